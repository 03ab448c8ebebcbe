"""Reading tar archives as streams: v7, ustar, GNU and PAX, with all forms of sparse files.

Python's own module keeps headers of any size in memory, follows chains of them by recursion,
and takes a damaged header for the end.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Protocol

from storage import cancellation
from storage.unpacking.extraction import DamageError, Extraction, quoted

__all__ = ["Member", "Source", "Stream", "extract_file", "extract_tar", "is_tar", "members"]

_BLOCK = 512
_PIECE = 1024 * 1024
# Names and PAX records in front of a member, and records for all members, may take so much.
_MAX_RECORDS = 1024 * 1024
_MAX_SEGMENTS = 1_000_000
_FILES = frozenset((b"0", b"\0", b"7"))
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = (b"x", b"X"), b"g", b"L", b"K"
_HARD_LINK, _LINK, _FOLDER, _DUMPED_FOLDER, _LABEL = b"1", b"2", b"5", b"D", b"V"
_GNU_SPARSE = b"S"
_SPECIAL = frozenset((b"3", b"4", b"6"))
_USTAR = b"ustar\0"
_NUMBER = re.compile(rb"[0-9]{1,20}")


class Stream(Protocol):
    """Bytes in order."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, and none only at the end."""


def is_tar(block: bytes) -> bool:
    """Tell whether the first 512 bytes of a file are the beginning of a tar."""
    return len(block) == _BLOCK and (not any(block) or _sums_up(block))


@dataclass(slots=True)
class _Records:
    """What stands in front of a member and overrides its header."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    segments: array[int] = field(default_factory=lambda: array("Q"))
    """Offsets and lengths of a sparse file in turns (GNU format 0.0)."""

    size: int = 0
    """Bytes that were read for it."""


@dataclass(slots=True)
class Member:
    """What the headers of a member say."""

    kind: bytes
    """Type flag of the header."""

    name: str
    target: str
    """Of a link."""

    size: int
    """Bytes of it in the archive."""

    executable: bool
    real_size: int
    """Bytes of the file that it becomes."""

    segments: array[int] | None
    """Of a sparse file: where the bytes in the archive belong, as offsets and lengths."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.kind in (_FOLDER, _DUMPED_FOLDER)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.kind == _LINK

    @property
    def is_hard_link(self) -> bool:
        """Whether it is another name of a member before it."""
        return self.kind == _HARD_LINK

    @property
    def is_special(self) -> bool:
        """Whether it is a device or a pipe."""
        return self.kind in _SPECIAL

    @property
    def has_content(self) -> bool:
        """Whether bytes of it follow in the archive, which have to be read or skipped."""
        return not (self.is_link or self.is_hard_link or self.is_special or self.kind == _FOLDER)


def extract_tar(stream: Stream, extraction: Extraction) -> None:
    """Extract all members of a tar.

    Args:
        stream: its decompressed bytes.
        extraction: where to.

    Raises:
        DamageError: it is damaged.
        InvalidInput: it holds what is refused.
    """
    source = Source(stream)
    for member in members(source, extraction):
        extraction.entry()
        if member.is_folder:
            extraction.folder(member.name)
            if member.has_content:
                source.skip(member.size, extraction)
        elif member.is_link:
            extraction.link(member.name, member.target)
        elif member.is_hard_link:
            extraction.hard_link(member.name, member.target)
        else:
            extract_file(source, member, extraction)
    source.drain(extraction)


def extract_file(
    source: Source, member: Member, extraction: Extraction, name: str | None = None
) -> None:
    """Extract a member that is a file, as ``name`` or under its own."""
    extraction.count(member.real_size)
    with extraction.file(name or member.name, member.executable) as target:
        if member.segments is None:
            source.copy(member.size, target)
        else:
            for offset, length in _pairs(member.segments):
                target.seek(offset)
                source.copy(length, target)
            target.truncate(member.real_size)
    source.pad(member.size)


class Source:
    """The bytes of the archive, in order."""

    def __init__(self, stream: Stream, *, may_end: bool = False) -> None:
        """Read from ``stream``, which stands at the first byte of a tar.

        Args:
            stream: its bytes.
            may_end: whether it may end behind any member, for there are programs that write no
                mark of the end. Only where something else tells that it is whole.
        """
        self._stream = stream
        self.may_end = may_end
        self.at = 0

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        data = self._stream.read(size)
        while 0 < len(data) < size:
            more = self._stream.read(size - len(data))
            if not more:
                break
            data += more
        self.at += len(data)
        return data

    def exactly(self, size: int) -> bytes:
        """Return ``size`` bytes."""
        data = self.read(size)
        if len(data) < size:
            raise DamageError(f"it ends at byte {self.at}, inside a member")
        return data

    def copy(self, size: int, target: IO[bytes]) -> None:
        """Write the next ``size`` bytes to an unbuffered file."""
        while size:
            cancellation.check()
            # As much as comes at once; the pieces need not be put together.
            rest = memoryview(self._stream.read(min(size, _PIECE)))
            if not rest:
                self.exactly(size)
            size -= len(rest)
            self.at += len(rest)
            while rest:
                rest = rest[target.write(rest) :]

    def skip(self, size: int, extraction: Extraction) -> None:
        """Pass over content that nobody needs."""
        extraction.count(size)
        left = size
        while left:
            left -= len(self.exactly(min(left, _PIECE)))
        self.pad(size)

    def drain(self, extraction: Extraction) -> None:
        """Read what follows the last member.

        Only the end of a compressed stream tells whether its checksum is right.
        """
        while piece := self._stream.read(_PIECE):
            extraction.count(len(piece))

    def pad(self, size: int) -> None:
        """Pass over what fills the last block of content of ``size`` bytes."""
        if size % _BLOCK:
            filling = self.read(-size % _BLOCK)
            if filling or not self.may_end:
                self.exactly(-size % _BLOCK - len(filling))


def members(source: Source, extraction: Extraction, *, specials: bool = False) -> Iterator[Member]:
    """Yield the members of a tar; the content of each is to be read before the next is asked for.

    Args:
        source: the decompressed bytes.
        extraction: counts, and words the refusals.
        specials: yield devices and pipes instead of refusing the archive.

    Raises:
        DamageError: it is damaged.
        InvalidInput: it holds what is refused.
    """
    everywhere: dict[bytes, bytes] = {}
    records = _Records()
    while True:
        at = source.at
        block = source.read(_BLOCK)
        if not block and source.may_end and not records.size:
            return
        if len(block) < _BLOCK:
            raise DamageError(f"it ends at byte {source.at} without the mark of its end")
        if not any(block):
            if records.size:
                raise DamageError(f"at byte {at} a member is missing")
            return
        if not _sums_up(block):
            raise DamageError(f"at byte {at} a header is damaged or missing")
        kind, size = block[156:157], _number(block[124:136])
        if kind in (*_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            body = _record_body(source, size, records)
            if kind == _PAX_GLOBAL:
                _read_pax(body, _Records(everywhere))
                if sum(map(len, everywhere.values())) > _MAX_RECORDS or len(everywhere) > 1000:
                    raise extraction.refusal("holds too many records for all members")
            elif kind in _PAX:
                _read_pax(body, records)
            else:
                key = b"path" if kind == _LONG_NAME else b"linkpath"
                # A PAX record says it better.
                records.values.setdefault(key, body.partition(b"\0")[0])
            continue
        if kind == _LABEL:
            extraction.entry()
            source.skip(size, extraction)
            continue
        member = _member(block, kind, size, {**everywhere, **records.values}, extraction)
        if member.is_special and not specials:
            raise extraction.refusal(f"holds {quoted(member.name)}, a device or pipe")
        _find_segments(source, block, member, {**everywhere, **records.values}, records.segments)
        records = _Records()
        yield member


def _record_body(source: Source, size: int, records: _Records) -> bytes:
    # The header counts too: many empty ones are not free.
    records.size += size + _BLOCK
    if records.size > _MAX_RECORDS:
        raise DamageError(
            f"at byte {source.at} names and records take more than {_MAX_RECORDS} bytes"
        )
    body = source.exactly(size)
    source.pad(size)
    return body


def _member(
    block: bytes, kind: bytes, size: int, values: dict[bytes, bytes], extraction: Extraction
) -> Member:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == _USTAR:
        # One old program keeps times in the last bytes of this field.
        prefix = block[345:476] if block[508:] == b"tar\0" else block[345:500]
        prefix = prefix.partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    name = values.get(b"GNU.sparse.name") or values.get(b"path") or name
    target = values.get(b"linkpath") or block[157:257].partition(b"\0")[0]
    if b"size" in values:
        size = _decimal(values[b"size"])
    shown = os.fsdecode(name)
    if kind in _FILES and name.endswith(b"/"):
        kind = _FOLDER  # the oldest archives mark folders so
    if kind not in (*_FILES, *_SPECIAL, _GNU_SPARSE, _HARD_LINK, _LINK, _FOLDER, _DUMPED_FOLDER):
        raise extraction.refusal(f"holds {quoted(shown)}, which is of the unknown type {kind!r}")
    executable = bool(_number(block[100:108]) & 0o100)
    return Member(kind, shown, os.fsdecode(target), size, executable, size, None)


# -- sparse files ------------------------------------------------------------------------------


def _find_segments(
    source: Source,
    block: bytes,
    member: Member,
    values: dict[bytes, bytes],
    listed: array[int],
) -> None:
    """Set what a sparse file has where, in the form that its archive tells it."""
    stored = member.size
    if member.kind == _GNU_SPARSE:
        segments = _old_segments(source, block)
        member.real_size = _number(block[483:495])
    elif member.kind not in _FILES:
        return
    elif values.get(b"GNU.sparse.major") == b"1":
        before = source.at
        segments = _leading_segments(source, member.size)
        member.real_size = _decimal(values.get(b"GNU.sparse.realsize", b""))
        stored -= source.at - before
    elif b"GNU.sparse.map" in values:
        segments = _checked(map(_decimal, values[b"GNU.sparse.map"].split(b",")))
        member.real_size = _decimal(values.get(b"GNU.sparse.size", b""))
    elif listed:
        segments = listed
        member.real_size = _decimal(values.get(b"GNU.sparse.size", b""))
    else:
        return
    end = 0
    for offset, length in _pairs(segments):
        if offset < end:
            raise DamageError(f"the map of {quoted(member.name)} is damaged")
        end = offset + length
        stored -= length
    if end > member.real_size or stored:
        raise DamageError(f"the map of {quoted(member.name)} does not fit to its size")
    member.segments = segments


def _old_segments(source: Source, block: bytes) -> array[int]:
    segments = array("Q")
    part, more = block[386:482], block[482]
    while True:
        for at in range(0, len(part), 24):
            if not part[at + 12]:
                break
            segments.append(_number(part[at : at + 12]))
            segments.append(_number(part[at + 12 : at + 24]))
        if not more:
            return _checked(segments)
        if len(segments) > 2 * _MAX_SEGMENTS:
            raise DamageError("the map of a sparse file is too long")
        following = source.exactly(_BLOCK)
        part, more = following[:504], following[504]


def _leading_segments(source: Source, size: int) -> array[int]:
    """Read the map in front of the content: numbers in lines, filled up to a block."""
    lines: list[bytes] = []
    segments = array("Q")
    rest, left, wanted = b"", size, None
    while wanted is None or len(segments) < wanted:
        if left < _BLOCK:
            raise DamageError("the map of a sparse file is cut off")
        left -= _BLOCK
        *lines, rest = (rest + source.exactly(_BLOCK)).split(b"\n")
        for line in lines:
            if wanted is None:
                wanted = 2 * _decimal(line)
                if wanted > 2 * _MAX_SEGMENTS:
                    raise DamageError("the map of a sparse file is too long")
            elif len(segments) < wanted:
                segments.append(_decimal(line))
        if len(rest) > _BLOCK:
            raise DamageError("the map of a sparse file is damaged")
    return _checked(segments)


def _checked(numbers: Iterable[int]) -> array[int]:
    segments = numbers if isinstance(numbers, array) else array("Q", numbers)
    if len(segments) % 2:
        raise DamageError("the map of a sparse file is damaged")
    return segments


def _pairs(segments: array[int]) -> Iterator[tuple[int, int]]:
    numbers = iter(segments)
    return zip(numbers, numbers, strict=True)


# -- records and numbers -----------------------------------------------------------------------


def _read_pax(body: bytes, records: _Records) -> None:
    """Read records, each of its length, a space, ``key=value`` and a line feed."""
    at = 0
    while at < len(body) and body[at]:
        digits = _NUMBER.match(body, at)
        if digits is None:
            raise DamageError("a PAX record is damaged")
        end = at + int(digits.group())
        record = body[digits.end() : end]
        key, equals, value = record[1:-1].partition(b"=")
        if end > len(body) or not equals or record[:1] != b" " or record[-1:] != b"\n":
            raise DamageError("a PAX record is damaged")
        at = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            # Format 0.0 repeats them, in turns.
            if (key == b"GNU.sparse.offset") == bool(len(records.segments) % 2):
                raise DamageError("the map of a sparse file is damaged")
            records.segments.append(_decimal(value))
        elif value:
            records.values[key] = value
        else:
            records.values.pop(key, None)
    _checked(records.segments)


def _decimal(text: bytes) -> int:
    value = int(text) if _NUMBER.fullmatch(text) else -1
    if not 0 <= value < 1 << 63:
        raise DamageError(f"{text[:40]!r} is no size")
    return value


def _number(raw: bytes) -> int:
    """Read a field of a header: octal digits, or base 256 behind a set bit."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ((1 << 8 * len(raw) - 1) - 1)
        if raw[0] & 0x40 or value >= 1 << 63:
            raise DamageError("a size in a header is no size")
        return value
    text = raw.partition(b"\0")[0].strip()
    if not text:
        return 0
    if text.strip(b"01234567"):
        raise DamageError(f"{text!r} in a header is no number")
    return int(text, 8)


def _sums_up(block: bytes) -> bool:
    try:
        expected = _number(block[148:156])
    except DamageError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old programs took the bytes for signed ones.
    return expected in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))
