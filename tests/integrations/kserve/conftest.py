"""What the tests of the old client's faults work with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.kserve.faults_support import lead_to
from tests.servers import SeaweedFS


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attempts follow one another at once."""
    for wait in ("RETRY_WAIT", "THROTTLE_WAIT"):
        monkeypatch.setenv(f"STORAGE_TRANSFER__{wait}", "0.05")


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A destination that is not there yet."""
    return tmp_path / "dest"


@pytest.fixture
def s3(seaweedfs: SeaweedFS, shared_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket that the environment leads to."""
    lead_to(seaweedfs, monkeypatch)
    return shared_bucket
