"""Publishing and pulling hold a part of a model in memory, never all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import SeaweedFS

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
SIZE = 256 * MIB
LIMIT = 160
PROGRAM = """
import sys
from storage import S3Config, StorageClient
from storage.registry import ModelRegistry
what, uri, path, access, secret, endpoint = sys.argv[1:]
with StorageClient(config=S3Config(access, secret, endpoint_url=endpoint)) as client:
    registry = ModelRegistry(uri, client=client)
    if what == "push":
        registry.init()
        registry.push("large", path)
    else:
        registry.pull("large", "latest", path, cache=what == "pull through the cache")
# Not ru_maxrss, which begins with that of the process that started this one.
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


def test_peak_memory_does_not_depend_on_the_size(
    seaweedfs: SeaweedFS, seaweedfs_bucket: str, tmp_path: Path
) -> None:
    source = tmp_path / "model.bin"
    with source.open("wb") as file:
        for _ in range(SIZE // MIB):
            file.write(os.urandom(MIB))

    def run(what: str, path: Path) -> int:
        keys = [seaweedfs.access_key, seaweedfs.secret_key, seaweedfs.endpoint]
        uri = f"s3://{seaweedfs_bucket}/registry"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, what, uri, str(path), *keys],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    peaks = {"push": run("push", source)}
    source.unlink()
    for what in ("pull", "pull through the cache"):
        peaks[what] = run(what, tmp_path / what)
        assert (tmp_path / what / "model.bin").stat().st_size == SIZE
    assert max(peaks.values()) <= LIMIT, f"MiB resident at most: {peaks}"
