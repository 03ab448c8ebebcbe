"""Uploads over HTTP through proxies that let things go wrong: the right bytes, or an error."""

from __future__ import annotations

import base64
import hashlib
import io
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.backends.base import OpenOptions, Payload
from storage.backends.http.backend import open_backend
from storage.config import HTTPConfig
from storage.errors import TransferError
from storage.testing.conformance_support import content
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault
from storage.uri import parse_uri
from tests.backends.fsspec_servers import PASSWORD, USER, WebdavServer
from tests.backends.http_support import b64, empty, fast_client, named
from tests.faults.scripts import once
from tests.servers import Azurite, Moto, S3Server, SeaweedFS
from tests.servers.nginx_http import NginxHTTP
from tests.servers.odd_http import OddHTTP, Reply, Request, Taker

SIZE = 10 * 64 * 1024 + 7
DATA = content(SIZE)
OTHER = content(SIZE, 1)


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    yield nginx_http
    empty(nginx_http.data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(scope="module")
def webdav() -> Iterator[WebdavServer]:
    with WebdavServer() as server:
        yield server


@pytest.fixture(params=["nginx", "webdav"])
def folder(request: pytest.FixtureRequest) -> tuple[str, Path, HTTPConfig]:
    """A server that takes PUT, the folder behind it, and who may write."""
    server = request.getfixturevalue(request.param)
    return server.endpoint, server.data, HTTPConfig(username=USER, password=PASSWORD)


UPLOAD_FAULTS = [
    Fault("flip_request"),
    Fault("flip_request", at=0.0),
    Fault("reset_request"),
    Fault("lost_answer"),
    Fault("lost_answer", status=500),
    Fault("stall_answer"),
    Fault("status", status=429, retry_after=0),
    Fault("status", status=503),
]


@pytest.mark.parametrize("fault", UPLOAD_FAULTS, ids=named)
def test_upload_is_done_only_with_the_right_bytes(
    folder: tuple[str, Path, HTTPConfig], model: Path, fault: Fault
) -> None:
    endpoint, data, config = folder
    silent = fault.kind == "stall_answer"
    if silent:
        config = HTTPConfig(username=USER, password=PASSWORD, read_timeout=1.0)
    with (
        FaultProxy(endpoint, once(fault, "PUT")) as proxy,
        fast_client(config) as client,
    ):
        assert client.upload(model, f"{proxy.endpoint}/m.bin")
        # Who is in a hurry may also give up a request that only took its time.
        assert proxy.count("PUT") == 2 or (silent and proxy.count("PUT") > 2)
    assert (data / "m.bin").read_bytes() == DATA


def test_upload_whose_bytes_are_damaged_each_time_is_an_error(
    folder: tuple[str, Path, HTTPConfig], model: Path
) -> None:
    endpoint, _, config = folder
    with (
        FaultProxy(endpoint, lambda one: Fault("flip_request")) as proxy,
        fast_client(config) as client,
        pytest.raises(TransferError, match="is there now"),
    ):
        client.upload(model, f"{proxy.endpoint}/m.bin")


def test_what_cannot_be_read_back_is_believed(
    odd_http: Callable[..., OddHTTP], model: Path
) -> None:
    for status in (401, 403, 404, 405):
        server = odd_http(lambda one, status=status: Reply(201 if one.method == "PUT" else status))
        with fast_client() as client:
            assert client.upload(model, f"{server.url}/m.bin")
        assert [one.method for one in server.requests] == ["PUT", "GET"]


@pytest.mark.parametrize(
    ("wanted", "url", "methods"),
    [
        (None, "m.bin", ["PUT", "GET"]),
        (False, "m.bin", ["PUT"]),
        (None, "m.bin?X-Amz-Signature=1", ["PUT"]),
        (True, "m.bin?X-Amz-Signature=1", ["PUT"]),
    ],
)
def test_file_is_read_back_where_that_may_tell_something(
    odd_http: Callable[..., OddHTTP],
    model: Path,
    wanted: bool | None,
    url: str,
    methods: list[str],
) -> None:
    server = odd_http(Taker())
    with fast_client(HTTPConfig(verify_uploads=wanted)) as client:
        client.upload(model, f"{server.url}/{url}")
    assert [one.method for one in server.requests] == methods


@pytest.mark.parametrize(("wanted", "methods"), [(None, ["PUT"]), (True, ["PUT", "GET"])])
def test_over_tls_it_is_read_back_when_asked_to(
    nginx: NginxHTTP, model: Path, wanted: bool | None, methods: list[str]
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(nginx.folder / "server.pem")
    config = HTTPConfig(ca_bundle=nginx.ca_file, verify_uploads=wanted)
    with FaultProxy(nginx.endpoint, tls=tls) as proxy, fast_client(config) as client:
        client.upload(model, f"{proxy.endpoint}/m.bin")
        assert [one.method for one in proxy.exchanges] == methods
    assert (nginx.data / "m.bin").read_bytes() == DATA


@pytest.mark.parametrize(
    ("query", "name", "value"),
    [
        (
            "",
            "Repr-Digest",
            f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:",
        ),
        ("", "X-Checksum-Sha256", hashlib.sha256(DATA).hexdigest()),
        ("?sig=1", "Content-MD5", b64(hashlib.md5(DATA))),
        # What the older signatures cover must not be added.
        ("?Signature=1", "Content-MD5", None),
        ("?sig=1", "Repr-Digest", None),
    ],
)
def test_digest_of_the_body_is_sent_with_it(
    odd_http: Callable[..., OddHTTP], model: Path, query: str, name: str, value: str | None
) -> None:
    server = odd_http(Taker())
    with fast_client() as client:
        client.upload(model, f"{server.url}/m.bin{query}")
    assert server.asked("PUT")[0].headers.get(name) == value


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": f'"{hashlib.md5(OTHER).hexdigest()}"', "x-amz-request-id": "1"},
        {"X-Goog-Hash": f"md5={b64(hashlib.md5(OTHER))}"},
        {
            "Content-MD5": b64(hashlib.md5(OTHER)),
            "x-ms-request-id": "1",
        },
    ],
    ids=["s3", "google", "azure"],
)
@pytest.mark.parametrize("query", ["sig=1", "Signature=1"])
def test_answer_that_tells_of_other_bytes_is_no_success(
    odd_http: Callable[..., OddHTTP], model: Path, headers: dict[str, str], query: str
) -> None:
    server = odd_http(Taker(headers=headers))
    with fast_client() as client, pytest.raises(TransferError, match="says that it stored md5:"):
        client.upload(model, f"{server.url}/m.bin?{query}")
    assert len(server.asked("PUT")) == 3
    with fast_client(HTTPConfig(verify_uploads=False)) as client:
        assert client.upload(model, f"{server.url}/m.bin?{query}")


def test_bytes_of_another_store_are_taken_once(odd_http: Callable[..., OddHTTP]) -> None:
    taken = 0

    class Remote(io.RawIOBase):
        def __init__(self) -> None:
            self._data = io.BytesIO(DATA)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            nonlocal taken
            count = self._data.readinto(buffer)
            taken += count
            return count

    server = odd_http(Taker())
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    backend.write("m.bin", Payload(lambda: io.BufferedReader(Remote()), SIZE))
    backend.close()
    assert taken == SIZE
    assert [one.method for one in server.requests] == ["PUT", "GET"]


# -- presigned URLs of real stores ---------------------------------------------------------------


def s3_url(server: S3Server, endpoint: str, bucket: str, key: str, signature: str) -> str:
    """Return a URL for PUT, signed for ``endpoint``."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
        config=Config(signature_version=signature, s3={"addressing_style": "path"}),
    )
    wanted = {"Bucket": bucket, "Key": key}
    return str(client.generate_presigned_url("put_object", Params=wanted, ExpiresIn=600))


@pytest.mark.parametrize("signature", ["s3", "s3v4"])
def test_damaged_upload_by_a_presigned_url_of_s3_is_sent_again(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, model: Path, signature: str
) -> None:
    key = f"{prefix}/m.bin"
    with FaultProxy(seaweedfs.endpoint, once(Fault("flip_request"), "PUT")) as proxy:
        url = s3_url(seaweedfs, proxy.endpoint, shared_bucket, key, signature)
        with fast_client() as client:
            client.upload(model, url)
        assert [one.method for one in proxy.exchanges] == ["PUT", "PUT"]
    assert seaweedfs.get_raw(shared_bucket, key) == DATA


@pytest.mark.parametrize("signature", ["s3", "s3v4"])
def test_digest_of_the_body_does_no_harm_to_a_signature(
    moto: Moto, moto_shared_bucket: str, prefix: str, model: Path, signature: str
) -> None:
    url = s3_url(moto, moto.endpoint, moto_shared_bucket, f"{prefix}/m.bin", signature)
    with fast_client() as client:
        client.upload(model, url)
    assert moto.get_raw(moto_shared_bucket, f"{prefix}/m.bin") == DATA


def test_damaged_upload_by_a_signed_url_of_azure_is_sent_again(
    azurite: Azurite, azurite_shared_container: str, prefix: str, model: Path
) -> None:
    from azure.storage.blob import BlobSasPermissions, generate_blob_sas

    account, container, key = azurite.main, azurite_shared_container, f"{prefix}/m.bin"
    sas = generate_blob_sas(
        account.name,
        container,
        key,
        account_key=account.key,
        permission=BlobSasPermissions(write=True, create=True),
        expiry=datetime.now(UTC) + timedelta(minutes=10),
    )
    config = HTTPConfig({"x-ms-blob-type": "BlockBlob", "x-ms-version": "2021-08-06"})
    with FaultProxy(azurite.endpoint, once(Fault("flip_request"), "PUT")) as proxy:
        with fast_client(config) as client:
            client.upload(model, f"{proxy.endpoint}/{account.name}/{container}/{key}?{sas}")
        assert [one.method for one in proxy.exchanges] == ["PUT", "PUT"]
    assert azurite.get_raw(container, key) == DATA


def test_those_who_write_one_file_take_turns_until_it_is_read_back(
    odd_http: Callable[..., OddHTTP],
) -> None:
    taker, rival = Taker(), threading.Event()

    def handler(request: Request) -> Reply:
        if request.method == "PUT" and taker.stored:
            rival.set()
        elif request.method == "GET" and not rival.is_set():
            # Long enough for who does not wait.
            rival.wait(0.5)
        return taker(request)

    server = odd_http(handler)
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())

    def put(data: bytes) -> None:
        backend.write("m.bin", Payload(lambda: io.BytesIO(data), len(data)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(put, [b"one", b"two"]))
    backend.close()
    assert [one.method for one in server.requests] == ["PUT", "GET", "PUT", "GET"]
