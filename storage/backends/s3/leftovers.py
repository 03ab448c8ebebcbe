"""What uploads in parts that failed leave behind, and how it is removed.

A driver aborts what it gives up. Nothing remains to be done here unless the abort fails too, or
the answer that names the upload was lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta

from storage.backends.base import OpenOptions
from storage.backends.s3.signed import SignedClient
from storage.cancellation import cancellable
from storage.errors import StorageError, TransientError, one_line

__all__ = ["IsOurs", "Leftovers", "advice"]

IsOurs = Callable[[str, Mapping[int, str]], bool]
"""Told the id of an unfinished upload and the ETags of its parts by their numbers (no quotes
around them), says whether it can be the one that failed."""

_log = logging.getLogger(__name__)

# Seconds before each look. The look itself may meet the fault that the upload met, and the
# store may still be at work on the last part.
_LOOKS = (0.0, 0.3, 1.0, 2.0, 4.0)
_HASTE = 10.0
# Clocks of stores show whole seconds, and their answers take a while.
_SLACK = timedelta(seconds=3)


def advice(where: str, problem: BaseException) -> str:
    """Return what to tell the user of parts that could not be removed."""
    return (
        f"{where}: the parts of a failed upload could not be removed and may be charged for "
        f"({one_line(problem)}); a lifecycle rule of the bucket, AbortIncompleteMultipartUpload, "
        "removes them"
    )


@dataclass(slots=True)
class _UnderWay:
    """Uploads in parts of one key by this process."""

    since: float
    count: int = 0
    failed: list[IsOurs] = field(default_factory=list)


_under_way: dict[str, _UnderWay] = {}
# What could not be removed; the next upload of the same key tries again.
_owed: dict[str, _UnderWay] = {}
_cleaned: set[str] = set()
_changed = threading.Condition()


def _after_fork() -> None:
    # The threads that were at it, and may have held the lock, do not exist in the child.
    global _changed
    _changed = threading.Condition()
    _under_way.clear()
    _cleaned.clear()


os.register_at_fork(after_in_child=_after_fork)


class Leftovers:
    """Removes them from one bucket. Safe for threads."""

    def __init__(
        self, uri: str, client: Callable[[OpenOptions], SignedClient], options: OpenOptions
    ) -> None:
        """Describe the bucket.

        Args:
            uri: the bucket's, with a trailing slash.
            client: returns a client for it.
            options: time-outs; shorter ones are taken, for somebody waits.
        """
        self._uri = uri
        self._client = client
        self._options = replace(
            options,
            connect_timeout=min(options.connect_timeout, _HASTE),
            stall_timeout=min(options.stall_timeout, _HASTE),
        )

    @contextmanager
    def removed(self, key: str) -> Iterator[Callable[[IsOurs], None]]:
        """Return what an upload of ``key`` happens in.

        It gets a function to call if the upload fails in a way that may leave something behind.

        As long as others of this process are at the same key, one that is alive cannot be told
        from one that is not: the last one cleans up, for all of them.
        """
        name = f"{self._uri}{key}"
        with _changed:
            _changed.wait_for(lambda: name not in _cleaned)
            state = _under_way.get(name) or _owed.pop(name, None) or _UnderWay(time.monotonic())
            _under_way[name] = state
            state.count += 1
        try:
            yield state.failed.append
        finally:
            with _changed:
                state.count -= 1
                last = state.count == 0
                if last:
                    del _under_way[name]
                    _cleaned.add(name)
            if last:
                try:
                    if state.failed:
                        # Also for who was cancelled, and would be told so by what is read here.
                        with cancellable(None):
                            self._remove(key, state)
                finally:
                    with _changed:
                        _cleaned.discard(name)
                        _changed.notify_all()

    def _remove(self, key: str, state: _UnderWay) -> None:
        """End the uploads of ``key`` that began meanwhile and may be ours.

        Another process may be sending the same key. Its upload is left alone if it holds a part
        that is none of ours. If it holds none yet, or the same ones, it is ended, and that
        process has to begin again, as this library does by itself.
        """
        where = f"{self._uri}{key}"
        problem: StorageError | None = None
        for wait in _LOOKS:
            time.sleep(wait)
            try:
                left, ours = self._look(key, state)
                for upload in ours:
                    self._client(self._options).abort(key, upload)
                if not ours:
                    if left:
                        text = "%s: %d unfinished uploads that may be another writer's were left"
                        _log.warning(text, where, left)
                    return
                problem = None
            except TransientError as exc:
                problem = exc
            except StorageError as exc:
                problem = exc
                break
        if problem is not None:
            with _changed:
                _owed[where] = state
            _log.warning("%s", advice(where, problem))

    def _look(self, key: str, state: _UnderWay) -> tuple[int, list[str]]:
        """Return how many unfinished uploads began meanwhile, and the ids of those to end."""
        client = self._client(self._options)
        window = timedelta(seconds=time.monotonic() - state.since) + _SLACK
        left = [one.upload for one in client.pending(key) if one.age <= window]
        ours = []
        for upload in left:
            etags = {part.number: part.etag.strip('"') for part in client.parts(key, upload)}
            # The file may be gone that an earlier one was of.
            with suppress(OSError):
                if any(is_ours(upload, etags) for is_ours in state.failed):
                    ours.append(upload)
        return len(left), ours
