"""What a client says is kept as it was said, or refused."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from storage.errors import (
    IntegrityError,
    InvalidInput,
)
from storage.integrations.scaleout import records
from storage.integrations.scaleout.records import Record
from tests.integrations.scaleout_reports.support import (
    CLIENT,
)


def test_a_record_says_what_the_client_said_and_when() -> None:
    before = datetime.now(UTC)
    said = records.metric({"loss": 0.5}, model_id="m", step=7, round_id="2", session_id="s")
    document = {"number": 3, **said.document()}
    found = Record.parse(document, CLIENT, "f00d", "here")
    assert found == Record(CLIENT, "f00d", 3, said)
    assert found.id == "f00d-3"
    assert abs((found.report.time - before).total_seconds()) < 5
    assert found.report.kind == "metric"
    assert found.report.step == 7
    assert found.report.payload == {"loss": 0.5}


def test_what_a_later_release_adds_to_a_record_is_left_alone() -> None:
    document = {"number": 1, **records.report("dance", {"a": [1]}).document(), "hue": "blue"}
    assert Record.parse(document, CLIENT, "f00d", "here").report.kind == "dance"


@pytest.mark.parametrize("change", [{"number": 0}, {"time": "now"}, {"payload": 1}, {"step": "1"}])
def test_a_record_that_makes_no_sense_is_damaged(change: dict[str, object]) -> None:
    document: dict[str, Any] = {"number": 1, **records.report("dance", {}).document(), **change}
    with pytest.raises(IntegrityError, match="here"):
        Record.parse(document, CLIENT, "f00d", "here")


def test_numbers_that_are_not_finite_are_kept() -> None:
    said = records.metric({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1})
    assert said.payload == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    values = [records.numeric(value) for value in said.payload.values()]
    assert math.isnan(values[0] or 0)
    assert values[1:] == [math.inf, -math.inf, 1.0]
    assert records.numeric("a text") is None
    assert records.numeric(True) is None


def test_scalars_and_arrays_of_numpy_become_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    payload: Any = {"a": numpy.float32(0.5), "b": numpy.arange(3), 4: (1, None)}
    said = records.telemetry("t", payload)
    assert said.payload == {"a": 0.5, "b": [0, 1, 2], "4": [1, None]}
    assert records.metric({"a": numpy.int64(3)}).payload == {"a": 3.0}


def test_an_attribute_that_is_no_dict_becomes_one() -> None:
    assert records.attribute("os", "linux").payload == {"value": "linux"}
    assert records.attribute("os", {"name": "linux"}).payload == {"name": "linux"}


_LOOP: dict[str, Any] = {}
_LOOP["self"] = _LOOP


@pytest.mark.parametrize(
    "payload",
    [{"a": object()}, {"a": b"bytes"}, {"a": {1, 2}}, {("a",): 1}, {"a": "\ud800"}, _LOOP, [1]],
    ids=["object", "bytes", "set", "name", "surrogate", "loop", "list"],
)
def test_what_json_cannot_say_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidInput):
        records.report("dance", payload)


@pytest.mark.parametrize("metrics", [{"a": "high"}, {"a": None}, {"a": [1]}, [1]])
def test_a_metric_that_is_no_number_is_refused(metrics: Any) -> None:
    with pytest.raises(InvalidInput, match="numbers under names"):
        records.metric(metrics)


def test_a_report_does_not_change_with_what_it_was_made_of() -> None:
    payload = {"a": [1]}
    said = records.report("dance", payload)
    payload["a"].append(2)
    assert said.payload == {"a": [1]}
