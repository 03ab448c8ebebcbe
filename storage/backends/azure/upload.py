"""Uploads to Azure in blocks: bounded, parallel, one blob at the end or none."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Self

from storage.backends.azure.answers import classify_azure, quoted, translated
from storage.backends.azure.client import Connection, encoded, md5
from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_parts import run
from storage.backends.drivers.streams import part_sizes
from storage.errors import TransientError

__all__ = ["BlockUpload", "DamagedError", "Unfinished", "block_sizes"]

_MIB = 1024 * 1024
_SMALLEST_BLOCK = 4 * _MIB
_MAX_BLOCKS = 50_000
# Azure keeps blocks for a week; nobody retries for so long.
_LIFETIME = 3600.0
_MOST_UNFINISHED = 100


block_sizes = partial(part_sizes, smallest=_SMALLEST_BLOCK, most=_MAX_BLOCKS, double_after=10_000)
"""The sizes of the blocks of a blob of some size, out of some memory."""


class DamagedError(Exception):
    """A blob was made of other blocks than were named; it has this entity tag."""


class Blocks:
    """The blocks of one blob that Azure has and nobody has committed so far."""

    def __init__(self) -> None:
        """Begin without any."""
        # Two uploads of one blob at once must not take each other's blocks for their own.
        self.upload = secrets.token_hex(13)
        self.digests: dict[int, bytes] = {}
        """The MD5 of each, by its number."""
        self.begun = time.monotonic()

    def name(self, number: int) -> str:
        """Return the name of a block: all of a blob have names of one length, as obstore's."""
        return base64.b64encode(f"{self.upload}{number:06}".encode()).decode()


class Unfinished:
    """What failed uploads of this process left, for the next try of the same blob."""

    def __init__(self) -> None:
        """Begin without any."""
        self._lock = threading.Lock()
        self._blocks: dict[str, Blocks] = {}

    def take(self, key: str) -> Blocks:
        """Return the blocks that there are of a blob; nobody else gets them meanwhile."""
        with self._lock:
            found = self._blocks.pop(key, None)
        fresh = found is not None and time.monotonic() - found.begun < _LIFETIME
        return found if found is not None and fresh else Blocks()

    def keep(self, key: str, blocks: Blocks) -> None:
        """Remember the blocks of an upload that failed; the oldest ones are forgotten."""
        with self._lock:
            self._blocks[key] = blocks
            while len(self._blocks) > _MOST_UNFINISHED:
                del self._blocks[next(iter(self._blocks))]


class BlockUpload:
    """One blob on its way up in blocks. Leaving the block by an exception ends it.

    Nothing is seen of the blob before :meth:`complete`. Azure has no way to drop blocks that
    are never committed: they take up space until the next write of the same blob, or a week.
    The next try sends those alone that did not arrive, or differ.
    """

    def __init__(
        self,
        connection: Connection,
        container: str,
        key: str,
        options: OpenOptions,
        where: str,
        unfinished: Unfinished,
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        """Describe the upload.

        Args:
            connection: sends the requests.
            container: the blob's.
            key: the blob's.
            options: how many requests and bytes may be under way.
            where: the blob's URI, for messages.
            unfinished: what earlier tries left.
            on_bytes: called with the size of each block that has arrived.
        """
        self._connection = connection
        self._blob = (container, key)
        self._options = options
        self._where = where
        self._on_bytes = on_bytes
        self._unfinished = unfinished
        self._blocks = unfinished.take(key)
        self._pending: dict[Future[Any], int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._count = 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None:
            return
        run(self._connection, self._give_up())
        if isinstance(exc, TransientError):
            self._unfinished.keep(self._blob[1], self._blocks)

    def send(self, data: bytes) -> None:
        """Upload the next block, once there is room for it."""
        # Two more are in memory: this one, and the one that is read meanwhile.
        room = max(1, self._options.memory // len(data) - 2)
        self._collect(min(room, self._options.connections) - 1)
        put = self._tracked(self._put(self._count, data))
        self._count += 1
        future = asyncio.run_coroutine_threadsafe(put, self._connection.loop)
        self._pending[future] = len(data)
        # Meanwhile.
        self._md5.update(data)

    async def _put(self, number: int, data: bytes) -> None:
        digest = await md5(data)
        if self._blocks.digests.get(number) == digest:
            return
        query = {"comp": "block", "blockid": self._blocks.name(number)}
        headers = {"Content-MD5": encoded(digest)}
        await self._connection.put(*self._blob, headers, data, query)
        self._blocks.digests[number] = digest

    def complete(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Make one blob of the blocks; return the headers of the store's answer.

        Raises:
            DamagedError: the list of the blocks was damaged on its way.
        """
        self._collect(0)
        names = "".join(
            f"<Latest>{self._blocks.name(number)}</Latest>" for number in range(self._count)
        )
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{names}</BlockList>'.encode()
        headers = {
            **headers,
            "Content-Type": "application/xml",
            # Whoever downloads it can check it.
            "x-ms-blob-content-md5": encoded(self._md5.digest()),
        }
        with translated(self._where):
            try:
                answer = run(
                    self._connection,
                    self._connection.put(*self._blob, headers, body, {"comp": "blocklist"}),
                )
            except Exception as exc:
                if getattr(exc, "status_code", 0) != 400:
                    raise
                # Somebody wrote the blob meanwhile, which dropped ours; or it was damaged.
                self._blocks.digests.clear()
                raise TransientError(str(classify_azure(exc, self._where))) from exc
        # Of what came as the list.
        came = answer.get("content-md5")
        if came not in (None, encoded(hashlib.md5(body, usedforsecurity=False).digest())):
            raise DamagedError(quoted(answer.get("etag")))
        return answer

    def _collect(self, room: int) -> None:
        """Wait until at most ``room`` blocks are under way."""
        while len(self._pending) > room:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                size = self._pending.pop(future)
                with translated(self._where):
                    future.result()
                if self._on_bytes is not None:
                    self._on_bytes(size)

    async def _tracked(self, put: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await put
        finally:
            self._tasks.discard(task)

    async def _give_up(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
