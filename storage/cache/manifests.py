"""Manifests: what a model consists of, as an immutable value with an id of its own.

A manifest holds content and nothing else: no source, no time. The same model from two stores
is one manifest, and so one snapshot.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from storage.cache.index import kept
from storage.cache.layout import Layout, hash_text, listed
from storage.cache.records import DamagedRecordError, force_name, read_record, write_record
from storage.digest import Digest, tree_digest
from storage.errors import InvalidInput
from storage.files import sync
from storage.lazy import lazy_property

__all__ = ["Manifest", "ManifestFile", "Manifests"]

_FORMAT = 1
# Last use is told to this many seconds; a hit then seldom writes.
_USE_GRAIN = 30.0
# Of one link, with all the links that it goes through.
_MAX_STEPS = 1000
_MAX_PATH = 4096


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model."""

    path: str
    """Relative, with ``/``."""

    size: int
    """Bytes."""

    digest: Digest
    """The address of its blob."""

    others: tuple[Digest, ...] = ()
    """Its digests in other algorithms, where they were computed."""

    executable: bool = False

    def digest_in(self, algorithm: str) -> Digest | None:
        """Return its digest in ``algorithm``, if that is known."""
        for digest in (self.digest, *self.others):
            if digest.algorithm == algorithm:
                return digest
        return None


@dataclass(frozen=True)
class Manifest:
    """The files of one model; links and empty folders only where an archive was unpacked."""

    is_tree: bool
    """Whether it is a tree; else it is one file, which gives the path its name."""

    files: tuple[ManifestFile, ...]
    links: tuple[tuple[str, str], ...] = ()
    """Symbolic links: path and target. None leads out of the tree."""

    folders: tuple[str, ...] = ()
    """Folders that hold nothing."""

    @lazy_property
    def id(self) -> str:
        """Hash of the content: paths, sizes, addresses and kinds of all entries."""
        lines = [f"{'tree' if self.is_tree else 'file'}"]
        for file in sorted(self.files, key=lambda file: file.path):
            kind = "x" if file.executable else "f"
            lines.append(f"{kind}\0{file.path}\0{file.size}\0{file.digest}")
        lines += sorted(f"l\0{path}\0{target}" for path, target in self.links)
        lines += sorted(f"d\0{path}" for path in self.folders)
        return hash_text(*lines)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def digest(self, algorithm: str) -> Digest | None:
        """Return the digest of the file or of the tree, if it is known in ``algorithm``."""
        found = {file.path: file.digest_in(algorithm) for file in self.files}
        if not self.is_tree:
            return found[self.files[0].path]
        known = {path: digest for path, digest in found.items() if digest is not None}
        return tree_digest(known, algorithm) if len(known) == len(found) else None

    def with_digests(self, found: Mapping[str, Mapping[str, Digest]]) -> Manifest:
        """Return the manifest with more digests of its files, by path and algorithm."""
        files = tuple(
            replace(file, others=_merged(file, found[file.path])) if file.path in found else file
            for file in self.files
        )
        return replace(self, files=files)

    def as_record(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "format": _FORMAT,
            "id": self.id,
            "tree": self.is_tree,
            "files": [
                {
                    "path": file.path,
                    "size": file.size,
                    "digest": str(file.digest),
                    "others": [str(digest) for digest in kept(file.others)],
                    "executable": file.executable,
                }
                for file in self.files
            ],
            "links": [list(link) for link in self.links],
            "folders": list(self.folders),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`as_record` gave; also of strangers, so nothing of it is believed.

        Raises:
            DamagedRecordError: it is no manifest, or one whose paths lead out of a tree.
        """
        try:
            manifest = cls(
                bool(record["tree"]),
                tuple(
                    ManifestFile(
                        _checked(file["path"]),
                        int(file["size"]),
                        Digest.parse(file["digest"]),
                        kept(Digest.parse(text) for text in file["others"]),
                        bool(file["executable"]),
                    )
                    for file in record["files"]
                ),
                tuple((_checked(path), _target(target)) for path, target in record["links"]),
                tuple(_checked(path) for path in record["folders"]),
            )
            if manifest.id != record["id"] or record["format"] != _FORMAT:
                raise DamagedRecordError("a manifest is not what its id says")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise DamagedRecordError(f"a manifest cannot be read: {exc}") from exc
        manifest._check_paths()
        return manifest

    def _check_paths(self) -> None:
        """Refuse entries that would be in one another's place."""
        entries = [file.path for file in self.files] + [path for path, _ in self.links]
        entries += self.folders
        taken = set(entries)
        inner = {path[:index] for path in taken for index, char in enumerate(path) if char == "/"}
        if len(taken) != len(entries) or taken & inner:
            raise DamagedRecordError("a manifest names a path twice")
        links = dict(self.links)
        if any(_leads_out(path, links) for path in links):
            raise DamagedRecordError("a link of a manifest leads out of its tree")
        if not self.is_tree and (len(entries) != 1 or not self.files or "/" in entries[0]):
            raise DamagedRecordError("a manifest of one file holds more or less than one")


class Manifests:
    """The manifests of one cache."""

    def __init__(self, layout: Layout) -> None:
        """Use those below the root of ``layout``."""
        self._layout = layout

    def load(self, manifest_id: str) -> Manifest | None:
        """Return a manifest, ``None`` if it is not there.

        Raises:
            DamagedRecordError: it is damaged.
        """
        record = read_record(self._layout.manifest(manifest_id))
        if record is None:
            return None
        manifest = Manifest.from_record(record)
        if manifest.id != manifest_id:
            raise DamagedRecordError(f"{self._layout.manifest(manifest_id)} is another manifest")
        return manifest

    def save(self, manifest: Manifest, *, durable: bool = False) -> None:
        """Keep a manifest, with the digests that are known of its files now.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self._layout.manifest(manifest.id)
        with contextlib.suppress(DamagedRecordError):
            old = self.load(manifest.id)
            if old is not None:
                manifest = manifest.with_digests(
                    {
                        file.path: {each.algorithm: each for each in file.others}
                        for file in old.files
                    }
                )
            if old == manifest:
                self.touch(manifest.id)
                if durable:
                    sync(path)
                    force_name(self._layout, path)
                return
        write_record(self._layout, path, manifest.as_record(), durable=durable)

    def touch(self, manifest_id: str) -> None:
        """Note that a manifest is used now, where the cache can be written."""
        path = self._layout.manifest(manifest_id)
        with contextlib.suppress(OSError):
            if time.time() - os.stat(path).st_mtime > _USE_GRAIN:
                os.utime(path)

    def last_use(self, manifest_id: str) -> float:
        """Return when a manifest was used last, in seconds since the epoch; 0 if it is gone."""
        try:
            return os.stat(self._layout.manifest(manifest_id)).st_mtime
        except OSError:
            return 0.0

    def ids(self) -> Iterator[str]:
        """Yield the ids of all manifests, damaged ones too."""
        for prefix in listed(self._layout.manifests):
            for name in listed(os.path.join(self._layout.manifests, prefix)):
                if name.endswith(".json"):
                    yield name.removesuffix(".json")


def _merged(file: ManifestFile, digests: Mapping[str, Digest]) -> tuple[Digest, ...]:
    known = {digest.algorithm: digest for digest in (*digests.values(), *file.others)}
    known.pop(file.digest.algorithm, None)
    return tuple(known[name] for name in sorted(known))


def _checked(path: object) -> str:
    """Return a relative path that stays where it belongs."""
    # What is longer than any system takes would cost much to look at.
    parts = path.split("/") if isinstance(path, str) and len(path) <= _MAX_PATH else []
    if not parts or "\0" in str(path) or any(part in ("", ".", "..") for part in parts):
        raise InvalidInput(f"{str(path)[:80]!r} is no path of a model")
    return str(path)


def _target(text: object) -> str:
    """Return what a link can say."""
    if not isinstance(text, str) or "\0" in text or len(text) > _MAX_PATH:
        raise InvalidInput(f"{str(text)[:80]!r} is no target of a link")
    return text


def _leads_out(path: str, links: Mapping[str, str]) -> bool:
    """Tell whether a link, or one that it leads to, ends outside of the tree or nowhere."""
    here = path.split("/")[:-1]
    ahead = links[path].split("/")[::-1]
    if links[path].startswith("/") or not links[path]:
        return True
    for _ in range(_MAX_STEPS):
        if not ahead:
            return False
        part = ahead.pop()
        if part == "..":
            if not here:
                return True
            here.pop()
        elif part not in ("", "."):
            further = links.get("/".join([*here, part]))
            if further is None:
                here.append(part)
            elif further.startswith("/"):
                return True
            else:
                ahead += further.split("/")[::-1]
    return True
