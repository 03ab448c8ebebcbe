"""What users of model servers do with a storage library, done with this one.

The classes and functions have the names that those users know; each is run against a real S3
server, a mounted claim and files, with nothing but the environment to say where they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from storage import (
    AuthenticationError,
    GCSConfig,
    ModelMissingError,
    S3Config,
    Storage,
    StorageError,
    StorageOperations,
    TransferError,
)
from tests.facade.stores import tree_bytes
from tests.servers import CountingProxy, SeaweedFS
from tests.servers.azurite import Azurite
from tests.servers.gcs import FakeGCS
from tests.servers.google_tokens import GoogleTokens
from tests.servers.hub import Hub
from tests.servers.nginx_http import NginxHTTP, put_file

pytestmark = pytest.mark.usefixtures("fresh_default_client")


class Classifier:
    """A model as small as a model can be, and yet it predicts."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def predict(self, lengths: Iterable[float]) -> list[str]:
        return ["setosa" if length < self.threshold else "virginica" for length in lengths]


def dumped(threshold: float = 2.5) -> bytes:
    # By its fields: the class is found again under whatever name this module was imported.
    return pickle.dumps({"threshold": threshold})


def load_pickled(path: str) -> Classifier:
    with open(path, "rb") as file:
        return Classifier(**pickle.load(file))


class Model(ABC):
    """What a model server serves."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = False
        self.model: Any = None

    @abstractmethod
    def load(self) -> None: ...


class Bucket:
    """A place on the S3 server; the environment alone says how to get there."""

    def __init__(self, server: SeaweedFS, bucket: str, prefix: str) -> None:
        self.server, self.bucket, self.prefix = server, bucket, prefix

    def uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}/{path}"

    def put(self, path: str, data: bytes) -> str:
        self.server.put_raw(self.bucket, f"{self.prefix}/{path}", data)
        return self.uri(path)


@pytest.fixture
def s3(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Bucket:
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    return Bucket(seaweedfs, shared_bucket, prefix)


# -- a model for a server --------------------------------------------------------------------


def download_model(uri: str, folder: str) -> str:
    local_path = Storage.download(uri, dest=folder)
    if not os.path.exists(local_path):
        raise FileNotFoundError(f"{uri} did not arrive")
    return local_path


class MyModel(Model):
    def __init__(self, name: str, uri: str) -> None:
        super().__init__(name)
        self.uri = uri

    def load(self) -> None:
        self.model = load_pickled(Storage.download(self.uri))
        self.ready = True


def test_a_model_is_downloaded_into_a_folder(s3: Bucket, out: Path) -> None:
    uri = s3.put("sklearn/iris-classifier/model.joblib", dumped())
    path = download_model(uri, f"{out}/models/")
    assert path == str(out / "models" / "model.joblib")
    assert load_pickled(path).predict([1.0, 5.0]) == ["setosa", "virginica"]


def test_a_model_server_loads_its_model(s3: Bucket) -> None:
    model = MyModel("iris", s3.put("models/latest/model.joblib", dumped()))
    model.load()
    assert model.ready
    assert model.model.predict([1.0]) == ["setosa"]


# -- many kinds of stores --------------------------------------------------------------------


def download_from_multiple_sources(sources: list[str]) -> tuple[list[str], dict[str, Exception]]:
    local_paths, failures = [], {}
    for uri in sources:
        try:
            local_paths.append(Storage.download(uri))
        except Exception as exc:  # noqa: BLE001 -- so do its users
            failures[uri] = exc
    return local_paths, failures


def test_several_kinds_of_stores_in_one_list(
    s3: Bucket,
    gcs_server: FakeGCS,
    gcs_bucket: str,
    azurite: Azurite,
    azurite_container: str,
    hub: Hub,
    nginx_http: NginxHTTP,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = tmp_path / "mounts" / "model-pvc" / "xgboost-model"
    local = tmp_path / "local" / "lightgbm-model"
    for folder in (claim, local):
        folder.mkdir(parents=True)
        (folder / "model.bst").write_bytes(folder.name.encode())
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"[stores.claims]\nprefix = 'pvc://model-pvc/'\nmount_root = '{tmp_path / 'mounts'}'\n"
    )
    # The variables that the stores' own clients read.
    for name, value in {
        "STORAGE_SETTINGS_FILE": str(settings),
        "STORAGE_EMULATOR_HOST": gcs_server.endpoint,
        "AZURE_STORAGE_CONNECTION_STRING": azurite.connection_string(),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.writer.token,
    }.items():
        monkeypatch.setenv(name, value)
    s3.put("tensorflow-model/saved_model.pb", b"graph")
    s3.put("tensorflow-model/variables/variables.index", b"index")
    gcs_server.put_raw(gcs_bucket, "pytorch-model/model.pt", b"tensors")
    azurite.put_raw(azurite_container, "sklearn-model/model.joblib", b"trees")
    hub.put(hub.repo("owner/bert"), {"config.json": b"{}", "model.safetensors": b"layers"})
    put_file(nginx_http.data, "releases/model.onnx", b"onnx")
    missing = f"gs://{gcs_bucket}/missing/"
    paths, failures = download_from_multiple_sources(
        [
            s3.uri("tensorflow-model/"),
            f"gs://{gcs_bucket}/pytorch-model/",
            f"azure://{azurite_container}/sklearn-model/",
            "pvc://model-pvc/xgboost-model/",
            f"file://{local}/",
            missing,
            "hf://owner/bert",
            f"{nginx_http.endpoint}/releases/model.onnx",
        ]
    )
    file = paths.pop()
    assert (os.path.basename(file), Path(file).read_bytes()) == ("model.onnx", b"onnx")
    assert [tree_bytes(path) for path in paths] == [
        {"saved_model.pb": b"graph", "variables/variables.index": b"index"},
        {"model.pt": b"tensors"},
        {"model.joblib": b"trees"},
        {"model.bst": b"xgboost-model"},
        {"model.bst": b"lightgbm-model"},
        {"config.json": b"{}", "model.safetensors": b"layers"},
    ]
    assert paths[3:5] == [str(claim), str(local)]
    assert list(failures) == [missing]
    assert isinstance(failures[missing], ModelMissingError)


# -- a second source -------------------------------------------------------------------------


class ConditionalModel(Model):
    def __init__(self, name: str, primary_uri: str, fallback_uri: str) -> None:
        super().__init__(name)
        self.primary_uri = primary_uri
        self.fallback_uri = fallback_uri

    def load(self) -> None:
        failures = []
        for uri in (self.primary_uri, self.fallback_uri):
            try:
                path = Storage.download(uri)
            except Exception as exc:  # noqa: BLE001 -- so do its users
                failures.append(exc)
                continue
            self.model = self._load_model_file(path)
            self.ready = True
            return
        raise RuntimeError(f"no source works: {failures}")

    def _load_model_file(self, path: str) -> Classifier:
        if not path.endswith((".joblib", ".pkl")):
            raise ValueError(f"{path} is of an unknown format")
        return load_pickled(path)


def test_the_fallback_is_used_if_the_first_source_fails(s3: Bucket, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(dumped(9.0))
    primary = s3.put("model.joblib", dumped(1.0))
    fallback = f"file://{tmp_path}/model.pkl"
    for first, second, threshold in (
        (primary, fallback, 1.0),
        (s3.uri("absent.joblib"), fallback, 9.0),
        ("gs://not-yet/model.joblib", primary, 1.0),
    ):
        model = ConditionalModel("iris", first, second)
        model.load()
        assert model.ready
        assert model.model.threshold == threshold


def test_both_failures_are_told_when_no_source_works(s3: Bucket, tmp_path: Path) -> None:
    model = ConditionalModel("iris", s3.uri("absent.joblib"), f"file://{tmp_path}/absent.pkl")
    with pytest.raises(RuntimeError, match=r"absent\.joblib.*absent\.pkl"):
        model.load()
    assert not model.ready


def test_the_format_is_known_by_the_name_that_the_object_has(s3: Bucket) -> None:
    model = ConditionalModel("iris", s3.put("model.onnx", b"onnx"), s3.uri("never asked"))
    with pytest.raises(ValueError, match=r"model\.onnx"):
        model.load()


# -- a cache of the user's own ---------------------------------------------------------------


class VersionedModelLoader:
    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir
        os.makedirs(cache_dir, exist_ok=True)

    def get_model_hash(self, uri: str) -> str:
        return hashlib.md5(uri.encode(), usedforsecurity=False).hexdigest()

    def cache_path(self, uri: str) -> str:
        return os.path.join(self.cache_dir, self.get_model_hash(uri))

    def is_cached(self, uri: str) -> bool:
        return os.path.exists(self.cache_path(uri))

    def load_cached_model(self, uri: str) -> str:
        path = self.cache_path(uri)
        if self.is_cached(uri):
            return path
        found = Storage.download(uri, dest=path)
        about = {"uri": uri, "downloaded_at": str(datetime.now(UTC)), "local_path": found}
        Path(f"{path}.meta").write_text(json.dumps(about))
        return found


class CachedModel(Model):
    def __init__(self, name: str, model_uri: str, cache_dir: str) -> None:
        super().__init__(name)
        self.model_uri = model_uri
        self.loader = VersionedModelLoader(cache_dir)

    def load(self) -> None:
        self.model = load_pickled(self.loader.load_cached_model(self.model_uri))
        self.ready = True


def test_a_loader_keeps_versions_apart(s3: Bucket, out: Path) -> None:
    uris = [s3.put(f"iris/v{n}/model.joblib", dumped(float(n))) for n in (1, 2)]
    for number, uri in enumerate(uris, 1):
        model = CachedModel("iris", uri, str(out))
        assert not model.loader.is_cached(uri)
        model.load()
        assert model.loader.is_cached(uri)
        assert model.model.threshold == number
    # From now on the store is not needed.
    s3.server.delete_raw(s3.bucket, f"{s3.prefix}/iris/v1/model.joblib")
    again = CachedModel("iris", uris[0], str(out))
    again.load()
    assert again.model.threshold == 1
    about = json.loads(Path(f"{again.loader.cache_path(uris[0])}.meta").read_text())
    assert about["uri"] == uris[0]
    assert about["local_path"] == again.loader.cache_path(uris[0])
    assert len(os.listdir(out)) == 4


def test_a_loader_takes_trees_too_and_marks_no_failure_as_cached(s3: Bucket, out: Path) -> None:
    s3.put("tree/model.joblib", dumped())
    s3.put("tree/labels.txt", b"setosa\nvirginica\n")
    loader = VersionedModelLoader(str(out))
    path = loader.load_cached_model(s3.uri("tree/"))
    assert sorted(tree_bytes(path)) == ["labels.txt", "model.joblib"]
    assert loader.load_cached_model(s3.uri("tree/")) == path
    with pytest.raises(ModelMissingError):
        loader.load_cached_model(s3.uri("absent/"))
    assert not loader.is_cached(s3.uri("absent/"))


# -- credentials -----------------------------------------------------------------------------


def setup_authenticated_storage(s3_uri: str, gcs_uri: str) -> tuple[str, str]:
    s3_config = S3Config(
        access_key_id=os.getenv("AWS_ACCESS_KEY_ID"),
        secret_access_key=os.getenv("AWS_SECRET_ACCESS_KEY"),
        region=os.getenv("AWS_DEFAULT_REGION", "us-east-1"),
    )
    gcs_config = GCSConfig(
        service_account_key=os.getenv("KEY_FILE"),
        project_id=os.getenv("GCP_PROJECT_ID"),
    )
    s3_model = Storage.download(s3_uri, config=s3_config)
    gcs_model = Storage.download(gcs_uri, config=gcs_config)
    return s3_model, gcs_model


@pytest.mark.parametrize("region", [None, "us-east-1"])
def test_credentials_come_from_variables(
    s3: Bucket,
    gcs_server: FakeGCS,
    gcs_bucket: str,
    counting_proxy: Callable[[str], CountingProxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    region: str | None,
) -> None:
    if region is not None:
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    s3.put("confidential-model/model.pkl", dumped())
    gcs_server.put_raw(gcs_bucket, "secure-model/model.pkl", dumped(1.5))
    proxy = counting_proxy(gcs_server.endpoint)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
    with GoogleTokens() as tokens:
        key_file = tmp_path / "service-account.json"
        key_file.write_text(json.dumps(tokens.service_account()))
        monkeypatch.setenv("KEY_FILE", str(key_file))
        folders = setup_authenticated_storage(
            s3.uri("confidential-model/"), f"gs://{gcs_bucket}/secure-model/"
        )
    assert [load_pickled(os.path.join(folder, "model.pkl")).threshold for folder in folders] == [
        2.5,
        1.5,
    ]
    assert {request.headers["authorization"][:7] for request in proxy.requests} == {"Bearer "}


def test_variables_that_are_not_set_mean_the_ambient_chain(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No keys in the variables: the config holds ``None`` twice, and a profile has them."""
    uri = s3.put("confidential-model/model.pkl", dumped())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    config = S3Config(
        access_key_id=os.getenv("AWS_ACCESS_KEY_ID"),
        secret_access_key=os.getenv("AWS_SECRET_ACCESS_KEY"),
        region=os.getenv("AWS_DEFAULT_REGION", "us-east-1"),
    )
    with pytest.raises(AuthenticationError, match="credentials"):
        Storage.download(uri, config=config)
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[default]\naws_access_key_id = {s3.server.access_key}\n"
        f"aws_secret_access_key = {s3.server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    assert load_pickled(Storage.download(uri, config=S3Config(None, None))).threshold == 2.5


# -- many models -----------------------------------------------------------------------------


class BatchModelManager:
    def __init__(self, max_workers: int = 4) -> None:
        self.max_workers = max_workers

    def download_models_batch(self, model_uris: list[str]) -> dict[str, str]:
        def download_single(uri: str) -> str:
            try:
                return Storage.download(uri)
            except Exception as exc:  # noqa: BLE001 -- so do its users
                return f"Error: {exc}"

        with ThreadPoolExecutor(max_workers=self.max_workers) as executor:
            return dict(zip(model_uris, executor.map(download_single, model_uris), strict=True))

    def sync_model_versions(self, base_uri: str, local_dir: str) -> list[str]:
        synced = []
        for path in StorageOperations.list_objects(base_uri):
            if path.endswith((".joblib", ".pkl", ".pt")):
                Storage.download(
                    f"{base_uri.rstrip('/')}/{path}", dest=os.path.join(local_dir, path)
                )
                synced.append(path)
        return synced


def test_a_batch_brings_what_is_there_and_tells_what_is_not(
    s3: Bucket, gcs_server: FakeGCS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    good = [s3.put(f"v{n}/model.joblib", dumped(float(n))) for n in range(12)]
    bad = {
        s3.uri("v99/model.bst"): "v99/model.bst",
        "gs://models/v3/pytorch-model.pt": "gs://",
        "s3://no-such-bucket/model.pt": "no-such-bucket",
    }
    results = BatchModelManager().download_models_batch([*good, *bad])
    assert list(results) == [*good, *bad]
    for number, uri in enumerate(good):
        assert load_pickled(results[uri]).threshold == number
    for uri, word in bad.items():
        assert results[uri].startswith("Error: ")
        assert word in results[uri]


@pytest.mark.parametrize("slash", ["", "/"])
def test_all_versions_of_a_model_are_synchronised(s3: Bucket, out: Path, slash: str) -> None:
    files = {
        "v1/model.joblib": dumped(1.0),
        "v2/model.pkl": dumped(2.0),
        "v2/parts/weights.pt": b"weights",
        "v2/notes.txt": b"not a model",
    }
    for path, data in files.items():
        s3.put(f"iris/{path}", data)
    s3.put("iris-other/v1/model.pt", b"a sibling")
    manager = BatchModelManager()
    models = ["v1/model.joblib", "v2/model.pkl", "v2/parts/weights.pt"]
    assert manager.sync_model_versions(s3.uri("iris") + slash, str(out)) == models
    assert tree_bytes(out) == {path: files[path] for path in models}
    # Again, over what is there; and a version that came meanwhile.
    s3.put("iris/v3/model.pt", b"three")
    s3.put("iris/v1/model.joblib", dumped(1.5))
    manager.sync_model_versions(s3.uri("iris") + slash, str(out))
    assert load_pickled(str(out / "v1/model.joblib")).threshold == 1.5
    assert (out / "v3/model.pt").read_bytes() == b"three"


# -- failures --------------------------------------------------------------------------------


class RobustStorageHandler:
    def __init__(self, max_retries: int = 3, retry_delay: float = 0.0) -> None:
        self.max_retries = max_retries
        self.retry_delay = retry_delay
        self.logger = logging.getLogger(__name__)

    def download_with_retry(self, uri: str, dest: str | None = None) -> str:
        for attempt in range(1, self.max_retries + 1):
            try:
                return Storage.download(uri, dest=dest)
            except StorageError as exc:
                self.logger.warning("attempt %d for %s failed: %s", attempt, uri, exc)
                if attempt == self.max_retries:
                    raise
                time.sleep(self.retry_delay * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def validate_storage_access(self, uri: str) -> bool:
        try:
            return StorageOperations.get_object_metadata(uri) is not None
        except Exception:  # noqa: BLE001 -- so do its users
            return False


class RobustModel(Model):
    def __init__(self, name: str, model_uri: str) -> None:
        super().__init__(name)
        self.model_uri = model_uri
        self.storage_handler = RobustStorageHandler()

    def load(self) -> None:
        if not self.storage_handler.validate_storage_access(self.model_uri):
            raise RuntimeError(f"{self.model_uri} cannot be reached")
        self.model = load_pickled(self.storage_handler.download_with_retry(self.model_uri))
        self.ready = True


def test_a_robust_model_checks_and_loads(s3: Bucket) -> None:
    model = RobustModel("iris", s3.put("model.joblib", dumped()))
    model.load()
    assert model.ready
    with pytest.raises(RuntimeError, match="cannot be reached"):
        RobustModel("iris", s3.uri("absent.joblib")).load()


def test_access_is_checked_without_an_exception(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"1")
    handler = RobustStorageHandler()
    uri = s3.put("model.joblib", dumped())
    for accessible in (uri, s3.uri(""), str(tmp_path / "f"), f"file://{tmp_path}"):
        assert handler.validate_storage_access(accessible)
    for inaccessible in (
        s3.uri("absent"),
        "s3://no-such-bucket/m",
        "gs://later/m",
        str(tmp_path / "absent"),
        "",
        "s3://",
    ):
        assert not handler.validate_storage_access(inaccessible)


def test_a_handler_tries_again(
    s3: Bucket,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = s3.put("model.joblib", dumped())
    # One try in the library for each of the handler's: its own retries are what is tested.
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "1")
    with CountingProxy(
        s3.server.endpoint, lambda number, method, path: 503 if number <= 2 else None
    ) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        path = RobustStorageHandler().download_with_retry(uri, str(out / "model.joblib"))
        assert load_pickled(path).threshold == 2.5
        assert [request.status for request in proxy.requests[:2]] == [503, 503]
    assert len(caplog.records) == 2
    assert all(s3.server.secret_key not in record.getMessage() for record in caplog.records)


def test_a_handler_gives_up_with_the_error_of_the_last_try(
    s3: Bucket, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = s3.put("model.joblib", dumped())
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "1")
    with CountingProxy(s3.server.endpoint, lambda number, method, path: 503) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(TransferError, match="503"):
            RobustStorageHandler().download_with_retry(uri, str(out / "model.joblib"))
        assert proxy.count() == 3
    with pytest.raises(ModelMissingError):
        RobustStorageHandler().download_with_retry(f"{out}/absent")
    assert os.listdir(out) == []


def test_what_is_no_error_of_a_store_is_not_tried_again(
    s3: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TypeError):
        RobustStorageHandler().download_with_retry(s3.put("m", b"1"), dest=5)  # type: ignore[arg-type]
    assert caplog.records == []
