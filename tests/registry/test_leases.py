"""Leases are renewed, released, left to collectors, and checked when they are read."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.errors import IntegrityError, TransferError
from storage.registry import layout, leases
from storage.registry.documents import decode, encode, now
from storage.registry.leases import CollectionDocument, Lease, list_leases, revoke
from storage.registry.objects import ObjectStore
from tests.registry.stepping import World

DIGEST = "ab" * 32
CONTENT = "cd" * 32


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_a_lease_says_what_it_was_told(world: World) -> None:
    store, started = world.registry.store, now()
    with Lease.take(
        store, "m", [DIGEST], pending="p", started=started, content=CONTENT, attempt=3
    ) as lease:
        (found,) = list_leases(store)
        assert (found.id, found.model, found.pending) == (lease.id, "m", "p")
        assert found.blobs == frozenset({DIGEST})
        assert (found.content, found.attempt) == (CONTENT, 3)
        assert found.started == started
        assert found.modified is not None
    assert not list_leases(store)


def test_a_lease_is_renewed_until_it_is_released(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEWAL", 0.01)
    store = world.registry.store
    renewed = threading.Semaphore(0)

    class Watched(ObjectStore):
        def replace(self, name: str, data: bytes) -> None:
            super().replace(name, data)
            renewed.release()

    watched = Watched(store.client, store.location, store.config)
    lease = Lease.take(watched, "m", [DIGEST], pending="p")
    (first,) = list_leases(store)
    # What was renewed before that does not count; one may have been under way.
    while renewed.acquire(blocking=False):
        pass
    for _ in range(2):
        assert renewed.acquire(timeout=30)
    (later,) = list_leases(store)
    assert first.modified is not None
    assert later.modified is not None
    assert later.modified > first.modified
    lease.release()
    # Nothing brings it back.
    assert not world.names(layout.UPLOADS)
    assert not lease._renewer.is_alive()


def test_a_renewal_that_fails_does_not_end_the_renewing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEWAL", 0.01)
    store = world.registry.store
    tried = threading.Semaphore(0)

    class Failing(ObjectStore):
        def replace(self, name: str, data: bytes) -> None:
            tried.release()
            raise TransferError("no answer, for the test")

    with Lease.take(Failing(store.client, store.location, store.config), "m", pending="p"):
        for _ in range(3):
            assert tried.acquire(timeout=30)


def renewers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "registry lease"}


def check_that_they_end(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("circular", [False, True])
def test_a_lease_that_is_dropped_is_not_renewed_any_more(circular: bool, world: World) -> None:
    before = renewers()
    held: list[Any] = [Lease.take(world.registry.store, "m", [DIGEST], pending="p")]
    made = renewers() - before
    assert len(made) == 1
    if circular:
        held.append(held)
    del held
    gc.collect()
    check_that_they_end(made)
    # Whether anybody still needs it is for a collector to tell.
    assert len(list_leases(world.registry.store)) == 1


@pytest.mark.parametrize("started", [False, True])
def test_an_interrupt_while_a_lease_is_taken_leaves_nobody_who_renews_it(
    started: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[threading.Thread] = set()
    start: Callable[[threading.Thread], None] = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "registry lease":
            return start(thread)
        if started:
            start(thread)
            made.add(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    # Whoever is told keeps the lease from being garbage.
    with pytest.raises(KeyboardInterrupt) as told:
        Lease.take(world.registry.store, "m", [DIGEST], pending="p")
    assert len(made) == started
    check_that_they_end(made)
    assert told.value.__traceback__ is not None


def test_an_abandoned_lease_stays_for_a_collector(world: World) -> None:
    store = world.registry.store
    lease = Lease.take(store, "m", [DIGEST], pending="p", content=CONTENT, attempt=1)
    lease.abandon()
    lease.release()
    (found,) = list_leases(store)
    revoke(store, found)
    assert not list_leases(store)
    entry = layout.entry(layout.content_log("m", CONTENT), 1)
    assert decode(world.data(entry), entry)["revoked"] == lease.id


def test_revoking_changes_nothing_that_is_decided_and_may_be_repeated(world: World) -> None:
    store = world.registry.store
    entry = layout.entry(layout.content_log("m", CONTENT), 1)
    store.create(entry, b"decided")
    lease = Lease.take(store, "m", [DIGEST], pending="p", content=CONTENT, attempt=1)
    (found,) = list_leases(store)
    for _ in range(2):
        revoke(store, found)
    assert world.data(entry) == b"decided"
    assert not world.names(layout.UPLOADS)
    lease.release()


def test_a_lease_without_content_leaves_no_trace_when_it_is_revoked(world: World) -> None:
    store = world.registry.store
    with Lease.take(store, "m", [DIGEST], pending="p"):
        (found,) = list_leases(store)
        before = world.names()
        revoke(store, found)
        assert world.names() == before - {layout.upload(found.id)}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "../elsewhere"},
        {"model": None},
        {"content": "short"},
        {"attempt": 0},
        {"attempt": "1"},
        {"blobs": "ab"},
        {"started": "yesterday"},
    ],
    ids=str,
)
def test_a_damaged_lease_is_an_error_that_names_it(change: dict[str, Any], world: World) -> None:
    store = world.registry.store
    lease = Lease.take(store, "m", [DIGEST], pending="p", content=CONTENT, attempt=1)
    lease.abandon()
    store.replace(lease.name, encode({**decode(world.data(lease.name), ""), **change}))
    advice = rf"{lease.id}\.json.*when nobody publishes .* any more, remove this object"
    with pytest.raises(IntegrityError, match=advice):
        list_leases(store)
    with pytest.raises(IntegrityError, match=advice):
        world.registry.gc(grace=0)
    with pytest.raises(IntegrityError, match=advice):
        world.registry.pending()
    assert lease.name in world.names()
    store.delete([lease.name])
    assert world.registry.pending() == []
    assert world.registry.gc(grace=0).leases == 0


@pytest.mark.parametrize("name", [layout.collection("0" * 32), layout.verdict("0" * 32)])
@pytest.mark.parametrize("data", [b"", b"not ours", encode({"token": "x", "blobs": 1, "at": ""})])
def test_a_damaged_collection_is_an_error_that_tells_what_to_do(
    name: str, data: bytes, world: World, tmp_path: Path
) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    registry = world.registry
    registry.store.create(name, data)
    for call in (registry.gc, lambda: registry.push("m", tmp_path / "model")):
        with pytest.raises(
            IntegrityError, match=rf"{name}.*when no gc .* any more, remove this object"
        ):
            call()
    assert name in world.names()
    registry.store.delete([name])
    assert registry.push("m", tmp_path / "model").number == 1
    registry.gc(grace=0)
    world.check_collected()


def test_of_a_collection_whose_verdict_was_removed_the_next_one_does_the_rest(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    registry = world.registry
    version = registry.push("m", tmp_path / "model")
    registry.delete("m", version.number)
    # Killed after its verdict; that was damaged, and somebody removed it as he was told to.
    condemned = CollectionDocument("x", version.blobs)
    registry.store.create(layout.collection("0" * 32), condemned.dumps())
    assert registry.gc(grace=0).removed == 1
    world.check_collected()
