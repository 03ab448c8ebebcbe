"""Where a fleet keeps what: the names of its objects, relative to its URI.

::

    fleet.json                                   what this is, and in which format
    models/<model id>.scm                        models, and the updates that clients trained
    reports/…                                    metrics, attributes, telemetry and status records
    clients/<client>/<process>.json              last sign of life of a process of a client
    tasks/to/<client>/<task>/request.json        what one client is to do
    tasks/any/<task>/request.json                what any one client is to do
    …/<task>/claims/<number>.json                who does it; the highest number is in force
    …/<task>/abort.json                          that it is to be stopped
    …/<task>/result.json                         how it ended

Only a sign of life is ever written over. All other objects are created once, and only if they are
absent: that decides who does a task, and which result counts. Below ``reports/`` are the names
of :mod:`storage.integrations.scaleout.reports`.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from storage.errors import InvalidInput, one_line

__all__ = [
    "CLIENTS",
    "MARKER",
    "MODELS",
    "REPORTS",
    "TASKS",
    "TaskEntry",
    "check_client",
    "check_model",
    "check_task",
    "client_of",
    "clients_folder",
    "entries",
    "is_name",
    "model_key",
    "new_task_id",
    "sign_of_life",
    "task_folder",
]

MARKER = "fleet.json"
MODELS = "models/"
_MODEL_SUFFIX = ".scm"
REPORTS = "reports/"
CLIENTS = "clients/"
TASKS = "tasks/"

_ONE = f"{TASKS}to/"
_ANY = f"{TASKS}any/"
_REQUEST, _ABORT, _RESULT = "request.json", "abort.json", "result.json"
_CLAIM = re.compile(r"claims/((?!0000)[0-9]{4}|[1-9][0-9]{4})\.json")

# Every store keeps such names as they are: Azure drops dots at the end, and a dot at the beginning
# hides a file.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9_-])?")
_TASK = re.compile(r"[0-9]{8}T[0-9]{12}Z-[0-9a-f]{12}")


def check_client(client_id: object) -> str:
    """Return the id of a client, which is a part of names.

    Raises:
        InvalidInput: it cannot be one.
    """
    return _check(client_id, "client")


def check_model(model_id: object) -> str:
    """Return the id of a model, which is a part of names.

    Raises:
        InvalidInput: it cannot be one.
    """
    return _check(model_id, "model")


def check_task(task_id: object) -> str:
    """Return the id of a task, which is a part of names.

    Raises:
        InvalidInput: no task can have it.
    """
    if not isinstance(task_id, str) or not _TASK.fullmatch(task_id):
        raise InvalidInput(
            f"{one_line(repr(task_id), 80)} cannot be the id of a task; expected one that submit() "
            "returned"
        )
    return task_id


def is_name(text: str) -> bool:
    """Tell whether a text can be a part of a name that every store keeps as it is."""
    return _NAME.fullmatch(text) is not None


def _check(name: object, what: str) -> str:
    if not isinstance(name, str) or not is_name(name):
        raise InvalidInput(
            f"{one_line(repr(name), 80)} cannot be the id of a {what}: expected 1 to 200 of the "
            "letters A-Z and a-z, digits, '.', '_' and '-', without '.' or '-' at the beginning "
            "and '.' at the end"
        )
    return name


def model_key(model_id: str) -> str:
    """Return the name of a model.

    Raises:
        InvalidInput: that cannot be the id of one.
    """
    return f"{MODELS}{check_model(model_id)}{_MODEL_SUFFIX}"


# -- clients ---------------------------------------------------------------------------------


def clients_folder(client_id: str) -> str:
    """Return what the names of all signs of life of a client begin with."""
    return f"{CLIENTS}{client_id}/"


def sign_of_life(client_id: str, process: str) -> str:
    """Return the name of the sign of life of a process of a client."""
    return f"{clients_folder(client_id)}{process}.json"


def client_of(name: str) -> tuple[str, str] | None:
    """Return the client and the process whose sign of life has this name, if it is one."""
    parts = name.removeprefix(CLIENTS).split("/")
    if not name.startswith(CLIENTS) or len(parts) != 2 or not parts[1].endswith(".json"):
        return None
    return parts[0], parts[1].removesuffix(".json")


# -- tasks -----------------------------------------------------------------------------------


def new_task_id() -> str:
    """Return an id that no other task has; those that are made later sort after it."""
    now = datetime.fromtimestamp(time.time(), UTC)
    return f"{now:%Y%m%dT%H%M%S%f}Z-{uuid.uuid4().hex[:12]}"


def task_folder(client_id: str | None) -> str:
    """Return what the names of all tasks for a client begin with; ``None`` for any client."""
    return _ANY if client_id is None else f"{_ONE}{client_id}/"


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """What a listing tells of a task."""

    id: str

    client: str | None
    """Whom it is for; ``None`` for any client."""

    is_requested: bool = False
    """Whether the request is there: else the task is being removed."""

    claim: int = 0
    """The number of the claim in force; 0 if nobody has begun."""

    is_aborted: bool = False
    """Whether it is to be stopped."""

    has_ended: bool = False
    """Whether there is a result."""

    @property
    def _folder(self) -> str:
        return f"{task_folder(self.client)}{self.id}/"

    @property
    def request(self) -> str:
        """The name of the request."""
        return f"{self._folder}{_REQUEST}"

    @property
    def abort(self) -> str:
        """The name of the object that stops it."""
        return f"{self._folder}{_ABORT}"

    @property
    def result(self) -> str:
        """The name of the result."""
        return f"{self._folder}{_RESULT}"

    def claimed(self, number: int) -> str:
        """Return the name of a claim."""
        return f"{self._folder}claims/{number:04}.json"


def entries(names: Iterable[str]) -> list[TaskEntry]:
    """Return the tasks that a listing of names below :data:`TASKS` tells of, the oldest first.

    What is no part of a task is passed over.
    """
    found: dict[tuple[str | None, str], list[str]] = {}
    for name in names:
        if (place := _place_of(name)) is not None:
            client, task, part = place
            found.setdefault((client, task), []).append(part)
    listed = [_entry(client, task, parts) for (client, task), parts in found.items()]
    return sorted(listed, key=lambda entry: entry.id)


def _place_of(name: str) -> tuple[str | None, str, str] | None:
    client: str | None = None
    if name.startswith(_ANY):
        rest = name.removeprefix(_ANY)
    elif name.startswith(_ONE):
        client, _, rest = name.removeprefix(_ONE).partition("/")
        if not is_name(client):
            return None
    else:
        return None
    task, _, part = rest.partition("/")
    return (client, task, part) if part and _TASK.fullmatch(task) else None


def _entry(client: str | None, task: str, parts: list[str]) -> TaskEntry:
    claims = [int(match[1]) for part in parts if (match := _CLAIM.fullmatch(part))]
    return TaskEntry(
        task,
        client,
        is_requested=_REQUEST in parts,
        claim=max(claims, default=0),
        is_aborted=_ABORT in parts,
        has_ended=_RESULT in parts,
    )
