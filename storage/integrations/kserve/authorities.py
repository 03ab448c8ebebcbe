"""The authorities that a cluster trusts beside the system's: KServe's global CA bundle.

The webhook mounts a config map as a folder and names it by ``CA_BUNDLE_CONFIGMAP_NAME`` and
``CA_BUNDLE_VOLUME_MOUNT_POINT``. Clients take one file with all authorities, so the system's, those
of ``certifi`` and the cluster's are put together, in memory: a container may have no place to
write, and nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import ssl
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from storage.integrations.kserve.environment import Environment

__all__ = ["Authorities", "memory_file"]

_FOLDER = "/etc/ssl/custom-certs"
_FILE = "cabundle.crt"

_log = logging.getLogger(__name__)


class Authorities:
    """The bundle for the stores of one call; a context manager around it.

    The file is gone at the end.
    """

    def __init__(self, environment: Environment) -> None:
        """Describe it; nothing is read before it is needed."""
        self._environment = environment
        self._descriptor: int | None = None
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def bundle(self, *, oci: bool = False) -> str | None:
        """Return the path of a PEM file with all authorities; ``None`` for the usual ones.

        A bundle that cannot be used is said in a warning, and the usual ones count.

        Args:
            oci: whether it is for a registry, for which the folder alone says enough.
        """
        get = self._environment.get
        folder = get("CA_BUNDLE_VOLUME_MOUNT_POINT")
        named = get("CA_BUNDLE_CONFIGMAP_NAME") is not None
        if not named and not (oci and folder is not None):
            return None
        if get("REQUESTS_CA_BUNDLE") is not None and not oci:
            return None  # somebody has chosen already
        if not self._asked:
            self._asked = True
            self._descriptor = _combined(os.path.join(folder or _FOLDER, _FILE), quiet=not named)
        return None if self._descriptor is None else f"/proc/self/fd/{self._descriptor}"


def _combined(path: str, *, quiet: bool) -> int | None:
    """Return an open file with all authorities, or ``None`` if ``path`` cannot be used."""
    import certifi

    if not os.path.exists(path):
        if not quiet:
            _log.warning("the CA bundle %s is not there; the usual authorities are trusted", path)
        return None
    system = ssl.get_default_verify_paths().cafile
    try:
        parts = []
        for each in (system, certifi.where(), path):
            if each is not None and os.path.exists(each):
                with open(each, "rb") as file:
                    parts.append(file.read().rstrip() + b"\n")
        text = b"".join(parts)
        # One entry that cannot be read spoils the whole file.
        ssl.create_default_context(cadata=text.decode("ascii", "ignore"))
    except (OSError, ValueError) as exc:  # an SSLError is an OSError
        _log.warning(
            "the CA bundle %s cannot be used, and the usual authorities are trusted: %s", path, exc
        )
        return None
    return memory_file("authorities", text)


def memory_file(name: str, content: bytes) -> int:
    """Return the descriptor of a file that is in memory only, and holds ``content``.

    This process, and no other user's, reads it as ``/proc/self/fd/<descriptor>``.
    """
    descriptor = os.memfd_create(name)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
