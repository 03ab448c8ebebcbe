"""Where the bytes of a container are: what the readers of containers ask of it."""

from __future__ import annotations

import errno
import io
import os
from abc import abstractmethod
from typing import Any, BinaryIO, Protocol, cast

from storage.errors import InvalidInput

__all__ = ["FileSource", "Section", "Source", "as_source"]

_BLOCK = 1024 * 1024


class Source(Protocol):
    """Bytes that stay the same as long as they are read: a file, or an object in a store."""

    size: int
    """Number of bytes."""

    name: str
    """What messages call it: a path or a URI, never with a secret."""

    @abstractmethod
    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes from ``offset`` on, fewer than ``length`` only at the end.

        Raises:
            IntegrityError: they are not the bytes any more that were there first.
            InvalidInput: the source is closed.
        """

    @abstractmethod
    def stream(self, offset: int, length: int) -> BinaryIO:
        """Return ``length`` bytes from ``offset`` on as a file that has ``readinto()``, too.

        It stays usable after the source is closed, and is for the caller to close.
        """

    @abstractmethod
    def fileno(self) -> int | None:
        """Return the descriptor of the local file that holds them; ``None`` if there is none.

        Raises:
            IntegrityError: the file was written to since it was opened.
        """

    @abstractmethod
    def duplicate(self) -> Source:
        """Return another source of the same bytes, which outlives this one."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file or the connections; a second time is fine."""


class Section(io.RawIOBase):
    """A readable, seekable file of known size; a subclass says how its bytes are read."""

    def __init__(self, size: int) -> None:
        """Begin at the first of ``size`` bytes."""
        super().__init__()
        self._size = size
        self._position = 0

    @abstractmethod
    def _read(self, position: int, view: memoryview) -> int:
        """Fill the beginning of ``view``, which ends before the section does; return how much."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._demand_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._demand_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        if whence not in base:
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        if base[whence] + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._demand_open()
        with memoryview(buffer) as whole, whole.cast("B") as octets:
            length = min(len(octets), self._size - self._position)
            if length <= 0:
                return 0
            with octets[:length] as view:
                count = self._read(self._position, view)
        self._position += count
        return count

    def readall(self) -> bytes:
        # Memory for what there is, not for what a header says.
        blocks = []
        while block := self.read(_BLOCK):
            blocks.append(block)
        return b"".join(blocks)

    def _demand_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


class FileSource(Source):
    """A seekable binary file that somebody else opened and closes; not for several threads."""

    def __init__(self, file: BinaryIO, name: str = "the file") -> None:
        """Take all of ``file`` as it is now."""
        self._file = file
        self.name = name
        self.size = file.seek(0, os.SEEK_END)

    def read_at(self, offset: int, length: int) -> bytes:
        wanted = max(0, min(length, self.size - offset))
        if not wanted:
            return b""
        self._file.seek(offset)
        blocks = []
        while wanted and (block := self._file.read(min(wanted, _BLOCK))):
            blocks.append(block)
            wanted -= len(block)
        return b"".join(blocks)

    def stream(self, offset: int, length: int) -> BinaryIO:
        return io.BufferedReader(_FileSection(self, offset, length), _BLOCK)

    def fileno(self) -> int | None:
        return None

    def duplicate(self) -> FileSource:
        return FileSource(self._file, self.name)

    def close(self) -> None:
        """Leave the file as it is: it is somebody else's."""


class _FileSection(Section):
    def __init__(self, source: FileSource, offset: int, length: int) -> None:
        super().__init__(length)
        self._source = source
        self._offset = offset

    def _read(self, position: int, view: memoryview) -> int:
        data = self._source.read_at(self._offset + position, len(view))
        view[: len(data)] = data
        return len(data)


def as_source(found: Source | BinaryIO) -> Source:
    """Return ``found``, or a source of the file that it is.

    Raises:
        InvalidInput: the file cannot be sought in.
    """
    if hasattr(found, "read_at"):
        return cast(Source, found)
    if not found.seekable():
        raise InvalidInput(
            "a ZIP archive is read from its end, and this stream cannot seek; copy it to a file"
        )
    return FileSource(found)
