"""Taking things out of a cache that others use at the same time, without a lock to rely on.

Whoever uses something holds a lease on it first and looks whether it is there afterwards.
Whoever removes something moves it out of sight first and reads the leases afterwards. So either
the user finds it gone, or the remover finds the lease and puts it back. In steps:

1. Read who needs what, and choose (:class:`storage.cache.survey.Survey`).
2. Rename all that is to go into a folder of our own in ``partial/``: refs first, so that nobody
   new finds a model of which the rest is about to go, then snapshot, manifest and blobs.
3. Read again who needs what, in an order that misses nobody: leases, pins, refs, manifests.
   What is needed now goes back, unless something new is in its place.
4. Delete our folder. Nothing in a public place is touched any more.

What may come in between:

* A download finds a blob and drops its own copy of it (``Blobs.add``) while we move that blob.
  It holds a lease on the blob since before it looked; in step 3 we see it. If the download has
  ended by then, its manifest is there and names the blob. Should it look in between, it finds
  that something is gone, and fetches it again (``Filling.publish`` checks everything).
* A model of ours is used between steps 1 and 2, and not any more in step 3: the time of its last
  use tells. It was pinned or fetched anew: a pin or a ref that was not there before tells.
* We are killed. What we moved is in the folder of a dead process and goes with that. What stays
  is in nobody's way: a model without its ref can be fetched again, a ref without its model too,
  and the rest nobody names, so that the next collection of garbage removes it.

Before step 1 we announce it (:mod:`storage.cache.announce`) until the end of step 3, and whoever
takes a lease meanwhile waits (``ModelCache.hold``), as does another removal. So nobody sees a
model that is gone for a moment and then back; moving and reading again is for those who cannot
wait that long. The lock ``gc`` only makes removals queue in an orderly way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from storage.cache.announce import REMOVED, announce_removal
from storage.cache.locks import gc_lock
from storage.cache.partials import new_partial
from storage.cache.records import DamagedRecordError, make_folder_for
from storage.cache.survey import Survey, folder_size
from storage.digest import Digest

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache

__all__ = ["Removal", "removing"]


@contextmanager
def removing(cache: ModelCache) -> Iterator[Removal]:
    """Take things out of a cache: what is taken in the body is gone at its end.

    Should the body fail, all of it is put back.

    Raises:
        DestinationError: something in the cache cannot be read.
        OSError: the cache cannot be written.
    """
    with new_partial(cache.upper.path) as folder:
        # Neither reading all of it nor deleting large files is a thing to wait for.
        survey = Survey(cache)
        with gc_lock(cache.upper.path):
            announced = announce_removal(cache.upper.layout, folder)
            survey.update()
            removal = Removal(cache, survey, announced)
            try:
                yield removal
                removal.settle()
            except BaseException:
                removal.put_back()
                raise
            os.rename(announced, os.path.join(folder, REMOVED))


class Removal:
    """What is on its way out of a cache."""

    def __init__(self, cache: ModelCache, survey: Survey, folder: str) -> None:
        """Move it to ``folder``, by which the removal is announced."""
        self._cache = cache
        self._folder = folder
        self.survey = survey
        """What there is, and who needs it, as of when the lock was taken."""

        self.models = self.blobs = self.bytes = 0
        """What is gone in the end."""
        self._moved: dict[str, str] = {}
        self._names = count()
        self._models: dict[str, _Model] = {}
        self._blobs: dict[Digest, str] = {}

    # -- taking ------------------------------------------------------------------------------

    def take_model(self, manifest_id: str) -> None:
        """Take a manifest, its refs in this root and its snapshot, or a snapshot alone."""
        survey, layout = self.survey, self._cache.upper.layout
        model = self._models[manifest_id] = _Model(
            survey.manifests.get(manifest_id, frozenset()),
            frozenset(survey.sources.get(manifest_id, ())),
            survey.used.get(manifest_id, 0.0),
        )
        known = manifest_id in survey.used
        for ref in survey.refs.get(manifest_id, ()) if known else ():
            path = self._cache.upper.refs.path(ref.source)
            # Another version may have come meanwhile, and has to stay.
            if self._take(path, partial(self._leads_to, manifest_id)):
                model.parts.append(path)
        manifest = (layout.manifest(manifest_id),) if known else ()
        for path in (layout.snapshot(manifest_id), *manifest):
            if self._take(path):
                model.parts.append(path)

    def take_blobs(self, digests: Iterable[Digest]) -> None:
        """Take blobs; those that turn out to be needed come back."""
        for digest in digests:
            path = self._cache.upper.blobs.path(digest)
            if self._take(path):
                self._blobs[digest] = path

    def take_file(self, path: str, is_useless: Callable[[str], bool]) -> bool:
        """Take a record, and put it back at once if it is not what it was taken for.

        Args:
            path: of the record.
            is_useless: tells of a path whether the record there can go.

        Returns:
            Whether it was taken.
        """
        return is_useless(path) and self._take(path, is_useless)

    def _take(self, path: str, check: Callable[[str], bool] | None = None) -> bool:
        moved = os.path.join(self._folder, str(next(self._names)))
        # Noted first: an interrupt may come before the call returns.
        self._moved[path] = moved
        try:
            os.rename(path, moved)
        except (FileNotFoundError, NotADirectoryError):
            del self._moved[path]
            return False
        if check is not None and not check(moved):
            self._put_back(path)
            return False
        return True

    def _leads_to(self, manifest_id: str, path: str) -> bool:
        try:
            ref = self._cache.upper.refs.read(path)
        except DamagedRecordError:
            return True
        return ref is not None and ref.manifest == manifest_id

    # -- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Read again who needs what, and put that back; the rest may be deleted."""
        survey = self.survey
        survey.update()
        pins = self._cache.pins.names()
        back = {
            manifest_id
            for manifest_id, model in self._models.items()
            if manifest_id in survey.held.manifests
            or manifest_id in survey.refs
            or not pins.isdisjoint(model.sources)
            or self._last_use(manifest_id) != model.used
        }
        needed = survey.named().union(*(self._models[each].blobs for each in back))
        for digest in needed.intersection(self._blobs):
            self._put_back(self._blobs.pop(digest))
        for manifest_id in back:
            # The other way round than they were taken: who finds the ref finds the rest.
            for path in reversed(self._models.pop(manifest_id).parts):
                self._put_back(path)
        manifest = self._cache.upper.layout.manifest
        self.models = sum(manifest(each) in model.parts for each, model in self._models.items())
        self.blobs = len(self._blobs)
        self.bytes = folder_size(self._folder)

    def put_back(self) -> None:
        """Put everything back that was taken."""
        for path in reversed([*self._moved]):
            self._put_back(path)

    def _last_use(self, manifest_id: str) -> float:
        """Return when a manifest was used last that was taken."""
        path = self._moved.get(self._cache.upper.layout.manifest(manifest_id))
        try:
            return self._models[manifest_id].used if path is None else os.stat(path).st_mtime
        except OSError:
            return 0.0

    def _put_back(self, path: str) -> None:
        """Put something back where it was, unless something new is there."""
        moved = self._moved.pop(path)
        # What cannot be put back is as if it had never been here: it will be fetched again.
        with contextlib.suppress(OSError):
            make_folder_for(path)
            if not os.path.isdir(moved):
                with contextlib.suppress(OSError):
                    os.link(moved, path)
                    return
            # Where there are no links; a folder takes the place of an empty one only.
            if not os.path.isfile(path):
                os.rename(moved, path)


@dataclass(slots=True)
class _Model:
    """A manifest that was taken."""

    blobs: frozenset[Digest]
    sources: frozenset[str]
    used: float
    parts: list[str] = field(default_factory=list)
    """What was taken of it, in this order."""
