"""Folders to work in, out of sight of readers; what killed processes left goes, or is gone on with.

A folder that holds a ``journal`` can be gone on with (``storage.transfer.journal``): it stays for
a day, unless room is needed. Whoever goes on with one renames it to a name of its own first; of
several who want it, the one whose rename succeeds has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial

from storage.cache.layout import Layout, listed
from storage.cache.owners import Owner, current_owner, may_live, new_name
from storage.files import remove

__all__ = ["JOURNAL", "dead_size", "give_up", "living", "new_partial", "remove_dead"]

JOURNAL = "journal"
"""Name of the file that tells what of a folder somebody can go on with."""

_LOCK = "lock"
# Begins the name of a folder that its owner has given up; no owner's name does.
_GIVEN_UP = "given-up-"
# Seconds without any change after which nobody is expected to go on.
_RESUMABLE = 24 * 3600.0


@contextlib.contextmanager
def new_partial(root: str, wanted: Callable[[str], bool] | None = None) -> Iterator[str]:
    """Make a folder below ``partial/`` that is this caller's alone, and remove it at the end.

    Args:
        root: of the cache.
        wanted: tells of a folder that a dead process left, or a living one gave up, whether to
            go on with it instead.

    Yields:
        Its path. It holds a file ``lock``.

    Raises:
        OSError: the cache cannot be written.
    """
    path = os.path.join(Layout(root).partial, new_name())
    maker = os.getpid()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if wanted is None or not _take_over(root, path, wanted):
        os.mkdir(path, 0o700)
    descriptor = None
    try:
        # What protects it on this machine is its name.
        with contextlib.suppress(OSError):
            lock = os.path.join(path, _LOCK)
            # The lock of whoever gave it up.
            remove(lock)
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


def give_up(path: str) -> None:
    """Leave a folder of one's own to whoever wants to go on with it, this process included."""
    # A child forked meanwhile comes through here too.
    if Owner.parse(os.path.basename(path)) != current_owner():
        return
    with contextlib.suppress(OSError):
        os.rename(path, os.path.join(os.path.dirname(path), _GIVEN_UP + os.urandom(8).hex()))


def _take_over(root: str, path: str, wanted: Callable[[str], bool]) -> bool:
    """Give the name ``path`` to a folder that is ``wanted`` and nobody's; tell if there is one."""
    for found in _with_owners(root, None, alive=False, resumable=True):
        if _is_resumable(found) and wanted(found):
            with contextlib.suppress(OSError):
                os.rename(found, path)
                return True
    return False


def remove_dead(root: str, now: float | None = None, *, resumable: bool = False) -> int:
    """Remove what dead processes left in ``partial/``.

    What nobody can tell to be dead, has no owner in its name, or can be gone on with, goes after
    a day without any change. What cannot be removed stays.

    Args:
        root: of the cache.
        now: seconds since the epoch, if not the time of the call.
        resumable: remove what can be gone on with, however young it is.

    Returns:
        How many bytes that gave back.
    """
    return sum(map(_remove, _dead(root, now, resumable)))


def dead_size(root: str, *, resumable: bool = False) -> int:
    """Return how many bytes :func:`remove_dead` would give back."""
    return sum(_measure(path)[0] for path in _dead(root, None, resumable))


def living(root: str) -> Iterator[str]:
    """Yield the paths of what :func:`remove_dead` would leave: somebody may work at it, or will."""
    return _with_owners(root, None, alive=True, resumable=False)


def _dead(root: str, now: float | None, resumable: bool) -> Iterator[str]:
    return _with_owners(root, now, alive=False, resumable=resumable)


def _with_owners(root: str, now: float | None, *, alive: bool, resumable: bool) -> Iterator[str]:
    """Yield what is alive, or dead; what can be gone on with is dead if ``resumable``."""
    now = time.time() if now is None else now
    folder = Layout(root).partial
    for name in listed(folder):
        path = os.path.join(folder, name)
        if _may_live(name, path, now, resumable) == alive:
            yield path


def _may_live(name: str, path: str, now: float, resumable: bool) -> bool:
    changed = partial(_changed, path)
    if _is_resumable(path):
        if not resumable and now - changed() < _RESUMABLE:
            return True
        if name.startswith(_GIVEN_UP):
            return False
    return may_live(Owner.parse(name), os.path.join(path, _LOCK), changed, now)


def _is_resumable(path: str) -> bool:
    # A process that was killed before its first note may leave an empty journal.
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(path, JOURNAL)).st_size > 0
    return False


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
