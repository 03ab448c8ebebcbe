"""Processes that end when they are told to, and file systems on which locks are odd."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage.cache.owners import Owner, current_owner
from tests.servers import small_disk

NOBODY = 65534
HOUR = 3600.0

without_locks = pytest.mark.parametrize(
    "locks",
    [None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP],
    ids=["no-op", "ENOLCK", "ENOSYS", "EOPNOTSUPP"],
)
"""Runs a test for each way in which :func:`break_locks` does it."""


def break_locks(patch: pytest.MonkeyPatch, code: int | None) -> None:
    """Let ``flock`` fail with ``code``, or, for ``None``, do nothing and succeed."""

    def flock(descriptor: int, operation: int) -> None:
        if code is not None:
            raise OSError(code, os.strerror(code))

    patch.setattr(fcntl, "flock", flock)


@contextlib.contextmanager
def read_only_disk(fill: Callable[[Path], object]) -> Iterator[Path]:
    """Mount a file system that ``fill`` may write to, and nobody afterwards."""
    with small_disk() as disk:
        fill(disk)
        remount = ("mount", "-o", "remount,ro", str(disk))
        sudo = () if os.geteuid() == 0 else ("sudo", "-n")
        subprocess.run([*sudo, *remount], check=True, timeout=30)
        yield disk


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Make a temporary folder that every user may enter, unlike ``tmp_path``."""
    path = Path(tempfile.mkdtemp(prefix="storage-test-"))
    os.chmod(path, 0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def python(code: str, *args: object, prefix: tuple[str, ...] = ()) -> Iterator[Process]:
    """Run Python code with ``args`` as ``sys.argv[1:]``; it is killed at the end.

    It says what it has to say by ``print(..., flush=True)``, and waits by ``input()``.
    """
    started = subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process = Process(started)
    try:
        yield process
    finally:
        process.kill()
        for pipe in (started.stdin, started.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Process:
    """A running child."""

    def __init__(self, started: subprocess.Popen[str]) -> None:
        self._started = started
        self.pid = started.pid

    def line(self) -> str:
        """Wait for the next line that it prints; empty when it has ended."""
        assert self._started.stdout is not None
        return self._started.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        """Let its next ``input()`` return."""
        assert self._started.stdin is not None
        self._started.stdin.write("\n")
        self._started.stdin.flush()

    def kill(self) -> None:
        """End it by SIGKILL, and reap it."""
        self._started.kill()
        self._started.wait(60)

    def wait(self) -> int:
        """Wait for its own end; return its status."""
        return self._started.wait(60)


def forked(function: Callable[[], object]) -> bool:
    """Run ``function`` in a forked child and wait; return whether it returned something true."""
    pid = os.fork()
    if pid == 0:
        status = 1
        # A child that hangs ends by this, which is not what anybody expects.
        signal.alarm(60)
        try:
            status = 0 if function() else 2
        except BaseException:  # noqa: BLE001 - all that a child can do is to tell
            sys.excepthook(*sys.exc_info())
        finally:
            # Neither buffers nor exit handlers are this process's own.
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def as_nobody(function: Callable[[], object]) -> bool:
    """Like :func:`forked`, without the rights of root."""

    def call() -> object:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return function()

    return forked(call)


def dead_owner() -> Owner:
    """Return a process of this machine that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return replace(current_owner(), pid=pid, started=current_owner().started + 1)


def foreign_owner() -> Owner:
    """Return a process of which nothing can be known here."""
    return replace(current_owner(), host="0123456789abcdef")


def later(hours: float) -> float:
    """Return the time in so many hours."""
    return time.time() + hours * HOUR
