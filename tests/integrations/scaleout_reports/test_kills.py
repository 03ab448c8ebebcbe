"""A process that is killed at any moment has lost nothing that its spool took."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from storage import files
from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    Nursery,
    Order,
    acknowledged,
    delivered,
    empty,
    fill,
    once,
    sender_to,
)


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
    empty(sender_to(spool, tmp_path / "store"))
    check_log(tmp_path / "log", delivered(tmp_path / "store"), kills)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_record_that_was_cut_off_costs_no_other(
    cut: int, folder: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(folder, CLIENT, segment_bytes=10_000)
    fill(spool, 1, 2)
    spool.close()
    (path,) = (folder / "segments").iterdir()
    line = path.read_bytes().splitlines(keepends=True)[-1]
    with open(path, "ab") as file:
        file.write(line[: cut * len(line) // 8])
    spool = Spool(folder, CLIENT)
    assert "cut off midway" in caplog.text
    fill(spool, 3)
    empty(sender_to(spool, store))
    assert delivered(store) == once(1, 2, 3)
    assert spool.damaged == 0
