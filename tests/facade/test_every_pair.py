"""A real model of 90 MB from each of the seven stores to each of them, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage import (
    AzureConfig,
    GCSConfig,
    HFConfig,
    PVCConfig,
    Storage,
    StorageOperations,
)
from tests.facade.stores import s3_config, sha256_of_files
from tests.servers import SeaweedFS
from tests.servers.azurite import Azurite
from tests.servers.gcs import FakeGCS
from tests.servers.hub import Hub
from tests.servers.nginx_http import NginxHTTP

pytestmark = pytest.mark.slow

SEVEN = ("s3", "gs", "azure", "pvc", "file", "http", "hf")


@dataclass(frozen=True)
class End:
    """A place for trees in one store."""

    base: str
    config: Any = None
    lists: bool = True


@pytest.fixture(scope="module")
def ends(
    request: pytest.FixtureRequest,
    module_hub: Hub,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], End]]:
    made: dict[str, End] = {}
    makers: dict[str, Callable[[], End]] = {
        "s3": lambda: _s3(request.getfixturevalue("seaweedfs"), bucket("shared_bucket")),
        "gs": lambda: _gs(request.getfixturevalue("gcs_server"), bucket("gcs_shared_bucket")),
        "azure": lambda: _azure(
            request.getfixturevalue("azurite"), bucket("azurite_shared_container")
        ),
        "pvc": lambda: _pvc(tmp_path_factory.mktemp("claims")),
        "file": lambda: End(str(tmp_path_factory.mktemp("files"))),
        "http": lambda: _http(request.getfixturevalue("nginx_http")),
        "hf": lambda: _hf(module_hub),
    }

    def bucket(fixture: str) -> str:
        name: str = request.getfixturevalue(fixture)
        return name

    def end(name: str) -> End:
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    yield end
    for one in made.values():
        if one.lists:
            StorageOperations.delete_object(f"{one.base}/", config=one.config, recursive=True)


def _s3(server: SeaweedFS, bucket: str) -> End:
    return End(f"s3://{bucket}/pairs", s3_config(server, "obstore"))


def _gs(server: FakeGCS, bucket: str) -> End:
    # The server takes no writes of obstore's.
    config = GCSConfig(
        project_id=server.project, token="any", endpoint_url=server.endpoint, driver="fsspec"
    )
    return End(f"gs://{bucket}/pairs", config)


def _azure(server: Azurite, container: str) -> End:
    config = AzureConfig(*server.main, endpoint_url=server.account_url())
    return End(f"azure://{container}/pairs", config)


def _pvc(folder: Path) -> End:
    (folder / "models").mkdir()
    return End("pvc://models/pairs", PVCConfig(mount_root=folder))


def _http(server: NginxHTTP) -> End:
    return End(f"{server.endpoint}/pairs", lists=False)


def _hf(hub: Hub) -> End:
    repo = hub.repo("owner/pairs")
    return End(f"hf://{repo.id}/pairs", HFConfig(hub.writer.token, hub.url))


@pytest.fixture(scope="module")
def expected(minilm: Path) -> dict[str, str]:
    found = sha256_of_files(minilm)
    assert len(found) > 10
    return found


@pytest.fixture(scope="module")
def sources(
    ends: Callable[[str], End], minilm: Path, expected: dict[str, str]
) -> Callable[[str], End]:
    """Call it with a store's name to get the model in it, below ``source``."""
    filled: set[str] = set()

    def filled_end(name: str) -> End:
        one = ends(name)
        if name not in filled:
            assert Storage.upload(minilm, f"{one.base}/source", config=one.config) is True
            filled.add(name)
        return one

    return filled_end


@pytest.mark.parametrize("target", SEVEN)
@pytest.mark.parametrize("source", SEVEN)
def test_the_model_arrives_whole(
    sources: Callable[[str], End],
    ends: Callable[[str], End],
    expected: dict[str, str],
    source: str,
    target: str,
    tmp_path: Path,
) -> None:
    one, two = sources(source), ends(target)
    place = f"from-{source}"
    # Plain HTTP has no listings: there, a tree is the files that somebody can name.
    steps = [("", "")] if one.lists else [(f"/{path}", f"/{path}") for path in expected]
    for path, to in steps:
        StorageOperations.copy_object(
            f"{one.base}/source{path}",
            f"{two.base}/{place}{to}",
            config=one.config,
            dest_config=two.config,
        )
    copied = tmp_path / "copied"
    if two.lists:
        listed = StorageOperations.list_objects(f"{two.base}/{place}", config=two.config)
        assert listed == sorted(expected)
        Storage.download(f"{two.base}/{place}", copied, config=two.config)
        StorageOperations.delete_object(f"{two.base}/{place}", config=two.config, recursive=True)
    else:
        for path in expected:
            Storage.download(f"{two.base}/{place}/{path}", copied / path, config=two.config)
            StorageOperations.delete_object(f"{two.base}/{place}/{path}", config=two.config)
    assert sha256_of_files(copied) == expected
