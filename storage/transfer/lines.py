"""Lines of JSON that say whether they are whole: what journals on this machine's disk consist of.

Each is the CRC-32 of its text in eight hex digits, a space, the text, and a line feed. A write
that was cut, and a byte that changed, are told by that.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["decode_line", "encode_line"]

_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record, its line feed included; it is all ASCII."""
    text = _encode(record).encode("ascii")
    return b"%08x %b\n" % (zlib.crc32(text), text)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line with its line feed; ``None`` if it is not as it was written."""
    checksum, _, text = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None
