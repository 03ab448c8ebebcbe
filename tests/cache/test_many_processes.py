"""Many ask for one model at once: it comes once, and all get it right, with locks or without."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage import OfflineError
from storage.cache import gc
from storage.cache.verify import verify
from tests.cache.askers import Order, ask_at_once
from tests.cache.conftest import MakeClient
from tests.cache.nursery import Child, Job, Model, Nursery, fingerprint
from tests.cache.processes import without_locks
from tests.cache.support import S3Source, blob_files, make_source, wrong_blobs
from tests.cache.worker import TIMEOUT

MIB = 1024 * 1024
COUNT = 10
NAMES = ("a.bin", "b.bin", "sub/c.bin", "sub/d.bin")
SMALL = {"config.json": b"{}"}


@pytest.fixture(scope="module")
def nursery(_isolated_session: None) -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> S3Source:
    found = make_source(request, "s3")
    assert isinstance(found, S3Source)
    return found


def content(name: str, size: int) -> bytes:
    """Return cheap content in which no two ranges that are asked for are the same."""
    block = random.Random(name).randbytes(min(size, MIB + 4099))
    return (block * (size // len(block) + 1))[:size]


def put_model(bucket: S3Source, size: int) -> dict[str, str]:
    """Store a model of so many bytes in several files; return its fingerprint."""
    found: dict[str, str] = {}
    for name in NAMES:
        data = content(name, size // len(NAMES))
        bucket.put_file(f"model/{name}", data)
        found |= fingerprint({name: data})
    return found


def assert_clean(cache: Path, make_client: MakeClient, models: int = 1) -> None:
    """See that everything in the cache is right, and that nothing is left but that."""
    client = make_client(cache_dir=cache)
    report = verify(client.cache, full=True)
    assert report.problems == ()
    assert wrong_blobs(cache) == []
    assert len(blob_files(cache)) == report.checked
    layout = client.cache.upper.layout
    for folder, count in (
        (layout.partial, 0),
        (layout.quarantine, 0),
        (layout.snapshots, models),
        (layout.manifests, models),
    ):
        assert len(os.listdir(folder) if os.path.isdir(folder) else ()) == count, folder
    gc.collect(client.cache, grace=0)
    client.cache.close()
    assert os.listdir(cache / "leases") == []


# -- one fetches ---------------------------------------------------------------------------


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "dests"),
    [
        ("threads", 3),
        ("forked", 0),
        pytest.param("spawned", 0, marks=slow),
        pytest.param("forked after use", 3, marks=slow),
        pytest.param("spawned", 3, marks=slow),
    ],
)
def test_the_server_sees_each_body_once_when_ten_ask_at_once(
    bucket: S3Source, cache: Path, tmp_path: Path, make_client: MakeClient, how: str, dests: int
) -> None:
    ask_ten(bucket, cache, tmp_path, make_client, how, dests, 32 * MIB)


@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("how", "dests"), [("forked", 0), ("spawned", 3), ("threads", 0)])
def test_the_server_sees_each_body_once_when_ten_ask_for_a_gibibyte(
    bucket: S3Source, cache: Path, tmp_path: Path, make_client: MakeClient, how: str, dests: int
) -> None:
    ask_ten(bucket, cache, tmp_path, make_client, how, dests, 1024 * MIB)


def ask_ten(
    bucket: S3Source,
    cache: Path,
    folder: Path,
    make_client: MakeClient,
    how: str,
    dests: int,
    size: int,
) -> None:
    files = put_model(bucket, size)
    other = bucket.put_model(SMALL, "other")
    bucket.forget()
    places = [str(folder / f"dest-{number}") for number in range(dests)]
    order = Order(
        how, bucket.uri("model"), bucket.fields, [*places, *[None] * (COUNT - dests)], other
    )
    answers = ask_at_once(order, cache)
    for answer in answers:
        assert answer.files == files
    assert len({answer.pid for answer in answers}) == (1 if how == "threads" else COUNT)
    assert [answer.path for answer in answers[:dests]] == places
    (path,) = {answer.path for answer in answers[dests:]}
    assert Path(path).is_relative_to(cache)
    asked_first = bucket.sizes("other") if how == "forked after use" else {}
    assert bucket.fetched == bucket.sizes() | asked_first
    assert sum(bucket.sizes().values()) == size
    assert_clean(cache, make_client, 1 + len(asked_first))


@without_locks
def test_without_locks_the_trees_are_right_all_the_same(
    bucket: S3Source, nursery: Nursery, cache: Path, make_client: MakeClient, locks: int | None
) -> None:
    files = put_model(bucket, 4 * MIB)
    model = Model(bucket.uri("model"), [files], bucket.fields)
    job = Job(
        str(cache), [model], steps=2, hold=2, flock="no-op" if locks is None else locks, seed=1
    )
    bucket.forget()
    outcomes = nursery.run(*[job] * COUNT)
    paths = set()
    for outcome in outcomes:
        assert (outcome.wrong, outcome.errors) == ([], [])
        paths |= {step["path"] for step in outcome.steps}
    assert len(paths) == 1
    assert bucket.fetched.keys() == bucket.sizes().keys()
    assert_clean(cache, make_client)


# -- the one who fetches goes away ---------------------------------------------------------


class Gate:
    """Lets the first file pass, and keeps whoever wants another one waiting until it opens."""

    def __init__(self, bucket: S3Source) -> None:
        self.listings = 0
        self._opened = threading.Event()
        self._late = False
        self._changed = threading.Condition()
        bucket.proxy.fault = self._pass

    def _pass(self, number: int, method: str, path: str) -> int | None:
        if "list-type" in path:
            with self._changed:
                self.listings += 1
                self._changed.notify_all()
            return None
        if method != "GET" or path.partition("?")[0].endswith(NAMES[0]):
            return None
        if not self._late:
            # Longer than any child lives: who waits here for ever is to be found out.
            assert self._opened.wait(2 * TIMEOUT)
            # Whoever asked may not be there any more, and would be counted nevertheless.
            return 503
        return None

    def wait_for_listings(self, count: int) -> None:
        """Wait until so many have asked what there is."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.listings >= count, 120)

    def let_newcomers_pass(self) -> None:
        """Let everybody pass who asks from now on."""
        self._late = True

    def open(self) -> None:
        """Do that, and let those who wait ask again."""
        self._late = True
        self._opened.set()


@pytest.fixture
def gate(bucket: S3Source) -> Iterator[Gate]:
    found = Gate(bucket)
    yield found
    found.open()


def wait_for_part(make_client: MakeClient, model: Model) -> None:
    """Wait until the cache knows one file of a model."""
    client = make_client()
    deadline = time.monotonic() + 120
    while True:
        with pytest.raises(OfflineError) as caught:
            client.download(model.uri, config=model.config, offline=True)
        if f"only in part: 1 of {len(NAMES)} files" in str(caught.value):
            return
        assert time.monotonic() < deadline, str(caught.value)
        time.sleep(0.01)


def begin(
    gate: Gate, nursery: Nursery, make_client: MakeClient, job: Job, waiting: Job
) -> tuple[Child, list[Child]]:
    """Let one child fetch and the others wait for it; return both."""
    holder = nursery.start(job)
    wait_for_part(make_client, job.models[0])
    others = [nursery.start(waiting) for _ in range(COUNT - 1)]
    gate.wait_for_listings(COUNT)
    return holder, others


def test_when_the_one_who_fetches_is_killed_another_one_goes_on_from_there(
    bucket: S3Source, gate: Gate, nursery: Nursery, cache: Path, make_client: MakeClient
) -> None:
    files = put_model(bucket, 4 * 9 * MIB)
    job = Job(str(cache), [Model(bucket.uri("model"), [files], bucket.fields)], steps=1)
    holder, others = begin(gate, nursery, make_client, job, job)
    holder.kill()
    assert holder.wait().signal == signal.SIGKILL
    bucket.forget()
    gate.open()
    for other in others:
        outcome = other.wait()
        assert (outcome.wrong, outcome.errors, len(outcome.steps)) == ([], [], 1)
    left = {path: size for path, size in bucket.sizes().items() if not path.endswith(NAMES[0])}
    assert bucket.fetched == left
    gc.collect(make_client().cache, grace=0)
    assert_clean(cache, make_client)


def test_nobody_waits_for_one_who_is_stopped_and_he_goes_on_in_the_end(
    bucket: S3Source, gate: Gate, nursery: Nursery, cache: Path, make_client: MakeClient
) -> None:
    files = put_model(bucket, 4 * MIB)
    job = Job(str(cache), [Model(bucket.uri("model"), [files], bucket.fields)], steps=1)
    # They are soon tired of waiting, for the gate too, and never of trying again.
    impatience = {"STORAGE_TRANSFER__STALL_TIMEOUT": "1", "STORAGE_TRANSFER__ATTEMPTS": "1000"}
    holder, others = begin(gate, nursery, make_client, job, replace(job, environment=impatience))
    stopped = time.monotonic()
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        gate.open()
        outcomes = [other.wait() for other in others]
        # With the usual patience they would wait for him for a minute.
        assert time.monotonic() - stopped < 50
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    for outcome in (*outcomes, holder.wait()):
        assert (outcome.wrong, outcome.errors, len(outcome.steps)) == ([], [], 1)
    assert_clean(cache, make_client)


def test_who_waits_goes_on_by_himself_after_the_time_of_the_settings(
    bucket: S3Source, gate: Gate, nursery: Nursery, cache: Path, make_client: MakeClient
) -> None:
    files = put_model(bucket, 4 * MIB)
    # Nobody stalls: the one who fetches just takes long.
    job = Job(
        str(cache),
        [Model(bucket.uri("model"), [files], bucket.fields)],
        steps=1,
        environment={"STORAGE_TRANSFER__STALL_TIMEOUT": "300"},
    )
    holder = nursery.start(job)
    wait_for_part(make_client, job.models[0])
    gate.let_newcomers_pass()
    hasty = nursery.start(
        replace(job, environment=job.environment | {"STORAGE_CACHE_LOCK_TIMEOUT": "0.1"})
    )
    for child in (hasty, holder):
        outcome = child.wait()
        gate.open()
        assert (outcome.wrong, outcome.errors, len(outcome.steps)) == ([], [], 1)
    assert_clean(cache, make_client)
