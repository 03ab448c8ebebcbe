"""What whoever may write below the URI of a fleet cannot do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.digest import new_hasher
from storage.errors import InvalidInput
from storage.integrations.scaleout import TaskHandle, layout
from storage.integrations.scaleout.documents import Claim, Request
from storage.integrations.scaleout.layout import TaskEntry
from storage.registry.documents import LONGEST, encode
from tests.integrations.scaleout.support import Fleet


def _with_half_a_character() -> bytes:
    """Return a request whose checksum is right and whose session no message can hold."""
    whole = json.loads(Request.of("custom", None, None, name="calibrate").dumps())
    del whole["_blake3"]
    text = encode({**whole, "session_id": "\\ud800"})
    assert b'"\\\\ud800"' in text
    fields = text[text.index(b'",') :].replace(b'"\\\\ud800"', b'"\\ud800"')
    hasher = new_hasher("blake3")
    hasher.update(fields)
    return b'{"_blake3":"' + hasher.hexdigest().encode() + fields


def test_no_task_keeps_a_client_from_the_others(local_fleet: Fleet) -> None:
    fleet, store = local_fleet, local_fleet.board._store
    whole = Request.of("custom", None, None, name="calibrate").dumps()
    bad = [TaskEntry(layout.new_task_id(), client) for client in ("edge-1", None)]
    for entry in bad:
        store.create(entry.request, _with_half_a_character())
    long = TaskEntry(layout.new_task_id(), None)
    path = Path(fleet.uri) / long.request
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(LONGEST + 1)
    claims = [Claim("edge-1", name, "f").dumps() for name in ("../../../x", "a\0b", "")]
    claimed = [TaskEntry(layout.new_task_id(), "edge-1") for _ in range(4)]
    for entry, claim in zip(claimed, [*claims, b"{}"], strict=True):
        store.create(entry.request, whole)
        store.create(entry.claimed(1), claim)
    fleet.start("edge-1")
    after = fleet.board.submit("custom", name="calibrate", client="edge-1")
    assert fleet.board.wait(after, 60).is_completed
    for entry, why in zip([*bad, long], ["surrogates", "surrogates", "more than"], strict=True):
        task = TaskHandle(entry.id, entry.client)
        result = fleet.board.wait(task, 60)
        assert result.status == "FAILED"
        assert why in result.response["error"]
        folder = entry.request.rpartition("/")[0]
        assert store.names(f"{folder}/claims/") == [entry.claimed(1)]
    assert [task.id for task in fleet.board.tasks()] == [entry.id for entry in claimed]


def test_names_that_lead_elsewhere_are_no_tasks() -> None:
    task = layout.new_task_id()
    for wrong, client in (("../../models/m", None), (task, "../x"), (task, ""), ("", None)):
        with pytest.raises(InvalidInput, match="cannot be the id of"):
            TaskHandle(wrong, client)
    names = [
        f"tasks/to/../{task}/request.json",
        f"tasks/to/a b/{task}/request.json",
        "tasks/any/../request.json",
    ]
    assert layout.entries(names) == []


def test_a_claim_without_measure_is_none() -> None:
    folder = f"tasks/any/{layout.new_task_id()}"
    numbers = ("0000", "00001", "123456", "9" * 200, "0007")
    (entry,) = layout.entries(f"{folder}/claims/{number}.json" for number in numbers)
    assert entry.claim == 7
    assert entry.claimed(7) == f"{folder}/claims/0007.json"
    (entry,) = layout.entries([f"{folder}/claims/12345.json"])
    assert entry.claimed(entry.claim) == f"{folder}/claims/12345.json"
