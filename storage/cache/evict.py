"""A cache that keeps to its budget: what was used least recently makes room.

What counts are the bytes of blobs, of copies in snapshots and of downloads under way. The unit
that goes is a model; of its blobs those go that no other model has. What is pinned, what a
living process uses and what was used within the grace period stays, whatever the budget says.
How things go while others use the cache is told in :mod:`storage.cache.removal`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.cache.partials import dead_size, remove_dead
from storage.cache.pins import pin_name
from storage.cache.removal import removing
from storage.cache.survey import Survey, occupied
from storage.errors import InsufficientSpaceError, InvalidInput, ModelMissingError, StorageError
from storage.files import translate_os_errors
from storage.uri import Location

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache

__all__ = ["Evicted", "delete", "evict", "foresee", "make_room", "trim"]

_TRIES = 3
_ADVICE = (
    "raise the budget (STORAGE_CACHE_BUDGET), unpin or delete models (`storage cache ls` lists "
    "them), or name a destination, which needs no room in the cache"
)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What went."""

    models: int = 0
    blobs: int = 0
    bytes: int = 0


def make_room(cache: ModelCache, needed: int) -> None:
    """See that so many bytes more are within the budget; evict only if that is enough.

    Args:
        cache: what to make room in.
        needed: bytes that are about to be added.

    Raises:
        InsufficientSpaceError: what may be evicted is not enough; nothing was.
        DestinationError: the cache cannot be read or written.
    """
    budget = cache.budget
    if budget is None or not needed:
        return
    if needed > budget:
        raise InsufficientSpaceError(
            f"the cache {cache.upper.path} has a budget of {budget} bytes, and {needed} are "
            f"needed for one download; nothing was evicted; {_ADVICE}"
        )
    # What others add meanwhile, or turn out to need, has to be made up for; but not for ever.
    for _ in range(_TRIES):
        if _occupied(cache) + needed <= budget:
            return
        _shrink(cache, budget - needed, needed)


def evict(cache: ModelCache, target: int) -> Evicted:
    """Evict what was used least recently until at most so many bytes are left.

    It goes as far as it can: what is pinned or in use, or was used within the grace period,
    stays. :func:`storage.cache.survey.occupied` tells how many bytes are left.

    Args:
        cache: what to evict from.
        target: bytes that may stay.

    Raises:
        DestinationError: the cache cannot be read or written.
    """
    if not os.path.exists(cache.upper.layout.version) or _occupied(cache) <= target:
        return Evicted()
    return _shrink(cache, target, None)


def foresee(cache: ModelCache, target: int | None) -> tuple[list[str], int]:
    """Return the sources whose models would be evicted, and how many bytes would go.

    Args:
        cache: what would be evicted from.
        target: bytes that may stay; no limit if ``None``, and only what nobody needs goes.

    Raises:
        DestinationError: the cache cannot be read.
    """
    if not os.path.exists(cache.upper.layout.version):
        return [], 0
    survey = Survey(cache)
    size = survey.size
    if target is not None and size > target:
        root = cache.upper.path
        survey.partial -= dead_size(root, resumable=True) - dead_size(root)
    victims, left = _choose(survey, size if target is None else target, cache.grace)
    uris = {ref.source.uri for each in victims for ref in survey.refs.get(each, ())}
    return sorted(uris), size - left


def trim(cache: ModelCache) -> None:
    """Bring a cache back into its budget as far as that is possible; for after a download."""
    if cache.budget is not None:
        with contextlib.suppress(StorageError):
            evict(cache, cache.budget)


def delete(cache: ModelCache, location: Location) -> Evicted:
    """Remove what a source has, in all variants, however lately it was used.

    Content that another source has as well stays with that.

    Args:
        cache: what to remove it from.
        location: of the source.

    Raises:
        ModelMissingError: it is not in the cache.
        InvalidInput: it is pinned, or in use; nothing was removed.
        DestinationError: the cache cannot be read or written.
    """
    cache.check_version()
    name = pin_name(location)
    having = (
        root for root in cache.roots if any(pin_name(ref.source) == name for ref in root.refs.all())
    )
    where = next(having, None)
    if where is not cache.upper:
        lower = f", only in {where.path} below it, which is never written" if where else ""
        raise ModelMissingError(
            str(location),
            f"{location} is not in the cache {cache.upper.path}{lower}; nothing was removed",
        )
    with cache.writing(), removing(cache) as removal:
        survey = removal.survey
        if name in cache.pins.names():
            raise InvalidInput(f"{location} is pinned in the cache; unpin it to remove it")
        mine = [
            (manifest_id, ref)
            for manifest_id, refs in survey.refs.items()
            for ref in refs
            if pin_name(ref.source) == name
        ]
        victims = {
            manifest_id
            for manifest_id, _ in mine
            if manifest_id in survey.used and survey.sources[manifest_id] == {name}
        }
        if not survey.held.manifests.isdisjoint(victims):
            raise InvalidInput(
                f"{location} is in use by a running process; nothing was removed; end it first"
            )
        for manifest_id, ref in mine:
            if manifest_id not in victims:
                removal.take_file(cache.upper.refs.path(ref.source), os.path.isfile)
        for manifest_id in victims:
            removal.take_model(manifest_id)
        # What no model ever had is none of this source's.
        removal.take_blobs(survey.unneeded(victims, math.inf))
    return Evicted(removal.models, removal.blobs, removal.bytes)


def _occupied(cache: ModelCache) -> int:
    with translate_os_errors(cache.upper.path):
        return occupied(cache)


def _shrink(cache: ModelCache, target: int, needed: int | None) -> Evicted:
    """Evict until ``target`` bytes are left; if bytes are ``needed``, all of that or nothing."""
    with cache.writing():
        # What somebody might go on with some day is less than what somebody has.
        remove_dead(cache.upper.path, resumable=True)
        with removing(cache) as removal:
            survey = removal.survey
            victims, left = _choose(survey, target, cache.grace)
            if needed is not None and left > target:
                raise _no_room(cache, survey, needed)
            for manifest_id in victims:
                removal.take_model(manifest_id)
            removal.take_blobs(survey.unneeded(victims, cache.grace))
    return Evicted(removal.models, removal.blobs, removal.bytes)


def _choose(survey: Survey, target: int, grace: float) -> tuple[list[str], int]:
    """Return what is to go, and how many bytes are left then."""
    needs = Counter(digest for blobs in survey.manifests.values() for digest in blobs)
    needs.update(survey.named(survey.manifests))

    def freed(manifest_id: str) -> int:
        blobs = survey.manifests.get(manifest_id, frozenset())
        return survey.copies.get(manifest_id, 0) + survey.total(
            digest for digest in blobs if not needs[digest]
        )

    # What nobody can find any more goes in any case.
    garbage = [*survey.unreferenced(grace), *survey.orphans(grace)]
    left = survey.size - survey.total(survey.unneeded((), grace))
    for manifest_id in garbage:
        needs.subtract(survey.manifests.get(manifest_id, ()))
        left -= freed(manifest_id)
    idle = [each for each in survey.used if survey.is_idle(each, grace) and each not in garbage]
    victims = []
    for manifest_id in sorted(idle, key=survey.used.__getitem__):
        if left <= target:
            break
        needs.subtract(survey.manifests.get(manifest_id, ()))
        left -= freed(manifest_id)
        victims.append(manifest_id)
    # A model of which others need every blob would go for nothing.
    for manifest_id in reversed(victims):
        if freed(manifest_id):
            continue
        needs.update(survey.manifests.get(manifest_id, ()))
        victims.remove(manifest_id)
    return garbage + victims, left


def _no_room(cache: ModelCache, survey: Survey, needed: int) -> InsufficientSpaceError:
    pinned, leased, recent = survey.kept(cache.grace)
    return InsufficientSpaceError(
        f"the cache {cache.upper.path} has a budget of {cache.budget} bytes, and {needed} more are "
        f"needed: of {survey.size} that are used, {pinned} are pinned, {leased} in use, {recent} "
        f"were used within {cache.grace:g} s and {survey.partial} belong to downloads under way; "
        f"nothing was evicted; {_ADVICE}"
    )
