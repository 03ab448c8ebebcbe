"""A transfer that stands still ends, within the time in which nothing may come."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import StorageError, TransferError
from storage.testing.fault_script import Fault, Request
from storage.transfer import events
from tests.faults.stores import SITES, HubSite, Site, make_site
from tests.transfer.support import MIB, assert_clear, everything_in

STALL = 1.0
ATTEMPTS = 2
# Of a transfer that is to succeed: the machine may stand still for a moment too, and each time
# that is a stall as well.
MANY = 8
# For all that is not waiting: looks, plans, the waits between two tries, a busy machine. With it,
# each bound is less than the 30 seconds of who was not told what a stall is.
MARGIN = 20.0
SMALL, LARGE = 100_000, 9 * MIB


class Stalling:
    """Lets requests of one kind come to a stand."""

    def __init__(self, kind: str, limit: int, site: Site, only: str) -> None:
        self._fault = Fault(kind)
        self._limit = limit
        self._concerns = site.reads_object if only == "read" else self._writes
        self.site = site
        self.met = 0

    def _writes(self, request: Request) -> bool:
        # Google's JSON API takes an object by POST, and the Hub what is small.
        return (
            self.site.sends_object(request)
            or "/upload/storage/" in request.target
            or (self.site.name == "hf" and "/commit/" in request.target)
        )

    def __call__(self, request: Request) -> Fault | None:
        if self.met >= self._limit or not self._concerns(request):
            return None
        self.met += 1
        return self._fault


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[StorageClient]:
    limits = {
        "stall_timeout": STALL,
        "connect_timeout": 20,
        "attempts": getattr(request, "param", ATTEMPTS),
        "retry_wait": 0.05,
        "connections": 2,
        "part_size": "4MiB",
    }
    with StorageClient(settings=load_settings(transfer=limits)) as found:
        yield found


stubborn = pytest.mark.parametrize("client", [MANY], indirect=True, ids=[""])


@pytest.fixture(autouse=True)
def less_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # The Hub is given ten stall timeouts for a commit; two show as well that there is an end.
    monkeypatch.setattr("storage.backends.hf.session._PATIENCE", 2)
    monkeypatch.setattr(HubSite, "patience", 2)


def bound(site: Site, stalls: int) -> float:
    """Return the seconds in which a transfer with so many stalls, one by one, has to end."""
    return MARGIN + stalls * STALL * site.patience


@stubborn
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["stall", "stall_answer"])
@pytest.mark.parametrize("name", SITES)
def test_a_stalled_read_is_noticed_and_repeated(
    request: pytest.FixtureRequest,
    client: StorageClient,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    caplog.set_level(logging.INFO, events.LOGGER)
    site = make_site(request, name, "down")
    script = Stalling(kind, 1, site, "read")
    data = bytes(SMALL)
    with site.place(script) as place:
        place.put_raw("m.bin", data)
        began = time.monotonic()
        client.download(place.uri("m.bin"), tmp_path / "m.bin", config=place.config)
        took = time.monotonic() - began
    assert script.met == 1
    assert (tmp_path / "m.bin").read_bytes() == data
    assert STALL <= took < bound(site, 1)
    told = [getattr(record, "storage_event", "") for record in caplog.records]
    # Once for each stall, which lasts for so long.
    assert 1 <= told.count("attempt.stalled") <= took / STALL, told


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SITES)
def test_a_store_that_always_stalls_is_given_up(
    request: pytest.FixtureRequest, client: StorageClient, tmp_path: Path, name: str
) -> None:
    site = make_site(request, name, "down")
    # The body does not even begin: a byte of progress would refill the tries.
    script = Stalling("stall_answer", 99, site, "read")
    (tmp_path / "place").mkdir()
    with site.place(script) as place:
        place.put_raw("m.bin", bytes(SMALL))
        began = time.monotonic()
        with pytest.raises(TransferError, match=rf"tried {ATTEMPTS} times") as caught:
            client.download(place.uri("m.bin"), tmp_path / "place" / "m.bin", config=place.config)
        took = time.monotonic() - began
    assert_clear(caught.value)
    # No driver repeats it by itself; a try may end before its request has come.
    assert script.met <= ATTEMPTS
    assert took < bound(site, ATTEMPTS)
    assert everything_in(tmp_path / "place") == []


# What stalls on its way up by obstore goes there by the second driver then, whose API the shim
# for obstore's uploads does not have.
WRITTEN = [name for name in SITES if name != "gcs-obstore"]


@stubborn
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_stalled_write_is_noticed_and_repeated(
    request: pytest.FixtureRequest, client: StorageClient, tmp_path: Path, name: str
) -> None:
    site = make_site(request, name, "up")
    script = Stalling("stall_answer", 1, site, "write")
    # Buckets take the large one in parts.
    data = bytes(SMALL if name in ("hf", "http") else LARGE)
    (tmp_path / "m.bin").write_bytes(data)
    with site.place(script) as place:
        began = time.monotonic()
        client.upload(tmp_path / "m.bin", place.uri("m.bin"), config=place.config)
        took = time.monotonic() - began
        assert place.get_raw("m.bin") == data
    assert script.met == 1
    assert STALL <= took < bound(site, 1)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_store_that_takes_and_never_answers_is_given_up(
    request: pytest.FixtureRequest, client: StorageClient, tmp_path: Path, name: str
) -> None:
    site = make_site(request, name, "up")
    script = Stalling("stall_answer", 99, site, "write")
    (tmp_path / "m.bin").write_bytes(bytes(SMALL))
    with site.place(script) as place:
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            client.upload(tmp_path / "m.bin", place.uri("m.bin"), config=place.config)
        took = time.monotonic() - began
    assert_clear(caught.value)
    assert took < bound(site, ATTEMPTS)
