"""Deleting versions: refused, forced, interrupted, and for good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import InvalidInput, ModelMissingError
from storage.registry import gc, layout
from tests.registry.stepping import Actor, World


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"alpha")
    return tmp_path / "model"


@pytest.fixture
def world(source: Path) -> Iterator[World]:
    made = World()
    assert made.registry.push("m", source).number == 1
    made.registry.update("m", 1, description="changed")
    yield made
    made.close()


def test_a_deleted_version_is_gone_and_its_number_is_not_given_again(
    world: World, source: Path
) -> None:
    registry = world.registry
    registry.delete("m", 1)
    assert registry.numbers("m") == []
    for look in (registry.show, registry.find, registry.pull):
        with pytest.raises(ModelMissingError):
            look("m", 1)
    assert not world.names("models/m/versions/") | world.names("models/m/attributes/")
    assert registry.push("m", source).number == 2
    assert registry.numbers("m") == [2]


def test_deleting_what_is_not_there_says_so(world: World) -> None:
    registry = world.registry
    with pytest.raises(ModelMissingError, match="version 7 of 'm'"):
        registry.delete("m", 7)
    with pytest.raises(ModelMissingError, match="version 1 of 'other'"):
        registry.delete("other", 1)
    registry.delete("m", 1)
    with pytest.raises(ModelMissingError, match="version 1 of 'm'"):
        registry.delete("m", 1)


def test_what_an_alias_is_set_to_is_deleted_only_by_force(world: World, source: Path) -> None:
    registry = world.registry
    registry.set_alias("m", "production", 1)
    registry.set_alias("m", "candidate", 1)
    before = world.names()
    with pytest.raises(InvalidInput, match="candidate, production"):
        registry.delete("m", 1)
    assert world.names() == before
    registry.delete("m", 1, force=True)
    with pytest.raises(ModelMissingError):
        registry.show("m", "production")
    # Not the version that has the files now, either: nobody set the alias to that.
    assert registry.push("m", source).number == 2
    with pytest.raises(ModelMissingError, match="production"):
        registry.show("m", "production")


def test_an_alias_that_was_moved_does_not_protect_any_more(world: World, source: Path) -> None:
    registry = world.registry
    registry.set_alias("m", "production", 1)
    (source / "b").write_bytes(b"beta")
    registry.set_alias("m", "production", registry.push("m", source).number)
    registry.delete("m", 1)
    assert registry.show("m", "production").number == 2


def test_killed_before_any_call_it_deleted_all_or_nothing(world: World, source: Path) -> None:
    lengths = Actor(world.copy(), lambda registry: registry.delete("m", 1))
    lengths.run()
    outcomes = set()
    for calls in range(len(lengths.calls) + 1):
        again = world.copy()
        dead = Actor(again, lambda registry: registry.delete("m", 1))
        dead.run(calls)
        dead.kill()
        is_gone = again.is_deleted(1)
        outcomes.add(is_gone)
        assert again.check().keys() == (set() if is_gone else {("m", 1)})
        assert again.registry.numbers("m") == ([] if is_gone else [1])
        again.registry.gc()
        if is_gone:
            left = again.names("models/m/versions/") | again.names("models/m/attributes/")
            assert not left
            assert not again.names("models/m/deleting/") | again.names(layout.BLOBS)
        else:
            again.registry.delete("m", 1)
            assert not again.check()
        again.close()
    assert outcomes == {False, True}


def test_an_intent_that_was_given_up_bars_aliases_until_a_collection_finds_it_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Actor(world, lambda registry: registry.delete("m", 1))
    dead.run_until("write", "deleted/")
    dead.kill()
    registry = world.registry
    with pytest.raises(ModelMissingError, match="being deleted"):
        registry.set_alias("m", "production", 1)
    assert registry.gc(grace=0).leftovers == 0
    monkeypatch.setattr(gc, "GRACE", 0.0)
    assert registry.gc(grace=0).leftovers == 1
    assert registry.set_alias("m", "production", 1) == 1


def test_a_helper_that_comes_late_brings_nothing_back(world: World, source: Path) -> None:
    # Committed, and not seen yet: whoever publishes the same helps.
    (source / "b").write_bytes(b"beta")
    first = Actor(world, lambda registry: registry.push("m", source))
    first.run_until("write", "versions/")
    late = Actor(world, lambda registry: registry.push("m", source))
    late.run_until("write", "versions/")
    first.run()
    assert first.result is not None
    number = first.result.number
    world.registry.delete("m", number)
    late.run()
    assert layout.version("m", number) in world.names()
    assert world.registry.numbers("m") == [1]
    assert world.registry.push("m", source).number > number
    world.registry.gc()
    assert layout.version("m", number) not in world.names()
    world.check_collected()
