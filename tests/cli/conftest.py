"""The real command, as a process, and a small model in a directory store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import storage

FILES = {
    "config.json": b'{"model_type": "linear"}\n',
    "empty.txt": b"",
    "tokenizer/merges.txt": b"a b\n",
    "weights.bin": bytes(range(256)) * 1024,
}
_ROOT = Path(storage.__file__).parents[1]
_TIMEOUT = 60


@dataclass(frozen=True)
class Result:
    """What a finished command left."""

    status: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error, and nothing else."""
        line = self.err.removesuffix("\n")
        assert line.startswith("storage: error: "), self.err
        assert "\n" not in line
        return line.removeprefix("storage: error: ")

    @property
    def json_error(self) -> dict[str, str]:
        """The error of a command with --json: one line too."""
        assert self.err.count("\n") == 1, self.err
        found: dict[str, str] = json.loads(self.err)["error"]
        assert set(found) == {"type", "message"}
        return found


def _environment() -> dict[str, str]:
    # Most users have buffers, in which something can be left.
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


class Command:
    """Runs ``storage`` in processes of its own."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, *args: str | Path, **options: Any) -> Result:
        process = self.start(*args, **options)
        out, err = process.communicate(timeout=_TIMEOUT)
        return Result(process.returncode, out or b"", (err or b"").decode())

    def start(
        self, *args: str | Path, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        return self._start(["-m", "storage.cli", *map(str, args)], env, options)

    def python(self, script: Path) -> int:
        """Run a script of Python; return its status."""
        return self._start([str(script)], None, {"stdout": None, "stderr": None}).wait(_TIMEOUT)

    def _start(
        self, args: list[str], env: dict[str, str] | None, options: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        process = subprocess.Popen(
            [sys.executable, *args],
            env={**_environment(), "PYTHONPATH": str(_ROOT), **(env or {})},
            **(streams | options),
        )
        self._processes.append(process)
        return process

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.wait()


@pytest.fixture
def command() -> Iterator[Command]:
    runner = Command()
    yield runner
    runner.stop()


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def read_tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The folder of a model in a store, beside a sibling with a longer name."""
    models = tmp_path / "store" / "models"
    write_tree(models / "iris-v2", {"other.bin": b"another model"})
    return write_tree(models / "iris", FILES)


@pytest.fixture
def uri(stored: Path) -> str:
    return f"file://{stored}"
