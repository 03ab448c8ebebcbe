"""Objects as files, and stores as fsspec file systems."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    Storage,
    StorageOperations,
)
from tests.facade.stores import S3Store, Store, needs
from tests.servers import CountingProxy

DATA = random.Random(7).randbytes(3_000_017)


# -- reading ---------------------------------------------------------------------------------


def test_a_file_is_read_in_any_order(store: Store) -> None:
    store.put_raw("model.bin", DATA)
    with Storage.open(store.uri("model.bin"), config=store.config) as file:
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.read(10) == DATA[:10]
        assert file.tell() == 10
        assert file.seek(1_000_000) == 1_000_000
        assert file.read(5) == DATA[1_000_000:1_000_005]
        assert file.seek(-7, io.SEEK_END) == len(DATA) - 7
        assert file.read() == DATA[-7:]
        assert file.read() == b""
        assert file.read(10) == b""
        file.seek(3)
        file.seek(4, io.SEEK_CUR)
        assert file.read(3) == DATA[7:10]
        file.seek(len(DATA) + 100)
        assert file.read(1) == b""
        file.seek(0)
        assert file.read() == DATA
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)
        with pytest.raises(OSError, match="write"):
            file.write(b"x")
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_random_reads_give_what_is_there(store: Store) -> None:
    store.put_raw("model.bin", DATA)
    chance = random.Random(11)
    with Storage.open(store.uri("model.bin"), config=store.config) as file:
        for _ in range(40):
            start = chance.randrange(len(DATA))
            length = chance.choice([0, 1, 100, 70_000, 1_500_000])
            file.seek(start)
            assert file.read(length) == DATA[start : start + length]


def test_short_reads_and_buffers_of_the_caller(store: Store) -> None:
    store.put_raw("model.bin", DATA)
    with Storage.open(store.uri("model.bin"), config=store.config) as file:
        pieces = []
        while piece := file.read1(100_000):  # type: ignore[attr-defined]
            assert len(piece) <= 100_000
            pieces.append(piece)
        assert b"".join(pieces) == DATA
        file.seek(1)
        buffer = bytearray(2_000_000)
        assert file.readinto(buffer) == 2_000_000  # type: ignore[attr-defined]
        assert bytes(buffer) == DATA[1:2_000_001]
        assert file.readinto(bytearray(0)) == 0  # type: ignore[attr-defined]


def test_other_libraries_read_from_it(store: Store, tmp_path: Path) -> None:
    import tarfile
    import zipfile

    (tmp_path / "f").write_bytes(DATA)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.write(tmp_path / "f", "f")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "f", "f")
    for name in ("a.zip", "a.tar"):
        store.put_raw(name, (tmp_path / name).read_bytes())
    with (
        Storage.open(store.uri("a.zip"), config=store.config) as file,
        zipfile.ZipFile(file) as zipped,
    ):
        assert zipped.read("f") == DATA
    with (
        Storage.open(store.uri("a.tar"), config=store.config) as file,
        tarfile.open(fileobj=file) as tar,
    ):
        member = tar.extractfile("f")
        assert member is not None
        assert member.read() == DATA


@needs("S3")
def test_reading_from_start_to_end_is_one_request(
    store: Store, counting_proxy: Callable[[str], CountingProxy]
) -> None:
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", DATA)
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    with Storage.open(store.uri("model.bin"), config=config) as file:
        assert proxy.count("GET") == 0
        while file.read(100_000):
            pass
    assert proxy.count("GET") == 1
    assert proxy.count("HEAD") == 1
    proxy.clear()
    with Storage.open(store.uri("model.bin"), config=config) as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == DATA[-10:]
    assert [request.status for request in proxy.requests if request.method == "GET"] == [206]


def test_only_an_object_can_be_opened(store: Store) -> None:
    store.put_raw("tree/f", b"1")
    for path, error in (
        ("tree", ModelMissingError),
        ("absent", ModelMissingError),
        ("tree/", InvalidInput),
    ):
        with pytest.raises(error):
            Storage.open(store.uri(path), config=store.config)
    for mode in ("r", "w", "a", "ab", "r+b", "rt", ""):
        with pytest.raises(InvalidInput, match="mode"):
            Storage.open(store.uri("tree/f"), mode, config=store.config)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        Storage.open(store.uri("tree/"), "wb", config=store.config)
    assert store.keys() == ["tree/f"]


def test_what_is_replaced_while_it_is_read_is_never_mixed(store: Store) -> None:
    old, new = b"o" * 6_000_000, b"n" * 6_000_000
    store.put_raw("model.bin", old)
    with Storage.open(store.uri("model.bin"), config=store.config) as file:
        begin = file.read(1000)
        store.put_raw("model.bin", new)
        # A jump away from the request under way, so that another one is needed.
        file.seek(5_000_000)
        try:
            end = file.read(1000)
        except ObjectChangedError:
            end = None
    assert begin == old[:1000]
    assert end in (None, old[:1000])
    with Storage.open(store.uri("model.bin"), config=store.config) as file:
        assert file.read() == new


# -- writing ---------------------------------------------------------------------------------


def test_what_is_written_appears_when_it_is_closed(store: Store) -> None:
    uri = store.uri("deep/model.bin")
    with Storage.open(uri, "wb", config=store.config) as file:
        assert file.writable()
        assert not file.readable()
        assert file.write(b"we") == 2
        assert file.write(bytearray(b"ig")) == 2
        assert file.write(memoryview(b"hts")) == 3
        assert file.tell() == 7
        assert store.keys() == []
    assert store.get_raw("deep/model.bin") == b"weights"
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")


def test_a_written_file_replaces_an_older_one(store: Store) -> None:
    store.put_raw("model.bin", b"something longer from before")
    file = Storage.open(store.uri("model.bin"), "wb", config=store.config)
    file.write(b"new")
    assert store.get_raw("model.bin") == b"something longer from before"
    file.close()
    assert store.get_raw("model.bin") == b"new"


def test_nothing_written_is_an_empty_object(store: Store) -> None:
    Storage.open(store.uri("empty"), "wb", config=store.config).close()
    assert store.keys() == ["empty"]
    assert store.get_raw("empty") == b""


def write_and_fail(store: Store, path: str) -> None:
    with Storage.open(store.uri(path), "wb", config=store.config) as file:
        file.write(b"half of the")
        raise RuntimeError("the model went up in smoke")


def test_an_error_while_writing_leaves_what_was_there(store: Store) -> None:
    store.put_raw("old", b"kept")
    for path in ("old", "new"):
        with pytest.raises(RuntimeError, match="smoke"):
            write_and_fail(store, path)
    assert store.keys() == ["old"]
    assert store.get_raw("old") == b"kept"


def test_exclusive_writing_makes_an_object_once(store: Store) -> None:
    uri = store.uri("model.bin")
    with Storage.open(uri, "xb", config=store.config) as file:
        file.write(b"first")
    file = Storage.open(uri, "xb", config=store.config)
    file.write(b"second")
    with pytest.raises(ObjectExistsError):
        file.close()
    assert file.closed
    assert store.get_raw("model.bin") == b"first"


def test_a_large_file_is_written_whole(store: Store) -> None:
    digest = hashlib.sha256()
    with Storage.open(store.uri("large"), "wb", config=store.config) as file:
        for number in range(6):
            block = random.Random(number).randbytes(3_000_000)
            digest.update(block)
            file.write(block)
    assert hashlib.sha256(store.get_raw("large")).digest() == digest.digest()
    found = StorageOperations.get_object_metadata(store.uri("large"), config=store.config)
    assert found["size"] == 18_000_000
    if not store.lacks("metadata"):
        assert found["digests"]["sha256"] == digest.hexdigest()
    path = Storage.download(store.uri("large"), config=store.config)
    assert os.path.getsize(path) == 18_000_000


# -- fsspec ----------------------------------------------------------------------------------


def test_the_file_system_of_a_store_is_usable(store: Store) -> None:
    from fsspec import AbstractFileSystem

    store.put_all({"tree/model.bin": b"weights", "tree/sub/f": b"1"})
    fs = Storage.filesystem(store.uri("tree"), config=store.config)
    assert isinstance(fs, AbstractFileSystem)
    path = store.filesystem_path("tree")
    names = sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False))
    assert names == ["model.bin", "sub"]
    with fs.open(f"{path}/model.bin", "rb") as file:
        assert file.read() == b"weights"
    assert fs.cat_file(f"{path}/model.bin", start=2, end=5) == b"igh"
    assert fs.size(f"{path}/sub/f") == 1
    assert not fs.exists(f"{path}/absent")
    with fs.open(f"{path}/new", "wb") as file:
        file.write(b"by fsspec")
    assert store.get_raw("tree/new") == b"by fsspec"
    path = Storage.download(store.uri("tree/new"), config=store.config)
    assert Path(path).read_bytes() == b"by fsspec"


def test_each_store_gives_its_own_file_system(make_store: Callable[[str], Store]) -> None:
    for name, expected in (
        ("file", "LocalFileSystem"),
        ("pvc", "LocalFileSystem"),
        ("seaweedfs-obstore", "S3FileSystem"),
        ("moto-fsspec", "S3FileSystem"),
    ):
        store = make_store(name)
        fs = Storage.filesystem(store.base, config=store.config)
        assert type(fs).__name__ == expected
