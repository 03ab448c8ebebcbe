"""What is written down of tasks and clients: JSON with a checksum, as a registry writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from storage.errors import IntegrityError, InvalidInput, one_line
from storage.integrations.scaleout import layout
from storage.registry.documents import decode, encode, now, read_fields, read_time, write_time

__all__ = [
    "AUTONOMOUS",
    "COMPLETED",
    "CUSTOM",
    "FAILED",
    "INTERRUPTED",
    "KINDS",
    "Claim",
    "Request",
    "Result",
    "SignOfLife",
]

KINDS: Mapping[str, str] = {
    "train": "Scaleout_ModelUpdate",
    "validate": "Scaleout_Validation",
    "stage": "Scaleout_StageModel",
    "infer": "Scaleout_Inference",
}
"""The kinds of tasks that every client knows, and what ``scaleoututil`` calls their types."""

CUSTOM = "Custom_"
"""What the type of a task begins with for which the client has a callback of its own."""

AUTONOMOUS = "Autonomous_"
"""What the type of a task begins with that a client began by itself."""

COMPLETED, FAILED, INTERRUPTED = "COMPLETED", "FAILED", "INTERRUPTED"

_TEXT = (str, type(None))


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be done: the fields of a ``TaskRequest`` message."""

    type: str
    """As ``scaleoututil`` calls it; see :data:`KINDS`."""

    model_id: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """``client_settings`` of a training, ``parameters`` of everything else."""

    session_id: str = ""
    round_id: str = ""

    submitted: datetime = field(default_factory=now)
    """By the clock of who submitted it."""

    @classmethod
    def of(
        cls,
        kind: str,
        model_id: str | None,
        params: Mapping[str, Any] | None,
        *,
        name: str | None = None,
        session_id: str = "",
        round_id: str = "",
    ) -> Self:
        """Make the request of a kind of task.

        Args:
            kind: out of :data:`KINDS`, or ``custom``.
            model_id: needed by every kind but ``custom``.
            params: what the callback is given.
            name: of the callback of a ``custom`` task, as it was registered.
            session_id: what it is a part of.
            round_id: what it is a part of.

        Raises:
            InvalidInput: there is no such kind, or something is missing.
        """
        if (name is not None) != (kind == "custom") or name == "":
            raise InvalidInput(
                f"a task of kind {kind!r} was given the name {name!r}; a custom task needs the "
                "name of its callback, and no other has one"
            )
        if kind not in KINDS and kind != "custom":
            raise InvalidInput(
                f"there is no kind of task {kind!r}; expected {', '.join(KINDS)} or custom"
            )
        if kind in KINDS and not model_id:
            raise InvalidInput(f"a task of kind {kind!r} needs the id of a model")
        if name is None:
            what = KINDS[kind]
        else:
            what = name if name.startswith(CUSTOM) else f"{CUSTOM}{name}"
        place = "client_settings" if kind == "train" else "parameters"
        return cls(what, model_id or "", {place: dict(params or {})}, session_id, round_id)

    def dumps(self) -> bytes:
        """Return the text of its document.

        Raises:
            InvalidInput: its data are no JSON.
        """
        return encode(
            {
                "type": self.type,
                "model_id": self.model_id,
                "data": dict(self.data),
                "session_id": self.session_id,
                "round_id": self.round_id,
                "submitted": write_time(self.submitted),
            }
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read the text of a request at ``where``.

        Raises:
            IntegrityError: it is damaged.
            UnsupportedOperation: it is of a format that this release does not know.
        """
        names = dict.fromkeys(("type", "model_id", "session_id", "round_id", "submitted"), str)
        fields = read_fields(decode(data, where), where, data=dict, **names)
        fields["submitted"] = read_time(fields["submitted"], where)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who does a task. No two are the same, for no two processes are."""

    client: str | None
    """``None``: nobody does it, for it was stopped before it was begun."""

    process: str
    """The process, by a name that tells its owner (:mod:`storage.cache.owners`)."""

    folder: str
    """Which folder on which disk that process works in, where no two do at once."""

    def dumps(self) -> bytes:
        """Return the text of its document."""
        return encode({"client": self.client, "process": self.process, "folder": self.folder})

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read the text of a claim at ``where``; raises as :meth:`Request.parse`."""
        fields = read_fields(decode(data, where), where, client=_TEXT, process=str, folder=str)
        process = fields["process"]
        if not layout.is_name(process):
            # It becomes a part of a name, which must not lead anywhere else.
            raise IntegrityError(f"{where}: {one_line(repr(process), 80)} is no name of a process")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Result:
    """How a task ended."""

    status: str
    """:data:`COMPLETED`, :data:`FAILED` or :data:`INTERRUPTED`."""

    response: Mapping[str, Any]
    """What came of it: of a training ``model_update_id`` and ``meta``, of a validation
    ``metrics``, of an inference ``result``, of a custom task what its callback returned; ``error``
    if it failed, ``msg`` if it was stopped."""

    client: str | None
    """Who did it; ``None`` if it was stopped before anybody had begun."""

    started: datetime
    """By the clock of the client, as the next."""

    ended: datetime

    @property
    def is_completed(self) -> bool:
        """Whether it was done."""
        return self.status == COMPLETED

    @property
    def model_update_id(self) -> str | None:
        """The id of the model that a training made."""
        found = self.response.get("model_update_id")
        return found if isinstance(found, str) else None

    def dumps(self) -> bytes:
        """Return the text of its document.

        Raises:
            InvalidInput: the response is no JSON.
        """
        return encode(
            {
                "status": self.status,
                "response": dict(self.response),
                "client": self.client,
                "started": write_time(self.started),
                "ended": write_time(self.ended),
            }
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read the text of a result at ``where``; raises as :meth:`Request.parse`."""
        fields = read_fields(
            decode(data, where),
            where,
            status=str,
            response=dict,
            client=_TEXT,
            started=str,
            ended=str,
        )
        for name in ("started", "ended"):
            fields[name] = read_time(fields[name], where)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """What a process of a client says of itself every now and then."""

    name: str
    """What the client is called, for people."""

    folder: str
    """Which folder on which disk it works in, where no two do at once."""

    is_stopped: bool
    """Whether it has ended, and was able to say so."""

    running: tuple[str, ...]
    """Ids of the tasks that it does."""

    pending_records: int
    """Records in its spool that no store has yet."""

    pending_results: int
    """Results, with their models, that no store has yet."""

    def dumps(self) -> bytes:
        """Return the text of its document."""
        return encode(
            {
                "name": self.name,
                "folder": self.folder,
                "is_stopped": self.is_stopped,
                "running": list(self.running),
                "pending_records": self.pending_records,
                "pending_results": self.pending_results,
            }
        )

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read the text of a sign of life at ``where``; raises as :meth:`Request.parse`."""
        fields = read_fields(
            decode(data, where),
            where,
            name=str,
            folder=str,
            is_stopped=bool,
            running=list,
            pending_records=int,
            pending_results=int,
        )
        fields["running"] = tuple(map(str, fields["running"]))
        return cls(**fields)
