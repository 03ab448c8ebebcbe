"""Making a cache right again: what is damaged or missing is fetched from where it came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from storage.cache.cache import CacheShortfallError, ModelCache
from storage.cache.records import DamagedRecordError, UnreadableRecordError
from storage.cache.refs import Ref, Source
from storage.cache.verify import Problem, Report, set_aside, verify
from storage.client.download import Download, DownloadOptions
from storage.client.sources import fitting_configs
from storage.client.sourcing import source_of
from storage.config.freshness import REVALIDATE
from storage.errors import ConfigurationError, ModelMissingError, StorageError, one_line
from storage.transfer.plan import Patterns
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.transfer.progress import ProgressCallback

__all__ = ["Fetch", "Outcome", "Repair", "repair"]

Fetch = Callable[["StorageClient", Location, DownloadOptions], object]
"""Downloads a source into the cache."""

Outcome = Literal["repaired", "changed", "failed", "unknown"]
"""``repaired``: as it was; ``changed``: the source has another version, which is cached now;
``failed``: the source did not give it; ``unknown``: what was cached cannot be told, or where it
came from cannot be asked."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What became of one model that was damaged, or of one thing that was not in order."""

    uri: str
    """The source, without credentials; a path, if there is no model to it."""

    outcome: Outcome
    what: str
    """What was wrong, what was done, and what is left to do."""

    error: StorageError | None = None
    """Why it failed."""


def repair(
    client: StorageClient,
    *,
    full: bool = False,
    config: Any = None,
    progress: ProgressCallback | None = None,
    fetch: Fetch | None = None,
) -> list[Repair]:
    """Verify the cache and fetch again what is not right; see :meth:`StorageClient.repair`."""
    cache = client.cache
    report = verify(cache, full=full)
    broken = dict(_broken(cache))
    locations = [_location(ref.source) for ref, _ in broken.values()]
    configs = _configs(locations, config)
    repairs = [
        _repair(client, location, ref, why, its_config, progress, fetch or _fetch)
        for (ref, why), location, its_config in zip(
            broken.values(), locations, configs, strict=True
        )
    ]
    return repairs + list(_tidy(cache, report))


def _broken(cache: ModelCache) -> Iterator[tuple[Source, tuple[Ref, str]]]:
    """Yield the refs whose models cannot be used, and why; one for each source."""
    seen: set[Source] = set()
    for root in cache.roots:
        for ref in root.refs.all():
            # What a lower cache says does not count where this one says something.
            if ref.source in seen:
                continue
            seen.add(ref.source)
            if _shortfall(cache, ref) is None:
                continue
            # It may be on its way out, or have been evicted.
            try:
                cache.hold(manifests=[ref.manifest])
                why = _shortfall(cache, ref)
            finally:
                cache.leases.release(ref.manifest)
            if why is not None and os.path.exists(root.refs.path(ref.source)):
                yield ref.source, (ref, why)


def _shortfall(cache: ModelCache, ref: Ref) -> str | None:
    """Return what a model lacks, if it lacks anything."""
    try:
        cache.check(cache.manifest(ref.manifest))
    except CacheShortfallError as exc:
        return str(exc)
    return None


def _location(source: Source) -> Location:
    # A path may look like a URI.
    return parse_uri(f"file://{source.uri}" if source.scheme == "file" else source.uri)


def _configs(locations: list[Location], config: Any) -> list[Any]:
    """Return the config for those sources that it fits, and none for the others."""
    if not locations:
        return []
    try:
        return fitting_configs(locations, config)
    except ConfigurationError:
        return [None] * len(locations)


def _repair(
    client: StorageClient,
    location: Location,
    ref: Ref,
    why: str,
    config: Any,
    progress: ProgressCallback | None,
    fetch: Fetch,
) -> Repair:
    source = ref.source
    patterns = Patterns(source.allow, source.ignore)
    now = source_of(location, client.resolve_config(location, config), patterns, source.unpack)
    reason = _unaskable(source, now)
    if reason is not None:
        return Repair(source.uri, "unknown", f"{why}; {reason}")
    options = DownloadOptions(
        config=config,
        patterns=patterns,
        unpack=source.unpack,
        freshness=REVALIDATE,
        cache=True,
        progress=progress,
        # Nothing is handed over.
        require_signature=False,
    )
    try:
        fetch(client, location, options)
        found = client.cache.ref(now)
    except ModelMissingError as exc:
        what = f"{why}; its source has it no more; `storage cache rm` forgets it"
        return Repair(source.uri, "failed", what, exc)
    except (StorageError, CacheShortfallError) as exc:
        error = exc if isinstance(exc, StorageError) else StorageError(str(exc))
        return Repair(source.uri, "failed", f"{why}; {one_line(error)}", error)
    if found is not None and found.manifest == ref.manifest:
        return Repair(source.uri, "repaired", f"{why}; it was fetched again")
    if now != source:
        # The old note had no origin, and is of the version that is gone.
        client.cache.upper.refs.delete(source)
    return Repair(
        source.uri, "changed", f"{why}; its source has changed; what it is now was fetched"
    )


def _fetch(client: StorageClient, location: Location, options: DownloadOptions) -> None:
    Download(client, location, options).run(None)


def _unaskable(source: Source, now: Source) -> str | None:
    """Return why a source cannot be asked again, knowing what the cache knows of it."""
    if now.identity != source.identity:
        return (
            "its URI held a query or a credential, which the cache does not keep; download it "
            "again with the whole URI"
        )
    if source.origin and now.origin != source.origin:
        if source.scheme == "memory":
            return "it was in the memory of another process; `storage cache rm` forgets it"
        return (
            f"it came from {one_line(source.origin, 100)}, and the config in force leads to "
            f"{one_line(now.origin, 100) or 'the usual endpoint'}; name its config"
        )
    return None


def _tidy(cache: ModelCache, report: Report) -> Iterator[Repair]:
    """Put away what is no part of any model, or cannot be read and was not replaced."""
    upper = cache.upper
    for problem in report.problems:
        if not problem.path.startswith(f"{upper.path}/"):
            continue
        if problem.kind == "stray" or (
            problem.kind in ("manifest", "ref") and _is_in_the_way(cache, problem)
        ):
            name = problem.uris[0] if problem.uris else problem.path
            moved = set_aside(upper, problem)
            if moved is None:
                yield Repair(name, "failed", f"{problem.path} {problem.what} and cannot be moved")
            elif problem.kind == "ref":
                what = f"the note of what it was {problem.what}; download it again"
                yield Repair(name, "unknown", what)
            else:
                yield Repair(name, "repaired", f"{problem.path} {problem.what}; moved to {moved}")


def _is_in_the_way(cache: ModelCache, problem: Problem) -> bool:
    """Tell whether a note is still damaged, and nothing leads to it that may be repaired yet."""
    upper = cache.upper
    try:
        if problem.kind == "ref":
            upper.refs.read(problem.path)
            return False
        manifest_id = os.path.basename(problem.path).removesuffix(".json")
        if any(ref.manifest == manifest_id for ref in upper.refs.all()):
            return False
        upper.manifests.load(manifest_id)
    except UnreadableRecordError:
        return False
    except DamagedRecordError:
        return True
    return False
