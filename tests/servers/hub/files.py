"""The bytes of the test Hub: files on disk under their SHA-256, never held in memory."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Blob", "BlobStore", "MismatchError", "git_oid", "pointer"]

_BLOCK = 1024 * 1024


class MismatchError(ValueError):
    """The bytes that arrived are not the ones that were announced."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Content that is stored."""

    sha256: str
    git: str
    """Its object id in git, if it were stored as a plain file."""

    size: int


def git_oid(data: bytes) -> str:
    """Return the id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """Return what git itself stores for a large file."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    ).encode()


class BlobStore:
    """Blobs below one folder."""

    def __init__(self, folder: Path) -> None:
        """Keep them below ``folder``, which exists."""
        self._folder = folder
        self._blobs: dict[str, Blob] = {}
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return where a blob's bytes are."""
        return self._folder / sha256

    def get(self, sha256: str) -> Blob | None:
        """Return a blob that is there."""
        return self._blobs.get(sha256)

    def receive(self, pieces: Iterable[bytes]) -> Path:
        """Write a body to a file of its own and return its path."""
        path = self._folder / f"incoming-{secrets.token_hex(8)}"
        try:
            with open(path, "wb") as file:
                for piece in pieces:
                    file.write(piece)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def join(self, parts: Iterable[Path]) -> Path:
        """Return one file that holds ``parts`` in order; they are gone afterwards."""
        path = self._folder / f"joined-{secrets.token_hex(8)}"
        with open(path, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file, _BLOCK)
                part.unlink()
        return path

    def adopt(self, path: Path, sha256: str | None = None, size: int | None = None) -> Blob:
        """Store a file's content and take the file away.

        Raises:
            MismatchError: it is not the one that ``sha256`` and ``size`` announce.
        """
        try:
            blob = _measure(path)
            if sha256 not in (None, blob.sha256) or size not in (None, blob.size):
                raise MismatchError(
                    f"expected {sha256} of {size} bytes, got {blob.sha256} of {blob.size} bytes"
                )
            with self._lock:
                if blob.sha256 not in self._blobs:
                    os.replace(path, self.path(blob.sha256))
                    self._blobs[blob.sha256] = blob
        finally:
            path.unlink(missing_ok=True)
        return blob

    def add(self, data: bytes) -> Blob:
        """Store ``data``."""
        sha256 = hashlib.sha256(data).hexdigest()
        with self._lock:
            if sha256 not in self._blobs:
                self.path(sha256).write_bytes(data)
                self._blobs[sha256] = Blob(sha256, git_oid(data), len(data))
            return self._blobs[sha256]


def _measure(path: Path) -> Blob:
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    return Blob(sha256.hexdigest(), git.hexdigest(), size)
