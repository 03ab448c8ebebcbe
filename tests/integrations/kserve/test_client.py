"""The class that model servers import in the place of KServe's, on each store."""

from __future__ import annotations

import inspect
import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import (
    AuthenticationError,
    InvalidInput,
    ModelMissingError,
    StorageError,
)
from storage.integrations.kserve import Storage
from tests.backends.azure_identity_server import IdentityServer
from tests.integrations.kserve.support import (
    MODEL,
    child_environment,
    command,
    initialize,
    put_all,
    tar,
    tree,
    variables_of,
)
from tests.servers import Azurite, CountingProxy, FakeGCS, Hub, OddHTTP, Reply, SeaweedFS

ACCOUNT = "https://devstoreaccount1.blob.core.windows.net"


@pytest.fixture
def model(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URI of a model on S3, and the variables that lead there."""
    for name, value in variables_of(seaweedfs).items():
        monkeypatch.setenv(name, value)
    return put_all(seaweedfs, shared_bucket, prefix, MODEL)


def test_the_signature_is_that_of_kserve() -> None:
    names = ["uri", "out_dir", "allow_patterns", "ignore_patterns"]
    parameters = inspect.signature(Storage.download).parameters
    assert list(parameters) == names
    assert [parameters[name].default for name in names[1:]] == [None] * 3
    several = inspect.signature(Storage.download_files).parameters
    assert list(several) == ["source_uris", "out_dirs", *names[2:]]


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys; from storage.integrations.kserve import Storage; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment({}),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"pydantic", "obstore", "requests", "storage.client.client"} & set(found)


def test_a_failure_is_what_model_servers_catch(model: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        Storage.download(f"{model}/nothing", str(tmp_path))
    assert isinstance(caught.value, ModelMissingError)


def test_the_destination_is_returned(model: str, tmp_path: Path) -> None:
    assert Storage.download(model, str(tmp_path / "a")) == str(tmp_path / "a")
    assert Storage.download(Path(tmp_path / "a"), tmp_path / "b") == str(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == MODEL


def test_without_a_destination_it_is_a_folder_in_the_cache(
    model: str, seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    cache = os.environ["STORAGE_CACHE_DIR"]
    archive = put_all(seaweedfs, shared_bucket, f"{prefix}-a", {"m.tgz": tar(MODEL)})

    whole = Storage.download(model)
    single = Storage.download(f"{model}/config.json")
    unpacked = Storage.download(f"{archive}/m.tgz")

    assert all(path.startswith(cache) for path in (whole, single, unpacked))
    assert tree(Path(whole)) == tree(Path(unpacked)) == MODEL
    assert tree(Path(single)) == {"config.json": b"{}"}
    assert Storage.download(model) == whole


def test_without_a_cache_it_is_a_temporary_folder_that_a_failure_does_not_leave(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("STORAGE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    found = Storage.download(model)
    assert tree(Path(found)) == MODEL
    assert Path(found).parent == tmp_path / "tmp"
    with pytest.raises(ModelMissingError):
        Storage.download(f"{model}/nothing")
    with (
        OddHTTP(lambda request: Reply(200, b"no archive at all")) as server,
        pytest.raises(StorageError, match=r"m\.zip"),
    ):
        Storage.download(f"{server.url}/m.zip")
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == [Path(found).name]


def test_a_user_may_have_no_home(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platformdirs

    def refuse(*args: object, **more: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("STORAGE_CACHE_DIR")
    for name in ("user_cache_path", "user_config_path"):
        monkeypatch.setattr(platformdirs, name, refuse)
    monkeypatch.setattr("storage.integrations.kserve.model._is_usable", lambda folder: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert Storage.download(model, tmp_path / "d") == str(tmp_path / "d")
    assert tree(tmp_path / "d") == MODEL
    assert tree(Path(Storage.download(model))) == MODEL


def test_what_is_here_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.bin").write_bytes(b"1")

    assert Storage.download(str(tmp_path / "m")) == str(tmp_path / "m")
    assert Storage.download(f"file://{tmp_path}/m") == f"{tmp_path}/m"
    Storage.download(str(tmp_path / "m"), str(tmp_path / "d"))
    assert stat.S_ISLNK(os.lstat(tmp_path / "d" / "model.bin").st_mode)


def test_patterns_of_the_call(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_ALLOW_PATTERNS", "*.nothing")

    Storage.download(model, str(tmp_path / "a"), allow_patterns=["*.json", "w*"])
    Storage.download(model, str(tmp_path / "b"), [], ["*.bin"])
    # Named by itself, a file is not looked at by the patterns of trees.
    Storage.download(f"{model}/config.json", str(tmp_path / "c"))

    assert set(tree(tmp_path / "a")) == {"config.json", "weights/part-1.bin"}
    assert set(tree(tmp_path / "b")) == {"config.json", "empty"}
    assert set(tree(tmp_path / "c")) == {"config.json"}
    with pytest.raises(ModelMissingError, match="pattern"):
        Storage.download(model, str(tmp_path / "d"))


def test_other_patterns_leave_other_files(model: str, tmp_path: Path) -> None:
    Storage.download(model, str(tmp_path), ["*.json"])
    Storage.download(model, str(tmp_path), ["empty"])
    assert set(tree(tmp_path)) == {"empty"}


def test_one_call_leaves_the_sources_of_another_and_a_list_is_complete(
    model: str, tmp_path: Path
) -> None:
    Storage.download(f"{model}/weights", str(tmp_path))
    Storage.download(f"{model}/config.json", str(tmp_path))
    assert set(tree(tmp_path)) == {"part-1.bin", "config.json"}
    Storage.download_files([f"{model}/empty"], [str(tmp_path)])
    assert set(tree(tmp_path)) == {"empty"}


def test_several_files_at_once(model: str, tmp_path: Path) -> None:
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert Storage.download_files([model, f"{model}/weights"], folders) == folders
    assert tree(tmp_path / "b") == {"part-1.bin": MODEL["weights/part-1.bin"]}
    with pytest.raises(ValueError, match="2 sources and 1 folders"):
        Storage.download_files([model, model], folders[:1])
    with pytest.raises(InvalidInput, match="in order"):
        Storage.download(folders[0], model)
    same = f"{model}/weights/part-1.bin"
    with pytest.raises(InvalidInput, match=r"part-1\.bin"):
        Storage.download_files([f"{model}/weights", same], [folders[1]] * 2)


def test_two_secrets_in_one_process_do_not_meet(
    seaweedfs: SeaweedFS,
    moto_of_another: str,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_all(seaweedfs, shared_bucket, prefix, {"a": b"of SeaweedFS"})

    def secret(endpoint: str) -> str:
        key = {"access_key_id": seaweedfs.access_key, "secret_access_key": seaweedfs.secret_key}
        return json.dumps({"type": "s3", "endpoint_url": endpoint, **key})

    before = dict(os.environ)
    uri = f"s3://{shared_bucket}/{prefix}"
    monkeypatch.setenv("STORAGE_CONFIG", secret(seaweedfs.endpoint))
    Storage.download(uri, str(tmp_path / "a"))
    monkeypatch.setenv("STORAGE_CONFIG", secret(moto_of_another))
    with pytest.raises(StorageError):
        Storage.download(uri, str(tmp_path / "b"))
    monkeypatch.delenv("STORAGE_CONFIG")
    assert dict(os.environ) == before

    assert tree(tmp_path / "a") == {"a": b"of SeaweedFS"}
    assert tree(tmp_path / "b") == {}


@pytest.fixture
def moto_of_another() -> Iterator[str]:
    """The endpoint of a store that has nothing."""
    with OddHTTP(lambda request: Reply(404)) as server:
        yield server.url


def test_threads_of_one_process_agree(model: str, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(Storage.download(model))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert tree(Path(found[0])) == MODEL


def test_processes_that_start_together_fetch_once(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    uri = put_all(seaweedfs, shared_bucket, prefix, {"a.bin": b"1" * 1000, "b.bin": b"2"})
    with CountingProxy(seaweedfs.endpoint) as proxy:
        variables = {**variables_of(seaweedfs), "S3_ENDPOINT": proxy.endpoint}
        children = [
            subprocess.Popen(command(uri, str(tmp_path)), env=child_environment(variables))
            for _ in range(3)
        ]
        assert [child.wait(120) for child in children] == [0] * 3
        fetched = [each for each in proxy.requests if each.method == "GET" and ".bin" in each.path]

    assert len(fetched) == 2
    assert tree(tmp_path) == {"a.bin": b"1" * 1000, "b.bin": b"2"}


def test_logs_hold_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "storage")
    with OddHTTP(lambda request: Reply(200, b"1", {"ETag": '"1"'})) as server:
        Storage.download(f"{server.url}/m.bin?sig=verysecret", str(tmp_path))
    assert tree(tmp_path) == {"m.bin": b"1"}
    assert "m.bin" in caplog.text
    assert "verysecret" not in caplog.text


def test_from_a_bucket_of_google(
    gcs_server: FakeGCS, gcs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    for path, content in MODEL.items():
        gcs_server.put_raw(gcs_bucket, path, content)

    Storage.download(f"gs://{gcs_bucket}", str(tmp_path))
    assert tree(tmp_path) == MODEL


@pytest.fixture
def blobs(azurite: Azurite, azurite_container: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a model on Azure, as Azure's own hosts are called."""
    monkeypatch.setenv("AZURE_SERVICE_URL", azurite.account_url())
    for path, content in MODEL.items():
        azurite.put_raw(azurite_container, f"m/{path}", content)
    return f"{ACCOUNT}/{azurite_container}/m"


def test_from_azure_by_key_and_by_signature(
    blobs: str, azurite: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storage.download(f"{blobs}?{azurite.sas('rl')}", str(tmp_path / "a"))
    with pytest.raises((AuthenticationError, ModelMissingError)):
        Storage.download(blobs, str(tmp_path / "b"))
    monkeypatch.setenv("AZURE_STORAGE_ACCESS_KEY", azurite.main.key)
    Storage.download(blobs, str(tmp_path / "b"))

    assert tree(tmp_path / "a") == tree(tmp_path / "b") == MODEL


def test_from_azure_by_token_and_by_the_identity_of_the_machine(
    azurite_tls: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_SERVICE_URL", azurite_tls.account_url())
    monkeypatch.setenv("SSL_CERT_FILE", str(azurite_tls.ca))
    with azurite_tls.container("kserve-tokens") as container:
        azurite_tls.put_raw(container, "m/a", b"1")
        uri = f"{ACCOUNT}/{container}/m"
        with monkeypatch.context() as patch:
            patch.setenv("AZURE_ACCESS_TOKEN", azurite_tls.bearer())
            Storage.download(uri, str(tmp_path / "a"))
        with IdentityServer(azurite_tls.bearer()) as machine:
            # Of the system: nothing names it.
            monkeypatch.setenv("IDENTITY_ENDPOINT", f"{machine.url}/msi/token")
            monkeypatch.setenv("IDENTITY_HEADER", "header")
            Storage.download(uri, str(tmp_path / "b"))

    assert tree(tmp_path / "a") == tree(tmp_path / "b") == {"a": b"1"}


def test_from_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.writer.token)
    hub.put(hub.repo("owner/m", private=True), dict(MODEL))
    hub.put(hub.repo("owner/archive"), {"m.tgz": tar(MODEL)})

    Storage.download("hf://owner/m", str(tmp_path / "a"))
    Storage.download("hf://owner/archive", str(tmp_path / "b"))

    assert tree(tmp_path / "a") == MODEL
    # Repositories are brought as they are.
    assert set(tree(tmp_path / "b")) == {"m.tgz"}


def test_offline_what_was_cached_is_served(
    model: str, seaweedfs: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CountingProxy(seaweedfs.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT", proxy.endpoint)
        Storage.download(model)
    monkeypatch.setenv("STORAGE_OFFLINE", "true")
    Storage.download(model, str(tmp_path / "a"))
    assert tree(tmp_path / "a") == MODEL
    assert tree(Path(Storage.download(model))) == MODEL
    with pytest.raises(StorageError, match="never cached"):
        Storage.download(f"{model}/weights", str(tmp_path / "b"))


@pytest.mark.slow
def test_a_killed_download_is_gone_on_with(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    from storage.testing.fault_link import Link
    from storage.testing.fault_proxy import FaultProxy

    content = os.urandom(40 * 1024 * 1024)
    uri = put_all(seaweedfs, shared_bucket, prefix, {"large.bin": content})
    with FaultProxy(seaweedfs.endpoint, link=Link(shared_rate=16_000_000)) as proxy:
        variables = {**variables_of(seaweedfs), "S3_ENDPOINT": proxy.endpoint}
        child = subprocess.Popen(command(uri, str(tmp_path)), env=child_environment(variables))
        try:
            deadline = time.monotonic() + 60
            while not any(path.stat().st_size > 500 for path in tmp_path.rglob("journal")):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            child.kill()
            child.wait()
        assert not (tmp_path / "large.bin").exists()
        proxy.clear()

        ended = initialize(uri, str(tmp_path), variables=variables)
        assert ended.status == 0, ended.err
        assert proxy.bytes_down < len(content)
    assert tree(tmp_path) == {"large.bin": content}
    assert os.listdir(tmp_path) == ["large.bin"]
