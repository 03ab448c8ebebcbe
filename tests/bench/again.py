"""The second download: a model that is here already, asked for again in all the usual ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tests.bench.contestants import Contestant, Toolbox
from tests.bench.data import Source, Store, check_tree
from tests.bench.measure import Command, Measurement, measure
from tests.servers.hub import Hub

__all__ = ["REPEATS", "Repeat", "Repeats"]

_ASK = Path(__file__).with_name("workers") / "ask.py"
_REPO = "bench/model"


@dataclass(frozen=True, slots=True)
class Repeat:
    """One way to ask again."""

    name: str
    contestant: str
    """The contestant that must take part for this to be measured."""

    how: str
    """What ``workers/ask.py`` calls it."""

    code: str
    """What a user writes."""

    asks: str
    """Whom it asks before it answers."""

    hub: bool = False
    """The model is the Hub's, not the S3 server's."""

    cold: bool = False
    """Each time in a new process."""


_OURS = "Storage.download(uri)"
_PEER = "snapshot_download(repo)"
REPEATS = (
    Repeat(
        "storage, cache-first",
        "storage",
        "cache-first",
        'Storage.download(uri, freshness="cache-first")',
        "nobody",
    ),
    Repeat("storage, revalidate (S3)", "storage", "revalidate", _OURS, "the S3 server"),
    Repeat("storage, revalidate (Hub)", "storage", "revalidate", _OURS, "the Hub", hub=True),
    Repeat(
        "storage-command, offline",
        "storage-command",
        "offline",
        "storage download URI --offline",
        "nobody",
        cold=True,
    ),
    Repeat("huggingface_hub", "huggingface_hub", "revalidate", _PEER, "the Hub", hub=True),
    Repeat(
        "huggingface_hub, local files",
        "huggingface_hub",
        "cache-first",
        "snapshot_download(repo, local_files_only=True)",
        "nobody",
        hub=True,
    ),
    Repeat(
        "huggingface_hub, offline",
        "huggingface_hub",
        "offline",
        f'HF_HUB_OFFLINE=1 python -c "{_PEER}"',
        "nobody",
        hub=True,
        cold=True,
    ),
)


class Repeats:
    """The model on both servers, and a cache for each library; a context manager.

    A cache is filled by the first who needs it, by an ordinary download that nobody times.
    """

    def __init__(
        self,
        source: Source,
        uri: str,
        store: Store,
        tools: Toolbox,
        scratch: Path,
        timeout: float,
    ) -> None:
        """Prepare nothing yet.

        Args:
            source: the model.
            uri: where it lies on the S3 server.
            store: that server.
            tools: programs and interpreters.
            scratch: a directory that is not there yet, for the caches.
            timeout: seconds that one process may take.
        """
        self._source = source
        self._uri = uri
        self._store = store
        self._tools = tools
        self._scratch = scratch
        self._timeout = timeout
        self._hub = Hub()
        self._checked: set[str] = set()

    def __enter__(self) -> Self:
        self._hub.start()
        repo = self._hub.repo(_REPO)
        for name in self._source.digests:
            # One by one: the model does not fit into everybody's memory.
            self._hub.put(repo, {name: (self._source.path / name).read_bytes()})
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hub.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def in_process(self, repeat: Repeat, contestant: Contestant, calls: int) -> list[Measurement]:
        """Return an account of each of ``calls`` calls in one process.

        Memory and processor time are those of the whole process.
        """
        home = self._home(contestant)
        timings = home / "timings.json"
        command = self._worker(repeat, contestant, home, calls)
        run = measure(replace(command, timings=timings), home, self._timeout)
        if run.fault is not None:
            return [run]
        told = json.loads(timings.read_text())
        if fault := self._check(told["path"]):
            return [replace(run, fault=fault)]
        return [replace(run, seconds=seconds) for seconds in told["calls"]]

    def prepare_cold(self, repeat: Repeat, contestant: Contestant) -> Command:
        """Return the command of a cold repeat, after its cache was filled and it was tried.

        Raises:
            RuntimeError: it fails, or delivers something else.
        """
        home = self._home(contestant)
        cold = self._cold(repeat, contestant, home)
        _output(self._online(repeat, contestant, home), home, self._timeout)
        if fault := self._check(_output(cold, home, self._timeout)):
            raise RuntimeError(fault)
        return cold

    def run_cold(self, command: Command) -> Measurement:
        """Run a command of :meth:`prepare_cold` once and account for it."""
        return measure(command, Path(command.environment["HOME"]), self._timeout)

    def _check(self, path: str) -> str | None:
        """Say what is wrong with the tree at ``path``; one that was right stays so."""
        if path in self._checked:
            return None
        fault = check_tree(Path(path), self._source)
        if fault is None:
            self._checked.add(path)
        return fault

    # -- commands ------------------------------------------------------------------------------

    def _home(self, contestant: Contestant) -> Path:
        # What this library has cached in one process it finds in all.
        home = self._scratch / ("storage" if contestant.ours else contestant.name)
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _environment(self, contestant: Contestant, home: Path) -> dict[str, str]:
        return contestant.environment(self._tools, self._store.server, home) | {
            "HF_ENDPOINT": self._hub.url,
            # The test Hub does not speak the protocol of xet, and nobody looks at bars.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def _worker(self, repeat: Repeat, contestant: Contestant, home: Path, calls: int) -> Command:
        client = "storage" if contestant.ours else contestant.name
        model = self._model(repeat, contestant)
        argv = [self._tools.python, os.fspath(_ASK), client, repeat.how, model, f"{calls}"]
        timings = os.fspath(home / "timings.json")
        return Command([*argv, "--timings", timings], self._environment(contestant, home))

    def _model(self, repeat: Repeat, contestant: Contestant) -> str:
        if not repeat.hub:
            return self._uri
        return f"hf://{_REPO}" if contestant.ours else _REPO

    def _online(self, repeat: Repeat, contestant: Contestant, home: Path) -> Command:
        if contestant.ours:
            argv = [*self._tools.storage_command, "download", self._model(repeat, contestant)]
        else:
            code = "import huggingface_hub as h, sys; print(h.snapshot_download(sys.argv[1]))"
            argv = [self._tools.python, "-c", code, self._model(repeat, contestant)]
        return Command(argv, self._environment(contestant, home))

    def _cold(self, repeat: Repeat, contestant: Contestant, home: Path) -> Command:
        command = self._online(repeat, contestant, home)
        if contestant.ours:
            return replace(command, argv=[*command.argv, "--offline"])
        offline: Mapping[str, str] = {**command.environment, "HF_HUB_OFFLINE": "1"}
        return replace(command, environment=offline)


def _output(command: Command, home: Path, timeout: float) -> str:
    """Run ``command`` and return the last line that it prints, a path."""
    done = subprocess.run(
        command.argv,
        env=dict(command.environment),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(
            f"exit status {done.returncode}: {lines[-1][:300] if lines else 'no message'}"
        )
    return done.stdout.strip().splitlines()[-1]
