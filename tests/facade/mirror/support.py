"""What the tests of mirrors share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from storage import (
    MirrorResult,
    StorageOperations,
)
from storage.client.mirror.batch import Batch, ItemOutcome, run_batch
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


def die_midway(folder: str, after: int, batch: Batch) -> tuple[ItemOutcome, ...]:
    """Do a batch; the first process that comes when ``after`` are done dies over it.

    Args:
        folder: where all processes note what they did, and the dead one its own end.
        after: how many batches are done before.
        batch: of which the dead one does a part.
    """
    done = len(os.listdir(folder))
    if done >= after:
        with suppress(FileExistsError), open(f"{folder}/died", "x") as note:
            run_batch(replace(batch, name=f"{batch.name}-part", items=batch.items[:2]))
            note.write(f"{os.getpid()} {done}")
            note.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    outcomes = run_batch(batch)
    Path(folder, batch.name).touch()
    return outcomes


def wait_midway(folder: str, after: int, path: str, batch: Batch) -> tuple[ItemOutcome, ...]:
    """Do a batch; when ``after`` are done, in whatever order, not before a file is there.

    Args:
        folder: where all processes note what they did.
        after: how many batches are done before.
        path: of the file.
        batch: to be done.
    """
    deadline = time.monotonic() + 120
    while len(os.listdir(folder)) >= after and not os.path.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    outcomes = run_batch(batch)
    Path(folder, batch.name).touch()
    return outcomes


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
