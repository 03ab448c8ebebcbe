"""What one source is wanted for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from storage.errors import InvalidInput, redact
from storage.integrations.kserve.local import path_of
from storage.integrations.kserve.placing import Place

if TYPE_CHECKING:
    from storage.transfer.plan import Patterns
    from storage.transfer.progress import ProgressCallback

__all__ = ["Wish"]

# Names of parameters of a query.
_CREDENTIAL = re.compile(r"sig|token|key|secret|pass|cred|auth|code", re.IGNORECASE)


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
        """Return the place of the source in ``folder``.

        Raises:
            InvalidInput: nothing but credentials tells it from another source of the call.
        """
        beside = [_identity(uri) for uri in self.beside]
        if self.uri not in self.beside and _identity(self.uri) in beside:
            raise InvalidInput(
                f"two sources of this call are {redact(self.uri)}, and only what may be a "
                "credential tells them apart; give them folders of their own"
            )
        only = None if self.only is None else [_identity(uri) for uri in self.only]
        return Place(folder, _identity(self.uri), beside=beside, only=only)


def _identity(uri: str) -> str:
    """Return what tells a source from others, without what may be a credential."""
    path = path_of(uri)
    if path is not None:
        return f"file://{os.path.abspath(path)}"
    query = urlsplit(uri).query
    # A signature is another one tomorrow, and the source is the same.
    if any(_CREDENTIAL.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
        query = ""
    return f"{redact(uri)}?{query}" if query else redact(uri)
