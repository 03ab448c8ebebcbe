"""Clients whose store goes away and comes back: a SeaweedFS that is really stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.scaleout.support import Fleet, kill, until
from tests.peers.environments import PeerError
from tests.servers import SeaweedFS


def _metrics(fleet: Fleet) -> list[tuple[int | None, dict[str, float]]]:
    """Return what every delivered metric says, by the store's objects alone."""
    found = [each.report for each in fleet.board.reports.records(kinds=["metric"])]
    return [(each.step, dict(each.payload)) for each in found]


def test_a_client_works_without_its_store_and_delivers_when_it_is_back(
    own_fleet: Fleet, own_server: SeaweedFS, tmp_path: Path
) -> None:
    fleet, board = own_fleet, own_fleet.board
    hold = tmp_path / "hold"
    hold.touch()
    seed = fleet.seed("seed", 1.0, 2.0)
    client = fleet.start("edge-1", freshness="revalidate")
    assert board.wait(board.submit("stage", seed, client="edge-1"), 60).is_completed
    assert board.wait(board.submit("validate", seed, client="edge-1"), 60).is_completed
    train = board.submit("train", seed, {"hold": str(hold)}, client="edge-1")
    until(lambda: fleet.lines("train"), "the training has begun")

    own_server.halt()
    # What is staged infers, what is cached is read, and what is said is kept.
    assert client("infer", client_id="edge-1", model_id=seed, by=3) == 3.0
    assert len(client("chunks_of", client_id="edge-1", model_id=seed)) == 1
    answer = client(
        "log", client_id="edge-1", metrics=[{"loss": step} for step in range(20)], step=100
    )
    assert answer == [True, 120]
    hold.unlink()
    until(lambda: fleet.lines("trained"), "the training has ended")
    until(
        lambda: client("ask", client_id="edge-1", attribute="link_quality") == "OFFLINE",
        "the client has noticed",
    )
    until(
        lambda: client("ask", client_id="edge-1", attribute="pending") >= 21,
        "the result is kept, too",
    )
    own = client("autonomous", client_id="edge-1")

    own_server.resume()
    result = board.wait(train, 100)
    assert result.is_completed
    assert fleet.weights(str(result.model_update_id)) == [2.0, 3.0]
    after = board.submit("infer", seed, {"by": 5}, client="edge-1")
    assert board.wait(after, 60).response == {"result": 5.0}
    until(lambda: own in {task.id for task, _ in board.results()}, "its own task is told")
    until(lambda: client("ask", client_id="edge-1", attribute="pending") == 0, "all is delivered")
    until(
        lambda: client("ask", client_id="edge-1", attribute="link_quality") == "HEALTHY",
        "the link is good, and quick again",
    )
    assert client("stop", client_id="edge-1") is None
    assert _metrics(fleet) == [(step, {"loss": 1.0 / (step + 1)}) for step in range(3)] + [
        (100 + step, {"loss": float(step)}) for step in range(20)
    ]
    assert len(fleet.lines("train")) == 1
    assert board.reports.check().duplicates == 0


def test_a_client_killed_with_a_result_delivers_it_and_trains_no_second_time(
    own_fleet: Fleet, own_server: SeaweedFS, tmp_path: Path
) -> None:
    fleet, board = own_fleet, own_fleet.board
    hold = tmp_path / "hold"
    hold.touch()
    client = fleet.start("edge-1")
    train = board.submit("train", fleet.seed("seed", 5.0), {"hold": str(hold)}, client="edge-1")
    until(lambda: fleet.lines("train"), "the training has begun")
    own_server.halt()
    hold.unlink()
    outbox = fleet.folder / "state" / "edge-1" / "outbox" / train.id
    until(outbox.exists, "the result is kept")
    kill(client)

    # It begins, and works, without its store.
    client = fleet.start("edge-1")
    assert client("stage", client_id="edge-1", model_id="seed") == ["seed", 5.0]
    assert client("log", client_id="edge-1", metrics=[{"loss": 9.0}], step=50) == [True, 51]
    kill(client)

    own_server.resume()
    client = fleet.start("edge-1")
    result = board.wait(train, 100)
    assert result.is_completed
    assert fleet.weights(str(result.model_update_id)) == [6.0]
    assert len(fleet.lines("train")) == 1
    until(lambda: len(_metrics(fleet)) == 4, "the metrics are delivered")
    assert _metrics(fleet)[3] == (50, {"loss": 9.0})
    assert not outbox.exists()
    assert board.reports.check().duplicates == 0


@pytest.mark.slow
def test_a_client_killed_while_it_delivers_delivers_each_thing_once(
    own_fleet: Fleet, own_server: SeaweedFS
) -> None:
    fleet, board = own_fleet, own_fleet.board
    seed = fleet.seed("seed", 1.0)
    tasks, said = [], 0
    for attempt in range(6):
        client = fleet.start("edge-1")
        tasks.append(board.submit("train", seed, client="edge-1"))
        until(lambda: len(fleet.lines("trained")) > len(tasks) - 1, "it has trained")
        metrics = [{"loss": said + number} for number in range(40)]
        assert client("log", client_id="edge-1", metrics=metrics, step=1000 + said)[0]
        said += 40
        if attempt % 2:
            # Somewhere between the outbox, the model, the result, and the removal.
            until(lambda: board.result(tasks[-1]) is not None, "the result is there")
        kill(client)
    fleet.start("edge-1")
    results = board.wait_for(tasks, 100)
    assert all(result.is_completed for result in results)
    assert len({result.model_update_id for result in results}) == len(tasks)
    for result in results:
        assert fleet.weights(str(result.model_update_id)) == [2.0]
    expected = [(1000 + number, {"loss": float(number)}) for number in range(said)]
    until(
        lambda: [each for each in _metrics(fleet) if (each[0] or 0) >= 1000] == expected,
        "each is delivered once, in order",
    )


def test_a_client_that_is_told_to_be_offline_asks_no_store(fleet: Fleet) -> None:
    seed = fleet.seed("seed", 4.0)
    client = fleet.start("edge-1")
    assert client("stage", client_id="edge-1", model_id=seed) == ["seed", 4.0]
    assert client("stop", client_id="edge-1") is None
    task = fleet.board.submit("validate", seed, client="edge-1")

    client = fleet.start("edge-1", fleet.process(STORAGE_OFFLINE="1"))
    assert client("stage", client_id="edge-1", model_id=seed) == ["seed", 4.0]
    with pytest.raises(PeerError, match="OfflineError"):
        client("stage", client_id="edge-1", model_id=fleet.seed("other"))
    assert client("log", client_id="edge-1", metrics=[{"loss": 1.0}])[0]
    assert client("stop", client_id="edge-1") is None
    assert list(fleet.board.reports.records()) == []
    assert fleet.board.tasks() == [task]

    fleet.start("edge-1")
    assert fleet.board.wait(task, 60).is_completed
    until(lambda: (0, {"loss": 1.0}) in _metrics(fleet), "what was said is delivered")


def test_a_client_that_never_met_its_store_waits_for_it(
    own_fleet: Fleet, own_server: SeaweedFS
) -> None:
    fleet = own_fleet
    seed = fleet.seed("seed", 4.0)
    own_server.halt()
    client = fleet.start("edge-1", patience=1.0)
    assert client("log", client_id="edge-1", metrics=[{"loss": 1.0}]) == [True, 1]
    with pytest.raises(PeerError, match=r"UnreachableError|TransferError"):
        client("stage", client_id="edge-1", model_id=seed)
    assert client("stop", client_id="edge-1") is None
    own_server.resume()
    client = fleet.start("edge-1")
    assert client("stage", client_id="edge-1", model_id=seed) == ["seed", 4.0]
    until(lambda: _metrics(fleet) == [(0, {"loss": 1.0})], "what was said is delivered")
