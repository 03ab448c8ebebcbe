"""What an edge client reports: metrics, attributes, telemetry and the rest, as frozen values.

The fields are those of the messages of Scaleout Edge 1.1 (``ModelMetric``, ``AttributeRecord``,
``TelemetryRecord``, ``InferenceResult``, ``Status``). A *report* is what was said and when; a
*record* is a report that a spool has taken: it has a number, and with that an identity that no
other record has.

As JSON a record is an object with ``number``, ``kind``, ``time`` and ``payload``, and those of the
other fields that are known. Numbers that are not finite are the texts ``NaN``, ``Infinity`` and
``-Infinity``, as in protobuf's JSON.
"""

from __future__ import annotations

import math
import numbers
import time as clocks
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from storage.errors import IntegrityError, InvalidInput, one_line
from storage.registry import documents

__all__ = [
    "ATTRIBUTE",
    "INFERENCE",
    "METRIC",
    "STATUS",
    "TELEMETRY",
    "Record",
    "Report",
    "attribute",
    "inference",
    "metric",
    "numeric",
    "plain",
    "report",
    "status",
    "telemetry",
]

METRIC = "metric"
ATTRIBUTE = "attribute"
TELEMETRY = "telemetry"
INFERENCE = "inference"
STATUS = "status"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TEXTS = ("key", "model_id", "round_id", "session_id", "task_id", "priority")
_OPTIONAL = (*_TEXTS, "step")


@dataclass(frozen=True, slots=True)
class Report:
    """Something that a client says."""

    kind: str
    """What it is: ``metric``, ``attribute``, ``telemetry``, ``inference``, ``status``, or
    anything else that its reader knows."""

    payload: Mapping[str, Any]
    """What is said, as JSON can say it."""

    time: datetime
    """When, by the clock of the machine, in UTC, in whole milliseconds."""

    monotonic: float
    """The same in seconds by a clock that nobody sets and that each boot begins anew."""

    key: str | None = None
    """What an attribute, an observation or a result is called."""

    model_id: str | None = None
    round_id: str | None = None
    session_id: str | None = None
    task_id: str | None = None
    step: int | None = None
    """Of the training, as the client counts it."""

    priority: str | None = None
    """The priority class that the caller asked for."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON's values, without what is unknown."""
        found = {
            "kind": self.kind,
            "payload": self.payload,
            "time": documents.write_time(self.time),
            "monotonic": self.monotonic,
        }
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found


@dataclass(frozen=True, slots=True)
class Record:
    """A report that a spool has taken."""

    client: str
    """The id of the client."""

    stream: str
    """One run of numbers: a spool begins another when its machine boots."""

    number: int
    """Counts the records of a spool; those of one stream never share one."""

    report: Report

    @property
    def id(self) -> str:
        """What no other record has."""
        return f"{self.stream}-{self.number}"

    @classmethod
    def parse(cls, document: Any, client: str, stream: str, where: str) -> Self:
        """Read a record; fields that this release does not know are left alone.

        Args:
            document: as JSON gave it.
            client: whose it is.
            stream: what its number counts in.
            where: it was found, for messages.

        Raises:
            IntegrityError: it is not one.
        """
        fields = documents.read_fields(
            document,
            where,
            number=int,
            kind=str,
            time=str,
            monotonic=(int, float),
            payload=dict,
        )
        known: dict[str, type] = {**dict.fromkeys(_TEXTS, str), "step": int}
        known = {name: kind for name, kind in known.items() if name in document}
        others = documents.read_fields(document, where, **known)
        if fields["number"] < 1:
            raise IntegrityError(f"{where} is damaged: {fields['number']} is no record's number")
        number = fields.pop("number")
        fields["time"] = documents.read_time(fields["time"], where)
        return cls(client, stream, number, Report(**fields, **others))


def report(
    kind: str,
    payload: Mapping[str, Any],
    *,
    key: str | None = None,
    model_id: str | None = None,
    round_id: str | None = None,
    session_id: str | None = None,
    task_id: str | None = None,
    step: int | None = None,
    priority: str | None = None,
) -> Report:
    """Return a report of now.

    Args:
        kind: see :class:`Report`, as all others.
        payload: is copied. Scalars and arrays of NumPy and PyTorch become plain numbers.
        key: name.
        model_id: of the model that it is about, as are the round and the session.
        round_id: of the federated round.
        session_id: of the federated session.
        task_id: of the task that the client works on.
        step: of the training.
        priority: class of the message.

    Raises:
        InvalidInput: something in it is nothing that JSON knows.
    """
    copy = plain(payload, kind)
    if not isinstance(copy, dict):
        raise InvalidInput(f"a {kind} has a dict as its payload, not a {type(payload).__name__}")
    texts = (key, model_id, round_id, session_id, task_id, priority)
    names = (None if text is None else _text(str(text), kind) for text in texts)
    if step is not None:
        step = _step(step, kind)
    return Report(
        _text(str(kind), "kind"),
        copy,
        documents.now(),
        round(clocks.monotonic(), 3),
        **dict(zip(_TEXTS, names, strict=True)),
        step=step,
    )


def metric(
    metrics: Mapping[str, Any],
    *,
    model_id: str | None = None,
    step: int | None = None,
    round_id: str | None = None,
    session_id: str | None = None,
    task_id: str | None = None,
) -> Report:
    """Return the metrics of a model at a step of its training; see :func:`report`.

    Raises:
        InvalidInput: a value is no number.
    """
    try:
        values = {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as exc:
        raise InvalidInput(f"metrics are numbers under names: {one_line(exc)}") from exc
    return report(
        METRIC,
        values,
        model_id=model_id,
        step=step,
        round_id=round_id,
        session_id=session_id,
        task_id=task_id,
    )


def attribute(
    key: str, value: Any, *, priority: str | None = None, task_id: str | None = None
) -> Report:
    """Return one attribute of the client. What is no dict becomes ``{"value": value}``."""
    payload = value if isinstance(value, Mapping) else {"value": value}
    return report(ATTRIBUTE, payload, key=key, priority=priority, task_id=task_id)


def telemetry(
    key: str,
    payload: Mapping[str, Any] | None = None,
    *,
    priority: str | None = None,
    task_id: str | None = None,
) -> Report:
    """Return one observation."""
    return report(TELEMETRY, payload or {}, key=key, priority=priority, task_id=task_id)


def inference(
    key: str,
    payload: Mapping[str, Any],
    *,
    inference_id: str | None,
    model_id: str | None = None,
    priority: str | None = None,
) -> Report:
    """Return one result of an inference. Its id is that of the task which asked for it."""
    return report(
        INFERENCE, payload, key=key, model_id=model_id, task_id=inference_id, priority=priority
    )


def status(
    text: object, *, level: str = "INFO", type: str | None = None, task_id: str | None = None
) -> Report:
    """Return a message about what the client is doing.

    Args:
        text: of the message.
        level: of its log.
        type: of the message, if it has one.
        task_id: of the task that it is about.
    """
    payload = {"status": str(text), "level": level, **({"type": type} if type else {})}
    return report(STATUS, payload, task_id=task_id)


def numeric(value: object) -> float | None:
    """Return a number of a payload as one, finite or not; ``None`` if it is none."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def plain(value: Any, what: str) -> Any:
    """Return a copy of ``value`` of which nothing but JSON's values is part.

    Args:
        value: what was said; scalars and arrays of numpy are the numbers that they hold.
        what: what it is called in a message.

    Raises:
        InvalidInput: something in it is nothing that JSON knows.
    """
    try:
        return _copy(value, what)
    except RecursionError as exc:
        raise InvalidInput(f"a {what} holds itself, or is nested too deep") from exc


def _copy(value: Any, what: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, what)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _finite(float(value))
    if isinstance(value, Mapping):
        return {_name(name, what): _copy(each, what) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(each, what) for each in value]
    tolist = getattr(value, "tolist", None)
    if callable(tolist) and not isinstance(value, (bytes, bytearray, memoryview, type)):
        return _copy(tolist(), what)
    raise InvalidInput(
        f"a {what} holds a {type(value).__name__}; it can hold text, numbers, booleans, None, "
        "and lists and dicts of them"
    )


def _finite(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _name(name: object, what: str) -> str:
    if isinstance(name, (str, int, float)):
        return _text(str(name), what)
    raise InvalidInput(f"a {what} has a {type(name).__name__} as a name; names are texts")


def _text(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"a {what} holds {text!r}, which is no text of Unicode") from exc
    return str(text)


def _step(step: object, what: str) -> int:
    try:
        return int(step)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError, OverflowError) as exc:
        raise InvalidInput(f"the step of a {what} is a number, not {one_line(step, 40)}") from exc
