"""Killed at any moment, a download leaves nothing or everything, and no trace after the next.

The signal comes from inside the process, at a chosen step of the transfer or after a chosen
time. ``STORAGE_SOAK=1`` makes ten times as many rounds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import SeaweedFS, small_disk
from tests.transfer.nursery import Nursery, Order, Outcome
from tests.transfer.support import KIB, everything_in, files_of

SOAK = bool(os.environ.get("STORAGE_SOAK"))
# For each of seven kinds of destinations.
ROUNDS = 80 if SOAK else 8

_bytes = random.Random(7).randbytes
# The large file is of several ranges, and of one size in both versions: only its content tells
# them apart.
OLD = {
    "config.json": b'{"version": 1}',
    "gone/a.bin": _bytes(3000),
    "gone/deeper/b.bin": _bytes(10),
    "sub/both.bin": _bytes(5000),
    "weights.bin": _bytes(300 * KIB),
}
NEW = {
    "added/c.bin": _bytes(2000),
    "config.json": b'{"version": 2}',
    "sub/both.bin": _bytes(6000),
    "sub/empty": b"",
    "weights.bin": _bytes(300 * KIB),
}


@dataclass(frozen=True)
class Case:
    """A kind of destination."""

    name: str
    tree: bool = True
    old: bool = False
    """Whether an older version is there."""

    mounted: bool = False
    exchange: bool = True

    @property
    def before(self) -> str:
        """What the destination is like without the new version."""
        if self.old:
            return "old"
        return "empty" if self.mounted else "absent"

    def allows(self, state: str, place: Path) -> bool:
        """Tell whether the destination may be in ``state`` after a download was killed."""
        if state in (self.before, "new"):
            return True
        if self.old and self.tree and not self.exchange:
            return state == "absent"
        return self.mounted and any(place.glob("*/.storage.*.partial/moving"))


CASES = {
    case.name: case
    for case in (
        Case("tree"),
        Case("tree-replacing", old=True),
        Case("tree-replacing-without-exchange", old=True, exchange=False),
        Case("file", tree=False),
        Case("file-replacing", tree=False, old=True),
        Case("mount", mounted=True),
        Case("mount-replacing", mounted=True, old=True),
    )
}


class Place:
    """A folder with the destination in it, and what is downloaded to there."""

    def __init__(
        self, case: Case, dest: Path, nursery: Nursery, uri: str, config: dict[str, str]
    ) -> None:
        self.case = case
        self.folder = dest.parent
        self.dest = dest
        self._nursery = nursery
        self._uri = uri
        self._config = config

    def reset(self) -> None:
        """Bring back what was there before the download."""
        # A mount point stays; only what it holds can be removed.
        for path in list((self.dest if self.case.mounted else self.folder).iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if self.case.old:
            self.succeed("old")
        (self.folder / "neighbour").write_bytes(b"mine")
        assert self.state() == self.case.before

    def order(self, version: str = "new", **more: object) -> Order:
        tail = "" if self.case.tree else "/weights.bin"
        return Order(
            f"{self._uri}/{version}{tail}",
            str(self.dest),
            self._config,
            exchange=self.case.exchange,
            **more,  # type: ignore[arg-type]
        )

    def download(self, version: str = "new", **more: object) -> Outcome:
        return self._nursery.run(self.order(version, **more))[0]

    def race(self, *versions: str) -> list[Outcome]:
        return self._nursery.run(*(self.order(version) for version in versions))

    def state(self) -> str:
        """Say what the destination is now."""
        if not os.path.lexists(self.dest):
            return "absent"
        if not self.case.tree:
            found = {"weights.bin": self.dest.read_bytes()}
        else:
            found = {
                name: data for name, data in files_of(self.dest).items() if ".partial/" not in name
            }
        for name, files in (("old", OLD), ("new", NEW)):
            if found == (files if self.case.tree else {"weights.bin": files["weights.bin"]}):
                return name
        return "mixed" if found else "empty"

    def succeed(self, version: str = "new") -> Outcome:
        """Download without interruption, and check that nothing else is there afterwards."""
        outcome = self.download(version)
        assert (outcome.signal, outcome.error, outcome.message) == (None, None, None)
        assert outcome.result == str(self.dest)
        assert self.state() == version
        self.check_no_trace(version)
        return outcome

    def check_no_trace(self, version: str) -> None:
        expected = {self.dest.name}
        for name in (OLD if version == "old" else NEW) if self.case.tree else ():
            path = Path(self.dest.name, name)
            expected |= {path.as_posix(), *(above.as_posix() for above in path.parents)} - {"."}
        assert set(everything_in(self.folder)) - {"neighbour"} == expected

    def check_after_kill(self, where: str) -> None:
        state = self.state()
        assert self.case.allows(state, self.folder), f"killed {where}: the destination is {state}"


@pytest.fixture(scope="module")
def source(seaweedfs: SeaweedFS, shared_bucket: str) -> str:
    """The URI that both versions of the model are below."""
    for version, files in (("old", OLD), ("new", NEW)):
        for name, data in files.items():
            seaweedfs.put_raw(shared_bucket, f"kill/{version}/{name}", data)
    return f"s3://{shared_bucket}/kill"


@pytest.fixture
def config(seaweedfs: SeaweedFS) -> dict[str, str]:
    return {
        "access_key_id": seaweedfs.access_key,
        "secret_access_key": seaweedfs.secret_key,
        "endpoint_url": seaweedfs.endpoint,
    }


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    nursery: Nursery,
    source: str,
    config: dict[str, str],
) -> Iterator[Place]:
    case = CASES[request.param]
    folder = tmp_path / "place"
    folder.mkdir()
    if not case.mounted:
        yield Place(case, folder / "model", nursery, source, config)
        return
    with small_disk(folder) as disk:
        yield Place(case, disk, nursery, source, config)


everywhere = pytest.mark.parametrize("place", CASES, indirect=True)


@everywhere
def test_killed_at_any_moment_leaves_nothing_or_everything(place: Place) -> None:
    place.reset()
    whole = place.succeed()
    rng = random.Random(place.case.name)
    chosen = killed = 0
    for number in range(ROUNDS):
        place.reset()
        if number % 3:
            # Evenly over all steps, so that none is left out.
            tick = 1 + (number * len(whole.ticks) + rng.randrange(len(whole.ticks))) // ROUNDS
            outcome, where = place.download(tick=tick), f"at tick {tick}"
            chosen += 1
            killed += outcome.signal == signal.SIGKILL
            # The number of steps varies a little: who lives on had less of them.
            assert outcome.signal is not None or len(outcome.ticks) < tick, where
        else:
            delay = rng.uniform(0, whole.seconds)
            outcome, where = place.download(delay=delay), f"after {delay} s"
        assert outcome.error is None, (where, outcome)
        place.check_after_kill(where)
        if number % 2:
            # Killed again: while it removes or repairs what the first one left.
            tick = rng.randrange(1, len(whole.ticks))
            again = place.download(tick=tick)
            assert again.error is None, (where, tick, again)
            place.check_after_kill(f"{where}, then at tick {tick}")
        place.succeed()
    # The last step may come before the chosen one; most must be what they claim. After a chosen
    # time all may be over, for how long it takes is the machine's affair.
    assert killed > chosen * 0.5


NAMED_POINTS = [
    ("tree", "after mkdir", 1, "absent"),
    ("tree", "after truncate", 1, "absent"),
    ("tree", "after pwrite", 4, "absent"),
    ("tree", "progress", 6, "absent"),
    ("tree", "before setxattr", 1, "absent"),
    ("tree", "before rename", 1, "absent"),
    ("tree", "after rename", 1, "new"),
    ("tree", "before rmdir", 1, "new"),
    ("tree-replacing", "before setxattr", 1, "old"),
    ("tree-replacing", "before exchange", 1, "old"),
    ("tree-replacing", "after exchange", 1, "new"),
    ("tree-replacing", "after unlink", 2, "new"),
    ("tree-replacing", "after rmdir", 1, "new"),
    ("tree-replacing-without-exchange", "after rename", 1, "absent"),
    ("tree-replacing-without-exchange", "after rename", 2, "new"),
    ("file", "before replace", 1, "absent"),
    ("file", "after replace", 1, "new"),
    ("file-replacing", "before replace", 1, "old"),
    ("file-replacing", "after replace", 1, "new"),
    ("mount", "before dump", 1, "empty"),
    ("mount", "after rename", 2, "mixed"),
    ("mount", "after setxattr", 1, "new"),
    ("mount-replacing", "before dump", 1, "old"),
    ("mount-replacing", "before rename", 1, "old"),
    ("mount-replacing", "after rename", 2, "mixed"),
    ("mount-replacing", "after rename", 6, "mixed"),
    ("mount-replacing", "after setxattr", 1, "new"),
    ("mount-replacing", "after unlink", 1, "new"),
    ("mount-replacing", "after unlink", 3, "new"),
]


@pytest.mark.parametrize(
    ("place", "point", "nth", "state"),
    NAMED_POINTS,
    indirect=["place"],
    ids=[f"{case}-{point}-{nth}".replace(" ", "-") for case, point, nth, _ in NAMED_POINTS],
)
def test_killed_at_a_named_point(place: Place, point: str, nth: int, state: str) -> None:
    place.reset()
    outcome = place.download(point=point, tick=nth)
    assert outcome.signal == signal.SIGKILL
    assert place.state() == state
    place.check_after_kill(point)
    place.succeed()


@pytest.mark.parametrize("place", ["mount-replacing"], indirect=True)
def test_a_tree_that_was_half_in_place_is_whole_again_even_if_the_next_download_fails(
    place: Place,
) -> None:
    place.reset()
    assert place.download(point="after rename", tick=6).signal == signal.SIGKILL
    assert place.state() == "mixed"
    outcome = place.download(options={"digest": "sha256:" + "0" * 64})
    assert outcome.error == "IntegrityError"
    assert place.state() == "new"
    place.check_no_trace("new")


@everywhere
def test_an_interrupt_at_any_moment_before_publishing_leaves_nothing_new(place: Place) -> None:
    place.reset()
    whole = place.succeed()
    last = max(
        whole.ticks.index(f"before {name}")
        for name in ("setxattr", "replace", "dump")
        if f"before {name}" in whole.ticks
    )
    for tick in range(1, last + 1, 1 if SOAK else 4):
        place.reset()
        before = everything_in(place.folder)
        outcome = place.download(tick=tick, signal=signal.SIGINT)
        where = f"interrupted at tick {tick}, {whole.ticks[tick - 1]}"
        if outcome.error is None:
            # The order of the steps varies; this one was past the last of them.
            assert place.state() == "new", where
            continue
        assert outcome.error == "KeyboardInterrupt", (where, outcome)
        assert place.state() in (place.case.before, "new"), where
        if place.state() != "new":
            assert everything_in(place.folder) == before, where


@everywhere
def test_two_processes_with_one_destination_end_with_one_whole_tree(place: Place) -> None:
    for number in range(ROUNDS // 2):
        place.reset()
        outcomes = place.race("old", "new") if number % 2 else place.race("new", "old")
        if place.case.exchange:
            assert [(outcome.error, outcome.message) for outcome in outcomes] == [(None, None)] * 2
        state = place.state()
        assert state in ("old", "new")
        place.check_no_trace(state)


@pytest.mark.parametrize("place", ["tree-replacing", "mount-replacing"], indirect=True)
def test_a_download_does_not_touch_one_that_is_alive(place: Place) -> None:
    """Both are under way at once; the slower one is not taken for dead."""
    for _ in range(3):
        place.reset()
        outcomes = place.race("new", "new", "new")
        assert [outcome.error for outcome in outcomes] == [None] * 3
        assert place.state() == "new"
        place.check_no_trace("new")


def test_the_record_of_moves_names_what_moves(
    tmp_path: Path, nursery: Nursery, source: str, config: dict[str, str]
) -> None:
    """The window in which a mount point is neither old nor new is told by a file."""
    with small_disk(tmp_path) as disk:
        order = Order(f"{source}/new", str(disk), config, point="after rename", tick=1)
        assert nursery.run(order)[0].signal == signal.SIGKILL
        (record,) = disk.glob(".storage.*.partial/moving")
        moves = json.loads(record.read_text())
        assert moves["old"] == []
        assert sorted(moves["new"]) == ["added", "config.json", "sub", "weights.bin"]
