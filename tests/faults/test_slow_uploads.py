"""Uploads over links on which a part takes longer than a store may be silent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage.client.client import StorageClient
from storage.config import S3Config, load_settings
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from tests.servers.seaweedfs import SeaweedFS

MIB = 1024 * 1024
# A part of 8 MiB on each of eight connections takes 8 seconds, four times as long as the store may
# be silent. What the system buffers of one connection, some megabytes, takes less.
SLOW = Link(delay=0.01, shared_rate=8 * MIB)
STALL = 2.0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[64 * MIB], [4 * MIB] * 16], ids=["parts", "objects"])
def test_an_upload_over_a_slow_link_is_no_stall(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
    sizes: list[int],
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for number, size in enumerate(sizes):
        (source / str(number)).write_bytes(os.urandom(size))
    settings = load_settings(transfer={"stall_timeout": STALL})
    with FaultProxy(seaweedfs.endpoint, link=SLOW, store="s3") as proxy:
        config = S3Config(
            access_key_id=seaweedfs.access_key,
            secret_access_key=seaweedfs.secret_key,
            endpoint_url=proxy.endpoint,
        )
        with StorageClient(config, settings) as client:
            client.upload(source, f"s3://{shared_bucket}/{prefix}slow/")
        sent = proxy.bytes_up
    for number in range(len(sizes)):
        key = f"{prefix}slow/{number}"
        assert seaweedfs.get_raw(shared_bucket, key) == (source / str(number)).read_bytes()
    # Other tests use the bucket too.
    pending = seaweedfs.pending_uploads(shared_bucket)
    assert not [key for key, _ in pending if key.startswith(prefix)]
    # What was sent before the link was known to be slow, and all of it once more.
    assert sent < 3 * sum(sizes)
