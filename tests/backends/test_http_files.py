"""What a URL and an answer make of a file: its name, its coding, whether it is one."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from storage.client import StorageClient
from storage.errors import (
    ModelMissingError,
    StorageError,
    TransferError,
    UnsupportedOperation,
)
from storage.testing.conformance_support import content
from tests.backends.http_support import empty, fast_client
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply, Request, StaticFile

PART = 64 * 1024
SIZE = 10 * PART + 7
DATA = content(SIZE)
OLD = formatdate(1_700_000_000, usegmt=True)


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with fast_client() as client:
        yield client


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    yield nginx_http
    empty(nginx_http.data)


def fetched(client: StorageClient, url: str, out: Path) -> bytes:
    return Path(client.download(url, out / "file")).read_bytes()


def coded(coding: str, data: bytes) -> bytes:
    if coding == "deflate":
        return zlib.compress(data)
    if coding == "raw-deflate":
        return zlib.compress(data)[2:-4]
    if coding == "gzip-members":
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    return gzip.compress(data)


@pytest.mark.parametrize("coding", ["gzip", "gzip-members", "deflate", "raw-deflate"])
def test_content_coding_of_the_transport_is_undone(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, coding: str
) -> None:
    text = b"0123456789" * 500_000
    header = coding.removeprefix("raw-").partition("-")[0]
    body = coded(coding, text)
    server = odd_http(
        StaticFile(
            body,
            headers={
                "Content-Encoding": header,
                "X-Checksum-Sha256": hashlib.sha256(body).hexdigest(),
            },
        )
    )
    assert client.get_object_metadata(f"{server.url}/m.json")["size"] is None
    assert fetched(client, f"{server.url}/m.json", tmp_path) == text
    assert {one.headers["Accept-Encoding"] for one in server.requests} == {"identity"}


@pytest.mark.parametrize("damage", [-20, 20], ids=["cut", "rubbish"])
def test_damaged_content_coding_is_no_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, damage: int
) -> None:
    body = gzip.compress(DATA)
    body = body[:damage] if damage < 0 else body[:1000] + bytes(damage) + body[1000:]
    server = odd_http(StaticFile(body, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(TransferError, match="no whole gzip stream"):
        client.download(f"{server.url}/m.json", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_unknown_content_coding_is_refused(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA, headers={"Content-Encoding": "br"}))
    with pytest.raises(UnsupportedOperation, match="content coding 'br'"):
        client.download(f"{server.url}/m.json", tmp_path / "file")


def test_nginx_that_always_compresses_gives_the_plain_file(
    nginx: NginxHTTP, client: StorageClient, tmp_path: Path
) -> None:
    put_file(nginx.data, "model.json.gz", gzip.compress(b'{"a": 1}'))
    assert fetched(client, f"{nginx.odd}/compressed/model.json", tmp_path) == b'{"a": 1}'


@pytest.mark.parametrize("name", ["model.tar.gz", "model.pkl.gz", "model.tgz"])
def test_compressed_file_announced_as_a_coding_stays_compressed(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, name: str
) -> None:
    body = gzip.compress(DATA)
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/x-tar"}
    server = odd_http(StaticFile(body, headers=headers))
    path = client.download(f"{server.url}/{name}", f"{tmp_path}/")
    assert path == str(tmp_path / name)
    assert Path(path).read_bytes() == body
    # Compressed as it is, its ranges are those of the file.
    assert len(server.asked("GET")) == -(-len(body) // PART)


@pytest.mark.parametrize(
    ("path", "disposition", "name"),
    [
        ("m/a%20b.bin", None, "a b.bin"),
        ("m/model.bin", 'attachment; filename="other.bin"', "model.bin"),
        ("api/models/17", 'attachment; filename="other.safetensors"', "other.safetensors"),
        ("api/models/17", 'attachment; filename="../../evil.sh"', "evil.sh"),
        ("api/models/17", 'attachment; filename=".."', "17"),
        ("api/models/17", None, "17"),
        ("m/..%2F..%2Fmodel.bin", None, "model.bin"),
        ("m/mod%C3%A8le", None, "modèle"),
        ("m/model?file=x.bin", None, "model"),
    ],
)
def test_file_is_named_after_the_url_or_else_by_the_server(
    odd_http: Callable[..., OddHTTP],
    client: StorageClient,
    tmp_path: Path,
    path: str,
    disposition: str | None,
    name: str,
) -> None:
    headers = {} if disposition is None else {"Content-Disposition": disposition}
    server = odd_http(StaticFile(DATA, headers=headers))
    if "%2F" in path:
        with pytest.raises(StorageError, match=r"'\.\.'"):
            client.download(f"{server.url}/{path}", f"{tmp_path}/")
        assert server.requests == []
        return
    assert client.download(f"{server.url}/{path}", f"{tmp_path}/") == str(tmp_path / name)
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("a%20b/c%2Bd", "/a%20b/c%2Bd"),
        ("a b/é", "/a%20b/%C3%A9"),
        ("owner%2Fmodel/raw", "/owner%2Fmodel/raw"),
        ("//double//m.bin", "///double//m.bin"),
        ("a+b/[1]", "/a+b/%5B1%5D"),
        ("m.bin?sig=a%2Fb%3D&x=1+2", "/m.bin?sig=a%2Fb%3D&x=1+2"),
    ],
)
def test_url_is_sent_as_it_is_written(
    odd_http: Callable[..., OddHTTP], client: StorageClient, path: str, sent: str
) -> None:
    server = odd_http(StaticFile(DATA))
    client.get_object_metadata(f"{server.url}/{path}")
    assert [one.target for one in server.requests] == [sent]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("models/iris", ModelMissingError),
        ("models/iri", ModelMissingError),
        ("models", ModelMissingError),
        ("none/at/all", ModelMissingError),
        # Nothing but a tree can be meant.
        ("models/iris/", UnsupportedOperation),
        ("", UnsupportedOperation),
    ],
)
def test_folder_and_nothing_are_no_file(
    nginx: NginxHTTP,
    client: StorageClient,
    tmp_path: Path,
    path: str,
    kind: type[StorageError],
) -> None:
    put_file(nginx.data, "models/iris/model.bin", b"1")
    with pytest.raises(kind):
        client.download(f"{nginx.endpoint}/{path}", tmp_path / "out")


def test_index_of_a_folder_is_no_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    def handler(request: Request) -> Reply:
        if request.path == "/models":
            return Reply(301, headers={"Location": "/models/"})
        return Reply(200, b"<h1>Index</h1>", {"Content-Type": "text/html"})

    with pytest.raises(ModelMissingError):
        client.download(f"{odd_http(handler).url}/models", tmp_path / "out")
