"""Whether a cache is what it says: every note readable, every model whole, every byte right.

Other processes may download, evict and tidy up meanwhile. What looks wrong is looked at again
while nobody evicts, and what is gone by then was no problem.
"""

from __future__ import annotations

import os
import secrets
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import unquote

from storage.cache.announce import wait_for_removals
from storage.cache.blobs import State, is_marked, set_mark
from storage.cache.cache import CacheShortfallError, ModelCache, Root
from storage.cache.layout import listed
from storage.cache.locks import gc_lock
from storage.cache.manifests import Manifest, ManifestFile
from storage.cache.records import DamagedRecordError, UnreadableRecordError, make_folder_for
from storage.cache.refs import Ref
from storage.digest import Digest, hash_file
from storage.errors import StorageError, few
from storage.files import sync

__all__ = ["Kind", "Problem", "Report", "set_aside", "verify"]

Kind = Literal["blob", "missing", "manifest", "ref", "snapshot", "stray"]
"""``blob``: wrong content; ``missing``: a model without some of its files; ``manifest`` and
``ref``: notes that cannot be read or lead nowhere; ``snapshot``: a tree that is not what its
model is; ``stray``: what does not belong among the blobs."""

_THREADS = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    kind: Kind
    what: str
    """What is wrong, and what was done about it."""

    path: str
    uris: tuple[str, ...] = ()
    """Of the models that it is a part of, without credentials."""

    quarantined_to: str | None = None
    """Where it is now, if it was moved."""


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`verify` found."""

    checked: int
    """Files of models that were looked at; of a full verification, blobs of no model too."""

    bytes: int
    """Bytes that were hashed."""

    problems: tuple[Problem, ...]


def verify(
    cache: ModelCache, *, full: bool = False, progress: Callable[[int], object] | None = None
) -> Report:
    """Look at everything in a cache, and in the lower ones.

    Damaged blobs of the cache go to quarantine, and snapshots that are wrong are made anew. In
    one that cannot be written, and in lower ones, all is only reported.

    Args:
        cache: what to look at.
        full: hash every blob; else only those that are in doubt, and of the others the size.
        progress: called with a number of bytes after so many were hashed, from any thread.

    Raises:
        ConfigurationError: it is another kind of cache.
    """
    cache.check_version()
    checks = [_Check(cache, root, full, progress) for root in cache.roots]
    for check in checks:
        check.run()
    return Report(
        sum(check.checked for check in checks),
        sum(check.bytes for check in checks),
        tuple(problem for check in checks for problem in check.problems),
    )


def set_aside(root: Root, problem: Problem) -> str | None:
    """Move what is wrong to quarantine and return its new path; ``None`` if that cannot be."""
    name = f"{problem.kind}-{os.path.basename(problem.path)[-150:]}.{secrets.token_hex(4)}"
    target = os.path.join(root.layout.quarantine, name)
    try:
        make_folder_for(target)
        os.rename(problem.path, target)
    except OSError:
        return None
    return target


class _Check:
    """The verification of one root."""

    def __init__(
        self,
        cache: ModelCache,
        root: Root,
        full: bool,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.checked = self.bytes = 0
        self.problems: list[Problem] = []
        self._cache = cache
        self._root = root
        self._full = full
        self._progress = progress
        self._lock = threading.Lock()
        self._uris: defaultdict[str, set[str]] = defaultdict(set)
        self._bad: dict[Digest, Problem] = {}
        self._users: defaultdict[Digest, set[str]] = defaultdict(set)

    def run(self) -> None:
        for path, ref in self._refs():
            if isinstance(ref, DamagedRecordError):
                uri = unquote(os.path.basename(os.path.dirname(path)), errors="surrogateescape")
                self.problems.append(Problem("ref", _why(ref), path, (uri,)))
            else:
                self._uris[ref.manifest].add(ref.source.uri)
        _in_threads(self._hash, self._every_blob() if self._full else self._doubtful())
        incomplete = list(self._check_manifests())
        damaged = {problem.path for problem in self.problems if problem.kind == "manifest"}
        loose = [
            manifest_id
            for manifest_id in self._uris
            if not self._has_manifest(manifest_id)
            and self._root.layout.manifest(manifest_id) not in damaged
        ]
        if incomplete or loose:
            self._confirm(incomplete, set(loose))
        for digest, problem in self._bad.items():
            self.problems.append(replace(problem, uris=tuple(sorted(self._users[digest]))))
        self._find_strays()

    @property
    def _is_upper(self) -> bool:
        return self._root is self._cache.upper

    @property
    def _roots(self) -> tuple[Root, ...]:
        """Where what a model of this root needs may be."""
        return self._cache.roots if self._is_upper else (self._root,)

    def _refs(self) -> Iterator[tuple[str, Ref | DamagedRecordError]]:
        """Yield the path of every ref, and the ref or why there is none."""
        for path, is_ref in self._root.refs.paths():
            if is_ref:
                try:
                    ref = self._root.refs.read(path)
                except DamagedRecordError as exc:
                    yield path, exc
                else:
                    if ref is not None:
                        yield path, ref

    # -- blobs -------------------------------------------------------------------------------

    def _manifests(self) -> Iterator[Manifest]:
        """Yield the manifests that can be read."""
        for manifest_id in self._root.manifests.ids():
            try:
                manifest = self._root.manifests.load(manifest_id)
            except DamagedRecordError:
                continue
            if manifest is not None:
                yield manifest

    def _every_blob(self) -> Iterator[tuple[Digest, int]]:
        for digest, status in self._root.blobs.all():
            yield digest, status.st_size

    def _doubtful(self) -> Iterator[tuple[Digest, int]]:
        """Yield the blobs of models that one look does not find right."""
        seen: set[Digest] = set()
        for manifest in self._manifests():
            for file in manifest.files:
                if file.digest in seen:
                    continue
                seen.add(file.digest)
                state = self._root.blobs.look(file.digest, file.size)
                if state in (State.DOUBTFUL, State.DAMAGED):
                    yield file.digest, file.size

    def _hash(self, digest: Digest, size: int) -> None:
        blobs = self._root.blobs
        state, moved = blobs.verify(digest, size)
        if state is State.DAMAGED and moved is None:
            # It could not be moved; or there is a better one now.
            state, moved = blobs.verify(digest, size)
        with self._lock:
            self.checked += self._full
            self.bytes += size
            if state is State.DAMAGED:
                what = "is damaged"
                if moved is None:
                    used = blobs.look(digest, size) is State.CLEAN
                    what += " and cannot be moved" + (", so it is used" if used else "")
                self._bad[digest] = Problem("blob", what, blobs.path(digest), (), moved)
        if self._progress is not None:
            self._progress(size)

    def _find_strays(self) -> None:
        top = self._root.layout.blobs
        for algorithm in listed(top):
            folder = os.path.join(top, algorithm)
            if not self._is_folder(folder):
                continue
            for prefix in listed(folder):
                inner = os.path.join(folder, prefix)
                if not self._is_folder(inner):
                    continue
                for name in listed(inner):
                    self._check_name(algorithm, prefix, os.path.join(inner, name))

    def _is_folder(self, path: str) -> bool:
        if os.path.isdir(path):
            return True
        self._report_stray(path)
        return False

    def _check_name(self, algorithm: str, prefix: str, path: str) -> None:
        name = os.path.basename(path)
        try:
            proper = Digest(algorithm, name).hex[:2] == prefix
            proper = proper and stat.S_ISREG(os.lstat(path).st_mode)
        except FileNotFoundError:
            return
        except (OSError, StorageError):
            proper = False
        # What NFS keeps for those who have it open goes by itself.
        if not proper and not name.startswith(".nfs"):
            self._report_stray(path)

    def _report_stray(self, path: str) -> None:
        if os.path.lexists(path):
            self.problems.append(Problem("stray", "is no blob", path))

    # -- models ------------------------------------------------------------------------------

    def _check_manifests(self) -> Iterator[tuple[str, tuple[ManifestFile, ...]]]:
        """Check all models; yield those that miss files, and which."""
        for manifest_id in self._root.manifests.ids():
            try:
                manifest = self._root.manifests.load(manifest_id)
            except DamagedRecordError as exc:
                path = self._root.layout.manifest(manifest_id)
                uris = tuple(sorted(self._uris.get(manifest_id, ())))
                self.problems.append(Problem("manifest", _why(exc), path, uris))
                continue
            if manifest is None:
                continue
            if not self._full:
                self.checked += len(manifest.files)
            for file in manifest.files:
                if file.digest in self._bad:
                    self._users[file.digest] |= self._uris.get(manifest_id, set())
            missing = self._missing(manifest)
            if missing:
                yield manifest_id, missing
            elif not any(file.digest in self._bad for file in manifest.files):
                self._check_snapshot(manifest)

    def _missing(self, manifest: Manifest) -> tuple[ManifestFile, ...]:
        """Return the files whose blob is nowhere; those found damaged are told by themselves."""
        return tuple(
            file
            for file in manifest.files
            if file.digest not in self._bad and self._is_nowhere(file)
        )

    def _is_nowhere(self, file: ManifestFile) -> bool:
        looks = (root.blobs.look(file.digest, file.size) for root in self._roots)
        return all(state is State.ABSENT for state in looks)

    def _has_manifest(self, manifest_id: str) -> bool:
        return any(os.path.exists(root.layout.manifest(manifest_id)) for root in self._roots)

    def _confirm(
        self, incomplete: list[tuple[str, tuple[ManifestFile, ...]]], loose: set[str]
    ) -> None:
        """Report what is still missing now, of what some source still names."""
        if self._is_upper:
            with gc_lock(self._root.path):
                wait_for_removals(self._root.layout)
                self._report_missing(incomplete, loose)
        else:
            self._report_missing(incomplete, loose)

    def _report_missing(
        self, incomplete: list[tuple[str, tuple[ManifestFile, ...]]], loose: set[str]
    ) -> None:
        named: defaultdict[str, set[str]] = defaultdict(set)
        for path, ref in self._refs():
            if isinstance(ref, DamagedRecordError):
                continue
            named[ref.manifest].add(ref.source.uri)
            if ref.manifest in loose and not self._has_manifest(ref.manifest):
                what = "leads to a model that is not here"
                self.problems.append(Problem("ref", what, path, (ref.source.uri,)))
        for manifest_id, files in incomplete:
            path = self._root.layout.manifest(manifest_id)
            # One that nothing leads to is never used; it goes when the cache is tidied up.
            if manifest_id not in named or not os.path.exists(path):
                continue
            gone = [repr(file.path) for file in files if self._is_nowhere(file)]
            if gone:
                what = f"files are missing: {few(gone)}"
                uris = tuple(sorted(named[manifest_id]))
                self.problems.append(Problem("missing", what, path, uris))

    # -- snapshots ---------------------------------------------------------------------------

    def _check_snapshot(self, manifest: Manifest) -> None:
        folder = self._root.layout.snapshot(manifest.id)
        if not os.path.lexists(folder):
            return  # made when it is used
        right = self._settle_copies(manifest, folder)
        snapshots = self._root.snapshots
        if right and (snapshots.is_whole(manifest) or not self._is_upper):
            # Of a lower cache it is used if it is whole; if not, one is made here.
            return
        what = "is not what its model is"
        if self._is_upper:
            try:
                self._cache.hold(manifests=[manifest.id])
                self._cache.check(manifest)
                # It may have been on its way out, or been made anew by another process.
                if not os.path.lexists(folder) or snapshots.is_whole(manifest):
                    return
                with self._cache.writing():
                    snapshots.build(manifest, durable=True)
                what += "; it was made anew"
            except CacheShortfallError:
                return
            except StorageError as exc:
                what += f" and cannot be made anew: {exc}"
            finally:
                self._cache.leases.release(manifest.id)
        uris = tuple(sorted(self._uris.get(manifest.id, ())))
        self.problems.append(Problem("snapshot", what, folder, uris))

    def _settle_copies(self, manifest: Manifest, folder: str) -> bool:
        """Hash the copies that are in doubt, or all; tell whether all are right."""
        right = True
        for file in manifest.files:
            path = os.path.join(folder, file.path)
            try:
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode):
                    continue
                marked = is_marked(found, file.digest)
                if marked and not self._full:
                    continue
                self.bytes += found.st_size
                good = hash_file(path, (file.digest.algorithm,)).get(file.digest.algorithm)
                if good == file.digest and marked:
                    continue
                right = right and good == file.digest
                if self._is_upper:
                    if good == file.digest:
                        sync(path)
                        set_mark(path, file.digest, durable=True)
                    else:
                        os.utime(path)  # the mark is gone, so nobody takes it for right
            except OSError:
                continue  # whether it is there is asked later
        return right


def _why(error: DamagedRecordError) -> str:
    return "cannot be read" if isinstance(error, UnreadableRecordError) else "is damaged"


def _in_threads(work: Callable[[Digest, int], object], items: Iterable[tuple[Digest, int]]) -> None:
    """Call ``work`` with each of ``items``, which are taken one by one."""
    waiting = iter(items)
    lock = threading.Lock()
    stop = threading.Event()

    def drain() -> None:
        while not stop.is_set():
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            work(*item)

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for future in [pool.submit(drain) for _ in range(_THREADS)]:
                future.result()
        except BaseException:
            stop.set()
            raise
