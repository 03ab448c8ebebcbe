"""Bytes on their way to and from a store, for drivers that make their requests themselves."""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from storage.backends.base import ByteRange
from storage.errors import (
    IntegrityError,
    ObjectChangedError,
    TransientError,
    UnsupportedOperation,
)

__all__ = ["Watched", "check_size", "exactly", "extent"]

T = TypeVar("T")

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
                    if not task.done() and self.tell() < self._size and idle > self._limit:
                        raise TimeoutError(
                            f"the store took {self.tell()} of {self._size} bytes and then none "
                            f"for {self._limit:g} s"
                        )
                return task.result()
            finally:
                if not task.done():
                    task.cancel()
                    await asyncio.wait({task})


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
