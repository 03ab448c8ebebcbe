"""An object as a file to write: spooled on local disk, stored as a whole when it is closed."""

from __future__ import annotations

import io
import tempfile
from types import TracebackType
from typing import BinaryIO, Self, cast

from storage.backends.base import Backend, BatchItem, file_payload
from storage.digest import MultiHasher
from storage.files import translate_os_errors
from storage.transfer import events
from storage.transfer.progress import Meter
from storage.transfer.retry import RetryPolicy
from storage.transfer.sending import send_item

__all__ = ["ObjectWriter", "open_writer"]


class ObjectWriter(io.BufferedIOBase):
    """A write-only file. Closing it stores the object; leaving ``with`` by an error does not."""

    def __init__(
        self, backend: Backend, key: str, retry: RetryPolicy, where: str, *, if_absent: bool
    ) -> None:
        """Open a spool file in the system's temporary folder."""
        super().__init__()
        self.name = where
        self._backend = backend
        self._key = key
        self._retry = retry
        self._if_absent = if_absent
        self._hasher = MultiHasher(("blake3", "sha256"))
        self._size = 0
        with translate_os_errors(tempfile.gettempdir()):
            self._spool = tempfile.NamedTemporaryFile(prefix="storage-")  # noqa: SIM115

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        if self.closed:
            raise ValueError(f"{self.name}: write to a closed file")
        view = memoryview(data).cast("B")
        with translate_os_errors(self._spool.name):
            self._spool.write(view)
        self._hasher.update(view)
        self._size += len(view)
        return len(view)

    def discard(self) -> None:
        """Close without storing anything."""
        self._spool.close()
        super().close()

    def close(self) -> None:
        """Store the object.

        Raises:
            ObjectExistsError: the file was opened with ``xb`` and the object exists.
        """
        if self.closed:
            return
        try:
            with translate_os_errors(self._spool.name):
                self._spool.flush()
            metadata = {name: digest.hex for name, digest in self._hasher.digests().items()}
            item = BatchItem(
                self._key,
                file_payload(self._spool.name, self._size),
                metadata if self._backend.capabilities.metadata else {},
            )
            with events.transfer("upload", self.name):
                meter = Meter("upload", self.name, self._size, 1, None)
                send_item(self._backend, item, self._retry, meter, if_absent=self._if_absent)
                meter.add_object()
        finally:
            self.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # An object that nobody closed was not finished: it is dropped, never stored.
        spool = getattr(self, "_spool", None)
        if spool is not None:
            spool.close()


def open_writer(
    backend: Backend, key: str, retry: RetryPolicy, where: str, *, if_absent: bool
) -> BinaryIO:
    """Return an :class:`ObjectWriter` for ``key``."""
    return cast("BinaryIO", ObjectWriter(backend, key, retry, where, if_absent=if_absent))
