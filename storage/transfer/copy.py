"""Objects from one store to another through this machine, in bounded memory, verified."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from storage import cancellation
from storage.backends.base import Backend, BatchItem, Body, Buffer, ObjectInfo, Payload
from storage.digest import Digest, MultiHasher
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ModelMissingError,
    StorageError,
    TransientError,
)
from storage.transfer.engine import TransferOptions
from storage.transfer.progress import Meter
from storage.transfer.reader import can_go_on, open_reader, whole_body
from storage.transfer.retry import RetryPolicy
from storage.transfer.sending import send_item
from storage.transfer.verify import algorithms_for, check_digests

__all__ = ["Source", "stream_copy"]

_BUFFER = 1024 * 1024


class Source:
    """An object of one store, ready to be written to another.

    Its bytes are hashed on their way. If they are not what its store says, or what is
    expected, the last read fails, so that no write of them ever completes.
    """

    def __init__(
        self,
        origin: Backend,
        info: ObjectInfo,
        *,
        where: str,
        retry: RetryPolicy,
        expected: Digest | None = None,
        pinned: bool = False,
        algorithm: str | None = None,
    ) -> None:
        """Look at the object once more: a listing does not tell all of it.

        Args:
            origin: where it is.
            info: the object, as listed.
            where: its URI, for messages.
            retry: how to repeat what fails.
            expected: digest that it must have.
            pinned: whether the version of ``info``, and no other, is wanted.
            algorithm: of a digest that is wanted of the bytes, for :attr:`found`.
        """
        try:
            self.info = retry.run(partial(origin.stat, info.key, info.version))
        except (AuthenticationError, ModelMissingError):
            # To name a version may take a permission of its own, and where no versions are kept
            # the one that was listed may have been replaced.
            if pinned or info.version is None:
                raise
            self.info = retry.run(partial(origin.stat, info.key))
        self._origin = origin
        self.where = where
        self._retry = retry
        self._expected = expected
        self._algorithm = algorithm
        self.found: dict[str, Digest] = {}
        """The digests of the bytes that were read last, when all of them were."""
        self._kept: tuple[Digest, ...] = ()
        if origin.capabilities.checksums and not (self.info.digests or self.info.hint):
            # Without them the object is what it would be in a store that keeps none.
            with contextlib.suppress(StorageError):
                self._kept = retry.run(partial(origin.checksums, self.info), where=where)

    def item(self, target: Backend, key: str) -> BatchItem:
        """Return what to write to ``key`` of ``target``."""
        metadata = dict(self.info.metadata)
        if target.capabilities.metadata:
            metadata |= {digest.algorithm: digest.hex for digest in self.info.digests}
        payload = Payload(self._open, self.info.size)
        return BatchItem(key, payload, metadata, self.info.content_type)

    def _open(self) -> io.BufferedReader:
        reader: io.RawIOBase | io.BufferedReader
        if not can_go_on(self.info):
            reader = _Arriving(whole_body(self._origin, self.info, self.where))
        else:
            reader = open_reader(self._origin, self.info, self._retry, self.where)
        return io.BufferedReader(_Checked(reader, self), _BUFFER)

    def verify(self, hasher: MultiHasher) -> None:
        """Compare the digests of all bytes with what they should be.

        Raises:
            IntegrityError: the bytes are wrong.
        """
        found: dict[str, Digest] = hasher.digests()
        doubt = check_digests(self.where, self.vouched, found, self._expected)
        if doubt is not None and self._origin.is_digest(self.info):
            raise IntegrityError(
                f"{self.where}: the store's ETag says {doubt}, the bytes that arrived are "
                f"{found[doubt.algorithm]}; nothing was written"
            )
        self.found = found

    def hasher(self) -> MultiHasher:
        """Return a hasher for what ``verify`` compares."""
        wanted = [] if self._expected is None else [self._expected.algorithm]
        if self._algorithm is not None:
            wanted.append(self._algorithm)
        return MultiHasher(algorithms_for(self.vouched, wanted))

    @property
    def vouched(self) -> ObjectInfo:
        """What the store says about the object, also when it is asked once more."""
        return replace(self.info, digests=self._kept) if self._kept else self.info


def stream_copy(
    source: Source,
    target: Backend,
    key: str,
    *,
    options: TransferOptions,
    meter: Meter,
    cancel: threading.Event | None = None,
    if_absent: bool = False,
) -> ObjectInfo:
    """Copy ``source`` to ``key`` of ``target``, with ``if_absent`` only if nothing is there.

    Raises:
        IntegrityError: the source's bytes are not what they should be.
        ObjectExistsError: ``if_absent``, and there is an object that is not this one.
    """
    item = source.item(target, key)
    return send_item(target, item, options.retry, meter, if_absent=if_absent, cancel=cancel)


class _Arriving(io.RawIOBase):
    """A body as it arrives: if it breaks, all of the write begins again."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._body = body
        self._chunks: Iterator[Buffer] = iter(body)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk).cast("B")
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._body.close()
        super().close()


class _Checked(io.RawIOBase):
    """Passes a stream on, and raises instead of ending if it was not the expected one."""

    def __init__(self, stream: io.RawIOBase | io.BufferedReader, source: Source) -> None:
        super().__init__()
        self._stream = stream
        self._source = source
        self._left = source.info.size
        self._verified = False
        self._hasher = source.hasher()
        # It may be read by threads that know nothing of the caller.
        self._token = cancellation.current()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        if self._token is not None:
            self._token.check()
        view = memoryview(buffer).cast("B")
        count = self._stream.readinto(view) or 0
        self._hasher.update(view[:count])
        if self._left is not None:
            self._left -= count
            if self._left < 0 or (self._left and not count and view):
                raise TransientError(
                    f"{self._source.where}: the store says {self._source.info.size} bytes, "
                    f"{'fewer' if self._left > 0 else 'more'} came"
                )
        # Where the size is known, before the last bytes are handed on: the writer must not
        # see the end of wrong ones.
        done = self._left == 0 if self._left is not None else count == 0 and len(view) > 0
        if done and not self._verified:
            self._verified = True
            self._source.verify(self._hasher)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
