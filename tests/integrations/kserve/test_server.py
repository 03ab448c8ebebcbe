"""KServe's own model server serves a model that this library fetched, by the replaced import."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from tests.integrations.kserve.side import REPOSITORY
from tests.integrations.mlflow_support import PROJECT
from tests.peers.environments import INSIDE, Release
from tests.servers import SeaweedFS, Server, ServerError, free_port

SERVING = str(INSIDE / "kserve_serving.py")
KSERVE = Release(
    "kserve==0.21.0",
    besides=(
        *("joblib", "scikit-learn"),
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["s3"],
    ),
)
"""The model server with scikit-learn, and what this library needs for S3; without its client."""


class ModelServer(Server):
    """One server of KServe's with one model."""

    name = "kserve"
    health_path = "/v2/health/ready"

    def __init__(self, uri: str, variables: Mapping[str, str]) -> None:
        """Start nothing yet; ``variables`` lead to the store of ``uri``."""
        super().__init__()
        self._uri, self._variables = uri, variables

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        return [KSERVE.python(), SERVING, "serve", self._uri, "--port", str(self.port)]

    def environment(self) -> Mapping[str, str]:
        """Return what leads to this library and to the store."""
        return {**self._variables, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        answer = requests.get(self.endpoint + path, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any) -> Any:
        """Post JSON and return the answer's."""
        answer = requests.post(self.endpoint + path, json=body, timeout=60)
        assert answer.ok, answer.text
        return answer.json()


class Trained(NamedTuple):
    """A model on this machine."""

    folder: Path
    flowers: list[list[float]]
    classes: list[int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A classifier of scikit-learn's, and what it says of some flowers."""
    folder = tmp_path_factory.mktemp("trained")
    try:
        python = KSERVE.python()
    except ServerError as exc:
        pytest.fail(f"{KSERVE.requirement} cannot be installed: {exc}", pytrace=False)
    ended = subprocess.run(
        [python, SERVING, "train", str(folder)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    return Trained(folder, said["flowers"], said["classes"])


@pytest.fixture
def variables(seaweedfs: SeaweedFS) -> dict[str, str]:
    """What the webhook of KServe sets for a service account with a secret of S3."""
    return {
        "AWS_ACCESS_KEY_ID": seaweedfs.access_key,
        "AWS_SECRET_ACCESS_KEY": seaweedfs.secret_key,
        "AWS_DEFAULT_REGION": seaweedfs.region,
        "AWS_EC2_METADATA_DISABLED": "true",
        "S3_ENDPOINT": seaweedfs.endpoint.removeprefix("http://"),
        "S3_USE_HTTPS": "0",
    }


@pytest.fixture
def uri(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, trained: Trained) -> str:
    """The model in a bucket, beside a file that is not the model's."""
    model = (trained.folder / "model.joblib").read_bytes()
    seaweedfs.put_raw(shared_bucket, f"{prefix}/iris/model.joblib", model)
    seaweedfs.put_raw(shared_bucket, f"{prefix}/iris/README.md", b"# Flowers")
    seaweedfs.put_raw(shared_bucket, f"{prefix}/iris-v2/model.pkl", b"of another model")
    return f"s3://{shared_bucket}/{prefix}/iris"


@pytest.fixture
def archive(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, trained: Trained, tmp_path: Path
) -> str:
    """The model as an archive in a bucket."""
    packed = tmp_path / "iris.tar.gz"
    with tarfile.open(packed, "w:gz") as opened:
        opened.add(trained.folder / "model.joblib", "model.joblib")
    seaweedfs.put_raw(shared_bucket, f"{prefix}/iris.tar.gz", packed.read_bytes())
    return f"s3://{shared_bucket}/{prefix}/iris.tar.gz"


def _serves(server: ModelServer, trained: Trained) -> None:
    """Assert that both protocols give the model's own answers."""
    assert server.get("/v2/health/ready") == {"ready": True}
    assert server.get("/v1/models/iris") == {"name": "iris", "ready": True}
    assert server.get("/v2/models/iris/ready") == {"name": "iris", "ready": True}
    first = server.post("/v1/models/iris:predict", {"instances": trained.flowers})
    assert first == {"predictions": trained.classes}
    values = [value for flower in trained.flowers for value in flower]
    tensor = {"name": "input-0", "shape": [len(trained.flowers), 4], "datatype": "FP64"}
    second = server.post("/v2/models/iris/infer", {"inputs": [{**tensor, "data": values}]})
    assert second["model_name"] == "iris"
    assert second["outputs"][0]["data"] == trained.classes
    assert len(set(trained.classes)) == 3


@pytest.fixture
def pod(tmp_path: Path, variables: dict[str, str], archive: str) -> Path:
    """The folder that a pod's initializer leaves to its model server."""
    models = tmp_path / "models"
    ended = subprocess.run(
        [KSERVE.python(), "-m", "storage.integrations.kserve", archive, str(models)],
        env={**variables, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in models.iterdir()] == ["model.joblib"]
    return models


def test_the_real_server_serves_what_the_replaced_import_fetched_from_s3(
    uri: str, variables: dict[str, str], trained: Trained
) -> None:
    """The server itself calls ``Storage.download`` when it loads the model."""
    with ModelServer(uri, variables) as server:
        _serves(server, trained)
        pid = server.pid
    assert not Path(f"/proc/{pid}").exists()


def test_the_real_server_serves_what_the_initializer_left(pod: Path, trained: Trained) -> None:
    """The usual way in a pod: the initializer fetches, and the server takes the folder."""
    with ModelServer(str(pod), {}) as server:
        _serves(server, trained)


def test_a_server_whose_model_is_missing_ends_and_says_why(
    uri: str, variables: dict[str, str]
) -> None:
    """KServe restarts the container; its log has the reason."""
    with pytest.raises(ServerError, match="ModelMissingError"):
        ModelServer(uri[:-1], variables).start()
