"""Archives that are written here: what ``zipfile`` reads of them, and where their data lies."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.container.entries import (
    DEFLATED,
    STORED,
    data_offset,
    open_entry,
    read_directory,
    read_entry,
)
from storage.container.source import FileSource
from storage.container.stored import LocalSource, unnamed_file
from storage.container.zipped import PAGE, ZipWriter
from storage.errors import IntegrityError, InvalidInput

GIB = 1024**3
WEIGHTS = np.random.default_rng(1).standard_normal(1_000_000, dtype=np.float32).tobytes()
TEXT = b"all work and no play makes jack a dull boy\n" * 50_000


def written(
    steps: Callable[[ZipWriter], object], file: BinaryIO | None = None, alignment: int = 64
) -> bytes:
    """Return the archive that some steps make; check it with ``zipfile``."""
    target = io.BytesIO() if file is None else file
    writer = ZipWriter(target, alignment=alignment)
    steps(writer)
    writer.close()
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
    target.seek(0)
    return target.read()


def by_window(writer: ZipWriter, name: str, content: bytes, compress: bool | None = None) -> None:
    with writer.entry(name, compress) as file:
        for position in range(0, len(content), 100_000):
            file.write(content[position : position + 100_000])


def by_stream(writer: ZipWriter, name: str, content: bytes, compress: bool | None = None) -> None:
    writer.add(name, io.BytesIO(content), compress)


def by_pipe(writer: ZipWriter, name: str, content: bytes, compress: bool | None = None) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: object) -> int:
            raise io.UnsupportedOperation

    writer.add(name, Pipe(content), compress)


def by_source(writer: ZipWriter, name: str, content: bytes, compress: bool | None = None) -> None:
    writer.add(name, FileSource(io.BytesIO(content)), compress)


def at_once(writer: ZipWriter, name: str, content: bytes, compress: bool | None = None) -> None:
    writer.write(name, content[:7], b"", memoryview(content)[7:], compress=compress)


WAYS = (at_once, by_window, by_stream, by_pipe, by_source)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compress", [None, True, False])
@pytest.mark.parametrize("content", [b"", b"x", WEIGHTS, TEXT, bytes(3_000_000)])
def test_an_entry_is_what_was_written(
    way: Callable[..., None], compress: bool | None, content: bytes, tmp_path: Path
) -> None:
    with unnamed_file(tmp_path) as file:
        data = written(lambda writer: way(writer, "größe/x", content, compress), file)
    entry = read_directory(io.BytesIO(data))["größe/x"]
    assert read_entry(io.BytesIO(data), entry, 10**9) == content
    shrinks = content not in (b"", b"x", WEIGHTS)
    expected = shrinks if compress is None else compress
    assert entry.method == (DEFLATED if expected else STORED)
    if shrinks and expected:
        assert entry.compressed_size < len(content) / 20


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("content", [WEIGHTS, TEXT])
def test_the_same_content_gives_the_same_bytes(way: Callable[..., None], content: bytes) -> None:
    def steps(writer: ZipWriter) -> None:
        way(writer, "a", content)
        writer.write("b", b"end")

    data = written(steps)
    assert data == written(steps)
    if way is not by_pipe or content is WEIGHTS:
        # Whichever way it came, but for the blocks in which it is deflated.
        assert len(data) == len(
            written(lambda writer: (at_once(writer, "a", content), writer.write("b", b"end")))
        )


@pytest.mark.parametrize("alignment", [1, 64, PAGE])
def test_data_begins_where_it_can_be_mapped(alignment: int) -> None:
    def steps(writer: ZipWriter) -> None:
        for length in range(200):
            writer.write("x" * (length + 1), bytes(length))
        by_window(writer, "y", WEIGHTS)

    file = io.BytesIO(written(steps, alignment=alignment))
    entries = read_directory(file)
    assert len(entries) == 201
    assert {data_offset(file, entry) % alignment for entry in entries.values()} == {0}


def test_an_archive_begins_where_the_file_stands() -> None:
    file = io.BytesIO(b"before" + bytes(100_000))
    file.seek(6)
    data = written(lambda writer: by_window(writer, "a", b"content"), file)
    assert data.startswith(b"before")
    assert len(data) < 1000
    assert read_entry(io.BytesIO(data), read_directory(io.BytesIO(data))["a"], 10) == b"content"


def test_what_is_stored_goes_forward_only() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as source, open(writing, "wb", buffering=0) as pipe:
        writer = ZipWriter(pipe)  # type: ignore[arg-type]
        writer.write("a", b"one", np.arange(10), compress=False)
        writer.write("b", b"two", compress=False)
        writer.close()
        pipe.close()
        data = io.BytesIO(source.read())
    with zipfile.ZipFile(data) as archive:
        assert archive.read("a") == b"one" + np.arange(10).tobytes()


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 65536, "there"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    writer = ZipWriter(io.BytesIO())
    writer.write("there", b"")
    with pytest.raises(InvalidInput, match="cannot be the name"):
        writer.write(name, b"")


def test_an_entry_is_complete_before_the_next_one_begins() -> None:
    writer = ZipWriter(io.BytesIO())
    with writer.entry("a"), pytest.raises(InvalidInput, match="before the last"):
        writer.write("b", b"")


# -- files inside ------------------------------------------------------------------------------


def test_an_entry_that_failed_is_not_there() -> None:
    def steps(writer: ZipWriter) -> None:
        writer.write("a", b"one")
        with contextlib.suppress(RuntimeError), writer.entry("b") as file:
            file.write(WEIGHTS)
            raise RuntimeError
        writer.write("b", b"two")

    data = written(steps)
    assert len(data) < 1000
    assert data == written(lambda writer: (writer.write("a", b"one"), writer.write("b", b"two")))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["savez", "compressed"])
def test_numpy_saves_into_an_entry(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {str(index): np.arange(50_000.0) * index for index in range(5)}
    with unnamed_file(tmp_path) as file:
        with io.BytesIO() as expected:
            save(expected, **arrays)
            size = len(expected.getvalue())

        def steps(writer: ZipWriter) -> None:
            with writer.entry("m", compress=False) as window:
                save(window, **arrays)

        data = io.BytesIO(written(steps, file))
    entry = read_directory(data)["m"]
    assert entry.size == size
    with open_entry(data, entry) as stream:
        loaded = np.load(stream)
        assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())


def test_a_helper_may_close_the_file_that_it_got() -> None:
    def steps(writer: ZipWriter) -> None:
        with writer.entry("a") as file:
            pickle.dump({"weights": list(range(1000))}, file)
            file.close()

    data = io.BytesIO(written(steps))
    with open_entry(data, read_directory(data)["a"]) as stream:
        assert pickle.load(stream) == {"weights": list(range(1000))}


def test_an_entry_cannot_be_written_when_it_is_complete() -> None:
    writer = ZipWriter(io.BytesIO())
    with writer.entry("a") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="closed"):
        file.write(b"y")


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.binary(max_size=5000)),
        st.tuples(st.just("seek"), st.integers(0, 200_000)),
        st.tuples(st.just("read"), st.integers(0, 5000)),
        st.tuples(st.just("truncate"), st.integers(0, 200_000)),
    ),
    max_size=12,
)


@settings(max_examples=200)
@given(_STEPS, st.sampled_from([None, True, False]))
def test_an_entry_is_written_as_any_file(
    steps: list[tuple[str, bytes | int]], compress: bool | None
) -> None:
    expected = io.BytesIO()
    target = io.BytesIO()
    writer = ZipWriter(target)
    with writer.entry("a", compress) as file:
        for step, argument in steps:
            if step == "truncate" and int(argument) > len(expected.getvalue()):  # type: ignore[arg-type]
                continue  # an io.BytesIO would not grow
            assert getattr(file, step)(argument) == getattr(expected, step)(argument)
            assert file.tell() == expected.tell()
    writer.close()
    entry = read_directory(target)["a"]
    assert read_entry(target, entry, 10**6) == expected.getvalue()


# -- entries of others -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("local", [True, False])
def test_an_entry_is_taken_over_as_it_is(method: int, local: bool, tmp_path: Path) -> None:
    path = tmp_path / "old.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a", TEXT)
        archive.writestr("b", b"")
        archive.writestr("c", WEIGHTS)
    with open(path, "rb") as file, unnamed_file(tmp_path) as target:
        source = LocalSource.open(path) if local else FileSource(file)
        entries = read_directory(source)

        def steps(writer: ZipWriter) -> None:
            writer.write("metadata.json", b"{}")
            for name, entry in entries.items():
                writer.copy(source, entry, "new" if name == "a" else None)
            writer.write("last", b"last")

        data = io.BytesIO(written(steps, target))
        source.close()
    found = read_directory(data)
    assert list(found) == ["metadata.json", "new", "b", "c", "last"]
    assert found["new"].compressed_size == entries["a"].compressed_size
    assert read_entry(data, found["new"], 10**9) == TEXT
    assert read_entry(data, found["c"], 10**9) == WEIGHTS


def test_damage_is_taken_over_and_found_out_by_the_reader() -> None:
    data = bytearray(written(lambda writer: writer.write("a", WEIGHTS)))
    data[5000] ^= 1
    old = FileSource(io.BytesIO(data))
    file = io.BytesIO()
    writer = ZipWriter(file)
    writer.copy(old, read_directory(old)["a"])
    writer.close()
    with pytest.raises(IntegrityError, match="CRC"):
        read_entry(file, read_directory(file)["a"], 10**9)


# -- large ones --------------------------------------------------------------------------------


class Sparse(io.FileIO):
    """A file that takes no room for blocks of zeros."""

    zeros = bytes(1024 * 1024)

    def write(self, data: object, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if view.nbytes == len(self.zeros) and bytes(view) == self.zeros:
            end = self.seek(view.nbytes, os.SEEK_CUR)
            self.truncate(max(end, os.fstat(self.fileno()).st_size))
            return view.nbytes
        return super().write(view)


@pytest.mark.slow
def test_an_archive_of_more_than_four_gib_is_read_by_zipfile(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    with Sparse(path, "w+") as file:
        writer = ZipWriter(file, alignment=PAGE)  # type: ignore[arg-type]
        with writer.entry("zeros", compress=False) as window:
            for _ in range(5 * 1024):
                window.write(Sparse.zeros)
            window.write(b"end")
        writer.write("metadata.json", b"{}")
        by_window(writer, "text", TEXT)
        writer.close()
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("zeros").file_size == 5 * GIB + 3
        assert archive.getinfo("text").header_offset > 5 * GIB
        assert archive.read("metadata.json") == b"{}"
        assert archive.read("text") == TEXT
    source = LocalSource.open(path)
    entries = read_directory(source)
    assert read_entry(source, entries["text"], 10**9) == TEXT
    with open_entry(source, entries["zeros"], mmap=True) as stream:
        memory = stream.getbuffer()  # type: ignore[attr-defined]
        assert memory[-4:] == b"\0end"
        stream.seek(-3, os.SEEK_END)
        assert stream.read() == b"end"
    source.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1])
def test_sizes_and_places_at_the_bound_of_the_old_format_are_read_by_zipfile(
    size: int, tmp_path: Path
) -> None:
    """The size of one entry, and where the next one and the directory begin."""
    path = tmp_path / "large.zip"
    begin = 0
    for wanted in ("size", "place", "directory"):
        with Sparse(path, "w+") as file:
            writer = ZipWriter(file, alignment=1)  # type: ignore[arg-type]
            with writer.entry("zeros", compress=False) as window:
                window.truncate(size - begin if wanted != "directory" else size - 2 * begin - 3)
            # Its header and its name are as long as those of the first one.
            writer.write("after", b"end", compress=False)
            writer.close()
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            infos = {info.filename: info for info in archive.infolist()}
            found = {
                "size": infos["zeros"].file_size,
                "place": infos["after"].header_offset,
                "directory": archive.start_dir,  # type: ignore[attr-defined]
            }
            assert found[wanted] == size
            assert archive.read("after") == b"end"
            entries = read_directory(raw)  # type: ignore[arg-type]
            assert entries["zeros"].size == infos["zeros"].file_size
            assert read_entry(raw, entries["after"], 3) == b"end"  # type: ignore[arg-type]
            begin = data_offset(raw, entries["zeros"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_five_gib_of_zeros_become_small_and_come_back(tmp_path: Path) -> None:
    with open(tmp_path / "zeros", "w+b") as zeros, unnamed_file(tmp_path) as file:
        zeros.truncate(5 * GIB)
        writer = ZipWriter(file)
        writer.add("zeros", zeros)
        writer.close()
        source = LocalSource.adopt(file, "zeros")
        assert source.size < 30_000_000
        with zipfile.ZipFile(file) as archive:
            assert archive.getinfo("zeros").file_size == 5 * GIB
        entry = read_directory(source)["zeros"]
        digest = hashlib.sha256()
        with open_entry(source, entry) as stream:
            assert not any(map(any, (stream.read(1000), stream.read(1000))))
            stream.seek(0)
            while block := stream.read(1024 * 1024):
                digest.update(block[:16])
            assert stream.tell() == 5 * GIB
        source.close()


@pytest.mark.parametrize("count", [65_534, 65_535, 65_536])
def test_more_entries_than_the_old_format_counts_are_read_by_zipfile(count: int) -> None:
    def steps(writer: ZipWriter) -> None:
        for index in range(count):
            writer.write(f"{index}", b"", compress=False)

    data = io.BytesIO(written(steps, alignment=1))
    assert len(read_directory(data)) == count
