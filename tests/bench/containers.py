"""Model containers and archives: local work, each library in a process and with pins of its own."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tests.bench.contestants import PythonClient, Toolbox
from tests.bench.measure import Command, Measurement, measure

__all__ = ["ASIDE", "WORKS", "Containers", "Work"]

_CONTAIN = Path(__file__).with_name("workers") / "contain.py"
_BLOCK = 1024 * 1024
_TEXTS = 4
# The sum of millions of 32-bit floats differs with the order in which a processor adds them.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of work on a container or an archive."""

    name: str
    title: str
    """With the size of the weights as ``{}``."""

    peer: str
    """Whom this library is compared with."""

    factor: float
    """How many times as fast it is to be."""


WORKS = {
    work.name: work
    for work in (
        Work("build", "Container of {} of weights, built and saved", "scaleoututil", 50),
        Work("retag", "Container of {} of weights, re-tagged and saved", "scaleoututil", 50),
        Work("map", "Container of {} of weights, opened and loaded", "scaleoututil", 50),
        Work("archive", "tar.zst of {} of weights and text", "arkindex-base-worker", 6),
    )
}
ASIDE = frozenset({"build", "map"})
"""Works whose processes hold the weights themselves, so their memory says nothing."""


class Containers:
    """What is worked on, and the containers that each library made of it; a context manager."""

    def __init__(self, scratch: Path, tools: Toolbox, size: int, seed: int, timeout: float) -> None:
        """Prepare nothing yet.

        Args:
            scratch: a directory that is not there yet, with room for six times ``size``.
            tools: interpreters.
            size: bytes of weights.
            seed: of the weights.
            timeout: seconds that one process may take.
        """
        self._scratch = scratch
        self._tools = tools
        self._size = size
        self._seed = seed
        self._timeout = timeout
        self._weights = scratch / "tree" / "weights.bin"
        self._expected = 0.0

    def __enter__(self) -> Self:
        self._weights.parent.mkdir(parents=True)
        numpy: Any = importlib.import_module("numpy")
        generator = numpy.random.default_rng(self._seed)
        with open(self._weights, "wb") as file:
            for _ in range(0, self._size, _BLOCK):
                numbers = generator.standard_normal(_BLOCK // 4, dtype="f4")
                file.write(numbers.astype("<f4", copy=False).tobytes())
        worker: Any = importlib.import_module("tests.bench.workers.contain")
        self._expected = worker.touch(worker.weights(self._weights))
        words = random.Random(self._seed)
        vocabulary = [f"{words.getrandbits(24):x}" for _ in range(20_000)]
        for number in range(_TEXTS):
            with open(self._weights.with_name(f"text-{number}.txt"), "w") as text:
                # Two tenths of the weights in all.
                while text.tell() < self._size // 20:
                    text.write(" ".join(words.choices(vocabulary, k=20)) + "\n")
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def weights_size(self) -> int:
        """Bytes of the weights alone."""
        return self._weights.stat().st_size

    @property
    def tree_size(self) -> int:
        """Bytes of the weights and the text."""
        return sum(path.stat().st_size for path in self._weights.parent.iterdir())

    def run(self, work: Work, contestant: PythonClient, check: bool) -> Measurement:
        """Let ``contestant`` do ``work`` once, in a process of its own.

        Its own container, if it needs one, was built before, and nobody timed that.
        """
        source = self._weights.parent if work.name == "archive" else self._weights
        if work.name in ("retag", "map"):
            source = self._scratch / f"{contestant.name}.container"
            if not source.exists():
                built = self._once("build", contestant, self._weights, source)
                if built.fault is not None:
                    return built
        target = self._scratch / "target"
        try:
            run = self._once(work.name, contestant, source, target)
            if check and run.fault is None:
                run = replace(run, fault=self._check(work.name, target))
            return run
        finally:
            target.unlink(missing_ok=True)

    def _once(self, work: str, contestant: PythonClient, source: Path, target: Path) -> Measurement:
        home = self._scratch / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        argv = [contestant.python(self._tools), os.fspath(_CONTAIN), contestant.distribution, work]
        argv += [os.fspath(source), os.fspath(target), "--timings", os.fspath(self._timings)]
        environment = self._tools.environment(home)
        if not contestant.ours:
            environment.pop("PYTHONPATH", None)
        os.sync()
        _read(source)
        run = measure(Command(argv, environment, self._timings), home, self._timeout)
        # An interpreter and a framework take their time to start, and that is another matter.
        return run if run.fault else replace(run, seconds=run.transfer_seconds or 0.0)

    @property
    def _timings(self) -> Path:
        return self._scratch / "timings.json"

    def _check(self, work: str, target: Path) -> str | None:
        """Say what is wrong with what was made; ``None`` if it holds what it was made of."""
        if work == "map":
            found = json.loads(self._timings.read_text())["found"]
            right = abs(found - self._expected) <= _TOLERANCE * abs(self._expected) + _TOLERANCE
            return None if right else f"the weights add up to {found}, expected {self._expected}"
        if work == "archive":
            return self._check_archive(target)
        with zipfile.ZipFile(target) as container:
            metadata = json.loads(container.read("metadata.json"))
            if work == "retag" and metadata.get("tag") != "v2":
                return "no tag in the metadata"
            numpy: Any = importlib.import_module("numpy")
            with container.open("training_model.bin") as stream, numpy.load(stream) as arrays:
                hashes = hashlib.sha256()
                for index in range(len(arrays.files)):
                    hashes.update(arrays[str(index)].tobytes())
        return None if hashes.hexdigest() == _sha256(self._weights) else "other weights"

    def _check_archive(self, target: Path) -> str | None:
        expected = {path.name: _sha256(path) for path in self._weights.parent.iterdir()}
        found = {}
        zstandard: Any = importlib.import_module("zstandard")
        with (
            open(target, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for member in tar:
                if (content := tar.extractfile(member)) is not None:
                    name = os.path.basename(member.name)
                    found[name] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        return None if found == expected else f"holds {sorted(found)}, or these with other bytes"


def _read(source: Path) -> None:
    """Read a file or a folder, so that nobody waits for a disk; memory may have been taken back."""
    for path in source.iterdir() if source.is_dir() else [source]:
        _sha256(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
