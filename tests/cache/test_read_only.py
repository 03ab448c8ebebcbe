"""Caches that this process may read and not write: of a baked image, or of another user."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import DestinationError, OfflineError, StorageClient, StorageError
from tests.cache.boots import count_hashes, reboot, run_in_boot
from tests.cache.conftest import MakeClient
from tests.cache.disk import state
from tests.cache.processes import as_nobody, open_folder
from tests.cache.support import Source, blob_files, flip_byte, no_network_process, tree_bytes
from tests.servers import read_only_view

MODEL = {"model.bin": b"weights" * 1000, "config/a.json": b"{}"}
OTHER = {"model.bin": b"another"}
WEIGHTS = MODEL["model.bin"]
LARGE = len(WEIGHTS)

memory = pytest.mark.kinds("memory")


def large_blob(cache: Path) -> Path:
    return next(path for path in blob_files(cache) if path.stat().st_size == LARGE)


@pytest.fixture(autouse=True)
def _no_word_about_it() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- on a mount that nobody can write to ---------------------------------------------------


@pytest.mark.kinds("memory", "s3")
@pytest.mark.parametrize("durable", [False, True])
def test_what_is_cached_on_a_read_only_mount_loads(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path, durable: bool
) -> None:
    uri = source.put_model(MODEL)
    first = Path(make_client().download(uri, config=source.config))
    before = state(cache)
    with read_only_view(cache) as view:
        client = make_client(cache_dir=view, durable=durable)
        for number in range(2):
            source.forget()
            path = client.download(uri, config=source.config)
            assert path == str(view / first.relative_to(cache))
            assert (source.requests, source.bodies) == (1, [])
            out = client.download(uri, tmp_path / f"on{number}", config=source.config)
            assert source.bodies == []
            source.forget()
            assert client.download(uri, config=source.config, offline=True) == path
            assert client.download(uri, config=source.config, freshness="cache-first") == path
            off = tmp_path / f"off{number}"
            client.download(uri, off, config=source.config, offline=True)
            assert source.requests == 0
            assert tree_bytes(path) == tree_bytes(out) == tree_bytes(off) == MODEL
        client.close()
    assert state(cache) == before


@pytest.mark.kinds("web")
def test_a_new_process_loads_what_is_cached_on_a_read_only_mount(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_file("model.bin", WEIGHTS)
    path = Path(make_client().download(uri))
    with read_only_view(cache) as view:
        environ = {**os.environ, "STORAGE_CACHE_DIR": str(view)}
        command = [sys.executable, "-W", "error", "-m", "storage.cli", "download", "--quiet"]
        source.forget()
        done = subprocess.run(
            [*command, uri], env=environ, capture_output=True, text=True, check=False, timeout=60
        )
        expected = view / path.relative_to(cache)
        assert (done.stdout, done.stderr, done.returncode) == (f"{expected}\n", "", 0)
        assert (source.requests, source.bodies) == (1, [])
        for arguments in ((), (str(tmp_path / "out.bin"),)):
            done = no_network_process([*command, "--offline", uri, *arguments], env=environ)
            assert (done.stderr, done.returncode) == ("", 0)
            assert Path(done.stdout[:-1]).read_bytes() == WEIGHTS


@memory
def test_what_is_not_cached_needs_another_folder_or_a_destination(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    make_client().download(source.put_model(MODEL))
    uri = source.put_model(OTHER, "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (cache, empty):
        before = state(folder)
        with read_only_view(folder) as view:
            client = make_client(cache_dir=view)
            for options in ({}, {"dest": tmp_path / "x", "cache": True}):
                with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR") as caught:
                    client.download(uri, **options)  # type: ignore[arg-type]
                assert str(view) in str(caught.value)
                assert not (tmp_path / "x").exists()
            with pytest.raises(OfflineError, match="never cached"):
                client.download(uri, offline=True)
            out = client.download(uri, tmp_path / f"out-{folder.name}")
            assert tree_bytes(out) == OTHER
        assert state(folder) == before


@memory
def test_a_new_version_is_not_hidden_by_the_old_one(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    changed = MODEL | {"config/a.json": b"{} "}
    source.put_file("model/config/a.json", b"{} ")
    with read_only_view(cache) as view:
        client = make_client(cache_dir=view)
        with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
            client.download(uri)
        source.forget()
        assert tree_bytes(client.download(uri, tmp_path / "out")) == changed
        # What is the same is taken from the cache.
        assert source.bodies == ["model/config/a.json"]
        assert tree_bytes(client.download(uri, offline=True)) == MODEL


@memory
def test_what_is_damaged_there_is_not_served(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    flip_byte(large_blob(cache))
    with read_only_view(cache) as view:
        client = make_client(cache_dir=view)
        for _ in range(2):
            with pytest.raises(OfflineError, match=r"damaged: 'model\.bin'"):
                client.download(uri, offline=True)
            with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
                client.download(uri)
        source.forget()
        assert tree_bytes(client.download(uri, tmp_path / "out")) == MODEL
        assert source.bodies == ["model/model.bin"]
        (repair,) = client.repair(full=True)
        assert (repair.uri, repair.outcome) == (uri, "failed")
        assert isinstance(repair.error, DestinationError)


@memory
def test_a_snapshot_that_is_not_there_cannot_be_made_but_a_destination_can(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    path = Path(make_client().download(uri))
    (path / "config/a.json").unlink()
    with read_only_view(cache) as view:
        client = make_client(cache_dir=view)
        for offline in (False, True):
            with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
                client.download(uri, offline=offline)
            out = tmp_path / f"{offline}"
            assert tree_bytes(client.download(uri, out, offline=offline)) == MODEL


@pytest.mark.kinds("web")
@pytest.mark.parametrize("in_doubt", ["copied", "rebooted"])
def test_blobs_in_doubt_are_hashed_once_in_each_process(
    make_client: MakeClient,
    source: Source,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_doubt: str,
) -> None:
    uri = source.put_file("model.bin", WEIGHTS)
    path = Path(make_client().download(uri))
    if in_doubt == "copied":
        for blob in blob_files(cache):
            os.utime(blob)
    with read_only_view(cache) as view:
        found = view / path.relative_to(cache)
        if in_doubt == "rebooted":
            reboot(monkeypatch)
        hashes = count_hashes(monkeypatch)
        client = make_client(cache_dir=view)
        for _ in range(3):
            assert client.download(uri, offline=True) == str(found)
        assert Counter(hashes.values()) == {1: 1}
        # Another process finds out for itself.
        program = (
            f"{run_in_boot('yet another')}import storage\n"
            f"print(storage.Storage.download({uri!r}, offline=True))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "STORAGE_CACHE_DIR": str(view)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (f"{found}\n", "")
        flip_byte(large_blob(cache))
        with pytest.raises(OfflineError, match="damaged"):
            client.download(uri, offline=True)


# -- of another user -----------------------------------------------------------------------


@pytest.fixture
def shared(make_client: MakeClient) -> Iterator[Callable[[int], tuple[StorageClient, Path]]]:
    """Make a client of root's cache, which is made under an umask; and a folder for all."""
    with open_folder() as folder:
        masks = []

        def make(umask: int) -> tuple[StorageClient, Path]:
            masks.append(os.umask(umask))
            return make_client(cache_dir=folder / "cache"), folder

        yield make
        for umask in masks:
            os.umask(umask)


@pytest.mark.kinds("web")
def test_another_user_loads_what_is_cached(
    shared: Callable[[int], tuple[StorageClient, Path]], source: Source
) -> None:
    client, folder = shared(0o022)
    uri = source.put_file("model.bin", WEIGHTS)
    path = client.download(uri)
    other = source.put_file("other.bin", b"another")
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    # All modules are loaded; a child that is another user could perhaps load no more.
    client.download(uri, out / "first")
    client.download(uri, offline=True)

    def load() -> bool:
        assert client.download(uri, offline=True) == path
        second = client.download(uri, out / "second")
        assert Path(path).read_bytes() == Path(second).read_bytes() == WEIGHTS
        with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
            client.download(other)
        assert Path(client.download(other, out / "other")).read_bytes() == b"another"
        return True

    before = state(folder / "cache")
    source.forget()
    assert as_nobody(lambda: client.download(uri) == path)
    assert (source.requests, source.bodies) == (1, [])
    assert as_nobody(load)
    assert set(source.bodies) == {"other.bin"}
    assert state(folder / "cache") == before


@pytest.mark.kinds("web")
def test_another_user_hashes_what_is_in_doubt_and_can_repair_nothing(
    shared: Callable[[int], tuple[StorageClient, Path]],
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, folder = shared(0o022)
    uri = source.put_file("model.bin", WEIGHTS)
    path = client.download(uri)
    client.download(uri, offline=True)
    client.repair()
    damaged = source.put_file("bad", b"rotten")
    client.download(damaged)
    flip_byte(next(each for each in blob_files(folder / "cache") if each.stat().st_size == 6))

    def load() -> bool:
        reboot(monkeypatch)
        hashes = count_hashes(monkeypatch)
        for _ in range(2):
            assert client.download(uri, offline=True) == path
            assert client.download(uri) == path
        assert Counter(hashes.values()) == {1: 1}
        with pytest.raises(OfflineError, match="damaged: 'bad'"):
            client.download(damaged, offline=True)
        repairs = {repair.uri: repair for repair in client.repair(full=True)}
        assert set(repairs) == {damaged}
        assert repairs[damaged].outcome == "failed"
        assert "cannot be written" in str(repairs[damaged].error)
        assert "STORAGE_CACHE_DIR" in str(repairs[damaged].error)
        return True

    before = state(folder / "cache")
    assert as_nobody(load)
    assert state(folder / "cache") == before


@pytest.mark.kinds("web")
def test_what_only_its_owner_may_read_is_refused_to_others_in_our_words(
    shared: Callable[[int], tuple[StorageClient, Path]], source: Source
) -> None:
    client, folder = shared(0o077)
    uri = source.put_file("model.bin", WEIGHTS)
    path = client.download(uri)
    assert Path(path).read_bytes() == WEIGHTS
    assert client.download(uri, offline=True) == path
    out = folder / "out"
    out.mkdir()
    out.chmod(0o777)
    client.download(uri, out / "first")

    def load() -> bool:
        with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
            client.download(uri)
        for options in ({"offline": True}, {"offline": True, "dest": out / "no"}):
            with pytest.raises(OfflineError, match="cannot be read: Permission denied"):
                client.download(uri, **options)
        assert Path(client.download(uri, out / "second")).read_bytes() == WEIGHTS
        return True

    assert as_nobody(load)
    # The owner is not disturbed.
    assert client.download(uri, offline=True) == path


@pytest.mark.parametrize(("umask", "readable"), [(0o077, False), (0o022, True)])
def test_who_may_read_a_cache_is_as_the_umask_says(
    shared: Callable[[int], tuple[StorageClient, Path]],
    served_archive: str,
    umask: int,
    readable: bool,
) -> None:
    client, folder = shared(umask)
    client.download(served_archive)
    client.download(served_archive, unpack=True)
    entries = [folder / "cache", *(folder / "cache").rglob("*")]
    assert any(path.name == "run" for path in entries)
    for path in entries:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            continue
        assert not mode & 0o022, path
        if readable:
            assert mode & 0o444 == 0o444, path
            assert mode & 0o111 == 0o111 or not (path.is_dir() or path.name == "run"), path
        else:
            assert not mode & 0o077, path


@memory
def test_a_folder_that_cannot_even_be_entered_is_told(
    make_client: MakeClient, source: Source
) -> None:
    uri = source.put_model(MODEL)
    with open_folder() as folder:
        (folder / "closed").mkdir()
        (folder / "closed").chmod(0o700)
        (folder / "out").mkdir()
        (folder / "out").chmod(0o777)
        client = make_client(cache_dir=folder / "closed" / "cache")
        make_client(cache_dir=folder / "first").download(uri)
        client.download(uri, folder / "out" / "first")

        def load() -> bool:
            with pytest.raises(DestinationError, match="STORAGE_CACHE_DIR"):
                client.download(uri)
            with pytest.raises(StorageError):
                client.download(uri, offline=True)
            assert tree_bytes(client.download(uri, folder / "out" / "second")) == MODEL
            return True

        assert as_nobody(load)
