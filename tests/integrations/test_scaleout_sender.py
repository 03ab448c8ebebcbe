"""What a spool holds comes to the store, each record once, whatever stores and networks do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import storage
from storage import StorageClient
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    StorageError,
    TransferError,
    TransientError,
    UnsupportedOperation,
)
from storage.integrations.scaleout import batches, records
from storage.integrations.scaleout import sender as module
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.sender import Sender
from storage.integrations.scaleout.spool import Spool
from storage.registry import documents
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from storage.testing.faulty_backend import FaultyBackend
from tests.cache.processes import forked
from tests.facade.conftest import any_store
from tests.facade.stores import S3Store, s3_config
from tests.integrations.spooling import (
    CLIENT,
    Nursery,
    Order,
    Wrapping,
    delivered,
    empty,
    impatient,
    observation,
    sender_to,
    store_at,
)
from tests.servers import SeaweedFS

WAIT = 20.0
"""Seconds for what takes a moment on a machine that is not busy."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool", CLIENT)
    yield spool
    spool.close()


@pytest.fixture
def s3(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> S3Store:
    return s3_store(seaweedfs, shared_bucket, prefix)


def s3_store(server: SeaweedFS, bucket: str, prefix: str) -> S3Store:
    config = s3_config(server, "obstore")
    return S3Store("seaweedfs-obstore", server, "obstore", bucket, prefix, config)


def fill(spool: Spool, *numbers: int) -> None:
    for number in numbers:
        spool.append(observation(number))


def once(*numbers: int) -> dict[int, int]:
    return dict.fromkeys(numbers, 1)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Gate:
    """Around a backend: a test says what its writes meet."""

    def __init__(self) -> None:
        self.error: Callable[[str], Exception | None] = lambda key: None
        self.writes: list[str] = []
        self.is_applied = False
        """Whether a write is done before its error."""

    def client(self) -> StorageClient:
        return Wrapping(partial(_Gated, self), settings=impatient())


class _Gated:
    def __init__(self, gate: Gate, backend: Any) -> None:
        self._gate = gate
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write(self, key: str, *args: Any, **options: Any) -> Any:
        self._gate.writes.append(key)
        error = self._gate.error(key)
        if error is None or self._gate.is_applied:
            result = self._backend.write(key, *args, **options)
        if error is not None:
            raise error
        return result


@pytest.fixture
def gate() -> Gate:
    return Gate()


def away(_: str) -> Exception:
    return TransientError("nobody answers")


# -- delivery --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["file", "pvc", "seaweedfs-obstore", "gcs-fsspec", "azurite-obstore", "hub"]
)
def test_reports_arrive_as_they_were_made_and_in_order(
    kind: str,
    spool: Spool,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prefix: str,
) -> None:
    there = any_store(request, tmp_path_factory, kind, prefix)
    uri, config = there.base, there.config
    said = [
        records.metric({"loss": 0.25, "worst": float("inf")}, model_id="m", step=0, round_id="1"),
        records.attribute("os", "linux", priority="artifact"),
        records.telemetry("cpu", {"value": 12}, task_id="t"),
        records.inference("cat", {"box": [1, 2]}, inference_id="i", model_id="m"),
        records.status("working", level="DEBUG", type="LOG"),
        records.report("dance", {"steps": 3}, session_id="s"),
    ]
    sender = sender_to(spool, uri, config)
    sender.start()
    assert [spool.append(each) for each in said] == [1, 2, 3, 4, 5, 6]
    assert sender.close(WAIT)
    reports = Reports(uri, config=config)
    found = list(reports.records())
    assert [record.report for record in found] == [replace(each) for each in said]
    assert {record.client for record in found} == {CLIENT}
    (metric,) = reports.metrics(CLIENT)
    assert metric["metrics"] == {"loss": 0.25, "worst": float("inf")}
    assert (metric["model_id"], metric["step"], metric["round_id"]) == ("m", 0, "1")
    summary = reports.check()
    assert (summary.records, summary.duplicates, summary.missing, summary.damaged) == (6, 0, 0, 0)
    assert sender.counts() == module.Counts(0, 6, 0, 0, 0, None, True)


def test_a_report_is_sent_without_a_call(spool: Spool, store: Path) -> None:
    sender = sender_to(spool, store)
    sender.start()
    for number in range(5):
        fill(spool, number)
        until(lambda: sender.counts().delivered == spool.last)
    assert delivered(store) == once(*range(5))
    sender.close(WAIT)


def test_reports_wait_for_others_but_not_for_a_flush(spool: Spool, store: Path) -> None:
    sender = sender_to(spool, store, linger=600.0, most=10)
    sender.start()
    fill(spool, *range(5))
    time.sleep(0.2)
    assert sender.counts().delivered == 0
    # Enough for a batch.
    fill(spool, *range(5, 10))
    until(lambda: sender.counts().delivered == 10)
    fill(spool, 10)
    assert sender.flush(WAIT)
    assert delivered(store) == once(*range(11))
    assert len(list(store.rglob("*.json"))) == 2
    sender.close(WAIT)


def test_many_threads_report_while_it_is_sent(spool: Spool, store: Path) -> None:
    sender = sender_to(spool, store, most=50)
    sender.start()
    threads = [
        threading.Thread(target=fill, args=(spool, *range(start, start + 200)))
        for start in range(0, 1600, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.close(WAIT)
    assert delivered(store) == once(*range(1600))


def test_a_store_on_which_a_second_try_would_be_a_second_object_is_refused(spool: Spool) -> None:
    with pytest.raises(UnsupportedOperation, match="only if it is absent"):
        Sender(spool, store_at("http://127.0.0.1:9/reports"))


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_lost_answers_deliver_nothing_twice_and_lose_nothing(
    seed: int, tmp_path: Path, store: Path
) -> None:
    faults = ("lost_answer", "refuse", "partial", "reset", "truncate", "flip")
    faulty: list[FaultyBackend] = []

    def wrap(backend: Any) -> FaultyBackend:
        # One for all calls: what happens depends on how often the same was asked.
        faulty[:] = faulty or [FaultyBackend(backend, seed, faults, 0.5)]
        return faulty[0]

    client = Wrapping(wrap, settings=impatient())
    for turn in range(4):
        spool = Spool(tmp_path / "spool", CLIENT, segment_bytes=2000)
        sender = sender_to(spool, store, client=client, most=4, wait_max=0.02)
        sender.start()
        fill(spool, *range(turn * 15, turn * 15 + 15))
        # The last one has all the time that it takes; the others are stopped midway.
        done = sender.close(WAIT if turn == 3 else 0.05)
        spool.close()
        assert done or turn < 3
    assert delivered(store) == once(*range(60))
    assert any(fault == "lost_answer" for _, _, fault in faulty[0].happened)


def test_answers_that_a_real_store_gave_and_the_network_lost(spool: Spool, s3: S3Store) -> None:
    lost: list[str] = []

    def script(request: Request) -> Fault | None:
        if request.method == "PUT" and len(lost) < 4:
            lost.append(request.target)
            return Fault("lost_answer")
        return None

    with FaultProxy(s3.server.endpoint, script, store="s3") as proxy:
        sender = sender_to(spool, s3.base, s3.through(proxy.endpoint), most=5)
        sender.start()
        fill(spool, *range(12))
        assert sender.close(WAIT)
    assert len(lost) == 4
    assert delivered(s3.base, s3.config) == once(*range(12))


def test_a_store_that_is_away_gets_everything_when_it_is_back(tmp_path: Path) -> None:
    with SeaweedFS() as server, server.bucket("away") as bucket:
        there = s3_store(server, bucket, "reports")
        spool = Spool(tmp_path / "spool", CLIENT, segment_bytes=2000)
        sender = sender_to(spool, there.base, there.config, most=7)
        sender.start()
        fill(spool, *range(10))
        assert sender.flush(WAIT)
        assert sender.counts().reachable
        server.halt()
        fill(spool, *range(10, 50))
        assert not sender.close(1.0)
        counts = sender.counts()
        assert counts.pending == 40
        assert counts.reachable is False
        assert counts.last_error
        spool.close()
        # The program starts again while the store is still away.
        spool = Spool(tmp_path / "spool", CLIENT, segment_bytes=2000)
        sender = sender_to(spool, there.base, there.config, most=7)
        sender.start()
        fill(spool, *range(50, 60))
        until(lambda: sender.counts().failures > 1)
        server.resume()
        assert sender.close(2 * WAIT)
        assert sender.counts().last_error is None
        spool.close()
        assert delivered(there.base, there.config) == once(*range(60))
        assert Reports(there.base, config=there.config).check().duplicates == 0


def test_killed_while_it_sends_to_a_real_store(tmp_path: Path, s3: S3Store) -> None:
    order = Order(
        str(tmp_path / "spool"),
        s3.base,
        str(tmp_path / "log"),
        config=_fields(s3),
        count=15,
        threaded=True,
    )
    killed = 0
    with Nursery() as nursery:
        for turn in range(8):
            # Somewhere in the calls of both threads.
            tick = None if turn == 7 else 25 + turn * 17
            status = nursery.run(replace(order, first=turn * 15, tick=tick))
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
        assert status == 0
    assert killed > 4
    taken = {int(line) for line in (tmp_path / "log").read_text().split()}
    found = delivered(s3.base, s3.config)
    assert found == dict.fromkeys(found, 1)
    assert found.keys() >= taken
    assert len(found.keys() - taken) <= killed


def _fields(there: S3Store) -> dict[str, Any]:
    config = there.config
    assert config is not None
    return {
        name: value.get_secret_value() if hasattr(value, "get_secret_value") else value
        for name, value in config
        if name in config.model_fields_set
    }


def test_a_store_that_is_away_is_not_stormed(spool: Spool, store: Path, gate: Gate) -> None:
    gate.error = away
    sender = sender_to(spool, store, client=gate.client(), wait_initial=0.1, wait_max=10.0)
    sender.start()
    end = time.monotonic() + 1.0
    number = 0
    while time.monotonic() < end:
        # New reports are no reason to hurry.
        fill(spool, number)
        number += 1
        time.sleep(0.005)
    assert 2 <= len(gate.writes) <= 6
    assert len(set(gate.writes)) == 1
    gate.error = lambda key: None
    before = time.monotonic()
    sender.wake()
    until(lambda: not sender.counts().pending)
    assert time.monotonic() - before < WAIT / 2
    sender.close(WAIT)
    assert delivered(store) == once(*range(number))


def test_who_is_in_a_hurry_waits_for_no_others_but_storms_no_store(
    spool: Spool, store: Path, gate: Gate
) -> None:
    sender = sender_to(
        spool, store, client=gate.client(), linger=600.0, wait_initial=0.2, wait_max=10.0
    )
    sender.start()
    for number in range(3):
        fill(spool, number)
        sender.hurry()
        until(lambda: sender.counts().delivered == spool.last)
    gate.error = away
    gate.writes.clear()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        fill(spool, 0)
        sender.hurry()
        time.sleep(0.005)
    assert 1 <= len(gate.writes) <= 3
    assert not sender.close(0.1)


def test_a_failure_is_told_once(
    spool: Spool, store: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = away
    sender = sender_to(spool, store, client=gate.client(), wait_initial=0.01, wait_max=0.01)
    sender.start()
    fill(spool, 1)
    until(lambda: sender.counts().failures > 5)
    assert caplog.text.count("cannot be delivered") == 1
    assert "nobody answers" in (sender.counts().last_error or "")
    assert not sender.close(0.1)


def test_a_fault_of_the_program_does_not_end_the_delivery(
    spool: Spool, store: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter([RuntimeError("oops")])
    gate.error = lambda key: next(faults, None)
    sender = sender_to(spool, store, client=gate.client())
    sender.start()
    fill(spool, 1)
    assert sender.flush(WAIT)
    assert "Traceback" in caplog.text
    assert delivered(store) == once(1)
    sender.close(WAIT)


def test_closing_takes_no_longer_than_it_may(spool: Spool, store: Path, gate: Gate) -> None:
    blocked = threading.Event()

    def block(_: str) -> None:
        blocked.wait(WAIT)

    gate.error = block
    sender = sender_to(spool, store, client=gate.client())
    sender.start()
    fill(spool, 1)
    until(lambda: gate.writes)
    before = time.monotonic()
    assert not sender.close(0.2)
    assert time.monotonic() - before < WAIT / 2
    spool.close()
    # What was under way ends, and is the same batch to the next program.
    blocked.set()
    assert sender._thread is not None
    sender._thread.join(WAIT)
    assert not sender._thread.is_alive()
    again = Spool(spool.folder, CLIENT)
    empty(sender_to(again, store))
    assert delivered(store) == once(1)
    again.close()


_LEAVE = """
import sys
from tests.integrations.spooling import *
spool = Spool(sys.argv[1], CLIENT)
sender = sender_to(spool, sys.argv[2], linger=600.0)
sender.start()
spool.append(observation(1))
"""


def test_a_program_that_closes_nothing_ends_and_loses_nothing(tmp_path: Path, store: Path) -> None:
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", _LEAVE, str(tmp_path / "spool"), str(store)],
        check=True,
        timeout=60,
        cwd=Path(storage.__file__).parents[1],
    )
    assert time.monotonic() - began < WAIT
    spool = Spool(tmp_path / "spool", CLIENT)
    empty(sender_to(spool, store))
    assert delivered(store) == once(1)
    spool.close()


def _use(sender: Sender) -> bool:
    sender.wake()
    sender.hurry()
    done = sender.flush(10.0) or sender.close(10.0)
    sender._end()
    return not done and not sender.counts().delivered


def test_a_forked_child_delivers_nothing_and_waits_for_nothing(spool: Spool, store: Path) -> None:
    sender = sender_to(spool, store, linger=600.0)
    sender.start()
    fill(spool, 1)
    # As if a thread of the parent were in the middle of it.
    with sender._changed:
        assert forked(partial(_use, sender))
    assert sender.close(WAIT)
    assert delivered(store) == once(1)


def test_a_sender_that_never_began_delivers_nothing(spool: Spool, store: Path) -> None:
    sender = sender_to(spool, store)
    fill(spool, 1)
    assert not sender.flush(0.1)
    assert not sender.close(0.1)
    assert spool.pending == 1


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [AuthenticationError("403: no"), TransferError("413: too large"), IntegrityError("odd")],
    ids=["forbidden", "too large", "odd"],
)
def test_a_batch_that_is_refused_does_not_hold_up_the_others(
    error: StorageError,
    spool: Spool,
    store: Path,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate.error = lambda key: error if "/0000000000000003-" in key else None
    sender = sender_to(spool, store, client=gate.client(), most=2, wait_max=0.02)
    sender.start()
    fill(spool, *range(8))
    until(lambda: not sender.counts().pending)
    assert not sender.flush(0.2)
    assert delivered(store) == once(0, 1, 4, 5, 6, 7)
    counts = sender.counts()
    assert (counts.aside, counts.delivered, counts.reachable) == (1, 6, True)
    assert "is refused and set aside, with 2 reports" in caplog.text
    assert len([key for key in gate.writes if "/0000000000000003-" in key]) >= 3
    assert Reports(store).check().missing == 2
    sender.close(WAIT)
    spool.close()
    # It is there for the next program, and that one succeeds.
    again = Spool(spool.folder, CLIENT)
    gate.error = lambda key: None
    sender = sender_to(again, store, client=gate.client())
    assert sender.counts().aside == 1
    sender.start()
    assert sender.close(WAIT)
    assert delivered(store) == once(*range(8))
    assert sender.counts() == module.Counts(0, 8, 0, 0, 0, None, True)
    assert Reports(store).check().missing == 0
    assert again.used < 2000
    again.close()


def test_what_was_set_aside_is_tried_again_after_a_while(
    spool: Spool, store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASIDE_WAIT", 0.2)
    gate.error = lambda key: AuthenticationError("403: no")
    sender = sender_to(spool, store, client=gate.client(), wait_max=0.02)
    sender.start()
    fill(spool, 1)
    until(lambda: sender.counts().aside)
    gate.error = lambda key: None
    until(lambda: not sender.counts().aside)
    assert delivered(store) == once(1)
    sender.close(WAIT)


def test_a_batch_that_was_set_aside_and_is_damaged_is_told(
    spool: Spool, store: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = lambda key: AuthenticationError("403: no")
    sender = sender_to(spool, store, client=gate.client())
    fill(spool, 1)
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            sender._step()
    (kept,) = (Path(spool.folder) / "aside").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    gate.error = lambda key: None
    sender._aside_at = 0
    empty(sender)
    assert "a file is damaged" in caplog.text
    assert (Path(spool.folder) / "damaged" / kept.name).exists()
    assert (spool.damaged, sender.counts().aside) == (1, 0)


def test_what_was_set_aside_is_not_sent_again_when_the_mark_is_lost(
    spool: Spool, store: Path, gate: Gate
) -> None:
    gate.error = lambda key: AuthenticationError("403: no") if "/0000000000000003-" in key else None
    sender = sender_to(spool, store, client=gate.client(), most=2)
    fill(spool, 1, 2, 3, 4)
    sender._step()
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            sender._step()
    assert sender.counts().aside == 1
    spool.close()
    (Path(spool.folder) / "mark").unlink()
    again = Spool(spool.folder, CLIENT)
    fill(again, 5)
    gate.error = lambda key: None
    empty(sender_to(again, store, client=gate.client(), most=5))
    assert delivered(store) == once(1, 2, 3, 4, 5)
    again.close()


def test_who_may_write_but_not_read_delivers_once(
    spool: Spool, store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(*_: object, **__: object) -> Any:
        raise AuthenticationError("403: no")

    monkeypatch.setattr(_Gated, "read", forbid, raising=False)
    monkeypatch.setattr(_Gated, "stat", forbid, raising=False)
    monkeypatch.setattr(_Gated, "list", forbid, raising=False)
    answers = iter([TransientError("lost")])
    gate.error = lambda key: next(answers, None)
    gate.is_applied = True
    sender = sender_to(spool, store, client=gate.client())
    sender.start()
    fill(spool, 1)
    assert sender.close(WAIT)
    assert len(gate.writes) == 2
    assert delivered(store) == once(1)


def test_who_may_not_list_goes_on_without_its_mark(
    spool: Spool,
    store: Path,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forbid(*_: object, **__: object) -> Any:
        raise AuthenticationError("403: no")

    fill(spool, 1, 2, 3)
    sender_to(spool, store, most=2)._step()
    spool.close()
    (Path(spool.folder) / "mark").unlink()
    again = Spool(spool.folder, CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(_Gated, "list", forbid, raising=False)
        empty(sender_to(again, store, client=gate.client()))
    assert "may be sent there once more" in caplog.text
    # It cannot know what is there; who reads it takes each record once all the same.
    assert [record.number for record in Reports(store).records()] == [1, 2, 3]
    assert Reports(store).check().duplicates == 2
    again.close()


def test_another_content_under_the_name_of_a_batch_is_told(
    spool: Spool, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 1)
    batch = Outgoing(spool).next(10)
    assert batch is not None
    (store / batch.name).parent.mkdir(parents=True)
    (store / batch.name).write_bytes(b"something else")
    sender = sender_to(spool, store)
    for _ in range(3):
        with pytest.raises(IntegrityError, match="another content than its name says"):
            sender._step()
    fill(spool, 2)
    empty(sender)
    assert sender.counts().aside == 1
    assert "set aside" in caplog.text


# -- damage between two tries ----------------------------------------------------------------


@pytest.mark.parametrize("was_delivered", [True, False])
@pytest.mark.parametrize("damaged", [(2,), (1, 2, 3)], ids=["one", "all"])
def test_damage_between_two_tries_delivers_nothing_twice(
    damaged: tuple[int, ...], was_delivered: bool, spool: Spool, store: Path, gate: Gate
) -> None:
    gate.is_applied = was_delivered
    gate.error = away
    sender = sender_to(spool, store, client=gate.client())
    fill(spool, 1, 2, 3)
    with pytest.raises(TransferError):
        sender._step()
    (path,) = (Path(spool.folder) / "segments").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    for at in damaged:
        lines[at] = b"f" + lines[at][1:-5] + b"0000\n"
    path.write_bytes(b"".join(lines))
    gate.error = lambda key: None
    fill(spool, 4)
    empty(sender)
    left = {1, 2, 3} if was_delivered else {1, 2, 3} - set(damaged)
    assert delivered(store) == once(*left, 4)
    assert spool.damaged == len(damaged)


# -- the reader ------------------------------------------------------------------------------


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


# -- all of it together ----------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """A program that reports, stops, and meets a store that fails: against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.store = self.folder / "store"
        self.gate = Gate()
        self.client = self.gate.client()
        self.taken: list[int] = []
        self.count = 0
        self.open()

    def open(self) -> None:
        self.spool = Spool(
            self.folder / "spool", CLIENT, segment_bytes=500, max_record=700, max_bytes=20_000
        )
        self.sender = sender_to(self.spool, self.store, client=self.client, most=3)

    @rule(size=st.sampled_from([0, 100, 300, 1000]))
    def report(self, size: int) -> None:
        self.count += 1
        try:
            self.spool.append(observation(self.count, size))
        except StorageError:
            return
        self.taken.append(self.count)

    @rule(
        fault=st.sampled_from([None, None, "away", "lost", "refused"]),
        steps=st.integers(1, 4),
    )
    def step(self, fault: str | None, steps: int) -> None:
        error = {
            None: None,
            "away": TransientError("away"),
            "lost": TransientError("lost"),
            "refused": AuthenticationError("403"),
        }[fault]
        self.gate.error = lambda key: error
        self.gate.is_applied = fault == "lost"
        for _ in range(steps):
            try:
                self.sender._step()
            except StorageError:
                assert error is not None
        self.gate.error = lambda key: None

    @rule(torn=st.booleans(), mark=st.sampled_from([None, None, None, 0, 1]))
    def reopen(self, torn: bool, mark: int | None) -> None:
        self.spool.close()
        segments = sorted((self.folder / "spool" / "segments").iterdir())
        if torn and segments:
            with open(segments[-1], "ab") as file:
                file.write(b"0badc0de {")
        if mark is not None:
            with open(self.folder / "spool" / "mark", "r+b") as file:
                file.seek(512 * mark)
                file.write(b"x")
        self.open()

    def teardown(self) -> None:
        import shutil

        self.gate.error = lambda key: None
        self.sender._aside_at = 0
        empty(self.sender)
        assert self.sender.counts().aside == 0
        assert self.spool.pending == 0
        self.spool.close()
        assert delivered(self.store) == once(*self.taken)
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
