"""ZIP archives of others, and of attackers: read as ``zipfile`` does, or refused in our words."""

from __future__ import annotations

import io
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
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
    Entry,
    data_offset,
    open_entry,
    read_directory,
    read_entry,
)
from storage.container.source import FileSource
from storage.container.stored import LocalSource
from storage.errors import AuthenticationError, IntegrityError, InvalidInput

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1
WEIGHTS = np.random.default_rng(1).standard_normal(100_000, dtype=np.float32).tobytes()
TEXT = b"all work and no play makes jack a dull boy\n" * 20_000
CONTENTS = {
    "metadata.json": b'{"model_id": "m"}',
    "training_model.bin": WEIGHTS,
    "text.txt": TEXT,
    "empty": b"",
    "files/": b"",
    "files/Modell-ü-模型.bin": bytes(70_000),
}


class OneWay(io.RawIOBase):
    """A pipe: what zipfile writes into one has its sizes behind the data."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        block = bytes(data)  # type: ignore[call-overload]
        self.data += block
        return len(block)


def zipped(
    contents: dict[str, bytes] = CONTENTS,
    method: int = zipfile.ZIP_DEFLATED,
    *,
    streamed: bool = False,
    force_zip64: bool = False,
    comment: bytes = b"",
) -> bytes:
    """Return an archive as ``zipfile`` makes it."""
    file = OneWay() if streamed else io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:  # type: ignore[arg-type]
        for name, content in contents.items():
            with archive.open(name, "w", force_zip64=force_zip64) as entry:
                entry.write(content)
        archive.comment = comment
    return bytes(file.data) if isinstance(file, OneWay) else file.getvalue()


def read_all(data: bytes) -> dict[str, bytes]:
    """Return what an archive holds."""
    file = io.BytesIO(data)
    entries = read_directory(file)
    return {name: read_entry(file, entry, 10**9) for name, entry in entries.items()}


# -- what others make --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(zipped(), id="deflated"),
        pytest.param(zipped(method=zipfile.ZIP_STORED), id="stored"),
        pytest.param(zipped(streamed=True), id="deflated with data descriptors"),
        pytest.param(zipped(method=zipfile.ZIP_STORED, streamed=True), id="stored with them"),
        pytest.param(zipped(force_zip64=True), id="zip64"),
        pytest.param(zipped(force_zip64=True, streamed=True), id="zip64 with data descriptors"),
        pytest.param(b"#!/bin/sh\nexit\n" + zipped(), id="behind something else"),
        pytest.param(zipped(comment=b"PK\5\6 a comment" + bytes(5000)), id="with a comment"),
        pytest.param(zipped(comment=bytes(65535)), id="with the longest comment"),
    ],
)
def test_archives_are_read_as_zipfile_reads_them(data: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            expected = {name: archive.read(name) for name in archive.namelist()}
    except zipfile.BadZipFile:
        # The mark of the end in a comment.
        with pytest.raises(InvalidInput):
            read_all(data)
        return
    assert read_all(data) == expected == CONTENTS
    assert list(read_directory(io.BytesIO(data))) == list(CONTENTS)


def test_an_archive_without_entries_is_read() -> None:
    assert read_directory(io.BytesIO(zipped({}))) == {}


def test_what_numpy_saves_is_read_and_loaded_by_it() -> None:
    inner = io.BytesIO()
    np.savez_compressed(inner, a=np.arange(10_000.0), b=np.zeros((3, 4)))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO(zipped({"weights": inner.getvalue()}, method))
        with open_entry(file, read_directory(file)["weights"]) as stream:
            loaded = np.load(stream)
            assert loaded["b"].shape == (3, 4)
            assert np.array_equal(loaded["a"], np.arange(10_000.0))
    array = io.BytesIO()
    np.save(array, np.arange(300_000))
    file = io.BytesIO(zipped({"array": array.getvalue()}))
    with open_entry(file, read_directory(file)["array"]) as stream:
        assert np.array_equal(np.load(stream), np.arange(300_000))


def test_only_the_end_is_read_for_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(zipped(method=zipfile.ZIP_STORED))
    read: list[tuple[int, int]] = []

    class Watched(FileSource):
        def read_at(self, offset: int, length: int) -> bytes:
            read.append((offset, length))
            return super().read_at(offset, length)

    with open(path, "rb") as file:
        source = Watched(file)
        entries = read_directory(source)
        with zipfile.ZipFile(path) as archive:
            directory = archive.start_dir
        # The size of ZIP64's locator and record, which may be there before it.
        assert min(offset for offset, _ in read) >= directory - 76
        read.clear()
        data_offset(source, entries["text.txt"])
        assert len(read) == 1


# -- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_stream_can_be_read_anywhere(method: int) -> None:
    file = io.BytesIO(zipped({"x": TEXT}, method))
    chance = random.Random(1)
    with open_entry(file, read_directory(file)["x"]) as stream:
        assert stream.compressed == (method == zipfile.ZIP_DEFLATED)
        assert not hasattr(stream, "getbuffer")
        for _ in range(100):
            offset, length = chance.randrange(len(TEXT) + 10), chance.randrange(200_000)
            assert stream.seek(offset) == offset
            assert stream.read(length) == TEXT[offset : offset + length]
        stream.seek(0)
        assert stream.readline() == TEXT[:43]
        stream.seek(-10, os.SEEK_END)
        assert stream.read() == TEXT[-10:]
        with pytest.raises(io.UnsupportedOperation):
            stream.fileno()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("reading", ["whole", "blocks", "tiny", "begun twice"])
def test_a_changed_entry_is_found_out_when_it_is_read(method: int, reading: str) -> None:
    data = bytearray(zipped({"x": WEIGHTS[:200_000]}, method))
    file = io.BytesIO(data)
    entry = read_directory(file)["x"]
    data[data_offset(file, entry) + 150_000] ^= 1
    file = io.BytesIO(data)
    size = {"blocks": 4096, "tiny": 7}.get(reading, -1)
    with open_entry(file, entry) as stream:
        if reading == "begun twice":
            stream.read(10_000)
            stream.seek(0)
        with pytest.raises(IntegrityError, match="entry 'x' is damaged"):
            sum(len(block) for block in iter(lambda: stream.read(size), b""))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_who_reads_on_in_a_damaged_entry_is_told_again(method: int) -> None:
    data = bytearray(zipped({"x": WEIGHTS}, method))
    file = io.BytesIO(data)
    entry = read_directory(file)["x"]
    data[data_offset(file, entry) + 150_000] ^= 1
    with open_entry(io.BytesIO(data), entry) as stream:
        with pytest.raises(IntegrityError):
            stream.read()
        for step in (lambda: None, lambda: stream.seek(entry.size // 2), lambda: stream.seek(0)):
            step()
            for _ in range(3):
                with pytest.raises(IntegrityError, match="entry 'x' is damaged"):
                    stream.read(200_000)


def test_a_stream_outlives_the_source_that_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(zipped())
    source = LocalSource.open(tmp_path / "model.zip")
    entry = read_directory(source)["text.txt"]
    stream = open_entry(source, entry)
    source.close()
    with stream:
        assert stream.read() == TEXT
    with pytest.raises(InvalidInput, match="closed"):
        open_entry(source, entry)


def test_a_stored_entry_of_a_file_is_mapped_on_request(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(zipped(method=zipfile.ZIP_STORED))
    source = LocalSource.open(path)
    entries = read_directory(source)
    for name, content in CONTENTS.items():
        with open_entry(source, entries[name], mmap=True) as stream:
            memory = stream.getbuffer()  # type: ignore[attr-defined]
            assert stream.read() == content
        assert bytes(memory) == content
        memory[:] = bytes(len(memory))
    source.close()
    assert read_all(path.read_bytes()) == CONTENTS
    path.write_bytes(zipped())
    source = LocalSource.open(path)
    with open_entry(source, read_directory(source)["text.txt"], mmap=True) as stream:
        assert not hasattr(stream, "getbuffer")
    source.close()


def test_more_than_the_limit_is_not_read() -> None:
    file = io.BytesIO(zipped({"metadata.json": bytes(1000)}))
    entry = read_directory(file)["metadata.json"]
    assert read_entry(file, entry, 1000) == bytes(1000)
    with pytest.raises(InvalidInput, match="holds 1000 bytes, and at most 999 are read"):
        read_entry(file, entry, 999)


# -- what attackers make -----------------------------------------------------------------------


def directory_field(data: bytes, offset: int, layout: str, value: int) -> bytes:
    """Return an archive with one field of the first record of its directory changed."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, data.index(b"PK\1\2") + offset, value)
    return bytes(changed)


SMALL = zipped({"a": b"x" * 100, "b": bytes(range(200))}, zipfile.ZIP_STORED)
PACKED = zipped({"a": b"x" * 100, "b": bytes(range(200)) * 3})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "no whole ZIP", id="nothing"),
        pytest.param(b"PK", "no whole ZIP", id="two bytes"),
        pytest.param(b"PK\5\6" + bytes(17), "no whole ZIP", id="a short end"),
        pytest.param(SMALL[:-1], "no whole ZIP", id="cut short"),
        pytest.param(directory_field(SMALL, 8, "<H", 1), "encrypted", id="encrypted"),
        pytest.param(directory_field(SMALL, 8, "<H", 0x2000), "encrypted", id="masked"),
        pytest.param(directory_field(SMALL, 10, "<H", 12), "method 12", id="bzip2"),
        pytest.param(directory_field(SMALL, 10, "<H", 99), "method 99", id="AES"),
        pytest.param(directory_field(SMALL, 24, "<L", 101), "cannot hold 101", id="long"),
        pytest.param(directory_field(SMALL, 24, "<L", 99), "cannot hold 99", id="short"),
        pytest.param(directory_field(PACKED, 24, "<L", 2**31), "cannot hold", id="a bomb"),
        pytest.param(directory_field(SMALL, 20, "<L", 10**6), "overlaps", id="overlapping"),
        pytest.param(directory_field(SMALL, 42, "<L", 10**6), "not where", id="outside"),
        pytest.param(directory_field(SMALL, 42, "<L", 131), "overlaps", id="shared header"),
        pytest.param(directory_field(SMALL, 46, "<B", 0), "proper name", id="NUL"),
        pytest.param(directory_field(SMALL, 46, "<B", ord("b")), "two entries", id="twice"),
        pytest.param(directory_field(SMALL, 6, "<H", 99), "no whole ZIP", id="future"),
    ],
)
def test_what_cannot_be_right_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        read_directory(io.BytesIO(data))


def test_a_name_is_the_same_in_the_header_and_in_the_directory() -> None:
    data = SMALL.replace(b"a", b"z", 1)
    with pytest.raises(InvalidInput, match="another header"):
        read_all(data)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [(50, "holds more than the 50"), (600, "ends before"), (0, "holds more than the 0")],
)
def test_a_size_that_lies_is_found_out(claim: int, reason: str) -> None:
    content = bytes(500)
    data = directory_field(zipped({"a": content}), 24, "<L", claim)
    # With the checksum that the wrong size would have.
    data = directory_field(data, 16, "<L", zlib.crc32(content[:claim]))
    file = io.BytesIO(data)
    with pytest.raises(IntegrityError, match=reason):
        read_entry(file, read_directory(file)["a"], 10**6)


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_million_entries_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    size = 10_000_000 * 47
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 0, 0))

    def read() -> None:
        with open(path, "rb") as file, pytest.raises(InvalidInput, match="at most 4194304"):
            read_directory(file)

    assert peak(read) < 1024 * 1024


def test_a_bomb_costs_the_memory_of_what_is_read_of_it() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(deflater.compress(bytes(1024 * 1024)) for _ in range(200)) + deflater.flush()
    size = 200 * 1024 * 1024
    data = zipped({"a": b""}, zipfile.ZIP_STORED)
    header, rest = data[:31], data[31:]
    data = header[:8] + b"\x08\0" + header[10:] + packed + rest
    for offset, layout, value in (
        (10, "<H", DEFLATED),
        (16, "<L", 0),
        (20, "<L", len(packed)),
        (24, "<L", size),
    ):
        data = directory_field(data, offset, layout, value)
    end = bytearray(data)
    struct.pack_into("<L", end, len(end) - 6, data.index(b"PK\1\2"))
    file = io.BytesIO(end)
    entry = read_directory(file)["a"]
    with pytest.raises(InvalidInput, match="at most"):
        read_entry(file, entry, 64 * 1024 * 1024)

    def read() -> None:
        with open_entry(file, entry) as stream, pytest.raises(IntegrityError, match="CRC"):
            sum(len(block) for block in iter(lambda: stream.read(1024 * 1024), b""))

    assert peak(read) < 8 * 1024 * 1024


def test_what_the_source_raises_is_not_taken_for_a_damaged_archive() -> None:
    class Refused(FileSource):
        def read_at(self, offset: int, length: int) -> bytes:
            raise AuthenticationError("the store refused")

    with pytest.raises(AuthenticationError, match="the store refused"):
        read_directory(Refused(io.BytesIO(SMALL)))


def judged(data: bytes) -> None:
    """Read an archive that may be damaged: all of it, or one of the errors for that."""
    file: BinaryIO = io.BytesIO(data)
    try:
        entries = read_directory(file)
    except InvalidInput:
        return
    for entry in entries.values():
        try:
            content = read_entry(file, entry, 10**6)
        except (InvalidInput, IntegrityError):
            continue
        assert zlib.crc32(content) == entry.crc
        assert len(content) == entry.size


@pytest.mark.parametrize("data", [SMALL, PACKED], ids=["stored", "deflated"])
def test_no_changed_byte_and_no_cut_gives_another_error(data: bytes) -> None:
    for position in range(len(data)):
        for value in {0, 0xFF, data[position] ^ 1, data[position] ^ 0x80}:
            judged(data[:position] + bytes([value]) + data[position + 1 :])
        judged(data[:position])
        judged(data[position:])


@settings(max_examples=1000 * SOAK)
@given(
    data=st.sampled_from([SMALL, PACKED, zipped({"a": b"", "ü": TEXT[:300]}, force_zip64=True)]),
    changes=st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 8), st.binary(max_size=8)), max_size=8
    ),
)
def test_no_changes_give_another_error(data: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    changed = bytearray(data)
    for position, removed, added in changes:
        changed[position : position + removed] = added
    judged(bytes(changed))


@settings(max_examples=300 * SOAK)
@given(st.binary(max_size=300), st.binary(max_size=30), st.binary(max_size=40))
def test_no_bytes_give_another_error(data: bytes, fields: bytes, comment: bytes) -> None:
    judged(data)
    judged(data + b"PK\1\2" + fields + b"PK\5\6" + fields[:18] + comment)


def test_entries_say_how_they_are_compressed() -> None:
    entry = read_directory(io.BytesIO(PACKED))["a"]
    assert entry == Entry(
        "a", 0, entry.compressed_size, 100, zlib.crc32(b"x" * 100), 8, entry.limit
    )
    assert (STORED, DEFLATED) == (0, 8)
