"""Mirrors: workers that die, and what they are told."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import (
    MirrorError,
    MirrorResult,
    S3Config,
    StorageClient,
    StorageOperations,
    cancellation,
)
from storage.client.mirror import batch as batches
from storage.config import reveal
from storage.config.settings import load_settings
from storage.transfer.progress import Progress
from tests.facade.mirror.support import (
    Counting,
    content,
    counts,
    many,
    mirror,
)
from tests.facade.stores import BucketStore, Store

# A process that has threads is forked on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

# -- workers that die ------------------------------------------------------------------------


def _die_once(marker: str, batch: batches.Batch) -> Any:
    """Do a part of a batch; the first process that comes by dies then."""
    part = batches.Batch(f"{batch.name}-part", batch.ends, batch.items[:2])
    batches.run_batch(part)
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return batches.run_batch(batch)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _die(marker: str, batch: batches.Batch) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(ProcessPoolExecutor):
    """Does something else than a batch."""

    def __init__(self, instead: Any, method: str = "fork") -> None:
        super().__init__(2, mp_context=multiprocessing.get_context(method))
        self._instead = instead

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._instead, *args, **kwargs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_batches_of_a_process_that_was_killed_are_done_by_others(
    make_store: Callable[[str], Store], tmp_path: Path, method: str
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(40)
    one.put_all(files)
    instead = partial(_die_once, str(tmp_path / "died"))
    made: list[Executor] = []

    def make() -> Executor:
        made.append(Deadly(instead, method))
        return made[-1]

    told: list[Progress] = []
    result = mirror(one, two, executor=make, batch_size=10, progress=told.append)
    assert (tmp_path / "died").exists()
    assert len(made) == 2
    assert 1 <= result.resubmitted <= 4
    # The dead one had copied two at least; whoever comes next finds them in place.
    assert result.copied + result.skipped == 40
    assert result.skipped >= 2
    assert result.bytes == 300 * result.copied
    assert content(two) == files
    assert (told[-1].objects_done, told[-1].bytes_done) == (40, 40 * 300)
    for pool in made:
        with pytest.raises((RuntimeError, BrokenProcessPool)):
            pool.submit(os.getpid)


def test_a_broken_executor_that_cannot_be_made_again_ends_the_mirror_with_what_is_done(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    files = many(40)
    one.put_all(files)
    with (
        Deadly(partial(_die_once, str(tmp_path / "died"))) as pool,
        pytest.raises(MirrorError, match="pass a function that makes it") as caught,
    ):
        mirror(one, two, executor=pool, batch_size=10)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert result.failed == 0
    assert result.copied + result.skipped < 40
    # The dead one could not remove what it was writing; nobody lists or reads that.
    held = {path: data for path, data in content(two).items() if not path.endswith(".partial")}
    assert held.items() <= files.items()
    assert StorageOperations.list_objects(two.base) == sorted(held)
    again = mirror(one, two)
    assert again.copied + again.skipped == 40
    assert again.skipped == len(held) >= 2
    assert {path: two.get_raw(path) for path in files} == files


def test_a_batch_that_kills_whoever_does_it_is_given_up(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("file"), make_store("pvc")
    one.put_all({"a": b"1", "b": b"2"})
    made: list[Executor] = []

    def make() -> Executor:
        made.append(Deadly(partial(_die, "")))
        return made[-1]

    with pytest.raises(MirrorError, match="brought no result, 4 times") as caught:
        mirror(one, two, executor=make)
    assert [one.error for one in caught.value.result.failures] == ["WorkerLost"] * 2  # type: ignore[attr-defined]
    assert len(made) == 4


def test_doing_a_batch_twice_at_once_is_as_good_as_once(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(30)
    one.put_all(files)

    class Twice(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            super().submit(fn, *args, **kwargs)
            return super().submit(fn, *args, **kwargs)

    with Twice(4) as pool:
        assert counts(mirror(one, two, executor=pool, batch_size=5))[3] == 0
    assert content(two) == files


def test_an_interrupt_gives_out_no_more_work(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("memory"), make_store("memory")
    one.put_all(many(200, 3))
    main = threading.main_thread().ident
    assert main is not None
    given = Counting()

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with given, pytest.raises(KeyboardInterrupt):
        mirror(one, two, executor=given, batch_size=5, in_flight=2, progress=interrupt)
    assert len(given.sizes) < 10
    assert counts(mirror(one, two))[3] == 0
    assert content(two) == content(one)


# -- secrets ---------------------------------------------------------------------------------


def test_batches_carry_secrets_and_show_none(
    make_store: Callable[[str], Store], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    assert isinstance(one, BucketStore)
    one.put_all({"a": b"1", "b": b"2"})
    secrets = [reveal(one.config.secret_access_key), reveal(two.config.account_key)]
    seen: list[batches.Batch] = []

    class Watching(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            seen.append(args[0])
            return super().submit(fn, pickle.loads(pickle.dumps(args[0])), **kwargs)

    wrong = S3Config("AKIDEXAMPLE", "a secret that is wrong", endpoint_url=one.server.endpoint)
    with caplog.at_level(logging.DEBUG), Watching(1) as pool:
        result = mirror(one, two, executor=pool)
        with pytest.raises(Exception, match="s3://") as caught:
            StorageOperations.mirror(
                one.base, two.uri("x"), config=wrong, dest_config=two.config, executor=pool
            )
    carried = pickle.dumps(seen[0])
    for secret in secrets:
        assert secret.encode() in carried
        for text in (repr(seen), str(seen), repr(result), caplog.text, str(caught.value)):
            assert secret not in text
    assert "a secret that is wrong" not in f"{caught.value!r}{caplog.text}"


def test_limits_and_named_stores_of_the_client_hold_for_its_workers(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own environment knows neither."""
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    one.put_all({"a": b"1"})
    fields = {
        name: reveal(value)
        for name, value in one.config
        if name in one.config.model_fields_set and value is not None
    }
    settings = load_settings(
        transfer={"connections": 3, "attempts": 2},
        stores={"main": {"prefix": one.base, "type": "s3", **fields}},
    )
    seen: list[batches.Batch] = []

    class Watching(ProcessPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            seen.append(args[0])
            return super().submit(fn, *args, **kwargs)

    with (
        StorageClient(settings=settings) as client,
        Watching(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        assert counts(client.mirror(one.base, two.base, executor=pool)) == (1, 0, 0, 0)
    assert content(two) == {"a": b"1"}
    assert (seen[0].ends.transfer.connections, seen[0].ends.transfer.attempts) == (3, 2)


def test_a_cancelled_mirror_gives_out_no_more_work(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("memory"), make_store("file")
    one.put_all(many(300, 3))
    with Counting() as pool:

        async def run() -> None:
            task: asyncio.Task[Any]

            def cancel(progress: Progress) -> None:
                loop.call_soon_threadsafe(task.cancel)
                # However late the loop is: the work goes on when it was told.
                token = cancellation.current()
                assert token is not None
                assert token.wait(60)

            loop = asyncio.get_running_loop()
            task = asyncio.ensure_future(
                StorageOperations.amirror(
                    one.base, two.base, executor=pool, batch_size=5, in_flight=2, progress=cancel
                )
            )
            await task

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
        assert len(pool.sizes) < 20
    assert counts(mirror(one, two))[3] == 0
    assert content(two) == content(one)
