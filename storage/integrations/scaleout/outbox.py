"""What clients have made and no store has yet: results of tasks, with the models that they trained.

A result is on this machine's disk before its task counts as done, so neither a store that cannot
be reached nor the death of the process loses it, and nothing is trained twice. One folder each,
which appears by a rename and goes by one::

    <task>/outcome.json     the result, and where it belongs
    <task>/model.scm        the trained model, if there is one
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from dataclasses import dataclass
from typing import BinaryIO

from storage.errors import IntegrityError, StorageError, TransferError, one_line
from storage.files import remove, sync, sync_tree, translate_os_errors
from storage.integrations.scaleout.documents import Claim, Request, Result
from storage.integrations.scaleout.layout import TaskEntry
from storage.integrations.scaleout.models import ModelStore
from storage.registry.documents import decode, encode, read_fields
from storage.registry.objects import ObjectStore

__all__ = ["Delivery", "Outbox", "Outcome"]

_log = logging.getLogger(__name__)

_DOCUMENT, _MODEL = "outcome.json", "model.scm"
_UNFINISHED, _DAMAGED = ".unfinished-", ".damaged-"
_BLOCK = 1024 * 1024
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result on its way to the store."""

    entry: TaskEntry
    """The task."""

    result: Result

    model_id: str | None = None
    """The id of the model that comes with it."""

    request: Request | None = None
    """What the store has to be told of a task that the client began by itself."""

    claim: Claim | None = None
    """As ``request``: who did it."""

    def dumps(self) -> bytes:
        """Return the text of its document."""
        return encode(
            {
                "task": self.entry.id,
                "client": self.entry.client,
                "result": self.result.dumps().decode(),
                "model_id": self.model_id,
                "request": None if self.request is None else self.request.dumps().decode(),
                "claim": None if self.claim is None else self.claim.dumps().decode(),
            }
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> Outcome:
        """Read the text of an outcome at ``where``.

        Raises:
            IntegrityError: it is damaged.
        """
        text = (str, type(None))
        fields = read_fields(
            decode(data, where),
            where,
            task=str,
            client=text,
            result=str,
            model_id=text,
            request=text,
            claim=text,
        )
        request, claim = fields["request"], fields["claim"]
        return cls(
            TaskEntry(fields["task"], fields["client"]),
            Result.parse(fields["result"].encode(), where),
            fields["model_id"],
            None if request is None else Request.parse(request.encode(), where),
            None if claim is None else Claim.parse(claim.encode(), where),
        )


class Outbox:
    """The folder of what has to be delivered. One process uses it at a time."""

    def __init__(self, folder: str, *, durable: bool = False) -> None:
        """Use ``folder``, which is made; what a killed process had not finished goes.

        Args:
            folder: of this client alone.
            durable: whether what is put there is on the disk before it counts.

        Raises:
            DestinationError: it cannot be written to.
        """
        self._folder = folder
        self._durable = durable
        with translate_os_errors(folder):
            os.makedirs(folder, exist_ok=True)
            for name in os.listdir(folder):
                if name.startswith(_UNFINISHED):
                    remove(os.path.join(folder, name))

    def put(self, outcome: Outcome, model: BinaryIO | None = None) -> None:
        """Keep an outcome until it is delivered.

        Args:
            outcome: of a task without one.
            model: the bytes of the model that comes with it; read to the end.

        Raises:
            DestinationError: it cannot be written (``InsufficientSpaceError``: no room).
        """
        place = os.path.join(self._folder, outcome.entry.id)
        own = os.path.join(self._folder, f"{_UNFINISHED}{uuid.uuid4().hex}")
        with translate_os_errors(place):
            try:
                os.mkdir(own, 0o700)
                if model is not None:
                    with open(os.path.join(own, _MODEL), "xb") as file:
                        shutil.copyfileobj(model, file, _BLOCK)
                with open(os.path.join(own, _DOCUMENT), "xb") as file:
                    file.write(outcome.dumps())
                if self._durable:
                    sync_tree(own)
                os.rename(own, place)
                if self._durable:
                    sync(self._folder)
            except BaseException:
                remove(own)
                raise

    def tasks(self) -> list[str]:
        """Return the ids of the tasks whose outcomes are here, the oldest first."""
        with translate_os_errors(self._folder):
            return sorted(name for name in os.listdir(self._folder) if not name.startswith("."))

    def holds(self, task: str) -> bool:
        """Tell whether the outcome of a task is here."""
        return os.path.isdir(os.path.join(self._folder, task))

    def read(self, task: str) -> Outcome:
        """Return an outcome.

        Raises:
            IntegrityError: it is damaged.
        """
        path = os.path.join(self._folder, task, _DOCUMENT)
        with translate_os_errors(path), open(path, "rb") as file:
            return Outcome.parse(file.read(), path)

    def model(self, task: str) -> str:
        """Return the path of the model that comes with an outcome."""
        return os.path.join(self._folder, task, _MODEL)

    def discard(self, task: str) -> None:
        """Remove an outcome."""
        gone = os.path.join(self._folder, f"{_UNFINISHED}{uuid.uuid4().hex}")
        with translate_os_errors(self._folder):
            os.rename(os.path.join(self._folder, task), gone)
            remove(gone)

    def set_aside(self, task: str) -> None:
        """Leave a damaged outcome under a name that nobody looks at."""
        with translate_os_errors(self._folder):
            aside = os.path.join(self._folder, f"{_DAMAGED}{task}-{uuid.uuid4().hex[:8]}")
            os.rename(os.path.join(self._folder, task), aside)


class Delivery:
    """Brings what is in an outbox to the store, one after the other, until all is there."""

    def __init__(self, outbox: Outbox, store: ObjectStore, models: ModelStore) -> None:
        """Prepare; :meth:`start` begins."""
        self._outbox = outbox
        self._store = store
        self._models = models
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._is_away = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="scaleout outbox", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Look for what is new. A store that could not be reached is asked no sooner."""
        if not self._is_away:
            self.wake()

    def wake(self) -> None:
        """Look at once, whatever was to be waited for: the store can be reached again."""
        self._idle.clear()
        self._wake.set()

    def close(self, timeout: float) -> bool:
        """Deliver what can be within ``timeout`` seconds, and end.

        Returns:
            Whether nothing is left.
        """
        self.wake()
        if self._thread is not None:
            self._idle.wait(timeout)
            self._stop.set()
            self._wake.set()
            self._thread.join(timeout)
        return not self._outbox.tasks()

    def deliver(self) -> None:
        """Bring everything to the store now.

        Raises:
            StorageError: the store cannot be reached, or does not take something; that stays.
        """
        refused: StorageError | None = None
        for task in self._outbox.tasks():
            if self._stop.is_set():
                return
            try:
                outcome = self._outbox.read(task)
            except IntegrityError as exc:
                _log.error("the outcome of task %s is set aside: %s", task, one_line(exc))
                self._outbox.set_aside(task)
                continue
            except StorageError as exc:
                refused = exc  # a disk that fails there may not fail elsewhere
                continue
            try:
                self._deliver(outcome)
            except TransferError:
                raise
            except StorageError as exc:
                refused = exc  # what comes after it may be taken
                continue
            self._outbox.discard(task)
        if refused is not None:
            raise refused

    def _deliver(self, outcome: Outcome) -> None:
        entry = outcome.entry
        if outcome.model_id is not None:
            self._models.upload(self._outbox.model(entry.id), outcome.model_id)
        # The claim comes first: a request without one is somebody's to do.
        if outcome.claim is not None:
            self._store.create(entry.claimed(1), outcome.claim.dumps())
        if outcome.request is not None:
            self._store.create(entry.request, outcome.request.dumps())
        if not self._store.create(entry.result, outcome.result.dumps()):
            _log.warning("task %s has another result already; this one is dropped", entry.id)

    def _run(self) -> None:
        wait = 0.0
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self.deliver()
                if self._is_away:
                    # Whoever was not listened to may have come after the list was made.
                    self._is_away = False
                    self._wake.set()
                if not self._wake.is_set():
                    self._idle.set()
                wait = 0.0
            except StorageError as exc:
                self._is_away = isinstance(exc, TransferError)
                self._idle.set()
                wait = min(max(_SHORTEST_WAIT, 2 * wait), _LONGEST_WAIT)
                _log.warning("results stay here for %.0f s more: %s", wait, one_line(exc))
            except Exception:  # noqa: BLE001 -- a thread that ends does nothing any more
                self._idle.set()
                wait = _LONGEST_WAIT
                _log.exception("results stay here")
            self._wake.wait(wait or None)
