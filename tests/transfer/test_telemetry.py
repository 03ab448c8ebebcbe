"""Transfers as OpenTelemetry sees them, by its own SDK."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from storage.backends.memory import MemoryBackend
from storage.errors import ModelMissingError, TransferError, TransientError
from storage.transfer import telemetry
from tests.transfer.support import KIB, memory_bucket
from tests.transfer.test_events import Breaking, Client

DATA = os.urandom(300 * KIB)


class Seen:
    """What was exported."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracing = TracerProvider(shutdown_on_exit=False)
        self.tracing.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.measuring = MeterProvider([self.reader], shutdown_on_exit=False)

    @property
    def spans(self) -> list[ReadableSpan]:
        """In the order in which they ended."""
        return list(self.exporter.get_finished_spans())

    def points(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """Return the points of a metric by their attributes."""
        data = self.reader.get_metrics_data()
        return {
            tuple(sorted((point.attributes or {}).items())): point
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }

    def unit(self, name: str) -> str | None:
        data = self.reader.get_metrics_data()
        assert data is not None
        scopes = [scope for one in data.resource_metrics for scope in one.scope_metrics]
        return next(one.unit for scope in scopes for one in scope.metrics if one.name == name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Providers for this test only; a program sets them once for good."""
    found = Seen()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: found.tracing)
    monkeypatch.setattr(trace, "get_tracer", found.tracing.get_tracer)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: found.measuring)
    monkeypatch.setattr(metrics, "get_meter", found.measuring.get_meter)
    monkeypatch.setattr(telemetry, "_instruments", None)
    yield found
    found.tracing.shutdown()
    found.measuring.shutdown()


@pytest.fixture
def bucket() -> Iterator[MemoryBackend]:
    with memory_bucket({"model/a": DATA, "model/b": b"", "one": DATA}) as backend:
        yield backend


IO = (("storage.operation", "download"), ("storage.scheme", "memory"))


def test_a_download_is_a_span(bucket: MemoryBackend, seen: Seen, tmp_path: Path) -> None:
    Client(bucket).download("memory://b/model/", tmp_path / "m")
    [span] = seen.spans
    assert span.name == "storage.download"
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "modelstorage"
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "storage.operation": "download",
        "storage.uri": "memory://b/model/",
        "storage.objects": 2,
        "storage.bytes": len(DATA),
        "storage.bytes_present": 0,
        "storage.retries": 0,
    }
    assert list(span.events) == []


def test_a_retry_is_an_event_of_the_span(bucket: MemoryBackend, seen: Seen, tmp_path: Path) -> None:
    # The reads are in threads of their own.
    broken = Breaking(bucket, TransientError("reset"), TransientError("stalled", stalled=True))
    Client(broken, connections=4).download("memory://b/model/", tmp_path / "m")
    [span] = seen.spans
    assert [event.name for event in span.events] == ["storage.retry"] * 2
    # Which of two threads tells of its own first is chance.
    [reset] = [one for one in span.events if (one.attributes or {})["storage.reason"] == "reset"]
    assert (
        dict(reset.attributes or {}).items()
        >= {
            "storage.operation": "download",
            "storage.error": "TransientError",
            "storage.reason": "reset",
            "storage.attempt": 1,
        }.items()
    )
    assert "storage.delay" in (reset.attributes or {})
    assert (span.attributes or {})["storage.retries"] == 2
    [retries] = seen.points("storage.transfer.retries").items()
    assert retries[0] == IO
    assert retries[1].value == 2


def test_a_failed_transfer_has_an_error_for_its_status(
    bucket: MemoryBackend, seen: Seen, tmp_path: Path
) -> None:
    with pytest.raises(TransferError) as caught:
        Client(Breaking(bucket, *[TransientError("reset")] * 99)).download(
            "memory://b/one", tmp_path / "m"
        )
    [span] = seen.spans
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == str(caught.value)
    assert (span.attributes or {})["error.type"] == "TransferError"
    # No stack trace: causes are exceptions of others.
    assert {event.name for event in span.events} <= {"storage.retry", "storage.gave_up"}


def test_transfers_within_a_span_of_the_program_are_its_children(
    bucket: MemoryBackend, seen: Seen, tmp_path: Path
) -> None:
    client = Client(bucket)
    (tmp_path / "x").write_bytes(b"12345")
    with trace.get_tracer("program").start_as_current_span("mine") as mine:
        client.download_many(["memory://b/one", "memory://b/model/"], [tmp_path / "1", None])
        client.upload(tmp_path / "x", "memory://b/x")
        client.copy_object("memory://b/x", "memory://b/y")
        assert trace.get_current_span() is mine
    *transfers, _ = seen.spans
    assert sorted(span.name for span in transfers) == [
        "storage.copy",
        "storage.download",
        "storage.download",
        "storage.upload",
    ]
    assert {span.parent.span_id for span in transfers if span.parent is not None} == {
        mine.get_span_context().span_id
    }


def test_a_retry_outside_of_a_transfer_is_told_to_the_span_of_the_program(
    bucket: MemoryBackend, seen: Seen
) -> None:
    client = Client(Breaking(bucket, TransientError("reset")))
    with (
        trace.get_tracer("program").start_as_current_span("mine"),
        client.open("memory://b/one") as file,
    ):
        file.read()
    [mine] = seen.spans
    assert [event.name for event in mine.events] == ["storage.retry"]
    assert [one.value for one in seen.points("storage.transfer.retries").values()] == [1]


def test_metrics_add_up(bucket: MemoryBackend, seen: Seen, tmp_path: Path) -> None:
    client = Client(bucket)
    client.download("memory://b/one", tmp_path / "1")
    client.download("memory://b/one", tmp_path / "2")
    with pytest.raises(ModelMissingError):
        client.download("memory://b/nothing", tmp_path / "3")
    assert {key: one.value for key, one in seen.points("storage.transfer.io").items()} == {
        IO: 2 * len(DATA)
    }
    durations = seen.points("storage.transfer.duration")
    assert {key: one.count for key, one in durations.items()} == {
        IO: 2,
        (("error.type", "ModelMissingError"), *IO): 1,
    }
    assert seen.unit("storage.transfer.io") == "By"
    assert seen.unit("storage.transfer.duration") == "s"
