"""What killed downloads left is removed; what living ones need is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

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
from tests.transfer.support import everything_in, files_of, write_tree


@pytest.mark.parametrize("tree", [True, False])
def test_what_a_dead_download_left_is_removed(dest: Path, tree: bool) -> None:
    leftover(dest.parent / ".model.0123456789abcdef.partial")
    # Killed before it had its lock.
    (dest.parent / ".model.fedcba9876543210.partial").mkdir()
    put(dest, tree)
    assert everything_in(dest.parent) == (paths_of(NEW, "model") if tree else ["model"])


def test_what_a_dead_download_left_is_removed_even_if_this_one_fails(dest: Path) -> None:
    leftover(dest.parent / ".model.0123456789abcdef.partial")
    with pytest.raises(GiveUpError):
        give_up(dest)
    assert everything_in(dest.parent) == []


def test_what_a_living_download_needs_is_kept(dest: Path) -> None:
    with Destination(str(dest), tree=True) as slow:
        write_tree(Path(slow.content), NEW)
        for _ in range(2):
            put_tree(dest, OLD)
            assert files_of(Path(slow.content)) == NEW
        slow.publish()
    assert files_of(dest) == NEW
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_a_lock_held_by_another_process_keeps_its_folder(dest: Path) -> None:
    staging = leftover(dest.parent / ".model.0123456789abcdef.partial")
    with FileLock(staging / "lock"):
        put_file(dest, b"x")
        assert (staging / "content" / "half").exists()
    put_file(dest, b"x")
    assert everything_in(dest.parent) == ["model"]


@pytest.mark.parametrize(
    "name",
    [
        ".other.0123456789abcdef.partial",
        ".model.bin.0123456789abcdef.partial",
        ".model.0123456789abcde.partial",
        ".model.0123456789abcdef.partial.bak",
        ".model.0123456789ABCDEF.partial",
        "model.0123456789abcdef.partial",
        ".storage.0123456789abcdef.partial",
        ".modelX0123456789abcdef.partial",
    ],
)
def test_what_only_looks_similar_is_kept(dest: Path, name: str) -> None:
    leftover(dest.parent / name)
    put_file(dest, b"x")
    assert (dest.parent / name / "content" / "half").exists()


def test_a_leftover_that_this_user_may_not_touch_does_not_stop_a_download(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = leftover(dest.parent / ".model.0123456789abcdef.partial")
    real = FileLock.acquire

    def denied(self: FileLock, *args: Any, **kwargs: Any) -> Any:
        if str(theirs) in self.lock_file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.lock_file)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", denied)
    put_file(dest, b"x")
    assert sorted(os.listdir(dest.parent)) == [theirs.name, "model"]


def test_a_leftover_that_vanishes_meanwhile_is_not_made_again(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.listdir

    def and_a_ghost(path: str = ".") -> list[str]:
        ghosts = [".model.0123456789abcdef.partial"] if path == str(dest.parent) else []
        return real(path) + ghosts

    made: list[str] = []
    real_mkdir = os.mkdir

    def noted(path: str, mode: int = 0o777) -> None:
        made.append(os.fspath(path))
        real_mkdir(path, mode)

    monkeypatch.setattr(os, "listdir", and_a_ghost)
    monkeypatch.setattr(os, "mkdir", noted)
    put_file(dest, b"x")
    monkeypatch.undo()
    assert made
    assert not any("0123456789abcdef" in path for path in made)
    assert os.listdir(dest.parent) == ["model"]


@pytest.mark.parametrize(
    "error",
    [NotImplementedError(), OSError(errno.ENOLCK, "no locks"), OSError(errno.ENOSYS, "none")],
    ids=["NotImplementedError", "ENOLCK", "ENOSYS"],
)
def test_a_file_system_without_locks_is_good_enough(
    dest: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    staging = leftover(dest.parent / ".model.0123456789abcdef.partial")
    put_tree(dest, NEW)
    put_tree(dest, OLD)
    assert files_of(dest) == OLD
    # Nobody can tell whether its download lives.
    assert sorted(os.listdir(dest.parent)) == [staging.name, "model"]


def test_somebody_who_takes_a_new_folder_for_a_leftover_gets_it(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making the folder and locking it another download may come and remove it."""
    real = os.mkdir
    thieves: list[tuple[str, FileLock]] = []

    def slow(path: str, mode: int = 0o777) -> None:
        real(path, mode)
        if path.endswith(".partial") and not thieves:
            thief = FileLock(os.path.join(path, "lock"))
            thief.acquire(timeout=0)
            thieves.append((path, thief))

    monkeypatch.setattr(os, "mkdir", slow)
    with Destination(str(dest), tree=False) as destination:
        stolen, thief = thieves[0]
        assert os.path.dirname(destination.content) != stolen
        thief.release()
        Path(destination.content).write_bytes(b"x")
        destination.publish()
    put_file(dest, b"x")
    assert os.listdir(dest.parent) == ["model"]


@pytest.mark.parametrize("error", [Timeout("x"), FileNotFoundError(), FileExistsError()])
def test_a_new_folder_that_somebody_removes_before_it_is_locked_is_made_again(
    dest: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, errors = FileLock.acquire, [error]

    def lost(self: FileLock, *args: Any, **kwargs: Any) -> Any:
        if errors:
            os.rmdir(os.path.dirname(self.lock_file))
            raise errors.pop()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", lost)
    put_file(dest, b"x")
    assert everything_in(dest.parent) == ["model"]


@pytest.mark.parametrize("step", range(1, 12))
def test_an_interrupt_on_the_way_in_leaves_nothing(
    dest: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    count = 0

    def interrupting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = function(*args, **kwargs)
            count += 1
            if count == step:
                raise KeyboardInterrupt
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (os, "mkdir"),
            (os, "lstat"),
            (os.path, "exists"),
            (FileLock, "acquire"),
            (os, "access"),
        ):
            patch.setattr(owner, name, interrupting(getattr(owner, name)))
        try:
            with Destination(str(dest / "deeper" / "model"), tree=True):
                pass
        except KeyboardInterrupt:
            assert count >= step
        else:
            assert count < step
    assert everything_in(dest.parent) == []
