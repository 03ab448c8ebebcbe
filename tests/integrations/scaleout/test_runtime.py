"""The real ``EdgeClient`` with the runtime on SeaweedFS."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import GCSConfig, StorageClient
from storage.errors import InvalidInput
from storage.integrations.scaleout import StorageRuntime
from storage.integrations.scaleout.tokens import access_token, with_token
from storage.uri import parse_uri
from tests.integrations.scaleout.support import Fleet, until


def test_a_client_stages_infers_trains_and_validates(fleet: Fleet) -> None:
    board, seed = fleet.board, fleet.seed("seed", 1.0, 2.0)
    client = fleet.start("edge-1")
    staged = board.submit("stage", seed, client="edge-1")
    assert board.wait(staged, 60).response == {"model_id": "seed"}
    assert fleet.lines("staged") == [["seed"]]

    inferred = board.submit("infer", seed, {"by": 21}, client="edge-1")
    result = board.wait(inferred, 60)
    assert result.is_completed
    assert result.response == {"result": 21.0}

    trained = board.submit("train", seed, client="edge-1", round_id="r1", session_id="s1")
    result = board.wait(trained, 60)
    assert (result.status, result.client) == ("COMPLETED", "edge-1")
    assert result.response["meta"]["training_metadata"] == {"num_examples": 7}
    assert result.response["meta"]["config"] == '{"client_settings": {}}'
    update = result.model_update_id
    assert update is not None
    assert fleet.weights(update) == [2.0, 3.0]
    assert fleet.lines("train") == [[trained.id, "seed", "r1", "s1"]]
    assert fleet.lines("trained") == [[trained.id, "3"]]

    validated = board.submit("validate", update, client="edge-1", round_id="r2")
    assert board.wait(validated, 60).response == {"metrics": {"mean": 2.5, "worst": "NaN"}}
    assert client("stop", client_id="edge-1") is None

    found = [each.report for each in board.reports.records(client="edge-1")]
    metrics = [each for each in found if each.kind == "metric"]
    assert [(each.step, each.payload, each.task_id) for each in metrics] == [
        (step, {"loss": 1.0 / (step + 1)}, trained.id) for step in range(3)
    ]
    assert {(each.model_id, each.round_id, each.session_id) for each in metrics} == {
        ("seed", "r1", "s1")
    }
    (validation,) = [each for each in found if each.kind == "validation"]
    assert (validation.model_id, validation.round_id) == (update, "r2")
    (inference,) = [each for each in found if each.kind == "inference"]
    assert inference.payload["value"] == 21.0
    assert {each.kind for each in found} >= {"status"}
    summary = board.reports.check()
    assert (summary.duplicates, summary.missing, summary.damaged) == (0, 0, 0)


def test_what_a_client_cannot_do_is_said(fleet: Fleet) -> None:
    board, seed = fleet.board, fleet.seed("seed")
    fleet.start("edge-1")
    tasks = {
        "no such weather": board.submit(
            "train", seed, {"fail": "no such weather"}, client="edge-1"
        ),
        "there is no model missing": board.submit("validate", "missing", client="edge-1"),
        "missing not found": board.submit("stage", "missing", client="edge-1"),
        "unknown type of task: Custom_dance": board.submit("custom", name="dance", client="edge-1"),
    }
    results = board.wait_for(list(tasks.values()), 60)
    for reason, result in zip(tasks, results, strict=True):
        assert result.status == "FAILED"
        assert reason in result.response["error"]
    # It goes on.
    told = board.submit("custom", None, {"level": 3}, name="calibrate", client="edge-1")
    assert board.wait(told, 60).response == {"by": "edge-1", "level": 3}


def test_a_client_connects_and_is_seen(fleet: Fleet) -> None:
    peer = fleet.process()

    def begin(client: str, uri: str | None, **connect: object) -> list[str]:
        return peer(  # type: ignore[no-any-return]
            "start",
            client_id=client,
            uri=uri,
            folder=fleet.folder / "state",
            log=fleet.log,
            options={"poll_interval": 0.2, "heartbeat_interval": 0.2},
            connect=connect,
        )

    told = {"client_id": "edge-2", "name": "by the door", "package": "local"}
    assert begin("edge-2", None, url=fleet.uri, json=told) == ["Assigned", "by the door"]
    (status,) = until(fleet.board.clients, "the client is seen")
    assert (status.id, status.name, status.is_stopped) == ("edge-2", "by the door", False)
    assert peer("ask", client_id="edge-2", attribute="get_access_token") is None
    until(
        lambda: peer("ask", client_id="edge-2", attribute="link_quality") == "HEALTHY",
        "the link is good",
    )
    assert peer("stop", client_id="edge-2") is None
    (status,) = fleet.board.clients()
    assert status.is_stopped

    result, reason = begin("edge 3", None, url=fleet.uri, json={"client_id": "edge 3"})
    assert (result, "cannot be the id of a client" in reason) == ("UnMatchedConfig", True)
    result, _ = begin("edge-3", None, url="s3://no-such-bucket/fleet", json={})
    assert result == "IncorrectUrl"
    result, reason = begin("edge-3", None, url="https://127.0.0.1:9/api", json={})
    assert result == "UnMatchedConfig"
    wrong = {"access_key_id": "AKIDEXAMPLE", "secret_access_key": "wrong"}
    endpoint = {"endpoint_url": fleet.endpoint}
    result, reason = peer(
        "start",
        client_id="edge-3",
        uri=fleet.uri,
        folder=fleet.folder / "state",
        log=fleet.log,
        options={"config": {**wrong, **endpoint}},
        connect={"url": "", "json": {}},
    )
    assert result == "UnAuthorized"
    assert "wrong" not in reason


def test_two_processes_are_not_one_client(fleet: Fleet) -> None:
    fleet.start("edge-1")
    other = fleet.process()
    answer = other(
        "start",
        client_id="edge-1",
        uri=fleet.uri,
        folder=fleet.folder / "state",
        log=fleet.log,
        connect={"url": "", "json": {"client_id": "edge-1"}},
    )
    assert answer == ["Assigned", "no handler"]


def test_priority_classes_are_kept_and_alerts_do_not_wait(fleet: Fleet) -> None:
    peer = fleet.start("edge-1")
    names, refused, kept, is_left = peer("priorities", client_id="edge-1")
    assert names["own"] == 95
    assert names.keys() >= {
        "alert",
        "model_update",
        "telemetry",
        "inference",
        "artifact",
        "backlog",
    }
    assert refused == ["ValueError", "KeyError", "KeyError"]
    assert kept
    assert not is_left
    (found,) = until(lambda: list(fleet.board.reports.records()), "the alert is delivered")
    assert (found.report.key, found.report.priority) == ("urgent", "own")


def test_reports_outside_of_tasks_have_the_context_that_they_are_given(fleet: Fleet) -> None:
    peer = fleet.start("edge-1")
    answer = peer(
        "log",
        client_id="edge-1",
        metrics=[{"loss": 0.5, "acc": 1}, {"loss": 0.25}],
        attributes={"site": "north", "gps": {"lat": 1.5}},
        telemetry=["cpu", {"value": 0.9}],
        step=4,
    )
    assert answer == [True, 6]
    peer("stop", client_id="edge-1")
    found = [each.report for each in fleet.board.reports.records()]
    assert [(each.kind, each.key, each.step, dict(each.payload)) for each in found] == [
        ("metric", None, 4, {"loss": 0.5, "acc": 1}),
        ("metric", None, 5, {"loss": 0.25}),
        ("attribute", "site", None, {"value": "north"}),
        ("attribute", "gps", None, {"lat": 1.5}),
        ("telemetry", "cpu", None, {"value": 0.9}),
    ]
    assert {each.task_id for each in found} == {None}


def test_a_client_that_has_ended_reports_nothing_until_it_runs_again(fleet: Fleet) -> None:
    peer = fleet.start("edge-1")
    assert peer("again", client_id="edge-1") == [False, True]
    task = fleet.board.submit("custom", name="calibrate", client="edge-1")
    assert fleet.board.wait(task, 60).is_completed
    assert peer("stop", client_id="edge-1") is None
    found = [each.report for each in fleet.board.reports.records()]
    assert [(each.kind, each.key) for each in found] == [("status", None), ("telemetry", "again")]
    assert found[0].payload == {"status": "here again", "level": "AUDIT", "type": "LIFE"}


def test_a_forked_child_waits_for_no_lock_and_reports_nothing(local_fleet: Fleet) -> None:
    peer = local_fleet.start("edge-1")
    until(local_fleet.board.clients, "the client is at work")
    assert peer("fork", client_id="edge-1") == [10, True]
    assert peer("stop", client_id="edge-1") is None
    assert [each.report.key for each in local_fleet.board.reports.records()] == ["own"]


def test_a_client_that_would_count_as_gone_is_refused() -> None:
    for options in ({"heartbeat_interval": 600.0}, {"poll_interval": 700.0}, {"silence": 30.0}):
        with pytest.raises(InvalidInput, match="would count as gone"):
            StorageRuntime("memory://fleet", **options)  # type: ignore[arg-type]
    StorageRuntime("memory://fleet", poll_interval=700.0, silence=3600.0)


def test_the_runtime_has_all_that_a_client_may_ask_of_it(fleet: Fleet) -> None:
    assert fleet.process()("contract") == []


def test_a_signal_ends_a_client_in_good_order(fleet: Fleet) -> None:
    peer = fleet.process(SCALEOUT_CLIENT_SEND_TELEMETRY="true")
    options = {"poll_interval": 0.2, "heartbeat_interval": 0.2}
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(
            peer,
            "run_here",
            client_id="edge-1",
            uri=fleet.uri,
            folder=fleet.folder / "state",
            log=fleet.log,
            options=options,
        )
        task = fleet.board.submit("custom", name="calibrate", client="edge-1")
        assert fleet.board.wait(task, 60).is_completed
        os.kill(peer._process.pid, signal.SIGTERM)
        assert ended.result(60) is None
    (status,) = fleet.board.clients()
    assert status.is_stopped
    assert status.pending_results == 0
    observed = {each.report.key for each in fleet.board.reports.records(kinds={"telemetry"})}
    assert observed == {"memory_usage", "cpu_usage"}


def test_a_token_is_for_stores_that_take_one(tmp_path: Path) -> None:
    client = StorageClient()
    gcs = parse_uri("gs://bucket/fleet")
    config = with_token(client, gcs, None, "the token")
    assert isinstance(config, GCSConfig)
    assert access_token(client, gcs, config) == "the token"
    endpoint = "http://127.0.0.1:1"
    config = with_token(client, gcs, {"endpoint_url": endpoint, "token": "old"}, "the token")
    assert access_token(client, gcs, config) == "the token"
    assert config.endpoint_url == endpoint
    assert with_token(client, gcs, {"token": "old"}, None) == {"token": "old"}
    for uri in ("s3://bucket/fleet", str(tmp_path)):
        assert with_token(client, parse_uri(uri), None, "the token") is None
        assert access_token(client, parse_uri(uri), None) is None
