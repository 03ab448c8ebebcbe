"""What one source is wanted for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import redact
from storage.integrations.kserve.local import path_of
from storage.integrations.kserve.placing import Place

if TYPE_CHECKING:
    from storage.transfer.plan import Patterns
    from storage.transfer.progress import ProgressCallback

__all__ = ["Wish"]


@dataclass(frozen=True)
class Wish:
    """One source, where it should go, and which of its files."""

    uri: str
    folder: str | None
    """``None``: wherever it can be read."""

    patterns: Patterns
    beside: tuple[str, ...] = ()
    """Sources that the same call has brought into the same folder before."""

    only: tuple[str, ...] | None = None
    """All sources that the folder is to have; ``None``: any."""

    progress: ProgressCallback | None = None

    def place(self, folder: str) -> Place:
        """Return the place of the source in ``folder``."""
        beside = [_identity(uri) for uri in self.beside]
        only = None if self.only is None else [_identity(uri) for uri in self.only]
        return Place(folder, _identity(self.uri), beside=beside, only=only)


def _identity(uri: str) -> str:
    """Return what tells a source from others, without what may be a credential."""
    path = path_of(uri)
    return f"file://{os.path.abspath(path)}" if path is not None else redact(uri)
