"""Folders to work in are removed, by whoever comes next if need be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.cache import owners
from storage.integrations.scratch import remove_dead, scratch

LEAVE = """
import os, signal, sys
from storage.integrations.scratch import scratch
with scratch(sys.argv[1]) as path:
    open(os.path.join(path, "some"), "w").write("part")
    os.chmod(path, 0o500)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave(folder: Path) -> None:
    """Let a killed process leave something there."""
    command = [sys.executable, "-c", LEAVE, str(folder)]
    path = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(command, env={"PYTHONPATH": path}, check=False, timeout=180)
    assert ended.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_folder_to_work_in_is_ones_own_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".modelstorage-notes").touch()
    with scratch(str(tmp_path)) as one, scratch(str(tmp_path)) as other:
        assert one != other
        Path(one, "some").touch()
        remove_dead(str(tmp_path))
        assert len(names(tmp_path)) == 3
    assert names(tmp_path) == [".modelstorage-notes"]
    with pytest.raises(KeyError), scratch(str(tmp_path)) as one:
        raise KeyError
    assert names(tmp_path) == [".modelstorage-notes"]


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    leave(tmp_path)
    assert len(names(tmp_path)) == 1
    with scratch(str(tmp_path)) as mine:
        assert names(tmp_path) == [os.path.basename(mine)]
    remove_dead(str(tmp_path / "absent"))


def test_what_another_machine_left_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = owners.current_owner()
    there = tmp_path / f".modelstorage-{'0' * 16}-{me.boot}-{me.namespace}-1-1-00000000"
    there.mkdir()
    remove_dead(str(tmp_path))
    assert there.exists()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    remove_dead(str(tmp_path))
    assert not there.exists()


def test_a_forked_child_removes_nothing(tmp_path: Path) -> None:
    place = scratch(str(tmp_path))
    path = place.__enter__()
    child = os.fork()
    if not child:
        try:
            place.__exit__(None, None, None)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.path.isdir(path)
    place.__exit__(None, None, None)
    assert names(tmp_path) == []
