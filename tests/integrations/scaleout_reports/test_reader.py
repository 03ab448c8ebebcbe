"""Who reads reports gets each once, in order, and is told what is wrong."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.errors import (
    IntegrityError,
    StorageError,
)
from storage.integrations.scaleout import batches, records
from storage.integrations.scaleout.reports import Reports
from storage.registry import documents


def put(store: Path, client: str, stream: str, *numbers: int, **other: Any) -> Path:
    """Store a batch as some client would."""
    said = [
        {"number": number, **records.report("dance", {"value": number}).document(), **other}
        for number in numbers
    ]
    data = documents.encode({"client": client, "stream": stream * 16, "records": said})
    name = f"{numbers[0]:016d}-{numbers[-1]:016d}-{stream * 16}-{'0' * 16}.json"
    path = store / batches.client_folder(client) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_records_come_by_client_and_number(store: Path) -> None:
    put(store, "b", "1", 1, 2)
    put(store, "a", "2", 11, 12)
    put(store, "a", "1", 9, 10)
    put(store, "a", "1", 1, 2, 3)
    (store / "a" / "notes.txt").write_bytes(b"not ours")
    found = [(record.client, record.number) for record in Reports(store).records()]
    assert found == [*(("a", number) for number in (1, 2, 3, 9, 10, 11, 12)), ("b", 1), ("b", 2)]
    assert Reports(store).clients() == ["a", "b"]
    assert [record.number for record in Reports(store).records("b")] == [1, 2]
    assert list(Reports(store).records("c")) == []
    assert Reports(store).check("a").missing == 5


def test_what_is_there_twice_comes_once_and_is_counted(store: Path) -> None:
    put(store, "a", "1", 1, 2, 3)
    put(store, "a", "1", 2, 3, 4)
    put(store, "a", "2", 3, 4)
    found = [record.id for record in Reports(store).records()]
    assert len(found) == len(set(found)) == 6
    assert Reports(store).check().duplicates == 2


def test_a_damaged_batch_is_an_error_or_told(store: Path) -> None:
    put(store, "a", "1", 1, 2)
    bad = put(store, "a", "1", 3, 4)
    bad.write_bytes(bad.read_bytes().replace(b'"number":3', b'"number":5'))
    put(store, "a", "1", 5)
    with pytest.raises(IntegrityError, match="damaged"):
        list(Reports(store).records())
    told: list[StorageError] = []
    found = Reports(store).records(on_damage=told.append)
    assert [record.number for record in found] == [1, 2, 5]
    assert len(told) == 1
    summary = Reports(store).check()
    assert (summary.damaged, summary.batches, summary.missing) == (1, 3, 2)


@pytest.mark.parametrize(
    "fields", [{"client": "b"}, {"stream": "x"}, {"records": [{}]}, {"records": 1}], ids=str
)
def test_a_batch_that_is_not_what_its_name_says_is_damaged(
    fields: dict[str, Any], store: Path
) -> None:
    path = put(store, "a", "1", 1)
    document = json.loads(path.read_bytes())
    del document["_blake3"]
    path.write_bytes(documents.encode({**document, **fields}))
    with pytest.raises(IntegrityError):
        list(Reports(store).records())


def test_since_leaves_out_what_is_older(store: Path) -> None:
    now = datetime.now(UTC)
    for number in range(1, 4):
        put(store, "a", "1", number, time=documents.write_time(now - timedelta(hours=3 - number)))
    found = Reports(store).records(since=now - timedelta(hours=1, minutes=1))
    assert [record.number for record in found] == [2, 3]
    with pytest.raises(ValueError, match="time zone"):
        list(Reports(store).records(since=datetime(2020, 1, 1)))  # noqa: DTZ001


def test_only_some_kinds_are_asked_for(store: Path) -> None:
    put(store, "a", "1", 1, kind="metric", payload={"loss": 1, "note": "odd", "bad": "NaN"})
    put(store, "a", "1", 2)
    assert [record.number for record in Reports(store).records(kinds={"dance"})] == [2]
    (metric,) = Reports(store).metrics()
    assert metric["metrics"].keys() == {"loss", "bad"}
