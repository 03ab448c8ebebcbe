"""Small files that say whether they are whole: one line of JSON, then the SHA-256 of it.

Written under another name and renamed, so that a reader sees the old record or the new one.
After a power cut a record may be torn all the same; then it counts as damaged, never as true.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from storage.cache.layout import Layout
from storage.files import sync

__all__ = [
    "DamagedRecordError",
    "UnreadableRecordError",
    "force_name",
    "make_folder_for",
    "read_record",
    "write_record",
]


class DamagedRecordError(Exception):
    """A record is not what was written. Never seen outside of the cache."""


class UnreadableRecordError(DamagedRecordError):
    """A record could not be read, and may be right all the same."""


def write_record(
    layout: Layout,
    path: str,
    value: Mapping[str, Any],
    *,
    durable: bool = False,
) -> None:
    """Put a record at ``path``, replacing the one that is there.

    Args:
        layout: of the cache that ``path`` is in.
        path: where to.
        value: what to write; anything that JSON can hold.
        durable: force it to disk.

    Raises:
        OSError: it cannot be written.
    """
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    data += b"\n" + hashlib.sha256(data).hexdigest().encode() + b"\n"
    temporary = layout.temporary()
    try:
        with _open_new(temporary) as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except FileNotFoundError:
            make_folder_for(path)
            os.replace(temporary, path)
        except IsADirectoryError:
            # Not ours, and nothing would ever be noted here again.
            aside = os.path.join(layout.quarantine, os.path.basename(temporary))
            make_folder_for(aside)
            os.rename(path, aside)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    if durable:
        force_name(layout, path)


def _open_new(path: str) -> BinaryIO:
    try:
        return open(path, "xb")
    except FileNotFoundError:
        make_folder_for(path)
        return open(path, "xb")


def read_record(path: str) -> dict[str, Any] | None:
    """Return the record at ``path``, or ``None`` if there is none.

    Raises:
        DamagedRecordError: it is damaged or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            text, _, seal = file.read().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise UnreadableRecordError(f"{path} cannot be read: {exc.strerror}") from exc
    if seal.strip().decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
        raise DamagedRecordError(f"{path} is damaged")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DamagedRecordError(f"{path} holds no record") from exc
    if not isinstance(value, dict):
        raise DamagedRecordError(f"{path} holds no record")
    return value


def make_folder_for(path: str) -> None:
    """Make the folder that ``path`` is to be in."""
    os.makedirs(os.path.dirname(path), exist_ok=True)


def force_name(layout: Layout, path: str) -> None:
    """Force the name of a file to disk, and those of the folders that it is in.

    Whoever made those folders may have left their names to the system.
    """
    folder = os.path.dirname(path)
    above = []
    while folder not in layout.forced and len(folder) > len(layout.root):
        above.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(above):
        sync(os.path.dirname(each))
        layout.forced.add(each)
    sync(os.path.dirname(path))
