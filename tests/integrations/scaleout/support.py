"""What the tests of Scaleout Edge share: its release, its processes, and a fleet on a store."""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from storage import StorageClient
from storage.container import ModelContainer
from storage.container.weights.helpers import NumpyHelper
from storage.integrations.scaleout import TaskBoard
from tests.facade.stores import s3_config
from tests.peers.environments import FOR_SCALEOUT_CLIENT, Peer, Release
from tests.servers import SeaweedFS

HERE = Path(__file__).parent
SIDE = HERE / "side.py"
PROJECT = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())["project"]
# Seconds for what takes one or two; shorter than what a test may take.
WAIT = 120.0

SCALEOUT_CLIENT = Release(
    "scaleout==1.1.0",
    needs=(
        *FOR_SCALEOUT_CLIENT,
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["s3"],
    ),
    besides=("scaleoututil==1.1.0",),
)
"""The newest, with the library's own requirements."""

QUICK = {"poll_interval": 0.2, "heartbeat_interval": 0.5}
"""Options of a runtime whose tests do not wait."""

T = TypeVar("T")


def until(look: Callable[[], T], what: str) -> T:
    """Return what ``look`` returns as soon as it is true."""
    deadline = time.monotonic() + WAIT
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)
    return found


@dataclass
class Fleet:
    """A fleet on a store, its operator in this process, its clients in others."""

    uri: str
    board: TaskBoard
    folder: Path
    """Where clients keep what they have, and write down what they do."""

    environment: Mapping[str, str]
    endpoint: str
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def log(self) -> Path:
        """What the callbacks of clients have written down."""
        return self.folder / "log"

    def lines(self, word: str) -> list[list[str]]:
        """Return the lines of the log that begin with ``word``, without it."""
        if not self.log.exists():
            return []
        found = [line.split() for line in self.log.read_text().splitlines()]
        return [words[1:] for words in found if words[0] == word]

    def process(self, **environment: str) -> Peer:
        """Start a process with scaleout and this library in it, and these variables."""
        scratch = self.folder / uuid.uuid4().hex
        scratch.mkdir()
        peer = self._stack.enter_context(Peer(SCALEOUT_CLIENT, str(SIDE), scratch))
        variables = {
            "SCALEOUT_CLIENT_SEND_TELEMETRY": "false",
            "SCALEOUT_MODEL_CACHE_DIR": str(scratch / "staged"),
            "STORAGE_CACHE_DIR": str(self.folder / "cache"),
            "NO_GCE_CHECK": "true",
            **self.environment,
            **environment,
        }
        assert peer("prepare", environment=variables) == "1.1.0"
        return peer

    def start(
        self,
        client: str,
        peer: Peer | None = None,
        how: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Peer:
        """Start a client, in a process of its own or in ``peer``; ``how`` is told to ``run``."""
        peer = peer or self.process()
        state = self.folder / "state"
        answer = peer(
            "start",
            client_id=client,
            uri=self.uri,
            folder=state,
            log=self.log,
            options={**QUICK, **options},
            how=how,
        )
        assert answer == ["Assigned", f"the {client}"]
        return peer

    def seed(self, model_id: str, *values: float) -> str:
        """Store a model with these weights, and return its id."""
        import numpy as np

        made = ModelContainer.from_training_model(
            [np.array(values or (1.0, 2.0), dtype=np.float32)], NumpyHelper()
        )
        with made, made.to_builder().set_model_id(model_id).build() as model:
            self.board.models.accept(model_id, model.get_filechunk_stream())
        return model_id

    def weights(self, model_id: str) -> list[float]:
        """Return the first weights of a model, as this library reads them."""
        found = ModelContainer.from_filechunk_stream(self.board.models.chunks(model_id))
        with found:
            assert found.model_id == model_id
            return [float(each) for each in found.get_training_model()[0]]

    def close(self) -> None:
        """End all processes."""
        self._stack.close()


def kill(peer: Peer) -> None:
    """Kill a process as a kernel without memory does."""
    process = peer._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def fleet_in(folder: Path) -> Iterator[Fleet]:
    """Make a fleet in a folder of this machine."""
    with StorageClient() as client:
        uri = str(folder / "the fleet")
        fleet = Fleet(uri, TaskBoard(uri, client=client), folder, {}, "")
        try:
            yield fleet
        finally:
            fleet.close()


@contextmanager
def fleet_on(server: SeaweedFS, bucket: str, folder: Path, *, attempts: int = 5) -> Iterator[Fleet]:
    """Make a fleet on SeaweedFS, whose clients make so many attempts for each request."""
    uri = f"s3://{bucket}/{uuid.uuid4().hex}/the fleet"
    settings = folder / "settings.toml"
    store = {
        "prefix": "s3://",
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
        "endpoint_url": server.endpoint,
    }
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in store.items())
    settings.write_text(f"[transfer]\nattempts = {attempts}\n[stores.s3]\n{text}")
    environment = {"STORAGE_SETTINGS_FILE": str(settings)}
    with StorageClient(s3_config(server, "obstore")) as client:
        fleet = Fleet(uri, TaskBoard(uri, client=client), folder, environment, server.endpoint)
        try:
            yield fleet
        finally:
            fleet.close()
