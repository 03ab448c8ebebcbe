"""What the operating system has to say: names, syncing, space, refusals."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from storage import files
from storage.errors import (
    DestinationError,
    InsufficientSpaceError,
    InvalidInput,
    ObjectExistsError,
)
from storage.files import check_space, translate_os_errors
from storage.transfer.destination import Destination
from tests.transfer.placing import (
    NEW,
    OLD,
    GiveUpError,
    give_up,
    leftover,
    paths_of,
    put,
    put_file,
    put_tree,
)
from tests.transfer.support import assert_clear, everything_in, files_of

# -- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "x" * 255,
        "é" * 127,
        "語" * 85,
        "x" * 200,
        "x" * 199,
        os.fsdecode(b"\xff" * 255),
        "a b [1] %41 #+",
        "line\nbreak",
        "-rf",
    ],
    ids=lambda name: f"{len(os.fsencode(name))}-bytes",
)
@pytest.mark.parametrize("tree", [True, False])
def test_any_name_that_the_file_system_takes_is_fine(dest: Path, name: str, tree: bool) -> None:
    path = dest.parent / name
    for content in (OLD, NEW):
        if tree:
            put_tree(path, content)
            assert files_of(path) == content
        else:
            put_file(path, content["a.bin"])
            assert path.read_bytes() == content["a.bin"]
    assert os.listdir(dest.parent) == [name]


def test_leftovers_of_a_long_name_are_found(dest: Path) -> None:
    names = ["x" * 250 + "-one", "x" * 250 + "-two"]
    for name in names:
        with Destination(str(dest.parent / name), tree=False) as destination:
            staging = Path(destination.content).parent
        leftover(staging)
    assert len(os.listdir(dest.parent)) == 2
    put_file(dest.parent / names[0], b"x")
    assert sorted(os.listdir(dest.parent)) == sorted([names[0], staging.name])


@pytest.mark.parametrize("tree", [True, False])
def test_a_name_that_is_too_long_is_invalid(dest: Path, tree: bool) -> None:
    with pytest.raises(InvalidInput, match="too long") as caught:
        put(dest.parent / ("x" * 256), tree)
    assert_clear(caught.value)
    assert os.listdir(dest.parent) == []


# -- to the disk ---------------------------------------------------------------------------


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was synced and renamed, in order, with the final path for staged ones."""
    events: list[tuple[str, str]] = []

    def staged(path: str) -> str:
        return re.sub(r"/\.[^/]*\.[0-9a-f]{16}\.partial", "/STAGING", path)

    def fsync(descriptor: int) -> None:
        events.append(("sync", staged(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renaming(name: str) -> None:
        real = getattr(os, name)

        def call(source: str, target: str) -> None:
            real(source, target)
            events.append(("rename", staged(target)))

        monkeypatch.setattr(os, name, call)

    monkeypatch.setattr(os, "fsync", fsync)
    renaming("rename")
    renaming("replace")
    return events


def test_a_durable_tree_is_synced_before_and_its_parents_after_the_rename(
    dest: Path, journal: list[tuple[str, str]]
) -> None:
    put_tree(dest / "made" / "m", NEW, durable=True)
    at = journal.index(("rename", str(dest / "made" / "m")))
    staging = f"{dest}/made/STAGING/content"
    before, after = journal[:at], journal[at + 1 :]
    assert {path for _, path in before} == {
        *(f"{staging}/{name}" for name in NEW),
        *(staging, f"{staging}/sub", f"{staging}/new"),
    }
    # A folder after what is in it.
    assert before[-1] == ("sync", staging)
    assert after == [("sync", str(path)) for path in (dest / "made", dest, dest.parent)]


def test_a_durable_file_is_synced_before_and_its_parent_after_the_rename(
    dest: Path, journal: list[tuple[str, str]]
) -> None:
    put_file(dest, b"x", durable=True)
    assert journal == [
        ("sync", f"{dest.parent}/STAGING/content"),
        ("rename", str(dest)),
        ("sync", str(dest.parent)),
    ]


def test_a_durable_move_has_its_record_on_disk_first_and_the_names_last(
    mounted: Path, journal: list[tuple[str, str]]
) -> None:
    put_tree(mounted, OLD, durable=True)
    journal.clear()
    put_tree(mounted, NEW, durable=True)
    first = next(number for number, (kind, _) in enumerate(journal) if kind == "rename")
    assert journal[first - 2 : first] == [
        ("sync", f"{mounted}/STAGING/moving"),
        ("sync", f"{mounted}/STAGING"),
    ]
    assert ("sync", f"{mounted}/STAGING/content/a.bin") in journal[: first - 2]
    assert journal[-1] == ("sync", str(mounted))


def test_links_to_nowhere_do_not_stop_a_durable_tree(dest: Path) -> None:
    with Destination(str(dest), tree=True, durable=True) as destination:
        os.symlink("nowhere", os.path.join(destination.content, "link"))
        destination.publish()
    assert os.readlink(dest / "link") == "nowhere"


def test_nothing_is_synced_unless_asked(dest: Path, journal: list[tuple[str, str]]) -> None:
    put_tree(dest, OLD)
    put_tree(dest, NEW)
    put_file(dest.parent / "file", b"x")
    assert [event for event in journal if event[0] == "sync"] == []


# -- space and other refusals of the system ------------------------------------------------


def test_too_little_space_is_told_in_bytes(tmp_path: Path) -> None:
    with pytest.raises(InsufficientSpaceError, match=f"{2**60} bytes are needed") as caught:
        check_space(str(tmp_path), 2**60)
    assert_clear(caught.value)
    assert caught.value.errno == errno.ENOSPC
    check_space(str(tmp_path), 0)


def test_a_file_system_that_does_not_tell_its_size_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[2:5] = [0, 0, 0]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    check_space(str(tmp_path), 10**9)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, InsufficientSpaceError),
        (errno.EDQUOT, InsufficientSpaceError),
        (errno.EROFS, DestinationError),
        (errno.EACCES, DestinationError),
        (errno.EIO, DestinationError),
        (errno.ENAMETOOLONG, InvalidInput),
    ],
)
def test_an_error_of_the_system_becomes_ours(code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, translate_os_errors("/a/b"):
        raise OSError(code, os.strerror(code), "/a/b/c")
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, OSError)
    assert_clear(caught.value)
    if isinstance(caught.value, OSError):
        assert caught.value.errno == (errno.ENOSPC if kind is InsufficientSpaceError else code)
        assert isinstance(caught.value, DestinationError)


@pytest.mark.parametrize("name", ["line\nbreak", "\x1b[31mred", os.fsdecode(b"\xff")])
def test_a_message_is_one_printable_line_whatever_the_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(ObjectExistsError) as caught:
        put_tree(path, {})
    assert_clear(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(DestinationError) as denied, translate_os_errors(str(path)):
        raise OSError(errno.EACCES, "denied", str(path))
    assert str(denied.value).isprintable()


def test_an_error_while_cleaning_up_does_not_hide_the_first_one(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", broken)
        with pytest.raises(GiveUpError):
            give_up(dest)
    put_tree(dest, NEW)
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_what_is_published_counts_even_if_the_old_tree_cannot_be_removed(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tree(dest, OLD)

    def broken(path: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", broken)
        assert put_tree(dest, NEW) == str(dest)
    assert files_of(dest) == NEW
    put_tree(dest, NEW)
    assert everything_in(dest.parent) == paths_of(NEW, "model")
