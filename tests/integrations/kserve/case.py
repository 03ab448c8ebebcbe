"""What a case of the comparison with KServe's storage initializer says."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.integrations.kserve.places import Files, Page

__all__ = [
    "MODEL",
    "SAME",
    "Case",
    "Failed",
    "Files",
    "Page",
    "Wrong",
    "gzipped",
    "tar",
    "zipped",
]

Tree = Mapping[str, bytes]

MODEL: Tree = {"config.json": b'{"a": 1}', "weights/part-1.bin": bytes(range(256)) * 5}
"""What most cases fetch."""


@dataclass(frozen=True)
class Failed:
    """Exit status 1, and nothing new in the destinations.

    Attributes:
        says: a regular expression of what is printed.
    """

    says: str


@dataclass(frozen=True)
class Wrong:
    """Why the old program is wrong.

    Attributes:
        reason: in a few words.
        leaves: what is in its first destination, with exit status 0; ``None``: its exit status
            is 1.
        perhaps: what may be there instead, as chance will have it.
        endless: it takes more than a minute, and is not run.
    """

    reason: str
    leaves: Tree | None = None
    perhaps: Tree | None = None
    endless: bool = False


SAME = None
"""The old program does what the case says."""


@dataclass(frozen=True)
class Case:
    """One run of an initializer and what has to come of it.

    Arguments and values of variables are templates: ``$root`` is the URI of the case's own place
    in its store, ``$dest`` the first destination and ``$dest2`` the second; each store has more
    names (see ``stores``).

    Attributes:
        name: says what the case is about, in words joined by dashes.
        store: where the files are, by the name of a method of ``Stores``.
        files: what is there, below ``$root``.
        tree: what is in ``$dest`` afterwards, or how it fails.
        arguments: of the command line.
        variables: added to those that lead to the store; ``None`` takes one away.
        old: how the old program differs; ``SAME`` if it does not.
        also: what is in ``$dest2`` afterwards.
        dest: the first destination, if it is no new folder.
        earlier: files below ``$root-earlier`` that a run before has brought to ``$dest``.
        there: files that somebody else put into ``$dest`` before.
    """

    name: str
    store: str
    files: Files
    tree: Tree | Failed
    arguments: tuple[str, ...] = ("$root", "$dest")
    variables: Mapping[str, str | None] = field(default_factory=dict)
    old: Wrong | None = SAME
    also: Tree | None = None
    dest: str = ""
    earlier: Files | None = None
    there: Tree = field(default_factory=dict)


def tar(files: Tree, mode: str = "w:gz") -> bytes:
    """Return a tar archive of regular files."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:  # type: ignore[call-overload]
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def zipped(files: Tree) -> bytes:
    """Return a zip archive of regular files, the same whenever it is made."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for path, content in files.items():
            # By itself it has the time of 1980.
            member = zipfile.ZipInfo(path)
            member.external_attr = 0o600 << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return written.getvalue()


def gzipped(content: bytes) -> bytes:
    """Return a file by gzip, the same whenever it is made."""
    return gzip.compress(content, mtime=0)
