"""What clients reported, for those who look at it: the batches below a prefix, as records."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from storage.errors import IntegrityError, StorageError, UnsupportedOperation
from storage.integrations.scaleout import batches
from storage.integrations.scaleout.batches import BatchName
from storage.integrations.scaleout.records import METRIC, Record, numeric
from storage.registry import documents
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient

__all__ = ["Reports", "Summary"]

# How far the clock of a client may be ahead of that of the store.
_AHEAD = timedelta(days=1)

OnDamage = Callable[[StorageError], object]
"""Called with what is wrong with an object that is left out."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What there is, and whether it is all."""

    clients: int
    batches: int
    records: int
    """Each counted once."""

    duplicates: int
    """Records that were there once more."""

    missing: int
    """Numbers that should be there: between two others of their stream, and of no record."""

    damaged: int
    """Objects that cannot be read."""


class Reports:
    """Reads what clients reported. Nothing is remembered between two calls."""

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        config: Any = None,
        client: StorageClient | None = None,
    ) -> None:
        """Address the reports below ``uri``; nothing is asked of the store yet.

        Args:
            uri: where the runtimes put them.
            config: of the store.
            client: to ask with; the default one of this process if none is given.
        """
        if client is None:
            from storage.facade import default_client

            client = default_client()
        location = parse_uri(f"{os.fspath(uri).rstrip('/')}/")
        self._store = ObjectStore(client, location, config)

    def clients(self) -> list[str]:
        """Return the ids of all clients that ever delivered something, sorted."""
        return sorted({batches.client_of(name.partition("/")[0]) for name in self._names("")})

    def records(
        self,
        client: str | None = None,
        *,
        since: datetime | None = None,
        kinds: Collection[str] | None = None,
        on_damage: OnDamage | None = None,
    ) -> Iterator[Record]:
        """Yield records, each once: by client, and those of a client in the order of their numbers.

        Only names are kept in memory, about a hundred bytes for each batch; of the batches those
        that are fetched at once.

        Args:
            client: only those of this client.
            since: only those that were reported at that time or later, by the client's clock. It
                may be ahead of the store's by a day; what is older there is not fetched.
            kinds: only those of these kinds. All others are yielded too if there is none, those
                that this release does not know as well.
            on_damage: what to do about an object that cannot be read, instead of failing.

        Raises:
            IntegrityError: an object is damaged, and there is no ``on_damage``.
            InvalidInput: ``client`` cannot be the id of one.
            ValueError: ``since`` has no time zone.
        """
        if since is not None and since.tzinfo is None:
            raise ValueError("since has no time zone; say which one is meant")
        seen = _Seen()
        for _, found in self._batches(client, since, on_damage):
            for record in seen.news(found):
                if since is not None and record.report.time < since:
                    continue
                if kinds is None or record.report.kind in kinds:
                    yield record

    def metrics(
        self,
        client: str | None = None,
        *,
        since: datetime | None = None,
        on_damage: OnDamage | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield metrics as plain dicts, one for each call of ``log_metric``.

        They have ``client``, ``number``, ``time``, ``model_id``, ``round_id``, ``session_id``,
        ``task_id``, ``step``, and ``metrics``: numbers by their names, those that are not finite
        included.

        Args:
            client: as all others, see :meth:`records`.
            since: time.
            on_damage: what to do.

        Raises:
            IntegrityError: as :meth:`records`.
        """
        for record in self.records(client, since=since, kinds={METRIC}, on_damage=on_damage):
            said = record.report
            values = {name: numeric(value) for name, value in said.payload.items()}
            yield {
                "client": record.client,
                "number": record.number,
                "time": said.time,
                "model_id": said.model_id,
                "round_id": said.round_id,
                "session_id": said.session_id,
                "task_id": said.task_id,
                "step": said.step,
                "metrics": {name: value for name, value in values.items() if value is not None},
            }

    def check(self, client: str | None = None) -> Summary:
        """Read everything, and count what is there twice, not at all, or damaged.

        Args:
            client: only what this one reported.
        """
        damaged: list[StorageError] = []
        clients: set[str] = set()
        seen = _Seen()
        count = records = 0
        for said, found in self._batches(client, None, damaged.append):
            clients.add(said.client)
            count += 1
            records += len(list(seen.news(found)))
        return Summary(
            len(clients),
            count + len(damaged),
            records,
            seen.duplicates,
            seen.missing,
            len(damaged),
        )

    # -- batches ------------------------------------------------------------------------------

    def _batches(
        self, client: str | None, since: datetime | None, on_damage: OnDamage | None
    ) -> Iterator[tuple[BatchName, list[Record]]]:
        prefix = "" if client is None else f"{batches.client_folder(client)}/"
        oldest = None if since is None else since.astimezone(UTC) - _AHEAD
        names = self._names(prefix, oldest)
        step = self._store.client.budget.connections
        for start in range(0, len(names), step):
            for found in self._store.map(self._read, names[start : start + step]):
                if isinstance(found, tuple):
                    yield found
                elif on_damage is None:
                    raise found
                else:
                    on_damage(found)

    def _names(self, prefix: str, oldest: datetime | None = None) -> list[str]:
        """Return the names of all batches, by client and number; no more is kept of a listing."""
        store = self._store
        skip = len(store.location.prefix)

        def collect() -> list[str]:
            return [
                info.key[skip:]
                for info in store.backend.list(store.key(prefix))
                if oldest is None or info.modified is None or info.modified >= oldest
            ]

        found = store.client.run_retried(collect, where=store.where(prefix))
        return sorted(name for name in found if batches.parse_name(name) is not None)

    def _read(self, name: str) -> tuple[BatchName, list[Record]] | StorageError:
        """Return a batch, or what is wrong with it."""
        where = self._store.where(name)
        said = batches.parse_name(name)
        data = self._store.read(name)
        if said is None or data is None:
            return IntegrityError(f"{where} was listed, and now it is not there")
        try:
            return said, list(_parsed(data, said, where))
        except (IntegrityError, UnsupportedOperation) as exc:
            return exc


def _parsed(data: bytes, said: BatchName, where: str) -> Iterator[Record]:
    """Yield the records of a batch.

    Raises:
        IntegrityError: it is damaged, or not what its name says.
        UnsupportedOperation: it is of a format that this release does not know.
    """
    document = documents.decode(data, where)
    fields = documents.read_fields(document, where, client=str, stream=str, records=list)
    if (fields["client"], fields["stream"]) != (said.client, said.stream):
        raise IntegrityError(
            f"{where} holds records of another client or stream than its name says"
        )
    for each in fields["records"]:
        record = Record.parse(each, said.client, said.stream, where)
        if not said.first <= record.number <= said.last:
            raise IntegrityError(f"{where} holds record {record.number}, which its name leaves out")
        yield record


class _Seen:
    """Tells what is new among batches that come in the order of their names."""

    def __init__(self) -> None:
        self._highest: dict[tuple[str, str], int] = {}
        self.duplicates = 0
        self.missing = 0

    def news(self, found: Iterable[Record]) -> Iterator[Record]:
        """Yield the records that were not there before."""
        for record in found:
            stream = record.client, record.stream
            highest = self._highest.get(stream)
            if highest is not None and record.number <= highest:
                self.duplicates += 1
                continue
            if highest is not None:
                self.missing += record.number - highest - 1
            self._highest[stream] = record.number
            yield record
