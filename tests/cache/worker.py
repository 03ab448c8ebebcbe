"""A child process that uses a cache, and dies in the middle of it when told to.

``python -m tests.cache.worker JOB`` runs one job (JSON, see :class:`Job`): steps in random
order, each a download or a command such as ``storage cache gc``. It writes one line of JSON to
standard output when it is ready, and one after each step. With ``STORAGE_KILL_POINT=NAME[:N]``
it sends itself SIGKILL when it passes the point for the N-th time.

The points are the calls that change the file system below the cache's root, before and after:
``before-replace-refs``, ``after-unlink-blobs`` and so on; the last word is the folder of the
cache. The beginning of a name will do (``after-rename``), and ``change`` is any of them.

Without a job it is a process that has imported everything and forks a child for each order, so
that a child costs milliseconds; ``nursery.py`` is its other end.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from tests.cache.askers import hashes
from tests.cache.processes import break_locks
from tests.transfer.support import memory_bucket

__all__ = ["TIMEOUT", "Job", "Model", "fingerprint"]

TIMEOUT = 240
"""Seconds after which a child that hangs is ended."""

_KILL_POINT = "STORAGE_KILL_POINT"


def fingerprint(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return what a :class:`Model` says of its files; a single object has the path ``""``."""
    return {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}


@dataclass(frozen=True)
class Model:
    """Something to download."""

    uri: str
    versions: Sequence[Mapping[str, str]]
    """What it may be: SHA-256 by path. Whatever else is delivered is wrong."""

    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``download``."""


@dataclass(frozen=True)
class Job:
    """What one child is to do."""

    root: str
    """Of the cache."""

    models: Sequence[Model] = ()
    commands: Sequence[Sequence[str]] = ()
    """Arguments of the command ``storage``, such as ``("cache", "gc")``."""

    steps: int | None = None
    """How many steps, each a random model or command; until it is killed if ``None``."""

    seed: int = 0
    kill_point: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """``STORAGE_*`` variables, such as a budget."""

    flock: str | int | None = None
    """``"no-op"``: locks are given to everybody; a number: the error of every attempt."""

    user: int | None = None
    """User id to become first."""

    hold: int = 1
    """Steps after which what was in use is looked at once more, and given up."""


class _Points:
    """Names what changes below a folder, and sends the signal when it is time."""

    def __init__(self, root: str, kill_point: str | None) -> None:
        self._root = os.path.realpath(root)
        self._lock = threading.Lock()
        self._point, _, count = (kill_point or "").partition(":")
        self._left = int(count or 1)
        self.passed: list[str] = []

    def hook(self, module: ModuleType, name: str) -> None:
        """Pass a point before and after every call of a function."""
        function: Callable[..., Any] = getattr(module, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            area = self._area(name, args, kwargs)
            if area is None:
                return function(*args, **kwargs)
            self._pass(f"before-{name}-{area}")
            result = function(*args, **kwargs)
            self._pass(f"after-{name}-{area}")
            return result

        setattr(module, name, hooked)

    def _pass(self, name: str) -> None:
        with self._lock:
            self.passed.append(name)
            if self._point != "change" and not f"{name}-".startswith(f"{self._point}-"):
                return
            self._left -= 1
            due = self._left == 0
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    def _area(self, name: str, args: Any, kwargs: Any) -> str | None:
        """Return the folder of the cache that a call changes; ``None`` if it changes none."""
        number = 1 if name in _TWO_PATHS else 0
        try:
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC):
                return None
            path = self._resolve(args[number], _folder_of(args, kwargs, number))
        except (OSError, TypeError, IndexError):
            return None
        if path != self._root and not path.startswith(self._root + os.sep):
            return None
        area = os.path.relpath(path, self._root).split(os.sep)[0]
        return "root" if area == "." else area

    def _resolve(self, path: Any, folder: int | None) -> str:
        if isinstance(path, int):
            # A pipe or a socket has no path, and is below nothing.
            return os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)
        if folder is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        # The file itself may be a link, which is what is changed then.
        head, tail = os.path.split(os.path.abspath(text))
        return os.path.join(os.path.realpath(head), tail)


_HOOKED = (
    *("mkdir", "open", "write", "pwrite", "truncate", "ftruncate", "posix_fallocate", "fsync"),
    *("chmod", "utime", "setxattr", "link", "symlink", "rename", "replace", "unlink", "remove"),
    "rmdir",
)
_TWO_PATHS = frozenset({"link", "symlink", "rename", "replace", "exchange"})


def _folder_of(args: Any, kwargs: Any, number: int) -> int | None:
    for name in ("dir_fd", "dst_dir_fd" if number else "src_dir_fd"):
        if (found := kwargs.get(name)) is not None:
            return int(found)
    return None


class _Worker:
    """Does the steps of one job and tells about them."""

    def __init__(self, job: Job, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._job = job
        self._tell = tell

    def run(self) -> None:
        job = self._job
        os.environ.update(job.environment, STORAGE_CACHE_DIR=job.root)
        if job.user is not None:
            os.setgroups([])
            os.setgid(job.user)
            os.setuid(job.user)
        if job.flock is not None:
            # For good: this process is the job's alone.
            break_locks(pytest.MonkeyPatch(), None if job.flock == "no-op" else int(job.flock))
        points = _Points(job.root, job.kill_point or os.environ.get(_KILL_POINT))
        from storage import files
        from storage.client import StorageClient

        for name in _HOOKED:
            points.hook(os, name)
        points.hook(files, "exchange")
        rng = random.Random(job.seed)
        choices: list[Model | Sequence[str]] = [*job.models, *job.commands]
        self._tell({"ready": os.getpid()})
        done = 0
        while job.steps is None or done < job.steps:
            with StorageClient() as client:
                held: list[tuple[Model, str]] = []
                for _ in range(job.hold):
                    self._tell(self._step(client, rng.choice(choices), held))
                    done += 1
                    if done == job.steps:
                        break
                # Whatever the others did meanwhile, nothing was taken away or changed.
                for model, path in held:
                    if wrong := _wrong(model, path):
                        self._tell({"what": model.uri, "wrong": f"while in use: {wrong}"})
                client.cache.close()
        self._tell({"points": points.passed})

    def _step(
        self, client: Any, choice: Model | Sequence[str], held: list[tuple[Model, str]]
    ) -> dict[str, Any]:
        from storage.errors import StorageError

        if not isinstance(choice, Model):
            return _command(choice)
        told: dict[str, Any] = {"what": choice.uri}
        try:
            path = client.download(choice.uri, config=choice.config or None, **choice.options)
        except StorageError as exc:
            return told | {"error": type(exc).__name__, "message": str(exc)}
        if wrong := _wrong(choice, path):
            return told | {"path": path, "wrong": wrong}
        held.append((choice, path))
        return told | {"path": path}


def _command(arguments: Sequence[str]) -> dict[str, Any]:
    from storage.cli import main

    # Some commands print bytes, which only a stream of a file takes.
    written, complained = io.BytesIO(), io.StringIO()
    printed = io.TextIOWrapper(written, "utf-8", write_through=True)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        status = main(arguments)
    message = (complained.getvalue() or written.getvalue().decode()).strip()
    return {"what": " ".join(arguments), "status": status, "message": message[-2000:]}


def _wrong(model: Model, path: str) -> str | None:
    """Say what is wrong with a model at ``path``."""
    try:
        found = hashes(path)
    except OSError as exc:
        return f"{path}: {exc}"
    return None if found in model.versions else f"{path} is no version of it: {found}"


def _perform(job: Job, pipe: int) -> int:
    """Do a job; return the exit status."""
    # Not by os.write, which is hooked.
    with open(pipe, "wb", buffering=0, closefd=False) as file:

        def tell(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line).encode() + b"\n")

        try:
            _Worker(job, tell).run()
        except BaseException as exc:  # noqa: BLE001 -- whatever it is, the parent wants to know
            tell({"failed": f"{type(exc).__name__}: {exc}"})
            return 1
    return 0


def _read_job(fields: Mapping[str, Any]) -> Job:
    return Job(**{**fields, "models": [Model(**model) for model in fields.get("models", ())]})


# -- the process that forks ----------------------------------------------------------------


def _fork(order: Mapping[str, Any]) -> int:
    pipe = os.open(order["pipe"], os.O_WRONLY)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            # A child that hangs ends by this, unless it goes on until it is killed.
            signal.alarm(TIMEOUT)
            status = _perform(_read_job(order["job"]), pipe)
        finally:
            # Neither buffers nor exit handlers are this process's own.
            os._exit(status)
    os.close(pipe)
    return pid


def _prepare() -> None:
    """Import everything that a child needs, so that it costs milliseconds."""
    import obstore.store  # noqa: F401
    import requests  # noqa: F401

    import storage.cli.commands  # noqa: F401
    from storage.client import StorageClient
    from storage.config import S3Config, load_settings
    from storage.uri import parse_uri

    with (
        tempfile.TemporaryDirectory() as folder,
        StorageClient(settings=load_settings(cache_dir=folder)) as client,
        memory_bucket({"model/a": b"1", "model/b": b"2"}) as bucket,
    ):
        config = S3Config("key", "secret", endpoint_url="http://127.0.0.1")
        client.backend(parse_uri("s3://bucket/key"), config)
        client.backend(parse_uri("http://127.0.0.1/key"))
        # Twice, to find it in the cache; a child that is another user could import no more.
        for _ in range(2):
            client.download(f"memory://{bucket._bucket}/model")


def main() -> None:
    """Run the job on the command line, else serve orders until the parent hangs up."""
    if len(sys.argv) > 1:
        sys.exit(_perform(_read_job(json.loads(sys.argv[1])), 1))
    _prepare()
    assert threading.active_count() == 1, "a process with threads must not fork"
    for line in sys.stdin.buffer:
        order = json.loads(line)
        answer = os.waitpid(order["reap"], 0)[1] if "reap" in order else _fork(order)
        sys.stdout.buffer.write(b"%d\n" % answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
