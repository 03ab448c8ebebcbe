"""Blocking functions as awaitable ones, without a second implementation.

:func:`awaitable` makes ``async`` forms: they run the blocking function in a thread and wait for
it without blocking the event loop. The threads are the library's own, 32 at most, and the same
for all event loops of the process; further calls wait for their turn. The functions see the
context variables of their caller.

Cancelling the task that waits cancels the work (:mod:`storage.cancellation`). It ends at its
next look, with the next buffer for example, cleans up, and only then the task goes on with its
``CancelledError``. That waits :data:`PATIENCE` seconds at most: work that is stuck in a request
for longer ends and cleans up by itself, at the latest when the request times out. A task that is
cancelled twice does not wait.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from storage.cancellation import CancellationToken, cancellable

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

__all__ = ["PATIENCE", "THREADS", "awaitable", "awaitable_function", "run_blocking"]

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 32
"""Blocking functions that run at once, over all event loops of a process."""

PATIENCE = 5.0
"""Seconds that a cancelled task waits for its work to end."""


def awaitable(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return the ``async`` form of a method, for the body of the same class.

    ::

        adownload = awaitable(download)

    It calls the method by its name, so a subclass that overrides the one has changed both.
    """
    name = method.__name__

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await run_blocking(functools.partial(getattr(self, name), *args, **kwargs))

    return cast("Callable[P, Coroutine[Any, Any, T]]", _described(call, method))


def awaitable_function(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return the ``async`` form of a function, or of a static method in the body of its class."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await run_blocking(functools.partial(function, *args, **kwargs))

    return cast("Callable[P, Coroutine[Any, Any, T]]", _described(call, function))


def _described(call: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the ``async`` form the name, the signature and the documentation of its function."""
    functools.update_wrapper(call, function)
    owner, _, name = function.__qualname__.rpartition(".")
    call.__name__ = f"a{name}"
    call.__qualname__ = f"{owner}.a{name}" if owner else f"a{name}"
    call.__doc__ = (
        f"Await what :meth:`{name}` does, in a thread; cancelling ends it.\n\n"
        f"        {function.__doc__ or ''}"
    )
    return call


async def run_blocking(
    function: Callable[[], T], discard: Callable[[T], object] | None = None
) -> T:
    """Run ``function`` in a thread and return what it returns, or raise what it raises.

    Args:
        function: takes no argument.
        discard: called with a result that nobody waits for any more.

    Raises:
        asyncio.CancelledError: the task was cancelled, and the work with it.
    """
    import asyncio

    token = CancellationToken()

    def work() -> T:
        with cancellable(token):
            return function()

    running = _threads().submit(contextvars.copy_context().run, work)
    waiting = asyncio.wrap_future(running)
    try:
        await asyncio.wait((waiting,))
    except asyncio.CancelledError:
        token.cancel()
        if running.cancel():
            raise  # it had not begun
        if discard is not None:
            running.add_done_callback(functools.partial(_discard, discard))
        try:
            await asyncio.wait((waiting,), timeout=PATIENCE)
        finally:
            _forget(waiting)
        raise
    return waiting.result()


def _discard(discard: Callable[[T], object], ended: concurrent.futures.Future[T]) -> None:
    if ended.exception() is None:
        discard(ended.result())


def _forget(waiting: asyncio.Future[Any]) -> None:
    """Have nobody told of what nobody waits for."""
    if waiting.done() and not waiting.cancelled():
        waiting.exception()
    else:
        waiting.cancel()


_lock = threading.Lock()
_pool: concurrent.futures.ThreadPoolExecutor | None = None


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            from concurrent.futures import ThreadPoolExecutor

            _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="storage-await")
        return _pool


def _after_fork() -> None:
    # The threads do not exist in the child.
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)
