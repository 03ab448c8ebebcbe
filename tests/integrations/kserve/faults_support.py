"""What the tests of the old client's faults share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.kserve.side import REPOSITORY
from tests.servers import S3Server


def lead_to(server: S3Server, patch: pytest.MonkeyPatch, endpoint: str | None = None) -> None:
    """Set the variables that lead to an S3 server."""
    patch.setenv("AWS_ENDPOINT_URL", endpoint or server.endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    patch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    patch.setenv("AWS_DEFAULT_REGION", server.region)


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_empty(folder: Path) -> bool:
    """Tell whether there is nothing, not even a folder."""
    return not folder.exists() or not any(folder.iterdir())


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the initializer as a process of its own, with the variables of this one."""
    return subprocess.run(
        [sys.executable, "-m", "storage.integrations.kserve", *arguments],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **_path()},
    )  # fmt: skip
