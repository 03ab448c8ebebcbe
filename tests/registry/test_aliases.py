"""Aliases: one winner, a history, and never a version that is not there."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage import IntegrityError, InvalidInput, ModelMissingError, ObjectChangedError
from storage.registry import ModelRegistry, layout
from storage.registry.aliases import set_alias
from storage.registry.documents import encode
from storage.registry.objects import ObjectStore
from tests.registry.conftest import MakeFolder


@pytest.fixture
def iris(here: ModelRegistry, folder: MakeFolder) -> ModelRegistry:
    """A registry with three versions of ``iris``."""
    for index in range(3):
        here.push("iris", folder({"model": b"%d" % index}))
    return here


def test_an_alias_is_set_moved_and_deleted(iris: ModelRegistry) -> None:
    assert iris.set_alias("iris", "production", 1) == 1
    assert iris.set_alias("iris", "canary", "production") == 1
    assert iris.set_alias("iris", "production") == 3
    assert iris.aliases("iris") == {"canary": 1, "production": 3}
    iris.delete_alias("iris", "production")
    iris.delete_alias("iris", "never-there")
    assert iris.aliases("iris") == {"canary": 1}
    with pytest.raises(ModelMissingError, match="has no alias 'production'; it has canary"):
        iris.show("iris", "production")
    history = iris.alias_history("iris", "production")
    assert [(entry.index, entry.version) for entry in history] == [(3, None), (2, 3), (1, 1)]
    assert history[0].at >= history[1].at >= history[2].at


def test_setting_what_is_set_leaves_no_entry(iris: ModelRegistry) -> None:
    for _ in range(2):
        iris.set_alias("iris", "production", 2)
    assert len(iris.alias_history("iris", "production")) == 1


def test_what_is_expected_has_to_be_there(iris: ModelRegistry) -> None:
    with pytest.raises(ObjectChangedError, match="is not set, and was expected to be set to ver"):
        iris.set_alias("iris", "production", 1, expected=2)
    iris.set_alias("iris", "production", 1, expected=None)
    for expected in (None, 2):
        with pytest.raises(ObjectChangedError, match="is set to version 1"):
            iris.set_alias("iris", "production", 2, expected=expected)
        with pytest.raises(ObjectChangedError, match="is set to version 1"):
            iris.delete_alias("iris", "production", expected=expected)
    iris.delete_alias("iris", "production", expected=1)
    iris.set_alias("iris", "production", 3, expected=None)
    assert iris.aliases("iris") == {"production": 3}


def test_each_change_of_many_at_once_is_made_from_what_it_saw(iris: ModelRegistry) -> None:
    iris.set_alias("iris", "production", 1)

    def move(target: int) -> int:
        won = 0
        for _ in range(20):
            seen = iris.resolve("iris", "production")
            if seen == target:
                continue
            try:
                iris.set_alias("iris", "production", target, expected=seen)
                won += 1
            except ObjectChangedError:
                pass
        return won

    with ThreadPoolExecutor(3) as pool:
        won = sum(pool.map(move, (1, 2, 3)))
    history = iris.alias_history("iris", "production")
    assert len(history) == won + 1
    assert [entry.index for entry in history] == list(range(won + 1, 0, -1))
    assert all(one.version != other.version for one, other in itertools.pairwise(history))


@pytest.mark.parametrize("alias", ["latest", "12", "a/b", "", ".x", "x."])
def test_names_that_would_be_taken_for_something_else_are_refused(
    iris: ModelRegistry, alias: str
) -> None:
    with pytest.raises(InvalidInput):
        iris.set_alias("iris", alias, 1)
    with pytest.raises(InvalidInput):
        iris.delete_alias("iris", alias)


def test_a_number_that_is_absurd_is_refused(iris: ModelRegistry) -> None:
    with pytest.raises(InvalidInput):
        iris.show("iris", "9" * 5000)
    with pytest.raises(ModelMissingError):
        iris.show("iris", "9" * 200)


def test_an_alias_needs_a_version_that_is_there(iris: ModelRegistry) -> None:
    with pytest.raises(ModelMissingError, match="version 7 of 'iris' is not there"):
        iris.set_alias("iris", "production", 7)
    iris.delete("iris", 1)
    with pytest.raises(ModelMissingError, match="version 1 of 'iris' was deleted"):
        iris.set_alias("iris", "production", 1)
    assert iris.alias_history("iris", "production") == []


@pytest.mark.parametrize("mark", ["deleted/", "deleting/00000001/"])
@pytest.mark.parametrize("before", [2, None])
def test_an_alias_goes_back_if_somebody_deletes_the_version_meanwhile(
    iris: ModelRegistry, before: int | None, mark: str
) -> None:
    if before is not None:
        iris.set_alias("iris", "production", before)
    iris.store.create(layout.entry(f"models/iris/{mark}", 1), encode({}))
    # As if it was looked at before the mark was there.
    with pytest.raises(
        ModelMissingError, match="is being deleted; the alias 'production' was not set to it"
    ):
        set_alias(iris.store, "iris", "production", 1)
    assert iris.aliases("iris").get("production") == before


def test_an_alias_does_not_go_back_to_what_was_deleted_meanwhile(iris: ModelRegistry) -> None:
    iris.set_alias("iris", "production", 2)
    for number in (1, 2):
        iris.store.create(layout.deleted("iris", number), encode({}))
    with pytest.raises(ModelMissingError, match="is being deleted"):
        set_alias(iris.store, "iris", "production", 1)
    assert iris.aliases("iris") == {}


@pytest.mark.parametrize("reference", ["production", "latest"])
def test_a_version_that_an_alias_leaves_and_that_is_deleted_is_not_missed(
    iris: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    iris.set_alias("iris", "production", 3)
    read = ObjectStore.read

    def meddled(store: ObjectStore, name: str) -> bytes | None:
        if name == layout.version("iris", 3):
            monkeypatch.setattr(ObjectStore, "read", read)
            iris.set_alias("iris", "production", 2)
            iris.delete("iris", 3)
        return read(store, name)

    monkeypatch.setattr(ObjectStore, "read", meddled)
    assert iris.find("iris", reference).number == 2


def test_a_damaged_entry_is_an_error(iris: ModelRegistry) -> None:
    iris.store.create(layout.entry(layout.alias("iris", "production"), 1), encode({}))
    with pytest.raises(IntegrityError, match="version is missing"):
        iris.resolve("iris", "production")
