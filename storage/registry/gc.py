"""Collecting garbage: removing the blobs that no version uses, while others publish.

1. The blobs that no commit names are candidates. A collection that names them is written.
2. The leases are read: what they name stays. Old ones are revoked.
3. The commits are read again, after the leases: who released one had committed by then.
4. What is left of the candidates is doomed. A verdict that names it is created; if the collection
   is still there after that, the blobs are removed, then the collection, then the verdict.

Whoever takes a lease after step 2 sees the collection and keeps away from what it names. As every
upload has a name of its own, what was removed never comes back: a collector that stops for a day
before step 4, or a store that executes a removal late, hits nothing that is used.

Collectors that were killed leave collections behind. With a verdict, one goes when all that it
dooms is gone. Without one, another collector calls it off by an empty verdict and removes it: a
collector that only was slow finds that verdict, or no collection. So it does not matter how many
collect at once, or who of them is killed.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from storage.errors import InvalidInput, StorageError
from storage.registry import layout
from storage.registry.documents import Version, decode
from storage.registry.leases import (
    GRACE,
    CollectionDocument,
    list_collections,
    list_leases,
    revoke,
)
from storage.registry.objects import ObjectStore

__all__ = ["Collection", "collect"]

_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection did, or would do."""

    dry_run: bool
    """Whether nothing was done."""

    removed: int
    """Blobs."""

    freed: int
    """Bytes of them."""

    kept: int
    """Blobs that versions use, or that somebody is about to use."""

    kept_bytes: int
    """Bytes of them."""

    leases: int
    """Leases of publishers that are taken for dead."""

    helped: int
    """Versions that were committed and that nobody saw, because their publisher died then."""

    leftovers: int
    """Objects that deletions left behind which somebody did not finish."""


def collect(store: ObjectStore, *, grace: float = GRACE, dry_run: bool = False) -> Collection:
    """Remove what no version uses and nobody is about to use.

    Whatever ``grace`` is, nothing that is needed goes: a publisher that was taken for dead by
    mistake begins again.

    Args:
        store: the registry's.
        grace: seconds, by the store's clock, for which a publisher need not be heard of.
        dry_run: only tell what would be done.

    Raises:
        InvalidInput: ``grace`` is negative.
        IntegrityError: a document is damaged, so that nobody knows what is needed.
    """
    if not grace >= 0:
        raise InvalidInput(f"grace is a number of seconds from 0 on, not {grace}")
    age = timedelta(seconds=grace)
    # Before the blobs: one that is not there any more was removed, not written later.
    others = list_collections(store)
    blobs = {
        name: info.size or 0
        for name, info in store.infos(layout.BLOBS)
        if layout.blob_digest(name) is not None
    }
    survey = _Survey(store, dry_run)
    survey.read_models()
    candidates = sorted(blobs.keys() - survey.live)
    removed: list[str] = []
    now = datetime.now(UTC)
    if dry_run:
        survey.read_leases(now - age)
        removed = survey.doomed(candidates)
    else:
        # Once at least: there is more to do than to remove blobs.
        for start in range(0, max(1, len(candidates)), _BATCH):
            more, now = _remove(store, survey, candidates[start : start + _BATCH], age)
            removed += more
    # Here a wrong guess would do harm, if little, so ``grace`` does not count.
    leftovers = survey.leftovers(now - timedelta(seconds=GRACE))
    if not dry_run:
        store.delete(leftovers)
        _finish(store, others, blobs.keys() - set(removed), now - age)
    freed = sum(map(blobs.__getitem__, removed))
    return Collection(
        dry_run,
        removed=len(removed),
        freed=freed,
        kept=len(blobs) - len(removed),
        kept_bytes=sum(blobs.values()) - freed,
        leases=survey.revoked,
        helped=survey.helped,
        leftovers=len(leftovers),
    )


def _remove(
    store: ObjectStore, survey: _Survey, candidates: Sequence[str], age: timedelta
) -> tuple[list[str], datetime]:
    """Remove those of ``candidates`` that nobody needs; return them, and the store's time."""
    token = uuid.uuid4().hex
    name, verdict = layout.collection(token), layout.verdict(token)
    store.create(name, CollectionDocument(token, frozenset(candidates)).dumps())
    try:
        info = store.info(name)
        now = (info and info.modified) or datetime.now(UTC)
        survey.read_leases(now - age)
        survey.read_models()
        doomed = survey.doomed(candidates)
    except BaseException:
        # Nothing was removed, and nobody needs to keep away from these blobs.
        with contextlib.suppress(StorageError):
            store.delete([name])
        raise
    is_mine = store.create(verdict, CollectionDocument(token, frozenset(doomed)).dumps())
    if not is_mine or store.info(name) is None:
        doomed = []  # somebody took this collector for dead
    store.delete(doomed)
    _forget(store, name, verdict)
    return doomed, now


def _finish(
    store: ObjectStore,
    others: Mapping[str, CollectionDocument],
    left: Set[str],
    oldest: datetime,
) -> None:
    """Remove the collections of collectors that were killed, as far as that is safe.

    Args:
        store: the registry's.
        others: what there was before the blobs were listed.
        left: the blobs that are there.
        oldest: whoever began before is taken for dead.
    """
    for identity in {layout.last_part(name).partition(".")[0] for name in others}:
        name, verdict = layout.collection(identity), layout.verdict(identity)
        if verdict in others:
            # A verdict without its collection is that of a collector that gave up, or was done.
            is_over = others[verdict].blobs.isdisjoint(left) or store.info(name) is None
        else:
            written = others[name].modified
            is_over = (
                written is not None
                and written < oldest
                and store.create(verdict, CollectionDocument(uuid.uuid4().hex).dumps())
            )
        if is_over:
            _forget(store, name, verdict)


def _forget(store: ObjectStore, name: str, verdict: str) -> None:
    """Remove a collection, and then its verdict: one that comes late finds no collection."""
    store.delete([name])
    store.delete([verdict])


class _Survey:
    """What is known of the models and leases, more with each look."""

    def __init__(self, store: ObjectStore, dry_run: bool) -> None:
        self._store = store
        self._dry_run = dry_run
        self._names: dict[str, datetime | None] = {}
        self._read: set[str] = set()
        self.live: set[str] = set()
        """Names of the blobs that versions use, of those deleted since the first look too."""
        self.leased: set[str] = set()
        """Digests that publishers under way will use."""
        self.helped = 0
        self.revoked = 0

    def read_models(self) -> None:
        """Look at all models: read the commits that were not there at the last look."""
        self._names = {name: info.modified for name, info in self._store.infos(layout.MODELS)}
        commits = {name for name in self._names if layout.kind_of(name) == "contents"}
        added = self._store.map(self._read_commit, sorted(commits - self._read))
        self._read = commits
        self.helped += sum(added)

    def _read_commit(self, name: str) -> bool:
        """Note what a commit needs; tell whether nobody could see it."""
        store, where = self._store, self._store.where(name)
        data = store.read(name)
        document = {"revoked": ""} if data is None else decode(data, where)
        if "revoked" in document:
            return False
        version = Version.read(document, where)
        if layout.deleted(version.model, version.number) in self._names:
            return False
        self.live.update(version.blobs)
        seen_as = layout.version(version.model, version.number)
        if seen_as in self._names:
            return False
        if not self._dry_run:
            store.create(seen_as, version.dumps())
        return True

    def read_leases(self, oldest: datetime) -> None:
        """Read all leases; revoke those from before ``oldest``."""
        self.leased = set()
        for lease in list_leases(self._store):
            # A commit of the Hub has a time, and its objects have none.
            if (lease.modified or lease.started) >= oldest:
                self.leased.update(lease.blobs)
                continue
            self.revoked += 1
            if not self._dry_run:
                revoke(self._store, lease)

    def doomed(self, candidates: Sequence[str]) -> list[str]:
        """Return those of ``candidates`` that nobody needs."""
        return [
            name
            for name in candidates
            if name not in self.live and layout.blob_digest(name) not in self.leased
        ]

    def leftovers(self, oldest: datetime) -> list[str]:
        """Return what deletions have left: of versions that are gone, or from before ``oldest``."""
        gone = {
            layout.version_of(name) for name in self._names if layout.kind_of(name) == "deleted"
        }
        found = []
        for name, modified in self._names.items():
            kind = layout.kind_of(name)
            given_up = kind == "deleting" and modified is not None and modified < oldest
            remains = kind in ("versions", "attributes", "deleting")
            if given_up or (remains and layout.version_of(name) in gone):
                found.append(name)
        return sorted(found)
