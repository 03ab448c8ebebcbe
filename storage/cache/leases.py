"""Leases: which manifests and blobs the living processes use, so that nobody evicts them.

One file per process, ``leases/<owner>-<8 hex digits>``, to which lines are appended::

    m <manifest id>
    b <algorithm>:<hex>
    -m <manifest id>         released; the same for blobs

It holds what it names as long as its owner lives, or a child that was forked from it: they
share the lock of the file. A child that takes leases itself writes all that it inherited into
a file of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from storage.cache.layout import listed
from storage.cache.owners import Owner, may_live, new_name
from storage.files import is_locked

__all__ = ["Held", "Leases", "leases_of", "release_all"]

# Bytes of lines without effect after which a lease is written anew.
_MAX_WASTE = 1024 * 1024
# Seconds after which a lease that is asked for again is touched: for owners whom others cannot
# see, its age says whether it counts.
_REFRESH = 3600.0


@dataclass(frozen=True, slots=True)
class Held:
    """What the living processes use."""

    manifests: frozenset[str]
    """Ids of manifests."""

    blobs: frozenset[str]
    """Digests as ``<algorithm>:<hex>``."""


class Leases:
    """What this process uses of the cache below one root, and what all do.

    Construction touches nothing. Threads may share it, and a forked child may go on with it.
    """

    def __init__(self, root: str) -> None:
        """Keep leases in ``<root>/leases``, which is made when it is first needed."""
        self._folder = os.path.join(root, "leases")
        self._counts: Counter[str] = Counter()
        self._file: _LeaseFile | None = None
        self._discard: weakref.finalize[[], Leases] | None = None
        self._mutex = threading.Lock()
        _instances.add(self)

    def hold(self, manifests: Iterable[str] = (), blobs: Iterable[str] = ()) -> bool:
        """Protect manifests and blobs until they are released as often as they were held.

        Args:
            manifests: ids.
            blobs: digests as ``<algorithm>:<hex>``.

        Returns:
            Whether other processes can see it. They cannot if the cache is read-only or full.
        """
        return self._change([*map(_manifest_line, manifests), *map(_blob_line, blobs)], 1)

    def release(self, manifest: str) -> None:
        """Take back one :meth:`hold` of a manifest; one that is not held is fine."""
        self._change([_manifest_line(manifest)], -1)

    def release_blobs(self, blobs: Iterable[str]) -> None:
        """Take back one :meth:`hold` of each of ``blobs``; those not held are fine."""
        self._change([*map(_blob_line, blobs)], -1)

    def close(self) -> None:
        """Release everything; the end of the process does it too.

        What children got that were forked meanwhile stays protected until they end.
        """
        with self._mutex:
            self._counts.clear()
            self._file = None
            if self._discard is not None:
                self._discard()

    def held(self) -> Held:
        """Return what any living process holds, this one included."""
        with self._mutex:
            lines = set(self._counts)
        now = time.time()
        # A lease that is written anew meanwhile may be missed, its old file gone and its new one
        # still empty. If none came or went, all were read.
        seen = None
        while (names := sorted(listed(self._folder))) != seen:
            seen = names
            for name in names:
                if self._may_live(name, now):
                    lines |= _read(os.path.join(self._folder, name))
        return Held(
            frozenset(line[2:] for line in lines if line.startswith("m ")),
            frozenset(line[2:] for line in lines if line.startswith("b ")),
        )

    def remove_dead(self) -> int:
        """Remove the leases of dead processes, and return how many bytes that gave back."""
        now = time.time()
        freed = 0
        for name in listed(self._folder):
            if not self._may_live(name, now):
                path = os.path.join(self._folder, name)
                with contextlib.suppress(OSError):
                    size = os.lstat(path).st_size
                    os.unlink(path)
                    freed += size
        return freed

    def _may_live(self, name: str, now: float) -> bool:
        path = os.path.join(self._folder, name)
        return may_live(Owner.parse(name), path, lambda: _modified(path), now)

    def _change(self, lines: list[str], step: int) -> bool:
        with self._mutex:
            news = []
            for line in lines:
                before = self._counts[line]
                after = before + step
                if after < 0:
                    continue
                self._counts[line] = after
                if not after:
                    del self._counts[line]
                if not before or not after:
                    news.append(line if after else f"-{line}")
            return self._write(news)

    def _write(self, news: list[str]) -> bool:
        try:
            if self._file is not None and self._file.usable():
                self._file.append(news)
            elif self._counts or self._file is not None:
                self._renew()
        except OSError:
            return False
        if self._file is not None and self._file.waste > _MAX_WASTE:
            with contextlib.suppress(OSError):
                self._renew()
        return True

    def _renew(self) -> None:
        """Write all that is held to a new file, and only then discard the old one."""
        os.makedirs(self._folder, exist_ok=True)
        file = _LeaseFile(os.path.join(self._folder, new_name()), [*self._counts])
        old, self._discard = self._discard, weakref.finalize(self, file.discard)
        self._file = file
        if old is not None:
            old()


class _LeaseFile:
    """A lease of this process, open and locked."""

    def __init__(self, path: str, lines: list[str]) -> None:
        """Write ``lines`` to a new file.

        Raises:
            OSError: it cannot be written; nothing is left.
        """
        self.waste = 0
        self._path = path
        self._pid = os.getpid()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)
        self._whole = True
        self._touched = time.monotonic()
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self.append(lines)
        except BaseException:
            self.discard()
            raise

    def usable(self) -> bool:
        """Tell whether lines that are appended now will be seen by others."""
        return self._whole and self._pid == os.getpid() and self._is_open(1)

    def append(self, lines: list[str]) -> None:
        """Add ``lines``, in one piece.

        Raises:
            OSError: not all could be written; the file is not usable any more.
        """
        if not lines:
            if time.monotonic() - self._touched > _REFRESH:
                os.utime(self._descriptor)
                self._touched = time.monotonic()
            return
        self._whole = False
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        if os.write(self._descriptor, data) != len(data):
            raise OSError("a lease was written in part")
        self._whole = True
        self._touched = time.monotonic()
        self.waste += sum(2 * len(line) for line in lines if line.startswith("-"))

    def discard(self) -> None:
        """Close the file, and remove it unless children of this process need it."""
        if self._is_open(0):
            os.close(self._descriptor)
        if self._pid == os.getpid() and not is_locked(self._path):
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _is_open(self, names: int) -> bool:
        """Tell whether the descriptor still is this file, with at least so many names.

        Programs that become daemons close descriptors that are not theirs, and others open
        files under the same numbers.
        """
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity and status.st_nlink >= names


def _manifest_line(manifest: str) -> str:
    return f"m {manifest}"


def _blob_line(blob: str) -> str:
    return f"b {blob}"


def _read(path: str) -> set[str]:
    """Return the lines of a lease that hold.

    Raises:
        OSError: they cannot be read; nobody may take that for "nothing is in use".
    """
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.read().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return set()
    lines: set[str] = set()
    # What follows the last line end is a line that was not written to its end.
    for line in text.split("\n")[:-1]:
        if line.startswith("-"):
            lines.discard(line[1:])
        else:
            lines.add(line)
    return lines


def _modified(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def leases_of(root: str) -> Leases:
    """Return the leases of this process on the cache below ``root``, the same for all clients.

    What a client got may be in use long after the client is closed.
    """
    with _lock:
        return _by_root.setdefault(os.path.abspath(root), Leases(root))


def release_all() -> None:
    """Release everything that :func:`leases_of` gave for any cache."""
    for leases in list(_by_root.values()):
        leases.close()


_lock = threading.Lock()
_by_root: dict[str, Leases] = {}
_instances: weakref.WeakSet[Leases] = weakref.WeakSet()


def _after_fork() -> None:
    # The thread that held one does not exist in the child.
    global _lock
    _lock = threading.Lock()
    for leases in _instances:
        leases._mutex = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
