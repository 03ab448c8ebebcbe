"""A model as a stream of messages: the ``FileChunk`` of Scaleout's gRPC service.

The message has one field, ``bytes data = 1``. It is written and read here as Protocol Buffers
define it (https://protobuf.dev/programming-guides/encoding/), so neither ``protobuf`` nor
``grpcio`` is needed, and the bytes are those of the generated class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from storage.errors import InvalidInput

__all__ = ["CHUNK_SIZE", "FileChunk", "filechunk_data", "to_filechunks"]

CHUNK_SIZE = 1024 * 1024
"""Bytes of a model in one message. gRPC refuses messages of more than 4 MiB by default."""

_DATA = 1
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_LONGEST_VARINT = 10
_DEEPEST_GROUP = 100


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A piece of a file."""

    data: bytes = b""

    def SerializeToString(self) -> bytes:  # noqa: N802 -- what generated classes call it
        """Return the message as it goes over the wire."""
        if not self.data:
            return b""
        return b"".join((bytes([_DATA << 3 | _BYTES]), _varint(len(self.data)), self.data))

    @classmethod
    def FromString(cls, message: bytes) -> Self:  # noqa: N802 -- what generated classes call it
        """Return the message that came over the wire; unknown fields are passed over.

        Raises:
            InvalidInput: it is cut off, or no message at all.
        """
        wire = _Wire(message)
        data = b""
        while not wire.at_end:
            number, kind = wire.tag()
            if (number, kind) == (_DATA, _BYTES):
                data = wire.take(wire.varint())
            else:
                wire.skip(number, kind)
        return cls(data)


def to_filechunks(
    stream: BinaryIO,
    chunk_size: int = CHUNK_SIZE,
    message: Callable[..., Any] = FileChunk,
) -> Iterator[Any]:
    """Yield what ``stream`` holds as messages of ``chunk_size`` bytes; the last may be shorter.

    Args:
        stream: is read to its end, and not closed.
        chunk_size: bytes of data in a message.
        message: makes one, called with ``data=``; :class:`FileChunk` or a generated class.

    Raises:
        InvalidInput: ``chunk_size`` is not positive.
    """
    if chunk_size < 1:
        raise InvalidInput(f"chunk_size is {chunk_size}; expected at least 1 byte")
    return _messages(stream, chunk_size, message)


def _messages(stream: BinaryIO, chunk_size: int, message: Callable[..., Any]) -> Iterator[Any]:
    while data := stream.read(chunk_size):
        # A raw stream may give less than it was asked for.
        while len(data) < chunk_size and (more := stream.read(chunk_size - len(data))):
            data += more
        yield message(data=data)


def filechunk_data(chunks: Iterable[Any]) -> Iterator[bytes]:
    """Yield the data of ``chunks``, anything with ``data``, without the empty ones.

    Raises:
        InvalidInput: one has no bytes in ``data``.
    """
    for chunk in chunks:
        data = getattr(chunk, "data", None)
        if not isinstance(data, bytes):
            raise InvalidInput(
                f"a {type(chunk).__name__} came where a FileChunk was expected: a message with "
                "bytes in its field data"
            )
        if data:
            yield data


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class _Wire:
    """A message that is being read."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._message)

    def take(self, length: int) -> bytes:
        left = len(self._message) - self._at
        if length > left:
            raise InvalidInput(
                f"the FileChunk is cut off: {length} bytes were announced at byte {self._at}, "
                f"{left} are left"
            )
        self._at += length
        return self._message[self._at - length : self._at]

    def varint(self) -> int:
        value = 0
        for place in range(_LONGEST_VARINT):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
        raise self._malformed()

    def tag(self) -> tuple[int, int]:
        tag = self.varint()
        number = tag >> 3
        if not 0 < number < 1 << 29:
            raise self._malformed()
        return number, tag & 7

    def skip(self, number: int, kind: int, depth: int = 0) -> None:
        if kind == _VARINT:
            self.varint()
        elif kind == _FIXED64:
            self.take(8)
        elif kind == _FIXED32:
            self.take(4)
        elif kind == _BYTES:
            self.take(self.varint())
        elif kind == _GROUP and depth < _DEEPEST_GROUP:
            while (found := self.tag()) != (number, _GROUP_END):
                self.skip(*found, depth + 1)
        else:
            raise self._malformed()

    def _malformed(self) -> InvalidInput:
        return InvalidInput(f"no FileChunk: malformed before byte {self._at}")
