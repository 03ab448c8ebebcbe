"""ModelScope, against a server that its own client downloads from as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ModelScopeConfig,
    OfflineError,
    StorageClient,
    StorageError,
    UnsupportedOperation,
)
from storage.backends import modelscope
from storage.config import Settings
from storage.errors import BucketMissingError
from storage.uri import parse_uri
from tests.servers.modelscope import TOKEN, ModelScope
from tests.servers.odd_http import OddHTTP, Reply, Request

LARGE = os.urandom(2_500_000)
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "weights/deep/large.bin": LARGE,
    "naïve 100% [1] #x.txt": b"odd name",
}
URI = "modelscope://owner/m"


@pytest.fixture
def service(
    odd_http: Callable[..., OddHTTP], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModelScope]:
    server = ModelScope(odd_http(lambda request: Reply(500)))
    server.models["owner/m"] = {"master": dict(FILES), "v1": {"config.json": b"first"}}
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.server.url)
    yield server
    assert not server.leaks


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=Settings(transfer={"attempts": 2, "retry_wait": 0.01})) as client:
        yield client


def tree(path: str | Path) -> dict[str, bytes]:
    root = Path(path)
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def test_a_model_is_downloaded_as_its_own_client_does(
    service: ModelScope, client: StorageClient, tmp_path: Path
) -> None:
    script = (
        "import sys; from modelscope_hub import HubApi; "
        "HubApi(endpoint=sys.argv[1]).download_repo('owner/m', 'model', local_dir=sys.argv[2])"
    )
    command = [sys.executable, "-c", script, service.server.url, str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    client.download(URI, tmp_path / "ours")

    theirs = {
        name: data for name, data in tree(tmp_path / "theirs").items() if not name.startswith(".")
    }
    assert tree(tmp_path / "ours") == FILES == theirs


def test_a_revision_a_folder_and_a_file_are_downloaded(
    service: ModelScope, client: StorageClient
) -> None:
    assert tree(client.download(f"{URI}:v1")) == {"config.json": b"first"}
    assert tree(client.download(URI, config=ModelScopeConfig(revision="v1"))) == {
        "config.json": b"first"
    }
    assert tree(client.download(f"{URI}/weights")) == {"deep/large.bin": LARGE}
    assert Path(client.download(f"{URI}/weights/deep/large.bin")).read_bytes() == LARGE
    with pytest.raises(ModelMissingError):
        client.download(f"{URI}/weight")


def test_a_repeat_fetches_no_file(service: ModelScope) -> None:
    with StorageClient() as first:
        path = first.download(URI)
    before = len(service.server.requests)
    with StorageClient() as second:
        assert second.download(URI) == path
        repeat = [request.target for request in service.server.requests[before:]]
        assert second.download(URI, offline=True) == path

    assert all("/repo/files?" in target for target in repeat)
    assert len(service.server.requests) == before + len(repeat)


def test_offline_nothing_is_asked(service: ModelScope, client: StorageClient) -> None:
    with pytest.raises(OfflineError):
        client.download(URI, offline=True)

    assert not service.server.requests


def test_parts_of_files_are_read(service: ModelScope, client: StorageClient) -> None:
    with client.open(f"{URI}/weights/deep/large.bin") as file:
        file.seek(2_000_000)
        assert file.read(100) == LARGE[2_000_000:2_000_100]
    # A small file is sent whole, whatever is asked for.
    with client.open(f"{URI}/naïve 100% [1] #x.txt") as file:
        file.seek(4)
        assert file.read(4) == b"name"


def test_a_private_model_wants_a_token(
    service: ModelScope, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.private.add("owner/m")
    with pytest.raises(BucketMissingError, match="token is missing"):
        client.download(URI)

    assert tree(client.download(URI, config=ModelScopeConfig(TOKEN))) == FILES
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with pytest.raises(BucketMissingError):
        client.download(URI, config=ModelScopeConfig(anonymous=True))
    assert client.list_objects(URI) == sorted(FILES)


def test_a_token_that_is_refused_is_said_and_not_shown(
    service: ModelScope, client: StorageClient
) -> None:
    service.server.handler = lambda request: Reply(401, b"{}")

    with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
        client.download(URI, config=ModelScopeConfig("a-wrong-token"))

    assert "a-wrong-token" not in str(caught.value)
    assert len(service.server.requests) == 1


@pytest.mark.parametrize("path", ["config.json", "weights/deep/large.bin"])
def test_wrong_bytes_are_not_published(
    service: ModelScope, client: StorageClient, tmp_path: Path, path: str
) -> None:
    service.served[path] = bytes(len(FILES[path]))

    with pytest.raises(StorageError) as caught:
        client.download(URI, tmp_path / "m")

    assert isinstance(caught.value, IntegrityError) or "replaced" in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["owner/other", "other/m"])
def test_a_model_that_is_not_there_is_said(
    service: ModelScope, client: StorageClient, name: str
) -> None:
    for uri in (f"modelscope://{name}", f"modelscope://{name}/config.json", f"{URI}:v9"):
        with pytest.raises(ModelMissingError):
            client.download(uri)


def test_a_listing_that_is_cut_in_silence_is_continued_by_folders(
    service: ModelScope, client: StorageClient
) -> None:
    files = {f"{folder}/{n:04}": b"" for folder in "abc" for n in range(1100)}
    service.models["owner/m"]["master"] = files

    assert client.list_objects(URI) == sorted(files)

    service.models["owner/m"]["master"] = {f"{n:04}": b"" for n in range(3100)}
    with pytest.raises(UnsupportedOperation, match="3000 entries"):
        client.list_objects(URI)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b'{"Data": 5}',
        b'{"Data": {"Files": [3]}}',
        b'{"Data": {"Files": [{"Path": "a", "Size": 1e999}]}}',
        b'{"Data": {"Files": [{"Path": "a", "Size": -1}]}}',
        b"[" * 900_000,
    ],
    ids=range(7),
)
def test_what_is_no_modelscope_is_said(
    service: ModelScope, client: StorageClient, body: bytes
) -> None:
    service.server.handler = lambda request: Reply(200, body)

    with pytest.raises(StorageError, match="none of ModelScope"):
        client.list_objects(URI)


def test_a_folder_that_is_in_itself_is_asked_for_once(
    service: ModelScope, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelscope, "_LISTED", 2)
    folders = [{"Path": path, "Type": "tree", "Size": 0} for path in ("up", "other")]

    def answer(request: Request) -> Reply:
        found = folders if "Recursive=True" in request.target else folders[:1]
        return Reply(200, json.dumps({"Data": {"Files": found}}).encode())

    service.server.handler = answer
    with pytest.raises(ModelMissingError):
        client.list_objects(URI)
    assert len(service.server.requests) == 4


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_a_file_that_leads_elsewhere_is_refused(
    service: ModelScope, client: StorageClient, tmp_path: Path, name: str
) -> None:
    service.models["owner/m"]["master"] = {name: b"x", "z": b"x"}
    with pytest.raises(StorageError):
        client.download(URI, tmp_path / "a" / "m")
    assert not list(tmp_path.rglob("evil"))


def test_nothing_is_written(service: ModelScope, client: StorageClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UnsupportedOperation):
        client.upload(tmp_path / "file", f"{URI}/file")


@pytest.mark.parametrize("uri", ["modelscope://m", "modelscope://", "modelscope://o/../m"])
def test_a_uri_without_an_owner_and_a_model_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput, match="there is no repository"):
        parse_uri(uri)
