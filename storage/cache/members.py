"""The members of a parcel: a plain tar archive, of which only the simplest form is read.

The reader of the standard library keeps whatever an archive says of its members in memory, and
knows links, devices and sparse files. Nothing of that is in a parcel.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Protocol

from storage.errors import IntegrityError, TransferError, one_line

__all__ = ["Members", "Reader", "Writer", "damaged", "write_end", "write_member"]

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1024 * 1024
# Bytes of what an archive may say about one member: a size, where it is over 8 GiB.
_MAX_EXTENDED = 4096
_SIZE_FIELD = re.compile(rb"[0-9]+ size=([0-9]{1,19})\n")


class Reader(Protocol):
    """A binary stream to read."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, and none only at the end."""


class Writer(Protocol):
    """A binary stream to write."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""


def damaged(why: str) -> IntegrityError:
    """Return the error about a parcel that is not as it was made."""
    return IntegrityError(
        f"the parcel is damaged or none: {why}; no model of it is used; make or copy it again"
    )


def write_member(stream: Writer, name: str, size: int, pieces: Iterable[bytes]) -> None:
    """Write one member, whose ``pieces`` have ``size`` bytes together.

    Raises:
        OSError: the stream cannot be written.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o444
    stream.write(info.tobuf(tarfile.PAX_FORMAT))
    for piece in pieces:
        stream.write(piece)
    stream.write(bytes(-size % _BLOCK))


def write_end(stream: Writer) -> None:
    """Write what follows the last member.

    Raises:
        OSError: the stream cannot be written.
    """
    stream.write(bytes(2 * _BLOCK))


class Members:
    """The members of an archive, one after the other."""

    def __init__(self, stream: Reader) -> None:
        """Begin at the begin of ``stream``."""
        self._stream = stream
        self._left = 0

    def next(self) -> tuple[str, int] | None:
        """Return name and size of the next member, ``None`` after the last.

        Raises:
            IntegrityError: there is no such thing.
            TransferError: the stream cannot be read.
        """
        assert not self._left
        block = self._exactly(_BLOCK)
        if not block.strip(b"\0"):
            return None
        info = _parse(block)
        size = info.size
        if info.type == tarfile.XHDTYPE:
            if size > _MAX_EXTENDED:
                raise damaged("what it says about a member is too long")
            match = _SIZE_FIELD.fullmatch(self._exactly(size))
            self._exactly(-size % _BLOCK)
            if match is None:
                raise damaged("it says more about a member than its size")
            size = int(match[1])
            info = _parse(self._exactly(_BLOCK))
        if info.type != tarfile.REGTYPE or size < 0:
            raise damaged(f"{one_line(info.name, 80)!r} is no file")
        self._left = size
        return info.name, size

    def read(self) -> Iterator[bytes]:
        """Yield the content of the member in pieces; all of it has to be taken.

        Raises:
            IntegrityError: it ends too early.
            TransferError: the stream cannot be read.
        """
        padding = -self._left % _BLOCK
        while self._left:
            piece = self._exactly(min(_PIECE, self._left))
            self._left -= len(piece)
            yield piece
        self._exactly(padding)

    def _exactly(self, size: int) -> bytes:
        pieces = []
        while size:
            try:
                piece = self._stream.read(size)
            except OSError as exc:
                raise TransferError(f"the parcel cannot be read: {exc.strerror}") from exc
            if not piece:
                raise damaged("it ends too early")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as exc:
        raise damaged("it is no tar archive, or parts of it are lost") from exc
