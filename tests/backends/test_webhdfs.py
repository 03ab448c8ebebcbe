"""HDFS over HTTP by fsspec's driver, against a server of the tests; see there what it is."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from fsspec.implementations.webhdfs import WebHDFS as PlainWebHDFS
from requests import Response

from storage import (
    AuthenticationError,
    FsspecConfig,
    ModelMissingError,
    OfflineError,
    StorageClient,
    StorageError,
)
from storage.backends.drivers.fsspec_webhdfs import _careful
from storage.config import Settings
from storage.errors import TransferError
from storage.uri import parse_uri
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.webhdfs import PASSWORD, USER, WebHDFS

LARGE = os.urandom(9_000_000)
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "weights/large.bin": LARGE,
    "weights/deep/er/small": b"x",
    "odd name +=ä.txt": b"odd",
}


@pytest.fixture
def hdfs(odd_http: Callable[..., OddHTTP]) -> Iterator[WebHDFS]:
    server = WebHDFS(odd_http(lambda request: Reply(500)))
    for path, data in FILES.items():
        server.put(f"/user/me/m/{path}", data)
    server.put("/user/me/m-v2/config.json", b"of another model")
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


def test_a_folder_is_downloaded(hdfs: WebHDFS, client: StorageClient, tmp_path: Path) -> None:
    client.download(f"{hdfs.uri}/user/me/m", tmp_path / "m")

    assert tree(tmp_path / "m") == FILES


def test_a_file_is_downloaded_from_the_data_node_in_parts(
    hdfs: WebHDFS, client: StorageClient
) -> None:
    found = client.download(f"{hdfs.uri}/user/me/m/weights/large.bin")

    assert Path(found).read_bytes() == LARGE
    asked = [one for one in hdfs.opened() if one.headers["Host"].startswith("localhost")]
    lengths = [int(parse_qs(one.target.partition("?")[2])["length"][0]) for one in asked]
    assert sum(lengths) == len(LARGE)
    assert max(lengths) <= 8 * 1024 * 1024


def test_a_part_of_a_file_is_read(hdfs: WebHDFS, client: StorageClient) -> None:
    with client.open(f"{hdfs.uri}/user/me/m/weights/large.bin") as file:
        file.seek(8_000_000)
        assert file.read(100) == LARGE[8_000_000:8_000_100]


def test_a_repeat_fetches_no_file(hdfs: WebHDFS) -> None:
    uri = f"{hdfs.uri}/user/me/m"
    with StorageClient() as first:
        path = first.download(uri)
    hdfs.server.clear()
    with StorageClient() as second:
        assert second.download(uri) == path
        assert not hdfs.opened()
        hdfs.server.clear()
        assert second.download(uri, offline=True) == path
        assert not hdfs.server.requests
        hdfs.put("/user/me/m/config.json", b"[]")
        assert tree(second.download(uri))["config.json"] == b"[]"
    assert {one.target.split("?")[0] for one in hdfs.opened()} == {
        "/webhdfs/v1/user/me/m/config.json"
    }


def test_offline_nothing_is_asked(hdfs: WebHDFS, client: StorageClient) -> None:
    with pytest.raises(OfflineError):
        client.download(f"{hdfs.uri}/user/me/m", offline=True)
    assert not hdfs.server.requests


def test_objects_are_listed_and_described(hdfs: WebHDFS, client: StorageClient) -> None:
    assert client.list_objects(f"{hdfs.uri}/user/me/m") == sorted(FILES)
    found = client.get_object_metadata(f"{hdfs.uri}/user/me/m/weights/large.bin")
    assert found["size"] == len(LARGE)
    number = hdfs.files["/user/me/m/weights/large.bin"][1]
    assert found["etag"] == f'"{number}-{1_770_000_000_000 + number}-{len(LARGE)}"'
    assert isinstance(found["modified_time"], (str, datetime))
    assert datetime.fromtimestamp(1_770_000_000, UTC).strftime("%Y-%m-%d") in str(
        found["modified_time"]
    )


def test_what_is_not_there_is_said(hdfs: WebHDFS, client: StorageClient) -> None:
    for path in ("user/me/mm", "user/me/m/nothing", "user/me/m/config.json/x"):
        with pytest.raises(ModelMissingError):
            client.download(f"{hdfs.uri}/{path}")


def test_a_gateway_wants_user_and_password(hdfs: WebHDFS, client: StorageClient) -> None:
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    hdfs.authorization = f"Basic {login}"
    uri = f"{hdfs.uri}/user/me/m"

    with pytest.raises(AuthenticationError):
        client.download(uri)
    wrong = FsspecConfig({"user": USER, "password": "a-wrong-password"})
    with pytest.raises(AuthenticationError) as caught:
        client.download(uri, config=wrong)
    assert "a-wrong-password" not in str(caught.value)
    # The data node gets none of it; see the fixture.
    config = FsspecConfig({"user": USER, "password": PASSWORD})
    assert tree(client.download(uri, config=config)) == FILES


def test_the_name_of_a_user_is_told(hdfs: WebHDFS, client: StorageClient) -> None:
    client.list_objects(f"{hdfs.uri}/user/me/m", config=FsspecConfig({"user": "me"}))

    assert all("user.name=me" in request.target for request in hdfs.server.requests)


def test_an_error_of_a_data_node_is_no_content(
    hdfs: WebHDFS, client: StorageClient, tmp_path: Path
) -> None:
    hdfs.broken = True

    with pytest.raises(TransferError):
        client.download(f"{hdfs.uri}/user/me/m", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_from_https_nothing_leads_to_http() -> None:
    cls = _careful(PlainWebHDFS)
    fs = cls("namenode.example", 9871, use_https=True, skip_instance_cache=True)
    with fs.session as session:
        with pytest.raises(StorageError, match="led from https"):
            session.get("http://127.0.0.1:9/x?delegation=secret")
        for target, refused in [("http://d.example/x?delegation=secret", True), ("/x", False)]:
            answer = Response()
            answer.status_code, answer.url = 307, "https://namenode.example:9871/"
            answer.headers["Location"] = target
            with pytest.raises(StorageError) if refused else nullcontext() as caught:
                assert session.get_redirect_target(answer) == target
            assert "secret" not in str(caught and caught.value)


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        ("hdfs://namenode:8020/user/me/m", "namenode:8020", "user/me/m"),
        ("hdfs:///user/me/m", "", "user/me/m"),
        ("webhdfs://me@namenode:9870/user/me/m", "namenode:9870", "user/me/m"),
    ],
)
def test_a_uri_names_the_name_node_and_a_path(uri: str, bucket: str, key: str) -> None:
    found = parse_uri(uri)

    assert (found.bucket, found.key, found.is_local) == (bucket, key, False)


def test_without_hadoop_its_own_protocol_says_what_is_missing(client: StorageClient) -> None:
    with pytest.raises(StorageError) as caught:
        client.download("hdfs://127.0.0.1:1/user/me/m")

    assert "\n" not in str(caught.value)
    assert "hdfs://127.0.0.1:1/" in str(caught.value)
