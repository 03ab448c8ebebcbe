"""Where a file or a tree appears: whole or not at all, and nothing of others is touched."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

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
    put_file,
    put_tree,
)
from tests.transfer.support import assert_clear, everything_in, files_of, write_tree

# -- what appears --------------------------------------------------------------------------


def test_a_tree_appears_with_all_that_is_in_it_and_nothing_beside(dest: Path) -> None:
    assert put_tree(dest, NEW) == str(dest)
    assert files_of(dest) == NEW
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_a_file_appears_and_nothing_beside(dest: Path) -> None:
    assert put_file(dest, b"data") == str(dest)
    assert dest.read_bytes() == b"data"
    assert everything_in(dest.parent) == ["model"]


@pytest.mark.parametrize("tree", [True, False])
def test_nothing_is_seen_before_it_is_published(dest: Path, tree: bool) -> None:
    with Destination(str(dest), tree=tree) as destination:
        if tree:
            write_tree(Path(destination.content), NEW)
        else:
            Path(destination.content).write_bytes(b"data")
        Path(destination.scratch("x")).write_bytes(b"y")
        assert not dest.exists()
        destination.publish()
        assert dest.exists()
    assert not any(name.startswith(".") for name in everything_in(dest.parent))


def test_an_empty_tree_is_a_folder(dest: Path) -> None:
    put_tree(dest, {})
    assert everything_in(dest.parent) == ["model"]
    put_tree(dest, NEW)
    assert files_of(dest) == NEW


def test_what_is_published_has_usual_permissions(dest: Path) -> None:
    put_tree(dest, NEW)
    usual = dest.parent / "usual"
    usual.mkdir()
    assert dest.stat().st_mode == usual.stat().st_mode


def test_folders_above_are_made(dest: Path) -> None:
    put_tree(dest / "x" / "y" / "z", {"a": b"1"})
    assert everything_in(dest.parent) == [
        *("model", "model/x", "model/x/y", "model/x/y/z", "model/x/y/z/a"),
    ]


@pytest.mark.parametrize("tree", [True, False])
def test_a_failure_leaves_nothing_not_even_folders_above(dest: Path, tree: bool) -> None:
    (dest / "kept").mkdir(parents=True)
    target = dest / "kept" / "made" / "too" / "model"
    with pytest.raises(GiveUpError):
        give_up(target, tree)
    assert everything_in(dest.parent) == ["model", "model/kept"]


def test_folders_above_stay_if_somebody_else_uses_them_meanwhile(dest: Path) -> None:
    with Destination(str(dest / "x" / "model"), tree=True):
        (dest / "theirs").write_bytes(b"")
    assert everything_in(dest.parent) == ["model", "model/theirs"]


def test_a_relative_path_is_of_the_folder_at_the_beginning(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dest.parent)
    with Destination("model", tree=False) as destination:
        Path(destination.content).write_bytes(b"x")
        monkeypatch.chdir("/")
        assert destination.publish() == str(dest)


# -- what may be replaced ------------------------------------------------------------------


def test_a_tree_of_ours_is_replaced_as_a_whole(dest: Path) -> None:
    put_tree(dest, OLD)
    put_tree(dest, NEW)
    assert files_of(dest) == NEW
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_an_empty_folder_is_replaced(dest: Path) -> None:
    dest.mkdir()
    put_tree(dest, NEW)
    assert files_of(dest) == NEW


def test_a_failure_leaves_the_old_tree_and_it_is_still_ours(dest: Path) -> None:
    put_tree(dest, OLD)
    with pytest.raises(GiveUpError):
        give_up(dest)
    assert files_of(dest) == OLD
    put_tree(dest, NEW)
    assert files_of(dest) == NEW


def add(dest: Path) -> None:
    (dest / "sub" / "mine").write_bytes(b"")


def add_folder(dest: Path) -> None:
    (dest / "mine").mkdir()


def drop(dest: Path) -> None:
    (dest / "a.bin").unlink()


def resize(dest: Path) -> None:
    (dest / "a.bin").write_bytes(b"longer than before")


def rename(dest: Path) -> None:
    (dest / "a.bin").rename(dest / "b.bin")


def unmark(dest: Path) -> None:
    os.removexattr(dest, "user.modelstorage.tree")


@pytest.mark.parametrize("change", [add, add_folder, drop, resize, rename, unmark])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_tree_that_somebody_changed_is_replaced_only_when_told_to(
    dest: Path, mounted: Path, change: Callable[[Path], None], where: str
) -> None:
    dest = dest if where == "beside" else mounted
    put_tree(dest, OLD)
    change(dest)
    changed = everything_in(dest)
    with pytest.raises(ObjectExistsError, match="overwrite=True") as caught:
        put_tree(dest, NEW)
    assert_clear(caught.value)
    assert everything_in(dest) == changed
    put_tree(dest, NEW, overwrite=True)
    assert files_of(dest) == NEW
    put_tree(dest, OLD)
    assert files_of(dest) == OLD


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_files_of_others_are_refused_before_anything_is_made(
    dest: Path, mounted: Path, where: str
) -> None:
    dest = dest if where == "beside" else mounted
    dest.mkdir(exist_ok=True)
    (dest / "mine").write_bytes(b"precious")
    with (
        pytest.raises(ObjectExistsError),
        Destination(str(dest), tree=True),
    ):
        pytest.fail("entered")
    assert everything_in(dest) == ["mine"]


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_files_that_appear_while_it_downloads_are_not_replaced(
    dest: Path, mounted: Path, where: str
) -> None:
    dest = dest if where == "beside" else mounted
    with Destination(str(dest), tree=True) as destination:
        write_tree(Path(destination.content), NEW)
        dest.mkdir(exist_ok=True)
        (dest / "mine").write_bytes(b"precious")
        with pytest.raises(ObjectExistsError):
            destination.publish()
    assert everything_in(dest) == ["mine"]
    assert [path.name for path in dest.parent.iterdir() if path.name.startswith(".")] == []


def test_files_that_appear_in_the_last_moment_are_not_replaced(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at the destination and the rename."""
    monkeypatch.setattr(trees, "mark", lambda *_: write_tree(dest, {"mine": b"precious"}))
    with pytest.raises(ObjectExistsError):
        put_tree(dest, NEW)
    assert everything_in(dest.parent) == ["model", "model/mine"]


def test_a_tree_of_another_download_that_was_faster_is_replaced(dest: Path) -> None:
    with Destination(str(dest), tree=True) as slow:
        write_tree(Path(slow.content), NEW)
        put_tree(dest, OLD)
        slow.publish()
    assert files_of(dest) == NEW
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_without_extended_attributes_a_tree_is_replaced_only_when_told_to(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    monkeypatch.setattr(os, "getxattr", unsupported)
    put_tree(dest, OLD)
    with pytest.raises(ObjectExistsError):
        put_tree(dest, NEW)
    put_tree(dest, NEW, overwrite=True)
    assert files_of(dest) == NEW


def test_a_file_replaces_a_file(dest: Path) -> None:
    dest.write_bytes(b"old")
    put_file(dest, b"new")
    assert dest.read_bytes() == b"new"


def test_a_file_replaces_a_link_and_not_what_it_points_to(dest: Path) -> None:
    (dest.parent / "target").write_bytes(b"old")
    dest.symlink_to("target")
    put_file(dest, b"new")
    assert not dest.is_symlink()
    assert (dest.read_bytes(), (dest.parent / "target").read_bytes()) == (b"new", b"old")


def test_a_tree_goes_where_a_link_to_a_folder_leads(dest: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    dest.symlink_to(real)
    assert put_tree(dest, NEW) == str(real)
    assert dest.is_symlink()
    assert files_of(real) == NEW
    assert everything_in(tmp_path / "elsewhere") == paths_of(NEW, "real")
    assert os.listdir(dest.parent) == ["model"]


def make_file(path: Path) -> None:
    path.write_bytes(b"mine")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_file(path: Path) -> None:
    (path.parent / "target").write_bytes(b"mine")
    path.symlink_to("target")


@pytest.mark.parametrize("make", [make_file, make_pipe, make_dangling, make_link_to_file])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_tree_does_not_replace_what_is_no_folder(
    dest: Path, make: Callable[[Path], None], overwrite: bool
) -> None:
    make(dest)
    before = sorted(os.listdir(dest.parent))
    with pytest.raises(ObjectExistsError, match="is not a folder") as caught:
        put_tree(dest, NEW, overwrite=overwrite)
    assert_clear(caught.value)
    assert sorted(os.listdir(dest.parent)) == before


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_socket])
def test_a_file_does_not_replace_what_is_no_file(
    dest: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dest.parent)
    make(dest)
    with pytest.raises(ObjectExistsError, match="not a regular file") as caught:
        put_file(dest, b"x", overwrite=True)
    assert_clear(caught.value)
    assert os.listdir(dest.parent) == ["model"]


@pytest.mark.parametrize("tree", [True, False])
def test_a_path_below_a_file_is_refused(dest: Path, tree: bool) -> None:
    dest.write_bytes(b"mine")
    for path in (dest / "x", dest / "x" / "y"):
        with pytest.raises(DestinationError) as caught, Destination(str(path), tree=tree):
            pytest.fail("entered")
        assert_clear(caught.value)
    assert everything_in(dest.parent) == ["model"]


# -- without an atomic swap ----------------------------------------------------------------


def test_without_exchange_the_old_tree_steps_aside(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "exchange", lambda left, right: False)
    put_tree(dest, OLD)
    put_tree(dest, NEW)
    assert files_of(dest) == NEW
    assert everything_in(dest.parent) == paths_of(NEW, "model")


def test_without_exchange_the_old_tree_comes_back_if_the_new_one_cannot_take_its_place(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "exchange", lambda left, right: False)
    put_tree(dest, OLD)
    real, calls = os.rename, []

    def failing(source: str, target: str) -> None:
        calls.append(target)
        if target == str(dest) and len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(DestinationError):
        put_tree(dest, NEW)
    assert len(calls) == 4
    assert files_of(dest) == OLD
    assert everything_in(dest.parent) == paths_of(OLD, "model")


def test_this_system_swaps_folders_at_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", {"x": b"1"})
    write_tree(tmp_path / "b", {"y": b"2"})
    assert files.exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert files_of(tmp_path) == {"a/y": b"2", "b/x": b"1"}
