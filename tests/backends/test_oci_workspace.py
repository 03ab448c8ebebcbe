"""The folder for layers: gone at the end, whatever the end is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from storage.backends.oci.workspace import Workspace
from storage.errors import DestinationError


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The place for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_it_is_private_and_gone_when_closed(temporary: Path) -> None:
    workspace = Workspace()
    Path(workspace.path, "layer").write_bytes(b"1")
    assert os.stat(workspace.path).st_mode & 0o077 == 0
    workspace.close()
    workspace.close()
    assert os.listdir(temporary) == []


def test_it_is_gone_when_nobody_has_it_any_more(temporary: Path) -> None:
    workspace = Workspace()
    assert os.listdir(temporary)
    del workspace
    assert os.listdir(temporary) == []


def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(temporary: Path) -> None:
    code = (
        "import sys, time, tempfile\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "from storage.backends.oci.workspace import Workspace\n"
        "workspace = Workspace()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(temporary)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    (theirs,) = os.listdir(temporary)
    own = Workspace()
    assert set(os.listdir(temporary)) == {theirs, os.path.basename(own.path)}
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    other = Workspace()
    assert set(os.listdir(temporary)) == {os.path.basename(one.path) for one in (own, other)}
    own.close()
    other.close()


def test_no_place_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(DestinationError, match="TMPDIR"):
        Workspace()


# Newer Pythons warn where threads of earlier tests are left.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_takes_nothing_from_its_parent(temporary: Path) -> None:
    workspace = Workspace()
    pid = os.fork()
    if pid == 0:
        workspace.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.path.isdir(workspace.path)
    workspace.close()
    assert os.listdir(temporary) == []
