"""What happens in transfers, told to ``logging`` and, where a program uses it, OpenTelemetry.

Every event is a record of the logger ``storage.events``: a sentence for people, and fields for
programs, which are attributes of the record and begin with ``storage_``. ``docs/events.md``
lists them. Nothing is printed in a program that never set logging up, and nothing is imported
for events: whoever wants them has imported ``logging`` or ``opentelemetry`` already.

No event holds a credential: URIs are without queries and user information, reasons are the
redacted messages of our own errors.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from storage.errors import IntegrityError, TransientError, conceal_causes, one_line, redact

if TYPE_CHECKING:
    from logging import Logger

    from storage.transfer.progress import Meter

__all__ = [
    "LOGGER",
    "PREFIX",
    "Transfer",
    "attempt_failed",
    "gave_up",
    "resumed",
    "transfer",
    "verification_failed",
    "watch",
]

LOGGER = "storage.events"
"""The logger of all events."""

PREFIX = "storage_"
"""What the names of all fields begin with."""

_DEBUG, _INFO, _WARNING = 10, 20, 30

_ids = itertools.count(1)
_current: ContextVar[Transfer | None] = ContextVar("storage_transfer", default=None)


class Transfer:
    """One download, upload or copy under way."""

    def __init__(self, operation: str, uri: str) -> None:
        """Begin; the clock starts now.

        Args:
            operation: ``download``, ``upload`` or ``copy``.
            uri: what is transferred; credentials in it are left out.
        """
        self.operation = operation
        self.uri = redact(uri)
        self.retries = 0
        self.meters: list[Meter] = []
        self._name = f"{os.getpid()}-{next(_ids)}"
        self._began = time.monotonic()

    @property
    def scheme(self) -> str:
        """The scheme of the URI; that of a plain path is ``file``."""
        scheme, separator, _ = self.uri.partition("://")
        return scheme if separator else "file"

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    @property
    def moved(self) -> int:
        """Bytes of objects that were moved so far; what has to move again does not count."""
        return sum(meter.moved() - meter.present for meter in self.meters)

    def fields(self) -> dict[str, Any]:
        """Return what every event of this transfer says."""
        return {"transfer": self._name, "operation": self.operation, "uri": self.uri}

    def totals(self) -> dict[str, Any]:
        """Return what the last event of this transfer says."""
        last = self.meters[-1] if self.meters else None
        return {
            "objects": 0 if last is None else last.objects,
            "bytes": self.moved,
            "bytes_present": 0 if last is None else last.present,
            "seconds": round(self.seconds, 6),
            "retries": self.retries,
        }


def watch(meter: Meter) -> None:
    """Let the transfer that this thread works for count by ``meter``."""
    found = _current.get()
    if found is not None:
        found.meters.append(meter)


@contextmanager
def transfer(operation: str, uri: str) -> Iterator[Transfer]:
    """Tell of a transfer's beginning and its end, whatever that is.

    Args:
        operation: ``download``, ``upload`` or ``copy``.
        uri: what is transferred; credentials in it are left out.
    """
    began = Transfer(operation, uri)
    token = _current.set(began)
    telemetry = _telemetry()
    span = None if telemetry is None else telemetry.begin(began)
    _emit(
        _DEBUG,
        "transfer.begun",
        "%(storage_operation)s of %(storage_uri)s begins",
        **began.fields(),
    )
    error: BaseException | None = None
    try:
        yield began
    except BaseException as exc:
        error = exc
        conceal_causes(exc)
        raise
    finally:
        _tell_end(began, error)
        _current.reset(token)
        if telemetry is not None:
            telemetry.end(began, span, error)


def _tell_end(ended: Transfer, error: BaseException | None) -> None:
    fields = {**ended.fields(), **ended.totals()}
    if error is None:
        _emit(
            _INFO,
            "transfer.finished",
            "%(storage_operation)s of %(storage_uri)s finished: %(storage_objects)d objects, "
            "%(storage_bytes)d bytes moved, %(storage_bytes_present)d here already, "
            "%(storage_seconds).3f s",
            **fields,
        )
        return
    if isinstance(error, IntegrityError):
        verification_failed(ended.uri, error)
    _emit(
        _INFO,
        "transfer.failed",
        "%(storage_operation)s of %(storage_uri)s failed after %(storage_seconds).3f s: "
        "%(storage_error)s: %(storage_reason)s",
        **fields,
        **_reason(error),
    )


def attempt_failed(where: str, attempt: int, error: TransientError, delay: float) -> None:
    """Tell that a try failed and that there will be another one.

    Args:
        where: what was tried (a URI); that of the transfer if empty.
        attempt: number of the try since the last progress, from 1.
        error: why it failed.
        delay: seconds until the next try.
    """
    found = _current.get()
    if found is not None:
        found.retries += 1
    fields = _attempt(found, where, attempt, error) | {"delay": round(delay, 3)}
    _emit(
        _INFO,
        "attempt.stalled" if error.stalled else "attempt.failed",
        "%(storage_uri)s: try %(storage_attempt)d failed (%(storage_error)s: %(storage_reason)s); "
        "next in %(storage_delay).1f s",
        **fields,
    )
    _note("retry", fields)
    telemetry = _telemetry()
    if telemetry is not None:
        telemetry.count_retry(found)


def gave_up(where: str, attempt: int, error: TransientError, limit: str) -> None:
    """Tell that a try failed and that there will be no other one.

    Args:
        where: what was tried (a URI); that of the transfer if empty.
        attempt: number of the try since the last progress, from 1.
        error: why it failed.
        limit: what forbids another try; empty if all are spent.
    """
    fields = _attempt(_current.get(), where, attempt, error)
    fields["limit"] = limit or "attempts"
    _emit(
        _INFO,
        "attempt.gave_up",
        "%(storage_uri)s: given up after try %(storage_attempt)d, limit: %(storage_limit)s "
        "(%(storage_error)s: %(storage_reason)s)",
        **fields,
    )
    _note("gave_up", fields)


def resumed(where: str, present: int, total: int | None) -> None:
    """Tell that a transfer goes on where an earlier one stopped.

    Args:
        where: the object's URI.
        present: bytes of it that are here already.
        total: bytes of it in all, if known.
    """
    found = _current.get()
    fields = {**({} if found is None else found.fields()), "uri": redact(where)}
    fields |= {"bytes_present": present, "bytes_total": total}
    _emit(
        _INFO,
        "transfer.resumed",
        "%(storage_uri)s: resumed, %(storage_bytes_present)d of %(storage_bytes_total)s bytes "
        "are here already",
        **fields,
    )
    _note("resumed", fields)


def verification_failed(where: str, error: IntegrityError) -> None:
    """Tell that bytes were not the expected ones.

    A transfer that fails by an ``IntegrityError`` tells this by itself.

    Args:
        where: the object's URI.
        error: what was expected and found.
    """
    found = _current.get()
    fields = {**({} if found is None else found.fields()), "uri": redact(where), **_reason(error)}
    _emit(
        _WARNING,
        "verification.failed",
        "%(storage_uri)s: wrong bytes (%(storage_reason)s)",
        **fields,
    )
    _note("verification_failed", fields)


def _attempt(
    found: Transfer | None, where: str, attempt: int, error: TransientError
) -> dict[str, Any]:
    fields = {"uri": ""} if found is None else {**found.fields(), "bytes": found.moved}
    if where:
        fields["uri"] = redact(where)
    return fields | {"attempt": attempt, **_reason(error)}


def _reason(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "reason": one_line(error)}


def _emit(level: int, event: str, message: str, **fields: Any) -> None:
    logger = _logger()
    if logger is None or not logger.isEnabledFor(level):
        return
    named = {f"{PREFIX}{name}": value for name, value in {"event": event, **fields}.items()}
    logger.log(level, message, named, extra=named)


def _logger() -> Logger | None:
    """Return the logger of events; none in a program that has not even imported logging."""
    logging = sys.modules.get("logging")
    if logging is None:
        return None
    top = logging.getLogger("storage")
    if not top.handlers:
        # Else Python prints warnings to stderr in programs that never set logging up.
        top.addHandler(logging.NullHandler())
    found: Logger = logging.getLogger(LOGGER)
    return found


def _note(name: str, fields: dict[str, Any]) -> None:
    telemetry = _telemetry()
    if telemetry is not None:
        telemetry.note(name, fields)


def _telemetry() -> Any:
    """Return the module that talks to OpenTelemetry; none if the program does not use that."""
    if "opentelemetry.trace" not in sys.modules and "opentelemetry.metrics" not in sys.modules:
        return None
    try:
        from storage.transfer import telemetry
    except ImportError:  # a release of it without metrics
        return None
    return telemetry
