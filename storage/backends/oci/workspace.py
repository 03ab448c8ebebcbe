"""A folder for layers on their way, gone at the end, and what killed processes left of theirs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import weakref

from storage.errors import DestinationError
from storage.files import is_locked, remove, translate_os_errors

__all__ = ["Workspace"]

_PREFIX = "modelstorage-oci-"


class Workspace:
    """A folder of this user's in the system's place for temporary files.

    It is locked as long as its owner lives, which tells it from one that was left behind.
    """

    def __init__(self) -> None:
        """Make the folder, after removing those of dead owners.

        Raises:
            DestinationError: there is no place for temporary files.
        """
        try:
            parent = tempfile.gettempdir()
        except OSError as exc:
            raise DestinationError(
                "layers of images need a folder for temporary files, and none can be written; "
                "name one by TMPDIR"
            ) from exc
        with translate_os_errors(parent):
            _sweep(parent)
            while True:
                self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
                lock = _locked(self.path)
                if lock is not None:
                    break
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _drop, self.path, lock, os.getpid())

    @property
    def is_own(self) -> bool:
        """Whether this process made it, and not one of which it is a fork."""
        return self._owner == os.getpid()

    def close(self) -> None:
        """Remove the folder with all that is in it. Safe to call twice."""
        self._finalizer()


def _drop(path: str, lock: int, owner: int) -> None:
    # A forked child has a copy of this, and no right to what its parent uses.
    if owner != os.getpid():
        return
    try:
        with contextlib.suppress(OSError):
            remove(path)
    finally:
        os.close(lock)


def _locked(path: str) -> int | None:
    """Return the open and locked folder; ``None`` if whoever sweeps has it, or had it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.isdir(path)
    except BlockingIOError:
        mine = False
    except OSError:  # no locks on this file system
        mine = True
    if mine:
        return lock
    os.close(lock)
    return None


def _sweep(parent: str) -> None:
    with os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(_PREFIX):
                continue
            with contextlib.suppress(OSError):
                mine = entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                if not mine or not entry.is_dir(follow_symlinks=False) or is_locked(entry.path):
                    continue
                # Locked until it is gone, or its maker might come between.
                lock = _locked(entry.path)
                if lock is not None:
                    try:
                        remove(entry.path)
                    finally:
                        os.close(lock)
