"""What is done although it is reported as failed is recognised, and not done or refused again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import (
    Backend,
    BatchItem,
    Capabilities,
    ObjectInfo,
    Payload,
    bytes_payload,
    md5_hint,
)
from storage.backends.memory import MemoryBackend
from storage.digest import Digest, new_hasher
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectExistsError,
    TransferError,
    TransientError,
    UnreachableError,
)
from storage.transfer.progress import Meter
from storage.transfer.sending import send_item, send_items
from storage.transfer.writer import open_writer
from tests.transfer.support import FAST, MIB, Wrapped, memory_bucket


@pytest.fixture
def bucket() -> Iterator[MemoryBackend]:
    with memory_bucket({"other": b""}) as backend:
        yield backend


class Losing(Wrapped):
    """Does what it is asked for; its first answers are lost, and ``then`` happens."""

    def __init__(
        self, inner: Backend, lost: int = 1, then: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(inner)
        self.lost = lost
        self.then = then
        self.writes = self.reads = 0

    def write(self, key: str, *args: Any, **kwargs: Any) -> ObjectInfo:
        self.writes += 1
        info: ObjectInfo = self.inner.write(key, *args, **kwargs)
        self._lose()
        return info

    def write_many(self, items: list[BatchItem], **options: Any) -> list[ObjectInfo]:
        self.writes += 1
        infos = []
        if options.get("if_absent"):
            for item in items:
                if any(info.key == item.key for info in self.inner.list()):
                    raise ObjectExistsError(f"{item.key} exists")
        for item in items:
            info = self.inner.write(item.key, item.payload, metadata=item.metadata)
            options["on_bytes"](item.payload.size)
            infos.append(info)
        self._lose()
        return infos

    def read(self, *args: Any, **kwargs: Any) -> Any:
        self.reads += 1
        return self.inner.read(*args, **kwargs)

    def _lose(self) -> None:
        if self.lost:
            self.lost -= 1
            self.then()
            raise TransientError("the answer is lost")


class Forgetful(Losing):
    """Keeps no metadata, and tells of its objects what ``tells`` leaves."""

    def __init__(
        self,
        inner: Backend,
        tells: Callable[[bytes, ObjectInfo], ObjectInfo] = lambda _, info: info,
        **options: Any,
    ) -> None:
        super().__init__(inner, **options)
        self._tells = tells

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, metadata=False)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        info = replace(self.inner.stat(key, version), metadata={}, digests=(), hint=None)
        return self._tells(content(self.inner, key), info)


def content(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(chunk) for chunk in body)


def digest(algorithm: str, data: bytes) -> Digest:
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return Digest(algorithm, hasher.hexdigest())


def item_of(data: bytes, key: str = "a", *, described: bool = True) -> BatchItem:
    metadata = {name: digest(name, data).hex for name in ("blake3", "sha256")}
    return BatchItem(key, bytes_payload(data), metadata if described else {})


def send(backend: Any, data: bytes, *, if_absent: bool = True, described: bool = True) -> Meter:
    meter = Meter("upload", "memory://b/a", len(data), 1, None)
    item = item_of(data, described=described)
    info = send_item(backend, item, FAST, meter, if_absent=if_absent)
    assert info.size == len(data)
    assert content(backend.inner, "a") == data
    assert meter.moved() == len(data)
    return meter


# -- stores that keep metadata -------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 5, 9 * MIB])
def test_an_object_that_must_be_new_is_recognised(bucket: MemoryBackend, size: int) -> None:
    store = Losing(bucket)
    assert send(store, os.urandom(size)).present == 0
    assert store.reads == 0


def test_a_large_object_is_not_sent_twice(bucket: MemoryBackend) -> None:
    store = Losing(bucket)
    send(store, os.urandom(9 * MIB), if_absent=False)
    assert store.writes == 1
    # It costs a request to look, as much as a small object itself.
    small = Losing(bucket)
    send(small, b"12345", if_absent=False)
    assert small.writes == 2


def test_a_large_object_that_did_not_arrive_is_sent_again(bucket: MemoryBackend) -> None:
    class Refusing(Losing):
        def write(self, key: str, *args: Any, **kwargs: Any) -> ObjectInfo:
            self._lose()
            return super().write(key, *args, **kwargs)

    bucket.write("a", bytes_payload(b"x" * 9 * MIB))
    store = Refusing(bucket)
    send(store, os.urandom(9 * MIB), if_absent=False)
    assert store.writes == 1


@pytest.mark.parametrize("data", [b"67890", b"123456"])
def test_what_somebody_else_made_meanwhile_is_a_rival(bucket: MemoryBackend, data: bytes) -> None:
    store = Losing(bucket, then=lambda: bucket.write("a", bytes_payload(data)))
    with pytest.raises(ObjectExistsError):
        send(store, b"12345")
    assert content(bucket, "a") == data


def test_what_was_removed_meanwhile_is_written_again(bucket: MemoryBackend) -> None:
    store = Losing(bucket, then=lambda: bucket.delete(["a"]))
    send(store, b"12345")
    assert store.writes == 2


@pytest.mark.parametrize("error", [None, UnreachableError("refused")])
def test_what_was_there_before_is_a_rival_even_if_it_is_the_same(
    bucket: MemoryBackend, error: Exception | None
) -> None:
    class Unreachable(Losing):
        problem = error

        def write(self, key: str, *args: Any, **kwargs: Any) -> ObjectInfo:
            if self.problem is not None:
                # Nothing was sent, so nothing can have been done.
                problem, self.problem = self.problem, None
                raise problem
            return super().write(key, *args, **kwargs)

    send(Losing(bucket, 0), b"12345")
    with pytest.raises(ObjectExistsError):
        send(Unreachable(bucket, 0), b"12345")


def test_metadata_of_somebody_else_proves_nothing(bucket: MemoryBackend) -> None:
    bytes_of_others = bytes_payload(b"67890")
    store = Losing(bucket, then=lambda: bucket.write("a", bytes_of_others, metadata={"by": "me"}))
    meter = Meter("copy", "memory://b/a", 5, 1, None)
    item = BatchItem("a", bytes_payload(b"12345"), {"by": "me"})
    with pytest.raises(ObjectExistsError):
        send_item(store, item, FAST, meter, if_absent=True)
    # Nor does it for a large one, which would be written again.
    large = BatchItem("b", bytes_payload(os.urandom(9 * MIB)), {"by": "me"})
    store = Losing(bucket)
    send_item(store, large, FAST, meter)
    assert store.writes == 2


class Damaging(Losing):
    """Damages what it stores, metadata excepted, and loses its first answer."""

    damage = 1

    def write(self, key: str, payload: Payload, **kwargs: Any) -> ObjectInfo:
        if not self.damage:
            return super().write(key, payload, **kwargs)
        self.damage -= 1
        with payload.open() as stream:
            data = bytearray(stream.read())
        data[0] ^= 1
        return super().write(key, bytes_payload(bytes(data)), **kwargs)


class Telling(Damaging):
    """Tells the CRC of an object only if it is asked for it."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, checksums=True)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return replace(self.inner.stat(key, version), hint=None)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        return (digest("crc32c", content(self.inner, info.key)),)


@pytest.mark.parametrize("kind", [Damaging, Telling])
@pytest.mark.parametrize("size", [5, 9 * MIB])
def test_a_damaged_object_is_not_its_own(
    bucket: MemoryBackend, kind: type[Damaging], size: int
) -> None:
    with pytest.raises(IntegrityError, match="damaged in the store"):
        send(kind(bucket), os.urandom(size))


@pytest.mark.parametrize("kind", [Damaging, Telling])
def test_a_damaged_large_object_is_written_again(
    bucket: MemoryBackend, kind: type[Damaging]
) -> None:
    store = kind(bucket)
    send(store, os.urandom(9 * MIB), if_absent=False)
    assert store.writes == 2


def test_by_the_checksum_that_the_store_keeps_an_object_is_recognised(
    bucket: MemoryBackend,
) -> None:
    store = Telling(bucket)
    store.damage = 0
    send(store, b"12345")
    assert (store.writes, store.reads) == (2, 0)


class WriteOnly(Losing):
    """Lets nobody look."""

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        raise AuthenticationError("may not be read")


def test_who_may_not_look_writes_again(bucket: MemoryBackend) -> None:
    store = WriteOnly(bucket)
    send(store, os.urandom(9 * MIB), if_absent=False)
    assert store.writes == 2
    bucket.delete(["a"])
    with pytest.raises(ObjectExistsError):
        send(WriteOnly(bucket), b"12345")


def test_answers_that_are_lost_again_and_again_end(bucket: MemoryBackend) -> None:
    class Mute(Losing):
        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            raise TransientError("this answer is lost, too")

    store = Mute(bucket, 99)
    with pytest.raises(TransferError, match="tried 4 times"):
        send(store, b"12345")
    assert store.writes == 4


# -- stores that do not --------------------------------------------------------------------


def with_sha256(data: bytes, info: ObjectInfo) -> ObjectInfo:
    return replace(info, digests=(digest("sha256", data), Digest("crc32c", "00000000")))


def with_md5(data: bytes, info: ObjectInfo) -> ObjectInfo:
    return replace(info, hint=digest("md5", data))


def with_other_etag(data: bytes, info: ObjectInfo) -> ObjectInfo:
    return replace(info, hint=md5_hint('"' + "0" * 32 + '"'))


def without_size(data: bytes, info: ObjectInfo) -> ObjectInfo:
    return replace(info, size=None, etag=None, version=None)


def with_checksum_only(data: bytes, info: ObjectInfo) -> ObjectInfo:
    return replace(info, digests=(Digest("crc32c", "00000000"),))


TELLS = {
    "sha256": (with_sha256, 0),
    "md5": (with_md5, 0),
    "an ETag of another kind": (with_other_etag, 1),
    "nothing, not even the size": (without_size, 1),
    "a checksum": (with_checksum_only, 1),
    "its size": (lambda data, info: info, 1),
}


@pytest.mark.parametrize("tells", TELLS)
@pytest.mark.parametrize("data", [b"", b"12345"])
def test_without_metadata_the_content_itself_is_recognised(
    bucket: MemoryBackend, tells: str, data: bytes
) -> None:
    tell, reads = TELLS[tells]
    store = Forgetful(bucket, tell)
    meter = Meter("upload", "memory://b/a", len(data), 1, None)
    send_item(store, item_of(data, described=False), FAST, meter, if_absent=True)
    assert content(bucket, "a") == data
    assert meter.moved() == len(data)
    assert store.reads == reads


@pytest.mark.parametrize("tells", TELLS)
def test_without_metadata_another_content_is_a_rival(bucket: MemoryBackend, tells: str) -> None:
    tell, _ = TELLS[tells]
    rival = bytes_payload(b"67890")
    store = Forgetful(bucket, tell, then=lambda: bucket.write("a", rival))
    meter = Meter("upload", "memory://b/a", 5, 1, None)
    with pytest.raises(ObjectExistsError):
        send_item(store, item_of(b"12345", described=False), FAST, meter, if_absent=True)
    assert content(bucket, "a") == b"67890"


@pytest.mark.parametrize("rival", [b"1234", b"123456"])
def test_without_a_size_the_beginning_is_not_the_whole(bucket: MemoryBackend, rival: bytes) -> None:
    store = Forgetful(bucket, without_size, then=lambda: bucket.write("a", bytes_payload(rival)))
    meter = Meter("upload", "memory://b/a", 5, 1, None)
    with pytest.raises(ObjectExistsError):
        send_item(store, item_of(b"12345", described=False), FAST, meter, if_absent=True)


def test_what_is_recognised_has_a_size(bucket: MemoryBackend) -> None:
    store = Forgetful(bucket, without_size)
    meter = Meter("upload", "memory://b/a", 5, 1, None)
    info = send_item(store, item_of(b"12345", described=False), FAST, meter, if_absent=True)
    assert info.size == 5


# -- what need not move --------------------------------------------------------------------


class Having(Losing):
    """Has all but the last byte of everything already, and is told of that alone."""

    def write(self, key: str, payload: Payload, **kwargs: Any) -> ObjectInfo:
        count = kwargs.pop("on_bytes")
        info = super().write(key, payload, **kwargs)
        count(1)
        return info

    def write_many(self, items: list[BatchItem], **options: Any) -> list[ObjectInfo]:
        count = options["on_bytes"]
        infos = super().write_many(items, **{**options, "on_bytes": lambda _: None})
        count(len(items))
        return infos


def test_bytes_that_did_not_move_are_done_and_were_present(bucket: MemoryBackend) -> None:
    assert send(Having(bucket), b"12345", if_absent=False).present == 4
    meter = Meter("upload", "memory://b/", 8, 2, None)
    several = [item_of(b"12345", "b"), item_of(b"123", "c")]
    send_items(Having(bucket), several, FAST, meter)  # type: ignore[arg-type]
    assert (meter.moved(), meter.present) == (8, 6)


# -- files that are opened for writing, and many objects at once ---------------------------


@pytest.mark.parametrize("kind", [Losing, Forgetful])
def test_a_file_that_must_be_new_is_recognised(
    bucket: MemoryBackend, kind: type[Losing], tmp_path: Path
) -> None:
    with open_writer(kind(bucket), "a", FAST, "memory://b/a", if_absent=True) as file:  # type: ignore[arg-type]
        file.write(b"12345")
    assert content(bucket, "a") == b"12345"
    file = open_writer(kind(bucket, lost=0), "a", FAST, "memory://b/a", if_absent=True)  # type: ignore[arg-type]
    file.write(b"12345")
    with pytest.raises(ObjectExistsError):
        file.close()


@pytest.mark.parametrize("kind", [Losing, Forgetful])
def test_many_objects_that_must_be_new_are_recognised(
    bucket: MemoryBackend, kind: type[Losing]
) -> None:
    store: Any = kind(bucket)
    items = [item_of(b"12345", "a"), item_of(b"", "b")]
    meter = Meter("upload", "memory://b/", 5, 2, None)
    infos = send_items(store, items, FAST, meter, if_absent=True)
    assert [(info.key, info.size) for info in infos] == [("a", 5), ("b", 0)]
    assert (store.writes, meter.moved()) == (2, 5)


def test_of_many_objects_one_of_somebody_else_makes_all_rivals(bucket: MemoryBackend) -> None:
    rival = bytes_payload(b"67890")
    store: Any = Losing(bucket, then=lambda: bucket.write("b", rival))
    items = [item_of(b"12345", "a"), item_of(b"12345", "b")]
    with pytest.raises(ObjectExistsError):
        send_items(store, items, FAST, Meter("upload", "", 10, 2, None), if_absent=True)
