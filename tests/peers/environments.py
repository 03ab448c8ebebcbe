"""The releases of the peers, each in a virtual environment of its own, and a process in it.

Their pins clash with one another and with the library's. An environment is made when the first
test asks for it, in the folder where the servers that pip cannot install are too, and found
there by every later session. One that cannot be made fails the tests that need it; it never
skips them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.servers.provision import provided, run_installer

INSIDE = Path(__file__).with_name("inside")
"""The scripts that the peers' interpreters run; they know nothing of this library."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release of a peer on PyPI."""

    requirement: str
    """It, pinned."""

    needs: tuple[str, ...] | None = None
    """What its code under test imports, if its pins cannot be had on every Python that runs the
    tests; ``None`` installs what the release asks for."""

    besides: tuple[str, ...] = ()
    """Packages that it needs, installed with it: without their pins, if it is without its own."""

    @property
    def folder(self) -> str:
        """A name that changes with the requirements and the interpreter."""
        version = sys.implementation.cache_tag
        what = repr((self.requirement, self.needs, self.besides)).encode()
        name = self.requirement.replace("==", "-")
        return f"peer-{name}-{version}-{hashlib.sha256(what).hexdigest()[:8]}"

    def python(self) -> str:
        """Return the path of its interpreter; install it if that was not done yet.

        Raises:
            ServerError: it cannot be installed.
        """
        return str(provided(self.folder, self._install) / "bin" / "python")

    def _install(self, folder: Path) -> None:
        run_installer([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
        pip += ["install", "--quiet", "--disable-pip-version-check"]
        if self.needs is None:
            run_installer([*pip, self.requirement, *self.besides], folder)
        else:
            run_installer([*pip, *self.needs], folder)
            run_installer([*pip, "--no-deps", self.requirement, *self.besides], folder)


# Both pin a grpcio, and the newer one a numpy that Python 3.11 cannot have. The versions are what
# both can live with; their own code is theirs, byte for byte.
_FOR_SCALEOUT = ("cryptography>=50", "grpcio==1.84.0", "numpy>=2.2.6", "protobuf>=6.33.5,<7")

SCALEOUT = Release("scaleoututil==1.1.0", needs=_FOR_SCALEOUT)
"""The newest; it writes ``_version``, and knows files that users attach."""

SCALEOUT_BEFORE = Release("scaleoututil==1.0.7", needs=_FOR_SCALEOUT)
"""The one before; it writes ``version``. Python 3.11 still gets this one from pip."""

# What the client of scaleout imports beside that; it pins a click that it needs for its command.
FOR_SCALEOUT_CLIENT = (
    *_FOR_SCALEOUT,
    *("click>=8.1", "filelock>=4.0.9", "psutil", "pyjwt>=2.10", "pyyaml>=6", "requests>=2.31"),
    "urllib3>=2.6",
)
"""For an environment with ``scaleout`` and ``scaleoututil``, both without their pins."""

ARKINDEX = Release("arkindex-base-worker==0.6.0")
"""The newest; its ``create_archive`` gives three values."""

ARKINDEX_BEFORE = Release(
    "arkindex-base-worker==0.3.7.post1",
    # Its pins of lxml, Pillow, shapely and zstandard have no wheels for Python 3.13.
    needs=(
        "apistar==0.7.2", "legacy-cgi; python_version >= '3.13'", "lxml", "peewee", "Pillow",
        "python-gnupg", "shapely", "tenacity", "typesystem==0.2.5", "zstandard",
    ),
    besides=("arkindex-client==1.0.16", "teklia-toolbox==0.1.5"),
)  # fmt: skip
"""The last one whose ``create_archive`` gives a hash of the content too."""

MODEL_SIGNING = Release("model-signing==1.1.1", besides=("pyOpenSSL",))
"""The newest; it imports pyOpenSSL, which sigstore used to bring."""


class PeerError(Exception):
    """What the peer's code raised; begins with the name of its class."""


class Peer:
    """A process of a peer's interpreter that does one thing after another, as it is told."""

    def __init__(self, release: Release, script: str, scratch: Path) -> None:
        """Start ``script`` of :data:`INSIDE`; its temporary files go below ``scratch``."""
        self.release = release
        self._errors = scratch / "stderr"
        environment = {
            "HOME": str(scratch),
            "LANG": "C.UTF-8",
            "PATH": os.defpath,
            "TMPDIR": str(scratch),
        }
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [release.python(), str(INSIDE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=scratch,
                env=environment,
                text=True,
                encoding="utf-8",
            )

    def __enter__(self) -> Self:
        """Return the peer."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def __call__(self, task: str, /, **arguments: Any) -> Any:
        """Let the peer do ``task`` of its script and return what it says, by way of JSON.

        Raises:
            PeerError: its code raised an exception.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([task, arguments], default=os.fspath) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            printed = self._errors.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise AssertionError(f"the peer died at {task}: {printed}")
        answer: Mapping[str, Any] = json.loads(line)
        if "raised" in answer:
            raise PeerError(answer["raised"])
        return answer["value"]


@contextlib.contextmanager
def running(release: Release, script: str, scratch: Path) -> Iterator[Peer]:
    """Start a process and end it."""
    with Peer(release, script, scratch) as peer:
        yield peer
