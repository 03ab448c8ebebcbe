"""What a spool holds comes to the store, each record once, whatever stores and networks do."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import storage
from storage.errors import (
    UnsupportedOperation,
)
from storage.integrations.scaleout import records
from storage.integrations.scaleout import sender as module
from storage.integrations.scaleout.reporting import Reporting
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.sender import Sender
from storage.integrations.scaleout.spool import Spool
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from storage.testing.faulty_backend import FaultyBackend
from tests.cache.processes import forked
from tests.facade.conftest import any_store
from tests.facade.stores import S3Store, s3_config
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    WAIT,
    Gate,
    Nursery,
    Order,
    Wrapping,
    are_not_stormed,
    away,
    delivered,
    empty,
    fill,
    impatient,
    once,
    sender_to,
    start_idle,
    store_at,
    until,
)
from tests.servers import SeaweedFS


@pytest.fixture
def s3(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> S3Store:
    return s3_store(seaweedfs, shared_bucket, prefix)


def s3_store(server: SeaweedFS, bucket: str, prefix: str) -> S3Store:
    config = s3_config(server, "obstore")
    return S3Store("seaweedfs-obstore", server, "obstore", bucket, prefix, config)


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
    start_idle(sender)
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

    def was_lost() -> bool:
        return any(fault == "lost_answer" for _, _, fault in faulty[0].happened)

    client = Wrapping(wrap, settings=impatient())
    turns, is_last = 0, False
    while not is_last:
        # The faults go by the names of the batches, which are others each time: three turns are
        # enough nearly always.
        is_last = turns > 2 and (was_lost() or turns > 30)
        spool = Spool(tmp_path / "spool", CLIENT, segment_bytes=2000)
        sender = sender_to(spool, store, client=client, most=4, wait_max=0.02)
        sender.start()
        fill(spool, *range(turns * 15, turns * 15 + 15))
        turns += 1
        # The last one has all the time that it takes; the others are stopped midway.
        done = sender.close(WAIT if is_last else 0.05)
        spool.close()
        assert done or not is_last
    assert delivered(store) == once(*range(turns * 15))
    assert was_lost()


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
        until(lambda: sender.counts().reachable is False)
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
    began = time.monotonic()
    sender.start()
    number = 0
    while time.monotonic() < began + 1.0:
        # New reports are no reason to hurry.
        fill(spool, number)
        number += 1
        time.sleep(0.005)
    until(lambda: len(gate.writes) >= 2)
    assert are_not_stormed(len(gate.writes), 0.1, began)
    assert len(set(gate.writes)) == 1
    gate.error = lambda key: None
    sender.close(WAIT)
    assert delivered(store) == once(*range(number))


def test_a_sender_that_is_woken_waits_no_longer(spool: Spool, store: Path, gate: Gate) -> None:
    gate.error = away
    sender = sender_to(spool, store, client=gate.client(), wait_initial=600.0, wait_max=600.0)
    sender.start()
    fill(spool, 0)
    until(lambda: gate.writes)
    gate.error = lambda key: None
    sender.wake()
    until(lambda: not sender.counts().pending)
    assert delivered(store) == once(0)


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
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        fill(spool, 0)
        sender.hurry()
        time.sleep(0.005)
    until(lambda: gate.writes)
    assert are_not_stormed(len(gate.writes), 0.2, began)
    assert not sender.close(0.1)


class _Urgent(Reporting):
    """The reports of a client, each of a class that waits for no others."""

    def __init__(self, spool: Spool, sender: Sender) -> None:
        super().__init__()
        self.binding = SimpleNamespace(spool=spool, sender=sender)
        self._priorities = SimpleNamespace(is_urgent=lambda name: True)  # type: ignore[assignment]

    def _bound(self) -> Any:
        return self.binding

    def get_current_task_id(self) -> None:
        return None


def test_alerts_wait_for_no_others_but_storm_no_store(
    spool: Spool, store: Path, gate: Gate
) -> None:
    sender = sender_to(
        spool, store, client=gate.client(), linger=600.0, wait_initial=0.2, wait_max=10.0
    )
    sender.start()
    client = _Urgent(spool, sender)
    assert client.send_telemetry("alert", {"value": 1}, priority="alert")
    until(lambda: sender.counts().delivered == 1)
    gate.error = away
    gate.writes.clear()
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        assert client.send_telemetry("alert", {"value": 1}, priority="alert")
        time.sleep(0.005)
    until(lambda: gate.writes)
    assert are_not_stormed(len(gate.writes), 0.2, began)
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
from tests.integrations.scaleout_reports.support import *
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
        timeout=2 * WAIT,
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
