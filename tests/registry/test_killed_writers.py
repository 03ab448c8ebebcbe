"""A publisher that is killed, at any call to the store, leaves nothing half done that is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.config import load_settings
from storage.errors import TransferError, TransientError
from storage.registry import ModelRegistry
from tests.facade.stores import tree_bytes
from tests.registry.stepping import World
from tests.registry.writers import MODEL, Job, Process, check

FILES = {"weights.bin": "weights" * 1000, "sub/config.json": "{}", "sub/again": "{}"}


@pytest.mark.slow
def test_killed_at_any_step_it_leaves_nothing_seen_and_the_next_one_publishes(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    seen, unseen, tick, status = 0, 0, 0, -9
    with Process(Job("steps", "", files=FILES)) as process:
        while status:
            tick += 1
            registry = ModelRegistry(tmp_path / f"registry{tick}")
            registry.init()
            status = int(process.ask(json.dumps([str(registry.location), tick])))
            assert status in (0, -9), f"a child ended with {status}"
            before = check(registry)
            if before:
                # Only what was committed, and that is all of it.
                seen += 1
                pulled = registry.pull(MODEL, dest=tmp_path / f"pulled{tick}")
                assert tree_bytes(pulled) == tree_bytes(folder)
            else:
                unseen += 1
            version = registry.push(MODEL, folder)
            registry.gc(grace=0)
            assert check(registry) == {version.number: version}
            assert set(registry.store.names("blobs/")) == version.blobs
            assert not registry.pending()
    # Most of the work is done before anybody sees it.
    assert unseen > seen > 1


class _Silent:
    """A backend that gives no answer to a write below ``contents/``, done or not."""

    def __init__(self, backend: Any, is_done: bool) -> None:
        self._backend = backend
        self._is_done = is_done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write(self, key: str, *args: Any, **options: Any) -> Any:
        is_commit = "contents/" in key
        result = self._backend.write(key, *args, **options) if self._is_done or not is_commit else 0
        if is_commit:
            raise TransientError("no answer, for the test")
        return result


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "not done"])
def test_a_commit_without_an_answer_is_left_to_those_who_come_later(
    is_done: bool, tmp_path: Path
) -> None:
    class Client(StorageClient):
        def backend(self, *args: Any, **options: Any) -> Any:
            return _Silent(super().backend(*args, **options), is_done)

    world = World()
    client = Client(settings=load_settings(transfer={"attempts": 1}))
    registry = ModelRegistry(world.uri, client=client)
    (tmp_path / "a").write_bytes(b"alpha")
    with pytest.raises(TransferError, match="publish it again"):
        registry.push(MODEL, tmp_path)
    # It may come true at any time, so what it needs stays.
    assert len(world.registry.pending()) == 1
    world.registry.gc()
    assert world.names("blobs/")
    version = world.registry.push(MODEL, tmp_path)
    assert version.number == (1 if is_done else 2)
    assert world.check() == {(MODEL, version.number): version}
    world.check_collected()
    assert world.check() == {(MODEL, version.number): version}
    world.close()
