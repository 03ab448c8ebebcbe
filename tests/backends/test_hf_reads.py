"""What reading from the Hub does beyond the contract: commits, pins, few requests."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from collections.abc import Callable, Iterator

import pytest

from storage.backends.base import (
    ByteRange,
    ObjectInfo,
    bytes_payload,
)
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
)
from tests.backends.hf_support import OpenHub, hub_backends, read
from tests.servers.hub import Answer, Hub, Repo, Request
from tests.servers.odd_http import OddHTTP, Reply

WEIGHTS = b"weights" * 1000


@pytest.fixture
def repo(hub: Hub) -> Repo:
    return hub.repo("owner/m")


@pytest.fixture
def open_hub(hub: Hub) -> Iterator[OpenHub]:
    with hub_backends(hub) as open_backend:
        yield open_backend


def test_construction_is_inert(hub: Hub, open_hub: OpenHub) -> None:
    backend = open_hub()
    assert backend.capabilities.batch_write
    assert backend.name == "hf"
    assert not hub.requests


def test_stat_is_one_request_and_tells_the_digest(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    commit = hub.put(repo, {"m.safetensors": WEIGHTS, "config.json": b"{}"})
    backend = open_hub()
    hub.forget()
    info = backend.stat("m.safetensors")
    assert [request.method for request in hub.requests] == ["HEAD"]
    entry = commit.files["m.safetensors"]
    assert info.digests == (Digest("sha256", entry.sha256),)
    assert (info.size, info.etag, info.version) == (len(WEIGHTS), f'"{entry.sha256}"', commit.id)
    small = backend.stat("config.json")
    assert (small.digests, small.etag) == ((), f'"{commit.files["config.json"].git}"')
    assert len(hub.requests) == 2


def test_list_says_the_same_as_stat(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"m.safetensors": WEIGHTS, "config.json": b"{}"})
    backend = open_hub()
    for info in backend.list():
        assert info == backend.stat(info.key)


def test_description_survives_pickling(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"m.safetensors": WEIGHTS})
    info = open_hub().stat("m.safetensors")
    again = pickle.loads(pickle.dumps(info))
    assert (again, again.pin, type(again)) == (info, info.etag, type(info))


def test_commit_of_another_file_changes_no_identity(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.put(repo, {"a": b"1"})
    backend = open_hub()
    before = backend.stat("a")
    hub.put(repo, {"b": b"2"})
    after = backend.stat("a")
    assert before.version != after.version
    assert before.pin == after.pin
    assert not before.differs_from(after)


def test_moved_branch_is_noticed_by_the_next_call(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": b"old"})
    backend = open_hub()
    assert read(backend, "a.bin") == b"old"
    hub.put(repo, {"a.bin": b"newer", "b": b"1"})
    assert backend.stat("a.bin").size == 5
    assert {info.key: info.size for info in backend.list()} == {"a.bin": 5, "b": 1}
    assert read(backend, "a.bin") == b"newer"


@pytest.mark.parametrize("key", ["a.bin", "a.txt"])
def test_pinned_read_is_of_its_commit_though_the_branch_moved(
    hub: Hub, repo: Repo, open_hub: OpenHub, key: str
) -> None:
    hub.put(repo, {key: b"old"})
    backend = open_hub()
    [listed] = backend.list()
    told = backend.stat(key)
    hub.put(repo, {key: b"new"})
    for info in (listed, told):
        assert read(backend, key, pin=info) == b"old"
        assert read(backend, key, ByteRange(1, 3), info) == b"ld"


def test_pinned_read_of_a_commit_that_is_gone_is_noticed(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    old = hub.put(repo, {"a": b"old"})
    backend = open_hub()
    info = backend.stat("a")
    hub.put(repo, {"a": b"new"})
    del repo.commits[old.id]
    with pytest.raises(ObjectChangedError, match="gone"):
        read(backend, "a", pin=info)


def test_pin_without_a_commit_is_held_to_its_identity(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.put(repo, {"a": b"old"})
    backend = open_hub()
    info = backend.stat("a")
    pin = ObjectInfo("a", 3, info.etag)
    assert read(backend, "a", pin=pin) == b"old"
    hub.put(repo, {"a": b"new"})
    with pytest.raises(ObjectChangedError):
        read(backend, "a", pin=pin)


def test_listing_is_of_one_commit_though_the_branch_moves(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.page = 2
    hub.put(repo, {f"f{number}": b"1" for number in range(5)})
    listing = open_hub().list()
    first = next(listing)
    hub.put(repo, {f"f{number}": b"22" for number in range(9)})
    found = [first, *listing]
    assert [(info.key, info.size) for info in found] == [(f"f{number}", 1) for number in range(5)]


def test_ranges_of_a_large_file_ask_the_hub_once(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    backend = open_hub()
    info = backend.stat("a.bin")
    hub.forget()
    for start in range(0, 5000, 1000):
        span = ByteRange(start, start + 1000)
        assert read(backend, "a.bin", span, info) == WEIGHTS[start : start + 1000]
    origins = [request.origin for request in hub.requests]
    assert origins == ["hub", *["cdn"] * 5]
    assert all("authorization" not in request.headers for request in hub.requests[1:])


def test_expired_address_is_asked_for_again(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    backend = open_hub()
    info = backend.stat("a.bin")
    assert read(backend, "a.bin", pin=info) == WEIGHTS
    hub.expire_links()
    assert read(backend, "a.bin", ByteRange(0, 7), info) == b"weights"


@pytest.mark.parametrize("direct", [False, True], ids=["redirected", "direct"])
def test_small_file_comes_from_the_hub_itself(
    hub: Hub, repo: Repo, open_hub: OpenHub, direct: bool
) -> None:
    hub.direct = direct
    hub.put(repo, {"a b#1.txt": b"12345"})
    backend = open_hub()
    info = backend.stat("a b#1.txt")
    assert info.size == 5
    assert read(backend, "a b#1.txt", ByteRange(1, 3), info) == b"23"
    assert {request.origin for request in hub.requests} == {"hub"}


def test_part_is_cut_out_where_the_hub_sends_all_of_a_small_file(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.put(repo, {"a.txt": b"12345"})
    hub.direct = True

    def without_ranges(request: Request) -> Answer | None:
        request.headers = {k: v for k, v in request.headers.items() if k != "range"}
        return None

    hub.before = without_ranges
    backend = open_hub()
    assert read(backend, "a.txt", ByteRange(1, 3)) == b"23"
    with pytest.raises(ObjectChangedError):
        read(backend, "a.txt", ByteRange(3, 6))


@pytest.mark.parametrize("span", [None, ByteRange(0, 10), ByteRange(2000, 5000)])
def test_compressed_body_is_never_taken_for_the_file(
    hub: Hub, repo: Repo, open_hub: OpenHub, span: ByteRange | None
) -> None:
    commit = hub.put(repo, {"a.txt": b"text " * 1000})
    backend = open_hub()
    info = backend.stat("a.txt")
    data = gzip.compress(b"text " * 1000)
    told = {"X-Repo-Commit": commit.id, "ETag": str(info.etag), "X-Linked-Size": "5000"}
    hub.before = lambda request: Answer(200, told | {"Content-Encoding": "gzip"}, data)
    for pin in (None, info):
        with pytest.raises(UnsupportedOperation, match="content coding 'gzip'"):
            read(backend, "a.txt", span, pin)


def test_body_without_a_length_is_checked_and_cut_all_the_same(
    hub: Hub, repo: Repo, open_hub: OpenHub, odd_http: Callable[..., OddHTTP]
) -> None:
    data = b"text " * 1000
    commit = hub.put(repo, {"a.txt": data})
    info = open_hub().stat("a.txt")
    told = {"X-Repo-Commit": commit.id, "ETag": str(info.etag)}
    server = odd_http(lambda request: Reply(200, data, told, chunked=True))
    backend = open_hub(endpoint=server.url)
    assert read(backend, "a.txt", None, info) == data
    assert read(backend, "a.txt", ByteRange(5, 9), info) == b"text"
    server.handler = lambda request: Reply(200, b"T" + data[1:], told, chunked=True)
    with pytest.raises(IntegrityError, match="git's id"):
        read(backend, "a.txt", None, info)


def test_part_of_a_file_of_another_size_is_refused(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    backend = open_hub()
    info = backend.stat("a.bin")
    page = Answer(200, {"Content-Type": "text/html"}, b"<h1>Your network</h1>" * 100)
    hub.before = lambda request: page if request.origin == "cdn" else None
    with pytest.raises(TransientError, match="a file of 7000 bytes was expected, one of 2100 came"):
        read(backend, "a.bin", ByteRange(0, 10), info)


def test_service_that_tells_the_sha1_of_the_bytes_is_understood(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    commit = hub.put(repo, {"a.txt": b"12345"})
    headers = {"ETag": hashlib.sha1(b"12345").hexdigest(), "X-Repo-Commit": commit.id}
    hub.before = lambda request: Answer(200, dict(headers), b"12345")
    assert read(open_hub(), "a.txt") == b"12345"
    hub.before = lambda request: Answer(200, dict(headers), b"12354")
    with pytest.raises(IntegrityError):
        read(open_hub(), "a.txt")


def test_repository_that_was_renamed_is_found(hub: Hub, open_hub: OpenHub) -> None:
    hub.put(hub.repo("new-owner/m"), {"a.txt": b"1", "b.bin": b"2"})
    hub.state.renamed["model", "bert"] = "new-owner/m"
    backend = open_hub("hf://bert")
    assert backend.stat("a.txt").size == 1
    assert read(backend, "b.bin") == b"2"
    assert [info.key for info in backend.list()] == ["a.txt", "b.bin"]


@pytest.mark.parametrize("uri", ["hf://gpt2", "hf://datasets/owner/d", "hf://spaces/owner/s"])
def test_every_kind_of_repository(hub: Hub, open_hub: OpenHub, uri: str) -> None:
    kind = {"datasets": "dataset", "spaces": "space"}.get(uri.split("/")[2], "model")
    name = "gpt2" if kind == "model" else uri.split("/", 3)[3]
    repo = hub.repo(name, kind)
    hub.put(repo, {"x/a.bin": b"1", "x/b.txt": b"2"})
    backend = open_hub(uri)
    assert [info.key for info in backend.list("x/")] == ["x/a.bin", "x/b.txt"]
    assert (read(backend, "x/a.bin"), read(backend, "x/b.txt")) == (b"1", b"2")
    if kind != "model":
        backend.write("y.bin", bytes_payload(b"3"))
        backend.copy("y.bin", "z.bin")
        backend.delete(["y.bin"])
        assert hub.get(repo, "z.bin") == b"3"
        assert "y.bin" not in repo.head().files


@pytest.mark.parametrize("uri", ["hf://owner/m@v1", "hf://owner/m:v1", "hf://owner/m@a%2Fb"])
def test_revision_of_the_uri_is_read_and_written(
    hub: Hub, repo: Repo, open_hub: OpenHub, uri: str
) -> None:
    hub.put(repo, {"a.txt": b"old"})
    branch = "a/b" if "%" in uri else "v1"
    repo.branches[branch] = repo.head().id
    hub.put(repo, {"a.txt": b"new"})
    backend = open_hub(uri)
    assert read(backend, "a.txt") == b"old"
    assert [info.size for info in backend.list()] == [3]
    backend.write("b.bin", bytes_payload(b"1"))
    assert set(repo.head(branch).files) == {"a.txt", "b.bin"}
    assert set(repo.head().files) == {"a.txt"}
    files, root = backend.filesystem()
    assert files.cat_file(f"{root}/a.txt") == b"old"


def test_pull_request_is_read(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a": b"1"})
    repo.pulls["refs/pr/1"] = hub.put(repo, {"a": b"proposed"}).id
    backend = open_hub("hf://owner/m@refs/pr/1")
    assert read(backend, "a") == b"proposed"
    files, root = backend.filesystem()
    assert files.cat_file(f"{root}/a") == b"proposed"


def test_revision_of_the_config_is_the_default(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a": b"old"})
    repo.tags["v1"] = repo.head().id
    hub.put(repo, {"a": b"new"})
    assert read(open_hub(revision="v1"), "a") == b"old"
    assert read(open_hub("hf://owner/m@main", revision="v1"), "a") == b"new"


def test_missing_revision_is_said(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a": b"1"})
    backend = open_hub("hf://owner/m@none")
    for call in (
        lambda: backend.stat("a"),
        lambda: list(backend.list()),
        lambda: backend.write("b", bytes_payload(b"1")),
    ):
        with pytest.raises(ModelMissingError, match="no branch, tag or commit") as caught:
            call()
        assert not isinstance(caught.value, BucketMissingError)


def test_commit_is_not_written_to(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    backend = open_hub(f"hf://owner/m@{hub.put(repo, {'a': b'1'}).id}")
    hub.forget()
    calls: list[Callable[[], object]] = [
        lambda: backend.write("b", bytes_payload(b"1")),
        lambda: backend.copy("a", "b"),
        lambda: backend.delete(["a"]),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="name a branch"):
            call()
    assert not hub.requests
    assert [info.key for info in backend.list()] == ["a"]


def test_tag_cannot_be_written(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a": b"1"})
    repo.tags["v1"] = repo.head().id
    with pytest.raises(StorageError):
        open_hub("hf://owner/m@v1").write("b", bytes_payload(b"1"))
    assert set(repo.head().files) == {"a"}


def test_failing_storage_is_not_asked_around(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    backend = open_hub()
    info = backend.stat("a.bin")
    assert read(backend, "a.bin", pin=info) == WEIGHTS
    hub.before = lambda request: Answer(503) if request.origin == "cdn" else None
    hub.forget()
    with pytest.raises(TransientError):
        read(backend, "a.bin", pin=info)
    assert [request.origin for request in hub.requests] == ["cdn"]
