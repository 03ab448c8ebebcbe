"""The same for many items at once, with the results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from storage.transfer.engine import Budget, run_tasks

__all__ = ["map_parallel"]

T = TypeVar("T")
R = TypeVar("R")


def map_parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    threads: int = 8,
    budget: Budget | None = None,
) -> list[R]:
    """Return what ``function`` returns for each of ``items``, in their order.

    Args:
        function: called by several threads; the first exception ends the work and is raised.
        items: what it is called with.
        threads: at most.
        budget: connections shared with others, of which each call holds one.
    """
    results: dict[int, R] = {}

    def run(index: int, _: threading.Event) -> None:
        results[index] = function(items[index])

    tasks = [partial(run, index) for index in range(len(items))]
    threads = max(1, min(threads, len(items)))
    run_tasks(tasks, Budget(threads) if budget is None else budget, threads)
    return [results[index] for index in range(len(items))]
