"""Any backend as an fsspec file system."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import Body, ByteRange, Capabilities, ObjectInfo, bytes_payload
from storage.backends.filesystem import BackendFileSystem
from storage.backends.local.backend import LocalBackend
from storage.backends.memory import MemoryBackend
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    UnsupportedOperation,
)


class Limited(MemoryBackend):
    """A memory bucket that counts its reads and may pretend to be able to do less."""

    def __init__(self, bucket: str, **denied: bool) -> None:
        super().__init__(bucket)
        self.denied = denied
        self.spans: list[ByteRange | None] = []

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, **self.denied)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        self.spans.append(span)
        return super().read(key, span, pin)


KEYS = ["a.bin", "m/a.bin", "m/b/c.bin", "m/b/d.bin", "m-2/x", "m"]


@pytest.fixture
def backend() -> Iterator[Limited]:
    backend = Limited("files")
    for key in KEYS:
        backend.write(key, bytes_payload(key.encode()))
    yield backend
    MemoryBackend.clear()


@pytest.fixture
def files(backend: Limited) -> BackendFileSystem:
    return BackendFileSystem(backend)


def test_directories_are_made_up_from_the_keys(files: BackendFileSystem) -> None:
    assert files.ls("", detail=False) == ["a.bin", "m", "m-2"]
    assert files.ls("m/", detail=False) == ["m/a.bin", "m/b"]
    assert [(e["name"], e["type"], e["size"]) for e in files.ls("m")] == [
        ("m/a.bin", "file", 7),
        ("m/b", "directory", 0),
    ]
    # A key may be an object and the beginning of others.
    assert [(e["name"], e["type"]) for e in files.ls("")][1:3] == [
        ("m", "directory"),
        ("m", "file"),
    ]


def test_ls_of_a_file_is_the_file(files: BackendFileSystem) -> None:
    [entry] = files.ls("m/a.bin")
    assert (entry["name"], entry["type"], entry["size"]) == ("m/a.bin", "file", 7)


@pytest.mark.parametrize("call", ["ls", "info", "cat_file", "rm_file", "open", "modified"])
def test_what_is_missing_is_a_file_not_found_error(files: BackendFileSystem, call: str) -> None:
    for path in ("none", "m/none", "m/a.bin/none"):
        with pytest.raises(FileNotFoundError):
            getattr(files, call)(path)
        assert not files.exists(path)


def test_kinds(files: BackendFileSystem) -> None:
    assert files.isfile("m/a.bin")
    assert files.isdir("m/b")
    assert files.isdir("m/b/")
    assert files.isdir("")
    assert not files.isdir("m/a.bin")
    assert not files.isfile("m/b")
    assert files.info("m/a.bin")["etag"] == files.backend.stat("m/a.bin").etag
    assert files.modified("m/a.bin").tzinfo is not None


def test_find(files: BackendFileSystem) -> None:
    assert files.find("") == sorted(KEYS)
    assert files.find("m/b") == ["m/b/c.bin", "m/b/d.bin"]
    assert files.find("m", withdirs=True) == ["m", "m/a.bin", "m/b", "m/b/c.bin", "m/b/d.bin"]
    assert files.find("m", maxdepth=1) == ["m/a.bin"]
    assert files.find("m", maxdepth=1, withdirs=True) == ["m", "m/a.bin", "m/b"]
    assert files.find("m/a.bin") == ["m/a.bin"]
    assert files.find("none") == []
    assert files.find("m/b", detail=True)["m/b/c.bin"]["size"] == 9


def test_walk_and_glob(files: BackendFileSystem) -> None:
    assert [(path, dirs, names) for path, dirs, names in files.walk("m")] == [
        ("m", ["b"], ["a.bin"]),
        ("m/b", [], ["c.bin", "d.bin"]),
    ]
    assert files.glob("m/**/*.bin") == ["m/a.bin", "m/b/c.bin", "m/b/d.bin"]
    assert files.glob("m/b/[c]*") == ["m/b/c.bin"]


def test_failing_store_is_not_an_empty_one(tmp_path: Path) -> None:
    class Closed(LocalBackend):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            raise AuthenticationError("closed")

        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            raise AuthenticationError("closed")

    files = BackendFileSystem(Closed(str(tmp_path)))
    for call in (files.exists, files.find, files.ls, files.info):
        with pytest.raises(AuthenticationError):
            call("m")


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (2, 5), (0, 1), (-3, None), (None, -3), (5, 100), (100, 200), (5, 5), (5, 2)],
)
@pytest.mark.parametrize("ranged", [True, False])
def test_cat_file_is_a_slice(
    backend: Limited,
    files: BackendFileSystem,
    start: int | None,
    end: int | None,
    ranged: bool,
) -> None:
    backend.denied = {"ranged_read": ranged}
    assert files.cat_file("m/b/c.bin", start, end) == b"m/b/c.bin"[start:end]


def test_cat_file_reads_no_more_than_the_slice(backend: Limited, files: BackendFileSystem) -> None:
    files.cat_file("m/b/c.bin", 2, 5)
    assert backend.spans == [ByteRange(2, 5)]


DATA = b"".join(b"%07d\n" % number for number in range(200_000))


@pytest.mark.parametrize("denied", [{}, {"ranged_read": False}], ids=["ranged", "whole"])
def test_opened_file_reads_like_a_local_one(
    backend: Limited, files: BackendFileSystem, denied: dict[str, bool]
) -> None:
    backend.write("data", bytes_payload(DATA))
    backend.denied = denied
    with files.open("data", block_size=100_000) as file, io.BytesIO(DATA) as local:
        steps: list[Callable[[Any], object]] = [
            lambda f: f.read(10),
            lambda f: f.readline(),
            lambda f: f.seek(1_000_003),
            lambda f: f.read(300_000),
            lambda f: f.tell(),
            lambda f: f.seek(-20, io.SEEK_END),
            lambda f: f.read(),
            lambda f: f.read(1),
            lambda f: f.seek(100, io.SEEK_CUR),
            lambda f: f.read(1),
            lambda f: f.seek(0),
            lambda f: f.read(),
        ]
        for number, step in enumerate(steps):
            assert step(file) == step(local), number
    assert file.closed


def test_opened_file_reads_ranges_and_not_all(backend: Limited, files: BackendFileSystem) -> None:
    backend.write("data", bytes_payload(DATA))
    with files.open("data", block_size=1000) as file:
        file.seek(800_000)
        assert file.read(8) == DATA[800_000:800_008]
    assert sum(len(span) for span in backend.spans if span) <= 1000
    assert None not in backend.spans


def test_opened_file_is_one_version(backend: Limited, files: BackendFileSystem) -> None:
    backend.write("data", bytes_payload(DATA))
    with files.open("data", block_size=1000) as file:
        file.read(10)
        backend.write("data", bytes_payload(DATA[::-1]))
        with pytest.raises(ObjectChangedError):
            file.read()


def test_empty_file(files: BackendFileSystem) -> None:
    files.touch("empty")
    assert files.info("empty")["size"] == 0
    assert files.cat_file("empty") == b""
    with files.open("empty") as file:
        assert file.read() == b""


def test_text_compression_and_csv(files: BackendFileSystem) -> None:
    with files.open("t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["é", "1"], ["b", "2"]])
    with files.open("t.csv", "r", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["é", "1"], ["b", "2"]]
    with files.open("t.gz", "wb", compression="gzip") as file:
        file.write(DATA)
    assert gzip.decompress(files.cat_file("t.gz")) == DATA
    with files.open("t.gz", "rt", compression="infer") as file:
        assert file.readline() == "0000000\n"
    with files.open("t.txt.bz2", "w", compression="infer") as file:
        file.write("é\n")
    assert bz2.decompress(files.cat_file("t.txt.bz2")) == "é\n".encode()


@pytest.mark.parametrize("size", [0, 10, (8 << 20) + 1], ids=["empty", "small", "over-memory"])
def test_written_file_appears_when_it_is_closed(
    backend: Limited, files: BackendFileSystem, size: int
) -> None:
    data = (DATA * 6)[:size]
    file = files.open("new/file", "wb")
    for at in range(0, size, 1_000_000):
        file.write(data[at : at + 1_000_000])
    assert file.tell() == size
    assert not files.exists("new/file")
    file.close()
    file.close()
    assert files.cat_file("new/file") == data
    with pytest.raises(ValueError, match="closed"):
        file.write(b"1")


@pytest.mark.parametrize("mode", ["wb", "w"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_file_left_by_an_exception_does_not_appear(
    files: BackendFileSystem, mode: str, compression: str | None
) -> None:
    def write_half() -> None:
        with files.open("m/a.bin", mode, compression=compression) as file:
            file.write(b"half" if mode == "wb" else "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert files.cat_file("m/a.bin") == b"m/a.bin"


@pytest.mark.parametrize("mode", ["wb", "w"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_file_that_nobody_closed_does_not_appear(
    files: BackendFileSystem, mode: str, compression: str | None
) -> None:
    file = files.open("new", mode, compression=compression)
    file.write(b"half" if mode == "wb" else "half")
    del file
    gc.collect()
    assert not files.exists("new")


def test_exclusive_creation(backend: Limited, files: BackendFileSystem) -> None:
    with files.open("new", "xb") as file:
        file.write(b"1")
    with pytest.raises(ObjectExistsError):
        files.open("new", "xb")
    with pytest.raises(ObjectExistsError):
        files.pipe_file("new", b"2", mode="create")
    late = files.open("late", "xb")
    late.write(b"mine")
    backend.write("late", bytes_payload(b"theirs"))
    with pytest.raises(ObjectExistsError):
        late.close()
    assert late.closed
    assert files.cat_file("late") == b"theirs"


def test_appending_is_refused(files: BackendFileSystem) -> None:
    for mode in ("ab", "r+b", "a"):
        with pytest.raises(UnsupportedOperation, match="replaced whole"):
            files.open("m/a.bin", mode)


def test_transaction_stores_all_or_nothing(files: BackendFileSystem) -> None:
    with files.transaction:
        for name in ("t/1", "t/2"):
            with files.open(name, "wb") as file:
                file.write(b"1")
        assert files.find("t") == []
    assert files.find("t") == ["t/1", "t/2"]

    def write_and_fail() -> None:
        with files.transaction:
            with files.open("t/3", "wb") as file:
                file.write(b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert files.find("t") == ["t/1", "t/2"]


@pytest.mark.parametrize("denied", [{}, {"copy": False}], ids=["by-the-store", "by-us"])
def test_copy_move_and_remove(
    backend: Limited, files: BackendFileSystem, denied: dict[str, bool]
) -> None:
    backend.denied = denied
    backend.write("meta", bytes_payload(b"1"), metadata={"owner": "me"})
    files.cp_file("meta", "copy")
    assert backend.stat("copy").metadata["owner"] == "me"
    files.copy("m/b", "copies/", recursive=True)
    assert files.find("copies") == ["copies/b/c.bin", "copies/b/d.bin"]
    files.mv("m-2/x", "moved")
    assert not files.exists("m-2")
    files.rm("m/b", recursive=True)
    assert files.find("m") == ["m/a.bin"]
    files.rm("copies/b/*.bin")
    assert not files.exists("copies")
    with pytest.raises(ModelMissingError):
        files.rm("none")


def test_get_and_put(files: BackendFileSystem, tmp_path: Path) -> None:
    files.get("m/b", str(tmp_path / "out"), recursive=True)
    assert (tmp_path / "out/c.bin").read_bytes() == b"m/b/c.bin"
    files.put(str(tmp_path / "out"), "in", recursive=True)
    assert files.find("in") == ["in/c.bin", "in/d.bin"]


def test_keys_with_odd_characters(files: BackendFileSystem) -> None:
    for path in ("o/a b", "o/a%41", "o/a+b", "o/w[1]", "o/n#1", "o/é", "o/a?b", "o/a*b"):
        files.pipe_file(path, path.encode())
        with files.open(path) as file:
            assert file.read() == path.encode()
        assert files.info(path)["name"] == path
    assert len(files.ls("o")) == 8


def test_local_directory_through_it(tmp_path: Path) -> None:
    files = BackendFileSystem(LocalBackend(str(tmp_path)))
    with files.open("m/a.bin", "wb") as file:
        file.write(b"12345")
    assert (tmp_path / "m/a.bin").read_bytes() == b"12345"
    assert files.ls("m", detail=False) == ["m/a.bin"]
    files.rm_file("m/a.bin")
    assert files.find("") == []
