"""Headers of tar members: ustar, with PAX records (POSIX.1-2001) only where ustar has no room.

All of them have the same owner and the same time, so that they tell of content alone.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["BLOCK", "END", "RECORD", "member_header"]

BLOCK = 512
"""Headers and contents fill blocks of so many bytes."""

END = bytes(2 * BLOCK)
"""What follows the last member."""

RECORD = 20 * BLOCK
"""An archive fills records of so many bytes, with zeros behind its end."""

_Kind = Literal["file", "folder", "link"]
_TYPES: dict[_Kind, bytes] = {"file": b"0", "folder": b"5", "link": b"2"}
_PAX = b"x"
_PAX_NAME = b"././@PaxHeader"
_NAME, _PREFIX, _LINK = 100, 155, 100
# The first size that has no room in eleven octal digits.
_LARGE = 8**11
# 1980-01-01, the first time that a ZIP can tell; tar commands warn about 1970.
_TIME = 315_532_800


def member_header(
    kind: _Kind, name: bytes, *, size: int = 0, executable: bool = False, target: bytes = b""
) -> bytes:
    """Return all blocks that come before a member's content.

    Args:
        kind: what it is.
        name: its relative path; of a folder without a slash at the end.
        size: bytes of a file's content.
        executable: whether a file is a program.
        target: where a link leads.
    """
    mode = 0o777 if kind == "link" else 0o755 if executable or kind == "folder" else 0o644
    if kind == "folder":
        name += b"/"
    records = {}
    prefix, short = _split(name)
    if short is None or (not name.isascii() and _is_utf8(name)):
        records[b"path"] = name
        prefix, short = b"", name[:_NAME]
    if len(target) > _LINK or (not target.isascii() and _is_utf8(target)):
        records[b"linkpath"] = target
    if size >= _LARGE:
        records[b"size"] = b"%d" % size
    header = b""
    if records:
        if not all(map(_is_utf8, records.values())):
            records = {b"hdrcharset": b"BINARY", **records}
        body = b"".join(_record(key, value) for key, value in records.items())
        header = _block(_PAX, _PAX_NAME, len(body), 0o644) + body + bytes(-len(body) % BLOCK)
    small = size if size < _LARGE else 0
    return header + _block(_TYPES[kind], short, small, mode, target[:_LINK], prefix)


def _split(name: bytes) -> tuple[bytes, bytes | None]:
    """Return the parts of a name as ustar keeps them; ``None`` if it cannot."""
    if len(name) <= _NAME:
        return b"", name
    cut = name.find(b"/", max(0, len(name) - _NAME - 1), -1)
    if 0 < cut <= _PREFIX:
        return name[:cut], name[cut + 1 :]
    return b"", None


def _block(
    kind: bytes, name: bytes, size: int, mode: int, target: bytes = b"", prefix: bytes = b""
) -> bytes:
    block = b"".join(
        (
            name.ljust(_NAME, b"\0"),
            b"%07o\0" % mode,
            b"%07o\0" % 0,  # user
            b"%07o\0" % 0,  # group
            b"%011o\0" % size,
            b"%011o\0" % _TIME,
            b" " * 8,
            kind,
            target.ljust(_LINK, b"\0"),
            b"ustar\x0000",
            bytes(32 + 32),  # names of user and group
            b"%07o\0" % 0 * 2,  # device numbers
            prefix.ljust(_PREFIX, b"\0"),
        )
    ).ljust(BLOCK, b"\0")
    return b"%b%06o\0 %b" % (block[:148], sum(block), block[156:])


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" %b=%b\n" % (key, value)
    length = len(rest)
    # The length counts its own digits.
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
