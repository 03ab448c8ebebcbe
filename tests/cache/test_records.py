"""A record is read as it was written, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from storage.cache.layout import Layout
from storage.cache.records import (
    DamagedRecordError,
    UnreadableRecordError,
    read_record,
    write_record,
)
from tests.cache.processes import as_nobody, open_folder
from tests.servers import small_disk

VALUE = {"path": "naïve \udcff\n.bin", "size": 2**60, "list": [1, None, True], "none": {}}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "cache"))


@pytest.fixture
def record(layout: Layout) -> Path:
    """Path of a record whose folder is not there yet."""
    return Path(layout.root, "refs", "s3", "bucket", "one.json")


def leftovers(layout: Layout) -> list[str]:
    return os.listdir(layout.partial)


def sealed(text: bytes) -> bytes:
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def test_a_record_is_read_as_it_was_written(layout: Layout, record: Path) -> None:
    assert read_record(str(record)) is None
    write_record(layout, str(record), VALUE)
    assert read_record(str(record)) == VALUE
    write_record(layout, str(record), {"another": 1})
    assert read_record(str(record)) == {"another": 1}
    assert leftovers(layout) == []


def test_there_is_no_record_below_a_file(layout: Layout, record: Path) -> None:
    write_record(layout, str(record), VALUE)
    assert read_record(str(record / "inner.json")) is None


def test_a_record_that_was_cut_anywhere_is_damaged(layout: Layout, record: Path) -> None:
    write_record(layout, str(record), VALUE)
    whole = record.read_bytes()
    # The line end after the checksum says nothing.
    for length in range(len(whole) - 1):
        record.write_bytes(whole[:length])
        with pytest.raises(DamagedRecordError):
            read_record(str(record))
        record.write_bytes(whole[:length] + bytes(len(whole) - length))
        with pytest.raises(DamagedRecordError):
            read_record(str(record))


def test_a_record_with_one_bit_changed_is_damaged(layout: Layout, record: Path) -> None:
    write_record(layout, str(record), VALUE)
    whole = record.read_bytes()
    for place in range(len(whole) - 1):
        record.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedRecordError):
            read_record(str(record))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"{}\n",
        bytes(4096),
        sealed(b"[1]"),
        sealed(b"null"),
        sealed(b"{"),
        sealed(b"\xff"),
        sealed(b"[" * 100_000),
        sealed(b"{}") + sealed(b"{}"),
        b"\n" + sealed(b"{}"),
        json.dumps({"a": 1}).encode(),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_record_is_damaged(layout: Layout, record: Path, data: bytes) -> None:
    record.parent.mkdir(parents=True)
    record.write_bytes(data)
    with pytest.raises(DamagedRecordError) as caught:
        read_record(str(record))
    assert not isinstance(caught.value, UnreadableRecordError)


def test_what_cannot_be_read_may_be_right(layout: Layout) -> None:
    with open_folder() as folder:
        path = folder / "one.json"
        write_record(Layout(str(folder)), str(path), VALUE)
        path.chmod(0)

        def read() -> bool:
            with pytest.raises(UnreadableRecordError):
                read_record(str(path))
            return True

        assert as_nobody(read)
    os.makedirs(layout.root)
    with pytest.raises(UnreadableRecordError):
        read_record(layout.root)


def test_whoever_reads_meanwhile_reads_the_old_one_to_its_end(layout: Layout, record: Path) -> None:
    write_record(layout, str(record), {"old": "x" * 100_000})
    with open(record, "rb") as reading:
        begin = reading.read(10)
        write_record(layout, str(record), {"new": "y"})
        old = begin + reading.read()
    assert old == sealed(json.dumps({"old": "x" * 100_000}, separators=(",", ":")).encode())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_record_that_cannot_be_replaced_stays(
    layout: Layout, record: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write_record(layout, str(record), {"old": 1})

    def refuse(source: str, target: str) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_record(layout, str(record), {"new": 2})
    assert read_record(str(record)) == {"old": 1}
    assert leftovers(layout) == []


def test_a_record_that_does_not_fit_on_the_disk_changes_nothing() -> None:
    with small_disk(mebibytes=1) as disk:
        layout = Layout(str(disk))
        path = str(disk / "refs" / "one.json")
        write_record(layout, path, {"old": 1})
        with pytest.raises(OSError) as caught:  # noqa: PT011 -- its number follows
            write_record(layout, path, {"new": "x" * 2**20})
        assert caught.value.errno == errno.ENOSPC
        assert read_record(path) == {"old": 1}
        assert leftovers(layout) == []
        write_record(layout, path, {"new": 2})
        assert read_record(path) == {"new": 2}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_record_is_as_the_umask_says(
    layout: Layout, record: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_record(layout, str(record), VALUE)
    finally:
        os.umask(before)
    assert record.stat().st_mode & 0o777 == mode
