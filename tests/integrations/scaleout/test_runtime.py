"""The real ``EdgeClient`` with the runtime on SeaweedFS."""

from __future__ import annotations

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

    found = list(board.reports.records(client="edge-1"))
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
    assert (summary.duplicates, summary.gaps, summary.damaged) == (0, 0, 0)
