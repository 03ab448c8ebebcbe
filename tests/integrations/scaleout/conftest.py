"""Fleets for the tests of Scaleout Edge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.scaleout.support import SCALEOUT_CLIENT, Fleet, fleet_in, fleet_on
from tests.servers import SeaweedFS
from tests.servers.process import ServerError


@pytest.fixture(scope="session")
def scaleout() -> None:
    """The environment with the real client; a test without it fails."""
    try:
        SCALEOUT_CLIENT.python()
    except ServerError as exc:
        pytest.fail(f"{SCALEOUT_CLIENT.requirement} cannot be installed: {exc}", pytrace=False)


@pytest.fixture
def fleet(
    scaleout: None, seaweedfs: SeaweedFS, shared_bucket: str, tmp_path: Path
) -> Iterator[Fleet]:
    """An empty fleet on SeaweedFS."""
    with fleet_on(seaweedfs, shared_bucket, tmp_path) as found:
        yield found


@pytest.fixture
def local_fleet(scaleout: None, tmp_path: Path) -> Iterator[Fleet]:
    """An empty fleet in a folder."""
    with fleet_in(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def own_server() -> Iterator[SeaweedFS]:
    """A SeaweedFS that a test may stop."""
    with SeaweedFS() as server:
        server.create_bucket("fleet")
        yield server


@pytest.fixture
def own_fleet(scaleout: None, own_server: SeaweedFS, tmp_path: Path) -> Iterator[Fleet]:
    """An empty fleet on that."""
    # What is stopped is not worth many attempts; the client goes on trying by itself.
    with fleet_on(own_server, "fleet", tmp_path, attempts=2) as found:
        yield found
    if not own_server.is_running:  # the test failed in between
        own_server.resume()
