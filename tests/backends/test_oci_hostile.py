"""Registries and images that are made to do harm, and processes that fork."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.backends.base import OpenOptions
from storage.backends.oci import content
from storage.backends.oci.workspace import Workspace
from storage.config import OCIConfig
from storage.errors import ConfigurationError, InvalidInput, StorageError
from storage.unpacking.extraction import ExtractionLimits
from tests.backends.oci_support import TITLE, Entry, Pusher, opened, tree_of
from tests.servers.registry import Registry


@pytest.fixture
def push(oci_registry: Registry, prefix: str) -> Pusher:
    """A repository of its own."""
    return Pusher.of(oci_registry, prefix)


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The place for temporary files, where nothing stays."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        return os.fork()


def test_a_bomb_of_links_to_folders_is_refused(
    push: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "ExtractionLimits", lambda: ExtractionLimits(entries=2000))
    layer = [Entry("models", folder=True), Entry("models/f30", folder=True)]
    for n in reversed(range(30)):  # two to the power of thirty folders, all of them empty
        layer.append(Entry(f"models/f{n:02}", folder=True))
        layer += [Entry(f"models/f{n:02}/{name}", link=f"../f{n + 1:02}") for name in "ab"]
    push.image("v1", [layer], "gzip")

    with (
        opened(push.uri(":v1"), OCIConfig()) as backend,
        pytest.raises(InvalidInput, match="more than 2000"),
    ):
        tree_of(backend)


@pytest.mark.parametrize("name", ["../evil", "/evil", "./../evil", "a/../../evil", "a/./evil"])
def test_a_file_that_leads_elsewhere_is_refused(push: Pusher, tmp_path: Path, name: str) -> None:
    kind = "application/octet-stream"
    layers = [push.blob(b"x", kind, **{TITLE: title}) for title in (name, "z")]
    push.artifact("v1", layers)

    with StorageClient() as client, pytest.raises(StorageError):
        client.download(push.uri(":v1"), tmp_path / "a" / "m")
    assert not list(tmp_path.rglob("evil"))


def test_two_contents_of_one_name_are_refused(push: Pusher, tmp_path: Path) -> None:
    kind = "application/octet-stream"
    push.artifact("v1", [push.blob(data, kind, **{TITLE: "m"}) for data in (b"1", b"2")])

    with StorageClient() as client, pytest.raises(StorageError):
        client.download(push.uri(":v1"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_forked_child_has_connections_and_files_of_its_own(push: Pusher) -> None:
    push.image("v1", [[Entry("models", folder=True), ("models/m", b"model")]], "gzip")
    with opened(push.uri(":v1"), OCIConfig()) as backend:
        assert [info.key for info in backend.list()] == ["m"]
        session = backend.session._connections._session()
        gone, close = os.pipe()
        pid = fork()
        if pid == 0:
            status = 1
            try:
                os.close(close)
                os.read(gone, 1)  # until the parent has removed its files
                with backend.read("m") as body:
                    same = b"".join(map(bytes, body)) == b"model"
                other = backend.session._connections._session() is not session
                status = 0 if same and other else 2
                backend.close()
            finally:
                os._exit(status)
        os.close(gone)
    os.close(close)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_folder_that_is_being_swept_is_not_taken(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    made: list[tuple[str, int]] = []
    plain = tempfile.mkdtemp

    def mkdtemp(**options: Any) -> str:
        path = plain(**options)
        if not made:  # another process found it before it was locked
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            made.append((path, lock))
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    workspace = Workspace()
    ((swept, lock),) = made
    assert workspace.path != swept
    os.close(lock)
    os.rmdir(swept)
    workspace.close()


def test_a_port_that_is_none_is_said() -> None:
    from storage.backends.oci.session import RegistrySession

    session = RegistrySession("h.example:99999", "m", None, OpenOptions())
    with pytest.raises(ConfigurationError, match="not a plain URL"):
        session.ask("GET", session.manifest_url("v1"), "oci://h.example:99999/m")
