"""What backends of repositories share: one version of all that is in one, and plain paths."""

from __future__ import annotations

from typing import Protocol

from storage.backends.base import Backend, check_prefix
from storage.errors import InvalidInput, ModelMissingError

__all__ = ["RepositoryBackend", "check_folder", "check_path"]

_ODD = frozenset(("", ".", ".."))


class RepositoryBackend(Backend, Protocol):
    """A backend with ``capabilities.repository``."""

    def current_version(self) -> str:
        """Return the version that all objects have now: ``ObjectInfo.version`` of each.

        Costs a request at most, and no byte of an object. As long as it is the same, so is all
        that ``list`` and ``stat`` say.

        Raises:
            BucketMissingError: there is no such repository.
            ModelMissingError: the revision that it is asked at does not exist.
        """


def check_path(key: str, where: str) -> None:
    """Refuse a key that is the path of no file.

    Args:
        key: of an object.
        where: its URI, for messages.

    Raises:
        InvalidInput: it holds an empty segment, ``.`` or ``..``.
        ModelMissingError: it is that of a folder.
    """
    parts = key.split("/")
    if not key or (parts[-1] == "" and not _ODD & set(parts[:-1])):
        raise ModelMissingError(where)
    if _ODD & set(parts):
        raise InvalidInput(
            f"{where}: the key holds an empty segment, '.' or '..', which no file there has"
        )


def check_folder(prefix: str, where: str) -> None:
    """Refuse a prefix for a listing that is the path of no folder.

    Raises:
        InvalidInput: it holds an empty segment, ``.`` or ``..``, or does not end in ``/``.
    """
    check_prefix(prefix)
    if prefix and _ODD & set(prefix.removesuffix("/").split("/")):
        raise InvalidInput(
            f"{where}: the prefix holds an empty segment, '.' or '..', which no folder there has"
        )
