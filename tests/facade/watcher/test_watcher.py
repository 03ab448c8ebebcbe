"""A server is told of a new version of its model, and gets it ready, under a path of its own."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import (
    InvalidInput,
    ModelWatcher,
    StorageClient,
    WatchedModel,
)
from storage.cache.evict import trim
from storage.config import load_settings
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from tests.facade.stores import S3Store, Store, tree_bytes
from tests.facade.watcher.support import (
    MIB,
    OFTEN,
    Told,
    put_version,
    until,
    version,
)
from tests.servers.proxy import CountingProxy


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
        assert watcher.wait(60).path == told.models[0].path
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
        watcher.stop(60)
        # What was on its way has come, and nothing after it.
        assert proxy.bytes_down < 24 * MIB
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
    watcher.stop(60)
    watcher.stop(60)
    assert time.monotonic() - began < 30
