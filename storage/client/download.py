"""One download from URI to local path: where it may come from, and where it goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from storage.client.arguments import expected_digest
from storage.client.offline import Offline, offline_mode, warn_of_copy
from storage.config.freshness import Freshness, read_freshness
from storage.digest import Digest, hash_file, tree_digest
from storage.errors import (
    IntegrityError,
    InvalidInput,
    OfflineError,
    SignatureError,
    UnreachableError,
)
from storage.files import translate_os_errors
from storage.lazy import lazy_property
from storage.transfer import events
from storage.transfer.plan import Patterns, Plan, PlannedFile, make_plan, resolve
from storage.transfer.progress import Meter, ProgressCallback
from storage.uri import Location

if TYPE_CHECKING:
    from storage.backends.base import Backend
    from storage.cache.manifests import Manifest
    from storage.cache.refs import Source
    from storage.client.cached import CachedDownload
    from storage.client.client import StorageClient
    from storage.client.placed import PlacedDownload
    from storage.client.signatures import RequireSignature
    from storage.transfer.download import FetchedFile
    from storage.transfer.journal import Journal

__all__ = ["Download", "DownloadOptions", "Link"]

Link = Literal["hardlink", "symlink"]


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """What a call of ``download`` says beside the source and the destination."""

    config: Any = None
    patterns: Patterns = Patterns()  # noqa: RUF009 -- it is never changed
    digest: Digest | None = None
    files: Mapping[str, Digest] | None = None
    """Digests that single files must have, by path."""

    unpack: bool = False
    offline: Offline = None
    freshness: Freshness | None = None
    cache: bool | None = None
    """Whether the cache is filled; ``None``: if there is no destination."""

    link: Link | None = None
    durable: bool | None = None
    overwrite: bool = False
    progress: ProgressCallback | None = None
    require_signature: RequireSignature = None
    single: bool = False
    """Whether a tree is refused, before its first byte."""


class Download:
    """What one call of ``download`` was asked for, and the ways to do it."""

    def __init__(self, client: StorageClient, location: Location, options: DownloadOptions) -> None:
        """Keep the arguments; refuse what contradicts itself."""
        self.client = client
        self.location = location
        self._options = options
        self.config = options.config
        self.patterns = options.patterns
        self.unpack = options.unpack
        self.progress = options.progress
        self.expected = expected_digest(location, options.digest)
        settings = client.settings
        self.freshness = read_freshness(
            settings.freshness if options.freshness is None else options.freshness
        )
        self.durable = settings.durable if options.durable is None else options.durable
        self._files = options.files or {}
        self.offline = offline_mode(settings, location, options.offline)
        self.keeps: bool | None = None
        """Whether what is fetched is kept in the cache; known once it runs."""

        self.overwrite = options.overwrite
        self._fill = options.cache
        self.link = options.link
        if self.link not in (None, "hardlink", "symlink"):
            raise InvalidInput(f"link is 'hardlink', 'symlink' or None, not {self.link!r}")
        policy = client.policy_for(options.require_signature)
        self._verification = None
        if policy is not None:
            from storage.client.signatures import Verification

            self._verification = Verification(self, policy)

    def run(self, dest: str | None) -> str:
        """Download to ``dest``, or to where the cache keeps it, and return the path."""
        with events.transfer("download", str(self.location)):
            return self._run(dest)

    def _run(self, dest: str | None) -> str:
        self.keeps = dest is None or self._fill
        if self.is_here:
            return self._from_this_machine(dest)
        if self.offline is True:
            return self.from_cache(dest)
        try:
            return self._from_store_or_again(dest)
        except UnreachableError as exc:
            if self.offline != "auto":
                raise
            self.offline = True
            try:
                path = self.from_cache(dest)
            except OfflineError:
                raise exc from None
            warn_of_copy(str(exc))
            return path

    @property
    def is_here(self) -> bool:
        """Whether the source is files of this machine, which can be used where they are."""
        return self.location.is_local

    @property
    def backend(self) -> Backend:
        """The backend of the source."""
        return self.client.backend(self.location, self.config)

    def make_plan(self, location: Location | None = None) -> Plan:
        """Ask the store what there is at ``location``, by default the source itself."""
        plan = self.ask(self.location if location is None else location)
        if self.unpack and plan.is_tree:
            raise InvalidInput(f"{plan.uri} is a tree; unpack=True is for one archive")
        self._refuse_tree(plan.is_tree)
        if self._verification is not None:
            self._verification.expect(plan)
        return plan

    def ask(self, location: Location) -> Plan:
        """Return what the store has at ``location``: the source, or the source as a tree.

        Raises:
            ModelMissingError: there is nothing.
        """
        return self.client.run_retried(make_plan, self.backend, location, self.patterns)

    def _refuse_tree(self, is_tree: bool) -> None:
        if is_tree and self._options.single:
            raise InvalidInput(f"{self.location} is a tree; one object was expected")

    def demand(self, file: PlannedFile, is_tree: bool) -> Digest | None:
        """Return the digest that a file must have because the caller says so."""
        return self._files.get(file.path, None if is_tree else self.expected)

    # -- from this machine -------------------------------------------------------------------

    def _from_this_machine(self, dest: str | None) -> str:
        if dest is not None:
            # A whole tree may be put onto itself; a part of it would take the rest away.
            self.refuse_overlap(dest, self.location, itself=self.patterns.active)
        elif not self.unpack and not self.patterns.active:
            return self._in_place()
        if dest is None:
            return self._through_cache(None)
        return self._placed(dest).fetch(self.make_plan(), None)

    def _in_place(self) -> str:
        """Return the path of what is here already, checked if a digest is expected."""
        backend = self.backend
        is_tree, objects = resolve(backend, self.location)
        self._refuse_tree(is_tree)
        if self.location.scheme == "pvc":
            # Whoever reads the tree follows its links: none of them may lead out of the claim.
            objects = iter(list(objects))
        path = backend.local_path(self.location.key.rstrip("/"))
        assert path is not None
        if self.expected is not None:
            skip = len(self.location.prefix)
            self._check_files(
                path, [info.key[skip:] for info in objects] if is_tree else [], is_tree
            )
        if self._verification is not None:
            self._verification.check_in_place(path)
        return path

    def refuse_overlap(self, dest: str, location: Location, *, itself: bool) -> None:
        """Refuse a destination inside what is at ``location`` on this machine, or around it.

        With ``itself``, what is there is refused, too.
        """
        source = self.backend.local_path(location.key.rstrip("/"))
        assert source is not None
        source, target = os.path.realpath(source), os.path.realpath(dest)
        inside = os.path.join(target, "")
        onto_itself = source == target and itself
        if target.startswith(os.path.join(source, "")) or (
            (source.startswith(inside) or onto_itself) and os.path.isdir(source)
        ):
            raise InvalidInput(
                f"{dest} and the source {source} are inside one another; "
                "choose a destination elsewhere"
            )

    # -- from a store ------------------------------------------------------------------------

    def _from_store_or_again(self, dest: str | None) -> str:
        try:
            return self._from_store(dest)
        except SignatureError:
            if self._verification is None or not self.freshness:
                raise
            # Of a model and its signature one may be cached and the other newer.
            self.freshness = 0.0
            self._verification.forget()
            return self._from_store(dest)

    def _from_store(self, dest: str | None) -> str:
        if dest is None or self._fill:
            return self._through_cache(dest)
        with self._cached() as cached:
            last = cached.last()
            manifest = cached.fresh(last) or cached.unchanged_version(last)
            # An archive is verified as such, and is not there any more.
            if manifest is not None and not (self.unpack and self._verification is not None):
                self._verify_cached(cached, manifest)
                self.tell_present(manifest)
                return self._placed(dest).materialise(manifest)
            return self._placed(dest).fetch(self.make_plan(), cached)

    def _through_cache(self, dest: str | None) -> str:
        self._verify_archive()
        with self._cached() as cached:
            manifest = cached.obtain()
            self._refuse_tree(manifest.is_tree)
            self._verify_cached(cached, manifest)
            if dest is not None:
                return self._placed(dest).materialise(manifest)
            return cached.keep(manifest)

    def from_cache(self, dest: str | None) -> str:
        """Take what the source was when it was cached last; no backend, no socket."""
        self._verify_archive()
        with self._cached() as cached:
            manifest = cached.offline()
            self._refuse_tree(manifest.is_tree)
            self._verify_cached(cached, manifest)
            self.tell_present(manifest)
            return (
                cached.keep(manifest) if dest is None else self._placed(dest).materialise(manifest)
            )

    def _cached(self) -> CachedDownload:
        from storage.client.cached import CachedDownload

        return CachedDownload(self)

    def _placed(self, dest: str) -> PlacedDownload:
        from storage.client.placed import PlacedDownload

        return PlacedDownload(self, dest)

    def _verify_cached(self, cached: CachedDownload, manifest: Manifest) -> None:
        """Verify the signature of what the cache has, before it is handed over."""
        if self._verification is None or self.unpack:
            return
        from storage.container.signatures.signed_files import LocalFile

        for algorithm in self._verification.algorithms:
            manifest = cached.with_digests(manifest, algorithm)
        files = {
            file.path: LocalFile(
                self.client.cache.blob_path(file.digest),
                {digest.algorithm: digest for digest in (file.digest, *file.others)},
            )
            for file in manifest.files
        }
        self._verification.check(manifest.is_tree, files)

    def _verify_archive(self) -> None:
        """Verify an archive, and expect what is unpacked to have come from it.

        The cache has what was unpacked, which is not what was signed.
        """
        if self._verification is None or not self.unpack:
            return
        asked = replace(
            self._options,
            unpack=False,
            link=None,
            offline=self.offline,
            freshness=self.freshness,
        )
        job = Download(self.client, self.location, asked)
        assert job._verification is not None
        job._verification.is_archive = True
        archive = job.run(None)
        with translate_os_errors(archive):
            self.expected = hash_file(archive, ("sha256",))["sha256"]

    def tell_present(self, manifest: Manifest) -> None:
        """Tell whoever watches that all of a model is here already."""
        size, count = manifest.size, len(manifest.files)
        meter = Meter("download", str(self.location), size, count, self.progress)
        meter.add_present(size)
        for _ in manifest.files:
            meter.add_object()
        meter.finish()

    # -- what the ways share -----------------------------------------------------------------

    @lazy_property
    def source(self) -> Source:
        """What tells this download from those of other sources, or of other parts of this one."""
        from storage.client.sourcing import source_of

        config = self.client.resolve_config(self.location, self.config)
        return source_of(self.location, config, self.patterns, self.unpack)

    def fetch(
        self,
        plan: Plan,
        folder: str | None,
        file: str | None,
        meter: Meter,
        journal: Journal | None,
        **options: Any,
    ) -> list[FetchedFile]:
        """Fetch and verify what is in ``plan``; see :func:`storage.transfer.download.fetch`."""
        from storage.transfer.download import fetch
        from storage.transfer.journal import WORTH

        if not plan.files:
            return []
        small = plan.size is not None and plan.size < WORTH
        if small and journal is not None and not journal.noted:
            journal = None
        algorithms = self.algorithms.union(options.pop("algorithms", ()))
        return fetch(
            self.backend,
            plan,
            folder,
            file,
            options=self.client.transfer_options,
            budget=self.client.budget,
            meter=meter,
            algorithms=algorithms,
            expected=None if plan.is_tree else self.expected,
            expected_files=self._files,
            journal=journal,
            **options,
        )

    @property
    def algorithms(self) -> set[str]:
        """The hashes of every file that it takes to tell whether the whole is as demanded."""
        found = set() if self.expected is None else {self.expected.algorithm}
        return found if self._verification is None else found.union(self._verification.algorithms)

    @property
    def demands(self) -> bool:
        """Whether the caller says what the content has to be, or who has to have signed it."""
        return bool(self.expected or self._files or self._verification)

    def verify(
        self,
        is_tree: bool,
        paths: Mapping[str, str],
        digests: Mapping[str, Mapping[str, Digest]],
    ) -> None:
        """Refuse files that together are not what is demanded.

        Args:
            is_tree: whether they are a tree.
            paths: where each is.
            digests: those of each that are known.

        Raises:
            IntegrityError: the tree has another digest.
            SignatureError: it is not signed, or not as it should be.
        """
        if is_tree:
            self._check_tree(digests)
        if self._verification is not None:
            from storage.container.signatures.signed_files import LocalFile

            files = {name: LocalFile(paths[name], known) for name, known in digests.items()}
            self._verification.check(is_tree, files)

    def extract(self, archive: str, folder: str) -> None:
        """Unpack the archive that the source is."""
        from storage.container.archives.extract import extract_into

        with translate_os_errors(folder):
            extract_into(archive, folder)

    def _check_files(self, path: str, files: list[str], is_tree: bool) -> None:
        """Compare files that are here already with the expected digest."""
        assert self.expected is not None
        algorithm = self.expected.algorithm
        with translate_os_errors(path):
            if is_tree:
                self._check_tree(
                    {name: hash_file(os.path.join(path, name), (algorithm,)) for name in files}
                )
                return
            found = hash_file(path, (algorithm,))[algorithm]
        if found != self.expected:
            raise IntegrityError(
                f"{self.location}: expected {self.expected}, but {path} is {found}"
            )

    def _check_tree(self, digests: Mapping[str, Mapping[str, Digest]]) -> None:
        if self.expected is None:
            return
        algorithm = self.expected.algorithm
        found = tree_digest({path: each[algorithm] for path, each in digests.items()}, algorithm)
        if found != self.expected:
            raise IntegrityError(
                f"{self.location}: the tree is expected to be {self.expected}, but what "
                f"arrived is {found}; nothing was published"
            )
