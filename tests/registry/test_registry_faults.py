"""A registry over a network that breaks: what is acknowledged is there, and nothing else is."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient, StorageError
from storage.backends.base import Backend
from storage.config import load_settings
from storage.registry import ModelRegistry, Version
from storage.testing.faulty_backend import FaultyBackend
from storage.uri import Location
from tests.facade.stores import MemoryStore

FAULTS = (
    "refuse",
    "retry_after",
    "reset",
    "truncate",
    "extra",
    "flip",
    "stale",
    "anonymous",
    "partial",
    "lost_answer",
)
SEEDS = 200 if os.environ.get("STORAGE_SOAK") == "1" else 20


class Faulty(StorageClient):
    """A client over a network that breaks as its seed says."""

    def __init__(self, seed: int, faults: tuple[str, ...] = FAULTS, attempts: int = 4) -> None:
        transfer = {"retry_wait": 0.001, "attempts": attempts, "retry_budget": 10_000}
        super().__init__(settings=load_settings(transfer=transfer))
        self._seed = seed
        self._faults = faults
        self._made: FaultyBackend | None = None

    def backend(self, location: Location, config: Any = None, *, durable: bool = False) -> Backend:
        if self._made is None:
            self._made = FaultyBackend(
                super().backend(location, config), self._seed, self._faults, 0.2
            )
        return self._made


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_is_acknowledged_is_there_and_right(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    uri = MemoryStore().base
    sound = ModelRegistry(uri, client=StorageClient())
    sound.init()
    registry = ModelRegistry(uri, client=Faulty(seed))
    made: dict[int, Version] = {}
    alias: int | None = None
    sure = True
    for step in range(12):
        source = tmp_path / "model"
        source.write_bytes(b"%d" % chance.randrange(8))
        try:
            if chance.random() < 0.6 or not made:
                version = registry.push("iris", source, metrics={"step": step})
                assert made.setdefault(version.number, version) == version
                assert sound.store.read(version.files[0].name) == source.read_bytes()
            elif chance.random() < 0.5:
                number = chance.choice(list(made))
                before, sure = sure, False
                expected: Any = {"expected": alias} if before else {}
                registry.set_alias("iris", "production", number, **expected)
                alias, sure = number, True
            else:
                number = chance.choice(list(made))
                assert registry.show("iris", number).files == made[number].files
        except StorageError:
            continue
    for number, version in made.items():
        assert sound.find("iris", number) == version
    numbers = sound.numbers("iris")
    contents = [sound.find("iris", number).content for number in numbers]
    assert len(set(contents)) == len(contents)
    assert set(made) <= set(numbers)
    if sure:
        assert sound.aliases("iris").get("production") == alias


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_passes_by_itself_is_not_seen(seed: int, tmp_path: Path) -> None:
    uri = MemoryStore().base
    client = Faulty(seed, ("lost_answer", "flip", "truncate"), attempts=20)
    registry = ModelRegistry(uri, client=client)
    registry.init()
    source = tmp_path / "model"
    for index in range(5):
        source.write_bytes(b"%d" % index)
        assert registry.push("iris", source).number == index + 1
        registry.set_alias("iris", "production", index + 1, expected=index or None)
    history = registry.alias_history("iris", "production")
    assert [entry.version for entry in history] == [5, 4, 3, 2, 1]
    assert registry.pending() == []
