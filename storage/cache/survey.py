"""What is in a cache: what takes its space, and what must not go.

The order in which things are read matters to those who remove some of them. A download holds
a lease on all that it needs until its manifest and its ref are there. So leases are read first:
what was released before that is named by something that is read after it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from storage.cache.announce import REMOVED, REMOVING
from storage.cache.layout import listed
from storage.cache.partials import living
from storage.cache.pins import pin_name
from storage.cache.records import DamagedRecordError, UnreadableRecordError
from storage.cache.refs import Ref
from storage.digest import Digest
from storage.errors import DestinationError

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache

__all__ = ["Survey", "folder_size", "occupied"]

_ID = re.compile("[0-9a-f]{64}")


class Survey:
    """The upper root of a cache, as far as eviction and garbage collection have to know it."""

    def __init__(self, cache: ModelCache) -> None:
        """Read everything.

        Raises:
            DestinationError: something cannot be read.
        """
        self._cache = cache
        root = cache.upper
        self.blobs: dict[Digest, os.stat_result] = dict(root.blobs.all())
        self.copies = {
            name: folder_size(root.layout.snapshot(name)) for name in listed(root.layout.snapshots)
        }
        """Bytes that each snapshot takes beside its blobs."""

        self.partial = _partial_size(root.path)
        self.manifests: dict[str, frozenset[Digest]] = {}
        """The blobs of each manifest."""

        self.damaged: set[str] = set()
        self.update()

    def update(self) -> None:
        """Read again what others may have changed meanwhile, of blobs and snapshots apart.

        Raises:
            DestinationError: something cannot be read.
        """
        cache = self._cache
        self.held = cache.leases.held()
        pins = cache.pins.names()
        self.refs: dict[str, list[Ref]] = defaultdict(list)
        """The refs to each manifest that are in this root."""
        self.sources: dict[str, set[str]] = defaultdict(set)
        """The names that pins of its sources have, by manifest; those of lower roots too."""
        for root in cache.roots:
            refs = self._refs() if root is cache.upper else root.refs.all()
            for ref in refs:
                self.sources[ref.manifest].add(pin_name(ref.source))
                if root is cache.upper:
                    self.refs[ref.manifest].append(ref)
        self.pinned = {
            manifest for manifest, sources in self.sources.items() if not pins.isdisjoint(sources)
        }
        before = {
            manifest_id: blobs
            for manifest_id, blobs in self.manifests.items()
            if manifest_id not in self.damaged
        }
        self.manifests.clear()
        self.damaged.clear()
        self.used: dict[str, float] = {}
        """When each manifest was used last, in seconds since the epoch."""
        for manifest_id in cache.upper.manifests.ids():
            self.used[manifest_id] = cache.upper.manifests.last_use(manifest_id)
            blobs = before.get(manifest_id)
            if blobs is None:
                blobs = self._blobs_of(manifest_id)
            if blobs is not None:
                self.manifests[manifest_id] = blobs

    def _refs(self) -> Iterator[Ref]:
        refs = self._cache.upper.refs
        for path, is_ref in refs.paths():
            with _reading():
                ref = refs.read(path) if is_ref else None
                if ref is not None:
                    yield ref

    def _blobs_of(self, manifest_id: str) -> frozenset[Digest] | None:
        with _reading():
            manifest = self._cache.upper.manifests.load(manifest_id)
            return None if manifest is None else frozenset(file.digest for file in manifest.files)
        self.damaged.add(manifest_id)
        # Whoever uses it goes by its snapshot.
        return frozenset(_leads_to(self._cache.upper.layout.snapshot(manifest_id)))

    @property
    def size(self) -> int:
        """Bytes that count against the budget."""
        blobs = sum(status.st_size for status in self.blobs.values())
        return blobs + sum(self.copies.values()) + self.partial

    def is_idle(self, manifest_id: str, grace: float) -> bool:
        """Tell whether a manifest is neither pinned, nor leased, nor used lately."""
        return not (
            manifest_id in self.pinned
            or manifest_id in self.held.manifests
            or _is_recent(self.used.get(manifest_id, 0.0), grace)
        )

    def unreferenced(self, grace: float) -> list[str]:
        """Return the idle manifests that no source leads to any more, or that are damaged."""
        return [
            manifest_id
            for manifest_id in self.used
            if (manifest_id not in self.sources or manifest_id in self.damaged)
            and self.is_idle(manifest_id, grace)
        ]

    def named(self, without: Iterable[str] = ()) -> set[Digest]:
        """Return the blobs that leases name, or manifests other than those of ``without``."""
        left_out = set(without)
        return self._leased().union(
            *(blobs for each, blobs in self.manifests.items() if each not in left_out)
        )

    def _leased(self) -> set[Digest]:
        found = set()
        for text in self.held.blobs:
            with contextlib.suppress(ValueError):
                found.add(Digest.parse(text))
        return found

    def kept(self, grace: float) -> tuple[int, int, int]:
        """Return the bytes that are pinned, of the rest those in use, of the rest those recent."""
        sizes = []
        models: set[str] = set()
        blobs: set[Digest] = set()
        recent = {each for each, used in self.used.items() if _is_recent(used, grace)}
        for its_models, its_blobs in (
            (self.pinned, set[Digest]()),
            (self.held.manifests, self._leased()),
            (recent, set[Digest]()),
        ):
            its_blobs = its_blobs.union(*(self.manifests.get(each, ()) for each in its_models))
            size = sum(self.copies.get(each, 0) for each in its_models - models)
            sizes.append(size + self.total(its_blobs - blobs))
            models |= its_models
            blobs |= its_blobs
        return sizes[0], sizes[1], sizes[2]

    def total(self, digests: Iterable[Digest]) -> int:
        """Return the bytes of those of some blobs that are here."""
        return sum(self.blobs[digest].st_size for digest in digests if digest in self.blobs)

    def unneeded(self, without: Iterable[str], grace: float) -> list[Digest]:
        """Return the blobs that nothing needs once the manifests of ``without`` are gone.

        What no manifest ever named may be of a download that is to go on: it stays for a while.
        """
        needed = self.named(without)
        left = {digest for manifest in without for digest in self.manifests.get(manifest, ())}
        return [
            digest
            for digest, status in self.blobs.items()
            if digest not in needed and (digest in left or not _is_recent(status.st_ctime, grace))
        ]

    def orphans(self, grace: float) -> list[str]:
        """Return the snapshots without a manifest that nobody uses."""
        layout = self._cache.upper.layout
        found = []
        for name in self.copies:
            known = (self.used, self.refs, self.held.manifests)
            if _ID.fullmatch(name) and not any(name in names for names in known):
                with contextlib.suppress(OSError):
                    if not _is_recent(os.lstat(layout.snapshot(name)).st_ctime, grace):
                        found.append(name)
        return found


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Pass over what is damaged, but not over what only cannot be read now."""
    try:
        yield
    except UnreadableRecordError as exc:
        raise DestinationError(
            f"{exc}, so nobody can tell what of the cache is needed; nothing was removed"
        ) from exc
    except DamagedRecordError:
        pass


def occupied(cache: ModelCache) -> int:
    """Return the bytes that count against the budget of a cache: :attr:`Survey.size`, quicker."""
    root = cache.upper
    return (
        sum(status.st_size for _, status in root.blobs.all())
        + folder_size(root.layout.snapshots)
        + _partial_size(root.path)
    )


def folder_size(path: str, skip: Collection[str] = ()) -> int:
    """Return the bytes of all regular files in a folder, or of one file.

    Args:
        path: of the folder.
        skip: names of folders in it that do not count.
    """
    size = 0
    waiting = [path]
    while waiting:
        here = waiting.pop()
        # What another user works at is hidden from this one, and not this one's to weigh.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if not os.path.isdir(here):
                size += os.lstat(here).st_size
                continue
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if here != path or entry.name not in skip:
                            waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            size += entry.stat(follow_symlinks=False).st_size
    return size


def _partial_size(root: str) -> int:
    """Return the bytes of what living processes work at."""
    return sum(folder_size(path, (REMOVING, REMOVED)) for path in living(root))


def _is_recent(when: float, grace: float) -> bool:
    # What seems to come from the future was made before the clock was set back.
    return abs(time.time() - when) < grace


def _leads_to(snapshot: str) -> Iterator[Digest]:
    """Yield the blobs that the links of a snapshot lead to."""
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = os.path.join(folder, name)
            # Not all of them are links, and not all links lead to blobs.
            with contextlib.suppress(OSError, ValueError):
                *_, algorithm, _, hexdigest = os.readlink(path).split("/")
                yield Digest(algorithm, hexdigest)
