"""Reads ZIP archives, whoever made them: what they hold, and the entries, checked.

The format is PKWARE's APPNOTE. The directory is read by :mod:`zipfile`, so that an archive holds
the same entries here as it does for other programs in Python; what could be read in two ways is
refused, and so is what would take more memory than a directory may.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from storage.container.source import Section, Source, as_source
from storage.container.stored import map_file
from storage.errors import IntegrityError, InvalidInput, one_line

__all__ = [
    "DEFLATED",
    "STORED",
    "Entry",
    "EntryStream",
    "MappedEntryStream",
    "data_offset",
    "open_entry",
    "read_directory",
    "read_entry",
]

STORED = zipfile.ZIP_STORED
DEFLATED = zipfile.ZIP_DEFLATED

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 0x2041  # by any of the three ways
_UTF8 = 0x800
_BLOCK = 1024 * 1024
_BUFFER = 128 * 1024
_INPUT = 64 * 1024
# A container has a handful of entries and a list of parameters some hundreds; this is enough for
# 40,000. In memory it takes some ten times as much.
_LONGEST_DIRECTORY = 4 * 1024 * 1024
# Deflate makes of one byte 1032 at most: 258 out of two bits.
_BEST_RATIO = 1032


@dataclass(frozen=True, slots=True)
class Entry:
    """What the directory of an archive says of one entry."""

    name: str
    """Its path in the archive."""

    header_offset: int
    """Where its header begins; :func:`data_offset` tells where its data does."""

    compressed_size: int
    """Bytes that it takes in the archive."""

    size: int
    """Bytes that it holds."""

    crc: int
    """CRC-32 of the bytes that it holds."""

    method: int
    """:data:`STORED` or :data:`DEFLATED`."""

    limit: int
    """Where the next entry, or the directory, begins."""


def read_directory(archive: Source | BinaryIO) -> dict[str, Entry]:
    """Return the entries of a ZIP archive, in the order of its directory.

    Only the end of the archive is read. Bytes before the first entry are no error.

    Raises:
        InvalidInput: it is no ZIP archive, or one whose directory contradicts itself, has more
            than 4 MiB, or names an entry that is encrypted, or compressed by something else
            than Deflate, or there twice.
    """
    source = as_source(archive)
    file = _Directory(source)
    try:
        with zipfile.ZipFile(cast(BinaryIO, file)) as zipped:
            infos = zipped.infolist()
            end: int = cast(Any, zipped).start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
        EOFError,
        OSError,
        struct.error,
    ) as exc:
        if file.failure is not None:
            # zipfile takes what the source raised for the end of the archive.
            raise file.failure from None
        raise InvalidInput(
            f"{source.name} is no whole ZIP archive: {one_line(exc)}; fetch or make it again"
        ) from exc
    finally:
        # An error keeps alive what it came through: this very object.
        file.failure = None
    limits = _limits(infos, end)
    entries: dict[str, Entry] = {}
    for info in infos:
        entry = Entry(
            info.filename,
            info.header_offset,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type,
            limits[info.header_offset],
        )
        if reason := _objection(info, entry):
            raise InvalidInput(f"{source.name}: the entry {_shown(entry)} {reason}")
        if entry.name in entries:
            raise InvalidInput(
                f"{source.name} holds two entries named {_shown(entry)}; refused, for readers "
                "would differ in which one they take"
            )
        entries[entry.name] = entry
    return entries


def _shown(entry: Entry) -> str:
    return one_line(repr(entry.name[:100]))


def _limits(infos: list[zipfile.ZipInfo], end: int) -> dict[int, int]:
    """Return by the offset of each header where the next thing begins."""
    offsets = sorted(info.header_offset for info in infos)
    # Backwards, so that headers at one place leave no room for each other.
    return dict(reversed(list(zip(offsets, [*offsets[1:], end], strict=False))))


def _objection(info: zipfile.ZipInfo, entry: Entry) -> str | None:
    if not entry.name or info.orig_filename != entry.name:
        return "has no proper name; refused"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted, which is not supported; make the archive without a password"
    if entry.method not in (STORED, DEFLATED):
        return (
            f"is compressed by method {entry.method}; only Deflate (8) and none (0) are supported"
        )
    if entry.header_offset < 0 or (
        entry.header_offset + _LOCAL_HEADER.size + entry.compressed_size > entry.limit
    ):
        return "is not where the directory says, or overlaps another one; refused"
    most = entry.compressed_size
    if entry.method == DEFLATED:
        most *= _BEST_RATIO
    if entry.size > most or (entry.method == STORED and entry.size != most):
        return (
            f"cannot hold {entry.size} bytes in the {entry.compressed_size} that it takes; refused"
        )
    return None


class _Directory(Section):
    """An archive as :mod:`zipfile` may see it: no single read costs much memory."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.size)
        self._source = source
        self.failure: Exception | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        if length > _LONGEST_DIRECTORY:
            raise ValueError(
                f"its directory would be {length} bytes long, and at most {_LONGEST_DIRECTORY} "
                "are read"
            )
        try:
            data = self._source.read_at(self._position, length)
        except Exception as exc:
            self.failure = exc
            raise
        self._position += len(data)
        return data

    def _read(self, position: int, view: memoryview) -> int:
        raise NotImplementedError


def data_offset(archive: Source | BinaryIO, entry: Entry) -> int:
    """Return where the data of an entry begins; its header is read for that.

    Raises:
        InvalidInput: there is another header than the directory says.
    """
    source = as_source(archive)
    # No encoding of a name is longer than UTF-8's.
    longest = _LOCAL_HEADER.size + len(entry.name.encode())
    raw = source.read_at(entry.header_offset, longest)
    if len(raw) >= _LOCAL_HEADER.size:
        magic, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(raw)
        name = raw[_LOCAL_HEADER.size :][:name_length]
        offset = int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)
        if (
            magic == _LOCAL_MAGIC
            and len(name) == name_length
            and name.decode("utf-8" if flags & _UTF8 else "cp437", "replace") == entry.name
            and method == entry.method
            and not flags & _ENCRYPTED
            and offset + entry.compressed_size <= entry.limit
        ):
            return offset
    raise InvalidInput(
        f"{source.name}: the entry {_shown(entry)} has another header than the directory of the "
        "archive says; fetch or make it again"
    )


class EntryStream(io.BufferedReader):
    """The bytes that an entry holds, read as they are needed.

    Read from the beginning to the end they are checked: the read that brings the last of them
    raises ``IntegrityError`` if they do not have the CRC-32 of the directory. It seeks; in
    compressed data a step back begins again.
    """

    compressed: bool
    """Whether seeking is expensive."""

    def __init__(self, raw: _Contents) -> None:
        """Read from ``raw``."""
        super().__init__(raw, _BUFFER)
        self.compressed = raw.compressed


class MappedEntryStream(EntryStream):
    """An entry whose bytes can be had as memory, too."""

    def __init__(self, raw: _Contents, memory: memoryview) -> None:
        """Read from ``raw``; ``memory`` is the same bytes."""
        super().__init__(raw)
        self._memory = memory

    def getbuffer(self) -> memoryview:
        """Return the bytes as memory, as ``io.BytesIO`` does.

        They are read from the file when they are first used, and not checked. What is written
        to them stays in this process. They outlive the stream.
        """
        return self._memory


def open_entry(archive: Source | BinaryIO, entry: Entry, *, mmap: bool = False) -> EntryStream:
    """Open an entry for reading.

    Args:
        archive: what :func:`read_directory` read.
        entry: one of those that it returned.
        mmap: give a stream that has ``getbuffer()`` (a :class:`MappedEntryStream`), if the
            entry is stored in a local file.

    Raises:
        InvalidInput: the entry is not where the directory says.
        IntegrityError: on reading, if the bytes are not those that the directory promises.
    """
    source = as_source(archive)
    offset = data_offset(source, entry)
    memory = map_file(source, offset, entry.size) if mmap and entry.method == STORED else None
    kind = _Inflated if entry.method == DEFLATED else _Stored
    raw = kind(source.duplicate(), entry, offset)
    try:
        raw.begin()
    except BaseException:
        raw.close()
        raise
    return EntryStream(raw) if memory is None else MappedEntryStream(raw, memory)


def read_entry(archive: Source | BinaryIO, entry: Entry, limit: int) -> bytes:
    """Return the bytes that an entry holds.

    Args:
        archive: what :func:`read_directory` read.
        entry: one of those that it returned.
        limit: how many there may be.

    Raises:
        InvalidInput: there are more, or the entry is not where the directory says.
        IntegrityError: they are not those that the directory promises.
    """
    source = as_source(archive)
    if entry.size > limit:
        raise InvalidInput(
            f"{source.name}: the entry {_shown(entry)} holds {entry.size} bytes, and at most "
            f"{limit} are read"
        )
    with open_entry(source, entry) as stream:
        return stream.read()


class _Contents(Section):
    """The bytes that an entry holds, checked as far as they are read in their order."""

    compressed: bool

    def __init__(self, source: Source, entry: Entry, offset: int) -> None:
        super().__init__(entry.size)
        self._source = source
        self._entry = entry
        self._begin = offset
        self._stream: Any = None
        self._crc = 0
        self._checked = 0
        # The words alone: an error keeps what it came through alive.
        self._failure = ""

    def begin(self) -> None:
        """Check at once what nobody is going to read."""
        if not self._size:
            self._check()

    def close(self) -> None:
        if not self.closed:
            self._drop_stream()
            self._source.close()
        super().close()

    def _read(self, position: int, view: memoryview) -> int:
        if self._failure:  # whoever reads on is told again
            raise IntegrityError(self._failure)
        count = self._bring(position, view)
        if not count:
            raise self._damaged(f"ends before the {position + 1}th of its {self._size} bytes")
        if position <= self._checked < position + count:
            self._crc = zlib.crc32(view[self._checked - position : count], self._crc)
            self._checked = position + count
            if self._checked == self._size:
                self._check()
        return count

    def _bring(self, position: int, view: memoryview) -> int:
        """Fill the beginning of ``view``, as :meth:`_read`; nothing if there is nothing."""
        raise NotImplementedError

    def _check(self) -> None:
        if self._crc != self._entry.crc:
            raise self._damaged(
                f"has the CRC-32 {self._crc:08x}, and {self._entry.crc:08x} was expected"
            )

    def _damaged(self, how: str) -> IntegrityError:
        self._failure = (
            f"{self._source.name}: the entry {_shown(self._entry)} is damaged: it {how}; fetch or "
            "make it again"
        )
        return IntegrityError(self._failure)

    def _open_stream(self) -> None:
        self._drop_stream()
        self._stream = self._source.stream(self._begin, self._entry.compressed_size)

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Stored(_Contents):
    compressed = False
    _at = 0

    def _bring(self, position: int, view: memoryview) -> int:
        if self._stream is None:
            self._open_stream()
        if position != self._at:
            self._stream.seek(position)
        count: int = self._stream.readinto(view)
        self._at = position + count
        return count


class _Inflated(_Contents):
    compressed = True

    def __init__(self, source: Source, entry: Entry, offset: int) -> None:
        super().__init__(source, entry, offset)
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._done = 0

    def _bring(self, position: int, view: memoryview) -> int:
        if self._stream is None or position < self._done:
            self._open_stream()
            self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            self._done = 0
        while self._done < position:
            if not self._inflate(min(position - self._done, _BLOCK)):
                return 0
        data = self._inflate(len(view))
        view[: len(data)] = data
        return len(data)

    def _inflate(self, length: int) -> bytes:
        """Return some of the next bytes, none only at the end of the data."""
        data = b""
        while not data and not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._stream.read(_INPUT)
            try:
                # It may hold back output when all input is in it.
                data = self._inflater.decompress(packed, length)
            except zlib.error as exc:
                raise self._damaged(f"cannot be unpacked ({one_line(exc)})") from exc
            if not packed and not data:
                break
        self._done += len(data)
        return data

    def _check(self) -> None:
        super()._check()
        if self._stream is None:
            self._open_stream()
        if self._inflate(1):
            raise self._damaged(f"holds more than the {self._size} bytes that it should")
