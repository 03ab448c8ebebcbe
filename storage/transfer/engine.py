"""Many tasks over a few threads, within one budget of connections for the whole client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from storage.transfer.retry import RetryPolicy

__all__ = ["Budget", "CancelledError", "TransferOptions", "run_tasks"]

_MIB = 1024 * 1024


class CancelledError(Exception):
    """Another task of the same transfer failed; this one need not go on. Never seen outside."""


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How transfers go about it."""

    connections: int = 16
    """Requests under way at once, over all transfers of a client."""

    part_size: int = 32 * _MIB
    """Bytes of one ranged request; a multiple of 1 MiB. Smaller objects are one request."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)

    durable: bool = False
    """Whether downloads are forced to disk before they are published."""


class Budget:
    """The connections that all transfers of one client share."""

    def __init__(self, connections: int) -> None:
        """Allow ``connections`` requests at once."""
        self.connections = connections
        self._slots = threading.BoundedSemaphore(connections)

    def __enter__(self) -> None:
        self._slots.acquire()

    def __exit__(self, *_: object) -> None:
        self._slots.release()


def run_tasks(
    tasks: Iterable[Callable[[threading.Event], None]], budget: Budget, limit: int
) -> None:
    """Run ``tasks`` on at most ``limit`` threads and wait for all of them.

    Tasks are taken one by one, in order, as threads become free. The first failure (or an
    interrupt of the calling thread) sets the event that every task is given, no further task
    begins, and when all have ended the failure is raised.
    """
    cancel = threading.Event()
    lock = threading.Lock()
    source: Iterator[Callable[[threading.Event], None]] = iter(tasks)
    failures: list[BaseException] = []

    def work() -> None:
        while not cancel.is_set():
            with lock:
                task = next(source, None)
            if task is None:
                return
            try:
                with budget:
                    if not cancel.is_set():
                        task(cancel)
            except CancelledError:
                return
            except BaseException as exc:
                failures.append(exc)
                cancel.set()
                return

    threads = max(1, min(limit, budget.connections))
    if threads == 1:
        work()
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="storage") as pool:
            futures = [pool.submit(work) for _ in range(threads)]
            try:
                wait(futures)
            finally:
                # On an interrupt: let the threads stop at their next buffer.
                cancel.set()
    if failures:
        raise failures[0]
