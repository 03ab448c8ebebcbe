"""Small and read-only file systems, for a disk that is full and one that is never written."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.process import ServerError


@contextmanager
def small_disk(
    parent: str | os.PathLike[str] | None = None, *, mebibytes: int = 8, read_only: bool = False
) -> Iterator[Path]:
    """Mount a tmpfs of ``mebibytes``, empty and perhaps read-only, and unmount it at the end.

    Raises:
        ServerError: this process may not mount (it takes root and CAP_SYS_ADMIN, or ``sudo``
            without a password).
    """
    point = Path(tempfile.mkdtemp(prefix="disk-", dir=parent))
    options = f"size={mebibytes}m,mode=0777"
    try:
        _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point))
        try:
            if read_only:
                _run("mount", "-o", "remount,ro", str(point))
            yield point
        finally:
            # Lazily: a failed test may have left a file open.
            _run("umount", "--lazy", str(point))
    finally:
        point.rmdir()


@contextmanager
def read_only_view(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Show ``folder`` at a second place, where not even root can write to it.

    Raises:
        ServerError: this process may not mount; see :func:`small_disk`.
    """
    point = Path(tempfile.mkdtemp(prefix="view-"))
    try:
        _run("mount", "--bind", str(folder), str(point))
        try:
            _run("mount", "-o", "remount,bind,ro", str(point))
            yield point
        finally:
            _run("umount", "--lazy", str(point))
    finally:
        point.rmdir()


def _run(*command: str) -> None:
    if os.geteuid() != 0:
        command = ("sudo", "-n", *command)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as exc:
        raise ServerError(f"{' '.join(command)}: {exc}") from exc
    if done.returncode != 0:
        raise ServerError(
            f"{' '.join(command)} failed, and this test needs a small disk of its own. It takes "
            "root with CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN), or sudo without a "
            f"password: {done.stderr.strip()}"
        )
