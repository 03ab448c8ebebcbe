"""Folders with a version of a model each, below one folder, for as long as somebody uses them.

A version in use is locked, shared, by every process that uses it: the lock (``flock``) of its
folder ends with the process. What is not locked goes when somebody tidies up: whoever releases a
version, or begins to use another. Where folders cannot be locked, nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable

from storage import cancellation
from storage.errors import DestinationError
from storage.files import remove, shown, translate_os_errors

__all__ = ["HeldVersion", "VersionFolders"]

_NAME = re.compile(r"v-[0-9a-f]{16}")
_REMOVED = re.compile(r"\.v-[0-9a-f]{16}\.[0-9a-f]{16}\.removed")
_TRIES = 10
_PAUSE = 0.05


class HeldVersion:
    """A version that stays until it is released, or the process ends."""

    def __init__(self, path: str, descriptor: int) -> None:
        """Keep what locks it."""
        self.path = path
        """Of the file, or of the tree."""
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let it be removed, by whoever tidies up; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class VersionFolders:
    """The versions below one folder. Several processes may share it."""

    def __init__(self, root: str) -> None:
        """Use ``root``, which is made when it is first needed."""
        self._root = os.path.abspath(root)

    def obtain(self, version: str, fetch: Callable[[str], str]) -> HeldVersion:
        """Return a version, held, after it was put there.

        Args:
            version: what tells it from others.
            fetch: called with the path of a folder; puts the version there, unless it is there
                already, and returns the path of its file or tree.

        Raises:
            DestinationError: the folder cannot be written, or is removed again and again.
        """
        folder = os.path.join(self._root, f"v-{hashlib.sha256(version.encode()).hexdigest()[:16]}")
        for tries in range(_TRIES):
            cancellation.check()
            path = fetch(os.path.join(folder, ""))
            with translate_os_errors(folder):
                descriptor = _hold(folder)
            if descriptor is not None:
                return HeldVersion(path, descriptor)
            cancellation.pause(_PAUSE * (tries + 1))
        raise DestinationError(
            f"{shown(folder)} was removed {_TRIES} times right after a model was put there; "
            "something else tidies up in that folder; name another one"
        )

    def tidy(self) -> None:
        """Remove the versions that nobody uses; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._root):
                path = os.path.join(self._root, name)
                if _REMOVED.fullmatch(name):
                    remove(path)
                elif _NAME.fullmatch(name):
                    self._remove(path)

    def _remove(self, folder: str) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever opened it meanwhile sees that it has another name.
                name = f".{os.path.basename(folder)}.{os.urandom(8).hex()}.removed"
                gone = os.path.join(self._root, name)
                os.rename(folder, gone)
                remove(gone)
            finally:
                os.close(descriptor)


def _hold(folder: str) -> int | None:
    """Open and lock a folder; ``None`` if somebody removes it just now, or has done so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    held = False
    try:
        held = _lock(descriptor) and _is(descriptor, folder)
    except FileNotFoundError:
        pass
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None


def _lock(descriptor: int) -> bool:
    """Lock a folder, shared; tell whether nobody removes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Where nothing can be locked, nothing is removed either.
        return True
    return True


def _is(descriptor: int, path: str) -> bool:
    """Tell whether an open folder is the one at ``path``."""
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
