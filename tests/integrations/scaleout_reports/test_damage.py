"""What a disk damages is kept and told, and costs nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage import files
from storage.errors import TransferError
from storage.integrations.scaleout import journal
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    Gate,
    away,
    delivered,
    empty,
    fill,
    once,
    sender_to,
)


def open_spool(folder: Path, **options: Any) -> Spool:
    return Spool(folder, CLIENT, **{"segment_bytes": 800, **options})


def deliver(spool: Spool, store: Path) -> None:
    empty(sender_to(spool, store, most=3))


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


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


@pytest.mark.parametrize("is_looked_at", [False, True])
@pytest.mark.parametrize("streams", ["07", "70"])
def test_what_comes_after_a_first_record_that_a_power_cut_took_is_kept_and_in_order(
    streams: str, is_looked_at: bool, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two segments begin with the same number; chance says which of their names is first."""
    names, boots = iter(f"{streams}1"), iter(range(4))
    chance = SimpleNamespace(token_hex=lambda _: next(names) * 16)
    monkeypatch.setattr("storage.integrations.scaleout.spool.secrets", chance)

    def boot() -> Spool:
        here = f"boot {next(boots)}"
        monkeypatch.setattr(files, "boot_id", lambda: here)
        return open_spool(folder)

    spool = boot()
    fill(spool, 0)
    spool.close()
    (path,) = segments(folder)
    header, record = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + record[:20])
    spool = boot()
    if is_looked_at:
        deliver(spool, store)
    fill(spool, 1, 2, 3)
    spool.close()
    spool = boot()
    assert (spool.last, spool.pending) == (3, 3)
    fill(spool, 4)
    deliver(spool, store)
    assert delivered(store) == once(1, 2, 3, 4)
    found = [record.report.payload["value"] for record in Reports(store).records()]
    assert found == [1, 2, 3, 4]
    spool.close()


def test_what_is_passed_over_after_a_lost_mark_keeps_its_numbers(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = open_spool(folder)
    fill(spool, *range(15))
    deliver(spool, store)
    spool.close()
    (folder / "mark").unlink()
    monkeypatch.setattr(files, "boot_id", lambda: "another boot")
    spool = open_spool(folder)
    deliver(spool, store)
    spool.close()
    spool = open_spool(folder)
    assert spool.last == 15
    fill(spool, 15)
    spool.close()
    spool = open_spool(folder)
    assert spool.pending == 1
    deliver(spool, store)
    assert delivered(store) == once(*range(16))


@pytest.mark.parametrize("streams", ["07", "70"])
def test_what_comes_after_a_newest_segment_without_a_header_has_other_numbers(
    streams: str, folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(f"{streams}1")
    chance = SimpleNamespace(token_hex=lambda _: next(names) * 16)
    monkeypatch.setattr("storage.integrations.scaleout.spool.secrets", chance)
    spool = open_spool(folder)
    fill(spool, 0)
    spool.close()
    (path,) = segments(folder)
    path.write_bytes(b"\0" * 100 + b"\n")
    spool = open_spool(folder)
    fill(spool, 1, 2, 3)
    spool.close()
    spool = open_spool(folder)
    assert (spool.last, spool.pending) == (4, 4)
    deliver(spool, store)
    assert delivered(store) == once(1, 2, 3)
    assert spool.damaged == 1


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


@pytest.mark.parametrize("was_delivered", [True, False])
@pytest.mark.parametrize("damaged", [(2,), (1, 2, 3)], ids=["one", "all"])
def test_damage_between_two_tries_delivers_nothing_twice(
    damaged: tuple[int, ...], was_delivered: bool, spool: Spool, store: Path, gate: Gate
) -> None:
    gate.is_applied = was_delivered
    gate.error = away
    sender = sender_to(spool, store, client=gate.client())
    fill(spool, 1, 2, 3)
    with pytest.raises(TransferError):
        sender._step()
    (path,) = (Path(spool.folder) / "segments").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    for at in damaged:
        lines[at] = b"f" + lines[at][1:-5] + b"0000\n"
    path.write_bytes(b"".join(lines))
    gate.error = lambda key: None
    fill(spool, 4)
    empty(sender)
    left = {1, 2, 3} if was_delivered else {1, 2, 3} - set(damaged)
    assert delivered(store) == once(*left, 4)
    assert spool.damaged == len(damaged)
