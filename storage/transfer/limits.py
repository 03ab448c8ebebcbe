"""A limit on the bytes per second of all transfers of a client, around any backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from storage.backends.base import (
    Backend,
    BatchItem,
    Body,
    Buffer,
    ByteRange,
    ObjectInfo,
    Payload,
)

__all__ = ["RateLimiter", "connections_at", "limited"]

# Seconds at full rate that may pass at once after a quiet time.
_BURST = 0.25
# Bytes per second that a connection is worth. With fewer, and buffers of 1 MiB, a store may take
# one that waits for its turn for one that has died.
_SLOWEST = 256 * 1024


class RateLimiter:
    """Lets so many bytes pass per second, over all threads, in the order in which they ask.

    A token bucket: what was not used in the last quarter of a second is lost. Who asks waits
    until the bytes before his own have had their time, not for his own, so that nothing waits
    after its last byte.
    """

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Begin with a full bucket.

        Args:
            rate: bytes per second.
            clock: gives the time in seconds.
            sleep: waits for some seconds; an interrupt ends it by an exception.
        """
        self._rate = rate
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free = clock() - _BURST
        self.step = max(1, int(rate * _BURST))
        """Bytes that are worth a wait of their own."""

    def take(self, count: int) -> None:
        """Count bytes that arrived or left, when it is their turn."""
        with self._lock:
            turn = max(self._free, self._clock() - _BURST)
            self._free = turn + count / self._rate
        while (left := turn - self._clock()) > 0:
            self._sleep(left)


def connections_at(rate: int | None, connections: int) -> int:
    """Return how many of the ``connections`` to use at ``rate`` bytes per second."""
    return connections if rate is None else max(1, min(connections, rate // _SLOWEST))


def limited(backend: Backend, limiter: RateLimiter) -> Backend:
    """Return ``backend`` with its reads and writes at no more than the limiter's rate.

    A read waits between two buffers, a write whenever the backend has handed bytes over: then
    no request stands still that the backend watches. What the store moves by itself, and what
    goes by :meth:`Backend.filesystem` or a signed URL, is not limited.
    """
    return cast("Backend", _Limited(backend, limiter))


class _Limited:
    def __init__(self, backend: Backend, limiter: RateLimiter) -> None:
        self._backend = backend
        self._limiter = limiter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self._backend.read(key, span, pin)
        return Body(body.info, self._paced(body), body.close)

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        on_bytes: Callable[[int], object] | None = None,
        **options: Any,
    ) -> ObjectInfo:
        return self._backend.write(key, payload, on_bytes=self._counted(on_bytes), **options)

    def write_many(
        self,
        items: Sequence[BatchItem],
        *,
        on_bytes: Callable[[int], object] | None = None,
        **options: Any,
    ) -> list[ObjectInfo]:
        backend: Any = self._backend
        infos: list[ObjectInfo] = backend.write_many(
            items, on_bytes=self._counted(on_bytes), **options
        )
        return infos

    def _paced(self, body: Body) -> Iterator[Buffer]:
        step = self._limiter.step
        for chunk in body:
            # In steps, for whoever takes them may have to stop.
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), step):
                piece = view[start : start + step]
                self._limiter.take(len(piece))
                yield piece

    def _counted(self, on_bytes: Callable[[int], object] | None) -> Callable[[int], object]:
        def count(moved: int) -> None:
            if on_bytes is not None:
                on_bytes(moved)
            # Bytes that are taken back have moved all the same, and will once more.
            if moved > 0:
                self._limiter.take(moved)

        return count
