"""Sources and clients of the tests of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.cache.cache import ModelCache
from storage.config import load_settings
from tests.cache.parcels import MODEL, OTHER, archive, packed
from tests.cache.support import SOURCES, Source, make_source
from tests.servers import OddHTTP
from tests.servers.odd_http import StaticFile

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


# -- parcels ---------------------------------------------------------------------------------


@pytest.fixture
def far(tmp_path: Path, make_client: MakeClient) -> ModelCache:
    """An empty cache of a machine without a network."""
    return make_client(cache_dir=tmp_path / "far").cache


@pytest.fixture
def models(make_client: MakeClient, source: Source) -> dict[str, dict[str, bytes]]:
    """Two cached models that share a file, by their URIs."""
    files = {source.put_model(MODEL): MODEL, source.put_model(OTHER, "other"): OTHER}
    client = make_client()
    for uri in files:
        client.download(uri, config=source.config)
    client.cache.close()  # else they are leased as long as this process lives
    return files


@pytest.fixture
def parcel(make_client: MakeClient, models: dict[str, dict[str, bytes]]) -> bytes:
    return packed(make_client().cache)


@pytest.fixture
def served_archive(odd_http: Callable[..., OddHTTP], tmp_path: Path) -> str:
    """The URL of an archive with a program, a link and an empty folder in it."""
    return f"{odd_http(StaticFile(archive(tmp_path).read_bytes())).url}/model.tar"
