"""What is noted is found again; what is damaged, of another boot or not ours is not believed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage import files
from storage.backends.base import ByteRange, ObjectInfo
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectChangedError,
    TransferError,
    UnreachableError,
)
from storage.transfer import journal as module
from storage.transfer.journal import Journal
from storage.transfer.lines import encode_line
from tests.cache.processes import as_nobody, open_folder
from tests.transfer.support import KIB, everything_in

SOURCE = "a" * 64
INFO = ObjectInfo("m/weights.bin", 1000, etag='"one"')

Ranges = list[tuple[int, int]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "staging"
    path.mkdir(mode=0o700)
    return path


def note(
    folder: Path, *spans: tuple[int, int], name: str = "a.bin", info: ObjectInfo = INFO
) -> None:
    """Leave what a killed download leaves that had fetched ``spans``."""
    write(Journal(str(folder / "journal"), SOURCE), folder, *spans, name=name, info=info)


def write(
    journal: Journal,
    folder: Path,
    *spans: tuple[int, int],
    name: str = "a.bin",
    info: ObjectInfo = INFO,
) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.truncate(info.size)
        tracked = journal.track(str(path), info)
        for start, end in spans:
            tracked.add(file.fileno(), start, end)


def found(
    folder: Path, name: str = "a.bin", info: ObjectInfo = INFO, source: str = SOURCE
) -> Ranges:
    journal = Journal(str(folder / "journal"), source)
    path = str(folder / name)
    ranges = journal.track(path, info).ranges if journal.has(path) else []
    return [(span.start, span.end) for span in ranges]


# -- what is noted is found ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("noted", "merged"),
    [
        ([(0, 1000)], [(0, 1000)]),
        ([(0, 10), (10, 20)], [(0, 20)]),
        ([(500, 600), (0, 10), (600, 700)], [(0, 10), (500, 700)]),
        ([(999, 1000)], [(999, 1000)]),
    ],
)
def test_ranges_are_found_sorted_and_joined(folder: Path, noted: Ranges, merged: Ranges) -> None:
    note(folder, *noted)
    assert found(folder) == merged
    assert Journal(str(folder / "journal"), SOURCE).noted == sum(b - a for a, b in merged)


def test_nothing_is_written_before_there_is_something_to_note(folder: Path) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    journal.track(str(folder / "a.bin"), INFO)
    journal.close()
    assert everything_in(folder) == []


def test_one_file_is_one_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, 1000), name="first")
    writes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or real(fd, data))
    for number in range(20):
        info = replace(INFO, key=f"m/{number}")
        write(journal, folder, (0, 1000), name=f"sub/{number}", info=info)
    assert len(writes) == 20
    assert [data.count(b"\n") for data in writes] == [1] * 20


def test_any_name_is_kept(folder: Path) -> None:
    name = "sub\n/ü \udcff {[\"'#.bin"
    note(folder, (0, 7), name=name)
    assert found(folder, name) == [(0, 7)]


def test_what_is_dropped_is_forgotten_and_can_be_noted_anew(folder: Path) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, 500))
    journal.track(str(folder / "a.bin"), INFO).drop()
    assert journal.noted == 0
    assert found(folder) == []
    newer = replace(INFO, etag='"two"')
    write(journal, folder, (100, 200), info=newer)
    assert found(folder, info=newer) == [(100, 200)]
    assert found(folder) == []


def test_it_goes_on_from_journal_to_journal(folder: Path) -> None:
    for number in range(10):
        journal = Journal(str(folder / "journal"), SOURCE)
        journal.keep_only({str(folder / "a.bin"): INFO})
        assert journal.noted == number * 100
        write(journal, folder, (number * 100, number * 100 + 100))
        journal.close()
    assert found(folder) == [(0, 1000)]


def test_many_threads_may_note_at_once(folder: Path) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    info = replace(INFO, size=80_000)
    path = folder / "a.bin"
    with open(path, "wb") as file:
        file.truncate(info.size)
        tracked = journal.track(str(path), info)

        def work(first: int) -> None:
            for start in range(first, info.size or 0, 80):
                tracked.add(file.fileno(), start, start + 10)

        threads = [threading.Thread(target=work, args=(number * 10,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert journal.noted == info.size
    assert found(folder, info=info) == [(0, info.size)]


# -- what is not believed ------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        replace(INFO, etag='"two"'),
        replace(INFO, size=1001),
        replace(INFO, key="m/other.bin"),
        replace(INFO, version="7"),
    ],
    ids=["etag", "size", "key", "version"],
)
def test_bytes_of_another_version_are_not_taken(folder: Path, other: ObjectInfo) -> None:
    note(folder, (0, 500))
    journal = Journal(str(folder / "journal"), SOURCE)
    assert journal.track(str(folder / "a.bin"), other).ranges == []
    journal = Journal(str(folder / "journal"), SOURCE)
    journal.keep_only({str(folder / "a.bin"): other})
    assert everything_in(folder) == []


def test_another_source_finds_nothing(folder: Path) -> None:
    note(folder, (0, 500))
    assert found(folder, source="b" * 64) == []


@pytest.mark.parametrize("boot", ["another", None])
def test_another_boot_is_believed_only_what_was_forced_to_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, boot: str | None
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    note(folder, (0, 500))
    assert not synced
    monkeypatch.setattr(files, "boot_id", lambda: boot)
    assert found(folder) == []
    journal = Journal(str(folder / "journal"), SOURCE, durable=True)
    journal.keep_only({})
    write(journal, folder, (0, 300), (300, 400))
    assert len(synced) == 2
    monkeypatch.undo()
    assert found(folder) == [(0, 400)]


def test_nobody_knows_the_boot_so_nothing_is_believed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "boot_id", lambda: None)
    note(folder, (0, 500))
    assert found(folder) == []


def test_what_is_taken_over_for_good_is_forced_to_disk_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(folder, (0, 500))
    synced: list[str] = []
    monkeypatch.setattr(files, "sync", synced.append)
    journal = Journal(str(folder / "journal"), SOURCE, durable=True)
    journal.keep_only({str(folder / "a.bin"): INFO})
    assert synced == [str(folder / "a.bin")]
    monkeypatch.setattr(files, "boot_id", lambda: "another")
    assert found(folder) == [(0, 500)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 499),
        lambda path: path.chmod(0o400),
        lambda path: os.link(path, path.parent / "another-name"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.rename(path.parent / "b"), path.symlink_to("b")),
    ],
    ids=["gone", "short", "read-only", "linked", "folder", "link"],
)
def test_a_file_that_is_not_as_it_was_left_is_not_used(
    folder: Path, spoil: Callable[[Path], object]
) -> None:
    note(folder, (0, 500))
    spoil(folder / "a.bin")
    assert found(folder) == []
    journal = Journal(str(folder / "journal"), SOURCE)
    journal.keep_only({str(folder / "a.bin"): INFO})
    assert everything_in(folder) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_not_believed(folder: Path, mode: int) -> None:
    note(folder, (0, 500))
    folder.chmod(mode)
    assert found(folder) == []


def test_a_folder_of_another_user_is_not_believed() -> None:
    with open_folder() as shared:
        shared.chmod(0o777)
        staging = shared / "staging"

        def leave() -> bool:
            staging.mkdir()
            note(staging, (0, 500))
            return found(staging) == [(0, 500)]

        assert as_nobody(leave)
        assert found(staging) == []


@pytest.mark.parametrize("path", ["../a.bin", "/etc/passwd", "sub/../../a.bin", "", ".", "a\0b"])
def test_a_journal_speaks_of_nothing_outside_its_folder(folder: Path, path: str) -> None:
    note(folder, (0, 500))
    (folder.parent / "a.bin").write_bytes(bytes(1000))
    text = (folder / "journal").read_bytes().splitlines()
    record = encode_line(
        {"file": 0, "path": path, "content": module._content(INFO), "size": 1000, "range": [0, 9]}
    )
    (folder / "journal").write_bytes(text[0] + b"\n" + record)
    assert Journal(str(folder / "journal"), SOURCE).noted == 0


# -- damage --------------------------------------------------------------------------------


def damaged(data: bytes) -> list[bytes]:
    """Return a journal with one byte cut off, flipped or added, at every place."""
    rng = random.Random(3)
    cut = [data[:at] for at in range(len(data))]
    flipped = [
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        for at in range(len(data))
    ]
    added = [data[:at] + rng.randbytes(1) + data[at:] for at in range(len(data))]
    return [*cut, *flipped, *added, *(data[:at] + data[at + 1 :] for at in range(len(data)))]


def test_damage_at_any_byte_makes_less_of_it_and_never_something_else(folder: Path) -> None:
    other = replace(INFO, key="m/b")
    note(folder, (0, 100), (300, 400))
    journal = Journal(str(folder / "journal"), SOURCE)
    journal.keep_only({str(folder / "a.bin"): INFO})
    write(journal, folder, (100, 200))
    write(journal, folder, (0, 50), name="b", info=other)
    journal.track(str(folder / "b"), other).drop()
    write(journal, folder, (70, 80), name="b", info=replace(other, etag='"two"'))
    data = (folder / "journal").read_bytes()
    whole = {"a.bin": ((0, 200), (300, 400)), "b": ((70, 80),)}
    less = 0
    for text in damaged(data):
        (folder / "journal").write_bytes(text)
        journal = Journal(str(folder / "journal"), SOURCE)
        for path, tracked in journal._files.items():
            allowed = [ByteRange(*span) for span in whole[Path(path).name]]
            # What was dropped may come back with the bytes it had: its version is not wanted.
            if tracked.content == module._content(other):
                allowed = [ByteRange(0, 50)]
            for span in tracked.ranges:
                assert any(each.start <= span.start and span.end <= each.end for each in allowed), (
                    text
                )
        less += journal.noted < 310
    # Random bytes that are added to the line's end may be no damage, all others are.
    assert less > 0.9 * len(damaged(data))


def test_what_follows_a_torn_record_is_not_believed(folder: Path) -> None:
    note(folder, (0, 100))
    with open(folder / "journal", "ab") as file:
        file.write(b'0badc0de {"mo')
        file.write(encode_line({"more": 0, "range": [100, 200]}))
        file.write(encode_line({"more": 0, "range": [200, 300]}))
    assert found(folder) == [(0, 100)]


@pytest.mark.parametrize(
    "record",
    [
        {"more": 0, "range": [100, 1001]},
        {"more": 0, "range": [-1, 5]},
        {"more": 0, "range": [5, 5]},
        {"more": 0, "range": ["0", "5"]},
        {"more": 0, "range": [[], {}]},
        {"more": 9, "range": [100, 200]},
        {"more": [], "range": [100, 200]},
        {"later": "something new"},
        {"file": 1, "path": 7, "content": None, "size": "x", "range": [0, 1]},
        [],
        7,
    ],
)
def test_a_record_that_makes_no_sense_ends_the_reading(folder: Path, record: object) -> None:
    note(folder, (0, 100))
    with open(folder / "journal", "ab") as file:
        file.write(encode_line(record))  # type: ignore[arg-type]
        file.write(encode_line({"more": 0, "range": [500, 600]}))
    assert found(folder) == [(0, 100)]


def test_a_later_format_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_FORMAT", 2)
        note(folder, (0, 100))
    assert found(folder) == []


# -- trouble -------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_written_does_not_stop_a_download(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, 100))
    real = os.write
    # The disk is full: half a record is written, and then there is room again.
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    write(journal, folder, (100, 200))
    monkeypatch.undo()
    write(journal, folder, (200, 300))
    assert journal.noted == 100
    assert found(folder) == [(0, 100)]


def test_what_cannot_be_dropped_takes_the_journal_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, 100))
    monkeypatch.setattr(os, "write", lambda *_: 0)
    journal.track(str(folder / "a.bin"), INFO).drop()
    monkeypatch.undo()
    # What the file holds from now on is something else.
    assert not (folder / "journal").exists()
    assert found(folder) == []


def test_only_what_is_wanted_stays_in_the_folder(folder: Path) -> None:
    note(folder, (0, 100), name="content/sub/a.bin")
    note_of_more = Journal(str(folder / "journal"), SOURCE)
    note_of_more.keep_only({str(folder / "content/sub/a.bin"): INFO})
    write(note_of_more, folder, (0, 100), name="content/old.bin", info=replace(INFO, key="old"))
    for name in ("lock", "scratch.zip", "content/x/y/z", "content/sub/b.bin", "journal.new"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "content/x/link").symlink_to("/")
    journal = Journal(str(folder / "journal"), SOURCE)
    journal.keep_only({str(folder / "content/sub/a.bin"): INFO})
    assert everything_in(folder) == [
        "content",
        "content/sub",
        "content/sub/a.bin",
        "journal",
        "lock",
    ]
    assert found(folder, "content/sub/a.bin") == [(0, 100)]
    assert found(folder, "content/old.bin") == []


@pytest.mark.parametrize(
    ("error", "noted", "kept"),
    [
        (TransferError("x"), module.WORTH, True),
        (UnreachableError("x"), module.WORTH, True),
        (KeyboardInterrupt(), module.WORTH, True),
        (TransferError("x"), module.WORTH - 1, False),
        (ObjectChangedError("x"), module.WORTH, False),
        (IntegrityError("x"), module.WORTH, False),
        (AuthenticationError("x"), module.WORTH, True),
        (OSError("x"), module.WORTH, False),
        (None, module.WORTH, False),
    ],
)
def test_what_is_kept_after_a_failure(
    folder: Path, error: BaseException | None, noted: int, kept: bool
) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, noted), info=replace(INFO, size=noted + KIB))
    assert journal.is_worth_keeping(error) == kept


def test_the_message_says_what_is_kept(folder: Path) -> None:
    journal = Journal(str(folder / "journal"), SOURCE)
    write(journal, folder, (0, 100))
    error = UnreachableError("nobody answers (tried 5 times)")
    journal.tell(error, "in /models/.iris.partial")
    assert str(error) == (
        "nobody answers (tried 5 times); 100 bytes of it are kept in /models/.iris.partial, and "
        "the next download of the same to the same place goes on from there"
    )


def test_it_holds_neither_uri_nor_key_nor_pin(folder: Path) -> None:
    info = ObjectInfo("m/w.bin?sig=CANARY", 1000, etag='"CANARY"', version="CANARY")
    note(folder, (0, 100), info=info)
    text = (folder / "journal").read_text()
    assert "CANARY" not in text
    assert "m/w" not in text
    assert (folder / "journal").stat().st_mode & 0o777 == 0o600
