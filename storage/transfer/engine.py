"""Many tasks over a few threads, within one budget of connections for the whole client."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from storage import cancellation
from storage.transfer.retry import RetryPolicy

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = [
    "LARGE_WRITE",
    "PART_GRANULE",
    "Budget",
    "CancelledError",
    "TransferOptions",
    "run_by_size",
    "run_tasks",
]

_MIB = 1024 * 1024
PART_GRANULE = 64 * 1024
"""Parts begin where memory can be mapped, on every system."""

LARGE_WRITE = 8 * _MIB
"""Bytes above which a backend writes an object in parts."""

Task = Callable[[threading.Event], None]

_FIRST_THREADS = 4
_LOOK = 0.05
# Bytes a second of one connection below which the network bounds it, and nothing here.
_SLOW = 16 * _MIB
_RAMP_LOOKS = 3
_RAMP_GAIN = 1.1
_RAMP_RETRY = 30
_NAP = 1.0
_TURN = 0.25


class CancelledError(Exception):
    """Another task of the same transfer failed; this one need not go on. Never seen outside."""


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How transfers go about it."""

    connections: int = 16
    """Requests under way at once, over all transfers of a client."""

    part_size: int = 32 * _MIB
    """Bytes of one ranged request, a multiple of ``PART_GRANULE``; less is one request."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)

    memory: int = 128 * _MIB
    """Bytes that uploads and copies may hold in flight."""


class Budget:
    """The connections that all transfers of one client share."""

    def __init__(self, connections: int) -> None:
        """Allow ``connections`` requests at once."""
        self.connections = connections
        self._slots = threading.BoundedSemaphore(connections)

    def __enter__(self) -> None:
        if cancellation.current() is None:
            self._slots.acquire()
        else:
            # Others may hold them for long.
            while not self._slots.acquire(timeout=_TURN):
                cancellation.check()

    def __exit__(self, *_: object) -> None:
        self._slots.release()


def run_tasks(
    tasks: Iterable[Task],
    budget: Budget,
    limit: int,
    moved: Callable[[], int] | None = None,
) -> None:
    """Run ``tasks`` on at most ``limit`` threads and wait for all of them.

    Tasks are taken one by one, in order, as threads become free. The first failure (or an
    interrupt of the calling thread) sets the event that every task is given, no further task
    begins, and when all have ended the failure is raised. So does work that is cancelled
    (:mod:`storage.cancellation`).

    Args:
        tasks: what to do.
        budget: connections shared with other transfers; each task holds one.
        limit: threads at most.
        moved: tells the bytes moved so far. Given for tasks that take long, it makes the
            threads begin as a few and double as long as that moves more bytes a second:
            beyond that point connections only fight over the processors. They double at once
            while each moves so little that it is the network that they wait for.
    """
    cancel = threading.Event()
    lock = threading.Lock()
    source: Iterator[Task] = iter(tasks)
    failures: list[BaseException] = []
    workers: list[threading.Thread] = []

    def work() -> None:
        workers.append(threading.current_thread())
        while not cancel.is_set():
            try:
                with lock:
                    task = next(source, None)
                if task is None:
                    return
                with budget:
                    if not cancel.is_set():
                        task(cancel)
            except CancelledError:
                return
            except BaseException as exc:  # noqa: BLE001 -- raised below, by the calling thread
                failures.append(exc)
                cancel.set()
                return

    threads = max(1, min(limit, budget.connections))
    with cancellation.linked(cancel):
        _run_work(work, threads, moved, cancel, workers)
    if failures:
        raise failures[0]
    cancellation.check()


def _run_work(
    work: Callable[[], None],
    threads: int,
    moved: Callable[[], int] | None,
    cancel: threading.Event,
    workers: list[threading.Thread],
) -> None:
    if threads == 1:
        work()
    else:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(threads, thread_name_prefix="storage")
        try:
            # What happens in a thread is told of the transfer (and the span) that began it.
            _run_threads(lambda: pool.submit(contextvars.copy_context().run, work), threads, moved)
        finally:
            # On an interrupt: let the threads stop at their next buffer.
            cancel.set()
            pool.shutdown()
            # The pool does not know a thread during whose start the interrupt came.
            for worker in workers:
                worker.join()


def run_by_size(tasks: Iterable[tuple[int | None, Task]], budget: Budget, memory: int) -> None:
    """Run tasks that each write one object, the large ones first.

    A backend sends a large object in parts, in parallel, within the memory for one write, so
    each of them is alone; small ones go together, as many as fit into that memory.

    Args:
        tasks: the size of each object, if known, and what writes it.
        budget: connections shared with other transfers.
        memory: bytes that may be in flight.
    """
    small = []
    largest = 0
    for size, task in tasks:
        if size is None or size > LARGE_WRITE:
            run_tasks([task], budget, 1)
        else:
            small.append(task)
            largest = max(largest, size)
    # A small object may be in memory whole, and once more while it is handed over.
    limit = memory // (2 * largest) if largest else len(small)
    if small:
        run_tasks(small, budget, max(1, min(limit, len(small))))


def _run_threads(
    start: Callable[[], Future[None]], threads: int, moved: Callable[[], int] | None
) -> None:
    from concurrent.futures import wait

    first = threads if moved is None else min(threads, _FIRST_THREADS)
    futures = [start() for _ in range(first)]
    if moved is not None:
        best = looks = 0
        seen = mark = moved()
        while len(futures) < threads:
            _, running = wait(futures, _LOOK)
            if not running:
                return
            looks += 1
            now = moved()
            # What waits for the network does not wait longer for more of its kind.
            more = now - seen < len(futures) * _SLOW * _LOOK
            seen = now
            if looks % _RAMP_LOOKS == 0:
                # After a plateau another try is due now and then: the link may have changed.
                more = more or now - mark > best * _RAMP_GAIN or looks >= _RAMP_RETRY
                best, mark = max(best, now - mark), now
            if more:
                looks, mark = 0, now
                futures += [start() for _ in range(min(len(futures), threads - len(futures)))]
    # An interrupt that comes just before a thread falls asleep does not wake it.
    while wait(futures, _NAP).not_done:
        pass
