"""Pulling a version: a download whose plan is the list of files in the version's document.

The plan needs neither a listing nor a look at each file, and every byte is held to the digest
that the version names. In the cache the source is called
``<registry>/models/<model>@<reference>/``, where no object ever is; so what an alias was when it
was asked last is known offline.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from storage.backends.base import Body, ByteRange, ObjectInfo
from storage.cache.cache import CacheShortfallError
from storage.cache.refs import identity_of
from storage.client.arguments import local_path
from storage.client.download import Download, DownloadOptions
from storage.digest import Digest
from storage.errors import (
    DestinationError,
    IntegrityError,
    ModelMissingError,
    ObjectChangedError,
    UnreachableError,
)
from storage.files import materialise, translate_os_errors
from storage.registry import layout
from storage.registry.registry import ModelRegistry
from storage.transfer.plan import Patterns, Plan, PlannedFile

if TYPE_CHECKING:
    from storage.backends.base import Backend
    from storage.client.client import StorageClient
    from storage.registry.documents import Version, VersionFile
    from storage.transfer.download import FetchedFile
    from storage.transfer.journal import Journal
    from storage.transfer.progress import Meter
    from storage.uri import Location

__all__ = ["Pull", "fetch_again", "is_version", "make_pull", "pulled_location"]

_PULLED = re.compile(
    rf"(?P<root>(?:.*/)?){layout.MODELS}(?P<model>[^/@]+)@(?P<reference>[^/@]+)/", re.DOTALL
)


def make_pull(
    registry: ModelRegistry,
    model: str,
    reference: int | str = layout.LATEST,
    *,
    allow_patterns: str | Iterable[str] | None = None,
    ignore_patterns: str | Iterable[str] | None = None,
    digest: str | Digest | None = None,
    **options: Any,
) -> Pull:
    """Return what brings a version here, verified, once it runs; see :meth:`ModelRegistry.pull`.

    Args:
        registry: where it is.
        model: its name.
        reference: number or alias of the version.
        allow_patterns: only these paths.
        ignore_patterns: not these.
        digest: of the tree.
        options: the others of the download, by the names of ``DownloadOptions``.
    """
    asked = DownloadOptions(
        config=registry.config,
        patterns=Patterns(allow_patterns, ignore_patterns),
        digest=None if digest is None else Digest.parse(digest),
        **options,
    )
    reference = layout.parse_reference(reference)
    return Pull(registry, layout.check_model(model), reference, asked)


def fetch_again(client: StorageClient, location: Location, options: DownloadOptions) -> str:
    """Download what the cache has by ``location``: a version of a registry, or any other source.

    For :meth:`storage.StorageClient.repair`.
    """
    found = _PULLED.fullmatch(location.key)
    if found is not None:
        root = replace(location, key=found["root"])
        registry = ModelRegistry(str(root), config=options.config, client=client)
        if registry.exists():
            reference = layout.parse_reference(found["reference"])
            return Pull(registry, found["model"], reference, options).run(None)
    return Download(client, location, options).run(None)


def is_version(location: Location) -> bool:
    """Tell whether it is by ``location`` that the cache knows a version of some registry."""
    return _PULLED.fullmatch(location.key) is not None


def pulled_location(root: Location, model: str, reference: int | str) -> Location:
    """Return the location by which the cache knows a version of the registry at ``root``."""
    # The slash says that it is a tree, so that nobody looks for an object of that name.
    key = f"{root.prefix}{layout.MODELS}{model}@{reference}/"
    url = None if root.url is None else f"{root.url.rstrip('/')}/{key[len(root.prefix) :]}"
    return replace(root, key=key, url=url, digest=None)


class Pull(Download):
    """A download of what a version consists of."""

    def __init__(
        self,
        registry: ModelRegistry,
        model: str,
        reference: int | str,
        options: DownloadOptions,
    ) -> None:
        """Keep the arguments; see :func:`make_pull`."""
        location = pulled_location(registry.location, model, reference)
        super().__init__(registry.client, location, options)
        if location.is_local and self.offline is True:
            # A registry on this machine may be asked. The cache stands in for one that is not here.
            self.offline = "auto"
        self._registry = registry
        self._model = model
        self._reference = reference
        self._names: dict[str, str] = {}
        self._version: Version | None = None
        self._fingerprint: str | None = None

    @property
    def is_here(self) -> bool:
        # What may be on this machine are blobs, which have other names.
        return False

    @property
    def backend(self) -> Backend:
        return cast("Backend", _Blobs(super().backend, self._names))

    @property
    def number(self) -> int | None:
        """The number of the version that came; ``None`` if only an alias of it is known here."""
        if self._version is not None:
            return self._version.number
        if isinstance(self._reference, int):
            return self._reference
        cache = self.client.cache
        try:
            ref = cache.ref(self.source)
        except CacheShortfallError:
            return None
        if ref is None or ref.fingerprint is None:
            return None
        begin = str(pulled_location(self._registry.location, self._model, "")).removesuffix("/")
        known = [
            other.source.uri.removeprefix(begin).rstrip("/")
            for root in cache.roots
            for other in root.refs.all()
            if other.fingerprint == ref.fingerprint and other.source.uri.startswith(begin)
        ]
        return max((int(tail) for tail in known if tail.isdecimal()), default=None)

    def run(self, dest: str | os.PathLike[str] | None) -> str:
        if dest is not None:
            dest = local_path(dest)
            if self.location.is_local:
                self.refuse_overlap(dest, self._registry.location, itself=True)
        path = super().run(dest)
        self._note_number()
        return path

    def from_cache(self, dest: str | None) -> str:
        # An alias may be another version by now than what is here.
        self._version = None
        return super().from_cache(dest)

    def ask(self, location: Location) -> Plan:
        try:
            version = self._registry.find(self._model, self._reference)
        except ModelMissingError as exc:
            if location.is_local and self.offline == "auto" and not self._registry.exists():
                # As a claim that is not mounted.
                where = self._registry.location
                raise UnreachableError(
                    f"there is no registry at {where}; check the URI, or whether it is mounted"
                ) from exc
            raise
        if not any(self.patterns.wants(file.path) for file in version.files):
            raise ModelMissingError(
                str(location),
                f"{location}: none of its {len(version.files)} files matches the patterns; "
                f"allowed {self.patterns.allow}, ignored {self.patterns.ignore}",
            )
        files = [self._planned(file) for file in version.files if self._wants(file.path)]
        plan = Plan(str(location), True, tuple(files))
        self._files = {file.path: Digest("blake3", file.blake3) for file in version.files}
        self._version, self._fingerprint = version, plan.fingerprint()
        return plan

    def _planned(self, file: VersionFile) -> PlannedFile:
        store = self._registry.store
        # Which upload of a content it was is nothing to the cache, or to whoever goes on with it.
        key = store.key(layout.blob_incarnations(file.blake3).removesuffix("/"))
        self._names[key] = store.key(file.name)
        info = ObjectInfo(key, file.size, version=file.blake3, digests=file.digests)
        return PlannedFile(file.path, info)

    def _wants(self, path: str) -> bool:
        if self.patterns.wants(path):
            return True
        if self._verification is None:
            return False
        from storage.container.signatures.bundles import SIGNATURE_NAME

        # What is signed cannot be verified without it.
        return path == SIGNATURE_NAME

    def fetch(
        self,
        plan: Plan,
        folder: str | None,
        file: str | None,
        meter: Meter,
        journal: Journal | None,
        **options: Any,
    ) -> list[FetchedFile]:
        firsts = {each.info.pin: each for each in reversed(plan.files)}
        once = tuple(each for each in plan.files if firsts[each.info.pin] is each)
        try:
            fetched = super().fetch(
                replace(plan, files=once), folder, file, meter, journal, **options
            )
        except ModelMissingError as exc:
            raise self._what_is_gone(exc) from exc
        if len(once) == len(plan.files):
            return fetched
        assert folder is not None, "two files are in a folder"
        found = {each.info.pin: each for each in fetched}
        for each in plan.files:
            if firsts[each.info.pin] is not each:
                copy = self._copy(found[each.info.pin], each.path, folder)
                if on_file := options.get("on_file"):
                    on_file(copy, os.path.join(folder, copy.path))
                fetched.append(copy)
                meter.add_present(copy.size)
                meter.add_object()
        return fetched

    def _copy(self, original: FetchedFile, path: str, folder: str) -> FetchedFile:
        """Return a file with the content of one that has arrived, or is in the cache already."""
        source, target = os.path.join(folder, original.path), os.path.join(folder, path)
        if not os.path.exists(source):
            cache = self.client.cache
            source = cache.blob_path(original.digests[cache.algorithm])
        with translate_os_errors(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            materialise(source, target)
        return replace(original, path=path)

    def _what_is_gone(self, error: ModelMissingError) -> Exception:
        """Return what it means that a blob is missing: whoever deletes a version may have it."""
        version, now = self._version, self._registry.find(self._model, self._reference)
        if version is not None and now.number != version.number:
            return ObjectChangedError(
                f"{self.location} was version {version.number}, which was deleted while it was "
                f"pulled, and is version {now.number} now; pull it again"
            )
        return IntegrityError(
            f"{self.location} is damaged: the registry lacks the content of a file: {error}"
        )

    def _note_number(self) -> None:
        """Let the cache find what came by an alias by its number, too."""
        version = self._version
        if version is None or not self.keeps:
            return
        numbered = pulled_location(self._registry.location, self._model, version.number)
        source = replace(self.source, uri=str(numbered), identity=identity_of(numbered))
        cache = self.client.cache
        if source == self.source:
            return
        with contextlib.suppress(DestinationError, CacheShortfallError), cache.writing():
            ref = cache.ref(self.source)
            # Another process may have pulled since, and the alias was another version for it.
            if ref is not None and ref.fingerprint == self._fingerprint:
                cache.upper.refs.set(replace(ref, source=source), durable=self.durable)


class _Blobs:
    """A backend of objects that are told by their content: what is read needs no other pin.

    So the parts of a blob are fetched in parallel, and a download goes on with those that it has,
    without a look at the object. ``keys`` tells where each content is.
    """

    def __init__(self, backend: Backend, keys: Mapping[str, str]) -> None:
        self._backend = backend
        self._keys = keys
        self.capabilities = replace(backend.capabilities, pinned_read=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return self._backend.stat(self._keys.get(key, key))

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self._backend.read(self._keys.get(key, key), span)
        if pin is not None:
            if body.info.size not in (None, pin.size):
                body.close()
                raise IntegrityError(
                    f"{key} has {body.info.size} bytes in the registry, and {pin.size} were "
                    "published; nothing was published here"
                )
            # What the store says of digests is nothing against what was published.
            body.info = replace(
                body.info, version=pin.version, etag=None, digests=pin.digests, hint=None
            )
        return body
