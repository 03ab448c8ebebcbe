"""Small things that the fsspec drivers share: connections to lend, streams to watch."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO, TypeVar

from storage.backends.base import Buffer
from storage.errors import IntegrityError, TransientError

__all__ = [
    "Chunks",
    "Pool",
    "Source",
    "abandon",
    "arriving",
    "first",
    "is_temporary",
    "moment",
    "overrides",
    "run",
    "send_once",
    "temporary_key",
]

T = TypeVar("T")

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.partial", re.DOTALL)
# 255 bytes is what most file systems allow, less the two dots, the digits and the suffix.
_STEM_MAX = 255 - 1 - 1 - 16 - len(".partial")
_PIECE = 1024 * 1024
_GENERIC = ("fsspec.spec", "fsspec.asyn", "fsspec.archive")


class Pool:
    """Idle file systems of one process, to be lent to one thread at a time."""

    def __init__(self) -> None:
        """Start without any, for this process."""
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.shared: Any = None
        """One that serves all threads at once, where there is such a one."""
        self._idle: list[Any] = []

    def take(self) -> Any:
        """Return an idle file system, or ``None``."""
        with self.lock:
            return self._idle.pop() if self._idle else None

    def give(self, fs: Any) -> None:
        """Take a file system back."""
        with self.lock:
            self._idle.append(fs)

    def empty(self) -> list[Any]:
        """Forget the idle ones and the shared one; return them, to be closed."""
        with self.lock:
            found = [*self._idle, *([] if self.shared is None else [self.shared])]
            self._idle, self.shared = [], None
        return found


def run(fs: Any, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return a coroutine's result, run on the event loop of an asynchronous file system.

    It is cancelled when the wait for it is given up, by a Ctrl-C for one.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, fs.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def arriving(
    fs: Any,
    read: Callable[[int], Coroutine[Any, Any, bytes]],
    length: int | None,
    where: str,
    translated: Callable[[str], AbstractContextManager[None]],
) -> Generator[Buffer]:
    """Yield exactly ``length`` bytes of an asynchronous stream, the next piece on its way.

    Args:
        fs: the file system on whose event loop the stream is read.
        read: returns up to so many bytes; none at the end.
        length: of the stream; ``None`` if unknown.
        where: the object's URI, for messages.
        translated: turns failures of ``read`` into errors of ours.
    """

    async def fetch(amount: int) -> bytearray:
        piece = bytearray()
        while len(piece) < amount and (block := await read(amount - len(piece))):
            piece += block
        return piece

    def ask() -> Future[bytearray] | None:
        amount = _PIECE if length is None else min(_PIECE, length - arrived)
        return asyncio.run_coroutine_threadsafe(fetch(amount), fs.loop) if amount else None

    arrived = 0
    pending = ask()
    try:
        while pending is not None:
            with translated(where):
                piece = pending.result()
            if not piece:
                break
            arrived += len(piece)
            pending = ask()
            yield piece
    finally:
        if pending is not None:
            pending.cancel()
    if length is not None and arrived != length:
        raise TransientError(f"{where}: the body ended after {arrived} of {length} bytes")


class Chunks:
    """The chunks of a body, and what has to be freed after the last one or the first failure."""

    def __init__(self, chunks: Generator[Buffer], lease: ExitStack) -> None:
        """Yield ``chunks``; end ``lease`` with them."""
        self._chunks = chunks
        self._lease = lease

    def __iter__(self) -> Iterator[Buffer]:
        return self

    def __next__(self) -> Buffer:
        try:
            return next(self._chunks)
        except StopIteration:
            self._lease.close()
            raise
        except BaseException as exc:
            self._lease.__exit__(type(exc), exc, exc.__traceback__)
            raise

    def close(self) -> None:
        """Give up what is left."""
        with self._lease:
            self._chunks.close()


class Source:
    """A payload's stream while it is sent: counted, and its own failures kept apart."""

    def __init__(
        self,
        stream: BinaryIO,
        size: int | None,
        on_bytes: Callable[[int], object] | None,
        where: str,
    ) -> None:
        """Read ``stream``.

        Args:
            stream: the payload's.
            size: bytes that the payload announces.
            on_bytes: called with the number of bytes of each read.
            where: the object's URI, for messages.
        """
        self.size = size
        self._stream = stream
        self._on_bytes = on_bytes
        self._where = where
        self._sent = 0
        self._failure: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, ``b""`` at the end."""
        try:
            block = self._stream.read(size)
            self._sent += len(block)
            if block and self._on_bytes is not None:
                self._on_bytes(len(block))
        except BaseException as exc:
            self._failure = exc
            raise
        return block

    @property
    def failed(self) -> bool:
        """Whether the stream itself failed, or who counts its bytes."""
        return self._failure is not None

    def check(self) -> None:
        """Raise unless as many bytes were read as the payload announced."""
        if self.size is not None and self._sent != self.size:
            raise IntegrityError(
                f"{self._where}: {self.size} bytes were announced and {self._sent} came; the "
                "source changed while it was read, so nothing is stored"
            )

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let a failure of the stream out as it was, whatever the store's client made of it."""
        try:
            yield
        except BaseException:
            if self._failure is not None:
                raise self._failure from None
            raise


def send_once(session: Any) -> None:
    """Keep a session of aiohttp from sending a PUT again by itself when a connection breaks.

    A write that was applied, and only its answer lost, would be refused as somebody else's.
    """
    if hasattr(session, "_retry_connection"):
        session._retry_connection = False


def abandon(file: Any) -> None:
    """Close a file opened for writing so that what was written does not become an object."""
    with suppress(Exception):
        file.discard()
    if hasattr(file, "_upload_chunk"):
        # Closing is what commits it, and the collector would close it.
        file.closed = True
    else:
        with suppress(Exception):
            file.close()


def temporary_key(key: str) -> str:
    """Return a new key beside ``key`` for an object in the making."""
    folder, slash, name = key.rpartition("/")
    stem = name.encode()[:_STEM_MAX].decode(errors="ignore")
    return f"{folder}{slash}.{stem}.{secrets.token_hex(8)}.partial"


def is_temporary(name: str) -> bool:
    """Return whether ``name`` (without folders) is that of an object in the making."""
    return _TEMPORARY.fullmatch(name) is not None


def overrides(cls: type[Any], *names: str) -> bool:
    """Return whether ``cls`` implements any of these methods better than fsspec's base does."""
    return any(
        getattr(getattr(cls, name, None), "__module__", _GENERIC[0]) not in _GENERIC
        for name in names
    )


def first(raw: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first of these values that is there."""
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def moment(value: Any) -> datetime | None:
    """Return a time in any of the forms that fsspec's file systems give it."""
    try:
        if isinstance(value, str):
            # FTP: 20260131235959.123
            match = re.fullmatch(r"(\d{14})(\.\d+)?", value)
            value = (
                datetime.strptime(match.group(1), "%Y%m%d%H%M%S")  # noqa: DTZ007 -- below
                if match
                else datetime.fromisoformat(value)
            )
        elif isinstance(value, (int, float)):
            value = datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
