"""Leases are renewed, released, left to collectors, and checked when they are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from storage.errors import IntegrityError, StorageError, TransferError
from storage.registry import layout, leases
from storage.registry.documents import decode, encode, now
from storage.registry.leases import Lease, list_leases, revoke
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
        assert (found.blobs, found.content, found.attempt) == ({DIGEST}, CONTENT, 3)
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
    with pytest.raises(IntegrityError, match=lease.id):
        list_leases(store)
    with pytest.raises(StorageError):
        world.registry.gc(grace=0)
    assert lease.name in world.names()
