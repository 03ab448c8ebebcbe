"""The files of a model against a list of what was signed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from storage.digest import Digest, new_hasher
from storage.errors import SignatureError, few, one_line
from storage.files import shown

__all__ = ["SINGLE", "LocalFile", "SignedFiles", "SignedPart", "local_files"]

SINGLE = "."
"""What model-signing calls the only file, where what is signed is a file and no tree."""

_THREADS = 4
_BLOCK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file that is to be compared with what was signed."""

    path: str
    """Where it is on this machine."""

    digests: Mapping[str, Digest] = field(default_factory=dict)
    """Those of its digests that are known already, by algorithm; others are computed."""


@dataclass(frozen=True, slots=True)
class SignedPart:
    """A stretch of a file and its hash."""

    start: int
    end: int | None
    algorithm: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class SignedFiles:
    """What a verified bundle says of the files of a model."""

    where: str
    """What was signed, for messages."""

    parts: Mapping[str, Sequence[SignedPart]]
    """By the path of the file."""

    allow_symlinks: bool
    """Whether the signer followed links."""

    def check(
        self,
        files: Mapping[str, LocalFile],
        selected: Callable[[str], bool] | None = None,
    ) -> None:
        """Compare files with what was signed.

        Args:
            files: those that are there, by path; of a single file by :data:`SINGLE`.
            selected: which of the signed files are to be there, if not all.

        Raises:
            SignatureError: a file is not signed, is missing, or has another content.
        """
        if (SINGLE in files) != (SINGLE in self.parts) and self.parts:
            one, other = ("one file", "a tree") if SINGLE in self.parts else ("a tree", "one file")
            raise SignatureError(f"{self.where}: the signature is of {one}, and this is {other}")
        unsigned = [path for path in files if path not in self.parts]
        missing = [
            path
            for path in self.parts
            if path not in files and (selected is None or selected(path))
        ]
        found = _listed("not signed:", unsigned) + _listed("signed, but not there:", missing)
        if not found:
            paths = sorted(files)
            with ThreadPoolExecutor(_THREADS) as pool:
                right = pool.map(lambda path: self._is_right(path, files[path]), paths)
                changed = [path for path, good in zip(paths, right, strict=True) if not good]
            found = _listed("not what was signed:", changed)
        if found:
            advice = ""
            if unsigned:
                advice = "; if they belong there, leave them out (ignore) or have all of it signed"
            raise SignatureError(f"{self.where}: {'; '.join(found)}{advice}")

    def _is_right(self, path: str, file: LocalFile) -> bool:
        parts = self.parts[path]
        if len(parts) == 1 and parts[0].end is None:
            known = file.digests.get(parts[0].algorithm)
            if known is not None:
                return bytes.fromhex(known.hex) == parts[0].digest
        end: int | None = 0
        with open(file.path, "rb", buffering=0) as stream:
            for part in sorted(parts, key=lambda part: part.start):
                # Nothing between two parts may be left out.
                if part.start != end or _hash(stream, part) != part.digest:
                    return False
                end = part.end
            return end is None or not stream.read(1)


def _hash(stream: Any, part: SignedPart) -> bytes:
    # The name that model-signing has for it is not one of ours.
    hasher: Any = hashlib.blake2b() if part.algorithm == "blake2b" else new_hasher(part.algorithm)
    left = None if part.end is None else part.end - part.start
    while block := stream.read(_BLOCK if left is None else min(_BLOCK, left)):
        hasher.update(block)
        left = None if left is None else left - len(block)
    return b"" if left else bytes.fromhex(hasher.hexdigest())


def _listed(what: str, paths: Sequence[str]) -> list[str]:
    names = ("the file" if path == SINGLE else one_line(shown(path), 80) for path in sorted(paths))
    return [f"{what} {few(list(names))}"] if paths else []


def local_files(
    root: str, ignored: Collection[str] = (), *, allow_symlinks: bool = False
) -> dict[str, LocalFile]:
    """Return every file of a folder by its relative path, or the one file that ``root`` is.

    Args:
        root: the folder or file. It may be a link itself.
        ignored: relative paths of files and folders that are left out.
        allow_symlinks: take links to files for files; else they are refused.

    Raises:
        SignatureError: there is a link that may not be, or something that is no file.
        OSError: it is not there, or cannot be read.
    """
    mode = os.stat(root).st_mode
    if stat.S_ISREG(mode):
        return {SINGLE: LocalFile(root)}
    if not stat.S_ISDIR(mode):
        raise SignatureError(f"{shown(root)} is neither a file nor a folder; refused")

    def fail(exc: OSError) -> None:
        raise exc

    files = {}
    for folder, inner, names in os.walk(root, onerror=fail):
        prefix = "" if folder == root else f"{os.path.relpath(folder, root)}/"
        inner[:] = [name for name in inner if f"{prefix}{name}" not in ignored]
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        for name in (*links, *names):
            path, relative = os.path.join(folder, name), f"{prefix}{name}"
            if relative in ignored:
                continue
            if os.path.islink(path) and (name in links or not allow_symlinks):
                kind = "a link to a folder" if name in links else "a link"
                raise SignatureError(f"{shown(root)}: {shown(relative)} is {kind}; refused")
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise SignatureError(f"{shown(root)}: {shown(relative)} is no file; refused")
            files[relative] = LocalFile(path)
    return files
