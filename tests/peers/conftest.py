"""The peers, each a process that lives as long as the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.environments import (
    ARKINDEX,
    ARKINDEX_BEFORE,
    MODEL_SIGNING,
    SCALEOUT,
    SCALEOUT_BEFORE,
    Peer,
    Release,
    running,
)
from tests.servers.process import ServerError


def _peer(
    release: Release, script: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Peer]:
    try:
        release.python()
    except ServerError as exc:
        pytest.fail(f"{release.requirement} cannot be installed: {exc}", pytrace=False)
    scratch = tmp_path_factory.mktemp("peer")
    with running(release, script, scratch) as peer:
        yield peer
    # What the peer left behind when it was told nothing more.
    shutil.rmtree(scratch)


def _name(release: Release) -> str:
    return release.requirement


@pytest.fixture(scope="session", params=[SCALEOUT, SCALEOUT_BEFORE], ids=_name)
def scaleout(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Peer]:
    """``scaleoututil``, both formats of its metadata."""
    yield from _peer(request.param, "scaleout_models.py", tmp_path_factory)


@pytest.fixture(scope="session")
def newest_scaleout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """The newest ``scaleoututil`` alone, for what the one before cannot."""
    yield from _peer(SCALEOUT, "scaleout_models.py", tmp_path_factory)


@pytest.fixture(scope="session", params=[ARKINDEX, ARKINDEX_BEFORE], ids=_name)
def arkindex(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Peer]:
    """``arkindex-base-worker``, with and without a hash of the content."""
    yield from _peer(request.param, "arkindex_archives.py", tmp_path_factory)


@pytest.fixture(scope="session")
def newest_arkindex(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """The newest ``arkindex-base-worker`` alone, for what takes long."""
    yield from _peer(ARKINDEX, "arkindex_archives.py", tmp_path_factory)


@pytest.fixture(scope="session")
def model_signing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """``model-signing``."""
    yield from _peer(MODEL_SIGNING, "signing_bundles.py", tmp_path_factory)


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which do not stay until pytest removes its folders."""
    folder = tmp_path / "roomy"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
