"""A real model of 90 MB, up to a real server and down again, in every way there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import S3Config, Storage, StorageOperations
from tests.facade.stores import s3_config, sha256_of_files
from tests.servers import SeaweedFS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def expected(minilm: Path) -> dict[str, str]:
    """The files of the model as they are on disk."""
    found = sha256_of_files(minilm)
    assert len(found) > 10
    assert WEIGHTS in found
    assert any("/" in path for path in found)
    assert (minilm / WEIGHTS).stat().st_size > 80_000_000
    return found


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(seaweedfs: SeaweedFS, driver: str) -> S3Config:
    return s3_config(seaweedfs, driver)


@pytest.fixture
def uri(shared_bucket: str, prefix: str, config: S3Config) -> Iterator[str]:
    yield (uri := f"s3://{shared_bucket}/{prefix}/minilm")
    StorageOperations.delete_object(uri, config=config, recursive=True)


def test_through_the_facade(
    minilm: Path, expected: dict[str, str], uri: str, config: S3Config, out: Path
) -> None:
    assert Storage.upload(minilm, uri, config=config) is True
    assert StorageOperations.list_objects(uri, config=config) == sorted(expected)
    found = StorageOperations.get_object_metadata(f"{uri}/{WEIGHTS}", config=config)
    assert found["digests"]["sha256"] == expected[WEIGHTS]

    tree = Storage.download(uri, out / "model", config=config)
    assert tree == str(out / "model")
    assert sha256_of_files(tree) == expected
    # Over itself: as a whole, with nothing left beside it.
    assert Storage.download(uri, out / "model", config=config) == tree
    assert sha256_of_files(tree) == expected

    file = Storage.download(f"{uri}/{WEIGHTS}", out / "weights.bin", config=config)
    assert file == str(out / "weights.bin")
    pinned = f"{uri}/{WEIGHTS}#sha256={expected[WEIGHTS]}"
    assert Storage.download(pinned, out, config=config) == str(out / WEIGHTS)
    assert sorted(os.listdir(out)) == ["model", WEIGHTS, "weights.bin"]
    for path in (out / "weights.bin", out / WEIGHTS):
        assert sha256_of_files(out)[path.name] == expected[WEIGHTS]

    kept = Storage.download(uri, config=config)
    assert sha256_of_files(kept) == expected
    assert Storage.download(uri, config=config, offline=True) == kept


def test_what_one_driver_stores_the_other_reads(
    minilm: Path,
    expected: dict[str, str],
    uri: str,
    config: S3Config,
    driver: str,
    out: Path,
    seaweedfs: SeaweedFS,
) -> None:
    other = s3_config(seaweedfs, {"obstore": "fsspec", "fsspec": "obstore"}[driver])
    Storage.upload(minilm, uri, config=config)
    assert sha256_of_files(Storage.download(uri, out / "model", config=other)) == expected


def test_through_the_command(
    minilm: Path,
    expected: dict[str, str],
    uri: str,
    driver: str,
    seaweedfs: SeaweedFS,
    tmp_path: Path,
    out: Path,
) -> None:
    config = tmp_path / "store.toml"
    config.write_text(
        f'type = "s3"\naccess_key_id = "{seaweedfs.access_key}"\n'
        f'secret_access_key = "{seaweedfs.secret_key}"\n'
        f'endpoint_url = "{seaweedfs.endpoint}"\ndriver = "{driver}"\n'
    )

    def storage(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "storage.cli", *arguments, "--config", str(config)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert seaweedfs.secret_key not in done.stdout + done.stderr
        return done.stdout

    storage("upload", str(minilm), uri)
    assert storage("ls", uri).splitlines() == sorted(expected)
    assert storage("download", uri, "out/model") == f"{out}/model\n"
    assert sha256_of_files(out / "model") == expected
    assert storage("download", f"{uri}/{WEIGHTS}", "out/weights.bin") == f"{out}/weights.bin\n"
    assert sha256_of_files(out)["weights.bin"] == expected[WEIGHTS]
    report = json.loads(storage("stat", f"{uri}/{WEIGHTS}", "--json"))
    assert report["size"] == (minilm / WEIGHTS).stat().st_size
    assert report["digests"]["sha256"] == expected[WEIGHTS]
    kept = storage("download", uri, "--quiet").strip()
    assert sha256_of_files(kept) == expected
    assert sorted(os.listdir(out)) == ["model", "weights.bin"]
