"""Tasks on their way through a client: found by polling, claimed, run, stopped, and noted down."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from storage.errors import (
    IntegrityError,
    InvalidInput,
    StorageError,
    UnsupportedOperation,
    one_line,
)
from storage.integrations.scaleout import layout
from storage.integrations.scaleout.classes import Classes
from storage.integrations.scaleout.documents import (
    AUTONOMOUS,
    COMPLETED,
    FAILED,
    INTERRUPTED,
    Claim,
    Request,
    Result,
)
from storage.integrations.scaleout.handlers import Done, Handlers, answer
from storage.integrations.scaleout.layout import TaskEntry
from storage.integrations.scaleout.outbox import Outbox, Outcome
from storage.integrations.scaleout.presence import Presence
from storage.integrations.scaleout.processes import forget_in_child
from storage.registry.objects import ObjectStore

__all__ = ["CONCURRENCY", "TaskRunner"]

_log = logging.getLogger(__name__)

CONCURRENCY = 4
"""Tasks of a board that a client does at the same time."""

_NOTING_AGAIN = 5.0
# Ended tasks on a board, each of which is three names to list: the first warning of them.
_MANY = 1000
_ENDED = "the client that began it by itself has ended"


@dataclass(eq=False, slots=True)
class _Running:
    """A task that this process does."""

    entry: TaskEntry
    request: Request
    task: Any
    """The ``Task`` of scaleout, which tells the callback that it is to stop."""

    is_own: bool = False
    """Whether the client began it by itself."""

    is_known: bool = True
    """Whether the store has been told of it."""

    is_lost: bool = False
    """Whether its result is not wanted any more."""

    thread: threading.Thread | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


class TaskRunner:
    """Does the tasks of one client. Its methods may be called by any thread."""

    def __init__(
        self,
        store: ObjectStore,
        client_id: str,
        presence: Presence,
        handlers: Handlers,
        outbox: Outbox,
        classes: Classes,
        *,
        concurrency: int,
        on_outcome: Callable[[], None],
    ) -> None:
        """Prepare; nothing is asked of the store yet.

        Args:
            store: the fleet.
            client_id: whose tasks are done.
            presence: which process this is.
            handlers: do what a task asks for.
            outbox: takes results.
            classes: of scaleout.
            concurrency: tasks of the board done at once; the others are left where they are.
            on_outcome: called when there is a result in the outbox.
        """
        self._store = store
        self._client_id = client_id
        self._presence = presence
        self._handlers = handlers
        self._outbox = outbox
        self._classes = classes
        self._concurrency = concurrency
        self._on_outcome = on_outcome
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        # These two are the poll's own. Claims of others or that are damaged, and what tasks for any
        # client ask for: they are there for good, and need no second look.
        self._foreign: set[tuple[str, int]] = set()
        self._types: dict[str, str] = {}
        self._too_many = _MANY
        self._stopping = threading.Event()
        forget_in_child(self)

    # -- what others ask ---------------------------------------------------------------------

    def running(self) -> tuple[str, ...]:
        """Return the ids of the tasks under way."""
        with self._lock:
            return tuple(sorted(self._running))

    def current(self) -> Any:
        """Return the ``Task`` that the calling thread does, if it does one."""
        me = threading.current_thread()
        with self._lock:
            found = [each for each in self._running.values() if each.thread is me]
        return found[0].task if found else None

    def check_abort(self) -> None:
        """Raise if the task of the calling thread is to stop; do nothing on other threads.

        Raises:
            StoppedException: of scaleout.
        """
        task = self.current()
        if task is None:
            return
        with task.lock:
            if task.interrupted:
                raise self._classes.StoppedException(task.interrupted_reason)

    def forget(self) -> None:
        """Give up what threads of the parent may hold; for the child of a fork."""
        self._lock = threading.Lock()

    def stop(self, timeout: float) -> bool:
        """Take no more tasks, tell those under way to stop, and wait for them.

        Those of the board that stop have no result: the next process of this client does them
        again, as it would if this one had been killed.

        Returns:
            Whether all have ended.
        """
        self._stopping.set()
        with self._lock:
            running = list(self._running.values())
        for each in running:
            self._interrupt(each, "the client stops")
        deadline = time.monotonic() + timeout
        for each in running:
            if each.thread is not None and each.thread is not threading.current_thread():
                each.thread.join(max(0.0, deadline - time.monotonic()))
        return not self.running()

    # -- looking for work --------------------------------------------------------------------

    def poll(self) -> None:
        """Look once for what is to be done and what is to be stopped.

        Raises:
            StorageError: the store cannot be asked.
        """
        mine = layout.entries(self._store.names(layout.task_folder(self._client_id)))
        shared = layout.entries(self._store.names(layout.task_folder(None)))
        found = sorted([*mine, *shared], key=lambda entry: entry.id)
        self._stop_aborted({entry.id: entry for entry in found})
        self._tell_of_own()
        self._forget({entry.id for entry in found if not entry.has_ended})
        self._advise(sum(entry.has_ended for entry in found))
        for entry in found:
            if self._stopping.is_set():
                return
            try:
                if entry.is_requested and not entry.has_ended:
                    self._consider(entry)
            except (InvalidInput, IntegrityError, UnsupportedOperation) as exc:
                # Whoever may write to the board must not be able to stop the others' tasks.
                self._leave_alone(entry, exc)

    def _forget(self, but: set[str]) -> None:
        self._foreign = {each for each in self._foreign if each[0] in but}
        self._types = {task: type_ for task, type_ in self._types.items() if task in but}

    def _advise(self, ended: int) -> None:
        if ended >= self._too_many:
            self._too_many = 2 * ended
            _log.warning(
                "each look for tasks lists %d that have ended; remove_ended() of the board makes "
                "looks short again",
                ended,
            )

    def _leave_alone(self, entry: TaskEntry, reason: StorageError) -> None:
        _log.error("task %s is left alone: %s", entry.id, one_line(reason))
        self._foreign.add((entry.id, entry.claim))

    def _stop_aborted(self, found: dict[str, TaskEntry]) -> None:
        with self._lock:
            running = [each for each in self._running.values() if each.is_known]
        for each in running:
            entry = found.get(each.entry.id)
            if entry is None:
                self._lose(each, "the task was removed")
            elif entry.has_ended or entry.claim > each.entry.claim:
                self._lose(each, "another process of this client has taken the task over")
            elif entry.is_aborted:
                self._interrupt(each, "Aborted by server")

    def _lose(self, running: _Running, reason: str) -> None:
        running.is_lost = True
        self._interrupt(running, reason)

    @staticmethod
    def _interrupt(running: _Running, reason: str) -> None:
        with running.task.lock:
            if not running.task.interrupted:
                running.task.interrupted = True
                running.task.interrupted_reason = reason

    def _consider(self, entry: TaskEntry) -> None:
        with self._lock:
            busy = sum(not each.is_own for each in self._running.values())
            is_running = entry.id in self._running
        if is_running or (entry.id, entry.claim) in self._foreign or not self._can(entry):
            return
        # In this order: a result is in the outbox before its task is under way no more.
        if self._outbox.holds(entry.id) or (busy >= self._concurrency and not entry.is_aborted):
            return
        if entry.claim and not self._may_take(entry):
            return
        request, problem = self._request(entry)
        if request is None and problem is None:
            return
        if request is not None and entry.client is None:
            self._types[entry.id] = request.type
            if not self._can(entry):
                return
        if not self._take(entry):
            return
        if entry.is_aborted:
            self._note(entry, Result(INTERRUPTED, {"msg": "Aborted by server"}, *self._moment()))
        elif problem is not None:
            self._note(entry, Result(FAILED, {"error": problem}, *self._moment()))
        elif request is not None and request.type.startswith(AUTONOMOUS):
            self._note(entry, Result(FAILED, {"error": _ENDED}, *self._moment()))
        elif request is not None:
            self._begin(replace(entry, claim=entry.claim + 1), request)

    def _can(self, entry: TaskEntry) -> bool:
        """Tell whether this client can do what a task for any asks for, as far as it is known."""
        type_ = self._types.get(entry.id)
        # Another client may have the callback, or this one later.
        return type_ is None or self._handlers.can(type_)

    def _may_take(self, entry: TaskEntry) -> bool:
        name = entry.claimed(entry.claim)
        data = self._store.read(name)
        if data is None:
            return False
        claim = Claim.parse(data, self._store.where(name))
        if claim.client is None:
            return entry.is_aborted  # whoever stopped it did not come to write the result
        if claim.client != self._client_id:
            self._foreign.add((entry.id, entry.claim))
            return False
        return self._presence.may_take(claim)

    def _request(self, entry: TaskEntry) -> tuple[Request | None, str | None]:
        """Return what is to be done, or why that cannot be told; neither if it is gone."""
        try:
            data = self._store.read(entry.request)
            if data is None:
                return None, None
            request = Request.parse(data, self._store.where(entry.request))
            self._message(entry, request)
        except (IntegrityError, UnsupportedOperation, ValueError, RecursionError) as exc:
            return None, one_line(exc)  # a message holds less than JSON does, half characters not
        return request, None

    def _take(self, entry: TaskEntry) -> bool:
        """Claim a task; return whether it is this process's to do, and still to be done."""
        name = entry.claimed(entry.claim + 1)
        if not self._store.create(name, self._presence.claim.dumps()):
            return False
        # Whoever removes a task removes its request first, and the claims that he has seen then.
        if self._store.info(entry.request) is None:
            self._store.delete([name])
            return False
        return self._store.info(entry.result) is None

    # -- doing it ----------------------------------------------------------------------------

    def _begin(self, entry: TaskEntry, request: Request) -> None:
        message = self._message(entry, request)
        running = _Running(entry, request, self._classes.Task(message))
        running.task.acked_by_server = True
        self._start(running, lambda: self._handlers.run(message))

    def start_own(self, callback: Callable[[], Any], type_: str, parameters: Any) -> Any:
        """Begin a task that the client wants by itself, and return scaleout's ``Task`` of it.

        It begins at once, whether the store can be reached or not, and can be stopped by the
        board as soon as the store knows of it.
        """
        entry = TaskEntry(layout.new_task_id(), self._client_id, is_requested=True, claim=1)
        model_id = str((parameters or {}).get("model_id", ""))
        request = Request(type_, model_id, {"parameters": dict(parameters or {})})
        running = _Running(
            entry, request, self._classes.Task(self._message(entry, request)), is_own=True
        )
        running.is_known = False
        running.task.command_type = type_

        self._start(running, lambda: answer(callback()))
        return running.task

    def _tell_of_own(self) -> None:
        with self._lock:
            untold = [each for each in self._running.values() if not each.is_known]
        for each in untold:
            # The claim comes first: a request without one is somebody's to do.
            self._store.create(each.entry.claimed(1), self._presence.claim.dumps())
            self._store.create(each.entry.request, each.request.dumps())
            each.is_known = True
            each.task.acked_by_server = True

    def _message(self, entry: TaskEntry, request: Request) -> Any:
        return self._classes.messages.TaskRequest(
            model_id=request.model_id,
            data=json.dumps(dict(request.data)),
            correlation_id=entry.id,
            timestamp=request.submitted.isoformat(),
            session_id=request.session_id,
            round_id=request.round_id,
            type=request.type,
            status=self._classes.StatusType.PENDING.value,
            client_id=self._client_id,
        )

    def _start(self, running: _Running, work: Callable[[], Done]) -> None:
        running.thread = threading.Thread(
            target=self._do,
            args=(running, work),
            name=f"scaleout task {running.entry.id}",
            daemon=True,
        )
        running.task.runner_thread = running.thread
        with self._lock:
            self._running[running.entry.id] = running
        try:
            running.thread.start()
        except BaseException:
            # There are no more threads to be had: it can be tried again.
            with self._lock:
                del self._running[running.entry.id]
            raise

    def _do(self, running: _Running, work: Callable[[], Done]) -> None:
        task, status = running.task, self._classes.StatusType
        with task.lock:
            task.status = status.RUNNING
            task.started_at = running.started
        done = Done({})
        try:
            done = work()
            ended, response = COMPLETED, done.response
        except self._classes.StoppedException as exc:
            ended, response = INTERRUPTED, {"msg": str(exc)}
        except (Exception, SystemExit) as exc:  # noqa: BLE001 -- a callback may raise anything
            # The causes of ours may tell more of a store than a log should hold.
            trace = None if isinstance(exc, StorageError) else exc
            _log.warning("task %s failed: %s", running.entry.id, one_line(exc), exc_info=trace)
            ended, response = FAILED, {"error": one_line(exc) or type(exc).__name__}
        result = Result(ended, response, self._client_id, running.started, datetime.now(UTC))
        own = running if running.is_own else None
        is_given_up = ended == INTERRUPTED and (
            running.is_lost or (self._stopping.is_set() and own is None)
        )
        if not is_given_up:
            try:
                self._note(running.entry, result, done.model, own)
            except Exception as exc:  # noqa: BLE001 -- the model is the callback's, and may be gone
                _log.error("the result of task %s is lost: %s", running.entry.id, one_line(exc))
                ended, response = FAILED, {"error": one_line(exc)}
                now = datetime.now(UTC)
                result = Result(FAILED, response, self._client_id, running.started, now)
                self._note(running.entry, result, None, own)
        with task.lock:
            task.response = dict(response)
            task.status = status(ended)
            task.completed_at = result.ended
            task.done = True
        with self._lock:
            del self._running[running.entry.id]

    def _moment(self) -> tuple[str, datetime, datetime]:
        now = datetime.now(UTC)
        return self._client_id, now, now

    def _note(
        self, entry: TaskEntry, result: Result, model: Any = None, own: _Running | None = None
    ) -> None:
        """Put a result into the outbox; a full disk is waited for.

        Raises:
            Exception: it cannot be read, or written down at all.
        """
        outcome = Outcome(
            entry,
            result,
            None if model is None else model.model_id,
            None if own is None else own.request,
            None if own is None else self._presence.claim,
        )
        while True:
            try:
                if model is None:
                    self._outbox.put(outcome)
                else:
                    with closing(model.get_file_stream()) as stream:
                        self._outbox.put(outcome, stream)
                break
            except InvalidInput:
                raise
            except StorageError as exc:
                _log.error("the result of task %s cannot be kept: %s", entry.id, one_line(exc))
                if self._stopping.wait(_NOTING_AGAIN):
                    return  # the next process does the task again
        self._on_outcome()
