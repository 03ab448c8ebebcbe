"""A limit on bytes per second: over all connections, both ways, by a clock of the test."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import storage.transfer.limits
from storage.backends.base import (
    Backend,
    BatchItem,
    Body,
    ByteRange,
    ObjectInfo,
    Payload,
    bytes_payload,
)
from storage.backends.memory import MemoryBackend
from storage.client import StorageClient
from storage.config import load_settings
from storage.transfer.download import fetch
from storage.transfer.engine import Budget
from storage.transfer.limits import RateLimiter, connections_at, limited
from storage.transfer.plan import Patterns, make_plan
from storage.transfer.progress import Meter
from storage.uri import parse_uri
from tests.servers import SeaweedFS
from tests.transfer.failing import DRIVERS, good
from tests.transfer.support import KIB, MIB, Wrapped, memory_bucket, options

RATE = 256 * KIB
STEP = RATE // 4
BURST = 0.25


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self._lock = threading.Lock()
        self._read = threading.local()

    def __call__(self) -> float:
        with self._lock:
            self._read.at = self.now
            return self.now

    @property
    def passed(self) -> float:
        return self() - 1000.0

    def sleep(self, seconds: float) -> None:
        with self._lock:
            # From when this thread looked at the clock: to come here takes it no time.
            woken = self._read.at + seconds
            self.sleeps.append(seconds)
        # Whoever sleeps meanwhile does so at the same time.
        time.sleep(0)
        with self._lock:
            self.now = max(self.now, woken)

    def limiter(self, rate: float = RATE) -> RateLimiter:
        return RateLimiter(rate, self, self.sleep)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def assert_paced(clock: Clock, moved: int, largest: int = STEP) -> None:
    """Check that ``moved`` bytes took their time, but for the last ones, and no more."""
    assert (moved - largest) / RATE - BURST <= clock.passed <= moved / RATE


def test_each_waits_for_those_before_it_and_not_for_itself(clock: Clock) -> None:
    limiter = clock.limiter(1000)
    times = []
    for count in (500, 500, 250, 1, 1000):
        limiter.take(count)
        times.append(clock.passed)
    assert times == pytest.approx([0.0, 0.25, 0.75, 1.0, 1.001])


def test_who_keeps_below_the_rate_never_waits(clock: Clock) -> None:
    limiter = clock.limiter(1000)
    for _ in range(100):
        limiter.take(100)
        clock.now += 0.1
    assert clock.sleeps == []


def test_a_quiet_time_saves_up_a_quarter_of_a_second_and_no_more(clock: Clock) -> None:
    limiter = clock.limiter(1000)
    clock.now += 3600
    taken = 0
    while not clock.sleeps:
        limiter.take(10)
        taken += 10
    # The last one before has nothing to wait for, and the last one waits.
    assert 250 < taken <= 250 + 2 * 10


def test_one_wait_is_one_sleep(clock: Clock) -> None:
    limiter = clock.limiter(1000)
    for _ in range(50):
        limiter.take(1000)
    assert len(clock.sleeps) == 49
    assert clock.passed == 48.75


def test_an_interrupt_ends_a_wait_and_the_others_go_on(clock: Clock) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    limiter = RateLimiter(1000, clock, interrupted)
    limiter.take(1000)
    with pytest.raises(KeyboardInterrupt):
        limiter.take(1000)
    clock.now += 1.75
    limiter.take(1000)


def test_threads_share_the_rate(clock: Clock) -> None:
    limiter = clock.limiter(1000)
    passed: list[tuple[float, int]] = []

    def work(count: int) -> None:
        for _ in range(20):
            limiter.take(count)
            passed.append((clock.passed, count))

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 10, 100, 250)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    total = 0
    for when, count in sorted(passed):
        assert total <= 1000 * (when + BURST) + 1e-6
        total += count
    assert total == 20 * 361


@pytest.mark.parametrize(
    ("rate", "connections"),
    [(None, 16), (100 * MIB, 16), (MIB, 4), (300 * KIB, 1), (1, 1)],
)
def test_a_slow_line_is_shared_by_few_connections(rate: int | None, connections: int) -> None:
    assert connections_at(rate, 16) == connections


# -- backends --------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Backend]:
    with memory_bucket() as backend:
        yield backend


def test_a_read_is_paced_in_steps(memory: Backend, clock: Clock) -> None:
    data = os.urandom(3 * MIB // 2 + 17)
    memory.write("a", bytes_payload(data))
    with limited(memory, clock.limiter()).read("a") as body:
        assert body.info == memory.stat("a")
        pieces = [bytes(piece) for piece in body]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) == STEP
    assert_paced(clock, len(data))


def test_a_read_of_a_range_passes_it_on(memory: Backend, clock: Clock) -> None:
    memory.write("a", bytes_payload(b"0123456789"))
    backend = limited(memory, clock.limiter())
    with backend.read("a", ByteRange(2, 5), backend.stat("a")) as body:
        assert b"".join(map(bytes, body)) == b"234"


def test_the_end_of_a_read_frees_its_connection(memory: Backend, clock: Clock) -> None:
    closed = []

    class Closing(Wrapped):
        def read(self, *args: Any) -> Body:
            body = self.inner.read(*args)
            return Body(body.info, iter(body), lambda: closed.append(True))

    memory.write("a", bytes_payload(bytes(MIB)))
    with limited(Closing(memory), clock.limiter()).read("a") as body:  # type: ignore[arg-type]
        next(iter(body))
        assert not closed
    assert closed == [True]


def test_a_write_is_paced_while_its_bytes_are_counted(memory: Backend, clock: Clock) -> None:
    data = os.urandom(4 * MIB)
    counts: list[int] = []
    payload = bytes_payload(data)
    opened: list[Payload] = []

    class Seeing(Wrapped):
        def write(self, key: str, payload: Payload, **more: Any) -> ObjectInfo:
            opened.append(payload)
            return self.inner.write(key, payload, **more)

    backend = limited(Seeing(memory), clock.limiter())  # type: ignore[arg-type]
    info = backend.write("a", payload, metadata={"owner": "me"}, on_bytes=counts.append)
    assert info.size == sum(counts) == len(data)
    assert memory.stat("a").metadata == {"owner": "me"}
    # A driver that looks for a file in it still finds it.
    assert opened == [payload]
    assert_paced(clock, len(data), largest=MIB)


def test_bytes_that_are_taken_back_have_moved(memory: Backend, clock: Clock) -> None:
    class Redirected(Wrapped):
        def write(self, key: str, payload: Payload, *, on_bytes: Any) -> ObjectInfo:
            for count in (RATE, -RATE, RATE, 0):
                on_bytes(count)
            return self.inner.write(key, payload, on_bytes=on_bytes)

    counts: list[int] = []
    limiter = clock.limiter()
    limited(Redirected(memory), limiter).write(  # type: ignore[arg-type]
        "a", bytes_payload(b""), on_bytes=counts.append
    )
    assert counts == [RATE, -RATE, RATE, 0]
    limiter.take(1)
    assert clock.passed == 2 - BURST


def test_a_write_of_many_is_paced(memory: Backend, clock: Clock) -> None:
    class Batch(Wrapped):
        def write_many(
            self,
            items: Sequence[BatchItem],
            *,
            if_absent: bool = False,
            on_bytes: Callable[[int], object] | None = None,
        ) -> list[ObjectInfo]:
            return [
                self.inner.write(item.key, item.payload, if_absent=if_absent, on_bytes=on_bytes)
                for item in items
            ]

    backend: Any = limited(Batch(memory), clock.limiter())  # type: ignore[arg-type]
    items = [BatchItem(name, bytes_payload(bytes(MIB))) for name in "abc"]
    assert [info.key for info in backend.write_many(items, if_absent=True)] == ["a", "b", "c"]
    assert_paced(clock, 3 * MIB, largest=MIB)


def test_everything_else_is_the_backends_own(memory: Backend, clock: Clock) -> None:
    memory.write("m/a", bytes_payload(b"x"))
    backend = limited(memory, clock.limiter(1))
    assert backend.name == memory.name
    assert backend.capabilities == memory.capabilities
    assert [info.key for info in backend.list("m/")] == ["m/a"]
    assert backend.local_path("m/a") == memory.local_path("m/a")
    backend.copy("m/a", "m/b")
    backend.delete(["m/a"])
    assert [info.key for info in memory.list()] == ["m/b"]
    assert clock.sleeps == []


def test_a_download_of_many_connections_is_paced(
    memory: Backend, clock: Clock, tmp_path: Path
) -> None:
    files = {f"m/{index}": os.urandom(200 * KIB + index) for index in range(12)}
    for key, data in files.items():
        memory.write(key, bytes_payload(data))
    backend = limited(memory, clock.limiter())
    plan = make_plan(backend, parse_uri("memory://any/m/"), Patterns(None, None))
    total = sum(map(len, files.values()))
    fetched = fetch(
        backend,
        plan,
        str(tmp_path),
        None,
        options=options(part_size=64 * KIB, connections=8),
        budget=Budget(8),
        meter=Meter("download", plan.uri, total, len(files), None),
    )
    assert len(fetched) == len(files)
    for key, data in files.items():
        assert (tmp_path / key.removeprefix("m/")).read_bytes() == data
    assert_paced(clock, total)


# -- the client ------------------------------------------------------------------------------


@pytest.fixture
def slow_client(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageClient]:
    """A client with a limit, on the test's clock."""
    monkeypatch.setattr(
        storage.transfer.limits,
        "RateLimiter",
        partial(RateLimiter, clock=clock, sleep=clock.sleep),
    )
    settings = load_settings(transfer={"limit_rate": RATE})
    with StorageClient(settings=settings) as client:
        yield client
    for name in ("limits-one", "limits-two"):
        MemoryBackend.clear(name)


def test_all_stores_of_a_client_share_its_limit(
    slow_client: StorageClient, clock: Clock, tmp_path: Path
) -> None:
    source = tmp_path / "model.bin"
    source.write_bytes(os.urandom(MIB))
    slow_client.upload(source, "memory://limits-one/model.bin")
    assert_paced(clock, MIB, largest=MIB)
    # Who expects a digest wants the bytes to pass through this machine.
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    slow_client.copy_object(
        f"memory://limits-one/model.bin#sha256={digest}", "memory://limits-two/model.bin"
    )
    assert_paced(clock, 3 * MIB, largest=MIB)
    dest = slow_client.download("memory://limits-two/model.bin", tmp_path / "copy.bin")
    assert Path(dest).read_bytes() == source.read_bytes()
    assert_paced(clock, 4 * MIB, largest=MIB)
    with slow_client.open("memory://limits-two/model.bin") as file:
        assert file.read() == source.read_bytes()
    assert_paced(clock, 5 * MIB, largest=MIB)


def test_what_is_on_this_machine_is_not_limited(
    slow_client: StorageClient, clock: Clock, tmp_path: Path
) -> None:
    source = tmp_path / "model.bin"
    source.write_bytes(bytes(2 * MIB))
    slow_client.download(str(source), tmp_path / "copy.bin")
    slow_client.upload(source, str(tmp_path / "other.bin"))
    assert clock.sleeps == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_our_own_waiting_is_no_stall_of_the_store(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path, driver: str
) -> None:
    # Four connections share the rate, so that a buffer of 1 MiB waits for about four seconds. A
    # stall is less than that, and more than it takes a busy machine to answer.
    data = os.urandom(9 * MIB // 2)
    limits = {
        "limit_rate": MIB,
        "part_size": MIB,
        "attempts": 1,
        "stall_timeout": 1.6,
        "connections": 4,
    }
    config = good(seaweedfs, driver)
    (tmp_path / "model.bin").write_bytes(data)
    uri = f"s3://{shared_bucket}/{prefix}/model.bin"
    with StorageClient(config) as client:
        # What is imported, and made by the store, for the first time is no part of it.
        client.upload(tmp_path / "model.bin", uri)
        client.download(uri, tmp_path / "warm.bin")
    with StorageClient(config, load_settings(transfer=limits)) as client:
        client.upload(tmp_path / "model.bin", uri)
        began = time.monotonic()
        path = client.download(uri, tmp_path / "copy.bin")
        seconds = time.monotonic() - began
    assert Path(path).read_bytes() == data
    # It cannot have been faster, however long it took.
    assert seconds >= (len(data) - 2 * STEP) / MIB - BURST
