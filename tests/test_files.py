"""Files and folders of this machine: what is copied, linked and refused."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from storage import files
from storage.errors import DestinationError, InsufficientSpaceError, InvalidInput

CONTENT = bytes(range(256)) * 10_000
LINKS = ("hardlink", "symlink")


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    """A file as the cache keeps it: read-only, with a time that means something else."""
    path = tmp_path / "blob"
    path.write_bytes(CONTENT)
    path.chmod(0o444)
    os.utime(path, (400_000_000, 400_000_000))
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system."""
    try:
        folder = tempfile.TemporaryDirectory(dir="/dev/shm")
    except OSError:
        pytest.skip("there is no second file system")
    with folder as path:
        if os.stat(path).st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system")
        yield Path(path)


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, refused)


@pytest.mark.parametrize(
    ("executable", "mask", "mode"),
    [(False, 0o022, 0o644), (False, 0o077, 0o600), (True, 0o022, 0o755), (True, 0o007, 0o770)],
)
def test_a_copy_is_as_any_new_file(
    blob: Path, tmp_path: Path, executable: bool, mask: int, mode: int
) -> None:
    target = tmp_path / "copy"
    before = os.umask(mask)
    try:
        files.materialise(str(blob), str(target), executable=executable)
    finally:
        os.umask(before)
    assert target.read_bytes() == CONTENT
    status = target.stat()
    assert status.st_mode & 0o7777 == mode
    assert status.st_nlink == 1
    assert status.st_mtime > 1_700_000_000
    assert blob.stat().st_mode & 0o7777 == 0o444


def test_what_is_written_into_a_copy_stays_there(blob: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    files.materialise(str(blob), str(target))
    with target.open("r+b") as file:
        file.write(b"changed")
    assert blob.read_bytes() == CONTENT


def test_an_empty_file_is_copied(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    files.materialise(str(tmp_path / "empty"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_copy_reaches_another_file_system(blob: Path, elsewhere: Path) -> None:
    files.materialise(str(blob), str(elsewhere / "copy"))
    assert (elsewhere / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM]
)
def test_what_the_kernel_cannot_copy_is_read_and_written(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse(monkeypatch, "copy_file_range", code)
    files.materialise(str(blob), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize("code", [errno.EXDEV, 0], ids=["error", "nothing"])
def test_what_the_kernel_copies_in_part_is_completed(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, calls = os.copy_file_range, []

    def partial(source: int, target: int, count: int) -> int:
        calls.append(count)
        if len(calls) < 3:
            return real(source, target, 70_001)
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(os, "copy_file_range", partial)
    files.materialise(str(blob), str(tmp_path / "copy"))
    assert len(calls) == 3
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize("exception", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_nothing(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exception: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise exception

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(type(exception)) as caught:
        files.materialise(str(blob), str(tmp_path / "copy"))
    assert caught.value is exception
    assert os.listdir(tmp_path) == ["blob"]


@pytest.mark.parametrize("link", [None, *LINKS])
def test_what_exists_is_never_replaced(
    blob: Path, tmp_path: Path, link: Literal["hardlink", "symlink"] | None
) -> None:
    target = tmp_path / "mine"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        files.materialise(str(blob), str(target), link)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("link", [None, *LINKS])
def test_what_is_missing_leaves_nothing(
    tmp_path: Path, link: Literal["hardlink", "symlink"] | None
) -> None:
    with pytest.raises(FileNotFoundError):
        files.materialise(str(tmp_path / "missing"), str(tmp_path / "copy"), link)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("through_link", [False, True])
def test_a_hard_link_is_the_very_file(blob: Path, tmp_path: Path, through_link: bool) -> None:
    source = blob
    if through_link:
        source = tmp_path / "link"
        source.symlink_to("blob")
    target = tmp_path / "name"
    files.materialise(str(source), str(target), "hardlink")
    assert not target.is_symlink()
    assert target.samefile(blob)
    assert blob.stat().st_nlink == 2


def test_a_symbolic_link_leads_to_the_absolute_path(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    files.materialise("blob", "folder/name", "symlink")
    assert os.readlink("folder/name") == str(blob.resolve())
    assert Path("folder/name").read_bytes() == CONTENT


def test_a_hard_link_to_another_file_system_becomes_a_copy(blob: Path, elsewhere: Path) -> None:
    files.materialise(str(blob), str(elsewhere / "copy"), "hardlink")
    assert (elsewhere / "copy").read_bytes() == CONTENT
    assert blob.stat().st_nlink == 1


@pytest.mark.parametrize(
    "code", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]
)
@pytest.mark.parametrize(("link", "call"), [("hardlink", "link"), ("symlink", "symlink")])
def test_a_link_that_is_impossible_becomes_a_copy(
    blob: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    link: Literal["hardlink", "symlink"],
    call: str,
    code: int,
) -> None:
    refuse(monkeypatch, call, code)
    target = tmp_path / "copy"
    files.materialise(str(blob), str(target), link)
    assert not target.is_symlink()
    assert not target.samefile(blob)
    assert target.read_bytes() == CONTENT


def test_a_link_that_fails_otherwise_is_an_error(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "link", errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        files.materialise(str(blob), str(tmp_path / "copy"), "hardlink")
    assert os.listdir(tmp_path) == ["blob"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, InsufficientSpaceError),
        (errno.EDQUOT, InsufficientSpaceError),
        (errno.ENAMETOOLONG, InvalidInput),
        (errno.EROFS, DestinationError),
    ],
)
def test_an_error_of_the_system_becomes_one_line_of_ours(code: int, error: type[Exception]) -> None:
    with pytest.raises(error) as caught, files.translate_os_errors("/some\nwhere"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is error
    assert "'/some\\nwhere'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tree_that_somebody_made_read_only_is_removed(tmp_path: Path) -> None:
    inner = tmp_path / "tree" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch(0o444)
    inner.chmod(0o555)
    files.remove(str(tmp_path / "tree"))
    files.remove(str(tmp_path / "tree"))
    assert os.listdir(tmp_path) == []
