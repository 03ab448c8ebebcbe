"""Spools and senders for tests, and child processes that use them until they are killed.

``python -m tests.integrations.scaleout_reports.support`` is a process that has imported everything
and forks a child for each order, so that a child costs milliseconds. A child counts *ticks*: one
before and one after every call that changes a file of the spool or the store. At the tick that its
order names it sends itself SIGKILL: no clean-up code runs.

What a child was told to be taken, it writes to a log that no spool knows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import storage
from storage import StorageClient
from storage.backends.base import Backend
from storage.config import load_settings
from storage.errors import StorageError, TransientError
from storage.integrations.scaleout import records
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.sender import Sender
from storage.integrations.scaleout.spool import Spool
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

__all__ = [
    "CLIENT",
    "WAIT",
    "Gate",
    "Gated",
    "Nursery",
    "Order",
    "Spool",
    "Wrapping",
    "acknowledged",
    "are_not_stormed",
    "away",
    "delivered",
    "empty",
    "fill",
    "impatient",
    "observation",
    "once",
    "sender_to",
    "start_idle",
    "store_at",
    "until",
]

WAIT = 60.0
"""Seconds for what takes a moment on a machine that is not busy; disks can be slow, too."""

CLIENT = "edge/1"
"""The client of these tests; its id has a character that no name of a folder can have."""

_HOOKED = ("open", "write", "pwrite", "ftruncate", "replace", "unlink", "fsync", "fdatasync")


def observation(number: int, size: int = 0) -> records.Report:
    """Return a report that can be told from all others."""
    return records.telemetry("seen", {"value": number, "padding": "x" * size})


class Wrapping(StorageClient):
    """A client whose backends a test puts something around."""

    def __init__(self, wrap: Callable[[Backend], Any], **options: Any) -> None:
        """Call ``wrap`` with every backend."""
        super().__init__(**options)
        self._wrap = wrap

    def backend(self, *args: Any, **options: Any) -> Any:
        return self._wrap(super().backend(*args, **options))


def impatient() -> Any:
    """Return settings with which a failure is told at once."""
    return load_settings(transfer={"attempts": 1, "connect_timeout": 2})


def store_at(uri: object, config: Any = None, client: StorageClient | None = None) -> ObjectStore:
    """Return where batches go; by default a failed request is not repeated there."""
    client = client or StorageClient(settings=impatient())
    return ObjectStore(client, parse_uri(f"{uri}/"), config)


def sender_to(
    spool: Spool, uri: object, config: Any = None, client: StorageClient | None = None, **how: Any
) -> Sender:
    """Return a sender that does not wait long."""
    options = {"linger": 0.0, "wait_initial": 0.02, "wait_max": 0.1, **how}
    return Sender(spool, store_at(uri, config, client), **options)


def start_idle(sender: Sender) -> None:
    """Start a sender that finds nothing, and return when it waits for a first report.

    What is there before its first look, it sends without waiting for more.
    """
    sender.start()
    until(lambda: sender._wanted == 1)


def empty(sender: Sender) -> None:
    """Deliver everything, in this thread."""
    while sender._step():
        pass


def delivered(uri: object, config: Any = None) -> Counter[int]:
    """Return how often each observation was delivered, duplicates included, by reading it all."""
    reports = Reports(str(uri), config=config)
    found: Counter[int] = Counter()
    for name in reports._names(""):
        batch = reports._read(name)
        assert isinstance(batch, tuple), batch
        found.update(record.report.payload["value"] for record in batch[1])
    return found


def fill(spool: Spool, *numbers: int, size: int = 0) -> None:
    """Report some observations."""
    for number in numbers:
        spool.append(observation(number, size))


def once(*numbers: int) -> dict[int, int]:
    """Return that each of ``numbers`` was delivered once."""
    return dict.fromkeys(numbers, 1)


def until(condition: Callable[[], object]) -> None:
    """Wait for something to come true."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def are_not_stormed(tries: int, wait_initial: float, since: float) -> bool:
    """Tell whether so many failed tries are as far apart as they have to be.

    Each wait is twice the one before, of which chance takes half at most. A machine that stands
    still for a while has more time for tries, so that a mere number would say nothing.
    """
    took = time.monotonic() - since
    return wait_initial / 2 * (2.0 ** (tries - 1) - 1) <= took


class Gate:
    """Around a backend: a test says what its writes meet."""

    def __init__(self) -> None:
        self.error: Callable[[str], Exception | None] = lambda key: None
        self.writes: list[str] = []
        self.is_applied = False
        """Whether a write is done before its error."""

    def client(self) -> StorageClient:
        return Wrapping(partial(Gated, self), settings=impatient())


class Gated:
    def __init__(self, gate: Gate, backend: Any) -> None:
        self._gate = gate
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write(self, key: str, *args: Any, **options: Any) -> Any:
        self._gate.writes.append(key)
        error = self._gate.error(key)
        if error is None or self._gate.is_applied:
            result = self._backend.write(key, *args, **options)
        if error is not None:
            raise error
        return result


def away(_: str) -> Exception:
    """Return the error of a store that cannot be reached."""
    return TransientError("nobody answers")


def acknowledged(log: Path) -> list[int]:
    """Return what children noted that was taken."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


# -- children --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What one child is to do."""

    folder: str
    uri: str
    log: str
    """Where it notes what was taken."""

    config: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    count: int = 12
    """Which observations it reports."""

    tick: int | None = None
    """At which it is killed."""

    threaded: bool = False
    """Whether a thread delivers meanwhile; otherwise some is delivered after every fourth."""

    durable: bool = False
    file_size: int | None = None
    """Bytes that a file may have (RLIMIT_FSIZE)."""

    segment_bytes: int = 800
    most: int = 3
    """Records of a batch."""


class Nursery:
    """The parent's end; a context manager."""

    def __enter__(self) -> Self:
        root = str(Path(storage.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.scaleout_reports.support"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(2 * WAIT)
        self._process.stdout.close()

    def start(self, order: Order) -> int:
        """Begin; return the id of the child."""
        return int(self._ask(asdict(order)))

    def wait(self) -> int:
        """Return how the child ended: 0, or minus the number of a signal."""
        return int(self._ask(None))

    def run(self, order: Order) -> int:
        """Do both."""
        self.start(order)
        return self.wait()

    def _ask(self, what: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def _serve() -> None:
    child = 0
    for line in sys.stdin:
        order = json.loads(line)
        if order is None:
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            answer = child = os.fork()
            if not child:
                _be_child(Order(**order))
        print(answer, flush=True)


def _be_child(order: Order) -> None:
    try:
        _work(order)
        os._exit(0)
    finally:
        # The child must not go on as its parent would, whatever failed.
        traceback.print_exc()
        os._exit(1)


def _work(order: Order) -> None:
    log = os.open(order.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    note = os.write
    clock = _Ticks(order.tick)
    clock.hook()
    if order.file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_size, resource.RLIM_INFINITY))
    client = Wrapping(clock.wrap, settings=impatient())
    config = _config(order.config)
    spool = Spool(order.folder, CLIENT, durable=order.durable, segment_bytes=order.segment_bytes)
    sender = sender_to(spool, order.uri, config, client, most=order.most)
    if order.threaded:
        sender.start()
    for number in range(order.first, order.first + order.count):
        try:
            spool.append(observation(number))
        except StorageError:
            continue
        note(log, b"%d\n" % number)
        if order.threaded:
            time.sleep(0.002)
        elif number % 4 == 3:
            sender._step()
    if order.threaded:
        assert sender.close(60)
    else:
        empty(sender)
    spool.close()


def _config(fields: dict[str, Any]) -> Any:
    return storage.S3Config(**fields) if fields else None


def _do_not_sync(descriptor: int) -> None:
    """Do nothing: a killed process loses nothing that the kernel has, and disks are slow."""
    os.fstat(descriptor)


class _Ticks:
    """Kills this process at a tick."""

    def __init__(self, last: int | None) -> None:
        self._last = last
        self._count = 0
        self._here = threading.local()

    def hook(self) -> None:
        for name in ("fsync", "fdatasync"):
            setattr(os, name, _do_not_sync)
        for name in _HOOKED:
            setattr(os, name, self._hooked(getattr(os, name)))

    def _hooked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.tick()
            result = function(*args, **options)
            self.tick()
            return result

        return call

    def tick(self) -> None:
        if getattr(self._here, "is_away", False):
            return
        self._count += 1
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, backend: Backend) -> Any:
        return _Ticking(backend, self)

    def away(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call the store: one tick before and one after, whatever it does."""
        self.tick()
        self._here.is_away = True
        try:
            return function(*args, **options)
        finally:
            self._here.is_away = False
            self.tick()


class _Ticking:
    def __init__(self, backend: Backend, clock: _Ticks) -> None:
        self._backend = backend
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def write(self, *args: Any, **options: Any) -> Any:
        return self._clock.away(self._backend.write, *args, **options)


if __name__ == "__main__":
    _serve()
