"""Watchers and async files where somebody gives up, removes, or ends in the middle."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    ModelWatcher,
    StorageClient,
    StorageOperations,
    TransferError,
)
from storage.cache.locks import SourceLock
from storage.cancellation import CancellationToken, OperationCancelledError, cancellable
from storage.client.versions import VersionFolders
from tests.facade.watcher.support import until


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a").write_text("1")
    return folder


@pytest.mark.parametrize("raised", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("awaited", [False, True])
def test_a_watcher_goes_on_whatever_ends_on_change(
    source: Path, raised: type[BaseException], awaited: bool
) -> None:
    told: list[str] = []
    errors: list[Exception] = []

    def on_change(model: Any) -> None:
        told.append(model.path)
        if len(told) == 1:
            raise raised

    async def on_change_later(model: Any) -> None:
        on_change(model)

    with ModelWatcher(
        source,
        on_change_later if awaited else on_change,
        interval=0.05,
        on_error=errors.append,
    ) as watcher:
        until(lambda: watcher.current)
    assert len(told) == 2
    assert isinstance(errors[0], TransferError)
    assert raised.__name__ in str(errors[0])


@pytest.mark.parametrize("seconds", [math.inf, math.nan])
def test_times_without_end_are_refused(source: Path, seconds: float) -> None:
    with pytest.raises(InvalidInput, match="interval"):
        ModelWatcher(source, interval=seconds)
    with pytest.raises(InvalidInput, match="settling"):
        ModelWatcher(source, settle=seconds)


def test_an_interval_may_be_longer_than_a_system_can_wait(source: Path) -> None:
    watcher = ModelWatcher(source, lambda model: None, interval=1e12)
    with watcher:
        watcher.wait(60)
        time.sleep(0.05)
        assert watcher._thread is not None
        assert watcher._thread.is_alive()


def test_a_watcher_that_was_stopped_may_be_asked(source: Path) -> None:
    watcher = ModelWatcher(source, lambda model: None, interval=60)
    with watcher:
        watcher.wait(60)
    (source / "a").write_text("2, and more")
    model = watcher.check()
    assert model is not None
    assert Path(model.path, "a").read_text() == "2, and more"


def test_a_child_that_was_forked_during_a_look_may_look_itself(source: Path) -> None:
    watcher = ModelWatcher(source, lambda model: None, interval=60)
    look, inside, go_on = watcher._source.look, threading.Event(), threading.Event()

    def slow() -> str | None:
        inside.set()
        go_on.wait(120)
        return look()

    watcher._source.look = slow  # type: ignore[method-assign]
    with watcher:
        assert inside.wait(60)
        watcher._source.look = look  # type: ignore[method-assign]
        pid = os.fork()
        if not pid:  # pragma: no cover -- in the child
            signal.alarm(60)
            try:
                found = watcher.check()
                os._exit(0 if found is not None and os.path.isdir(found.path) else 3)
            finally:
                os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        go_on.set()


# -- folders of versions ---------------------------------------------------------------------


def test_a_version_is_not_taken_while_somebody_removes_it(tmp_path: Path) -> None:
    folders = VersionFolders(str(tmp_path))
    fetched: list[str] = []

    def fetch(dest: str) -> str:
        os.makedirs(dest, exist_ok=True)
        Path(dest, "model").write_text("1")
        fetched.append(dest)
        return dest

    first = folders.obtain("1", fetch)
    first.release()
    # Another process, which tidies up, has locked it, and is about to rename it.
    descriptor = os.open(first.path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def remove() -> None:
        until(lambda: len(fetched) > 1)
        os.rename(first.path.rstrip("/"), tmp_path / "gone")
        os.close(descriptor)

    other = threading.Thread(target=remove)
    other.start()
    held = folders.obtain("1", fetch)
    other.join()
    assert Path(held.path, "model").read_text() == "1"
    folders.tidy()
    assert Path(held.path, "model").read_text() == "1"
    held.release()


def test_watchers_of_other_files_share_a_folder_and_no_version(
    source: Path, tmp_path: Path
) -> None:
    (source / "b").write_text("2")
    shared = tmp_path / "versions"
    choices: list[dict[str, Any]] = [{"allow_patterns": "a"}, {"ignore_patterns": "a"}]
    with StorageClient() as client:
        client.copy_object(source, "memory://faults-shared/m")
        one, two = (
            ModelWatcher("memory://faults-shared/m", client=client, dest=shared, **choice).check()
            for choice in choices
        )
        assert one is not None
        assert two is not None
        assert (os.listdir(one.path), os.listdir(two.path)) == (["a"], ["b"])


# -- what is cancelled -----------------------------------------------------------------------


@pytest.mark.parametrize("entered", [False, True])
def test_a_file_with_a_write_that_was_cancelled_is_not_stored(entered: bool) -> None:
    uri = "memory://faults/written"

    async def write(file: Any) -> None:
        plain = file._file.write

        def slow(data: bytes) -> Any:
            time.sleep(0.3)
            return plain(data)

        file._file.write = slow
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(file.write(b"abc"), 0.05)
        with pytest.raises(TransferError, match="was cancelled"):
            await file.write(b"abc")

    async def main() -> None:
        client = StorageClient()
        if entered:
            with pytest.raises(TransferError, match="nothing is stored"):
                async with client.aopen(uri, "wb") as file:
                    await write(file)
        else:
            file = await client.aopen(uri, "wb")
            await write(file)
            with pytest.raises(TransferError, match="nothing is stored"):
                await file.close()
            await file.close()
        assert file.closed

    asyncio.run(main())
    with pytest.raises(ModelMissingError):
        StorageOperations.list_objects(uri)


def test_who_is_cancelled_while_waiting_for_a_turn_leaves_no_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = CancellationToken()
    plain = SourceLock.__enter__

    def cancelled(lock: SourceLock) -> SourceLock:
        plain(lock).__exit__(None, None, None)
        token.cancel()
        token.check()
        raise AssertionError

    monkeypatch.setattr(SourceLock, "__enter__", cancelled)
    with StorageClient() as client:
        client.copy_object(source, "memory://faults-turn/m")
        with cancellable(token), pytest.raises(OperationCancelledError):
            client.download("memory://faults-turn/m", tmp_path / "new" / "parent" / "dest")
    assert sorted(os.listdir(tmp_path)) == ["source"]
