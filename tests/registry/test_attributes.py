"""What is said of a version: changed by many, never lost."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage import InvalidInput, ModelMissingError
from storage.registry import Attributes, ModelRegistry, Version, layout
from tests.registry.conftest import MakeFolder
from tests.registry.stepping import Actor, World

ITSELF: dict[str, Any] = {}
ITSELF["inner"] = [ITSELF]


@pytest.fixture
def iris(here: ModelRegistry, folder: MakeFolder) -> ModelRegistry:
    """A registry with one version of ``iris``."""
    here.push(
        "iris",
        folder({"model": b"1"}),
        description="first",
        tags={"stage": "test", "team": "flowers"},
        configuration={"layers": [1, {"units": 8}], "seed": None, "name": "größe"},
        metrics={"accuracy": 0.5, "epochs": 3},
    )
    return here


def test_what_is_said_at_first_is_kept(iris: ModelRegistry) -> None:
    assert iris.show("iris").attributes == Attributes(
        "first",
        {"stage": "test", "team": "flowers"},
        {"layers": [1, {"units": 8}], "name": "größe", "seed": None},
        {"accuracy": 0.5, "epochs": 3},
    )


def test_names_alone_are_tags(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder({"model": b"1"}), tags=["checked", "small"])
    assert version.attributes.tags == {"checked": "", "small": ""}


def test_a_change_is_of_what_it_names_alone(iris: ModelRegistry) -> None:
    published = iris.find("iris")
    changed = iris.update("iris", 1, tags={"stage": "live", "team": None}, metrics={"f1": 0.7})
    assert changed.attributes.description == "first"
    assert changed.attributes.tags == {"stage": "live"}
    assert changed.attributes.metrics == {"accuracy": 0.5, "epochs": 3, "f1": 0.7}
    assert iris.show("iris") == changed
    assert iris.versions("iris") == [changed]
    assert iris.find("iris") == published
    assert iris.update("iris", description="").attributes.description == ""


def test_what_is_published_is_what_is_read(here: ModelRegistry, folder: MakeFolder) -> None:
    configuration: dict[str, Any] = {"shape": (1, 2), "inner": {"pair": ("a", None)}}
    version = here.push("iris", folder({"model": b"1"}), configuration=configuration)
    configuration["inner"]["pair"] = "changed later"
    assert version == here.show("iris")
    assert version.attributes.configuration == {"shape": [1, 2], "inner": {"pair": ["a", None]}}


def test_what_is_none_is_taken_away(iris: ModelRegistry) -> None:
    said = iris.update("iris", configuration={"seed": None, "x": 1}, metrics={"epochs": None})
    assert said.attributes.configuration == {"layers": [1, {"units": 8}], "name": "größe", "x": 1}
    assert said.attributes.metrics == {"accuracy": 0.5}


def test_a_change_of_nothing_leaves_no_trace(iris: ModelRegistry) -> None:
    before = iris.store.names("")
    iris.update("iris", description="first", tags={"stage": "test"})
    assert iris.store.names("") == before


def test_changes_of_many_at_once_are_all_there(iris: ModelRegistry) -> None:
    def tag(index: int) -> None:
        iris.update("iris", tags={f"t{index}": "x"}, metrics={f"m{index}": index})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tag, range(12)))
    said = iris.show("iris").attributes
    assert {f"t{index}" for index in range(12)} <= said.tags.keys()
    assert {f"m{index}": index for index in range(12)}.items() <= said.metrics.items()


@pytest.mark.parametrize(
    "said",
    [
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": 10**400}},
        {"metrics": {"loss": "0.5"}},
        {"tags": "word"},
        {"tags": {"a": 1}},
        {"tags": {"": "x"}},
        {"configuration": {"f": object()}},
        {"configuration": {"f": float("nan")}},
        {"configuration": {1: "x"}},
        {"configuration": {"x": [{2: "y"}]}},
        {"configuration": {"half": "\ud800"}},
        {"configuration": ITSELF},
        {"description": 3},
    ],
)
def test_what_cannot_be_written_down_is_refused_before_a_byte_is_sent(
    iris: ModelRegistry, folder: MakeFolder, said: dict[str, Any]
) -> None:
    before = iris.store.names("")
    with pytest.raises(InvalidInput):
        iris.push("tulip", folder({"model": b"2"}), **said)
    with pytest.raises(InvalidInput):
        iris.update("iris", **said)
    assert iris.store.names("") == before


@pytest.mark.parametrize("name", ["document", "where", "self", "", "ü ß"])
def test_a_metric_and_a_key_can_have_any_name(
    here: ModelRegistry, folder: MakeFolder, name: str
) -> None:
    said: dict[str, Any] = {"metrics": {name: 1}, "configuration": {name: 2}}
    said |= {"tags": {name: "x"}} if name else {}
    here.push("iris", folder({"model": b"1"}), **said)
    found = here.show("iris").attributes
    assert (found.metrics, found.configuration) == ({name: 1}, {name: 2})
    assert here.update("iris", **said).attributes == found


@pytest.mark.parametrize("parent", ["\ud800", True, 1.5, b"x"])
def test_a_parent_that_cannot_be_written_down_is_refused_before_a_byte_is_sent(
    here: ModelRegistry, folder: MakeFolder, parent: Any
) -> None:
    before = here.store.names("")
    with pytest.raises(InvalidInput):
        here.push("iris", folder({"model": b"1"}), parent=parent)
    assert here.store.names("") == before


def test_nothing_is_said_of_a_version_that_is_not_there(iris: ModelRegistry) -> None:
    with pytest.raises(ModelMissingError):
        iris.update("iris", 2, description="x")


def interrupted(
    first: Callable[[ModelRegistry], Any], second: Callable[[ModelRegistry], Any], folder: Path
) -> Iterator[tuple[World, Actor[Any]]]:
    """Yield worlds in which somebody did the first thing, and others the second before a call."""
    with contextlib.closing(World()) as world:
        world.registry.push("m", folder, description="as published")
        world.registry.update("m", tags={"t": "1"})
        world.registry.update("m", description="as changed")
        for calls in itertools.count():
            with contextlib.closing(world.copy()) as copy:
                actor = Actor(copy, first)
                actor.run(calls)
                if actor.has_ended:
                    break
                second(copy.registry)
                actor.run()
                yield copy, actor


@pytest.mark.parametrize("many", [False, True])
def test_what_was_said_is_seen_whole_or_not_at_all_while_a_version_is_deleted(
    folder: MakeFolder, many: bool
) -> None:
    def look(registry: ModelRegistry) -> list[Version]:
        return registry.versions("m") if many else [registry.show("m", 1)]

    whole, moments = Attributes("as changed", {"t": "1"}), 0
    source = folder({"model": b"1"})
    for _, reader in interrupted(look, lambda registry: registry.delete("m", 1), source):
        assert isinstance(reader.error, ModelMissingError | None)
        assert all(version.attributes == whole for version in reader.result or ())
        moments += 1
    assert moments > 5


def test_of_a_deleted_version_nothing_is_said_to_have_been_changed(folder: MakeFolder) -> None:
    def update(registry: ModelRegistry) -> Version:
        return registry.update("m", 1, metrics={"accuracy": 1})

    def delete(registry: ModelRegistry) -> None:
        registry.delete("m", 1)

    source, told = folder({"model": b"1"}), []
    for world, actor in interrupted(update, delete, source):
        assert isinstance(actor.error, ModelMissingError | None)
        if actor.error is None:
            assert actor.result is not None
            assert actor.result.attributes == Attributes(
                "as changed", {"t": "1"}, metrics={"accuracy": 1}
            )
        told.append(actor.error is None)
        # What was said meanwhile is not said of what has these files next, nor does it stay.
        again = world.registry.push("m", source, description="anew")
        assert world.registry.show("m") == again
        assert again.attributes == Attributes("anew")
        world.registry.gc()
        assert not world.names(layout.attribute_logs("m"))
    assert told[0] is False


def test_a_diff_tells_files_and_what_is_said(iris: ModelRegistry, folder: MakeFolder) -> None:
    iris.push("iris", folder({"a": b"1", "b": b"2", "c": b"3"}), metrics={"accuracy": 0.5})
    iris.push("iris", folder({"a": b"1", "b": b"4!", "d": b"3"}), metrics={"accuracy": 0.8})
    found = iris.diff("iris", 2, "latest")
    assert [file.path for file in found.added] == ["d"]
    assert [file.path for file in found.removed] == ["c"]
    assert [(old.path, old.size, new.size) for old, new in found.changed] == [("b", 1, 2)]
    assert [file.path for file in found.unchanged] == ["a"]
    assert found.attributes == {"metrics.accuracy": (0.5, 0.8)}
    assert found.fetched == 2
    assert iris.diff("iris", 3, 3).attributes == {}
