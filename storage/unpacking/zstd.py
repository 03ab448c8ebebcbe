"""Reading Zstandard (RFC 8878), by the package ``zstandard``: streams that end as they should."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Any

from storage.errors import ConfigurationError
from storage.unpacking.extraction import DamageError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "MAGIC",
    "MAX_WINDOW",
    "SKIPPABLE",
    "is_zstd",
    "open_zstd",
    "zstandard",
    "zstandard_error",
]

MAX_WINDOW = 128 * 1024 * 1024
"""Bytes that a decoder has to remember at most; what the ``zstd`` command accepts too."""

MAGIC = 0xFD2FB528
"""What a frame begins with, as a little-endian number."""

SKIPPABLE = 0x184D2A50
"""The first of sixteen such values, of frames that hold something else; decoders pass over them."""

_RLE_BLOCK = 1
# Bytes of a frame's magic number and header together, at most.
_MAX_HEADER = 18


def zstandard() -> ModuleType:
    """Return the package.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import zstandard as found
    except ImportError as exc:
        raise ConfigurationError(
            "Zstandard needs the package zstandard, which is not installed; "
            'run: pip install "modelstorage[container]"'
        ) from exc
    return found


def zstandard_error() -> type[Exception]:
    """Return what the package raises about content that is damaged."""
    error: type[Exception] = zstandard().ZstdError
    return error


def is_zstd(start: bytes) -> bool:
    """Tell whether a file that begins with ``start`` is of frames."""
    magic = int.from_bytes(start[:4], "little")
    return len(start) >= 4 and (magic == MAGIC or magic & ~0xF == SKIPPABLE)


def open_zstd(file: IO[bytes]) -> Any:
    """Return a reader of what the frames of a seekable file hold, all of them.

    Raises:
        DamageError: the frames do not fill the file.
    """
    library = zstandard()
    # The decoder takes a file that ends inside a frame for a whole one.
    _check_frames(file)
    file.seek(0)
    decompressor = library.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return decompressor.stream_reader(file, read_across_frames=True, closefd=False)


def _check_frames(file: IO[bytes]) -> None:
    """Walk over the frames, reading the headers of their blocks only."""
    size = file.seek(0, os.SEEK_END)
    at = file.seek(0)
    while at < size:
        start, at = at, _frame_end(file, at)
        if at > size:
            raise DamageError(f"the Zstandard frame at byte {start} is cut off")
        file.seek(at)


def _frame_end(file: IO[bytes], at: int) -> int:
    """Return the end of the frame at ``at``, where ``file`` stands; past its end if it is cut."""
    begin = file.read(_MAX_HEADER)
    magic = int.from_bytes(begin[:4], "little")
    if len(begin) >= 4 and magic & ~0xF == SKIPPABLE:
        return at + 8 + int.from_bytes(begin[4:8], "little")
    if len(begin) < 5 or magic != MAGIC:
        raise DamageError(f"at byte {at} there is no Zstandard frame")
    flags = begin[4]
    single = flags >> 5 & 1
    at += 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
    while True:
        file.seek(at)
        head = file.read(3)
        header = int.from_bytes(head, "little")
        at += 3 + (1 if header >> 1 & 3 == _RLE_BLOCK else header >> 3)
        if len(head) < 3:
            return at + 3  # past the end, wherever that is
        if header & 1:
            return at + 4 * (flags >> 2 & 1)
