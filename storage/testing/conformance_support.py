"""What the parts of the conformance suite share."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar

import pytest

from storage.backends.base import Backend, ByteRange, ObjectInfo, Payload
from storage.errors import StorageError

__all__ = [
    "MIB",
    "Raw",
    "Scenario",
    "Source",
    "content",
    "fails",
    "in_threads",
    "keys_of",
    "needs",
    "read_all",
    "stored",
    "unfinished",
]

MIB = 1024 * 1024

_Test = TypeVar("_Test", bound=Callable[..., object])
_Result = TypeVar("_Result")


class Raw(Protocol):
    """The bucket under test, reached AROUND the backend: the store's own client, or its disk.

    It may also have ``unfinished() -> Sequence[str]``: what takes up space in the bucket
    without being an object, such as multipart uploads that nobody completed or aborted.
    """

    def put(self, key: str, data: bytes) -> None:
        """Store an object, replacing what is there. ``put("dir/", b"")`` makes a marker."""

    def get(self, key: str) -> bytes:
        """Return the content of an object."""

    def keys(self) -> set[str]:
        """Return the keys of all objects, markers included where the store has them."""


class Scenario:
    """Base of the parts of the suite; what they may read from the class under test."""

    exceptions: ClassVar[dict[str, str]] = {}
    count: ClassVar[int] = 2500
    large: ClassVar[int] = 24 * MIB


def needs(*capabilities: str) -> Callable[[_Test], _Test]:
    """Mark a test as one about what ``capabilities`` (names of its fields) promise.

    A backend that denies one of them has to refuse the operation, which a test of its own
    checks; this test then reports itself as skipped, and which capability is missing.
    """

    def mark(test: _Test) -> _Test:
        test.__dict__["needs_capabilities"] = capabilities
        return test

    return mark


def content(size: int, seed: int = 0) -> bytes:
    """Return ``size`` bytes that look random and are the same each time."""
    return random.Random(seed).randbytes(size)


def read_all(
    backend: Backend, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None
) -> bytes:
    """Return what a read yields; each buffer is copied before the next one is asked for."""
    with backend.read(key, span, pin) as body:
        return b"".join([bytes(piece) for piece in body])


def keys_of(infos: Iterable[ObjectInfo]) -> list[str]:
    """Return the keys, sorted; every object must come with its size."""
    found = list(infos)
    for info in found:
        assert info.size is not None, f"{info.key!r} was listed without its size"
    return sorted(info.key for info in found)


def stored(raw: Raw, key: str) -> bytes:
    """Return the content of an object that must be there under exactly this key."""
    found = raw.keys()
    assert key in found, f"{key!r} is not stored; the bucket holds {sorted(found)[:10]}"
    return raw.get(key)


def unfinished(raw: Raw) -> Sequence[str]:
    """Return what takes up space without being an object, where ``raw`` can tell."""
    ask = getattr(raw, "unfinished", None)
    return ask() if ask is not None else []


@contextlib.contextmanager
def fails(*expected: type[BaseException]) -> Iterator[None]:
    """Expect one of these errors, and that it is fit to be shown, logged and sent on."""
    with pytest.raises(expected) as caught:
        yield
    error = caught.value
    assert isinstance(error, StorageError), f"{type(error)} is not an error of this library"
    text = str(error)
    assert text.strip(), f"{type(error).__name__} says nothing"
    assert len(text.splitlines()) == 1, f"more than one line: {text!r}"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), text), "it does not survive pickling"


class Stream(io.BytesIO):
    """A stream that may give short reads, as sockets and pipes do, and may fail midway."""

    def __init__(self, data: bytes, piece: int | None, fail_at: int | None) -> None:
        super().__init__(data)
        self._piece = piece
        self._fail_at = fail_at

    def read(self, size: int | None = -1, /) -> bytes:
        if self._fail_at is not None and self.tell() >= self._fail_at:
            raise RuntimeError("the source of the payload broke")
        if self._piece is not None:
            size = self._piece if size is None or size < 0 else min(size, self._piece)
        return super().read(size)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    read1 = read
    readinto1 = readinto


class Source:
    """Makes payloads out of :class:`Stream` and remembers every stream it opened."""

    def __init__(
        self, data: bytes, *, piece: int | None = None, fail_at: int | None = None
    ) -> None:
        """Describe the streams.

        Args:
            data: their bytes.
            piece: the most bytes that one ``read`` returns.
            fail_at: offset from which on ``read`` raises ``RuntimeError``.
        """
        self._make = partial(Stream, data, piece, fail_at)
        self.streams: list[Stream] = []

    def payload(self, size: int | None) -> Payload:
        """Return a payload that announces ``size`` bytes."""
        return Payload(self._open, size)

    def _open(self) -> Stream:
        self.streams.append(self._make())
        return self.streams[-1]


def in_threads(work: Sequence[Callable[[], _Result]], threads: int = 8) -> list[_Result]:
    """Run ``work`` in threads that start together; return the results in order."""
    threads = min(threads, len(work))
    barrier = threading.Barrier(threads)
    local = threading.local()

    def run(task: Callable[[], _Result]) -> _Result:
        if not getattr(local, "started", False):
            local.started = True
            barrier.wait(timeout=60)
        return task()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, work))
