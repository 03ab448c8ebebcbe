"""Coroutines use the same client: each blocking method has a form to be awaited."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, assert_type

import pytest

import storage
from storage import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    Storage,
    StorageClient,
    StorageOperations,
    UnsupportedScheme,
)
from storage.awaitable import THREADS, run_blocking
from storage.client.asynchronous import AsyncFile, AsyncOpening
from storage.client.base import ClientBase
from storage.client.lockfile import LockFile
from storage.config import reveal
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from storage.transfer.progress import Progress
from tests.facade.stores import S3Store, Store

MIB = 1024 * 1024

# What never waits for a store, a disk or an import; and what is for the parts of the library.
NOT_BLOCKING = {
    StorageClient: set(),
    Storage: {"is_local", "get_storage_spec"},
    StorageOperations: set(),
}


def public_methods(owner: type) -> dict[str, Callable[..., Any]]:
    return {
        name: getattr(owner, name)
        for name, value in vars(owner).items()
        if not name.startswith("_") and not isinstance(value, property)
    }


@pytest.mark.parametrize("owner", [StorageClient, Storage, StorageOperations])
def test_every_public_blocking_method_has_a_form_to_be_awaited(owner: type) -> None:
    methods = public_methods(owner)
    blocking = {name for name in methods if f"a{name}" in methods or name[0] != "a"}
    blocking -= NOT_BLOCKING[owner]
    assert blocking
    for name in sorted(blocking):
        assert f"a{name}" in methods, f"{owner.__name__}.{name} has no form to be awaited"
        form, plain = methods[f"a{name}"], methods[name]
        assert form.__name__ == f"a{name}"
        assert form.__qualname__ == f"{owner.__name__}.a{name}"
        assert form.__module__ == plain.__module__
        assert form.__doc__
        if name == "open":
            assert inspect.signature(form).parameters == inspect.signature(plain).parameters
            continue
        assert inspect.iscoroutinefunction(form), f"{owner.__name__}.a{name}"
        # Parameters, defaults, annotations, and what is returned.
        assert inspect.signature(form) == inspect.signature(plain)


def test_a_client_can_be_closed_by_a_coroutine() -> None:
    assert inspect.iscoroutinefunction(ClientBase.aclose)


def test_types_are_those_of_the_blocking_methods(tmp_path: Path) -> None:
    """Also read by the type checker: that is what ``assert_type`` is for."""

    async def use(client: StorageClient, lock: LockFile) -> None:
        assert_type(await client.adownload("memory://m/a"), str)
        assert_type(await client.adownload_many(["memory://m/a"]), list[str])
        assert_type(await client.adownload_locked(lock, "memory://m/a"), str)
        assert_type(await client.adownload_locked(lock), list[str])
        assert_type(await client.aupload(tmp_path, "memory://m/c"), bool)
        assert_type(await client.alist_objects("memory://m/"), list[str])
        assert_type(await Storage.adownload("memory://m/a"), str)
        assert_type(await Storage.adownload_locked(lock, "memory://m/a"), str)
        assert_type(await Storage.adownload_locked(lock), list[str])
        assert_type(await StorageOperations.adelete_object("memory://m/a"), bool)
        assert_type(client.aopen("memory://m/a"), AsyncOpening)
        async with client.aopen("memory://m/a") as file:
            assert_type(file, AsyncFile)
            assert_type(await file.read(), bytes)

    assert inspect.iscoroutinefunction(use)


@pytest.mark.parametrize(
    "name", ["memory", "file", "seaweedfs-obstore", "gcs-fsspec", "azurite-obstore", "hub"]
)
def test_a_model_goes_to_a_store_and_back(
    make_store: Callable[[str], Store], name: str, tmp_path: Path
) -> None:
    store = make_store(name)
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    (source / "a").write_bytes(b"first\nsecond\n")
    (source / "b" / "c").write_bytes(b"c" * 300_000)

    async def use(client: StorageClient) -> None:
        uri = store.uri("model")
        assert await client.aupload(source, uri) is True
        assert await client.alist_objects(uri) == ["a", "b/c"]
        assert (await client.aget_object_metadata(f"{uri}/a"))["size"] == 13
        path = Path(await client.adownload(uri, tmp_path / "back"))
        assert (path / "b" / "c").read_bytes() == b"c" * 300_000
        kept, again = await client.adownload_many([uri, f"{uri}/a"])
        assert Path(again).read_bytes() == b"first\nsecond\n"
        assert os.path.isdir(kept)
        if name != "hub":
            assert await client.acopy_object(f"{uri}/a", store.uri("copy")) is True
            assert await client.adelete_object(f"{uri}/a") is True
            assert await client.alist_objects(uri) == ["b/c"]
        async with client.aopen(f"{uri}/b/c") as file:
            assert await file.seek(-3, os.SEEK_END) == 299_997
            assert await file.read() == b"ccc"
        with pytest.raises(ModelMissingError):
            await client.adownload(store.uri("nothing"))

    async def main() -> None:
        async with StorageClient(store.config) as client:
            await use(client)

    asyncio.run(main())


def test_facades_have_the_same_forms(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")

    async def main() -> None:
        await Storage.aupload(tmp_path / "a", "memory://facade/a")
        lock = await Storage.alock("memory://facade/a")
        assert await Storage.adownload_locked(lock, "memory://facade/a")
        assert await StorageOperations.alist_objects("memory://facade/") == ["a"]
        assert (await StorageOperations.aget_object_metadata("memory://facade/a"))["size"] == 1
        await StorageOperations.acopy_object("memory://facade/a", "memory://facade/b")
        assert await StorageOperations.adelete_object("memory://facade/", recursive=True)
        with pytest.raises(UnsupportedScheme):
            await Storage.afilesystem("nothing://like/it")

    asyncio.run(main())


def test_a_subclass_that_changes_a_method_has_changed_both_forms() -> None:
    class Mine(StorageClient):
        def list_objects(self, uri: Any, *, config: Any = None) -> list[str]:
            return ["mine"]

    assert asyncio.run(Mine().alist_objects("memory://m/")) == ["mine"]


# -- files -----------------------------------------------------------------------------------


def test_a_file_is_read_as_the_blocking_one_is() -> None:
    with Storage.open("memory://files/text", "wb") as made:
        made.write(b"one\ntwo\nthree")

    async def main() -> None:
        file = await Storage.aopen("memory://files/text")
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert await file.readline() == b"one\n"
        assert await file.tell() == 4
        assert [line async for line in file] == [b"two\n", b"three"]
        await file.seek(0)
        buffer = bytearray(5)
        assert await file.readinto(buffer) == 5
        assert buffer == b"one\nt"
        assert await asyncio.gather(*(file.read(1) for _ in range(3))) != [b"", b"", b""]
        await file.close()
        assert file.closed
        with pytest.raises(ValueError, match="closed"):
            await file.read()
        with pytest.raises(ModelMissingError):
            await Storage.aopen("memory://files/nothing")
        with pytest.raises(InvalidInput):
            async with Storage.aopen("memory://files/text", "r+"):  # type: ignore[arg-type]
                pass

    asyncio.run(main())


def test_a_file_that_is_written_appears_when_it_is_closed_and_not_after_an_error() -> None:
    async def fail_midway() -> None:
        async with Storage.aopen("memory://files/broken", "wb") as file:
            await file.write(b"half")
            raise KeyError

    async def main() -> None:
        async with Storage.aopen("memory://files/new", "wb") as file:
            assert await file.write(b"whole") == 5
            with pytest.raises(ModelMissingError):
                await StorageOperations.alist_objects("memory://files/new")
        with pytest.raises(KeyError):
            await fail_midway()
        file = await Storage.aopen("memory://files/new", "xb")
        await file.write(b"other")
        with pytest.raises(ObjectExistsError):
            await file.close()
        async with Storage.aopen("memory://files/new") as file:
            assert await file.read() == b"whole"
        with pytest.raises(ModelMissingError):
            await Storage.aopen("memory://files/broken")

    asyncio.run(main())


# -- event loops and threads -------------------------------------------------------------------


@pytest.fixture
def slow(make_store: Callable[[str], Store]) -> Iterator[tuple[S3Store, StorageClient]]:
    """A model of 6 MiB in a store that gives it in a second and more."""
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_all({f"model/{index}": os.urandom(MIB) for index in range(6)})
    link = Link(delay=0.01, shared_rate=6 * MIB)
    with (
        FaultProxy(store.server.endpoint, link=link, store="s3") as proxy,
        StorageClient(store.through(proxy.endpoint)) as client,
    ):
        yield store, client


def test_the_event_loop_is_never_blocked(
    slow: tuple[S3Store, StorageClient], tmp_path: Path
) -> None:
    store, client = slow
    ticks = 0
    over = threading.Event()
    between: list[int] = []

    def tick() -> None:
        # Another thread tells the time: on a busy machine it is as late as the loop is.
        nonlocal ticks
        while not over.wait(0.01):
            ticks += 1

    async def heart() -> None:
        while True:
            before = ticks
            await asyncio.sleep(0.01)
            between.append(ticks - before)

    async def main() -> None:
        beating = asyncio.create_task(heart())
        path = await client.adownload(store.uri("model/"), tmp_path / "model")
        await client.aupload(path, store.uri("again"))
        async with client.aopen(store.uri("model/0")) as file:
            assert len(await file.read()) == MIB
        await client.adownload(store.uri("again/"))
        beating.cancel()

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        asyncio.run(main())
    finally:
        over.set()
        clock.join()
    assert len(between) > 50
    # Work on the loop would take a second and more at once, each time.
    assert sorted(between)[-2] < 25


def test_several_event_loops_use_one_client_at_once(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    store = make_store("seaweedfs-obstore")
    store.put_all({f"model/{index}": os.urandom(MIB) for index in range(6)})
    client = StorageClient(store.config)
    found: list[list[str]] = []

    def run(index: int) -> None:
        async def main() -> list[str]:
            uri = store.uri("model/")
            tasks = [client.adownload(uri, tmp_path / f"{index}-{at}") for at in range(2)]
            return list(await asyncio.gather(*tasks))

        found.append(asyncio.run(main()))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for paths in found:
        for path in paths:
            assert sorted(os.listdir(path)) == [str(index) for index in range(6)]


def test_a_hundred_calls_at_once_have_a_bounded_number_of_threads() -> None:
    lock = threading.Lock()
    running = most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def main() -> None:
        await asyncio.gather(*(run_blocking(work) for _ in range(4 * THREADS)))

    asyncio.run(main())
    assert most <= THREADS
    names = [thread.name for thread in threading.enumerate() if "storage-await" in thread.name]
    assert len(names) <= THREADS


def test_context_variables_and_progress_come_through(tmp_path: Path) -> None:
    asked: ContextVar[str] = ContextVar("asked")
    seen: list[tuple[str, bool]] = []
    with Storage.open("memory://context/a", "wb") as file:
        file.write(b"a")

    def told(progress: Progress) -> None:
        seen.append((asked.get(), progress.finished))

    async def main() -> None:
        asked.set("request 7")
        await Storage.adownload("memory://context/a", tmp_path / "a", progress=told)

    asyncio.run(main())
    assert seen[-1] == ("request 7", True)


def test_an_error_is_the_one_of_the_blocking_method(tmp_path: Path) -> None:
    with Storage.open("memory://errors/a", "wb") as file:
        file.write(b"a")

    async def main() -> None:
        with pytest.raises(IntegrityError, match="expects sha256:0"):
            await Storage.adownload(
                "memory://errors/a", tmp_path / "a", digest=f"sha256:{'0' * 64}"
            )

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_does_not_import_asyncio() -> None:
    code = (
        "import sys; from storage import Storage; Storage.is_local('/a');"
        "assert 'asyncio' not in sys.modules and 'concurrent' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(storage.__file__).parents[1])}


FORK = """
import asyncio, os, signal, sys, warnings
from storage import Storage
warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
uri, out = sys.argv[1:]
async def main(name):
    await Storage.adownload(uri, f"{out}/{name}")
asyncio.run(main("parent"))
child = os.fork()
if child == 0:
    signal.alarm(120)
    try:
        asyncio.run(main("child"))
    except BaseException as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
asyncio.run(main("parent-again"))
sys.exit(status)
"""


def test_a_forked_child_has_threads_of_its_own(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("seaweedfs-obstore")
    store.put_all({"model/a": b"a" * 100_000})
    fields = {
        field: reveal(value)
        for field, value in store.config
        if field in store.config.model_fields_set and value is not None
    }
    config = json.dumps({"type": "s3", **fields})
    done = subprocess.run(
        [sys.executable, "-c", FORK, store.uri("model/"), str(out)],
        env=_environment() | {"STORAGE_CONFIG": config},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("parent", "child", "parent-again"):
        assert (out / name / "a").read_bytes() == b"a" * 100_000
