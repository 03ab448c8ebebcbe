"""KServe's storage initializer of two makes, the old program and this library's, side by side.

Each is a process of its own interpreter that forks for every run, so the imports are paid once.
Both see a file system of their own in which ``/mnt/pvc`` and ``/mnt/models`` are volumes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.peers.environments import INSIDE, Peer, Release

REPOSITORY = Path(__file__).parents[3]
LIMIT = 60.0
"""Seconds that one run may take."""

KSERVE_STORAGE = Release("kserve-storage==0.21.0")
"""The library of KServe's image; the few lines of its entry point are in ``inside``."""

# What a client may do without, which is looked for on machines of a cloud; and no long waits
# between attempts at what never works.
_ALWAYS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
    "LANG": "C.UTF-8",
    "NO_GCE_CHECK": "true",
    "PATH": os.defpath,
    "STORAGE_TRANSFER__RETRY_WAIT": "0.05",
    "STORAGE_TRANSFER__THROTTLE_WAIT": "0.05",
}
# What the clients of Hubs and of git keep beside the files.
_NOTES = re.compile(r"\.cache/huggingface/|\.git/|\.ms(?:c|v)$|\._+temp/")

Tree = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class _ThisInterpreter(Release):
    """The interpreter of the tests, which has this library's extras."""

    def python(self) -> str:
        """Return its path."""
        return sys.executable


class Outcome(NamedTuple):
    """What a run left."""

    status: int | None
    """``None``: it did not end in time."""

    trees: list[Tree | None]
    """Of its destinations; ``None`` where there is no folder."""

    out: str
    err: str

    @property
    def printed(self) -> str:
        """All that it printed."""
        return self.out + self.err


class Initializer:
    """One of the two programs, running.

    Attributes:
        claim: what it sees as ``/mnt/pvc``.
        models: what it sees as ``/mnt/models``.
    """

    def __init__(self, peer: Peer, program: str, modules: Sequence[str], scratch: Path) -> None:
        """Import ``modules`` for the ``program``, and mount the volumes below ``scratch``."""
        self._peer, self._program, self._scratch = peer, program, scratch
        self._runs = 0
        self.claim, self.models = scratch / "claim", scratch / "models"
        for volume in (self.claim, self.models):
            volume.mkdir()
        volumes = {"pvc": self.claim, "models": self.models}
        peer("mount", point="/mnt", folders=volumes)
        path = [] if program.endswith(".py") else [str(REPOSITORY)]
        # One process for all files of a bucket: a pool of four takes most of a short run.
        environment = {"S3_MAX_FILE_CONCURRENCY": "1"}
        self.files = peer("prepare", modules=list(modules), path=path, environment=environment)

    def folder(self) -> Path:
        """Return a new folder for a run."""
        self._runs += 1
        folder = self._scratch / f"run-{self._runs}"
        folder.mkdir()
        return folder

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        destinations: Sequence[str] = (),
        *,
        folder: Path | None = None,
        user: int | None = None,
        limit: float = LIMIT,
    ) -> Outcome:
        """Run it once, with no other variables than these and what every run has.

        Args:
            arguments: of its command line.
            environment: its variables.
            destinations: the folders to look into afterwards.
            folder: where it works; its home and its temporary folder are there.
            user: who it runs as, without a home or a temporary folder that it may write to.
            limit: seconds that it may take.
        """
        folder = folder or self.folder()
        home, temporary = folder / "home", folder / "tmp"
        for place in (home, temporary):
            # A pod's user has no home to write to, and its root file system is read-only.
            place.mkdir(exist_ok=True, mode=0o777 if user is None else 0o555)
        variables = {**_ALWAYS, "HOME": str(home), "TMPDIR": str(temporary), **environment}
        answer: dict[str, Any] = self._peer(
            "run",
            program=self._program,
            arguments=list(arguments),
            environment=variables,
            folder=folder,
            limit=limit,
            user=user,
        )
        trees = [self.tree(destination) for destination in destinations]
        return Outcome(answer["status"], trees, answer["out"], answer["err"])

    def tree(self, folder: str | Path) -> Tree | None:
        """Return the files below ``folder`` as the program sees them; ``None`` if it is none."""
        found = self._peer("tree", folder=folder)
        if found is None:
            return None
        return {
            path: content.encode("latin-1")
            for path, content in sorted(found.items())
            if not _NOTES.match(path)
        }

    def empty(self) -> None:
        """Remove what is in the volumes."""
        for volume in (self.claim, self.models):
            for entry in volume.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


@contextmanager
def old_program(scratch: Path) -> Iterator[Initializer]:
    """Run the old program; its files go below ``scratch``.

    Raises:
        ServerError: it cannot be installed.
    """
    # Not the Hub's client: it reads its variables when it is imported. And not Azure's.
    modules = ("kserve_storage", "boto3", "google.cloud.storage")
    program = str(INSIDE / "kserve_initializer.py")
    with Peer(KSERVE_STORAGE, "initializers.py", scratch) as peer:
        yield Initializer(peer, program, modules, scratch)


@contextmanager
def this_library(scratch: Path) -> Iterator[Initializer]:
    """Run this library's initializer; its files go below ``scratch``."""
    modules = ("storage.integrations.kserve", "obstore", "requests")
    with Peer(_ThisInterpreter("modelstorage"), "initializers.py", scratch) as peer:
        program = Initializer(peer, "storage.integrations.kserve", modules, scratch)
        expected = REPOSITORY / "storage" / "integrations" / "kserve"
        assert Path(program.files[0]).parent == expected, program.files
        yield program
