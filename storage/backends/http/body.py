"""Bodies: one on its way up, counted and checked; one on its way down, decoded."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from storage.backends.base import ByteRange, Payload
from storage.backends.http.headers import last_part
from storage.digest import Digest, MultiHasher
from storage.errors import IntegrityError, StorageError, TransientError

__all__ = ["CODINGS", "Upload", "cut", "decoded", "no_page"]

_BLOCK = 256 * 1024
_DECODED = 1024 * 1024
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
CODINGS = tuple(_WINDOW_BITS)
"""Content codings that :func:`decoded` can undo."""


# Kinds of files of which none begins as a web page does.
_BINARY = re.compile(
    r"\.(?:7z|arrow|bin|bz2|ckpt|gguf|ggml|gz|h5|hdf5|joblib|json|keras|mar|mlmodel|msgpack|npy|npz"
    r"|onnx|ot|parquet|pb|pickle|pkl|pmml|pt|pth|safetensors|tar|tflite|tgz|wasm|whl|xz|ya?ml|zip"
    r"|zst)$",
    re.IGNORECASE,
)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


class Upload:
    """The blocks of a payload, for one request.

    The last block is held back until the stream has ended: a server that got all bytes that
    were announced would take a stream that goes on for a whole one.

    Attributes:
        total: bytes handed over.
        error: what the payload's own stream raised, which is no failure of the connection.
    """

    def __init__(
        self,
        payload: Payload,
        where: str,
        on_bytes: Callable[[int], object] | None,
        algorithm: str | None = None,
    ) -> None:
        """Open the payload; ``algorithm`` is that of ``digest``, if it is wanted."""
        self.total = 0
        self._hasher = MultiHasher((algorithm,) if algorithm is not None else ())
        self.error: BaseException | None = None
        self._announced = payload.size
        self._where = where
        self._on_bytes = on_bytes
        self._stream: BinaryIO = payload.open()

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._blocks()
        except GeneratorExit:
            raise
        except BaseException as exc:
            self.error = exc
            raise

    def _blocks(self) -> Iterator[bytes]:
        held = self._read()
        while held:
            following = self._read()
            total = self.total + len(held)
            if self._announced is not None and (
                total > self._announced or (not following and total != self._announced)
            ):
                raise self._wrong_size(total + len(following))
            yield held
            self._hasher.update(held)
            self.total = total
            if self._on_bytes is not None:
                self._on_bytes(len(held))
            held = following
        if self._announced is not None and self.total != self._announced:
            raise self._wrong_size(self.total)

    def _wrong_size(self, found: int) -> IntegrityError:
        return IntegrityError(
            f"{self._where}: {self._announced} bytes were announced and {found} came; the "
            "source changed while it was read; nothing was stored"
        )

    def _read(self) -> bytes:
        pieces = []
        missing = _BLOCK
        while missing and (piece := self._stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def digest(self) -> Digest | None:
        """Return the digest of what was sent, if it was wanted."""
        return next(iter(self._hasher.digests().values()), None)

    def rewind(self) -> None:
        """Take back what was counted; the body is sent again, by another one."""
        if self._on_bytes is not None and self.total:
            self._on_bytes(-self.total)
        self.total = 0

    def close(self) -> None:
        """Close the payload's stream."""
        self._stream.close()


def decoded(chunks: Iterable[bytes], coding: str, where: str) -> Iterator[bytes]:
    """Undo a content coding, in bounded memory.

    Raises:
        TransientError: the body is damaged, or ends early.
    """
    bits = _WINDOW_BITS[coding]
    decoder = zlib.decompressobj(bits)
    begun = False
    problem = None
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                if decoder.eof:
                    # A gzip file may have several members, one after the other.
                    decoder = zlib.decompressobj(bits)
                try:
                    data = decoder.decompress(rest, _DECODED)
                except zlib.error:
                    if begun or coding != "deflate":
                        raise
                    # Some servers leave out the frame that "deflate" ought to have.
                    bits = -15
                    decoder = zlib.decompressobj(bits)
                    data = decoder.decompress(rest, _DECODED)
                begun = True
                rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
                if data:
                    yield data
                while not decoder.eof and not rest and len(data) == _DECODED:
                    data = decoder.decompress(b"", _DECODED)
                    if data:
                        yield data
    except zlib.error as exc:
        problem = exc
    if problem is not None or (begun and not decoder.eof):
        raise TransientError(f"{where}: the body is no whole {coding} stream") from problem


def no_page(chunks: Iterable[bytes], key: str, where: str) -> Iterator[bytes]:
    """Pass a body that is announced as a web page on, unless it is one and the file is none.

    Raises:
        TransientError: it is.
    """
    first = _BINARY.search(last_part(key)) is not None
    for chunk in chunks:
        if first and _PAGE.match(chunk[:1024]):
            raise TransientError(
                f"{where}: the server sent a web page instead of the file, with the status of a "
                "success; it may be an error, or one for logging in: look at it"
            )
        first = False
        yield chunk


def cut(chunks: Iterable[bytes], span: ByteRange, where: str) -> Iterator[bytes]:
    """Yield ``span`` out of a whole body.

    Raises:
        StorageError: the body ends before the span does.
    """
    position = 0
    for chunk in chunks:
        part = chunk[max(0, span.start - position) : span.end - position]
        position += len(chunk)
        if part:
            yield part
        if position >= span.end:
            return
    raise StorageError(
        f"{where}: bytes {span.start} to {span.end} were asked for, and it has {position}"
    )
