"""MLflow's release, what is around it when it runs beside this library, and its server."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.peers.environments import Release
from tests.servers import Server, free_port
from tests.servers.process import HOST

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GROUP = "mlflow.artifact_repository"
SIDE = str(Path(__file__).with_name("mlflow_side.py"))

MLFLOW = Release(
    "mlflow-skinny==3.17.2",
    besides=(
        *PROJECT["dependencies"],
        *sorted(
            {
                requirement
                for extra in ("s3", "gcs", "azure", "hf")
                for requirement in PROJECT["optional-dependencies"][extra]
            }
        ),
        # For runs and models in a database, for pyfunc models, and for the server.
        *("alembic", "sqlalchemy", "numpy", "pandas", "flask", "flask-cors"),
    ),
)
"""The newest to be had. ``mlflow`` is the same code with the pins of everything that it can do."""


class Surroundings(NamedTuple):
    """What a process of MLflow's needs to find this library, and its stores."""

    path: list[str]
    """For ``sys.path``: this repository, and what pip would leave of an installation."""

    environment: Mapping[str, str]


def surroundings(scratch: Path, stores: Mapping[str, Mapping[str, Any]]) -> Surroundings:
    """Write the settings ``stores`` and the entry points of this package below ``scratch``."""
    info = scratch / "site" / f"{PROJECT['name']}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {PROJECT['name']}\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in PROJECT["entry-points"][GROUP].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    settings = scratch / "config.toml"
    with settings.open("w") as file:
        for name, fields in stores.items():
            print(f"[stores.{name}]", file=file)
            for field, value in fields.items():
                print(f"{field} = {json.dumps(value)}", file=file)
    environment = {
        "HF_HUB_DISABLE_XET": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/mlflow.db",
        "NO_GCE_CHECK": "true",
        "STORAGE_SETTINGS_FILE": str(settings),
    }
    return Surroundings([str(info.parent), str(REPOSITORY)], environment)


class MlflowServer(Server):
    """A tracking server that moves its clients' artifacts to a store and back."""

    name = "mlflow"
    health_path = "/health"

    def __init__(self, around: Surroundings, destination: str, home: Path) -> None:
        """Start nothing yet.

        Args:
            around: leads to this library.
            destination: where the server keeps what clients send it.
            home: below its folder ``root`` are artifacts of experiments that name no place.
        """
        super().__init__()
        self._around = around
        self.destination = destination
        self.home = home

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        return [
            *(MLFLOW.python(), "-m", "mlflow", "server"),
            *("--host", HOST, "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"),
            *("--artifacts-destination", self.destination),
            *("--default-artifact-root", f"modelstorage-file://{self.home}/root"),
        ]

    def environment(self) -> Mapping[str, str]:
        """Return what leads to this library."""
        return {
            **self._around.environment,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PYTHONPATH": os.pathsep.join(self._around.path),
        }

    def stop(self) -> None:
        """Stop the server and its workers, which are in a process group of their own."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)
        super().stop()
