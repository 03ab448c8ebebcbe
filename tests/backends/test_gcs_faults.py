"""What both GCS drivers make of a store that fails, lies or stalls; and of each other's infos."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from storage.backends import open_backend
from storage.backends.base import (
    Backend,
    ByteRange,
    ObjectInfo,
    OpenOptions,
    Payload,
    bytes_payload,
)
from storage.config import GCSConfig
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
)
from storage.uri import parse_uri
from tests.servers import CountingProxy, FakeGCS
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.odd_http import OddHTTP, Reply, Request
from tests.servers.process import HOST

MIB = 1024 * 1024


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def opened() -> Iterator[Callable[..., Backend]]:
    backends: list[Backend] = []

    def make(endpoint: str, driver: Any, bucket: str = "bucket", **fields: Any) -> Backend:
        config = GCSConfig(token="HIDDEN", endpoint_url=endpoint, driver=driver, **fields)
        backends.append(open_backend(parse_uri(f"gs://{bucket}/"), config, OpenOptions()))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def read(backend: Backend, key: str, *arguments: Any) -> bytes:
    with backend.read(key, *arguments) as body:
        return b"".join(bytes(piece) for piece in body)


CALLS: dict[str, Callable[[Backend], object]] = {
    "stat": lambda backend: backend.stat("a"),
    "list": lambda backend: list(backend.list()),
    "read": lambda backend: read(backend, "a"),
    "write": lambda backend: backend.write("a", bytes_payload(b"1")),
    "delete": lambda backend: backend.delete(["a"]),
}


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
def test_opening_is_inert(driver: str) -> None:
    script = (
        "import sys\n"
        "from storage.backends import open_backend\n"
        "from storage.backends.base import OpenOptions\n"
        "from storage.config import GCSConfig\n"
        "from storage.uri import parse_uri\n"
        "config = GCSConfig('/no/such/file.json', driver=sys.argv[1])\n"
        "backend = open_backend(parse_uri('gs://b/'), config, OpenOptions())\n"
        "backend.name, backend.capabilities\n"
        "found = {'gcsfs', 'google', 'fsspec', 'aiohttp', 'requests', 'obstore'}\n"
        "found &= set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script, driver], check=True, timeout=60)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationError),
        (403, AuthenticationError),
        (408, TransientError),
        (429, TransientError),
        (500, TransientError),
        (503, TransientError),
    ],
)
def test_status_is_told_apart_after_one_attempt(
    driver: Any,
    status: int,
    kind: type[StorageError],
    call: Callable[[Backend], object],
    opened: Callable[..., Backend],
) -> None:
    with OddHTTP(lambda request: Reply(status)) as server:
        backend = opened(server.url, driver)
        with pytest.raises(kind) as caught:
            call(backend)
        assert len(server.requests) == 1
    assert "HIDDEN" not in str(caught.value)
    assert "upload" not in str(caught.value)


def test_store_says_when_to_come_back(opened: Callable[..., Backend]) -> None:
    with OddHTTP(lambda request: Reply(429, headers={"Retry-After": "3"})) as server:
        backend = opened(server.url, "fsspec")
        for call in CALLS.values():
            with pytest.raises(TransientError) as caught:
                call(backend)
            assert caught.value.retry_after == 3


XML = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>said</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, XML % b"NoSuchBucket", BucketMissingError),
        (404, XML % b"NoSuchKey", ModelMissingError),
        (403, XML % b"AccessDenied", AuthenticationError),
        (400, XML % b"ExpiredToken", AuthenticationError),
        (400, XML % b"UserProjectMissing", ConfigurationError),
        (412, XML % b"PreconditionFailed", ObjectChangedError),
    ],
    ids=lambda value: (
        value.split(b"Code>")[1].decode("ascii")[:-2] if isinstance(value, bytes) else None
    ),
)
def test_errors_of_the_xml_api(
    driver: Any, status: int, body: bytes, kind: type[StorageError], opened: Callable[..., Backend]
) -> None:
    with OddHTTP(lambda request: Reply(status, body)) as server, pytest.raises(kind) as caught:
        read(opened(server.url, driver), "a")
    assert type(caught.value) is kind


def test_error_that_came_packed_is_understood(driver: Any, opened: Callable[..., Backend]) -> None:
    for status, code, kind in (
        (404, b"NoSuchBucket", BucketMissingError),
        (403, b"AccessDenied", AuthenticationError),
        (400, b"UserProjectMissing", ConfigurationError),
    ):
        packed = gzip.compress(XML % code)
        answer = Reply(status, packed, {"Content-Encoding": "gzip"})
        with OddHTTP(lambda request, answer=answer: answer) as server, pytest.raises(kind):
            read(opened(server.url, driver), "a")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_reads_what_its_parent_has_read(
    driver: Any, gcs_server: FakeGCS, gcs_bucket: str, opened: Callable[..., Backend]
) -> None:
    gcs_server.put_raw(gcs_bucket, "a", b"12345")
    backend = opened(gcs_server.endpoint, driver, gcs_bucket)
    assert read(backend, "a") == b"12345"
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        status = 1
        try:
            status = 0 if read(backend, "a") == b"12345" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, "The specified bucket does not exist.", BucketMissingError),
        (404, "No such object: bucket/a", ModelMissingError),
        (
            400,
            "Bucket is a requester pays bucket but no user project provided.",
            ConfigurationError,
        ),
        (403, "robot does not have storage.objects.get access", AuthenticationError),
    ],
    ids=["bucket", "object", "payer", "forbidden"],
)
def test_errors_of_the_json_api(
    status: int, message: str, kind: type[StorageError], opened: Callable[..., Backend]
) -> None:
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    with OddHTTP(lambda request: Reply(status, body)) as server, pytest.raises(kind) as caught:
        opened(server.url, "fsspec").stat("a")
    assert type(caught.value) is kind


def test_expired_token_is_told_by_a_stat(driver: Any, opened: Callable[..., Backend]) -> None:
    # The answer to obstore's HEAD has no body, so the second driver is asked for the reason.
    with (
        OddHTTP(lambda request: Reply(400, XML % b"ExpiredToken")) as server,
        pytest.raises(AuthenticationError, match="ExpiredToken"),
    ):
        opened(server.url, driver).stat("a")


def answering(
    body: bytes, headers: Mapping[str, str] | None = None, **fields: Any
) -> Callable[[Request], Reply]:
    """Return a handler that gives an object in its own way."""
    headers = {
        "ETag": '"tag"',
        "x-goog-generation": "7",
        "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT",
        **(headers or {}),
    }
    return lambda request: Reply(body=body, headers=headers, **fields)


def test_body_that_ends_early_is_transient(driver: Any, opened: Callable[..., Backend]) -> None:
    with OddHTTP(answering(b"x" * 100, cut=50)) as server, pytest.raises(TransientError):
        read(opened(server.url, driver), "a")


def test_store_that_ignores_ranges_is_noticed(driver: Any, opened: Callable[..., Backend]) -> None:
    with OddHTTP(answering(b"x" * 100)) as server, pytest.raises(StorageError):
        read(opened(server.url, driver), "a", ByteRange(10, 20))


@pytest.mark.parametrize(
    "pin", [ObjectInfo("a", 5, version="6"), ObjectInfo("a", 5, '"other"'), ObjectInfo("a", 4)]
)
def test_store_that_ignores_pins_is_noticed(
    driver: Any, pin: ObjectInfo, opened: Callable[..., Backend]
) -> None:
    with OddHTTP(answering(b"12345")) as server:
        backend = opened(server.url, driver)
        with pytest.raises(ObjectChangedError):
            read(backend, "a", None, pin)
        assert read(backend, "a", None, ObjectInfo("a", 5, '"tag"', "7")) == b"12345"


def test_pins_are_sent(driver: Any, opened: Callable[..., Backend]) -> None:
    with OddHTTP(answering(b"12345")) as server:
        read(opened(server.url, driver), "a/b#1", None, ObjectInfo("a/b#1", 5, '"tag"', "7"))
        [request] = server.requests
    assert request.target == "/bucket/a%2Fb%231?generation=7"
    assert request.headers["If-Match"] == '"tag"'
    assert request.headers["Authorization"] == "Bearer HIDDEN"


def test_stored_bytes_are_asked_for_whatever_their_encoding(
    driver: Any, opened: Callable[..., Backend]
) -> None:
    packed = gzip.compress(b"12345" * 100)

    def answer(request: Request) -> Reply:
        # What GCS does: decoded on the way, and without a length, for who does not take gzip.
        headers = {
            "ETag": '"tag"',
            "x-goog-generation": "7",
            "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT",
        }
        if "gzip" not in request.headers.get("Accept-Encoding", ""):
            return Reply(body=b"12345" * 100, headers=headers, chunked=True)
        return Reply(body=packed, headers={**headers, "Content-Encoding": "gzip"})

    with OddHTTP(answer) as server:
        backend = opened(server.url, driver)
        assert read(backend, "a") == packed
        with backend.read("a") as body:
            assert body.info.size == len(packed)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"text"', b'{"kind": "other"}'])
def test_success_that_says_nothing_is_none(body: bytes, opened: Callable[..., Backend]) -> None:
    with OddHTTP(lambda request: Reply(body=body)) as server:
        backend = opened(server.url, "fsspec")
        with pytest.raises(TransientError):
            backend.stat("a")
        with pytest.raises(TransientError):
            backend.copy("a", "b")
        with pytest.raises(TransientError):
            backend.write("a", bytes_payload(b"12345"))
        if not body.startswith(b"{"):
            with pytest.raises(TransientError):
                list(backend.list())


def test_anonymous_reads_no_file_of_the_environment(
    driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., Backend]
) -> None:
    federation = tmp_path / "federation.json"
    federation.write_text(json.dumps({"type": "external_account", "audience": "any"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(federation))
    with OddHTTP(answering(b"12345")) as server:
        assert read(opened(server.url, driver, anonymous=True), "a") == b"12345"
        [request] = server.requests
    assert "Authorization" not in request.headers


def test_empty_payload_of_unknown_size_keeps_its_metadata(opened: Callable[..., Backend]) -> None:
    headers = {"ETag": f'"{md5(b"").hexdigest()}"', "x-goog-generation": "7"}
    with OddHTTP(lambda request: Reply(headers=headers)) as server:
        payload = Payload(lambda: io.BytesIO(b""), None)
        backend = opened(server.url, "obstore")
        info = backend.write("a", payload, metadata={"note": "1"}, content_type="text/x-model")
        [request] = server.requests
    assert (info.size, request.method, request.target) == (0, "PUT", "/bucket/a")
    assert request.headers["x-goog-meta-note"] == "1"
    assert request.headers["Content-Type"] == "text/x-model"


@pytest.mark.parametrize("content_type", ["a\nb: c", " text/x", "text/x\x7f"])
def test_content_type_that_no_header_can_hold_is_refused(
    driver: Any, content_type: str, opened: Callable[..., Backend]
) -> None:
    with OddHTTP(lambda request: Reply()) as server:
        backend = opened(server.url, driver)
        for size in (5, 9 * MIB):
            with pytest.raises(InvalidInput):
                backend.write("a", bytes_payload(b"x" * size), content_type=content_type)
        assert server.requests == []


def test_silence_is_noticed(driver: Any, opened: Callable[..., Backend]) -> None:
    release = threading.Event()
    with OddHTTP(lambda request: Reply(200 if release.wait(30) else 500)) as server:
        try:
            with pytest.raises(TransientError):
                opened(server.url, driver, read_timeout=0.3).stat("a")
        finally:
            release.set()


# --- both drivers, one store ---------------------------------------------------------------------


@pytest.fixture
def both(
    gcs_server: FakeGCS, gcs_bucket: str, opened: Callable[..., Backend]
) -> tuple[Backend, Backend]:
    first, second = (
        opened(gcs_server.endpoint, name, gcs_bucket) for name in ("obstore", "fsspec")
    )
    return first, second


def infos(backend: Backend, key: str) -> list[ObjectInfo]:
    """Return what a driver says of an object, by each of its ways."""
    with backend.read(key) as body:
        said = body.info
    [listed] = backend.list("m/")
    return [backend.stat(key), listed, said]


def test_what_one_driver_says_pins_the_reads_of_the_other(
    both: tuple[Backend, Backend], gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    gcs_server.put_raw(gcs_bucket, "m/a", b"12345")
    old = [info for backend in both for info in infos(backend, "m/a")]
    for info in old:
        assert info.pin
        for backend in both:
            assert read(backend, "m/a", ByteRange(1, 3), info) == b"23"
            assert not any(info.differs_from(other) for other in infos(backend, "m/a"))
    gcs_server.put_raw(gcs_bucket, "m/a", b"67890")
    for info in old:
        for backend in both:
            with pytest.raises(ObjectChangedError):
                read(backend, "m/a", ByteRange(1, 3), info)


def test_listing_of_one_driver_is_a_condition_for_the_other(
    both: tuple[Backend, Backend], gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    for backend in both:
        stored = gcs_server.put_raw(gcs_bucket, "m/a", b"1")
        [info] = backend.list("m/")
        assert info.version == stored["generation"]
        both[1].write("m/a", bytes_payload(b"22"), if_match=info)
        assert gcs_server.get_raw(gcs_bucket, "m/a") == b"22"
        with pytest.raises(ObjectChangedError):
            both[1].write("m/a", bytes_payload(b"333"), if_match=info)


def test_entity_tag_alone_is_a_condition_for_both(
    both: tuple[Backend, Backend], gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    for backend in both:
        gcs_server.put_raw(gcs_bucket, "m/a", b"1")
        info = replace(both[0].stat("m/a"), version=None)
        backend.write("m/a", bytes_payload(b"22"), if_match=info)
        assert gcs_server.get_raw(gcs_bucket, "m/a") == b"22"
        with pytest.raises(ObjectChangedError):
            backend.write("m/a", bytes_payload(b"333"), if_match=info)


def test_what_obstore_lacks_goes_to_gcsfs_by_itself(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[..., Backend],
) -> None:
    proxy = counting_proxy(gcs_server.endpoint)
    backend = opened(proxy.endpoint, "obstore", gcs_bucket)
    backend.write("a//b", bytes_payload(b"1"))
    assert gcs_server.get_raw(gcs_bucket, "a//b") == b"1"
    backend.write("m/a", bytes_payload(b"x" * 9 * MIB), if_absent=True)
    assert any("ifGenerationMatch=0" in request.path for request in proxy.requests)
    version = backend.stat("m/a").version
    backend.copy("m/a", "m/b", version=version)
    with gcs_server.bucket("yet-another") as other:
        gcs_server.put_raw(other, "c", b"123")
        backend.copy("c", "m/c", bucket=other)
    assert gcs_server.keys_raw(gcs_bucket) == ["a//b", "m/a", "m/b", "m/c"]
    assert all(request.headers["authorization"] == "Bearer HIDDEN" for request in proxy.requests)


def test_emulator_is_written_to_by_the_api_that_it_has(
    gcs_server: FakeGCS, gcs_bucket: str, opened: Callable[..., Backend]
) -> None:
    backend = opened(gcs_server.endpoint, None, gcs_bucket)
    assert backend.name == "gs (obstore)"
    backend.write("m/a", bytes_payload(b"12345"))
    backend.copy("m/a", "m/b")
    backend.delete(["m/a"])
    assert gcs_server.keys_raw(gcs_bucket) == ["m/b"]
    with pytest.raises(StorageError, match="invalid uploadType"):
        opened(gcs_server.endpoint, "obstore", gcs_bucket).write("m/a", bytes_payload(b"1"))


def test_googles_own_service_is_written_to_by_obstore(opened: Callable[..., Backend]) -> None:
    host = "storage.googleapis.com"
    tag = f'"{md5(b"12345").hexdigest()}"'
    headers = {"ETag": tag, "x-goog-generation": "7"}
    with OddHTTP(lambda request: Reply(headers=headers)) as server:
        port = urlsplit(server.url).port
        assert port
        with ForwardProxy(hosts={host: (HOST, port)}) as proxy:
            backend = opened(f"http://{host}", None, proxy=proxy.url)
            info = backend.write("m/a", bytes_payload(b"12345"), if_absent=True)
            backend.write("m/a", bytes_payload(b"12345"), if_match=info)
        puts = server.requests
    assert (info.etag, info.version) == (tag, "7")
    assert [(put.method, put.target) for put in puts] == [("PUT", "/bucket/m%2Fa")] * 2
    assert [put.headers["x-goog-if-generation-match"] for put in puts] == ["0", "7"]


def test_metadata_may_be_in_any_script(both: tuple[Backend, Backend]) -> None:
    metadata = {"owner": "é模", "note": "plain"}
    # No header can hold these.
    for awkward in ({"a name": "1"}, {"note": "two\nlines"}, {"note": " padded "}):
        both[0].write("m/a", bytes_payload(b"12345"), metadata=awkward)
        assert both[1].stat("m/a").metadata == awkward
    for writer in both:
        writer.write("m/a", bytes_payload(b"12345"), metadata=metadata)
        for reader in both:
            assert reader.stat("m/a").metadata == metadata
            with reader.read("m/a", ByteRange(1, 3), reader.stat("m/a")) as body:
                assert body.info.metadata == metadata
                assert b"".join(bytes(piece) for piece in body) == b"23"


def test_hint_of_obstore_is_confirmed_by_the_store(both: tuple[Backend, Backend]) -> None:
    from storage.digest import Digest

    first, second = both
    second.write("m/a", bytes_payload(b"12345"))
    right = Digest("md5", "827ccb0eea8a706c4c34a16891f84e7b")
    wrong = Digest("md5", "0" * 32)
    for backend in both:
        assert backend.is_digest(ObjectInfo("m/a", 5, hint=right))
        assert not backend.is_digest(ObjectInfo("m/a", 5, hint=wrong))
        with pytest.raises(ModelMissingError):
            backend.is_digest(ObjectInfo("none", 5, hint=right))
        with pytest.raises(ObjectChangedError):
            backend.is_digest(ObjectInfo("m/a", 5, version="1", hint=right))
    assert first.stat("m/a").version == second.stat("m/a").version
