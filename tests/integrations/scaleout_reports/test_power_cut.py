"""What a power cut takes from a spool: at most what was never forced to disk, and nothing twice.

The disk is played: it is noted what was forced to it (``fsync``), and a cut puts back that, or
any mixture of that and what was written since: names and contents of files each for themselves, as
file systems do that write in any order.
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from storage import files
from storage.errors import TransferError, TransientError
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    Gate,
    delivered,
    empty,
    observation,
    sender_to,
)

_SECTOR = 512


class Disk:
    """Knows what of a folder would be there after a power cut."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.names: dict[str, set[str]] = {}
        self.contents: dict[str, bytes] = {}
        self.boots = 0
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._sync)
        self._replace = os.replace
        patch.setattr(os, "replace", self._renamed)
        patch.setattr(files, "boot_id", lambda: f"boot {self.boots}")

    def _sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            self.names[path] = set(os.listdir(path))
        else:
            self.contents[path] = Path(path).read_bytes()

    def _renamed(self, source: str, target: str) -> None:
        self._replace(source, target)
        if source in self.contents:
            self.contents[target] = self.contents.pop(source)

    def cut(self, chance: random.Random) -> None:
        """Leave what a cut would, and boot again."""
        self.boots += 1
        for folder, _, found in list(os.walk(self.root)):
            kept = self.names.get(folder, set())
            for name in kept | set(found):
                path = os.path.join(folder, name)
                if os.path.isdir(path) or name == "lock":
                    continue
                is_there = (name in kept) if chance.random() < 0.5 else (name in found)
                self._put(Path(path), is_there, chance)
            self.names[folder] = set(os.listdir(folder))

    def _put(self, path: Path, is_there: bool, chance: random.Random) -> None:
        now = path.read_bytes() if path.exists() else None
        synced = self.contents.get(str(path))
        path.unlink(missing_ok=True)
        if not is_there:
            self.contents.pop(str(path), None)
            return
        left = synced if now is None else _mixed(synced or b"", now, chance)
        assert left is not None
        path.write_bytes(left)
        self.contents[str(path)] = left


def _mixed(synced: bytes, now: bytes, chance: random.Random) -> bytes:
    """Return a file of which each sector is as it was forced to disk, or as it is now."""
    short, long = sorted((len(synced), len(now)))
    size = chance.choice([len(synced), len(now), chance.randint(short, long)])
    found = bytearray(size)
    for start in range(0, size, _SECTOR):
        part = slice(start, min(start + _SECTOR, size))
        is_safe = synced[part] == now[part]
        is_new = is_safe or chance.random() < 0.5
        found[part] = (now if is_new else synced)[part].ljust(part.stop - start, b"\0")
    return bytes(found)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])
@pytest.mark.parametrize("seed", range(12))
def test_power_cuts_deliver_nothing_twice_and_cost_nothing_that_was_forced_to_disk(
    seed: int, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    gate = Gate()
    # The store is elsewhere, and keeps what it has.
    client, store = gate.client(), tmp_path / "store"
    taken: list[int] = []
    spool: Any = None
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        for turn in range(12):
            spool = Spool(tmp_path / "disk/spool", CLIENT, segment_bytes=900, durable=durable)
            sender = sender_to(spool, store, client=client, most=chance.randint(1, 4))
            for number in range(turn * 10, turn * 10 + chance.randint(1, 10)):
                spool.append(observation(number))
                taken.append(number)
                gate.error = _faults(chance)
                gate.is_applied = chance.random() < 0.7
                if chance.random() < 0.4:
                    with contextlib.suppress(TransferError):
                        sender._step()
            spool.close()
            disk.cut(chance)
        gate.error = lambda key: None
        spool = Spool(tmp_path / "disk/spool", CLIENT, durable=durable)
        empty(sender_to(spool, store, client=client))
        spool.close()
    found = delivered(store)
    # No number was given to two records, of which a reader would take one for the other.
    assert {record.report.payload["value"] for record in Reports(store).records()} == set(found)
    assert found == dict.fromkeys(found, 1)
    assert found.keys() <= set(taken)
    if durable:
        assert found.keys() == set(taken)


def _faults(chance: random.Random) -> Any:
    error = TransientError("nobody answers") if chance.random() < 0.4 else None
    return lambda key: error
