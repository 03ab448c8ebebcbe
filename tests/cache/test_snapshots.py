"""The files of a model in one folder: built in one step, and looked at before each use."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.cache.cache import Root
from storage.cache.manifests import Manifest, ManifestFile
from storage.digest import hash_file
from tests.cache.boots import reboot

PROGRAM = b"#!/bin/sh\necho yes\n"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "cache"))


def keep(root: Root, path: str, data: bytes, *, executable: bool = False) -> ManifestFile:
    """Make content a blob of a cache, and return the file that it is in a model."""
    os.makedirs(root.path, exist_ok=True)
    new = os.path.join(root.path, "new")
    Path(new).write_bytes(data)
    digest = hash_file(new, ("blake3",))["blake3"]
    root.blobs.add(new, digest, len(data), durable=False)
    return ManifestFile(path, len(data), digest, (), executable)


def model(root: Root) -> Manifest:
    """Return a model with everything in it that there may be."""
    return Manifest(
        True,
        (
            keep(root, "model.bin", b"weights"),
            keep(root, "deep/er/config.json", b"{}"),
            keep(root, "bin/run", PROGRAM, executable=True),
            keep(root, "bin/script", PROGRAM),
            keep(root, "zero", b""),
        ),
        (("latest", "model.bin"), ("bin/up", "../deep"), ("nowhere", "gone")),
        ("empty", "deep/hollow"),
    )


def assert_right(folder: str | Path) -> None:
    folder = Path(folder)
    assert (folder / "model.bin").read_bytes() == b"weights"
    assert (folder / "deep/er/config.json").read_bytes() == b"{}"
    assert (folder / "bin/run").read_bytes() == (folder / "bin/script").read_bytes() == PROGRAM
    assert (folder / "zero").read_bytes() == b""
    assert (folder / "bin/run").stat().st_mode & 0o111 == 0o111
    assert (folder / "bin/script").stat().st_mode & 0o111 == 0
    for name in ("model.bin", "bin/run", "bin/script"):
        assert (folder / name).stat().st_mode & 0o222 == 0
    links = {name: os.readlink(folder / name) for name in ("latest", "bin/up", "nowhere")}
    assert links == {"latest": "model.bin", "bin/up": "../deep", "nowhere": "gone"}
    assert os.listdir(folder / "empty") == os.listdir(folder / "deep/hollow") == []
    assert sorted(os.listdir(folder)) == [
        *("bin", "deep", "empty", "latest", "model.bin", "nowhere", "zero")
    ]
    assert sorted(os.listdir(folder / "bin")) == ["run", "script", "up"]
    assert sorted(os.listdir(folder / "deep")) == ["er", "hollow"]


@pytest.fixture(params=["links", "copies"])
def built(root: Root, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A model with its snapshot; also where the file system has no links but those of archives."""
    manifest = model(root)
    if request.param == "copies":
        forbid_links(monkeypatch, errno.EPERM, only_to="blobs")
    root.snapshots.build(manifest)
    return manifest


def forbid_links(patch: pytest.MonkeyPatch, code: int, only_to: str = "") -> None:
    """Let symbolic links fail with ``code`` as on a file system without them."""
    real = os.symlink

    def symlink(target: str, path: str, *options: Any) -> None:
        if only_to in str(target):
            raise OSError(code, os.strerror(code), path)
        real(target, path, *options)

    patch.setattr(os, "symlink", symlink)


# -- building ------------------------------------------------------------------------------


def test_a_snapshot_has_everything_that_its_model_has(root: Root, built: Manifest) -> None:
    assert root.snapshots.path(built) == root.layout.snapshot(built.id)
    assert_right(root.snapshots.path(built))
    assert root.snapshots.is_whole(built)
    assert os.listdir(root.layout.partial) == []


def test_files_are_links_and_programs_are_copies(root: Root) -> None:
    manifest = model(root)
    folder = Path(root.snapshots.build(manifest))
    links = {"model.bin", "deep/er/config.json", "bin/script", "zero"}
    for file in manifest.files:
        path = folder / file.path
        assert path.is_symlink() == (file.path in links)
        blob = root.blobs.path(file.digest)
        assert os.path.samefile(path, blob) == (file.path in links)
        if path.is_symlink():
            assert not os.path.isabs(os.readlink(path))


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL], ids=os.strerror
)
def test_where_no_links_are_there_are_copies(
    root: Root, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    manifest = Manifest(True, (keep(root, "a", b"1"), keep(root, "b/c", b"2")))
    forbid_links(monkeypatch, code)
    folder = Path(root.snapshots.build(manifest))
    assert not (folder / "a").is_symlink()
    assert ((folder / "a").read_bytes(), (folder / "b/c").read_bytes()) == (b"1", b"2")
    assert root.snapshots.is_whole(manifest)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_another_error_is_one_and_leaves_nothing(
    root: Root, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    manifest = model(root)
    forbid_links(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        root.snapshots.build(manifest)
    assert not os.path.exists(root.layout.snapshot(manifest.id))
    assert os.listdir(root.layout.partial) == []


def test_a_single_file_keeps_its_name(root: Root) -> None:
    manifest = Manifest(False, (keep(root, "model.bin", b"weights"),))
    path = root.snapshots.build(manifest)
    assert path == root.snapshots.path(manifest)
    assert os.path.basename(path) == "model.bin"
    assert Path(path).read_bytes() == b"weights"
    assert root.snapshots.is_whole(manifest)


def test_a_blob_of_a_lower_cache_is_linked_by_its_whole_path(root: Root, tmp_path: Path) -> None:
    lower = Root(str(tmp_path / "lower"), read_only=True)
    there = keep(lower, "there", b"lower")
    upper = Root(root.path, [lower])
    manifest = Manifest(True, (keep(upper, "here", b"upper"), there))
    folder = Path(upper.snapshots.build(manifest))
    assert os.readlink(folder / "there") == lower.blobs.path(there.digest)
    assert os.readlink(folder / "here").startswith("../../blobs/")
    assert (folder / "there").read_bytes() == b"lower"
    assert upper.snapshots.is_whole(manifest)
    # As soon as it is in the upper one, that is where a link has to lead.
    keep(upper, "there", b"lower")
    assert not upper.snapshots.is_whole(manifest)
    upper.snapshots.build(manifest)
    assert upper.snapshots.is_whole(manifest)
    shutil.rmtree(lower.path)
    assert (folder / "there").read_bytes() == b"lower"


def test_a_cache_can_be_moved(root: Root, built: Manifest, tmp_path: Path) -> None:
    os.rename(root.path, tmp_path / "moved")
    moved = Root(str(tmp_path / "moved"))
    assert moved.snapshots.is_whole(built)
    assert_right(moved.snapshots.path(built))


# -- what is not right ---------------------------------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def relink(path: Path, target: str | Path) -> None:
    path.unlink()
    path.symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "a file is missing": lambda folder: (folder / "model.bin").unlink(),
    "an inner file is missing": lambda folder: (folder / "deep/er/config.json").unlink(),
    "an inner folder is missing": lambda folder: shutil.rmtree(folder / "deep/er"),
    "an empty folder is missing": lambda folder: (folder / "empty").rmdir(),
    "a link is missing": lambda folder: (folder / "bin/up").unlink(),
    "a program is missing": lambda folder: (folder / "bin/run").unlink(),
    "an extra file": lambda folder: (folder / "extra").write_bytes(b"mine"),
    "an extra inner file": lambda folder: (folder / "deep/er/extra").write_bytes(b"mine"),
    "an extra folder": lambda folder: (folder / "deep/extra").mkdir(),
    "an extra link": lambda folder: (folder / "extra").symlink_to("model.bin"),
    "something in an empty folder": lambda folder: (folder / "empty/x").write_bytes(b""),
    "a file is another": lambda folder: rewrite(folder / "model.bin", b"weightX"),
    "a file is a copy": lambda folder: rewrite(folder / "model.bin", b"weights"),
    "a file leads elsewhere": lambda folder: relink(folder / "model.bin", "/etc/passwd"),
    "a file leads to another": lambda folder: relink(folder / "model.bin", "zero"),
    "a file is a folder": lambda folder: (
        (folder / "zero").unlink(),
        (folder / "zero").mkdir(),
    ),
    "a link leads elsewhere": lambda folder: relink(folder / "latest", "zero"),
    "a link is a file": lambda folder: rewrite(folder / "latest", b"weights"),
    "an empty folder is a file": lambda folder: (
        (folder / "empty").rmdir(),
        (folder / "empty").write_bytes(b""),
    ),
    "an inner folder is a link": lambda folder: (
        (folder / "deep").rename(folder.parent / "away"),
        (folder / "deep").symlink_to("../away"),
    ),
    "all of it is a link": lambda folder: (
        folder.rename(folder.parent / "away"),
        folder.symlink_to("away"),
    ),
    "all of it is a file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")),
    "a program was written to": lambda folder: (
        (folder / "bin/run").chmod(0o755),
        (folder / "bin/run").write_bytes(PROGRAM[::-1]),
    ),
    "a program was cut": lambda folder: (
        (folder / "bin/run").chmod(0o755),
        os.truncate(folder / "bin/run", 3),
    ),
    "a program is a link": lambda folder: relink(folder / "bin/run", "script"),
    "a file was written to, or its blob": lambda folder: (
        (folder / "model.bin").chmod(0o644),
        (folder / "model.bin").write_bytes(b"weightX"),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_it_was_built_is_built_anew(root: Root, built: Manifest, name: str) -> None:
    folder = Path(root.snapshots.path(built))
    is_link = (folder / "model.bin").is_symlink()
    CHANGES[name](folder)
    if name == "a file was written to, or its blob" and is_link:
        # That is found where blobs are looked at.
        assert root.blobs.settle(built.files[0].digest, 7).value == "damaged"
        keep(root, "model.bin", b"weights")
    else:
        assert not root.snapshots.is_whole(built)
        root.snapshots.build(built)
    assert root.snapshots.is_whole(built)
    assert_right(folder)
    assert os.listdir(root.layout.partial) == []


def test_copies_that_were_not_synced_are_made_anew_after_another_boot(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = model(root)
    root.snapshots.build(manifest)
    reboot(monkeypatch)
    assert not root.snapshots.is_whole(manifest)
    root.snapshots.build(manifest, durable=True)
    reboot(monkeypatch)
    assert root.snapshots.is_whole(manifest)


# -- publishing ----------------------------------------------------------------------------


@pytest.mark.parametrize("can_exchange", [True, False])
def test_one_that_is_wrong_is_replaced_as_a_whole(
    root: Root, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    manifest = model(root)
    folder = Path(root.snapshots.build(manifest))
    (folder / "extra").write_bytes(b"mine")
    if not can_exchange:
        monkeypatch.setattr("storage.cache.snapshots.exchange", lambda left, right: False)
    with open(folder / "model.bin", "rb") as reading:
        root.snapshots.build(manifest)
        # Whoever has a file of the old one open goes on with it.
        assert reading.read() == b"weights"
    assert_right(folder)
    assert os.listdir(root.layout.partial) == []


def test_of_two_that_build_the_same_the_first_one_stays(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = model(root)
    real = os.rename

    def rename(source: str, target: str) -> None:
        if target == root.layout.snapshot(manifest.id) and not os.path.exists(target):
            monkeypatch.setattr(os, "rename", real)
            Root(root.path).snapshots.build(manifest)
            monkeypatch.setattr(os, "rename", rename)
            first.append(os.stat(target).st_ino)
        real(source, target)

    first: list[int] = []
    monkeypatch.setattr(os, "rename", rename)
    folder = root.snapshots.build(manifest)
    assert [os.stat(folder).st_ino] == first
    assert_right(folder)
    assert os.listdir(root.layout.partial) == []
