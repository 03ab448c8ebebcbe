"""GCS under faults on the way: nothing damaged is stored or handed over, by both drivers."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import Storage
from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.backends.gcs.auth import TokenSource
from storage.config import GCSConfig
from storage.digest import Digest, hash_file
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from storage.uri import parse_uri
from tests.faults.scripts import once
from tests.servers import FakeGCS
from tests.servers.gcs import GCSShim, OpenSeaweedFS
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.odd_http import Request as Asked

MIB = 1024 * 1024
DRIVERS = ("obstore", "fsspec")
Open = Callable[..., Backend]


@pytest.fixture
def opened() -> Iterator[Open]:
    backends: list[Backend] = []

    def make(endpoint: str, driver: Any, bucket: str = "bucket", **fields: Any) -> Backend:
        config = config_of(endpoint, driver, **fields)
        # Nothing stalls here but the machine.
        options = OpenOptions(memory=9 * MIB, stall_timeout=60)
        backends.append(open_backend(parse_uri(f"gs://{bucket}/"), config, options))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def config_of(endpoint: str, driver: Any, **fields: Any) -> GCSConfig:
    return GCSConfig(**{"token": "HIDDEN", **fields}, endpoint_url=endpoint, driver=driver)


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(piece) for piece in body)


# --- downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("tree", [False, True], ids=["object", "tree"])
def test_flipped_byte_of_somebody_elses_object_is_refused(
    driver: str, tree: bool, gcs_server: FakeGCS, gcs_bucket: str, tmp_path: Path
) -> None:
    gcs_server.put_raw(gcs_bucket, "m/a", os.urandom(100_000))

    def flip(request: Request) -> Fault | None:
        of_object = request.method == "GET" and request.target.partition("?")[0].endswith("m%2Fa")
        return Fault("flip") if of_object and not request.target.startswith("/storage/") else None

    with FaultProxy(gcs_server.endpoint, flip, store="gcs") as proxy:
        uri = f"gs://{gcs_bucket}/m" if tree else f"gs://{gcs_bucket}/m/a"
        with pytest.raises(IntegrityError):
            Storage.download(uri, tmp_path / "a", config=config_of(proxy.endpoint, driver))
        assert [exchange.fault for exchange in proxy.exchanges if exchange.fault] == [Fault("flip")]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("driver", DRIVERS)
def test_checksums_of_an_object_are_found(
    driver: str, opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    data = os.urandom(1000)
    gcs_server.put_raw(gcs_bucket, "m/a", data)
    backend = opened(gcs_server.endpoint, driver, gcs_bucket)
    info = backend.stat("m/a")
    kept = backend.checksums(info) if backend.capabilities.checksums else info.digests
    assert [digest.algorithm for digest in kept] == ["md5", "crc32c"]
    assert kept[0].hex == hashlib.md5(data).hexdigest()
    [listed] = backend.list("m/")
    assert listed.digests == kept


def test_checksums_of_another_version_are_none(
    opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    backend = opened(gcs_server.endpoint, "obstore", gcs_bucket)
    gcs_server.put_raw(gcs_bucket, "m/a", b"1")
    old = backend.stat("m/a")
    gcs_server.put_raw(gcs_bucket, "m/a", b"2")
    assert backend.checksums(old) == ()
    gcs_server.delete_raw(gcs_bucket, "m/a")
    assert backend.checksums(old) == ()


@pytest.mark.parametrize("key", ["token", "anonymous"])
def test_checksums_are_asked_for_once_with_the_same_token(opened: Open, key: str) -> None:
    def answer(request: Asked) -> Reply:
        return Reply(body=b'{"crc32c": "gnzLDg==", "generation": "7"}')

    with OddHTTP(answer) as server:
        backend = opened(server.url, "obstore", **({"anonymous": True} if key != "token" else {}))
        info = backend_info("m/a b", "7")
        assert backend.checksums(info) == (Digest("crc32c", "827ccb0e"),)
        [asked] = server.requests
    assert asked.path == "/storage/v1/b/bucket/o/m%2Fa%20b"
    assert "generation=7" in asked.target
    assert asked.headers.get("Authorization") == ("Bearer HIDDEN" if key == "token" else None)


def backend_info(key: str, generation: str) -> Any:
    from storage.backends.base import ObjectInfo

    return ObjectInfo(key, 5, version=generation)


def test_composed_object_is_checked_by_its_crc32c(opened: Open, tmp_path: Path) -> None:
    data = b"12345"
    crc = hash_file_of(data, tmp_path)

    def answer(request: Asked) -> Reply:
        if request.path.startswith("/storage/v1/"):
            said = f'{{"crc32c": "{crc}", "generation": "7", "kind": "storage#object"}}'
            return Reply(body=said.encode())
        headers = {
            "ETag": '"CKih16GjycICEAE="',
            "x-goog-generation": "7",
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }
        return Reply(body=data, headers=headers)

    with OddHTTP(answer) as server:
        config = config_of(server.url, "obstore")
        Storage.download("gs://bucket/a", tmp_path / "a", config=config)
        assert (tmp_path / "a").read_bytes() == data
        data = b"12354"
        with pytest.raises(IntegrityError, match="crc32c"):
            Storage.download("gs://bucket/a", tmp_path / "b", config=config)
    assert not (tmp_path / "b").exists()


def hash_file_of(data: bytes, folder: Path) -> str:
    (folder / "plain").write_bytes(data)
    crc = hash_file(folder / "plain", ["crc32c"])["crc32c"]
    return base64.b64encode(bytes.fromhex(crc.hex)).decode()


# --- uploads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("at", [0.0, 0.01, 0.5, 0.99])
def test_byte_flipped_on_the_way_up_is_never_stored(
    size: int, at: float, opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    data = os.urandom(size)
    flip = once(Fault("flip_request", at), "PUT" if size > 8 * MIB else "POST")
    with FaultProxy(gcs_server.endpoint, flip, store="gcs") as proxy:
        backend = opened(proxy.endpoint, "fsspec", gcs_bucket)
        with pytest.raises(StorageError):
            backend.write("m/a", bytes_payload(data), metadata={"sha256": "a" * 64})
        assert gcs_server.keys_raw(gcs_bucket) == []
        backend.write("m/a", bytes_payload(data), metadata={"sha256": "a" * 64})
    assert gcs_server.get_raw(gcs_bucket, "m/a") == data


def test_damaged_object_is_not_left_if_no_answer_tells_of_it(
    opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    faults = iter([Fault("flip_request"), None, Fault("truncate_unsized")])

    def script(request: Request) -> Fault | None:
        return next(faults, None) if request.method == "PUT" else None

    with FaultProxy(gcs_server.endpoint, script, store="gcs") as proxy:
        backend = opened(proxy.endpoint, "fsspec", gcs_bucket)
        with pytest.raises(TransientError):
            backend.write("m/a", bytes_payload(bytes(9 * MIB)), metadata={"sha256": "1"})
    assert gcs_server.keys_raw(gcs_bucket) == []


def test_byte_flipped_before_obstores_write_is_noticed(
    opened: Open, gcs_shim: GCSShim, open_seaweedfs: OpenSeaweedFS, prefix: str
) -> None:
    data = os.urandom(1000)
    with (
        open_seaweedfs.bucket("flipped") as bucket,
        FaultProxy(gcs_shim.endpoint, once(Fault("flip_request"), "PUT"), store="gcs") as proxy,
    ):
        backend = opened(proxy.endpoint, "obstore", bucket)
        with pytest.raises(TransientError, match="damaged"):
            backend.write("m/a", bytes_payload(data))
        backend.write("m/a", bytes_payload(data))
        assert read(backend, "m/a") == data


def test_damaged_object_that_is_only_to_be_created_is_told(
    opened: Open, gcs_shim: GCSShim, open_seaweedfs: OpenSeaweedFS
) -> None:
    # The shim cannot remove it, and the next try would take it for its own.
    with (
        open_seaweedfs.bucket("flipped-create") as bucket,
        FaultProxy(gcs_shim.endpoint, once(Fault("flip_request"), "PUT"), store="gcs") as proxy,
    ):
        backend = opened(proxy.endpoint, "obstore", bucket)
        with pytest.raises(IntegrityError, match="delete it"):
            backend.write("m/a", bytes_payload(b"12345"), if_absent=True)


class XmlStore:
    """What obstore needs to store an object in parts, and what the JSON API says of it."""

    def __init__(self, said: bytes) -> None:
        self.said = said
        self.removed: list[str] = []

    def __call__(self, request: Asked) -> Reply:
        if request.path.startswith("/storage/v1/"):
            if request.method == "DELETE":
                self.removed.append(request.target.partition("?")[2])
                return Reply(204)
            return Reply(body=self.said)
        tag = {"ETag": '"tag"', "x-goog-generation": "7"}
        if request.method == "PUT":
            return Reply(headers=tag)
        if "uploads" in request.target:
            name = "InitiateMultipartUploadResult"
            return Reply(body=f"<{name}><UploadId>1</UploadId></{name}>".encode())
        name = "CompleteMultipartUploadResult"
        return Reply(body=f"<{name}><ETag>tag</ETag></{name}>".encode(), headers=tag)


def test_parts_are_checked_by_the_crc32c_of_the_whole(opened: Open, tmp_path: Path) -> None:
    data = os.urandom(9 * MIB)
    right = f'{{"crc32c": "{hash_file_of(data, tmp_path)}", "generation": "7"}}'
    store = XmlStore(right.encode())
    with OddHTTP(store) as server:
        backend = opened(server.url, "obstore")
        assert backend.write("a", bytes_payload(data)).size == len(data)
        assert store.removed == []
        store.said = b'{"crc32c": "AAAAAA==", "generation": "7"}'
        with pytest.raises(TransientError, match="damaged"):
            backend.write("a", bytes_payload(data))
    assert store.removed == ["generation=7&ifGenerationMatch=7"]


# --- answers that are lost, or are none ----------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("status", [None, 500])
def test_create_whose_answer_was_lost_is_known_again(
    size: int, status: int | None, gcs_server: FakeGCS, gcs_bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(data := os.urandom(size))
    # Of a large object, the session's beginning: fake-gcs-server takes a question for an end.
    lost = once(Fault("lost_answer", status=status), "POST")
    with FaultProxy(gcs_server.endpoint, lost, store="gcs") as proxy:
        config = config_of(proxy.endpoint, "fsspec")
        uri = f"gs://{gcs_bucket}/m/a"
        assert Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)
        assert gcs_server.get_raw(gcs_bucket, "m/a") == data
        if size < MIB:
            with pytest.raises(ObjectExistsError):
                Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)


def test_create_by_obstore_whose_answer_was_lost_is_known_again(
    gcs_shim: GCSShim, open_seaweedfs: OpenSeaweedFS, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    lost = once(Fault("lost_answer"), "PUT")
    with (
        open_seaweedfs.bucket("lost-answer") as bucket,
        FaultProxy(gcs_shim.endpoint, lost, store="gcs") as proxy,
    ):
        config = config_of(proxy.endpoint, "obstore")
        uri = f"gs://{bucket}/m/a"
        assert Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)
        with pytest.raises(ObjectExistsError):
            Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)


def always(reply: Reply, request: Asked) -> Reply:
    return reply


CALLS: dict[str, Callable[[Backend], object]] = {
    "stat": lambda backend: backend.stat("m/a"),
    "list": lambda backend: list(backend.list("m/")),
    "read": lambda backend: read(backend, "m/a"),
    "write": lambda backend: backend.write("m/b", bytes_payload(b"1")),
    "write in chunks": lambda backend: backend.write("m/b", bytes_payload(bytes(9 * MIB))),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "document",
    [None, b"", b"{}", b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>", b"<p>"],
    ids=["json", "nothing", "empty", "xml", "html"],
)
def test_error_that_comes_as_a_success_is_none(
    driver: str, call: Callable[[Backend], object], document: bytes | None, opened: Open
) -> None:
    body = document if document is not None else b'{"error": {"code": 500, "message": "no"}}'
    with OddHTTP(lambda request: Reply(200, body)) as server:
        backend = opened(server.url, driver)
        if call is CALLS["list"] and body == b"{}":
            assert call(backend) == []  # which is how Google says it
            return
        if call is CALLS["read"] and driver == "fsspec":
            pin = backend_info("m/a", "7")
            with pytest.raises(TransientError):
                backend.read("m/a", None, pin)
            return
        if call is CALLS["write in chunks"] and driver == "fsspec":
            with pytest.raises(StorageError, match="resumable"):
                call(backend)
            return
        with pytest.raises(TransientError):
            call(backend)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("kind", ["truncate", "truncate_unsized", "reset", "error_body"])
@pytest.mark.parametrize("page", [1, 2])
def test_listing_that_is_cut_is_no_listing(
    driver: str, kind: str, page: int, opened: Open, gcs_server: FakeGCS, gcs_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module in ("fsspec", "json_api"):
        monkeypatch.setitem(
            __import__(f"storage.backends.gcs.{module}", fromlist=["PAGE"]).PAGE, "maxResults", "2"
        )
    for number in range(4):
        gcs_server.put_raw(gcs_bucket, f"m/{number}", b"1")
    script = once(Fault(kind, 0.6), number=page)
    with FaultProxy(gcs_server.endpoint, script, store="gcs") as proxy:
        backend = opened(proxy.endpoint, driver, gcs_bucket)
        with pytest.raises(TransientError):
            list(backend.list("m/"))
        assert len(list(backend.list("m/"))) == 4


def copying(backend: Backend) -> None:
    backend.copy("m/0", "m/9")


def deleting(backend: Backend) -> None:
    backend.delete(["m/0", "m/1"])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("act", [copying, deleting])
def test_error_in_the_body_of_a_success_is_an_error(
    driver: str, act: Callable[[Backend], object], opened: Open, gcs_server: FakeGCS,
    gcs_bucket: str,
) -> None:  # fmt: skip
    for number in range(2):
        gcs_server.put_raw(gcs_bucket, f"m/{number}", b"1")
    broken = True

    def script(request: Request) -> Fault | None:
        return Fault("error_body") if broken and request.method in ("POST", "DELETE") else None

    with FaultProxy(gcs_server.endpoint, script, store="gcs") as proxy:
        backend = opened(proxy.endpoint, driver, gcs_bucket)
        with pytest.raises(TransientError):
            act(backend)
        broken = False
        act(backend)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_store_that_is_asked_too_often_says_so(
    driver: str, call: Callable[[Backend], object], opened: Open
) -> None:
    for status, body in (
        (429, b""),
        (503, b""),
        (403, b'{"error": {"code": 403, "errors": [{"reason": "rateLimitExceeded"}]}}'),
    ):
        if status == 403 and driver == "obstore" and call is not CALLS["list"]:
            continue  # the JSON API's alone
        with OddHTTP(partial(always, Reply(status, body))) as server:
            with pytest.raises(TransientError) as caught:
                call(opened(server.url, driver))
            assert caught.value.throttled


def test_time_to_wait_may_be_a_date(opened: Open) -> None:
    date = formatdate(time.time() + 100, usegmt=True)
    with OddHTTP(lambda request: Reply(503, headers={"Retry-After": date})) as server:
        for driver in DRIVERS:
            with pytest.raises(TransientError) as caught:
                list(opened(server.url, driver).list())
            assert caught.value.retry_after is not None
            assert 60 < caught.value.retry_after <= 100


# --- tokens that expire --------------------------------------------------------------------------


class Issuer:
    """Credentials that give token 1, 2, …, and a store that knows which one is good."""

    def __init__(self) -> None:
        self.issued = 0
        self.good = 1
        self.refused = 0
        self.status = 401

    def find(self) -> Any:
        import google.auth.credentials

        issuer = self

        class Credentials(google.auth.credentials.Credentials):
            def refresh(self, request: Any) -> None:
                issuer.issued += 1
                self.token = f"TOKEN-{issuer.issued}"

        return Credentials()  # type: ignore[no-untyped-call]

    def __call__(self, request: Request) -> Fault | None:
        headers = {name.lower(): value for name, value in dict(request.headers).items()}
        if headers.get("authorization") == f"Bearer TOKEN-{self.good}":
            return None
        self.refused += 1
        return Fault("expire") if self.status == 401 else Fault("status", status=self.status)


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> Issuer:
    issuer = Issuer()
    monkeypatch.setattr(TokenSource, "_find", issuer.find)
    return issuer


# fake-gcs-server has no writes by the XML API.
@pytest.mark.parametrize(
    ("driver", "call"),
    [
        *(("obstore", call) for call in ("stat", "list", "read", "delete")),
        *(("fsspec", call) for call in (*CALLS, "delete")),
    ],
)
def test_token_that_is_refused_is_renewed_once(
    driver: str, call: str, issuer: Issuer, opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    gcs_server.put_raw(gcs_bucket, "m/a", b"12345")
    with FaultProxy(gcs_server.endpoint, issuer, store="gcs") as proxy:
        backend = opened(proxy.endpoint, driver, gcs_bucket, token=None)
        assert backend.stat("m/a").size == 5
        assert (issuer.issued, issuer.refused) == (1, 0)
        issuer.good = 2
        if call == "delete":
            backend.delete(["m/a"])
        else:
            CALLS[call](backend)
        assert (issuer.issued, issuer.refused) == (2, 1)
        # And no further than that.
        issuer.good = 9
        with pytest.raises(AuthenticationError):
            backend.stat("m/a")
        assert (issuer.issued, issuer.refused) == (3, 3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_permission_that_is_missing_costs_one_request(
    driver: str, issuer: Issuer, opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    issuer.good, issuer.status = 9, 403
    with FaultProxy(gcs_server.endpoint, issuer, store="gcs") as proxy:
        backend = opened(proxy.endpoint, driver, gcs_bucket, token=None)
        for call in ("stat", "list", "read"):
            with pytest.raises(AuthenticationError):
                CALLS[call](backend)
        assert (issuer.issued, issuer.refused) == (1, 3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_pin_survives_an_answer_that_tells_another_generation(
    driver: str, opened: Open, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    gcs_server.put_raw(gcs_bucket, "m/a", b"1")
    backend = opened(gcs_server.endpoint, driver, gcs_bucket)
    info = backend.stat("m/a")
    gcs_server.put_raw(gcs_bucket, "m/a", b"2")
    with pytest.raises(ObjectChangedError):
        backend.read("m/a", None, info)
