"""Git repositories: passwords, other hosts, damage on the way, and large file storage."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from storage import (
    AuthenticationError,
    GitConfig,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    StorageClient,
    StorageError,
    UnsupportedOperation,
)
from storage.backends.base import OpenOptions
from storage.backends.git import pack as packs
from storage.backends.git.backend import GitBackend, open_backend
from storage.config import Settings
from storage.errors import TransferError, redact
from storage.uri import parse_uri
from tests.servers.git_http import PASSWORD, USER, GitHTTP
from tests.servers.odd_http import OddHTTP, Reply

LARGE = os.urandom(3_000_000)
LOGIN = GitConfig(USER, PASSWORD)


@pytest.fixture
def model(git_server: GitHTTP) -> GitHTTP:
    git_server.create("m")
    git_server.commit("m", {"config.json": b"{}", "weights.bin": LARGE[:400_000]})
    return git_server


@pytest.fixture
def client() -> Iterator[StorageClient]:
    settings = Settings(transfer={"attempts": 3, "retry_wait": 0.01})
    with StorageClient(settings=settings) as client:
        yield client


def nameless_files() -> set[str]:
    """Return the files without a name that this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {name for name in found if name.endswith("(deleted)")}


def backend(server: GitHTTP, name: str = "m") -> GitBackend:
    return open_backend(parse_uri(server.uri(name)), None, OpenOptions())


@pytest.mark.parametrize(
    ("user", "config"),
    [
        ("", LOGIN),
        (USER, GitConfig(password=PASSWORD)),
        (USER, GitConfig("somebody-else", PASSWORD)),
        (f"{USER}:{PASSWORD}", None),
        ("", GitConfig(USER, token=PASSWORD)),
    ],
)
def test_a_private_repository_wants_its_password(
    model: GitHTTP, client: StorageClient, user: str, config: GitConfig | None
) -> None:
    uri = model.uri("m", private=True, user=user)

    assert Path(client.download(uri, config=config), "config.json").read_bytes() == b"{}"


def test_a_user_alone_is_an_access_token_and_in_no_message(
    model: GitHTTP, client: StorageClient
) -> None:
    uri = model.uri("m", private=True, user="ghp-s3cr3t-t0ken")

    with pytest.raises(AuthenticationError, match="refused the credentials") as caught:
        client.download(uri)

    sent = base64.b64encode(b"ghp-s3cr3t-t0ken:").decode()
    assert [given for _, _, given in model.requests] == [f"Basic {sent}"]
    shown = f"{caught.value!r} {parse_uri(uri)} {parse_uri(uri)!r} {redact(sent)}"
    assert "ghp-s3cr3t-t0ken" not in shown
    assert sent not in shown


def test_the_settings_know_the_password_of_a_host(model: GitHTTP) -> None:
    host = model.uri("m").split("/open/")[0]
    entry = {"prefix": f"{host}/", "username": USER, "password": PASSWORD}
    with StorageClient(settings=Settings(stores={"git": entry})) as client:
        assert client.list_objects(model.uri("m", private=True)) == ["config.json", "weights.bin"]


@pytest.mark.parametrize("config", [None, GitConfig(USER, "wrong-password"), GitConfig(token="no")])
def test_wrong_credentials_fail_after_one_request(
    model: GitHTTP, client: StorageClient, tmp_path: Path, config: GitConfig | None
) -> None:
    with pytest.raises(AuthenticationError, match="credentials") as caught:
        client.download(model.uri("m", private=True), tmp_path / "m", config=config)

    assert len(model.requests) == 1
    assert "wrong-password" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_password_in_a_uri_is_in_no_message(model: GitHTTP, client: StorageClient) -> None:
    uri = model.uri("gone", private=True, user=f"{USER}:{PASSWORD}")

    with pytest.raises(ModelMissingError) as caught:
        client.download(uri)

    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in repr(parse_uri(uri))


def test_a_password_follows_no_redirection_to_another_host(
    model: GitHTTP, client: StorageClient
) -> None:
    uri = model.uri("m").replace("/open/", "/moved/")

    path = client.download(uri, config=LOGIN)

    assert Path(path, "config.json").read_bytes() == b"{}"
    assert any(given is not None for _, _, given in model.requests)
    assert not model.leaks


@pytest.mark.parametrize(
    "uri",
    [
        "https://raw.example/o/r/main/x.gitignore",
        "https://raw.example/o/r/main/.gitattributes",
        "https://files.example/a.git.zip",
        "https://files.example/x?name=a.git",
        "https://files.example/.git/config",
        "http://files.example/repo.git",
    ],
)
def test_what_only_looks_like_a_repository_is_http(uri: str) -> None:
    assert parse_uri(uri).type == "http"


@pytest.mark.parametrize(
    ("uri", "repository", "revision", "key"),
    [
        ("https://git.example/o/r.git", "git.example/o/r.git", None, ""),
        ("https://u@git.example/o/r.git/", "git.example/o/r.git", None, ""),
        ("https://git.example/r.git@v1", "git.example/r.git", "v1", ""),
        ("https://git.example/r.git@a%2Fb/c%20d/e", "git.example/r.git", "a/b", "c d/e"),
        ("https://git.example/r/.git", "git.example/r/.git", None, ""),
        ("git+https://git.example:8443/o/_git/r", "git.example:8443/o/_git/r", None, ""),
        ("git+https://git.example/o/r@main/x", "git.example/o/r", "main", "x"),
        ("git+http://127.0.0.1:1/r.git/x.git/y", "127.0.0.1:1/r.git", None, "x.git/y"),
    ],
)
def test_a_uri_names_repository_revision_and_path(
    uri: str, repository: str, revision: str | None, key: str
) -> None:
    found = parse_uri(uri)

    assert (found.bucket, found.version, found.key) == (repository, revision, key)
    again = parse_uri(str(found))
    assert (again.bucket, again.version, again.key) == (repository, revision, key)
    assert found.spec()["type"] == "git+http"


@pytest.mark.parametrize("uri", ["git+https://git.example/", "git+https://h/r.git@/x"])
def test_a_uri_without_a_repository_or_a_revision_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput):
        parse_uri(uri)


def test_a_pack_that_is_damaged_once_is_fetched_again(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    damaged = []

    def mangle(path: str, content: bytes) -> bytes:
        if damaged or b"PACK" not in content:
            return content
        damaged.append(path)
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    model.mangle = mangle
    client.download(model.uri("m"), tmp_path / "m")

    assert (tmp_path / "m" / "weights.bin").read_bytes() == LARGE[:400_000]
    assert damaged
    assert model.packs() == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "none"])
def test_a_pack_that_is_always_damaged_is_never_published(
    model: GitHTTP, client: StorageClient, tmp_path: Path, damage: str
) -> None:
    def mangle(path: str, content: bytes) -> bytes:
        if b"PACK" not in content:
            return content
        if damage == "none":
            return b""
        middle = len(content) // 2
        if damage == "cut":
            return content[:middle]
        return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]

    model.mangle = mangle
    before = nameless_files()
    with pytest.raises(TransferError):
        client.download(model.uri("m"), tmp_path / "m")

    assert not (tmp_path / "m").exists()
    # One of an earlier test may have been closed meanwhile.
    assert nameless_files() <= before


def test_a_server_that_is_busy_is_asked_again(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    answers = iter([503, 429])
    model.status = lambda path: next(answers, None)

    client.download(model.uri("m"), tmp_path / "m")

    assert (tmp_path / "m" / "config.json").exists()


def test_what_is_no_git_server_is_said(
    client: StorageClient, odd_http: Callable[..., OddHTTP]
) -> None:
    page = Reply(body=b"<html>", headers={"Content-Type": "text/html"})
    server = odd_http(lambda request: page)

    with pytest.raises(StorageError, match="text/html, not git's smart HTTP"):
        client.download(f"git+{server.url}/model.git")


def test_a_commit_is_fetched_once_by_many_threads(model: GitHTTP) -> None:
    git = backend(model)
    start = threading.Barrier(8)
    sizes = []

    def ask() -> None:
        start.wait()
        sizes.append(git.stat("weights.bin").size)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    git.close()

    assert sizes == [400_000] * 8
    assert model.packs() == 1


def test_a_file_that_would_be_put_together_in_memory_has_a_limit(
    git_server: GitHTTP, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    git_server.create("big")
    data = os.urandom(200_000)
    git_server.commit("big", {"a": data, "b": data + b"x", "c": data + b"yz"})
    git_server.git("repack", "-adfq", cwd=git_server.folder / "big.git")
    monkeypatch.setattr(packs, "MAX_DELTA", 100_000)

    with pytest.raises(UnsupportedOperation, match="large file storage"):
        client.download(git_server.uri("big"))


def test_differences_upon_differences_are_put_together(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    git_server.create("chain")
    data = os.urandom(50_000)
    files = {f"v{n:02}": data + os.urandom(20) * n for n in range(30)}
    git_server.commit("chain", files)
    git_server.git("repack", "-adfq", "--depth=30", cwd=git_server.folder / "chain.git")

    client.download(git_server.uri("chain"), tmp_path / "m")

    found = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert found == files


def test_a_file_is_never_in_memory_whole(git_server: GitHTTP) -> None:
    git_server.create("big")
    data = os.urandom(12_000_000)
    git_server.commit("big", {"a": data})
    git = backend(git_server, "big")
    pack = git._snapshot().pack
    tracemalloc.start()
    try:
        again = packs.Pack(os.dup(pack._descriptor), pack._size, "again")
        hasher = hashlib.sha256()
        with git.read("a") as body:
            for chunk in body:
                hasher.update(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        git.close()

    assert hasher.digest() == hashlib.sha256(data).digest()
    assert again._found.keys() == pack._found.keys()
    assert peak < 4_000_000


def test_a_full_disk_is_said_and_nothing_stays(
    git_server: GitHTTP,
    client: StorageClient,
    full_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    git_server.create("big")
    git_server.commit("big", {"a": os.urandom(12_000_000)})
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))

    with pytest.raises(InsufficientSpaceError, match="TMPDIR"):
        client.download(git_server.uri("big"), tmp_path / "m")

    # The next one has room; in it lies nothing of this one.
    assert not list(full_disk.iterdir())
    assert shutil.disk_usage(full_disk).free > 6_000_000


def test_without_the_server_a_repository_comes_from_the_cache(tmp_path: Path) -> None:
    settings = Settings(transfer={"attempts": 1})
    with GitHTTP(tmp_path) as server, StorageClient(settings=settings) as client:
        server.create("m")
        server.commit("m", {"config.json": b"{}"})
        uri = server.uri("m")
        path = client.download(uri)
    with StorageClient(settings=settings) as client:
        with pytest.raises(StorageError, match="nobody answers"):
            client.download(uri)
        with pytest.warns(RuntimeWarning, match="the cached copy is used"):
            assert client.download(uri, offline="auto") == path


# -- large file storage ---------------------------------------------------------------------------


def test_a_large_file_comes_from_large_file_storage(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    model.commit("m", {"large.bin": model.pointer(LARGE)})
    uri = model.uri("m", private=True)

    client.download(uri, tmp_path / "m", config=LOGIN)

    assert (tmp_path / "m" / "large.bin").read_bytes() == LARGE
    assert not model.leaks
    with client.open(f"{uri}/large.bin", config=LOGIN) as file:
        file.seek(1_000_000)
        assert file.read(10) == LARGE[1_000_000:1_000_010]


def test_a_large_file_that_did_not_change_is_not_fetched_again(
    model: GitHTTP, client: StorageClient
) -> None:
    model.commit("m", {"large.bin": model.pointer(LARGE)})
    client.download(model.uri("m"))
    before = len(model.requests)
    model.commit("m", {"config.json": b"new"})
    client.download(model.uri("m"))

    assert not [path for _, path, _ in model.requests[before:] if path.startswith("/large/")]


def test_a_pointer_is_never_handed_over_as_the_file(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    model.commit("m", {"large.bin": model.pointer(LARGE, keep=False)})

    with pytest.raises(UnsupportedOperation, match="no large file storage"):
        client.download(model.uri("m"), tmp_path / "m")
    model.large["0" * 64] = b""
    with pytest.raises(ModelMissingError, match="does not have this large file"):
        client.download(model.uri("m"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("old", "new"), [("spec/v1", "spec/v2"), ("oid ", "ext-0-x sha256:00\noid "), ("size", "long")]
)
def test_a_pointer_that_is_not_understood_is_refused(
    model: GitHTTP, client: StorageClient, old: str, new: str
) -> None:
    pointer = model.pointer(LARGE).decode().replace(old, new)
    model.commit("m", {"large.bin": pointer.encode()})

    with pytest.raises(UnsupportedOperation, match="pointer of git LFS"):
        client.download(model.uri("m"))


def test_a_large_file_of_other_content_is_refused(
    model: GitHTTP, client: StorageClient, tmp_path: Path
) -> None:
    model.commit("m", {"large.bin": model.pointer(LARGE)})
    for oid in model.large:
        model.large[oid] = bytes(len(LARGE))

    with pytest.raises(StorageError, match="sha256"):
        client.download(model.uri("m"), tmp_path / "m")
    assert not (tmp_path / "m").exists()
