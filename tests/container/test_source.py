"""Files that are held open: found out when they change, unnamed until they are published."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.container.source import FileSource, as_source
from storage.container.stored import (
    LocalSource,
    copy_bytes,
    map_file,
    publish,
    unnamed_file,
)
from storage.errors import (
    AuthenticationError,
    DestinationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    StorageError,
)

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the user."""
    path = tmp_path / "model.zip"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def source(path: Path) -> Iterator[LocalSource]:
    """The same, opened."""
    opened = LocalSource.open(path)
    yield opened
    opened.close()


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


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 10), (255_990, 100), (256_000, 1), (10**18, 5), (7, 0), (0, 10**18)]
)
def test_reads_give_the_bytes_that_are_there(source: LocalSource, offset: int, length: int) -> None:
    assert source.read_at(offset, length) == CONTENT[offset : offset + length]
    other = FileSource(io.BytesIO(CONTENT))
    assert other.read_at(offset, length) == CONTENT[offset : offset + length]


def test_a_stream_is_a_file_of_a_part(source: LocalSource) -> None:
    with source.stream(100, 50) as stream:
        assert stream.read(10) == CONTENT[100:110]
        assert stream.seek(-5, os.SEEK_END) == 45
        assert stream.read() == CONTENT[145:150]
        assert stream.read(1) == b""
        with pytest.raises(OSError, match="Invalid"):
            stream.seek(-51, os.SEEK_END)


def test_streams_and_duplicates_outlive_their_source(path: Path) -> None:
    source = LocalSource.open(path)
    stream, other = source.stream(0, source.size), source.duplicate()
    source.close()
    source.close()
    with pytest.raises(InvalidInput, match="closed"):
        source.read_at(0, 1)
    # Its descriptor belongs to another file now.
    with open(os.devnull, "rb"), stream:
        assert stream.read() == CONTENT
    assert other.read_at(1, 2) == CONTENT[1:3]
    other.close()


def test_a_process_without_descriptors_is_told_so(source: LocalSource) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        with pytest.raises(StorageError, match="Too many open files"):
            source.stream(0, 10)
        with pytest.raises(StorageError, match="Too many open files"):
            LocalSource.open(__file__)
        assert source.read_at(0, 10) == CONTENT[:10]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_forgotten_is_closed(path: Path) -> None:
    source = LocalSource.open(path)
    assert times_open(path) == 1
    del source
    assert times_open(path) == 0


def times_open(path: Path) -> int:
    """Return how many descriptors of this process are of a file, whatever else it has open."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    return found


@pytest.mark.parametrize("change", ["written", "longer", "shorter", "empty"])
def test_a_file_that_is_written_to_is_found_out(path: Path, change: str) -> None:
    source = LocalSource.open(path)
    stream = source.stream(0, source.size)
    assert source.read_at(0, 1) == CONTENT[:1]
    with open(path, "r+b") as file:
        if change == "written":
            file.write(b"x")
        else:
            file.truncate({"longer": 300_000, "shorter": 1000, "empty": 0}[change])
    os.utime(path, ns=(1, 1))
    for read in (
        lambda: source.read_at(0, 1),
        lambda: stream.read(1),
        source.fileno,
        source.duplicate,
        lambda: copy_bytes(source, 0, 1, io.BytesIO()),
    ):
        with pytest.raises(IntegrityError, match="was written to since it was opened"):
            read()
    stream.close()
    source.close()


def test_a_file_that_is_replaced_stays_as_it_was(path: Path, source: LocalSource) -> None:
    other = path.with_name("other")
    other.write_bytes(b"new")
    os.replace(other, path)
    assert source.read_at(0, source.size) == CONTENT


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        with pytest.raises(InvalidInput, match="folder or a device"):
            LocalSource.open(tmp_path / name)
    for missing in (tmp_path / "missing", tmp_path / "missing" / "below"):
        with pytest.raises(ModelMissingError, match="there is no file"):
            LocalSource.open(missing)
    with pytest.raises(InvalidInput, match="no path"):
        LocalSource.open("a\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_somebody_else_is_refused(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(AuthenticationError):
        LocalSource.open(path)


def test_what_cannot_seek_is_no_source() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with open(reading, "rb") as pipe, pytest.raises(InvalidInput, match="cannot seek"):
        as_source(pipe)


# -- mapping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(0, 5), (4097, 10_000), (255_999, 1), (3, 0)])
def test_mapped_bytes_are_those_of_the_file_and_private(
    path: Path, source: LocalSource, offset: int, length: int
) -> None:
    memory = map_file(source, offset, length)
    assert memory is not None
    source.close()
    assert bytes(memory) == CONTENT[offset : offset + length]
    memory[:] = bytes(length)
    assert path.read_bytes() == CONTENT


def test_what_is_no_local_file_is_not_mapped() -> None:
    assert map_file(FileSource(io.BytesIO(CONTENT)), 0, 1) is None


# -- copying -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "buffered", "memory"])
def test_a_part_is_copied_to_where_the_file_stands(
    source: LocalSource, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "copy"
    target = {
        "raw": lambda: io.FileIO(path, "w+"),
        "buffered": lambda: path.open("w+b"),
        "memory": io.BytesIO,
    }[kind]()
    with target:
        target.write(b"before")
        copy_bytes(source, 1000, 200_000, target)  # type: ignore[arg-type]
        target.write(b"after")
        target.seek(0)
        assert target.read() == b"before" + CONTENT[1000:201_000] + b"after"


def test_a_file_that_changes_what_is_written_to_it_gets_it_all(
    source: LocalSource, tmp_path: Path
) -> None:
    with gzip.open(tmp_path / "copy.gz", "wb") as file:
        copy_bytes(source, 0, source.size, file)  # type: ignore[arg-type]
    with gzip.open(tmp_path / "copy.gz") as file:
        assert file.read() == CONTENT


def test_a_source_that_ends_too_early_is_found_out(source: LocalSource) -> None:
    with pytest.raises(IntegrityError, match="ends 5 bytes before"):
        copy_bytes(source, 0, source.size + 5, io.BytesIO())


# -- publishing --------------------------------------------------------------------------------


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def written(folder: Path) -> contextlib.closing[LocalSource]:
    file = unnamed_file(folder)
    file.write(CONTENT)
    return contextlib.closing(LocalSource.adopt(file, "the file"))


def test_an_unnamed_file_has_no_name_until_it_is_published(tmp_path: Path) -> None:
    with written(tmp_path) as file:
        assert os.listdir(tmp_path) == []
        inode = os.fstat(file.fileno()).st_ino
        publish(file, tmp_path / "model.zip")
        assert os.listdir(tmp_path) == ["model.zip"]
    found = os.stat(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_bytes() == CONTENT
    # Not copied, where the system can do without.
    assert found.st_ino == inode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_published_file_has_the_mode_of_any_new_one(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with written(tmp_path) as file:
            publish(file, tmp_path / "linked")
            publish(file, tmp_path / "copied")
    finally:
        os.umask(before)
    for name in ("linked", "copied"):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o666 & ~umask


def test_a_file_is_published_over_another_one_and_over_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "model.zip", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to("model.zip")
    with open(target, "rb") as reader, written(tmp_path) as file:
        publish(file, target)
        assert reader.read() == b"old"
        assert target.read_bytes() == CONTENT
        publish(file, link)
    assert not link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "model.zip"]


def test_files_that_are_published_twice_are_two(tmp_path: Path) -> None:
    with written(tmp_path) as file:
        publish(file, tmp_path / "one")
        publish(file, tmp_path / "two")
    (tmp_path / "one").write_bytes(b"changed")
    assert (tmp_path / "two").read_bytes() == CONTENT


def test_a_file_is_published_over_itself(path: Path) -> None:
    with contextlib.closing(LocalSource.open(path)) as file:
        assert publish(file, path) is None
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [path.name]


def test_a_file_is_published_on_another_file_system(tmp_path: Path, elsewhere: Path) -> None:
    with written(elsewhere) as file:
        publish(file, tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["model.zip"]
    assert os.listdir(elsewhere) == []


@pytest.fixture
def only_named_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system whose files all have names, such as NFS."""
    plain = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, **more: int | None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return plain(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("only_named_files")
def test_where_all_files_have_names_they_are_published_by_another_one(tmp_path: Path) -> None:
    target = tmp_path / "model.zip"
    target.write_bytes(b"old")
    with written(tmp_path) as file:
        assert os.listdir(tmp_path) == ["model.zip"]
        saved = publish(file, target)
        assert saved is not None
        with contextlib.closing(saved):
            # One copy, and no second one that is kept open.
            assert os.path.samestat(os.fstat(saved.fileno()), target.stat())
            assert saved.name == str(target)
        with pytest.raises(InvalidInput, match="is a folder"):
            publish(file, tmp_path)
    assert target.read_bytes() == CONTENT
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~current_umask()
    assert os.listdir(tmp_path) == ["model.zip"]


@pytest.mark.usefixtures("only_named_files")
def test_a_copy_that_fails_under_another_name_leaves_nothing(tmp_path: Path) -> None:
    class Short(FileSource):
        size = 100

    with written(tmp_path) as file, open(file.fileno(), "rb", closefd=False) as opened:
        cut = Short(opened)
        cut.size += 5
        with pytest.raises(IntegrityError, match="ends 5 bytes before"):
            publish(cut, tmp_path / "model.zip")
    assert os.listdir(tmp_path) == []


def test_a_file_whose_name_was_removed_gets_another_one(tmp_path: Path) -> None:
    with written(tmp_path) as file:
        assert publish(file, tmp_path / "one") is None
        os.unlink(tmp_path / "one")
        saved = publish(file, tmp_path / "two")
        assert saved is not None
        with contextlib.closing(saved):
            assert os.path.samestat(os.fstat(saved.fileno()), (tmp_path / "two").stat())
    assert (tmp_path / "two").read_bytes() == CONTENT


FULL = """
import errno, os, subprocess, sys
from storage.container.stored import LocalSource, publish, unnamed_file
from storage.errors import InsufficientSpaceError

folder, home = sys.argv[1:]
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
    sys.exit(77)
file = unnamed_file(home)
file.write(bytes(2 << 20))
source = LocalSource.adopt(file, "the file")
plain = os.open
for named in (False, True):
    if named:
        def refuse(path, flags, mode=0o777, **more):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no")
            return plain(path, flags, mode, **more)
        os.open = refuse
    try:
        publish(source, folder + "/model.zip")
    except InsufficientSpaceError as exc:
        assert "model.zip" in str(exc) and "full" in str(exc), exc
    else:
        sys.exit("published")
    assert os.listdir(folder) == []
    room = os.statvfs(folder)
    assert room.f_bfree == room.f_blocks, "not all of it was given back"
"""


def test_a_full_file_system_is_reported_and_left_as_it_was(tmp_path: Path) -> None:
    """A real one of 1 MiB, in a name space of its own."""
    (tmp_path / "full").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", FULL, tmp_path / "full", tmp_path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 0, done.stderr


def test_a_name_of_255_bytes_is_published(tmp_path: Path) -> None:
    name = "ü" * 127 + "x"
    (tmp_path / name).write_bytes(b"old")
    with written(tmp_path) as file:
        publish(file, tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_place_that_cannot_be_written_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with written(tmp_path) as file:
        with pytest.raises(InvalidInput, match="is a folder"):
            publish(file, tmp_path / "folder")
        for name in ("missing/model.zip", "/proc/model.zip"):
            with pytest.raises(DestinationError) as caught:
                publish(file, tmp_path / name)
            # Not what a file was called that was tried there.
            assert str(caught.value).startswith(f"{(tmp_path / name).parent} cannot be written")
        with pytest.raises(InvalidInput, match="no path"):
            publish(file, f"{tmp_path}/a\0b")
        with pytest.raises(InvalidInput, match="too long"):
            publish(file, tmp_path / ("x" * 300))
    assert os.listdir(tmp_path) == ["folder"]


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time; from storage.container.stored import unnamed_file\n"
        "file = unnamed_file(sys.argv[1]); file.write(bytes(10_000_000)); file.flush()\n"
        "print('written', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == []
