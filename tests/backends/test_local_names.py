"""Local files: links, special files, names, and directories in the way."""

from __future__ import annotations

import inspect
import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from storage.backends.base import Backend, Payload, bytes_payload
from storage.backends.local.backend import LocalBackend
from storage.errors import (
    InvalidInput,
    ModelMissingError,
)
from tests.backends.directories import claim, files_in, read


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def backend(root: Path) -> LocalBackend:
    return LocalBackend(str(root))


@pytest.fixture(params=["file", "pvc"])
def either(request: pytest.FixtureRequest, root: Path) -> Backend:
    if request.param == "file":
        return LocalBackend(str(root))
    return claim(root.parent, root.name)


def test_links_inside_the_root_are_followed(either: Backend, root: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs/1").write_bytes(b"12345")
    (root / "snapshot").mkdir()
    (root / "snapshot/model.bin").symlink_to("../blobs/1")
    (root / "latest").symlink_to("snapshot")
    keys = {info.key: info.size for info in either.list()}
    assert keys == {"blobs/1": 5, "snapshot/model.bin": 5, "latest/model.bin": 5}
    assert read(either, "latest/model.bin") == b"12345"
    assert [info.key for info in either.list("latest/")] == ["latest/model.bin"]


def test_links_in_a_circle_end(either: Backend, root: Path) -> None:
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/model.bin").write_bytes(b"1")
    (root / "a/b/up").symlink_to("..")
    (root / "a/b/top").symlink_to(root)
    (root / "x").mkdir()
    (root / "x/to-y").symlink_to("../y")
    (root / "y").mkdir()
    (root / "y/to-x").symlink_to("../x")
    (root / "y/model.bin").write_bytes(b"1")
    assert [info.key for info in either.list()] == [
        "a/b/model.bin",
        "x/to-y/model.bin",
        "y/model.bin",
    ]


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "itself"])
def test_link_to_nowhere_makes_the_listing_fail(either: Backend, root: Path, target: str) -> None:
    (root / "link").symlink_to(target)
    with pytest.raises(InvalidInput, match="link"):
        list(either.list())


def test_dangling_link_is_no_object(either: Backend, root: Path) -> None:
    (root / "link").symlink_to("nowhere")
    with pytest.raises(ModelMissingError):
        either.stat("link")


@pytest.fixture
def escape(tmp_path: Path, root: Path) -> Path:
    """A directory beside the claim, and links into it."""
    outside = tmp_path / "root-outside"
    (outside / "tree").mkdir(parents=True)
    (outside / "secret").write_bytes(b"secret")
    (root / "file").symlink_to(outside / "secret")
    (root / "relative").symlink_to("../root-outside/secret")
    (root / "tree").symlink_to(outside)
    return outside


@pytest.mark.parametrize("key", ["file", "relative", "tree/secret", "tree/new/deep"])
def test_claim_is_not_left_through_links(
    tmp_path: Path, root: Path, escape: Path, key: str
) -> None:
    backend = claim(tmp_path, "root")
    (root / "own").write_bytes(b"1")
    calls: list[Callable[[], object]] = [
        lambda: backend.stat(key),
        lambda: backend.read(key),
        lambda: backend.local_path(key),
        lambda: backend.copy(key, "stolen"),
    ]
    if "/" in key:
        calls += [
            lambda: backend.write(key, bytes_payload(b"2")),
            lambda: backend.write(key, bytes_payload(b"2"), if_absent=True),
            lambda: backend.copy("own", key),
            lambda: backend.delete([key]),
            lambda: list(backend.list("tree/")),
        ]
    for call in calls:
        with pytest.raises(InvalidInput, match="out of"):
            call()
    with pytest.raises(InvalidInput, match="out of"):
        list(backend.list())
    assert files_in(escape) == {"secret"}
    assert (escape / "secret").read_bytes() == b"secret"
    assert not (root / "stolen").exists()


def test_write_and_delete_touch_the_link_and_not_its_target(
    either: Backend, root: Path, escape: Path
) -> None:
    either.write("file", bytes_payload(b"mine"))
    either.delete(["relative"])
    assert (escape / "secret").read_bytes() == b"secret"
    assert not (root / "file").is_symlink()
    assert (root / "file").read_bytes() == b"mine"
    assert not (root / "relative").is_symlink()


def test_lost_and_found_of_a_volume_is_no_model(tmp_path: Path, root: Path) -> None:
    for name in ("lost+found", "m/lost+found"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_bytes(b"1")
    backend = claim(tmp_path, "root")
    assert [info.key for info in backend.list()] == ["m/lost+found/file"]
    assert [info.key for info in LocalBackend(str(root)).list()] == [
        "lost+found/file",
        "m/lost+found/file",
    ]


def make_special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)
            try:  # the path of a socket is limited to about 100 bytes
                server.bind(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
    else:
        path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["pipe", "socket", "link-to-device"])
@pytest.mark.timeout(60)
def test_special_file_is_refused_and_never_opened(root: Path, kind: str) -> None:
    make_special(root / "special", kind)
    backend = LocalBackend(str(root))
    (root / "own").write_bytes(b"1")
    before = os.lstat(root / "special")
    calls: list[Callable[[], object]] = [
        lambda: backend.stat("special"),
        lambda: backend.read("special"),
        lambda: list(backend.list()),
        lambda: backend.copy("special", "copy"),
        lambda: backend.copy("own", "special"),
        lambda: backend.write("special", bytes_payload(b"1")),
        lambda: backend.write("special", bytes_payload(b"1"), if_absent=True),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match=r"a named pipe|a socket|a device"):
            call()
    after = os.lstat(root / "special")
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert files_in(root) == {"special", "own"}


def test_listing_goes_deeper_than_recursion(root: Path) -> None:
    # Frames are made scarce, rather than the tree deeper than its remover can follow.
    folder = root / "/".join(["d"] * 200)
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"1")
    backend = LocalBackend(str(root))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        [info] = backend.list()
    finally:
        sys.setrecursionlimit(limit)
    assert info.key == "d/" * 200 + "model.bin"


def test_names_that_are_not_utf_8_survive(backend: LocalBackend, root: Path) -> None:
    with open(os.fsencode(root) + b"/m\xff\xfe", "wb") as file:
        file.write(b"12345")
    [info] = backend.list()
    assert read(backend, info.key) == b"12345"
    backend.copy(info.key, "folder/" + info.key)
    assert os.path.exists(os.fsencode(root) + b"/folder/m\xff\xfe")


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "模" * 85], ids=["ascii", "two", "three"])
def test_name_of_255_bytes_is_written(backend: LocalBackend, root: Path, name: str) -> None:
    backend.write(name, bytes_payload(b"1"))
    backend.write(name, bytes_payload(b"2"), if_match=backend.stat(name))
    backend.write(f"m/{name}", bytes_payload(b"3"), if_absent=True)
    assert files_in(root) == {name, f"m/{name}"}


@pytest.mark.parametrize("key", ["n" * 256, "new/" + "n" * 256, "\ud800"])
def test_name_that_cannot_be_is_refused_and_leaves_nothing(
    backend: LocalBackend, root: Path, key: str
) -> None:
    with pytest.raises(InvalidInput):
        backend.write(key, bytes_payload(b"1"))
    assert not list(root.iterdir())


def test_name_too_long_to_exist_is_missing(backend: LocalBackend) -> None:
    with pytest.raises(ModelMissingError):
        backend.stat("n" * 256)
    assert list(backend.list("n" * 256 + "/")) == []
    backend.delete(["n" * 256])


def test_file_does_not_replace_a_directory(backend: LocalBackend, root: Path) -> None:
    (root / "m").mkdir()
    for options in ({}, {"if_absent": True}):
        with pytest.raises(InvalidInput, match="a directory"):
            backend.write("m", bytes_payload(b"1"), **cast(Any, options))
    assert (root / "m").is_dir()
    assert files_in(root) == set()


def test_file_is_not_made_a_directory(backend: LocalBackend, root: Path) -> None:
    (root / "m").write_bytes(b"1")
    with pytest.raises(InvalidInput, match="is a file"):
        backend.write("m/deep/a", bytes_payload(b"1"))
    with pytest.raises(ModelMissingError):
        backend.stat("m/deep/a")
    backend.delete(["m/deep/a"])
    assert files_in(root) == {"m"}


def test_delete_leaves_directories(backend: LocalBackend, root: Path) -> None:
    backend.write("m/deep/a", bytes_payload(b"1"))
    backend.delete(["m/deep/a", "m/deep"])
    assert (root / "m/deep").is_dir()
    assert list(backend.list("m/")) == []


def test_failed_write_takes_back_the_directories_it_made(backend: LocalBackend, root: Path) -> None:
    (root / "there").mkdir()

    def broken() -> BinaryIO:
        raise RuntimeError("no source")

    with pytest.raises(RuntimeError, match="no source"):
        backend.write("there/new/deep/a", Payload(broken, 5))
    assert list(root.iterdir()) == [root / "there"]
    assert not list((root / "there").iterdir())


def test_new_file_has_the_permissions_of_the_umask(backend: LocalBackend, root: Path) -> None:
    umask = os.umask(0o027)
    try:
        backend.write("a", bytes_payload(b"1"))
        backend.write("b", bytes_payload(b"1"), if_absent=True)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE((root / name).stat().st_mode) for name in "ab"} == {0o640}
