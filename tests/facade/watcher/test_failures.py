"""Watchers where the store, the model or the server fails, and versions that are half changed."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from storage import (
    ModelMissingError,
    ModelWatcher,
    SignatureError,
    SignaturePolicy,
    StorageClient,
    TransferError,
    cancellation,
)
from storage.config import load_settings
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from tests.facade.stores import S3Store, tree_bytes
from tests.facade.watcher.support import (
    MIB,
    OFTEN,
    Told,
    put_version,
    until,
    version,
)
from tests.servers.proxy import CountingProxy


def test_what_on_change_raises_is_told_and_it_is_called_again(
    s3: S3Store, client: StorageClient
) -> None:
    told = Told(fail=2)
    with ModelWatcher(
        s3.uri("model/"), told.change, client=client, interval=OFTEN, on_error=told.error
    ) as watcher:
        until(lambda: watcher.current)
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
        assert tree_bytes(watcher.wait(60).path) == {"a": b"a"}
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
                deadline = time.monotonic() + 60
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
            assert watcher.wait(60).path == kept
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
    changed: list[str] = []

    def midway(request: Request) -> Fault | None:
        if changed or request.method != "GET" or not request.target.endswith("model/0"):
            return None
        changed.append(request.target)
        return Fault("change")

    def change(_: Request) -> None:
        s3.put_raw("model/1", b"2" * 1000)
        s3.put_raw("model/0", b"2" * 4 * MIB)
        s3.put_raw("model/2", b"2" * 1000)

    with (
        FaultProxy(s3.server.endpoint, midway, on_change=change, store="s3") as proxy,
        StorageClient(s3.through(proxy.endpoint)) as client,
    ):
        model = ModelWatcher(s3.uri("model/"), client=client).check()
        assert len(changed) == 1
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


def test_a_version_is_fetched_when_it_has_settled(
    s3: S3Store, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, waited, coming = 600.0, 0, ["1", "2"]
    plain = cancellation.pause

    def pause(seconds: float) -> None:
        nonlocal waited
        if seconds != settle:
            plain(seconds)
            return
        waited += 1
        if waited > 1 and coming:
            # The files of the second version are replaced one by one.
            s3.put_raw(f"model/{coming.pop()}", b"2" * 1000)

    monkeypatch.setattr(cancellation, "pause", pause)
    watcher = ModelWatcher(s3.uri("model/"), client=client, settle=settle)
    first = watcher.check()
    assert first is not None
    assert tree_bytes(first.path) == version(1)
    assert waited == 1
    s3.put_raw("model/0", b"2" * 1000)
    second = watcher.check()
    assert second is not None
    assert tree_bytes(second.path) == version(2)
    assert waited == 4


def test_each_version_has_to_be_signed(s3: S3Store, client: StorageClient) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    policy = SignaturePolicy.key(generate_private_key(SECP256R1()).public_key())
    watcher = ModelWatcher(s3.uri("model/"), client=client, require_signature=policy)
    with pytest.raises(SignatureError):
        watcher.check()
