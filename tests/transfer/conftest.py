"""Places to download to, and processes that do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.client.base
from storage.backends.base import Backend
from storage.client import StorageClient
from storage.config import load_settings
from storage.transfer import journal
from tests.servers import CountingProxy, SeaweedFS, small_disk
from tests.transfer.failing import ATTEMPTS
from tests.transfer.nursery import Nursery
from tests.transfer.resume_support import STEP, Download
from tests.transfer.support import MIB


@pytest.fixture(scope="session")
def nursery(_isolated_session: None) -> Iterator[Nursery]:
    """Child processes that download, and die when they are told to."""
    with Nursery() as found:
        yield found


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A temporary folder that every user may enter, unlike ``tmp_path``."""
    path = Path(tempfile.mkdtemp(prefix="storage-test-"))
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A path where nothing is, alone in its folder."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "model"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A mount point: it can be filled, not replaced."""
    with small_disk(tmp_path) as disk:
        yield disk


@pytest.fixture
def client() -> Iterator[StorageClient]:
    """A client that gives up soon."""
    limits = {
        "attempts": ATTEMPTS,
        "part_size": "1MiB",
        "connections": 4,
        "connect_timeout": 5,
    }
    with StorageClient(settings=load_settings(transfer=limits)) as found:
        yield found


@pytest.fixture
def download(client: StorageClient, monkeypatch: pytest.MonkeyPatch) -> Download:
    """Call it with a backend, a key and a destination to download through a whole client."""
    monkeypatch.setattr(journal, "STEP", STEP)
    monkeypatch.setattr(journal, "WORTH", STEP)

    def run(backend: Backend, key: str, dest: Path | None, **more: Any) -> str:
        monkeypatch.setattr(storage.client.base, "open_backend", lambda *_: backend)
        client.close()
        return client.download(f"memory://bucket/{key}", dest, **more)

    return run


@pytest.fixture
def proxy(seaweedfs: SeaweedFS, counting_proxy: Callable[[str], CountingProxy]) -> CountingProxy:
    """A proxy before the server, which counts requests."""
    return counting_proxy(seaweedfs.endpoint)


@pytest.fixture(scope="session")
def stored(seaweedfs: SeaweedFS, shared_bucket: str) -> str:
    """The URI of a tree of two small objects and one of 6 MiB."""
    for name, size in (("a.bin", 100), ("sub/b.bin", 5), ("large.bin", 6 * MIB)):
        seaweedfs.put_raw(shared_bucket, f"failing/model/{name}", os.urandom(size))
    return f"s3://{shared_bucket}/failing/model"
