"""Folders of versions that processes share, watchers and coroutines, and servers that fork."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    ModelWatcher,
    StorageClient,
    WatchedModel,
    awaitable,
)
from storage.client.versions import VersionFolders
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from tests.facade.stores import S3Store, tree_bytes
from tests.facade.watcher.support import (
    MIB,
    OFTEN,
    Told,
    program_environment,
    put_version,
    until,
    version,
)

# -- folders of versions -----------------------------------------------------------------------


def test_folders_that_no_process_uses_go_and_those_of_others_stay(
    s3: S3Store, client: StorageClient, out: Path
) -> None:
    (out / "mine").mkdir()
    mine = ModelWatcher(s3.uri("model/"), client=client, dest=out)
    other = ModelWatcher(s3.uri("model/"), client=client, dest=out)
    first, same = mine.check(), other.check()
    assert first is not None
    assert same is not None
    assert same.path == first.path
    put_version(s3, 2)
    second = mine.check()
    assert second is not None
    first.release()
    # The other one has it still.
    assert tree_bytes(same.path) == version(1)
    same.release()
    assert sorted(os.listdir(out)) == sorted(["mine", os.path.basename(second.path.rstrip("/"))])


def test_what_a_killed_server_left_goes_and_its_newest_version_is_used_again(
    s3: S3Store, out: Path
) -> None:
    code = """
import json, os, signal, sys
from storage import ModelWatcher
uri, dest = sys.argv[1:]
print(ModelWatcher(uri, dest=dest).check().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = program_environment(s3)

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, s3.uri("model/"), str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == -9, done.stderr
        return done.stdout.strip()

    first = run()
    assert tree_bytes(first) == version(1)
    put_version(s3, 2)
    second = run()
    assert tree_bytes(second) == version(2)
    assert not os.path.exists(first)
    with StorageClient(s3.config) as client:
        model = ModelWatcher(s3.uri("model/"), client=client, dest=out).check()
        assert model is not None
        assert model.path == second
        inode = os.stat(model.path).st_ino
        again = ModelWatcher(s3.uri("model/"), client=client, dest=out).check()
        assert again is not None
        assert os.stat(again.path).st_ino == inode


def test_a_version_that_is_removed_before_it_was_held_is_put_there_again(out: Path) -> None:
    folders = VersionFolders(str(out))
    calls: list[str] = []

    def fetch(dest: str) -> str:
        calls.append(dest)
        if len(calls) > 1:
            os.makedirs(dest)
        return dest

    held = folders.obtain("1", fetch)
    assert len(calls) == 2
    folders.tidy()
    assert os.path.isdir(held.path)
    held.release()
    folders.tidy()
    assert os.listdir(out) == []
    with pytest.raises(OSError, match="removed 10 times"):
        folders.obtain("1", lambda dest: dest)


# -- coroutines ------------------------------------------------------------------------------


def test_an_async_on_change_is_called_by_the_loop_that_started_the_watcher(
    s3: S3Store, client: StorageClient
) -> None:
    told = Told(fail=1)
    loops: list[asyncio.AbstractEventLoop] = []

    async def change(model: WatchedModel) -> None:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        told.change(model)

    async def error(exc: Exception) -> None:
        loops.append(asyncio.get_running_loop())
        told.error(exc)

    async def main() -> None:
        async with ModelWatcher(
            s3.uri("model/"), change, client=client, interval=OFTEN, on_error=error
        ):
            while not told.models:
                await asyncio.sleep(0.01)
        assert set(loops) == {asyncio.get_running_loop()}

    asyncio.run(main())
    assert len(loops) == 3
    assert [type(each) for each in told.errors] == [KeyError]
    # Without a loop, by one of its own.
    with ModelWatcher(s3.uri("model/"), change, client=client, interval=OFTEN):
        until(lambda: len(told.models) == 2)
    assert loops[-1] is not loops[0]


def test_stopping_does_not_wait_for_a_coroutine_that_waits_for_the_loop(
    s3: S3Store, client: StorageClient
) -> None:
    begun: list[int] = []
    ended: list[str] = []

    async def change(_: WatchedModel) -> None:
        begun.append(1)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        watcher = ModelWatcher(s3.uri("model/"), change, client=client, interval=OFTEN).start()
        while not begun:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        watcher.stop(60)  # on the very loop that the coroutine needs
        assert time.monotonic() - began < 30
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert ended == ["cancelled"]


def test_changes_are_iterated_over_until_the_watcher_is_stopped(
    s3: S3Store, client: StorageClient
) -> None:
    told = Told()

    async def main() -> None:
        watcher = ModelWatcher(s3.uri("model/"), client=client, interval=OFTEN, on_error=told.error)
        async for model in watcher.changes():
            told.change(model)
            if len(told.models) == 1:
                with pytest.raises(InvalidInput, match="started already"):
                    await anext(watcher.changes())
                await asyncio.to_thread(put_version, s3, 2)
                continue
            break
        await asyncio.sleep(0)
        assert told.contents == [version(1), version(2)]
        stopping = ModelWatcher(s3.uri("model/"), client=client, interval=3600)

        async def stop() -> None:
            while stopping.current is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            stopping.stop()

        task = asyncio.create_task(stop())
        began = time.monotonic()
        seen = [model async for model in stopping.changes()]
        assert len(seen) == 1
        assert time.monotonic() - began < 60
        await task

    asyncio.run(main())


def test_iterating_goes_on_after_failures_and_ends_with_its_task(
    s3: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What does not end by itself is waited for until all of it has come.
    monkeypatch.setattr(awaitable, "PATIENCE", 60)
    told = Told()

    async def main(client: StorageClient, proxy: FaultProxy) -> None:
        async def consume() -> None:
            watcher = ModelWatcher(
                s3.uri("later/"), client=client, interval=OFTEN, on_error=told.error
            )
            async for model in watcher.changes():
                told.change(model)

        task = asyncio.create_task(consume())
        while not told.errors:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(s3.put_raw, "later/a", b"a")
        while not told.models:
            await asyncio.sleep(0.01)
        before = proxy.bytes_down
        await asyncio.to_thread(s3.put_raw, "later/a", bytes(32 * MIB))
        while proxy.bytes_down < before + MIB:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # What was on its way has come, and nothing after it.
        assert proxy.bytes_down < before + 24 * MIB

    with (
        FaultProxy(s3.server.endpoint, link=Link(shared_rate=4 * MIB), store="s3") as proxy,
        StorageClient(s3.through(proxy.endpoint)) as client,
    ):
        asyncio.run(main(client, proxy))
    assert [type(error) for error in told.errors[:1]] == [ModelMissingError]
    assert len(told.models) == 1


def test_a_forked_child_starts_a_watcher_of_its_own(s3: S3Store, out: Path) -> None:
    code = """
import os, signal, sys, time, warnings
from storage import ModelWatcher
warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
uri, out = sys.argv[1:]
name = "parent"
def change(model):
    with open(f"{out}/{name}-{len(os.listdir(out))}", "w") as file:
        file.write(model.path)
watcher = ModelWatcher(uri, change, interval=0.05).start()
watcher.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(120)
    name = "child"
    try:
        watcher.stop()  # it is the parent's
        assert watcher.check() is None  # what the parent was told counts here, too
        mine = ModelWatcher(uri, change, interval=0.05).start()
        mine.wait(60)
        mine.stop()
    except BaseException as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert watcher._thread.is_alive()
watcher.stop()
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, s3.uri("model/"), str(out)],
        env=program_environment(s3),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(name.partition("-")[0] for name in os.listdir(out))
    assert names == ["child", "parent"]
    paths = {(out / name).read_text() for name in os.listdir(out)}
    assert len(paths) == 1
