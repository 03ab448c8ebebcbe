"""Trees at their destination: take turns at one, and recognise what this library put there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time

from storage import cancellation
from storage.errors import DestinationError

__all__ = ["is_marked", "lock_folder", "mark"]

_XATTR = "user.modelstorage.tree"
_PAUSE = 0.02


def lock_folder(descriptor: int, path: str, timeout: float) -> None:
    """Wait for the lock of an open folder; closing the descriptor, or death, frees it.

    Where folders cannot be locked this does nothing.

    Raises:
        DestinationError: somebody else has held the lock for ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DestinationError(
                    f"{path!r}: another download has been changing this folder for "
                    f"{timeout:.0f} s; try again when it is done"
                ) from None
            cancellation.pause(_PAUSE)
        except OSError:
            return


def mark(folder: str, ignored: re.Pattern[str]) -> None:
    """Remember that this library put there what ``folder`` holds now.

    Without extended attributes nothing is remembered; a later download then needs
    ``overwrite=True``, which is safe.
    """
    with contextlib.suppress(OSError):
        os.setxattr(folder, _XATTR, _fingerprint(folder, ignored).encode())


def is_marked(folder: str, ignored: re.Pattern[str]) -> bool:
    """Tell whether ``folder`` holds just what it held when it was marked."""
    try:
        found = os.getxattr(folder, _XATTR).decode("ascii", "replace")
        return found == _fingerprint(folder, ignored)
    except OSError:
        return False  # it may also be replaced, and removed, while it is being looked at


def _fingerprint(folder: str, ignored: re.Pattern[str]) -> str:
    """Hash the paths and sizes of all in ``folder`` but the top-level names ``ignored``."""
    lines = []
    for root, folders, files in os.walk(folder):
        base = os.path.relpath(root, folder)
        if base == ".":
            folders[:] = [name for name in folders if not ignored.fullmatch(name)]
        lines += [f"{base}/{name}/" for name in folders]
        lines += [f"{base}/{name}\0{os.lstat(os.path.join(root, name)).st_size}" for name in files]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
