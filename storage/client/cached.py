"""One download through the cache: from what is there, else from the store and kept."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from storage.cache.cache import CacheShortfallError
from storage.cache.index import Known, ObjectKey
from storage.cache.manifests import Manifest, ManifestFile
from storage.cache.refs import Ref
from storage.client.sourcing import object_key
from storage.digest import Digest, hash_file
from storage.errors import (
    DestinationError,
    IntegrityError,
    ModelMissingError,
    OfflineError,
    TransferError,
    TransientError,
)
from storage.files import check_space, materialise, translate_os_errors
from storage.transfer.plan import Plan, PlannedFile, plan_at_version
from storage.transfer.progress import Meter, Progress

if TYPE_CHECKING:
    from storage.backends.base import ObjectInfo
    from storage.backends.repositories import RepositoryBackend
    from storage.cache.filling import Filling
    from storage.client.download import Download
    from storage.transfer.download import FetchedFile
    from storage.transfer.journal import Journal

__all__ = ["CachedDownload"]

# Of an object larger than this the store is asked for digests that its listing leaves out.
_WORTH_ASKING = 8 * 1024 * 1024
_TRIES = 3


class CachedDownload:
    """The part of a download that knows the cache; a context manager.

    What it uses can be evicted again at the end, but for what the caller gets: a path in the
    cache, or symbolic links into it.
    """

    def __init__(self, job: Download) -> None:
        """Prepare for ``job``; nothing is touched."""
        self._job = job
        self._cache = job.client.cache
        self._source = job.source
        self._held: list[str] = []
        self._leased: str | None = None

    def keep(self, manifest: Manifest) -> str:
        """Return the path of a model, which stays where it is as long as this process lives."""
        path = self._cache.open(manifest, durable=self._job.durable)
        self._leased = None
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None or self._job.link != "symlink":
            self._cache.leases.release_blobs(self._held)
            self._lease(None)

    def _lease(self, manifest_id: str | None) -> None:
        """Hold one manifest instead of another; before anybody looks whether it is there."""
        if manifest_id == self._leased:
            return
        if manifest_id is not None:
            self._cache.hold(manifests=[manifest_id])
        if self._leased is not None:
            self._cache.leases.release(self._leased)
        self._leased = manifest_id

    def _load(self, ref: Ref) -> Manifest:
        """Return what ``ref`` says, all of it here and right.

        Raises:
            CacheShortfallError: it is not.
        """
        self._lease(ref.manifest)
        manifest = self._cache.manifest(ref.manifest)
        self._cache.check(manifest)
        return manifest

    # -- without the store -------------------------------------------------------------------

    def offline(self) -> Manifest:
        """Return what the source was when it was asked last; no backend, no socket.

        Raises:
            OfflineError: it was never cached, only in part, or it is damaged.
            IntegrityError: it is not what is expected.
        """
        self._cache.check_version()
        advice = "download it again while the store can be reached"
        try:
            ref = self._cache.ref(self._source)
            if ref is not None:
                manifest = self._load(ref)
                self._demand(manifest, ref)
                return manifest
        except CacheShortfallError as exc:
            if exc.damaged:
                advice = f"`storage cache repair` or {advice}"
            raise self._not_here(f"{exc};", advice) from exc
        pending = self._cache.upper.refs.pending(self._source)
        if pending is not None:
            there = sum(self._has(key, (), None) is not None for key in pending.keys)
            what = f"is cached only in part: {there} of {pending.files} files are there;"
            raise self._not_here(what, advice)
        advice = "download it once while the store can be reached"
        raise self._not_here("was never cached with these filters, and", advice)

    def _not_here(self, what: str, advice: str) -> OfflineError:
        return OfflineError(
            f"{self._job.location} {what} offline nothing is fetched; {advice} "
            f"(cache: {self._cache.upper.path})"
        )

    def last(self) -> tuple[Ref, Manifest] | None:
        """Return what the source had last, if all of it is here and right.

        What another origin had counts only for a caller who expects a digest: it may be
        another model, and its version says nothing about this one.
        """
        self._cache.check_version()
        try:
            ref = self._cache.ref(self._source)
            if ref is None or (
                ref.source.origin != self._source.origin and self._job.expected is None
            ):
                return None
            return ref, self._load(ref)
        except CacheShortfallError:
            return None

    def fresh(self, last: tuple[Ref, Manifest] | None) -> Manifest | None:
        """Return what the source had last, if the call allows that to be used unasked.

        It does if it is young enough, or has the digest that is expected.
        """
        if last is None:
            return None
        ref, manifest = last
        if self._job.expected is not None:
            found = self._digest(manifest, ref, self._job.expected.algorithm)
            return manifest if found == self._job.expected else None
        age = time.time() - ref.validated_at
        limit = self._job.freshness
        # A clock that was set back makes no old answer young.
        return manifest if math.isinf(limit) or 0 <= age < limit else None

    # -- with the store ----------------------------------------------------------------------

    def obtain(self) -> Manifest:
        """Return what the source is now, after fetching into the cache what is not there."""
        from storage.cache.locks import SourceLock

        last = self.last()
        found = self.fresh(last) or self.unchanged_version(last) or self._unchanged_tree(last)
        plan = None
        # A repository's plan may take all of it: the lock is for that, too.
        if found is None and not self._job.backend.capabilities.repository:
            plan = self._job.make_plan()
            found = self._unchanged(plan, last)
        if found is not None:
            self._job.tell_present(found)
            return found
        path = os.path.join(self._cache.upper.layout.locks, f"{self._source.identity}.lock")
        # What stalls in a transfer is tried again sooner than that.
        stall = 2 * self._job.client.settings.transfer.stall_timeout
        with SourceLock(path, timeout=self._cache.lock_timeout, stall=stall) as lock:
            for _ in range(_TRIES):
                # Another process may have fetched it while this one waited.
                last = self.last()
                found = self._unchanged(plan, last) if plan else self.unchanged_version(last)
                if found is None and plan is None:
                    with lock.beating():
                        plan = self._job.make_plan()
                    found = self._unchanged(plan, last)
                if found is not None:
                    self._job.tell_present(found)
                    return found
                assert plan is not None
                try:
                    manifest = self._fill(plan, lock.beat)
                except CacheShortfallError as exc:
                    shortfall = exc
                    continue
                self._trim()
                return manifest
            raise TransferError(
                f"{self._job.location} {shortfall}, {_TRIES} times right after it was fetched; "
                f"something takes files away from the cache {self._cache.upper.path}"
            ) from shortfall

    def unchanged_version(self, last: tuple[Ref, Manifest] | None) -> Manifest | None:
        """Ask for the version of a whole repository, where there is one, and for nothing in it."""
        job = self._job
        if last is None or not job.backend.capabilities.repository:
            return None
        backend = cast("RepositoryBackend", job.backend)
        version = job.client.run_retried(backend.current_version, where=str(job.location))
        sizes = {file.path: file.size for file in last[1].files}
        plan = plan_at_version(str(job.location), last[1].is_tree, sizes, version)
        return self._unchanged(plan, last)

    def _unchanged_tree(self, last: tuple[Ref, Manifest] | None) -> Manifest | None:
        """Ask for a tree as a tree, where it was one: one request tells that nothing changed."""
        job = self._job
        settled = job.location.forces_tree or job.backend.capabilities.repository
        if last is None or not last[1].is_tree or settled or job.unpack:
            return None
        tree = replace(job.location, key=job.location.prefix)
        with contextlib.suppress(ModelMissingError):
            return self._unchanged(job.make_plan(tree), last)
        return None

    def _unchanged(self, plan: Plan, last: tuple[Ref, Manifest] | None) -> Manifest | None:
        """Return what the source had last, if the store says that it is the same now."""
        fingerprint = plan.fingerprint()
        if last is None or fingerprint is None or last[0].fingerprint != fingerprint:
            return None
        ref, manifest = last
        expected = self._job.expected
        if expected is not None and self._digest(manifest, ref, expected.algorithm) is None:
            return None  # of an archive that is gone; fetched again, it will be known
        self._demand(manifest, ref)
        with contextlib.suppress(DestinationError), self._cache.writing():
            seen = replace(ref, source=self._source, validated_at=time.time())
            self._cache.upper.refs.set(seen, durable=self._job.durable)
        return manifest

    def _fill(self, plan: Plan, beat: Callable[[], object]) -> Manifest:
        """Fetch what is not there and make the model known.

        Raises:
            CacheShortfallError: a part of it went away meanwhile.
        """
        job = self._job
        plan = self._with_digests(plan)

        def report(progress: Progress) -> None:
            beat()
            if job.progress is not None:
                job.progress(progress)

        meter = Meter("download", plan.uri, plan.size, len(plan.files), report)
        keys = [self._key(file.info) for file in plan.files]
        known = {file.path: self._known(file, plan.is_tree) for file in plan.files}
        files = {
            path: ManifestFile(path, found.size, found.digest, found.others)
            for path, found in known.items()
            if found is not None
        }
        for file in files.values():
            meter.add_present(file.size)
            meter.add_object()
        missing = tuple(file for file in plan.files if file.path not in files)
        # Not at the top: a process that finds its model should not import what fetches one.
        from storage.cache.filling import Filling

        with (
            Filling(
                self._cache,
                self._source,
                keys,
                durable=job.durable,
                resumable=lambda path: self._journal(path).noted > 0,
            ) as filling,
            self._resuming(filling) as journal,
        ):
            with translate_os_errors(filling.folder):
                journal.keep_only(
                    {os.path.join(filling.folder, file.path): file.info for file in missing}
                )
                os.makedirs(filling.folder, exist_ok=True)
            size = sum(file.info.size or 0 for file in missing)
            # The cache weighs files by their size, the disk by what was written to them.
            self._make_room(max(0, size - filling.weight()))
            check_space(filling.folder, max(0, size - journal.noted))
            lock = threading.Lock()

            def take(file: FetchedFile, path: str) -> None:
                key = self._key(file.info)
                found = filling.take(path, file.path, file.size, file.digests, key)
                with lock:
                    files[file.path] = found

            fetched = job.fetch(
                replace(plan, files=missing),
                filling.folder,
                None,
                meter,
                journal,
                # An archive is not kept: what may be expected of it later is found now or never.
                algorithms=(self._cache.algorithm, *(("sha256",) if job.unpack else ())),
                vouched=True,
                on_file=None if job.unpack else take,
            )
            # What was replaced while it came is known as what came.
            arrived = {file.path: file.info for file in fetched}
            planned = (replace(file, info=arrived.get(file.path, file.info)) for file in plan.files)
            plan = replace(plan, files=tuple(planned))
            archive: tuple[Digest, ...] = ()
            if job.unpack:
                name = plan.files[0].path
                if fetched:
                    archive = tuple(fetched[0].digests.values())
                    manifest = self._unpack(os.path.join(filling.folder, name), filling)
                else:
                    archive = (files[name].digest, *files[name].others)
                    manifest = self._unpack(self._cache.blob_path(files[name].digest), filling)
            else:
                manifest = Manifest(plan.is_tree, tuple(files[file.path] for file in plan.files))
                self._demand(manifest, None)
            self._lease(manifest.id)
            filling.publish(manifest, plan.fingerprint(), archive)
        meter.finish()
        return manifest

    def _journal(self, path: str) -> Journal:
        from storage.transfer.journal import Journal

        return Journal(path, self._source.id, durable=self._job.durable)

    @contextlib.contextmanager
    def _resuming(self, filling: Filling) -> Iterator[Journal]:
        """Leave what has arrived to the next download if this one fails, and that may not."""
        journal = self._journal(filling.journal)
        try:
            yield journal
        except BaseException as exc:
            if journal.is_worth_keeping(exc):
                filling.leave()
                journal.tell(exc, "in the cache")
            raise
        finally:
            journal.close()

    def _unpack(self, archive: str, filling: Filling) -> Manifest:
        from storage.cache.partials import new_partial

        with new_partial(self._cache.upper.path) as working:
            folder = os.path.join(working, "content")
            os.mkdir(folder)
            self._job.extract(archive, folder)
            return filling.take_tree(folder)

    def _trim(self) -> None:
        """Make up for downloads at the same time that together took more than there is."""
        if self._cache.budget is not None:
            from storage.cache.evict import trim

            trim(self._cache)

    def _make_room(self, size: int) -> None:
        if self._cache.budget is not None:
            from storage.cache.evict import make_room

            make_room(self._cache, size)

    # -- single files ------------------------------------------------------------------------

    def put(self, file: PlannedFile, is_tree: bool, target: str) -> dict[str, Digest] | None:
        """Put an object that the cache has at ``target``; return its digests.

        ``None`` if the cache does not have it.

        Raises:
            IntegrityError: it is not what is expected.
        """
        found = self._known(file, is_tree)
        if found is None:
            return None
        with translate_os_errors(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            materialise(self._cache.blob_path(found.digest), target, self._job.link)
        return {digest.algorithm: digest for digest in (found.digest, *found.others)}

    def _known(self, file: PlannedFile, is_tree: bool) -> Known | None:
        """Return the content of an object, if the cache has it; it is held until `release`.

        Its digests are known in the algorithms that the caller has an expectation in.
        """
        job = self._job
        demand = job.demand(file, is_tree)
        asked = file.info.digests if demand is None else (demand, *file.info.digests)
        found = self._has(self._key(file.info), asked, file.info.size)
        if found is None:
            return None
        digests = {digest.algorithm: digest for digest in (found.digest, *found.others)}
        for wanted in (demand, job.expected):
            if wanted is not None and wanted.algorithm not in digests:
                blob = self._cache.blob_path(found.digest)
                digests |= hash_file(blob, (wanted.algorithm,))
        if demand is not None and digests[demand.algorithm] != demand:
            raise IntegrityError(
                f"{job.location}: {file.path} is expected to be {demand}, and the store has "
                f"{digests[demand.algorithm]}; nothing was published"
            )
        digests.pop(found.digest.algorithm)
        return replace(found, others=tuple(digests[name] for name in sorted(digests)))

    def _has(
        self, key: ObjectKey | None, digests: Iterable[Digest], size: int | None
    ) -> Known | None:
        """Return what the cache knows of an object and has of it; held until `release`."""
        found = self._cache.known(key, digests, size)
        if found is not None:
            self._held.append(str(found.digest))
        return found

    def _key(self, info: ObjectInfo) -> ObjectKey | None:
        return object_key(self._source, self._job.location, info.key, info.pin)

    def _with_digests(self, plan: Plan) -> Plan:
        """Ask for the digests of large objects that a listing does not tell."""
        job = self._job
        if not plan.is_tree or not job.backend.capabilities.metadata:
            return plan
        asked = {
            index: file
            for index, file in enumerate(plan.files)
            if (file.info.size or 0) > _WORTH_ASKING
            and not file.info.digests
            and self._has(self._key(file.info), (), file.info.size) is None
        }
        files = list(plan.files)

        def ask(index: int, _: threading.Event) -> None:
            file = files[index]
            with contextlib.suppress(ModelMissingError, TransientError):
                info = job.backend.stat(file.info.key)
                if not info.differs_from(file.info):
                    files[index] = replace(file, info=replace(file.info, digests=info.digests))

        from storage.transfer.engine import run_tasks

        run_tasks((partial(ask, index) for index in asked), job.client.budget, len(asked))
        return replace(plan, files=tuple(files))

    # -- what is expected --------------------------------------------------------------------

    def _demand(self, manifest: Manifest, ref: Ref | None) -> None:
        """Refuse a model that is not what is expected."""
        expected = self._job.expected
        if expected is None:
            return
        found = self._digest(manifest, ref, expected.algorithm)
        if found != expected:
            raise IntegrityError(
                f"{self._job.location}: expected {expected}, found "
                f"{found or f'no {expected.algorithm} digest of the archive that it was'}; "
                "nothing was published"
            )

    def _digest(self, manifest: Manifest, ref: Ref | None, algorithm: str) -> Digest | None:
        """Return the digest of a cached model, or of the archive that it was."""
        if self._job.unpack:
            archive = () if ref is None else ref.archive
            return next((each for each in archive if each.algorithm == algorithm), None)
        return self.with_digests(manifest, algorithm).digest(algorithm)

    def with_digests(self, manifest: Manifest, algorithm: str) -> Manifest:
        """Return the manifest of a cached model with the digest of every file in ``algorithm``."""
        unknown = [file for file in manifest.files if file.digest_in(algorithm) is None]
        if unknown:
            manifest = manifest.with_digests(
                {
                    file.path: hash_file(self._cache.blob_path(file.digest), (algorithm,))
                    for file in unknown
                }
            )
            with contextlib.suppress(DestinationError), self._cache.writing():
                self._cache.upper.manifests.save(manifest)
                for file in manifest.files:
                    self._cache.upper.index.learn(Known(file.digest, file.size, file.others), None)
                self._cache.upper.index.flush()
        return manifest
