"""One object as a seekable file, read by ranges as they are asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

from storage.backends.base import Backend, Body, Buffer, ByteRange, ObjectInfo
from storage.backends.spool import spooled
from storage.errors import ObjectChangedError, TransientError
from storage.transfer.retry import RetryPolicy

__all__ = ["ObjectReader", "can_go_on", "open_reader", "whole_body"]

_BUFFER = 1024 * 1024
# A forward seek shorter than this reads on; a new request costs more.
_SKIP = 256 * 1024


class ObjectReader(io.RawIOBase):
    """A read-only, seekable, unbuffered file over an object.

    All bytes come from the version that was there when the file was opened; if it is replaced
    meanwhile, reading raises ``ObjectChangedError``. A request reads on until a seek leaves
    it, so sequential reading is one request. A broken one is repeated from its position.
    Not for use by several threads at once; each may have a :meth:`part` of its own.
    """

    def __init__(
        self,
        backend: Backend,
        info: ObjectInfo,
        retry: RetryPolicy,
        where: str,
        span: ByteRange | None = None,
    ) -> None:
        """Read the object that ``info`` (of ``backend.stat``) describes.

        Args:
            backend: where the object is.
            info: the object; its size must be known.
            retry: how to repeat failed reads.
            where: the object's URI, for messages.
            span: what of it the file is, and no request goes beyond; all of it when ``None``.
        """
        super().__init__()
        assert info.size is not None
        self.info = info
        self.name = where
        self._backend = backend
        self._first, self._end = (0, info.size) if span is None else (span.start, span.end)
        self._retry = retry
        self._position = self._first
        self._body: Body | None = None
        self._chunks: Iterator[Buffer] = iter(())
        self._body_position = 0
        self._rest = memoryview(b"")

    @property
    def pins_ranges(self) -> bool:
        """Whether a range can be read on its own, and only of the version that is open."""
        capabilities = self._backend.capabilities
        able = capabilities.ranged_read and capabilities.pinned_read
        return able and self.info.ranged and self.info.pin is not None

    def part(self, start: int, end: int) -> ObjectReader:
        """Return bytes ``start`` to ``end`` of the object as a file of their own.

        It is independent of this one, and of the same version.
        """
        span = ByteRange(start, end)
        return ObjectReader(self._backend, self.info, self._retry, self.name, span)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._first

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        bases = {io.SEEK_SET: self._first, io.SEEK_CUR: self._position, io.SEEK_END: self._end}
        position = bases[whence] + offset
        if position < self._first:
            wanted = position - self._first
            raise ValueError(f"{self.name}: cannot seek to {wanted}, before the start")
        self._position = position
        return self.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        if self._position >= self._end or not view:
            return 0
        self._retry.run(self._fill, where=self.name)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        self._body_position += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _fill(self) -> None:
        """Make the next bytes at the position available."""
        try:
            ahead = self._position - self._body_position
            if self._body is None or not 0 <= ahead <= _SKIP + len(self._rest):
                self._start()
            while self._body_position < self._position or not self._rest:
                if not self._rest:
                    chunk = next(self._chunks, None)
                    if chunk is None:
                        raise TransientError(
                            f"{self.name}: the body ended at {self._body_position} of {self._end}"
                        )
                    self._rest = memoryview(chunk).cast("B")
                    if self._body_position + len(self._rest) > self._end:
                        raise TransientError(
                            f"{self.name}: the store sent more than was asked for, up to byte "
                            f"{self._end}"
                        )
                skipped = min(len(self._rest), self._position - self._body_position)
                self._rest = self._rest[skipped:]
                self._body_position += skipped
        except TransientError:
            self._drop()
            raise

    def _start(self) -> None:
        self._drop()
        capabilities = self._backend.capabilities
        span = None
        if capabilities.ranged_read and self.info.ranged:
            span = ByteRange(self._position, self._end)
        pin = self.info if capabilities.pinned_read and self.info.pin is not None else None
        self._body = self._backend.read(self.info.key, span, pin)
        if self.info.differs_from(self._body.info):
            raise ObjectChangedError(f"{self.name} was replaced while it was being read")
        self._chunks = iter(self._body)
        self._body_position = self._position if span is not None else 0

    def _drop(self) -> None:
        body, self._body = self._body, None
        self._chunks = iter(())
        self._rest = memoryview(b"")
        if body is not None:
            body.close()


def can_go_on(info: ObjectInfo) -> bool:
    """Tell whether an :class:`ObjectReader` may read an object.

    Not where the size is unknown, for nobody can seek from its end; nor where a read that broke
    begins again without a pin, for what comes then may be of another version.
    """
    return info.size is not None and (info.ranged or info.pin is not None)


def open_reader(
    backend: Backend, info: ObjectInfo, retry: RetryPolicy, where: str
) -> io.BufferedReader:
    """Return an :class:`ObjectReader` behind a buffer of 1 MiB.

    An object for which it is not made is fetched to a temporary file first.
    """
    if not can_go_on(info):
        return retry.run(lambda: _fetched(backend, info, where), where=where)
    return io.BufferedReader(ObjectReader(backend, info, retry, where), _BUFFER)


def whole_body(backend: Backend, info: ObjectInfo, where: str) -> Body:
    """Begin to read all of an object that :func:`can_go_on` is not true of.

    Raises:
        ObjectChangedError: it is certainly not the one that ``info`` is about.
    """
    body = backend.read(info.key)
    if info.differs_from(body.info):
        body.close()
        raise ObjectChangedError(f"{where} was replaced before it was read")
    return body


def _fetched(backend: Backend, info: ObjectInfo, where: str) -> io.BufferedReader:
    file = spooled(whole_body(backend, info, where))
    found = os.fstat(file.fileno()).st_size
    if info.size in (None, found):
        return file
    file.close()
    raise TransientError(f"{where}: {info.size} bytes were announced and {found} came")
