"""Eviction and garbage collection among processes that download, and among those that die."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import OfflineError, StorageClient
from storage.cache import announce
from storage.cache import cache as cache_module
from storage.cache.announce import REMOVING
from storage.cache.evict import delete, evict, make_room
from storage.cache.gc import collect
from storage.cache.leases import Held, Leases
from storage.cache.removal import Removal, removing
from storage.cache.survey import Survey, occupied
from storage.config import load_settings
from tests.cache.conftest import MakeClient
from tests.cache.models import KIB, Models, content
from tests.cache.processes import break_locks, forked
from tests.facade.stores import tree_bytes

SIZE = 100 * KIB
HOUR = 3600.0
# A removal reads the leases to see what there is, after it was announced, and in the end.
FIRST, LAST = 2, 3


@pytest.fixture
def models(make_client: MakeClient, tmp_path: Path) -> Models:
    """Two models that share a file, and that nobody has used for hours."""
    found = Models(make_client(cache_grace=HOUR), tmp_path / "fetched")
    for age, name in enumerate("ba"):
        found.add(name, {"shared": content("shared"), "own/model.bin": content(name)})
        found.used(name, (age + 2) * HOUR)
    return found


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait for a removal, and locks do nothing."""
    break_locks(monkeypatch, None)
    monkeypatch.setattr(cache_module, "wait_for_removals", lambda _: None)


def at_reading(
    patch: pytest.MonkeyPatch, number: int, act: Callable[[], object], *, before: bool
) -> None:
    """Do something in another thread, before or after the leases are read for the n-th time."""
    real = Leases.held
    calls = itertools.count(1)
    remover = threading.current_thread()

    def held(leases: Leases) -> Held:
        due = threading.current_thread() is remover and next(calls) == number
        found = None if before and due else real(leases)
        if due:
            failed: list[BaseException] = []
            thread = threading.Thread(target=_run, args=(act, failed))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            if failed:
                raise failed[0]
        return real(leases) if found is None else found

    patch.setattr(Leases, "held", held)


def _run(act: Callable[[], object], failed: list[BaseException]) -> None:
    try:
        act()
    except BaseException as exc:  # noqa: BLE001 -- the other thread raises it
        failed.append(exc)


MOMENTS = pytest.mark.parametrize(
    ("number", "before"),
    [(FIRST, False), (LAST, True)],
    ids=["before-anything-is-taken", "when-all-is-taken"],
)
REMOVALS: dict[str, Callable[[Models], object]] = {
    "evict": lambda models: evict(models.cache, 0),
    "make_room": lambda models: evict(models.cache, 2 * SIZE),
    "delete": lambda models: delete(models.cache, models.location("a")),
}
removals = pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)


# -- what comes in between -----------------------------------------------------------------


@MOMENTS
@removals
@pytest.mark.usefixtures("nobody_waits")
def test_a_model_that_is_fetched_and_kept_meanwhile_is_right(
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    removal: Callable[[Models], object],
    number: int,
    before: bool,
) -> None:
    paths: list[str] = []
    at_reading(monkeypatch, number, lambda: paths.append(models.keep("a")), before=before)
    removal(models)
    monkeypatch.undo()
    assert tree_bytes(paths[0]) == models.files["a"]
    assert "a" in models.there()
    models.blobs()


@MOMENTS
@removals
@pytest.mark.usefixtures("nobody_waits")
def test_what_another_model_meanwhile_has_as_well_stays(
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    removal: Callable[[Models], object],
    number: int,
    before: bool,
) -> None:
    models.put("c", {"same": content("a"), "shared": content("shared"), "more": content("more")})
    # To a destination: when it has ended, it holds nothing.
    at_reading(monkeypatch, number, lambda: models.fetch("c"), before=before)
    removal(models)
    monkeypatch.undo()
    assert "c" in models.there()
    models.blobs()


@MOMENTS
@pytest.mark.usefixtures("nobody_waits")
def test_what_was_used_meanwhile_and_is_not_any_more_stays(
    models: Models, monkeypatch: pytest.MonkeyPatch, number: int, before: bool
) -> None:
    at_reading(monkeypatch, number, lambda: models.fetch("a"), before=before)
    evict(models.cache, 0)
    monkeypatch.undo()
    assert models.there() == {"a"}


@pytest.mark.usefixtures("nobody_waits")
def test_what_was_pinned_meanwhile_stays(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    location = models.location("a")
    at_reading(monkeypatch, LAST, lambda: models.cache.pins.add(location), before=True)
    evict(models.cache, 0)
    monkeypatch.undo()
    assert models.there() == {"a"}


def between_choice_and_taking(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something when it is settled which models are to go, and none has gone yet."""
    real = Removal.take_model
    acts = iter([act])

    def take_model(removal: Removal, manifest_id: str) -> None:
        for each in acts:
            each()
        real(removal, manifest_id)

    patch.setattr(Removal, "take_model", take_model)


@pytest.mark.usefixtures("nobody_waits")
def test_a_new_version_that_comes_meanwhile_keeps_its_ref(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = models.cache.upper.refs
    (ref,) = (ref for ref in refs.all() if ref.source.uri == models.uri("a"))
    newer = replace(ref, manifest=models.manifests()["b"])
    between_choice_and_taking(monkeypatch, lambda: refs.set(newer))
    assert evict(models.cache, 2 * SIZE).models == 1
    assert refs.get(ref.source) == newer


@pytest.mark.usefixtures("nobody_waits")
def test_what_was_used_after_it_was_chosen_stays(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_choice_and_taking(monkeypatch, lambda: models.fetch("a", offline=True))
    evict(models.cache, 0)
    assert models.there() == {"a"}


@pytest.mark.usefixtures("nobody_waits")
def test_what_a_ref_leads_to_again_stays(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = models.cache.upper.refs
    (ref,) = (ref for ref in refs.all() if ref.source.uri == models.uri("a"))
    at_reading(monkeypatch, LAST, lambda: refs.set(ref), before=True)
    evict(models.cache, 0)
    monkeypatch.undo()
    assert models.there() == {"a"}


@pytest.mark.usefixtures("nobody_waits")
def test_a_blob_that_a_download_found_meanwhile_stays(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = models.cache.manifest(models.manifests()["a"])
    own = manifest.files[0]

    def add() -> None:
        # What Filling.take does of a download that has not ended yet.
        models.cache.hold(blobs=[str(own.digest)])
        new = tmp_path / "new"
        new.write_bytes(models.files["a"][own.path])
        models.cache.upper.blobs.add(str(new), own.digest, own.size, durable=False)

    at_reading(monkeypatch, FIRST, add, before=False)
    evict(models.cache, 0)
    monkeypatch.undo()
    assert models.there() == set()
    assert models.blobs() == {own.digest}


@pytest.mark.usefixtures("nobody_waits")
def test_what_is_needed_meanwhile_does_not_count_as_room(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.cache.budget = 3 * SIZE
    at_reading(monkeypatch, LAST, lambda: models.keep("a"), before=True)
    make_room(models.cache, SIZE)
    monkeypatch.undo()
    assert models.there() == {"a"}
    assert occupied(models.cache) == 2 * SIZE


def test_whoever_takes_a_lease_waits_for_the_end_of_a_removal(
    models: Models, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    manifest = models.manifests()["a"]
    waiting = threading.Event()
    seen: list[list[Path]] = []

    def hold() -> None:
        models.cache.hold(manifests=[manifest])
        seen.append(list(cache.glob(f"partial/*/{REMOVING}")))

    def begin() -> None:
        thread.start()
        assert waiting.wait(60)

    def sleep(seconds: float) -> None:
        waiting.set()
        time.sleep(seconds)

    thread = threading.Thread(target=hold)
    monkeypatch.setattr(announce, "time", _Clock(sleep))
    at_reading(monkeypatch, LAST, begin, before=True)
    evict(models.cache, 2 * SIZE)
    thread.join(60)
    assert seen == [[]]
    assert models.there() == {"a", "b"}


def test_of_two_removals_one_waits_for_the_other_without_any_lock(
    models: Models, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    break_locks(monkeypatch, None)
    waiting = threading.Event()
    under_way: list[int] = []

    def sleep(seconds: float) -> None:
        waiting.set()
        time.sleep(seconds)

    real = Removal.settle

    def settle(removal: Removal) -> None:
        if threading.current_thread() is not other:
            other.start()
            assert waiting.wait(60)
        real(removal)
        under_way.append(len(list(cache.glob(f"partial/*/{REMOVING}"))))

    other = threading.Thread(target=lambda: collect(models.cache))
    monkeypatch.setattr(announce, "time", _Clock(sleep))
    monkeypatch.setattr(Removal, "settle", settle)
    evict(models.cache, 2 * SIZE)
    other.join(60)
    assert len(under_way) == 2
    assert under_way[1] == 1
    assert models.there() == {"b"}


def test_removals_that_come_at_once_all_get_their_turn(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_locks(monkeypatch, None)
    inside: list[int] = []
    most: list[int] = []
    real = Removal.settle

    def settle(removal: Removal) -> None:
        inside.append(1)
        most.append(len(inside))
        real(removal)
        inside.pop()

    monkeypatch.setattr(Removal, "settle", settle)
    threads = [threading.Thread(target=collect, args=(models.cache,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 6
    assert models.there() == {"a", "b"}


def test_nobody_waits_for_a_removal_that_was_killed(models: Models, cache: Path) -> None:
    assert forked(lambda: _take_and_die(models, models.manifests()["a"]))
    assert list(cache.glob(f"partial/*/{REMOVING}"))
    # Else it would wait for longer than a test may take.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(announce, "_TIMEOUT", 3600.0)
        models.keep("a")
    assert models.there() == {"a", "b"}


class _Clock:
    """The module ``time`` with another ``sleep``."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self.sleep = sleep
        self.monotonic = time.monotonic


def _take_and_die(models: Models, manifest_id: str) -> None:
    with removing(models.cache) as removal:
        removal.take_model(manifest_id)
        removal.take_blobs(removal.survey.unneeded([manifest_id], HOUR))
        os._exit(0)


# -- those that die ------------------------------------------------------------------------

_CHANGES = ("mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "utime", "open")


def die_at(root: str, number: int) -> None:
    """Let this process kill itself at its n-th change below a folder; twice for each change."""
    left = itertools.count(number, -1)

    def hook(name: str) -> None:
        function = getattr(os, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            counts = "dir_fd" in kwargs or any(str(arg).startswith(root) for arg in args[:2])
            if name == "open":
                counts = counts and bool(args[1] & os.O_CREAT)
            if counts and next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if counts and next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, hooked)

    for name in _CHANGES:
        hook(name)


def killed_at(root: Path, number: int, act: Callable[[], object]) -> bool:
    """Do something in a child that dies at its n-th change; return whether it came to that."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_at(str(root), number)
            act()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def check_after_a_kill(models: Models) -> None:
    """See that nothing is wrong, that all space is given back, and that all comes again."""
    for name in models.files:
        try:
            models.fetch(name, offline=True)
        except OfflineError:
            continue
    collect(models.cache, grace=0)
    there = models.there()
    survey = Survey(models.cache)
    assert survey.blobs.keys() == survey.named()
    assert set(survey.manifests) == set(models.manifests().values())
    assert set(survey.copies) == set(survey.manifests)
    assert os.listdir(models.cache.upper.layout.partial) == []
    distinct = {data for name in there for data in models.files[name].values()}
    assert occupied(models.cache) == sum(map(len, distinct))
    for name in models.files:
        models.fetch(name)
    assert models.there() == set(models.files)
    models.blobs()


@pytest.mark.parametrize("work", ["evict", "delete", "collect", "pin"])
def test_a_kill_at_any_change_does_no_harm(
    models: Models, make_client: MakeClient, tmp_path: Path, cache: Path, work: str
) -> None:
    acts: dict[str, Callable[[], object]] = {
        "evict": lambda: evict(models.cache, 0),
        "delete": lambda: delete(models.cache, models.location("a")),
        "collect": lambda: collect(models.cache, grace=0),
        "pin": lambda: models.cache.pin(models.location("a")),
    }
    if work == "collect":
        models.put("b", {"own/model.bin": content("b, second version")})
        models.fetch("b")
        orphan = models.cache.upper.layout.manifest(models.manifests()["a"])
        os.unlink(orphan)
    models.cache.close()
    pristine = tmp_path / "pristine"
    cache.rename(pristine)
    for number in itertools.count(1):
        root = tmp_path / f"root-{number}"
        shutil.copytree(pristine, root, symlinks=True)
        models.use(make_client(cache_dir=root, cache_grace=0))
        died = killed_at(root, number, acts[work])
        check_after_a_kill(models)
        models.cache.close()
        shutil.rmtree(root)
        if not died:
            break
    assert number > 20 or work == "pin"


# -- many at once --------------------------------------------------------------------------


def _client(root: str) -> StorageClient:
    return StorageClient(settings=load_settings(cache_dir=root, cache_grace=0))


def _download_often(
    root: str, folder: str, seed: int, broken: bool, begin: Any, results: Any
) -> None:
    problems = []
    begin.wait(120)
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            break_locks(patch, None)
        rng = random.Random(seed)
        for step in range(20):
            name = rng.choice("abcdef")
            with _client(root) as client:
                try:
                    # With filters, local files go through the cache.
                    kept = client.download(f"file://{folder}/{name}", allow_patterns="*")
                    wanted = tree_bytes(os.path.join(folder, name))
                    if tree_bytes(kept) != wanted:
                        problems.append(f"step {step}: {name} is wrong")
                    if rng.random() < 0.5:
                        target = f"{root}-{seed}-{step}"
                        client.download(
                            f"file://{folder}/{name}", target, allow_patterns="*", cache=True
                        )
                        if tree_bytes(target) != wanted:
                            problems.append(f"step {step}: {target} is wrong")
                    if tree_bytes(kept) != wanted:
                        problems.append(f"step {step}: {name} was taken away")
                except Exception as exc:  # noqa: BLE001 -- all of them are told
                    problems.append(f"step {step}: {type(exc).__name__}: {exc}")
                client.cache.close()
    results.put(problems)


def _remove_often(root: str, seed: int, broken: bool, begin: Any, stop: Any, results: Any) -> None:
    problems = []
    evicted = 0
    begin.wait(120)
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            break_locks(patch, None)
        rng = random.Random(seed)
        cache = _client(root).cache
        while not stop.is_set():
            try:
                if rng.random() < 0.5:
                    evicted += evict(cache, rng.choice([0, SIZE, 4 * SIZE])).models
                else:
                    evicted += collect(cache, grace=0).counts.get("models", 0)
            except Exception as exc:  # noqa: BLE001 -- all of them are told
                problems.append(f"{type(exc).__name__}: {exc}")
    results.put((problems, evicted))


@pytest.mark.parametrize("broken", [False, True], ids=["locks", "no-locks"])
def test_downloads_are_right_while_others_evict(tmp_path: Path, cache: Path, broken: bool) -> None:
    folder = tmp_path / "store"
    for name in "abcdef":
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "own").write_bytes(content(name))
        (folder / name / "sub" / "shared").write_bytes(content("shared", 3))
        (folder / name / "pair").write_bytes(content("abc" if name in "abc" else "def"))
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    # Else all downloads may be over before somebody evicts.
    begin = spawn.Barrier(5)
    told, evictions = spawn.Queue(), spawn.Queue()
    writers = [
        spawn.Process(
            target=_download_often, args=(str(cache), str(folder), seed, broken, begin, told)
        )
        for seed in range(3)
    ]
    removers = [
        spawn.Process(target=_remove_often, args=(str(cache), seed, broken, begin, stop, evictions))
        for seed in range(2)
    ]
    processes = [*writers, *removers]
    for process in processes:
        process.start()
    try:
        problems = [problem for _ in writers for problem in told.get(timeout=240)]
        stop.set()
        ends = [evictions.get(timeout=60) for _ in removers]
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert problems == []
    assert [problem for end in ends for problem in end[0]] == []
    assert sum(end[1] for end in ends) > 0
    remaining = _client(str(cache)).cache
    collect(remaining, grace=0)
    evict(remaining, 0)
    assert occupied(remaining) == 0
