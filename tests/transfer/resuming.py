"""Processes that download and are killed when so many bytes have come, again and again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import storage

__all__ = ["MIB", "Process", "Resuming", "ends_of"]

MIB = 1024 * 1024

_PROGRAM = """
import json, os, signal, sys
from storage import files
from storage.client import StorageClient
from storage.config import load_settings
from storage.transfer import journal, progress

order = json.loads(sys.argv[1])
if order["step"]:
    journal.STEP = journal.WORTH = order["step"]
if order["boot"]:
    files.boot_id = lambda: order["boot"]
progress._INTERVAL = 0.0

def watch(event):
    moved = event.bytes_done - event.bytes_present
    if order["kill_at"] is not None and moved >= order["kill_at"]:
        os.kill(os.getpid(), signal.SIGKILL)

if order["gate"]:
    print("ready", flush=True)
    sys.stdin.readline()
with StorageClient(settings=load_settings(**order["settings"])) as client:
    path = client.download(
        order["uri"], order["dest"], config=order["config"], progress=watch, **order["options"]
    )
print(path, flush=True)
"""


class Process:
    """One of them, under way."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(storage.__file__).parents[1],
            env={**os.environ, "NO_GCE_CHECK": "true"},
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its number among the processes of this machine."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until it could begin."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def end(self) -> str | None:
        """Let it begin, wait for its end and return the path; ``None`` if it was killed."""
        out, err = self._process.communicate("\n", timeout=120)
        if self._process.returncode == -signal.SIGKILL:
            return None
        assert self._process.returncode == 0, err
        return out.strip()


def ends_of(processes: Sequence[Process]) -> list[str | None]:
    """Let them begin at once, as soon as all could, and return the end of each."""
    for process in processes:
        process.wait_until_ready()
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(Process.end, processes))


@dataclass(frozen=True)
class Resuming:
    """What they all download."""

    uri: str
    dest: str | None
    config: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    """Bytes between two notes in the journal, if not the usual."""

    def start(
        self, kill_at: int | None = None, *, boot: str | None = None, gate: bool = False
    ) -> Process:
        """Start a process.

        Args:
            kill_at: bytes that move until it kills itself; never if ``None``.
            boot: the boot of the machine that it takes this one for.
            gate: let it wait until it is told to begin.
        """
        order = {
            "uri": self.uri,
            "dest": self.dest,
            "config": self.config,
            "options": self.options,
            "settings": self.settings,
            "step": self.step,
            "kill_at": kill_at,
            "boot": boot,
            "gate": gate,
        }
        return Process(order)

    def run(self, kill_at: int | None = None, *, boot: str | None = None) -> str | None:
        """Run a process to its end; see :meth:`start`."""
        return self.start(kill_at, boot=boot).end()
