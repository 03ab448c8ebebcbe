"""Whatever goes wrong once, no published version is lost and no pending one left without need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.errors import StorageError
from storage.integrations.arkindex import ModelVersionPublisher, publish_model_version
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault
from tests.integrations.arkindex_server import MODEL, Arkindex, PlainClient
from tests.integrations.arkindex_store import Store
from tests.servers.seaweedfs import SeaweedFS

FAULTS: tuple[int | str, ...] = ("reset", "lost", 400, 403, 404, 409, 500)
OPERATIONS = (
    "CreateModelVersion",
    "RetrieveModelVersion",
    "UpdateModelVersion",
    "PartialUpdateModelVersion",
    "DestroyModelVersion",
)


@pytest.fixture
def store(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Store:
    return Store(seaweedfs, shared_bucket, prefix)


@pytest.fixture
def arkindex(store: Store) -> Iterator[Arkindex]:
    with Arkindex(store.sign, store.get) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.bin").write_bytes(b"weights")
    return made


def check(arkindex: Arkindex, store: Store, version: Any) -> None:
    """Check that a version is available, and its archive the one that it says."""
    assert version["state"] == "available"
    assert arkindex.versions[version["id"]]["archive_hash"] == version["archive_hash"]
    data = store.get(version["id"])
    assert data is not None
    assert hashlib.md5(data).hexdigest() == version["archive_hash"]


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_request_goes_wrong(
    arkindex: Arkindex,
    store: Store,
    folder: Path,
    operation: str,
    fault: int | str,
    known: bool,
) -> None:
    client = PlainClient(arkindex)
    if known:
        publish_model_version(client, folder, MODEL)
    arkindex.faults[operation] = [fault]
    try:
        version = publish_model_version(client, folder, MODEL, description="mine")
    except StorageError:
        pending = [one["id"] for one in arkindex.versions.values() if one["state"] == "created"]
        # Only who made one and was not told of it leaves it behind.
        assert not pending or (operation, fault) == ("CreateModelVersion", "lost")
        version = publish_model_version(client, folder, MODEL, description="mine")
    check(arkindex, store, version)
    assert version is not None
    assert version["description"] == "mine"
    assert arkindex.lost == []
    assert sum(one["state"] == "available" for one in arkindex.versions.values()) == 1


@pytest.mark.parametrize(
    "first", [("PartialUpdateModelVersion", "lost"), ("PartialUpdateModelVersion", 500)], ids=str
)
@pytest.mark.parametrize(
    "second", [("RetrieveModelVersion", "reset"), ("DestroyModelVersion", "lost")], ids=str
)
def test_looking_and_removing_go_wrong_too(
    arkindex: Arkindex,
    store: Store,
    folder: Path,
    first: tuple[str, int | str],
    second: tuple[str, int | str],
) -> None:
    publisher = ModelVersionPublisher(PlainClient(arkindex))
    for operation, fault in (first, second):
        arkindex.faults.setdefault(operation, []).append(fault)
    try:
        version = publisher.publish_model_version(folder, MODEL)
    except StorageError:
        version = publish_model_version(PlainClient(arkindex), folder, MODEL)
    check(arkindex, store, version)
    assert arkindex.lost == []


def test_a_store_that_refuses_for_good_leaves_nothing(
    arkindex: Arkindex, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_TRANSFER__THROTTLE_WAIT", "0.01")
    monkeypatch.setenv("STORAGE_TRANSFER__RETRY_WAIT", "0.01")
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "3")
    with FaultProxy(store.endpoint, lambda _: Fault("status", status=503), store="s3") as proxy:
        store.endpoint = proxy.endpoint
        with pytest.raises(StorageError, match="tried 3 times"):
            publish_model_version(PlainClient(arkindex), folder, MODEL)
        assert proxy.count("PUT") == 3
    assert arkindex.versions == {}
    assert store.ids() == []
