"""A disk that is full: what is cached is served, nothing is half there, and it goes on later."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import InsufficientSpaceError, OfflineError, StorageClient
from storage.cache.blobs import Blobs
from storage.cache.filling import Filling
from storage.cache.index import Index
from storage.cache.leases import Leases
from storage.cache.manifests import Manifests
from storage.cache.records import read_record
from storage.cache.refs import Refs
from storage.cache.snapshots import Snapshots
from storage.cache.verify import verify
from tests.cache.conftest import MakeClient
from tests.cache.support import Source, blob_files, tree_bytes, wrong_blobs
from tests.servers import small_disk

KIB = 1024
OLD = {"model.bin": b"old" * 1000, "config/a.json": b"{}"}
NEW = {"model.bin": os.urandom(300 * KIB), "config/a.json": b"{}", "tokenizer": b"tokens" * 1000}

pytestmark = pytest.mark.kinds("memory")


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(mebibytes=1) as disk:
        yield disk


@pytest.fixture
def old(source: Source) -> str:
    return source.put_model(OLD, "old")


@pytest.fixture
def client(make_client: MakeClient, disk: Path, old: str) -> StorageClient:
    """A client of a cache on the small disk, which has a model already."""
    client = make_client(cache_dir=disk / "cache")
    client.download(old)
    return client


def fill_up(disk: Path, leave: int = 0) -> None:
    """Let only so many bytes be free on a disk."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "filler", "ab", buffering=0) as file:
        left = free - leave
        while left > 0:
            try:
                left -= file.write(bytes(min(left, 64 * KIB)))
            except OSError:
                break
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize <= leave + 4 * KIB


def assert_goes_on(client: StorageClient, source: Source, disk: Path, old: str, new: str) -> None:
    """See that nothing is half there, that the old model loads, and the new one with space."""
    cache = disk / "cache"
    assert wrong_blobs(cache) == []
    assert os.listdir(cache / "partial") == []
    with pytest.raises(OfflineError, match=r"never cached|only in part"):
        client.download(new, offline=True)
    for options in ({"offline": True}, {}, {"freshness": "cache-first"}):
        source.forget()
        assert tree_bytes(client.download(old, **options)) == OLD
        assert source.bodies == []
    (disk / "filler").unlink(missing_ok=True)
    source.forget()
    assert tree_bytes(client.download(new)) == NEW
    assert len(source.bodies) == len(set(source.bodies))
    assert tree_bytes(client.download(new, offline=True)) == NEW
    assert verify(client.cache, full=True).problems == ()


def test_a_model_that_does_not_fit_is_refused_before_anything_is_fetched(
    client: StorageClient, source: Source, disk: Path, old: str
) -> None:
    new = source.put_model(NEW, "new")
    fill_up(disk, 200 * KIB)
    source.forget()
    with pytest.raises(InsufficientSpaceError, match="are free"):
        client.download(new)
    assert source.bodies == []
    assert_goes_on(client, source, disk, old, new)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("leave", [0, 4, 8, 20, 50, 100, 200, 290, 310])
def test_a_disk_that_is_full_in_the_middle_leaves_nothing_half(
    client: StorageClient,
    source: Source,
    disk: Path,
    old: str,
    leave: int,
    durable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = source.put_model(NEW, "new")
    # Some file systems do not tell, and others fill up meanwhile.
    monkeypatch.setattr("storage.client.cached.check_space", lambda *_: None)
    fill_up(disk, leave * KIB)
    with pytest.raises(InsufficientSpaceError) as caught:
        client.download(new, durable=durable)
    assert caught.value.errno == errno.ENOSPC
    assert_goes_on(client, source, disk, old, new)


def test_what_came_before_the_disk_was_full_is_not_fetched_again(
    client: StorageClient, source: Source, disk: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"part-{number}": os.urandom(64 * KIB) for number in range(6)}
    new = source.put_model(files, "new")
    monkeypatch.setattr("storage.client.cached.check_space", lambda *_: None)
    fill_up(disk, 300 * KIB)
    with pytest.raises(InsufficientSpaceError):
        client.download(new)
    there = len(blob_files(disk / "cache")) - len(OLD)
    assert there > 0
    with pytest.raises(OfflineError, match=f"only in part: {there} of 6 files"):
        client.download(new, offline=True)
    (disk / "filler").unlink()
    source.forget()
    assert tree_bytes(client.download(new)) == files
    assert len(source.bodies) == 6 - there


MOMENTS: dict[str, tuple[type, str]] = {
    "before the download is noted": (Refs, "begin"),
    "before a folder to work in": (Filling, "__enter__"),
    "before the blobs": (Blobs, "add"),
    "before the index": (Index, "learn"),
    "before the lease": (Leases, "hold"),
    "before the manifest": (Manifests, "save"),
    "before the snapshot": (Snapshots, "build"),
    "before the ref": (Refs, "set"),
    "before the index is flushed": (Index, "flush"),
}


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_is_full_when_something_is_noted_is_no_harm(
    client: StorageClient,
    source: Source,
    disk: Path,
    old: str,
    moment: str,
    durable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = source.put_model(NEW, "new")
    kind, name = MOMENTS[moment]
    real: Callable[..., Any] = getattr(kind, name)
    filled: list[str] = []

    def filling(self: object, *args: Any, **options: Any) -> Any:
        if not filled:
            filled.append(moment)
            fill_up(disk)
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, filling)
        try:
            path = client.download(new, durable=durable)
        except InsufficientSpaceError:
            pass
        else:
            # What could not be noted was nothing but a help.
            assert moment in ("before the lease", "before the index is flushed")
            assert tree_bytes(path) == NEW
            assert tree_bytes(client.download(new, offline=True)) == NEW
            return
    assert filled
    assert_goes_on(client, source, disk, old, new)


def test_on_a_full_disk_what_is_cached_is_served(
    client: StorageClient,
    make_client: MakeClient,
    source: Source,
    disk: Path,
    old: str,
    tmp_path: Path,
) -> None:
    fill_up(disk)
    for each in (client, make_client(cache_dir=disk / "cache")):
        for options in ({}, {"durable": True}, {"offline": True}, {"freshness": "cache-first"}):
            source.forget()
            assert tree_bytes(each.download(old, **options)) == OLD
            assert source.bodies == []
    assert tree_bytes(client.download(old, tmp_path / "out")) == OLD
    new = source.put_model(NEW, "new")
    assert tree_bytes(client.download(new, tmp_path / "new")) == NEW
    assert_goes_on(client, source, disk, old, new)


def test_a_note_that_does_not_fit_leaves_the_old_one(
    client: StorageClient, source: Source, disk: Path, old: str
) -> None:
    # Each of them is written anew when the store has been asked.
    note = next((disk / "cache" / "refs").rglob("*.json"))
    for leave in (0, 1, 4, 8):
        (disk / "filler").unlink(missing_ok=True)
        fill_up(disk, leave * KIB)
        assert tree_bytes(client.download(old)) == OLD
        assert read_record(str(note)) is not None
        assert tree_bytes(client.download(old, offline=True)) == OLD


def test_a_disk_that_is_full_from_the_begin_is_told(
    make_client: MakeClient, source: Source, disk: Path, old: str, tmp_path: Path
) -> None:
    fill_up(disk)
    client = make_client(cache_dir=disk / "cache")
    with pytest.raises(InsufficientSpaceError):
        client.download(old)
    assert tree_bytes(client.download(old, tmp_path / "out")) == OLD
    (disk / "filler").unlink()
    assert tree_bytes(client.download(old)) == OLD
    assert tree_bytes(make_client(cache_dir=disk / "cache").download(old, offline=True)) == OLD


def test_a_disk_without_a_free_inode_is_a_full_one(
    client: StorageClient, source: Source, disk: Path, old: str
) -> None:
    new = source.put_model(NEW, "new")
    for spare in range(0, 40, 3):
        used = os.statvfs(disk).f_files - os.statvfs(disk).f_ffree
        _allow_inodes(disk, used + spare)
        try:
            client.download(new)
        except InsufficientSpaceError:
            assert os.listdir(disk / "cache" / "partial") == []
            assert tree_bytes(client.download(old)) == OLD
            with pytest.raises(OfflineError):
                client.download(new, offline=True)
        else:
            break
    assert spare > 3
    _allow_inodes(disk, 10_000)
    assert tree_bytes(client.download(new)) == NEW
    assert wrong_blobs(disk / "cache") == []
    assert verify(client.cache, full=True).problems == ()


def _allow_inodes(disk: Path, count: int) -> None:
    sudo = () if os.geteuid() == 0 else ("sudo", "-n")
    command = (*sudo, "mount", "-o", f"remount,nr_inodes={count}", str(disk))
    subprocess.run(command, check=True, timeout=30)


def test_the_version_of_a_cache_is_written_when_there_is_space(
    make_client: MakeClient, source: Source, disk: Path, old: str
) -> None:
    client = make_client(cache_dir=disk / "cache")
    client.download(old)
    version = disk / "cache" / "VERSION"
    version.write_bytes(b"torn")
    fill_up(disk)
    assert tree_bytes(make_client(cache_dir=disk / "cache").download(old, offline=True)) == OLD
    (disk / "filler").unlink()
    make_client(cache_dir=disk / "cache").download(source.put_model(NEW, "new"))
    assert read_record(str(version)) == {"format": 1, "algorithm": "blake3"}
