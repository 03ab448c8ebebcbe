"""What a transfer tells while it runs. Nothing is printed here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from storage.transfer import events

__all__ = ["Meter", "Progress", "ProgressCallback"]

_INTERVAL = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of one transfer at one moment."""

    operation: str
    """``download``, ``upload``, ``copy`` or ``mirror``."""

    uri: str
    """What is transferred, without credentials."""

    bytes_done: int
    """Bytes moved or found in place so far. May go back when an object has to start again."""

    bytes_total: int | None
    """Bytes in all; ``None`` where the store does not tell."""

    objects_done: int
    objects_total: int

    bytes_present: int
    """Of ``bytes_done``, those that were in place already and did not move."""

    seconds: float
    """Since the transfer began."""

    finished: bool
    """Whether this is the last event. It comes only after success."""

    @property
    def rate(self) -> float:
        """Bytes a second moved since the beginning."""
        return (self.bytes_done - self.bytes_present) / self.seconds if self.seconds else 0.0


ProgressCallback = Callable[[Progress], object]
"""Called from the threads of a transfer, one call at a time, about ten times a second."""


class Meter:
    """Adds up what the threads of one transfer report, and tells the caller now and then."""

    def __init__(
        self,
        operation: str,
        uri: str,
        bytes_total: int | None,
        objects_total: int,
        callback: ProgressCallback | None,
    ) -> None:
        """Begin at zero; the clock starts now."""
        self._operation = operation
        self._uri = uri
        self._bytes_total = bytes_total
        self._objects_total = objects_total
        self._callback = callback
        self._lock = threading.Lock()
        self._bytes = self._present = self._objects = 0
        self._began = time.monotonic()
        self._told = 0.0
        self._told_bytes = False
        events.watch(self)

    @property
    def objects(self) -> int:
        """Finished objects so far."""
        return self._objects

    @property
    def present(self) -> int:
        """Of the bytes counted so far, those that need not move."""
        return self._present

    def moved(self) -> int:
        """Return the bytes counted so far, those that were here already included."""
        return self._bytes

    def add_bytes(self, count: int) -> None:
        """Count bytes that arrived or left (negative: that have to move again)."""
        with self._lock:
            self._bytes += count
            self._tell()

    @contextmanager
    def attempt(self, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Give a function that counts bytes, to be called from any thread.

        If the attempt fails, its bytes are taken back: they have to move again. If it succeeds,
        those of ``total`` that were not counted did not have to move.
        """
        counted = 0
        lock = threading.Lock()

        def count(sent: int) -> None:
            nonlocal counted
            with lock:
                counted += sent
            self.add_bytes(sent)

        try:
            yield count
        except BaseException:
            self.add_bytes(-counted)
            raise
        if total is not None and counted < total:
            self.add_present(total - counted)

    def add_present(self, count: int) -> None:
        """Count bytes that need not move."""
        with self._lock:
            self._bytes += count
            self._present += count
            self._tell()

    def add(self, moved: int, present: int, objects: int) -> None:
        """Count what another process did: bytes that moved and that need not, and objects."""
        with self._lock:
            self._bytes += moved + present
            self._present += present
            self._objects += objects
            self._tell()

    def resize(self, old: int | None, new: int | None) -> None:
        """Take note that an object, replaced meanwhile, has ``new`` bytes instead of ``old``."""
        with self._lock:
            if self._bytes_total is None or old is None or new is None:
                self._bytes_total = None
            else:
                self._bytes_total += new - old

    def add_object(self) -> None:
        """Count a finished object."""
        with self._lock:
            self._objects += 1
            self._tell()

    def finish(self) -> None:
        """Send the last event."""
        with self._lock:
            self._tell(finished=True)

    def _tell(self, finished: bool = False) -> None:
        if self._callback is None:
            return
        now = time.monotonic()
        # The first bytes are always told, so that a caller sees that something moves.
        first_bytes = self._bytes != 0 and not self._told_bytes
        if not finished and not first_bytes and now - self._told < _INTERVAL:
            return
        self._told = now
        self._told_bytes = self._bytes != 0
        self._callback(
            Progress(
                self._operation,
                self._uri,
                self._bytes,
                self._bytes_total,
                self._objects,
                self._objects_total,
                self._present,
                now - self._began,
                finished,
            )
        )
