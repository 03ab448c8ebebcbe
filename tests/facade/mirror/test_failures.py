"""Mirrors: expected digests, and what goes wrong midway."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import (
    IntegrityError,
    InvalidInput,
    MirrorError,
    MirrorResult,
    ModelMissingError,
    PVCConfig,
    StorageOperations,
    UnsupportedOperation,
    tree_digest,
)
from storage.client.mirror import batch as batches
from storage.client.mirror import run as mirrors
from storage.digest import Digest
from storage.transfer.progress import Progress
from storage.uri import parse_uri
from tests.facade.mirror.support import (
    FILES,
    MIB,
    content,
    counts,
    many,
    mirror,
    processes,
)
from tests.facade.stores import FileStore, Store, s3_config
from tests.servers import SeaweedFS

# A process that has threads is forked on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

# -- digests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_the_digest_of_a_tree_is_that_of_every_byte_also_of_those_in_place(
    make_store: Callable[[str], Store], algorithm: str
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    one.put_all(FILES)
    digest = digest_of(FILES, algorithm)
    with processes("spawn")() as pool:
        first = mirror(one, two, digest=digest, executor=pool, batch_size=2)
        assert counts(first) == (len(FILES), 0, 0, 0)
        # What is in place is read, and hashed.
        again = mirror(one, two, digest=digest, executor=pool, batch_size=2)
        assert counts(again) == (0, len(FILES), 0, 0)
    one.put_raw("config.json", b"[]")
    two.put_raw("stray", b"1")
    with pytest.raises(IntegrityError, match=f"expected the digest {algorithm}:"):
        mirror(one, two, digest=digest, delete=True)
    assert two.get_raw("stray") == b"1"


def digest_of(files: Mapping[str, bytes], algorithm: str = "sha256") -> Digest:
    from storage.digest import MultiHasher

    found = {}
    for path, data in files.items():
        hasher = MultiHasher([algorithm])
        hasher.update(data)
        found[path] = hasher.digests()[algorithm]
    return tree_digest(found, algorithm)


def test_one_object_with_another_digest_than_expected_is_never_written(
    make_store: Callable[[str], Store],
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    one.put_raw("m.bin", b"tampered")
    wrong = f"{one.uri('m.bin')}#sha256={'0' * 64}"
    with pytest.raises(MirrorError, match="IntegrityError"):
        mirror(one, two, src_uri=wrong, dest_uri=two.uri("m.bin"))
    assert two.keys() == []
    # Also not when the same wrong bytes are in place.
    two.put_raw("m.bin", b"tampered")
    with pytest.raises(MirrorError, match="IntegrityError"):
        mirror(one, two, src_uri=wrong, dest_uri=two.uri("m.bin"))


# -- what goes wrong -------------------------------------------------------------------------


def test_an_object_that_changes_after_the_listing_arrives_whole_as_it_is_then(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    one.put_all({"a": b"old", "b": b"same"})
    listed = mirrors.MirrorPlan.totals

    def change(plan: Any) -> Any:
        one.put_raw("a", b"new and longer")
        return listed(plan)

    told: list[Progress] = []
    monkeypatch.setattr(mirrors.MirrorPlan, "totals", change)
    result = mirror(one, two, progress=told.append)
    assert counts(result) == (2, 0, 0, 0)
    assert result.bytes == len(b"new and longer") + len(b"same")
    assert content(two) == {"a": b"new and longer", "b": b"same"}
    assert (told[-1].bytes_done, told[-1].bytes_total) == (result.bytes, result.bytes)


def test_an_object_that_is_replaced_while_it_is_read_is_never_a_mixture(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    old, new = bytes(3 * MIB), b"n" * (3 * MIB)
    one.put_raw("big", old)
    read = batches._MirrorCopy._read
    replaced: list[bool] = []

    def replace_after_asking(self: Any, info: Any) -> Any:
        source = read(self, info)
        if not replaced:
            replaced.append(True)
            one.put_raw("big", new)
        return source

    monkeypatch.setattr(batches._MirrorCopy, "_read", replace_after_asking)
    assert counts(mirror(one, two)) == (1, 0, 0, 0)
    assert two.get_raw("big") == new


def test_an_object_that_vanishes_is_told_and_the_others_arrive(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(20)
    one.put_all(files)
    gone = sorted(files)[7]
    listed = mirrors.MirrorPlan.totals

    def remove(plan: Any) -> Any:
        one.delete_raw(gone)
        return listed(plan)

    told: list[Progress] = []
    monkeypatch.setattr(mirrors.MirrorPlan, "totals", remove)
    with ThreadPoolExecutor(2) as pool, pytest.raises(MirrorError, match="19 of 20") as caught:
        mirror(one, two, executor=pool, batch_size=4, progress=told.append)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert counts(result) == (19, 0, 0, 1)
    assert result.bytes == 19 * 300
    (failure,) = result.failures
    assert (failure.path, failure.error) == (gone, "ModelMissingError")
    assert not any(one.finished for one in told)
    assert content(two).keys() == files.keys() - {gone}


def test_failures_without_end_end(make_store: Callable[[str], Store], monkeypatch: Any) -> None:
    monkeypatch.setattr(mirrors, "_MOST_FAILURES", 30)
    one, two = make_store("file"), make_store("memory")
    one.put_all(many(200, 5))
    original = mirrors.MirrorPlan.totals

    def remove_all(plan: Any) -> Any:
        held = one.keys()
        for path in held:
            one.delete_raw(path)
        return original(plan)

    monkeypatch.setattr(mirrors.MirrorPlan, "totals", remove_all)
    with ThreadPoolExecutor(1) as pool, pytest.raises(MirrorError, match="were not tried"):
        mirror(one, two, executor=pool, batch_size=10, in_flight=2)


def test_what_cannot_be_right_is_refused_before_a_byte_moves(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    memory, file = make_store("memory"), make_store("file")
    memory.put_all({"a": b"1", "sub/b": b"2"})
    with pytest.raises(InvalidInput, match="overlap"):
        mirror(memory, memory, dest_uri=memory.uri("sub"))
    with pytest.raises(InvalidInput, match="overlap"):
        mirror(memory, memory)
    with pytest.raises(InvalidInput, match="one object"):
        mirror(memory, file, src_uri=memory.uri("a"), delete=True)
    with pytest.raises(InvalidInput, match="digest"):
        mirror(memory, file, dest_uri=f"{file.base}#sha256={'0' * 64}")
    with pytest.raises(InvalidInput, match="batch_size"):
        mirror(memory, file, batch_size=0)
    with pytest.raises(InvalidInput, match="executor"):
        mirror(memory, file, executor=3)
    with pytest.raises(ModelMissingError, match="patterns"):
        mirror(memory, file, allow_patterns="*.none")
    with pytest.raises(ModelMissingError):
        mirror(memory, file, src_uri=memory.uri("nothing"))
    memory.put_all({"x//y": b"1", "x/y": b"2"})
    with pytest.raises(InvalidInput, match="'x/y'"):
        mirror(memory, file)
    memory.delete_raw("x//y")
    memory.put_all({"x": b"1"})
    with pytest.raises(InvalidInput, match="'x/y'"):
        mirror(memory, file)
    memory.delete_raw("x")
    memory.put_all({"../out": b"1"})
    with pytest.raises(InvalidInput, match=r"\.\."):
        mirror(memory, file)
    assert file.keys() == []


def test_places_that_overlap_are_told_by_the_store_and_not_by_who_asks(
    make_store: Callable[[str], Store], seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    """To delete what the source lacks would delete the source."""
    store = make_store("seaweedfs-obstore")
    store.put_all({"sub/a": b"1", "b": b"2"})
    other = s3_config(seaweedfs, "fsspec")
    assert other != store.config
    for src, dest in (("sub", ""), ("", "sub")):
        with pytest.raises(InvalidInput, match="overlap"):
            StorageOperations.mirror(
                store.uri(src), store.uri(dest), config=store.config, dest_config=other, delete=True
            )
    (tmp_path / "real" / "claim" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "claim" / "sub" / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InvalidInput, match="overlap"):
        StorageOperations.mirror(
            "pvc://claim/sub",
            tmp_path / "link" / "claim",
            config=PVCConfig(mount_root=tmp_path / "real"),
            delete=True,
        )
    assert content(store) == {"sub/a": b"1", "b": b"2"}


def test_a_file_whose_name_no_store_takes_fails_alone(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("file"), make_store("seaweedfs-obstore")
    assert isinstance(one, FileStore)
    one.put_all({"a": b"1", "b": b"2"})
    (one.folder / os.fsdecode(b"not \xff text")).write_bytes(b"3")
    for executor in (None, partial(ThreadPoolExecutor, 1)):
        with pytest.raises(MirrorError, match="1 failed") as caught:
            mirror(one, two, executor=executor)
        assert "WorkerLost" not in str(caught.value)
    assert content(two) == {"a": b"1", "b": b"2"}


def test_a_worker_that_cannot_open_a_store_says_why(make_store: Callable[[str], Store]) -> None:
    """What is installed here may be missing there."""
    one, two = make_store("file"), make_store("pvc")
    one.put_all({"a": b"1"})

    class Poor(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            ends = replace(args[0].ends, source=parse_uri("nosuchscheme://x/y"))
            return super().submit(fn, replace(args[0], ends=ends))

    with Poor(1) as pool, pytest.raises(MirrorError, match="UnsupportedScheme") as caught:
        mirror(one, two, executor=pool)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert result.resubmitted == 0


def test_workers_with_a_memory_or_a_disk_of_their_own_are_noticed(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, file, target = make_store("memory"), make_store("file"), make_store("pvc")
    file.put_all({"a": b"1"})
    with pytest.raises(UnsupportedOperation, match="memory of their own"):
        mirror(file, memory, executor=processes("spawn"))
    monkeypatch.setattr(mirrors, "_SEEN_WITHIN", 0.0)
    with Elsewhere() as pool, pytest.raises(UnsupportedOperation, match="file system"):
        mirror(file, target, executor=pool)


class Elsewhere(ThreadPoolExecutor):
    """Says that all was copied, as a machine does that wrote to its own disk."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        items = args[0].items
        future.set_result(tuple(batches.ItemOutcome(i.path, True, 1, True) for i in items))
        return future
