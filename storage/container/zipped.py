"""Writes ZIP archives whose stored entries can be mapped.

The format is PKWARE's APPNOTE, with ZIP64 where sizes need it. The data of every entry begins at
a multiple of the archive's alignment, behind an extra field that readers pass over. There are no
times in it: the same content gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from storage.container.entries import DEFLATED, STORED, Entry, data_offset
from storage.container.source import Section, Source
from storage.container.stored import copy_bytes
from storage.errors import InvalidInput, one_line

__all__ = ["PAGE", "ZipWriter"]

PAGE = 4096
"""The alignment at which a whole entry can be mapped, and copied without being written again
where files share their blocks (reflinks)."""

_BLOCK = 1024 * 1024
_BUFFER = 64 * 1024
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_ZIP64_EXTRA = 0x0001
_PADDING_EXTRA = 0xD935  # the number that Android's zipalign uses
_EXTRA_HEADER = 4
_ZIP64_SIZES = 16
_FULL_16 = 0xFFFF
_FULL_32 = 0xFFFFFFFF
_UTF8 = 0x800
_VERSION, _VERSION_64 = 20, 45
_UNIX = 3 << 8
_EPOCH = 1 << 5 | 1  # the first of January 1980, before which the format has no dates
_REGULAR_FILE = 0o100644 << 16

_LEVEL = 1
_SAMPLES = 8
_SAMPLE = 64 * 1024
# Less than a block is no gain. Weights shrink to 93 % (float32) or 80 % (bfloat16) at best, and
# are worth more if they can be mapped.
_SMALLEST = 4096
_SHRUNK = 0.75


@dataclass(slots=True)
class _Record:
    """An entry that is being written, or was."""

    name: bytes
    header: int
    data: int
    size: int = 0
    compressed_size: int = 0
    crc: int = 0
    method: int = STORED


class ZipWriter:
    """Writes one archive into a file, entry by entry.

    Whether an entry is compressed is decided by samples of it, unless the caller says so. Only
    :meth:`write` of what is not compressed, and :meth:`close`, go strictly forward; for
    anything else the file is sought in and read, too.
    """

    def __init__(self, file: BinaryIO, *, alignment: int = 64) -> None:
        """Begin an archive.

        Args:
            file: written from where it stands; what it holds behind that is replaced. It stays
                open.
            alignment: what the places of the data are multiples of, counted from the beginning
                of the archive.
        """
        self._file = file
        self._offset = file.tell() if file.seekable() else 0
        self._alignment = alignment
        self._end = 0  # of the last whole entry
        self._at = 0  # where the file stands; less than nothing if that is not known
        self._records: list[_Record] = []
        self._names: set[bytes] = set()
        self._busy = False

    def write(self, name: str, *parts: Any, compress: bool | None = None) -> None:
        """Write an entry that is in memory.

        Args:
            name: of the entry.
            parts: its content: ``bytes`` and the like, one after the other.
            compress: by default, if it shrinks.
        """
        with self._begin(name) as record, contextlib.ExitStack() as views:
            octets = []
            for part in parts:
                view = views.enter_context(memoryview(part))
                if view.nbytes:  # an empty one cannot be cast
                    octets.append(views.enter_context(view.cast("B")))
            record.size = sum(map(len, octets))
            if compress is None:
                compress = _shrinks(_reader(octets), record.size)
            pieces = (piece for view in octets for piece in _pieces(view))
            if compress:
                self._deflate(record, pieces)
                self._put(record.header, _local_header(record))
                return
            for view in octets:
                record.crc = zlib.crc32(view, record.crc)
            record.compressed_size = record.size
            at = self._put(record.header, _local_header(record))
            for piece in pieces:
                at = self._put(at, piece)

    def add(self, name: str, source: Source | BinaryIO, compress: bool | None = None) -> None:
        """Write an entry that a source or a stream holds, in bounded memory.

        Args:
            name: of the entry.
            source: all of a source, or a stream from where it stands.
            compress: by default, if it shrinks.
        """
        if hasattr(source, "read_at"):
            whole = cast(Source, source)
            if compress is None:
                compress = _shrinks(whole.read_at, whole.size)
            with whole.stream(0, whole.size) as stream:
                self.add(name, stream, compress)
            return
        stream = source
        if compress is None and stream.seekable():
            begin = stream.tell()

            def read_at(offset: int, length: int) -> bytes:
                stream.seek(begin + offset)
                return stream.read(length)

            compress = _shrinks(read_at, stream.seek(0, os.SEEK_END) - begin)
            stream.seek(begin)
        if not compress:
            with self.entry(name, compress) as window:
                for block in _blocks(stream):
                    window.write(block)
            return
        with self._begin(name) as record:
            self._deflate(record, _blocks(stream))
            self._put(record.header, _local_header(record))

    @contextlib.contextmanager
    def entry(self, name: str, compress: bool | None = None) -> Iterator[BinaryIO]:
        """Write an entry as a file: a context manager, of a file that is empty at first.

        The file can be sought in, read and cut short. After an exception there is no such
        entry, and another one may be written.

        Args:
            name: of the entry.
            compress: by default, if it shrinks; this is done at the end, in its place.
        """
        with self._begin(name) as record:
            window = _Window(self, record.data)
            with io.BufferedRandom(cast(io.RawIOBase, window), _BUFFER) as file:
                yield file
            record.size = record.compressed_size = window.size
            record.crc = window.checksum()
            if compress is None:
                compress = _shrinks(
                    lambda offset, length: self._get(record.data + offset, length), record.size
                )
            if compress:
                self._deflate_in_place(record)
            self._put(record.header, _local_header(record))

    def copy(self, source: Source, entry: Entry, name: str | None = None) -> None:
        """Write an entry of another archive as it is, without unpacking it.

        The kernel copies its bytes, where it can. Whether they have their checksum shows when
        they are read.

        Args:
            source: the other archive.
            entry: one of its entries.
            name: of the new entry; by default the old one.

        Raises:
            InvalidInput: the entry is not where the directory of the other archive says.
            IntegrityError: the other archive is no longer what it was.
        """
        begin = data_offset(source, entry)
        with self._begin(entry.name if name is None else name) as record:
            record.size, record.compressed_size = entry.size, entry.compressed_size
            record.crc, record.method = entry.crc, entry.method
            self._seek(self._put(record.header, _local_header(record)))
            self._at = -1
            copy_bytes(source, begin, entry.compressed_size, self._file)

    def close(self) -> None:
        """Write the directory, with which the archive is complete; the file stays open."""
        begin = at = self._end
        for record in self._records:
            at = self._put(at, _central_header(record))
        at = self._put(at, _end_records(len(self._records), begin, at - begin))
        # What a failed entry left, or an older content.
        if self._file.seekable() and self._file.seek(0, os.SEEK_END) > self._offset + at:
            self._file.truncate(self._offset + at)
        self._file.flush()

    @contextlib.contextmanager
    def _begin(self, name: str) -> Iterator[_Record]:
        try:
            raw = name.encode()
        except UnicodeEncodeError:
            raw = b""
        if not raw or b"\0" in raw or len(raw) > _FULL_16 or raw in self._names:
            raise InvalidInput(
                f"{one_line(repr(name[:100]))} cannot be the name of another entry: a ZIP archive "
                "needs names of 1 to 65535 bytes of UTF-8 without NUL, each of them once"
            )
        if self._busy:
            raise InvalidInput(
                f"{one_line(repr(name[:100]))} cannot be begun before the last entry is complete"
            )
        self._busy = True
        header = self._end
        # Room for the sizes of ZIP64, for they may turn out only later.
        shortest = _LOCAL_HEADER.size + len(raw) + 2 * _EXTRA_HEADER + _ZIP64_SIZES
        data = -(-(header + shortest) // self._alignment) * self._alignment
        record = _Record(raw, header, data)
        try:
            yield record
        except BaseException:
            self._at = -1
            raise
        finally:
            self._busy = False
        self._names.add(raw)
        self._records.append(record)
        self._end = record.data + record.compressed_size

    def _deflate(self, record: _Record, blocks: Iterable[bytes | memoryview]) -> None:
        """Write the data of an entry, compressed; note all that is to be known of it."""
        deflater = _deflater()
        at = record.data
        record.size = 0
        for block in blocks:
            record.size += len(block)
            record.crc = zlib.crc32(block, record.crc)
            at = self._put(at, deflater.compress(block))
        at = self._put(at, deflater.flush())
        record.compressed_size = at - record.data
        record.method = DEFLATED

    def _deflate_in_place(self, record: _Record) -> None:
        deflater = _deflater()
        # What does not fit into the place of what was read already: next to nothing.
        pending = bytearray()
        at = record.data
        for position in range(0, record.size, _BLOCK):
            block = self._get(record.data + position, min(_BLOCK, record.size - position))
            pending += deflater.compress(block)
            room = record.data + position + len(block) - at
            at = self._put(at, bytes(pending[:room]))
            del pending[:room]
        at = self._put(at, bytes(pending + deflater.flush()))
        record.compressed_size = at - record.data
        record.method = DEFLATED

    def _seek(self, at: int) -> None:
        if at != self._at:
            self._file.seek(self._offset + at)
            self._at = at

    def _put(self, at: int, data: bytes | memoryview) -> int:
        """Write at a place in the archive; return where that ends."""
        self._seek(at)
        self._at = -1
        with memoryview(data) as rest:
            written = 0
            while written < len(rest):
                written += self._file.write(rest[written:])
        self._at = at + len(data)
        return self._at

    def _get(self, at: int, length: int) -> bytes:
        self._seek(at)
        self._at = -1
        blocks = []
        while length and (block := self._file.read(length)):
            blocks.append(block)
            length -= len(block)
        return b"".join(blocks)

    def _cut(self, at: int) -> None:
        self._at = -1
        self._file.truncate(self._offset + at)


class _Window(Section):
    """The place of an entry in the archive's file, as a file of its own.

    What is written in order is checksummed on the way; after other writes all is read again.
    """

    def __init__(self, writer: ZipWriter, begin: int) -> None:
        super().__init__(0)
        self._writer = writer
        self._begin = begin
        self._crc = 0
        self._in_order = True

    @property
    def size(self) -> int:
        return self._size

    def checksum(self) -> int:
        """Return the CRC-32 of all that was written."""
        if not self._in_order:
            self._crc = 0
            for position in range(0, self._size, _BLOCK):
                length = min(_BLOCK, self._size - position)
                block = self._writer._get(self._begin + position, length)
                self._crc = zlib.crc32(block, self._crc)
        return self._crc

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._demand_open()
        with memoryview(data) as view, view.cast("B") as octets:
            if self._position > self._size:
                self._fill(self._position)
            if self._position < self._size:
                self._in_order = False
            at = self._position
            for piece in _pieces(octets):
                if self._in_order:
                    self._crc = zlib.crc32(piece, self._crc)
                self._writer._put(self._begin + at, piece)
                at += len(piece)
                self._size = max(self._size, at)
            self._position = at
            return len(octets)

    def truncate(self, size: int | None = None, /) -> int:
        self._demand_open()
        wanted = self._position if size is None else size
        if wanted < self._size:
            self._in_order = False
            self._writer._cut(self._begin + wanted)
            self._size = wanted
        self._fill(wanted)
        return wanted

    def _fill(self, size: int) -> None:
        """Write zeros up to there, where a file would have a hole."""
        while self._size < size:
            piece = bytes(min(_BLOCK, size - self._size))
            self._crc = zlib.crc32(piece, self._crc)
            self._writer._put(self._begin + self._size, piece)
            self._size += len(piece)

    def _read(self, position: int, view: memoryview) -> int:
        data = self._writer._get(self._begin + position, len(view))
        view[: len(data)] = data
        return len(data)


def _deflater() -> Any:
    return zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)


def _shrinks(read_at: Callable[[int, int], bytes], size: int) -> bool:
    """Tell by some samples whether content is worth to be compressed."""
    if size < _SMALLEST:
        return False
    if size <= _SAMPLES * _SAMPLE:
        samples = [read_at(0, size)]
    else:
        step = (size - _SAMPLE) // (_SAMPLES - 1)
        samples = [read_at(index * step, _SAMPLE) for index in range(_SAMPLES)]
    compressed = sum(len(zlib.compress(sample, _LEVEL)) for sample in samples)
    return compressed < _SHRUNK * sum(map(len, samples))


def _reader(views: list[memoryview]) -> Callable[[int, int], bytes]:
    """Return what reads buffers as if they were one."""

    def read_at(offset: int, length: int) -> bytes:
        found = []
        for view in views:
            piece = bytes(view[offset : offset + length])
            found.append(piece)
            length -= len(piece)
            offset = max(0, offset - len(view))
        return b"".join(found)

    return read_at


def _pieces(view: memoryview) -> Iterator[memoryview]:
    for position in range(0, len(view), _BLOCK):
        yield view[position : position + _BLOCK]


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block


# -- the records of the format -----------------------------------------------------------------


def _local_header(record: _Record) -> bytes:
    version, extra = _VERSION, b""
    sizes = record.compressed_size, record.size
    if max(sizes) >= _FULL_32:
        version = _VERSION_64
        extra = struct.pack(
            "<2H2Q", _ZIP64_EXTRA, _ZIP64_SIZES, record.size, record.compressed_size
        )
        sizes = _FULL_32, _FULL_32
    begin = record.header + _LOCAL_HEADER.size + len(record.name) + len(extra) + _EXTRA_HEADER
    padding = record.data - begin
    extra += struct.pack("<2H", _PADDING_EXTRA, padding) + bytes(padding)
    header = _LOCAL_HEADER.pack(
        b"PK\3\4",
        version,
        _flags(record),
        record.method,
        0,
        _EPOCH,
        record.crc,
        *sizes,
        len(record.name),
        len(extra),
    )
    return header + record.name + extra


def _central_header(record: _Record) -> bytes:
    fields = [record.size, record.compressed_size, record.header]
    long = [field for field in fields if field >= _FULL_32]
    size, compressed_size, header = (min(field, _FULL_32) for field in fields)
    version, extra = _VERSION, b""
    if long:
        version = _VERSION_64
        extra = struct.pack(f"<2H{len(long)}Q", _ZIP64_EXTRA, 8 * len(long), *long)
    fixed = _CENTRAL_HEADER.pack(
        b"PK\1\2",
        _UNIX | version,
        version,
        _flags(record),
        record.method,
        0,
        _EPOCH,
        record.crc,
        compressed_size,
        size,
        len(record.name),
        len(extra),
        0,
        0,
        0,
        _REGULAR_FILE,
        header,
    )
    return fixed + record.name + extra


def _end_records(count: int, begin: int, size: int) -> bytes:
    records = b""
    if count >= _FULL_16 or size >= _FULL_32 or begin >= _FULL_32:
        rest, by = _END_64.size - 12, _UNIX | _VERSION_64
        records = _END_64.pack(
            b"PK\6\6", rest, by, _VERSION_64, 0, 0, count, count, size, begin
        ) + _LOCATOR_64.pack(b"PK\6\7", 0, begin + size, 1)
    entries = min(count, _FULL_16)
    return records + _END.pack(
        b"PK\5\6", 0, 0, entries, entries, min(size, _FULL_32), min(begin, _FULL_32), 0
    )


def _flags(record: _Record) -> int:
    return 0 if record.name.isascii() else _UTF8
