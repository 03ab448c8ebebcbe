"""Locks that save work: of ten processes that want the same bytes, one fetches them.

Nothing rests on them. Whoever does not get one in time, or cannot lock at all, goes on without.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from storage import cancellation
from storage.cache.layout import Layout, listed

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["SourceLock", "gc_lock", "remove_stale"]

_FIRST_PAUSE = 0.02
_LAST_PAUSE = 0.25
# Seconds between two signs of life; waiting needs to see one in a minute.
_BEAT = 1.0
_GC_TIMEOUT = 10.0
# Seconds since the last use.
_STALE = 24 * 3600.0


class SourceLock:
    """The right to do what others would do again; a context manager.

    Threads of one process exclude each other like processes do. The file stays when the lock is
    given back; :func:`remove_stale` removes it.
    """

    def __init__(
        self,
        path: str,
        *,
        timeout: float,
        stall: float = 60.0,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        """Describe the lock; nothing is touched.

        Args:
            path: of its file. Folders above it are made.
            timeout: seconds to wait for it at most.
            stall: seconds to wait for a holder that gives no sign of life (:meth:`beat`).
            done: tells that another one has done it all; asked before each look at the lock.
        """
        self._path = path
        self._timeout = timeout
        self._stall = stall
        self._done = done
        self._lock: BaseFileLock | None = None
        self._beaten = 0.0

    @property
    def acquired(self) -> bool:
        """Whether this is the holder; if not, it goes on without the lock."""
        return self._lock is not None

    def __enter__(self) -> Self:
        # Here the folder may be read-only, and the file system without locks.
        with contextlib.suppress(OSError, NotImplementedError):
            self._wait()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                lock.release()

    def beat(self) -> None:
        """Tell those who wait that the work goes on. Cheap: call it as often as you like."""
        now = time.monotonic()
        if self._lock is not None and now - self._beaten >= _BEAT:
            self._beaten = now
            with contextlib.suppress(OSError):
                os.utime(self._path)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat from a thread of its own, during work that tells nothing until it is done."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(_BEAT):
                self.beat()

        thread = threading.Thread(target=beat, name="source-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _wait(self) -> None:
        from filelock import Timeout

        lock = _file_lock(self._path)
        began = changed = time.monotonic()
        seen: object = None
        pause = _FIRST_PAUSE
        while not self._done():
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                self._lock = lock
                self._beaten = time.monotonic() - _BEAT
                self.beat()
                return
            now = time.monotonic()
            # Only that it changes counts: the file system's clock may be any other than ours.
            if (state := _state(self._path)) != seen:
                seen, changed = state, now
            left = min(began + self._timeout, changed + self._stall) - now
            if left <= 0:
                return
            cancellation.pause(min(pause, left))
            pause = min(2 * pause, _LAST_PAUSE)


def gc_lock(root: str) -> SourceLock:
    """Return the lock under which a cache is tidied up, and things are held against that."""
    return SourceLock(os.path.join(Layout(root).locks, "gc"), timeout=_GC_TIMEOUT)


def remove_stale(folder: str, now: float | None = None) -> int:
    """Remove the files of locks that nobody has held for a day, and return how many.

    Whoever opened one of them before and gets its lock afterwards sees that the file has no
    name any more, and begins again with a new one.

    Args:
        folder: with files of locks; what is in folders below it stays.
        now: seconds since the epoch, if not the time of the call.
    """
    now = time.time() if now is None else now
    removed = 0
    for name in listed(folder):
        path = os.path.join(folder, name)
        # A lock that is held raises an OSError too.
        with contextlib.suppress(OSError, NotImplementedError):
            if not _is_stale(path, now):
                continue
            with _file_lock(path).acquire(timeout=0):
                if _is_stale(path, now):
                    os.unlink(path)
                    removed += 1
    return removed


def _file_lock(path: str) -> BaseFileLock:
    from filelock import FileLock  # takes longer to import than a hit in the cache

    # The other kind is a mere file, which a killed process leaves locked for ever.
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def _is_stale(path: str, now: float) -> bool:
    return now - os.lstat(path).st_mtime > _STALE


def _state(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
