"""A copy through this machine holds a part of the object, never all of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.facade.stores import s3_config
from tests.servers import SeaweedFS

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
SIZE = 400 * MIB
COPY = """
import sys
from storage import S3Config, StorageOperations
source, target, access, secret, endpoint, driver = sys.argv[1:]
config = S3Config(access, secret, endpoint_url=endpoint, driver=driver)
options = {"config": config} if source.startswith("s3:") else {"dest_config": config}
StorageOperations.copy_object(source, target, **options)
# Not ru_maxrss, which begins with that of the process that started this one.
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A file of more bytes than a copy may hold, and its SHA-256."""
    path = tmp_path_factory.mktemp("large") / "model.bin"
    hasher = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(SIZE // MIB):
            block = os.urandom(MIB)
            hasher.update(block)
            file.write(block)
    yield path, hasher.hexdigest()
    path.unlink()


@pytest.mark.parametrize(("driver", "limit"), [("obstore", 160), ("fsspec", 240)])
def test_peak_memory_does_not_depend_on_the_size(
    seaweedfs: SeaweedFS,
    seaweedfs_bucket: str,
    source: tuple[Path, str],
    tmp_path: Path,
    driver: str,
    limit: int,
) -> None:
    config = s3_config(seaweedfs, driver)
    path, digest = source
    place = f"s3://{seaweedfs_bucket}"

    def copy(origin: str, target: str) -> int:
        keys = [seaweedfs.access_key, seaweedfs.secret_key, str(config.endpoint_url), driver]
        done = subprocess.run(
            [sys.executable, "-c", COPY, origin, target, *keys],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    peaks = [
        copy(str(path), f"{place}/one"),
        # The digest makes the bytes come by, out of the store and into it at once.
        copy(f"{place}/one#sha256={digest}", f"{place}/two"),
        copy(f"{place}/two", str(tmp_path / "back")),
    ]
    with open(tmp_path / "back", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    (tmp_path / "back").unlink()
    assert max(peaks) <= limit, f"MiB resident at most: {peaks}"
