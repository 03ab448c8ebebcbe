"""What may stand for a destination, here and in a store, and for the digest of a source."""

from __future__ import annotations

import os

from storage.digest import Digest
from storage.errors import InvalidInput, redact
from storage.uri import Location

__all__ = ["expected_digest", "local_path", "writable"]


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


def expected_digest(location: Location, digest: str | Digest | None) -> Digest | None:
    """Return the digest that is expected of a source, by its URI or by the call.

    Raises:
        InvalidInput: it is none, or the two expect different ones.
    """
    given = None if digest is None else Digest.parse(digest)
    named = None if location.digest is None else Digest.parse(location.digest)
    if given is not None and named is not None and given != named:
        raise InvalidInput(
            f"{location}: the URI expects {named} and the call expects {given}; drop one"
        )
    return given or named
