"""One run of one command: a fresh process, its wall clock, its memory, its own timings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Command", "Measurement", "measure"]

_SPAWN = Path(__file__).with_name("workers") / "spawn.py"


@dataclass(frozen=True, slots=True)
class Command:
    """What to start."""

    argv: Sequence[str]
    """Program (an absolute path) and arguments."""

    environment: Mapping[str, str]
    """The whole environment; nothing is inherited."""

    timings: Path | None = None
    """Where the process leaves its own timings, if it does."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run cost, and whether it did what it should."""

    seconds: float
    """Wall clock from the start of the process to its end: what a user waits."""

    cpu_seconds: float
    """Processor time of the process and of the children it waited for."""

    peak_memory: int
    """Bytes. The resident peak as the kernel kept it; for a process with children at least
    the sampled sum over all of them, shared pages counted once."""

    processes: int
    """Most processes seen at once."""

    import_seconds: float | None = None
    """Python clients: importing the client."""

    transfer_seconds: float | None = None
    """Python clients: the transfer alone, without interpreter and import."""

    fault: str | None = None
    """Why this run does not count: failed, too slow, or wrong bytes."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)


def measure(command: Command, directory: Path, timeout: float) -> Measurement:
    """Run ``command`` and account for it.

    Args:
        command: what to start.
        directory: working directory; a scratch file for standard error is made in it.
        timeout: seconds after which the process and its children are killed.

    Returns:
        The account; a failure of the command is its ``fault``, not an exception.
    """
    errors = directory / "stderr"
    if command.timings is not None:
        command.timings.unlink(missing_ok=True)
    job = {
        "argv": list(command.argv),
        "environment": dict(command.environment),
        "directory": os.fspath(directory),
        "errors": os.fspath(errors),
        "timeout": timeout,
    }
    finished = subprocess.run(
        [sys.executable, "-I", "-S", os.fspath(_SPAWN)],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout + 60,
    )
    account = json.loads(finished.stdout)
    timings: dict[str, float] = {}
    if command.timings is not None and command.timings.exists():
        timings = json.loads(command.timings.read_text())
    return Measurement(
        seconds=account["seconds"],
        cpu_seconds=account["cpu_seconds"],
        peak_memory=account["peak_memory"],
        processes=account["processes"],
        import_seconds=timings.get("import"),
        transfer_seconds=timings.get("transfer"),
        fault=_fault(account, errors, timeout),
    )


def _fault(account: Mapping[str, Any], errors: Path, timeout: float) -> str | None:
    if account["timed_out"]:
        return f"killed after {timeout:.0f} s"
    if account["exit_status"] == 0:
        return None
    lines = errors.read_text(errors="replace").strip().splitlines()
    return f"exit status {account['exit_status']}: {lines[-1][:300] if lines else 'no message'}"
