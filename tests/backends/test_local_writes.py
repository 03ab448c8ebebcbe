"""Local files: changes under a reader, partial files, and locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from storage.backends.base import ByteRange, Payload, bytes_payload
from storage.backends.local import files
from storage.backends.local.backend import LocalBackend
from storage.errors import (
    InvalidInput,
    ObjectChangedError,
    ObjectExistsError,
    TransientError,
    UnsupportedOperation,
)
from tests.backends.directories import files_in, read, without


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def backend(root: Path) -> LocalBackend:
    return LocalBackend(str(root))


def test_file_cut_short_while_it_is_read(backend: LocalBackend, root: Path) -> None:
    (root / "a").write_bytes(b"x" * (3 << 20))
    with backend.read("a") as body:
        pieces = iter(body)
        next(pieces)
        os.truncate(root / "a", (1 << 20) + 5)
        with pytest.raises(ObjectChangedError):
            list(pieces)


@pytest.mark.parametrize("span", [None, ByteRange(5, (2 << 20) + 5)], ids=["whole", "span"])
def test_file_written_over_in_place_while_it_is_read(
    backend: LocalBackend, root: Path, span: ByteRange | None
) -> None:
    (root / "a").write_bytes(b"x" * (3 << 20))
    with backend.read("a", span) as body:
        pieces = iter(body)
        next(pieces)
        with open(root / "a", "r+b") as file:
            file.write(b"y" * (3 << 20))
        with pytest.raises(ObjectChangedError):
            list(pieces)


def test_file_replaced_while_it_is_read_is_read_to_its_end(
    backend: LocalBackend, root: Path
) -> None:
    (root / "a").write_bytes(b"x" * (3 << 20))
    with backend.read("a") as body:
        pieces = iter(body)
        got = len(next(pieces))
        backend.write("a", bytes_payload(b"y" * (3 << 20)))
        got += sum(piece.tobytes().count(b"x") for piece in cast(Iterator[memoryview], pieces))
    assert got == 3 << 20


def test_contents_that_follow_each_other_at_once_have_different_etags(
    backend: LocalBackend,
) -> None:
    # An inode freed by one write is used again by the next but one.
    etags = [backend.write("a", bytes_payload(b"%05d" % number)).etag for number in range(300)]
    assert len(set(etags)) == 300
    assert backend.stat("a").etag == etags[-1]


def test_time_of_a_file_is_finer_than_the_clock_of_the_kernel(
    backend: LocalBackend, root: Path
) -> None:
    # That clock stands still for some milliseconds, so it shows a time before the write.
    for _ in range(20):
        before = time.time_ns()
        backend.write("a", bytes_payload(b"1"))
        assert before <= (root / "a").stat().st_mtime_ns <= time.time_ns()


def test_copy_and_conditional_write_tell_the_etag_that_stat_tells(
    backend: LocalBackend,
) -> None:
    info = backend.write("a", bytes_payload(b"1"), if_absent=True)
    assert backend.stat("a").etag == info.etag
    info = backend.write("a", bytes_payload(b"2"), if_match=info)
    assert backend.stat("a").etag == info.etag


def test_partial_files_are_not_objects(backend: LocalBackend, root: Path) -> None:
    name = ".model.bin.0123456789abcdef.partial"
    (root / name).write_bytes(b"1")
    (root / ".nfs000000000000000000000001").write_bytes(b"1")
    (root / ".model.bin.partial").write_bytes(b"1")
    assert [info.key for info in backend.list()] == [".model.bin.partial"]
    with pytest.raises(InvalidInput, match="partial"):
        backend.write(name, bytes_payload(b"1"))


def _write_and_hang(root: str, name: str, started: Any) -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            started.set()
            threading.Event().wait()
            return b""

        def __enter__(self) -> Endless:
            return self

        def __exit__(self, *exc_info: object) -> None: ...

    LocalBackend(root).write(name, Payload(lambda: cast(BinaryIO, Endless()), None))


@pytest.fixture
def hanging(root: Path) -> Iterator[Any]:
    """A process that is writing ``m/a`` and will never finish."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_write_and_hang, args=(str(root), "m/a", started))
    process.start()
    try:
        assert started.wait(60)
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def test_what_a_killed_writer_left_goes_with_the_next_write(root: Path, hanging: Any) -> None:
    [left] = files_in(root)
    assert files.is_temporary(os.path.basename(left))
    assert list(LocalBackend(str(root)).list()) == []
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.join()
    assert files_in(root) == {left}
    LocalBackend(str(root)).write("m/b", bytes_payload(b"1"))
    assert files_in(root) == {"m/b"}


def test_work_in_progress_of_another_process_is_left_alone(root: Path, hanging: Any) -> None:
    before = files_in(root)
    backend = LocalBackend(str(root))
    backend.write("m/b", bytes_payload(b"1"))
    backend.write("m/a", bytes_payload(b"1"))
    assert files_in(root) == before | {"m/a", "m/b"}


def test_partial_file_of_another_machine_goes_when_it_is_old(
    backend: LocalBackend, root: Path
) -> None:
    foreign = "0" * 8 if not files._machine().startswith("0" * 8) else "1" * 8
    young, old = (root / f".a.{foreign}{digit * 8}.partial" for digit in "ab")
    young.write_bytes(b"1")
    old.write_bytes(b"1")
    os.utime(old, (0, 0))
    backend.write("b", bytes_payload(b"1"))
    assert young.exists()
    assert not old.exists()


def _count_up(root: str, times: int) -> None:
    backend = LocalBackend(root)
    for _ in range(times):
        while True:
            info = backend.stat("counter")
            with backend.read("counter") as body:
                number = int(b"".join([bytes(piece) for piece in body]))
            if body.info.etag != info.etag:
                continue
            try:
                backend.write("counter", bytes_payload(b"%08d" % (number + 1)), if_match=info)
            except (ObjectChangedError, TransientError):
                continue
            break


def test_processes_and_threads_that_compare_and_swap_lose_no_update(
    backend: LocalBackend, root: Path
) -> None:
    # All contents have one size, so that only inode and time tell them apart.
    backend.write("counter", bytes_payload(b"%08d" % 0))
    context = multiprocessing.get_context("spawn")
    workers: list[Any] = [
        context.Process(target=_count_up, args=(str(root), 100)) for _ in range(2)
    ]
    workers += [threading.Thread(target=_count_up, args=(str(root), 100)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert read(backend, "counter") == b"%08d" % 500
    assert files_in(root) == {"counter"}


def test_plain_write_and_delete_wait_for_a_comparing_writer(
    backend: LocalBackend, root: Path
) -> None:
    backend.write("a", bytes_payload(b"1"))
    lock = root / files._temporary_name("a", "0" * 16)
    done: list[str] = []

    def act() -> None:
        backend.write("a", bytes_payload(b"2"))
        backend.delete(["a"])
        done.append("both")

    with files.holding(str(root), "a", required=True):
        assert lock.exists()
        other = threading.Thread(target=act)
        other.start()
        other.join(0.3)
        assert not done
        assert (root / "a").read_bytes() == b"1"
    other.join(60)
    assert done
    assert files_in(root) == set()


def test_lock_that_nobody_gives_back_is_an_error(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.write("a", bytes_payload(b"1"))
    monkeypatch.setattr(files, "_LOCK_TIMEOUT", 0.05)
    with (
        files.holding(str(root), "a", required=True),
        pytest.raises(TransientError, match="held this lock"),
    ):
        backend.write("a", bytes_payload(b"2"))
    assert read(backend, "a") == b"1"
    assert files_in(root) == {"a"}


def test_lock_on_a_file_that_its_holder_removed_is_no_lock(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = root / files._temporary_name("a", "0" * 16)
    flock = fcntl.flock
    others: list[int] = []

    def hand_over(fd: int, operation: int) -> None:
        # Between our opening the file and locking it, one holder ends and another begins.
        if not others:
            lock.unlink()
            others.append(os.open(lock, os.O_CREAT | os.O_RDWR))
            flock(others[0], fcntl.LOCK_EX)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", hand_over)
    monkeypatch.setattr(files, "_LOCK_TIMEOUT", 0.05)
    with (
        pytest.raises(TransientError, match="held this lock"),
        files.holding(str(root), "a", required=True),
    ):
        pytest.fail("two hold the lock")
    os.close(others[0])
    with files.holding(str(root), "a", required=True):
        assert lock.exists()
    assert files_in(root) == set()


def test_lock_file_of_a_killed_process_stops_nobody(backend: LocalBackend, root: Path) -> None:
    backend.write("a", bytes_payload(b"1"))
    (root / files._temporary_name("a", "0" * 16)).write_bytes(b"")
    backend.write("a", bytes_payload(b"2"), if_match=backend.stat("a"))
    assert files_in(root) == {"a"}


def test_file_system_without_hard_links_creates_under_a_lock(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, os, "link", errno.EPERM)
    backend.write("m/a", bytes_payload(b"1"), if_absent=True)
    # Raised only after the first look, when another writer was quicker.
    source = Payload(lambda: _Rival(root / "m/b"), None)
    with pytest.raises(ObjectExistsError):
        backend.write("m/b", source, if_absent=True)
    assert read(backend, "m/b") == b"rival"
    assert files_in(root) == {"m/a", "m/b"}


def test_creator_that_comes_second_is_refused(backend: LocalBackend, root: Path) -> None:
    with pytest.raises(ObjectExistsError):
        backend.write("b", Payload(lambda: _Rival(root / "b"), None), if_absent=True)
    assert read(backend, "b") == b"rival"
    assert files_in(root) == {"b"}


def _Rival(path: Path) -> BinaryIO:  # noqa: N802 -- stands for a stream
    path.write_bytes(b"rival")
    return open(path, "rb")


def test_file_system_without_locks_refuses_to_compare_and_writes_else(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, fcntl, "flock", errno.ENOLCK)
    info = backend.write("a", bytes_payload(b"1"))
    backend.write("a", bytes_payload(b"22"))
    backend.write("b", bytes_payload(b"1"), if_absent=True)
    with pytest.raises(UnsupportedOperation, match="cannot lock"):
        backend.write("a", bytes_payload(b"3"), if_match=backend.stat("a"))
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(b"3"), if_match=info)
    backend.delete(["b"])
    assert files_in(root) == {"a"}


def test_file_system_without_copy_in_the_kernel_copies_all_the_same(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom((2 << 20) + 5)
    (root / "a").write_bytes(data)
    without(monkeypatch, os, "copy_file_range", errno.EXDEV)
    backend.copy("a", "b")
    assert (root / "b").read_bytes() == data
