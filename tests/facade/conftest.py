"""Every store as one parametrised fixture, and a default client of its own for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.facade
from storage import StorageClient
from storage.backends.base import Backend
from storage.config import load_settings
from tests.facade.stores import (
    CONFIGS,
    AzureStore,
    BucketStore,
    FileStore,
    GCSStore,
    HubStore,
    MemoryStore,
    PVCStore,
    S3Store,
    Store,
    stores_with,
)

# Second servers and second drivers: for the inner loop, one of each kind will do.
SLOW_STORES = ("moto-obstore", "moto-fsspec", "seaweedfs-fsspec", "azurite-fsspec")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``store`` on all stores that have what it needs."""
    if "store" in metafunc.fixturenames:
        needed = getattr(metafunc.function, "needed_features", ())
        slow = (*SLOW_STORES, *getattr(metafunc.function, "slow_stores", ()))
        names = [
            pytest.param(name, marks=pytest.mark.slow if name in slow else ())
            for name in stores_with(needed)
        ]
        metafunc.parametrize("store", names, indirect=True)


def bucket_store(request: pytest.FixtureRequest, name: str, prefix: str) -> BucketStore:
    """Return a store on a server of buckets, by one of its drivers."""
    kind, _, driver = name.partition("-")
    store, fixture, bucket = {
        "seaweedfs": (S3Store, "seaweedfs", "shared_bucket"),
        "moto": (S3Store, "moto", "moto_shared_bucket"),
        "gcs": (GCSStore, "gcs_server", "gcs_shared_bucket"),
        "azurite": (AzureStore, "azurite", "azurite_shared_container"),
    }[kind]
    server = request.getfixturevalue(fixture)
    config = CONFIGS[kind](server, driver)
    place = f"{prefix}-{driver}"
    return store(name, server, driver, request.getfixturevalue(bucket), place, config)


def any_store(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    prefix: str,
) -> Store:
    """Return the store with a name out of ``STORES``, with a fresh, empty place."""
    if name == "memory":
        return MemoryStore()
    if name == "file":
        return FileStore(tmp_path_factory.mktemp("files") / "place")
    if name == "pvc":
        return PVCStore(tmp_path_factory.mktemp("mounts"))
    if name == "hub":
        return HubStore(request.getfixturevalue("hub"))
    return bucket_store(request, name, prefix)


@pytest.fixture
def make_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefix: str
) -> Callable[[str], Store]:
    """Call it with a name out of ``STORES`` to get that store with a fresh, empty place."""
    return lambda name: any_store(request, tmp_path_factory, name, prefix)


@pytest.fixture
def store(request: pytest.FixtureRequest, make_store: Callable[[str], Store]) -> Store:
    """A store with a fresh, empty place."""
    return make_store(request.param)


@pytest.fixture(scope="session")
def _connections() -> Iterator[dict[Any, Backend]]:
    """Backends that all tests share: s3fs takes a second to make its client."""
    shared: dict[Any, Backend] = {}
    yield shared
    for backend in shared.values():
        backend.close()


@pytest.fixture(autouse=True)
def _default_client(
    _isolated_test: None, _connections: dict[Any, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the facades have a client of this test's environment, over connections already made."""
    client = StorageClient()
    client._backends = _connections
    monkeypatch.setattr(storage.facade, "_client", client)


@pytest.fixture
def fresh_default_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the facades make their client themselves on first use, as in a new process."""
    monkeypatch.setattr(storage.facade, "_client", None)
    yield
    if storage.facade._client is not None:
        storage.facade._client.close()


@pytest.fixture
def small_parts() -> Iterator[StorageClient]:
    """A client that fetches objects in parts of 1 MiB, two at once."""
    settings = load_settings(transfer={"part_size": "1MiB", "connections": 2})
    with StorageClient(settings=settings) as client:
        yield client


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder, for destinations."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
