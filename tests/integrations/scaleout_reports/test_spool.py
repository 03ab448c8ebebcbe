"""A spool keeps what it took, says what it does not take, and has one owner."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import files
from storage.errors import (
    ConfigurationError,
    DestinationError,
    InsufficientSpaceError,
    InvalidInput,
)
from storage.integrations.scaleout import journal, records
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.spool import Spool
from tests.cache.processes import forked
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    Nursery,
    Order,
    acknowledged,
    delivered,
    empty,
    fill,
    observation,
    once,
    sender_to,
)


def open_spool(folder: Path, **options: Any) -> Spool:
    return Spool(folder, CLIENT, **{"segment_bytes": 800, **options})


def fill_up(spool: Spool, make: Callable[[int], records.Report]) -> list[int]:
    """Report until nothing fits any more, and return what was taken."""
    taken: list[int] = []
    with contextlib.suppress(InsufficientSpaceError):
        while spool.append(make(len(taken))):
            taken.append(len(taken))
    return taken


def deliver(spool: Spool, store: Path) -> None:
    empty(sender_to(spool, store, most=3))


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def _same(boot: str | None) -> str | None:
    return boot


# -- numbers ---------------------------------------------------------------------------------


def test_numbers_go_on_where_the_last_program_stopped(folder: Path, store: Path) -> None:
    spool = open_spool(folder)
    assert [spool.append(observation(number)) for number in range(3)] == [1, 2, 3]
    spool.close()
    spool = open_spool(folder)
    assert spool.pending == 3
    assert spool.append(observation(3)) == 4
    deliver(spool, store)
    assert (spool.pending, spool.delivered) == (0, 4)
    spool.close()
    spool = open_spool(folder)
    assert (spool.pending, spool.delivered, spool.last) == (0, 4, 4)
    assert delivered(store) == once(0, 1, 2, 3)


def test_numbers_go_on_when_all_files_are_removed(folder: Path, store: Path) -> None:
    spool = open_spool(folder)
    fill(spool, *range(20))
    deliver(spool, store)
    spool.close()
    for segment in segments(folder):
        segment.unlink()
    spool = open_spool(folder)
    assert spool.append(observation(20)) == 21
    deliver(spool, store)
    assert delivered(store) == once(*range(21))


def test_segments_that_are_delivered_are_removed(folder: Path, store: Path) -> None:
    spool = open_spool(folder)
    fill(spool, *range(40))
    assert len(segments(folder)) > 5
    used = spool.used
    deliver(spool, store)
    assert len(segments(folder)) == 1
    assert spool.used == segments(folder)[0].stat().st_size < used


def test_another_boot_begins_another_stream(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = set()
    for boot in ("one", "one", "two", None, None):
        monkeypatch.setattr(files, "boot_id", partial(_same, boot))
        spool = open_spool(folder)
        fill(spool, spool.last)
        streams.add(spool._stream)
        spool.close()
    assert len(streams) == 4
    spool = open_spool(folder)
    deliver(spool, store)
    assert delivered(store) == once(0, 1, 2, 3, 4)


def test_a_copy_of_a_spool_begins_another_stream(folder: Path, store: Path) -> None:
    spool = open_spool(folder)
    fill(spool, 1)
    spool.close()
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    for number, each in ((10, folder), (20, copy)):
        spool = open_spool(each)
        fill(spool, number)
        deliver(spool, store)
    found = delivered(store)
    # What was waiting in both is the same record, and what came after is not.
    assert found.keys() == {1, 10, 20}
    assert found[10] == found[20] == 1


def test_another_id_of_the_client_counts_from_then_on(folder: Path, store: Path) -> None:
    for number, client in enumerate(("old", "new")):
        spool = Spool(folder, client)
        fill(spool, number)
        spool.close()
    spool = Spool(folder, "new")
    deliver(spool, store)
    assert delivered(store) == once(0, 1)
    assert sorted(each.name for each in store.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("client", ["", "x" * 151, "/" * 60])
def test_an_id_that_is_no_name_is_refused(folder: Path, client: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 150 characters"):
        Spool(folder, client)


@pytest.mark.parametrize("client", [".", "..", "a b", "ä/ö", "%2E", "@", "x" * 150])
def test_any_other_id_has_a_folder_of_its_own(folder: Path, store: Path, client: str) -> None:
    from storage.integrations.scaleout.reports import Reports

    spool = Spool(folder, client)
    fill(spool, 1)
    deliver(spool, store)
    assert Reports(store).clients() == [client]
    assert [record.client for record in Reports(store).records(client)] == [client]


# -- who writes ------------------------------------------------------------------------------


def test_one_process_at_a_time_has_a_spool(folder: Path) -> None:
    spool = open_spool(folder)
    with pytest.raises(ConfigurationError, match=f"process {os.getpid()};"):
        open_spool(folder)
    spool.close()
    open_spool(folder).close()


_HOLD = """
import os, sys, time
from storage.integrations.scaleout.spool import Spool
spool = Spool(sys.argv[1], "edge/1")
holder = os.getpid()
# The child lives on, with what it inherited.
if sys.argv[2] == "plain" or not os.fork():
    print(holder, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_the_spool_of_a_dead_process_is_free(how: str, folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        holder = int(process.stdout.readline())
        with pytest.raises(ConfigurationError, match=f"process {holder};"):
            open_spool(folder)
        process.kill()
        process.wait()
        spool = open_spool(folder)
        fill(spool, 1)
        spool.close()
    finally:
        # What was forked lives in the same group, if there is any.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _is_told(spool: Spool) -> bool:
    with pytest.raises(DestinationError, match="the parent's"):
        spool.append(observation(2))
    return True


def test_a_forked_child_does_not_write_into_the_spool_of_its_parent(
    folder: Path, store: Path
) -> None:
    spool = open_spool(folder)
    fill(spool, 1)
    # As if another thread of the parent were in the middle of it.
    with spool.lock:
        assert forked(partial(_is_told, spool))
    fill(spool, 3)
    with pytest.raises(ConfigurationError):
        open_spool(folder)
    deliver(spool, store)
    assert delivered(store) == once(1, 3)


def test_a_closed_spool_says_so(folder: Path) -> None:
    spool = open_spool(folder)
    spool.close()
    spool.close()
    with pytest.raises(DestinationError, match="closed"):
        spool.append(observation(1))
    with pytest.raises(DestinationError, match="closed"):
        Outgoing(spool).next(10)


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DestinationError, match="cannot be opened"):
        open_spool(tmp_path / "file" / "spool")


# -- too much --------------------------------------------------------------------------------


def test_a_record_that_is_too_long_is_refused_before_it_is_written(folder: Path) -> None:
    spool = open_spool(folder, max_record=1000)
    fill(spool, 1)
    before = segments(folder)[0].read_bytes()
    with pytest.raises(InvalidInput, match="longer than the 1000"):
        fill(spool, 2, size=1000)
    assert segments(folder)[0].read_bytes() == before
    assert spool.append(observation(3)) == 2


def test_a_full_spool_says_so_and_telemetry_first(folder: Path, store: Path) -> None:
    spool = open_spool(folder, max_bytes=10_000)
    taken = fill_up(spool, observation)
    assert 7000 < spool.used <= 7500
    # The same again: one with a shorter number may fit.
    with pytest.raises(InsufficientSpaceError, match="of 7500 bytes for a telemetry"):
        spool.append(observation(len(taken)))
    # What is told of the training fits still.
    taken = fill_up(spool, records.status)
    assert taken
    assert 9500 < spool.used <= 10_000
    with pytest.raises(InsufficientSpaceError, match="of 10000 bytes for a status"):
        spool.append(records.status(len(taken)))
    everything = Outgoing(spool).next(10**6)
    assert everything is not None
    sender = sender_to(spool, store)
    empty(sender)
    spool.append(observation(0))
    assert spool.pending == 1


def test_the_limit_holds_for_headers_too(tmp_path: Path) -> None:
    # Wherever the last segment would begin.
    for limit in range(2000, 3000, 20):
        spool = open_spool(tmp_path / str(limit), max_bytes=limit)
        fill_up(spool, records.status)
        sizes = [path.stat().st_size for path in segments(tmp_path / str(limit))]
        assert limit - 500 < sum(sizes) == spool.used <= limit
        spool.close()


def test_nothing_is_lost_on_a_full_disk(full_disk: Path, store: Path) -> None:
    spool = Spool(full_disk / "spool", CLIENT, segment_bytes=200_000)
    taken = fill_up(spool, lambda number: observation(number, 50_000))
    with pytest.raises(InsufficientSpaceError, match="was not taken"):
        spool.append(observation(0, 50_000))
    # Not even a byte more fits, and the spool is delivered all the same.
    with open(full_disk / "rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
        while rest.write(bytes(4096)):
            pass
    assert os.statvfs(full_disk).f_bavail == 0
    deliver(spool, store)
    fill(spool, 1000)
    deliver(spool, store)
    assert delivered(store) == once(*taken, 1000)
    spool.close()


def test_nothing_is_lost_at_a_limit_of_the_size_of_files(tmp_path: Path, nursery: Nursery) -> None:
    order = Order(
        str(tmp_path / "spool"),
        str(tmp_path / "store"),
        str(tmp_path / "log"),
        count=40,
        file_size=2000,
        segment_bytes=10**6,
    )
    # A record reaches over the limit and is taken back; all later ones are refused as well.
    assert nursery.run(order) == 0
    taken = acknowledged(tmp_path / "log")
    assert 3 < len(taken) < 40
    assert delivered(tmp_path / "store") == once(*taken)


@pytest.mark.parametrize("can_be_taken_back", [True, False])
def test_a_report_of_which_a_part_was_written_costs_no_other(
    can_be_taken_back: bool, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(folder, segment_bytes=10_000)
    fill(spool, 1)
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: len(data) // 2])

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        if not can_be_taken_back:
            patch.setattr(os, "ftruncate", fail)
        with pytest.raises(InsufficientSpaceError):
            fill(spool, 2)
    fill(spool, 3)
    deliver(spool, store)
    assert delivered(store) == once(1, 3)
    assert spool.damaged == (0 if can_be_taken_back else 1)


def test_a_report_that_reaches_no_disk_is_not_taken(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(folder, durable=True)
    fill(spool, 1)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(DestinationError, match="not taken: Input/output error"):
            fill(spool, 2)
    fill(spool, 3)
    deliver(spool, store)
    assert delivered(store) == once(1, 3)


def test_to_take_a_report_costs_the_same_however_many_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(folder, segment_bytes=2000)
    fill(spool, *range(1000))
    assert len(segments(folder)) > 50

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("it was looked for")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(journal, "lines", refuse)
    fill(spool, *range(50))
