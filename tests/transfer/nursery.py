"""Child processes that download, and kill themselves in the middle of it when told to.

``python -m tests.transfer.nursery`` is a process that has imported everything and forks a child
for each order, so that a child costs milliseconds; :class:`Nursery` is its other end. A child
counts *ticks*: one before and one after every call that changes the file system, and one for
every progress event. At the tick that its order names it sends itself a signal, SIGKILL unless
the order says otherwise: no clean-up code runs, just as when the machine's memory is full.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import storage

_TIMEOUT = 60
_HOOKED = (
    "mkdir",
    "open",
    "pwrite",
    "truncate",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "setxattr",
    "write",
    "fdatasync",
)


@dataclass(frozen=True)
class Order:
    """What one child is to do."""

    uri: str
    dest: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``download``."""

    tick: int | None = None
    """Number of the tick, from 1, at which the signal is sent."""

    point: str | None = None
    """Name of ticks, such as ``after rename``; ``tick`` then counts those only."""

    delay: float | None = None
    """Seconds after which the signal is sent, wherever the download is by then."""

    signal: int = signal.SIGKILL
    exchange: bool = True
    """Whether the system can swap two folders at once."""

    durable: bool = False
    step: int | None = None
    """Bytes between two notes in the journal; ``None``: there is none for so little."""

    user: int | None = None
    """User id to become first."""

    folder: str | None = None
    """Working directory."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    signal: int | None
    """What killed it, if it was killed."""

    result: str | None = None
    """What ``download`` returned."""

    error: str | None = None
    """Type of what it raised."""

    message: str | None = None
    ticks: tuple[str, ...] = ()
    """Names of all ticks, if the child lived to tell."""

    seconds: float = 0.0


class Nursery:
    """The parent's end; a context manager."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        root = str(Path(storage.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def run(self, *orders: Order) -> list[Outcome]:
        """Run one child for each order, all at the same time, and wait for all."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        text = json.dumps([asdict(order) for order in orders])
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], 2 * _TIMEOUT)
        assert ready, "the children do not end"
        line = self._process.stdout.readline()
        assert line, "the nursery has died"
        return [Outcome(**(found | {"ticks": tuple(found["ticks"])})) for found in json.loads(line)]


# -- the child's side ----------------------------------------------------------------------


class _Ticks:
    """Counts, and sends the signal when it is time."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._left = order.tick
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if self._left is None or self._order.point not in (None, name):
                return
            self._left -= 1
            due = self._left == 0
        if due:
            os.kill(os.getpid(), self._order.signal)

    def hook(self, module: ModuleType, name: str) -> None:
        """Tick before and after every call of a function."""
        function: Callable[..., Any] = getattr(module, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return function(*args, **kwargs)
            self(f"before {name}")
            result = function(*args, **kwargs)
            self(f"after {name}")
            return result

        setattr(module, name, hooked)


def _download(order: Order) -> dict[str, Any]:
    from storage import files
    from storage.client import StorageClient
    from storage.config import load_settings
    from storage.transfer import journal, progress

    if order.step is not None:
        journal.STEP = journal.WORTH = order.step
    if order.user is not None:
        os.setgroups([])
        os.setgid(order.user)
        os.setuid(order.user)
    if order.folder is not None:
        os.chdir(order.folder)
    ticks = _Ticks(order)
    for name in _HOOKED:
        ticks.hook(os, name)
    ticks.hook(json, "dump")
    if order.exchange:
        ticks.hook(files, "exchange")
    else:
        files.exchange = lambda left, right: False
    # Every piece of progress is to be told.
    progress._INTERVAL = 0.0
    limits = {"part_size": "64KiB", "connections": 4, "attempts": 2, "retry_timeout": 5.0}
    settings = load_settings(transfer=limits, durable=order.durable, cache_dir="/nonexistent")
    client = StorageClient(settings=settings)
    reply: dict[str, Any] = {}
    began = time.monotonic()
    if order.delay is not None:
        timer = threading.Timer(order.delay, os.kill, (os.getpid(), order.signal))
        timer.daemon = True
        timer.start()
    try:
        reply["result"] = client.download(
            order.uri,
            order.dest,
            config=order.config or None,
            progress=lambda _: ticks("progress"),
            **order.options,
        )
    except BaseException as exc:  # noqa: BLE001 -- whatever it is, the parent wants to know
        reply["error"] = type(exc).__name__
        reply["message"] = str(exc)
    reply["ticks"] = ticks.names
    reply["seconds"] = time.monotonic() - began
    return reply


def _child(order: Order, gate: int, answer: int) -> None:
    # A child that hangs ends by this, which is not what anybody expects.
    signal.alarm(_TIMEOUT)
    os.read(gate, 1)
    reply = json.dumps(_download(order)).encode()
    with open(answer, "wb", closefd=False) as file:
        file.write(reply)


def _run(orders: Sequence[Order]) -> list[dict[str, Any]]:
    gate, opener = os.pipe()
    children = []
    for order in orders:
        answer, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(opener)
                _child(order, gate, writer)
                status = 0
            finally:
                # Neither buffers nor exit handlers are this process's own.
                os._exit(status)
        os.close(writer)
        children.append((pid, answer))
    os.close(gate)
    # All of them begin now.
    os.close(opener)
    outcomes = []
    for pid, answer in children:
        with open(answer, "rb") as file:
            text = file.read()
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        assert text or killed is not None, "a child failed"
        outcomes.append({"signal": killed, "ticks": ()} | (json.loads(text) if text else {}))
    return outcomes


def _prepare() -> None:
    """Import everything that a download imports on its way."""
    import obstore.store  # noqa: F401
    import s3fs  # noqa: F401

    from storage.client import StorageClient
    from storage.config import S3Config, load_settings
    from storage.uri import parse_uri

    with StorageClient(settings=load_settings(cache_dir="/nonexistent")) as client:
        for driver in ("obstore", "fsspec"):
            config = S3Config("key", "secret", endpoint_url="http://127.0.0.1", driver=driver)
            client.backend(parse_uri("s3://bucket/key"), config)
        # Once for all, for a child may be a user that cannot read this interpreter's modules.
        for name in ("a", "b"):
            with client.open(f"memory://nursery/{name}", "wb") as file:
                file.write(b"x")
        with tempfile.TemporaryDirectory() as folder:
            client.download("memory://nursery/", os.path.join(folder, "tree"))


def main() -> None:
    """Serve orders until the parent hangs up."""
    _prepare()
    assert threading.active_count() == 1, "a process with threads must not fork"
    for line in sys.stdin.buffer:
        outcomes = _run([Order(**order) for order in json.loads(line)])
        sys.stdout.buffer.write(json.dumps(outcomes).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
