"""A spool loses nothing that it took, whatever ends the process, fills the disk or damages it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import files
from storage.errors import (
    ConfigurationError,
    DestinationError,
    InsufficientSpaceError,
    IntegrityError,
    InvalidInput,
)
from storage.integrations.scaleout import journal, records
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.records import Record
from storage.integrations.scaleout.spool import Spool
from tests.cache.processes import forked
from tests.integrations.spooling import (
    CLIENT,
    Nursery,
    Order,
    delivered,
    empty,
    observation,
    sender_to,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def open_spool(folder: Path, **options: Any) -> Spool:
    return Spool(folder, CLIENT, **{"segment_bytes": 800, **options})


def fill(spool: Spool, *numbers: int, size: int = 0) -> None:
    for number in numbers:
        spool.append(observation(number, size))


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


def once(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


# -- what is reported ------------------------------------------------------------------------


def test_a_record_says_what_the_client_said_and_when() -> None:
    before = datetime.now(UTC)
    said = records.metric({"loss": 0.5}, model_id="m", step=7, round_id="2", session_id="s")
    document = {"number": 3, **said.document()}
    found = Record.parse(document, CLIENT, "f00d", "here")
    assert found == Record(CLIENT, "f00d", 3, said)
    assert found.id == "f00d-3"
    assert abs((found.report.time - before).total_seconds()) < 5
    assert found.report.kind == "metric"
    assert found.as_dict()["step"] == 7
    assert found.as_dict()["payload"] == {"loss": 0.5}


def test_what_a_later_release_adds_to_a_record_is_left_alone() -> None:
    document = {"number": 1, **records.report("dance", {"a": [1]}).document(), "hue": "blue"}
    assert Record.parse(document, CLIENT, "f00d", "here").report.kind == "dance"


@pytest.mark.parametrize("change", [{"number": 0}, {"time": "now"}, {"payload": 1}, {"step": "1"}])
def test_a_record_that_makes_no_sense_is_damaged(change: dict[str, object]) -> None:
    document: dict[str, Any] = {"number": 1, **records.report("dance", {}).document(), **change}
    with pytest.raises(IntegrityError, match="here"):
        Record.parse(document, CLIENT, "f00d", "here")


def test_numbers_that_are_not_finite_are_kept() -> None:
    said = records.metric({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    assert said.payload == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    values = [records.numeric(value) for value in said.payload.values()]
    assert math.isnan(values[0] or 0)
    assert values[1:] == [math.inf, -math.inf, 1.0]
    assert records.numeric("a text") is None
    assert records.numeric(True) is None


def test_scalars_and_arrays_of_numpy_become_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    payload: Any = {"a": numpy.float32(0.5), "b": numpy.arange(3), 4: (1, None)}
    said = records.telemetry("t", payload)
    assert said.payload == {"a": 0.5, "b": [0, 1, 2], "4": [1, None]}
    assert records.metric({"a": numpy.int64(3)}).payload == {"a": 3.0}


def test_an_attribute_that_is_no_dict_becomes_one() -> None:
    assert records.attribute("os", "linux").payload == {"value": "linux"}
    assert records.attribute("os", {"name": "linux"}).payload == {"name": "linux"}


_LOOP: dict[str, Any] = {}
_LOOP["self"] = _LOOP


@pytest.mark.parametrize(
    "payload",
    [{"a": object()}, {"a": b"bytes"}, {"a": {1, 2}}, {("a",): 1}, {"a": "\ud800"}, _LOOP, [1]],
    ids=["object", "bytes", "set", "name", "surrogate", "loop", "list"],
)
def test_what_json_cannot_say_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidInput):
        records.report("dance", payload)


@pytest.mark.parametrize("metrics", [{"a": "high"}, {"a": None}, {"a": [1]}, [1]])
def test_a_metric_that_is_no_number_is_refused(metrics: Any) -> None:
    with pytest.raises(InvalidInput, match="numbers under names"):
        records.metric(metrics)


def test_a_report_does_not_change_with_what_it_was_made_of() -> None:
    payload = {"a": [1]}
    said = records.report("dance", payload)
    payload["a"].append(2)
    assert said.payload == {"a": [1]}


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


# -- kills -----------------------------------------------------------------------------------


def acknowledged(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def check_log(log: Path, found: dict[int, int], kills: int) -> None:
    """Each record that was taken is there once; of others, one that a kill cut off."""
    taken = acknowledged(log)
    assert found == dict.fromkeys(found, 1)
    assert found.keys() >= set(taken)
    assert len(found.keys() - set(taken)) <= kills


@pytest.mark.slow
@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_killed_at_any_point_it_delivers_each_record_once(
    durable: bool, tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync", lambda path: None)
    tick, status, kills = 0, -signal.SIGKILL, 0
    while status:
        # Every point of the one, every seventh of the other.
        tick += 7 if durable else 1
        place = tmp_path / str(tick)
        place.mkdir()
        order = Order(
            str(place / "spool"),
            str(place / "store"),
            str(place / "log"),
            count=6,
            tick=tick,
            segment_bytes=400,
            durable=durable,
        )
        status = nursery.run(order)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        spool = Spool(place / "spool", CLIENT)
        fill(spool, 100)
        empty(sender_to(spool, place / "store", most=5))
        assert (spool.pending, spool.damaged) == (0, 0)
        spool.close()
        found = delivered(place / "store")
        assert found.pop(100) == 1
        check_log(place / "log", found, 1)
    assert kills > (20 if durable else 60)


def test_killed_again_and_again_it_delivers_each_record_once(
    tmp_path: Path, nursery: Nursery
) -> None:
    kills = 0
    for turn in range(25):
        order = Order(
            str(tmp_path / "spool"),
            str(tmp_path / "store"),
            str(tmp_path / "log"),
            first=turn * 12,
            tick=(turn * 37) % 101 + 1,
            segment_bytes=500,
            # Only what was fixed keeps its limits.
            most=2 + turn % 4,
        )
        kills += nursery.run(order) != 0
    assert kills > 15
    spool = Spool(tmp_path / "spool", CLIENT)
    deliver(spool, tmp_path / "store")
    check_log(tmp_path / "log", delivered(tmp_path / "store"), kills)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_record_that_was_cut_off_costs_no_other(
    cut: int, folder: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool(folder, segment_bytes=10_000)
    fill(spool, 1, 2)
    spool.close()
    (path,) = segments(folder)
    line = path.read_bytes().splitlines(keepends=True)[-1]
    with open(path, "ab") as file:
        file.write(line[: cut * len(line) // 8])
    spool = open_spool(folder)
    assert "cut off midway" in caplog.text
    fill(spool, 3)
    deliver(spool, store)
    assert delivered(store) == once(1, 2, 3)
    assert spool.damaged == 0


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
    fill_up(spool, observation)
    assert 7000 < spool.used <= 7500
    with pytest.raises(InsufficientSpaceError, match="of 7500 bytes for a telemetry"):
        spool.append(observation(0))
    # What is told of the training fits still.
    assert fill_up(spool, records.status)
    assert 9500 < spool.used <= 10_000
    with pytest.raises(InsufficientSpaceError, match="of 10000 bytes for a status"):
        spool.append(records.status(0))
    everything = Outgoing(spool).next(10**6)
    assert everything is not None
    sender = sender_to(spool, store)
    empty(sender)
    spool.append(observation(0))
    assert spool.pending == 1


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


# -- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 9, 40, -1])
def test_a_damaged_record_is_kept_and_told_and_costs_no_other_but_its_neighbour(
    at: int, folder: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool(folder, segment_bytes=10_000)
    fill(spool, 1, 2, 3, 4)
    spool.close()
    (path,) = segments(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[at] ^= 1
    lines[2] = bytes(damaged)
    path.write_bytes(b"".join(lines))
    spool = open_spool(folder)
    deliver(spool, store)
    fill(spool, 5)
    deliver(spool, store)
    # Without its line feed, it and the next one are one line.
    lost = {2, 3} if at == -1 else {2}
    assert delivered(store) == once(*({1, 2, 3, 4, 5} - lost))
    assert spool.damaged == 1
    assert "is damaged and cannot be delivered" in caplog.text
    (kept,) = (folder / "damaged").iterdir()
    assert bytes(damaged) in kept.read_bytes()
    spool.close()
    assert open_spool(folder).damaged == 1


def test_damage_does_not_stop_the_delivery_on_a_full_disk(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool(folder)
    fill(spool, *range(8))
    first, *_ = segments(folder)
    text = first.read_bytes()
    first.write_bytes(text.replace(b'"value":0', b'"value":9'))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "write_file", fail)
    deliver(spool, store)
    assert delivered(store) == once(*range(1, 8))
    assert (folder / "damaged" / first.name).read_bytes().count(b'"value":9') == 1
    assert "is damaged and cannot be delivered" in caplog.text
    assert spool.damaged == 1


def test_what_a_killed_process_did_not_finish_is_removed(folder: Path) -> None:
    open_spool(folder).close()
    for unfinished in (folder / "mark.new", folder / "aside" / "a@b.json.new"):
        unfinished.write_bytes(b"half")
    open_spool(folder).close()
    assert not list(folder.rglob("*.new"))


def test_a_segment_without_a_header_is_kept_and_told(
    folder: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool(folder)
    fill(spool, *range(12))
    spool.close()
    first, *_ = segments(folder)
    text = first.read_bytes()
    first.write_bytes(b"\0" + text[1:])
    spool = open_spool(folder)
    deliver(spool, store)
    in_first = text.count(b"\n") - 1
    assert delivered(store) == once(*range(in_first, 12))
    assert (folder / "damaged" / first.name).read_bytes() == b"\0" + text[1:]
    assert "a file is damaged" in caplog.text
    assert (spool.damaged, spool.pending) == (1, 0)


def test_a_newest_segment_without_a_header_does_not_stop_the_spool(
    folder: Path, store: Path
) -> None:
    spool = open_spool(folder)
    fill(spool, 1)
    (path,) = segments(folder)
    with open(path, "r+b") as file:
        file.write(b"\0")
    # It is read while it is still added to.
    deliver(spool, store)
    fill(spool, 2)
    deliver(spool, store)
    assert delivered(store) == once(2)
    assert spool.damaged == 1


def test_a_segment_that_somebody_removed_is_told(
    folder: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_spool(folder)
    fill(spool, *range(12))
    first, *others = segments(folder)
    gone = first.read_bytes().count(b"\n") - 1
    first.unlink()
    others[-1].unlink()
    fill(spool, 12)
    deliver(spool, store)
    assert caplog.text.count("was removed by somebody") == 3
    assert 12 in delivered(store)
    assert min(delivered(store)) == gone
    assert spool.pending == 0


@pytest.mark.parametrize("slots", [(0,), (1,), (0, 1), None], ids=["one", "two", "both", "gone"])
def test_a_damaged_mark_delivers_nothing_twice(
    slots: tuple[int, ...] | None, folder: Path, store: Path
) -> None:
    spool = open_spool(folder)
    fill(spool, *range(15))
    sender = sender_to(spool, store, most=2)
    for _ in range(3):
        sender._step()
    spool.close()
    mark = folder / "mark"
    if slots is None:
        mark.unlink()
    else:
        data = bytearray(mark.read_bytes())
        for slot in slots:
            data[512 * slot + 20] ^= 1
        mark.write_bytes(data)
    for most in (3, 5):
        # Stopped midway, the next program is as careful.
        spool = open_spool(folder)
        sender = sender_to(spool, store, most=most)
        sender._step()
        spool.close()
    spool = open_spool(folder)
    fill(spool, 15)
    deliver(spool, store)
    assert delivered(store) == once(*range(16))
    spool.close()
    spool = open_spool(folder)
    assert not Outgoing(spool).is_doubtful


def test_a_batch_is_the_same_whoever_sends_it(folder: Path) -> None:
    spool = open_spool(folder, segment_bytes=10_000)
    fill(spool, 1, 2, 3)
    first = Outgoing(spool).next(10)
    fill(spool, 4)
    assert Outgoing(spool).next(10) == first
    spool.close()
    spool = open_spool(folder)
    fill(spool, 5)
    assert first is not None
    assert Outgoing(spool).next(10) == Outgoing(spool).next(1) == first
    assert first.records == 3
