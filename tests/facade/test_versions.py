"""Versions that a URI pins: ``?versionId=`` on a bucket that keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    S3Config,
    Storage,
    StorageClient,
    StorageOperations,
)
from tests.facade.stores import s3_config
from tests.servers import Moto

KEY = "m/model.bin"


@pytest.fixture
def versioned(moto: Moto) -> Iterator[str]:
    with moto.bucket("versioned") as bucket:
        moto.raw.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        yield bucket


@pytest.fixture(params=["obstore", "fsspec"])
def config(request: pytest.FixtureRequest, moto: Moto) -> S3Config:
    return s3_config(moto, request.param)


@pytest.fixture
def versions(moto: Moto, versioned: str) -> list[str]:
    """Three versions of one object, "1" to "3"; their ids."""
    return [
        moto.raw.put_object(Bucket=versioned, Key=KEY, Body=body)["VersionId"]
        for body in (b"1" * 3_000_000, b"2" * 3_000_000, b"3" * 10)
    ]


def test_each_version_is_downloaded(
    versioned: str, versions: list[str], config: S3Config, small_parts: StorageClient, out: Path
) -> None:
    uri = f"s3://{versioned}/{KEY}"
    bodies = (b"1" * 3_000_000, b"2" * 3_000_000, b"3" * 10)
    assert Path(Storage.download(uri, out / "last", config=config)).read_bytes() == bodies[2]
    for version, body in zip(versions, bodies, strict=True):
        pinned = f"{uri}?versionId={version}"
        # Once in parts and once as a whole, into a folder and into the cache.
        path = small_parts.download(pinned, out / version, config=config)
        assert Path(path).read_bytes() == body
        kept = Storage.download(pinned, config=config)
        assert Path(kept).read_bytes() == body
        assert os.path.basename(kept) == "model.bin"
        assert Storage.download(pinned, config=config) == kept
        into = Storage.download(pinned, f"{out}/into/", config=config)
        assert into == str(out / "into" / "model.bin")
        assert Path(into).read_bytes() == body


def test_each_version_is_described_opened_and_copied(
    moto: Moto, versioned: str, versions: list[str], config: S3Config
) -> None:
    uri = f"s3://{versioned}/{KEY}"
    for number, version in enumerate(versions, 1):
        pinned = f"{uri}?versionId={version}"
        found = StorageOperations.get_object_metadata(pinned, config=config)
        assert found["version"] == version
        assert found["size"] == (10 if number == 3 else 3_000_000)
        assert StorageOperations.list_objects(pinned, config=config) == ["model.bin"]
        with Storage.open(pinned, config=config) as file:
            assert file.read(5) == b"%d" % number * 5
        copy = f"s3://{versioned}/copies/{number}"
        StorageOperations.copy_object(pinned, copy, config=config)
        assert moto.get_raw(versioned, f"copies/{number}")[:5] == b"%d" % number * 5
        spec = Storage.get_storage_spec(pinned)
        assert (spec["path"], spec["version"]) == (KEY, version)


def test_a_version_of_a_deleted_object_is_still_there(
    moto: Moto, versioned: str, versions: list[str], config: S3Config, out: Path
) -> None:
    moto.delete_raw(versioned, KEY)
    uri = f"s3://{versioned}/{KEY}"
    with pytest.raises(ModelMissingError):
        Storage.download(uri, out / "a", config=config)
    with pytest.raises(ModelMissingError):
        Storage.download(f"s3://{versioned}/m", out / "a", config=config)
    path = Storage.download(f"{uri}?versionId={versions[0]}", out / "b", config=config)
    assert Path(path).read_bytes() == b"1" * 3_000_000
    assert os.listdir(out) == ["b"]


def test_a_version_that_is_not_there_is_missing(
    moto: Moto, versioned: str, versions: list[str], config: S3Config, out: Path
) -> None:
    # Not the object below the name either: a version belongs to one object.
    moto.put_raw(versioned, f"{KEY}/child", b"child")
    other = moto.raw.put_object(Bucket=versioned, Key="other", Body=b"o")["VersionId"]
    for version in ("00000000-0000-0000-0000-000000000000", other):
        with pytest.raises(ModelMissingError):
            Storage.download(
                f"s3://{versioned}/{KEY}?versionId={version}", out / "a", config=config
            )
    assert os.listdir(out) == []


def test_versions_are_never_written(
    versioned: str, versions: list[str], config: S3Config, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(b"new")
    uri = f"s3://{versioned}/{KEY}?versionId={versions[0]}"
    for operation in (
        lambda: Storage.upload(tmp_path / "f", uri, config=config),
        lambda: Storage.open(uri, "wb", config=config),
        lambda: StorageOperations.delete_object(uri, config=config),
        lambda: StorageOperations.copy_object(f"s3://{versioned}/{KEY}", uri, config=config),
    ):
        with pytest.raises(InvalidInput, match="version"):
            operation()
    kept = StorageOperations.get_object_metadata(uri, config=config)
    assert kept["size"] == 3_000_000


@pytest.mark.parametrize("key", ["m/", ""])
def test_a_tree_has_no_version(versioned: str, config: S3Config, key: str) -> None:
    with pytest.raises(InvalidInput, match="tree"):
        Storage.download(f"s3://{versioned}/{key}?versionId=abc", config=config)


def test_a_pinned_version_with_a_digest(
    versioned: str, versions: list[str], config: S3Config
) -> None:
    import hashlib

    digest = hashlib.sha256(b"2" * 3_000_000).hexdigest()
    uri = f"s3://{versioned}/{KEY}?versionId={versions[1]}#sha256={digest}"
    assert Path(Storage.download(uri, config=config)).read_bytes() == b"2" * 3_000_000
