"""What may stand for a destination, on this machine and in a store."""

from __future__ import annotations

import os

from storage.errors import InvalidInput, redact
from storage.uri import Location

__all__ = ["local_path", "writable"]


def local_path(path: str | os.PathLike[str]) -> str:
    """Return a destination on this machine as text.

    Raises:
        InvalidInput: it is none.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput(f"a destination is the path of a file or folder, not {path!r}")
    if "://" in text:
        raise InvalidInput(f"{redact(text)!r} is a URI; a destination is a local path")
    return text


def writable(location: Location) -> Location:
    """Return ``location`` if something may be written or deleted there.

    Raises:
        InvalidInput: it names a content or a version, which are never written.
    """
    if location.digest is not None:
        raise InvalidInput(
            f"{location} is given with a digest, which says what is expected of a source; "
            "nothing is written or deleted by its digest; leave it out"
        )
    if location.version is not None and not location.has_revisions:
        raise InvalidInput(f"{location} names one version of an object; versions are never written")
    return location
