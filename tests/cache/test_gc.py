"""Garbage goes, all of it, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import DestinationError
from storage.cache.gc import Collected, collect
from storage.cache.leases import Leases
from storage.cache.partials import new_partial
from storage.cache.refs import Pending
from storage.cache.removal import Removal, removing
from storage.cache.survey import Survey, folder_size, occupied
from storage.digest import hash_file
from tests.cache.conftest import MakeClient
from tests.cache.models import KIB, Models, content
from tests.cache.processes import as_nobody, dead_owner, forked, open_folder, python

DAY = 24 * 3600.0
SIZE = 100 * KIB
KINDS = ("models", "blobs", "refs", "quarantined", "entries", "locks")


@pytest.fixture
def models(make_client: MakeClient, tmp_path: Path) -> Models:
    """Two models that nobody uses right now, in a cache with the usual grace period."""
    found = Models(make_client(), tmp_path / "fetched")
    found.add("a")
    found.add("b")
    return found


def collected(models: Models, grace: float | None = 0) -> dict[str, int]:
    """Collect; return how many of each kind went, kinds of which none went left out."""
    counts = collect(models.cache, grace=grace).counts
    assert set(counts) == set(KINDS)
    return {kind: count for kind, count in counts.items() if count}


def orphan(models: Models, name: str = "orphan") -> Path:
    """Put a blob into the cache that no model has."""
    source = Path(models.cache.upper.path, "new")
    source.write_bytes(content(name))
    digest = hash_file(source, ("blake3",))["blake3"]
    return Path(models.cache.upper.blobs.add(str(source), digest, SIZE, durable=False))


def files_below(root: Path) -> dict[Path, bytes | str]:
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_nothing_that_is_needed_goes(models: Models, cache: Path) -> None:
    models.keep("b")
    before = files_below(cache)
    assert collected(models) == {}
    after = files_below(cache)
    assert {path for path in before if path.parent.name != "locks"} <= set(after)
    assert models.there() == {"a", "b"}


def test_a_folder_that_is_no_cache_is_left_alone(make_client: MakeClient, cache: Path) -> None:
    assert collect(make_client().cache) == Collected(0, {})
    assert not cache.exists()
    (cache / "snapshots" / ("0" * 64)).mkdir(parents=True)
    (cache / "quarantine").mkdir()
    (cache / "quarantine" / "file").touch()
    assert collect(make_client().cache, grace=0) == Collected(0, {})
    assert (cache / "snapshots" / ("0" * 64)).exists()
    assert (cache / "quarantine" / "file").exists()


def test_what_dead_processes_left_goes(models: Models, cache: Path) -> None:
    owner = dead_owner().token
    folder = cache / "partial" / f"{owner}-00000000"
    folder.mkdir()
    (folder / "model").write_bytes(bytes(SIZE))
    record = cache / "partial" / f"{owner}-00000001"
    record.touch()
    lease = cache / "leases" / f"{owner}-00000000"
    lease.write_text(f"m {models.manifests()['a']}\n")
    with new_partial(str(cache)) as living:
        Path(living, "model").write_bytes(bytes(SIZE))
        freed = collect(models.cache).bytes
        assert os.path.getsize(os.path.join(living, "model")) == SIZE
    assert SIZE < freed < 2 * SIZE
    assert not folder.exists()
    assert not record.exists()
    assert not lease.exists()


def test_blobs_without_a_model_go_after_the_grace_period(models: Models) -> None:
    path = orphan(models)
    assert collected(models, None) == {}
    assert collected(models, 60.0) == {}
    assert path.exists()
    before = occupied(models.cache)
    done = collect(models.cache, grace=0)
    assert not path.exists()
    assert done.counts["blobs"] == 1
    assert done.bytes >= SIZE
    assert occupied(models.cache) == before - SIZE
    assert models.there() == {"a", "b"}


def test_blobs_that_a_living_process_holds_stay(models: Models, cache: Path) -> None:
    path = orphan(models)
    code = """
        import sys
        from storage.cache.leases import Leases

        leases = Leases(sys.argv[1])
        leases.hold(blobs=[f"blake3:{sys.argv[2]}"])
        print("held", flush=True)
        input()
    """
    with python(code, cache, path.name) as holder:
        assert holder.line() == "held"
        assert collected(models) == {}
        holder.kill()
        assert collected(models) == {"blobs": 1}
    assert not path.exists()


def test_a_version_that_was_replaced_goes_after_the_grace_period(models: Models) -> None:
    old = models.manifests()["a"]
    models.put("a", {"model.bin": content("a, second version")})
    models.fetch("a")
    assert collected(models, None) == {}
    assert collected(models) == {"models": 1, "blobs": 1}
    assert models.cache.upper.manifests.load(old) is None
    assert not os.path.exists(models.cache.upper.layout.snapshot(old))
    assert models.there() == {"a", "b"}


def test_a_version_that_was_replaced_stays_while_it_is_used(models: Models) -> None:
    path = models.keep("a")
    models.put("a", {"model.bin": content("a, second version")})
    models.fetch("a")
    assert collected(models) == {}
    assert Path(path, "model.bin").read_bytes() == content("a")
    models.cache.close()
    assert collected(models) == {"models": 1, "blobs": 1}
    assert not os.path.exists(path)


def test_a_snapshot_without_a_manifest_goes(models: Models) -> None:
    manifest = models.manifests()["a"]
    os.unlink(models.cache.upper.layout.manifest(manifest))
    assert collected(models) == {"refs": 1, "blobs": 1, "entries": 1}
    assert not os.path.exists(models.cache.upper.layout.snapshot(manifest))
    assert models.there() == {"b"}
    models.fetch("a")
    assert models.there() == {"a", "b"}


def test_folders_that_no_snapshot_is_named_like_are_left_alone(models: Models, cache: Path) -> None:
    (cache / "snapshots" / "mine").mkdir()
    collected(models)
    assert (cache / "snapshots" / "mine").exists()


def test_a_damaged_manifest_goes_with_all_that_needs_it(models: Models) -> None:
    manifest = models.manifests()["a"]
    Path(models.cache.upper.layout.manifest(manifest)).write_bytes(b"{}\n0\n")
    models.used("a", 2 * DAY)
    assert collected(models, None) == {"models": 1, "blobs": 1, "entries": 1}
    assert models.there() == {"b"}


def test_of_a_damaged_manifest_that_is_used_no_blob_goes(models: Models) -> None:
    path = models.keep("a")
    manifest = models.manifests()["a"]
    Path(models.cache.upper.layout.manifest(manifest)).write_bytes(b"{}\n0\n")
    assert collected(models) == {}
    assert Path(path, "model.bin").read_bytes() == content("a")


def test_nothing_is_removed_while_a_manifest_cannot_be_read(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = models.cache.upper.layout.manifest(models.manifests()["a"])
    orphan(models)
    blobs = models.blobs()

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        if path == unreadable:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open(path, *args, **kwargs)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr("storage.cache.records.open", refuse, raising=False)
        with pytest.raises(DestinationError, match="cannot be read: Too many open files"):
            collect(models.cache, grace=0)
    assert models.blobs() == blobs
    assert models.there() == {"a", "b"}


def test_damaged_refs_go_and_so_does_what_only_they_led_to(models: Models) -> None:
    (ref,) = (ref for ref in models.cache.upper.refs.all() if ref.source.uri == models.uri("a"))
    path = Path(models.cache.upper.refs.path(ref.source))
    path.write_bytes(path.read_bytes()[:-9])
    assert collected(models) == {"refs": 1, "models": 1, "blobs": 1, "entries": 1}
    assert models.there() == {"b"}


def test_a_ref_whose_manifest_a_lower_cache_has_stays(
    models: Models, make_client: MakeClient, tmp_path: Path, cache: Path
) -> None:
    lower = tmp_path / "lower"
    shutil.copytree(cache, lower, symlinks=True)
    manifest = models.manifests()["a"]
    os.unlink(models.cache.upper.layout.manifest(manifest))
    models.use(make_client(cache_lower=(lower,)))
    assert "refs" not in collected(models)
    assert models.there() == {"a", "b"}


def test_a_ref_stays_while_somebody_uses_what_it_leads_to(models: Models) -> None:
    manifest = models.manifests()["a"]
    os.unlink(models.cache.upper.layout.manifest(manifest))
    # Another removal may have it in its hands, and will put it back.
    models.cache.hold(manifests=[manifest])
    assert "refs" not in collected(models)
    models.cache.close()
    assert collected(models)["refs"] == 1


def test_notes_of_downloads_go_after_a_day(models: Models) -> None:
    refs = models.cache.upper.refs
    source = next(refs.all()).source
    refs.begin(Pending(source, 3, ()))
    assert collected(models) == {}
    (path,) = (Path(path) for path, is_ref in refs.paths() if not is_ref)
    os.utime(path, (0, time.time() - 1.1 * DAY))
    assert collected(models) == {"refs": 1}
    assert not path.exists()
    assert models.there() == {"a", "b"}


def test_quarantine_is_emptied_after_a_week_or_at_once_when_told_so(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = next(iter(models.blobs()))
    path = models.cache.upper.blobs.path(digest)
    os.chmod(path, 0o600)
    Path(path).write_bytes(bytes(SIZE))
    models.cache.upper.blobs.settle(digest, SIZE)
    quarantine = Path(models.cache.upper.layout.quarantine)
    assert len(list(quarantine.iterdir())) == 1
    assert "quarantined" not in collected(models, None)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 6.9 * DAY)
        assert "quarantined" not in collected(models, None)
        patch.setattr(time, "time", lambda: now + 7.1 * DAY)
        done = collect(models.cache)
    assert done.counts["quarantined"] == 1
    assert done.bytes >= SIZE
    assert list(quarantine.iterdir()) == []


def test_quarantine_is_emptied_without_a_grace_period(models: Models) -> None:
    quarantine = Path(models.cache.upper.layout.quarantine)
    quarantine.mkdir()
    (quarantine / "blake3-00.1").write_bytes(bytes(10))
    assert collected(models) == {"quarantined": 1}


def test_the_index_forgets_what_is_gone_and_nothing_else(models: Models) -> None:
    digest = models.cache.manifest(models.manifests()["a"]).files[0].digest
    os.unlink(models.cache.upper.blobs.path(digest))
    assert collected(models) == {"entries": 1}
    assert collected(models) == {}
    models.fetch("a")
    models.put("copy", dict(models.files["b"]))
    models.fetch("copy")
    assert models.there() == {"a", "b", "copy"}


def test_stale_locks_go(models: Models, cache: Path) -> None:
    lock = cache / "locks" / "some.lock"
    lock.touch()
    os.utime(lock, (0, time.time() - 2 * DAY))
    assert collected(models) == {"locks": 1}
    assert not lock.exists()


@pytest.mark.parametrize("budget", [None, 10**9])
def test_what_a_killed_eviction_had_taken_is_given_back(
    models: Models, cache: Path, budget: int | None
) -> None:
    def die() -> None:
        with removing(models.cache) as removal:
            removal.take_model(models.manifests()["a"])
            removal.take_blobs(removal.survey.blobs)
            os._exit(0)

    assert forked(die)
    assert folder_size(str(cache / "partial")) > 2 * SIZE
    done = collect(models.cache, grace=0)
    assert done.bytes > 2 * SIZE
    assert list((cache / "partial").iterdir()) == []
    assert models.blobs() == set()
    for name in "ab":
        models.fetch(name)
    assert models.there() == {"a", "b"}


def test_a_cache_that_cannot_be_written_says_so(make_client: MakeClient) -> None:
    with open_folder() as folder:
        models = Models(make_client(cache_dir=folder / "cache"), folder / "fetched")
        models.add("a")

        def refused() -> bool:
            with pytest.raises(DestinationError, match="cannot be written"):
                collect(models.cache, grace=0)
            return True

        assert as_nobody(refused)
        assert models.there() == {"a"}


@pytest.mark.parametrize("fails", ["take_blobs", "settle"])
def test_a_removal_that_fails_puts_everything_back(
    models: Models, cache: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    real: Callable[..., object] = getattr(Removal, fails)

    def fail(*args: object) -> None:
        real(*args)
        raise KeyboardInterrupt

    def take_all() -> None:
        with removing(models.cache) as removal:
            for manifest in models.manifests().values():
                removal.take_model(manifest)
            removal.take_blobs(removal.survey.blobs)

    before = files_below(cache)
    monkeypatch.setattr(Removal, fails, fail)
    with pytest.raises(KeyboardInterrupt):
        take_all()
    assert before.items() <= files_below(cache).items()
    assert models.there() == {"a", "b"}


def test_a_survey_tells_leases_of_blobs_that_nobody_can_parse_apart(models: Models) -> None:
    leases = Leases(models.cache.upper.path)
    leases.hold(blobs=["nonsense", "md5:1"])
    assert Survey(models.cache).named() == models.blobs()
    leases.close()
