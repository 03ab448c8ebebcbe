"""Listings in pages: of ten thousand versions, only the documents of one page are read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage import InvalidInput, ModelMissingError, StorageClient
from storage.backends.local.backend import LocalBackend
from storage.registry import ModelRegistry, Version, layout
from storage.registry.documents import encode
from tests.registry.conftest import MakeFolder

MANY = 10_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in a folder whose model has ten thousand versions, a few of them deleted."""
    root = tmp_path_factory.mktemp("many") / "registry"
    registry = ModelRegistry(root, client=StorageClient())
    registry.init()
    file = root.parent / "model"
    file.write_bytes(b"1")
    first = registry.push("iris", file)
    versions = root / layout.versions("iris")
    deleted = root / layout.deletions("iris")
    deleted.mkdir()
    for number in range(2, MANY + 1):
        (versions / f"{number:08}.json").write_bytes(replace(first, number=number).dumps())
    for number in (150, 9_999):
        (deleted / f"{number:08}.json").write_bytes(b"{}")
    return root


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """What is read, and by how many at once."""
    looks = Looks()
    read = LocalBackend.read

    def counted(backend: LocalBackend, key: str, *args: object) -> object:
        with looks:
            looks.keys.append(key)
            return read(backend, key, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalBackend, "read", counted)
    return looks


class Looks:
    """Counts reads."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1

    @property
    def documents(self) -> list[str]:
        return [key for key in self.keys if not key.endswith(layout.MARKER)]


def test_a_page_reads_its_documents_alone(many: Path, looks: Looks) -> None:
    registry = ModelRegistry(many)
    page = registry.versions("iris", page_size=100)
    assert [version.number for version in page] == list(range(1, 101))
    assert len(looks.documents) == 100
    page = registry.versions("iris", page_size=100, after=100)
    assert [version.number for version in page] == [*range(101, 150), *range(151, 202)]
    assert len(looks.documents) == 200
    assert looks.most <= registry.client.settings.transfer.connections


def test_the_newest_come_first_if_asked_to(many: Path) -> None:
    registry = ModelRegistry(many)
    page = registry.versions("iris", page_size=2, newest_first=True)
    assert [version.number for version in page] == [10_000, 9_998]
    page = registry.versions("iris", page_size=2, newest_first=True, after=9_998)
    assert [version.number for version in page] == [9_997, 9_996]


def test_numbers_and_the_latest_read_at_most_one_document(many: Path, looks: Looks) -> None:
    registry = ModelRegistry(many)
    assert len(registry.numbers("iris")) == MANY - 2
    assert looks.documents == []
    assert registry.find("iris").number == MANY
    assert len(looks.documents) == 1


def test_each_version_comes_once_page_by_page(many: Path, looks: Looks) -> None:
    registry = ModelRegistry(many)
    numbers = []
    for version in registry.each_version("iris"):
        numbers.append(version.number)
        assert len(looks.documents) <= len(numbers) + 100
        if len(numbers) == 450:
            break
    assert numbers == [number for number in range(1, 452) if number != 150]
    rest = registry.each_version("iris", after=9_997)
    assert [version.number for version in rest] == [9_998, 10_000]


def test_the_next_number_is_found_with_few_looks(
    here: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Path(str(here.location)) / layout.numbers("iris")
    claims.mkdir(parents=True)
    for number in range(1, 2_001):
        (claims / f"{number:08}.json").write_bytes(b"{}")
    asked: list[str] = []
    stat = LocalBackend.stat

    def counted(backend: LocalBackend, key: str, version: str | None = None) -> object:
        asked.append(key)
        return stat(backend, key, version)

    monkeypatch.setattr(LocalBackend, "stat", counted)
    assert here.push("iris", folder({"model": b"1"})).number == 2_001
    assert len([key for key in asked if "/numbers/" in key]) < 30
    asked.clear()
    assert here.push("iris", folder({"model": b"2"})).number == 2_002
    assert len([key for key in asked if "/numbers/" in key]) == 1


def test_a_version_that_vanishes_while_a_page_is_read_is_left_out(
    here: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [here.push("iris", folder({"model": b"%d" % index})) for index in range(3)]
    numbers: Callable[..., list[int]] = ModelRegistry.numbers

    def vanish(registry: ModelRegistry, model: str) -> list[int]:
        found = numbers(registry, model)
        registry.store.delete([layout.version("iris", 2)])
        return found

    monkeypatch.setattr(ModelRegistry, "numbers", vanish)
    assert here.versions("iris") == [made[0], made[2]]


def test_pages_of_what_is_not_there_are_refused(here: ModelRegistry, folder: MakeFolder) -> None:
    with pytest.raises(ModelMissingError, match="no version of a model 'iris'"):
        here.versions("iris")
    here.push("iris", folder({"model": b"1"}))
    with pytest.raises(InvalidInput, match="one version at least"):
        here.versions("iris", page_size=0)
    assert here.versions("iris", after=1) == []


def test_models_are_those_with_versions(here: ModelRegistry, folder: MakeFolder) -> None:
    for model in ("tulip", "iris", "gone"):
        here.push(model, folder({"model": model.encode()}))
    here.delete("gone", 1)
    here.begin("begun").abort()
    # As if those who deleted them had died in between.
    here.push("half-gone", folder({"model": b"1"}))
    here.store.create(layout.deleted("half-gone", 1), encode({}))
    here.push("tulip", folder({"model": b"2"}))
    here.store.create(layout.deleted("tulip", 1), encode({}))
    assert here.models() == ["iris", "tulip"]
    assert isinstance(here.show("tulip"), Version)
