"""One cache as the client sees it: a root that is written, and lower ones that are only read."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from storage.cache.announce import wait_for_removals
from storage.cache.blobs import Blobs, State
from storage.cache.index import Index, Known, ObjectKey
from storage.cache.layout import Layout, listed
from storage.cache.leases import leases_of
from storage.cache.manifests import Manifest, Manifests
from storage.cache.pins import Pins, pin_name
from storage.cache.records import (
    DamagedRecordError,
    UnreadableRecordError,
    force_name,
    read_record,
    write_record,
)
from storage.cache.refs import Ref, Refs, Source
from storage.cache.snapshots import Snapshots
from storage.digest import ALGORITHMS, Digest
from storage.errors import (
    ConfigurationError,
    DestinationError,
    ModelMissingError,
    StorageError,
    few,
)
from storage.files import shown, sync, sync_tree, translate_os_errors
from storage.uri import Location

__all__ = ["CacheShortfallError", "ModelCache", "Root"]

_FORMAT = 1
_SHOWN = 3
# What translate_os_errors has better words for.
_EXPLAINED = (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)


class CacheShortfallError(Exception):
    """What a source had is not all there, or not as it was; the text says what. Internal."""

    def __init__(self, text: str, damaged: bool = False) -> None:
        """Keep the ``text``, which follows the name of the source in a message."""
        super().__init__(text)
        self.damaged = damaged


class Root:
    """The parts of one cache on disk, put together. Construction touches nothing."""

    def __init__(self, path: str, others: Sequence[Root] = (), *, read_only: bool = False) -> None:
        """Describe the cache at ``path``, whose snapshots may lead to blobs of ``others``."""
        self.layout = Layout(path)
        self.blobs = Blobs(self.layout, read_only=read_only)
        self.manifests = Manifests(self.layout)
        self.refs = Refs(self.layout)
        self.index = Index(self.layout)
        self.snapshots = Snapshots(self.layout, self.find_blob)
        self._others = others

    @property
    def path(self) -> str:
        """The root."""
        return self.layout.root

    def find_blob(self, digest: Digest) -> str:
        """Return the path of a blob, here or in one of the others; the path here if nowhere."""
        here = self.blobs.path(digest)
        if not self._others or os.path.exists(here):
            return here
        for other in self._others:
            there = other.blobs.path(digest)
            if os.path.exists(there):
                return there
        return here

    def secure(self, manifest: Manifest) -> None:
        """Force to disk what an earlier download of a model left to the system.

        Raises:
            OSError: the cache cannot be written.
        """
        # Those of lower caches are not ours.
        mine = [
            file.digest for file in manifest.files if os.path.exists(self.layout.blob(file.digest))
        ]
        if not all(map(self.blobs.is_secure, mine)):
            for digest in mine:
                self.blobs.secure(digest)
            sync(self.layout.manifest(manifest.id))
            sync_tree(self.layout.snapshot(manifest.id))
            for path in (self.layout.manifest(manifest.id), self.layout.snapshot(manifest.id)):
                force_name(self.layout, path)

    def holds(self, manifest: Manifest) -> bool:
        """Tell whether every blob of a manifest is in this very root, and clean."""
        return all(
            self.blobs.look(file.digest, file.size) is State.CLEAN for file in manifest.files
        )


class ModelCache:
    """The content-hash cache. Safe for threads and processes; construction touches nothing."""

    def __init__(
        self,
        root: str,
        *,
        lower: Iterable[str] = (),
        algorithm: str = "blake3",
        budget: int | None = None,
        grace: float = 3600.0,
        lock_timeout: float = 3600.0,
    ) -> None:
        """Describe a cache.

        Args:
            root: the folder that is written; it is made when it is first needed.
            lower: caches that are read through, never written or locked, in this order.
            algorithm: of the digests that address blobs, ``blake3`` or ``sha256``.
            budget: bytes that blobs may take; no limit if ``None``.
            grace: seconds for which what was used stays, whatever the budget says.
            lock_timeout: seconds to wait for another process that fetches the same source.
        """
        self.lower = tuple(Root(os.path.abspath(path), read_only=True) for path in lower)
        self.upper = Root(os.path.abspath(root), self.lower)
        self.algorithm = algorithm
        self.budget = budget
        self.grace = grace
        self.lock_timeout = lock_timeout
        self.leases = leases_of(self.upper.path)
        self.pins = Pins(self.upper.layout)
        self._checked = False

    @property
    def roots(self) -> tuple[Root, ...]:
        """All roots, in the order in which they are asked."""
        return (self.upper, *self.lower)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the system's errors about the cache into ours; the first time make it a cache.

        Raises:
            DestinationError: it cannot be written.
            ConfigurationError: what is there is another kind of cache.
        """
        with translate_os_errors(self.upper.path):
            try:
                self.check_version(create=True)
                yield
            except OSError as exc:
                if isinstance(exc, StorageError) or exc.errno in _EXPLAINED:
                    raise
                where = exc.filename2 or exc.filename or self.upper.path
                raise DestinationError(
                    f"the cache {self.upper.path} cannot be written: {exc.strerror or exc} "
                    f"({shown(where)}); set STORAGE_CACHE_DIR to a folder that this user may "
                    "write, or name a destination"
                ) from exc

    def check_version(self, *, create: bool = False) -> None:
        """Refuse a cache of another format or with other addresses.

        Args:
            create: make a cache of the folder if it is none.

        Raises:
            ConfigurationError: it is one, or something else that a cache would spoil.
            OSError: it cannot be created.
        """
        if self._checked:
            return
        for root in self.roots:
            path = root.layout.version
            try:
                found = read_record(path)
            except DamagedRecordError:
                found = None
            if found is None:
                if create and root is self.upper:
                    _refuse_foreign(root.layout)
                    record = {"format": _FORMAT, "algorithm": self.algorithm}
                    write_record(root.layout, path, record, durable=True)
                    _sync_above(root.path)
                continue
            if found.get("format") != _FORMAT:
                raise ConfigurationError(
                    f"{root.path} is a cache of format {found.get('format')}; this version reads "
                    f"format {_FORMAT}; set STORAGE_CACHE_DIR to another folder"
                )
            if found.get("algorithm") != self.algorithm:
                raise ConfigurationError(
                    f"{root.path} is a cache with {found.get('algorithm')} addresses, and the "
                    f"settings ask for {self.algorithm}; set STORAGE_CACHE_DIR to another folder "
                    "or digest_algorithm to what it has"
                )
        self._checked = create

    # -- what is there -----------------------------------------------------------------------

    def settle(self, digest: Digest, size: int) -> State:
        """Tell whether some root has a blob that can be used, verifying it if in doubt."""
        states = []
        for root in self.roots:
            states.append(root.blobs.settle(digest, size))
            if states[-1] is State.CLEAN:
                return State.CLEAN
            if states[-1] is State.DAMAGED and os.path.lexists(root.blobs.path(digest)):
                break  # it could not be moved, so it would be found before a better one
        return State.DAMAGED if State.DAMAGED in states else State.ABSENT

    def known(
        self, key: ObjectKey | None, digests: Iterable[Digest], size: int | None
    ) -> Known | None:
        """Return what an object is, if its content is here and can be used.

        Args:
            key: of the object in the index; ``None`` if its version cannot be told.
            digests: what its content must have, as far as somebody says so.
            size: in bytes, where known.
        """
        asked = tuple(digests)
        for root in self.roots:
            found = None if key is None else root.index.by_source(key)
            if found is None and asked and size is not None:
                address = root.index.by_digest(asked, self.algorithm)
                found = None if address is None else Known(address, size)
            if (
                found is not None
                and found.digest.algorithm == self.algorithm
                and size in (None, found.size)
            ):
                if not os.path.exists(self.blob_path(found.digest)):
                    continue
                # Before the look that counts: what is leased is not evicted.
                self.hold(blobs=[str(found.digest)])
                if self.settle(found.digest, found.size) is State.CLEAN:
                    return found
                self.leases.release_blobs([str(found.digest)])
        return None

    def ref(self, source: Source) -> Ref | None:
        """Return what a source had last.

        Raises:
            CacheShortfallError: the note of it is damaged, or cannot be read.
        """
        problem: DamagedRecordError | None = None
        for root in self.roots:
            try:
                found = root.refs.get(source)
            except DamagedRecordError as exc:
                problem = exc
                continue
            if found is not None:
                return found
        if isinstance(problem, UnreadableRecordError):
            # As that of another user, who kept it private; there is nothing to repair.
            raise CacheShortfallError(f"may be cached, but {problem}")
        if problem is not None:
            raise CacheShortfallError("is cached but damaged: the note of what it was", True)
        return None

    def manifest(self, manifest_id: str) -> Manifest:
        """Return a manifest.

        Raises:
            CacheShortfallError: it is damaged or not there.
        """
        damaged = False
        for root in self.roots:
            try:
                found = root.manifests.load(manifest_id)
            except DamagedRecordError:
                damaged = True
                continue
            if found is not None:
                return found
        raise CacheShortfallError(
            "is cached but damaged: the list of its files"
            if damaged
            else "is cached only in part: the list of its files is gone",
            damaged,
        )

    def check(self, manifest: Manifest) -> None:
        """See that every blob of a manifest is here and can be used.

        Raises:
            CacheShortfallError: one is not.
        """
        states = [self.settle(file.digest, file.size) for file in manifest.files]
        for state, kind in ((State.DAMAGED, "damaged"), (State.ABSENT, "part")):
            bad = [
                repr(file.path)
                for file, found in zip(manifest.files, states, strict=True)
                if found is state
            ]
            if not bad:
                continue
            if kind == "damaged":
                raise CacheShortfallError(f"is cached but damaged: {few(bad)}", True)
            there = len(manifest.files) - len(bad)
            raise CacheShortfallError(
                f"is cached only in part: {there} of {len(manifest.files)} files are there; "
                f"missing: {few(bad)}"
            )

    def open(self, manifest: Manifest, *, durable: bool = False) -> str:
        """Return the path of a model that :meth:`check` found whole.

        Raises:
            DestinationError: its snapshot is not there and cannot be made.
        """
        for root in self.roots:
            # A snapshot of the upper cache may lead to blobs of any; a lower one's may not.
            complete = root is self.upper or root.holds(manifest)
            if complete and root.snapshots.is_whole(manifest):
                if root is self.upper:
                    root.manifests.touch(manifest.id)
                    if durable:
                        with self.writing():
                            root.secure(manifest)
                return root.snapshots.path(manifest)
        with self.writing():
            # The list of its files may be in a lower cache only.
            self.upper.manifests.save(manifest, durable=durable)
            path = self.upper.snapshots.build(manifest, durable=durable)
            if durable:
                self.upper.secure(manifest)
            return path

    def blob_path(self, digest: Digest) -> str:
        """Return the path of a blob that :meth:`settle` found clean."""
        return self.upper.find_blob(digest)

    # -- what stays there --------------------------------------------------------------------

    def hold(self, manifests: Iterable[str] = (), blobs: Iterable[str] = ()) -> None:
        """Protect what is to be used, and return when it can be seen whether it is there.

        A removal that has begun may not have seen the lease; it is waited for.

        Args:
            manifests: ids.
            blobs: digests as ``<algorithm>:<hex>``.
        """
        ids = tuple(manifests)
        self.leases.hold(ids, blobs)
        wait_for_removals(self.upper.layout)
        for manifest_id in ids:
            self.upper.manifests.touch(manifest_id)

    def pin(self, location: Location) -> bool:
        """Keep what a source has, and whatever it will have, until it is unpinned.

        Returns:
            Whether it was not pinned yet.

        Raises:
            ModelMissingError: it is not in the cache.
            DestinationError: the cache cannot be written.
        """
        self.check_version()
        if self._knows(location):
            with self.writing():
                fresh = self.pins.add(location)
            # It may have been evicted before the pin was seen.
            wait_for_removals(self.upper.layout)
            if self._knows(location):
                return fresh
            if fresh:
                self.unpin(location)
        raise ModelMissingError(
            str(location),
            f"{location} is not in the cache {self.upper.path}, so it cannot be pinned; "
            "download it first",
        )

    def _knows(self, location: Location) -> bool:
        name = pin_name(location)
        return any(
            pin_name(ref.source) == name
            and any(each.manifests.last_use(ref.manifest) for each in self.roots)
            for root in self.roots
            for ref in root.refs.all()
        )

    def unpin(self, location: Location) -> bool:
        """Let what a source has be evicted again; tell whether it was pinned.

        Raises:
            DestinationError: the cache cannot be written.
        """
        self.check_version()
        if not os.path.isdir(self.upper.layout.pins):
            return False
        with self.writing():
            return self.pins.remove(location)

    def release(self, path: str) -> bool:
        """Take back one of the leases that a download made for the path that it returned.

        Returns:
            Whether it is a path in this cache. What is there may be evicted once every download
            that returned it was taken back.
        """
        for root in self.roots:
            inside = os.path.relpath(path, root.layout.snapshots).split(os.sep)
            if inside[0] != os.pardir:
                self.leases.release(inside[0])
                return True
        return False

    def close(self) -> None:
        """Give up all that this process holds; what it got may then be evicted."""
        self.leases.close()


def _refuse_foreign(layout: Layout) -> None:
    """Make no cache of a folder whose folders are somebody else's: tidying up removes in them.

    A cache that has lost its VERSION is none of these, and gets a new one.
    """
    names = {name for name in listed(layout.root) if not name.startswith(".")}
    kept = {os.path.basename(path) for path in layout.kept}
    others = names - kept - {"leases", "locks", "lost+found", "partial"}
    strangers = {name for name in listed(layout.blobs) if name not in ALGORITHMS}
    if names & kept and (others or strangers) and not os.path.lexists(layout.version):
        raise ConfigurationError(
            f"{layout.root} is no cache, and holds what is not ours: "
            f"{', '.join(map(shown, sorted(others or strangers)[:_SHOWN]))}; set "
            "STORAGE_CACHE_DIR to a folder that is empty or not there yet"
        )


def _sync_above(folder: str) -> None:
    """Force the name of a folder to disk, and those of the folders that it is in."""
    while folder != (folder := os.path.dirname(folder)):
        with contextlib.suppress(OSError):
            sync(folder)
