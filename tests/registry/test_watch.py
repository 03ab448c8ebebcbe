"""A server follows an alias: it gets each version that the alias is set to, ready and verified."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from storage import InvalidInput, ModelMissingError, StorageClient, WatchedModel
from storage.config import load_settings
from storage.errors import TransferError
from storage.registry import ModelRegistry, RegistryWatcher
from tests.facade.stores import FileStore, tree_bytes
from tests.facade.watcher.support import until
from tests.registry.conftest import MakeFolder, OpenRegistry
from tests.servers import CountingProxy

OFTEN = 0.05
# Seconds in which comes what is to come, however busy the machine is.
PATIENCE = 60


def files(number: int) -> dict[str, bytes]:
    return {"weights": b"%d" % number * 100, "config.json": b"{}"}


def push(registry: ModelRegistry, folder: MakeFolder, *numbers: int) -> None:
    for number in numbers:
        registry.push("iris", folder(files(number)))


def test_each_version_that_an_alias_is_set_to_is_told(
    open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    registry = open_registry()
    registry.init()
    follow(registry, folder, None)


def test_versions_may_be_put_in_a_folder(
    registry: ModelRegistry, folder: MakeFolder, tmp_path: Path
) -> None:
    registry.delete("iris", 1)
    registry.gc(grace=0)
    follow(registry, folder, tmp_path / "versions")


def follow(registry: ModelRegistry, folder: MakeFolder, dest: Path | None) -> None:
    push(registry, folder, 1, 2, 3)
    low, _, high = registry.numbers("iris")
    registry.set_alias("iris", "production", low)
    watcher = registry.watch("iris", alias="production", dest=dest)
    first = watcher.check()
    assert first is not None
    assert (first.version, tree_bytes(first.path)) == (str(low), files(1))
    assert watcher.check() is None
    registry.set_alias("iris", "production", high)
    third = watcher.check()
    assert third is not None
    assert (third.version, tree_bytes(third.path)) == (str(high), files(3))
    assert third.previous is first
    assert tree_bytes(first.path) == files(1)
    first.release()
    assert dest is None or len(list(dest.iterdir())) == 1
    # And back: that is a change, too.
    registry.set_alias("iris", "production", low)
    again = watcher.check()
    assert again is not None
    assert (again.version, tree_bytes(again.path)) == (str(low), files(1))


@pytest.fixture
def registry(tmp_path: Path, folder: MakeFolder) -> ModelRegistry:
    registry = ModelRegistry(FileStore(tmp_path / "registry").base, client=StorageClient())
    registry.init()
    push(registry, folder, 1)
    return registry


def test_without_an_alias_the_latest_version_is_told(
    registry: ModelRegistry, folder: MakeFolder
) -> None:
    told: list[WatchedModel] = []
    with registry.watch("iris", told.append, interval=OFTEN) as watcher:
        assert isinstance(watcher, RegistryWatcher)
        watcher.wait(PATIENCE)
        push(registry, folder, 2)
        until(lambda: len(told) == 2)
        registry.delete("iris", 2)
        until(lambda: len(told) == 3)
    assert [model.version for model in told] == ["1", "2", "1"]
    assert tree_bytes(told[1].path) == files(2)


def test_an_alias_that_is_not_set_yet_is_waited_for(registry: ModelRegistry) -> None:
    told: list[WatchedModel] = []
    errors: list[Exception] = []
    with registry.watch(
        "iris", told.append, alias="production", interval=OFTEN, on_error=errors.append
    ):
        until(lambda: errors)
        registry.set_alias("iris", "production", 1)
        until(lambda: told)
        registry.delete_alias("iris", "production")
        errors.clear()
        until(lambda: errors)
    assert isinstance(errors[0], ModelMissingError)
    assert [model.version for model in told] == ["1"]
    assert tree_bytes(told[0].path) == files(1)


def test_an_alias_that_moves_during_the_pull_gives_one_version_and_its_own_number(
    registry: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(registry, folder, 2)
    registry.set_alias("iris", "production", 1)
    watcher = registry.watch("iris", alias="production")
    resolve = registry.resolve
    moved: list[int] = []

    def late(*args: Any) -> int:
        number = resolve(*args)
        if not moved:
            moved.append(number)
            registry.set_alias("iris", "production", 2)
        return number

    monkeypatch.setattr(registry, "resolve", late)
    model = watcher.check()
    assert moved == [1]
    assert model is not None
    assert (model.version, tree_bytes(model.path)) == ("2", files(2))


def test_patterns_choose_files_of_each_version(registry: ModelRegistry) -> None:
    model = registry.watch("iris", allow_patterns="*.json").check()
    assert model is not None
    assert list(tree_bytes(model.path)) == ["config.json"]


def test_what_a_server_pulled_before_is_not_told(registry: ModelRegistry) -> None:
    path = registry.pull("iris")
    watcher = registry.watch("iris", current=path)
    assert watcher.check() is None
    assert watcher.current is not None
    assert watcher.current.version == "1"


def test_a_server_starts_with_what_the_alias_was_while_the_registry_is_away(
    s3_registry: ModelRegistry, folder: MakeFolder
) -> None:
    push(s3_registry, folder, 1)
    s3_registry.set_alias("iris", "production", 1)
    away = threading.Event()
    settings = load_settings(transfer={"attempts": 1})
    config = s3_registry.config
    with (
        CountingProxy(config.endpoint_url, lambda *_: 503 if away.is_set() else None) as proxy,
        StorageClient(settings=settings) as client,
    ):
        config = config.model_copy(update={"endpoint_url": proxy.endpoint})
        registry = ModelRegistry(str(s3_registry.location), config=config, client=client)
        assert registry.watch("iris", alias="production").check()
        away.set()
        told: list[WatchedModel] = []
        errors: list[Exception] = []
        with registry.watch(
            "iris", told.append, alias="production", interval=OFTEN, on_error=errors.append
        ) as watcher:
            assert tree_bytes(watcher.wait(PATIENCE).path) == files(1)
            assert isinstance(errors[0], TransferError)
            push(s3_registry, folder, 2)
            s3_registry.set_alias("iris", "production", 2)
            away.clear()
            until(lambda: len(told) == 2)
        assert tree_bytes(told[1].path) == files(2)
        away.set()
        with pytest.raises(TransferError):
            registry.watch("iris", alias="staging").check()


def test_names_that_cannot_be_are_refused(registry: ModelRegistry) -> None:
    with pytest.raises(InvalidInput):
        registry.watch("no/name")
    with pytest.raises(InvalidInput):
        registry.watch("iris", alias="no/alias")
    with pytest.raises(InvalidInput):
        registry.watch("iris", interval=-1)


def test_offline_what_the_cache_has_is_told(folder: MakeFolder, s3_registry: ModelRegistry) -> None:
    push(s3_registry, folder, 1)
    assert s3_registry.pull("iris")
    settings = load_settings(offline=True)
    with StorageClient(settings=settings) as client:
        offline = ModelRegistry(str(s3_registry.location), config=s3_registry.config, client=client)
        watcher = offline.watch("iris")
        model = watcher.check()
        assert model is not None
        assert tree_bytes(model.path) == files(1)
        assert watcher.check() is None


@pytest.fixture
def s3_registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefix: str
) -> ModelRegistry:
    from tests.facade.conftest import any_store

    store = any_store(request, tmp_path_factory, "seaweedfs-obstore", prefix)
    registry = ModelRegistry(store.base, config=store.config, client=StorageClient())
    registry.init()
    return registry
