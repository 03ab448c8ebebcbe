"""A store that asks to wait is asked again when it said, and not before.

Drivers that see the headers of an answer pass on what they say. obstore shows none: for it the
least wait after an answer of the kind "slow down" is what makes ``Retry-After: 2`` true, and
what lets it come back, not too soon, to a store that asked for an hour.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

import pytest

from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import TransferError
from storage.testing.fault_script import Fault, Request
from storage.transfer import events
from tests.faults.stores import SITES, make_site
from tests.transfer.support import assert_clear

DATA = b"x" * 100_000


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, events.LOGGER)


def check_wait(caplog: pytest.LogCaptureFixture, name: str, gap: float) -> None:
    """Check the wait before the second of two requests for ``name``, ``gap`` seconds apart."""
    # The contract, by the store's clock.
    assert gap >= 2, name
    # It is not another wait, which would be longer. What the client means to wait says so, for a
    # busy machine comes back later.
    waits = [
        vars(record)["storage_delay"]
        for record in caplog.records
        if vars(record).get("storage_event") == "attempt.failed"
        and name in vars(record)["storage_uri"]
    ]
    assert len(waits) == 1, (name, waits)
    assert waits[0] < 5, name


def client() -> StorageClient:
    """Return a client with the waits that users have."""
    return StorageClient(settings=load_settings(transfer={"connections": 8}))


class Once:
    """Lets the first request for each of some objects meet a fault of its own, made then."""

    def __init__(
        self, faults: dict[str, Callable[[], Fault]], only: Callable[[Request], bool]
    ) -> None:
        self._left = dict(faults)
        self._only = only
        self.asked: dict[str, list[float]] = {name: [] for name in faults}

    def __call__(self, request: Request) -> Fault | None:
        if not self._only(request):
            return None
        for name, times in self.asked.items():
            if name in unquote(request.target):
                times.append(time.monotonic())
                make = self._left.pop(name, None)
                return make() if make else None
        return None

    def gap(self, name: str) -> float:
        """Return the seconds between the first two requests for ``name``."""
        first, second = self.asked[name][:2]
        return second - first


def limited() -> Fault:
    return Fault("status", status=429, retry_after=2)


def busy() -> Fault:
    return Fault("status", status=503, retry_after=2)


def dated() -> Fault:
    # A date has whole seconds, so this one is between 2 and 3 of them away when it is sent.
    date = formatdate(time.time() + 3, usegmt=True)
    return Fault("status", status=503, retry_after=date)


@pytest.mark.parametrize("name", SITES)
def test_a_download_waits_as_long_as_the_store_says(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    site = make_site(request, name, "down")
    faults = {"limited.bin": limited, "busy.bin": busy, "dated.bin": dated}
    script = Once(faults, site.reads_object)
    with site.place(script) as place, client() as downloader:
        place.put_all(dict.fromkeys(script.asked, DATA))
        downloader.download_many(
            [place.uri(one) for one in script.asked],
            [tmp_path / one for one in script.asked],
            config=place.config,
        )
    for one in script.asked:
        assert (tmp_path / one).read_bytes() == DATA
        check_wait(caplog, one, script.gap(one))


@pytest.mark.parametrize("name", SITES)
def test_an_upload_waits_as_long_as_the_store_says(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    site = make_site(request, name, "up")
    # On the Hub all is one step, and its last request is the one that counts.
    asked = "/commit/" if name == "hf" else "limited.bin"
    script = Once({asked: limited}, lambda one: one.method in ("PUT", "POST"))
    (tmp_path / "limited.bin").write_bytes(DATA)
    with site.place(script) as place, client() as uploader:
        uploader.upload(tmp_path / "limited.bin", place.uri("limited.bin"), config=place.config)
        assert place.get_raw("limited.bin") == DATA
    check_wait(caplog, "limited.bin", script.gap(asked))


@pytest.mark.parametrize("name", SITES)
def test_a_store_that_asks_for_an_hour_is_not_waited_for(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    site = make_site(request, name, "down")
    fault = Fault("status", status=503, retry_after=3600)
    script = Once({"hour.bin": lambda: fault}, site.reads_object)
    target = tmp_path / "hour.bin"
    with site.place(script) as place, client() as downloader:
        place.put_raw("hour.bin", DATA)
        uri = place.uri("hour.bin")
        if name.endswith("obstore"):
            downloader.download(uri, target, config=place.config)
            check_wait(caplog, "hour.bin", script.gap("hour.bin"))
            return
        reason = "tried once; the store asks to wait 3600 s, more than the 300 s allowed"
        with pytest.raises(TransferError, match=reason) as caught:
            downloader.download(uri, target, config=place.config)
    assert_clear(caught.value)
    assert len(script.asked["hour.bin"]) == 1
    assert not target.exists()
