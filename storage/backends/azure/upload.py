"""Uploads to Azure in blocks: bounded, parallel, one blob at the end or none."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Self

from storage.backends.azure.answers import translated
from storage.backends.azure.client import Connection
from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_parts import run
from storage.backends.drivers.streams import part_sizes

__all__ = ["BlockUpload", "block_sizes"]

_MIB = 1024 * 1024
_SMALLEST_BLOCK = 4 * _MIB
_MAX_BLOCKS = 50_000


block_sizes = partial(part_sizes, smallest=_SMALLEST_BLOCK, most=_MAX_BLOCKS, double_after=10_000)
"""The sizes of the blocks of a blob of some size, out of some memory."""


class BlockUpload:
    """One blob on its way up in blocks. Leaving the block by an exception ends it.

    Nothing is seen of the blob before :meth:`complete`. Azure has no way to drop blocks that
    are never committed: they take up space until the next write of the same blob, or a week.
    """

    def __init__(
        self,
        connection: Connection,
        container: str,
        key: str,
        options: OpenOptions,
        where: str,
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        """Describe the upload.

        Args:
            connection: sends the requests.
            container: the blob's.
            key: the blob's.
            options: how many requests and bytes may be under way.
            where: the blob's URI, for messages.
            on_bytes: called with the size of each block that has arrived.
        """
        self._connection = connection
        self._blob = (container, key)
        self._options = options
        self._where = where
        self._on_bytes = on_bytes
        # Two uploads of one blob at once must not take each other's blocks for their own.
        self._upload = secrets.token_hex(13)
        self._pending: dict[Future[Any], int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._blocks = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is not None:
            run(self._connection, self._give_up())

    def _name(self, number: int) -> str:
        # 32 characters, as obstore's: all blocks of a blob have names of one length.
        return base64.b64encode(f"{self._upload}{number:06}".encode()).decode()

    def send(self, data: bytes) -> None:
        """Upload the next block, once there is room for it."""
        # Two more are in memory: this one, and the one that is read meanwhile.
        room = max(1, self._options.memory // len(data) - 2)
        self._collect(min(room, self._options.connections) - 1)
        query = {"comp": "block", "blockid": self._name(self._blocks)}
        self._blocks += 1
        put = self._tracked(self._connection.put(*self._blob, {}, data, query))
        future = asyncio.run_coroutine_threadsafe(put, self._connection.loop)
        self._pending[future] = len(data)

    def complete(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Make one blob of the blocks; return the headers of the store's answer."""
        self._collect(0)
        names = "".join(f"<Latest>{self._name(number)}</Latest>" for number in range(self._blocks))
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{names}</BlockList>'.encode()
        headers = {**headers, "Content-Type": "application/xml"}
        with translated(self._where):
            return run(
                self._connection,
                self._connection.put(*self._blob, headers, body, {"comp": "blocklist"}),
            )

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
