"""Repeating what failed for a passing reason, the same way for every backend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage.errors import TransferError, TransientError, UnreachableError

__all__ = ["RetryPolicy"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and for how long, a step is tried.

    Waits grow exponentially with jitter from ``wait_initial`` to ``wait_max`` seconds; a
    store's Retry-After wins over them, unless it is longer than ``timeout``: then there is no
    further try. Only :class:`TransientError` is worth one.
    """

    attempts: int = 5
    """Tries in a row without a byte of progress; 1 means no retry."""

    timeout: float = 120.0
    """Seconds after which no further try is begun, counted from the last progress."""

    wait_initial: float = 0.2
    wait_max: float = 10.0

    def run(self, step: Callable[[], T], progressed: Callable[[], bool] | None = None) -> T:
        """Call ``step`` until it returns; it goes on where its last try stopped.

        Args:
            step: raises ``TransientError`` for what may be repeated.
            progressed: tells whether the last try got further than the ones before it, and
                forgets; progress refills the attempts, so that a long transfer over a bad
                link ends, while one that stands still fails.

        Raises:
            TransferError: the attempts are spent; from the last ``TransientError``.
        """
        # Most steps succeed at once, and do without the machinery of repeating.
        try:
            return step()
        except TransientError as exc:
            if exc.spent:
                raise
            failed: TransientError | None = exc

        def repeat() -> T:
            nonlocal failed
            if failed is not None:
                error, failed = failed, None
                raise error
            return step()

        while True:
            try:
                return self._until_progress(repeat, progressed)
            except _ProgressedError:
                continue

    def _until_progress(self, step: Callable[[], T], progressed: Callable[[], bool] | None) -> T:
        import stamina

        _silence("stamina")
        tried = 0
        try:
            for attempt in stamina.retry_context(
                on=self._wait_hint,
                attempts=self.attempts,
                timeout=self.timeout,
                wait_initial=self.wait_initial,
                wait_max=self.wait_max,
                wait_jitter=self.wait_initial,
            ):
                with attempt:
                    tried += 1
                    try:
                        return step()
                    except TransientError as exc:
                        if progressed is not None and exc.retry_after is None and progressed():
                            raise _ProgressedError from exc
                        raise
        except UnreachableError as exc:
            if exc.spent:
                raise
            error = _spent(UnreachableError, exc, tried)
            error.spent = True
            raise error from exc
        except TransientError as exc:
            raise _spent(TransferError, exc, tried) from exc
        raise AssertionError("a retry context ends by returning or raising")

    def _wait_hint(self, exc: Exception) -> bool | float:
        if not isinstance(exc, TransientError) or exc.spent:
            return False
        if exc.retry_after is None:
            return True
        # A store may ask for an hour; nobody waits longer than the caller allows.
        return exc.retry_after if exc.retry_after <= self.timeout else False


def _silence(name: str) -> None:
    """Keep a logger from printing to stderr in programs that never set logging up."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


class _ProgressedError(Exception):
    """The step failed, but later than before."""


_Error = TypeVar("_Error", bound=TransferError)


def _spent(kind: type[_Error], exc: TransientError, tried: int) -> _Error:
    times = "once" if tried == 1 else f"{tried} times"
    return kind(f"{exc} (tried {times})")
