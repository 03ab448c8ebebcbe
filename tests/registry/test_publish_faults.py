"""Publishing: verified, whole or not at all, whoever dies, is faster or changes a file."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from storage import (
    DestinationError,
    IntegrityError,
    InvalidInput,
    StorageClient,
    TransferError,
)
from storage.backends.base import Backend, Payload
from storage.backends.memory import MemoryBackend
from storage.digest import hash_file
from storage.registry import (
    ModelRegistry,
    documents,
    layout,
    leases,
    publish,
    sources,
)
from storage.registry.documents import Version, encode, now
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


@pytest.mark.parametrize("data", [b"not ours", None])
def test_what_somebody_put_where_a_version_is_to_be_seen_is_an_error_that_tells_what_to_do(
    here: ModelRegistry, folder: MakeFolder, data: bytes | None
) -> None:
    first = here.push("iris", folder({"model": b"1"}))
    name = layout.version("iris", 2)
    here.store.create(name, replace(first, number=2).dumps() if data is None else data)
    with pytest.raises(IntegrityError, match=rf"{name} is not the version 2 .* remove it, and"):
        here.push("iris", folder(FILES))
    assert here.pending() == []
    here.store.delete([name])
    assert here.push("iris", folder(FILES)).number == 2
    assert here.find("iris", 2).size == sum(map(len, FILES.values()))


def test_a_version_that_a_later_release_showed_with_more_fields_is_the_same(
    memory: ModelRegistry, meddled: Meddled, folder: MakeFolder
) -> None:
    def overtake(key: str) -> None:
        if "/versions/" in key:
            meddled.before = lambda key: None
            (name,) = keys(memory, layout.contents("iris"))
            data = memory.store.read(name)
            assert data is not None
            later = documents.decode(data, name) | {"more": 1}
            memory.store.create(layout.version("iris", 1), encode(later))

    meddled.before = overtake
    version = memory.push("iris", folder(FILES))
    assert meddled.before != overtake
    assert memory.find("iris", 1) == version


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


def test_an_interrupt_at_any_line_leaves_no_lease_that_is_renewed(
    memory: ModelRegistry, folder: MakeFolder
) -> None:
    left = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (publish.__file__, leases.__file__):
            return None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return trace

    source = folder(FILES)
    before = sys.gettrace()
    for step in itertools.count():
        (source / "step").write_bytes(b"%d" % step)
        left = step
        try:
            sys.settrace(trace)
            memory.push("iris", source)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        for thread in threading.enumerate():
            if thread.name == "registry lease":
                thread.join(30)
                assert not thread.is_alive(), step
    assert step > 100


def test_a_pending_version_that_is_dropped_is_not_renewed_any_more(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    before = set(threading.enumerate())
    pending = here.begin("iris")
    pending.add(folder(FILES))
    made = {thread for thread in threading.enumerate() if thread.name == "registry lease"} - before
    assert len(made) == 1
    del pending
    gc.collect()
    for thread in made:
        thread.join(30)
        assert not thread.is_alive()
    assert here.gc(grace=0).removed == len(FILES)


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
    version = memory.push("iris", source)
    assert version == faster[0]
    # He has uploaded something, and published nothing.
    assert (faster[0].is_new, version.is_new) == (True, False)
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
