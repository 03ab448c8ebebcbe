"""Threads that work beside one another on the same stream of bytes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence

__all__ = ["PIECE", "Lanes", "Take", "usable_cores"]

PIECE = 2 * 1024 * 1024
"""Bytes that are handed over at once, at least. Every time costs a change of threads."""

# What waits for one thread: so many pieces, or as many small ones as make a piece together.
_WAITING = 4

Take = Callable[[Sequence[bytes | memoryview]], object]
"""Takes pieces that follow one another."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class _Lane:
    """A thread that takes pieces in their order; those who give them wait if it is behind."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._given: queue.Queue[Sequence[bytes | memoryview] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, pieces: Sequence[bytes | memoryview]) -> None:
        if self._error is not None:
            raise self._error
        self._given.put(pieces)

    def end(self) -> None:
        """Wait until everything is done, well or badly."""
        self._given.put(None)
        self._thread.join()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (pieces := self._given.get()) is not None:
            try:
                # After a failure the rest is only taken off, so that nobody waits for ever.
                if self._error is None:
                    self._take(pieces)
            except BaseException as exc:  # noqa: BLE001 -- raised again by whoever gives
                self._error = exc


class Lanes:
    """Several of them, each for all pieces; small pieces go together."""

    def __init__(self, *takes: Take) -> None:
        """Start a thread for each of ``takes``, which get all pieces in their order."""
        self._lanes = [_Lane(take) for take in takes]
        self._pieces: list[bytes | memoryview] = []
        self._waiting = 0
        self.size = 0
        """Bytes given so far."""

    def write(self, piece: bytes | memoryview) -> int:
        """Give the next bytes to all of them; return how many those are."""
        self._pieces.append(piece)
        self._waiting += len(piece)
        self.size += len(piece)
        if self._waiting >= PIECE:
            self._hand_over()
        return len(piece)

    def _hand_over(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        for lane in self._lanes:
            lane.give(pieces)

    def end(self, *, whole: bool) -> None:
        """Wait for all of them; if ``whole``, first hand over the rest, and raise what failed."""
        try:
            if whole:
                self._hand_over()
        finally:
            for lane in self._lanes:
                lane.end()
        if whole:
            for lane in self._lanes:
                lane.check()
