"""What a caller of `fetch` may ask for beside the bytes: each file at once, and more digests."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from storage.backends.base import Backend, Body, ByteRange, ObjectInfo, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.digest import Digest
from storage.errors import IntegrityError, ObjectChangedError, StorageError, TransientError
from storage.transfer.download import FetchedFile, fetch
from storage.transfer.engine import Budget
from storage.transfer.plan import Patterns, make_plan
from storage.transfer.progress import Meter
from storage.uri import parse_uri
from tests.transfer.faulty import Replacing, Script, reset_after
from tests.transfer.support import KIB, Wrapped, everything_in, memory_bucket, options

_bytes = random.Random(21).randbytes
PART = 64 * KIB
WHOLE, RANGED = "a-whole.bin", "b/ranged.bin"
TREE = {
    WHOLE: _bytes(PART),
    RANGED: _bytes(5 * PART - 7),
    "c/empty": b"",
    "c/small": _bytes(10),
}
FILES = {f"m/{path}": data for path, data in TREE.items()}


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def run(backend: Backend, folder: Path, connections: int = 4, **more: Any) -> list[FetchedFile]:
    """Fetch the tree ``m`` of ``backend`` into ``folder``."""
    plan = make_plan(backend, parse_uri("memory://bucket/m/"), Patterns())
    folder.mkdir()
    return fetch(
        backend,
        plan,
        str(folder),
        None,
        options=options(PART, connections),
        budget=Budget(connections),
        meter=Meter("download", plan.uri, plan.size, len(plan.files), None),
        **more,
    )


class Takes:
    """Moves every file away as it comes, and notes what it found."""

    def __init__(self, away: Path) -> None:
        away.mkdir()
        self._away = away
        self._lock = threading.Lock()
        self.found: dict[str, bytes] = {}
        self.still_open: list[str] = []

    def __call__(self, file: FetchedFile, path: str) -> None:
        with self._lock:
            assert file.path not in self.found, "each file comes once"
            self.found[file.path] = Path(path).read_bytes()
            for descriptor in os.listdir("/proc/self/fd"):
                try:
                    target = os.readlink(f"/proc/self/fd/{descriptor}")
                except OSError:
                    continue
                if target == path:
                    self.still_open.append(path)
            os.rename(path, self._away / str(len(self.found)))


# -- on_file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 4])
def test_each_file_is_handed_over_once_closed_and_may_be_moved(
    tmp_path: Path, connections: int
) -> None:
    take = Takes(tmp_path / "away")
    with memory_bucket(FILES) as backend:
        results = run(backend, tmp_path / "tree", connections, on_file=take)
    assert take.found == TREE
    assert take.still_open == []
    assert [file.path for file in results] == sorted(TREE)
    assert everything_in(tmp_path / "tree") == ["b", "c"]


def test_a_file_is_handed_over_while_others_are_still_to_come(tmp_path: Path) -> None:
    handed = threading.Event()

    class Waits(Wrapped):
        def read(
            self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None
        ) -> Body:
            if key == f"m/{RANGED}":
                assert handed.wait(60), "the first file was not handed over meanwhile"
            return self.inner.read(key, span, pin)

    def note(file: FetchedFile, path: str) -> None:
        if file.path == WHOLE:
            handed.set()

    with memory_bucket(FILES) as backend:
        run(Waits(backend), tmp_path / "tree", on_file=note)


@pytest.mark.parametrize("path", [WHOLE, RANGED])
@pytest.mark.parametrize(
    "error", [TransientError("mine"), ObjectChangedError("mine"), OSError("mine"), KeyError("mine")]
)
def test_what_it_raises_fails_the_transfer_and_is_not_tried_again(
    tmp_path: Path, path: str, error: Exception
) -> None:
    calls = []

    def refuse(file: FetchedFile, _: str) -> None:
        if file.path == path:
            calls.append(file.path)
            raise error

    with memory_bucket(FILES) as backend, pytest.raises(type(error)) as caught:
        run(backend, tmp_path / "tree", on_file=refuse)
    assert caught.value is error
    assert calls == [path]


@pytest.mark.parametrize("path", [WHOLE, RANGED])
def test_a_replaced_object_is_handed_over_in_its_last_version_only(
    tmp_path: Path, path: str
) -> None:
    take = Takes(tmp_path / "away")
    with memory_bucket(FILES) as inner:
        backend = Replacing(inner, f"m/{path}", 2, repeat(3 * PART + 5))
        # Going on after the reset needs a version that is no longer there.
        cut = Script(backend, f"m/{path}", reset_after(100))
        results = run(cut, tmp_path / "tree", on_file=take)
    assert take.found == TREE | {path: backend.last}
    assert [file.size for file in results] == [len(take.found[name]) for name in sorted(TREE)]


@pytest.mark.parametrize("path", [WHOLE, RANGED])
def test_a_damaged_file_is_never_handed_over(tmp_path: Path, path: str) -> None:
    take = Takes(tmp_path / "away")
    flipped = bytes([TREE[path][0] ^ 1])

    def flip(data: bytes) -> Any:
        return iter([flipped, data[1:]])

    with memory_bucket(FILES) as inner, pytest.raises(IntegrityError, match=path):
        run(Script(inner, f"m/{path}", flip), tmp_path / "tree", on_file=take)
    assert path not in take.found


# -- vouched ---------------------------------------------------------------------------------


def described(backend: MemoryBackend, metadata: Mapping[str, str]) -> None:
    for key, data in FILES.items():
        both = {"blake3": blake3(data).hexdigest(), "sha256": sha256(data).hex}
        backend.write(
            key,
            bytes_payload(data),
            metadata={
                name: both[name] if value == "right" else value for name, value in metadata.items()
            },
        )


@pytest.mark.parametrize(
    ("metadata", "algorithms", "computed"),
    [
        ({"blake3": "right", "sha256": "right"}, (), {"sha256"}),
        ({"blake3": "right", "sha256": "right"}, ("blake3",), {"blake3", "sha256"}),
        ({"sha256": "right"}, ("blake3",), {"blake3", "sha256"}),
        ({"blake3": "right"}, ("blake3",), {"blake3"}),
        ({}, ("blake3",), {"blake3", "md5"}),
        ({}, (), {"md5"}),
    ],
)
def test_sha256_is_computed_beside_the_rest_where_the_store_vouches_for_one(
    tmp_path: Path, metadata: dict[str, str], algorithms: tuple[str, ...], computed: set[str]
) -> None:
    with memory_bucket() as backend:
        described(backend, metadata)
        for file in run(backend, tmp_path / "tree", algorithms=algorithms, vouched=True):
            assert file.digests.keys() == computed
            assert file.digests.get("sha256") in (None, sha256(TREE[file.path]))


def test_a_wrong_sha256_of_the_store_is_found_beside_a_right_blake3(tmp_path: Path) -> None:
    with memory_bucket() as backend:
        described(backend, {"blake3": "right", "sha256": "0" * 64})
        run(backend, tmp_path / "plain")
        with pytest.raises(IntegrityError, match="the store says sha256:0000"):
            run(backend, tmp_path / "tree", vouched=True)


# -- expected_files --------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_files_that_are_what_is_expected_pass(tmp_path: Path, algorithm: str) -> None:
    demands = {
        path: Digest(algorithm, hashlib.new(algorithm, data).hexdigest())
        for path, data in TREE.items()
    }
    with memory_bucket(FILES) as backend:
        for file in run(backend, tmp_path / "tree", expected_files=demands):
            assert file.digests[algorithm] == demands[file.path]


@pytest.mark.parametrize("path", sorted(TREE))
def test_a_file_that_is_not_what_is_expected_is_named_and_ends_the_transfer(
    tmp_path: Path, path: str
) -> None:
    handed = []

    def note(file: FetchedFile, _: str) -> None:
        handed.append(file.path)

    demands = {name: sha256(data) for name, data in TREE.items()} | {path: sha256(b"other")}
    with memory_bucket(FILES) as backend, pytest.raises(IntegrityError) as caught:
        run(backend, tmp_path / "tree", 1, expected_files=demands, on_file=note)
    message = str(caught.value)
    assert f"memory://bucket/m/{path}: the caller expects {sha256(b'other')}" in message
    assert str(sha256(TREE[path])) in message
    assert handed == [name for name in sorted(TREE) if name < path]


def test_a_file_that_is_not_named_may_be_anything(tmp_path: Path) -> None:
    with memory_bucket(FILES) as backend:
        results = run(backend, tmp_path / "tree", expected_files={WHOLE: sha256(TREE[WHOLE])})
    assert {file.path for file in results if "sha256" in file.digests} == {WHOLE}


def test_a_demand_is_kept_when_the_object_is_replaced(tmp_path: Path) -> None:
    with memory_bucket(FILES) as inner:
        backend = Replacing(inner, f"m/{RANGED}", 1, repeat(PART + 5))
        with pytest.raises(StorageError) as caught:
            run(backend, tmp_path / "tree", expected_files={RANGED: sha256(TREE[RANGED])})
    assert type(caught.value) is IntegrityError
