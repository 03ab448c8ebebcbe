"""Keeps the bytes of a container open until it is closed or forgotten."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, NoReturn, Self

from storage.errors import InvalidInput

if TYPE_CHECKING:
    from storage.container.source import Source

__all__ = ["Held"]


class Held:
    """What owns a source, which threads may use at once, and is a context manager."""

    _source: Source | None
    _lock: threading.RLock
    _close_source: weakref.finalize[[], Held]

    def _hold(self, source: Source) -> None:
        """Own ``source``; to be called once, before anything else."""
        self._lock = threading.RLock()
        self._source = source
        self._close_source = weakref.finalize(self, source.close)

    def _replace(self, source: Source) -> None:
        """Own another one instead, unless this was closed meanwhile."""
        with self._lock:
            if self._source is None:
                source.close()
                return
            self._close_source()
            self._source = source
            self._close_source = weakref.finalize(self, source.close)

    def _opened(self) -> Source:
        """Return the source, which nobody closes before the lock is released."""
        if self._source is None:
            raise InvalidInput(f"{self!r} is closed; open it again to read from it")
        return self._source

    def _duplicate(self) -> Source:
        """Return another source of the same bytes, for the caller to close."""
        with self._lock:
            return self._opened().duplicate()

    def close(self) -> None:
        """Let go of the source; a second time is fine."""
        with self._lock:
            self._source = None
            self._close_source()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied; save it to a file and send "
            "that, or use to_builder() for a changed copy"
        )
