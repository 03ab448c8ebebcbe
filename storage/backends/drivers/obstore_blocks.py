"""A payload on its way to obstore, in blocks of one part each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from storage.backends.drivers.streams import check_size, exactly

__all__ = ["Blocks", "md5", "read_apart"]


class Blocks:
    """A stream as blocks of one part each, counted as they are taken.

    Raises instead of ending if the stream is not of the announced size, so that no wrong
    object is completed.
    """

    def __init__(
        self,
        stream: BinaryIO,
        part_size: int,
        announced: int | None,
        where: str,
        on_bytes: Callable[[int], object] | None,
        hashed: int = 0,
    ) -> None:
        """Read ``stream``.

        Args:
            stream: the payload's.
            part_size: bytes of each block but the last one.
            announced: bytes that the payload announces.
            where: the object's URI, for messages.
            on_bytes: called with the size of each block that is taken.
            hashed: how many of the first blocks an MD5 is wanted of.
        """
        self._stream = stream
        self._announced = announced
        self._where = where
        self._on_bytes = on_bytes
        self._hashed = hashed
        self.part_size = part_size
        self.total = 0
        self.count = 0
        self.md5s: list[bytes] = []
        """Of the blocks that were taken, those wanted."""

    def __iter__(self) -> Iterator[bytes]:
        while block := exactly(self._stream, self.part_size):
            self.total += len(block)
            self.count += 1
            if self.count <= self._hashed:
                self.md5s.append(md5(block))
            yield block
            if self._on_bytes is not None:
                self._on_bytes(len(block))
        check_size(self._where, self._announced, self.total)


def read_apart(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield ``blocks``, each taken by a thread of its own.

    obstore asks for them where it may not be called again, and they may come from it too: a
    copy from one store to another.
    """
    source = iter(blocks)
    with ThreadPoolExecutor(1, thread_name_prefix="storage-read") as reader:
        while block := reader.submit(next, source, b"").result():
            yield block


def md5(data: bytes) -> bytes:
    """Return the MD5 of ``data``, which here stands against accidents only."""
    return hashlib.md5(data, usedforsecurity=False).digest()
