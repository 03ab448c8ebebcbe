"""Whoever uses a registry is interrupted before every single call to the store, by others.

Two at a time: one runs up to some call, the other one up to some call, then the first to the end,
then the other. Every pair of calls is tried (a part of them unless ``STORAGE_SOAK=1``), each with
and without a collection, for which every publisher is dead, at both changes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from storage.errors import InvalidInput, ModelMissingError
from storage.registry import ModelRegistry, layout
from storage.registry.leases import Lease
from tests.registry.stepping import Actor, World, schedules

SOAK = os.environ.get("STORAGE_SOAK") == "1"
# No divisor of what is likely to be the number of calls, so that it meets all of them.
STRIDE = 1 if SOAK else 17

Work = Callable[[ModelRegistry], Any]

FILES: Mapping[str, Mapping[str, bytes]] = {
    "live": {"a": b"alpha", "shared": b"shared"},
    # Deleted: nobody needs its blob any more.
    "gone": {"b": b"beta"},
    # Of what is garbage, what is in use and what is not there.
    "mixed": {"b": b"beta", "shared": b"shared", "new/c": b"gamma"},
    "new": {"d": b"delta", "again": b"delta"},
}
LIVE, GONE = 1, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    base = tmp_path_factory.mktemp("models")
    for name, files in FILES.items():
        for path, data in files.items():
            target = base / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    return {name: base / name for name in FILES}


@pytest.fixture(scope="module")
def first_world(folders: Mapping[str, Path]) -> Iterator[World]:
    world = World()
    registry = world.registry
    assert registry.push("m", folders["live"]).number == LIVE
    assert registry.push("m", folders["gone"]).number == GONE
    registry.delete("m", GONE)
    # Somebody died, after he had uploaded something.
    dead = Actor(world, lambda registry: registry.push("m", folders["new"]))
    dead.run_until("write", "blobs/")
    dead.run(1)
    dead.kill()
    yield world
    world.close()


def publish(name: str) -> Callable[[Mapping[str, Path]], Work]:
    return lambda folders: lambda registry: registry.push("m", folders[name])


def publish_slowly(name: str) -> Callable[[Mapping[str, Path]], Work]:
    def work(folders: Mapping[str, Path]) -> Work:
        def run(registry: ModelRegistry) -> Any:
            with registry.begin("m") as pending:
                pending.add(folders[name])
                return pending.commit()

        return run

    return work


def collect(grace: float) -> Callable[[Mapping[str, Path]], Work]:
    return lambda _: lambda registry: registry.gc(grace=grace)


def delete(number: int) -> Callable[[Mapping[str, Path]], Work]:
    return lambda _: lambda registry: registry.delete("m", number)


def set_alias(number: int) -> Callable[[Mapping[str, Path]], Work]:
    return lambda _: lambda registry: registry.set_alias("m", "production", number)


def update(number: int) -> Callable[[Mapping[str, Path]], Work]:
    return lambda _: lambda registry: registry.update("m", number, description="changed")


ACTORS: Mapping[str, Callable[[Mapping[str, Path]], Work]] = {
    "publish live": publish("live"),
    "publish gone": publish("gone"),
    "publish mixed": publish("mixed"),
    "publish new": publish("new"),
    "slowly gone": publish_slowly("gone"),
    "slowly mixed": publish_slowly("mixed"),
    "collect": collect(3600),
    "collect all": collect(0),
    "delete live": delete(LIVE),
    "alias live": set_alias(LIVE),
    "update live": update(LIVE),
}
PAIRS = [
    ("publish gone", "collect"),
    ("publish gone", "collect all"),
    ("publish mixed", "collect"),
    ("publish mixed", "collect all"),
    ("publish new", "collect all"),
    ("slowly gone", "collect all"),
    ("slowly mixed", "collect"),
    ("publish gone", "publish gone"),
    ("publish mixed", "slowly mixed"),
    ("publish live", "delete live"),
    ("publish live", "collect all"),
    ("delete live", "delete live"),
    ("delete live", "collect all"),
    ("delete live", "alias live"),
    ("delete live", "update live"),
    ("collect all", "collect all"),
]


@pytest.mark.slow
@pytest.mark.timeout(1200 if SOAK else 300)
@pytest.mark.parametrize("meddled", [False, True], ids=["alone", "meddled"])
@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_interrupted_anywhere_two_leave_a_registry_right(
    one: str, two: str, meddled: bool, first_world: World, folders: Mapping[str, Path]
) -> None:
    works = {name: ACTORS[name](folders) for name in (one, two)}
    calls, others = (_length(first_world, works[name]) for name in (one, two))
    tried = 0
    for swapped, before, between in schedules(calls, others, STRIDE):
        world = first_world.copy()
        names = (two, one) if swapped else (one, two)
        first, second = (Actor(world, works[name]) for name in names)
        first.run(before)
        _meddle(world, meddled)
        second.run(between)
        _meddle(world, meddled)
        world.check()
        first.run()
        world.check()
        second.run()
        for name, actor in zip(names, (first, second), strict=True):
            _check_answer(world, name, actor)
        _check_end(world, folders, {first.error, second.error})
        world.close()
        tried += 1
    assert tried


@pytest.mark.parametrize("name", [name for name in ACTORS if name != "alias live"])
def test_killed_before_any_call_it_leaves_a_registry_right(
    name: str, first_world: World, folders: Mapping[str, Path]
) -> None:
    work = ACTORS[name](folders)
    for calls in range(_length(first_world, work) + 1):
        world = first_world.copy()
        known = world.check()
        actor = Actor(world, work)
        actor.run(calls)
        actor.kill()
        seen = world.check()
        # What is seen was committed whole; what was not deleted is seen.
        if name == "delete live":
            assert seen.keys() <= known.keys()
        else:
            assert seen.keys() >= known.keys()
            assert len(seen) - len(known) in (0, 1)
        for again in ("gone", "mixed"):
            version = world.registry.push("m", folders[again])
            assert world.check()["m", version.number] == version
        _check_end(world, folders, set())
        world.close()


def test_a_collector_that_wakes_up_late_removes_nothing_that_was_published_meanwhile(
    first_world: World, folders: Mapping[str, Path]
) -> None:
    world = first_world.copy()
    late = Actor(world, lambda registry: registry.gc(grace=0))
    late.run_until("delete", "blobs/")
    # It has decided, and stops before it removes the first blob. Others find what it left, more
    # than once, and use what it condemned.
    versions = [world.registry.push("m", folders[name]) for name in ("gone", "mixed", "new")]
    world.registry.gc(grace=0)
    world.registry.delete("m", versions[0].number)
    world.registry.gc(grace=0)
    again = world.registry.push("m", folders["gone"])
    late.run()
    assert late.error is None
    seen = world.check()
    for version in (*versions[1:], again):
        assert seen["m", version.number] == version
    world.check_collected()
    world.close()


def test_what_a_stopped_collector_condemned_stays_condemned_while_it_is_there(
    first_world: World, folders: Mapping[str, Path]
) -> None:
    world = first_world.copy()
    beta = blake3(b"beta").hexdigest()
    (condemned,) = world.names(layout.blob_incarnations(beta))
    late = Actor(world, lambda registry: registry.gc(grace=3600))
    late.run_until("delete", "blobs/")
    # Somebody's lease keeps the next collector from removing the blob, too.
    with Lease.take(world.registry.store, "m", [beta], pending="p"):
        assert world.registry.gc().removed == 0
    version = world.registry.push("m", folders["gone"])
    assert condemned not in version.blobs
    late.run()
    assert world.check()["m", version.number] == version
    assert condemned not in world.names()
    world.check_collected()
    world.close()


@pytest.mark.parametrize("killed", [False, True], ids=["slow", "killed"])
@pytest.mark.parametrize("early", [False, True], ids=["late publisher", "early publisher"])
def test_a_collection_that_is_called_off_at_any_moment_harms_nobody(
    early: bool, killed: bool, first_world: World, folders: Mapping[str, Path]
) -> None:
    beta = blake3(b"beta").hexdigest()
    removed = set()
    for calls, more in itertools.product(range(20), range(1, 6)):
        world = first_world.copy()
        slow = Actor(world, lambda registry: registry.gc(grace=3600))
        slow.run_until("write", "verdict")
        other = Actor(world, lambda registry: registry.gc(grace=0))
        other.run_until("list", "uploads/")
        before = len(other.calls)
        # So that others leave the blob that is condemned by now.
        with Lease.take(world.registry.store, "m", [beta], pending="p"):
            other.run(calls)
            if early:
                version = world.registry.push("m", folders["gone"])
            slow.run(more)
            other.run()
            world.registry.gc()
        if not early:
            version = world.registry.push("m", folders["gone"])
        if killed:
            slow.kill()
        else:
            slow.run()
            assert slow.error is None
            assert slow.result is not None
            removed.add(slow.result.removed)
        assert other.error is None
        assert world.check()["m", version.number] == version
        world.check_collected()
        world.close()
    assert len(other.calls) - before <= calls, "there are more moments"
    assert killed or len(removed) > 1, "it was always, or never, called off"


def _length(first_world: World, work: Work) -> int:
    world = first_world.copy()
    actor = Actor(world, work)
    actor.run()
    assert actor.error is None
    world.close()
    return len(actor.calls)


def _meddle(world: World, meddled: bool) -> None:
    if meddled:
        world.registry.gc(grace=0)


def _check_answer(world: World, name: str, actor: Actor[Any]) -> None:
    verb = name.partition(" ")[0]
    if verb in ("publish", "slowly"):
        assert actor.error is None, actor.error
        version = actor.result
        assert version is not None
        if world.is_deleted(version.number):
            mark = f"models/m/deleted/{version.number:08}.json"
            assert mark not in actor.gone_before, "it got what was deleted before it began"
        else:
            assert world.visible()["m", version.number] == version
    elif verb == "collect":
        assert actor.error is None, actor.error
    elif verb == "delete":
        assert isinstance(actor.error, ModelMissingError | InvalidInput | None), actor.error
        if not isinstance(actor.error, InvalidInput):
            assert world.is_deleted(LIVE)
    else:
        assert isinstance(actor.error, ModelMissingError | None), actor.error


def _check_end(
    world: World, folders: Mapping[str, Path], errors: set[BaseException | None]
) -> None:
    if len(errors - {None}) > 1:
        # Whoever comes second fails, and one of them is first; unless both saw the other.
        kinds = {type(error) for error in errors}
        assert kinds <= {InvalidInput, ModelMissingError}
    production = world.registry.aliases("m").get("production")
    assert production is None or ("m", production) in world.visible()
    world.check_collected()
    for folder in folders.values():
        version = world.registry.push("m", folder)
        assert world.registry.push("m", folder) == version
    world.check()
