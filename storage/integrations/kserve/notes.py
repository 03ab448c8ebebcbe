"""The note of a folder: which entries came from which source, and how they looked then.

It is an extended attribute of the folder, or a hidden file in it where there are none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

__all__ = [
    "NEW_NOTE",
    "Share",
    "has_note",
    "is_below",
    "is_real_folder",
    "is_reserved",
    "read_note",
    "read_shares",
    "state_of",
    "write_note",
]

_XATTR = "user.modelstorage.sources"
_NOTE = ".modelstorage"

NEW_NOTE = f"{_NOTE}.new"
"""What a note is called while it is written."""

_RESERVED = re.compile(r"\.modelstorage(?:\.new|\.[0-9a-f]{16})?")


@dataclass
class Share:
    """What one source has put into the folder."""

    paths: list[str] = field(default_factory=list)
    """Files and folders that are its own, relative; a folder with all in it."""

    plan: str | None = None
    """Fingerprint of the source's content, if it has one."""

    state: str | None = None
    """Fingerprint of what was put there; see :func:`state_of`."""


def is_reserved(name: str) -> bool:
    """Tell whether a file or folder of this name is about a folder, and no part of a model."""
    return _RESERVED.fullmatch(name) is not None


def has_note(folder: str) -> bool:
    """Tell whether anything was brought to ``folder`` itself."""
    try:
        os.getxattr(folder, _XATTR)
    except OSError:
        return os.path.lexists(os.path.join(folder, _NOTE))
    return True


def read_note(folder: str) -> dict[str, Share]:
    """Return what each source has in ``folder``, by the source's key."""
    try:
        text = os.getxattr(folder, _XATTR)
    except OSError:
        try:
            with open(os.path.join(folder, _NOTE), "rb") as file:
                text = file.read()
        except OSError:
            return {}
    try:
        return read_shares(json.loads(text))
    except ValueError:
        return {}  # it was damaged, or is somebody else's; then nothing is ours


def read_shares(found: object) -> dict[str, Share]:
    """Return shares as they stand in JSON; paths that lead out of the folder are left out.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(found, dict):
        raise ValueError("no shares")
    try:
        shares = {str(key): Share(**share) for key, share in found.items()}
        for share in shares.values():
            share.paths = [path for path in share.paths if is_below(path)]
    except TypeError as exc:
        raise ValueError("no shares") from exc
    return shares


def write_note(folder: str, shares: Mapping[str, Share]) -> None:
    """Note what each source has in ``folder``.

    Raises:
        OSError: the file system refuses.
    """
    text = json.dumps({key: asdict(share) for key, share in shares.items()}).encode()
    note = os.path.join(folder, _NOTE)
    try:
        os.setxattr(folder, _XATTR, text)
    except OSError:  # none on this file system, or it is too long for one
        fresh = os.path.join(folder, NEW_NOTE)
        with open(fresh, "wb") as file:
            file.write(text)
        os.rename(fresh, note)
        with contextlib.suppress(OSError):
            os.removexattr(folder, _XATTR)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)


def state_of(folder: str, paths: Collection[str]) -> str:
    """Return a hash of the names, sizes and times of all files at ``paths``.

    What is in folders that have sources of their own does not count.

    Raises:
        OSError: one is not there.
    """
    lines = []

    def note(path: str) -> None:
        found = os.lstat(path)
        name = os.path.relpath(path, folder)
        lines.append(f"{name}\0{found.st_mode}\0{found.st_size}\0{found.st_mtime_ns}")

    for path in paths:
        place = os.path.join(folder, path)
        if not is_real_folder(place):
            note(place)
            continue
        for root, folders, names in os.walk(place):
            folders[:] = [name for name in folders if not has_note(os.path.join(root, name))]
            for name in (*names, *(each for each in folders if os.path.islink(f"{root}/{each}"))):
                note(os.path.join(root, name))
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def is_real_folder(path: str) -> bool:
    """Tell whether there is a folder, and not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def is_below(path: object) -> bool:
    """Tell whether a relative path stays below the folder that it starts from."""
    return isinstance(path, str) and path != "" and not {"", ".", ".."} & set(path.split("/"))
