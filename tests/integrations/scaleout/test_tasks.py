"""Tasks and who does them: claims, stops, deaths, removals."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from storage.errors import InvalidInput, ModelMissingError
from storage.integrations.scaleout import layout
from storage.integrations.scaleout.documents import Claim, SignOfLife
from storage.integrations.scaleout.layout import TaskEntry
from storage.registry.objects import ObjectStore
from tests.integrations.scaleout.support import Fleet, kill, until

ELSEWHERE = "0123456789abcdef-01234567-1-4711-1-89abcdef"
"""A process of another machine."""


def _live_elsewhere(store: ObjectStore, entry: TaskEntry) -> None:
    sign = SignOfLife("the edge-1", "another folder", False, (entry.id,), 0, 0)
    store.replace(layout.sign_of_life("edge-1", ELSEWHERE), sign.dumps())


def _begin_elsewhere(store: ObjectStore, entry: TaskEntry, number: int) -> None:
    """Let a process of the same client on another machine live and claim a task."""
    _live_elsewhere(store, entry)
    claim = Claim("edge-1", ELSEWHERE, "another folder")
    assert store.create(entry.claimed(number), claim.dumps())


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """A file; tasks that are told its name go on when it is gone."""
    path = tmp_path / "hold"
    path.touch()
    return path


def test_a_task_of_a_killed_client_is_done_by_its_next_process(fleet: Fleet, hold: Path) -> None:
    seed = fleet.seed("seed", 1.0)
    first = fleet.start("edge-1")
    task = fleet.board.submit("train", seed, {"hold": str(hold)}, client="edge-1")
    until(lambda: len(fleet.lines("train")) == 1, "the training has begun")
    kill(first)
    assert fleet.board.result(task) is None
    hold.unlink()
    fleet.start("edge-1")
    result = fleet.board.wait(task, 60)
    assert result.is_completed
    assert fleet.weights(str(result.model_update_id)) == [2.0]
    assert [line[0] for line in fleet.lines("train")] == [task.id, task.id]
    assert fleet.lines("trained") == [[task.id, "3"]]
    assert len(list(fleet.board.results())) == 1


def test_a_client_that_stops_leaves_its_tasks_to_its_next_process(fleet: Fleet, hold: Path) -> None:
    seed = fleet.seed("seed", 1.0)
    first = fleet.start("edge-1")
    task = fleet.board.submit("train", seed, {"hold": str(hold)}, client="edge-1")
    until(lambda: len(fleet.lines("train")) == 1, "the training has begun")
    assert first("stop", client_id="edge-1") is None
    assert fleet.lines("stopped")[0][:2] == [task.id, "StoppedException"]
    assert fleet.board.result(task) is None
    hold.unlink()
    fleet.start("edge-1", first)
    assert fleet.board.wait(task, 60).is_completed


def test_a_task_under_way_is_stopped(fleet: Fleet, hold: Path) -> None:
    seed = fleet.seed("seed")
    fleet.start("edge-1")
    task = fleet.board.submit("train", seed, {"hold": str(hold)}, client="edge-1")
    until(lambda: fleet.lines("train"), "the training has begun")
    (status,) = until(
        lambda: [each for each in fleet.board.clients() if each.running], "it is seen at work"
    )
    assert status.running == (task.id,)
    fleet.board.abort(task)
    result = fleet.board.wait(task, 60)
    assert (result.status, result.response) == ("INTERRUPTED", {"msg": "Aborted by server"})
    assert fleet.lines("stopped") == [[task.id, "StoppedException", "Aborted", "by", "server"]]
    assert fleet.board.tasks() == []


def test_a_task_that_was_removed_or_taken_over_has_no_result_of_this_process(
    fleet: Fleet, hold: Path
) -> None:
    seed, board = fleet.seed("seed"), fleet.board
    fleet.start("edge-1")
    removed, taken = (
        board.submit("train", seed, {"hold": str(hold)}, client="edge-1") for _ in range(2)
    )
    until(lambda: len(fleet.lines("train")) == 2, "both have begun")
    store, entry = board._store, TaskEntry(taken.id, taken.client)
    store.delete([TaskEntry(removed.id, removed.client).request])
    assert board.remove_ended([removed]) == 1
    _begin_elsewhere(store, entry, 2)
    until(lambda: len(fleet.lines("stopped")) == 2, "both have stopped")
    assert board.result(taken) is None
    assert store.names(layout.task_folder("edge-1")) == [
        entry.claimed(1),
        entry.claimed(2),
        entry.request,
    ]


def test_a_task_that_nobody_began_is_stopped_at_once(fleet: Fleet) -> None:
    seed = fleet.seed("seed")
    task = fleet.board.submit("train", seed, client="edge-1")
    fleet.board.abort(task)
    result = fleet.board.result(task)
    assert result is not None
    assert (result.status, result.client) == ("INTERRUPTED", None)
    fleet.start("edge-1")
    after = fleet.board.submit("validate", seed, client="edge-1")
    assert fleet.board.wait(after, 60).is_completed
    assert fleet.lines("train") == []


def test_a_task_begun_on_another_machine_is_left_to_it_until_it_is_silent(fleet: Fleet) -> None:
    task = fleet.board.submit("custom", name="calibrate", client="edge-1")
    entry = TaskEntry(task.id, task.client)
    store = fleet.board._store
    _begin_elsewhere(store, entry, 1)
    # Longer than a machine stands still while the other one is played.
    fleet.start("edge-1", fleet.process(), silence=10.0)
    others = 0
    while others < 8:
        _live_elsewhere(store, entry)
        # A few looks after the client has come.
        others += len(store.names(layout.clients_folder("edge-1"))) > 1
        time.sleep(0.05)
    assert fleet.lines("begun") == []
    result = fleet.board.wait(task, 60)
    assert (result.is_completed, len(fleet.lines("begun"))) == (True, 1)


def test_a_damaged_task_fails_and_stops_no_other(fleet: Fleet) -> None:
    damaged = fleet.board.submit("custom", name="calibrate", client="edge-1")
    fleet.board._store.replace(TaskEntry(damaged.id, damaged.client).request, b'{"format":1}')
    whole = fleet.board.submit("custom", name="calibrate", client="edge-1")
    fleet.start("edge-1")
    assert fleet.board.wait(whole, 60).is_completed
    result = fleet.board.wait(damaged, 60)
    assert result.status == "FAILED"
    assert "is damaged" in result.response["error"]


def test_two_clients_share_tasks_and_each_is_done_once(fleet: Fleet) -> None:
    for client in ("edge-1", "edge-2"):
        fleet.start(client, poll_interval=0.05, concurrency=1)
    until(lambda: len(fleet.board.clients()) == 2, "both are there")
    tasks = [fleet.board.submit("custom", name="calibrate") for _ in range(8)]
    results = fleet.board.wait_for(tasks, 60)
    done = [line[1] for line in fleet.lines("calibrated")]
    assert sorted(done) == sorted(task.id for task in tasks)
    assert {result.client for result in results} == {line[0] for line in fleet.lines("calibrated")}
    by = {result.client for result in results}
    mine = {
        client: {task.id for task, _ in fleet.board.results(client)}
        for client in ("edge-1", "edge-2")
    }
    assert by == {client for client, found in mine.items() if found}
    assert not mine["edge-1"] & mine["edge-2"]


@pytest.mark.slow
def test_clients_that_are_killed_do_every_task_and_none_twice_at_once(local_fleet: Fleet) -> None:
    fleet, chance = local_fleet, random.Random(7)
    clients = [f"edge-{number}" for number in range(3)]
    peers = {client: fleet.start(client, poll_interval=0.05) for client in clients}
    tasks = []
    for number in range(40):
        who = chance.choice([None, *clients])
        params: dict[str, Any] = {"pause": chance.random() / 5}
        tasks.append(fleet.board.submit("custom", None, params, name="calibrate", client=who))
        if number % 8 == 7:
            victim = chance.choice(clients)
            hold = fleet.folder / f"hold {number}"
            hold.touch()
            params = {"hold": str(hold)}
            held = fleet.board.submit("custom", None, params, name="calibrate", client=victim)
            tasks.append(held)
            until(lambda: held.id in [line[1] for line in fleet.lines("begun")], "it has begun")  # noqa: B023
            pid = peers[victim]._process.pid
            kill(peers[victim])
            with fleet.log.open("a") as log:
                print("killed", pid, file=log)
            hold.unlink()
            peers[victim] = fleet.start(victim, poll_interval=0.05)
    results = fleet.board.wait_for(tasks, 100)
    assert all(result.is_completed for result in results)
    for task, result in zip(tasks, results, strict=True):
        assert task.client in (None, result.client)
    killed: set[str] = set()
    begun: dict[str, list[str]] = {task.id: [] for task in tasks}
    for line in fleet.log.read_text().splitlines():
        word, *rest = line.split()
        if word == "killed":
            killed.add(rest[0])
        elif word == "begun":
            pid, task_id = rest
            assert killed.issuperset(begun[task_id]), "the one before may still be at it"
            begun[task_id].append(pid)
    assert all(begun.values())
    assert sum(len(pids) > 1 for pids in begun.values()) >= 5, "each kill was at work"


def test_a_client_that_does_not_poll_leaves_tasks_and_delivers_reports(fleet: Fleet) -> None:
    task = fleet.board.submit("custom", name="calibrate", client="edge-1")
    peer = fleet.start("edge-1", how={"with_polling": False, "with_heartbeat": False})
    assert peer("log", client_id="edge-1", metrics=[{"loss": 1.0}])[0]
    assert peer("stop", client_id="edge-1") is None
    assert len(list(fleet.board.reports.records())) == 1
    assert fleet.board.result(task) is None


def test_a_task_for_any_client_waits_for_one_that_can(fleet: Fleet) -> None:
    fleet.start("edge-1")
    other = fleet.board.submit("custom", name="dance")
    mine = fleet.board.submit("custom", name="calibrate")
    assert fleet.board.wait(mine, 60).client == "edge-1"
    assert fleet.board.tasks() == [other]
    with pytest.raises(TimeoutError, match=other.id):
        fleet.board.wait(other, 0.5)


def test_the_same_task_goes_to_every_client(fleet: Fleet) -> None:
    peer = fleet.start("edge-1")
    fleet.start("edge-2", peer)
    until(lambda: len(fleet.board.clients()) == 2, "both are there")
    tasks = fleet.board.submit_to_all("custom", None, {"level": 1}, name="calibrate")
    assert [task.client for task in tasks] == ["edge-1", "edge-2"]
    assert [each.response["by"] for each in fleet.board.wait_for(tasks, 60)] == ["edge-1", "edge-2"]


def test_a_task_that_a_client_begins_itself_is_on_the_board(fleet: Fleet, hold: Path) -> None:
    peer = fleet.start("edge-1")
    short = peer("autonomous", client_id="edge-1")
    (first,) = until(
        lambda: [each for each in fleet.board.results() if each[0].id == short], "it has ended"
    )
    assert first[1].response == {"done": short}
    assert fleet.board.request(first[0]).type == "Autonomous_survey"

    long = peer("autonomous", client_id="edge-1", hold=hold)
    (task,) = until(fleet.board.tasks, "it is known")
    assert task.id == long
    fleet.board.abort(task)
    assert fleet.board.wait(task, 60).status == "INTERRUPTED"

    lost = peer("autonomous", client_id="edge-1", hold=hold)
    (task,) = until(fleet.board.tasks, "it is known")
    kill(peer)
    fleet.start("edge-1")
    result = fleet.board.wait(task, 60)
    assert (task.id, result.status) == (lost, "FAILED")
    assert "has ended" in result.response["error"]


def test_ended_tasks_are_removed_and_none_is_done_again(fleet: Fleet) -> None:
    seed = fleet.seed("seed")
    fleet.start("edge-1")
    done = [fleet.board.submit("validate", seed, client="edge-1") for _ in range(2)]
    fleet.board.wait_for(done, 60)
    left = fleet.board.submit("custom", name="dance")
    assert fleet.board.remove_ended([left]) == 0
    assert fleet.board.remove_ended(done[:1]) == 1
    assert fleet.board.remove_ended() == 1
    assert fleet.board.tasks() == [left]
    with pytest.raises(ModelMissingError, match="may have been removed"):
        fleet.board.wait(done[0], 5)
    with pytest.raises(ModelMissingError):
        fleet.board.abort(done[1])


def test_a_task_that_is_no_task_is_refused(fleet: Fleet) -> None:
    board = fleet.board
    with pytest.raises(InvalidInput, match="no kind of task"):
        board.submit("dance", "m")
    with pytest.raises(InvalidInput, match="id of a model"):
        board.submit("train")
    with pytest.raises(InvalidInput, match="name of its callback"):
        board.submit("custom")
    with pytest.raises(InvalidInput, match="cannot be the id of a client"):
        board.submit("train", "m", client="../x")
    with pytest.raises(InvalidInput, match="cannot be the id of a model"):
        board.submit("train", "../x")
    with pytest.raises(InvalidInput, match="keeps text, finite numbers"):
        board.submit("train", "m", {"at": object()})
    assert board.tasks() == []
