"""HTTP/1.1 messages as they pass the proxy: heads kept as they are, bodies as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Self

__all__ = ["BLOCK", "Body", "Head", "ProtocolError", "read_head"]

BLOCK = 256 * 1024
"""Bytes read at once, and the longest head."""

# They concern one connection, not the message (RFC 9110, section 7.6.1).
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}
)


class ProtocolError(Exception):
    """What came is not HTTP/1.1."""


class Head:
    """The first line and the header fields of a message, bytes as they came."""

    def __init__(self, raw: bytes) -> None:
        """Take apart ``raw``, which ends with the empty line.

        Raises:
            ProtocolError: it is no head.
        """
        first, *lines = raw.lstrip(b"\r\n").removesuffix(b"\r\n\r\n").split(b"\r\n")
        self.words = first.decode("latin-1").split(" ", 2)
        if len(self.words) < 2:
            raise ProtocolError(f"no first line of a message: {first[:80]!r}")
        self.first = first
        self.fields = [(line.partition(b":")[0].decode("latin-1").lower(), line) for line in lines]

    def get(self, name: str) -> str | None:
        """Return the value of the first field ``name`` (lower case)."""
        for field, line in self.fields:
            if field == name:
                return line.partition(b":")[2].strip().decode("latin-1")
        return None

    def headers(self) -> dict[str, str]:
        """Return the fields by their names in lower case; of several, the last."""
        return {
            field: line.partition(b":")[2].strip().decode("latin-1") for field, line in self.fields
        }

    @property
    def chunked(self) -> bool:
        """Whether the body is in chunked coding."""
        return "chunked" in (self.get("transfer-encoding") or "").lower()

    @property
    def length(self) -> int | None:
        """The body's length if it is told and counts."""
        value = self.get("content-length")
        if value is None or self.chunked:
            return None
        if not value.isdigit():
            raise ProtocolError(f"no length of a body: {value[:80]!r}")
        return int(value)

    @property
    def keeps_alive(self) -> bool:
        """Whether the sender would use the connection again; the version says the default."""
        wish = (self.get("connection") or "").lower()
        version = self.words[0] if self.words[0].startswith("HTTP/") else self.words[-1]
        return "close" not in wish and (version == "HTTP/1.1" or "keep-alive" in wish)

    def encode(self, *more: str, without: Iterable[str] = ()) -> bytes:
        """Return the head to pass on: end-to-end fields only, and the lines ``more``."""
        left_out = _HOP_BY_HOP.union(without)
        lines = [self.first, *(line for field, line in self.fields if field not in left_out)]
        lines += [line.encode("latin-1") for line in more]
        return b"\r\n".join(lines) + b"\r\n\r\n"


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Return the next head, or ``None`` if the connection ended before it."""
    try:
        return Head(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.IncompleteReadError as exc:
        if exc.partial.strip():
            raise ProtocolError("the connection ended within a head") from exc
        return None
    except asyncio.LimitOverrunError as exc:
        raise ProtocolError("the head is too long") from exc


class Body:
    """The body of one message, read from its connection.

    Attributes:
        length: bytes, if told.
        chunked: whether it comes in chunked coding.
        trailers: the lines after the last chunk, once it is read.
    """

    def __init__(
        self, reader: asyncio.StreamReader, length: int | None, *, chunked: bool = False
    ) -> None:
        """Read ``length`` bytes, or chunks, or else up to the end of the connection."""
        self._reader = reader
        self.length = length
        self.chunked = chunked
        self.trailers = b""

    @classmethod
    def of_request(cls, head: Head, reader: asyncio.StreamReader) -> Self:
        """Return the body of a request; its length is 0 if it has none."""
        if head.chunked:
            return cls(reader, None, chunked=True)
        return cls(reader, head.length or 0)

    @classmethod
    def of_answer(cls, head: Head, method: str, reader: asyncio.StreamReader) -> Self:
        """Return the body of the answer to a request by ``method``."""
        if method == "HEAD" or head.words[1] in ("204", "304"):
            return cls(reader, 0)
        if head.chunked:
            return cls(reader, None, chunked=True)
        return cls(reader, head.length)

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return self.length == 0

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield it, block by block.

        Raises:
            asyncio.IncompleteReadError: the connection ended before the body.
        """
        if self.chunked:
            async for block in self._chunks():
                yield block
        elif self.length is not None:
            async for block in self._counted(self.length):
                yield block
        else:
            while block := await self._reader.read(BLOCK):
                yield block

    async def _counted(self, length: int) -> AsyncIterator[bytes]:
        while length:
            block = await self._reader.read(min(length, BLOCK))
            if not block:
                raise asyncio.IncompleteReadError(b"", length)
            length -= len(block)
            yield block

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := await self._chunk_size():
            async for block in self._counted(size):
                yield block
            await self._reader.readexactly(2)
        while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
            self.trailers += line

    async def _chunk_size(self) -> int:
        line = await self._reader.readuntil(b"\r\n")
        try:
            return int(line.split(b";")[0], 16)
        except ValueError as exc:
            raise ProtocolError(f"no size of a chunk: {line[:80]!r}") from exc
