"""What is measured: transfers, containers, imports, and the order of their runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from tests.bench.again import REPEATS, Repeat, Repeats
from tests.bench.containers import WORKS, Containers
from tests.bench.contestants import Contestant, Job, PythonClient, Toolbox
from tests.bench.data import Source, Store, check_file, check_tree, make_file, make_tree
from tests.bench.measure import Command, Measurement, measure
from tests.servers.nginx import Nginx

__all__ = ["CASES", "IMPORTS", "Bench", "Case", "CaseResult", "Sizes", "Statement"]

GIB = 1024**3
_SMALL_FILE = 8 * 1024
_SOURCE_BUCKET = "bench-source"
_UPLOAD_BUCKET = "bench-upload"
_OBJECT_KEY = "large/model.bin"
_TREE_KEY = "small/model"
_MODEL_KEY = "again/model"
_MODEL_FILES = 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is moved and how often."""

    object_bytes: int = GIB
    files: int = 2000
    weights_bytes: int = 256 * 1024**2
    """Weights in a container or an archive."""

    rounds: int = 3
    import_rounds: int = 9
    repeat_calls: int = 20
    """Second downloads in one process."""

    repeat_rounds: int = 10
    """Second downloads in new processes."""

    quick: bool = False
    """No discarded runs, and no judgement."""

    @classmethod
    def smoke(cls) -> Sizes:
        """Return sizes that show that everything works, and nothing else."""
        return cls(
            object_bytes=64 * 1024**2,
            files=200,
            weights_bytes=8 * 1024**2,
            rounds=1,
            import_rounds=2,
            repeat_calls=3,
            repeat_rounds=2,
            quick=True,
        )


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of work."""

    name: str
    action: str
    """An action of :class:`Job`, a name of :data:`WORKS`, ``again`` or ``import``."""

    warm_up: bool = True
    """Whether it begins with a run of everybody that is discarded."""

    def takes(self, contestant: Contestant) -> bool:
        """Tell whether ``contestant`` can do it."""
        if self.action == "import":
            return any(one.contestant == contestant.name for one in IMPORTS)
        return self.action in contestant.actions


CASES = {
    case.name: case
    for case in (
        Case("download", "download-object"),
        Case("small", "download-tree"),
        # Each run has a fresh bucket, so an earlier one has warmed nothing of the server's.
        Case("upload", "upload-object", warm_up=False),
        Case("http", "download-url"),
        Case("again", "again"),
        *(Case(work, work) for work in WORKS),
        Case("import", "import"),
    )
}


@dataclass(frozen=True, slots=True)
class Statement:
    """A line of Python whose import time is measured."""

    name: str
    code: str
    contestant: str
    """The contestant that must take part for this to be measured."""

    kserve: bool = False
    """Run it by the interpreter that has ``kserve-storage``."""


IMPORTS = (
    Statement("storage", "import storage", "storage"),
    Statement("storage names", "from storage import S3Config, Storage", "storage"),
    Statement("boto3", "import boto3", "boto3"),
    Statement("s3fs", "import s3fs", "s3fs"),
    Statement("kserve_storage", "import kserve_storage", "kserve-storage", kserve=True),
)
BARE = "bare interpreter"
BARE_KSERVE = "bare interpreter (kserve)"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """All runs of a case, by contestant (or by statement), without the discarded ones."""

    name: str
    title: str
    bytes: int
    files: int
    runs: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)


class Bench:
    """One session: a store that holds the data, a scratch directory, the programs."""

    def __init__(
        self,
        store: Store,
        tools: Toolbox,
        scratch: Path,
        sizes: Sizes,
        *,
        seed: int,
        timeout: float,
        say: Callable[[str], object],
    ) -> None:
        """Prepare nothing yet.

        Args:
            store: a running server.
            tools: programs and interpreters.
            scratch: an empty directory with room for twice the object.
            sizes: how much, how often.
            seed: of the data.
            timeout: seconds that one run may take.
            say: is told about every run.
        """
        self.store = store
        self.tools = tools
        self.scratch = scratch
        self.sizes = sizes
        self.seed = seed
        self.timeout = timeout
        self.say = say
        self._object: Source | None = None
        self._tree: Source | None = None
        self._seeded = False
        self._web: Nginx | None = None
        self._containers: Containers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._web is not None:
            self._web.stop()
        if self._containers is not None:
            self._containers.__exit__(*exc_info)

    def run(self, case: Case, contestants: Sequence[Contestant]) -> CaseResult:
        """Measure ``case`` for everybody who can do it."""
        if case.action == "import":
            return self._run_imports(case, {contestant.name for contestant in contestants})
        if case.action == "again":
            return self._run_repeats(case, {one.name: one for one in contestants})
        entrants = [one for one in contestants if case.takes(one)]
        if case.action in WORKS:
            return self._run_containers(case, entrants)
        source = self._prepare(case)
        size = source.size
        title = {
            "download-object": f"Download of one object of {_size(size)}",
            "download-tree": f"Download of {len(source.digests):,} objects of 8 KiB",
            "upload-object": f"Upload of one object of {_size(size)}",
            "download-url": f"Download of one file of {_size(size)} from nginx",
        }[case.action]

        def once(name: str, discarded: bool) -> Measurement:
            contestant = next(one for one in entrants if one.name == name)
            return self._transfer(case, contestant, source, check=not discarded)

        rare = {one.name for one in entrants if case.action in one.once}
        runs = self._alternate(case, [one.name for one in entrants], self.sizes.rounds, once, rare)
        return CaseResult(case.name, title, size, len(source.digests), runs)

    def _alternate(
        self,
        case: Case,
        names: Sequence[str],
        rounds: int,
        once: Callable[[str, bool], Measurement],
        rare: Collection[str] = (),
    ) -> dict[str, list[Measurement]]:
        """Run everybody once for nothing, then in turns; each round starts with another.

        Who fails once does not run again. The ``rare`` run in the first round only.
        """
        runs: dict[str, list[Measurement]] = {name: [] for name in names}
        for number in range(0 if case.warm_up and not self.sizes.quick else 1, rounds + 1):
            offset = number % len(names) if names else 0
            for name in [*names[offset:], *names[:offset]]:
                if any(run.fault for run in runs[name]) or (name in rare and number != 1):
                    continue
                run = once(name, number == 0)
                if number > 0 or run.fault:
                    runs[name].append(run)
                self._tell(case, "warm-up" if number == 0 else f"round {number}", name, run)
        return runs

    def _tell(self, case: Case, when: str, name: str, run: Measurement) -> None:
        self.say(
            f"{case.name:9} {when:8} {name:28} {run.seconds:8.3f} s "
            f"{run.peak_memory / 2**20:7.0f} MiB{'  ' + run.fault if run.fault else ''}"
        )

    def _prepare(self, case: Case) -> Source:
        if not self._seeded:
            self.store.make_bucket(_SOURCE_BUCKET)
            self._seeded = True
        if case.action == "again":
            self.say("preparing the model")
            size = self.sizes.object_bytes // _MODEL_FILES
            model = make_tree(self.scratch / "model", _MODEL_FILES, size, self.seed)
            self.store.put(model, _SOURCE_BUCKET, _MODEL_KEY)
            return model
        if case.action == "download-tree":
            if self._tree is None:
                self.say("preparing the small files")
                self._tree = make_tree(
                    self.scratch / "tree", self.sizes.files, _SMALL_FILE, self.seed
                )
                self.store.put(self._tree, _SOURCE_BUCKET, _TREE_KEY)
            return self._tree
        if self._object is None:
            self.say("preparing the large object")
            self._object = make_file(self.scratch / "model.bin", self.sizes.object_bytes, self.seed)
            self.store.put(self._object, _SOURCE_BUCKET, _OBJECT_KEY)
        return self._object

    def _transfer(
        self, case: Case, contestant: Contestant, source: Source, check: bool
    ) -> Measurement:
        home = self.scratch / "run"
        target = self.scratch / "target"
        for folder in (home, target):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        job = self._job(case, source, target)
        upload = case.action == "upload-object"
        if upload:
            self.store.make_bucket(_UPLOAD_BUCKET)
        # What an earlier run left to be written to the disk is not the next one's burden.
        os.sync()
        try:
            command = contestant.command(job, self.tools, self.store.server, home)
            run = measure(command, home, self.timeout)
            if check and run.fault is None:
                run = replace(run, fault=self._check(case, job, source))
            return run
        finally:
            if upload:
                self.store.remove_bucket(_UPLOAD_BUCKET)
            shutil.rmtree(target)

    def _job(self, case: Case, source: Source, target: Path) -> Job:
        if case.action == "upload-object":
            return Job(case.action, _UPLOAD_BUCKET, _OBJECT_KEY, source.path)
        if case.action == "download-tree":
            return Job(case.action, _SOURCE_BUCKET, _TREE_KEY, target / "model")
        digests = {"sha256": source.digests[""], "blake3": source.blake3}
        if case.action == "download-url":
            url = f"{self._nginx(source)}/{source.path.name}"
            return Job(case.action, "", "", target / "model.bin", digests, url, source.path)
        return Job(case.action, _SOURCE_BUCKET, _OBJECT_KEY, target / "model.bin", digests)

    def _nginx(self, source: Source) -> str:
        """Return the URL of the folder that holds ``source``."""
        if self._web is None:
            self._web = Nginx(
                f"server {{ listen @HOST@:@PORT@; root {source.path.parent}; sendfile on; }}",
                self.scratch,
            ).start()
        return self._web.endpoint

    def _check(self, case: Case, job: Job, source: Source) -> str | None:
        if case.action == "upload-object":
            return self.store.check_object(job.bucket, job.key, source)
        if case.action == "download-tree":
            return check_tree(job.path, source)
        return check_file(job.path, source)

    def _run_containers(self, case: Case, entrants: Sequence[Contestant]) -> CaseResult:
        if self._containers is None:
            self.say("preparing the weights")
            self._containers = Containers(
                self.scratch / "containers",
                self.tools,
                self.sizes.weights_bytes,
                self.seed,
                self.timeout,
            ).__enter__()
        containers, work = self._containers, WORKS[case.action]
        by_name = {one.name: one for one in entrants if isinstance(one, PythonClient)}

        def once(name: str, discarded: bool) -> Measurement:
            return containers.run(work, by_name[name], check=not discarded)

        runs = self._alternate(case, list(by_name), self.sizes.rounds, once)
        title = work.title.format(_size(containers.weights_size))
        size = containers.tree_size if case.action == "archive" else containers.weights_size
        return CaseResult(case.name, title, size, 1, runs)

    def _run_repeats(self, case: Case, taking_part: Mapping[str, Contestant]) -> CaseResult:
        ways = {one.name: one for one in REPEATS if one.contestant in taking_part}
        source = self._prepare(case)
        uri = f"s3://{_SOURCE_BUCKET}/{_MODEL_KEY}"
        caches = self.scratch / "caches"
        runs: dict[str, list[Measurement]] = {}
        with Repeats(source, uri, self.store, self.tools, caches, self.timeout) as repeats:
            for name, way in ways.items():
                if way.cold:
                    continue
                calls = self.sizes.repeat_calls
                runs[name] = repeats.in_process(way, taking_part[way.contestant], calls)
                self._tell(case, f"{len(runs[name])} calls", name, _middle(runs[name]))
            runs |= self._run_cold_repeats(case, repeats, ways, taking_part)
        shutil.rmtree(source.path)
        size = _size(self.sizes.object_bytes)
        title = f"Second download of a model of {size} in {_MODEL_FILES} files"
        return CaseResult(case.name, title, source.size, _MODEL_FILES, runs)

    def _run_cold_repeats(
        self,
        case: Case,
        repeats: Repeats,
        ways: Mapping[str, Repeat],
        taking_part: Mapping[str, Contestant],
    ) -> dict[str, list[Measurement]]:
        commands: dict[str, Command] = {}
        failed: dict[str, list[Measurement]] = {}
        for name, way in ways.items():
            if not way.cold:
                continue
            try:
                commands[name] = repeats.prepare_cold(way, taking_part[way.contestant])
            except (RuntimeError, subprocess.TimeoutExpired) as exc:
                failed[name] = [Measurement(0.0, 0.0, 0, 0, fault=str(exc))]
                self._tell(case, "warm-up", name, failed[name][0])

        def once(name: str, discarded: bool) -> Measurement:
            return repeats.run_cold(commands[name])

        return failed | self._alternate(case, list(commands), self.sizes.repeat_rounds, once)

    def _run_imports(self, case: Case, taking_part: set[str]) -> CaseResult:
        statements = [one for one in IMPORTS if one.contestant in taking_part]
        lines = {BARE: Statement(BARE, "pass", "")}
        if any(one.kserve for one in statements):
            lines[BARE_KSERVE] = Statement(BARE_KSERVE, "pass", "", kserve=True)
        lines |= {one.name: one for one in statements}
        home = self.scratch / "run"
        home.mkdir(exist_ok=True)

        def once(name: str, discarded: bool) -> Measurement:
            python = self.tools.kserve_python if lines[name].kserve else self.tools.python
            environment = self.tools.environment(home)
            return measure(Command([python, "-c", lines[name].code], environment), home, 60)

        runs = self._alternate(case, list(lines), self.sizes.import_rounds, once)
        return CaseResult(case.name, "Import time", 0, 0, runs)


def _middle(runs: Sequence[Measurement]) -> Measurement:
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def _size(count: int) -> str:
    return f"{count / GIB:g} GiB" if count >= GIB else f"{count / 1024**2:g} MiB"
