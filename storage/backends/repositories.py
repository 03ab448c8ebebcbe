"""What backends of repositories can do more: all that is in one has one version."""

from __future__ import annotations

from typing import Protocol

from storage.backends.base import Backend

__all__ = ["RepositoryBackend"]


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
