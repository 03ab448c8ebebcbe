"""Copies and uploads when something goes wrong midway: an answer is lost, a source changes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import GCSConfig, StorageOperations
from storage.backends.base import Backend, Body, ObjectInfo, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    TransientError,
)
from storage.transfer.copy import Source, stream_copy
from storage.transfer.engine import Budget
from storage.transfer.plan import Patterns
from storage.transfer.progress import Meter
from storage.transfer.upload import scan, upload
from tests.servers.odd_http import OddHTTP, Reply, Request
from tests.transfer.support import FAST, MIB, Wrapped, memory_bucket, options


@pytest.fixture
def bucket() -> Iterator[MemoryBackend]:
    with memory_bucket() as backend:
        yield backend


def content(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(chunk) for chunk in body)


def send(backend: Any, path: Path, *, if_absent: bool = False, meter: Meter | None = None) -> None:
    _, files = scan(str(path), Patterns(None, None))
    upload(
        backend,
        files,
        lambda file: file.path,
        options=options(),
        budget=Budget(2),
        meter=meter or Meter("upload", "memory://b/", None, 1, None),
        if_absent=if_absent,
    )


class Losing(Wrapped):
    """Does what it is asked for; its first answers are lost, and ``then`` happens."""

    def __init__(self, inner: Backend, lost: int, then: Callable[[], object]) -> None:
        super().__init__(inner)
        self.lost = lost
        self.then = then

    def write(self, key: str, *args: Any, **kwargs: Any) -> ObjectInfo:
        info: ObjectInfo = self.inner.write(key, *args, **kwargs)
        if self.lost:
            self.lost -= 1
            self.then()
            raise TransientError("the answer is lost")
        return info


# --- uploads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 9 * MIB])
def test_a_lost_answer_does_not_make_an_upload_its_own_rival(
    bucket: MemoryBackend, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "a"
    file.write_bytes(data := os.urandom(size))
    events: list[Any] = []
    meter = Meter("upload", "memory://b/", size, 1, events.append)
    send(Losing(bucket, 1, lambda: None), file, if_absent=True, meter=meter)
    meter.finish()
    assert content(bucket, "a") == data
    assert (events[-1].bytes_done, events[-1].objects_done) == (size, 1)


def test_what_somebody_else_made_meanwhile_is_a_rival(
    bucket: MemoryBackend, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    other = Losing(bucket, 1, lambda: bucket.write("a", bytes_payload(b"67890")))
    with pytest.raises(ObjectExistsError):
        send(other, tmp_path / "a", if_absent=True)
    assert content(bucket, "a") == b"67890"


def test_what_was_there_before_is_a_rival_even_if_it_is_the_same(
    bucket: MemoryBackend, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    send(bucket, tmp_path / "a")
    with pytest.raises(ObjectExistsError):
        send(bucket, tmp_path / "a", if_absent=True)


@pytest.mark.parametrize("size", [5, 9 * MIB])
def test_a_file_that_changes_before_its_end_replaces_nothing(
    bucket: MemoryBackend, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * size)
    bucket.write("a", bytes_payload(b"what was there"))

    class Changing(Wrapped):
        def write(self, key: str, *args: Any, **kwargs: Any) -> ObjectInfo:
            # After it was hashed; of the same size.
            file.write_bytes(b"y" * size)
            os.utime(file, ns=(1, 1))
            info: ObjectInfo = self.inner.write(key, *args, **kwargs)
            return info

    with pytest.raises(IntegrityError, match="nothing was stored"):
        send(Changing(bucket), file)
    assert content(bucket, "a") == b"what was there"


# --- copies --------------------------------------------------------------------------------------


def copied(origin: Any, target: MemoryBackend, *, pinned: bool = False) -> bytes:
    [info] = origin.list()
    meter = Meter("copy", "memory://b/a", None, 1, None)
    source = Source(origin, info, where="memory://b/a", retry=FAST, pinned=pinned)
    stream_copy(source, target, "copy", options=options(), meter=meter)
    return content(target, "copy")


class Strict(Wrapped):
    """Refuses to look at a version by its name."""

    def __init__(self, inner: Backend, problem: Exception) -> None:
        super().__init__(inner)
        self._problem = problem

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self.inner.list(prefix):
            yield ObjectInfo(info.key, info.size, version="of-the-listing")

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        if version is not None:
            raise self._problem
        return self.inner.stat(key)


@pytest.mark.parametrize("problem", [AuthenticationError("no"), ModelMissingError("a", "gone")])
def test_a_listed_version_that_cannot_be_named_is_no_obstacle(
    bucket: MemoryBackend, problem: Exception
) -> None:
    bucket.write("a", bytes_payload(b"12345"))
    with memory_bucket() as target:
        assert copied(Strict(bucket, problem), target) == b"12345"
        with pytest.raises(type(problem)):
            copied(Strict(bucket, problem), target, pinned=True)


class Replacing:
    """GCS in a bucket without versions, with an object that is replaced just before some reads."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.generation = 1

    def __call__(self, request: Request) -> Reply:
        asked = request.target.partition("?generation=")[2] or str(self.generation)
        if request.path == "/bucket/a" and self.times:
            self.times -= 1
            self.generation += 1
        if asked != str(self.generation):
            return Reply(404, b'{"error": {"code": 404, "message": "No such object"}}')
        if request.path == "/bucket/a":
            headers = {"ETag": f'"{asked}"', "x-goog-generation": asked}
            span = request.span
            assert span is not None
            headers["Content-Range"] = f"bytes {span[0]}-{span[1]}/{len(self.data)}"
            return Reply(206, self.data, headers)
        info = {"name": "a", "size": str(len(self.data)), "generation": asked}
        return Reply(body=json.dumps(info).encode())

    @property
    def data(self) -> bytes:
        return b"x" * self.generation * 10


@pytest.mark.parametrize("times", [1, 3])
def test_a_source_that_is_replaced_is_copied_from_its_beginning(tmp_path: Path, times: int) -> None:
    store = Replacing(times)
    with OddHTTP(store) as server:
        config = GCSConfig(token="any", endpoint_url=server.url, driver="fsspec")
        StorageOperations.copy_object("gs://bucket/a", tmp_path / "a", config=config)
    assert (tmp_path / "a").read_bytes() == b"x" * 10 * (times + 1)


@pytest.mark.parametrize(
    ("uri", "times"), [("gs://bucket/a", 4), ("gs://bucket/a?generation=1", 1)]
)
def test_a_source_that_is_replaced_again_and_again_is_not_copied(
    tmp_path: Path, uri: str, times: int
) -> None:
    with OddHTTP(Replacing(times)) as server:
        config = GCSConfig(token="any", endpoint_url=server.url, driver="fsspec")
        with pytest.raises(ObjectChangedError):
            StorageOperations.copy_object(uri, tmp_path / "a", config=config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "broken"])
def test_a_copy_of_what_has_no_name_is_of_one_body(bucket: MemoryBackend, cut: bool) -> None:
    bucket.write("a", bytes_payload(b"1" * MIB))

    class Nameless(Wrapped):
        """Tells nothing but the size; its first body does not come whole, and is replaced."""

        reads = 0

        def _bare(self, info: ObjectInfo) -> ObjectInfo:
            return replace(info, etag=None, version=None, hint=None, ranged=False, metadata={})

        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            yield from map(self._bare, self.inner.list(prefix))

        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            return self._bare(self.inner.stat(key))

        def read(self, key: str, span: object = None, pin: object = None) -> Body:
            assert span is None
            self.reads += 1
            body = self.inner.read(key)
            return Body(self._bare(body.info), self._half() if self.reads == 1 else iter(body))

        def _half(self) -> Iterator[bytes]:
            yield b"1" * (MIB // 2)
            bucket.write("a", bytes_payload(b"2" * MIB))
            if not cut:
                raise TransientError("reset")

    origin = Nameless(bucket)
    with memory_bucket() as target:
        assert copied(origin, target) == b"2" * MIB
    assert origin.reads == 2
