"""Uploads to S3 in parts that fail leave nothing behind, whatever went wrong."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, Payload, bytes_payload
from storage.config import S3Config
from storage.errors import AuthenticationError, StorageError, TransientError
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request, Script
from storage.uri import parse_uri
from tests.servers.s3 import S3Server
from tests.servers.seaweedfs import SeaweedFS

Driver = Literal["obstore", "fsspec"]
MIB = 1024 * 1024
CONTENT = bytes(range(256)) * (4096 * 12)  # 12 MiB
# Small enough for parts of 5 MiB by s3fs; those of obstore have 8.
OPTIONS = OpenOptions(connections=4, stall_timeout=60.0, memory=40 * MIB)
# Only where an answer does not come: a machine that stands still may look like that, too.
HASTY = replace(OPTIONS, stall_timeout=3.0)

drivers = pytest.mark.parametrize("driver", ["obstore", "fsspec"])


def backend_at(
    endpoint: str,
    server: S3Server,
    bucket: str,
    driver: Driver,
    options: OpenOptions = OPTIONS,
    **config: Any,
) -> Backend:
    keys = S3Config(
        server.access_key, server.secret_key, endpoint_url=endpoint, driver=driver, **config
    )
    return open_backend(parse_uri(f"s3://{bucket}/"), keys, options)


@contextmanager
def behind(
    server: S3Server,
    bucket: str,
    driver: Driver,
    script: Script,
    options: OpenOptions = OPTIONS,
    **config: Any,
) -> Iterator[tuple[Backend, FaultProxy]]:
    """Yield a backend that reaches the server through a proxy with this script."""
    with (
        FaultProxy(server.endpoint, script, store="s3") as proxy,
        closing(backend_at(proxy.endpoint, server, bucket, driver, options, **config)) as backend,
    ):
        yield backend, proxy


def step(request: Request) -> str:
    """What a request is within an upload in parts."""
    if "partNumber=" in request.target:
        return "part"
    if request.method == "POST":
        return "complete" if "uploadId=" in request.target else "create"
    if request.method == "DELETE" and "uploadId=" in request.target:
        return "abort"
    return "look" if request.method == "GET" else "other"


class Faulty:
    """Meets the first requests of each step with these faults."""

    def __init__(self, **faults: Fault | list[Fault]) -> None:
        self.left = {
            name: list(given) if isinstance(given, list) else [given]
            for name, given in faults.items()
        }

    @property
    def silent(self) -> bool:
        """Whether an answer does not come."""
        return any(one.kind == "stall_answer" for given in self.left.values() for one in given)

    def __call__(self, request: Request) -> Fault | None:
        waiting = self.left.get(step(request))
        return waiting.pop(0) if waiting else None


DOWN = Fault("status", status=500)
LOST = Fault("lost_answer")
FAULTS: dict[str, Callable[[], Faulty]] = {
    "part refused": lambda: Faulty(part=DOWN),
    "part cut": lambda: Faulty(part=Fault("reset_request")),
    "answer to a part lost": lambda: Faulty(part=LOST),
    "answer to a part not coming": lambda: Faulty(part=Fault("stall_answer")),
    "completion refused": lambda: Faulty(complete=DOWN),
    "completion an error": lambda: Faulty(complete=Fault("error_body")),
    "abort refused": lambda: Faulty(part=DOWN, abort=DOWN),
    "abort refused twice": lambda: Faulty(part=DOWN, abort=[DOWN, DOWN]),
    "abort an error that looks like a success": lambda: Faulty(
        part=DOWN, abort=Fault("error_body")
    ),
    "answer to the abort lost": lambda: Faulty(part=DOWN, abort=LOST),
    "abort not forwarded": lambda: Faulty(part=DOWN, abort=Fault("reset_request")),
    "answer to the creation lost": lambda: Faulty(create=LOST),
    "answer to the creation an error": lambda: Faulty(create=Fault("lost_answer", status=500)),
    "answer to the creation not coming": lambda: Faulty(create=Fault("stall_answer")),
    "answer to the creation cut": lambda: Faulty(create=Fault("truncate")),
    "creation lost, look refused": lambda: Faulty(create=LOST, look=DOWN),
    "creation lost, look an error that looks like a success": lambda: Faulty(
        create=LOST, look=Fault("error_body")
    ),
    "creation lost, abort lost": lambda: Faulty(create=LOST, abort=LOST),
}


@pytest.mark.slow
@drivers
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_failed_upload_leaves_no_parts(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Driver,
    faults: Callable[[], Faulty],
) -> None:
    script = faults()
    key = f"{prefix}/a"
    is_hasty = script.silent
    options = HASTY if is_hasty else OPTIONS
    with behind(seaweedfs, shared_bucket, driver, script, options) as (backend, proxy):
        try:
            backend.write(key, bytes_payload(CONTENT))
        except TransientError:
            assert seaweedfs.keys_raw(shared_bucket, prefix) == []
        else:
            # aiohttp sends a part again by itself if its connection had been in use before.
            assert set(script.left) == {"part"}
            assert driver == "fsspec"
        assert not any(script.left.values()), "not every fault was met"
        assert pending(seaweedfs, shared_bucket, key) == []
        # Nothing keeps silent any more but the machine.
        with closing(
            backend_at(proxy.endpoint, seaweedfs, shared_bucket, driver) if is_hasty else backend
        ) as patient:
            patient.write(key, bytes_payload(CONTENT))
    assert seaweedfs.get_raw(shared_bucket, key) == CONTENT


def pending(server: S3Server, bucket: str, key: str) -> list[str]:
    return [upload for found, upload in server.pending_uploads(bucket) if found == key]


class Interrupted(BytesIO):
    """A source that ends by an exception after 10 MiB."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(CONTENT)
        self._failure = failure

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 10 * MIB:
            raise self._failure
        return super().read(min(size or MIB, MIB))


@drivers
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError("gone")], ids=repr)
def test_interrupted_upload_leaves_no_parts(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Driver, failure: BaseException
) -> None:
    key = f"{prefix}/a"
    with (
        closing(backend_at(seaweedfs.endpoint, seaweedfs, shared_bucket, driver)) as backend,
        pytest.raises(type(failure)),
    ):
        backend.write(key, Payload(lambda: Interrupted(failure), len(CONTENT)))
    assert pending(seaweedfs, shared_bucket, key) == []


@drivers
def test_upload_that_is_refused_for_good_makes_one_request(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Driver
) -> None:
    def refuse(request: Request) -> Fault:
        return Fault("status", status=403)

    with behind(seaweedfs, shared_bucket, driver, refuse) as (backend, proxy):
        with pytest.raises(AuthenticationError):
            backend.write(f"{prefix}/a", bytes_payload(CONTENT))
        assert proxy.count() == 1


@drivers
def test_upload_of_another_writer_is_left_alone(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = f"{prefix}/a"
    begun: list[str] = []

    def script(request: Request) -> Fault | None:
        if step(request) != "create" or begun:
            return None
        # Another program sends the same key, in its own parts, at the same time.
        raw = seaweedfs.raw
        begun.append(raw.create_multipart_upload(Bucket=shared_bucket, Key=key)["UploadId"])
        part = {"Bucket": shared_bucket, "Key": key, "UploadId": begun[0], "PartNumber": 1}
        raw.upload_part(**part, Body=b"theirs" * MIB)
        return LOST

    with behind(seaweedfs, shared_bucket, driver, script) as (backend, _):
        with pytest.raises(TransientError), caplog.at_level(logging.WARNING):
            backend.write(key, bytes_payload(CONTENT))
        assert pending(seaweedfs, shared_bucket, key) == begun
    assert "another writer's" in caplog.text
    seaweedfs.raw.abort_multipart_upload(Bucket=shared_bucket, Key=key, UploadId=begun[0])


@drivers
def test_upload_of_another_thread_is_not_taken_for_a_leftover(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Driver
) -> None:
    key = f"{prefix}/a"
    first_failed, second_begun = threading.Event(), threading.Event()
    creations: list[int] = []

    def script(request: Request) -> Fault | None:
        if step(request) == "create":
            creations.append(request.number)
            return LOST if len(creations) == 2 else None
        return None

    class Slow(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 16 * MIB:
                second_begun.set()
                assert first_failed.wait(60)
            return super().read(size)

    with behind(seaweedfs, shared_bucket, driver, script) as (backend, _):
        failures: list[BaseException] = []

        def send() -> None:
            try:
                backend.write(key, Payload(lambda: Slow(CONTENT * 2), 2 * len(CONTENT)))
            except BaseException as exc:  # noqa: BLE001 -- shown below
                failures.append(exc)

        thread = threading.Thread(target=send)
        thread.start()
        assert second_begun.wait(60)
        with pytest.raises(TransientError):
            backend.write(key, bytes_payload(CONTENT))
        first_failed.set()
        thread.join(60)
    assert not failures
    assert seaweedfs.get_raw(shared_bucket, key) == CONTENT * 2
    assert pending(seaweedfs, shared_bucket, key) == []


@drivers
def test_parts_that_cannot_be_removed_are_told_of(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Driver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused = Fault("status", status=403)
    key = f"{prefix}/a"

    def script(request: Request) -> Fault | None:
        name = step(request)
        return {"part": DOWN, "abort": refused, "look": refused}.get(name)

    with (
        behind(seaweedfs, shared_bucket, driver, script) as (backend, _),
        pytest.raises(StorageError),
        caplog.at_level(logging.WARNING),
    ):
        backend.write(key, bytes_payload(CONTENT))
    assert "AbortIncompleteMultipartUpload" in caplog.text
    assert seaweedfs.secret_key not in caplog.text
    for upload in pending(seaweedfs, shared_bucket, key):
        seaweedfs.raw.abort_multipart_upload(Bucket=shared_bucket, Key=key, UploadId=upload)
