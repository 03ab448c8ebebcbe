"""A registry in a folder that others serve, by SFTP, FTP or WebDAV: it is read, not written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage import ModelMissingError, StorageClient, UnsupportedOperation
from storage.cli import main
from storage.config import load_settings
from storage.registry import ModelRegistry
from tests.backends.fsspec_servers import FolderServer, FtpServer, SftpServer, WebdavServer
from tests.cache.support import blocked_sockets
from tests.facade.stores import tree_bytes
from tests.registry.conftest import MakeFolder

MODEL = {"config.json": b'{"layers": 2}', "empty": b"", "sub/ü +%#.bin": bytes(range(256)) * 5000}
NEXT = MODEL | {"config.json": b'{"layers": 3}'}


@dataclass(frozen=True)
class Served:
    """A registry with three versions of ``iris``, the last of them deleted."""

    uri: str
    folder: Path

    def keys(self) -> set[str]:
        return set(tree_bytes(self.folder))


@pytest.fixture(scope="module", params=[SftpServer, FtpServer, WebdavServer])
def server(request: pytest.FixtureRequest) -> Iterator[FolderServer]:
    with request.param() as running:
        yield running


@pytest.fixture
def served(server: FolderServer, prefix: str, folder: MakeFolder) -> Served:
    place = server.data / prefix
    writer = ModelRegistry(place)
    writer.init()
    for files in (MODEL, NEXT, {"third": b"3"}):
        writer.push("iris", folder(files))
    writer.set_alias("iris", "production", 1)
    writer.update("iris", 1, description="good")
    writer.delete("iris", 3)
    return Served(f"{server.url}{prefix}", place)


@pytest.fixture
def open_reader(served: Served, tmp_path: Path) -> Iterator[Callable[..., ModelRegistry]]:
    made: list[StorageClient] = []

    def make(**settings: bool) -> ModelRegistry:
        client = StorageClient(settings=load_settings(cache_dir=tmp_path / "cache", **settings))
        made.append(client)
        return ModelRegistry(served.uri, client=client)

    yield make
    for client in made:
        client.close()


def test_all_that_is_there_is_found(open_reader: Callable[..., ModelRegistry]) -> None:
    reader = open_reader()
    assert reader.exists()
    assert reader.models() == ["iris"]
    assert reader.numbers("iris") == [1, 2]
    assert [version.number for version in reader.versions("iris")] == [1, 2]
    assert reader.aliases("iris") == {"production": 1}
    assert [entry.version for entry in reader.alias_history("iris", "production")] == [1]
    assert reader.find("iris").number == 2
    assert reader.show("iris", "production").attributes.description == "good"
    assert [new.path for _, new in reader.diff("iris", 1).changed] == ["config.json"]
    assert reader.pending() == []
    for reference in (3, "staging"):
        with pytest.raises(ModelMissingError):
            reader.show("iris", reference)


def test_versions_are_pulled_and_are_there_offline(
    open_reader: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    reader = open_reader()
    for reference, files in ((1, MODEL), ("production", MODEL), ("latest", NEXT)):
        assert tree_bytes(reader.pull("iris", reference, tmp_path / str(reference))) == files
        assert tree_bytes(reader.pull("iris", reference)) == files
    away = open_reader(offline=True)
    with blocked_sockets():
        assert tree_bytes(away.pull("iris", "production")) == MODEL
        assert tree_bytes(away.pull("iris", 2)) == NEXT


def test_nothing_is_written(
    open_reader: Callable[..., ModelRegistry], served: Served, folder: MakeFolder
) -> None:
    reader = open_reader()
    before = served.keys()
    for call in (
        lambda: reader.push("iris", folder({"other": b""})),
        lambda: reader.set_alias("iris", "production", 2),
        lambda: reader.update("iris", 1, description="bad"),
        lambda: reader.delete("iris", 1),
        lambda: reader.gc(),
    ):
        with pytest.raises(UnsupportedOperation, match="only if it is absent"):
            call()
    assert served.keys() == before


def test_the_command_reads_it_too(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["registry", "ls", served.uri]) == 0
    assert main(["registry", "ls", served.uri, "iris", "--quiet"]) == 0
    assert main(["registry", "show", served.uri, "iris@production", "--quiet"]) == 0
    assert main(["registry", "pull", served.uri, "iris", str(tmp_path / "out")]) == 0
    assert tree_bytes(tmp_path / "out") == NEXT
    out, err = capsys.readouterr()
    assert "description: good" in out
    assert not any(secret in out + err for secret in ("pass@word", "pass%40word"))
