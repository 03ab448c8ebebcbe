"""An object as a file for coroutines: what the blocking file does, in a thread."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

from storage.awaitable import run_blocking
from storage.errors import TransferError

if TYPE_CHECKING:
    from storage.client.client import StorageClient

__all__ = ["AsyncFile", "AsyncOpening"]

T = TypeVar("T")


class AsyncFile:
    """A file whose methods are awaited; made by :meth:`storage.Storage.aopen`.

    They do what those of the blocking file do, one after another. Reading that is cancelled
    leaves the position where it was. Lines can be iterated over by ``async for``.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Wrap a file that is open."""
        self._file = file
        self._lock = threading.Lock()
        # Nobody can tell how much of a write that was cancelled is in the file.
        self._unsure = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def readable(self) -> bool:
        """Tell whether it was opened for reading."""
        return self._file.readable()

    def seekable(self) -> bool:
        """Tell whether its position can be set."""
        return self._file.seekable()

    def writable(self) -> bool:
        """Tell whether it was opened for writing."""
        return self._file.writable()

    async def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, fewer only at the end; all that are left if it is negative."""
        return await self._reading(self._file.read, size)

    async def readline(self, size: int = -1) -> bytes:
        """Return what is left of a line, ``size`` bytes of it at most."""
        return await self._reading(self._file.readline, size)

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer``, and return how many bytes were put there: fewer only at the end."""
        assert isinstance(self._file, io.BufferedIOBase)
        return await self._reading(self._file.readinto, buffer)

    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, and return it from the start."""
        return await self._alone(self._file.seek, offset, whence)

    async def tell(self) -> int:
        """Return the position."""
        return await self._alone(self._file.tell)

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of ``data`` and return its size; it is stored when the file is closed.

        After a write that was cancelled the file takes no other, and is not stored.

        Raises:
            TransferError: a write to it was cancelled.
        """
        if self._unsure:
            raise self._unsure_error()
        try:
            return await self._alone(self._file.write, data)
        except asyncio.CancelledError:
            self._unsure = True
            raise

    def _unsure_error(self) -> TransferError:
        return TransferError(
            "a write to this file was cancelled, and may be in it or not; nothing is stored; open "
            "the object again and write all of it"
        )

    async def close(self) -> None:
        """Close the file; what was written is stored now.

        Raises:
            ObjectExistsError: the file was opened with ``xb`` and the object exists.
            TransferError: a write to it was cancelled; nothing is stored.
        """
        if self._unsure and not self.closed:
            await self._alone(_drop, self._file)
            raise self._unsure_error()
        await self._alone(self._file.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            await self.close()
        else:
            await self._alone(self._file.__exit__, exc_type, exc, traceback)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line

    async def _reading(self, read: Callable[..., T], *args: Any) -> T:
        def at_position() -> T:
            before = self._file.tell()
            try:
                return read(*args)
            except BaseException:
                if not self._file.closed:
                    self._file.seek(before)
                raise

        return await self._alone(at_position)

    async def _alone(self, function: Callable[..., T], *args: Any) -> T:
        """Run a method of the file, after those that were called before."""

        def work() -> T:
            with self._lock:
                return function(*args)

        return await run_blocking(work)


class AsyncOpening:
    """An object that is about to be opened: to be awaited, or entered by ``async with``."""

    def __init__(
        self,
        client: Callable[[], StorageClient],
        uri: str | os.PathLike[str],
        mode: str,
        config: Any,
    ) -> None:
        """Keep what :meth:`storage.StorageClient.open` is to be called with."""
        self._client = client
        self._uri = uri
        self._mode = mode
        self._config = config
        self._file: AsyncFile | None = None

    async def _open(self) -> AsyncFile:
        def work() -> BinaryIO:
            return self._client().open(self._uri, self._mode, config=self._config)

        return AsyncFile(await run_blocking(work, _drop))

    def __await__(self) -> Generator[Any, None, AsyncFile]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncFile:
        self._file = await self._open()
        return self._file

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        await self._file.__aexit__(exc_type, exc, traceback)


def _drop(file: BinaryIO) -> None:
    """Close a file that nobody is going to use; nothing is stored."""
    # What is written is stored by a close without an error.
    file.__exit__(GeneratorExit, GeneratorExit(), None)
