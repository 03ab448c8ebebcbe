"""An HTTP origin as an fsspec file system: with our credentials, redirections and checks.

fsspec's own needs aiohttp, follows redirections with every header, and splices the parts of
a file that is replaced while it is read.
"""

from __future__ import annotations

from typing import Any

from storage.backends.base import Backend
from storage.backends.filesystem import BackendFileSystem
from storage.errors import InvalidInput, redact

__all__ = ["HTTPFileSystem"]


class HTTPFileSystem(BackendFileSystem):
    """Files of one origin; a path is a URL of that origin, or what follows the host in it."""

    protocol: Any = ("http", "https")

    def __init__(self, backend: Backend, base: str, **kwargs: Any) -> None:
        """Serve the origin ``base``, a URL that ends in the slash after the host."""
        super().__init__(backend, **kwargs)
        self._base = base

    def _strip_protocol(self, path: Any) -> Any:
        """Return the key of a path: what follows the host, as it stands in the URL."""
        if isinstance(path, list):
            return [self._strip_protocol(one) for one in path]
        text = str(path)
        if "://" in text.split("?")[0]:
            bare = text.split("?")[0].split("#")[0]
            host, _, key = bare.partition("://")[2].partition("/")
            if f"{bare.partition('://')[0]}://{host.rpartition('@')[2]}/".lower() != self._base:
                raise InvalidInput(
                    f"{redact(text)} is not below {self._base}, the only host of this file system"
                )
            return key
        return text.lstrip("/")
