"""Batches under way on an executor, whichever it is, and what becomes of those that it loses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    wait,
)
from typing import Self

from storage import cancellation
from storage.client.mirror.batch import Batch, ItemOutcome, run_batch
from storage.errors import TransferError

__all__ = ["TRIES", "AnyExecutor", "Crew", "GoneError"]

AnyExecutor = Executor | Callable[[], Executor]
"""Who does the batches: an executor, or what makes one, and another one if that breaks."""

TRIES = 4
"""How often a batch is given out, if nobody brings its result."""

_NAP = 1.0


class GoneError(Exception):
    """An executor takes no more work."""


class Crew:
    """The batches that an executor has, and another executor where it breaks."""

    def __init__(self, executor: AnyExecutor) -> None:
        """Take an executor, or what makes one; it is made when the first batch comes."""
        self._make = None if isinstance(executor, Executor) else executor
        self._executor = executor if isinstance(executor, Executor) else None
        self._running: dict[Future[tuple[ItemOutcome, ...]], tuple[Batch, Executor]] = {}
        self._tries: dict[str, int] = {}
        # Why there is no executor any more.
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # After an error: what has not begun need not begin.
        for future in self._running:
            future.cancel()
        if self._make is not None and self._executor is not None:
            self._executor.shutdown()

    @property
    def running(self) -> int:
        """Batches that were given out, and whose end nobody has seen yet."""
        return len(self._running)

    def submit(self, batch: Batch) -> None:
        """Give a batch out.

        Raises:
            GoneError: nobody takes it.
        """
        for _ in range(TRIES):
            if self._executor is None:
                if self._make is None:
                    break
                self._executor = self._make()
            try:
                future = self._executor.submit(run_batch, batch)
            except Exception as exc:  # noqa: BLE001 -- whatever an executor raises
                self._error = exc
                self._drop(self._executor)
            else:
                self._running[future] = batch, self._executor
                return
        raise GoneError(f"{type(self._error).__name__}: {self._error}") from self._error

    def finished(
        self,
    ) -> Iterator[tuple[Batch, tuple[ItemOutcome, ...], BaseException | None]]:
        """Wait for batches to end; yield each with its outcomes, or what came instead of them."""
        cancellation.check()
        while not (done := wait(self._running, _NAP, FIRST_COMPLETED).done):
            cancellation.check()
            lost = [future for future, (_, by) in self._running.items() if _is_closed(by)]
            for future in lost:
                batch, executor = self._running.pop(future)
                future.cancel()
                self._drop(executor)
                self._count(batch)
                self._error = TransferError("the executor's client was closed")
                yield batch, (), self._error
            if lost:
                return
        for future in done:
            batch, executor = self._running.pop(future)
            self._count(batch)
            try:
                outcomes, error = future.result(), None
            except Exception as exc:  # noqa: BLE001 -- whatever an executor raises
                outcomes, error = (), exc
                if isinstance(exc, BrokenExecutor):
                    self._error = exc
                    self._drop(executor)
            else:
                del self._tries[batch.name]
            yield batch, outcomes, error

    def _count(self, batch: Batch) -> None:
        self._tries[batch.name] = self._tries.get(batch.name, 0) + 1

    def tried(self, batch: Batch) -> int:
        """Return how often a batch was given out in vain."""
        return self._tries[batch.name]

    def replace(self, batch: Batch, again: Batch) -> None:
        """Let ``again`` count as further tries of ``batch``."""
        self._tries[again.name] = self._tries.pop(batch.name)

    def _drop(self, executor: Executor) -> None:
        if executor is self._executor:
            self._executor = None
            if self._make is not None:
                # It is broken, in whatever way.
                with contextlib.suppress(Exception):
                    executor.shutdown(wait=False)


def _is_closed(executor: Executor) -> bool:
    """Tell whether this is the executor of a Dask client that was closed, or lost its cluster.

    Then some of its futures never end: whoever should end them fails by fetching their results.
    """
    return getattr(getattr(executor, "_client", None), "status", None) == "closed"
