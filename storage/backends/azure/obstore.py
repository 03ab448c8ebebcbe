"""Azure through obstore: what the driver of all three stores does not know about this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from storage.backends.azure.answers import (
    by_obstore,
    check_key,
    decoded_metadata,
    from_code,
    is_marker,
)
from storage.backends.base import (
    Backend,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    content_digests,
)
from storage.backends.drivers.obstore import ObstoreBackend
from storage.backends.drivers.renewal import renewing
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
)

if TYPE_CHECKING:
    from storage.backends.azure.credentials import Access

__all__ = ["AzureObstoreBackend"]

T = TypeVar("T")


class AzureObstoreBackend(ObstoreBackend):
    """One container through ``obstore``; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        uri: str,
        make_store: Callable[[], Any],
        options: OpenOptions,
        capabilities: Capabilities,
        second: Callable[[], Backend],
        access: Callable[[], Access],
    ) -> None:
        """Describe the container.

        Args:
            uri: see :class:`ObstoreBackend`, and for what is not said here.
            make_store: the same.
            options: the same.
            capabilities: the same.
            second: the same.
            access: returns the account and the credential.
        """
        super().__init__(uri, "azure", make_store, options, capabilities, second, from_code)
        self._access = access

    def _translated(self, key: str) -> AbstractContextManager[None]:
        return by_obstore(self._where(key))

    def _takes(self, key: str) -> bool:
        if key:
            check_key(self._where(key), key)
        return super()._takes(key)

    def _describe(self, key: str, result: Any) -> ObjectInfo:
        info = super()._describe(key, result)
        metadata = decoded_metadata(info.metadata)
        return replace(info, metadata=metadata, digests=content_digests(metadata))

    def _again(self, call: Callable[[], T]) -> T:
        """Return what ``call`` does; again with a new token if Azure refused the old one."""
        return renewing(call, self._renew, self._forget)

    def _renew(self, begun: float) -> bool:
        tokens = self._access().tokens
        return tokens is not None and tokens.renew(begun)

    def _forget(self) -> None:
        with self._lock:
            self._opened = None

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        stat = super().stat
        try:
            info = self._again(lambda: stat(key, version))
        except AuthenticationError:
            if self._access().tokens is None:
                raise
            # Which of Azure's two reasons for a 403 it is, only the headers tell.
            return self._second().stat(key, version)
        except (ObjectChangedError, ObjectExistsError):
            # obstore's guess at a 409 or 412. The answer to a HEAD has no body for it to look
            # into, and it does not look at the headers.
            return self._second().stat(key, version)
        if is_marker(key, info.size, info.metadata):
            raise ModelMissingError(self._where(key))
        if not info.digests:
            # No upload of ours. Azure may know an MD5, which obstore does not tell.
            return self._second().stat(key, version)
        return info

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        read = super().read
        return self._again(lambda: read(key, span, pin))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Only there do a thousand blobs come with their digests, and directories that are
        # marked by metadata with the mark.
        return self._second().list(prefix)

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
        # obstore sends no MD5, by which Azure refuses what was damaged on its way and others can
        # check what they download.
        return self._second().write(
            key,
            payload,
            metadata=metadata,
            content_type=content_type,
            if_absent=if_absent,
            if_match=if_match,
            on_bytes=on_bytes,
        )

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        # obstore does not wait for the end of a copy, which may come later than the answer.
        self._second().copy(source, key, version=version, bucket=bucket)

    def delete(self, keys: Sequence[str]) -> None:
        # Many at once take a permission on the whole container, which a SAS or a role may lack.
        if self._access().sas is None:
            delete = super().delete
            try:
                self._again(lambda: delete(keys))
                return
            except AuthenticationError:
                pass
        self._second().delete(keys)

    def sign(self, key: str, method: str, expires: float) -> str:
        # obstore signs the escaped name of a key with spaces and the like; Azure the plain one.
        return self._second().sign(key, method, expires)

    def close(self) -> None:
        opened = self._opened
        super().close()
        if opened is not None:
            tokens = self._access().tokens
            if tokens is not None:
                tokens.close()
