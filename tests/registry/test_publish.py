"""Publishing: in one pass, without what is there already; what is refused, and pending versions."""

from __future__ import annotations

import os
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    Progress,
    StorageClient,
)
from storage.digest import hash_file
from storage.registry import (
    ModelRegistry,
    PendingVersion,
    documents,
    layout,
)
from storage.registry.documents import content_id
from tests.facade.stores import MemoryStore
from tests.registry.conftest import MakeFolder

FILES = {"model.bin": b"weights", "config/params.json": b"{}", "empty": b""}


def keys(registry: ModelRegistry, prefix: str) -> list[str]:
    return registry.store.names(prefix)


# -- what is published -----------------------------------------------------------------------


def test_a_version_names_its_files_and_their_digests(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    source = folder(FILES)
    version = here.push("iris", source)
    for file in version.files:
        digests = hash_file(source / file.path, ("blake3", "sha256"))
        assert file.digests == tuple(digests.values())
        assert file.size == len(FILES[file.path])
        assert here.store.read(file.name) == FILES[file.path]
    assert version.content == content_id(version.files)
    assert version.size == sum(map(len, FILES.values()))


def test_a_single_file_is_a_tree_of_one(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder(FILES) / "model.bin")
    assert [file.path for file in version.files] == ["model.bin"]
    assert here.push("iris", folder({"model.bin": b"weights"})) == version


def test_patterns_choose_the_files(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder(FILES), allow_patterns="*.bin")
    assert [file.path for file in version.files] == ["model.bin"]
    with pytest.raises(InvalidInput, match="holds no file"):
        here.push("iris", folder(FILES), ignore_patterns="*")


def test_the_same_content_is_uploaded_once(here: ModelRegistry, folder: MakeFolder) -> None:
    version = here.push("iris", folder({"a": b"same", "b": b"same", "c/d": b"same"}))
    assert len(version.files) == 3
    assert len(keys(here, layout.BLOBS)) == 1


def test_progress_counts_each_content_once(here: ModelRegistry, folder: MakeFolder) -> None:
    seen: list[Progress] = []
    here.push("iris", folder({"a": b"x" * 1000}))
    here.push("iris", folder({"a": b"x" * 1000, "b": b"y" * 50}), progress=seen.append)
    last = seen[-1]
    assert last.finished
    assert (last.bytes_done, last.bytes_total, last.bytes_present) == (1050, 1050, 1000)
    assert (last.objects_done, last.objects_total) == (2, 2)


def test_a_parent_has_to_be_there(here: ModelRegistry, folder: MakeFolder) -> None:
    with pytest.raises(ModelMissingError, match="no version of a model 'iris'"):
        here.push("iris", folder(FILES), parent=1)
    version = here.push("iris", folder(FILES), parent="hf://owner/base")
    assert here.find("iris").parent == version.parent == "hf://owner/base"


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".hidden", "-x", "dot.", "a b", "ü", "x" * 201, "a\n"]
)
def test_names_that_not_every_store_keeps_are_refused(
    here: ModelRegistry, folder: MakeFolder, name: str
) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of a model"):
        here.push(name, folder(FILES))
    assert keys(here, "") == [layout.MARKER]


def test_a_large_file_is_never_in_memory(here: ModelRegistry, tmp_path: Path) -> None:
    source = tmp_path / "large.bin"
    with open(source, "wb") as file:
        for index in range(64):
            file.write(bytes([index]) * 1024 * 1024)
    tracemalloc.start()
    try:
        here.push("iris", source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize("add", [False, True])
def test_what_is_too_much_to_be_written_down_is_refused_before_a_byte_is_sent(
    here: ModelRegistry, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, add: bool
) -> None:
    source = folder({f"{index:03}": b"%d" % index for index in range(100)})
    elsewhere = ModelRegistry(MemoryStore().base, client=here.client)
    elsewhere.init()
    version = elsewhere.push("iris", source)
    commit = elsewhere.store.read(layout.entry(layout.content_log("iris", version.content), 1))
    assert commit is not None
    with here.begin("iris") as pending:
        before = here.store.names("")
        monkeypatch.setattr(documents, "LONGEST", len(commit) - 1)
        publish_it = partial(pending.add if add else partial(here.push, "iris"), source)
        with pytest.raises(InvalidInput, match="many files in an archive"):
            publish_it()
        assert here.store.names("") == before
        # A number may be longer.
        monkeypatch.setattr(documents, "LONGEST", len(commit) + 20)
        pending.add(source)
        assert len(pending.commit().files) == 100


def test_a_blob_of_a_wrong_size_is_not_used(here: ModelRegistry, folder: MakeFolder) -> None:
    old = here.push("iris", folder(FILES))
    name = next(file.name for file in old.files if file.path == "model.bin")
    here.store.replace(name, b"wei")
    new = here.push("tulip", folder(FILES))
    assert {file.path: file.name for file in new.files}["model.bin"] != name


def test_what_is_published_in_a_folder_survives_a_power_cut(
    tmp_path: Path, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[tuple[int, int]] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(identity(os.fstat(descriptor)))

    def identity(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    monkeypatch.setattr(os, "fsync", noted)
    root = tmp_path / "registry"
    with StorageClient() as client:
        registry = ModelRegistry(root, client=client)
        registry.init()
        registry.push("iris", folder(FILES))
        registry.set_alias("iris", "production")
        there = [path for path in root.rglob("*") if path.name != layout.UPLOADS.rstrip("/")]
        assert len(there) > 20
        assert [path for path in there if identity(path.stat()) not in synced] == []
        # What somebody else has put there and not synced yet is synced before it is relied upon.
        synced.clear()
        registry.push("iris", folder(FILES))
        assert identity((root / layout.versions("iris")).stat()) in synced
        registry.push("tulip", folder(FILES))
        blobs = {path.parent for path in (root / layout.BLOBS).rglob("*") if path.is_file()}
        assert [path for path in blobs if identity(path.stat()) not in synced] == []


# -- pending versions ------------------------------------------------------------------------


def test_a_pending_version_is_seen_as_pending_alone(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    with here.begin("iris", description="checked") as pending:
        pending.add(folder(FILES))
        pending.add(folder({"card.md": b"#"}), "docs/")
        assert [(each.id, each.model) for each in here.pending()] == [(pending.id, "iris")]
        assert here.models() == []
        assert here.numbers("iris") == []
        version = pending.commit()
    assert here.pending() == []
    assert here.show("iris") == version
    assert [file.path for file in version.files] == sorted([*FILES, "docs/card.md"])
    assert version.upload == pending.id


def test_a_pending_version_that_is_left_is_gone(here: ModelRegistry, folder: MakeFolder) -> None:
    source = folder(FILES)

    def fail() -> None:
        with here.begin("iris") as begun:
            left.append(begun)
            begun.add(source)
            raise KeyboardInterrupt

    left: list[PendingVersion] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert here.pending() == []
    assert here.models() == []
    with pytest.raises(InvalidInput, match="committed or aborted"):
        left[0].commit()


def test_a_pending_version_with_content_that_exists_is_that_version(
    here: ModelRegistry, folder: MakeFolder
) -> None:
    first = here.push("iris", folder(FILES))
    with here.begin("iris") as pending:
        pending.add(folder(FILES))
        version = pending.commit()
    assert version == first
    assert (first.is_new, version.is_new, here.find("iris").is_new) == (True, False, False)
    assert here.pending() == []
    assert here.numbers("iris") == [1]


def test_two_contents_at_one_path_are_refused(here: ModelRegistry, folder: MakeFolder) -> None:
    with here.begin("iris") as pending:
        pending.add(folder(FILES))
        with pytest.raises(InvalidInput, match="choose another path"):
            pending.add(folder({"model.bin": b"other"}))
        with pytest.raises(InvalidInput, match="a file and a folder at once"):
            pending.add(folder({"x": b""}), "model.bin")
        assert len(pending.commit().files) == len(FILES)


def test_a_version_without_files_is_refused(here: ModelRegistry) -> None:
    with here.begin("iris") as pending, pytest.raises(InvalidInput, match="needs files"):
        pending.commit()


@pytest.mark.parametrize("path", ["../up", "a\0b", "\ud800", "./a", "a//b"])
def test_a_folder_that_no_version_can_have_is_refused(
    here: ModelRegistry, folder: MakeFolder, path: str
) -> None:
    with here.begin("iris") as pending, pytest.raises(InvalidInput):
        pending.add(folder(FILES), path)
