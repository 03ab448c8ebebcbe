"""Many processes publish to one model, while some are killed and others collect all along.

Each publisher writes down, in a file of its own, what was acknowledged to it. At the end all of
that is there, once, under its number, and right to the last byte. ``STORAGE_SOAK=1`` lets each
publish ten times as much.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from storage.registry import ModelRegistry, layout
from tests.facade.stores import tree_bytes
from tests.registry.writers import MODEL, Job, Process, check, files_of

SOAK = os.environ.get("STORAGE_SOAK") == "1"
WRITERS = 8
# Losers of a race to create an object wait for seconds on SeaweedFS.
PUBLISHES = {"seaweedfs": 25 if SOAK else 3}
ALL_PUBLISHES = 200 if SOAK else 20
# So often a process is killed, on average, for each so many acknowledgements.
KILLED = 40
# Seconds; a machine that does nothing else needs 20.
LIMIT = 1500 if SOAK else 900


@dataclass(frozen=True)
class Place:
    uri: str
    config: Mapping[str, Any] | None = None


@pytest.fixture(params=["directory", "azurite", "gcs", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Place]:
    get: Callable[[str], Any] = request.getfixturevalue
    prefix = uuid4().hex
    if request.param == "directory":
        return request.param, Place(f"file://{tmp_path}/registry")
    if request.param == "azurite":
        server, container = get("azurite"), get("azurite_container")
        config = {
            "type": "azure",
            "account_name": server.main.name,
            "account_key": server.main.key,
            "endpoint_url": server.account_url(),
        }
        return request.param, Place(f"azure://{container}/{prefix}", config)
    if request.param == "gcs":
        server, bucket = get("gcs_server"), get("gcs_bucket")
        config = {"type": "gcs", "token": "any", "endpoint_url": server.endpoint}
        config |= {"project_id": server.project, "driver": "fsspec"}
        return request.param, Place(f"gs://{bucket}/{prefix}", config)
    server, bucket = get("seaweedfs"), get("seaweedfs_bucket")
    config = {
        "type": "s3",
        "access_key_id": server.admin.access_key,
        "secret_access_key": server.admin.secret_key,
        "endpoint_url": server.endpoint,
    }
    return request.param, Place(f"s3://{bucket}/{prefix}", config)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 300)
def test_all_that_was_acknowledged_is_there(place: tuple[str, Place], tmp_path: Path) -> None:
    name, (uri, config) = place[0], (place[1].uri, place[1].config)
    count = PUBLISHES.get(name, ALL_PUBLISHES)
    registry = ModelRegistry(uri, config=config)
    registry.init()
    logs = [tmp_path / f"writer{index}.log" for index in range(WRITERS)]
    jobs = [Job("publish", uri, config, str(log), index, count) for index, log in enumerate(logs)]
    began = time.monotonic()
    counts = _let_work(jobs, Job("collect", uri, config, seed=1), max(2, WRITERS * count // KILLED))
    seconds = time.monotonic() - began

    told = [json.loads(line) for log in logs for line in log.read_bytes().splitlines() if line]
    kept = [each for each in told if not each["passing"]]
    assert len(kept) >= WRITERS * count
    _compare(registry, told)
    registry.gc(grace=0)
    versions = _compare(registry, told)
    _compare_pulled(registry, kept, tmp_path)
    needed = {blob for version in versions.values() for blob in version.blobs}
    assert set(registry.store.names(layout.BLOBS)) == needed
    assert not registry.pending()
    assert not registry.store.names(layout.COLLECTIONS)
    claimed = len(registry.store.names(layout.numbers(MODEL)))
    print(
        f"\n{name}: {len(kept)} publishes of {WRITERS} processes in {seconds:.1f} s, "
        f"{len(versions)} versions, {claimed} numbers, {dict(counts)}"
    )


def _let_work(jobs: list[Job], collector: Job, kills: int) -> Counter[str]:
    """Run ``jobs`` to their end, and ``collector`` all along; kill about ``kills`` on the way."""
    dice = random.Random(7)
    counts: Counter[str] = Counter()
    running = {index: Process(job) for index, job in enumerate(jobs)}
    collecting = Process(collector)
    deadline = time.monotonic() + LIMIT
    goals = sorted(dice.uniform(0.02, 0.9) for _ in range(kills))
    goal = sum(job.count for job in jobs)
    try:
        while running:
            assert time.monotonic() < deadline, f"not done in {LIMIT} s: {counts}"
            for index, process in list(running.items()):
                if process.wait(0.02):
                    counts.update(running.pop(index).finish(1))
            lines = sum(_lines(job.log) for job in jobs)
            while goals and running and lines >= goals[0] * goal:
                goals.pop(0)
                index = dice.choice([*running, -1])
                counts["killed"] += 1
                if index < 0:
                    collecting.kill()
                    collecting = Process(collector)
                else:
                    running[index].kill()
                    running[index] = Process(jobs[index])
        counts.update(collecting.finish(60))
    finally:
        for process in (*running.values(), collecting):
            process.kill()
    return counts


def _lines(log: str) -> int:
    try:
        return Path(log).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _compare(registry: ModelRegistry, told: list[dict[str, Any]]) -> dict[int, Any]:
    """Compare what is in the registry with what was acknowledged; return the versions."""
    versions = check(registry)
    gone = {layout.number_of(name) for name in registry.store.names(layout.deletions(MODEL))}
    contents: dict[int, str] = {}
    for each in told:
        number = each["number"]
        assert contents.setdefault(number, each["content"]) == each["content"]
        if each["passing"]:
            # It was deleted afterwards, or its publisher was killed before that.
            assert (number in gone) != (number in versions)
            continue
        assert number in versions, f"version {number} was acknowledged and is not there: {each}"
        version = versions[number]
        assert version.content == each["content"]
        assert {file.path: file.sha256 for file in version.files} == each["files"]
        expected = files_of(each["writer"], each["index"])
        assert each["files"] == {path: sha256(data).hexdigest() for path, data in expected.items()}
    return versions


def _compare_pulled(registry: ModelRegistry, kept: list[dict[str, Any]], tmp_path: Path) -> None:
    for each in random.Random(3).sample(kept, 10):
        dest = tmp_path / f"pulled-{uuid4().hex}"
        pulled = registry.pull(MODEL, each["number"], dest)
        assert tree_bytes(pulled) == files_of(each["writer"], each["index"])
