"""The test Hub is honest: the Hub's own client, unchanged, works with it and is refused by it."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.servers.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")

WEIGHTS = b"weights" * 1000


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.writer.token)


def options(hub: Hub, tmp_path: Path) -> dict[str, Any]:
    return {"endpoint": hub.url, "token": hub.writer.token, "cache_dir": tmp_path / "cache"}


def test_real_model_survives_upload_and_download(
    hub: Hub, api: HfApi, minilm: Path, tmp_path: Path
) -> None:
    api.create_repo("owner/minilm", private=True)
    api.upload_folder(folder_path=minilm, repo_id="owner/minilm")
    found = snapshot_download("owner/minilm", **options(hub, tmp_path))
    compared = filecmp.dircmp(minilm, found)
    assert not compared.left_only
    assert not compared.right_only
    assert not compared.diff_files
    assert compared.subdirs
    info = api.model_info("owner/minilm", files_metadata=True)
    [weights] = [each for each in info.siblings or () if each.rfilename == "model.safetensors"]
    assert weights.lfs is not None
    assert weights.size == weights.lfs.size == (minilm / "model.safetensors").stat().st_size
    assert hub.asked("POST", "complete-multipart"), "the upload did not go in parts"
    assert not hub.leaks
    assert not hub.failures


def test_whoami_and_list_of_references(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    first = hub.put(repo, {"a": b"1"}).id
    api.create_tag("owner/m", tag="v1")
    api.create_branch("owner/m", branch="dev/x")
    assert api.whoami()["name"] == "owner"
    refs = api.list_repo_refs("owner/m", include_pull_requests=True)
    assert [(each.name, each.target_commit) for each in refs.tags] == [("v1", first)]
    assert {each.name for each in refs.branches} == {"main", "dev/x"}
    assert [each.title for each in api.list_repo_commits("owner/m")] == ["Put a", "initial commit"]


@pytest.mark.parametrize("direct", [False, True], ids=["redirected", "direct"])
def test_files_of_every_revision(hub: Hub, api: HfApi, tmp_path: Path, direct: bool) -> None:
    hub.direct = direct
    repo = hub.repo("owner/m")
    old = hub.put(repo, {"config.json": b"old", "m.safetensors": b"old weights"})
    api.create_tag("owner/m", tag="v1")
    hub.put(repo, {"config.json": b"new", "m.safetensors": b"new weights"})
    pull = api.upload_file(
        path_or_fileobj=b"proposed",
        path_in_repo="config.json",
        repo_id="owner/m",
        create_pr=True,
    )
    assert pull.pr_revision == "refs/pr/1"
    for revision, expected in {
        "main": b"new",
        "v1": b"old",
        old.id: b"old",
        "refs/pr/1": b"proposed",
    }.items():
        found = hf_hub_download(
            "owner/m", "config.json", revision=revision, **options(hub, tmp_path)
        )
        assert Path(found).read_bytes() == expected
    found = hf_hub_download("owner/m", "m.safetensors", revision="v1", **options(hub, tmp_path))
    assert Path(found).read_bytes() == b"old weights"


def test_commit_of_every_kind_of_operation(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    hub.put(repo, {"a.bin": WEIGHTS, "b.txt": b"b", "old/1": b"1", "old/2": b"2", "c": b"c"})
    api.create_commit(
        "owner/m",
        [
            CommitOperationAdd("new.json", b"{}"),
            CommitOperationAdd("new.safetensors", WEIGHTS[1:]),
            CommitOperationAdd("empty.bin", b""),
            CommitOperationCopy("a.bin", "copies/a.bin"),
            CommitOperationCopy("b.txt", "copies/b.txt"),
            CommitOperationDelete("c"),
            CommitOperationDelete("old/"),
        ],
        commit_message="everything",
    )
    assert set(repo.head().files) == {
        *("a.bin", "b.txt", "new.json", "new.safetensors", "empty.bin"),
        *("copies/a.bin", "copies/b.txt"),
    }
    assert hub.get(repo, "copies/a.bin") == WEIGHTS
    assert hub.get(repo, "new.safetensors") == WEIGHTS[1:]
    assert repo.head().title == "everything"


def test_unchanged_files_make_no_commit(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    hub.put(repo, {"a.bin": WEIGHTS, "b.txt": b"b"})
    before = repo.head()
    for path, data in (("a.bin", WEIGHTS), ("b.txt", b"b")):
        api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="owner/m")
    assert repo.head() is before


def test_stale_parent_is_refused(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    parent = repo.head().id
    hub.put(repo, {"a": b"1"})
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(
            "owner/m",
            [CommitOperationAdd("b", b"2")],
            commit_message="late",
            parent_commit=parent,
        )
    assert caught.value.response.status_code == 412
    assert set(repo.head().files) == {"a"}


def test_large_listing_comes_in_pages(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    hub.page = 7
    names = [f"f{number:02}/x" for number in range(20)]
    hub.put(repo, dict.fromkeys(names, b"1"))
    hub.forget()
    listed = api.list_repo_tree("owner/m", recursive=True, expand=True)
    assert [each.path for each in listed if "/" in each.path] == names
    assert len(hub.asked("GET", "/tree/main")) == 6
    infos = api.get_paths_info("owner/m", ["f00/x", "f01", "none"], expand=True)
    assert [each.path for each in infos] == ["f00/x", "f01"]


def test_file_system_reads_and_writes(hub: Hub) -> None:
    repo = hub.repo("owner/data", "dataset")
    hub.put(repo, {"x/a.csv": b"1,2", "x/b.parquet": WEIGHTS})
    files = HfFileSystem(endpoint=hub.url, token=hub.writer.token, skip_instance_cache=True)
    root = "datasets/owner/data"
    assert files.ls(f"{root}/x", detail=False) == [f"{root}/x/a.csv", f"{root}/x/b.parquet"]
    assert files.cat_file(f"{root}/x/a.csv") == b"1,2"
    with files.open(f"{root}/x/b.parquet", "rb") as file:
        file.seek(7)
        assert file.read(7) == b"weights"
    with files.open(f"{root}/new.csv", "wb") as file:
        file.write(b"3,4")
    assert hub.get(repo, "new.csv") == b"3,4"


def test_what_is_missing_is_said_by_its_code(hub: Hub, api: HfApi) -> None:
    hub.put(hub.repo("owner/m"), {"a": b"1"})
    assert api.file_exists("owner/m", "a")
    assert not api.file_exists("owner/m", "b")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("owner/m", "b", endpoint=hub.url)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("owner/m", revision="none")
    for client in (api, HfApi(endpoint=hub.url, token=False)):
        with pytest.raises(RepositoryNotFoundError):
            client.model_info("owner/none")


def test_private_repository_is_shown_to_its_owner_only(hub: Hub, api: HfApi) -> None:
    hub.put(hub.repo("owner/secret", private=True), {"a": b"1"})
    assert api.model_info("owner/secret").private
    for token in (hub.reader.token, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=token).model_info("owner/secret")


def test_gated_repository_is_read_by_who_was_admitted(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repo("owner/gated", gated=True)
    hub.put(repo, {"a": b"1"})
    asked: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    for token in (hub.reader.token, False):
        assert HfApi(endpoint=hub.url, token=token).model_info("owner/gated").gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download("owner/gated", "a", token=token, **asked)
    repo.admitted.add(hub.reader.name)
    assert hf_hub_download("owner/gated", "a", token=hub.reader.token, **asked)


def test_writing_needs_the_right_to_write(hub: Hub) -> None:
    repo = hub.repo("owner/m")
    for token, status in ((hub.reader.token, 403), (False, 401), ("hf_nobodys", 401)):
        client = HfApi(endpoint=hub.url, token=token)
        with pytest.raises(HfHubHTTPError) as caught:
            client.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="owner/m")
        assert caught.value.response.status_code == status
    assert not repo.head().files


def test_pointer_to_what_was_never_uploaded_is_refused(hub: Hub, api: HfApi) -> None:
    repo = hub.repo("owner/m")
    addition = CommitOperationAdd("a.bin", WEIGHTS)
    # As a client that forgets to upload.
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.create_commit("owner/m", [addition], commit_message="broken")
    assert not repo.head().files


@pytest.mark.parametrize("part_size", [None, 1024], ids=["basic", "multipart"])
def test_upload_of_other_bytes_than_announced_is_refused(
    hub: Hub, api: HfApi, tmp_path: Path, part_size: int | None
) -> None:
    hub.part_size = part_size
    repo = hub.repo("owner/m")
    path = tmp_path / "a.bin"
    path.write_bytes(WEIGHTS)
    addition = CommitOperationAdd("a.bin", path)
    assert addition.upload_info.sha256
    path.write_bytes(WEIGHTS[::-1])
    with pytest.raises(RuntimeError):
        api.create_commit("owner/m", [addition], commit_message="changed meanwhile")
    assert not repo.head().files
    assert not repo.lfs
