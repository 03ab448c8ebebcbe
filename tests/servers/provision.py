"""Servers that pip cannot install, in a folder of this user's that all sessions share.

Debian's packages are unpacked there, not installed: that takes no root and starts no service.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from tests.servers.process import ServerError

INSTALL_TIMEOUT = 600.0
# An installer needs the way to the network that the tests take away from what they test.
_ENVIRON = dict(os.environ)


def provided(name: str, make: Callable[[Path], None]) -> Path:
    """Return the shared folder ``name``; ``make`` fills it if it is not there yet.

    It appears whole or not at all, and two sessions do not make it at once. The tests' own
    ``HOME`` does not move it.

    Raises:
        ServerError: it could not be made.
    """
    home = pwd.getpwuid(os.getuid()).pw_dir
    parent = Path(home, ".cache", "modelstorage-tests")
    folder = parent / name
    if folder.exists():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f"{name}.lock", timeout=INSTALL_TIMEOUT):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
            try:
                make(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def debian_program(package: str, program: str) -> str:
    """Return the path of a program out of a Debian package, e.g. ``usr/sbin/nginx``.

    Raises:
        ServerError: apt is not here, or does not have the package.
    """

    def unpack(folder: Path) -> None:
        for needed in ("apt/lists/partial", "apt/cache/archives/partial", "root"):
            (folder / needed).mkdir(parents=True)
        # apt drops its rights for downloads, to a user who may not come in here.
        apt = ["apt-get", "-qq", "-o", "APT::Sandbox::User="]
        apt += ["-o", f"Dir::State::lists={folder}/apt/lists"]
        apt += ["-o", f"Dir::Cache={folder}/apt/cache"]
        run_installer([*apt, "update"], folder)
        run_installer([*apt, "download", package], folder)
        (archive,) = folder.glob(f"{package}_*.deb")
        run_installer(["dpkg-deb", "-x", str(archive), str(folder / "root")], folder)
        archive.unlink()
        shutil.rmtree(folder / "apt")

    return str(provided(f"debian-{package}", unpack) / "root" / program)


def run_installer(
    command: Sequence[str], folder: Path, environment: dict[str, str] | None = None
) -> None:
    """Run a command that installs something into ``folder``.

    Raises:
        ServerError: it failed; the message ends with what it printed.
    """
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=_ENVIRON | (environment or {}),
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerError(f"{command[0]} cannot be run: {exc}") from exc
    if result.returncode:
        printed = f"{result.stdout}\n{result.stderr}".strip()[-2000:]
        raise ServerError(f"{command[0]} exited with {result.returncode}: {printed}")
