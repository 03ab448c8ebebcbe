"""Leases: what living processes use is known to all, and only that."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage.cache import leases as module
from storage.cache.leases import Held, Leases
from storage.cache.owners import Owner, current_owner
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
    read_only_disk,
    without_locks,
)
from tests.servers import small_disk

BLOB = f"blake3:{'ab' * 32}"
OTHER_BLOB = f"sha256:{'cd' * 32}"

HOLD = """
    import os, sys
    from storage.cache.leases import Leases

    leases = Leases(sys.argv[1])
    print(leases.hold(["theirs"], ["blake3:00"]), flush=True)
    input()
"""


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def leases(root: str) -> Leases:
    return Leases(root)


def holding(manifests: set[str], *blobs: str) -> Held:
    return Held(frozenset(manifests), frozenset(blobs))


def files(root: str) -> list[Path]:
    folder = Path(root, "leases")
    return sorted(folder.iterdir()) if folder.exists() else []


def seen(root: str) -> Held:
    """Return what somebody sees who holds nothing."""
    return Leases(root).held()


def manifests(root: str) -> set[str]:
    return set(seen(root).manifests)


def write(root: str, owner: Owner, text: str = "m old\n", hours_ago: float = 0) -> Path:
    """Make a lease of some process."""
    path = Path(root, "leases", f"{owner.token}-0badcafe")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (later(-hours_ago),) * 2)
    return path


def run(*functions: Callable[[], object]) -> None:
    """Run functions in threads at once."""
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# -- hold and release ----------------------------------------------------------------------


def test_nothing_is_written_before_something_is_held(root: str, leases: Leases) -> None:
    assert leases.held() == holding(set())
    leases.release("never")
    leases.release_blobs([BLOB])
    assert leases.hold()
    leases.close()
    assert not os.path.exists(root)


def test_what_is_held_is_seen_by_all_until_it_is_released(root: str, leases: Leases) -> None:
    assert leases.hold(["one", "two"], [BLOB, OTHER_BLOB])
    assert seen(root) == leases.held() == holding({"one", "two"}, BLOB, OTHER_BLOB)
    leases.release("one")
    leases.release_blobs([BLOB])
    assert seen(root) == leases.held() == holding({"two"}, OTHER_BLOB)
    assert leases.hold(["one"])
    assert seen(root).manifests == {"one", "two"}
    (file,) = files(root)
    assert Owner.parse(file.name) == current_owner()


def test_the_same_thing_is_held_as_often_as_it_is_wanted(root: str, leases: Leases) -> None:
    for _ in range(2):
        leases.hold(["one"], [BLOB])
    leases.hold([], [BLOB])
    leases.release("one")
    leases.release_blobs([BLOB, BLOB])
    assert seen(root) == holding({"one"}, BLOB)
    leases.release("one")
    leases.release_blobs([BLOB])
    assert seen(root) == holding(set())
    leases.release("one")
    leases.hold(["one"])
    assert manifests(root) == {"one"}


def test_two_users_in_one_process_do_not_release_for_each_other(root: str) -> None:
    one, other = Leases(root), Leases(root)
    one.hold(["same"])
    other.hold(["same"])
    one.release("same")
    assert manifests(root) == {"same"}
    one.close()
    assert manifests(root) == {"same"}
    other.close()
    assert manifests(root) == set()


def test_threads_share_leases(root: str, leases: Leases) -> None:
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait(60)
        for number in range(50):
            leases.hold(["kept", f"{number}"], [BLOB])
            assert {"kept", f"{number}"} <= leases.held().manifests
            assert BLOB in leases.held().blobs
            leases.release(f"{number}")
            leases.release_blobs([BLOB])

    run(*[work] * 8)
    assert seen(root) == leases.held() == holding({"kept"})


def test_a_lease_is_not_inherited_by_other_programs(root: str, leases: Leases) -> None:
    leases.hold(["one"])
    (path,) = files(root)
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
                found.append(os.get_inheritable(int(descriptor)))
    assert found == [False]


# -- the end -------------------------------------------------------------------------------


def test_closing_releases_everything_and_is_not_the_end(root: str, leases: Leases) -> None:
    leases.hold(["one"], [BLOB])
    leases.close()
    assert files(root) == []
    assert leases.held() == holding(set())
    leases.close()
    assert leases.hold(["two"])
    assert manifests(root) == {"two"}


def test_leases_that_nobody_has_any_more_are_closed(root: str) -> None:
    leases = Leases(root)
    leases.hold(["one"])
    del leases
    gc.collect()
    assert files(root) == []


def test_a_process_takes_its_lease_along(root: str) -> None:
    with python(HOLD, root) as process:
        assert process.line() == "True"
        assert seen(root) == holding({"theirs"}, "blake3:00")
        process.go_on()
        assert process.wait() == 0
    assert files(root) == []


@pytest.mark.parametrize("locks", ["real", "no-op"])
def test_the_lease_of_a_killed_process_is_void_and_removed(
    root: str, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    if locks == "no-op":
        break_locks(monkeypatch, None)
    with python(HOLD, root) as process:
        assert process.line() == "True"
        assert seen(root).manifests == {"theirs"}
        assert Leases(root).remove_dead() == 0
        process.kill()
        assert seen(root) == holding(set())
    (file,) = files(root)
    size = file.stat().st_size
    assert Leases(root).remove_dead() == size > 0
    assert files(root) == []


@without_locks
def test_locks_are_not_needed(
    root: str, monkeypatch: pytest.MonkeyPatch, locks: int | None
) -> None:
    break_locks(monkeypatch, locks)
    leases = Leases(root)
    assert leases.hold(["one"])
    write(root, dead_owner())
    assert manifests(root) == {"one"}
    assert leases.remove_dead() > 0
    assert manifests(root) == {"one"}
    leases.close()
    assert files(root) == []


# -- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("", set()),
        ("m one\nm two", {"one"}),
        ("m one\n-m one", {"one"}),
        ("m one\n-m two\n-m one\n", set()),
        ("m one\n\0\0\0\n\nx\nm\nb\n-\nm two\n", {"one", "two"}),
        ("-m one\nm one\n", {"one"}),
    ],
)
def test_lines_that_were_not_written_to_their_end_are_ignored(
    root: str, text: str, held: set[str]
) -> None:
    write(root, current_owner(), text)
    assert manifests(root) == held


def test_processes_elsewhere_are_given_a_day(root: str) -> None:
    path = write(root, foreign_owner(), hours_ago=23)
    assert manifests(root) == {"old"}
    assert Leases(root).remove_dead() == 0
    os.utime(path, (later(-25),) * 2)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert manifests(root) == {"old"}
        assert Leases(root).remove_dead() == 0
    assert manifests(root) == set()
    assert Leases(root).remove_dead() == len("m old\n")
    assert files(root) == []


def test_what_ran_before_the_machine_started_again_holds_nothing(root: str) -> None:
    write(root, replace(current_owner(), boot="01234567"))
    assert manifests(root) == set()


def test_being_asked_again_keeps_a_lease_young(
    root: str, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases.hold(["one"])
    (path,) = files(root)
    os.utime(path, (later(-20),) * 2)
    leases.hold(["one"])
    assert path.stat().st_mtime < later(-19)
    monkeypatch.setattr(module, "_REFRESH", 0.0)
    leases.hold(["one"])
    assert path.stat().st_mtime > later(-1)
    assert path.read_text() == "m one\n"


# -- forks ---------------------------------------------------------------------------------

FORK = """
    import os, sys
    from storage.cache.leases import Leases

    leases = Leases(sys.argv[1])
    leases.hold(["inherited"], ["blake3:00"])
    pid = os.fork()
    if pid == 0:
        input()
        if sys.argv[2] == "use":
            print(leases.hold(["own"]), flush=True)
            input()
        sys.exit()
    print(pid, flush=True)
    if sys.argv[3] == "wait":
        os.wait()
"""


def until_gone(pid: int) -> None:
    """Wait for the end of a process that is not this one's child."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 60)[0]
        finally:
            os.close(descriptor)


Family = Callable[[str, str], contextlib.AbstractContextManager[tuple[Process, int]]]


@pytest.fixture
def family(root: str) -> Family:
    """Start a process that holds something and its child; both end with the test."""

    @contextlib.contextmanager
    def start(child: str, parent: str) -> Iterator[tuple[Process, int]]:
        with python(FORK, root, child, parent) as process:
            pid = int(process.line())
            try:
                yield process, pid
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    return start


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_a_child_keeps_what_it_inherited_when_its_parent_is_gone(
    root: str, family: Family, end: str
) -> None:
    with family("idle", "wait" if end == "killed" else "exit") as (parent, pid):
        if end == "killed":
            parent.kill()
        else:
            assert parent.wait() == 0
        assert seen(root) == holding({"inherited"}, "blake3:00")
        assert Leases(root).remove_dead() == 0
        parent.go_on()
        until_gone(pid)
        assert manifests(root) == set()
        assert Leases(root).remove_dead() > 0
    assert files(root) == []


def test_where_locks_do_nothing_the_end_of_the_owner_decides(
    root: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_locks(monkeypatch, None)
    with family("idle", "wait") as (parent, _):
        assert manifests(root) == {"inherited"}
        parent.kill()
        assert manifests(root) == set()


def test_a_child_that_holds_something_writes_its_own_lease(root: str, family: Family) -> None:
    with family("use", "wait") as (parent, pid):
        parent.go_on()
        assert parent.line() == "True"
        owners = {Owner.parse(path.name) for path in files(root)}
        assert {owner.pid for owner in owners if owner} == {parent.pid, pid}
        parent.kill()
        assert seen(root) == holding({"inherited", "own"}, "blake3:00")
        # The lock of the parent's lease is not held for what is in the child's own.
        assert Leases(root).remove_dead() > 0
        assert [owner.pid for path in files(root) if (owner := Owner.parse(path.name))] == [pid]
        assert seen(root) == holding({"inherited", "own"}, "blake3:00")


def test_the_end_of_a_child_leaves_the_lease_of_its_parent(root: str, family: Family) -> None:
    for use in ("idle", "use"):
        with family(use, "wait") as (parent, pid):
            parent.go_on()
            if use == "use":
                parent.line()
                parent.go_on()
            # It waits for its child, and then ends itself.
            assert parent.wait() == 0
            assert not os.path.exists(f"/proc/{pid}")
    # The exit handlers ran in the children too; each removed what was its own.
    assert files(root) == []


def test_a_child_that_closes_leaves_the_lease_of_its_parent(root: str, leases: Leases) -> None:
    leases.hold(["one"])

    def child() -> bool:
        leases.close()
        leases.release("one")
        return leases.held().manifests == {"one"} and leases.hold(["two"])

    assert forked(child)
    assert manifests(root) == {"one"}
    assert leases.hold(["three"])
    assert manifests(root) == {"one", "three"}
    assert leases.remove_dead() == len("m two\n")


def test_a_child_of_a_child_goes_on(root: str, leases: Leases) -> None:
    leases.hold(["one"])

    def child() -> bool:
        leases.hold(["two"])

        def grandchild() -> bool:
            return leases.hold(["three"]) and leases.held().manifests == {"one", "two", "three"}

        return forked(grandchild) and leases.held().manifests == {"one", "two"}

    assert forked(child)
    assert manifests(root) == {"one"}


def test_a_fork_in_the_middle_of_a_change_does_not_stop_the_child(
    root: str, leases: Leases
) -> None:
    leases.hold(["one"])
    with leases._mutex:
        # The thread that would give it back does not exist in the child.
        assert forked(lambda: leases.hold(["two"]) and leases.held().manifests == {"one", "two"})
    assert manifests(root) == {"one"}


def test_another_program_does_not_keep_a_lease(root: str) -> None:
    code = HOLD.replace(
        "input()",
        "import subprocess; subprocess.Popen(['cat'], close_fds=False); print('on', flush=True)"
        "; input()",
    )
    with python(code, root) as process:
        assert (process.line(), process.line()) == ("True", "on")
        process.kill()
        assert manifests(root) == set()


# -- files that grow, vanish or cannot be written ------------------------------------------


def test_a_lease_does_not_grow_for_ever(
    root: str, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WASTE", 1000)
    leases.hold(["kept"])
    names = set()
    for number in range(500):
        leases.hold([f"{number}"])
        leases.release(f"{number}")
        (path,) = files(root)
        names.add(path.name)
        assert path.stat().st_size < 2000
    assert len(names) > 5
    assert seen(root).manifests == {"kept"}


def test_nobody_misses_a_line_while_a_lease_is_written_anew(root: str) -> None:
    code = """
        import sys
        from storage.cache import leases as module

        module._MAX_WASTE = 20
        leases = module.Leases(sys.argv[1])
        leases.hold(["kept"])
        print("ready", flush=True)
        while True:
            leases.hold(["other"])
            leases.release("other")
    """
    with python(code, root) as process:
        assert process.line() == "ready"
        names: set[Path] = set()
        looks = 0
        deadline = time.monotonic() + 120
        # Where the two have one core, many looks may pass before it is written once.
        while looks < 500 or (len(names) <= 10 and time.monotonic() < deadline):
            assert "kept" in manifests(root)
            names.update(files(root))
            looks += 1
        assert len(names) > 10


def test_writing_anew_keeps_the_lease_that_a_child_needs(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = FORK.replace("print(pid", "for _ in range(9): leases._renew()\n    print(pid")
    with python(code, root, "idle", "wait") as process:
        pid = int(process.line())
        assert len(files(root)) == 2
        process.kill()
        assert manifests(root) == {"inherited"}
        process.go_on()
        until_gone(pid)
        assert manifests(root) == set()


def test_a_lease_that_somebody_removed_is_written_again(root: str, leases: Leases) -> None:
    leases.hold(["one"])
    files(root)[0].unlink()
    assert leases.held().manifests == {"one"}
    assert leases.hold(["other"])
    assert manifests(root) == {"one", "other"}
    files(root)[0].unlink()
    os.rmdir(os.path.join(root, "leases"))
    leases.release("one")
    assert leases.hold(["two"])
    assert manifests(root) == {"other", "two"}


def test_a_descriptor_that_others_closed_and_use_is_left_alone(
    root: str, leases: Leases, tmp_path: Path
) -> None:
    leases.hold(["one"])
    assert leases._file is not None
    descriptor = leases._file._descriptor
    theirs = tmp_path / "theirs"
    with open(theirs, "wb") as file:
        os.dup2(file.fileno(), descriptor)
    assert leases.hold(["two"])
    assert manifests(root) == {"one", "two"}
    assert theirs.read_bytes() == b""
    assert os.readlink(f"/proc/self/fd/{descriptor}") == str(theirs)
    os.close(descriptor)
    assert leases.hold(["three"])
    assert len(files(root)) == 1
    leases.close()
    assert files(root) == []


def test_a_cache_that_cannot_be_written_is_told() -> None:
    def check(root: Path) -> bool:
        leases = Leases(str(root))
        assert not leases.hold(["one"], [BLOB])
        assert not leases.hold(["one"])
        assert leases.held() == holding({"one", "theirs"}, BLOB)
        leases.release("one")
        assert leases.held().manifests == {"one", "theirs"}
        leases.release("one")
        assert leases.held().manifests == {"theirs"}
        assert leases.remove_dead() == 0
        leases.close()
        return True

    def fill(root: Path) -> None:
        write(str(root), foreign_owner(), "m theirs\n")
        write(str(root), dead_owner(), "m dead\n")

    with read_only_disk(fill) as disk:
        assert check(disk)
        assert len(files(str(disk))) == 2
    with open_folder() as folder:
        fill(folder)
        assert as_nobody(lambda: check(folder))
        assert len(files(str(folder))) == 2


def test_a_full_disk_tears_no_line(tmp_path: Path) -> None:
    with small_disk(tmp_path, mebibytes=1) as disk:
        leases = Leases(str(disk))
        assert leases.hold(["first"])
        filler = disk / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        # More than the rest of the page that the lease has.
        many = [f"{number:064x}" for number in range(200)]
        assert not leases.hold(many)
        assert "first" in manifests(str(disk))
        assert leases.held().manifests == {"first", *many}
        assert not leases.hold(["more"])
        leases.release("more")
        assert len(files(str(disk))) == 1
        filler.unlink()
        assert leases.hold(["last"])
        assert manifests(str(disk)) == {"first", *many, "last"}
        assert len(files(str(disk))) == 1
        leases.close()
