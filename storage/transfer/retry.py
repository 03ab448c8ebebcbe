"""Repeating what failed for a passing reason, the same way for every backend."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage import cancellation
from storage.errors import (
    StorageError,
    TransferError,
    TransientError,
    UnreachableError,
    conceal_causes,
)
from storage.transfer import events

__all__ = ["RetryBudget", "RetryPolicy"]

T = TypeVar("T")

# Doubling further than this means nothing to any ``wait_max``.
_DOUBLINGS = 30


class RetryBudget:
    """How many more tries than successes all transfers of one client may make: a token bucket.

    A retry takes one, unless the try before it got further; whatever works gives one back, and
    time gives back one a second. Each transfer bounds its own tries already; this bounds all of
    them together, so that a store that is down is not stormed by a program with a thousand
    things to fetch.

    100 is what two waves of 16 connections need to outlast a pause of some seconds (each takes
    4 retries at most, 64 in all). While a share p of the tries fails, each success comes with
    p / (1 - p) retries: below one half the bucket fills faster than it empties, so a link that
    loses 30 % of thousands of requests never sees its end. A store that is down gets 100
    retries, and from then on one a second and the first try of each new call. With the second
    that a client gets back for nothing, an outage is forgotten after 100 seconds.
    """

    def __init__(self, size: int = 100, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin full.

        Args:
            size: retries that fit, at least 1.
            clock: gives the time in seconds.
        """
        self._size = size
        self._clock = clock
        self._left = float(size)
        self._seen = clock()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take one; tell whether there was one."""
        with self._lock:
            now = self._clock()
            self._left = min(self._size, self._left + now - self._seen)
            self._seen = now
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def give_back(self) -> None:
        """Put one back, if it fits."""
        with self._lock:
            self._left = min(self._size, self._left + 1)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and for how long, a step is tried.

    Waits grow exponentially from ``wait_initial`` to ``wait_max`` seconds, with jitter. A
    store's Retry-After wins over them, unless it is longer than ``timeout``: then there is no
    further try. Only :class:`TransientError` is worth one.
    """

    attempts: int = 5
    """Tries in a row without a byte of progress; 1 means no retry."""

    timeout: float = 120.0
    """Seconds after which no further try is begun, counted from the last progress."""

    wait_initial: float = 0.2
    wait_max: float = 10.0

    wait_throttled: float = 2.0
    """Seconds to wait at least for a store that is asked too often and does not say how long."""

    budget: RetryBudget | None = None
    """Bounds the retries of all who share it."""

    def run(
        self,
        step: Callable[[], T],
        progressed: Callable[[], bool] | None = None,
        *,
        where: str = "",
        cancel: threading.Event | None = None,
    ) -> T:
        """Call ``step`` until it returns; it goes on where its last try stopped.

        Args:
            step: raises ``TransientError`` for what may be repeated.
            progressed: tells whether the last try got further than the ones before it, and
                forgets; progress refills the attempts, so that a long transfer over a bad
                link ends, while one that stands still fails.
            where: what the step is about (a URI), for events.
            cancel: when it is set nobody wants the result any more: a wait ends at once.

        Raises:
            TransferError: there is no further try; from the last ``TransientError``, and with
                the reason if that is not the number of attempts.
        """
        began = time.monotonic()
        tried = 0
        while True:
            cancellation.check()
            tried += 1
            try:
                result = step()
            except TransientError as exc:
                conceal_causes(exc)
                if exc.spent:
                    raise
                error = exc
            except StorageError as exc:
                conceal_causes(exc)
                raise
            else:
                if self.budget is not None:
                    self.budget.give_back()
                return result
            # Nothing that was read hurries a store that asks to wait.
            asked = error.throttled or error.retry_after is not None
            if not asked and progressed is not None and progressed():
                events.attempt_failed(where, tried, error, 0.0)
                began, tried = time.monotonic(), 0
                continue
            delay = self._delay(tried, error)
            reason = self._why_not(tried, error, delay, time.monotonic() - began)
            if reason is None:
                events.attempt_failed(where, tried, error, delay)
                if not _interrupted(delay, cancel):
                    continue
                reason = "the transfer is over"
            events.gave_up(where, tried, error, reason)
            raise _spent(error, tried, reason) from error

    def _delay(self, tried: int, error: TransientError) -> float:
        """Return the seconds to wait before the next try."""
        doubled = 2.0 ** min(tried - 1, _DOUBLINGS)
        least = min(self.wait_max, self.wait_initial * doubled)
        if error.retry_after is not None:
            least = error.retry_after
        elif error.throttled:
            most = max(self.wait_max, self.wait_throttled)
            least = max(least, min(most, self.wait_throttled * doubled))
        # Sixteen connections that were refused together should not come back together.
        return least + random.uniform(0, self.wait_initial)

    def _why_not(self, tried: int, error: TransientError, delay: float, spent: float) -> str | None:
        """Return why there is no further try, empty if all are spent, ``None`` if there is one."""
        if tried >= self.attempts:
            return ""
        asked = error.retry_after
        if asked is not None and asked > self.timeout:
            return f"the store asks to wait {asked:.0f} s, more than the {self.timeout:g} s allowed"
        if spent + delay > self.timeout:
            why = "" if asked is None else f"the store asks to wait {asked:.0f} s, "
            return f"{why}no further try in the {self.timeout:g} s allowed"
        if self.budget is not None and not self.budget.take():
            return "the budget of retries is spent"
        return None


def _interrupted(delay: float, cancel: threading.Event | None) -> bool:
    """Wait; tell whether that ended early because nobody wants the result any more."""
    if cancel is not None:
        return cancel.wait(delay)
    cancellation.pause(delay)
    return False


def _spent(error: TransientError, tried: int, reason: str) -> TransferError:
    times = "once" if tried == 1 else f"{tried} times"
    text = f"{error} (tried {times}{'; ' if reason else ''}{reason})"
    if not isinstance(error, UnreachableError):
        return TransferError(text)
    unreachable = UnreachableError(text)
    unreachable.spent = True
    return unreachable
