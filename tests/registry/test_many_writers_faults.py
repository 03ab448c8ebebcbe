"""Threads publish, delete and collect over a store that fails, and loses answers."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.config import load_settings
from storage.errors import ModelMissingError, TransferError
from storage.registry import ModelRegistry
from storage.registry.documents import Version
from storage.testing.faulty_backend import FaultyBackend
from tests.registry.stepping import World

SEEDS = range(200 if os.environ.get("STORAGE_SOAK") == "1" else 20)
# Others change nothing that a registry relies on: its documents have no digests.
FAULTS = ("refuse", "slow", "reset", "partial", "lost_answer")


class _Client(StorageClient):
    def __init__(self, seed: int) -> None:
        # So few tries that some of them are in vain.
        transfer = {"attempts": 3, "retry_wait": 0.001, "connections": 4}
        super().__init__(settings=load_settings(transfer=transfer))
        self._faulty: dict[int, Any] = {}
        self._seed = seed

    def backend(self, *args: Any, **options: Any) -> Any:
        found = super().backend(*args, **options)
        if id(found) not in self._faulty:
            self._faulty[id(found)] = FaultyBackend(found, self._seed, FAULTS, 0.2)
        return self._faulty[id(found)]


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_fails_the_registry_stays_right(seed: int, tmp_path: Path) -> None:
    world = World()
    folders = []
    for index in range(6):
        folder = tmp_path / f"{index}"
        folder.mkdir()
        (folder / "shared").write_bytes(b"%d" % (index % 2))
        (folder / "own").write_bytes(b"own %d" % index)
        folders.append(folder)
    acknowledged: list[Version] = []
    deleted: set[int] = set()
    failures: list[BaseException] = []
    failed_by_faults = []

    def publish(registry: ModelRegistry, dice: random.Random) -> None:
        acknowledged.append(registry.push("m", dice.choice(folders)))

    def delete(registry: ModelRegistry, dice: random.Random) -> None:
        numbers = registry.numbers("m")
        if numbers:
            number = dice.choice(numbers)
            # Whether it works or not: nobody can tell.
            deleted.add(number)
            registry.delete("m", number)

    def collect(registry: ModelRegistry, dice: random.Random) -> None:
        registry.gc(grace=dice.choice((0, 60)))

    def live(work: Callable[[ModelRegistry, random.Random], None], times: int, number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        registry = ModelRegistry(world.uri, client=_Client(100 * seed + number))
        for _ in range(times):
            try:
                work(registry, dice)
            except ModelMissingError:
                assert work is delete  # somebody else was faster
            except TransferError as exc:
                failed_by_faults.append(exc)

    def run(*args: Any) -> None:
        try:
            live(*args)
        except BaseException as exc:  # noqa: BLE001 -- raised below
            failures.append(exc)

    works = [(publish, 8)] * 4 + [(delete, 4), (collect, 8), (collect, 8)]
    threads = [
        threading.Thread(target=run, args=(*work, number)) for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    seen = world.check()
    assert acknowledged
    for version in acknowledged:
        if version.number not in deleted:
            assert seen["m", version.number] == version
    world.check_collected()
    for folder in folders:
        version = world.registry.push("m", folder)
        assert world.check()["m", version.number] == version
    world.close()
