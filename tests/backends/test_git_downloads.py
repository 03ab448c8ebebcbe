"""Git repositories: what is downloaded, and what a repeat costs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import (
    GitConfig,
    IntegrityError,
    ModelMissingError,
    OfflineError,
    StorageClient,
    StorageError,
    UnsupportedOperation,
)
from storage.errors import BucketMissingError
from tests.servers.git_http import GitHTTP

WEIGHTS = os.urandom(300_000)
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "weights/a.bin": WEIGHTS,
    "weights/b.bin": WEIGHTS[:150_000] + b"another" + WEIGHTS[150_000:],
    "naïve 100% [1] #x.txt": b"odd name",
}


@pytest.fixture
def model(git_server: GitHTTP) -> GitHTTP:
    git_server.create("m")
    git_server.commit("m", FILES)
    return git_server


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient() as client:
        yield client


def tree(path: str | Path) -> dict[str, bytes]:
    root = Path(path)
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def test_a_repository_is_downloaded_whole(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    dest = tmp_path / "model"

    assert client.download(model.uri("m"), dest) == str(dest)

    assert tree(dest) == FILES
    assert model.packs() == 1


@pytest.mark.parametrize("how", ["branch", "slash", "tag", "annotated", "commit", "config", "ref"])
def test_a_revision_is_what_it_was(model: GitHTTP, client: StorageClient, how: str) -> None:
    work = model.folder / "m.work"
    old = model.commit("m", {"config.json": b"old"})
    model.git("tag", "v1", cwd=work)
    model.git("tag", "-a", "-m", "first", "v1-annotated", cwd=work)
    model.git("push", "-q", "origin", "HEAD:refs/heads/team/one", cwd=work)
    model.git("push", "-q", "origin", "HEAD:refs/heads/one", cwd=work)
    model.commit("m", {"config.json": b"new"})
    revision = {
        "branch": "@one",
        "slash": "@team%2Fone",
        "tag": "@v1",
        "annotated": "@v1-annotated",
        "commit": f"@{old}",
        "config": "",
        "ref": "@refs%2Fheads%2Fone",
    }[how]
    config = GitConfig(revision="v1") if how == "config" else None

    found = client.download(model.uri("m", revision), config=config)
    one = client.download(model.uri("m", f"{revision}/config.json"), config=config)

    assert tree(found)["config.json"] == b"old"
    assert Path(one).read_bytes() == b"old"
    assert tree(client.download(model.uri("m")))["config.json"] == b"new"


def test_a_folder_and_a_file_of_a_repository_are_downloaded(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    folder = client.download(model.uri("m", "/weights"), tmp_path / "folder")
    file = client.download(model.uri("m", "/weights/a.bin"), tmp_path / "file")

    assert set(tree(folder)) == {"a.bin", "b.bin"}
    assert Path(file).read_bytes() == WEIGHTS
    assert client.list_objects(model.uri("m", "/weights")) == ["a.bin", "b.bin"]
    with pytest.raises(ModelMissingError):
        client.download(model.uri("m", "/weight"))


def test_a_repeat_asks_for_the_revision_and_for_no_pack(model: GitHTTP) -> None:
    with StorageClient() as first:
        path = first.download(model.uri("m"))
    before = len(model.requests)
    # As another process does, which has no pack.
    with StorageClient() as second:
        assert second.download(model.uri("m")) == path
    repeat = model.requests[before:]

    assert model.packs() == 1
    assert len(repeat) <= 2
    # The list of references, which holds no byte of a file.
    assert all("upload-pack" in request[1] for request in repeat)


def test_a_repeat_at_a_commit_asks_nobody(model: GitHTTP) -> None:
    commit = model.git("rev-parse", "main", cwd=model.folder / "m.git")
    with StorageClient() as first:
        path = first.download(model.uri("m", f"@{commit}"))
    before = len(model.requests)
    with StorageClient() as second:
        assert second.download(model.uri("m", f"@{commit}")) == path

    assert len(model.requests) == before


def test_a_new_commit_is_fetched(model: GitHTTP, client: StorageClient) -> None:
    client.download(model.uri("m"))
    model.commit("m", {"config.json": b"new", "empty": None})

    found = tree(client.download(model.uri("m")))

    assert found["config.json"] == b"new"
    assert "empty" not in found
    assert model.packs() == 2


def test_patterns_choose_files_of_a_repository(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    client.download(model.uri("m"), tmp_path / "m", allow_patterns="*.bin", ignore_patterns="*b.*")

    assert set(tree(tmp_path / "m")) == {"weights/a.bin"}


def test_offline_a_repository_comes_from_the_cache(model: GitHTTP, client: StorageClient) -> None:
    with pytest.raises(OfflineError):
        client.download(model.uri("m"), offline=True)
    path = client.download(model.uri("m"))
    before = len(model.requests)

    assert client.download(model.uri("m"), offline=True) == path
    # Neither a part of it nor another revision is what was asked for then.
    for other in ("/weights", "/config.json", "@main"):
        with pytest.raises(OfflineError):
            client.download(model.uri("m", other), offline=True)
        with pytest.raises(OfflineError):
            client.download(model.uri("m", other, user="somebody"), offline=True)
    assert len(model.requests) == before


def test_a_user_s_repository_is_one_of_its_own_offline(
    model: GitHTTP, client: StorageClient
) -> None:
    file = client.download(model.uri("m", "/config.json", user="one"))

    assert client.download(model.uri("m", "/config.json", user="one"), offline=True) == file
    for other in (model.uri("m", "/config.json", user="two"), model.uri("m", user="one")):
        with pytest.raises(OfflineError):
            client.download(other, offline=True)


def test_a_server_of_the_old_protocol_serves_a_repository(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    model.newest = 0

    client.download(model.uri("m", "@main"), tmp_path / "m")

    assert tree(tmp_path / "m") == FILES


def test_a_digest_that_is_expected_is_checked(model: GitHTTP, client: StorageClient) -> None:
    with pytest.raises(IntegrityError):
        client.download(model.uri("m", "/config.json"), digest=f"sha256:{'0' * 64}")


def test_reads_at_a_commit_stay_at_it(model: GitHTTP, client: StorageClient) -> None:
    with client.open(model.uri("m", "/weights/a.bin")) as file:
        model.commit("m", {"weights/a.bin": b"replaced"})
        file.seek(1000)
        assert file.read(50) == WEIGHTS[1000:1050]
        file.seek(0)
        assert file.read() == WEIGHTS


def test_nothing_is_written_to_a_repository(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UnsupportedOperation, match="git"):
        client.upload(tmp_path / "file", model.uri("m", "/file"))
    with pytest.raises(UnsupportedOperation, match="git"):
        client.delete_object(model.uri("m", "/config.json"))


def test_a_repository_is_copied_to_another_store(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    client.copy_object(model.uri("m", "/weights/a.bin"), f"file://{tmp_path}/a.bin")

    assert (tmp_path / "a.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("rest", "kind", "words"),
    [
        ("@nothing", ModelMissingError, "no branch or tag 'nothing'"),
        (f"@{'1' * 40}", ModelMissingError, "no such commit.*not our ref 1111"),
        ("/nothing", ModelMissingError, "no model at"),
        ("/config.json/below", ModelMissingError, "no model at"),
    ],
)
def test_what_is_not_there_is_said(
    model: GitHTTP, client: StorageClient, rest: str, kind: type[StorageError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        client.download(model.uri("m", rest))


def test_a_repository_that_is_not_there_is_said(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    git_server.create("hollow")

    with pytest.raises(BucketMissingError, match="no such repository"):
        client.download(git_server.uri("other"), tmp_path / "m")
    with pytest.raises(ModelMissingError, match="is empty"):
        client.download(git_server.uri("hollow"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_symbolic_links_are_followed_within_the_repository(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    work = git_server.create("links")
    (work / "real" / "deep").mkdir(parents=True)
    (work / "real" / "deep" / "file").write_bytes(b"content")
    (work / "folder").symlink_to("real/deep")
    (work / "real" / "up").symlink_to("../folder/file")
    git_server.push("links")

    client.download(git_server.uri("links"), tmp_path / "m")

    expected = {"real/deep/file", "folder/file", "real/up"}
    assert tree(tmp_path / "m") == dict.fromkeys(expected, b"content")
    assert not any(path.is_symlink() for path in (tmp_path / "m").rglob("*"))
    path = client.download(git_server.uri("links", "/folder/file"))
    assert Path(path).read_bytes() == b"content"


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "gone", "link"])
def test_symbolic_links_that_lead_elsewhere_are_refused(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path, target: str
) -> None:
    work = git_server.create("links")
    (work / "link").symlink_to(target)
    git_server.push("links")

    with pytest.raises(StorageError, match=r"symbolic link"):
        client.download(git_server.uri("links"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_submodule_is_refused(model: GitHTTP, client: StorageClient, tmp_path: Path) -> None:
    work = model.create("outer")
    commit = model.commit("m", {})
    model.git("update-index", "--add", "--cacheinfo", f"160000,{commit},inner", cwd=work)
    model.git("commit", "-q", "-m", "submodule", cwd=work)
    model.git("push", "-q", "origin", "main", cwd=work)

    with pytest.raises(UnsupportedOperation, match=f"submodule.*{commit}"):
        client.download(model.uri("outer"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_executable_file_is_a_file(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    work = git_server.create("tools")
    (work / "run").write_bytes(b"#!/bin/sh\n")
    (work / "run").chmod(0o755)
    git_server.push("tools")

    client.download(git_server.uri("tools"), tmp_path / "m")

    assert tree(tmp_path / "m") == {"run": b"#!/bin/sh\n"}
