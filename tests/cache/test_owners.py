"""Who made a file, and whether that process lives."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage import files
from storage.cache import owners
from storage.cache.owners import (
    Owner,
    boot_id,
    current_owner,
    is_alive,
    is_locked,
    may_live,
    new_name,
)
from tests.cache.processes import (
    Process,
    as_nobody,
    break_locks,
    dead_owner,
    foreign_owner,
    forked,
    later,
    open_folder,
    python,
    without_locks,
)

TELL = """
    from storage.cache.owners import current_owner
    print(current_owner().token, flush=True)
    input()
"""


def owner_of(process: Process) -> Owner:
    owner = Owner.parse(process.line())
    assert owner is not None
    return owner


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A system without ``/proc``."""
    with monkeypatch.context() as patch:
        patch.setattr(owners, "_PROC", str(tmp_path / "absent"))
        patch.setattr(files, "_BOOT_ID", str(tmp_path / "absent"))
        boot_id.cache_clear()
        owners._owner.cache_clear()
        yield
    boot_id.cache_clear()
    owners._owner.cache_clear()


# -- names ---------------------------------------------------------------------------------


def test_a_token_is_read_back_and_safe_in_a_file_name() -> None:
    me = current_owner()
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{8}-\d+-\d+-\d+", me.token)
    assert len(me.token) < 100
    assert Owner.parse(me.token) == me
    assert me.pid == os.getpid()


def test_a_new_name_tells_its_owner_and_is_new() -> None:
    names = {new_name() for _ in range(10)}
    assert len(names) == 10
    assert {Owner.parse(name) for name in names} == {current_owner()}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lock",
        "0123456789abcdef-01234567-1-1",
        "0123456789abcdef-01234567-1-0-1",
        "0123456789abcdef-01234567-1--1-1",
        "0123456789ABCDEF-01234567-1-1-1",
        "0123456789abcdef-01234567-1-1-1-",
        "0123456789abcdef-01234567-1-1-1-0123456",
        "0123456789abcdef-01234567-1-1-1-01234567.json",
        "0123456789abcdef-01234567-1-1-1\n",
        "0123456789abcdef-01234567-1-١-1",
    ],
)
def test_other_names_tell_no_owner(name: str) -> None:
    assert Owner.parse(name) is None


def test_a_forked_child_is_another_owner() -> None:
    parent = current_owner()

    def child() -> bool:
        me = current_owner()
        return me.pid == os.getpid() and me != parent and is_alive(parent) is is_alive(me) is True

    assert forked(child)
    assert current_owner() == parent


# -- alive? --------------------------------------------------------------------------------


def test_a_process_lives_until_it_ends() -> None:
    with python(TELL) as process:
        owner = owner_of(process)
        assert owner.pid == process.pid
        assert is_alive(owner) is True
        process.kill()
        assert is_alive(owner) is False


def test_a_zombie_is_dead() -> None:
    with python(TELL) as process:
        owner = owner_of(process)
        os.kill(process.pid, 9)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert os.path.exists(f"/proc/{process.pid}/stat")
        assert is_alive(owner) is False


def test_a_process_whose_first_thread_has_ended_lives() -> None:
    code = """
        import ctypes, platform, threading
        from storage.cache.owners import current_owner

        def work():
            # The first thread is gone when the kernel says so.
            while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
                pass
            print(current_owner().token, flush=True)
            input()

        threading.Thread(target=work).start()
        exit_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
        ctypes.CDLL(None).syscall(exit_thread, 0)
    """
    with python(code) as process:
        owner = owner_of(process)
        assert owner.pid == process.pid
        assert is_alive(owner) is True
        process.kill()
        assert is_alive(owner) is False


def test_the_name_of_a_process_says_nothing() -> None:
    rename = """
    open("/proc/self/comm", "w").write(") Z 1 (")
    print(flush=True)
    input()
    """
    with python(TELL + rename) as process:
        owner = owner_of(process)
        process.go_on()
        process.line()
        assert b"() Z 1 ()" in Path(f"/proc/{process.pid}/stat").read_bytes()
        assert is_alive(owner) is True


def test_a_later_process_with_the_same_number_is_not_the_owner() -> None:
    with python(TELL) as process:
        owner = owner_of(process)
        assert is_alive(replace(owner, started=owner.started - 1)) is False


@pytest.mark.parametrize("pid", [2**31 - 1, 2**31, 2**63, 10**19])
def test_a_number_that_no_process_has_is_dead(pid: int) -> None:
    assert is_alive(replace(current_owner(), pid=pid)) is False


def test_what_ran_in_another_boot_of_this_machine_is_dead() -> None:
    assert is_alive(replace(current_owner(), boot="01234567")) is False


@pytest.mark.parametrize(
    "change",
    [
        {"host": "0123456789abcdef"},
        {"host": "0123456789abcdef", "boot": "01234567"},
        {"namespace": 1},
        {"namespace": 0},
        {"boot": "00000000"},
    ],
    ids=str,
)
def test_elsewhere_nothing_is_certain(change: dict[str, str | int]) -> None:
    assert is_alive(replace(current_owner(), **change)) is None  # type: ignore[arg-type]


def test_without_its_start_time_a_process_is_known_by_its_number() -> None:
    with python(TELL) as process:
        owner = replace(owner_of(process), started=0)
        assert is_alive(owner) is True
        process.kill()
        assert is_alive(owner) is False


# -- what /proc shows ----------------------------------------------------------------------


def test_the_id_of_the_boot_is_that_of_the_kernel() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.usefixtures("without_proc")
def test_without_proc_the_number_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_HAS_NAMESPACES", False)
    assert boot_id() is None
    me = current_owner()
    assert (me.boot, me.namespace, me.started) == ("00000000", 0, 0)
    assert Owner.parse(me.token) == me
    with python("print(flush=True); input()") as process:
        owner = replace(me, pid=process.pid)
        assert is_alive(owner) is True
        process.kill()
        assert is_alive(owner) is False
    if os.geteuid() == 0:
        assert as_nobody(lambda: is_alive(me) is True)


@pytest.mark.usefixtures("without_proc")
def test_without_proc_in_a_system_with_namespaces_only_oneself_is_certain() -> None:
    me = current_owner()
    assert is_alive(me) is True
    assert is_alive(replace(me, pid=1)) is None
    assert is_alive(replace(me, pid=2**31 - 1)) is None


def test_processes_of_another_namespace_are_not_looked_up_here() -> None:
    with python(TELL, prefix=("unshare", "--pid", "--fork", "--mount-proc")) as process:
        owner = owner_of(process)
        assert owner.pid == 1
        assert owner.started
        assert is_alive(owner) is None


def test_proc_of_another_namespace_is_not_believed() -> None:
    code = """
        import os, sys
        from dataclasses import replace
        from storage.cache.owners import current_owner, is_alive

        me = current_owner()
        assert me.pid == 1 and os.readlink("/proc/self") != "1" and not me.started
        end, wait = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(wait)
            os.read(end, 1)
            os._exit(0)
        child = replace(me, pid=pid)
        alive = is_alive(me), is_alive(child)
        os.close(wait)
        os.waitpid(pid, 0)
        print(*alive, is_alive(child), flush=True)
    """
    with python(code, prefix=("unshare", "--pid", "--fork")) as process:
        assert process.line() == "True True False"


def test_a_process_that_is_hidden_is_not_called_dead() -> None:
    code = """
        import os, subprocess
        from dataclasses import replace
        from storage.cache.owners import current_owner, is_alive

        subprocess.run(["mount", "-o", "remount,hidepid=2", "/proc"], check=True)
        parent = current_owner()
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            assert not os.path.exists("/proc/1/stat")
            print(is_alive(parent), is_alive(replace(parent, pid=99)), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    """
    with python(code, prefix=("unshare", "--pid", "--fork", "--mount-proc")) as process:
        assert process.line() == "None False"


# -- locks and age -------------------------------------------------------------------------


def test_a_lock_is_seen_as_long_as_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(str(path))
    assert not is_locked(str(path / "below" / "no" / "folder"))
    with open(path, "w") as file:
        assert not is_locked(str(path))
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(str(path))
        assert is_locked(str(path))
    assert not is_locked(str(path))


def test_two_who_look_at_a_lock_do_not_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    seen: list[bool] = []
    flock = fcntl.flock

    def flock_and_look(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if not seen:
            seen.append(True)
            seen[0] = is_locked(str(path))

    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock_and_look)
        assert not is_locked(str(path))
    assert seen == [False]


@without_locks
def test_without_locks_nobody_holds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: int | None
) -> None:
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        break_locks(monkeypatch, locks)
        assert not is_locked(str(tmp_path / "lock"))


def test_a_lock_that_one_may_not_look_at_may_be_held() -> None:
    with open_folder() as folder:
        lock = folder / "lock"
        lock.touch(mode=0o600)
        assert not is_locked(str(lock))
        assert as_nobody(lambda: is_locked(str(lock)))


@pytest.mark.parametrize("locked", [True, False])
def test_what_may_live(tmp_path: Path, locked: bool) -> None:
    path = tmp_path / "lock"

    def may(owner: Owner | None, hours: float) -> bool:
        return may_live(owner, str(path), lambda: later(0), later(hours))

    with open(path, "w") as file:
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        assert may(current_owner(), 1000)
        assert may(dead_owner(), 0) is locked
        for unknown in (foreign_owner(), None):
            assert may(unknown, 23)
            assert may(unknown, -1000)
            assert may(unknown, 25) is locked


# -- imports -------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys\n"
        "from storage.cache import leases, locks, owners, partials\n"
        "leases.Leases('/nonexistent/root').held()\n"
        "locks.gc_lock('/nonexistent/root')\n"
        "partials.remove_dead('/nonexistent/root')\n"
        "locks.remove_stale('/nonexistent/root')\n"
        "heavy = {'asyncio', 'ctypes', 'filelock', 'pydantic', 'shutil', 'subprocess'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
