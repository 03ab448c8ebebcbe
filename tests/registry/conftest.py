"""Registries on every store that can hold one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.backends.base import Backend
from storage.registry import ModelRegistry
from tests.facade.conftest import any_store
from tests.facade.stores import Store

REGISTRY_STORES = (
    "memory",
    "file",
    "pvc",
    "seaweedfs-obstore",
    "gcs-fsspec",
    "azurite-obstore",
    "hub",
    # Second servers and second drivers.
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("moto-obstore", "moto-fsspec", "seaweedfs-fsspec", "azurite-fsspec")
    ),
)

OpenRegistry = Callable[[], ModelRegistry]
MakeFolder = Callable[[Mapping[str, bytes]], Path]


@pytest.fixture(params=REGISTRY_STORES)
def registry_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefix: str
) -> Store:
    """A store with a fresh, empty place."""
    return any_store(request, tmp_path_factory, request.param, prefix)


@pytest.fixture
def registry_uri(registry_store: Store) -> str:
    """The URI of an empty place for a registry."""
    return registry_store.base


@pytest.fixture(scope="session")
def _connections() -> Iterator[dict[Any, Backend]]:
    """Backends that all tests share: their clients take long to make."""
    shared: dict[Any, Backend] = {}
    yield shared
    for backend in shared.values():
        backend.close()


@pytest.fixture
def client(_isolated_test: None, _connections: dict[Any, Backend]) -> StorageClient:
    """A client of this test's environment, over connections already made."""
    client = StorageClient()
    client._backends = _connections
    return client


@pytest.fixture
def open_registry(registry_store: Store, client: StorageClient) -> OpenRegistry:
    """Call it for another look at the same registry, which remembers nothing."""

    def make() -> ModelRegistry:
        return ModelRegistry(registry_store.base, config=registry_store.config, client=client)

    return make


@pytest.fixture
def registry(open_registry: OpenRegistry) -> ModelRegistry:
    """A fresh registry on each store."""
    registry = open_registry()
    registry.init()
    return registry


@pytest.fixture
def here(tmp_path: Path, client: StorageClient) -> ModelRegistry:
    """A fresh registry in a folder, for what is the same on every store."""
    registry = ModelRegistry(tmp_path / "registry", client=client)
    registry.init()
    return registry


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Call it with files to get a folder of them."""

    def make(files: Mapping[str, bytes]) -> Path:
        made = tmp_path_factory.mktemp("model")
        for path, data in files.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_bytes(data)
        return made

    return make
