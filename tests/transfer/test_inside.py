"""Destinations that are filled, not replaced: mount points and their like."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from storage import files
from storage.errors import (
    DestinationError,
    ObjectExistsError,
)
from storage.transfer import trees
from storage.transfer.destination import Destination
from tests.transfer.placing import (
    NEW,
    OLD,
    GiveUpError,
    give_up,
    paths_of,
    put_tree,
)
from tests.transfer.support import assert_clear, everything_in, files_of, write_tree


def test_a_mount_point_is_filled_and_stays_one(mounted: Path) -> None:
    assert put_tree(mounted, OLD) == str(mounted)
    assert files_of(mounted) == OLD
    put_tree(mounted, NEW)
    assert files_of(mounted) == NEW
    assert sorted(os.listdir(mounted)) == ["a.bin", "new", "sub"]
    assert os.path.ismount(mounted)


def test_before_publishing_the_old_tree_in_a_mount_point_is_whole(mounted: Path) -> None:
    put_tree(mounted, OLD)
    with Destination(str(mounted), tree=True) as destination:
        write_tree(Path(destination.content), NEW)
        staged = os.path.relpath(os.path.dirname(destination.content), mounted)
        assert re.fullmatch(r"\.storage\.[0-9a-f]{16}\.partial", staged)
        assert {k: v for k, v in files_of(mounted).items() if not k.startswith(staged)} == OLD
    assert files_of(mounted) == OLD


def test_what_the_file_system_itself_needs_stays(mounted: Path) -> None:
    (mounted / "lost+found").mkdir()
    put_tree(mounted, OLD)
    put_tree(mounted, NEW)
    assert files_of(mounted) == NEW
    assert (mounted / "lost+found").is_dir()


def test_a_folder_named_like_that_elsewhere_is_somebodys(dest: Path) -> None:
    (dest / "lost+found").mkdir(parents=True)
    with pytest.raises(ObjectExistsError):
        put_tree(dest, NEW)


def test_a_bind_mount_is_a_mount_point(dest: Path, tmp_path: Path) -> None:
    lines = Path("/proc/self/mountinfo").read_text()
    bound = tmp_path / "a b\\c"
    bound.mkdir()
    escaped = str(bound).replace("\\", r"\134").replace(" ", r"\040")
    faked = tmp_path / "mountinfo"
    faked.write_text(f"{lines}99 1 8:1 /x {escaped} rw - ext4 /dev/sda1 rw\n")
    real = open

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        return real(faked if path == "/proc/self/mountinfo" else path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", opened)
        assert files.is_mount_point(str(bound))
        assert not files.is_mount_point(str(tmp_path / "a"))
    assert not files.is_mount_point(str(bound))


def test_where_the_parent_cannot_be_written_the_staging_is_inside(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest.mkdir()
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != str(dest.parent) and real(path, mode)
    )
    inode = dest.stat().st_ino
    put_tree(dest, OLD)
    put_tree(dest, NEW)
    assert files_of(dest) == NEW
    assert dest.stat().st_ino == inode
    assert os.listdir(dest.parent) == ["model"]


def test_the_working_directory_is_filled_not_replaced(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest.mkdir()
    monkeypatch.chdir(dest)
    put_tree(Path("."), OLD)
    put_tree(dest, NEW)
    assert sorted(os.listdir(".")) == ["a.bin", "new", "sub"]
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def failing_renames(patch: pytest.MonkeyPatch, *numbers: int) -> list[str]:
    """Let the calls of ``os.rename`` of these numbers fail; return what was renamed to."""
    real, calls = os.rename, []

    def failing(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) in numbers:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), target)
        real(source, target)

    patch.setattr(os, "rename", failing)
    return calls


@pytest.mark.parametrize("old", [True, False])
def test_a_move_that_fails_is_undone(mounted: Path, old: bool) -> None:
    before = OLD if old else {}
    count = len({name.partition("/")[0] for name in before}) + 3
    for number in range(1, count + 1):
        put_tree(mounted, before)
        with pytest.MonkeyPatch.context() as patch:
            calls = failing_renames(patch, number)
            with pytest.raises(DestinationError, match="busy") as caught:
                put_tree(mounted, NEW)
        assert len(calls) == 2 * number - 1
        assert_clear(caught.value)
        assert files_of(mounted) == before
        assert not any(name.startswith(".") for name in os.listdir(mounted))
    # Still ours.
    put_tree(mounted, NEW)
    assert files_of(mounted) == NEW


def test_a_move_that_can_neither_end_nor_be_undone_is_finished_by_the_next(mounted: Path) -> None:
    put_tree(mounted, OLD)
    with pytest.MonkeyPatch.context() as patch:
        failing_renames(patch, 4, 5)
        with pytest.raises(DestinationError, match="busy"):
            put_tree(mounted, NEW)
    (staging,) = (name for name in os.listdir(mounted) if name.startswith("."))
    assert "moving" in os.listdir(mounted / staging)
    with pytest.raises(GiveUpError):
        give_up(mounted)
    assert files_of(mounted) == NEW
    put_tree(mounted, OLD)
    assert files_of(mounted) == OLD


def half_moved(mounted: Path, record: str) -> Path:
    """Leave what a download leaves that is killed while entries move; return its folder."""
    staging = mounted / ".storage.0123456789abcdef.partial"
    write_tree(staging, {"content/new": b"new", "old/gone": b"gone", "lock": b""})
    (staging / "moving").write_text(record)
    (mounted / "done").write_bytes(b"done")
    (mounted / "still").write_bytes(b"still")
    return staging


def test_a_half_done_move_is_finished_first(mounted: Path) -> None:
    half_moved(mounted, json.dumps({"old": ["gone", "still"], "new": ["new", "done"]}))
    with pytest.raises(GiveUpError):
        give_up(mounted)
    assert files_of(mounted) == {"new": b"new", "done": b"done"}
    put_tree(mounted, NEW)
    assert files_of(mounted) == NEW


def test_what_somebody_put_there_after_the_kill_is_not_taken_for_ours(mounted: Path) -> None:
    half_moved(mounted, json.dumps({"old": ["gone", "still"], "new": ["new", "done"]}))
    (mounted / "theirs").write_bytes(b"precious")
    (mounted / "gone").write_bytes(b"precious too")
    with pytest.raises(ObjectExistsError):
        put_tree(mounted, NEW)
    expected = {"theirs": b"precious", "gone": b"precious too", "new": b"new", "done": b"done"}
    assert files_of(mounted) == expected


@pytest.mark.parametrize(
    "record",
    [
        "",
        '{"old": ["sti',
        json.dumps({"old": ["../../x"], "new": []}),
        json.dumps({"old": [], "new": [".."]}),
    ],
)
def test_a_record_that_cannot_be_ours_moves_nothing(mounted: Path, record: str) -> None:
    half_moved(mounted, record)
    with pytest.raises(ObjectExistsError):
        put_tree(mounted, NEW)
    assert files_of(mounted) == {"done": b"done", "still": b"still"}


def test_moves_of_two_downloads_do_not_mix(mounted: Path) -> None:
    """While one moves its entries, another one waits, even to look at what is there."""
    put_tree(mounted, OLD)
    moving, go_on = threading.Event(), threading.Event()
    real = trees.mark

    def slow(folder: str, ignored: re.Pattern[str]) -> None:
        moving.set()
        assert go_on.wait(30)
        real(folder, ignored)

    errors: list[BaseException] = []

    def other() -> None:
        try:
            put_tree(mounted, OLD)
        except BaseException as exc:  # noqa: BLE001 -- told to the test
            errors.append(exc)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "mark", slow)
        first = threading.Thread(target=put_tree, args=(mounted, NEW))
        first.start()
        assert moving.wait(30)
        patch.setattr(trees, "mark", real)
        second = threading.Thread(target=other)
        second.start()
        # Without the lock it would find a tree without its mark, and refuse.
        second.join(0.3)
        assert second.is_alive()
        go_on.set()
        first.join(30)
        second.join(30)
    assert errors == []
    assert files_of(mounted) == OLD
    assert not any(name.startswith(".") for name in os.listdir(mounted))


def test_a_lock_that_is_never_freed_is_an_error(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        trees.lock_folder(first, "here", 1.0)
        with pytest.raises(DestinationError, match="another download") as caught:
            trees.lock_folder(second, "here", 0.05)
        assert_clear(caught.value)
    finally:
        os.close(first)
        trees.lock_folder(second, "here", 30.0)
        os.close(second)
