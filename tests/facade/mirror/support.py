"""What the tests of mirrors share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

from storage import (
    MirrorResult,
    StorageOperations,
)
from tests.facade.stores import Store

MIB = 1024 * 1024
ENDS = ("seaweedfs-obstore", "azurite-obstore", "gcs-fsspec", "file")
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "odd name+%20#[1].bin": os.urandom(700),
    "sub/deep/weights.bin": os.urandom(300_000),
    "sub/vocab.txt": b"a\nb\n",
}


def mirror(source: Store, target: Store, **options: Any) -> MirrorResult:
    """Mirror the place of one store to that of another."""
    return StorageOperations.mirror(
        options.pop("src_uri", source.base),
        options.pop("dest_uri", target.base),
        config=source.config,
        dest_config=target.config,
        **options,
    )


def content(store: Store) -> dict[str, bytes]:
    """Return all that a store holds, read around the code under test."""
    paths = store.keys()
    return {path: store.get_raw(path) for path in paths}


def many(count: int, size: int = 300) -> dict[str, bytes]:
    return {f"part-{number % 5}/{number:04}.bin": os.urandom(size) for number in range(count)}


def counts(result: MirrorResult) -> tuple[int, int, int, int]:
    return result.copied, result.skipped, result.deleted, result.failed


def processes(method: str, number: int = 2) -> Callable[[], ProcessPoolExecutor]:
    context = multiprocessing.get_context(method)
    return partial(ProcessPoolExecutor, number, mp_context=context)


class Counting(ThreadPoolExecutor):
    """Threads that note how many batches there were at once, and how large they were."""

    def __init__(self) -> None:
        super().__init__(2)
        self.most = 0
        self.sizes: list[int] = []
        self._now: set[Future[Any]] = set()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sizes.append(len(args[0].items))
        future = super().submit(fn, *args, **kwargs)
        self._now = {one for one in self._now if not one.done()} | {future}
        self.most = max(self.most, len(self._now))
        return future
