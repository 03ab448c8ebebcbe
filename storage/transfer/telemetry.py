"""Transfers as spans and metrics of OpenTelemetry.

Imported only in programs that have imported OpenTelemetry themselves. Names follow its
conventions: a namespace, units by UCUM, ``error.type`` where something failed. Nothing is
recorded by ``Span.record_exception``: that would add the traces of causes, which are
exceptions of SDKs and may say anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry import context, metrics, trace

from storage.errors import one_line

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from storage.transfer.events import Transfer

__all__ = ["begin", "count_retry", "end", "note"]

_SCOPE = "modelstorage"


class _Begun(NamedTuple):
    span: Span
    token: Any


class _Instruments(NamedTuple):
    provider: Any
    moved: Any
    retries: Any
    duration: Any


_instruments: _Instruments | None = None


def begin(transfer: Transfer) -> _Begun:
    """Begin the span of a transfer and make it the current one."""
    span = trace.get_tracer(_SCOPE).start_span(
        f"storage.{transfer.operation}",
        attributes={"storage.operation": transfer.operation, "storage.uri": transfer.uri},
    )
    return _Begun(span, context.attach(trace.set_span_in_context(span)))


def end(transfer: Transfer, begun: _Begun, error: BaseException | None) -> None:
    """End the span of a transfer, and add the transfer to the metrics."""
    attributes = _attributes(transfer)
    span = begun.span
    for name, value in transfer.totals().items():
        if name != "seconds":
            span.set_attribute(f"storage.{name}", value)
    if error is not None:
        attributes["error.type"] = type(error).__name__
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(trace.Status(trace.StatusCode.ERROR, one_line(error)))
    context.detach(begun.token)
    span.end()
    found = _find_instruments()
    found.moved.add(max(0, transfer.moved), _attributes(transfer))
    found.duration.record(transfer.seconds, attributes)


def note(name: str, fields: dict[str, Any]) -> None:
    """Add an event to the current span: the transfer's, or one of the caller's."""
    attributes = {f"storage.{key}": value for key, value in fields.items() if value is not None}
    trace.get_current_span().add_event(f"storage.{name}", attributes)


def count_retry(transfer: Transfer | None) -> None:
    """Count a retry, of a transfer or of a single request."""
    _find_instruments().retries.add(1, {} if transfer is None else _attributes(transfer))


def _attributes(transfer: Transfer) -> dict[str, str]:
    """Return what metrics are told apart by: few values, so not the URI."""
    return {"storage.operation": transfer.operation, "storage.scheme": transfer.scheme}


def _find_instruments() -> _Instruments:
    global _instruments
    provider = metrics.get_meter_provider()
    found = _instruments
    if found is None or found.provider is not provider:
        meter = metrics.get_meter(_SCOPE)
        _instruments = found = _Instruments(
            provider,
            meter.create_counter(
                "storage.transfer.io", "By", "Bytes of objects moved to or from stores."
            ),
            meter.create_counter(
                "storage.transfer.retries", "{retry}", "Tries after one that failed."
            ),
            meter.create_histogram(
                "storage.transfer.duration", "s", "Time of downloads, uploads and copies."
            ),
        )
    return found
