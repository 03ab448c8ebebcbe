"""Refusals of S3 that pass by themselves or with other credentials, over both drivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import S3Config
from storage.errors import AuthenticationError, ObjectExistsError, StorageError, TransientError
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request, Script, SeededScript
from storage.uri import parse_uri
from tests.servers.seaweedfs import SeaweedFS


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@contextmanager
def behind(
    server: SeaweedFS, bucket: str, script: Script, **config: Any
) -> Iterator[tuple[Backend, FaultProxy]]:
    with FaultProxy(server.endpoint, script, store="s3") as proxy:
        found = S3Config(endpoint_url=proxy.endpoint, **config)
        uri = parse_uri(f"s3://{bucket}/")
        with closing(open_backend(uri, found, OpenOptions())) as backend:
            yield backend, proxy


def keys_of(server: SeaweedFS) -> dict[str, Any]:
    return {"access_key_id": server.access_key, "secret_access_key": server.secret_key}


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(chunk) for chunk in body)


CALLS: dict[str, Callable[[Backend, str], object]] = {
    "read": read,
    "write": lambda backend, key: backend.write(key, bytes_payload(b"weights")),
    "list": lambda backend, key: list(backend.list()),
    "delete": lambda backend, key: backend.delete([key]),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
@pytest.mark.parametrize("status", [429, 503])
def test_store_that_is_asked_too_often_says_so(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    call: Callable[[Backend, str], object],
    status: int,
) -> None:
    def busy(request: Request) -> Fault:
        return Fault("status", status=status, retry_after=7)

    config = {"driver": driver, **keys_of(seaweedfs)}
    with behind(seaweedfs, shared_bucket, busy, **config) as (backend, proxy):
        with pytest.raises(TransientError) as caught:
            call(backend, f"{prefix}/a")
        assert proxy.count() == 1
    assert caught.value.throttled
    # obstore shows no headers, and does not list.
    shown = driver == "fsspec" or call is CALLS["list"]
    assert caught.value.retry_after == (7 if shown else None)


def test_server_error_is_no_throttling(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Any
) -> None:
    def broken(request: Request) -> Fault:
        return Fault("status", status=500)

    config = {"driver": driver, **keys_of(seaweedfs)}
    with (
        behind(seaweedfs, shared_bucket, broken, **config) as (backend, _),
        pytest.raises(TransientError) as caught,
    ):
        read(backend, f"{prefix}/a")
    assert not caught.value.throttled


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (412, "PreconditionFailed", ObjectExistsError),
        # Two at once, and nobody has won yet.
        (409, "ConditionalRequestConflict", TransientError),
        (409, "OperationAborted", TransientError),
    ],
)
def test_creation_that_is_refused_tells_why(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    status: int,
    code: str,
    expected: type[StorageError],
) -> None:
    def refuse(request: Request) -> Fault:
        body = f"<Error><Code>{code}</Code><Message>in words</Message></Error>"
        return Fault("status", status=status, answer=body.encode())

    config = {"driver": driver, **keys_of(seaweedfs)}
    with behind(seaweedfs, shared_bucket, refuse, **config) as (backend, proxy):
        with pytest.raises(expected) as caught:
            backend.write(f"{prefix}/a", bytes_payload(b"weights"), if_absent=True)
        assert proxy.count() == 1
    assert type(caught.value) is expected


@calls
def test_expired_credentials_are_refused_after_one_request(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    call: Callable[[Backend, str], object],
) -> None:
    script = SeededScript(1, ["expire"], probability=1.0)
    config = {"driver": driver, **keys_of(seaweedfs)}
    with behind(seaweedfs, shared_bucket, script, **config) as (backend, proxy):
        with pytest.raises(AuthenticationError):
            call(backend, f"{prefix}/a")
        assert proxy.count() == 1


def test_credentials_that_were_replaced_meanwhile_are_found(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))

    def write(token: str) -> None:
        lines = [
            "[rotated]",
            f"aws_access_key_id = {seaweedfs.access_key}",
            f"aws_secret_access_key = {seaweedfs.secret_key}",
            *([f"aws_session_token = {token}"] if token else []),
        ]
        file.write_text("\n".join(lines))

    key = f"{prefix}/a"
    seaweedfs.put_raw(shared_bucket, key, b"weights")

    def script(request: Request) -> Fault | None:
        # SeaweedFS takes no token that it has not given itself, so the new ones have none.
        return Fault("expire") if "x-amz-security-token" in request.headers else None

    write("old")
    with behind(seaweedfs, shared_bucket, script, profile="rotated") as (backend, proxy):
        with pytest.raises(AuthenticationError):
            read(backend, key)
        write("")
        with pytest.raises(TransientError, match="expired"):
            read(backend, key)
        before = proxy.count()
        assert read(backend, key) == b"weights"
        assert proxy.count() == before + 1
