"""Several who ask for one model at the same moment: threads or processes.

``python -m tests.cache.askers`` reads an :class:`Order` (JSON) from standard input and writes
the :class:`Answer` of each asker to standard output.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path
from typing import Any

import storage
from storage.client import StorageClient
from storage.config import S3Config
from storage.uri import parse_uri

__all__ = ["Answer", "Order", "ask_at_once", "hashes"]

_TIMEOUT = 900


@dataclass(frozen=True)
class Order:
    """What is asked for, and by whom."""

    how: str
    """``threads`` of one client; processes that were ``forked`` from one with a client, or
    ``forked after use`` of it; or ``spawned``: processes that began on their own."""

    uri: str
    config: Mapping[str, Any]
    dests: Sequence[str | None]
    """One for each asker."""

    other: str
    """A small model, to use the client for."""


@dataclass(frozen=True)
class Answer:
    """What one of them got."""

    pid: int
    path: str
    files: Mapping[str, str]
    """SHA-256 by path."""


def ask_at_once(order: Order, cache: Path) -> list[Answer]:
    """Let all ask for a model that they find in ``cache``, or put there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cache.askers"],
        input=json.dumps(asdict(order)),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"STORAGE_CACHE_DIR": str(cache)},
        cwd=Path(storage.__file__).parents[1],
        timeout=_TIMEOUT,
        check=True,
    )
    return [Answer(**answer) for answer in json.loads(done.stdout)]


def hashes(path: str) -> dict[str, str]:
    """Return the SHA-256 of the files at ``path``, by path; of a single one by ``""``."""

    def sha256(name: str) -> str:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if os.path.isfile(path):
        return {"": sha256(path)}
    return {
        os.path.relpath(os.path.join(folder, name), path): sha256(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    }


# -- their side ----------------------------------------------------------------------------

_client: StorageClient | None = None
_wait: Callable[[], object]


def _begin(wait: Callable[[], object]) -> None:
    global _wait
    _wait = wait


def _ask(order: Order, dest: str | None) -> Answer:
    client = StorageClient() if _client is None else _client
    # Nobody goes on before all are here, so nobody answers twice.
    _wait()
    cache = None if dest is None else True
    path = client.download(order.uri, dest, config=order.config, cache=cache)
    return Answer(os.getpid(), path, hashes(path))


def main() -> None:
    """Carry out an order."""
    global _client
    order = Order(**json.load(sys.stdin))
    count = len(order.dests)
    if order.how != "spawned":
        _client = client = StorageClient()
        # Imports what all need.
        client.backend(parse_uri(order.uri), S3Config(**order.config))
        if order.how == "forked after use":
            client.download(order.other, config=order.config)
    pool: Pool
    if order.how == "threads":
        pool = ThreadPool(count, _begin, (threading.Barrier(count).wait,))
    else:
        context = multiprocessing.get_context("spawn" if order.how == "spawned" else "fork")
        pool = context.Pool(count, _begin, (context.Barrier(count).wait,))
    with pool:
        answers = pool.starmap(_ask, [(order, dest) for dest in order.dests], chunksize=1)
        pool.close()
        pool.join()
    json.dump([asdict(answer) for answer in answers], sys.stdout)


if __name__ == "__main__":
    main()
