"""`TaskBoard`: the operator's side of a fleet. It needs nothing of scaleout."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage.client.arguments import writable
from storage.errors import IntegrityError, ModelMissingError
from storage.integrations.scaleout import layout
from storage.integrations.scaleout.binding import mark
from storage.integrations.scaleout.documents import (
    INTERRUPTED,
    Claim,
    Request,
    Result,
    SignOfLife,
)
from storage.integrations.scaleout.layout import TaskEntry
from storage.integrations.scaleout.models import ModelStore
from storage.integrations.scaleout.reports import Reports
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.uri import Location

__all__ = ["ClientStatus", "TaskBoard", "TaskHandle"]

_SHORTEST_WAIT, _LONGEST_WAIT = 0.2, 5.0
_READ_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class TaskHandle:
    """Names a task; may be kept, and used by another process."""

    id: str
    """As ``correlation_id`` of the messages of the client has it."""

    client: str | None
    """Whom it is for; ``None`` for any one client."""

    def __post_init__(self) -> None:
        """Refuse what would name an object elsewhere.

        Raises:
            InvalidInput: no task has such an id, or no client.
        """
        layout.check_task(self.id)
        if self.client is not None:
            layout.check_client(self.client)


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """What a client last said of itself."""

    id: str
    name: str

    last_seen: datetime | None
    """By the clock of the store; ``None`` where it does not tell."""

    is_stopped: bool
    """Whether it has ended and said so. One that was killed or cut off is only silent."""

    running: tuple[str, ...]
    """Ids of the tasks that it does."""

    pending_records: int
    """Records that it has not delivered yet."""

    pending_results: int
    """Results that it has not delivered yet."""


class TaskBoard:
    """Gives the clients of a fleet tasks, and tells what became of them. Safe for many threads.

    Nothing is asked of the store before the first call, and there is no server: whoever may write
    below the URI may use a board, from anywhere.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        config: Any = None,
        client: StorageClient | None = None,
    ) -> None:
        """Address the fleet at ``uri``.

        Args:
            uri: as the clients' ``StorageRuntime`` has it.
            config: for the store.
            client: moves the bytes; that of the facades if ``None``.
        """
        if client is None:
            from storage.facade import default_client

            client = default_client()
        self.location: Location = writable(parse_uri(uri))
        """Where the fleet is."""

        self._store = ObjectStore(client, self.location, config)
        self._is_marked = False
        self.models = ModelStore(client, self.location, config)
        """The models of the fleet, by their ids."""

        self.reports = Reports(
            str(self.location.child(layout.REPORTS)), config=config, client=client
        )
        """What clients reported."""

    def __repr__(self) -> str:
        return f"TaskBoard({str(self.location)!r})"

    # -- giving tasks ------------------------------------------------------------------------

    def submit(
        self,
        kind: str,
        model_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        client: str | None = None,
        name: str | None = None,
        session_id: str = "",
        round_id: str = "",
    ) -> TaskHandle:
        """Put a task on the board.

        Args:
            kind: ``train``, ``validate``, ``stage``, ``infer`` or ``custom``.
            model_id: of the model that it is about.
            params: for the callback: the settings of a training, the parameters of an inference
                or a custom task.
            client: who shall do it; ``None`` lets any one client take it that can.
            name: of a custom task, as in ``set_custom_callback``.
            session_id: told to the callback, and kept with what it reports.
            round_id: as ``session_id``.

        Raises:
            InvalidInput: there is no such kind, or something that it needs is missing.
            StorageError: the store does not take it.
        """
        request = Request.of(
            kind, model_id, params, name=name, session_id=session_id, round_id=round_id
        )
        task = TaskHandle(layout.new_task_id(), client)
        if model_id:
            layout.check_model(model_id)
        self._mark()
        self._store.create(TaskEntry(task.id, client).request, request.dumps())
        return task

    def submit_to_all(
        self,
        kind: str,
        model_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        clients: Iterable[str] | None = None,
        **options: Any,
    ) -> list[TaskHandle]:
        """Put the same task on the board for each of several clients.

        Args:
            kind: as :meth:`submit`.
            model_id: as :meth:`submit`.
            params: as :meth:`submit`.
            clients: their ids; ``None`` for all that were heard of and have not ended.
            options: the other arguments of :meth:`submit`.

        Raises:
            StorageError: as :meth:`submit`.
        """
        if clients is None:
            clients = [status.id for status in self.clients() if not status.is_stopped]
        return [self.submit(kind, model_id, params, client=client, **options) for client in clients]

    def abort(self, task: TaskHandle) -> None:
        """Stop a task. One that nobody has begun ends at once; one that has ended stays as it is.

        A client that does it finds out when it looks next, and its callback when it calls
        ``check_task_abort``.

        Raises:
            ModelMissingError: there is no such task.
            StorageError: the store does not take it.
        """
        entry = self._entry(task)
        if entry.has_ended:
            return
        self._store.create(entry.abort, b"{}")
        # Whoever has the first claim writes the result.
        mine = Claim(None, f"operator-{uuid.uuid4().hex}", "")
        if not entry.claim and self._store.create(entry.claimed(1), mine.dumps()):
            now = datetime.now(UTC)
            told = {"msg": "Aborted by server"}
            self._store.create(entry.result, Result(INTERRUPTED, told, None, now, now).dumps())

    # -- what became of them -----------------------------------------------------------------

    def wait(self, task: TaskHandle, timeout: float | None = None) -> Result:
        """Return the result of a task, as soon as there is one.

        Args:
            task: what :meth:`submit` returned.
            timeout: seconds; ``None`` for ever.

        Raises:
            TimeoutError: there is none yet.
            ModelMissingError: the task was removed.
            StorageError: the store cannot be asked.
        """
        return self.wait_for([task], timeout)[0]

    def wait_for(self, tasks: Sequence[TaskHandle], timeout: float | None = None) -> list[Result]:
        """Return the results of several tasks, in their order; as :meth:`wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        found: dict[TaskHandle, Result] = {}
        wait = _SHORTEST_WAIT
        while True:
            left = [task for task in tasks if task not in found]
            for task, result in zip(left, self._store.map(self.result, left), strict=True):
                if result is not None:
                    found[task] = result
            if len(found) == len(set(tasks)):
                return [found[task] for task in tasks]
            left = [task for task in tasks if task not in found]
            if deadline is not None and time.monotonic() + wait > deadline:
                raise TimeoutError(
                    f"{len(left)} of {len(tasks)} tasks have no result after {timeout:g} s, "
                    f"{left[0].id} among them; clients() tells whether their clients are there"
                )
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(1.5 * wait, _LONGEST_WAIT)

    def result(self, task: TaskHandle) -> Result | None:
        """Return the result of a task; ``None`` if it has not ended.

        Raises:
            ModelMissingError: the task was removed.
            StorageError: the store cannot be asked.
        """
        entry = TaskEntry(task.id, task.client)
        data = self._store.read(entry.result)
        if data is not None:
            return Result.parse(data, self._store.where(entry.result))
        if self._store.info(entry.request) is None:
            raise _no_task(task)
        return None

    def results(self, client: str | None = None) -> Iterator[tuple[TaskHandle, Result]]:
        """Yield the results of all tasks that are on the board, the oldest first.

        Args:
            client: those of one client alone; what it did of the tasks for any client is among
                them.

        Raises:
            IntegrityError: a result is damaged; :meth:`remove_ended` removes its task.
            StorageError: the store cannot be asked.
        """
        ended = [
            entry
            for entry in self._entries()
            if entry.has_ended and (client is None or entry.client in (None, client))
        ]
        for start in range(0, len(ended), _READ_AT_ONCE):
            some = ended[start : start + _READ_AT_ONCE]
            texts = self._store.map(self._store.read, [entry.result for entry in some])
            for entry, data in zip(some, texts, strict=True):
                if data is None:
                    continue
                result = Result.parse(data, self._store.where(entry.result))
                if client is None or client in (entry.client, result.client):
                    yield _handle(entry), result

    def tasks(self) -> list[TaskHandle]:
        """Return all tasks on the board that have not ended, the oldest first."""
        return [
            _handle(entry)
            for entry in self._entries()
            if entry.is_requested and not entry.has_ended
        ]

    def request(self, task: TaskHandle) -> Request:
        """Return what a task asks for.

        Raises:
            ModelMissingError: there is no such task.
        """
        name = TaskEntry(task.id, task.client).request
        data = self._store.read(name)
        if data is None:
            raise _no_task(task)
        return Request.parse(data, self._store.where(name))

    def clients(self) -> list[ClientStatus]:
        """Return every client that was heard of, as its newest process tells it, sorted by id."""
        newest: dict[str, ClientStatus] = {}
        found = self._store.infos(layout.CLIENTS)
        texts = self._store.map(self._store.read, [name for name, _ in found])
        for (name, info), data in zip(found, texts, strict=True):
            place = layout.client_of(name)
            if place is None or data is None:
                continue
            try:
                sign = SignOfLife.parse(data, self._store.where(name))
            except IntegrityError:
                continue  # it is being written over
            status = ClientStatus(
                place[0],
                sign.name,
                info.modified,
                sign.is_stopped,
                sign.running,
                sign.pending_records,
                sign.pending_results,
            )
            known = newest.get(status.id)
            if known is None or _is_newer(status, known):
                newest[status.id] = status
        return [newest[client] for client in sorted(newest)]

    # -- tidying up --------------------------------------------------------------------------

    def remove_ended(self, tasks: Iterable[TaskHandle] | None = None) -> int:
        """Remove tasks that have ended, with their results, from the board.

        The fewer there are, the less a client has to list when it looks for work. Models that were
        trained stay.

        Args:
            tasks: which ones; those of them that have not ended are left. ``None`` for all.

        Returns:
            How many were removed.

        Raises:
            StorageError: the store does not remove them.
        """
        asked = None if tasks is None else set(tasks)
        ended = [
            entry
            for entry in self._entries()
            if (asked is None or _handle(entry) in asked)
            and (entry.has_ended or not entry.is_requested)
        ]
        # In this order: a client that finds a request without a result would do it. Whoever has
        # found it just before takes a second look for the request when he has claimed it.
        self._store.delete(entry.request for entry in ended)
        names = [
            name
            for entry in ended
            for number in range(1, entry.claim + 1)
            if (name := entry.claimed(number))
        ]
        self._store.delete([*names, *(entry.abort for entry in ended)])
        self._store.delete(entry.result for entry in ended)
        return len(ended)

    def _entries(self) -> list[TaskEntry]:
        return layout.entries(self._store.names(layout.TASKS))

    def _entry(self, task: TaskHandle) -> TaskEntry:
        plain = TaskEntry(task.id, task.client)
        folder = plain.request.rpartition("/")[0]
        found = layout.entries(self._store.names(f"{folder}/"))
        if not found or not found[0].is_requested:
            raise _no_task(task)
        return found[0]

    def _mark(self) -> None:
        if not self._is_marked:
            mark(self._store)
            self._is_marked = True


def _handle(entry: TaskEntry) -> TaskHandle:
    return TaskHandle(entry.id, entry.client)


def _is_newer(status: ClientStatus, than: ClientStatus) -> bool:
    if status.last_seen is None or than.last_seen is None:
        return than.is_stopped
    return status.last_seen > than.last_seen


def _no_task(task: TaskHandle) -> ModelMissingError:
    return ModelMissingError(task.id, f"there is no task {task.id}; it may have been removed")
