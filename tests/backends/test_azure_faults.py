"""What Azure may answer and Azurite does not, by both drivers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal
from urllib.parse import parse_qsl

import pytest

from storage.backends import open_backend
from storage.backends.azure.answers import from_code
from storage.backends.base import Backend, ByteRange, ObjectInfo, OpenOptions, bytes_payload
from storage.config import AzureConfig
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)
from storage.uri import parse_uri
from tests.servers.azurite import Azurite
from tests.servers.odd_http import Handler, OddHTTP, Reply, Request
from tests.servers.process import HOST, free_port

KEY = "a2V5"
VERSION = "2026-01-02T03:04:05.0000001Z"
ANSWERS = [
    (400, "InvalidAuthenticationInfo", AuthenticationError),
    (400, "OutOfRangeInput", InvalidInput),
    (400, "InvalidQueryParameterValue", StorageError),
    (401, "NoAuthenticationInformation", AuthenticationError),
    (403, "AuthenticationFailed", AuthenticationError),
    (403, "AuthorizationPermissionMismatch", AuthenticationError),
    (403, "KeyBasedAuthenticationNotPermitted", AuthenticationError),
    (404, "BlobNotFound", ModelMissingError),
    (404, "ContainerNotFound", BucketMissingError),
    (404, "ResourceNotFound", ModelMissingError),
    (409, "PublicAccessNotPermitted", AuthenticationError),
    (409, "ContainerBeingDeleted", TransientError),
    (409, "BlobArchived", StorageError),
    (412, "ConditionNotMet", ObjectChangedError),
    (412, "LeaseIdMissing", StorageError),
    (416, "InvalidRange", ObjectChangedError),
    (429, "TooManyRequests", TransientError),
    (500, "InternalError", TransientError),
    (500, "OperationTimedOut", TransientError),
    (503, "ServerBusy", TransientError),
]


def refusal(status: int, code: str, **headers: str) -> Reply:
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>Because.\n'
        "RequestId:1\nTime:2026-01-01T00:00:00Z</Message></Error>"
    )
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    fields = {"Content-Type": "application/xml", "x-ms-error-code": code, **headers}
    return Reply(status, body.encode(), fields)


def blob(data: bytes = b"12345", **headers: str) -> Reply:
    fields = {
        "ETag": '"0x1"',
        "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        "x-ms-blob-type": "BlockBlob",
        "Content-Type": "application/octet-stream",
    }
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(200, data, fields)


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Literal["obstore", "fsspec"]:
    found: Literal["obstore", "fsspec"] = request.param
    return found


@pytest.fixture
def opened(driver: Literal["obstore", "fsspec"]) -> Iterator[Callable[..., Backend]]:
    backends: list[Backend] = []

    def opener(
        endpoint: str, container: str = "c", patience: float = 60.0, **fields: Any
    ) -> Backend:
        config = AzureConfig(
            **{"account_name": "acct", "account_key": KEY, **fields},
            endpoint_url=endpoint,
            driver=driver,
        )
        options = OpenOptions(stall_timeout=patience, connect_timeout=60)
        backends.append(open_backend(parse_uri(f"azure://{container}/"), config, options))
        return backends[-1]

    yield opener
    for backend in backends:
        backend.close()


Azure = Callable[..., tuple[Backend, OddHTTP]]
# Of a client whose store stalls on purpose; elsewhere it is the machine that does.
HASTE = 2.0


@pytest.fixture
def azure(opened: Callable[..., Backend]) -> Iterator[Azure]:
    """Return a backend of an Azure that answers as it is told, and that Azure."""
    with ExitStack() as stack:

        def make(handler: Handler, **options: Any) -> tuple[Backend, OddHTTP]:
            server = stack.enter_context(OddHTTP(handler))
            return opened(f"{server.url}/acct", **options), server

        yield make


def read(backend: Backend, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> bytes:
    with backend.read("a", span, pin) as body:
        return b"".join(bytes(piece) for piece in body)


# --- error answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["read", "list", "write", "stat"])
@pytest.mark.parametrize(("status", "code", "expected"), ANSWERS, ids=lambda value: str(value))
def test_error_answer_is_understood_after_one_request(
    azure: Azure, status: int, code: str, expected: type[StorageError], operation: str
) -> None:
    backend, server = azure(lambda request: refusal(status, code))
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read(backend),
        "list": lambda: list(backend.list()),
        "write": lambda: backend.write("a", bytes_payload(b"1")),
        "stat": lambda: backend.stat("a"),
    }
    with pytest.raises(StorageError) as caught:
        calls[operation]()
    if operation == "stat" and status == 404:
        # obstore sees no more of the answer to a HEAD.
        expected = ModelMissingError
    elif operation == "stat" and status == 416:
        expected = StorageError
    assert isinstance(caught.value, expected), repr(caught.value)
    if expected is StorageError and operation != "write":
        assert not isinstance(caught.value, TransientError)
    assert len(str(caught.value).splitlines()) == 1
    assert KEY not in str(caught.value)
    # A second one, by the other driver, where the answer to a HEAD is not enough.
    assert len(server.requests) <= (2 if operation == "stat" else 1)


def test_every_error_code_gives_the_error_it_stands_for() -> None:
    for status, code, expected in ANSWERS:
        found = from_code("azure://c/a", code, status, "Because.\nRequestId:1")
        assert type(found) is expected
        assert "RequestId" not in str(found)
        assert "azure://c/a" in str(found)
    assert type(from_code("azure://c/a", "", 502, "")) is TransientError
    assert type(from_code("azure://c/a", "Unheard", 418, "")) is StorageError


def test_time_to_wait_is_told(azure: Azure, driver: str) -> None:
    backend, _ = azure(lambda request: refusal(503, "ServerBusy", Retry_After="7"))
    with pytest.raises(TransientError) as caught:
        list(backend.list())
    assert caught.value.retry_after == 7
    with pytest.raises(TransientError) as caught:
        read(backend)
    # obstore does not show the headers of a refusal.
    assert caught.value.retry_after == (7 if driver == "fsspec" else None)


@pytest.mark.parametrize("status", [409, 412])
def test_conflict_of_a_create_only_write(azure: Azure, status: int) -> None:
    code = {409: "BlobAlreadyExists", 412: "ConditionNotMet"}[status]
    backend, server = azure(lambda request: refusal(status, code))
    with pytest.raises(ObjectExistsError):
        backend.write("a", bytes_payload(b"1"), if_absent=True)
    assert server.requests[0].headers["If-None-Match"] == "*"


def test_write_that_replaces_what_is_gone(azure: Azure) -> None:
    backend, server = azure(lambda request: refusal(412, "ConditionNotMet"))
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(b"1"), if_match=ObjectInfo("a", 1, '"0x1"'))
    assert server.requests[0].headers["If-Match"] == '"0x1"'


def test_blob_with_snapshots_is_not_deleted_and_that_is_said(azure: Azure) -> None:
    backend, _ = azure(lambda request: refusal(409, "SnapshotsPresent"))
    with pytest.raises(StorageError) as caught:
        backend.delete(["a"])
    assert not isinstance(caught.value, (TransientError, ObjectExistsError))


def test_nobody_at_the_address(opened: Callable[..., Backend]) -> None:
    backend = opened(f"http://{HOST}:{free_port()}/acct")
    for call in (
        lambda: backend.stat("a"),
        lambda: read(backend),
        lambda: list(backend.list()),
        lambda: backend.write("a", bytes_payload(b"1")),
        lambda: backend.delete(["a"]),
    ):
        with pytest.raises(UnreachableError):
            call()


def test_name_that_does_not_exist(opened: Callable[..., Backend]) -> None:
    backend = opened("http://no-such-host.invalid/acct")
    for call in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(UnreachableError):
            call()


def test_server_that_does_not_speak_azure(azure: Azure) -> None:
    page = Reply(200, b"<html>welcome</html>", {"Content-Type": "text/html"})
    backend, _ = azure(lambda request: page)
    with pytest.raises(StorageError):
        list(backend.list())
    with pytest.raises(StorageError):
        backend.stat("a")


# --- bodies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 20 * 1024 * 1024], ids=["small", "large"])
@pytest.mark.parametrize("status", [200, 307])
def test_write_that_nobody_confirms_is_none(azure: Azure, status: int, size: int) -> None:
    elsewhere = {"Location": "https://elsewhere.example/"}
    backend, _ = azure(lambda request: Reply(status, b"", elsewhere))
    with pytest.raises(StorageError):
        backend.write("a", bytes_payload(bytes(size)))


def test_body_that_is_cut_is_noticed(azure: Azure) -> None:
    cut = blob(b"x" * 100_000)
    cut.cut = 50_000
    backend, server = azure(lambda request: cut)
    with pytest.raises(TransientError):
        read(backend)
    assert len(server.requests) == 1


def test_body_that_stalls_is_given_up(azure: Azure) -> None:
    go_on = threading.Event()
    stalled = blob(b"x" * 100_000)
    stalled.cut, stalled.stall = 50_000, go_on
    backend, server = azure(lambda request: stalled, patience=HASTE)
    try:
        with pytest.raises(TransientError):
            read(backend)
    finally:
        go_on.set()
    assert len(server.requests) == 1


def test_answer_that_does_not_come_is_given_up(azure: Azure) -> None:
    go_on = threading.Event()

    def handler(request: Request) -> Reply:
        go_on.wait(600)
        return Reply(500)

    backend, _ = azure(handler, patience=HASTE)
    try:
        for call in (lambda: backend.stat("a"), lambda: backend.write("a", bytes_payload(b"1"))):
            with pytest.raises(TransientError):
                call()
    finally:
        go_on.set()


def test_range_that_is_ignored_gives_no_wrong_bytes(azure: Azure) -> None:
    backend, _ = azure(lambda request: blob(b"0123456789"))
    with pytest.raises(StorageError):
        read(backend, ByteRange(2, 4))


def test_other_range_than_asked_for_gives_no_wrong_bytes(azure: Azure) -> None:
    def handler(request: Request) -> Reply:
        reply = blob(b"01", Content_Range="bytes 0-1/10")
        reply.status = 206
        return reply

    backend, _ = azure(handler)
    with pytest.raises(StorageError):
        read(backend, ByteRange(2, 4))


# --- versions --------------------------------------------------------------------------------


def versioned(request: Request) -> Reply:
    """An account that keeps versions, which Azurite does not."""
    old = dict(parse_qsl(request.target.partition("?")[2])).get("versionid") == VERSION
    version = VERSION if old else "2026-02-02T00:00:00.0000000Z"
    data = b"old" if old else b"newer"
    return blob(data, x_ms_version_id=version, ETag='"0x0"' if old else '"0x1"')


def test_version_is_asked_for_and_told(azure: Azure) -> None:
    backend, _ = azure(versioned)
    assert backend.stat("a").version == "2026-02-02T00:00:00.0000000Z"
    info = backend.stat("a", VERSION)
    assert (info.version, info.size) == (VERSION, 3)
    assert read(backend, pin=info) == b"old"


def test_store_that_ignores_the_version_is_not_believed(azure: Azure) -> None:
    backend, _ = azure(lambda request: blob())
    with pytest.raises(ModelMissingError, match="no version"):
        backend.stat("a", VERSION)


def test_text_that_is_no_version_names_nothing(azure: Azure) -> None:
    backend, _ = azure(lambda request: refusal(400, "InvalidQueryParameterValue"))
    with pytest.raises(ModelMissingError):
        backend.stat("a", "yesterday")


def test_version_is_copied_if_it_did_not_change(azure: Azure) -> None:
    def handler(request: Request) -> Reply:
        if request.method == "HEAD":
            return versioned(request)
        return Reply(202, b"", {"x-ms-copy-id": "1", "x-ms-copy-status": "success"})

    backend, server = azure(handler)
    backend.copy("a", "b", version=VERSION)
    [put] = server.asked("PUT")
    assert put.headers["x-ms-copy-source"] == f"{server.url}/acct/c/a?versionid={VERSION}"
    assert put.headers["x-ms-source-if-match"] == '"0x0"'


def test_version_that_may_not_be_named_is_read_by_its_entity_tag(azure: Azure) -> None:
    def handler(request: Request) -> Reply:
        if "versionid=" in request.target:
            return refusal(403, "AuthorizationPermissionMismatch")
        return blob(x_ms_version_id=VERSION)

    backend, server = azure(handler)
    assert read(backend, pin=ObjectInfo("a", 5, '"0x1"', VERSION)) == b"12345"
    assert [request.headers["If-Match"] for request in server.requests] == ['"0x1"'] * 2
    with pytest.raises(AuthenticationError):
        read(backend, pin=ObjectInfo("a", 5, None, VERSION))


# --- copies that take their time ---------------------------------------------------------------


class SlowCopy:
    """An Azure that copies for a while."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.gone = False

    def __call__(self, request: Request) -> Reply:
        if request.method == "HEAD" and request.path.endswith("/a"):
            return blob()
        if request.method == "HEAD":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            if state == "busy":
                return refusal(503, "ServerBusy")
            return blob(b"", x_ms_copy_id="7", x_ms_copy_status=state)
        if request.method == "DELETE":
            self.gone = True
            return Reply(202)
        if "comp=copy" in request.target:
            self.states = ["aborted"]
            return Reply(204)
        return Reply(202, b"", {"x-ms-copy-id": "7", "x-ms-copy-status": "pending"})


def test_copy_is_over_when_azure_says_so(azure: Azure) -> None:
    slow = SlowCopy("pending", "pending", "success")
    backend, server = azure(slow)
    backend.copy("a", "b")
    assert len([request for request in server.asked("HEAD") if request.path.endswith("/b")]) == 3
    assert not slow.gone


@pytest.mark.parametrize("state", ["failed", "aborted"])
def test_copy_that_fails_later_leaves_nothing(azure: Azure, state: str) -> None:
    slow = SlowCopy("pending", state)
    backend, server = azure(slow)
    with pytest.raises(TransientError, match=state):
        backend.copy("a", "b")
    assert slow.gone
    [deletion] = [request for request in server.requests if request.method == "DELETE"]
    assert deletion.headers["If-Match"] == '"0x1"'


def test_copy_that_cannot_be_watched_is_ended(azure: Azure) -> None:
    # Once: what asks how to end it finds it on its way.
    slow = SlowCopy("busy", "pending")
    backend, server = azure(slow)
    with pytest.raises(TransientError):
        backend.copy("a", "b")
    [abort] = [request for request in server.requests if "comp=copy" in request.target]
    assert abort.headers["x-ms-copy-action"] == "abort"
    assert slow.gone


def test_copy_that_never_goes_on_is_ended(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.backends.azure.fsspec._COPY_PATIENCE", 0.001)
    slow = SlowCopy("pending")
    backend, server = azure(slow)
    with pytest.raises(TransientError, match="not gone on"):
        backend.copy("a", "b")
    assert len([request for request in server.requests if "comp=copy" in request.target]) == 1
    assert slow.gone


# --- construction ----------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["obstore", "fsspec"])
def test_construction_imports_no_sdk(chosen: str) -> None:
    import subprocess
    import sys

    script = (
        "import sys\n"
        "from storage.backends.azure.backend import open_backend\n"
        "from storage.backends.base import OpenOptions\n"
        "from storage.uri import parse_uri\n"
        "class Config:\n"
        "    def __getattr__(self, name): return None\n"
        "config = Config()\n"
        f"config.driver, config.verify_ssl = {chosen!r}, True\n"
        "backend = open_backend(parse_uri('azure://c/m'), config, OpenOptions())\n"
        "backend.name, backend.capabilities\n"
        "backend.close()\n"
        "found = {'adlfs', 'aiohttp', 'azure', 'fsspec', 'obstore', 'pydantic', 'requests'}\n"
        "sys.exit(str(found & set(sys.modules)) if found & set(sys.modules) else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("chosen", "package"), [("obstore", "obstore.store"), ("fsspec", "azure.storage.blob.aio")]
)
def test_missing_package_names_the_install_line(
    monkeypatch: pytest.MonkeyPatch, chosen: Any, package: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    config = AzureConfig("acct", KEY, driver=chosen)
    backend = open_backend(parse_uri("azure://c/m"), config, OpenOptions())
    with pytest.raises(ConfigurationError, match=r'pip install "modelstorage\[azure\]"'):
        backend.stat("a")


def test_close_can_be_repeated(
    azurite: Azurite, azurite_container: str, opened: Callable[..., Backend]
) -> None:
    backend = opened(
        azurite.account_url(),
        azurite_container,
        account_name=azurite.main.name,
        account_key=azurite.main.key,
    )
    backend.close()
    with pytest.raises(ModelMissingError):
        backend.stat("none")
    list(backend.list())
    backend.close()
    backend.close()


def test_local_paths_and_other_capabilities(opened: Callable[..., Backend]) -> None:
    backend = opened("http://127.0.0.1:1/acct")
    assert backend.local_path("a") is None
    assert backend.capabilities.copy_across
    assert backend.capabilities.if_match
    assert not backend.is_digest(ObjectInfo("a", 1))
    with pytest.raises((InvalidInput, UnsupportedOperation)):
        backend.sign("a", "PATCH", 1)
