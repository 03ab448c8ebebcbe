"""Ending work that nobody waits for any more, from outside of it.

Whoever starts work in a thread opens a scope for it, :func:`cancellable`, with a token. The work,
and whatever threads it starts with a copy of its context, looks at the token now and then; in
the library that is done between the buffers of a transfer, before each try of a request, and
while something is waited for. Without a token nothing is ever cancelled, and looking costs next
to nothing.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "CancellationToken",
    "OperationCancelledError",
    "also",
    "cancellable",
    "check",
    "current",
    "linked",
    "pause",
]


class OperationCancelledError(BaseException):
    """The work was cancelled by whoever started it.

    Like ``KeyboardInterrupt`` this is no ``Exception``: it is not the failure of a source, for
    which another one could stand in.
    """


class CancellationToken:
    """Says whether some work is still wanted. Safe for many threads."""

    def __init__(self) -> None:
        """Begin as not cancelled."""
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        _tokens.add(self)

    @property
    def cancelled(self) -> bool:
        """Whether the work should end."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Ask the work to end; returns at once."""
        with self._lock:
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def check(self) -> None:
        """Do nothing, unless the work should end.

        Raises:
            OperationCancelledError: it should.
        """
        if self._event.is_set():
            raise OperationCancelledError("cancelled by the caller")

    def wait(self, seconds: float) -> bool:
        """Wait until the work should end, at most so long; tell whether it should."""
        return self._event.wait(seconds)

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call ``callback`` as soon as the work should end, once, as long as the block lasts.

        It must not wait for anything.
        """
        with self._lock:
            late = self.cancelled
            if not late:
                self._callbacks.append(callback)
        if late:
            callback()
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)


_tokens: weakref.WeakSet[CancellationToken] = weakref.WeakSet()
_current: ContextVar[CancellationToken | None] = ContextVar("storage_cancellation", default=None)


def current() -> CancellationToken | None:
    """Return the token of the work that this is a part of."""
    return _current.get()


@contextmanager
def cancellable(token: CancellationToken | None) -> Iterator[None]:
    """Make what runs in the block, and what it starts, end when ``token`` says so.

    With ``None`` nothing ends it, whatever it is a part of.
    """
    before = _current.set(token)
    try:
        yield
    finally:
        _current.reset(before)


@contextmanager
def also(token: CancellationToken) -> Iterator[None]:
    """Make what runs in the block end when ``token`` says so, or whoever started this."""
    outer, both = _current.get(), CancellationToken()
    with token.calling(both.cancel), cancellable(both):
        if outer is None:
            yield
            return
        with outer.calling(both.cancel):
            yield


def check() -> None:
    """Do nothing, unless the work that this is a part of should end.

    Raises:
        OperationCancelledError: it should.
    """
    token = _current.get()
    if token is not None:
        token.check()


def pause(seconds: float) -> None:
    """Sleep.

    Raises:
        OperationCancelledError: the work that this is a part of should end.
    """
    token = _current.get()
    if token is None:
        time.sleep(seconds)
    elif token.wait(seconds):
        token.check()


@contextmanager
def linked(event: threading.Event) -> Iterator[None]:
    """Set ``event`` as soon as the work that this is a part of should end."""
    token = _current.get()
    if token is None:
        yield
        return
    with token.calling(event.set):
        yield


def _after_fork() -> None:
    # The thread that held it does not exist in the child.
    for token in _tokens:
        token._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
