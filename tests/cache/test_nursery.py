"""The children of these tests work, tell, and die where they are told to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.cache.nursery import Job, KillLoop, Model, Nursery, Round, fingerprint
from tests.cache.processes import NOBODY, open_folder
from tests.cache.support import blob_files, make_source, tree_bytes, wrong_blobs

FILES = {"model.bin": bytes(range(256)) * 1000, "sub/config.json": b"{}"}


@pytest.fixture(scope="module")
def nursery(_isolated_session: None) -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    source = make_source(request, "s3")
    return Model(source.put_model(FILES), [fingerprint(FILES)], source.fields)


@pytest.fixture
def job(tmp_path: Path, model: Model) -> Job:
    return Job(str(tmp_path / "cache"), [model], steps=2)


def test_a_child_downloads_and_tells(nursery: Nursery, job: Job) -> None:
    (outcome,) = nursery.run(job)
    assert outcome.signal is None
    assert (outcome.wrong, outcome.errors) == ([], [])
    assert [step["what"] for step in outcome.steps] == [job.models[0].uri] * 2
    assert tree_bytes(outcome.steps[0]["path"]) == FILES
    assert outcome.points
    assert len(blob_files(job.root)) == 2
    assert wrong_blobs(job.root) == []


def test_a_child_may_be_a_process_of_its_own(job: Job) -> None:
    environment = os.environ | {"STORAGE_KILL_POINT": "before-rename"}
    argv = [sys.executable, "-m", "tests.cache.worker", json.dumps(asdict(job))]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [next(iter(json.loads(line))) for line in done.stdout.splitlines()] == [
        *("ready", "what", "what", "points")
    ]
    killed = subprocess.run(
        [*argv[:3], json.dumps(asdict(job) | {"root": f"{job.root}-2"})],
        cwd=root,
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -9


def test_bytes_that_are_no_version_of_the_model_are_told(nursery: Nursery, job: Job) -> None:
    other = Model(job.models[0].uri, [fingerprint({"model.bin": b"?"})], job.models[0].config)
    (outcome,) = nursery.run(replace(job, models=[other]))
    assert len(outcome.wrong) == 2


def test_an_error_of_a_step_is_told_and_the_next_one_follows(nursery: Nursery, job: Job) -> None:
    absent = Model("s3://absent/model", [], job.models[0].config)
    commands = (("ls", "--no-such-option"),)
    (outcome,) = nursery.run(Job(job.root, [absent], commands, steps=6, seed=1))
    assert len(outcome.errors) == 6
    assert len(set(outcome.errors)) == 2


@pytest.mark.parametrize("flock", ["no-op", errno.ENOLCK])
def test_a_child_may_be_another_user_on_a_system_without_locks(
    nursery: Nursery, job: Job, flock: str | int
) -> None:
    with open_folder() as folder:
        root = folder / "cache"
        root.mkdir()
        os.chown(root, NOBODY, NOBODY)
        special = replace(job, root=str(root), user=NOBODY, flock=flock, hold=2)
        (outcome,) = nursery.run(special)
        assert (outcome.errors, outcome.wrong, len(outcome.steps)) == ([], [], 2)
        assert {path.stat().st_uid for path in blob_files(root)} == {NOBODY}


def test_every_point_kills(nursery: Nursery, job: Job, tmp_path: Path) -> None:
    (whole,) = nursery.run(job)
    assert whole.points is not None
    named = sorted(set(whole.points))
    assert any(name.endswith("-blobs") for name in named)
    checked: list[Round] = []

    def check(done: Round) -> None:
        assert done.killed == 1
        assert wrong_blobs(done.outcomes[0].job.root) == []
        checked.append(done)

    for number, point in enumerate([*named, "change:3", "before"]):
        fresh = replace(job, root=str(tmp_path / f"cache-{number}"), steps=1)
        KillLoop(nursery, [fresh], check).at_points([point])
    assert len(checked) == len(named) + 2


def test_some_of_several_children_are_killed_at_random(nursery: Nursery, job: Job) -> None:
    endless = replace(job, steps=None)
    survivors = 0

    def check(done: Round) -> None:
        nonlocal survivors
        assert done.killed >= 1
        assert done.outcomes[0].signal is not None
        survivors += len(done.outcomes) - done.killed
        assert wrong_blobs(job.root) == []

    assert len(KillLoop(nursery, [endless, job, job], check, longest=0.05).run(8)) == 8
    assert survivors


def test_a_failed_check_tells_how_to_repeat_it(nursery: Nursery, job: Job) -> None:
    def check(done: Round) -> None:
        raise AssertionError("no")

    with pytest.raises(AssertionError) as caught:
        KillLoop(nursery, [job], check, seed=5).run(1, first=3)
    assert "seed 5, round 3" in caught.value.__notes__[0]
