"""A server is told of a new version of its model, and gets it ready, under a path of its own."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage
from storage import (
    InvalidInput,
    ModelMissingError,
    ModelWatcher,
    SignatureError,
    SignaturePolicy,
    StorageClient,
    TransferError,
    WatchedModel,
)
from storage.cache.evict import trim
from storage.client.versions import VersionFolders
from storage.config import load_settings
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from tests.facade.stores import S3Store, Store, tree_bytes
from tests.servers.proxy import CountingProxy

MIB = 1024 * 1024
OFTEN = 0.05
"""Seconds between two looks."""


class Told:
    """What a server was told, in order."""

    def __init__(self, fail: int = 0) -> None:
        self.models: list[WatchedModel] = []
        self.errors: list[Exception] = []
        self.contents: list[dict[str, bytes]] = []
        self.fail = fail

    def change(self, model: WatchedModel) -> None:
        if self.fail:
            self.fail -= 1
            raise KeyError("the server cannot load it")
        self.contents.append(tree_bytes(model.path))
        self.models.append(model)

    def error(self, exc: Exception) -> None:
        self.errors.append(exc)

    def has(self, count: int) -> bool:
        return len(self.models) >= count


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def s3(make_store: Callable[[str], Store]) -> S3Store:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    put_version(store, 1)
    return store


def put_version(store: Store, number: int, files: int = 3) -> dict[str, bytes]:
    content = {f"{index}": b"%d" % number * 1000 for index in range(files)}
    store.put_all({f"model/{name}": data for name, data in content.items()})
    return content


def version(number: int, files: int = 3) -> dict[str, bytes]:
    return {f"{index}": b"%d" % number * 1000 for index in range(files)}


def program_environment(store: S3Store) -> dict[str, str]:
    """Return the environment of a program that uses this code and ``store``."""
    fields = {
        "type": "s3",
        "access_key_id": store.server.admin.access_key,
        "secret_access_key": store.server.admin.secret_key,
        "endpoint_url": store.server.endpoint,
    }
    return os.environ | {
        "PYTHONPATH": str(Path(storage.__file__).parents[1]),
        "STORAGE_CONFIG": json.dumps(fields),
    }


@pytest.fixture
def client(s3: S3Store) -> Iterator[StorageClient]:
    with StorageClient(s3.config) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "dest"),
    [
        *((name, False) for name in ("seaweedfs-obstore", "azurite-obstore", "gcs-fsspec", "hub")),
        *((name, False) for name in ("file", "pvc", "memory")),
        *((name, True) for name in ("seaweedfs-obstore", "hub", "file")),
    ],
)
def test_a_new_version_is_told_and_the_old_one_stays_until_it_is_released(
    make_store: Callable[[str], Store], name: str, out: Path, dest: bool
) -> None:
    store = make_store(name)
    put_version(store, 1)
    with StorageClient(store.config) as client:
        watcher = ModelWatcher(
            store.uri("model/"), client=client, dest=out / "versions" if dest else None
        )
        first = watcher.check()
        assert first is not None
        assert tree_bytes(first.path) == version(1)
        assert first.version
        assert first.previous is None
        assert watcher.check() is None
        if name in ("file", "pvc"):
            time.sleep(0.02)  # the times of files tell versions
        put_version(store, 2)
        second = watcher.check()
        assert second is not None
        assert watcher.current is second
        assert second.path != first.path
        assert second.previous is first
        assert os.fspath(second) == second.path
        assert tree_bytes(first.path) == version(1)
        assert tree_bytes(second.path) == version(2)
        first.release()
        first.release()
        assert first.released
        assert not second.released
        assert os.path.exists(first.path) is not dest
        assert tree_bytes(second.path) == version(2)


def test_one_file_is_watched_too(s3: S3Store, client: StorageClient, out: Path) -> None:
    for dest in (None, out):
        s3.put_raw("weights.bin", b"1")
        watcher = ModelWatcher(s3.uri("weights.bin"), client=client, dest=dest)
        first = watcher.check()
        assert first is not None
        s3.put_raw("weights.bin", b"2")
        second = watcher.check()
        assert second is not None
        assert Path(first.path).read_bytes() == b"1"
        assert Path(second.path).read_bytes() == b"2"
        assert os.path.basename(second.path) == "weights.bin"


def test_a_look_at_what_did_not_change_is_one_request(s3: S3Store) -> None:
    with (
        CountingProxy(s3.server.endpoint) as proxy,
        StorageClient(s3.through(proxy.endpoint)) as client,
    ):
        watcher = ModelWatcher(s3.uri("model/"), client=client)
        assert watcher.check()
        proxy.clear()
        for _ in range(3):
            assert watcher.check() is None
        assert proxy.count() == 3


def test_the_thread_tells_each_version(s3: S3Store, client: StorageClient) -> None:
    told = Told()
    with ModelWatcher(s3.uri("model/"), told.change, client=client, interval=OFTEN) as watcher:
        assert watcher.wait(20).path == told.models[0].path
        for number in (2, 3):
            put_version(s3, number, files=1)
            until(functools.partial(told.has, number))
    assert told.contents[0] == version(1)
    assert told.contents[1] == version(1) | version(2, files=1)
    assert told.contents[2] == version(1) | version(3, files=1)
    assert [model.previous for model in told.models[:1]] == [None]
    assert told.models[2].previous is told.models[1]
    # What was before that is not kept alive by a chain.
    assert told.models[1].previous is None
    assert "storage-watch" not in [thread.name for thread in threading.enumerate()]


def test_the_same_content_under_another_etag_is_no_change(
    s3: S3Store, client: StorageClient
) -> None:
    watcher = ModelWatcher(s3.uri("model.bin"), client=client)
    data = os.urandom(6 * MIB)
    s3.put_raw("model.bin", data)
    model = watcher.check()
    assert model is not None
    before = model.version
    s3.delete_raw("model.bin")
    upload = s3.server.raw.create_multipart_upload(Bucket=s3.bucket, Key=f"{s3._prefix}model.bin")
    parts = []
    for number, start in enumerate((0, 5 * MIB), 1):
        part = s3.server.raw.upload_part(
            Bucket=s3.bucket,
            Key=upload["Key"],
            UploadId=upload["UploadId"],
            PartNumber=number,
            Body=data[start : 5 * MIB if number == 1 else None],
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    s3.server.raw.complete_multipart_upload(
        Bucket=s3.bucket,
        Key=upload["Key"],
        UploadId=upload["UploadId"],
        MultipartUpload={"Parts": parts},
    )
    assert watcher.check() is None
    assert watcher.current is model
    assert model.version != before
    assert not model.released


def test_what_is_in_use_is_not_evicted_and_what_was_released_is(
    s3: S3Store, tmp_path: Path
) -> None:
    s3.put_raw("model/0", os.urandom(300_000))
    settings = load_settings(cache_dir=tmp_path / "small", cache_budget=400_000, cache_grace=0)
    with StorageClient(s3.config, settings) as client:
        watcher = ModelWatcher(s3.uri("model/"), client=client)
        first = watcher.check()
        assert first is not None
        assert watcher.check() is None
        s3.put_raw("model/0", os.urandom(50_000))
        second = watcher.check()
        assert second is not None
        trim(client.cache)
        assert len(tree_bytes(first.path)["0"]) == 300_000
        first.release()
        s3.put_raw("model/0", os.urandom(120_000))
        third = watcher.check()
        assert third is not None
        assert not os.path.exists(first.path)
        assert len(tree_bytes(second.path)["0"]) == 50_000


def test_a_download_of_the_same_by_others_keeps_it_whatever_the_watcher_releases(
    s3: S3Store, tmp_path: Path
) -> None:
    settings = load_settings(cache_dir=tmp_path / "small", cache_budget=5_000, cache_grace=0)
    with StorageClient(s3.config, settings) as client:
        mine = client.download(s3.uri("model/"))
        model = ModelWatcher(s3.uri("model/"), client=client).check()
        assert model is not None
        assert model.path == mine
        model.release()
        s3.put_raw("other", os.urandom(1_500))
        client.download(s3.uri("other"))
        assert tree_bytes(mine) == version(1)


# -- failures --------------------------------------------------------------------------------


def test_what_on_change_raises_is_told_and_it_is_called_again(
    s3: S3Store, client: StorageClient
) -> None:
    told = Told(fail=2)
    with ModelWatcher(
        s3.uri("model/"), told.change, client=client, interval=OFTEN, on_error=told.error
    ) as watcher:
        until(lambda: told.models)
        assert [type(error) for error in told.errors] == [KeyError, KeyError]
        assert watcher.current is told.models[0]
        # A version that cannot be loaded does not keep a later one from coming.
        told.fail = 10**6
        put_version(s3, 2)
        until(lambda: len(told.errors) > 3)
        assert watcher.current is told.models[0]
        told.fail = 0
        put_version(s3, 3)
        until(lambda: told.contents[-1] == version(3))
    assert told.models[-1].previous is told.models[-2]


def test_a_version_that_is_withdrawn_before_it_could_be_loaded_is_forgotten(
    s3: S3Store, client: StorageClient
) -> None:
    watcher = ModelWatcher(s3.uri("model/"), client=client)
    first = watcher.check()
    put_version(s3, 2)
    offered = watcher._find()
    assert offered is not None
    put_version(s3, 1)
    assert watcher._find() is None
    assert offered.released
    assert watcher.current is first
    assert first is not None
    assert tree_bytes(first.path) == version(1)


def test_a_model_that_is_not_there_yet_is_waited_for(s3: S3Store, client: StorageClient) -> None:
    told = Told()
    with ModelWatcher(
        s3.uri("later/"), told.change, client=client, interval=OFTEN, on_error=told.error
    ) as watcher:
        until(lambda: told.errors)
        assert isinstance(told.errors[0], ModelMissingError)
        with pytest.raises(TransferError, match=r"no model within 0\.05 s"):
            watcher.wait(0.05)
        s3.put_raw("later/a", b"a")
        assert tree_bytes(watcher.wait(20).path) == {"a": b"a"}
        # Deleted: the server keeps what it has.
        s3.delete_raw("later/a")
        told.errors.clear()
        until(lambda: told.errors)
        assert tree_bytes(told.models[-1].path) == {"a": b"a"}


def test_without_on_error_the_log_is_told(
    s3: S3Store, client: StorageClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Exception) -> None:
        raise RuntimeError("on_error is broken, too")

    with caplog.at_level(logging.WARNING):
        for on_error, text in ((None, "ModelMissingError"), (broken, "broken, too")):
            caplog.clear()
            with ModelWatcher(
                s3.uri("nothing/"), print, client=client, interval=OFTEN, on_error=on_error
            ):
                deadline = time.monotonic() + 20
                while text not in caplog.text:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)


def test_a_store_that_cannot_be_reached_leaves_the_old_version_and_is_asked_less_often(
    s3: S3Store,
) -> None:
    told = Told()
    broken = threading.Event()
    settings = load_settings(transfer={"attempts": 1})
    with (
        CountingProxy(s3.server.endpoint, lambda *_: 503 if broken.is_set() else None) as proxy,
        StorageClient(s3.through(proxy.endpoint), settings) as client,
    ):
        watcher = ModelWatcher(
            s3.uri("model/"), told.change, client=client, interval=OFTEN, on_error=told.error
        )
        with watcher:
            until(lambda: told.models)
            broken.set()
            until(lambda: len(told.errors) >= 4)
            assert watcher.current is told.models[0]
            assert tree_bytes(told.models[0].path) == version(1)
            # Ten times as long as before, a tenth more or less.
            assert 0.9 * 8 * OFTEN <= watcher._delay() <= 1.1 * 10 * OFTEN
            put_version(s3, 2)
            broken.clear()
            until(lambda: len(told.models) == 2)
            until(lambda: watcher._failures == 0)
            assert watcher._delay() <= 1.1 * OFTEN


def test_a_server_starts_with_what_the_cache_has_while_the_store_is_down(
    s3: S3Store, client: StorageClient
) -> None:
    kept = client.download(s3.uri("model/"))
    told = Told()
    settings = load_settings(transfer={"attempts": 1, "retry_timeout": 1})
    down = threading.Event()
    down.set()
    with (
        CountingProxy(s3.server.endpoint, lambda *_: 503 if down.is_set() else None) as proxy,
        StorageClient(s3.through(proxy.endpoint), settings) as behind,
    ):
        # The cache tells stores at different addresses apart: this one was there once, too.
        down.clear()
        behind.download(s3.uri("model/"))
        down.set()
        with ModelWatcher(
            s3.uri("model/"), told.change, client=behind, interval=OFTEN, on_error=told.error
        ) as watcher:
            assert watcher.wait(20).path == kept
            assert told.models[0].version is None
            assert isinstance(told.errors[0], TransferError)
            down.clear()
            until(lambda: told.models[0].version is not None)
            # It was the newest all along.
            assert len(told.models) == 1
        down.set()
        with pytest.raises(TransferError):
            ModelWatcher(s3.uri("never/"), client=behind).check()


def test_offline_the_cache_alone_is_asked(s3: S3Store, client: StorageClient) -> None:
    client.download(s3.uri("model/"))
    nowhere = s3.config
    with StorageClient(nowhere, load_settings(offline=True)) as offline:
        watcher = ModelWatcher(s3.uri("model/"), client=offline)
        model = watcher.check()
        assert model is not None
        assert tree_bytes(model.path) == version(1)
        assert watcher.check() is None


def test_a_change_during_the_download_gives_one_version_and_not_a_mixture(s3: S3Store) -> None:
    s3.put_raw("model/0", b"1" * 4 * MIB)
    changed = threading.Event()
    with (
        FaultProxy(s3.server.endpoint, link=Link(shared_rate=4 * MIB), store="s3") as proxy,
        StorageClient(s3.through(proxy.endpoint)) as client,
    ):

        def change() -> None:
            until(lambda: proxy.bytes_down > MIB)
            s3.put_raw("model/1", b"2" * 1000)
            s3.put_raw("model/0", b"2" * 4 * MIB)
            s3.put_raw("model/2", b"2" * 1000)
            changed.set()

        writer = threading.Thread(target=change)
        writer.start()
        model = ModelWatcher(s3.uri("model/"), client=client).check()
        writer.join()
        assert changed.is_set()
        assert model is not None
        found = {name: set(data) for name, data in tree_bytes(model.path).items()}
        assert found == {name: {ord("2")} for name in "012"}


def test_what_never_stands_still_is_not_told(s3: S3Store, client: StorageClient) -> None:
    watcher = ModelWatcher(s3.uri("model/"), client=client)
    first = watcher.check()
    download = client.download
    count = 0

    def changing(*args: Any, **kwargs: Any) -> str:
        nonlocal count
        count += 1
        path = download(*args, **kwargs)
        s3.put_raw("model/0", b"%d" % count)
        return path

    client.download = changing  # type: ignore[method-assign]
    s3.put_raw("model/0", b"new")
    with pytest.raises(TransferError, match="changed 3 times"):
        watcher.check()
    assert watcher.current is first


def test_a_version_is_fetched_when_it_has_settled(s3: S3Store, client: StorageClient) -> None:
    told = Told()
    with ModelWatcher(
        s3.uri("model/"),
        told.change,
        client=client,
        interval=OFTEN,
        settle=0.6,
        on_error=told.error,
    ):
        until(lambda: told.models)
        for index in range(3):
            s3.put_raw(f"model/{index}", b"2" * 1000)
            time.sleep(0.15)
        until(lambda: len(told.models) == 2)
    assert told.contents == [version(1), version(2)]


def test_each_version_has_to_be_signed(s3: S3Store, client: StorageClient) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    policy = SignaturePolicy.key(generate_private_key(SECP256R1()).public_key())
    watcher = ModelWatcher(s3.uri("model/"), client=client, require_signature=policy)
    with pytest.raises(SignatureError):
        watcher.check()


# -- options ---------------------------------------------------------------------------------


def test_patterns_choose_what_is_watched(s3: S3Store, client: StorageClient) -> None:
    watcher = ModelWatcher(s3.uri("model/"), client=client, allow_patterns=iter(["0"]))
    model = watcher.check()
    assert model is not None
    assert list(tree_bytes(model.path)) == ["0"]
    s3.put_raw("model/1", b"other")
    assert watcher.check() is None


def test_what_the_server_has_already_is_not_told(s3: S3Store, client: StorageClient) -> None:
    path = client.download(s3.uri("model/"))
    for options in ({"current": path}, {"initial": False}):
        put_version(s3, 1)
        watcher = ModelWatcher(s3.uri("model/"), client=client, **options)
        assert watcher.check() is None
        assert watcher.current is not None
        assert watcher.current.path == path
        put_version(s3, 2)
        model = watcher.check()
        assert model is not None
        assert tree_bytes(model.path) == version(2)
    # There was a newer one before the watcher began.
    model = ModelWatcher(s3.uri("model/"), client=client, current=path).check()
    assert model is not None


@pytest.mark.parametrize("options", [{"interval": 0}, {"settle": -1}, {"dest": "s3://b/k"}])
def test_unusable_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ModelWatcher("memory://watch/m", **options)


def test_a_watcher_is_started_once_and_needs_somebody_to_tell(
    s3: S3Store, client: StorageClient
) -> None:
    with pytest.raises(InvalidInput, match="needs on_change"):
        ModelWatcher(s3.uri("model/"), client=client).start()
    told = Told()
    watcher = ModelWatcher(s3.uri("model/"), told.change, client=client, interval=OFTEN)
    with watcher, pytest.raises(InvalidInput, match="started already"):
        watcher.start()
    # Again after it was stopped; the version is known.
    put_version(s3, 2)
    with watcher:
        until(lambda: told.contents and told.contents[-1] == version(2))


# -- the end ---------------------------------------------------------------------------------


def test_stopping_ends_a_download_that_is_under_way(s3: S3Store, out: Path) -> None:
    s3.put_raw("model/0", bytes(32 * MIB))
    told = Told()
    with (
        FaultProxy(s3.server.endpoint, link=Link(shared_rate=4 * MIB), store="s3") as proxy,
        StorageClient(s3.through(proxy.endpoint)) as client,
    ):
        watcher = ModelWatcher(
            s3.uri("model/"), told.change, client=client, dest=out, on_error=told.error
        ).start()
        until(lambda: proxy.bytes_down > MIB)
        began = time.monotonic()
        watcher.stop()
        assert time.monotonic() - began < 3
        assert "storage-watch" not in [thread.name for thread in threading.enumerate()]
    assert told.models == []
    assert told.errors == []


def test_stopping_ends_a_wait_at_once_and_may_be_done_by_on_change(
    s3: S3Store, client: StorageClient
) -> None:
    watchers: list[ModelWatcher] = []
    told = Told()

    def change(model: WatchedModel) -> None:
        told.change(model)
        watchers[0].stop()

    watcher = ModelWatcher(s3.uri("model/"), change, client=client, interval=3600)
    watchers.append(watcher)
    watcher.start()
    until(lambda: "storage-watch" not in [thread.name for thread in threading.enumerate()])
    assert len(told.models) == 1
    watcher = ModelWatcher(s3.uri("model/"), told.change, client=client, interval=3600).start()
    until(lambda: len(told.models) == 2)
    began = time.monotonic()
    watcher.stop()
    watcher.stop()
    assert time.monotonic() - began < 1


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
            timeout=60,
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
        watcher.stop()  # on the very loop that the coroutine needs
        assert time.monotonic() - began < 2
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
        assert time.monotonic() - began < 5
        await task

    asyncio.run(main())


def test_iterating_goes_on_after_failures_and_ends_with_its_task(s3: S3Store) -> None:
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
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 3

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
watcher.wait(30)
child = os.fork()
if child == 0:
    signal.alarm(60)
    name = "child"
    try:
        watcher.stop()  # it is the parent's
        assert watcher.check() is None  # what the parent was told counts here, too
        mine = ModelWatcher(uri, change, interval=0.05).start()
        mine.wait(30)
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
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(name.partition("-")[0] for name in os.listdir(out))
    assert names == ["child", "parent"]
    paths = {(out / name).read_text() for name in os.listdir(out)}
    assert len(paths) == 1
