"""What is known about content that the cache holds: other digests of it, and where it is.

Both maps are hints. An entry says which blob a content would be, not that it is there; an
entry that is lost costs a transfer, and nothing else.

Entries are kept many to a record, since a record for each of a model's small files would take
longer to write than the file: objects by their folder, digests by their first two digits.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from storage.cache.layout import Layout
from storage.cache.records import (
    DamagedRecordError,
    UnreadableRecordError,
    read_record,
    write_record,
)
from storage.digest import CHECKSUMS, Digest

__all__ = ["TRUSTED", "Index", "Known", "ObjectKey", "kept"]

TRUSTED = frozenset({"blake3", "sha256", "sha512"})
"""Algorithms whose digests stand for the content; for MD5 and SHA-1 somebody can make another."""

# A download that is killed forgets the small objects of its last seconds.
_FLUSH_INTERVAL = 2.0
_FLUSH_SHARE = 20
_LARGE = 8 * 1024 * 1024
_KEPT = 512


def kept(others: Iterable[Digest]) -> tuple[Digest, ...]:
    """Return those of a content's other digests that are worth keeping.

    Checksums are not: they tell no content from another, and whoever reads the cache, or what
    was exported from it, may have nothing to compute them with.
    """
    return tuple(digest for digest in others if digest.algorithm not in CHECKSUMS)


@dataclass(frozen=True, slots=True)
class Known:
    """The content that an object has."""

    digest: Digest
    """The address of its blob."""

    size: int
    others: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """One version of an object of a store."""

    folder: str
    """Hash of the store and of all of the key up to its last slash."""

    name: str
    """What follows that slash."""

    pin: str
    """Version or strong ETag."""


class Index:
    """Two maps to blobs: from other digests, and from objects of stores. Safe for threads."""

    def __init__(self, layout: Layout) -> None:
        """Use the one below the root of ``layout``."""
        self._layout = layout
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int] | None, dict[str, Any]]] = {}
        self._unsaved: dict[str, dict[str, Any]] = {}
        self._flush_at = 0.0
        _instances.add(self)

    def by_digest(self, digests: Iterable[Digest], algorithm: str) -> Digest | None:
        """Return the address, in ``algorithm``, of the content that has one of ``digests``."""
        trusted = [digest for digest in digests if digest.algorithm in TRUSTED]
        for digest in trusted:
            if digest.algorithm == algorithm:
                return digest
        for digest in trusted:
            address = self._find(self._layout.advertised(digest), digest.hex)
            if address is not None and address.startswith(f"{algorithm}:"):
                return Digest.parse(address)
        return None

    def by_source(self, key: ObjectKey) -> Known | None:
        """Return what an object of a store is."""
        entry = self._find(self._layout.source(key.folder), key.name)
        if entry is None or entry["pin"] != key.pin:
            return None
        others = tuple(Digest.parse(text) for text in entry["others"])
        return Known(Digest.parse(entry["blob"]), entry["size"], others)

    def learn(self, known: Known, source: ObjectKey | None) -> None:
        """Note the digests of a blob that were verified, and the object it came from.

        Raises:
            OSError: the cache cannot be written.
        """
        entries: list[tuple[str, str, Any]] = [
            (self._layout.advertised(digest), digest.hex, str(known.digest))
            for digest in known.others
            if digest.algorithm in TRUSTED
        ]
        if source is not None:
            entry = {
                "pin": source.pin,
                "blob": str(known.digest),
                "size": known.size,
                "others": [str(digest) for digest in kept(known.others)],
            }
            entries.append((self._layout.source(source.folder), source.name, entry))
        with self._lock:
            for path, name, value in entries:
                self._unsaved.setdefault(path, {})[name] = value
            if known.size >= _LARGE or time.monotonic() >= self._flush_at:
                self._flush()

    def flush(self) -> None:
        """Write down what was learned.

        Raises:
            OSError: the cache cannot be written.
        """
        with self._lock:
            self._flush()

    def prune(self, is_there: Callable[[Digest], bool]) -> int:
        """Forget what leads to blobs that are gone, and records that are damaged.

        Args:
            is_there: tells of a blob whether some root has it.

        Returns:
            How many entries were forgotten.

        Raises:
            OSError: the cache cannot be written.
        """
        pruned = 0
        for folder, _, names in os.walk(self._layout.index):
            for path in (os.path.join(folder, name) for name in names):
                try:
                    entries = read_record(path) or {}
                except UnreadableRecordError:
                    continue
                except DamagedRecordError:
                    entries = {}
                kept = {name: entry for name, entry in entries.items() if is_there(_blob(entry))}
                pruned += len(entries) - len(kept)
                if not kept:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                elif len(kept) < len(entries):
                    write_record(self._layout, path, kept)
        return pruned

    def _flush(self) -> None:
        began = time.monotonic()
        for path, entries in self._unsaved.items():
            # What another process writes at this very moment may get lost.
            write_record(self._layout, path, self._load(path) | entries)
        self._unsaved.clear()
        now = time.monotonic()
        self._flush_at = now + max(_FLUSH_INTERVAL, _FLUSH_SHARE * (now - began))

    def _find(self, path: str, name: str) -> Any:
        with self._lock:
            return self._unsaved.get(path, {}).get(name) or self._load(path).get(name)

    def _load(self, path: str) -> dict[str, Any]:
        """Return the entries of one record; it is read again only when it has changed."""
        try:
            status = os.stat(path)
            state = (status.st_ino, status.st_mtime_ns)
        except OSError:
            state = None
        kept = self._read.get(path)
        if kept is not None and kept[0] == state:
            return kept[1]
        entries: dict[str, Any] = {}
        with contextlib.suppress(DamagedRecordError):
            entries = read_record(path) or {}
        if len(self._read) >= _KEPT:
            self._read.clear()
        self._read[path] = (state, entries)
        return entries


_instances: weakref.WeakSet[Index] = weakref.WeakSet()


def _after_fork() -> None:
    # The thread that held one does not exist in the child.
    for index in _instances:
        index._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _blob(entry: Any) -> Digest:
    """Return the blob that an entry leads to."""
    return Digest.parse(entry if isinstance(entry, str) else entry["blob"])
