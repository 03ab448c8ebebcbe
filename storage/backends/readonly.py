"""What backends share whose stores can only be read: everything that changes one is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from storage.backends.base import Capabilities, ObjectInfo, Payload
from storage.digest import Digest
from storage.errors import UnsupportedOperation

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["READ_ONLY", "ReadOnlyBackend"]

READ_ONLY = Capabilities(
    write=False,
    delete=False,
    copy=False,
    if_absent=False,
    metadata=False,
    any_key=False,
)
"""Listing and reading, by ranges and pinned; nothing else."""


class ReadOnlyBackend:
    """The methods of :class:`~storage.backends.base.Backend` that change a store, refused.

    Beside ``name`` a store of this kind brings ``stat``, ``list``, ``read`` and ``where``, and
    ``close`` if it holds anything. Keys are paths: empty and dot segments are not kept.
    """

    capabilities: Capabilities = READ_ONLY
    why_read_only: str = "this store can only be read"
    """What the message says after the URI; ends without a full stop."""

    def where(self, key: str) -> str:
        """Return the URI of a key, for messages; without a credential."""
        raise NotImplementedError

    def _refuse(self, key: str) -> NoReturn:
        raise UnsupportedOperation(f"{self.where(key)}: {self.why_read_only}")

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
        """Raise ``UnsupportedOperation``."""
        self._refuse(key)

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """Raise ``UnsupportedOperation``."""
        self._refuse(key)

    def delete(self, keys: Sequence[str]) -> None:
        """Raise ``UnsupportedOperation``, unless there is nothing to delete."""
        if keys:
            self._refuse(keys[0])

    def sign(self, key: str, method: str, expires: float) -> str:
        """Raise ``UnsupportedOperation``."""
        raise UnsupportedOperation(f"{self.where(key)}: there are no URLs to sign here")

    def is_digest(self, info: ObjectInfo) -> bool:
        """Return ``False``: nothing here gives hints."""
        return False

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """Return nothing: ``stat`` and ``list`` tell all digests that there are."""
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """Return a file system that reads by this backend; see ``Backend.filesystem``."""
        from storage.backends.filesystem import BackendFileSystem

        return BackendFileSystem(self), ""  # type: ignore[arg-type]

    def local_path(self, key: str) -> str | None:
        """Return ``None``: the store is remote."""
        return None

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
