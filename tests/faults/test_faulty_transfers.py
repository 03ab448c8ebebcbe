"""Seeded faulty transfers over every store: whole, or a clear error and nothing.

100 of them every day, 1,000 with ``STORAGE_SOAK=1``. A failure names the command that repeats
it. With ``STORAGE_FAULTS_LOG=<file>`` a line of JSON for each transfer is appended there, from
which ``python -m tests.faults.report`` makes the table in the documentation.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import TransferError
from storage.testing.fault_script import Fault, Request, Script
from tests.faults.harness import WRONG, run
from tests.faults.stores import SITES, Site, make_site

SOAK = os.environ.get("STORAGE_SOAK") == "1"
SEED = os.environ.get("STORAGE_FAULTS_SEED")
LOG = os.environ.get("STORAGE_FAULTS_LOG")
COUNT = 63 if SOAK else 7
# One in twenty has no request that its faults fit.
SPARE = 3 if SOAK else 0


def seeds_of(site: str, direction: str) -> list[int]:
    """Return the seeds of one test; every day each test takes others of them."""
    if SEED is not None:
        return [int(SEED)]
    cell, cells = 2 * SITES.index(site) + (direction == "up"), 2 * len(SITES)
    spare = range(cells * COUNT + cell * SPARE, cells * COUNT + (cell + 1) * SPARE)
    return [*range(cell * COUNT, (cell + 1) * COUNT), *spare]


@pytest.mark.timeout(3600 if SOAK else 300)
@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("name", SITES)
def test_a_faulty_transfer_ends_whole_or_with_an_error_and_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, direction: str
) -> None:
    site = make_site(request, name, direction)
    wrong = []
    for seed in seeds_of(name, direction):
        outcome = run(site, direction, seed, tmp_path / str(seed))
        if outcome.ended == WRONG:
            command = f"STORAGE_FAULTS_SEED={seed} pytest '{request.node.nodeid}'"
            wrong.append(f"{outcome}\n    {command}")
        if LOG is not None:
            with open(LOG, "a", encoding="utf-8") as log:
                log.write(outcome.line() + "\n")
    assert not wrong, f"{len(wrong)} are wrong:\n" + "\n".join(wrong)


# -- found by some of them -----------------------------------------------------------------


def small_upload(site: Site, script: Script, source: Path, **transfer: Any) -> None:
    settings = load_settings(transfer={"attempts": 2, "retry_wait": 0.01} | transfer)
    with site.place(script) as store, StorageClient(store.config, settings) as client:
        client.upload(source, store.uri("m"))
        assert store.get_raw("m") == source.read_bytes()


@pytest.mark.parametrize("name", ["s3-fsspec", "gcs-fsspec", "azure-fsspec"])
def test_an_empty_object_whose_upload_is_not_answered_is_sent_again(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """A client that waits for a "100 Continue" may wait for ever."""
    source = tmp_path / "empty"
    source.touch()
    stalled: list[Request] = []

    def stall_once(request: Request) -> Fault | None:
        if stalled or request.method not in ("PUT", "POST"):
            return None
        stalled.append(request)
        return Fault("stall_answer")

    site = make_site(request, name, "up")
    began = time.monotonic()
    # The machine may stand still for so long too, and each time that is a stall as well.
    small_upload(site, stall_once, source, stall_timeout=0.5, attempts=10)
    assert stalled
    # Less than the 30 seconds of who was not told what a stall is.
    assert time.monotonic() - began < 25


def test_a_page_instead_of_an_object_that_was_stored_is_no_success(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    source.write_bytes(b"weights")

    def page(request: Request) -> Fault | None:
        return Fault("error_body") if request.method == "PUT" else None

    with pytest.raises(TransferError, match="page"):
        small_upload(make_site(request, "http", "up"), page, source)
