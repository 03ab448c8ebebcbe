"""How a process ends, and how it doubles: SIGTERM as an exception, and what forks give up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Protocol

__all__ = ["ended_by_signal", "forget_in_child"]


@contextlib.contextmanager
def ended_by_signal(error: type[BaseException]) -> Iterator[None]:
    """Let SIGTERM raise ``error`` in the main thread, once; do nothing on another thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise error

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Forgetful(Protocol):
    def forget(self) -> None:
        """Give up what threads of the parent may hold: they do not exist in the child."""


_forgetful: weakref.WeakSet[_Forgetful] = weakref.WeakSet()


def forget_in_child(thing: _Forgetful) -> None:
    """Let ``thing`` forget in every child that is forked as long as it lives."""
    _forgetful.add(thing)


def _after_fork() -> None:
    for thing in _forgetful:
        thing.forget()


os.register_at_fork(after_in_child=_after_fork)
