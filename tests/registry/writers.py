"""Processes that use one registry, and write down what was acknowledged to them.

``python -m tests.registry.writers`` reads a :class:`Job` from its first line of input. A publisher
appends a line to its file after each acknowledgement, and goes on where the file ends when it is
started again; a collector collects until its input ends. With ``steps`` it forks a child for each
further line, which publishes to the registry and kills itself at the tick that the line names: one
tick is before and one after each call to the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from storage import StorageClient
from storage.client.parallel import map_parallel
from storage.errors import ObjectExistsError
from storage.registry import ModelRegistry
from storage.registry.documents import Version

__all__ = ["MODEL", "Job", "Process", "check", "files_of"]

MODEL = "m"
_CALLS = ("stat", "list", "read", "write", "delete")


@dataclass(frozen=True)
class Job:
    """What a process is to do."""

    kind: str
    """``publish``, ``collect`` or ``steps``."""

    uri: str
    config: Mapping[str, Any] | None = None
    log: str = ""
    """File of acknowledgements."""

    writer: int = 0
    """Which one of the publishers it is."""

    count: int = 0
    """Publishes that have to be acknowledged."""

    files: Mapping[str, str] = field(default_factory=dict)
    """What is published with ``steps``: path to text."""

    seed: int = 0


def files_of(writer: int, index: int) -> dict[str, bytes]:
    """Return what a publisher publishes as number ``index``."""
    weights = random.Random(index).randbytes(3000)
    if index % 10 == 9:
        # The same as all others: one of them publishes it.
        return {"weights.bin": weights, "config.json": b'{"index": %d}' % index}
    # One blob that all others publish too, and one of its own.
    return {"weights.bin": weights, "sub/config.json": b'{"%d": %d}' % (writer, index)}


def _passing(writer: int, index: int) -> dict[str, bytes]:
    """Return what is deleted at once, so that a blob that is soon needed becomes garbage."""
    weights = random.Random(index + 1).randbytes(3000)
    return {"weights.bin": weights, "passing.json": b'{"%d": %d}' % (writer, index)}


class Process:
    """A process that works; a context manager, which kills it at the end."""

    def __init__(self, job: Job) -> None:
        """Start it."""
        self.job = job
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.registry.writers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.tell(json.dumps(asdict(job)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def tell(self, line: str) -> None:
        """Write a line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def ask(self, line: str) -> str:
        """Write a line to it, and return the line that it answers."""
        self.tell(line)
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._end()

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended by itself; tell whether it has."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        assert self._process.returncode == 0, f"{self.job} ended with {self._process.returncode}"
        return True

    def finish(self, timeout: float) -> dict[str, int]:
        """End its input, and return what it counted."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        text = self._process.stdout.read()
        assert self.wait(timeout), f"{self.job} does not end"
        self._end()
        counted: dict[str, int] = json.loads(text)
        return counted

    def _end(self) -> None:
        self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def check(registry: ModelRegistry) -> dict[int, Version]:
    """Check that each version that is seen is whole, and each content one version; return them."""
    versions = {}
    if registry.numbers(MODEL):
        versions = {version.number: version for version in registry.each_version(MODEL)}
    files = {file.name: file for version in versions.values() for file in version.files}

    def read(name: str) -> None:
        data = registry.store.read(name)
        assert data is not None, f"{name} is needed, and is not there"
        assert (len(data), blake3(data).hexdigest()) == (files[name].size, files[name].blake3)

    map_parallel(read, sorted(files))
    contents = Counter(version.content for version in versions.values())
    assert max(contents.values(), default=1) == 1, "a content has two numbers"
    return versions


# -- in the process --------------------------------------------------------------------------


class _Counting:
    """A backend that counts what others were faster with, and can kill this process."""

    def __init__(self, backend: Any, client: _Client) -> None:
        self._backend = backend
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _CALLS:
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._client.tick()
            try:
                return found(*args, **options)
            except ObjectExistsError:
                self._client.conflicts += 1
                raise
            finally:
                self._client.tick()

        return call


class _Client(StorageClient):
    conflicts = 0
    deadly: int | None = None
    ticks = 0

    def backend(self, *args: Any, **options: Any) -> Any:
        return _Counting(super().backend(*args, **options), self)

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def _write_files(folder: str, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _publish(job: Job, registry: ModelRegistry) -> None:
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # What is torn was never acknowledged.
    lines = Path(job.log).read_bytes().split(b"\n")
    done = sum(b'"passing": false' in line for line in lines[:-1])
    if lines[-1]:
        os.write(log, b"\n")

    def push(files: Mapping[str, bytes], index: int, passing: bool) -> int:
        with tempfile.TemporaryDirectory() as folder:
            _write_files(folder, files)
            version = registry.push(MODEL, folder)
        told = {
            "writer": job.writer,
            "index": index,
            "passing": passing,
            "number": version.number,
            "content": version.content,
            "files": {file.path: file.sha256 for file in version.files},
        }
        os.write(log, json.dumps(told).encode() + b"\n")
        return version.number

    for index in range(done, job.count):
        if index % 4 == job.writer % 4:
            registry.delete(MODEL, push(_passing(job.writer, index), index, True))
        push(files_of(job.writer, index), index, False)
    os.close(log)


def _collect(job: Job, registry: ModelRegistry, counts: dict[str, int]) -> None:
    dice = random.Random(job.seed)
    os.set_blocking(0, False)
    while not _input_has_ended():
        # With 0 every publisher is dead for it.
        found = registry.gc(grace=dice.choice((0, 0, 0.5, 3)))
        counts["runs"] += 1
        counts["removed"] += found.removed
        counts["revoked"] += found.leases
        counts["helped"] += found.helped


def _input_has_ended() -> bool:
    try:
        return os.read(0, 1) == b""
    except BlockingIOError:
        return False


def _steps(job: Job) -> None:
    for line in sys.stdin:
        uri, deadly = json.loads(line)
        child = os.fork()
        if child == 0:
            client = _Client()
            client.deadly = deadly
            with tempfile.TemporaryDirectory() as folder:
                _write_files(folder, {path: text.encode() for path, text in job.files.items()})
                ModelRegistry(uri, client=client).push(MODEL, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _main() -> None:
    # Unbuffered, for the collector looks whether its input has ended.
    first = bytearray()
    while not first.endswith(b"\n"):
        first += os.read(0, 1)
    job = Job(**json.loads(first))
    if job.kind == "steps":
        _steps(job)
        return
    client = _Client()
    registry = ModelRegistry(job.uri, config=job.config, client=client)
    counts = dict.fromkeys(("runs", "removed", "revoked", "helped"), 0)
    if job.kind == "publish":
        _publish(job, registry)
    else:
        _collect(job, registry, counts)
    print(json.dumps({**counts, "conflicts": client.conflicts}), flush=True)


if __name__ == "__main__":
    _main()
