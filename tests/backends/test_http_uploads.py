"""Uploads and deletions over HTTP, presigned URLs of a real S3, and the file system."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import Storage, StorageOperations
from storage.backends import open_backend
from storage.backends.base import OpenOptions, Payload, bytes_payload
from storage.config import HTTPConfig
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    TransferError,
    UnsupportedOperation,
)
from storage.testing.conformance_support import content
from storage.uri import parse_uri
from tests.backends.http_support import CANARY, FolderRaw, empty, fast_client, quiet
from tests.servers import SeaweedFS
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply, Request, StaticFile, Taker

DATA = content(300_000)


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    yield nginx_http
    empty(nginx_http.data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("config", "content_type"),
    [(None, "application/json"), (HTTPConfig({"content-type": "x/y"}), "x/y")],
)
def test_upload_is_one_put_with_length_and_type(
    odd_http: Callable[..., OddHTTP], model: Path, config: HTTPConfig | None, content_type: str
) -> None:
    server = odd_http(lambda one: Reply(201, headers={"ETag": '"new"'}))
    assert Storage.upload(model, f"{server.url}/a%20b/m.json?sig=x%2F1", config=config)
    [request] = server.requests
    assert (request.method, request.target) == ("PUT", "/a%20b/m.json?sig=x%2F1")
    assert request.body == DATA
    assert request.headers["Content-Length"] == str(len(DATA))
    assert request.headers.get_all("Content-Type") == [content_type]
    assert "Transfer-Encoding" not in request.headers


def test_stream_of_unknown_size_is_sent_in_chunks(odd_http: Callable[..., OddHTTP]) -> None:
    server = odd_http(Taker())
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    info = backend.write("m.bin", Payload(lambda: io.BytesIO(DATA), None))
    backend.close()
    [request] = server.asked("PUT")
    assert (info.size, request.body) == (len(DATA), DATA)
    assert request.headers["Transfer-Encoding"] == "chunked"


def test_tree_is_uploaded_under_encoded_names(nginx: NginxHTTP, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    names = ["a b.bin", "sub/100%.bin", "sub/é+#?.bin", "%41", "deep/er/x"]
    for name in names:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    Storage.upload(tree, f"{nginx.endpoint}/models/v%201")
    assert FolderRaw(nginx.data).keys() == {f"models/v 1/{name}" for name in names}
    assert (nginx.data / "models/v 1/sub/é+#?.bin").read_bytes() == "sub/é+#?.bin".encode()


def test_file_goes_below_a_url_that_ends_in_a_slash(nginx: NginxHTTP, model: Path) -> None:
    Storage.upload(model, f"{nginx.endpoint}/models/")
    assert (nginx.data / "models/model.json").read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, AuthenticationError),
        (403, AuthenticationError),
        (405, UnsupportedOperation),
        (409, StorageError),
        (411, UnsupportedOperation),
        (413, StorageError),
        (501, UnsupportedOperation),
        (507, InsufficientSpaceError),
    ],
)
def test_refused_upload_is_tried_once(
    odd_http: Callable[..., OddHTTP], model: Path, status: int, error: type[StorageError]
) -> None:
    server = odd_http(lambda one: Reply(status))
    with pytest.raises(error) as caught:
        Storage.upload(model, f"{server.url}/m?sig={CANARY}", config=HTTPConfig(token=CANARY))
    assert quiet(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_upload_that_fails_in_passing_is_repeated_whole(
    odd_http: Callable[..., OddHTTP], model: Path, status: int
) -> None:
    server = odd_http(Taker([status]))
    told = []
    with fast_client() as client:
        client.upload(model, f"{server.url}/m", progress=told.append)
    assert [one.body for one in server.asked("PUT")] == [DATA, DATA]
    assert told[-1].bytes_done == len(DATA)


def test_nginx_tells_what_it_does_not_do(nginx: NginxHTTP, model: Path) -> None:
    with pytest.raises(AuthenticationError):
        Storage.upload(model, f"{nginx.odd}/private/m.json")
    with pytest.raises(AuthenticationError):
        Storage.upload(model, f"{nginx.odd}/read-only/m.json")
    with pytest.raises(InsufficientSpaceError):
        Storage.upload(model, f"{nginx.odd}/full/m.json")
    put_file(nginx.data, "folder/file", b"1")
    with pytest.raises(StorageError, match="409"):
        Storage.upload(model, f"{nginx.endpoint}/folder")
    assert FolderRaw(nginx.data).keys() == {"folder/file"}


def test_upload_does_not_promise_to_overwrite_nothing(
    odd_http: Callable[..., OddHTTP], model: Path
) -> None:
    server = odd_http(lambda one: Reply(201))
    with pytest.raises(UnsupportedOperation):
        Storage.upload(model, f"{server.url}/m", overwrite=False)
    assert server.requests == []


@pytest.mark.parametrize("status", [307, 308])
def test_redirected_upload_sends_the_body_again_and_no_secret(
    odd_http: Callable[..., OddHTTP], model: Path, status: int
) -> None:
    theirs = odd_http(Taker(), "localhost")
    ours = odd_http(lambda one: Reply(status, headers={"Location": f"{theirs.url}/there"}))
    told = []
    with fast_client(HTTPConfig(token=CANARY)) as client:
        client.upload(model, f"{ours.url}/m", progress=told.append)
    [request] = theirs.asked("PUT")
    assert (request.method, request.target, request.body) == ("PUT", "/there", DATA)
    assert "Authorization" not in request.headers
    assert told[-1].bytes_done == len(DATA)


@pytest.mark.parametrize("status", [301, 302, 303])
def test_redirection_that_would_drop_the_body_is_no_success(
    odd_http: Callable[..., OddHTTP], model: Path, status: int
) -> None:
    server = odd_http(
        lambda one: (
            Reply(status, headers={"Location": "/login"})
            if one.method == "PUT"
            else Reply(200, b"<h1>Log in</h1>")
        )
    )
    with pytest.raises(StorageError, match="page for logging in"):
        Storage.upload(model, f"{server.url}/m")
    assert [one.method for one in server.requests] == ["PUT"]


def test_source_that_cannot_be_read_is_not_the_servers_fault(
    odd_http: Callable[..., OddHTTP],
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "the disk is broken")

    server = odd_http(lambda one: Reply(201))
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    with pytest.raises(OSError, match="the disk is broken"):
        backend.write("m", Payload(Broken, 5))
    backend.close()


def test_delete_of_a_folder_is_no_delete(
    odd_http: Callable[..., OddHTTP], nginx: NginxHTTP
) -> None:
    put_file(nginx.data, "models/iris/model.bin", b"1")
    for path, kind in (("models", ModelMissingError), ("models/", UnsupportedOperation)):
        with pytest.raises(kind):
            StorageOperations.delete_object(f"{nginx.endpoint}/{path}", recursive=True)
    assert FolderRaw(nginx.data).keys() == {"models/iris/model.bin"}
    file = StaticFile(b"1")
    server = odd_http(lambda one: Reply(204) if one.method == "DELETE" else file(one))
    assert StorageOperations.delete_object(f"{server.url}/m.bin")
    assert [one.headers["Depth"] for one in server.asked("DELETE")] == ["0"]


def test_delete_that_is_redirected_to_a_page_deleted_nothing(
    odd_http: Callable[..., OddHTTP],
) -> None:
    file = StaticFile(b"1")
    page = {"Content-Type": "text/html"}

    def handler(request: Request) -> Reply:
        if request.path == "/login":
            return Reply(200, b"<h1>Log in</h1>", page)
        if request.method == "DELETE":
            return Reply(302, headers={"Location": "/login"})
        return file(request)

    server = odd_http(handler)
    with pytest.raises(StorageError, match="DELETE was answered by a redirection"):
        StorageOperations.delete_object(f"{server.url}/m.bin")
    assert [one.path for one in server.asked("DELETE")] == ["/m.bin"]


@pytest.mark.parametrize("status", [405, 501])
def test_server_without_delete_is_named_as_such(
    odd_http: Callable[..., OddHTTP], status: int
) -> None:
    file = StaticFile(b"1")
    server = odd_http(lambda one: Reply(status) if one.method == "DELETE" else file(one))
    with pytest.raises(UnsupportedOperation, match="does not do DELETE"):
        StorageOperations.delete_object(f"{server.url}/m.bin")


@pytest.mark.parametrize("key", ["a/../b", "../b", "a/./b", "a/%2e%2E/b", "a/b/.."])
def test_dot_segments_are_refused_before_anything_is_sent(
    odd_http: Callable[..., OddHTTP], model: Path, key: str
) -> None:
    server = odd_http(StaticFile(b"1"))
    for call in (
        lambda: Storage.upload(model, f"{server.url}/{key}"),
        lambda: Storage.download(f"{server.url}/{key}", model.parent / "out"),
    ):
        with pytest.raises(InvalidInput, match=r"'\.' and '\.\.'"):
            call()
    assert server.requests == []


# -- presigned URLs ------------------------------------------------------------------------------


SIGNATURES = pytest.mark.parametrize("signature", ["s3", "s3v4"])


def presigned(
    server: SeaweedFS, method: str, bucket: str, key: str, signature: str = "s3v4", **params: str
) -> str:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
        config=Config(signature_version=signature, s3={"addressing_style": "path"}),
    )
    given = {"Bucket": bucket, "Key": key, **params}
    return str(client.generate_presigned_url(method, Params=given, ExpiresIn=600))


@SIGNATURES
@pytest.mark.parametrize("name", ["model.bin", "a b+c/é [1].bin"])
def test_presigned_url_for_get_is_read_in_ranges(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
    name: str,
    signature: str,
) -> None:
    key = f"{prefix}/{name}"
    seaweedfs.put_raw(shared_bucket, key, DATA)
    url = presigned(seaweedfs, "get_object", shared_bucket, key, signature)
    with fast_client() as client:
        info = client.backend(parse_uri(url)).stat(parse_uri(url).key)
        assert (info.size, info.ranged) == (len(DATA), True)
        path = client.download(url, f"{tmp_path}/")
        assert path == str(tmp_path / name.rsplit("/", 1)[-1])
        assert Path(path).read_bytes() == DATA
        with client.open(url) as file:
            file.seek(-5, 2)
            assert file.read() == DATA[-5:]


@SIGNATURES
def test_presigned_url_for_put_is_written(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, model: Path, signature: str
) -> None:
    key = f"{prefix}/model.json"
    assert Storage.upload(model, presigned(seaweedfs, "put_object", shared_bucket, key, signature))
    assert seaweedfs.get_raw(shared_bucket, key) == DATA


@SIGNATURES
def test_content_type_that_was_signed_comes_from_the_config(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, model: Path, signature: str
) -> None:
    key = f"{prefix}/model.json"
    url = presigned(
        seaweedfs, "put_object", shared_bucket, key, signature, ContentType="text/x-model"
    )
    with pytest.raises(AuthenticationError, match="other headers"):
        Storage.upload(model, url)
    Storage.upload(model, url, config=HTTPConfig({"Content-Type": "text/x-model"}))
    assert seaweedfs.head_raw(shared_bucket, key)["ContentType"] == "text/x-model"


def test_digest_that_our_upload_left_is_known_through_a_presigned_url(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    key = f"{prefix}/m.bin"
    seaweedfs.put_raw(shared_bucket, key, DATA, {"x-amz-meta-sha256": "0" * 64})
    with pytest.raises(StorageError, match="the store says sha256:0000"):
        Storage.download(presigned(seaweedfs, "get_object", shared_bucket, key), tmp_path / "out")


@pytest.mark.parametrize("method", ["get_object", "put_object"])
def test_presigned_url_that_was_changed_is_refused_without_a_word_of_it(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, model: Path, method: str
) -> None:
    url = presigned(seaweedfs, method, shared_bucket, f"{prefix}/m.bin")
    signature = url.rpartition("Signature=")[2].partition("&")[0]
    seaweedfs.put_raw(shared_bucket, f"{prefix}/m.bin", b"old")
    wrong = url.replace(signature, CANARY + signature[len(CANARY) :])
    calls: dict[str, Callable[[], object]] = {
        "get_object": lambda: Storage.download(wrong, model.parent / "out"),
        "put_object": lambda: Storage.upload(model, wrong),
    }
    with pytest.raises(AuthenticationError, match="it may have expired") as caught:
        calls[method]()
    assert quiet(caught.value)
    assert seaweedfs.get_raw(shared_bucket, f"{prefix}/m.bin") == b"old"


# -- the file system -----------------------------------------------------------------------------


def test_filesystem_takes_urls_and_paths(nginx: NginxHTTP) -> None:
    put_file(nginx.data, "a b/data.csv", b"x,y\n1,2\n")
    config = HTTPConfig(ca_bundle=nginx.ca_file)
    files = Storage.filesystem(f"{nginx.tls}/", config=config)
    for path in (f"{nginx.tls}/a%20b/data.csv", "/a%20b/data.csv", "a b/data.csv"):
        assert files.cat_file(path) == b"x,y\n1,2\n"
        assert files.info(path)["size"] == 8
        with files.open(path, "r") as file:
            assert file.readline() == "x,y\n"
    files.pipe_file(f"{nginx.tls}/new.bin", b"12345")
    assert (nginx.data / "new.bin").read_bytes() == b"12345"
    with pytest.raises(InvalidInput, match="the only host"):
        files.cat_file("https://evil.example/a")
    with pytest.raises(UnsupportedOperation):
        files.ls("")


def test_pandas_and_pyarrow_read_and_write(nginx: NginxHTTP) -> None:
    import pandas
    import pyarrow.parquet as parquet

    frame = pandas.DataFrame({"x": range(1000), "y": [f"row {n}" for n in range(1000)]})
    files = Storage.filesystem(f"{nginx.endpoint}/")
    with files.open("data/frame.csv", "w") as file:
        frame.to_csv(file, index=False)
    with files.open(f"{nginx.endpoint}/data/frame.csv") as file:
        assert pandas.read_csv(file).equals(frame)
    with files.open("data/frame.parquet", "wb") as file:
        frame.to_parquet(file)
    assert pandas.read_parquet("data/frame.parquet", filesystem=files).equals(frame)
    table = parquet.read_table("data/frame.parquet", columns=["x"], filesystem=files)
    assert table.column("x").to_pylist() == list(range(1000))


# -- life ----------------------------------------------------------------------------------------


def _read_in_child(url: str, results: multiprocessing.Queue[bytes]) -> None:
    with Storage.open(url) as file:
        results.put(file.read())


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_child_opens_its_own_connections(odd_http: Callable[..., OddHTTP]) -> None:
    server = odd_http(StaticFile(b"12345"))
    with Storage.open(f"{server.url}/m") as file:
        assert file.read() == b"12345"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(f"{server.url}/m", results))
    child.start()
    assert results.get(timeout=60) == b"12345"
    child.join(60)
    assert child.exitcode == 0
    with Storage.open(f"{server.url}/m") as file:
        assert file.read() == b"12345"


def test_construction_is_inert() -> None:
    backend = open_backend(parse_uri("https://no-such-host.invalid/m"), None, OpenOptions())
    assert "https" in backend.name
    backend.close()


def test_closing_one_backend_leaves_the_others_connections(
    odd_http: Callable[..., OddHTTP],
) -> None:
    server = odd_http(StaticFile(DATA))
    one, other = (
        open_backend(parse_uri(f"{server.url}/"), config, OpenOptions())
        for config in (None, HTTPConfig(token="t"))
    )
    one.stat("m")
    with other.read("m") as body:
        first = bytes(next(iter(body)))
        one.close()
        assert first + b"".join(map(bytes, body)) == DATA
    other.close()


def test_write_of_bytes_returns_what_the_server_says(odd_http: Callable[..., OddHTTP]) -> None:
    server = odd_http(Taker(headers={"ETag": '"new"'}))
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    info = backend.write("m", bytes_payload(b"123"))
    backend.close()
    assert (info.key, info.size, info.etag) == ("m", 3, '"new"')


def test_passing_failure_of_a_stat_ends_in_a_transfer_error(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    server = odd_http(lambda one: Reply(503))
    with fast_client(attempts=2) as client, pytest.raises(TransferError, match="503"):
        client.download(f"{server.url}/m", tmp_path / "out")
    assert len(server.requests) == 2
