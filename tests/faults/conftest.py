"""Places for faulty transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

pytest.register_assert_rewrite(
    "tests.faults.examples",
    "tests.faults.harness",
    "tests.faults.proxy_support",
    "tests.faults.transfers",
)

from storage.backends import open_backend  # noqa: E402
from storage.backends.base import OpenOptions  # noqa: E402
from storage.uri import parse_uri  # noqa: E402
from tests.facade.stores import s3_config  # noqa: E402
from tests.faults.examples import Bucket, Folder, MemoryBucket, S3Bucket  # noqa: E402
from tests.faults.proxy_support import DATA  # noqa: E402
from tests.servers import OpenSeaweedFS, SeaweedFS  # noqa: E402
from tests.servers.nginx_http import NginxHTTP, put_file  # noqa: E402
from tests.servers.odd_http import OddHTTP, Reply  # noqa: E402


@pytest.fixture
def open_bucket(open_seaweedfs: OpenSeaweedFS) -> Iterator[str]:
    """An empty bucket of ``open_seaweedfs``, deleted after the test."""
    with open_seaweedfs.bucket(f"faults-{uuid4().hex}") as name:
        yield name


@pytest.fixture(scope="module")
def s3_bucket(seaweedfs: SeaweedFS) -> Iterator[S3Bucket]:
    """A bucket for all examples; each has a prefix of its own."""
    with seaweedfs.bucket(f"faulty-{uuid4().hex}") as name:
        location = parse_uri(f"s3://{name}/any")
        backend = open_backend(location, s3_config(seaweedfs, "obstore"), OpenOptions())
        yield S3Bucket(seaweedfs, name, backend)
        backend.close()


@pytest.fixture
def make_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Bucket]:
    """Call it with one of ``STORES`` to get a bucket; only S3's is not empty."""

    def make(store: str) -> Bucket:
        if store == "memory":
            return MemoryBucket()
        if store == "filesystem":
            folder = tmp_path / f"store-{uuid4().hex}"
            folder.mkdir()
            return Folder(folder)
        found: S3Bucket = request.getfixturevalue("s3_bucket")
        return found

    return make


@pytest.fixture
def server(nginx_http: NginxHTTP) -> NginxHTTP:
    """A server of files with ``DATA`` at ``/model.bin``."""
    put_file(nginx_http.data, "model.bin", DATA)
    (nginx_http.data / "written").unlink(missing_ok=True)
    return nginx_http


@pytest.fixture
def echo(odd_http: Callable[..., OddHTTP]) -> OddHTTP:
    """A server that answers with the body of the request."""
    return odd_http(lambda request: Reply(body=request.body or b"nothing"))
