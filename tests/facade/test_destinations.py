"""Where a download appears: whole, under the name that was asked for, or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import (
    DestinationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    Storage,
    StorageError,
)
from tests.facade.stores import FileStore, Store, tree_bytes

V1 = {"model.bin": b"one", "config/params.json": b"{1}", "old/only-in-one": b"1"}
V2 = {"model.bin": b"two!", "config/params.json": b"{2}", "new/only-in-two": b"2"}
WRONG = "sha256:" + "0" * 64


@pytest.fixture
def models(make_store: Callable[[str], Store]) -> Store:
    """A store with two versions of a tree and one object."""
    store = make_store("memory")
    store.put_all({f"v1/{path}": data for path, data in V1.items()})
    store.put_all({f"v2/{path}": data for path, data in V2.items()})
    store.put_raw("model.bin", b"weights")
    return store


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# -- one object ------------------------------------------------------------------------------


def test_dest_of_an_object_is_its_own_path(store: Store, out: Path) -> None:
    store.put_raw("model.bin", b"weights")
    path = Storage.download(store.uri("model.bin"), out / "renamed.pt", config=store.config)
    assert path == str(out / "renamed.pt")
    assert tree_bytes(out) == {"renamed.pt": b"weights"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_existing_folder_means_into_it(store: Store, out: Path, slash: str) -> None:
    store.put_raw("deep/model.bin", b"weights")
    (out / "other").write_bytes(b"kept")
    path = Storage.download(store.uri("deep/model.bin"), f"{out}{slash}", config=store.config)
    assert path == str(out / "model.bin")
    assert tree_bytes(out) == {"model.bin": b"weights", "other": b"kept"}


def test_a_trailing_slash_means_into_a_folder_that_is_made(store: Store, out: Path) -> None:
    store.put_raw("model.bin", b"weights")
    path = Storage.download(store.uri("model.bin"), f"{out}/a/b/", config=store.config)
    assert path == str(out / "a/b/model.bin")
    assert tree_bytes(out) == {"a/b/model.bin": b"weights"}


def test_missing_parents_are_made(models: Store, out: Path) -> None:
    path = Storage.download(models.uri("model.bin"), out / "a" / "b" / "c")
    assert path == str(out / "a/b/c")
    assert tree_bytes(out) == {"a/b/c": b"weights"}


def test_a_file_is_replaced(models: Store, out: Path) -> None:
    (out / "model.bin").write_bytes(b"something much longer from before")
    assert Storage.download(models.uri("model.bin"), out) == str(out / "model.bin")
    assert tree_bytes(out) == {"model.bin": b"weights"}


def test_a_link_is_replaced_and_what_it_leads_to_stays(models: Store, out: Path) -> None:
    (out / "target").write_bytes(b"kept")
    (out / "link").symlink_to("target")
    Storage.download(models.uri("model.bin"), out / "link")
    assert tree_bytes(out) == {"target": b"kept", "link": b"weights"}
    assert not (out / "link").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_not_replaced_by_a_file(models: Store, out: Path, overwrite: bool) -> None:
    (out / "model.bin").mkdir()
    (out / "model.bin" / "mine").write_bytes(b"kept")
    with pytest.raises(ObjectExistsError):
        Storage.download(models.uri("model.bin"), out, overwrite=overwrite)
    assert tree_bytes(out) == {"model.bin/mine": b"kept"}
    assert os.listdir(out) == ["model.bin"]


def test_a_pipe_is_not_replaced(models: Store, out: Path) -> None:
    os.mkfifo(out / "pipe")
    with pytest.raises(ObjectExistsError):
        Storage.download(models.uri("model.bin"), out / "pipe")
    assert os.listdir(out) == ["pipe"]
    assert stat.S_ISFIFO(os.stat(out / "pipe").st_mode)


def test_relative_destinations_are_relative_to_the_working_folder(
    models: Store, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    assert Storage.download(models.uri("model.bin"), "a") == str(out / "a")
    assert Storage.download(models.uri("model.bin"), "folder/") == str(out / "folder/model.bin")
    assert Storage.download(models.uri("v1"), "tree") == str(out / "tree")
    assert Storage.download(models.uri("model.bin"), ".") == str(out / "model.bin")


@pytest.mark.parametrize("dest", ["", "a\0b", "s3://bucket/key", "file:///tmp/x", b"bytes"])
def test_what_is_no_local_path_is_refused(models: Store, dest: str) -> None:
    with pytest.raises(InvalidInput):
        Storage.download(models.uri("model.bin"), dest)


def test_a_destination_below_a_file_is_an_error(models: Store, out: Path) -> None:
    (out / "file").write_bytes(b"kept")
    for uri in (models.uri("model.bin"), models.uri("v1")):
        with pytest.raises(DestinationError):
            Storage.download(uri, out / "file" / "below")
    assert tree_bytes(out) == {"file": b"kept"}


def test_a_destination_with_a_name_that_is_too_long_is_an_error(models: Store, out: Path) -> None:
    with pytest.raises(StorageError):
        Storage.download(models.uri("model.bin"), out / ("n" * 256))
    # What is as long as a name may be has to leave room for nothing else.
    path = Storage.download(models.uri("model.bin"), out / ("n" * 255))
    assert Path(path).read_bytes() == b"weights"
    assert os.listdir(out) == ["n" * 255]


# -- a tree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_dest_of_a_tree_is_the_trees_own_path(store: Store, out: Path, slash: str) -> None:
    store.put_all({f"v1/{path}": data for path, data in V1.items()})
    path = Storage.download(store.uri("v1"), f"{out}/tree{slash}", config=store.config)
    assert path == str(out / "tree")
    assert tree_bytes(path) == V1
    assert os.listdir(out) == ["tree"]


def test_an_empty_folder_is_filled(models: Store, out: Path) -> None:
    assert Storage.download(models.uri("v1"), out) == str(out)
    assert tree_bytes(out) == V1


def test_missing_parents_of_a_tree_are_made(models: Store, out: Path) -> None:
    path = Storage.download(models.uri("v1"), out / "a" / "b" / "tree")
    assert tree_bytes(path) == V1
    assert os.listdir(out) == ["a"]


def test_no_file_of_an_older_version_survives(store: Store, out: Path) -> None:
    store.put_all({f"v1/{path}": data for path, data in V1.items()})
    store.put_all({f"v2/{path}": data for path, data in V2.items()})
    Storage.download(store.uri("v1"), out / "tree", config=store.config)
    path = Storage.download(store.uri("v2"), out / "tree", config=store.config)
    assert tree_bytes(path) == V2
    assert sorted(os.listdir(path)) == ["config", "model.bin", "new"]
    assert os.listdir(out) == ["tree"]


def test_the_same_tree_may_be_downloaded_again(models: Store, out: Path) -> None:
    for _ in range(3):
        assert tree_bytes(Storage.download(models.uri("v1"), out / "tree")) == V1


def test_a_foreign_folder_is_not_replaced(models: Store, out: Path) -> None:
    (out / "mine").write_bytes(b"precious")
    with pytest.raises(ObjectExistsError, match="overwrite=True") as caught:
        Storage.download(models.uri("v1"), out)
    assert isinstance(caught.value, FileExistsError)
    assert tree_bytes(out) == {"mine": b"precious"}


def test_overwrite_replaces_a_foreign_folder_as_a_whole(models: Store, out: Path) -> None:
    (out / "deep").mkdir()
    (out / "deep" / "mine").write_bytes(b"gone")
    assert Storage.download(models.uri("v1"), out, overwrite=True) == str(out)
    assert tree_bytes(out) == V1
    assert sorted(os.listdir(out)) == ["config", "model.bin", "old"]


def add_a_file(tree: Path) -> None:
    (tree / "notes.txt").write_bytes(b"mine")


def add_a_deep_file(tree: Path) -> None:
    (tree / "config" / "notes.txt").write_bytes(b"mine")


def add_an_empty_folder(tree: Path) -> None:
    (tree / "mine").mkdir()


def remove_a_file(tree: Path) -> None:
    (tree / "model.bin").unlink()


def grow_a_file(tree: Path) -> None:
    (tree / "model.bin").write_bytes(b"something of my own")


def put_a_link_in_place_of_a_file(tree: Path) -> None:
    (tree / "model.bin").unlink()
    (tree / "model.bin").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    "change",
    [
        add_a_file,
        add_a_deep_file,
        add_an_empty_folder,
        remove_a_file,
        grow_a_file,
        put_a_link_in_place_of_a_file,
    ],
)
def test_a_tree_that_its_user_changed_is_foreign(
    models: Store, out: Path, change: Callable[[Path], None]
) -> None:
    tree = Path(Storage.download(models.uri("v1"), out / "tree"))
    change(tree)
    before = tree_bytes(tree)
    with pytest.raises(ObjectExistsError):
        Storage.download(models.uri("v2"), tree)
    assert tree_bytes(tree) == before
    assert tree_bytes(Storage.download(models.uri("v2"), tree, overwrite=True)) == V2
    assert os.listdir(out) == ["tree"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_not_replaced_by_a_tree(models: Store, out: Path, overwrite: bool) -> None:
    (out / "file").write_bytes(b"kept")
    with pytest.raises(ObjectExistsError):
        Storage.download(models.uri("v1"), out / "file", overwrite=overwrite)
    assert tree_bytes(out) == {"file": b"kept"}


def test_a_tree_goes_where_a_link_to_a_folder_leads(models: Store, out: Path) -> None:
    (out / "real").mkdir()
    (out / "link").symlink_to("real")
    Storage.download(models.uri("v1"), out / "link")
    Storage.download(models.uri("v2"), out / "link")
    assert (out / "link").is_symlink()
    assert tree_bytes(out / "real") == V2
    assert sorted(os.listdir(out)) == ["link", "real"]


def test_neighbours_of_a_destination_stay(models: Store, out: Path) -> None:
    neighbours = {"tree-v2/x": b"1", ".tree/x": b"2", "tree.partial": b"3", ".hidden": b"4"}
    for path, data in neighbours.items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_bytes(data)
    Storage.download(models.uri("v1"), out / "tree")
    Storage.download(models.uri("v2"), out / "tree")
    found = tree_bytes(out)
    assert found == neighbours | {f"tree/{path}": data for path, data in V2.items()}


def test_what_is_published_has_the_modes_that_the_user_wants(models: Store, out: Path) -> None:
    tree = Path(Storage.download(models.uri("v1"), out / "tree"))
    file = Path(Storage.download(models.uri("model.bin"), out / "file"))
    kept = Path(Storage.download(models.uri("v1")))
    for folder in (tree, tree / "config", kept, kept / "config"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask()
    for path in (file, tree / "model.bin"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    # What several models may share is nobody's to change.
    assert stat.S_IMODE((kept / "model.bin").stat().st_mode) == 0o444 & ~umask()


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["v1", "model.bin"])
def test_a_failed_download_leaves_nothing(store: Store, out: Path, path: str) -> None:
    store.put_all({f"v1/{name}": data for name, data in V1.items()})
    store.put_raw("model.bin", b"weights")
    with pytest.raises(IntegrityError):
        Storage.download(store.uri(path), out / "a" / "b", config=store.config, digest=WRONG)
    assert os.listdir(out) == []
    with pytest.raises(ModelMissingError):
        Storage.download(store.uri("absent"), out / "a" / "b", config=store.config)
    assert os.listdir(out) == []


def test_a_failed_download_keeps_what_was_there(models: Store, out: Path) -> None:
    Storage.download(models.uri("v1"), out / "tree")
    Storage.download(models.uri("model.bin"), out / "file")
    models.put_raw("model.bin", b"new")
    for path, dest in (("v2", "tree"), ("model.bin", "file")):
        with pytest.raises(IntegrityError):
            Storage.download(models.uri(path), out / dest, digest=WRONG)
    assert tree_bytes(out / "tree") == V1
    assert (out / "file").read_bytes() == b"weights"
    assert sorted(os.listdir(out)) == ["file", "tree"]
    # It is still a tree of ours.
    assert tree_bytes(Storage.download(models.uri("v2"), out / "tree")) == V2


def test_an_interrupted_download_leaves_nothing(store: Store, out: Path) -> None:
    store.put_raw("tree/model.bin", bytes(3_000_000))

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    for path, dest in (("tree", out / "tree"), ("tree/model.bin", out / "deep" / "file")):
        with pytest.raises(KeyboardInterrupt):
            Storage.download(store.uri(path), dest, config=store.config, progress=interrupt)
        assert os.listdir(out) == []


@pytest.mark.parametrize("where", ["inside", "around"])
def test_a_source_and_a_destination_inside_one_another_are_refused(
    make_store: Callable[[str], Store], where: str
) -> None:
    store = make_store("file")
    assert isinstance(store, FileStore)
    store.put_all({f"tree/{path}": data for path, data in V1.items()})
    dest = {
        "inside": store.folder / "tree" / "below",
        "around": store.folder,
    }[where]
    before = tree_bytes(store.folder)
    with pytest.raises(InvalidInput):
        Storage.download(store.uri("tree"), dest, overwrite=True)
    assert tree_bytes(store.folder) == before


def test_a_tree_onto_itself_loses_nothing(make_store: Callable[[str], Store]) -> None:
    store = make_store("file")
    assert isinstance(store, FileStore)
    store.put_all({f"tree/{path}": data for path, data in V1.items()})
    tree = store.folder / "tree"
    assert Storage.download(store.uri("tree"), tree, overwrite=True) == str(tree)
    assert tree_bytes(tree) == V1
    with pytest.raises(InvalidInput):
        Storage.download(store.uri("tree"), tree, overwrite=True, allow_patterns="*.bin")
    assert tree_bytes(tree) == V1


def test_a_file_onto_itself_stays_whole(make_store: Callable[[str], Store]) -> None:
    store = make_store("file")
    assert isinstance(store, FileStore)
    store.put_raw("model.bin", b"weights")
    path = store.folder / "model.bin"
    for dest in (path, store.folder, f"{store.folder}/"):
        try:
            found = Storage.download(store.uri("model.bin"), dest)
        except InvalidInput:
            continue
        assert found == str(path)
    assert tree_bytes(store.folder) == {"model.bin": b"weights"}
