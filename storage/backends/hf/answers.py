"""What the Hub says of files: descriptions, identities, the keys that it can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.backends.base import ObjectInfo
from storage.digest import Digest
from storage.errors import (
    InvalidInput,
    ModelMissingError,
    StorageError,
)

if TYPE_CHECKING:
    import requests

__all__ = ["GIT_ID", "Facts", "HubObject", "check_key", "described", "new_object"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
GIT_ID = re.compile(r"[0-9a-f]{40}")
"""What git calls a commit, or the content of a file."""


@dataclass(frozen=True, slots=True)
class HubObject(ObjectInfo):
    """A file of one commit. ``version`` is the commit, ``etag`` the file's own identity.

    The identity is the SHA-256 of a large file, git's object id of a small one. A commit
    that leaves the file alone changes the version and not the content.
    """

    @property
    def pin(self) -> str | None:
        """The file's own identity, the same in each commit that holds this content."""
        return self.etag

    def differs_from(self, other: ObjectInfo) -> bool:
        """Tell whether two answers are certainly not about the same content."""
        for mine, theirs in ((self.etag, other.etag), (self.size, other.size)):
            if mine is not None and theirs is not None and mine != theirs:
                return True
        return False


class Facts:
    """What the answers to a request for a file say of it."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.commit: str | None = None
        self.etag: str | None = None
        self.size: int | None = None
        self._linked = False

    def learn(self, response: requests.Response) -> None:
        """Take in one more answer of the Hub."""
        headers = response.headers
        self.commit = headers.get("X-Repo-Commit") or self.commit
        if linked := headers.get("X-Linked-ETag"):
            self.etag, self._linked = linked, True
        elif not self._linked:
            self.etag = headers.get("ETag") or self.etag
        length = headers.get("X-Linked-Size")
        if length is None and response.status_code == 200:
            length = headers.get("Content-Length")
        if length is not None and length.isdigit():
            self.size = int(length)

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be learned by going where the answer leads."""
        return self._linked and self.size is not None

    def info(self, key: str, where: str) -> HubObject:
        """Return what was learned.

        Raises:
            StorageError: it was no Hub that answered.
        """
        if self.commit is None:
            raise StorageError(
                f"{where}: the answer names no commit, so it is not one of a Hub; check the "
                "endpoint and the proxy"
            )
        return new_object(key, self.size, (self.etag or "").removeprefix("W/"), self.commit)


def new_object(key: str, size: int | None, oid: str, commit: str | None) -> HubObject:
    """Describe a file by its identity (``oid``, quoted or not; may be empty)."""
    oid = oid.strip('"')
    digests = (Digest("sha256", oid),) if _SHA256.fullmatch(oid) else ()
    # Git's id is checked where all bytes pass: a small file is read whole, from its beginning.
    whole = GIT_ID.fullmatch(oid) is not None
    return HubObject(
        key, size, f'"{oid}"' if oid else None, commit, digests=digests, ranged=not whole
    )


def described(item: Mapping[str, Any], commit: str) -> HubObject:
    """Return what a listing says of a file."""
    large = item.get("lfs")
    if large:
        return new_object(item["path"], large["size"], large["oid"], commit)
    return new_object(item["path"], item["size"], item["oid"], commit)


def check_key(key: str, where: str, *, writing: bool) -> None:
    """Refuse what git cannot hold.

    Raises:
        InvalidInput: the key holds empty or dot segments, a NUL, what is no text, or a
            folder ``.git``.
        ModelMissingError: it is that of a folder, and only asked for.
    """
    parts = key.split("/")
    if not writing and key and parts[-1] == "" and not {"", ".", ".."} & set(parts[:-1]):
        raise ModelMissingError(where)
    problem = None
    if {"", ".", ".."} & set(parts):
        problem = "an empty segment, '.' or '..'"
    elif "\0" in key:
        problem = "a NUL character"
    elif not key.isascii() and key != key.encode("utf-8", "replace").decode():
        problem = "what is no text in UTF-8"
    elif any(part.lower() == ".git" for part in parts):
        problem = "the name .git, which belongs to git"
    if problem is not None:
        raise InvalidInput(f"{where}: the key holds {problem}; the Hub cannot hold such a file")
