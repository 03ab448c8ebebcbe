"""Killed at any moment, those who use a cache leave it right, and the others notice nothing.

Writers, evictors and verifiers work on one cache at the same time, while what they fetch changes,
and some are killed: at a random moment, or at a named point. A reader in a process of its own
looks at all that it was given, and once more before it gives it up. ``STORAGE_SOAK=1`` makes
ten times as many rounds.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from storage import StorageClient
from storage.cache.evict import evict
from storage.cache.gc import collect
from storage.cache.survey import occupied
from storage.cache.verify import verify
from storage.config import load_settings
from tests.cache.askers import hashes
from tests.cache.nursery import Job, KillLoop, Model, Nursery, Outcome, Round, fingerprint
from tests.cache.support import blob_files, wrong_blobs
from tests.facade.stores import S3Store, tree_bytes
from tests.servers import SeaweedFS

SOAK = os.environ.get("STORAGE_SOAK") == "1"
ROUNDS = 300 if SOAK else 30
SEED = 4

KIB = 1024
# So that a small model takes many requests, and whatever nobody uses may go.
ENVIRONMENT = {
    "STORAGE_CACHE_GRACE": "0",
    "STORAGE_TRANSFER__PART_SIZE": "64KiB",
    "STORAGE_TRANSFER__CONNECTIONS": "4",
}
WRITER, HOARDER, EVICTOR, TIDIER, VERIFIER, READER = range(6)

_bytes = random.Random(11).randbytes
_SHARED = {"shared.bin": _bytes(200 * KIB), "licence": b"as is"}


def _packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            entry.mode = 0o755 if path.endswith(".sh") else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


# What each object may be. Some are of one size in all versions: only the content tells.
OBJECTS: Mapping[str, Sequence[bytes]] = {
    "one/shared.bin": [_SHARED["shared.bin"]],
    "one/licence": [_SHARED["licence"]],
    "one/weights.bin": [_bytes(150 * KIB) for _ in range(8)],
    "one/sub/config.json": [b'{"version": %d}' % number for number in range(3)],
    "two/shared.bin": [_SHARED["shared.bin"]],
    "two/head.bin": [*(_bytes(90 * KIB) for _ in range(8)), b""],
    "model.bin": [_SHARED["shared.bin"], *(_bytes(200 * KIB) for _ in range(8))],
}
# A program becomes a copy, not a link.
ARCHIVES = [_SHARED | {"run.sh": b"#!/bin/sh\n" + _bytes(40 * KIB)} for _ in range(2)]


class Remote:
    """Models that share content, and change."""

    def __init__(self, store: S3Store, server: SeaweedFS) -> None:
        """Put the first version of each into ``store``."""
        self._store = store
        self._objects = {**OBJECTS, "model.tar": [_packed(files) for files in ARCHIVES]}
        for path, versions in self._objects.items():
            store.put_raw(path, versions[0])
        config = {
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "endpoint_url": server.endpoint,
        }
        self.models = [
            Model(store.uri("one"), _trees("one/"), config),
            Model(store.uri("two"), _trees("two/"), config),
            Model(
                store.uri("model.bin"),
                [fingerprint({"": data}) for data in OBJECTS["model.bin"]],
                config,
            ),
            Model(
                store.uri("model.tar"),
                [fingerprint(files) for files in ARCHIVES],
                config,
                {"unpack": True},
            ),
        ]

    def models_as(self, **options: object) -> list[Model]:
        """Return the models with further arguments of ``download``."""
        return [replace(model, options=model.options | options) for model in self.models]

    def change(self, rng: random.Random) -> None:
        """Let some objects be other versions of themselves, maybe."""
        changing = sorted(path for path, versions in self._objects.items() if len(versions) > 1)
        for path in rng.sample(changing, 3):
            self._store.put_raw(path, rng.choice(self._objects[path]))


def _trees(prefix: str) -> list[dict[str, str]]:
    """Return all that a tree may be: its files change one by one."""
    versions = {path: data for path, data in OBJECTS.items() if path.startswith(prefix)}
    return [
        fingerprint(dict(zip((path[len(prefix) :] for path in versions), data, strict=True)))
        for data in itertools.product(*versions.values())
    ]


@pytest.fixture(scope="module")
def nursery(_isolated_session: None) -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.fixture
def remote(seaweedfs: SeaweedFS, shared_bucket: str) -> Remote:
    prefix = f"kill-{uuid4().hex}"
    store = S3Store("seaweedfs-obstore", seaweedfs, "obstore", shared_bucket, prefix, None)
    return Remote(store, seaweedfs)


@pytest.fixture
def jobs(remote: Remote, cache: Path) -> list[Job]:
    """Those who work on the cache in each round."""
    work = Job(str(cache), environment=ENVIRONMENT)
    evictions = [
        *(("cache", "gc", "--size", size, "--grace", "0") for size in ("0B", "200KB", "500KB")),
        ("cache", "rm", remote.models[0].uri),
    ]
    return [
        replace(work, models=remote.models, steps=8),
        # Its budget is less than all models take, and it keeps two of them in use.
        replace(
            work,
            models=remote.models,
            hold=2,
            environment=ENVIRONMENT | {"STORAGE_CACHE_BUDGET": "1500KB"},
        ),
        replace(work, commands=evictions, steps=5),
        replace(work, commands=[("cache", "gc", "--grace", "0")], steps=5),
        replace(
            work,
            commands=[("cache", "verify", "--full"), ("cache", "verify"), ("cache", "ls")],
            steps=5,
        ),
        replace(
            work,
            models=[
                *remote.models_as(freshness="cache-first"),
                *remote.models_as(offline=True),
                *remote.models,
            ],
            steps=8,
            hold=4,
        ),
    ]


def unexpected(number: int, outcome: Outcome) -> list[str]:
    """Return the errors of a child that it should not have had."""
    allowed = {
        HOARDER: ("InsufficientSpaceError",),
        EVICTOR: (
            "what is left is pinned, in use, under way, or was used lately",
            "is not in the cache",
            "is in use by a running process",
        ),
        READER: ("was never cached", "is cached only in part"),
    }
    return [
        error
        for error in outcome.errors
        if not any(text in error for text in allowed.get(number, ()))
    ]


class Inspector:
    """Looks at a cache that nobody uses just now."""

    def __init__(self, cache: Path, remote: Remote, folder: Path) -> None:
        """Look at ``cache``; ``folder`` is for copies of it."""
        self._cache = cache
        self._remote = remote
        self._copies = (folder / f"copy-{number}" for number in itertools.count())
        self.died: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()

    def check(self, done: Round) -> None:
        """See that nothing is wrong after a round of all jobs, and that space can be had back."""
        for number, outcome in enumerate(done.outcomes):
            assert unexpected(number, outcome) == []
        self.check_cache(done)

    def check_cache(self, done: Round) -> None:
        """See that nothing is wrong after a round, and that all space can be had back."""
        for outcome in done.outcomes:
            assert outcome.wrong == []
            if outcome.signal is not None:
                self.died[outcome.job.kill_point or "random"] += 1
            self.steps.update(
                "failed" if "error" in step or step.get("status") else "done"
                for step in outcome.steps
            )
        with self._client(self._cache) as client:
            assert verify(client.cache, full=True).problems == ()
        assert wrong_blobs(self._cache) == []
        copy = next(self._copies)
        # The times of blobs are copied, too.
        shutil.copytree(self._cache, copy, symlinks=True)
        with self._client(copy) as client:
            self._use_and_empty(client, copy, self._remote.models[done.number % 4])
        shutil.rmtree(copy)

    def _client(self, cache: Path) -> StorageClient:
        return StorageClient(settings=load_settings(cache_dir=cache, cache_grace=0))

    def _use_and_empty(self, client: StorageClient, root: Path, model: Model) -> None:
        path = client.download(model.uri, config=model.config, **model.options)
        assert hashes(path) in model.versions
        self._give_back(client)
        # This process lives, and so all that it uses is left, but no more. Another model may stay
        # that takes no space because all of its content is in this one, too.
        assert hashes(path) in model.versions
        place = Path(path)
        contents = set(tree_bytes(path).values() if place.is_dir() else [place.read_bytes()])
        assert {blob.read_bytes() for blob in blob_files(root)} - {b""} == contents - {b""}
        copies = [each for each in left_in(root, "snapshots") if not each.is_symlink()]
        assert [each for each in copies if not each.is_relative_to(place)] == []
        assert occupied(client.cache) == sum(
            [*map(len, contents), *(each.stat().st_size for each in copies)]
        )
        assert len(left_in(root, "leases")) == 1
        assert left_in(root, "partial", "quarantine") == []

        client.cache.close()
        self._give_back(client)
        assert occupied(client.cache) == 0
        kept = ("partial", "quarantine", "blobs", "manifests", "snapshots", "leases", "index")
        assert left_in(root, *kept) == []
        assert [path for path in left_in(root, "refs") if path.suffix != ".pending"] == []

    def _give_back(self, client: StorageClient) -> None:
        collect(client.cache, grace=0)
        evict(client.cache, 0)
        collect(client.cache, grace=0)
        assert verify(client.cache, full=True).problems == ()


def left_in(root: Path, *folders: str) -> list[Path]:
    """Return everything in some folders of a cache that is no folder itself."""
    found = [path for folder in folders for path in (root / folder).rglob("*")]
    return [path for path in found if path.is_symlink() or not path.is_dir()]


def points_of(nursery: Nursery, job: Job) -> dict[str, int]:
    """Return the points that a child passes, and how often."""
    (outcome,) = nursery.run(replace(job, seed=SEED))
    assert outcome.points
    return Counter(outcome.points)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("flock", "rounds"),
    [
        (None, 5),
        pytest.param(None, 2 * ROUNDS // 3, marks=pytest.mark.slow),
        pytest.param("no-op", ROUNDS // 3, marks=pytest.mark.slow),
    ],
)
def test_whoever_is_killed_nobody_sees_a_wrong_byte_and_all_space_is_given_back(
    nursery: Nursery,
    remote: Remote,
    jobs: list[Job],
    cache: Path,
    tmp_path: Path,
    flock: str | None,
    rounds: int,
) -> None:
    jobs = [replace(job, flock=flock) for job in jobs]
    # Each finds what the one before it left.
    points = {number: [*points_of(nursery, jobs[number])] for number in (WRITER, TIDIER, EVICTOR)}
    inspector = Inspector(cache, remote, tmp_path)
    KillLoop(
        nursery,
        jobs,
        inspector.check,
        seed=SEED,
        longest=0.3,
        points=points,
        spared=[READER],
        during=remote.change,
    ).run(rounds)
    assert inspector.died["random"] >= rounds
    assert inspector.died.total() > inspector.died["random"]
    assert inspector.steps["done"] > rounds


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [WRITER, HOARDER, EVICTOR, TIDIER])
def test_killed_at_any_named_point_it_leaves_the_cache_right(
    nursery: Nursery, remote: Remote, jobs: list[Job], cache: Path, tmp_path: Path, number: int
) -> None:
    inspector = Inspector(cache, remote, tmp_path)
    # Some models, and what was left by one who died.
    nursery.run(jobs[WRITER])
    remote.change(random.Random(SEED))
    nursery.run(replace(jobs[WRITER], kill_point="after-replace-blobs"))
    before = tmp_path / "before"
    shutil.copytree(cache, before, symlinks=True)
    job = replace(jobs[number], seed=SEED, steps=8)
    points = [
        f"{name}:{time}"
        for name, times in points_of(nursery, job).items()
        for time in sorted({1, 2, times // 2 + 1, times} & {*range(times + 1)})
    ][:: 1 if SOAK else 4]
    for count, point in enumerate(points):
        shutil.rmtree(cache)
        shutil.copytree(before, cache, symlinks=True)
        done = Round(count, nursery.run(replace(job, kill_point=point)))
        try:
            inspector.check_cache(done)
        except BaseException as exc:
            exc.add_note(str(done))
            raise
    # What several threads do has not always the same order.
    assert inspector.died.total() > 0.8 * len(points)
