"""A batch of a mirror: a value that can be sent anywhere, and the function that does it there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from storage.backends.base import BatchBackend, ObjectInfo
from storage.client.client import StorageClient
from storage.client.copy import Copy
from storage.client.mirror.plan import MirrorItem
from storage.config.plain import PlainSettings, PlainTransfer
from storage.digest import CHECKSUMS, Digest, MultiHasher, available, hash_file
from storage.errors import (
    AuthenticationError,
    DestinationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    conceal_causes,
    one_line,
)
from storage.transfer.copy import Source
from storage.transfer.engine import LARGE_WRITE, run_by_size
from storage.transfer.progress import Meter
from storage.transfer.reader import open_reader
from storage.transfer.sending import send_items
from storage.uri import Location

__all__ = ["Batch", "Ends", "ItemOutcome", "copy_batch", "run_batch"]

_MARK = "mirrorof"
_LEFT_DIGESTS = ("blake3", "sha256")
_REASON = 600


@dataclass(frozen=True, slots=True)
class Ends:
    """What a worker has to know of both ends.

    Configs hold credentials, and travel with them; no representation shows one.
    """

    source: Location
    target: Location
    config: Any = field(repr=False)
    target_config: Any = field(repr=False)
    transfer: PlainTransfer = field(repr=False)
    is_tree: bool = True
    durable: bool = False
    algorithm: str | None = None
    """Of the digests that are wanted of all objects."""
    overwrite: bool = True
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """A few objects of a mirror."""

    name: str
    """Of no other batch, and of no other try of this one. Some executors remember results."""

    ends: Ends
    items: tuple[MirrorItem, ...] = field(repr=False)

    def again(self, name: str) -> Batch:
        """Return the same work for another worker, which trusts nothing of the first one."""
        return replace(
            self, name=name, items=tuple(replace(item, look=True) for item in self.items)
        )


@dataclass(frozen=True, slots=True)
class ItemOutcome:
    """What became of one object: exactly one of copied, in place already, failed."""

    path: str
    copied: bool = False
    size: int = 0
    """Bytes of the object at the destination."""

    moved: bool = False
    """Whether its bytes came by here; the store itself may have copied it."""

    digest: Digest | None = None
    """Of its bytes, if one was wanted."""

    error: str | None = None
    """The name of the error's type."""

    reason: str = ""


# One for each process: connections are worth keeping. Making one is inert, and a client knows
# by itself that it is in a forked child.
_clients: dict[PlainTransfer, StorageClient] = {}


def run_batch(batch: Batch) -> tuple[ItemOutcome, ...]:
    """Do a batch in whatever process this is. Repeating it does no harm."""
    client = _client_of(batch.ends.transfer)
    size = sum(item.info.size or 0 for item in batch.items)
    meter = Meter("mirror", str(batch.ends.source), size, len(batch.items), None)
    try:
        return copy_batch(client, batch, meter)
    except StorageError as exc:
        # Not even a store could be opened: an extra is missing there, or a file of the config.
        return tuple(_failed(item, exc) for item in batch.items)


def _client_of(transfer: PlainTransfer) -> StorageClient:
    found = _clients.get(transfer)
    if found is None:
        found = _clients.setdefault(
            transfer, StorageClient(settings=PlainSettings(transfer=transfer))
        )
    return found


def copy_batch(client: StorageClient, batch: Batch, meter: Meter) -> tuple[ItemOutcome, ...]:
    """Do a batch with ``client``.

    An object that cannot be copied does not keep the others from it.

    Args:
        client: whose connections and limits are used.
        batch: what is to be done.
        meter: is told about bytes and objects.

    Returns:
        What became of each object.
    """
    copy = _MirrorCopy(client, batch.ends, meter)
    return tuple(copy.outcomes(batch.items))


class _MirrorCopy(Copy):
    """A copy of many objects, of which each may be there already, and each may fail."""

    def __init__(self, client: StorageClient, ends: Ends, meter: Meter) -> None:
        super().__init__(client, ends.source, ends.target, ends.config, ends.target_config, None)
        self._ends = ends
        self._meter = meter
        # Neither looks at the bytes, and no store's own copy can be told to create only.
        self._by_store = self._by_store and ends.algorithm is None and ends.overwrite
        if ends.durable and ends.target.is_local:
            self._by_store = False
            self._backend = client.backend(ends.target, ends.target_config, durable=True)

    def outcomes(self, items: tuple[MirrorItem, ...]) -> Iterator[ItemOutcome]:
        found: dict[str, ItemOutcome] = {}
        waiting: list[tuple[MirrorItem, Source]] = []
        in_one_step = self._backend.capabilities.batch_write and not self._ends.dry_run

        def do(item: MirrorItem, cancel: threading.Event) -> None:
            try:
                if in_one_step:
                    settled = self._prepare(item, waiting)
                else:
                    settled = self._settle(item, cancel)
            except StorageError as exc:
                settled = _failed(item, exc)
            if settled is not None:
                found[item.path] = settled

        tasks = [(item.info.size, partial(do, item)) for item in items]
        run_by_size(tasks, self._client.budget, self._client.transfer_options.memory)
        if waiting:
            found |= self._send_waiting(waiting)
        return (found[item.path] for item in items)

    # -- one object --------------------------------------------------------------------------

    def _settle(self, item: MirrorItem, cancel: threading.Event) -> ItemOutcome:
        source, there = self._look(item)
        if there is not None:
            return there
        if self._ends.dry_run:
            return ItemOutcome(item.path, copied=True, size=item.info.size or 0)
        if self._by_store and self._copied_by_store(item.info, item.key, self._meter):
            self._meter.add_object()
            return ItemOutcome(item.path, copied=True, size=item.info.size or 0)
        return self._write(item, source, cancel)

    def _write(
        self, item: MirrorItem, source: Source | None, cancel: threading.Event
    ) -> ItemOutcome:
        if_absent = not self._ends.overwrite
        try:
            read, written = self._streamed(
                item.info, item.key, self._meter, cancel, source=source, if_absent=if_absent
            )
        except ObjectExistsError:
            # Perhaps it is the same. Whoever repeats a batch finds what the first one left.
            there = self._look(replace(item, look=True))[1]
            if there is None:
                raise
            return there
        self._meter.add_object()
        size = written.size if written.size is not None else read.info.size
        digest = self._digest_of(read, item.key)
        return ItemOutcome(item.path, True, size or 0, moved=True, digest=digest)

    def _look(self, item: MirrorItem) -> tuple[Source | None, ItemOutcome | None]:
        """Return what was asked about the source, and the outcome if all is in place already."""
        if not (item.look or (item.info.size or 0) > LARGE_WRITE):
            return None, None
        path = self._backend.local_path(item.key)
        if path is not None and self._ends.overwrite and os.path.islink(path):
            # What it leads to may be replaced or removed while it stays.
            return None, None
        try:
            there = self._client.run_retried(self._backend.stat, item.key)
        except (ModelMissingError, AuthenticationError):
            return None, None  # who may write may not look
        source = self._read(item.info)
        if not self._same(source, there):
            if not self._ends.overwrite:
                raise ObjectExistsError(
                    f"{self._ends.target}: {item.path} is there with other content and "
                    "overwrite=False; delete it, or mirror with overwrite=True"
                )
            return source, None
        digest = None
        if self._ends.algorithm is not None:
            digest = self._digest_at_target(item.key, there)
            if self._expected is not None and digest != self._expected:
                return source, None
        size = there.size or 0
        self._meter.add_present(size)
        self._meter.add_object()
        return source, ItemOutcome(item.path, size=size, digest=digest)

    # -- in one step of the store ------------------------------------------------------------

    def _prepare(
        self, item: MirrorItem, waiting: list[tuple[MirrorItem, Source]]
    ) -> ItemOutcome | None:
        # What is created only if absent may be there by an earlier try of the same batch.
        source, there = self._look(item if self._ends.overwrite else replace(item, look=True))
        if there is None:
            waiting.append((item, source or self._read(item.info)))
        return there

    def _send_waiting(self, waiting: list[tuple[MirrorItem, Source]]) -> dict[str, ItemOutcome]:
        backend, retry = cast("BatchBackend", self._backend), self._client.transfer_options.retry
        items = [source.item(backend, item.key) for item, source in waiting]
        try:
            send_items(backend, items, retry, self._meter, if_absent=not self._ends.overwrite)
        except (InvalidInput, IntegrityError, ObjectChangedError, ObjectExistsError) as exc:
            # One of them is to blame, and keeps the others from nothing.
            if len(waiting) == 1:
                return {waiting[0][0].path: _failed(waiting[0][0], exc)}
            middle = len(waiting) // 2
            return self._send_waiting(waiting[:middle]) | self._send_waiting(waiting[middle:])
        except StorageError as exc:
            return {item.path: _failed(item, exc) for item, _ in waiting}
        found = {}
        for item, source in waiting:
            self._meter.add_object()
            found[item.path] = ItemOutcome(
                item.path,
                True,
                source.info.size or 0,
                moved=True,
                digest=self._digest_of(source, item.key),
            )
        return found

    # -- is it the same? ---------------------------------------------------------------------

    def _read(self, info: ObjectInfo) -> Source:
        """Return the source of an object, with what tells it again at the destination."""
        source = Source(
            self._origin,
            info,
            where=str(self._location_of(info)),
            retry=self._client.transfer_options.retry,
            expected=self._expected,
            pinned=self._source.version is not None,
            algorithm=self._ends.algorithm,
        )
        if not self._backend.capabilities.metadata:
            return source
        path = self._origin.local_path(info.key)
        if path is not None and not self._ends.dry_run:
            # What an upload leaves with an object, too.
            digests = tuple(_hash_local(path, _LEFT_DIGESTS).values())
            source.info = replace(source.info, digests=digests)
        elif all(digest.algorithm in CHECKSUMS for digest in source.info.digests):
            mark = self._mark_of(source)
            if mark is not None:
                metadata = {**source.info.metadata, _MARK: mark}
                source.info = replace(source.info, metadata=metadata)
        return source

    def _location_of(self, info: ObjectInfo) -> Location:
        source = self._source
        return source.child(info.key[len(source.prefix) :]) if self._ends.is_tree else source

    def _same(self, source: Source, there: ObjectInfo) -> bool:
        """Tell whether ``there`` has the content of ``source``; without a doubt, or not."""
        info = source.vouched
        if None not in (info.size, there.size) and info.size != there.size:
            return False
        # Of the source, its store was asked already.
        mine = _told(info)
        theirs = _told(there) or self._asked(there)
        _fill_in(self._origin.local_path(info.key), mine, theirs, there.hint)
        _fill_in(self._backend.local_path(there.key), theirs, mine, info.hint)
        common = mine.keys() & theirs.keys()
        if any(mine[name] != theirs[name] for name in common):
            return False
        if common - CHECKSUMS:
            return True
        if info.hint is not None and info.hint in (there.hint, theirs.get(info.hint.algorithm)):
            return True
        if there.hint is not None and there.hint == mine.get(there.hint.algorithm):
            return True
        mark = self._mark_of(source)
        return mark is not None and there.metadata.get(_MARK) == mark

    def _mark_of(self, source: Source) -> str | None:
        """Return what tells this very version of an object, if its store has a word for it."""
        info = source.info
        if info.pin is None:
            return None
        hasher = MultiHasher(["sha256"])
        # Some servers make tags of times and sizes, and another one's may be the same.
        named = f"{self._location_of(info)}\0{info.size}\0{info.pin}"
        hasher.update(named.encode("utf-8", "surrogateescape"))
        return hasher.digests()["sha256"].hex

    def _asked(self, there: ObjectInfo) -> dict[str, Digest]:
        """Return the digests that the destination tells of an object only when asked."""
        if there.hint is None and self._backend.capabilities.checksums:
            with suppress(AuthenticationError, ModelMissingError):
                kept = self._client.run_retried(self._backend.checksums, there)
                return {digest.algorithm: digest for digest in kept}
        return {}

    def _digest_of(self, source: Source, key: str) -> Digest | None:
        """Return the digest of what was just written, if one is wanted."""
        if self._ends.algorithm is None:
            return None
        found = source.found.get(self._ends.algorithm)
        return found or self._digest_at_target(
            key, self._client.run_retried(self._backend.stat, key)
        )

    def _digest_at_target(self, key: str, info: ObjectInfo) -> Digest:
        """Return the digest of the bytes that are at the destination."""
        algorithm = cast("str", self._ends.algorithm)
        path = self._backend.local_path(key)
        if path is not None:
            return _hash_local(path, (algorithm,))[algorithm]
        retry = self._client.transfer_options.retry
        with open_reader(self._backend, info, retry, str(self._target)) as reader:
            return hash_file(reader, (algorithm,))[algorithm]


def _told(info: ObjectInfo) -> dict[str, Digest]:
    """Return the digests of an object that its store, or whoever wrote it, vouches for."""
    found = {digest.algorithm: digest for digest in info.digests}
    for name, text in info.metadata.items():
        with suppress(InvalidInput):
            found.setdefault(name, Digest(name, text))
    return found


def _fill_in(
    path: str | None, mine: dict[str, Digest], theirs: dict[str, Digest], hint: Digest | None
) -> None:
    """Hash a file of this machine, if nothing yet tells whether it is what the others are."""
    if path is None or (mine.keys() & theirs.keys()) - CHECKSUMS:
        return
    names = [name for name in theirs if name not in CHECKSUMS and available(name)]
    names += _LEFT_DIGESTS[:1] if hint is None else [hint.algorithm]
    mine |= _hash_local(path, names[:1])


def _hash_local(path: str, algorithms: Sequence[str]) -> dict[str, Digest]:
    try:
        return hash_file(path, algorithms)
    except OSError as exc:
        raise DestinationError(f"{path} cannot be read: {exc.strerror}") from exc


def _failed(item: MirrorItem, exc: StorageError) -> ItemOutcome:
    conceal_causes(exc)
    return ItemOutcome(item.path, error=type(exc).__name__, reason=one_line(exc, _REASON))
