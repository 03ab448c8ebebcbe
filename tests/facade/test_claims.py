"""Mounted claims, and schemes that only fsspec knows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage import (
    BucketMissingError,
    InvalidInput,
    PVCConfig,
    Storage,
    StorageError,
    StorageOperations,
)
from tests.facade.stores import tree_bytes


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """A mount root with a claim in it, and a secret beside the claim."""
    root = tmp_path / "mounts"
    (root / "claim" / "model").mkdir(parents=True)
    (root / "claim" / "model" / "f").write_bytes(b"weights")
    (root / "secret").write_bytes(b"secret")
    return root


def test_a_claim_is_where_the_config_says(mounts: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "f").write_bytes(b"moved")
    config = PVCConfig(mount_root=mounts, mounts={"other": elsewhere})
    assert Storage.is_local("pvc://claim/model")
    assert Storage.download("pvc://claim/model", config=config) == str(mounts / "claim/model")
    assert Storage.download("pvc://claim/model/f", config=config) == str(mounts / "claim/model/f")
    assert Storage.download("pvc://claim", config=config) == str(mounts / "claim")
    assert Storage.download("pvc://other/f", config=config) == str(elsewhere / "f")
    with pytest.raises(BucketMissingError, match="not-mounted"):
        Storage.download("pvc://not-mounted/f", config=config)


@pytest.mark.parametrize(
    "path", ["../secret", "model/../../secret", "..", "link-out", "link-out/", "folder-out/secret"]
)
def test_nothing_outside_of_a_claim_is_read(mounts: Path, out: Path, path: str) -> None:
    (mounts / "claim" / "link-out").symlink_to("../secret")
    (mounts / "claim" / "folder-out").symlink_to("..")
    config = PVCConfig(mount_root=mounts)
    for dest in (None, out / "a"):
        with pytest.raises(StorageError) as caught:
            Storage.download(f"pvc://claim/{path}", dest, config=config)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError):
        Storage.open(f"pvc://claim/{path}", config=config)
    assert os.listdir(out) == []


def test_a_tree_with_a_link_out_of_its_claim_is_refused(mounts: Path, out: Path) -> None:
    (mounts / "claim" / "model" / "link").symlink_to("../../secret")
    for dest in (None, out / "a"):
        with pytest.raises(InvalidInput, match="secret"):
            Storage.download("pvc://claim/model", dest, config=PVCConfig(mount_root=mounts))
    assert os.listdir(out) == []


@pytest.mark.parametrize("path", ["../secret", "folder-out/secret", "folder-out/new"])
def test_nothing_outside_of_a_claim_is_written(mounts: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "f").write_bytes(b"new")
    (mounts / "claim" / "folder-out").symlink_to("..")
    uri, config = f"pvc://claim/{path}", PVCConfig(mount_root=mounts)
    with pytest.raises(InvalidInput):
        Storage.upload(tmp_path / "f", uri, config=config)
    with pytest.raises(InvalidInput):
        StorageOperations.delete_object(uri, config=config)
    with pytest.raises(InvalidInput):
        StorageOperations.copy_object(tmp_path / "f", uri, dest_config=config)
    assert sorted(os.listdir(mounts)) == ["claim", "secret"]
    assert (mounts / "secret").read_bytes() == b"secret"


def test_a_scheme_of_fsspec_goes_both_ways(tmp_path: Path, out: Path) -> None:
    store = tmp_path / "store"
    source = tmp_path / "source"
    for path, data in {"f": b"1", "a b/%41 [1]#": b"2", "empty": b""}.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    uri = f"local://{store}/model"
    assert Storage.upload(source, uri) is True
    assert tree_bytes(store / "model") == tree_bytes(source)
    assert StorageOperations.list_objects(uri) == ["a b/%41 [1]#", "empty", "f"]
    assert tree_bytes(Storage.download(uri, out / "t")) == tree_bytes(source)
    assert Path(Storage.download(f"{uri}/f", out / "f")).read_bytes() == b"1"
    with pytest.raises(FileNotFoundError):
        Storage.download(f"{uri}/absent", out / "n")
    StorageOperations.copy_object(uri, out / "copy")
    assert tree_bytes(out / "copy") == tree_bytes(source)
    StorageOperations.delete_object(uri, recursive=True)
    assert tree_bytes(store) == {}
