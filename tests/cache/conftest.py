"""Sources and clients of the tests of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.config import load_settings
from tests.cache.support import SOURCES, Source, make_source

MakeClient = Callable[..., StorageClient]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with ``source`` on every kind, or on those that ``kinds`` marks."""
    if "source" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("kinds")
        kinds = SOURCES if marker is None else marker.args
        metafunc.parametrize("source", kinds, indirect=True)


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Source:
    """A new, empty source that counts."""
    return make_source(request, request.param)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Root of a cache that is not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def make_client(cache: Path) -> Iterator[MakeClient]:
    """Make clients of the cache; they are closed at the end."""
    made: list[StorageClient] = []

    def make(**settings: Any) -> StorageClient:
        client = StorageClient(settings=load_settings(**{"cache_dir": cache} | settings))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make_client: MakeClient) -> StorageClient:
    """A client of the cache with the usual settings."""
    return make_client()
