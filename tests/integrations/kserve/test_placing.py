"""Several sources in one folder: what each put there goes with it, and nothing is ever half."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import files
from storage.errors import DestinationError, InvalidInput, ObjectExistsError
from storage.integrations.kserve import placing
from storage.integrations.kserve.placing import Place
from tests.integrations.kserve.support import V1, V2, child_environment, fill, put, tree
from tests.servers import small_disk


def test_files_of_an_older_version_are_gone(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", V1)
    put(tmp_path, "s3://b/m", V2)

    assert tree(tmp_path) == V2
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.bin", "new"]


def test_files_of_another_source_stay(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/one", {"one.bin": b"1", "shared/one": b"1"})
    put(tmp_path, "s3://b/two", {"two.bin": b"2", "shared/two": b"2"})
    put(tmp_path, "s3://b/one", {"one.bin": b"3", "shared/three": b"3"})
    put(tmp_path, "s3://b/two", {"two.bin": b"4"})

    assert tree(tmp_path) == {"one.bin": b"3", "shared/three": b"3", "two.bin": b"4"}


def test_folders_that_lose_their_last_file_go(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/one", {"a/b/c/one": b"1"})
    put(tmp_path, "s3://b/two", {"a/b/c/two": b"1"})
    put(tmp_path, "s3://b/one", {"x": b"1"})
    put(tmp_path, "s3://b/two", {"y": b"1"})

    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_a_source_that_replaces_a_file_of_another_replaces_all_of_it(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/other", {"other.bin": b"0"})
    put(tmp_path, "s3://b/v1", V1)
    put(tmp_path, "s3://b/v2", V2)

    assert tree(tmp_path) == {**V2, "other.bin": b"0"}


def test_a_folder_in_another_sources_folder_stays(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/base", {"weights/a": b"1", "weights/deep/b": b"1", "other/c": b"1"})
    put(tmp_path / "weights" / "adapter", "s3://b/adapter", {"x": b"1"})
    with Place(str(tmp_path), "s3://b/base") as place:
        assert place.is_current(f"plan of {['other/c', 'weights/a', 'weights/deep/b']}")
    put(tmp_path, "s3://b/base", {"weights/a": b"2", "config.json": b"2"})

    assert tree(tmp_path) == {"weights/a": b"2", "config.json": b"2", "weights/adapter/x": b"1"}
    put(tmp_path / "weights" / "adapter", "s3://b/adapter", {"y": b"2"})
    put(tmp_path, "s3://b/base", {"config.json": b"3"})
    assert tree(tmp_path) == {"config.json": b"3", "weights/adapter/y": b"2"}


def test_only_the_named_sources_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"0")
    for name in ("one", "two", "three"):
        put(tmp_path, f"s3://b/{name}", {f"{name}.bin": b"1", f"shared/{name}": b"1"})
    with Place(str(tmp_path), "s3://b/one", only=["s3://b/two"]) as place:
        assert not place.is_current(f"plan of {['one.bin', 'shared/one']}")
        fill(place, {"one.bin": b"1"})
        place.publish("new")

    assert set(tree(tmp_path)) == {"one.bin", "two.bin", "shared/two", "mine.txt"}
    with Place(str(tmp_path), "s3://b/one", only=["s3://b/two"]) as place:
        assert place.is_current("new")


def test_two_sources_of_one_call_do_not_replace_one_another(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/one", {"config.json": b"1"})
    with pytest.raises(InvalidInput, match=r"config\.json"):
        put(tmp_path, "s3://b/two", {"config.json": b"2"}, beside=("s3://b/one",))

    assert tree(tmp_path) == {"config.json": b"1"}


def test_files_that_nobody_noted_are_replaced_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"0")
    (tmp_path / "mine.txt").write_bytes(b"0")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_bytes(b"0")

    put(tmp_path, "s3://b/m", V2)
    assert tree(tmp_path) == {**V2, "mine.txt": b"0", "new/mine.txt": b"0"}
    put(tmp_path, "s3://b/m", {"x": b"1"})
    assert tree(tmp_path) == {"x": b"1", "mine.txt": b"0", "new/mine.txt": b"0"}


@pytest.mark.parametrize(("there", "comes"), [("a/b", "a"), ("a", "a/b")])
def test_a_file_and_a_folder_of_one_name_are_refused(
    there: str, comes: str, tmp_path: Path
) -> None:
    place = tmp_path / there
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"0")

    with pytest.raises(ObjectExistsError, match="of that name"):
        put(tmp_path, "s3://b/m", {comes: b"1", "c": b"1"})

    assert tree(tmp_path) == {there: b"0"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_becomes_a_folder_in_the_next_version(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", {"a": b"1", "b/c": b"1"})
    put(tmp_path, "s3://b/m", {"a/b": b"2", "b": b"2"})

    assert tree(tmp_path) == {"a/b": b"2", "b": b"2"}


def test_what_is_current_is_known_until_it_is_touched(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", V1)
    mark = f"plan of {sorted(V1)}"

    def current(plan: str | None) -> bool:
        with Place(str(tmp_path), "s3://b/m") as place:
            return place.is_current(plan)

    assert current(mark)
    assert not current("another")
    assert not current(None)
    (tmp_path / "old" / "a").write_bytes(b"9")
    assert not current(mark)
    put(tmp_path, "s3://b/m", V1)
    (tmp_path / "old" / "more").write_bytes(b"9")
    assert not current(mark)
    put(tmp_path, "s3://b/m", V1)
    (tmp_path / "model.bin").unlink()
    assert not current(mark)


def test_a_mount_point_is_filled_in_place() -> None:
    with small_disk() as disk:
        inode = disk.stat().st_ino
        put(disk, "s3://b/m", V1)
        put(disk, "s3://b/m", V2)

        assert {path: content for path, content in tree(disk).items() if path[0] != "."} == V2
        assert disk.stat().st_ino == inode


def test_a_folder_that_is_a_link_is_filled_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "models").symlink_to("volume")
    put(tmp_path / "models", "s3://b/m", V1)
    put(tmp_path / "volume", "s3://b/m", V2)

    assert tree(tmp_path / "volume") == V2
    assert os.readlink(tmp_path / "models") == "volume"


def test_who_was_killed_while_another_was_under_way_forgets_nothing(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", V1)
    with Place(str(tmp_path), "s3://b/other") as place:
        fill(place, {"other": b"0", "more": b"0"})
        _killed_after(3, tmp_path)
        place.publish()

    assert tree(tmp_path) == {**V2, "other": b"0", "more": b"0"}
    put(tmp_path, "s3://b/other", {"other": b"1"})
    put(tmp_path, "s3://b/m", {"x": b"1"})
    assert tree(tmp_path) == {"x": b"1", "other": b"1"}


def test_a_child_that_is_forked_meanwhile_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    def forking(*args: Any) -> None:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        children.append(child)

    with monkeypatch.context() as patch:
        patch.setattr(placing, "write_note", forking)
        put(tmp_path, "s3://b/m", V1)
    try:
        monkeypatch.setattr(placing, "_MOVE_TIMEOUT", 0.2)
        put(tmp_path, "s3://b/other", {"other": b"0"})
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_another_volume_in_the_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_bytes(b"0")
    monkeypatch.setattr(
        files, "is_mount_point", lambda path: str(path) == str(tmp_path / "adapter")
    )

    with pytest.raises(ObjectExistsError, match="another volume"):
        put(tmp_path, "s3://b/m", {"adapter/a": b"1"})
    put(tmp_path, "s3://b/m", V1)
    assert tree(tmp_path) == {**V1, "adapter/mine": b"0"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", V1)

    def fail() -> None:
        with Place(str(tmp_path), "s3://b/m") as place:
            fill(place, V2)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()

    assert tree(tmp_path) == V1
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.bin", "old"]


def _killed_after(moves: int, folder: Path) -> None:
    """Let a child publish V2 and die when it has made so many renames."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from storage.integrations.kserve import placing
        from tests.integrations.kserve.support import V2, fill

        folder, moves = sys.argv[1], int(sys.argv[2])
        rename, made = os.rename, 0

        def counted(*args):
            global made
            if made == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1
            rename(*args)

        with placing.Place(folder, "s3://b/m") as place:
            fill(place, V2)
            os.rename = counted
            place.publish("two")
        sys.exit(7)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder), str(moves)],
        env=child_environment({}),
        timeout=60,
        check=False,
    )
    assert child.returncode in (-signal.SIGKILL, 7)


@pytest.mark.parametrize("moves", [0, 1, 2, 4, 6, 7])
def test_a_process_killed_between_two_moves_is_made_up_for(moves: int, tmp_path: Path) -> None:
    put(tmp_path, "s3://b/other", {"other": b"0"})
    put(tmp_path, "s3://b/m", V1)
    _killed_after(moves, tmp_path)

    # Whoever comes next, for whatever source, finds one version or the other.
    put(tmp_path, "s3://b/other", {"other": b"1"})

    version = V1 if moves == 0 else V2
    assert tree(tmp_path) == {**version, "other": b"1"}
    assert all(not name.startswith(".") for name in os.listdir(tmp_path))
    put(tmp_path, "s3://b/m", {"x": b"1"})
    assert tree(tmp_path) == {"x": b"1", "other": b"1"}


def test_an_interrupt_between_two_moves_is_made_up_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "s3://b/m", V1)
    rename = os.rename
    made: list[object] = []

    def interrupted(source: Any, target: Any) -> None:
        made.append(source)
        if len(made) == 4:
            raise KeyboardInterrupt
        rename(source, target)

    with Place(str(tmp_path), "s3://b/m") as place:
        fill(place, V2)
        monkeypatch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            place.publish("two")

    assert tree(tmp_path) == V2
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.bin", "new"]


def test_a_move_that_fails_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "s3://b/m", V1)
    rename = os.rename

    def refused(source: Any, target: Any) -> None:
        if str(target).endswith("/new"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, Place(str(tmp_path), "s3://b/m") as place:
        fill(place, V2)
        patch.setattr(os, "rename", refused)
        with pytest.raises(DestinationError):
            place.publish("two")
    put(tmp_path, "s3://b/other", {"other": b"0"})

    assert tree(tmp_path) == {**V2, "other": b"0"}


def test_the_same_source_waits_and_another_does_not(tmp_path: Path) -> None:
    order: list[str] = []
    begun, other_ended = threading.Event(), threading.Event()

    def bring(source: str, pause: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with Place(str(tmp_path), source) as place:
                begun.set()
                order.append(f"{source} begins")
                pause()
                fill(place, {source: b"1"})
                place.publish()
                order.append(f"{source} ends")
            if source == "b":
                other_ended.set()

        return run

    def wait() -> None:
        other_ended.wait(60)
        # Who does not wait for this one would begin by now.
        time.sleep(0.2)

    first = threading.Thread(target=bring("a", wait))
    first.start()
    begun.wait()
    others = [threading.Thread(target=bring(name, bool)) for name in ("a", "b")]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join()

    assert order.index("b ends") < order.index("a ends")
    assert [entry for entry in order if entry[0] == "a"] == ["a begins", "a ends"] * 2
    assert tree(tmp_path) == {"a": b"1", "b": b"1"}


def test_what_a_dead_process_left_goes_and_what_a_living_one_needs_stays(tmp_path: Path) -> None:
    dead = tmp_path / f".modelstorage.{'0' * 16}"
    alive = tmp_path / f".modelstorage.{'1' * 16}"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model").write_bytes(b"1")
    descriptor = os.open(alive, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        put(tmp_path, "s3://b/m", {"a": b"1"})
    finally:
        os.close(descriptor)

    assert sorted(os.listdir(tmp_path)) == [alive.name, "a"]


def test_what_can_be_gone_on_with_is_kept_for_the_same_source(tmp_path: Path) -> None:
    def fail() -> None:
        with Place(str(tmp_path), "s3://b/m") as place:
            os.mkdir(place.path(f".model.{'a' * 16}.partial"))
            Path(place.path("scrap")).touch()
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()

    (staging,) = os.listdir(tmp_path)
    assert os.listdir(tmp_path / staging) == [f".model.{'a' * 16}.partial"]
    with Place(str(tmp_path), "s3://b/m") as place:
        assert os.path.isdir(place.path(f".model.{'a' * 16}.partial"))
        os.rmdir(place.path(f".model.{'a' * 16}.partial"))
        fill(place, {"a": b"1"})
        place.publish()
    assert os.listdir(tmp_path) == ["a"]
