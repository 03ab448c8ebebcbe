"""What the s3fs driver makes of a server that refuses, lies, stalls or hangs up.

No real server does all of that when asked to, so these are small servers of our own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from storage.backends.base import ByteRange, OpenOptions, bytes_payload
from storage.backends.s3.answers import _CODES, _NAMES, classify_s3, from_code
from storage.backends.s3.fsspec import S3FsspecBackend
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)
from tests.servers.process import HOST

Answer = Callable[[BaseHTTPRequestHandler], None]
MIB = 1024 * 1024
# Seconds without a byte, where a test waits for that.
HASTE = 0.4


@contextmanager
def serving(
    answer: Answer, scheme: str = "http", patience: float = 10.0
) -> Iterator[tuple[S3FsspecBackend, list[str]]]:
    """Run a server that gives ``answer``; yield a backend for it and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.close_connection = True
            answer(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        with closing(backend_at(server.server_address[1], scheme, patience)) as backend:
            yield backend, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def backend_at(port: int, scheme: str = "http", patience: float = HASTE) -> S3FsspecBackend:
    endpoint = f"{scheme}://{HOST}:{port}"
    arguments = {"key": "AKIDEXAMPLE", "secret": "SECRETEXAMPLE", "endpoint_url": endpoint}
    options = OpenOptions(stall_timeout=patience, connect_timeout=5)
    return S3FsspecBackend("bucket", arguments, options)


def reply(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    announce: int | None = None,
) -> None:
    handler.send_response(status)
    handler.send_header("Connection", "close")
    handler.send_header("Content-Length", str(len(body) if announce is None else announce))
    if status < 300:
        handler.send_header("ETag", '"of-the-object"')
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def problem(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>in words</Message></Error>".encode()


def take(handler: BaseHTTPRequestHandler) -> bytes:
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


CALLS: dict[str, Callable[[S3FsspecBackend], object]] = {
    "stat": lambda backend: backend.stat("a"),
    "list": lambda backend: list(backend.list()),
    "read": lambda backend: backend.read("a"),
    "write": lambda backend: backend.write("a", bytes_payload(b"1")),
    "delete": lambda backend: backend.delete(["a"]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "", AuthenticationError),
        (403, "AccessDenied", AuthenticationError),
        (404, "NoSuchKey", ModelMissingError),
        (408, "", TransientError),
        (409, "OperationAborted", TransientError),
        (429, "", TransientError),
        (500, "InternalError", TransientError),
        (501, "NotImplemented", UnsupportedOperation),
        (503, "SlowDown", TransientError),
        (507, "", InsufficientSpaceError),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_refusal_is_told_apart_after_one_attempt(
    call: Callable[[S3FsspecBackend], object], status: int, code: str, expected: type[StorageError]
) -> None:
    def refuse(handler: BaseHTTPRequestHandler) -> None:
        take(handler)
        reply(handler, status, problem(code) if code else b"", {"Retry-After": "7"})

    with serving(refuse) as (backend, asked):
        # A write misses no object but the one that it was to replace.
        if (status, "write") == (404, next(name for name in CALLS if CALLS[name] is call)):
            expected = ObjectChangedError
        with pytest.raises(expected) as caught:
            call(backend)
    assert len(asked) == 1
    assert type(caught.value) is expected
    if isinstance(caught.value, TransientError):
        assert caught.value.retry_after == 7


def test_head_without_a_reason_is_asked_for_it() -> None:
    def expired(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 400, problem("ExpiredToken"))

    words = "ExpiredToken: in words"
    with serving(expired) as (backend, asked), pytest.raises(AuthenticationError, match=words):
        backend.stat("a")
    # In between botocore asks in which region the bucket is.
    assert asked == ["HEAD /bucket/a", "HEAD /bucket", "GET /bucket/a"]


def test_body_cut_short_is_transient() -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, b"x" * 1000, announce=5000)

    with serving(cut) as (backend, _), backend.read("a") as body, pytest.raises(TransientError):
        list(body)


def test_body_that_stalls_is_transient() -> None:
    done = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, b"x" * 1000, announce=5000)
        done.wait(600)

    with serving(stall, patience=HASTE) as (backend, asked):
        try:
            # On a machine that stands still the answer itself is late, which is a stall as well.
            with pytest.raises(TransientError), backend.read("a") as body:
                list(body)
        finally:
            done.set()
    assert len(asked) <= 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_silence_is_transient(call: Callable[[S3FsspecBackend], object]) -> None:
    with socket.create_server((HOST, 0)) as deaf:
        backend = backend_at(deaf.getsockname()[1])
        with pytest.raises(TransientError):
            call(backend)
        backend.close()


@pytest.mark.parametrize("size", [8 * MIB, 40 * MIB], ids=["one-request", "parts"])
def test_server_that_stops_to_take_the_body_is_noticed(size: int) -> None:
    done = threading.Event()
    aborted = threading.Event()

    def stop_taking(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "POST":
            reply(handler, 200, b"<R><UploadId>one</UploadId></R>")
        elif handler.command == "DELETE":
            aborted.set()
            reply(handler, 204)
        elif handler.command == "GET":
            reply(handler, 404, problem("NoSuchUpload"))
        else:
            handler.rfile.read(1000)
            done.wait(30)

    with serving(stop_taking, patience=60) as (backend, _):
        # Its client has patience from now on, so that only the body meets a time limit.
        backend._shared()
        backend._options = replace(backend._options, stall_timeout=HASTE)
        with pytest.raises(TransientError, match="and then none"):
            backend.write("a", bytes_payload(bytes(size)))
        assert aborted.is_set() == (size > 16 * MIB)
        done.set()


def test_store_that_ignores_ranges_is_noticed() -> None:
    def whole(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200, b"12345")

    with serving(whole) as (backend, _):
        with backend.read("a", ByteRange(0, 5)) as body:
            assert b"".join(bytes(piece) for piece in body) == b"12345"
        with pytest.raises(UnsupportedOperation, match="ranges"):
            backend.read("a", ByteRange(1, 3))


def test_answer_with_another_range_is_transient() -> None:
    def other(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 206, b"45", {"Content-Range": "bytes 3-4/5"})

    with serving(other) as (backend, _), pytest.raises(TransientError, match="3-4 sent"):
        backend.read("a", ByteRange(1, 3))


def test_error_in_the_body_of_a_good_answer_is_an_error() -> None:
    def late(handler: BaseHTTPRequestHandler) -> None:
        take(handler)
        if handler.command == "POST" and "uploadId" in handler.path:
            reply(handler, 200, problem("InternalError"))
        elif handler.command == "POST":
            reply(handler, 200, b"<R><UploadId>one</UploadId></R>")
        elif handler.command == "GET":
            reply(handler, 404, problem("NoSuchUpload"))
        else:
            reply(handler, 200, headers={"ETag": '"x"'})

    with serving(late) as (backend, asked), pytest.raises(TransientError):
        backend.write("a", bytes_payload(bytes(17 * MIB)))
    assert asked[-2].startswith("DELETE /bucket/a?uploadId=one")
    # Whether that was all of it.
    assert asked[-1].startswith("GET /bucket/a?uploadId=one")


def test_listing_that_cannot_go_on_is_an_error() -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        entry = "<Contents><Key>a</Key><Size>1</Size></Contents>"
        page = f"<ListBucketResult><IsTruncated>true</IsTruncated>{entry}</ListBucketResult>"
        reply(handler, 200, page.encode())

    with serving(cut) as (backend, asked), pytest.raises(StorageError, match="listing is cut"):
        list(backend.list())
    assert len(asked) == 1


def test_keys_that_were_not_deleted_are_told() -> None:
    def partly(handler: BaseHTTPRequestHandler) -> None:
        take(handler)
        entry = "<Key>b</Key><Code>AccessDenied</Code><Message>no</Message>"
        reply(handler, 200, f"<DeleteResult><Error>{entry}</Error></DeleteResult>".encode())

    key = "s3://bucket/b"
    with serving(partly) as (backend, _), pytest.raises(AuthenticationError, match=key):
        backend.delete(["a", "b"])


def test_certificate_that_nobody_vouches_for_is_a_matter_of_settings() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 200)

    with serving(answer, "https") as (backend, _), pytest.raises(ConfigurationError):
        backend.stat("a")


# --- the tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("NoSuchBucket", 404, BucketMissingError),
        ("NoSuchVersion", 404, ModelMissingError),
        ("InvalidAccessKeyId", 403, AuthenticationError),
        ("SignatureDoesNotMatch", 403, AuthenticationError),
        ("ExpiredToken", 400, AuthenticationError),
        ("RequestTimeTooSkewed", 403, AuthenticationError),
        ("RequestTimeout", 400, TransientError),
        ("ConditionalRequestConflict", 409, TransientError),
        ("PreconditionFailed", 412, ObjectChangedError),
        ("InvalidRange", 416, ObjectChangedError),
        ("PermanentRedirect", 301, ConfigurationError),
        ("AuthorizationHeaderMalformed", 400, ConfigurationError),
        ("KeyTooLongError", 400, InvalidInput),
        ("InvalidObjectState", 403, StorageError),
        ("InvalidRequest", 400, StorageError),
        ("SomethingNew", 403, AuthenticationError),
        ("SomethingNew", 502, TransientError),
        ("SomethingNew", 400, StorageError),
        ("", 404, ModelMissingError),
    ],
)
def test_code_and_status_lead_to_an_error(
    code: str, status: int, expected: type[StorageError]
) -> None:
    error = from_code("s3://b/k", code, status, "in words")
    assert type(error) is expected
    assert "s3://b/k" in str(error)


@pytest.mark.parametrize("code", sorted(_CODES))
def test_every_known_code_makes_its_error(code: str) -> None:
    assert type(from_code("s3://b/k", code, 400, "in words")) is _CODES[code]


def test_message_holds_one_line_and_no_secret() -> None:
    message = "see\nhttps://user:pw@host/x?X-Amz-Signature=abc for more"
    text = str(from_code("s3://b/k", "InvalidRequest", 400, message))
    assert len(text.splitlines()) == 1
    assert "pw" not in text
    assert "abc" not in text


def botocore_class(name: str) -> Any:
    from botocore import exceptions, parsers

    return getattr(exceptions, name, None) or getattr(parsers, name)


_KNOWN = [name.partition(".")[2] for name in _NAMES if name.startswith("botocore.")]


@pytest.mark.parametrize("name", _KNOWN)
def test_every_name_in_the_table_exists(name: str) -> None:
    assert issubclass(botocore_class(name), Exception)


def test_every_exception_of_botocore_that_concerns_credentials_is_known() -> None:
    from botocore import exceptions

    known = tuple(botocore_class(name) for name in _KNOWN)
    concerned = [
        cls
        for name, cls in vars(exceptions).items()
        if isinstance(cls, type) and any(word in name for word in ("Credential", "Token", "SSO"))
    ]
    assert concerned
    assert [cls for cls in concerned if not issubclass(cls, known)] == []


def test_cause_is_found_behind_what_wraps_it() -> None:
    from botocore.exceptions import ConnectTimeoutError

    wrapper = OSError(22, "anything")
    wrapper.__cause__ = ConnectTimeoutError(endpoint_url="http://h/?secret=1")
    error = classify_s3(wrapper, "s3://b/k")
    assert type(error) is UnreachableError
    assert "secret" not in str(error)
