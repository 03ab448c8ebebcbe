"""Leases: what publishers under way will use, and what collections under way will remove.

A publisher writes its lease before it looks at the collections, and a collection is written before
its collector looks at the leases: one of the two always sees the other. What a collection names, a
publisher takes for gone already and uploads under another name. What a lease names, a collector
leaves alone.

A lease whose publisher died is not renewed and gets old. It is not trusted to be dead, though: a
lease names the entry of the content's log that will be its commit, and whoever removes the lease
writes that entry first. So a publisher that was only slow cannot commit any more what may have
been removed; it takes another lease and looks at its blobs again.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self

from storage.backends.base import ObjectInfo
from storage.errors import IntegrityError, InvalidInput, StorageError
from storage.registry import layout
from storage.registry.documents import decode, encode, now, read_fields, read_time, write_time
from storage.registry.objects import ObjectStore

__all__ = [
    "GRACE",
    "CollectionDocument",
    "Lease",
    "LeaseDocument",
    "Pending",
    "condemned",
    "list_collections",
    "list_leases",
    "list_pending",
    "revoke",
]

GRACE = 24 * 3600.0
"""Seconds without a renewal after which the publisher of a lease counts as dead."""

_RENEWAL = 15 * 60.0
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LeaseDocument:
    """What a lease says."""

    id: str
    model: str
    pending: str
    """The pending version that it is for, which may have had others before."""

    started: datetime
    """When that was begun, by the publisher's clock."""

    blobs: frozenset[str]
    """The BLAKE3 of what it will use."""

    content: str = ""
    """Identity of what is to be committed; empty while that is not known, and no commit near."""

    attempt: int = 0
    """Number of the entry of the content's log that will be the commit."""

    modified: datetime | None = None
    """When it was written or renewed last, by the store's clock."""

    def dumps(self) -> bytes:
        """Return the text of its document."""
        return encode(
            {
                "model": self.model,
                "pending": self.pending,
                "started": write_time(self.started),
                "blobs": sorted(self.blobs),
                "content": self.content,
                "attempt": self.attempt,
            }
        )

    @classmethod
    def parse(cls, data: bytes, name: str, where: str, modified: datetime | None) -> Self:
        """Read the text of a lease.

        Args:
            data: the text.
            name: of the object that it is the text of.
            where: its URI, for messages.
            modified: when the object was written.

        Raises:
            IntegrityError: it is damaged.
            UnsupportedOperation: it is of a format that this release does not know.
        """
        fields = read_fields(
            decode(data, where),
            where,
            model=str,
            pending=str,
            started=str,
            blobs=list,
            content=str,
            attempt=int,
        )
        fields["started"] = read_time(fields["started"], where)
        fields["blobs"] = frozenset(map(str, fields["blobs"]))
        lease = cls(layout.last_part(name), **fields, modified=modified)
        try:
            layout.check_model(lease.model)
        except InvalidInput as exc:
            raise IntegrityError(f"{where} is damaged: {exc}") from exc
        if lease.content and not (_HEX.fullmatch(lease.content) and lease.attempt >= 1):
            raise IntegrityError(
                f"{where} is damaged: it names no entry of the log of a content: "
                f"{lease.content[:80]!r}, {lease.attempt}"
            )
        return lease


class Lease:
    """A lease of this process, renewed until it is released. A context manager.

    One that is dropped without that is not renewed any more, and is left to a collector.
    """

    def __init__(self, store: ObjectStore, document: LeaseDocument) -> None:
        """Prepare; see :meth:`take`."""
        self._store = store
        self._document = document
        # Whoever collects garbage may be the renewer itself, so nothing with a lock can end it.
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._end = weakref.finalize(self, ended.put, None)
        # It must not keep the lease from being garbage.
        self._renewer = threading.Thread(
            target=_renew,
            args=(store, self.name, document.dumps(), ended),
            name="registry lease",
            daemon=True,
        )

    @classmethod
    def take(
        cls,
        store: ObjectStore,
        model: str,
        blobs: Iterable[str] = (),
        *,
        pending: str,
        started: datetime | None = None,
        content: str = "",
        attempt: int = 0,
    ) -> Self:
        """Write a lease.

        The caller reads :func:`condemned` after this, and looks for its blobs after that.

        Args:
            store: the registry's.
            model: what is published to.
            blobs: BLAKE3 of all that will be used, there already or not.
            pending: identity of the pending version.
            started: when that was begun; now if ``None``.
            content: identity of the content. Without it nothing may be committed by this lease.
            attempt: number of the entry in the content's log that is going to be tried.
        """
        identity, began = uuid.uuid4().hex, started or now()
        document = LeaseDocument(
            identity, model, pending, began, frozenset(blobs), content, attempt
        )
        lease = cls(store, document)
        try:
            store.create(lease.name, document.dumps())
            lease._renewer.start()
        except BaseException:
            lease._end()
            raise
        return lease

    @property
    def id(self) -> str:
        """What tells it from others."""
        return self._document.id

    @property
    def name(self) -> str:
        """The name of its object."""
        return layout.upload(self.id)

    def abandon(self) -> None:
        """Leave it to a collector, because it is not known what became of the commit."""
        self._end()
        # A renewal under way would bring back what is removed next.
        self._renewer.join()

    def release(self) -> None:
        """Remove it, because the version is committed or will never be. Idempotent."""
        if self._end.alive:
            self.abandon()
            self._store.delete([self.name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _renew(store: ObjectStore, name: str, data: bytes, ended: queue.SimpleQueue[None]) -> None:
    while True:
        try:
            return ended.get(timeout=_RENEWAL)
        except queue.Empty:
            # Whether it still counts is decided by the commit alone.
            with contextlib.suppress(StorageError):
                store.replace(name, data)


@contextlib.contextmanager
def _advised(advice: str) -> Iterator[None]:
    """Tell what to do about a damaged object that nobody can do without."""
    try:
        yield
    except IntegrityError as exc:
        raise IntegrityError(f"{exc}; {advice}") from exc


@dataclass(frozen=True, slots=True)
class Pending:
    """A version that somebody is publishing, or was when he died."""

    id: str
    model: str

    started: datetime
    """By the clock of who publishes it, in UTC."""

    renewed: datetime | None
    """When it was last heard of, by the clock of the store."""


def list_pending(store: ObjectStore) -> list[Pending]:
    """Return the versions that have a lease, the oldest first."""
    found: dict[str, Pending] = {}
    for lease in list_leases(store):
        known = found.get(lease.pending)
        renewed = lease.modified
        if known is not None and known.renewed is not None:
            renewed = max(known.renewed, renewed or known.renewed)
        found[lease.pending] = Pending(lease.pending, lease.model, lease.started, renewed)
    return sorted(found.values(), key=lambda pending: pending.started)


def list_leases(store: ObjectStore) -> list[LeaseDocument]:
    """Return all leases, those of dead publishers too.

    Raises:
        IntegrityError: one is damaged, so that nobody knows what it needs.
    """

    def look(found: tuple[str, ObjectInfo]) -> LeaseDocument | None:
        name, info = found
        # A publisher who lost it like this could commit what is collected meanwhile.
        with _advised(
            "it tells what a publisher needs: when nobody publishes to this registry any more, "
            "remove this object, and publish again what was under way"
        ):
            data = store.read(name)
            if data is None:
                return None
            return LeaseDocument.parse(data, name, store.where(name), info.modified)

    leases = store.map(look, store.infos(layout.UPLOADS))
    return [lease for lease in leases if lease is not None]


def revoke(store: ObjectStore, lease: LeaseDocument) -> None:
    """Remove the lease of somebody else; nothing can be committed by it afterwards."""
    if lease.content:
        entry = layout.entry(layout.content_log(lease.model, lease.content), lease.attempt)
        # If something is there, the publisher has committed or somebody else was faster.
        store.create(entry, encode({"revoked": lease.id}))
    store.delete([layout.upload(lease.id)])


def condemned(store: ObjectStore) -> frozenset[str]:
    """Return the names of the blobs that collections under way may remove at any time.

    Raises:
        IntegrityError: a collection is damaged, so that nobody knows what it removes.
    """
    return frozenset().union(*(each.blobs for each in list_collections(store).values()))


@dataclass(frozen=True, slots=True)
class CollectionDocument:
    """What a collection under way says, or its verdict."""

    token: str
    """What tells whoever wrote it from others."""

    blobs: frozenset[str] = frozenset()
    """The names of the blobs that it condemns, or dooms."""

    modified: datetime | None = None
    """When it was written, by the store's clock if that tells."""

    def dumps(self) -> bytes:
        """Return the text of its document."""
        return encode({"token": self.token, "blobs": sorted(self.blobs), "at": write_time(now())})

    @classmethod
    def parse(cls, data: bytes, where: str, modified: datetime | None) -> Self:
        """Read the text of a collection or verdict.

        Args:
            data: the text.
            where: its URI, for messages.
            modified: when the object was written.

        Raises:
            IntegrityError: it is damaged.
            UnsupportedOperation: it is of a format that this release does not know.
        """
        fields = read_fields(decode(data, where), where, token=str, blobs=list, at=str)
        written = modified or read_time(fields["at"], where)
        return cls(fields["token"], frozenset(map(str, fields["blobs"])), written)


def list_collections(store: ObjectStore) -> dict[str, CollectionDocument]:
    """Return all collections under way and their verdicts, by the names of their objects.

    Raises:
        IntegrityError: one is damaged.
    """

    def look(found: tuple[str, ObjectInfo]) -> tuple[str, CollectionDocument] | None:
        name, info = found
        # Publishers would not keep away any more from what a collector at work removes.
        with _advised(
            "it tells what a gc removes: when no gc of this registry is running any more, remove "
            "this object; the next gc does the rest"
        ):
            data = store.read(name)
            if data is None:
                return None
            return name, CollectionDocument.parse(data, store.where(name), info.modified)

    found = store.map(look, store.infos(layout.COLLECTIONS))
    return dict(item for item in found if item is not None)
