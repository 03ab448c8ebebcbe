"""Folders to work in, out of sight of readers; those that killed processes left are removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from functools import partial

from storage.cache.layout import Layout, listed
from storage.cache.owners import Owner, may_live, new_name
from storage.files import remove

__all__ = ["dead_size", "living", "new_partial", "remove_dead"]

_LOCK = "lock"


@contextlib.contextmanager
def new_partial(root: str) -> Iterator[str]:
    """Make a folder below ``partial/`` that is this caller's alone, and remove it at the end.

    Yields:
        Its path. It holds a file ``lock``.

    Raises:
        OSError: the cache cannot be written.
    """
    path = os.path.join(Layout(root).partial, new_name())
    maker = os.getpid()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.mkdir(path, 0o700)
    descriptor = None
    try:
        # What protects it on this machine is its name.
        with contextlib.suppress(OSError):
            lock = os.path.join(path, _LOCK)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        # A child forked meanwhile comes through here too.
        if os.getpid() == maker:
            with contextlib.suppress(OSError):
                remove(path)
        if descriptor is not None:
            os.close(descriptor)


def remove_dead(root: str, now: float | None = None) -> int:
    """Remove what dead processes left in ``partial/``.

    What nobody can tell to be dead, or has no owner in its name, goes after a day without any
    change. What cannot be removed stays.

    Args:
        root: of the cache.
        now: seconds since the epoch, if not the time of the call.

    Returns:
        How many bytes that gave back.
    """
    return sum(map(_remove, _dead(root, now)))


def dead_size(root: str) -> int:
    """Return how many bytes :func:`remove_dead` would give back."""
    return sum(_measure(path)[0] for path in _dead(root, None))


def living(root: str) -> Iterator[str]:
    """Yield the paths of what :func:`remove_dead` would leave: somebody may work at it."""
    return _with_owners(root, None, alive=True)


def _dead(root: str, now: float | None) -> Iterator[str]:
    return _with_owners(root, now, alive=False)


def _with_owners(root: str, now: float | None, *, alive: bool) -> Iterator[str]:
    now = time.time() if now is None else now
    folder = Layout(root).partial
    for name in listed(folder):
        path = os.path.join(folder, name)
        lock = os.path.join(path, _LOCK)
        if may_live(Owner.parse(name), lock, partial(_changed, path), now) == alive:
            yield path


def _remove(path: str) -> int:
    # Of several who find it, the one whose rename succeeds removes it.
    ours = os.path.join(os.path.dirname(path), new_name())
    with contextlib.suppress(OSError):
        os.rename(path, ours)
        size, _ = _measure(ours)
        remove(ours)
        return size
    return 0


def _changed(path: str) -> float:
    return _measure(path)[1]


def _measure(path: str) -> tuple[int, float]:
    """Return the bytes in a file or folder, and when anything of it was changed last."""
    size, changed = 0, 0.0
    for entry in _everything(path):
        with contextlib.suppress(OSError):
            status = os.lstat(entry)
            # The other time can be set at will, and is, for blobs.
            changed = max(changed, status.st_ctime)
            # What has another name elsewhere does not go with this one.
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                size += status.st_size
    return size, changed


def _everything(path: str) -> Iterator[str]:
    yield path
    if os.path.islink(path):
        return
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            yield os.path.join(folder, name)
