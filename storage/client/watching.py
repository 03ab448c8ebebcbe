"""Telling a server of new versions of its model, each with a path of its own.

A look at the source is one request (one listing, for a tree). What changed is downloaded,
verified, and only then told; and only if the source did not change again meanwhile, so that no
tree is half old and half new. What was told before stays where it is until it is released.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import logging
import math
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from storage import cancellation
from storage.awaitable import run_blocking
from storage.cancellation import CancellationToken, OperationCancelledError, cancellable
from storage.client.arguments import local_path
from storage.client.versions import VersionFolders
from storage.client.watched import WatchedModel, WatchedSource
from storage.errors import (
    InvalidInput,
    ObjectChangedError,
    OfflineError,
    TransferError,
    UnsupportedOperation,
    one_line,
)

__all__ = ["OnChange", "OnError", "WatchOptions", "Watcher"]

OnChange = Callable[["WatchedModel"], Awaitable[object] | object]
OnError = Callable[[Exception], Awaitable[object] | object]

_log = logging.getLogger(__name__)

_TRIES = 3
# So that a thousand servers that started together do not ask together for ever.
_JITTER = 0.1
# How many intervals the longest wait after failures takes.
_BACKOFF = 10
_STOP = 10.0
_LOOK = 0.2


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """How a source is watched; see :class:`storage.ModelWatcher`."""

    interval: float = 60.0
    """Seconds between two looks."""

    dest: str | os.PathLike[str] | None = None
    """A folder for the versions; ``None`` for the cache."""

    initial: bool = True
    """Whether the first version is told, too."""

    current: str | os.PathLike[str] | None = None
    """Path of a version that need not be told."""

    settle: float = 0.0
    """Seconds for which a new version must stay as it is."""

    on_error: OnError | None = None
    """What is called with failures."""


class Watcher:
    """Watches one source; :class:`ModelWatcher` and the registry's watchers are of this kind.

    Either :meth:`start` it (or enter it by ``with`` or ``async with``): a thread then looks, and
    calls ``on_change``. Or iterate over :meth:`changes`. Or call :meth:`check` when it suits.

    A child that is forked has no such thread; it makes or starts a watcher of its own.
    """

    def __init__(
        self,
        name: str,
        source: WatchedSource,
        on_change: OnChange | None,
        options: WatchOptions,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            name: what is watched, for messages.
            source: where versions come from.
            on_change: what is called with each.
            options: how to go about it.

        Raises:
            InvalidInput: an argument is unusable.
        """
        finite = math.isfinite(options.interval) and math.isfinite(options.settle)
        if not finite or options.interval <= 0 or options.settle < 0:
            raise InvalidInput(
                f"{name}: an interval is more than 0 seconds, and settling takes none or more; "
                f"not {options.interval!r} and {options.settle!r}"
            )
        self._name = name
        self._source = source
        self._on_change = on_change
        self._options = options
        dest, current = options.dest, options.current
        self._folders = None if dest is None else VersionFolders(local_path(dest))
        self._known = None if current is None else os.path.realpath(current)
        self._current: WatchedModel | None = None
        self._pending: WatchedModel | None = None
        self._failures = 0
        self._renew()

    def _renew(self) -> None:
        self._pid = os.getpid()
        self._token = CancellationToken()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = threading.Lock()
        self._first = threading.Condition()
        self._iterating = False

    def _be_here(self) -> None:
        """Forget, in a forked child, the thread and the locks of the parent."""
        if self._pid != os.getpid():
            self._renew()

    # -- what there is -----------------------------------------------------------------------

    @property
    def current(self) -> WatchedModel | None:
        """The version that was told last, and whose ``on_change`` did not fail."""
        return self._current

    def wait(self, timeout: float | None = None) -> WatchedModel:
        """Return the first version, when it is there; for a server that cannot start without.

        Raises:
            TransferError: it was not there within ``timeout`` seconds.
        """
        self._be_here()
        with self._first:
            if not self._first.wait_for(lambda: self._current is not None, timeout):
                raise TransferError(
                    f"{self._name}: there was no model within {timeout:g} s; whatever was the "
                    "reason was told to on_error, or to the log"
                )
        assert self._current is not None
        return self._current

    # -- in a thread -------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to look, in a thread, and return the watcher. The first version is told at once.

        Called by a coroutine, it has an ``async`` function called by that event loop.

        Raises:
            InvalidInput: it was started before.
        """
        self._be_here()
        if self._thread is not None or self._iterating:
            raise InvalidInput(f"{self._name}: the watcher was started already")
        if self._on_change is None:
            raise InvalidInput(f"{self._name}: a watcher that is started needs on_change")
        if self._token.cancelled:
            self._token = CancellationToken()
        self._loop = None
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="storage-watch", daemon=True)
        self._thread.start()
        return self

    def stop(self, timeout: float = _STOP) -> None:
        """End the thread, and whatever it is downloading; the current version stays.

        Args:
            timeout: seconds to wait for it at most, where ``on_change`` takes long.
        """
        if self._pid != os.getpid():
            return
        self._token.cancel()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await run_blocking(self.stop)

    def _run(self) -> None:
        token = self._token
        with contextlib.suppress(OperationCancelledError):
            while not token.cancelled:
                self._look_and_tell()
                token.wait(self._delay())

    def _look_and_tell(self) -> None:
        try:
            model = self._find()
            if model is not None:
                assert self._on_change is not None
                self._call(self._on_change, model)
                self._accept(model)
        except Exception as exc:  # noqa: BLE001 -- whatever it is, the server goes on with its model
            self._failed(exc)

    # -- by hand, and by coroutines ------------------------------------------------------------

    def check(self) -> WatchedModel | None:
        """Look now; return a version that is not the current one, or ``None``.

        What is returned is the current one from now on. ``on_change`` is not called.

        Raises:
            StorageError: the store cannot be asked, or the model cannot be fetched.
        """
        self._be_here()
        if self._token.cancelled and self._thread is None and not self._iterating:
            self._token = CancellationToken()  # it was stopped
        model = self._find()
        if model is not None:
            self._accept(model)
        return model

    async def changes(self) -> AsyncIterator[WatchedModel]:
        """Yield the current version, and each one that follows, until :meth:`stop`.

        Failures are told to ``on_error``, or to the log, and it goes on.

        Raises:
            InvalidInput: the watcher was started, or is iterated over already.
        """
        self._be_here()
        if self._thread is not None or self._iterating:
            raise InvalidInput(f"{self._name}: the watcher was started already")
        self._iterating = True
        self._loop = asyncio.get_running_loop()
        if self._token.cancelled:
            self._token = CancellationToken()
        try:
            while not self._token.cancelled:
                model = None
                try:
                    model = await run_blocking(self._find)
                except OperationCancelledError:
                    return
                except Exception as exc:  # noqa: BLE001 -- as in a thread
                    await run_blocking(lambda error=exc: self._failed(error))  # type: ignore[misc]
                if model is not None:
                    self._accept(model)
                    yield model
                await self._sleep(self._delay())
        finally:
            self._iterating = False

    async def _sleep(self, seconds: float) -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(over.set)

        with self._token.calling(wake), contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), seconds)

    # -- looking -----------------------------------------------------------------------------

    def _find(self) -> WatchedModel | None:
        """Return a version, ready, that is not the current one."""
        with cancellation.also(self._token), self._turn:
            return self._obtain()

    def _obtain(self) -> WatchedModel | None:
        try:
            version = self._source.look()
        except TransferError as exc:
            if self._current is not None or self._pending is not None:
                raise
            return self._stand_in(exc)
        if version is not None:
            for told in (self._current, self._pending):
                if told is not None and told.version == version:
                    return self._still(told)
        model = self._fetch(version)
        for told in (self._current, self._pending):
            if told is not None and told.path == model.path:
                # The same content, as another version.
                told.version = model.version
                model.release()
                return self._still(told)
        if self._current is None and self._is_known(model):
            self._accept(model)
            return None
        return self._offered(model)

    def _still(self, told: WatchedModel) -> WatchedModel | None:
        """Return a version that is still there, if it has to be told again."""
        if told is self._pending:
            return told
        if self._pending is not None:
            self._pending.release()
        self._pending, self._failures = None, 0
        return None

    def _is_known(self, model: WatchedModel) -> bool:
        """Tell whether the first version need not be told."""
        return not self._options.initial or os.path.realpath(model.path) == self._known

    def _offered(self, model: WatchedModel) -> WatchedModel:
        """Take note that a version is about to be told."""
        if self._pending is not None:
            self._pending.release()
        model.previous, self._pending = self._current, model
        return model

    def _stand_in(self, error: TransferError) -> WatchedModel:
        """Return what the cache has, for a start while the store cannot be reached."""
        if self._folders is not None:
            raise error
        try:
            path = self._source.fetch(None, None, offline=True)
        except OfflineError:
            raise error from None
        self._failed(error)
        return self._offered(self._kept(path, None))

    def _fetch(self, version: str | None) -> WatchedModel:
        """Return what is there now; of one version, not of two."""
        for _ in range(_TRIES):
            if self._options.settle:
                cancellation.pause(min(self._options.settle, threading.TIMEOUT_MAX))
                before, version = version, self._source.look()
                if version != before:
                    continue
            try:
                model = self._bring(version)
            except ObjectChangedError:
                version = self._source.look()
                continue
            try:
                after = self._source.look()
            except BaseException:
                model.release()
                raise
            if after == version:
                return model
            model.release()
            version = after
        raise TransferError(
            f"{self._name} changed {_TRIES} times while it was being fetched; what was there "
            "before stays, and it is tried again"
        )

    def _bring(self, version: str | None) -> WatchedModel:
        folders = self._folders
        if folders is None:
            return self._kept(self._source.fetch(version, None), version)
        if version is None:
            raise UnsupportedOperation(
                f"{self._name}: the store does not tell one version from another; watch it "
                "without a destination, so that contents are compared in the cache"
            )
        held = folders.obtain(
            f"{self._source.identity} {version}", lambda dest: self._source.fetch(version, dest)
        )

        def release() -> None:
            held.release()
            folders.tidy()

        return WatchedModel(self._name, held.path, version, release)

    def _kept(self, path: str, version: str | None) -> WatchedModel:
        return WatchedModel(
            self._name, path, version, functools.partial(self._source.release, path)
        )

    def _accept(self, model: WatchedModel) -> None:
        """Make a version the current one."""
        if model.previous is not None:
            model.previous.previous = None
        with self._first:
            self._current, self._pending, self._failures = model, None, 0
            self._first.notify_all()
        if self._folders is not None:
            self._folders.tidy()

    # -- telling -----------------------------------------------------------------------------

    def _delay(self) -> float:
        """Return the seconds until the next look."""
        times = min(2.0 ** max(0, min(self._failures, 10) - 1), _BACKOFF)
        delay = self._options.interval * times * random.uniform(1 - _JITTER, 1 + _JITTER)
        return min(delay, threading.TIMEOUT_MAX)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._options.on_error is not None:
            try:
                self._call(self._options.on_error, error)
                return
            except Exception as exc:  # noqa: BLE001 -- there is nobody else to tell
                error = exc
        _log.warning("%s: %s: %s", self._name, type(error).__name__, one_line(error))

    def _call(self, function: Callable[[Any], object], argument: object) -> None:
        """Call a function; wait for what it returns, if that is to be awaited."""
        try:
            with cancellable(None):
                result = function(argument)
                if not inspect.isawaitable(result):
                    return None
                if self._loop is None:
                    asyncio.run(_finish(result))
                    return None
        except (asyncio.CancelledError, SystemExit, KeyboardInterrupt) as exc:
            # It would end the thread, and the server would never hear of a new version.
            raise TransferError(
                f"{self._name}: what was told of it ended by {type(exc).__name__}; the watcher "
                "goes on, and stop() ends it"
            ) from exc
        coroutine = _finish(result)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except BaseException:
            coroutine.close()
            raise
        while True:
            try:
                return future.result(_LOOK)
            except concurrent.futures.CancelledError as exc:
                raise TransferError(f"{self._name}: the event loop ended what it was told") from exc
            except TimeoutError:
                if future.done():
                    raise
                if self._token.cancelled or self._loop.is_closed():
                    future.cancel()
                    raise OperationCancelledError("the watcher was stopped") from None


async def _finish(result: Awaitable[object]) -> None:
    await result
