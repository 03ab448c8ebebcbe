"""Bytes on their way to and from a store, for drivers that make their requests themselves."""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, BinaryIO, Protocol, Self, TypeVar, cast

from storage.backends.base import ByteRange, ObjectInfo, Payload
from storage.digest import Digest, MultiHasher
from storage.errors import (
    IntegrityError,
    ObjectChangedError,
    TransientError,
    UnsupportedOperation,
)

__all__ = [
    "HashedPayload",
    "Parts",
    "Watched",
    "check_pin",
    "check_size",
    "exactly",
    "extent",
    "genuine",
    "part_sizes",
    "send_payload",
]

T = TypeVar("T")
P = TypeVar("P", bound="Parts")

_MIB = 1024 * 1024
_PART = 16 * _MIB

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Watched(io.BytesIO):
    """A request's body that notices when nobody takes it.

    The client has a time limit for answers, none for sending.
    """

    def __init__(self, data: bytes, stall_timeout: float) -> None:
        """Send ``data``; give up after ``stall_timeout`` seconds in which none of it moves."""
        super().__init__(data)
        self._size = len(data)
        self._limit = stall_timeout
        self._moved = time.monotonic()

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        self._moved = time.monotonic()
        return super().read(size)

    async def sent_by(
        self, request: Callable[[], Coroutine[Any, Any, T]], slots: asyncio.Semaphore
    ) -> T:
        """Make the request that this is the body of, when one of ``slots`` is free.

        Raises:
            TimeoutError: the store stopped to take the body.
        """
        async with slots:
            self._moved = time.monotonic()
            task = asyncio.ensure_future(request())
            try:
                while not task.done():
                    await asyncio.wait({task}, timeout=self._limit / 4)
                    idle = time.monotonic() - self._moved
                    # Of an empty body nothing is ever taken, and a client that asked for a "100
                    # Continue" before it waits for that without a limit.
                    taken = self.tell() == self._size > 0
                    if not task.done() and not taken and idle > self._limit:
                        raise TimeoutError(
                            f"the store took {self.tell()} of {self._size} bytes and then none "
                            f"for {self._limit:g} s"
                        )
                return task.result()
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.wait({task})


def genuine(info: ObjectInfo, where: str) -> ObjectInfo:
    """Return what an answer says about an object, if an object store said it.

    All of them tell an entity tag. An error's document that comes with the status of a success,
    from whatever stands on the way, does not.

    Raises:
        TransientError: the answer is none of an object store.
    """
    if info.etag is None and info.version is None:
        raise TransientError(
            f"{where}: the answer has no entity tag, as every object has one; it is not the "
            "store's; if that goes on, check the endpoint and the proxy"
        )
    return info


def check_pin(info: ObjectInfo, pin: ObjectInfo | None, where: str) -> None:
    """Raise ``ObjectChangedError`` if what answered a read is another version than ``pin``."""
    if pin is not None and pin.differs_from(info):
        raise ObjectChangedError(f"{where} was replaced since it was looked at")


def exactly(stream: Any, size: int) -> bytes:
    """Return ``size`` bytes of a stream, fewer at its end."""
    block: bytes = stream.read(size)
    if len(block) == size or not block:
        return block
    blocks = [block]
    missing = size - len(block)
    while missing and (block := stream.read(missing)):
        blocks.append(block)
        missing -= len(block)
    return b"".join(blocks)


def part_sizes(
    size: int | None, memory: int, *, smallest: int, most: int, double_after: int
) -> Iterator[int]:
    """Yield the sizes of an upload's parts; the last one may turn out smaller.

    Args:
        size: of the object; ``None`` if unknown, and then the parts grow, so that ``most`` of
            them are enough for anything.
        memory: bytes that one upload may hold.
        smallest: bytes that a part has at least.
        most: parts that the store takes.
        double_after: parts of one size, where the object's is unknown.
    """
    part = min(_PART, max(smallest, memory // 8))
    if size is not None:
        part = max(part, -(-size // most))
        while True:
            yield part
    number = 0
    while True:
        yield part << (number // double_after)
        number += 1


class HashedPayload:
    """A payload whose bytes are hashed while whoever sends it reads them, once and in order."""

    def __init__(self, payload: Payload, *algorithms: str) -> None:
        """Hash ``payload`` by ``algorithms``."""
        self.payload = Payload(self._open, payload.size)
        """To be sent in the place of the one that was given."""
        self._source = payload
        self._algorithms = algorithms
        self._hasher = MultiHasher(())

    @property
    def digests(self) -> dict[str, Digest]:
        """Of what was read since it was opened last; none if it never was."""
        return self._hasher.digests()

    def _open(self) -> BinaryIO:
        self._hasher = MultiHasher(self._algorithms)
        return cast("BinaryIO", _Hashed(self._source.open(), self._hasher))


class _Hashed:
    """A stream that hashes what is read from it."""

    def __init__(self, stream: BinaryIO, hasher: MultiHasher) -> None:
        self._stream = stream
        self._hasher = hasher

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self._hasher.update(block)
        return block

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Parts(Protocol):
    """An object on its way up in parts. Leaving its block by an exception ends it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, exc: Any, traceback: Any, /) -> None: ...

    def send(self, data: bytes) -> None:
        """Send the next part."""


def send_payload(
    payload: Payload,
    sizes: Iterator[int],
    where: str,
    *,
    whole: Callable[[bytes], T],
    begin: Callable[[], P],
    complete: Callable[[P], T],
    on_bytes: Callable[[int], object] | None,
) -> tuple[T, int]:
    """Send a payload in one request if it is no more than one part, else in parts.

    Args:
        payload: what to send.
        sizes: of the parts.
        where: the object's URI, for messages.
        whole: sends all of it at once.
        begin: begins an upload in parts, which counts its own bytes.
        complete: makes one object of the parts.
        on_bytes: called with the size of what is sent at once.

    Returns:
        The store's answer, and the size.

    Raises:
        IntegrityError: the payload is not of the size that it announces; nothing is stored.
    """
    with payload.open() as stream:
        part = exactly(stream, next(sizes))
        following = exactly(stream, next(sizes)) if part else b""
        if not following:
            check_size(where, payload.size, len(part))
            answer = whole(part)
            if on_bytes is not None and part:
                on_bytes(len(part))
            return answer, len(part)
        with begin() as upload:
            total = 0
            while part:
                total += len(part)
                upload.send(part)
                part, following = following, b""
                if part:
                    following = exactly(stream, next(sizes))
            check_size(where, payload.size, total)
            return complete(upload), total


def check_size(where: str, announced: int | None, found: int) -> None:
    """Raise ``IntegrityError`` unless a payload holds as many bytes as it announced."""
    if announced is not None and announced != found:
        raise IntegrityError(
            f"{where}: {announced} bytes were announced and {found} came; the source changed "
            "while it was read, so nothing is stored"
        )


def extent(
    where: str, span: ByteRange | None, length: int | None, content_range: str | None
) -> tuple[int | None, int | None]:
    """Return the object's size and the length of the body, from the answer to a read.

    Args:
        where: the object's URI, for messages.
        span: what was asked for; ``None`` is all of it.
        length: the answer's ``Content-Length``.
        content_range: the answer's ``Content-Range``.

    Raises:
        ObjectChangedError: the object is too short for ``span``.
        UnsupportedOperation: the store ignored ``span``.
    """
    if span is None:
        return length, length
    match = _RANGE.fullmatch(content_range or "")
    if match is None:
        if span.start == 0 and length == span.end:
            return length, length
        raise UnsupportedOperation(
            f"{where}: bytes {span.start}-{span.end - 1} were asked for and the store sent the "
            "whole object; it cannot read ranges"
        )
    begin, last, size = (int(number) for number in match.groups())
    if size < span.end:
        raise ObjectChangedError(
            f"{where}: bytes up to {span.end} were asked for, the object has {size}"
        )
    if (begin, last + 1) != (span.start, span.end):
        raise TransientError(
            f"{where}: bytes {span.start}-{span.end - 1} were asked for and {begin}-{last} sent"
        )
    return size, len(span)
