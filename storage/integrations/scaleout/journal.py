"""The files of a spool: segments of records, and the mark that says which were delivered.

A segment is a file of lines, each with its checksum (:mod:`storage.transfer.lines`). The first
line says whose records follow; the others are the records, in the order of their numbers. Lines
are only ever added. Its name is the number of its first record and the stream in which it counts,
so that names sort as their records do.

The mark is one file of two slots that never grows: it is written over in turns, so that it can be
written on a disk that is full, and what a power cut leaves of one slot does not touch the other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from storage import files
from storage.errors import DestinationError, InsufficientSpaceError
from storage.transfer.lines import decode_line, encode_line

__all__ = [
    "UNFINISHED",
    "Header",
    "Line",
    "Mark",
    "MarkFile",
    "SegmentWriter",
    "drop_torn_tail",
    "first_number",
    "lines",
    "read_header",
    "segment_name",
    "told_os_errors",
    "write_file",
]

UNFINISHED = ".new"
"""How the names of files end that nobody has finished; those of a killed process stay."""

_FORMAT = 1
_SLOT = 512
_NAME = re.compile(r"(\d{16})-[0-9a-f]{16}\.seg")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def segment_name(first: int, stream: str) -> str:
    """Return the name of the segment that begins with record ``first`` of a stream."""
    return f"{first:016d}-{stream}.seg"


def first_number(name: str) -> int:
    """Return with which record a segment begins, by its name; 0 if that is no segment's."""
    found = _NAME.fullmatch(name)
    return 0 if found is None else int(found[1])


@contextlib.contextmanager
def told_os_errors(path: str, what: str) -> Iterator[None]:
    """Turn the system's error about a file of the spool into ours.

    Args:
        path: of the file, or of the spool.
        what: could not be done, for the message.
    """
    try:
        yield
    except OSError as exc:
        if isinstance(exc, DestinationError):
            raise
        reason = exc.strerror or str(exc)
        where = files.shown(path)
        if exc.errno in _FULL:
            raise InsufficientSpaceError(
                f"{where}: {what}: the disk, a quota or a limit is full ({reason}); free some "
                "space, or let the store be reached so that the spool is emptied"
            ) from exc
        error = DestinationError(
            f"{where}: {what}: {reason}; the spool needs a folder that this user may write, on a "
            "disk that works"
        )
        error.errno = exc.errno
        raise error from exc


def write_file(path: str, data: bytes) -> None:
    """Put ``data`` into a file, whole or not at all, on the disk when this returns.

    Raises:
        OSError: as the system says; nothing is left.
    """
    fresh = f"{path}{UNFINISHED}"
    try:
        with open(fresh, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(fresh, path)
        files.sync(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


# -- segments --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """Whose records a segment holds."""

    client: str
    stream: str
    boot: str | None
    """In which the segment was begun."""

    folder: int
    """The inode of the spool's folder then: a copy of the folder has another."""

    def line(self) -> bytes:
        """Return the first line of a segment."""
        return encode_line({"spool": _FORMAT, **asdict(self)})


def read_header(path: str) -> Header | None:
    """Return the header of a segment; ``None`` if it is damaged or of another format.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as segment:
        record = _decoded(segment.readline())
    if record is None or record.pop("spool", None) != _FORMAT:
        return None
    try:
        header = Header(**record)
    except TypeError:
        return None
    return header if isinstance(header.client, str) and isinstance(header.stream, str) else None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a segment."""

    start: int
    end: int
    """Where it is in the file, in bytes."""

    text: bytes
    record: dict[str, Any] | None
    """What it says; ``None`` if it is damaged."""

    @property
    def number(self) -> int | None:
        """The number of its record; ``None`` if it is damaged."""
        return None if self.record is None else self.record["number"]

    def highest(self, before: int) -> int:
        """Return the highest number up to here, from that before it; a damaged record had one."""
        return before + 1 if self.number is None else max(before, self.number)


def lines(path: str, start: int, end: int) -> Iterator[Line]:
    """Yield the lines of a segment between two offsets, one in memory at a time.

    The header is none of them. What stands after the last line feed counts as a damaged line.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as segment:
        at = start
        segment.seek(at)
        if at == 0:
            at = len(segment.readline())
        while at < end:
            text = segment.readline(end - at)
            if not text:
                return
            record = _decoded(text)
            if record is not None and type(record.get("number")) is not int:
                record = None
            yield Line(at, at + len(text), text, record)
            at += len(text)


def _decoded(text: bytes) -> dict[str, Any] | None:
    # A checksum that is right by chance does not make JSON of it.
    with contextlib.suppress(ValueError, RecursionError):
        return decode_line(text)
    return None


def drop_torn_tail(path: str) -> int:
    """Cut off what stands after the last line feed of a file, and return how many bytes it was.

    Raises:
        OSError: the file cannot be read or written.
    """
    with open(path, "r+b") as segment:
        size = segment.seek(0, os.SEEK_END)
        whole = _last_line_feed(segment, size)
        if whole < size:
            segment.truncate(whole)
    return size - whole


def _last_line_feed(segment: BinaryIO, size: int) -> int:
    """Return the offset after the last line feed, 0 if there is none."""
    step = 64 * 1024
    end = size
    while end > 0:
        start = max(0, end - step)
        segment.seek(start)
        found = segment.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class SegmentWriter:
    """Adds lines to one segment. Not safe for many threads."""

    def __init__(self, path: str, header: Header | None = None) -> None:
        """Open a segment.

        Args:
            path: of the file.
            header: of a new one. It is written together with the first record, so that no
                segment is without one; a file that is there counts for nothing.

        Raises:
            OSError: it cannot be opened.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        if header is not None:
            flags |= os.O_CREAT | os.O_TRUNC
        self.path = path
        self._header = b"" if header is None else header.line()
        self._descriptor = os.open(path, flags, 0o600)
        self.size = os.fstat(self._descriptor).st_size
        """Bytes of it that count."""
        self.broken = False
        """Whether there is more in the file than counts, because a write failed and could not be
        taken back. Nothing may be added then."""

    def append(self, line: bytes, *, sync: bool) -> None:
        """Add a line, in one write; it is the kernel's when this returns.

        Args:
            line: with its line feed.
            sync: force it to disk as well.

        Raises:
            OSError: it could not be written. The file is as it was, unless ``broken``.
        """
        data = self._header + line
        try:
            written = os.write(self._descriptor, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fdatasync(self._descriptor)
                if self._header:
                    files.sync(os.path.dirname(self.path))
        except BaseException:
            try:
                os.ftruncate(self._descriptor, self.size)
            except OSError:
                self.broken = True
            raise
        self._header = b""
        self.size += len(data)

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed the file, so that nobody would find what is added."""
        return os.fstat(self._descriptor).st_nlink == 0

    def close(self) -> None:
        """Write no more. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


# -- the mark --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the delivery has come."""

    segment: str = ""
    """The name of the segment in which the next record is, or after which it is if that was
    removed."""

    offset: int = 0
    """Where in that segment the next record begins."""

    number: int = 0
    """The highest number up to there."""

    delivered: int = 0
    """How many records were delivered, ever."""

    batch: str | None = None
    """The name of the object that is being sent; it was fixed before the first try."""

    end: int = 0
    """Where in the segment the records of that batch end."""

    doubtful: bool = False
    """It may be behind what was delivered: the newest one is damaged."""


class MarkFile:
    """Keeps a mark. Not safe for many threads."""

    def __init__(self, path: str, *, is_new: bool) -> None:
        """Open it, or make it.

        Args:
            path: of the file.
            is_new: whether it is no wonder that the file is missing.

        Raises:
            OSError: it cannot be read or made.
        """
        self._path = path
        if not os.path.exists(path):
            write_file(path, _slot(0, Mark(doubtful=not is_new)) + b"\0" * _SLOT)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        data = os.pread(self._descriptor, 2 * _SLOT, 0)
        slots = [data[:_SLOT], data[_SLOT:]]
        found = [_read_slot(slot) for slot in slots]
        self._generation, self.mark = max(
            (each for each in found if each is not None),
            key=lambda each: each[0],
            default=(0, Mark(doubtful=True)),
        )
        self._next = 1 - found.index((self._generation, self.mark)) if any(found) else 0
        # A slot that was never written is empty, not damaged.
        if any(each is None and slot.strip(b"\0") for each, slot in zip(found, slots, strict=True)):
            self.mark = Mark(**{**asdict(self.mark), "doubtful": True})

    def write(self, mark: Mark) -> None:
        """Put another mark in the place of this one; it is in the kernel when this returns.

        Raises:
            OSError: it cannot be written; the one before may be in force.
        """
        data = _slot(self._generation + 1, mark)
        if os.pwrite(self._descriptor, data, self._next * _SLOT) != _SLOT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._generation += 1
        self._next = 1 - self._next
        self.mark = mark

    def sync(self) -> None:
        """Force it to disk.

        Raises:
            OSError: that failed.
        """
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Write no more. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _slot(generation: int, mark: Mark) -> bytes:
    line = encode_line({"generation": generation, **asdict(mark)})
    assert len(line) <= _SLOT, "names are of a fixed length"
    return line.ljust(_SLOT, b"\0")


def _read_slot(slot: bytes) -> tuple[int, Mark] | None:
    with contextlib.suppress(ValueError, TypeError, KeyError, json.JSONDecodeError):
        record = decode_line(slot.rstrip(b"\0"))
        if record is not None:
            return int(record.pop("generation")), Mark(**record)
    return None
