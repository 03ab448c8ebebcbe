"""What is in a cache and what it takes, for people and programs to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.cache.blobs import State
from storage.cache.cache import CacheShortfallError
from storage.cache.pins import pin_name
from storage.cache.survey import Survey, folder_size
from storage.files import translate_os_errors

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache, Root
    from storage.cache.manifests import Manifest
    from storage.cache.refs import Ref, Source

__all__ = ["CachedModel", "Usage", "models", "usage"]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """What the cache has of one source, with one choice of filters."""

    uri: str
    """Canonical, without anything that may be a credential."""

    source: Source
    manifest: str
    """Id of the manifest: the same for the same content, wherever it is from."""

    size: int
    """Bytes of all files; 0 if the list of its files is gone or damaged."""

    files: int
    complete: bool
    """Whether every file is there, with its size. What is in them was not looked at."""

    last_used: float
    """Seconds since the epoch, to half a minute; 0 if it is not known."""

    validated_at: float
    """When the store was last seen to have it, in seconds since the epoch."""

    fetched_at: float
    """When it came here, in seconds since the epoch."""

    pinned: bool
    leased: bool
    """Whether a living process uses it."""

    path: str | None
    """Where its files are, as far as they were ever asked for without a destination."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a cache takes on its disk. A file counts once, with its size, whoever needs it."""

    root: str
    models: int
    """How many sources have a model, each choice of filters counted."""

    blobs: int
    """How many there are."""

    blob_bytes: int
    copy_bytes: int
    """Of files in snapshots that are no links, such as programs."""

    partial_bytes: int
    """Of downloads under way, and of what killed processes left."""

    quarantine_bytes: int
    other_bytes: int
    """Of notes: manifests, refs, index, pins, leases, locks."""

    budget: int | None
    counted_bytes: int
    """What counts against the budget: blobs, copies and downloads under way."""

    pinned_bytes: int
    leased_bytes: int
    """What living processes use and nobody pinned."""

    @property
    def total_bytes(self) -> int:
        """Everything below the root."""
        return (
            self.blob_bytes
            + self.copy_bytes
            + self.partial_bytes
            + self.quarantine_bytes
            + self.other_bytes
        )


def models(cache: ModelCache) -> list[CachedModel]:
    """Return what the cache and the lower ones have, sorted by URI.

    Raises:
        ConfigurationError: it is another kind of cache.
    """
    cache.check_version()
    held = cache.leases.held().manifests
    pins = cache.pins.names()
    found: dict[Source, CachedModel] = {}
    for root in cache.roots:
        for ref in root.refs.all():
            if ref.source not in found:
                pinned = pin_name(ref.source) in pins
                found[ref.source] = _describe(cache, ref, pinned, ref.manifest in held)
    return sorted(found.values(), key=lambda model: (model.uri, model.source.variant))


def usage(cache: ModelCache) -> Usage:
    """Return what the cache takes; lower ones are not counted.

    Raises:
        ConfigurationError: it is another kind of cache.
        DestinationError: it cannot be read.
    """
    cache.check_version()
    layout = cache.upper.layout
    with translate_os_errors(layout.root):
        survey = Survey(cache)
        total = folder_size(layout.root)
        partial = folder_size(layout.partial)
        quarantine = folder_size(layout.quarantine)
    blobs = survey.total(survey.blobs)
    copies = sum(survey.copies.values())
    pinned, leased, _ = survey.kept(0.0)
    return Usage(
        root=cache.upper.path,
        models=sum(map(len, survey.refs.values())),
        blobs=len(survey.blobs),
        blob_bytes=blobs,
        copy_bytes=copies,
        partial_bytes=partial,
        quarantine_bytes=quarantine,
        other_bytes=max(0, total - blobs - copies - partial - quarantine),
        budget=cache.budget,
        counted_bytes=survey.size,
        pinned_bytes=pinned,
        leased_bytes=leased,
    )


def _describe(cache: ModelCache, ref: Ref, pinned: bool, leased: bool) -> CachedModel:
    try:
        manifest = cache.manifest(ref.manifest)
    except CacheShortfallError:
        manifest = None
    return CachedModel(
        uri=ref.source.uri,
        source=ref.source,
        manifest=ref.manifest,
        size=0 if manifest is None else manifest.size,
        files=0 if manifest is None else len(manifest.files),
        complete=manifest is not None and _is_complete(cache.roots, manifest),
        last_used=max(root.manifests.last_use(ref.manifest) for root in cache.roots),
        validated_at=ref.validated_at,
        fetched_at=ref.fetched_at,
        pinned=pinned,
        leased=leased,
        path=None if manifest is None else _find(cache.roots, manifest),
    )


def _is_complete(roots: Sequence[Root], manifest: Manifest) -> bool:
    return all(
        any(
            root.blobs.look(file.digest, file.size) in (State.CLEAN, State.DOUBTFUL)
            for root in roots
        )
        for file in manifest.files
    )


def _find(roots: Sequence[Root], manifest: Manifest) -> str | None:
    paths = (root.snapshots.path(manifest) for root in roots)
    return next((path for path in paths if os.path.lexists(path)), None)
