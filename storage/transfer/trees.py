"""Whole trees on a local file system: swap, recognise, remove and sync them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time

from storage.errors import DestinationError

__all__ = [
    "exchange",
    "is_marked",
    "is_mount_point",
    "lock_folder",
    "make_parents",
    "mark",
    "remove",
    "sync",
    "sync_tree",
]

_XATTR = "user.modelstorage.tree"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_PAUSE = 0.02


def make_parents(folder: str) -> list[str]:
    """Make ``folder`` and what is missing above it; return what was made, outermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    made: list[str] = []
    try:
        for path in reversed(missing):
            # Noted first: an interrupt may come before the call returns.
            made.append(path)
            try:
                os.mkdir(path)
            except FileExistsError:
                made.pop()
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise
    return made


def is_mount_point(path: str) -> bool:
    """Tell whether something is mounted at ``path``, bind mounts included."""
    if os.path.ismount(path):
        return True
    # A bind mount within one file system looks like any folder to stat.
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    escaped = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found.group()[0], os.fsencode(path))
    return any(line.split(b" ")[4] == escaped for line in lines)


def exchange(left: str, right: str) -> bool:
    """Swap two paths atomically; tell whether this system can (Linux's renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result = renameat2(
        _AT_FDCWD,
        ctypes.c_char_p(os.fsencode(left)),
        _AT_FDCWD,
        ctypes.c_char_p(os.fsencode(right)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), right)


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
            time.sleep(_PAUSE)
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
    except OSError:
        return False
    return found == _fingerprint(folder, ignored)


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


def remove(path: str) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        try:
            shutil.rmtree(path)
        except PermissionError:
            # Folders that somebody made read-only, as models often are once they are in place.
            for root, _, _ in os.walk(path):
                os.chmod(root, 0o700)
            shutil.rmtree(path)


def sync_tree(path: str) -> None:
    """Force a file, or a folder and everything in it, to disk."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(root, name)):
                sync(os.path.join(root, name))
        sync(root)
    if not os.path.isdir(path):
        sync(path)


def sync(path: str) -> None:
    """Force one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
