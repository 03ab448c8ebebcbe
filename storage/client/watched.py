"""What a watcher hands over, and where it gets that from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

__all__ = ["WatchedModel", "WatchedSource", "kept_patterns"]


def kept_patterns(patterns: str | Iterable[str] | None) -> list[str] | None:
    """Return patterns as what can be read more than once: each look reads them."""
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


class WatchedSource(ABC):
    """Where versions come from."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What tells it from other sources, whose versions may be called the same."""

    @abstractmethod
    def look(self) -> str | None:
        """Return what tells the version that is there now; ``None`` if nothing does."""

    @abstractmethod
    def fetch(self, version: str | None, dest: str | None, *, offline: bool = False) -> str:
        """Bring the version here, verified, and return its path.

        Args:
            version: as :meth:`look` told it; another may be there by now.
            dest: a folder for it; ``None`` for the cache, where it stays until it is released.
            offline: take what the cache has, whatever version that is.

        Raises:
            ObjectChangedError: it is another one by now, that much is certain.
            OfflineError: ``offline``, and the cache does not have it.
        """

    @abstractmethod
    def release(self, path: str) -> None:
        """Take back what keeps a path in the cache."""


class WatchedModel:
    """One version of a model, whole and verified; it stays where it is until it is released."""

    def __init__(
        self, source: str, path: str, version: str | None, release: Callable[[], object]
    ) -> None:
        """Describe it; for :class:`Watcher`."""
        self.source = source
        """What is watched, for messages."""
        self.path = path
        """Of the file, or of the tree's folder."""
        self.version = version
        """What tells it from others: a hash of what the store says, or the number of a version of
        a registry; ``None`` if the store could not be asked."""
        self.previous: WatchedModel | None = None
        """The one that was told before; ``None`` for the first."""
        self._release: Callable[[], object] | None = release

    @property
    def released(self) -> bool:
        """Whether it may be gone."""
        return self._release is None

    def release(self) -> None:
        """Let its files be removed, or evicted from the cache; a second call does nothing."""
        release, self._release = self._release, None
        self.previous = None
        if release is not None:
            release()

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r} version={self.version!r}>"
