"""Garbage: what killed processes left, and what nothing leads to any more.

Nothing that a download could still give is garbage, so a budget is not kept this way; see
:mod:`storage.cache.evict`. How things go while others use the cache is told in
:mod:`storage.cache.removal`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from storage.cache.layout import listed
from storage.cache.locks import remove_stale
from storage.cache.partials import dead_size, remove_dead
from storage.cache.records import DamagedRecordError, UnreadableRecordError
from storage.cache.removal import removing
from storage.cache.survey import folder_size
from storage.digest import Digest
from storage.files import remove

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache

__all__ = ["Collected", "collect", "collectable"]

_DAY = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Collected:
    """What was given back."""

    bytes: int
    counts: Mapping[str, int]
    """How many of each kind went: ``models`` (that no source has any more), ``blobs``, ``refs``
    (that lead nowhere), ``quarantined`` files, ``entries`` of the index and ``locks``."""


def collect(cache: ModelCache, *, grace: float | None = None) -> Collected:
    """Remove what no finished or living download needs.

    That is: what dead processes worked at, and their leases; models that no source has any
    more; blobs, snapshots and entries of the index without a model; notes that are damaged,
    lead nowhere, or tell of a download that began more than a day ago; what has been in
    quarantine for a week.

    Args:
        cache: what to clean.
        grace: seconds for which models and blobs stay that nothing leads to; the grace period
            of the cache if ``None``. With 0, quarantine is emptied too, and killed downloads
            cannot be continued.

    Raises:
        DestinationError: the cache cannot be read or written.
    """
    if not os.path.exists(cache.upper.layout.version):
        return Collected(0, {})
    grace = cache.grace if grace is None else grace
    root = cache.upper
    with cache.writing():
        # What a killed download can still be continued with is no garbage, for a day.
        size = remove_dead(root.path, resumable=not grace) + cache.leases.remove_dead()
        locks = remove_stale(root.layout.locks)
        quarantined, freed = _empty_quarantine(root.layout.quarantine, grace)
        with removing(cache) as removal:
            survey = removal.survey
            leads_nowhere = partial(_leads_nowhere, cache, survey.held.manifests)
            refs = sum(
                removal.take_file(path, leads_nowhere if is_ref else _is_over)
                for path, is_ref in root.refs.paths()
            )
            # Without them, more may lead nowhere.
            survey.update()
            victims = [*survey.unreferenced(grace), *survey.orphans(grace)]
            for manifest_id in victims:
                removal.take_model(manifest_id)
            removal.take_blobs(survey.unneeded(victims, grace))
        entries = root.index.prune(partial(_is_there, cache))
    counts = {
        "models": removal.models,
        "blobs": removal.blobs,
        "refs": refs,
        "quarantined": quarantined,
        "entries": entries,
        "locks": locks,
    }
    return Collected(size + freed + removal.bytes, counts)


def collectable(cache: ModelCache) -> int:
    """Return the bytes that :func:`collect` would give back beside models, blobs and notes.

    Raises:
        DestinationError: the cache cannot be read.
    """
    root = cache.upper
    if not os.path.exists(root.layout.version):
        return 0
    old = _old(root.layout.quarantine, cache.grace)
    return dead_size(root.path, resumable=not cache.grace) + sum(map(folder_size, old))


def _empty_quarantine(folder: str, grace: float) -> tuple[int, int]:
    """Remove what has been there for long; return how many files, and their bytes."""
    count = size = 0
    for path in _old(folder, grace):
        with contextlib.suppress(OSError):
            freed = folder_size(path)
            remove(path)
            count += 1
            size += freed
    return count, size


def _old(folder: str, grace: float) -> Iterator[str]:
    age = 7 * _DAY if grace else 0.0
    for name in listed(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            # A file gets this time when it is moved, and nobody can set it.
            if not age or time.time() - os.lstat(path).st_ctime > age:
                yield path


def _leads_nowhere(cache: ModelCache, held: Collection[str], path: str) -> bool:
    """Tell whether a ref is damaged, or its manifest is nowhere and nobody asks for it."""
    try:
        ref = cache.upper.refs.read(path)
    except UnreadableRecordError:
        return False
    except DamagedRecordError:
        return True
    return not (
        ref is None
        or ref.manifest in held
        or any(os.path.exists(root.layout.manifest(ref.manifest)) for root in cache.roots)
    )


def _is_over(path: str) -> bool:
    """Tell whether a note of a download that began is too old to be of use."""
    try:
        return time.time() - os.lstat(path).st_mtime > _DAY
    except OSError:
        return False


def _is_there(cache: ModelCache, digest: Digest) -> bool:
    return any(os.path.exists(root.blobs.path(digest)) for root in cache.roots)
