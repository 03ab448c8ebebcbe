"""Google Cloud Storage through obstore: what is its own beside the driver of all three stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from storage.backends.base import (
    Backend,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
)
from storage.backends.drivers.obstore import ObstoreBackend
from storage.backends.drivers.obstore_errors import fits_header
from storage.backends.gcs.answers import from_code
from storage.backends.gcs.sign import Signer
from storage.errors import (
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    TransientError,
)

__all__ = ["GcsObstoreBackend"]

# The store copies what does not move to another place or class at once, whatever its size. What
# does may take longer than one request may; the second driver copies that in steps.
_COPY_LIMIT = 1024**3


class GcsObstoreBackend(ObstoreBackend):
    """One bucket through obstore; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        bucket: str,
        arguments: Callable[[], dict[str, Any]],
        options: OpenOptions,
        second: Callable[[], Backend],
        signer: Signer,
        *,
        reads_only: bool,
    ) -> None:
        """Describe the bucket; nothing is opened yet.

        Args:
            bucket: its name.
            arguments: returns those of ``obstore.store.GCSStore``.
            options: how to talk to the store.
            second: returns the second driver for the same bucket.
            signer: makes presigned URLs.
            reads_only: whether the second driver makes all changes.
        """
        capabilities = Capabilities(copy_across=True, if_match=True)
        super().__init__(
            f"gs://{bucket}/",
            "gs",
            lambda: _make_store(bucket, arguments()),
            options,
            capabilities,
            second,
            from_code,
            _COPY_LIMIT,
        )
        self._bucket = bucket
        self._arguments = arguments
        self._signer = signer
        self._reads_only = reads_only
        self._reader_lock = threading.Lock()
        self._reader_opened: tuple[int, Any] | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Everything; presigned URLs only with a key to sign with."""
        return replace(self._capabilities, sign=self._signer.usable)

    def _reader(self) -> Any:
        self._store()  # which keeps in mind that this process, and no child of it, uses obstore
        # Or an object stored in gzip's encoding would be sent decoded, and without ranges.
        with self._reader_lock:
            opened = self._reader_opened
            if opened is None or opened[0] != os.getpid():
                arguments = self._arguments()
                client = dict(arguments["client_options"])
                client["default_headers"] = {
                    **client.get("default_headers", {}),
                    "accept-encoding": "gzip",
                }
                store = _make_store(self._bucket, {**arguments, "client_options": client})
                opened = self._reader_opened = (os.getpid(), store)
            return opened[1]

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super()._list(prefix):
            etag = info.etag
            if etag and not etag.endswith('"'):
                # Some servers quote it in the header only.
                info = replace(info, etag=f'"{etag}"')
            yield info

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`."""
        try:
            return super().stat(key, version)
        except TransientError as exc:
            if not _is_beyond_obstore(exc):
                raise
        return self._second().stat(key, version)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        try:
            body = super().read(key, span, pin)
        except TransientError as exc:
            if not _is_beyond_obstore(exc):
                raise
            return self._second().read(key, span, pin)
        except ModelMissingError as exc:
            if type(exc) is ModelMissingError and pin is not None:
                self._replaced(key, exc)
            raise
        if pin is not None and pin.differs_from(body.info):
            body.close()
            raise ObjectChangedError(f"{self._where(key)} was replaced since it was looked at")
        return body

    def _replaced(self, key: str, exc: ModelMissingError) -> None:
        # A bucket that keeps no versions does not know a generation that was overwritten.
        with suppress(ModelMissingError):
            self.stat(key)
            raise ObjectChangedError(
                f"{self._where(key)} was replaced since it was looked at"
            ) from exc

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> ObjectInfo:
        """See :meth:`Backend.write`."""
        # A listing tells no generation, and the conditions of writes are about that alone.
        nameless = if_match is not None and if_match.version is None
        # Headers hold plain ASCII; the other API has no headers for it.
        foreign = not all(
            f"{name}{value}".isascii() and fits_header(name, value)
            for name, value in (metadata or {}).items()
        )
        awkward = self._reads_only or nameless or foreign
        write = self._second().write if awkward else super().write
        return write(
            key,
            payload,
            metadata=metadata,
            content_type=content_type,
            if_absent=if_absent,
            if_match=if_match,
            on_bytes=on_bytes,
        )

    def _mode(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> Any:
        if if_match is None:
            return super()._mode(key, if_absent, if_match)
        if if_match.version is None:
            raise InvalidInput(f"{self._where(key)}: if_match needs a generation to compare with")
        return {"version": if_match.version}

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        if self._reads_only:
            self._second().copy(source, key, version=version, bucket=bucket)
        else:
            super().copy(source, key, version=version, bucket=bucket)

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`."""
        if self._reads_only:
            self._second().delete(keys)
        else:
            super().delete(keys)

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`."""
        return self._signer(key, method, expires)

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        with self._reader_lock:
            self._reader_opened = None
        super().close()


def _is_beyond_obstore(exc: TransientError) -> bool:
    """Tell whether obstore stumbled over metadata that is not ASCII, or a packed error."""
    said = str(exc.__cause__)
    return "Metadata value for" in said or "invalid utf-8 sequence" in said


def _make_store(bucket: str, arguments: dict[str, Any]) -> Any:
    try:
        from obstore.store import GCSStore
    except ImportError as exc:
        raise ConfigurationError(
            "Google Cloud Storage needs the package obstore, which is not installed; "
            'run: pip install "modelstorage[gcs]"'
        ) from exc
    if provider := arguments.get("credential_provider"):
        provider()  # what fails in here keeps its own error; obstore would wrap it
    return GCSStore(bucket, **arguments)
