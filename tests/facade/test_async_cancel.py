"""A task that is cancelled ends its transfer soon, and nothing half is left of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import (
    ModelMissingError,
    Storage,
    StorageClient,
    StorageOperations,
    TransferError,
    awaitable,
    cancellation,
)
from storage.awaitable import THREADS, run_blocking
from storage.cache.locks import SourceLock
from storage.cancellation import CancellationToken, OperationCancelledError, cancellable
from storage.config import load_settings
from storage.errors import TransientError
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from storage.transfer import progress
from storage.transfer.engine import Budget, run_tasks
from storage.transfer.retry import RetryPolicy
from tests.facade.stores import BucketStore, S3Store, Store
from tests.servers.proxy import CountingProxy

MIB = 1024 * 1024
RATE = 16 * MIB
SIZE = 32 * MIB
SOON = 20.0
"""Seconds; whatever has to be given up takes longer here (``patient``)."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what does not end by itself waited for much longer than it should take."""
    monkeypatch.setattr(awaitable, "PATIENCE", 3 * SOON)


@pytest.fixture
def s3(make_store: Callable[[str], Store]) -> S3Store:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def slow(s3: S3Store) -> Iterator[FaultProxy]:
    """A slow way to the store."""
    with FaultProxy(s3.server.endpoint, link=Link(shared_rate=RATE), store="s3") as proxy:
        yield proxy


def busy_threads() -> list[str]:
    """Return the threads that transfers have; not those that wait for the next call."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("storage") and "await" not in name]


async def cancel_when(work: Awaitable[object], ready: Callable[[], bool]) -> None:
    """Cancel ``work``, a task too, as soon as ``ready``, and check that it ends soon."""
    task = asyncio.ensure_future(work)
    deadline = time.monotonic() + 60
    while not ready():
        assert not task.done(), task
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("dest", [False, True], ids=["cache", "destination"])
def test_a_cancelled_download_ends_and_the_next_one_goes_on_with_it(
    s3: S3Store, slow: FaultProxy, out: Path, dest: bool
) -> None:
    data = os.urandom(SIZE)
    s3.put_raw("model/weights", data)
    target = out / "model" if dest else None

    async def main() -> str:
        with StorageClient(s3.through(slow.endpoint)) as client:
            uri = s3.uri("model/")
            await cancel_when(client.adownload(uri, target), lambda: slow.bytes_down > 16 * MIB)
            assert busy_threads() == []
            assert not (out / "model").exists()
            came = slow.bytes_down
            assert came < SIZE
            path = await client.adownload(uri, target)
            # What was on its way when it was cancelled comes again.
            assert slow.bytes_down - came < SIZE - 8 * MIB
            return path

    path = asyncio.run(main())
    assert Path(path, "weights").read_bytes() == data
    assert [name for name in os.listdir(out) if name != "model"] == []


def test_a_time_limit_of_asyncio_ends_the_transfer(
    s3: S3Store, slow: FaultProxy, out: Path
) -> None:
    s3.put_raw("model.bin", bytes(SIZE))

    async def main() -> None:
        with StorageClient(s3.through(slow.endpoint)) as client:
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.adownload(s3.uri("model.bin"), out / "model.bin")
            assert time.monotonic() - began < 0.5 + SOON
            assert busy_threads() == []

    asyncio.run(main())
    assert not (out / "model.bin").exists()


def test_all_of_several_downloads_end(s3: S3Store, slow: FaultProxy, out: Path) -> None:
    for index in range(3):
        s3.put_raw(f"model-{index}", bytes(SIZE // 2))
    uris = [s3.uri(f"model-{index}") for index in range(3)]

    async def main() -> None:
        with StorageClient(s3.through(slow.endpoint)) as client:
            dests = [out / str(index) for index in range(3)]
            work = client.adownload_many(uris, dests)
            await cancel_when(work, lambda: slow.bytes_down > 4 * MIB)
            assert busy_threads() == []

    asyncio.run(main())
    assert [name for name in os.listdir(out) if not name.endswith(".partial")] == []


@pytest.mark.parametrize("name", ["seaweedfs-obstore", "seaweedfs-fsspec", "azurite-obstore"])
def test_a_cancelled_upload_leaves_no_object_and_no_parts(
    make_store: Callable[[str], Store], name: str, tmp_path: Path
) -> None:
    store = make_store(name)
    assert isinstance(store, BucketStore)
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(3 * SIZE)
    # What is in memory when it is cancelled still goes.
    settings = load_settings(transfer={"memory": "32MiB", "connections": 2})
    server = store.server
    with FaultProxy(server.endpoint, link=Link(shared_rate=2 * RATE)) as proxy:
        there = store.config.endpoint_url.replace(server.endpoint, proxy.endpoint)
        config = store.config.model_copy(update={"endpoint_url": there})

        def parts() -> list[tuple[str, str]]:
            # Azure has no list of uploads: blocks that were not put together go by themselves.
            if not isinstance(store, S3Store):
                return []
            pending: list[tuple[str, str]] = server.pending_uploads(store.bucket)
            return [each for each in pending if each[0].startswith(store._prefix)]

        async def main() -> None:
            with StorageClient(config, settings) as client:
                work = client.aupload(tmp_path / "weights", store.uri("weights"))
                await cancel_when(work, lambda: proxy.bytes_up > 8 * MIB)
                deadline = time.monotonic() + 60
                while (busy_threads() or parts()) and time.monotonic() < deadline:
                    await asyncio.sleep(0.1)

        asyncio.run(main())
        assert busy_threads() == []
        assert parts() == []
        assert proxy.bytes_up < 3 * SIZE
    assert store.keys() == []


def test_what_a_cancelled_upload_left_is_known_by_its_bytes_and_goes(
    s3: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may have begun an upload, and told nobody its name."""
    # Each part is told, however quick the store is.
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(SIZE)
    raw, token = s3.server.raw, CancellationToken()
    key = f"{s3._prefix}weights"

    def lose_an_upload(_: object) -> None:
        for name, upload in s3.server.pending_uploads(s3.bucket):
            named = {"Bucket": s3.bucket, "Key": key}
            parts = raw.list_parts(**named, UploadId=upload).get("Parts") if name == key else None
            if parts and not token.cancelled:
                size = next(part["Size"] for part in parts)
                lost = raw.create_multipart_upload(**named)["UploadId"]
                raw.upload_part(**named, UploadId=lost, PartNumber=1, Body=bytes(size))
                token.cancel()

    settings = load_settings(transfer={"memory": "16MiB", "connections": 1})
    with (
        StorageClient(s3.config, settings) as client,
        cancellable(token),
        pytest.raises(OperationCancelledError),
    ):
        client.upload(tmp_path / "weights", s3.uri("weights"), progress=lose_an_upload)
    assert [name for name, _ in s3.server.pending_uploads(s3.bucket) if name == key] == []
    assert s3.keys() == []


def test_a_cancelled_copy_between_stores_leaves_no_object(
    s3: S3Store, slow: FaultProxy, make_store: Callable[[str], Store]
) -> None:
    target = make_store("azurite-obstore")
    s3.put_raw("weights", bytes(SIZE))

    async def main() -> None:
        with StorageClient() as client:
            work = client.acopy_object(
                s3.uri("weights"),
                target.uri("weights"),
                config=s3.through(slow.endpoint),
                dest_config=target.config,
            )
            await cancel_when(work, lambda: slow.bytes_down > 8 * MIB)

    asyncio.run(main())
    assert target.keys() == []


def test_what_had_not_begun_never_begins() -> None:
    begun: list[int] = []
    free = threading.Event()

    async def main() -> None:
        full = [asyncio.ensure_future(run_blocking(free.wait)) for _ in range(THREADS)]
        waiting = asyncio.ensure_future(run_blocking(lambda: begun.append(1)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert time.monotonic() - began < SOON
        free.set()
        await asyncio.gather(*full)
        await run_blocking(lambda: None)

    asyncio.run(main())
    assert begun == []


def test_waiting_for_another_try_ends(s3: S3Store, out: Path) -> None:
    s3.put_raw("model", b"m")
    settings = load_settings(transfer={"throttle_wait": 3 * SOON, "retry_timeout": 9 * SOON})
    with CountingProxy(s3.server.endpoint, lambda *_: 503) as proxy:

        async def main() -> None:
            with StorageClient(s3.through(proxy.endpoint), settings) as client:
                work = asyncio.ensure_future(client.adownload(s3.uri("model"), out / "model"))
                while not proxy.count():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.7)
                assert not work.done()
                await cancel_when(work, lambda: True)
                assert busy_threads() == []

        asyncio.run(main())
        asked = proxy.count()
        time.sleep(0.5)
        assert proxy.count() == asked


def test_waiting_for_another_process_that_fetches_the_same_ends(s3: S3Store) -> None:
    s3.put_raw("model", b"m")

    async def main() -> None:
        with StorageClient(s3.config) as client:
            seen = asyncio.Event()
            path = await client.adownload(s3.uri("model"))
            locks = os.listdir(client.cache.upper.layout.locks)
            s3.put_raw("model", b"new")
            (name,) = [name for name in locks if name.endswith(".lock")]
            assert not seen.is_set()
            with SourceLock(os.path.join(client.cache.upper.layout.locks, name), timeout=5) as lock:
                assert lock.acquired
                work = asyncio.ensure_future(client.adownload(s3.uri("model")))
                await asyncio.sleep(0.7)
                assert not work.done()
                await cancel_when(work, lambda: True)
            assert Path(path).read_bytes() == b"m"
            assert Path(await client.adownload(s3.uri("model"))).read_bytes() == b"new"

    asyncio.run(main())


def test_a_store_that_says_nothing_is_not_waited_for_longer_than_a_moment(
    s3: S3Store, out: Path
) -> None:
    s3.put_raw("model", bytes(SIZE))
    with FaultProxy(s3.server.endpoint, link=Link(rate=1000), store="s3") as proxy:
        settings = load_settings(transfer={"stall_timeout": 12})

        async def main() -> None:
            with StorageClient(s3.through(proxy.endpoint), settings) as client:
                work = client.adownload(s3.uri("model"), out / "model")
                task = asyncio.ensure_future(work)
                await asyncio.sleep(0.5)
                task.cancel()
                await asyncio.sleep(0)
                began = time.monotonic()
                # The second time it is not waited for at all.
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - began < 5  # the request takes 12

        asyncio.run(main())
    deadline = time.monotonic() + 60
    while os.listdir(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.listdir(out) == []


def test_reading_that_is_cancelled_leaves_the_position(s3: S3Store, slow: FaultProxy) -> None:
    data = os.urandom(SIZE)
    s3.put_raw("weights", data)

    async def main() -> None:
        async with (
            StorageClient(s3.through(slow.endpoint)) as client,
            client.aopen(s3.uri("weights")) as file,
        ):
            assert await file.read(1000) == data[:1000]
            work = file.read(SIZE)
            before = slow.bytes_down
            await cancel_when(work, lambda: slow.bytes_down > before + 4 * MIB)
            assert await file.tell() == 1000
            assert await file.read(1000) == data[1000:2000]

    asyncio.run(main())


def test_a_file_that_nobody_waits_for_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    go_on = threading.Event()
    client = StorageClient()
    plain = client.open

    def late(*args: Any, **kwargs: Any) -> Any:
        file = plain(*args, **kwargs)
        opened.append(file)
        go_on.wait(60)
        return file

    monkeypatch.setattr(client, "open", late)

    async def main() -> None:
        async def opening() -> None:
            await client.aopen("memory://cancel/new", "wb")

        task = asyncio.ensure_future(opening())
        while not opened:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    # By its thread, a moment after the task has ended.
    deadline = time.monotonic() + 60
    while not opened[0].closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ModelMissingError):
        StorageOperations.list_objects("memory://cancel/new")


def test_cancelling_is_no_reason_to_ask_the_next_source_or_the_cache(
    s3: S3Store, slow: FaultProxy, out: Path
) -> None:
    s3.put_raw("first", bytes(SIZE))
    with Storage.open("memory://cancel/second", "wb") as file:
        file.write(b"second")

    async def main() -> None:
        with StorageClient(s3.through(slow.endpoint)) as client:
            sources = [s3.uri("first"), "memory://cancel/second"]
            work = client.adownload(sources, out / "model", offline="auto")
            await cancel_when(work, lambda: slow.bytes_down > MIB)

    asyncio.run(main())
    assert not (out / "model").exists()


# -- the token -------------------------------------------------------------------------------


def test_without_a_token_nothing_is_cancelled() -> None:
    cancellation.check()
    cancellation.pause(0)
    assert cancellation.current() is None


def test_waiting_for_a_connection_that_others_hold_ends() -> None:
    token, budget = CancellationToken(), Budget(1)
    threading.Timer(0.1, token.cancel).start()
    ran: list[int] = []
    with budget, cancellable(token), pytest.raises(OperationCancelledError):
        run_tasks([lambda _: ran.append(1)], budget, 1)
    assert ran == []


def test_whoever_started_the_work_and_whoever_runs_it_may_cancel_it() -> None:
    for index in range(2):
        tokens = CancellationToken(), CancellationToken()
        with cancellable(tokens[0]), cancellation.also(tokens[1]):
            cancellation.check()
            tokens[index].cancel()
            with pytest.raises(OperationCancelledError):
                cancellation.pause(30)
            with cancellable(None):
                cancellation.check()
            event = threading.Event()
            with cancellation.linked(event):
                assert event.is_set()


def test_work_that_is_cancelled_begins_no_further_task_and_no_further_try() -> None:
    token = CancellationToken()
    tasks: list[int] = []
    tries: list[int] = []

    def step() -> None:
        tries.append(1)
        token.cancel()
        raise TransientError("not now")

    def task(cancel: threading.Event) -> None:
        tasks.append(1)
        token.cancel()
        assert cancel.wait(5)

    with cancellable(token):
        with pytest.raises(OperationCancelledError):
            run_tasks([task] * 10, Budget(1), 1)
        assert len(tasks) == 1
        token = CancellationToken()
    with cancellable(token), pytest.raises((OperationCancelledError, TransferError)):
        RetryPolicy(wait_initial=30).run(step)
    assert len(tries) == 1
    with cancellable(token), pytest.raises(OperationCancelledError):
        RetryPolicy().run(step)
    assert len(tries) == 1
