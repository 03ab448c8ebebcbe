"""Where a registry and an inventory keep what, relative to their URI.

::

    forml.json                                   that there is a registry
    releases/PROJECT/RELEASE.json                the digest of a package; commits the release
    packages/PROJECT/RELEASE/<sha256>/...        the package, a file or a folder, as it was
    states/PROJECT/RELEASE/<state id>/<blake3>   a state
    generations/PROJECT/RELEASE/<number>.json    tag and digests of all states; commits them
    applications/NAME.py                         the descriptor of an application

Everything but descriptors is created once and never written over, and what commits is written last:
a writer that dies leaves nothing that is seen. ``RELEASE`` is the version without zeros at its end:
to ForML, 1.0 and 1 are one release.
"""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import quote, unquote

from forml import project as projects  # type: ignore[import-not-found]
from forml.io import asset  # type: ignore[import-not-found]
from packaging.utils import canonicalize_version

from storage.digest import Digest
from storage.registry import layout

__all__ = [
    "APPLICATIONS",
    "MARKER",
    "PACKAGE",
    "RELEASES",
    "application",
    "application_of",
    "generation",
    "generations",
    "package",
    "project_of",
    "release",
    "release_of",
    "releases",
    "state",
]

MARKER = "forml.json"
RELEASES = "releases/"
APPLICATIONS = "applications/"
PACKAGE = f"package.{projects.Package.FORMAT}"
"""The name of a package that is a file."""


def releases(project: Any) -> str:
    """Return what the names of all releases of a project begin with."""
    return f"{RELEASES}{_part(project)}/"


def release(project: Any, version: Any) -> str:
    """Return the name of a release."""
    return f"{RELEASES}{_release(project, version)}.json"


def package(project: Any, version: Any, digest: Digest) -> str:
    """Return what the names of all files of a package begin with."""
    return f"packages/{_release(project, version)}/{digest.hex}/"


def state(project: Any, version: Any, sid: uuid.UUID) -> str:
    """Return what the name of a state begins with; its digest follows."""
    return f"states/{_release(project, version)}/{sid}/"


def generations(project: Any, version: Any) -> str:
    """Return what the names of all generations of a release begin with."""
    return f"generations/{_release(project, version)}/"


def generation(project: Any, version: Any, number: Any) -> str:
    """Return the name of a generation."""
    return layout.entry(generations(project, version), asset.Generation.Key(number))


def application(name: str) -> str:
    """Return the name of the descriptor of an application."""
    return f"{APPLICATIONS}{_part(name)}.py"


def _release(project: Any, version: Any) -> str:
    return f"{_part(project)}/{_part(canonicalize_version(str(version)))}"


def _part(name: Any) -> str:
    """Return a name of ForML's as one part of a key."""
    text = quote(str(name), safe="")
    if not text:
        raise asset.Level.Key.Invalid("a name is empty")
    # Azure drops dots at the end, and two of them lead out of a folder.
    return f"{text[:-1]}%2E" if text.endswith(".") else text


# -- and back --------------------------------------------------------------------------------


def project_of(name: str) -> str | None:
    """Return the project that the name of a release holds; ``None`` if it is no such name."""
    found = _release_of(name)
    return None if found is None else found[0]


def release_of(name: str) -> str | None:
    """Return the version that the name of a release holds; ``None`` if it is no such name."""
    found = _release_of(name)
    return None if found is None else found[1]


def _release_of(name: str) -> tuple[str, str] | None:
    project, _, version = map(
        unquote, name.removeprefix(RELEASES).removesuffix(".json").partition("/")
    )
    try:
        asset.Release.Key(version)
        # What somebody else put there is not in the way of the rest.
        return (project, version) if release(project, version) == name else None
    except asset.Level.Key.Invalid:
        return None


def application_of(name: str) -> str | None:
    """Return the application that the name of a descriptor holds, if it is one."""
    found = unquote(name.removeprefix(APPLICATIONS).removesuffix(".py"))
    return found if found and application(found) == name else None
