"""What the tests of resumed downloads share: files, and a store that counts what is read."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from storage.backends.base import Backend, Body, Buffer, ByteRange, ObjectInfo
from storage.errors import TransientError
from tests.transfer.support import KIB, Wrapped

some_bytes = random.Random(17).randbytes
PART = 64 * KIB
STEP = 8 * KIB
PIECE = 4 * KIB
BIG = some_bytes(10 * PART - 7)
FILES = {
    "m/config.json": some_bytes(500),
    "m/empty": b"",
    "m/one-part": some_bytes(PART),
    "m/sub/weights.bin": BIG,
    "m/tokens.bin": some_bytes(3 * STEP),
}
TREE = {key.removeprefix("m/"): data for key, data in FILES.items()}
SIZE = sum(map(len, FILES.values()))


class Metered(Wrapped):
    """Counts the bytes that are read, and fails when there were ``limit`` of them."""

    def __init__(
        self,
        inner: Backend,
        limit: int | None = None,
        error: Callable[[], BaseException] = lambda: TransientError("reset by the test"),
    ) -> None:
        super().__init__(inner)
        self.limit = limit
        self.error = error
        self.read_bytes = 0
        self.spans: list[tuple[str, ByteRange | None]] = []
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        self.asked.append(key)
        found: ObjectInfo = self.inner.stat(key, version)
        return found

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        with self._lock:
            self.spans.append((key, span))
        body = self.inner.read(key, span, pin)
        return Body(body.info, self._chunks(body), body.close)

    def _chunks(self, body: Body) -> Iterator[Buffer]:
        for chunk in body:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                with self._lock:
                    if self.limit is not None and self.read_bytes + len(piece) > self.limit:
                        raise self.error()
                    self.read_bytes += len(piece)
                yield piece


Download = Callable[..., str]


def staging_in(folder: Path) -> Path:
    (found,) = folder.glob(".*.partial")
    return found
