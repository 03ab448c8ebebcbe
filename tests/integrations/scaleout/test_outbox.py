"""What waits on the disk for the store, and who may take what another process began."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage import StorageClient
from storage.cache.owners import new_name
from storage.errors import IntegrityError, InvalidInput, UnreachableError, UnsupportedOperation
from storage.integrations.scaleout import layout, tasks
from storage.integrations.scaleout.binding import Binding, Options, mark
from storage.integrations.scaleout.documents import Claim, Request, Result, SignOfLife
from storage.integrations.scaleout.layout import TaskEntry
from storage.integrations.scaleout.models import ModelStore
from storage.integrations.scaleout.outbox import Delivery, Outbox, Outcome
from storage.integrations.scaleout.polling import Polling
from storage.integrations.scaleout.presence import Presence, folder_id
from storage.integrations.scaleout.tasks import TaskRunner
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """A fleet in a folder."""
    return ObjectStore(StorageClient(), parse_uri(f"{tmp_path}/fleet/"))


def _outcome(*, model_id: str | None = None, **own: Request | Claim) -> Outcome:
    entry = TaskEntry(layout.new_task_id(), "edge-1")
    result = Result("COMPLETED", {"result": 1}, "edge-1", NOW, NOW)
    return Outcome(entry, result, model_id, **own)  # type: ignore[arg-type]


def _delivery(outbox: Outbox, store: ObjectStore) -> Delivery:
    return Delivery(outbox, store, ModelStore(store.client, store.location))


def _runner(store: ObjectStore, outbox: Outbox) -> TaskRunner:
    """Return one that cannot do anything."""
    unused: Any = None
    presence = Presence(store, "edge-1", "this folder")
    return TaskRunner(
        store,
        "edge-1",
        presence,
        unused,
        outbox,
        unused,
        concurrency=1,
        on_outcome=lambda: None,
    )


def test_many_ended_tasks_are_told_of_once_and_again_when_they_have_doubled(
    store: ObjectStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_MANY", 3)
    runner = _runner(store, Outbox(str(tmp_path / "outbox")))
    told = []
    for _ in range(7):
        outcome = _outcome()
        assert store.create(outcome.entry.request, Request.of("infer", "m", {}).dumps())
        assert store.create(outcome.entry.result, outcome.result.dumps())
        runner.poll()
        told.append(caplog.text.count("remove_ended()"))
    assert told == [0, 0, 1, 1, 1, 2, 2]


def test_a_task_for_which_there_is_no_thread_is_not_under_way(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    runner = _runner(store, Outbox(str(tmp_path / "outbox")))
    made: Any = lambda *args, **fields: SimpleNamespace()  # noqa: E731
    runner._classes = SimpleNamespace(  # type: ignore[assignment]
        Task=made,
        messages=SimpleNamespace(TaskRequest=made),
        StatusType=SimpleNamespace(PENDING=SimpleNamespace(value="PENDING")),
    )
    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(RuntimeError, match="new thread"):
        runner.start_own(lambda: None, "survey", None)
    assert runner.running() == ()


def test_a_client_rests_longer_than_a_look_takes() -> None:
    looks = []

    class Slow:
        def poll(self) -> None:
            looks.append(time.monotonic())
            time.sleep(0.1)

        def running(self) -> tuple[str, ...]:
            return ()

    binding: Any = SimpleNamespace(sign=lambda *args, **how: None, join=lambda: None)
    runner: Any = Slow()
    polling = Polling(
        binding, runner, lambda: "x", interval=0.01, heartbeat=None, looks_for_tasks=True
    )
    polling.start()
    while len(looks) < 3:
        time.sleep(0.01)
    polling.stop(10.0)
    assert all(later - look >= 0.4 for look, later in itertools.pairwise(looks))


def test_a_store_that_cannot_hold_a_fleet_leaves_the_folder_free(tmp_path: Path) -> None:
    options = Options(str(tmp_path / "state"), (), "cache-first", 600.0, durable=False)
    for _ in range(2):
        with pytest.raises(UnsupportedOperation, match="only if it is absent"):
            Binding(StorageClient(), parse_uri("ftp://host/fleet/"), None, "edge-1", options)
    binding = Binding(StorageClient(), parse_uri(f"{tmp_path}/fleet/"), None, "edge-1", options)
    binding.close(0.0)


def test_an_outcome_is_read_as_it_was_written() -> None:
    request = Request.of("infer", "m", {"by": 2}, session_id="s", round_id="r")
    outcome = _outcome(model_id="m", request=request, claim=Claim("edge-1", "p", "f"))
    found = Outcome.parse(outcome.dumps(), "here")
    assert found.result == outcome.result
    assert found.claim == outcome.claim
    assert found.request is not None
    assert found.request.data == {"parameters": {"by": 2}}
    assert (found.entry.id, found.entry.client, found.model_id) == (outcome.entry.id, "edge-1", "m")


@pytest.mark.parametrize("durable", [False, True])
def test_a_result_and_its_model_come_to_the_store_and_leave_nothing(
    store: ObjectStore, tmp_path: Path, durable: bool
) -> None:
    outbox = Outbox(str(tmp_path / "outbox"), durable=durable)
    outcome = _outcome(model_id="m-1")
    outbox.put(outcome, io.BytesIO(b"the model"))
    assert outbox.holds(outcome.entry.id)
    _delivery(outbox, store).deliver()
    assert (tmp_path / "fleet" / "models" / "m-1.scm").read_bytes() == b"the model"
    data = store.read(outcome.entry.result)
    assert data is not None
    assert Result.parse(data, "here") == outcome.result
    assert os.listdir(tmp_path / "outbox") == []


def test_what_a_killed_process_had_not_finished_goes_and_what_is_damaged_is_set_aside(
    store: ObjectStore, tmp_path: Path
) -> None:
    folder = tmp_path / "outbox"
    outbox = Outbox(str(folder))
    damaged, whole = _outcome(), _outcome()
    for each in (damaged, whole):
        outbox.put(each)
    (folder / damaged.entry.id / "outcome.json").write_bytes(b"{}")
    (folder / ".unfinished-0123").mkdir()
    (folder / ".unfinished-0123" / "model.scm").write_bytes(b"half")
    outbox = Outbox(str(folder))
    _delivery(outbox, store).deliver()
    assert store.read(whole.entry.result) is not None
    assert store.read(damaged.entry.result) is None
    (left,) = os.listdir(folder)
    assert left.startswith(f".damaged-{damaged.entry.id}")


def test_a_result_that_the_store_refuses_keeps_no_other_back(
    store: ObjectStore, tmp_path: Path
) -> None:
    outbox = Outbox(str(tmp_path / "outbox"))
    refused, taken = _outcome(model_id="m-2"), _outcome()
    outbox.put(refused)  # its model is missing
    outbox.put(taken)
    with pytest.raises(InvalidInput, match="No such file"):
        _delivery(outbox, store).deliver()
    assert outbox.tasks() == [refused.entry.id]
    assert store.read(taken.entry.result) is not None


def test_the_first_result_of_a_task_counts(store: ObjectStore, tmp_path: Path) -> None:
    outbox = Outbox(str(tmp_path / "outbox"))
    outcome = _outcome()
    first = Result("FAILED", {"error": "no"}, "edge-1", NOW, NOW)
    assert store.create(outcome.entry.result, first.dumps())
    outbox.put(outcome)
    _delivery(outbox, store).deliver()
    assert outbox.tasks() == []
    assert Result.parse(store.read(outcome.entry.result) or b"", "here") == first


def test_new_results_storm_no_store_that_is_away(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(str(tmp_path / "outbox"))
    delivery = _delivery(outbox, store)
    tries = []

    def away(name: str, data: bytes) -> bool:
        tries.append(name)
        raise UnreachableError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(store, "create", away)
        began = time.monotonic()
        delivery.start()
        while time.monotonic() < began + 0.5 or not tries:
            assert time.monotonic() < began + 60
            outbox.put(_outcome())
            delivery.hurry()
            time.sleep(0.01)
        # One that is hurried may follow the first at once; the others wait for a second, for two,
        # and so on. A machine that stands still meanwhile has the time for more.
        found, took = len(tries), time.monotonic() - began
        assert found < 3 or 2.0 ** (found - 1) - 2 <= took
    assert delivery.close(60.0)


def test_a_task_whose_result_waits_here_is_not_done_again(
    store: ObjectStore, tmp_path: Path
) -> None:
    outbox = Outbox(str(tmp_path / "outbox"))
    outcome = _outcome()
    entry = outcome.entry
    assert store.create(entry.request, Request.of("infer", "m", {}).dumps())
    assert store.create(entry.claimed(1), Claim("edge-1", "before", "this folder").dumps())
    outbox.put(outcome)
    runner = _runner(store, outbox)
    runner.poll()
    assert store.names(layout.TASKS) == [entry.claimed(1), entry.request]
    _delivery(outbox, store).deliver()
    runner.poll()
    assert store.names(layout.TASKS) == [entry.claimed(1), entry.request, entry.result]


def test_a_folder_has_one_id_for_ever(tmp_path: Path) -> None:
    found = folder_id(str(tmp_path / "one"))
    assert folder_id(str(tmp_path / "one")) == found
    assert folder_id(str(tmp_path / "two")) != found
    assert os.listdir(tmp_path / "one") == ["folder-id"]
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert folder_id(str(tmp_path / "copy")) != found


def test_only_what_a_process_that_is_gone_began_is_taken_up(store: ObjectStore) -> None:
    presence = Presence(store, "edge-1", "this folder")
    assert presence.may_take(presence.claim)
    assert presence.may_take(Claim("edge-1", "whoever", "this folder"))
    assert not presence.may_take(Claim("edge-2", "whoever", "this folder"))

    # This very process lives; one that never said anything began nothing.
    alive = new_name()
    claim = Claim("edge-1", alive, "another folder")
    assert presence.may_take(claim)
    sign = SignOfLife("edge-1", "another folder", False, (), 0, 0)
    name = layout.sign_of_life("edge-1", alive)
    store.replace(name, sign.dumps())
    assert not presence.may_take(claim)
    # One whose number another process has now is gone.
    host, boot, namespace, pid, started, _ = alive.split("-")
    dead = f"{host}-{boot}-{namespace}-{pid}-{int(started) + 1}-00000000"
    store.replace(layout.sign_of_life("edge-1", dead), sign.dumps())
    assert presence.may_take(Claim("edge-1", dead, "another folder"))
    # One that said that it ends is, too.
    stopped = SignOfLife("edge-1", "another folder", True, (), 0, 0)
    store.replace(name, stopped.dumps())
    assert presence.may_take(claim)
    presence.announce(sign)
    presence.forget_others()
    assert store.names(layout.CLIENTS) == [layout.sign_of_life("edge-1", presence.claim.process)]


def test_documents_that_are_damaged_are_told(store: ObjectStore) -> None:
    for kind in (Request, Claim, Result, SignOfLife, Outcome):
        with pytest.raises(IntegrityError, match="here is damaged"):
            kind.parse(b'{"format":1}', "here")


def test_a_store_on_which_two_clients_could_not_be_told_apart_is_refused() -> None:
    web = ObjectStore(StorageClient(), parse_uri("http://127.0.0.1:9/fleet/"))
    with pytest.raises(UnsupportedOperation, match="cannot create an object only if it is absent"):
        mark(web)
