"""What a collection removes, keeps, tells and finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from blake3 import blake3

from storage.errors import IntegrityError, InvalidInput, ModelMissingError, UnsupportedOperation
from storage.registry import gc, layout
from storage.registry.gc import Collection
from storage.registry.leases import CollectionDocument, Lease
from tests.registry.stepping import Actor, World

Folder = Callable[..., Path]
NOTHING = Collection(
    False, removed=0, freed=0, kept=0, kept_bytes=0, leases=0, helped=0, leftovers=0
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def make(**files: bytes) -> Path:
        base = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        base.mkdir()
        for name, data in files.items():
            (base / name).write_bytes(data)
        return base

    return make


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def _everything(world: World) -> Mapping[str, bytes]:
    return {name: world.data(name) for name in world.names()}


def test_what_no_version_needs_goes_and_the_rest_stays(world: World, folder: Folder) -> None:
    registry = world.registry
    registry.push("one", folder(shared=b"shared", own=b"of one"))
    registry.push("two", folder(shared=b"shared", own=b"of two!"))
    registry.delete("two", 1)
    assert registry.gc() == Collection(
        False, removed=1, freed=7, kept=2, kept_bytes=12, leases=0, helped=0, leftovers=0
    )
    assert world.visible().keys() == {("one", 1)}
    registry.delete("one", 1)
    assert registry.gc().removed == 2
    assert not world.names(layout.BLOBS)
    assert registry.gc() == NOTHING


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(world: World, folder: Folder) -> None:
    registry = world.registry
    registry.push("m", folder(a=b"alpha", b=b"beta"))
    registry.push("m", folder(a=b"alpha"))
    registry.delete("m", 1)
    dead = Actor(world, lambda registry: registry.push("m", folder(c=b"gamma")))
    dead.run_until("write", "versions/")
    dead.kill()
    before = _everything(world)
    told = registry.gc(grace=0, dry_run=True)
    assert _everything(world) == before
    assert told == Collection(
        True, removed=1, freed=4, kept=2, kept_bytes=10, leases=1, helped=1, leftovers=0
    )
    done = registry.gc(grace=0)
    assert (done.removed, done.freed, done.leases, done.helped) == (1, 4, 1, 1)
    assert world.visible().keys() == {("m", 2), ("m", 3)}


def test_what_is_uploaded_for_a_pending_version_stays_until_that_is_given_up(
    world: World, folder: Folder
) -> None:
    registry = world.registry
    with registry.begin("m") as pending:
        pending.add(folder(a=b"alpha"))
        assert registry.gc().removed == 0
        assert world.names(layout.BLOBS)
    assert registry.gc().removed == 1
    assert not world.names(layout.BLOBS)


def test_a_publisher_that_was_taken_for_dead_publishes_nevertheless(
    world: World, folder: Folder
) -> None:
    registry = world.registry
    source = folder(a=b"alpha")
    with registry.begin("m") as pending:
        pending.add(source)
        collected = registry.gc(grace=0)
        assert (collected.removed, collected.leases) == (1, 1)
        version = pending.commit()
    assert world.check() == {("m", 1): version}
    assert not registry.pending()


def test_many_blobs_go_in_rounds(
    world: World, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "_BATCH", 3)
    registry = world.registry
    registry.push("m", folder(**{f"f{index}": b"%d" % index for index in range(10)}))
    registry.delete("m", 1)
    assert registry.gc().removed == 10
    assert not world.names(layout.BLOBS)
    assert not world.names(layout.COLLECTIONS)


def test_what_is_not_ours_below_the_blobs_is_left_alone(world: World) -> None:
    store = world.registry.store
    foreign = "blobs/notes.txt"
    store.create(foreign, b"mine")
    assert world.registry.gc() == NOTHING
    assert world.data(foreign) == b"mine"


def test_a_version_whose_publisher_died_before_it_was_seen_is_made_visible(
    world: World, folder: Folder
) -> None:
    source = folder(a=b"alpha")
    dead = Actor(world, lambda registry: registry.push("m", source))
    dead.run_until("write", "versions/")
    dead.kill()
    assert not world.visible()
    assert world.registry.gc().helped == 1
    seen = world.check()
    assert seen == {("m", 1): world.registry.push("m", source)}


@pytest.mark.parametrize("kind", ["contents", "uploads", "collections"])
@pytest.mark.parametrize(
    ("data", "error"),
    [(b"{", IntegrityError), (b'{"format":2}', UnsupportedOperation)],
    ids=["damaged", "newer"],
)
def test_what_cannot_be_read_ends_a_collection_before_anything_is_removed(
    kind: str, data: bytes, error: type[Exception], world: World, folder: Folder
) -> None:
    registry = world.registry
    registry.push("m", folder(a=b"alpha"))
    registry.delete("m", 1)
    name = {
        "contents": layout.entry(layout.content_log("m", "0" * 64), 1),
        "uploads": layout.upload("someone"),
        "collections": layout.collection("someone"),
    }[kind]
    registry.store.create(name, data)
    before = _everything(world)
    with pytest.raises(error, match=name):
        registry.gc(grace=0)
    assert _everything(world) == before


@pytest.mark.parametrize("grace", [-1, float("nan")])
def test_a_grace_below_zero_is_refused(grace: float, world: World) -> None:
    with pytest.raises(InvalidInput, match="grace"):
        world.registry.gc(grace=grace)


def test_there_is_nothing_to_collect_where_no_registry_is() -> None:
    world = World({})
    with pytest.raises(ModelMissingError, match="no registry"):
        world.registry.gc()
    world.close()


def test_a_collector_that_others_took_for_dead_gives_up(world: World, folder: Folder) -> None:
    registry = world.registry
    source = folder(a=b"alpha")
    registry.push("m", source)
    registry.delete("m", 1)
    (blob,) = world.names(layout.BLOBS)
    slow = Actor(world, lambda registry: registry.gc())
    slow.run_until("write", "verdict")
    # What it has found out by now will be wrong.
    with Lease.take(registry.store, "m", [blake3(b"alpha").hexdigest()], pending="p"):
        collected = registry.gc(grace=0)
        assert (collected.removed, collected.leases) == (1, 1)
    version = registry.push("m", source)
    slow.run()
    assert slow.error is None
    assert slow.result is not None
    assert slow.result.removed == 0
    assert world.check()["m", version.number] == version
    assert blob not in version.blobs
    world.check_collected()


def test_a_collection_without_a_verdict_is_called_off_only_when_it_is_old(world: World) -> None:
    store = world.registry.store
    name = layout.collection("0" * 32)
    store.create(name, CollectionDocument("0" * 32, frozenset(["blobs/x"])).dumps())
    world.registry.gc()
    assert name in world.names()
    world.registry.gc(grace=0)
    assert not world.names(layout.COLLECTIONS)
