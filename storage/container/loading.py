"""Finds out what bytes are: a container, with its directory and metadata, or something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from storage.container.entries import Entry, open_entry, read_directory
from storage.container.metadata import LONGEST_METADATA, METADATA, decode_metadata
from storage.container.source import Source
from storage.container.stored import LocalSource, discard, unnamed_file
from storage.errors import InvalidInput, one_line
from storage.files import translate_os_errors

__all__ = ["TEMPORARY", "Contents", "blocks_of", "is_container", "read_contents", "spool"]

TEMPORARY = "the folder for temporary files"
"""What messages call it."""

_BLOCK = 1024 * 1024
# What a container begins with that this library or scaleoututil wrote.
_LOCAL_HEADER = b"PK\x03\x04"
_NAME_AT = 30


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of a container once it is open."""

    entries: dict[str, Entry]
    metadata: dict[str, Any]
    format_version: int


def is_container(source: Source | BinaryIO) -> bool:
    """Tell whether these bytes are a ZIP archive that has metadata of a model."""
    try:
        return METADATA in read_directory(source)
    except InvalidInput:
        return False


def read_contents(source: Source, *, strict: bool) -> Contents | None:
    """Read the directory and the metadata of a container.

    Args:
        source: its bytes.
        strict: whether it has to begin with ``PK``. ``scaleoututil`` demands that of streams,
            while it lets files have something before the archive.

    Returns:
        ``None`` if it is no container.

    Raises:
        InvalidInput: it is one, but damaged, cut short, or of a newer format.
        IntegrityError: its metadata do not have their checksum.
    """
    begin = source.read_at(0, _NAME_AT + len(METADATA))
    if strict and not begin.startswith(b"PK"):
        return None
    reason: Exception | None = None
    entry = None
    try:
        entries = read_directory(source)
        entry = entries.get(METADATA)
    except InvalidInput as exc:
        reason = exc
    begins = begin.startswith(_LOCAL_HEADER) and begin[_NAME_AT:] == METADATA.encode()
    # What is left of one that was cut may end with another archive: weights in an NPZ file.
    if begins and (entry is None or entry.header_offset):
        raise InvalidInput(
            f"{source.name} begins as a model container, and the directory at its end is "
            f"missing or another one's ({one_line(reason or 'no such entry')}): it is damaged "
            "or was cut short; fetch or build it again"
        ) from reason
    if entry is None:
        return None
    if entry.size > LONGEST_METADATA:
        raise InvalidInput(
            f"{source.name}: its {METADATA} has {entry.size} bytes and may have {LONGEST_METADATA}"
        )
    with open_entry(source, entry) as stream:
        metadata, version = decode_metadata(stream.read(), source.name)
    return Contents(entries, metadata, version)


def blocks_of(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a stream, which stays open."""
    while block := stream.read(_BLOCK):
        yield block


def spool(blocks: Iterable[bytes], name: str) -> LocalSource:
    """Keep bytes in a temporary file without a name.

    Raises:
        DestinationError: it cannot be written (``InsufficientSpaceError``: no room).
    """
    with contextlib.ExitStack() as undo:
        with translate_os_errors(TEMPORARY):
            file = unnamed_file()
        undo.callback(discard, file)
        for block in blocks:
            with translate_os_errors(TEMPORARY):
                file.write(block)
        with translate_os_errors(TEMPORARY):
            source = LocalSource.adopt(file, name)
        undo.pop_all()
        return source
