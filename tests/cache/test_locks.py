"""Locks that save work, and never stand in the way of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import cancellation
from storage.cache import locks as module
from storage.cache.locks import SourceLock, gc_lock, remove_stale
from tests.cache.processes import (
    as_nobody,
    break_locks,
    forked,
    later,
    open_folder,
    python,
    read_only_disk,
)

HOLD = """
    import sys
    from storage.cache.locks import SourceLock

    with SourceLock(sys.argv[1], timeout=60) as lock:
        print(lock.acquired, flush=True)
        input()
    print("released", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "locks" / "source")


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.on_sleep: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    # By which it waits.
    monkeypatch.setattr(cancellation, "time", found)
    return found


def can_have(path: str) -> bool:
    with SourceLock(path, timeout=0) as lock:
        return lock.acquired


# -- one at a time -------------------------------------------------------------------------


def test_one_has_it_and_then_the_next(path: str) -> None:
    lock = SourceLock(path, timeout=0)
    assert not lock.acquired
    for _ in range(2):
        with lock as entered:
            assert entered is lock
            assert lock.acquired
            assert not can_have(path)
        assert not lock.acquired
        assert os.path.exists(path)
    assert can_have(path)


def test_it_is_given_back_whatever_happened(path: str) -> None:
    def fail() -> None:
        with SourceLock(path, timeout=0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert can_have(path)


def test_a_thread_waits_for_another_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()
    sleep = time.sleep

    def told(seconds: float) -> None:
        waiting.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", told)
    order = []

    def wait() -> None:
        with SourceLock(path, timeout=60) as lock:
            order.append(("second", lock.acquired))

    with SourceLock(path, timeout=0):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(60)
        order.append(("first", True))
    thread.join(60)
    assert order == [("first", True), ("second", True)]


def test_a_killed_process_gives_it_back(path: str) -> None:
    with python(HOLD, path) as process:
        assert process.line() == "True"
        assert not can_have(path)
        process.kill()
        with SourceLock(path, timeout=60) as lock:
            assert lock.acquired


def test_another_thread_may_give_it_back(path: str) -> None:
    lock = SourceLock(path, timeout=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        thread = threading.Thread(target=stack.pop_all().close)
        thread.start()
        thread.join(60)
    assert can_have(path)


def test_of_ten_processes_one_does_the_work(path: str, tmp_path: Path) -> None:
    code = """
        import os, sys
        from storage.cache.locks import SourceLock

        path, done, log = sys.argv[1:]
        print("ready", flush=True)
        input()
        with SourceLock(path, timeout=60) as lock:
            assert lock.acquired
            if not os.path.exists(done):
                with open(log, "a") as file:
                    file.write(f"{os.getpid()}\\n")
                open(done, "w").close()
        print("over", flush=True)
    """
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(python(code, path, tmp_path / "done", tmp_path / "log"))
            for _ in range(10)
        ]
        for process in processes:
            assert process.line() == "ready"
        for process in processes:
            process.go_on()
        assert [process.line() for process in processes] == ["over"] * 10
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_forked_child_neither_has_it_nor_gives_it_back(path: str) -> None:
    pid = 0
    with SourceLock(path, timeout=0):
        assert forked(lambda: not can_have(path))
        pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            assert not can_have(path)
    if not pid:
        os._exit(0)
    assert can_have(path)


def test_a_child_that_lives_on_does_not_keep_it(path: str) -> None:
    end, wait = os.pipe()
    with SourceLock(path, timeout=0):
        pid = os.fork()
        if pid == 0:
            os.close(wait)
            os.read(end, 1)
            os._exit(0)
    assert can_have(path)
    os.close(wait)
    os.waitpid(pid, 0)
    os.close(end)


# -- patience ------------------------------------------------------------------------------


def test_waiting_ends_in_time(path: str, clock: Clock) -> None:
    with SourceLock(path, timeout=0):
        began = clock.now
        with SourceLock(path, timeout=30) as second:
            assert not second.acquired
            second.beat()
        assert clock.now - began == pytest.approx(30)
        assert not can_have(path)


def test_a_holder_without_a_sign_of_life_is_not_waited_for(path: str, clock: Clock) -> None:
    with SourceLock(path, timeout=0):
        began = clock.now
        with SourceLock(path, timeout=float("inf"), stall=60) as second:
            assert not second.acquired
        assert clock.now - began == pytest.approx(60)


def test_a_holder_that_gives_signs_of_life_is_waited_for(path: str, clock: Clock) -> None:
    with SourceLock(path, timeout=0) as first:
        clock.on_sleep = first.beat
        began = clock.now
        with SourceLock(path, timeout=1000, stall=5) as second:
            assert not second.acquired
        assert clock.now - began == pytest.approx(1000)


@pytest.mark.parametrize("shift", [-1e9, 1e6], ids=["past", "future"])
def test_the_clock_of_the_file_system_may_be_wrong(
    path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    ticks = iter(range(10**6))
    utime = os.utime

    def wrong(path: str) -> None:
        utime(path, (shift + 2e9 - next(ticks),) * 2)

    monkeypatch.setattr(os, "utime", wrong)
    with SourceLock(path, timeout=0) as first:
        clock.on_sleep = first.beat
        began = clock.now
        with SourceLock(path, timeout=100, stall=5):
            assert clock.now - began == pytest.approx(100)
        clock.on_sleep = lambda: None
        with SourceLock(path, timeout=100, stall=5):
            assert clock.now - began == pytest.approx(105)


def test_signs_of_life_are_cheap(path: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with SourceLock(path, timeout=0) as lock:
        touched = []
        monkeypatch.setattr(os, "utime", lambda path: touched.append(path))
        for _ in range(1000):
            lock.beat()
        assert touched == []
        for _ in range(40):
            clock.now += 0.25
            lock.beat()
        assert touched == [path] * 10
    lock.beat()
    assert len(touched) == 10


def test_only_the_holder_gives_signs_of_life(path: str, clock: Clock) -> None:
    with SourceLock(path, timeout=0), SourceLock(path, timeout=0) as without:
        before = os.stat(path).st_mtime_ns
        os.utime(path, (0, 0))
        clock.now += 10
        without.beat()
        assert os.stat(path).st_mtime_ns == 0 < before


def test_a_lost_file_does_not_stop_the_holder(path: str, clock: Clock) -> None:
    with SourceLock(path, timeout=0) as lock:
        os.unlink(path)
        clock.now += 10
        lock.beat()
        assert can_have(path)
    assert can_have(path)


# -- where locks do not work ---------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO],
    ids=lambda code: errno.errorcode[code],
)
def test_without_locks_the_work_goes_on(
    path: str, monkeypatch: pytest.MonkeyPatch, clock: Clock, code: int
) -> None:
    break_locks(monkeypatch, code)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with SourceLock(path, timeout=60) as one, SourceLock(path, timeout=60) as other:
                assert not one.acquired
                assert not other.acquired
                one.beat()
        assert remove_stale(os.path.dirname(path), later(1000)) == 0
    assert clock.now == 1000


def test_a_lock_that_does_nothing_stops_nobody(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_locks(monkeypatch, None)
    with SourceLock(path, timeout=60) as one, SourceLock(path, timeout=60) as other:
        assert one.acquired
        assert other.acquired
    assert remove_stale(os.path.dirname(path), later(1000)) == 1


def test_a_cache_that_cannot_be_written_stops_nobody() -> None:
    def check(root: Path) -> bool:
        for path in (root / "locks" / "new", root / "made" / "new", root / "locks" / "old"):
            with SourceLock(str(path), timeout=60) as lock:
                assert not lock.acquired
        with gc_lock(str(root)) as lock:
            assert not lock.acquired
        assert remove_stale(str(root / "locks"), later(1000)) == 0
        return True

    def fill(root: Path) -> None:
        (root / "locks").mkdir()
        (root / "locks" / "old").touch(mode=0o644)

    with read_only_disk(fill) as disk:
        assert check(disk)
    with open_folder() as folder:
        fill(folder)
        assert as_nobody(lambda: check(folder))


def test_a_file_in_the_place_of_the_folder_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "locks").touch()
    with gc_lock(str(tmp_path)) as lock:
        assert not lock.acquired
    assert remove_stale(str(tmp_path / "locks")) == 0


# -- tidying up ----------------------------------------------------------------------------


def test_the_lock_for_tidying_up_is_one_for_each_cache(tmp_path: Path, clock: Clock) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    with gc_lock(one) as first, gc_lock(other) as second:
        assert first.acquired
        assert second.acquired
        with gc_lock(one) as third:
            assert not third.acquired
        assert clock.now == pytest.approx(1010)
    assert os.listdir(os.path.join(one, "locks")) == ["gc"]


def test_locks_that_nobody_uses_are_removed(path: str) -> None:
    folder = os.path.dirname(path)
    assert remove_stale(folder) == 0
    with SourceLock(path, timeout=0):
        pass
    assert remove_stale(folder, later(23)) == 0
    assert os.path.exists(path)
    assert remove_stale(folder, later(25)) == 1
    assert os.listdir(folder) == []
    assert can_have(path)


def test_locks_that_are_held_stay_however_old(path: str) -> None:
    folder = os.path.dirname(path)
    with SourceLock(path, timeout=0):
        os.utime(path, (0, 0))
        assert remove_stale(folder) == 0
        assert not can_have(path)
    with python(HOLD, path) as process:
        assert process.line() == "True"
        os.utime(path, (0, 0))
        assert remove_stale(folder) == 0
        assert os.path.exists(path)
        process.kill()
        assert remove_stale(folder) == 1


def test_a_lock_that_somebody_used_just_now_stays(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SourceLock(path, timeout=0):
        pass
    os.utime(path, (0, 0))
    flock = fcntl.flock

    def after_another_one(descriptor: int, operation: int) -> None:
        os.utime(path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_one)
    assert remove_stale(os.path.dirname(path)) == 0
    assert os.path.exists(path)


def test_only_files_are_removed(path: str) -> None:
    folder = os.path.dirname(path)
    os.makedirs(os.path.join(folder, "sub"))
    os.symlink("nowhere", os.path.join(folder, "link"))
    assert remove_stale(folder, later(1000)) == 0
    assert sorted(os.listdir(folder)) == ["link", "sub"]


def test_whoever_locks_a_file_that_is_being_removed_begins_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SourceLock(path, timeout=0):
        pass
    os.utime(path, (0, 0))
    flock = fcntl.flock
    removed: list[int] = []

    def hand_over(descriptor: int, operation: int) -> None:
        # Between opening the file and locking it.
        if not removed:
            removed.append(0)
            removed[0] = remove_stale(os.path.dirname(path))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", hand_over)
    with SourceLock(path, timeout=60) as lock:
        assert removed == [1]
        assert lock.acquired
        assert not can_have(path)


def test_work_that_tells_nothing_gives_signs_of_life_all_the_same(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEAT", 0.01)
    with SourceLock(path, timeout=0) as lock:
        seen = set()
        with lock.beating():
            deadline = time.monotonic() + 30
            while len(seen) < 3 and time.monotonic() < deadline:
                seen.add(os.stat(path).st_mtime_ns)
            assert "source-lock" in {thread.name for thread in threading.enumerate()}
        assert len(seen) >= 3
        # Threads of other tests may end meanwhile.
        assert "source-lock" not in {thread.name for thread in threading.enumerate()}
