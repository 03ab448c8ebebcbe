"""A model on its way to a destination: from the cache, from the store, or not at all.

Several processes often want the same model at the same place, as the workers of one server that
start at once. One of them puts it there; the others wait for their turn, see what is there, and
leave it. What is there is known by a note, in the extended attribute ``user.modelstorage.placed``
of the file or of the tree's folder: which source, which version of it, and the path, size, time
and inode of every file. Whoever changes, adds or removes one has made the note void. A note
counts for the boot in which it was written, unless everything was forced to disk before. It is no
proof against those who may write there: a digest or a signature that is demanded is verified with
the bytes.

The turn is the lock of a file in a staging folder with a fixed name, beside the destination like
any other (:mod:`storage.transfer.destination`); a killed process leaves it free, and the next
download removes it. Without locks, or without extended attributes, everybody fetches.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from storage.cache.layout import hash_text
from storage.cache.locks import SourceLock
from storage.digest import Digest, hash_file
from storage.errors import IntegrityError, SignatureError
from storage.files import (
    boot_id,
    check_space,
    is_locked,
    make_parents,
    materialise,
    translate_os_errors,
)
from storage.transfer.destination import NOT_OF_TREE, Destination
from storage.transfer.progress import Meter

if TYPE_CHECKING:
    from storage.backends.base import ObjectInfo
    from storage.cache.manifests import Manifest
    from storage.client.cached import CachedDownload
    from storage.client.download import Download
    from storage.transfer.plan import Plan
    from storage.transfer.progress import ProgressCallback

__all__ = ["PlacedDownload", "tell_present"]

_XATTR = "user.modelstorage.placed"
_LOCK = "lock"
_TRIES = 3


def tell_present(plan: Plan, progress: ProgressCallback | None) -> None:
    """Tell ``progress`` of a download that had nothing to do: all is there already."""
    meter = _meter(plan, progress)
    meter.add_present(plan.size or 0)
    for _ in plan.files:
        meter.add_object()
    meter.finish()


def _meter(plan: Plan, progress: ProgressCallback | None) -> Meter:
    return Meter("download", plan.uri, plan.size, len(plan.files), progress)


class PlacedDownload:
    """The part of a download that puts a model at a destination."""

    def __init__(self, job: Download, dest: str) -> None:
        """Prepare for ``job``; nothing is touched."""
        self._job = job
        self._dest = dest

    def materialise(self, manifest: Manifest) -> str:
        """Put a model that the cache has at the destination, and return its path there."""
        job = self._job
        # An archive may hold no file at all.
        name = "" if manifest.is_tree else manifest.files[0].path
        destination = self._destination(manifest.is_tree, name, None)
        version = None if job.link is not None else f"manifest {manifest.id}"
        with self._turn(destination, version) as turn:
            if turn.found:
                # It is what the cache has, and that was verified.
                destination.tidy()
                return destination.path
            with destination:
                if job.link is None:
                    check_space(os.path.dirname(destination.content), manifest.size)
                with translate_os_errors(destination.path):
                    self._fill(manifest, destination.content)
                return turn.publish(version)

    def _fill(self, manifest: Manifest, root: str) -> None:
        for folder in manifest.folders:
            os.makedirs(os.path.join(root, folder), exist_ok=True)
        for file in manifest.files:
            place = os.path.join(root, file.path) if manifest.is_tree else root
            os.makedirs(os.path.dirname(place), exist_ok=True)
            # A link to a blob could not be a program.
            link = None if file.executable else self._job.link
            blob = self._job.client.cache.blob_path(file.digest)
            materialise(blob, place, link, executable=file.executable)
        for name, target in manifest.links:
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            os.symlink(target, os.path.join(root, name))

    def fetch(self, plan: Plan, cached: CachedDownload | None) -> str:
        """Put what is cached and fetch what is not; verify and publish."""
        job = self._job
        is_tree = plan.is_tree or job.unpack
        destination = self._destination(is_tree, plan.files[0].path, job.source.id)
        with self._turn(destination, self._version(plan)) as turn:
            if turn.found and self._is_right(plan, destination.path):
                tell_present(plan, job.progress)
                destination.tidy()
                return destination.path
            return self._fetch(plan, destination, turn, cached)

    def _version(self, plan: Plan) -> str | None:
        """Return what tells the version that is to be there; ``None`` if nothing does."""
        job = self._job
        # What is on this machine is copied sooner than it is compared.
        if job.is_here or job.link is not None:
            return None
        # Nobody can hold what was unpacked to the digest of an archive that is gone.
        if job.unpack and job.demands:
            return None
        return plan.fingerprint()

    def _is_right(self, plan: Plan, path: str) -> bool:
        """Tell whether what is there already is what the caller demands, byte by byte."""
        job = self._job
        if not job.demands:
            return True
        paths: dict[str, str] = {}
        digests: dict[str, dict[str, Digest]] = {}
        with translate_os_errors(path), contextlib.suppress(IntegrityError, SignatureError):
            for file in plan.files:
                place = os.path.join(path, file.path) if plan.is_tree else path
                demand = job.demand(file, plan.is_tree)
                wanted = job.algorithms if demand is None else {*job.algorithms, demand.algorithm}
                found = hash_file(place, wanted)
                if demand is not None and found[demand.algorithm] != demand:
                    return False
                paths[file.path], digests[file.path] = place, found
            job.verify(plan.is_tree, paths, digests)
            return True
        return False

    def _fetch(
        self, plan: Plan, destination: Destination, turn: _Turn, cached: CachedDownload | None
    ) -> str:
        job = self._job
        meter = _meter(plan, job.progress)
        with destination:
            archive = destination.scratch(plan.files[0].path) if job.unpack else None
            place = archive or destination.content
            targets = {
                file.path: os.path.join(place, file.path) if plan.is_tree else place
                for file in plan.files
            }
            journal = destination.resume({targets[file.path]: file.info for file in plan.files})
            here = 0 if journal is None else journal.noted
            check_space(os.path.dirname(destination.content), max(0, (plan.size or 0) - here))
            digests: dict[str, Mapping[str, Digest]] = {}
            for file in plan.files:
                target = targets[file.path]
                if cached is None or (journal is not None and journal.has(target)):
                    continue
                found = cached.put(file, plan.is_tree, target)
                if found is not None:
                    digests[file.path] = found
                    meter.add_present(file.info.size or 0)
                    meter.add_object()
            missing = tuple(file for file in plan.files if file.path not in digests)
            rest = replace(plan, files=missing)
            folder, single = (place, None) if plan.is_tree else (None, place)
            arrived: dict[str, ObjectInfo] = {}
            for fetched in job.fetch(rest, folder, single, meter, journal):
                digests[fetched.path] = fetched.digests
                arrived[fetched.path] = fetched.info
            job.verify(plan.is_tree, targets, digests)
            if archive is not None:
                job.extract(archive, destination.content)
                os.unlink(archive)
            # What was replaced while it came is known as what came.
            came = (replace(file, info=arrived.get(file.path, file.info)) for file in plan.files)
            published = turn.publish(self._version(replace(plan, files=tuple(came))))
        meter.finish()
        return published

    def _destination(self, is_tree: bool, name: str, source: str | None) -> Destination:
        """Return where the file or tree is to be; ``name`` is the file's."""
        job, path = self._job, self._dest
        if not is_tree and (path.endswith("/") or os.path.isdir(path)):
            path = os.path.join(path, name)
        return Destination(
            path, tree=is_tree, overwrite=job.overwrite, durable=job.durable, source=source
        )

    def _turn(self, destination: Destination, version: str | None) -> _Turn:
        job = self._job
        timeout = job.client.settings.cache_lock_timeout
        return _Turn(destination, job.source.id, version, durable=job.durable, timeout=timeout)


class _Turn:
    """The turn of one process at one destination; a context manager.

    Where there is no version, there is no waiting either, and nothing is noted.
    """

    def __init__(
        self,
        destination: Destination,
        source: str,
        version: str | None,
        *,
        durable: bool,
        timeout: float,
    ) -> None:
        """Describe what is to be there; nothing is touched.

        Args:
            destination: the place.
            source: hash of what was asked for.
            version: of the source, which is to be there.
            durable: whether only what was forced to disk counts.
            timeout: seconds to wait for others.
        """
        self._destination = destination
        self._source = source
        self._version = version
        self._durable = durable
        self._timeout = timeout
        self._folder: str | None = None
        self._lock: SourceLock | None = None
        self._made: list[str] = []
        self.found = False
        """Whether the version is there already."""

    def __enter__(self) -> Self:
        if self._version is None:
            return self
        folder = self._destination.reserved(self._source)
        if self._is_settled(folder):
            return self
        try:
            with contextlib.suppress(OSError):  # whoever cannot write there says so soon
                self._made = make_parents(os.path.dirname(self._destination.path))
                self._folder = folder
                self._lock = self._wait(folder)
            self.found = self.found or self._is_there()
        except BaseException as exc:
            self.__exit__(type(exc), exc, exc.__traceback__)
            raise
        if self.found:
            # There is nothing to do that others should wait for.
            self.__exit__(None, None, None)
        return self

    def _wait(self, folder: str) -> SourceLock:
        over = time.monotonic() + self._timeout
        for _ in range(_TRIES):
            lock = SourceLock(
                os.path.join(folder, _LOCK),
                timeout=self._timeout,
                # Whoever has the lock lives, and gives it back if its transfer stalls.
                stall=self._timeout,
                done=lambda: self._is_settled(folder),
            ).__enter__()
            # Somebody may have removed the folder, as one that a killed process left.
            if lock.acquired or self.found or time.monotonic() > over:
                break
        return lock

    def _is_settled(self, folder: str) -> bool:
        """Tell whether the version is there, and whoever put it there has left."""
        self.found = not os.path.lexists(folder) and self._is_there()
        return self.found

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lock, self._lock = self._lock, None
        folder, self._folder = self._folder, None
        if folder is not None:
            file = os.path.join(folder, _LOCK)
            with contextlib.suppress(OSError):
                if (lock is not None and lock.acquired) or not is_locked(file):
                    # While it is held: whoever waits for it begins again with a new one.
                    os.unlink(file)
            if lock is not None:
                lock.__exit__(exc_type, exc, traceback)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        for made in reversed(self._made if exc_type is not None else []):
            with contextlib.suppress(OSError):
                os.rmdir(made)

    def _is_there(self) -> bool:
        """Tell whether the version is there, as it was put there."""
        path = self._destination.path
        if self._version is None:
            return False
        try:
            note = json.loads(os.getxattr(path, _XATTR))
            return bool(
                note["source"] == self._source
                and note["version"] == self._version
                and self._outlasts(note["boot"])
                and note["state"] == _state(path)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _outlasts(self, boot: str | None) -> bool:
        """Tell whether what was written in ``boot``, or forced to disk, counts."""
        return boot is None or (not self._durable and boot == boot_id())

    def publish(self, version: str | None) -> str:
        """Publish what is staged, and note what it is.

        Args:
            version: that arrived, which need not be the one that was expected; ``None`` if
                nothing tells it.
        """
        version = None if self._version is None else version
        boot = None if self._durable else boot_id()
        if version is None or (boot is None and not self._durable):
            return self._destination.publish()
        # As it is staged: what somebody else puts there afterwards is not what was verified.
        state = _state(self._destination.content)
        path = self._destination.publish()
        note = {"source": self._source, "version": version, "boot": boot, "state": state}
        with contextlib.suppress(OSError):
            os.setxattr(path, _XATTR, json.dumps(note).encode())
        return path


def _state(path: str) -> str:
    """Hash the path, kind, size, time and inode of a file, or of all that is in a folder."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return _line("", status)
    lines = []
    for root, folders, files in os.walk(path):
        base = os.path.relpath(root, path)
        if base == ".":
            folders[:] = [name for name in folders if not NOT_OF_TREE.fullmatch(name)]
        for name in folders + files:
            lines.append(_line(f"{base}/{name}", os.lstat(os.path.join(root, name))))
    return hash_text(*sorted(lines))


def _line(path: str, status: os.stat_result) -> str:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        return f"{path} {kind}"
    return f"{path} {kind} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
