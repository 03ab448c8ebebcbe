"""The names of images and artifacts in OCI registries, as ``docker pull`` takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

__all__ = ["ImageName", "shown"]

_PUBLIC = "docker.io"
_DEFAULT_TAG = "latest"
# A tag or a digest ends the name of a repository; only behind one can a path follow.
_REFERENCE = re.compile(
    r"(?P<name>[^@:]+)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}))?(?:/(?P<path>.*))?",
    re.DOTALL,
)
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::[0-9]{1,5})?"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class ImageName:
    """What the text of a reference names."""

    registry: str
    """Host, and port if one is named."""

    repository: str
    """Path of the repository in the registry."""

    reference: str | None
    """Tag, or ``sha256:…``; ``None`` for the tag ``latest``. Of both the digest counts."""

    path: str
    """In the image or artifact; empty for all of it."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return what ``[registry/]repository[:tag][@digest][/path]`` names; ``None`` if nothing.

        Without a registry the public one is meant, and its repositories without an owner are in
        ``library``. What the first part of a name is, is told as Docker does: it is a registry if
        it has a dot or a port, or is ``localhost``.
        """
        first, slash, rest = text.partition("/")
        if slash and (re.search(r"[.:\[]", first) or first == "localhost"):
            registry, name = first, rest
        else:
            registry, name = _PUBLIC, text
        match = _REFERENCE.fullmatch(name)
        if match is None or not _HOST.fullmatch(registry):
            return None
        repository, tag, digest, path = match.group("name", "tag", "digest", "path")
        if not _REPOSITORY.fullmatch(repository) or (path is not None and not (tag or digest)):
            return None
        if registry == _PUBLIC and "/" not in repository:
            repository = f"library/{repository}"
        return cls(registry.lower(), repository, digest or tag, path or "")


def shown(bucket: str, reference: str | None, path: str) -> str:
    """Return the URI of a path in what a reference names.

    Args:
        bucket: registry and repository.
        reference: tag or digest.
        path: empty for all of it.
    """
    if reference is None and path:
        reference = _DEFAULT_TAG  # or the path would be a part of the repository's name
    mark = "@" if ":" in (reference or "") else ":"
    pin = f"{mark}{reference}" if reference is not None else ""
    return f"oci://{bucket}{pin}{f'/{path}' if path else ''}"
