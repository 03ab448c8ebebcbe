"""Deleting and collecting on every store that can hold a registry."""

from __future__ import annotations

from storage.registry import layout
from storage.registry.leases import Lease
from tests.registry.conftest import MakeFolder, OpenRegistry


def test_what_was_deleted_or_given_up_goes_and_the_rest_stays(
    open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    registry = open_registry()
    registry.init()
    kept = registry.push("one", folder({"shared": b"shared", "own": b"of one"}))
    gone = registry.push("two", folder({"shared": b"shared", "own": b"of two!"}))
    registry.delete("two", gone.number)
    collected = open_registry().gc()
    assert (collected.removed, collected.freed, collected.kept) == (1, 7, 2)
    assert set(registry.store.names(layout.BLOBS)) == kept.blobs

    dead = registry.begin("three")
    dead.add(folder({"own": b"of three"}))
    (lease,) = registry.pending()
    assert (lease.model, lease.id) == ("three", dead.id)
    assert registry.gc().removed == 0
    # Some stores tell the time in whole seconds.
    while registry.pending():
        registry.gc(grace=0)
    assert set(registry.store.names(layout.BLOBS)) == kept.blobs
    assert not registry.store.names(layout.COLLECTIONS)
    version = dead.commit()
    assert registry.find("three") == version
    assert registry.gc().removed == 0
    assert registry.models() == ["one", "three"]


def test_an_abandoned_lease_cannot_commit_after_a_collection(
    open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    registry = open_registry()
    registry.init()
    content = "ab" * 32
    lease = Lease.take(registry.store, "m", [], pending="p", content=content, attempt=1)
    lease.abandon()
    while registry.pending():
        registry.gc(grace=0)
    entry = layout.entry(layout.content_log("m", content), 1)
    assert not registry.store.create(entry, b"{}")
    assert registry.models() == []
