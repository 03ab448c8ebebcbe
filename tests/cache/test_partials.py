"""Working folders: those of the living stay, those of the dead go."""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from storage.cache.owners import Owner, current_owner, new_name
from storage.cache.partials import new_partial, remove_dead
from tests.cache.processes import (
    HOUR,
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

WORK = """
    import fcntl, os, sys
    from storage.cache.partials import new_partial

    root, locks = sys.argv[1:]
    if locks == "no-op":
        fcntl.flock = lambda *_: None
    with new_partial(root) as path:
        os.makedirs(os.path.join(path, "content"))
        with open(os.path.join(path, "content", "half"), "wb") as file:
            file.write(bytes(1000))
        print(path, flush=True)
        input()
    print("done", flush=True)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make(root: Path, owner: Owner | None, name: str = "stray") -> Path:
    """Make a working folder with 1000 bytes in it."""
    path = root / "partial" / (f"{owner.token}-0badcafe" if owner else name)
    (path / "content").mkdir(parents=True)
    (path / "lock").touch()
    (path / "content" / "half").write_bytes(bytes(1000))
    return path


def partials(root: Path) -> list[Path]:
    return sorted((root / "partial").iterdir())


# -- one's own -----------------------------------------------------------------------------


def test_a_folder_of_ones_own_is_there_until_the_end(root: Path) -> None:
    with new_partial(str(root)) as one, new_partial(str(root)) as other:
        assert one != other
        for path in (one, other):
            assert os.path.dirname(path) == str(root / "partial")
            assert os.stat(path).st_mode & 0o777 == 0o700
            assert Owner.parse(os.path.basename(path)) == current_owner()
            assert os.listdir(path) == ["lock"]
        os.makedirs(os.path.join(one, "a", "b"))
    assert partials(root) == []


def test_it_goes_whatever_happened(root: Path) -> None:
    def fail() -> None:
        with new_partial(str(root)) as path:
            sub = Path(path, "sub")
            sub.mkdir()
            (sub / "file").touch(mode=0o400)
            sub.chmod(0o500)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert partials(root) == []


def test_it_may_be_gone_already(root: Path) -> None:
    with new_partial(str(root)) as path:
        os.rename(path, root / "moved")
    assert partials(root) == []


def test_its_lock_is_held_and_not_inherited_by_other_programs(root: Path) -> None:
    with new_partial(str(root)) as path, open(os.path.join(path, "lock")) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = {int(fd) for fd in os.listdir("/proc/self/fd")} - {file.fileno()}
        links = {fd: link for fd in found if (link := _link(fd)) == os.path.join(path, "lock")}
        assert len(links) == 1
        assert not any(os.get_inheritable(fd) for fd in links)


def _link(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


@without_locks
def test_locks_are_not_needed(
    root: Path, monkeypatch: pytest.MonkeyPatch, locks: int | None
) -> None:
    break_locks(monkeypatch, locks)
    dead = make(root, dead_owner())
    with new_partial(str(root)) as path:
        assert remove_dead(str(root), later(1000)) == 1000
        assert partials(root) == [Path(path)]
    assert partials(root) == []
    assert not dead.exists()


def test_a_child_that_leaves_it_does_not_take_it_away(root: Path) -> None:
    pid = 0
    with new_partial(str(root)) as path:
        pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            assert os.listdir(path) == ["lock"]
            assert remove_dead(str(root)) == 0
    if not pid:
        os._exit(0)
    assert partials(root) == []


def test_a_cache_that_cannot_be_written_says_so() -> None:
    def enter(root: Path) -> bool:
        with pytest.raises(OSError), new_partial(str(root)):  # noqa: PT011 - any of the system's
            pass
        return True

    with read_only_disk(lambda _: None) as disk:
        assert enter(disk)
    with open_folder() as folder:
        assert as_nobody(lambda: enter(folder))


# -- of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("locks", ["real", "no-op"])
def test_what_a_living_process_needs_stays_until_it_is_killed(
    root: Path, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if locks == "no-op":
        break_locks(monkeypatch, None)
    with python(WORK, root, locks) as process:
        path = Path(process.line())
        assert remove_dead(str(root)) == 0
        assert remove_dead(str(root), later(1000)) == 0
        assert (path / "content" / "half").exists()
        process.kill()
        assert path.exists()
        assert remove_dead(str(root)) == 1000
    assert partials(root) == []


def test_a_process_that_ends_by_itself_leaves_nothing(root: Path) -> None:
    with python(WORK, root, "real") as process:
        path = Path(process.line())
        process.go_on()
        assert process.line() == "done"
        assert not path.exists()


def test_what_was_killed_before_it_had_a_lock_goes(root: Path) -> None:
    (root / "partial" / f"{dead_owner().token}-0badcafe").mkdir(parents=True)
    assert remove_dead(str(root)) == 0
    assert partials(root) == []


def test_temporary_files_go_with_their_owner(root: Path) -> None:
    folder = root / "partial"
    folder.mkdir(parents=True)
    (folder / f"{dead_owner().token}-00000001").write_bytes(b"12345")
    mine = folder / new_name()
    mine.write_bytes(b"123")
    assert remove_dead(str(root), later(1000)) == 5
    assert partials(root) == [mine]


def test_what_ran_before_the_machine_started_again_goes(root: Path) -> None:
    make(root, replace(current_owner(), boot="01234567"))
    assert remove_dead(str(root)) == 1000
    assert partials(root) == []


@pytest.mark.parametrize("known", [True, False], ids=["another-machine", "no-owner"])
def test_what_nobody_knows_goes_after_a_day_without_change(root: Path, known: bool) -> None:
    path = make(root, foreign_owner() if known else None)
    for entry in (path, path / "lock", path / "content", path / "content" / "half"):
        os.utime(entry, (0, 0))
    assert remove_dead(str(root), later(23)) == 0
    with open(path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_dead(str(root), later(25)) == 0
    assert (path / "content" / "half").exists()
    assert remove_dead(str(root), later(25)) == 1000
    assert partials(root) == []


def test_a_change_deep_inside_counts(root: Path) -> None:
    path = make(root, foreign_owner())
    half = path / "content" / "half"
    before = max(entry.stat().st_ctime for entry in (path, path / "lock", path / "content"))
    while half.stat().st_ctime <= before:
        # The times that blobs have are no times of a change.
        os.utime(half, (0, 0))
    day_after = (before + half.stat().st_ctime) / 2 + 24 * HOUR
    assert remove_dead(str(root), day_after) == 0
    assert half.exists()
    assert remove_dead(str(root), day_after + 10) == 1000


def test_stray_files_go_after_a_day(root: Path) -> None:
    (root / "partial").mkdir(parents=True)
    (root / "partial" / "stray").write_bytes(b"123")
    assert remove_dead(str(root), later(23)) == 0
    assert remove_dead(str(root), later(25)) == 3
    assert partials(root) == []


def test_bytes_with_another_name_elsewhere_are_not_given_back(root: Path) -> None:
    path = make(root, dead_owner())
    os.link(path / "content" / "half", root / "blob")
    assert remove_dead(str(root)) == 0
    assert partials(root) == []
    assert (root / "blob").stat().st_size == 1000


def test_links_are_removed_and_not_followed(root: Path) -> None:
    path = make(root, dead_owner())
    keep = root / "keep"
    keep.mkdir()
    (keep / "file").write_bytes(b"1")
    (path / "content" / "link").symlink_to(keep)
    (root / "partial" / f"{dead_owner().token}-00000002").symlink_to(keep)
    assert remove_dead(str(root)) == 1000
    assert partials(root) == []
    assert (keep / "file").exists()


def test_of_many_who_remove_at_once_each_counts_its_own(root: Path) -> None:
    owner = dead_owner()
    for number in range(40):
        make(root, None, f"{owner.token}-{number:08x}")
    barrier = threading.Barrier(8)
    freed: list[int] = []

    def remove() -> None:
        barrier.wait(60)
        freed.append(remove_dead(str(root)))

    threads = [threading.Thread(target=remove) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(freed) == 8
    assert sum(freed) == 40 * 1000
    assert partials(root) == []


def test_nothing_there_is_fine(root: Path) -> None:
    assert remove_dead(str(root)) == 0
    assert not root.exists()


def test_what_cannot_be_removed_stays() -> None:
    owner = dead_owner()
    with read_only_disk(lambda disk: make(disk, owner)) as disk:
        assert remove_dead(str(disk)) == 0
        assert len(partials(disk)) == 1
    with open_folder() as folder:
        make(folder, owner)
        assert as_nobody(lambda: remove_dead(str(folder)) == 0)
        assert len(partials(folder)) == 1
        assert remove_dead(str(folder)) == 1000


def test_a_child_of_a_dead_process_keeps_its_lock(root: Path) -> None:
    code = """
        import os, sys
        from storage.cache.partials import new_partial

        with new_partial(sys.argv[1]) as path:
            if os.fork() == 0:
                print("ready", flush=True)
                input()
                os._exit(0)
            os.wait()
    """
    with python(code, root) as process:
        assert process.line() == "ready"
        process.kill()
        assert remove_dead(str(root)) == 0
        assert len(partials(root)) == 1
        process.go_on()
        # Its end, not that of the killed parent, closes the pipe.
        assert process.line() == ""
        while remove_dead(str(root)) == 0 and partials(root):
            pass
    assert partials(root) == []


def test_an_interrupted_removal_is_finished_by_the_next_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, dead_owner())

    def interrupted() -> bool:
        from storage.cache import partials as module

        def die(_: str) -> None:
            os._exit(0)

        monkeypatch.setattr(module, "remove", die)
        remove_dead(str(root))
        return False

    assert forked(interrupted)
    (renamed,) = partials(root)
    owner = Owner.parse(renamed.name)
    assert owner is not None
    assert owner.pid != os.getpid()
    assert remove_dead(str(root)) == 1000
    assert partials(root) == []
