"""Somebody pulls the plug at any moment of some downloads: nothing wrong is ever served."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage import OfflineError, StorageClient
from storage.cache.evict import evict
from storage.cache.verify import verify
from storage.config import load_settings
from storage.uri import parse_uri
from tests.cache.boots import reboot
from tests.cache.disk import DAMAGES, Camera, Disk, restore
from tests.cache.support import Source, tree_bytes, wrong_blobs
from tests.servers import small_disk

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1

FIRST = {"model.bin": b"weights" * 1000, "config/a.json": b"{}", "same.txt": b"same"}
SECOND = {"model.bin": b"WEIGHTS" * 1000, "config/b.json": b"{}", "same.txt": b"same"}


@dataclass
class Film:
    """What was on the disk after each change of some downloads, and what they brought."""

    tree: str
    archive: str
    config: Any
    pictures: list[Disk]
    ends: dict[str, int]
    """How many pictures there were when each of the downloads returned."""


@pytest.fixture
def shoot(source: Source, served_archive: str) -> Iterator[Callable[[bool], tuple[Film, Path]]]:
    """Record downloads into a new cache, durable or not, on a small disk."""
    with small_disk(mebibytes=64) as disk:

        def record(durable: bool) -> tuple[Film, Path]:
            top = disk / "now"
            top.mkdir()
            uri = source.put_model(FIRST)
            with Camera(top) as camera:
                film = Film(uri, served_archive, source.config, camera.pictures, {})
                settings = load_settings(cache_dir=top / "cache", durable=durable, cache_grace=0.0)
                with StorageClient(settings=settings) as client:

                    def download(step: str, what: str, **options: Any) -> None:
                        config = source.config if what == uri else None
                        client.download(what, config=config, **options)
                        film.ends[step] = len(camera.pictures)

                    download("first", uri)
                    download("archive", served_archive, unpack=True)
                    download("again", uri)
                    source.put_model(SECOND)
                    download("second", uri)
                    download("archive again", served_archive, unpack=True)
                    # The archive and the old version go; what the new one shares with it stays.
                    client.cache.pin(parse_uri(uri))
                    client.cache.close()
                    evict(client.cache, 0)
            assert len(camera.pictures) > film.ends["archive again"] + 5
            return film, disk / "left"

        yield record


def look(film: Film, left: Path) -> tuple[str, str]:
    """Say what a cache serves without a network: ``right``… or ``refused``, of both models."""
    settings = load_settings(cache_dir=left / "cache", offline=True)
    with StorageClient(settings=settings) as client:
        try:
            tree = tree_bytes(client.download(film.tree, config=film.config))
            assert tree in (FIRST, SECOND)
            found = "first" if tree == FIRST else "second"
        except OfflineError:
            found = "refused"
        try:
            unpacked = Path(client.download(film.archive, unpack=True))
            program = b"#!/bin/sh\n" * 100
            assert tree_bytes(unpacked) == {"bin/run": program, "link": program, "data": b"data"}
            assert stat.S_IMODE((unpacked / "bin/run").stat().st_mode) & 0o100
            assert os.readlink(unpacked / "link") == "bin/run"
            assert os.listdir(unpacked / "none") == []
            other = "archive"
        except OfflineError:
            other = "refused"
    client.cache.close()
    return found, other


def heal(film: Film, left: Path) -> None:
    """See that the next download makes everything right."""
    settings = load_settings(cache_dir=left / "cache")
    with StorageClient(settings=settings) as client:
        assert tree_bytes(client.download(film.tree, config=film.config)) == SECOND
        client.download(film.archive, unpack=True)
        # What is left of the old version is nobody's any more.
        client.repair(full=True, config=film.config)
        assert verify(client.cache, full=True).problems == ()
    client.cache.close()
    assert wrong_blobs(left / "cache") == []
    assert look(film, left) == ("second", "archive")


def watch(
    film: Film,
    left: Path,
    durable: bool,
    rng: random.Random,
    cuts: Callable[[], Iterator[dict[str, Any]]],
    heal_one_in: int,
) -> dict[tuple[str, str], int]:
    """Pull the plug at every moment, in each of the ways that ``cuts`` gives."""
    seen: dict[tuple[str, str], int] = {}
    for number, picture in enumerate(film.pictures):
        for cut in cuts():
            restore(picture, left, **cut)
            try:
                found = look(film, left)
                seen[found] = seen.get(found, 0) + 1
                if durable:
                    # What a durable download returned is there for good.
                    if number >= film.ends["first"] - 1:
                        assert found[0] != "refused", number
                    if film.ends["archive"] - 1 <= number < film.ends["archive again"]:
                        assert found[1] == "archive", number
                    if number >= film.ends["second"] - 1:
                        assert found[0] == "second", number
                if rng.randrange(heal_one_in) == 0:
                    heal(film, left)
            finally:
                shutil.rmtree(left)
    return seen


@pytest.mark.kinds("s3")
@pytest.mark.parametrize("durable", [True, False])
def test_at_no_moment_is_anything_wrong_left(
    shoot: Callable[[bool], tuple[Film, Path]],
    monkeypatch: pytest.MonkeyPatch,
    durable: bool,
) -> None:
    film, left = shoot(durable)
    reboot(monkeypatch)
    rng = random.Random(0)

    def cuts() -> Iterator[dict[str, Any]]:
        # Nothing stays but what was synced; or all names stay, with nothing behind all of them
        # or some.
        yield {"lost": lambda what: True}
        damage, share = rng.choice([*DAMAGES.values()]), rng.choice([0.05, 0.1, 1])
        yield {"lost": lambda what: what == "content" and rng.random() < share, "damage": damage}

    seen = watch(film, left, durable, rng, cuts, 80)
    # What is seen of a download that was not durable is chance, unless all that it wrote is there.
    ends = {
        "archive": ("first", "archive"),
        "archive again": ("second", "archive"),
        "eviction": ("second", "refused"),
    }
    film.ends["eviction"] = len(film.pictures)
    for step, expected in ends.items():
        restore(film.pictures[film.ends[step] - 1], left, lost=lambda what: False)
        assert look(film, left) == expected, step
        shutil.rmtree(left)
    assert {("refused", "refused"), ("first", "refused"), ("second", "refused")} <= seen.keys()
    if durable:
        assert {("first", "archive"), ("second", "archive")} <= seen.keys()


@pytest.mark.kinds("s3")
@pytest.mark.slow
@pytest.mark.parametrize("durable", [True, False])
def test_at_no_moment_is_anything_wrong_left_of_what_may_be(
    shoot: Callable[[bool], tuple[Film, Path]],
    monkeypatch: pytest.MonkeyPatch,
    durable: bool,
) -> None:
    film, left = shoot(durable)
    reboot(monkeypatch)
    rng = random.Random(1)

    def cuts() -> Iterator[dict[str, Any]]:
        yield {"lost": lambda what: False}
        for _ in range(6 * SOAK):
            share = rng.choice([0.05, 0.2, 0.5, 0.8, 0.95])
            yield {
                "lost": lambda what, share=share: rng.random() < share,
                "damage": lambda data: rng.choice([*DAMAGES.values()])(data),
            }

    seen = watch(film, left, durable, rng, cuts, 100)
    assert ("refused", "refused") in seen
    assert ("second", "archive") in seen
