"""Bodies in chunks, as the servers of the tests read them."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedIOBase

__all__ = ["EndedEarlyError", "read_chunks"]


class EndedEarlyError(ConnectionError):
    """Who sends a body has hung up; what came is not all."""


def read_chunks(stream: BufferedIOBase) -> Iterator[bytes]:
    """Yield the chunks of a body, and read its trailers (RFC 9112, section 7.1).

    Raises:
        EndedEarlyError: who sends it has hung up.
    """
    while size := _size(stream.readline()):
        yield stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass


def _size(line: bytes) -> int:
    if not line:
        raise EndedEarlyError("the body of a request ended early")
    return int(line.split(b";")[0], 16)
