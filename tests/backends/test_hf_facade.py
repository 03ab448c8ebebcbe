"""`Storage` and `StorageOperations` on a Hub."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import storage.facade
from storage import Storage, StorageClient, StorageOperations
from storage.config import HFConfig, load_settings
from storage.digest import hash_file, tree_digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    OfflineError,
    StorageError,
    UnsupportedOperation,
)
from tests.servers.hub import Answer, Hub, Repo, Request

WEIGHTS = b"weights" * 1000
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "onnx/model.onnx": b"onnx" * 100,
    "onnx/empty.bin": b"",
}


@pytest.fixture(autouse=True)
def default_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with StorageClient() as client:
        monkeypatch.setattr(storage.facade, "_client", client)
        yield


@pytest.fixture
def repo(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.writer.token)
    repo = hub.repo("owner/m")
    hub.put(repo, FILES)
    hub.forget()
    yield repo
    assert not hub.leaks
    assert not hub.failures


def tree(path: str | Path) -> dict[str, bytes]:
    root = Path(path)
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def fetched(hub: Hub) -> set[str]:
    """Return the keys whose bytes were asked for."""
    return {request.path.split("/resolve/")[1] for request in hub.asked("GET", "/resolve/")}


def test_whole_repository_is_downloaded(repo: Repo, tmp_path: Path) -> None:
    assert tree(Storage.download("hf://owner/m", tmp_path / "m")) == FILES
    assert tree(Storage.download("hf://owner/m")) == FILES


def test_second_download_moves_no_bytes(hub: Hub, repo: Repo) -> None:
    first = Storage.download("hf://owner/m")
    hub.forget()
    assert Storage.download("hf://owner/m") == first
    assert not fetched(hub)
    repo.branches["other"] = repo.head().id
    # Another branch of the same repository, and the same commit.
    assert tree(Storage.download("hf://owner/m@other")) == FILES


def test_commit_elsewhere_does_not_fetch_a_folder_again(hub: Hub, repo: Repo) -> None:
    first = Storage.download("hf://owner/m/onnx")
    hub.put(repo, {"README.md": b"news"})
    hub.forget()
    assert Storage.download("hf://owner/m/onnx") == first
    assert not fetched(hub)
    hub.put(repo, {"onnx/model.onnx": b"new"})
    assert tree(Storage.download("hf://owner/m/onnx"))["model.onnx"] == b"new"


def test_one_file_is_downloaded_without_a_listing(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    found = Storage.download("hf://owner/m/model.safetensors", f"{tmp_path}/")
    assert found == str(tmp_path / "model.safetensors")
    assert Path(found).read_bytes() == WEIGHTS
    assert not hub.asked("GET", "/api/")


def test_folder_is_downloaded(repo: Repo, tmp_path: Path) -> None:
    for uri in ("hf://owner/m/onnx", "hf://owner/m/onnx/"):
        found = Storage.download(uri, tmp_path / "onnx")
        assert tree(found) == {"model.onnx": FILES["onnx/model.onnx"], "empty.bin": b""}


@pytest.mark.parametrize("uri", ["hf://owner/m/onn", "hf://owner/m/none", "hf://owner/m/config"])
def test_beginning_of_a_name_is_no_model(repo: Repo, tmp_path: Path, uri: str) -> None:
    with pytest.raises(ModelMissingError):
        Storage.download(uri, tmp_path / "m")


@pytest.mark.parametrize("pin", ["@v1", ":v1", "@{commit}", "@refs/pr/1", ":refs/pr/1"])
def test_revision_is_downloaded(hub: Hub, repo: Repo, tmp_path: Path, pin: str) -> None:
    commit = repo.head().id
    repo.tags["v1"] = repo.pulls["refs/pr/1"] = commit
    hub.put(repo, {"config.json": b"new", "model.safetensors": b"new", "later": b"1"})
    pin = pin.format(commit=commit)
    assert tree(Storage.download(f"hf://owner/m{pin}", tmp_path / "m")) == FILES
    found = Storage.download(f"hf://owner/m{pin}/config.json", tmp_path / "config.json")
    assert Path(found).read_bytes() == b"{}"
    assert StorageOperations.list_objects(f"hf://owner/m{pin}") == sorted(FILES)
    assert "later" in tree(Storage.download("hf://owner/m", tmp_path / "new"))


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_data_sets_and_spaces(hub: Hub, repo: Repo, tmp_path: Path, kind: str) -> None:
    hub.put(hub.repo("owner/m", kind), {"x.parquet": WEIGHTS, "y.txt": b"y"})
    found = Storage.download(f"hf://{kind}s/owner/m", tmp_path / "d")
    assert tree(found) == {"x.parquet": WEIGHTS, "y.txt": b"y"}


def test_repository_without_an_owner(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.put(hub.repo("gpt2"), FILES)
    assert tree(Storage.download("hf://gpt2", tmp_path / "m")) == FILES
    assert Storage.download("hf://gpt2@main/config.json", tmp_path / "c")


def test_only_what_the_patterns_allow_is_fetched(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    found = Storage.download(
        "hf://owner/m",
        tmp_path / "m",
        allow_patterns=["*.json", "onnx/"],
        ignore_patterns="*.bin",
    )
    assert set(tree(found)) == {"config.json", "onnx/model.onnx"}
    commit = repo.head().id
    assert fetched(hub) == {f"{commit}/config.json", f"{commit}/onnx/model.onnx"}
    with pytest.raises(ModelMissingError, match="patterns"):
        Storage.download("hf://owner/m", tmp_path / "n", allow_patterns="*.gguf")


def test_damaged_large_file_is_never_handed_over(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    hub.damage(repo, "model.safetensors")
    for uri in ("hf://owner/m/model.safetensors", "hf://owner/m"):
        with pytest.raises(IntegrityError, match="sha256"):
            Storage.download(uri, tmp_path / "m")
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("direct", [False, True], ids=["redirected", "direct"])
def test_damaged_small_file_is_never_handed_over(
    hub: Hub, repo: Repo, tmp_path: Path, direct: bool
) -> None:
    hub.direct = direct
    hub.damage(repo, "config.json")
    for uri in ("hf://owner/m/config.json", "hf://owner/m"):
        with pytest.raises(IntegrityError, match="git's id"):
            Storage.download(uri, tmp_path / "m")
        assert not (tmp_path / "m").exists()


def test_expected_digest_is_checked(repo: Repo, tmp_path: Path) -> None:
    sha256 = repo.head().files["model.safetensors"].sha256
    uri = "hf://owner/m/model.safetensors"
    assert Storage.download(f"{uri}#sha256={sha256}", tmp_path / "a")
    with pytest.raises(IntegrityError):
        Storage.download(f"{uri}#sha256={sha256[::-1]}", tmp_path / "b")


def test_branch_that_moves_during_a_download_gives_one_commit(
    hub: Hub, repo: Repo, tmp_path: Path
) -> None:
    new = {key: b"new " + data for key, data in FILES.items()}

    def before(request: Request) -> Answer | None:
        if request.method == "GET" and "/resolve/" in request.path:
            hub.before = None
            hub.put(repo, new)
        return None

    hub.before = before
    assert tree(Storage.download("hf://owner/m", tmp_path / "old")) == FILES
    assert tree(Storage.download("hf://owner/m", tmp_path / "new")) == new


def test_failures_that_pass_are_repeated(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    failed: set[str] = set()

    def before(request: Request) -> Answer | None:
        place = f"{request.method} {request.path}"
        if place in failed:
            return None
        failed.add(place)
        return Answer(503, {"Retry-After": "0"})

    hub.before = before
    assert tree(Storage.download("hf://owner/m", tmp_path / "m")) == FILES
    assert len(failed) > 5


def test_cached_model_is_served_while_the_hub_is_switched_off(
    hub: Hub, repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = Storage.download("hf://owner/m")
    hub.forget()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)
    assert Storage.download("hf://owner/m") == cached
    with pytest.raises(OfflineError, match="never cached"):
        Storage.download("hf://owner/m/config.json")
    with pytest.raises(OfflineError):
        StorageOperations.list_objects("hf://owner/m")
    assert not hub.requests


def test_upload_of_a_folder_is_one_commit(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for number in range(30):
        (source / f"part-{number}.json").write_bytes(b"%d" % number)
    (source / "model.safetensors").write_bytes(WEIGHTS * 10)
    (source / "empty").touch()
    before = repo.head()
    assert Storage.upload(source, "hf://owner/m/v2")
    assert repo.head().parent == before.id
    assert tree(Storage.download("hf://owner/m/v2", tmp_path / "back")) == tree(source)
    assert set(FILES) < set(repo.head().files)


def test_upload_to_the_root_and_to_a_branch(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_bytes(b"new")
    repo.branches["dev"] = repo.head().id
    assert Storage.upload(source, "hf://owner/m@dev")
    assert hub.get(repo, "config.json", "dev") == b"new"
    assert hub.get(repo, "config.json") == b"{}"
    assert Storage.upload(source / "config.json", "hf://owner/m/deep/")
    assert hub.get(repo, "deep/config.json") == b"new"


def test_upload_that_may_not_overwrite(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_bytes(b"new")
    head = repo.head()
    for uri in ("hf://owner/m", "hf://owner/m/onnx"):
        with pytest.raises(ObjectExistsError):
            Storage.upload(source, uri, overwrite=False)
    with pytest.raises(ObjectExistsError):
        Storage.upload(source / "config.json", "hf://owner/m/config.json", overwrite=False)
    assert repo.head() is head
    assert Storage.upload(source, "hf://owner/m/new", overwrite=False)


def test_upload_makes_no_repository(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(BucketMissingError, match="not made by an upload"):
        Storage.upload(tmp_path / "a", "hf://owner/new/a")
    assert ("model", "owner/new") not in hub.state.repos


def test_real_model_makes_the_round_trip(
    hub: Hub, repo: Repo, minilm: Path, tmp_path: Path
) -> None:
    hub.repo("owner/minilm", private=True)
    assert Storage.upload(minilm, "hf://owner/minilm")
    expected = tree_digest(
        {
            str(path.relative_to(minilm)): hash_file(path, ["sha256"])["sha256"]
            for path in minilm.rglob("*")
            if path.is_file()
        }
    )
    found = Storage.download("hf://owner/minilm", tmp_path / "m", digest=str(expected))
    assert tree(found).keys() == tree(minilm).keys()


def test_list_describe_and_delete(hub: Hub, repo: Repo) -> None:
    assert StorageOperations.list_objects("hf://owner/m") == sorted(FILES)
    assert StorageOperations.list_objects("hf://owner/m/onnx") == ["empty.bin", "model.onnx"]
    told = StorageOperations.get_object_metadata("hf://owner/m/model.safetensors")
    entry = repo.head().files["model.safetensors"]
    assert told["size"] == len(WEIGHTS)
    assert told["digests"] == {"sha256": entry.sha256}
    assert told["version"] == repo.head().id
    assert StorageOperations.get_object_metadata("hf://owner/m")["objects"] == len(FILES)
    before = repo.head()
    assert StorageOperations.delete_object("hf://owner/m/config.json")
    with pytest.raises(InvalidInput, match="recursive"):
        StorageOperations.delete_object("hf://owner/m/onnx")
    assert StorageOperations.delete_object("hf://owner/m/onnx", recursive=True)
    assert set(repo.head().files) == {"model.safetensors"}
    parent = repo.head().parent
    assert parent is not None
    assert repo.commits[parent].parent == before.id


def test_copy_within_a_repository_moves_no_large_file(hub: Hub, repo: Repo) -> None:
    assert StorageOperations.copy_object("hf://owner/m/model.safetensors", "hf://owner/m/b.bin")
    assert hub.get(repo, "b.bin") == WEIGHTS
    assert not [request for request in hub.requests if request.origin == "cdn"]


def test_copy_of_a_tree_within_a_repository_is_one_commit(hub: Hub, repo: Repo) -> None:
    first = repo.head()
    assert StorageOperations.copy_object("hf://owner/m", "hf://owner/m/copy")
    assert repo.head().parent == first.id
    assert {key for key in repo.head().files if key.startswith("copy/")} == {
        f"copy/{key}" for key in FILES
    }
    for key, data in FILES.items():
        assert hub.get(repo, f"copy/{key}") == data


def test_copy_of_a_tree_to_another_repository_is_one_commit(hub: Hub, repo: Repo) -> None:
    other = hub.repo("owner/other", "dataset")
    first = other.head()
    assert StorageOperations.copy_object("hf://owner/m", "hf://datasets/owner/other/copy")
    assert set(other.head().files) == {f"copy/{key}" for key in FILES}
    assert other.head().parent == first.id
    for key, data in FILES.items():
        assert hub.get(other, f"copy/{key}") == data


def test_copy_from_another_revision_of_the_repository(hub: Hub, repo: Repo) -> None:
    repo.tags["v1"] = repo.head().id
    hub.put(repo, {"model.safetensors": b"new"})
    assert StorageOperations.copy_object(
        "hf://owner/m@v1/model.safetensors", "hf://owner/m/model.safetensors"
    )
    assert hub.get(repo, "model.safetensors") == WEIGHTS


def test_copy_to_and_from_the_hub(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    assert StorageOperations.copy_object("hf://owner/m", f"{tmp_path}/m")
    assert tree(tmp_path / "m") == FILES
    assert StorageOperations.copy_object("hf://owner/m", "memory://hub/m")
    assert StorageOperations.copy_object("memory://hub/m", "hf://owner/m/again")
    for key, data in FILES.items():
        assert hub.get(repo, f"again/{key}") == data


def test_file_is_opened_and_read_in_places(hub: Hub, repo: Repo) -> None:
    with Storage.open("hf://owner/m/model.safetensors") as file:
        file.seek(7 * 500)
        assert file.read(7) == b"weights"
        file.seek(-7, 2)
        assert file.read() == b"weights"
    with Storage.open("hf://owner/m/new.txt", "wb") as file:
        file.write(b"12")
        file.write(b"345")
    assert hub.get(repo, "new.txt") == b"12345"
    with pytest.raises(ObjectExistsError), Storage.open("hf://owner/m/new.txt", "xb") as file:
        file.write(b"1")


def test_file_system_is_usable_by_pandas_and_arrow(hub: Hub, repo: Repo) -> None:
    pandas = pytest.importorskip("pandas")
    data = hub.repo("owner/data", "dataset")
    hub.put(data, {"t.csv": b"a,b\n1,2\n"})
    files = Storage.filesystem("hf://datasets/owner/data")
    with files.open("datasets/owner/data/t.csv") as file:
        assert pandas.read_csv(file)["b"].tolist() == [2]
    arrow = pytest.importorskip("pyarrow.csv")
    with files.open("datasets/owner/data/t.csv") as file:
        assert arrow.read_csv(file).column("a").to_pylist() == [1]


def test_two_accounts_and_two_hubs_in_one_process(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.put(hub.repo("owner/secret", private=True), {"a": b"here"})
    with Hub() as second:
        second.put(second.repo("owner/secret"), {"a": b"there"})
        uri = "hf://owner/secret/a"
        owner, other = HFConfig(hub.writer.token), HFConfig(endpoint=second.url)
        for _ in range(2):
            with Storage.open(uri, config=owner) as file:
                assert file.read() == b"here"
            with Storage.open(uri, config=other) as file:
                assert file.read() == b"there"
            with pytest.raises(BucketMissingError):
                Storage.open(uri)
        assert {request.token for request in second.requests} == {None}
        assert StorageOperations.copy_object(
            uri, "hf://owner/m/copied", config=other, dest_config=owner
        )
        assert hub.get(repo, "copied") == b"there"


def test_config_is_found_by_the_prefix(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HF_ENDPOINT")
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'[stores.ours]\nprefix = "hf://owner/"\nendpoint = "{hub.url}"\n'
        f'token = "{hub.writer.token}"\nrevision = "v1"\n'
    )
    repo.tags["v1"] = repo.head().id
    hub.put(repo, {"config.json": b"new"})
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(settings))
    with StorageClient(settings=load_settings()) as client:
        found = client.download("hf://owner/m/config.json", tmp_path / "c")
        assert Path(found).read_bytes() == b"{}"


def test_kserves_secret_gives_the_token(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.put(hub.repo("owner/secret", private=True), FILES)
    monkeypatch.setenv("STORAGE_CONFIG", f'{{"type": "hf", "HF_TOKEN": "{hub.writer.token}"}}')
    assert tree(Storage.download("hf://owner/secret", tmp_path / "m")) == FILES


def test_gated_repository_is_no_missing_model(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    gated = hub.repo("other/gated", gated=True)
    hub.put(gated, FILES)
    for uri in ("hf://other/gated", "hf://other/gated/config.json"):
        with pytest.raises(AuthenticationError, match="terms"):
            Storage.download(uri, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_command_prints_one_line_without_the_token(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_CANARY0123456789",
        "PYTHONPATH": str(Path(storage.facade.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "storage.cli", "download", "hf://owner/m", str(tmp_path / "m")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "refused the token" in done.stderr
    assert "CANARY" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_reading_imports_no_client_of_the_hub(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    program = (
        "import sys; from storage import Storage;"
        "Storage.download('hf://owner/m', sys.argv[1]);"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
        "PYTHONPATH": str(Path(storage.facade.__file__).parents[1]),
    }
    target = tmp_path / "m"
    subprocess.run(
        [sys.executable, "-c", program, str(target)], env=environment, timeout=120, check=True
    )
    assert tree(target) == FILES
    shutil.rmtree(target)


def test_what_the_hub_cannot_do_is_said(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"1")
    with pytest.raises(InvalidInput, match=r"\.git"):
        Storage.upload(tmp_path / "config", "hf://owner/m/.git/config")
    with pytest.raises(StorageError):
        Storage.upload(tmp_path / "config", "hf://owner/m/config.json/below")
    with pytest.raises((InvalidInput, UnsupportedOperation)):
        Storage.upload(tmp_path / "config", "hf://owner/m/a#sha256=" + "0" * 64)
