"""The in-process backend, which is the reference for the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, Capabilities, ObjectInfo, OpenOptions, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.errors import BucketMissingError, ModelMissingError
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri


class MemoryRaw:
    """Looks into the dict that the backend keeps."""

    def __init__(self, bucket: str) -> None:
        self._backend = MemoryBackend(bucket)
        self._objects = MemoryBackend._buckets[bucket].objects

    def put(self, key: str, data: bytes) -> None:
        self._backend._put(key, data, ObjectInfo(key, len(data)))

    def get(self, key: str) -> bytes:
        return self._objects[key].data

    def keys(self) -> set[str]:
        return set(self._objects)


@pytest.fixture
def bucket() -> Iterator[str]:
    """A bucket that exists and is empty."""
    backend = MemoryBackend("bucket")
    backend.write("first", bytes_payload(b""))
    backend.delete(["first"])
    yield "bucket"
    MemoryBackend.clear()


class TestMemoryConformance(BackendConformance):
    exceptions: ClassVar = {
        "test_write_makes_no_bucket": "a bucket in memory appears with its first object",
    }

    @pytest.fixture
    def backend(self, bucket: str) -> MemoryBackend:
        return MemoryBackend(bucket)

    @pytest.fixture
    def raw(self, bucket: str) -> MemoryRaw:
        return MemoryRaw(bucket)

    @pytest.fixture
    def missing_bucket_backend(self) -> Iterator[Backend]:
        yield MemoryBackend("nowhere")
        MemoryBackend.clear("nowhere")


def test_capabilities_are_all_but_signing() -> None:
    assert MemoryBackend("b").capabilities == Capabilities(
        list=True,
        write=True,
        delete=True,
        copy=True,
        copy_across=True,
        ranged_read=True,
        pinned_read=True,
        if_absent=True,
        if_match=True,
        metadata=True,
        sign=False,
        any_key=True,
    )


def test_uri_leads_to_the_bucket(bucket: str) -> None:
    MemoryBackend(bucket).write("m/a", bytes_payload(b"1"))
    location = parse_uri(f"memory://{bucket}/m/a")
    assert open_backend(location, None, OpenOptions()).stat(location.key).size == 1


def test_two_backends_of_one_name_share_the_bucket(bucket: str) -> None:
    MemoryBackend(bucket).write("a", bytes_payload(b"1"))
    assert MemoryBackend(bucket).stat("a").size == 1


def test_bucket_stays_when_its_last_object_goes(bucket: str) -> None:
    assert list(MemoryBackend(bucket).list()) == []


def test_clear_forgets_one_bucket_or_all() -> None:
    for name in ("one", "two"):
        MemoryBackend(name).write("a", bytes_payload(b"1"))
    MemoryBackend.clear("one")
    with pytest.raises(BucketMissingError):
        MemoryBackend("one").stat("a")
    assert MemoryBackend("two").stat("a").size == 1
    MemoryBackend.clear()
    with pytest.raises(BucketMissingError):
        MemoryBackend("two").stat("a")


def test_writing_the_same_bytes_again_is_a_new_version(bucket: str) -> None:
    backend = MemoryBackend(bucket)
    first = backend.write("a", bytes_payload(b"1"))
    second = backend.write("a", bytes_payload(b"1"))
    assert first.etag == second.etag
    assert first.version != second.version
    with pytest.raises(ModelMissingError, match="only the last one is kept"):
        backend.stat("a", first.version)


def test_list_is_sorted(bucket: str) -> None:
    backend = MemoryBackend(bucket)
    for key in ("b", "a/z", "a", "a/b"):
        backend.write(key, bytes_payload(b"1"))
    assert [info.key for info in backend.list()] == ["a", "a/b", "a/z", "b"]
