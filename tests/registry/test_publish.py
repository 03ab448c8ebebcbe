"""Publishing: in one pass, verified, without what is there already, whoever dies or is faster."""

from __future__ import annotations

import itertools
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage import (
    DestinationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    Progress,
    StorageClient,
    TransferError,
)
from storage.backends.base import Backend, Payload
from storage.backends.memory import MemoryBackend
from storage.digest import hash_file
from storage.registry import ModelRegistry, PendingVersion, layout, publish, sources
from storage.registry.documents import Version, content_id, encode, now
from storage.registry.leases import CollectionDocument, Lease, list_leases, revoke
from storage.registry.log import Log
from storage.uri import Location
from tests.facade.stores import MemoryStore
from tests.registry.conftest import MakeFolder

FILES = {"model.bin": b"weights", "config/params.json": b"{}", "empty": b""}


class Killed(BaseException):
    """Stands for the end of the process."""


class Meddled(StorageClient):
    """A client whose writes can be meddled with: called with the key before and after each."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str], object] = lambda key: None
        self.after: Callable[[str], object] = lambda key: None
        self.deleting: Callable[[Sequence[str]], object] = lambda keys: None

    def backend(self, location: Location, config: Any = None, *, durable: bool = False) -> Backend:
        return _MeddledBackend(location.bucket, self)


class _MeddledBackend(MemoryBackend):
    def __init__(self, bucket: str, client: Meddled) -> None:
        super().__init__(bucket)
        self._client = client

    def delete(self, keys: Sequence[str]) -> None:
        self._client.deleting(keys)
        super().delete(keys)

    def write(self, key: str, payload: Payload, **options: Any) -> Any:
        self._client.before(key)
        info = super().write(key, payload, **options)
        self._client.after(key)
        return info


@pytest.fixture
def meddled() -> Iterator[Meddled]:
    with Meddled() as client:
        yield client


@pytest.fixture
def memory(meddled: Meddled) -> ModelRegistry:
    """A registry in memory, by the client that is meddled with."""
    registry = ModelRegistry(MemoryStore().base, client=meddled)
    registry.init()
    return registry


def keys(registry: ModelRegistry, prefix: str) -> list[str]:
    return registry.store.names(prefix)


# -- what is published -----------------------------------------------------------------------


def test_a_version_names_its_files_and_their_digests(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    source = folder(FILES)
    version = here.push("iris", source)
    for file in version.files:
        digests = hash_file(source / file.path, ("blake3", "sha256"))
        assert file.digests == tuple(digests.values())
        assert file.size == len(FILES[file.path])
        assert here.store.read(file.name) == FILES[file.path]
    assert version.content == content_id(version.files)
    assert version.size == sum(map(len, FILES.values()))


def test_a_single_file_is_a_tree_of_one(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder(FILES) / "model.bin")
    assert [file.path for file in version.files] == ["model.bin"]
    assert here.push("iris", folder({"model.bin": b"weights"})) == version


def test_patterns_choose_the_files(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder(FILES), allow_patterns="*.bin")
    assert [file.path for file in version.files] == ["model.bin"]
    with pytest.raises(InvalidInput, match="holds no file"):
        here.push("iris", folder(FILES), ignore_patterns="*")


def test_the_same_content_is_uploaded_once(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder({"a": b"same", "b": b"same", "c/d": b"same"}))
    assert len(version.files) == 3
    assert len(keys(here, layout.BLOBS)) == 1


def test_progress_counts_each_content_once(here: ModelRegistry, folder: MakeFolder) -> None:
    seen: list[Progress] = []
    here.push("iris", folder({"a": b"x" * 1000}))
    here.push("iris", folder({"a": b"x" * 1000, "b": b"y" * 50}), progress=seen.append)
    last = seen[-1]
    assert last.finished
    assert (last.bytes_done, last.bytes_total, last.bytes_present) == (1050, 1050, 1000)
    assert (last.objects_done, last.objects_total) == (2, 2)


def test_a_parent_has_to_be_there(here: ModelRegistry, folder: MakeFolder) -> None:
    with pytest.raises(ModelMissingError, match="no version of a model 'iris'"):
        here.push("iris", folder(FILES), parent=1)
    version = here.push("iris", folder(FILES), parent="hf://owner/base")
    assert here.find("iris").parent == version.parent == "hf://owner/base"


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".hidden", "-x", "dot.", "a b", "ü", "x" * 201, "a\n"]
)
def test_names_that_not_every_store_keeps_are_refused(
    here: ModelRegistry, folder: MakeFolder, name: str
) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of a model"):
        here.push(name, folder(FILES))
    assert keys(here, "") == [layout.MARKER]


def test_a_large_file_is_never_in_memory(here: ModelRegistry, tmp_path: Path) -> None:
    source = tmp_path / "large.bin"
    with open(source, "wb") as file:
        for index in range(64):
            file.write(bytes([index]) * 1024 * 1024)
    tracemalloc.start()
    try:
        here.push("iris", source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024 * 1024


# -- pending versions ------------------------------------------------------------------------


def test_a_pending_version_is_seen_as_pending_alone(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    with here.begin("iris", description="checked") as pending:
        pending.add(folder(FILES))
        pending.add(folder({"card.md": b"#"}), "docs/")
        assert [(each.id, each.model) for each in here.pending()] == [(pending.id, "iris")]
        assert here.models() == []
        assert here.numbers("iris") == []
        version = pending.commit()
    assert here.pending() == []
    assert here.show("iris") == version
    assert [file.path for file in version.files] == sorted([*FILES, "docs/card.md"])
    assert version.upload == pending.id


def test_a_pending_version_that_is_left_is_gone(here: ModelRegistry, folder: MakeFolder) -> None:
    source = folder(FILES)

    def fail() -> None:
        with here.begin("iris") as begun:
            left.append(begun)
            begun.add(source)
            raise Killed

    left: list[PendingVersion] = []
    with pytest.raises(Killed):
        fail()
    assert here.pending() == []
    assert here.models() == []
    with pytest.raises(InvalidInput, match="committed or aborted"):
        left[0].commit()


def test_a_pending_version_with_content_that_exists_is_that_version(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    first = here.push("iris", folder(FILES))
    with here.begin("iris") as pending:
        pending.add(folder(FILES))
        assert pending.commit() == first
    assert here.pending() == []
    assert here.numbers("iris") == [1]


def test_two_contents_at_one_path_are_refused(here: ModelRegistry, folder: MakeFolder) -> None:
    with here.begin("iris") as pending:
        pending.add(folder(FILES))
        with pytest.raises(InvalidInput, match="choose another path"):
            pending.add(folder({"model.bin": b"other"}))
        with pytest.raises(InvalidInput, match="a file and a folder at once"):
            pending.add(folder({"x": b""}), "model.bin")
        assert len(pending.commit().files) == len(FILES)


def test_a_version_without_files_is_refused(here: ModelRegistry) -> None:
    with here.begin("iris") as pending, pytest.raises(InvalidInput, match="needs files"):
        pending.commit()


# -- files that change -----------------------------------------------------------------------


@pytest.mark.parametrize("later", [b"WEIGHTS", b"weigh", b"weights and more", None])
def test_a_file_that_changes_after_it_was_hashed_is_not_published(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder, later: bytes | None
) -> None:
    source = folder({"model.bin": b"weights"})
    file = source / "model.bin"
    status = file.stat()

    def change(key: str) -> None:
        if f"/{layout.UPLOADS}" in key:
            if later is None:
                file.unlink()
                return
            file.write_bytes(later)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    meddled.before = change
    # What was hashed is the beginning of it, which is all that is sent.
    if later == b"weights and more":
        assert memory.store.read(memory.push("iris", source).files[0].name) == b"weights"
        return
    error = DestinationError if later is None else IntegrityError
    with pytest.raises(error, match=r"cannot be read|changed while it was being published"):
        memory.push("iris", source)
    assert memory.models() == []
    assert keys(memory, layout.BLOBS) == keys(memory, layout.UPLOADS) == []


def test_a_file_that_grows_while_it_is_hashed_is_not_published(
    here: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(FILES)

    def grow(path: str, *args: Any) -> Any:
        with open(path, "ab") as file:
            file.write(b"more")
        return hash_file(path, *args)

    monkeypatch.setattr(sources, "hash_file", grow)
    with pytest.raises(IntegrityError, match="changed while it was being published"):
        here.push("iris", source)


# -- who dies when ---------------------------------------------------------------------------


def test_whoever_dies_leaves_nothing_visible_or_all_of_it(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    source = folder(FILES)
    steps: list[str] = []
    meddled.after = steps.append
    memory.push("iris", folder({"model": b"first"}))
    base = len(memory.location.prefix)
    committed = next(i for i, key in enumerate(steps) if "/contents/" in key)
    assert [key[base:].split("/")[0] for key in steps] == [
        "catalog", "uploads", "blobs", "models", "models", "models",
    ]  # fmt: skip
    # The catalog has the model already; each push has files of its own.
    count = 0
    for fatal in range(1, len(steps)):
        for when in ("before", "after"):
            seen: list[str] = []

            def die(key: str, fatal: int = fatal, seen: list[str] = seen) -> None:
                seen.append(key)
                if len(seen) == fatal:
                    raise Killed

            meddled.before = meddled.after = lambda key: None
            setattr(meddled, when, die)
            count += 1
            (source / "model.bin").write_bytes(b"%d" % count)
            before = memory.numbers("iris")
            with pytest.raises(Killed):
                memory.push("iris", source)
            meddled.before = meddled.after = lambda key: None
            # Whoever publishes it again gets what was committed, and else a new number.
            visible = memory.numbers("iris")
            assert visible in (before, [*before, visible[-1]])
            version = memory.push("iris", source)
            assert memory.numbers("iris") == [*before, version.number]
            assert memory.push("iris", source) == version
    assert committed


def test_a_commit_that_nobody_showed_is_shown_by_the_next(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def die(key: str) -> None:
        if "/versions/" in key:
            raise Killed

    meddled.before = die
    with pytest.raises(Killed):
        memory.push("iris", folder(FILES))
    assert memory.numbers("iris") == []
    meddled.before = lambda key: None
    assert memory.push("iris", folder(FILES)).number == 1
    assert memory.numbers("iris") == [1]


def test_a_commit_of_unknown_outcome_keeps_its_lease_and_is_found_again(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def lose(key: str) -> None:
        if "/contents/" in key:
            raise TransferError("no answer")

    meddled.after = lose
    with pytest.raises(TransferError, match="again: if it was, that gives the same version, else"):
        memory.push("iris", folder(FILES))
    assert len(memory.pending()) == 1
    meddled.after = lambda key: None
    assert memory.push("iris", folder(FILES)).number == 1


def test_a_commit_that_did_not_go_through_is_another_version_when_it_is_published_again(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def refuse(key: str) -> None:
        if "/contents/" in key:
            raise TransferError("no answer")

    meddled.before = refuse
    with pytest.raises(TransferError, match="same version, else another one"):
        memory.push("iris", folder(FILES))
    meddled.before = lambda key: None
    assert memory.push("iris", folder(FILES)).number == 2
    assert memory.numbers("iris") == [2]


def test_a_commit_of_another_model_is_damage(here: ModelRegistry, folder: MakeFolder) -> None:
    here.push("iris", folder(FILES))
    for name in here.store.names("models/iris/"):
        data = here.store.read(name)
        assert data is not None
        here.store.create(name.replace("iris", "tulip"), data)
    with pytest.raises(IntegrityError, match="is damaged: it is version 1 of 'iris'"):
        here.push("tulip", folder(FILES))


def test_a_store_that_does_not_tell_upper_from_lower_case_has_one_model_of_a_name(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    # What such a store has by that name is what was written by the other one.
    here.store.create(layout.catalog("iris"), encode({"model": "Iris"}))
    before = here.store.names("")
    with pytest.raises(InvalidInput, match="has a model 'Iris'; publish to that"):
        here.push("iris", folder(FILES))
    assert here.store.names("") == before


@pytest.mark.parametrize("moment", ["before", "after", "deleting"])
def test_an_interrupt_leaves_no_lease_that_is_renewed(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder, moment: str
) -> None:
    left = 0

    def interrupt(key: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            setattr(meddled, moment, lambda key: None)
            raise KeyboardInterrupt

    for step in itertools.count():
        left = step
        setattr(meddled, moment, interrupt)
        try:
            memory.push("iris", folder({"step": b"%d" % step}))
        except KeyboardInterrupt:
            assert "registry lease" not in [thread.name for thread in threading.enumerate()]
        else:
            break
    assert step > 0


@pytest.mark.parametrize("path", ["../up", "a\0b", "\ud800", "./a", "a//b"])
def test_a_folder_that_no_version_can_have_is_refused(
    here: ModelRegistry, folder: MakeFolder, path: str
) -> None:
    with here.begin("iris") as pending, pytest.raises(InvalidInput):
        pending.add(folder(FILES), path)


def test_a_number_whose_commit_is_of_unknown_outcome_is_not_used_again(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def lose(key: str) -> None:
        if "/contents/" in key:
            raise TransferError("no answer")

    with memory.begin("iris") as pending:
        pending.add(folder(FILES))
        meddled.after = lose
        with pytest.raises(TransferError, match="is not known"):
            pending.commit()
        meddled.after = lambda key: None
        pending.add(folder({"more": b"1"}))
        assert pending.commit().number == 2
    assert memory.push("iris", folder(FILES)).number == 1


def test_what_is_published_in_a_folder_survives_a_power_cut(
    tmp_path: Path, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(identity(os.fstat(descriptor)))

    def identity(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "registry"
    with StorageClient() as client:
        registry = ModelRegistry(root, client=client)
        registry.init()
        registry.push("iris", folder(FILES))
        registry.set_alias("iris", "production")
        there = [path for path in root.rglob("*") if path.name != layout.UPLOADS.rstrip("/")]
        assert len(there) > 20
        assert [path for path in there if identity(path.stat()) not in synced] == []
        # What somebody else has put there and not synced yet is synced before it is relied upon.
        synced.clear()
        registry.push("iris", folder(FILES))
        assert identity((root / layout.versions("iris")).stat()) in synced
        registry.push("tulip", folder(FILES))
        blobs = {path.parent for path in (root / layout.BLOBS).rglob("*") if path.is_file()}
        assert [path for path in blobs if identity(path.stat()) not in synced] == []


# -- others at the same time -----------------------------------------------------------------


def test_a_publisher_that_was_taken_for_dead_begins_again(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    settled: list[str] = []

    def collect(key: str) -> None:
        if "/numbers/" in key and not settled:
            for lease in list_leases(memory.store):
                settled.append(lease.id)
                revoke(memory.store, lease)
            memory.store.delete(keys(memory, layout.BLOBS))

    meddled.after = collect
    version = memory.push("iris", folder(FILES))
    assert len(settled) == 1
    assert version.number == 1
    assert all(memory.store.read(file.name) == FILES[file.path] for file in version.files)
    log = Log(memory.store, layout.content_log("iris", version.content))
    assert ["revoked" in entry for _, entry in log.entries()] == [False, True]
    assert keys(memory, layout.UPLOADS) == []


def test_a_blob_that_is_condemned_is_uploaded_under_another_name(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    old = here.push("iris", folder(FILES))
    name = next(file.name for file in old.files if file.path == "model.bin")
    here.store.create(
        layout.collection("0" * 32), CollectionDocument("x", frozenset([name])).dumps()
    )
    new = here.push("iris", folder(FILES | {"more": b"1"}))
    fresh = {file.path: file.name for file in new.files}
    assert fresh["model.bin"] != name
    assert here.store.read(fresh["model.bin"]) == b"weights"
    assert fresh["empty"] in old.blobs


@pytest.mark.parametrize("many_more", [1, 20])
def test_many_files_are_looked_for_by_few_listings(
    memory: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, many_more: int
) -> None:
    monkeypatch.setattr(publish, "_MANY_MORE", many_more)
    asked: list[str] = []
    listing = MemoryBackend.list

    def counted(backend: MemoryBackend, prefix: str = "") -> Any:
        asked.append(prefix)
        return listing(backend, prefix)

    monkeypatch.setattr(MemoryBackend, "list", counted)
    files = {f"{index:03}": b"%d" % index for index in range(100)}
    memory.push("tulip", folder({str(index): b"tulip %d" % index for index in range(9)}))
    old = memory.push("iris", folder(files))
    asked.clear()
    new = memory.push("iris", folder(files | {"000": b"other", "100": b"more"}))
    assert len(new.blobs & old.blobs) == 99
    # With one for each file a listing is given up, as one of a large registry is.
    assert (len(asked) < 10) == (many_more == 20)
    assert len(keys(memory, layout.BLOBS)) == 111


def test_a_blob_of_a_wrong_size_is_not_used(here: ModelRegistry, folder: MakeFolder) -> None:
    old = here.push("iris", folder(FILES))
    name = next(file.name for file in old.files if file.path == "model.bin")
    here.store.replace(name, b"wei")
    new = here.push("tulip", folder(FILES))
    assert {file.path: file.name for file in new.files}["model.bin"] != name


def test_of_two_who_publish_the_same_the_slower_gets_the_version_of_the_faster(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    faster: list[Version] = []

    def overtake(key: str) -> None:
        if "/numbers/" in key and not faster:
            meddled.after = lambda key: None
            faster.append(ModelRegistry(str(memory.location), client=meddled).push("iris", source))

    source = folder(FILES)
    meddled.after = overtake
    assert memory.push("iris", source) == faster[0]
    assert memory.numbers("iris") == [2]
    assert keys(memory, layout.UPLOADS) == []


def test_a_lease_is_there_before_the_blobs_are_looked_at(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    seen = []

    def look(key: str) -> None:
        if f"/{layout.BLOBS}" in key:
            leased = {blob for lease in list_leases(memory.store) for blob in lease.blobs}
            seen.append(layout.blob_digest(key.removeprefix(memory.location.prefix)) in leased)

    meddled.before = look
    memory.push("iris", folder(FILES))
    assert seen == [True] * len(FILES)


def test_a_lease_that_cannot_be_removed_is_in_nobodys_way(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def refuse(keys: Sequence[str]) -> None:
        raise TransferError("no answer")

    with memory.begin("iris") as pending:
        meddled.deleting = refuse
        pending.add(folder(FILES))
        assert pending.commit().number == 1
    assert memory.numbers("iris") == [1]
    assert [each.id for each in memory.pending()] == [pending.id]
    # All that is left is what a collection removes: nobody renews it.
    assert [thread for thread in threading.enumerate() if "lease" in thread.name] == []


def test_a_lease_of_somebody_else_is_left_alone(here: ModelRegistry, folder: MakeFolder) -> None:
    with Lease.take(here.store, "iris", pending="other", started=now()) as lease:
        here.push("iris", folder(FILES))
        assert [each.id for each in here.pending()] == ["other"]
        assert keys(here, layout.UPLOADS) == [lease.name]
