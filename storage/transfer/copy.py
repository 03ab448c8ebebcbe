"""An object from one store to another through this machine, in bounded memory, verified."""

from __future__ import annotations

import io

from storage.backends.base import Backend, ObjectInfo, Payload
from storage.digest import Digest, MultiHasher
from storage.errors import IntegrityError, InvalidInput
from storage.transfer.engine import TransferOptions
from storage.transfer.progress import Meter
from storage.transfer.reader import open_reader
from storage.transfer.verify import algorithms_for, check_digests

__all__ = ["stream_copy"]


def stream_copy(
    origin: Backend,
    info: ObjectInfo,
    target: Backend,
    key: str,
    *,
    where: str,
    options: TransferOptions,
    meter: Meter,
    expected: Digest | None = None,
) -> ObjectInfo:
    """Copy the object ``info`` of ``origin`` to ``key`` of ``target``.

    The bytes are hashed on their way. If they are not what the source's store says, or what
    is ``expected``, the last read fails, so that the write never completes.

    Raises:
        IntegrityError: the source's bytes are not what they should be.
    """
    if info.size is None:
        raise InvalidInput(f"{where}: its store does not tell the size; download it instead")
    retry = options.retry
    full = retry.run(lambda: origin.stat(info.key, info.version))
    metadata = dict(full.metadata)
    if target.capabilities.metadata:
        metadata |= {digest.algorithm: digest.hex for digest in full.digests}
    sent = 0

    def count(amount: int) -> None:
        nonlocal sent
        sent += amount
        meter.add_bytes(amount)

    def attempt() -> ObjectInfo:
        nonlocal sent
        meter.add_bytes(-sent)
        sent = 0

        def open_source() -> io.BufferedReader:
            reader = open_reader(origin, full, retry, where)
            return io.BufferedReader(_Checked(reader, origin, full, where, expected), 1024 * 1024)

        return target.write(
            key,
            Payload(open_source, full.size),
            metadata=metadata,
            content_type=full.content_type,
            on_bytes=count,
        )

    return retry.run(attempt)


class _Checked(io.RawIOBase):
    """Passes a stream on, and raises instead of ending if it was not the expected one."""

    def __init__(
        self,
        stream: io.BufferedReader,
        origin: Backend,
        info: ObjectInfo,
        where: str,
        expected: Digest | None,
    ) -> None:
        super().__init__()
        self._stream = stream
        self._origin = origin
        self._info = info
        self._where = where
        self._expected = expected
        self._left = info.size or 0
        self._verified = False
        wanted = () if expected is None else (expected.algorithm,)
        self._hasher = MultiHasher(algorithms_for(info, wanted))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        count = self._stream.readinto(view)
        self._hasher.update(view[:count])
        self._left -= count
        if self._left == 0 and not self._verified:
            self._verified = True
            self._verify()
        return count

    def _verify(self) -> None:
        # Before the last bytes are handed on: the writer must not see the end of wrong ones.
        found: dict[str, Digest] = self._hasher.digests()
        doubt = check_digests(self._where, self._info, found, self._expected)
        if doubt is not None and self._origin.is_digest(self._info):
            raise IntegrityError(
                f"{self._where}: the store's ETag says {doubt}, the bytes that arrived are "
                f"{found[doubt.algorithm]}; nothing was written"
            )

    def close(self) -> None:
        self._stream.close()
        super().close()
