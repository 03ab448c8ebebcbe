"""Stores that say little, or break in one way that a test chooses."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from storage.backends.base import (
    Backend,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    bytes_payload,
)
from storage.errors import TransientError
from tests.transfer.support import Wrapped


class Poor(Wrapped):
    """A store with little to say about its objects."""

    def __init__(
        self,
        inner: Backend,
        *,
        ranged: bool = True,
        pinned: bool = True,
        weak: bool = False,
        sized: bool = True,
        hinted: bool = False,
    ) -> None:
        super().__init__(inner)
        self._ranged = ranged
        self._pinned = pinned
        self._weak = weak
        self._sized = sized
        self._hinted = hinted
        self.spans: list[ByteRange | None] = []

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, ranged_read=self._ranged, pinned_read=self._pinned)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return self._poor(self.inner.stat(key, version))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return map(self._poor, self.inner.list(prefix))

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        assert span is None or self._ranged
        assert pin is None or self._pinned
        self.spans.append(span)
        body = self.inner.read(key, span, None)
        return Body(self._poor(body.info), iter(body), body.close)

    def _poor(self, info: ObjectInfo) -> ObjectInfo:
        return replace(
            info,
            etag=f"W/{info.etag}" if self._weak else info.etag,
            version=None,
            size=info.size if self._sized else None,
            hint=info.hint if self._hinted else None,
        )


class Script(Wrapped):
    """Breaks the reads of one key as ``steps`` say, one step for each read of it."""

    def __init__(self, inner: Backend, key: str, *steps: Callable[[bytes], Iterator[Buffer]]):
        super().__init__(inner)
        self._key = key
        self._steps = list(steps)
        self._lock = threading.Lock()
        self.spans: list[ByteRange | None] = []

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self.inner.read(key, span, pin)
        if key != self._key:
            return body
        with self._lock:
            self.spans.append(span)
            step = self._steps.pop(0) if self._steps else None
        if step is None:
            return body
        return Body(body.info, step(b"".join(bytes(chunk) for chunk in body)), body.close)


def reset_after(count: int) -> Callable[[bytes], Iterator[Buffer]]:
    def step(data: bytes) -> Iterator[Buffer]:
        yield data[:count]
        raise TransientError("reset by the test")

    return step


def end_after(count: int) -> Callable[[bytes], Iterator[Buffer]]:
    return lambda data: iter([data[:count]])


def one_more(data: bytes) -> Iterator[Buffer]:
    return iter([data, b"!"])


def fine(data: bytes) -> Iterator[Buffer]:
    return iter([data])


class Replacing(Wrapped):
    """Replaces the object after each of the first ``times`` reads of it."""

    def __init__(self, inner: Backend, key: str, times: int, sizes: Iterator[int]) -> None:
        super().__init__(inner)
        self._key = key
        self._times = times
        self._sizes = sizes
        self._lock = threading.Lock()
        self.last = b""

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        with self._lock:
            body = self.inner.read(key, span, pin)
            if key == self._key and self._times:
                self._times -= 1
                self.last = random.Random(self._times).randbytes(next(self._sizes))
                self.inner.write(key, bytes_payload(self.last))
            return body
