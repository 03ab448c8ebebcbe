"""Azure under faults on the way: nothing damaged is stored or handed over, by both drivers."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from storage import Storage
from storage.backends import open_backend
from storage.backends.azure.tokens import Tokens
from storage.backends.base import Backend, ObjectInfo, OpenOptions, bytes_payload
from storage.config import AzureConfig
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from storage.uri import parse_uri
from tests.faults.scripts import once
from tests.servers.azurite import Azurite
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.odd_http import Request as Asked

MIB = 1024 * 1024
# One request up to 4 MiB, and three blocks of 9.
MEMORY = 32 * MIB
DRIVERS = ("obstore", "fsspec")
Open = Callable[..., Backend]


def config_of(endpoint: str, driver: Any, **fields: Any) -> AzureConfig:
    name, key = Azurite.main
    own = {"account_name": name, "account_key": key, **fields}
    return AzureConfig(**own, endpoint_url=f"{endpoint}/{name}", driver=driver)


@pytest.fixture
def opened() -> Iterator[Open]:
    backends: list[Backend] = []

    def make(endpoint: str, driver: Any, container: str = "cont", **fields: Any) -> Backend:
        config = config_of(endpoint, driver, **fields)
        # Nothing stalls here but the machine.
        options = OpenOptions(memory=MEMORY, stall_timeout=60)
        backends.append(open_backend(parse_uri(f"azure://{container}/"), config, options))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(piece) for piece in body)


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def put_in_blocks(
    azurite: Azurite, container: str, data: bytes, headers: Mapping[str, str] | None = None
) -> None:
    """Make a blob of one block, of which Azure takes no MD5 by itself."""
    path = f"{container}/m/a"
    name = base64.b64encode(f"{1:032}".encode()).decode()
    azurite.request("PUT", path, {"comp": "block", "blockid": name}, {}, data)
    listed = f"<BlockList><Latest>{name}</Latest></BlockList>".encode()
    azurite.request("PUT", path, {"comp": "blocklist"}, headers or {}, listed)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- downloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True], ids=["object", "tree"])
def test_flipped_byte_of_somebody_elses_blob_is_refused(
    driver: str, tree: bool, azurite: Azurite, azurite_container: str, tmp_path: Path
) -> None:
    azurite.put_raw(azurite_container, "m/a", os.urandom(100_000))
    flip = once(Fault("flip"), "GET", to="/m/a")
    with FaultProxy(azurite.endpoint, flip, store="azure") as proxy:
        uri = f"azure://{azurite_container}/m" if tree else f"azure://{azurite_container}/m/a"
        with pytest.raises(IntegrityError):
            Storage.download(uri, tmp_path / "a", config=config_of(proxy.endpoint, driver))
        kinds = [exchange.fault.kind for exchange in proxy.exchanges if exchange.fault]
    assert kinds == ["flip"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("tree", [False, True], ids=["object", "tree"])
def test_blob_that_is_not_what_its_uploader_said_is_refused(
    driver: str, tree: bool, azurite: Azurite, azurite_container: str, tmp_path: Path
) -> None:
    put_in_blocks(azurite, azurite_container, b"12345", {"x-ms-blob-content-md5": md5(b"12354")})
    uri = f"azure://{azurite_container}/m" if tree else f"azure://{azurite_container}/m/a"
    with pytest.raises(IntegrityError, match="md5"):
        Storage.download(uri, tmp_path / "a", config=config_of(azurite.endpoint, driver))
    assert not (tmp_path / "a").exists()


def test_blob_without_an_md5_is_taken_at_its_size(
    driver: str, azurite: Azurite, azurite_container: str, tmp_path: Path
) -> None:
    put_in_blocks(azurite, azurite_container, b"12345")
    config = config_of(azurite.endpoint, driver)
    for uri in ("m", "m/a"):
        where = tmp_path / uri.replace("/", "-")
        Storage.download(f"azure://{azurite_container}/{uri}", where, config=config)
    assert (tmp_path / "m-a").read_bytes() == b"12345"


# --- uploads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 9 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("at", [0.0, 0.5, 0.99])
def test_byte_flipped_on_the_way_up_is_never_stored(
    size: int, at: float, opened: Open, azurite: Azurite, azurite_container: str
) -> None:
    data = os.urandom(size)
    flip = once(Fault("flip_request", at), "PUT")
    with FaultProxy(azurite.endpoint, flip, store="azure") as proxy:
        # Either driver writes in the same way.
        backend = opened(proxy.endpoint, "obstore", azurite_container)
        with pytest.raises(TransientError):
            backend.write("m/a", bytes_payload(data))
        assert azurite.keys_raw(azurite_container) == []
        backend.write("m/a", bytes_payload(data))
    assert azurite.get_raw(azurite_container, "m/a") == data
    # Whoever downloads it can check it.
    assert azurite.head_raw(azurite_container, "m/a")["content-md5"] == md5(data)


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_damaged_list_of_blocks_makes_no_blob(
    at: float, opened: Open, azurite: Azurite, azurite_container: str
) -> None:
    data = os.urandom(9 * MIB)
    flip = once(Fault("flip_request", at), "PUT", to="comp=blocklist")
    with FaultProxy(azurite.endpoint, flip, store="azure") as proxy:
        backend = opened(proxy.endpoint, None, azurite_container)
        with pytest.raises(StorageError):
            backend.write("m/a", bytes_payload(data))
        assert azurite.keys_raw(azurite_container) == []
        backend.write("m/a", bytes_payload(data))
    assert azurite.get_raw(azurite_container, "m/a") == data


def test_damaged_list_of_blocks_is_removed_with_its_own_entity_tag(opened: Open) -> None:
    def answer(request: Asked) -> Reply:
        if request.method == "DELETE":
            return Reply(202)
        other = {"Content-MD5": md5(b"other"), "ETag": '"0x7"'}
        return Reply(201, b"", other if "blocklist" in request.target else {})

    with OddHTTP(answer) as server:
        with pytest.raises(TransientError, match="damaged"):
            opened(server.url, None).write("a", bytes_payload(bytes(9 * MIB)))
        [deleted] = server.asked("DELETE")
    assert deleted.headers["If-Match"] == '"0x7"'


def test_next_try_sends_the_blocks_alone_that_did_not_arrive(
    opened: Open, azurite: Azurite, azurite_container: str
) -> None:
    data = os.urandom(9 * MIB)
    refused = once(Fault("status", status=500), "PUT", to="comp=blocklist")
    with FaultProxy(azurite.endpoint, refused, store="azure") as proxy:
        backend = opened(proxy.endpoint, None, azurite_container)
        with pytest.raises(TransientError):
            backend.write("m/a", bytes_payload(data))
        first = proxy.bytes_up
        assert first > len(data)
        arrived: list[int] = []
        backend.write("m/a", bytes_payload(data), on_bytes=arrived.append)
        assert proxy.bytes_up - first < 10_000
        assert sum(arrived) == len(data)
        # Other bytes are sent.
        other = data[: 5 * MIB] + os.urandom(MIB) + data[6 * MIB :]
        before = proxy.bytes_up
        backend.write("m/a", bytes_payload(other))
        assert proxy.bytes_up - before > len(other)
    assert azurite.get_raw(azurite_container, "m/a") == other
    assert azurite.uncommitted(azurite_container) == []


def test_blocks_of_an_earlier_try_are_compared(
    opened: Open, azurite: Azurite, azurite_container: str
) -> None:
    data = os.urandom(9 * MIB)
    other = data[: 5 * MIB] + os.urandom(MIB) + data[6 * MIB :]
    refused = once(Fault("status", status=500), "PUT", to="comp=blocklist")
    with FaultProxy(azurite.endpoint, refused, store="azure") as proxy:
        backend = opened(proxy.endpoint, None, azurite_container)
        with pytest.raises(TransientError):
            backend.write("m/a", bytes_payload(data))
        before = proxy.bytes_up
        backend.write("m/a", bytes_payload(other))
        assert 0 < proxy.bytes_up - before <= 4 * MIB + 10_000
    assert azurite.get_raw(azurite_container, "m/a") == other


def test_blocks_that_somebody_dropped_are_sent_again(
    opened: Open, azurite: Azurite, azurite_container: str
) -> None:
    data = os.urandom(9 * MIB)
    refused = once(Fault("status", status=500), "PUT", to="comp=blocklist")
    with FaultProxy(azurite.endpoint, refused, store="azure") as proxy:
        backend = opened(proxy.endpoint, None, azurite_container)
        with pytest.raises(TransientError):
            backend.write("m/a", bytes_payload(data))
        put_in_blocks(azurite, azurite_container, b"somebody else's")
        with pytest.raises(TransientError, match="InvalidBlockList"):
            backend.write("m/a", bytes_payload(data))
        before = proxy.bytes_up
        backend.write("m/a", bytes_payload(data))
        assert proxy.bytes_up - before > len(data)
    assert azurite.get_raw(azurite_container, "m/a") == data


# --- answers that are lost, or are none ----------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 20 * MIB], ids=["small", "large"])
@pytest.mark.parametrize("status", [None, 500])
def test_create_whose_answer_was_lost_is_known_again(
    size: int,
    status: int | None,
    driver: str,
    azurite: Azurite,
    azurite_container: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_bytes(data := os.urandom(size))
    lost = once(
        Fault("lost_answer", status=status), "PUT", to="comp=blocklist" if size > MIB else ""
    )
    with FaultProxy(azurite.endpoint, lost, store="azure") as proxy:
        config = config_of(proxy.endpoint, driver)
        uri = f"azure://{azurite_container}/m/a"
        assert Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)
        assert azurite.get_raw(azurite_container, "m/a") == data
        with pytest.raises(ObjectExistsError):
            Storage.upload(tmp_path / "a", uri, overwrite=False, config=config)


def test_credential_that_may_only_create(driver: str, opened: Open) -> None:
    code = b"<Error><Code>UnauthorizedBlobOverwrite</Code><Message>no</Message></Error>"
    answer = Reply(403, code, {"x-ms-error-code": "UnauthorizedBlobOverwrite"})
    with OddHTTP(lambda request: answer) as server:
        backend = opened(server.url, driver)
        with pytest.raises(ObjectExistsError):
            backend.write("a", bytes_payload(b"1"), if_absent=True)
        with pytest.raises(AuthenticationError, match="to create"):
            backend.write("a", bytes_payload(b"1"))


CALLS: dict[str, Callable[[Backend], object]] = {
    "stat": lambda backend: backend.stat("m/a"),
    "list": lambda backend: list(backend.list("m/")),
    "read": lambda backend: read(backend, "m/a"),
    "write": lambda backend: backend.write("m/b", bytes_payload(b"1")),
    "write in blocks": lambda backend: backend.write("m/b", bytes_payload(bytes(9 * MIB))),
    "copy": lambda backend: backend.copy("m/a", "m/c"),
    "delete": lambda backend: backend.delete(["m/a"]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "document",
    [b"", b"{}", b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>", b"<p>"],
    ids=["nothing", "json", "xml", "html"],
)
def test_error_that_comes_as_a_success_is_none(
    driver: str, call: str, document: bytes, opened: Open
) -> None:
    with (
        OddHTTP(lambda request: Reply(200, document)) as server,
        pytest.raises(TransientError),
    ):
        CALLS[call](opened(server.url, driver))


def test_answer_about_nothing_is_no_change(driver: str, opened: Open) -> None:
    with OddHTTP(lambda request: Reply(200, b"12345")) as server:
        backend = opened(server.url, driver)
        with pytest.raises(TransientError):
            backend.read("a", None, ObjectInfo("a", 5, '"0x1"'))


@pytest.mark.parametrize("kind", ["truncate", "truncate_unsized", "reset", "error_body"])
@pytest.mark.parametrize("page", [1, 2])
def test_listing_that_is_cut_is_no_listing(
    kind: str, page: int, opened: Open, azurite: Azurite, azurite_container: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("storage.backends.azure.fsspec._PAGE", 2)
    for number in range(4):
        azurite.put_raw(azurite_container, f"m/{number}", b"1")
    script = once(Fault(kind, 0.6), number=page)
    with FaultProxy(azurite.endpoint, script, store="azure") as proxy:
        backend = opened(proxy.endpoint, None, azurite_container)
        with pytest.raises(TransientError):
            list(backend.list("m/"))
        assert len(list(backend.list("m/"))) == 4


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "code", "throttled"),
    [
        (503, "ServerBusy", True),
        (429, "TooManyRequests", True),
        (500, "OperationTimedOut", False),
    ],
)
def test_store_that_is_asked_too_often_says_so(
    driver: str, call: str, status: int, code: str, throttled: bool, opened: Open
) -> None:
    answer = Reply(status, b"", {"x-ms-error-code": code})
    with OddHTTP(lambda request: answer) as server, pytest.raises(TransientError) as caught:
        CALLS[call](opened(server.url, driver))
    assert caught.value.throttled is throttled


def test_time_to_wait_may_be_a_date(opened: Open) -> None:
    date = formatdate(time.time() + 100, usegmt=True)
    with OddHTTP(lambda request: Reply(503, headers={"Retry-After": date})) as server:
        for call in ("list", "write", "read"):
            with pytest.raises(TransientError) as caught:
                CALLS[call](opened(server.url, "fsspec"))
            assert caught.value.retry_after is not None
            assert 60 < caught.value.retry_after <= 100


# --- credentials that expire ---------------------------------------------------------------------


class Authority:
    """Gives tokens that Azurite takes, and lets the last one alone be good."""

    def __init__(self, azurite: Azurite) -> None:
        self.bearer = azurite.bearer
        self.issued = 0
        self.expired = False
        self.refused = 0

    def credential(self, *parts: object) -> Any:
        self.issued += 1
        self.expired = False
        return self

    def get_token(self, scope: str) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken(self.bearer(), int(time.time()) + 3600)

    def __call__(self, request: Request) -> Fault | None:
        if self.expired:
            self.refused += 1
            return Fault("expire")
        return None


@pytest.mark.parametrize("call", [call for call in CALLS if call != "write in blocks"])
def test_token_that_is_refused_is_renewed_once(
    driver: str, call: str, opened: Open, azurite_tls: Azurite, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    import trustme

    authority = Authority(azurite_tls)
    monkeypatch.setattr("storage.backends.azure.tokens._credential", authority.credential)
    ca = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(tls)
    monkeypatch.setenv("SSL_CERT_FILE", str(azurite_tls.ca))
    with (
        azurite_tls.container("expiring") as container,
        FaultProxy(azurite_tls.endpoint, authority, store="azure", tls=tls) as proxy,
        ca.cert_pem.tempfile() as bundle,
    ):
        azurite_tls.put_raw(container, "m/a", b"12345")
        own = {"account_key": None, "ca_bundle": bundle}
        backend = opened(proxy.endpoint, driver, container, **own)
        assert backend.stat("m/a").size == 5
        assert (authority.issued, authority.refused) == (1, 0)
        authority.expired = True
        CALLS[call](backend)
        assert (authority.issued, authority.expired) == (2, False)
        # By obstore, a HEAD does not tell enough.
        assert authority.refused <= 2


def test_key_or_token_that_was_given_is_not_renewed(driver: str, opened: Open) -> None:
    answer = Reply(403, b"<Error><Code>AuthenticationFailed</Code></Error>")
    with OddHTTP(lambda request: answer) as server:
        for call in ("list", "read", "write"):
            server.clear()
            with pytest.raises(AuthenticationError):
                CALLS[call](opened(server.url, driver))
            assert len(server.requests) == 1
    assert not Tokens(AzureConfig("a", token="t"), None, "windows.net").renew(1e9)  # type: ignore[arg-type]
