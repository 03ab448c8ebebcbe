"""Reading ZIP archives by their directory: ZIP64, Unix modes and links.

The directory is read as a stream, so that the number of entries costs little memory, and before
anything is extracted it is made sure that no two entries share bytes (a bomb of overlapping
entries would make petabytes of megabytes), and that both headers of an entry say the same.
"""

from __future__ import annotations

import bz2
import lzma
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from storage import cancellation
from storage.unpacking.extraction import DamageError, Extraction, quoted

__all__ = ["ends_as_zip", "extract_zip"]

_PIECE = 1024 * 1024
_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_ZIP64 = 1
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_ENCRYPTED, _UTF8 = 1, 1 << 11
_UNIX = 3
_MAX_LINK = 4096
_MAX_DICTIONARY = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Directory:
    at: int
    size: int
    count: int
    shift: int
    """What was put in front of the archive, in bytes; its offsets do not know of it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    raw_name: bytes
    system: int
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    mode: int
    at: int

    @property
    def name(self) -> str:
        """Its path."""
        # Unix programs write the names of files as they are, whatever the flag says.
        if self.flags & _UTF8 or self.system == _UNIX:
            return os.fsdecode(self.raw_name)
        return self.raw_name.decode("cp437")


def ends_as_zip(file: IO[bytes]) -> bool:
    """Tell whether a file ends with the end of a ZIP."""
    return _find_end(file)[0] is not None


def extract_zip(file: IO[bytes], extraction: Extraction) -> None:
    """Extract all entries of a ZIP.

    Args:
        file: seekable.
        extraction: where to.

    Raises:
        DamageError: it is damaged.
        InvalidInput: it holds what is refused.
    """
    directory = _directory(file)
    _check_places(file, directory, extraction)
    for entry in _entries(file, directory):
        kind = stat.S_IFMT(entry.mode)
        if entry.raw_name.endswith(b"/"):
            extraction.folder(entry.name)
        elif kind == stat.S_IFLNK:
            target = b"".join(_content(file, entry, directory.shift, extraction))
            extraction.link(entry.name, os.fsdecode(target))
        elif kind in (0, stat.S_IFREG):
            extraction.check_member(entry.name, entry.size, entry.packed)
            with extraction.file(entry.name, bool(entry.mode & stat.S_IXUSR)) as target_file:
                for piece in _content(file, entry, directory.shift, extraction):
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[target_file.write(rest) :]
        else:
            raise extraction.refusal(f"holds {quoted(entry.name)}, a device or pipe")


def _find_end(file: IO[bytes]) -> tuple[tuple[Any, ...] | None, int]:
    """Return the fields of the record at the end, and where it is."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _END.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read(size - start)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if at + _END.size <= len(tail):
            fields = _END.unpack_from(tail, at)
            # What follows is the comment and nothing else.
            if at + _END.size + fields[7] == len(tail):
                return fields, start + at
        at = tail.rfind(b"PK\5\6", 0, at)
    return None, 0


def _directory(file: IO[bytes]) -> _Directory:
    fields, at = _find_end(file)
    if fields is None:
        raise DamageError("its directory is missing, or something follows it")
    _, disk, first_disk, here, count, size, offset, _ = fields
    if at >= _END64_PLACE.size:
        place = _read(file, at - _END64_PLACE.size, _END64_PLACE.size)
        if place.startswith(b"PK\6\7"):
            # Right in front of it: what else its place says must be so too.
            at -= _END64_PLACE.size + _END64.size
            if at < 0:
                raise DamageError("its directory is damaged")
            fields = _END64.unpack(_read(file, at, _END64.size))
            if fields[0] != b"PK\6\6":
                raise DamageError("its ZIP64 directory is damaged")
            _, _, _, _, disk, first_disk, here, count, size, offset = fields
    if disk or first_disk or here != count:
        raise DamageError("it is one of several parts")
    shift = at - size - offset
    if shift < 0:
        raise DamageError("its directory is damaged")
    return _Directory(at - size, size, count, shift)


def _entries(file: IO[bytes], directory: _Directory) -> Iterator[_Entry]:
    """Read the directory, entry by entry; ``file`` may be moved meanwhile."""
    at, end = directory.at, directory.at + directory.size
    for _ in range(directory.count):
        if at + _ENTRY.size > end:
            raise DamageError("its directory holds fewer entries than it says")
        fields = _ENTRY.unpack(_read(file, at, _ENTRY.size))
        (mark, made_by, _, flags, method, _, _, crc, packed, size) = fields[:10]
        (name_size, extra_size, comment_size, disk, _, attributes, offset) = fields[10:]
        names = _read(file, at + _ENTRY.size, name_size + extra_size)
        at += _ENTRY.size + name_size + extra_size + comment_size
        if mark != b"PK\1\2" or at > end or disk not in (0, 0xFFFF):
            raise DamageError("its directory is damaged")
        name, extra = names[:name_size], names[name_size:]
        size, packed, offset = _large(extra, size, packed, offset)
        if flags & _ENCRYPTED:
            raise DamageError("it is encrypted")
        yield _Entry(name, made_by >> 8, flags, method, crc, packed, size, attributes >> 16, offset)
    if at != end:
        raise DamageError("its directory holds more entries than it says")


def _large(extra: bytes, *values: int) -> tuple[int, ...]:
    """Return sizes and offset, from the field of ZIP64 where the header has no room."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == _ZIP64:
            missing = sum(value == 0xFFFFFFFF for value in values)
            if length < 8 * missing or at + 8 * missing > len(extra):
                raise DamageError("its directory is damaged")
            given = iter(struct.unpack_from(f"<{missing}Q", extra, at))
            return tuple(next(given) if value == 0xFFFFFFFF else value for value in values)
        at += length
    return values


def _check_places(file: IO[bytes], directory: _Directory, extraction: Extraction) -> None:
    """Make sure that entries keep to themselves, and to the part before the directory."""
    starts, ends = array("Q"), array("Q")
    for entry in _entries(file, directory):
        extraction.entry()
        at = entry.at + directory.shift
        end = at + _LOCAL.size + len(entry.raw_name) + entry.packed
        if end <= directory.at:
            # Only the entry itself tells how much else is in front of its content.
            end += int.from_bytes(_read(file, at + _LOCAL.size - 2, 2), "little")
        if end > directory.at:
            raise DamageError(f"{quoted(entry.name)} is not inside it")
        starts.append(at)
        ends.append(end)
    before = 0
    for index in sorted(range(len(starts)), key=starts.__getitem__):
        if starts[index] < before:
            raise extraction.refusal("holds entries that overlap")
        before = ends[index]


def _content(file: IO[bytes], entry: _Entry, shift: int, extraction: Extraction) -> Iterator[bytes]:
    """Yield what an entry holds, counted and checked."""
    at = entry.at + shift
    fields = _LOCAL.unpack(_read(file, at, _LOCAL.size))
    mark, _, flags, method, *_, name_size, extra_size = fields
    if (
        mark != b"PK\3\4"
        or (flags & _ENCRYPTED, method) != (0, entry.method)
        or _read(file, at + _LOCAL.size, name_size) != entry.raw_name
    ):
        raise DamageError(f"the headers of {quoted(entry.name)} contradict each other")
    file.seek(at + _LOCAL.size + name_size + extra_size)
    size = crc = 0
    for piece in _decoded(file, entry):
        size += len(piece)
        if size > entry.size:
            raise DamageError(f"{quoted(entry.name)} holds more than its header says")
        if stat.S_ISLNK(entry.mode) and size > _MAX_LINK:
            raise extraction.refusal(f"holds a link of more than {_MAX_LINK} bytes")
        extraction.count(len(piece))
        crc = zlib.crc32(piece, crc)
        yield piece
    if (size, crc) != (entry.size, entry.crc):
        raise DamageError(f"{quoted(entry.name)} fails its checksum, or is cut off")


def _decoded(file: IO[bytes], entry: _Entry) -> Iterator[bytes]:
    left = entry.packed
    if entry.method == _LZMA:
        left -= 9
    decoder = _decoder(file, entry)
    while left > 0:
        cancellation.check()
        data = file.read(min(left, _PIECE))
        if not data:
            raise DamageError(f"it ends inside {quoted(entry.name)}")
        left -= len(data)
        if decoder is None:
            yield data
            continue
        # All that comes of one piece may be a thousand times as much.
        yield from decoder.pieces(data)
    if decoder is not None and not decoder.ended:
        raise DamageError(f"{quoted(entry.name)} is cut off")


class _Deflated:
    """Decodes pieces of a deflated stream."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(-zlib.MAX_WBITS)

    @property
    def ended(self) -> bool:
        return self._inner.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        full = True
        # With no more input, a full piece may not have been all.
        while (data or full) and not self.ended:
            piece = self._inner.decompress(data, _PIECE)
            yield piece
            data, full = self._inner.unconsumed_tail, len(piece) == _PIECE
        if self.ended and (data or self._inner.unused_data):
            raise DamageError("something follows the compressed bytes of an entry")


class _Other:
    """The same with the decoders of ``bz2`` and ``lzma``."""

    def __init__(self, inner: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._inner = inner
        # LZMA need not mark its end; the size and the checksum of the entry tell.
        self._marked = isinstance(inner, bz2.BZ2Decompressor)

    @property
    def ended(self) -> bool:
        return self._inner.eof or not self._marked

    def pieces(self, data: bytes) -> Iterator[bytes]:
        while not self._inner.eof:
            yield self._inner.decompress(data, _PIECE)
            data = b""
            if self._inner.needs_input:
                return


def _decoder(file: IO[bytes], entry: _Entry) -> _Deflated | _Other | None:
    if entry.method == _STORED:
        return None
    if entry.method == _DEFLATED:
        return _Deflated()
    if entry.method == _BZIP2:
        return _Other(bz2.BZ2Decompressor())
    if entry.method == _LZMA:
        head = file.read(9)
        if len(head) < 9 or head[2:4] != b"\5\0" or head[4] >= 9 * 5 * 5:
            raise DamageError(f"{quoted(entry.name)} is damaged")
        rest, literal_context = divmod(head[4], 9)
        position, literal_position = divmod(rest, 5)
        dictionary = int.from_bytes(head[5:9], "little")
        if dictionary > _MAX_DICTIONARY:
            raise DamageError(
                f"{quoted(entry.name)} needs {dictionary} bytes of memory, and "
                f"{_MAX_DICTIONARY} are allowed"
            )
        filters = {
            "id": lzma.FILTER_LZMA1,
            "lc": literal_context,
            "lp": literal_position,
            "pb": position,
            "dict_size": max(dictionary, 4096),
        }
        return _Other(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[filters]))
    raise DamageError(
        f"{quoted(entry.name)} is compressed by the method {entry.method}, which is not supported"
    )


def _read(file: IO[bytes], at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise DamageError(f"it is cut off at byte {at + len(data)}")
    return data
