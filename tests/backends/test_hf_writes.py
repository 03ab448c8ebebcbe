"""What writing to the Hub does beyond the contract: one commit, conditions, little sent."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.backends.base import (
    BatchItem,
    Payload,
    bytes_payload,
    file_payload,
)
from storage.errors import (
    DestinationError,
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    ObjectExistsError,
    TransientError,
    UnsupportedOperation,
)
from tests.backends.hf_support import OpenHub, hub_backends
from tests.servers.hub import Answer, Hub, Repo, Request

WEIGHTS = b"weights" * 1000


@pytest.fixture
def repo(hub: Hub) -> Repo:
    return hub.repo("owner/m")


@pytest.fixture
def open_hub(hub: Hub) -> Iterator[OpenHub]:
    with hub_backends(hub) as open_backend:
        yield open_backend


def items(files: dict[str, bytes]) -> list[BatchItem]:
    return [BatchItem(key, bytes_payload(data)) for key, data in files.items()]


def test_many_files_are_one_commit(hub: Hub, repo: Repo, open_hub: OpenHub, tmp_path: Path) -> None:
    before = repo.head()
    local = tmp_path / "big.safetensors"
    local.write_bytes(WEIGHTS * 2000)
    files = {f"m/{number}.txt": b"%d" % number for number in range(300)}
    files |= {f"m/{number}.bin": b"weights %d" % number for number in range(9)}
    files |= {"m/empty.bin": b""}
    counts: list[int] = []
    batch = [
        *items(files),
        BatchItem("m/big.safetensors", file_payload(str(local), len(WEIGHTS) * 2000)),
    ]
    infos = open_hub().write_many(batch, on_bytes=counts.append)
    assert repo.head().parent == before.id
    assert [info.key for info in infos] == [item.key for item in batch]
    assert sum(counts) == sum(map(len, files.values())) + local.stat().st_size
    for key, data in files.items():
        assert hub.get(repo, key) == data
    assert hub.get(repo, "m/big.safetensors") == local.read_bytes()
    assert {info.version for info in infos} == {repo.head().id}
    assert {info.key: info.etag for info in infos} == {
        path: f'"{entry.etag}"' for path, entry in repo.head().files.items()
    }
    assert not hub.uploads.unfinished


@pytest.mark.parametrize(("size", "parts"), [(8 << 20, 1), ((8 << 20) + 1, 2), (20_000_001, 3)])
def test_large_file_goes_in_parts(
    hub: Hub, repo: Repo, open_hub: OpenHub, tmp_path: Path, size: int, parts: int
) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    local = tmp_path / "file"
    local.write_bytes(data[:size])
    open_hub().write("a.bin", file_payload(str(local), size))
    assert hub.get(repo, "a.bin") == data[:size]
    puts = hub.asked("PUT", "/upload/")
    assert len(puts) == parts
    assert all(request.origin == "cdn" for request in puts)


def test_unchanged_content_is_neither_sent_nor_committed(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    head = hub.put(repo, {"a.bin": WEIGHTS, "b.txt": b"b"})
    counts: list[int] = []
    files = {"a.bin": WEIGHTS, "b.txt": b"b"}
    infos = open_hub().write_many(items(files), on_bytes=counts.append)
    assert repo.head() is head
    assert not hub.asked("PUT", "")
    assert counts == [], "bytes were counted that did not move"
    assert [info.version for info in infos] == [head.id] * 2


def test_content_that_the_repository_has_elsewhere_is_not_sent(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    open_hub().write("b.bin", bytes_payload(WEIGHTS))
    assert hub.get(repo, "b.bin") == WEIGHTS
    assert not hub.asked("PUT", "")


def test_batch_is_refused_whole_if_a_key_exists(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    head = hub.put(repo, {"b": b"old"})
    with pytest.raises(ObjectExistsError, match="/b exists"):
        open_hub().write_many(items({"a.bin": WEIGHTS, "b": b"new"}), if_absent=True)
    assert repo.head() is head
    assert not hub.asked("PUT", ""), "bytes were sent before the question was asked"


def test_batch_names_a_key_once(repo: Repo, open_hub: OpenHub) -> None:
    batch = [*items({"a": b"1"}), *items({"a": b"2"})]
    with pytest.raises(InvalidInput, match="twice"):
        open_hub().write_many(batch)
    assert not repo.head().files


def test_empty_batch_is_no_commit(hub: Hub, open_hub: OpenHub) -> None:
    assert open_hub().write_many([]) == []
    assert not hub.requests


def others_commit(hub: Hub, repo: Repo, files: dict[str, bytes], times: int = 1) -> None:
    """Let somebody else commit just before each of the next commits arrives."""
    left = iter(range(times))

    def before(request: Request) -> Answer | None:
        if "/commit/" in request.path and next(left, None) is not None:
            hub.put(repo, {key: data + b"%d" % len(repo.commits) for key, data in files.items()})
        return None

    hub.before = before


def test_create_succeeds_though_others_commit_other_files(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    others_commit(hub, repo, {"other": b"1"}, times=3)
    open_hub().write("a.bin", bytes_payload(WEIGHTS), if_absent=True)
    assert set(repo.head().files) == {"a.bin", "other"}
    assert len(hub.asked("POST", "/commit/")) == 4
    assert len(hub.asked("PUT", "/upload/")) == 1


def test_create_loses_against_who_creates_meanwhile(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    others_commit(hub, repo, {"a": b"theirs"})
    with pytest.raises(ObjectExistsError):
        open_hub().write("a", bytes_payload(b"ours"), if_absent=True)
    assert hub.get(repo, "a").startswith(b"theirs")


def test_replacement_loses_against_who_replaces_meanwhile(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.put(repo, {"a": b"old"})
    backend = open_hub()
    info = backend.stat("a")
    others_commit(hub, repo, {"a": b"theirs"})
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(b"ours"), if_match=info)
    assert hub.get(repo, "a").startswith(b"theirs")


def test_branch_that_never_rests_is_worth_another_try(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    others_commit(hub, repo, {"other": b"1"}, times=100)
    with pytest.raises(TransientError, match="kept committing"):
        open_hub().write("a", bytes_payload(b"1"), if_absent=True)
    assert "a" not in repo.head().files


def test_delete_is_one_commit_and_survives_others(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a": b"1", "b.bin": b"1", "c/d": b"1", "e": b"1"})
    others_commit(hub, repo, {"other": b"1"})
    open_hub().delete(["a", "b.bin", "c/d", "none", "a"])
    assert set(repo.head().files) == {"e", "other"}
    assert [commit.title for commit in (repo.head(),)] == ["Delete 3 files with modelstorage"]


def test_copy_of_a_large_file_moves_no_bytes(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.put(repo, {"a.bin": WEIGHTS})
    hub.forget()
    open_hub().copy("a.bin", "deep/b.bin")
    assert hub.get(repo, "deep/b.bin") == WEIGHTS
    assert {request.origin for request in hub.requests} == {"hub"}
    assert sum(request.received + request.sent for request in hub.requests) < 2000


def test_copy_of_the_same_content_is_no_commit(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    head = hub.put(repo, {"a": b"1", "b": b"1"})
    open_hub().copy("a", "b")
    assert repo.head() is head


def test_copy_of_an_older_commit(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    old = hub.put(repo, {"a": b"old", "a.bin": b"old weights"})
    hub.put(repo, {"a": b"new", "a.bin": b"new weights"})
    backend = open_hub()
    backend.copy("a", "b", version=old.id)
    backend.copy("a.bin", "b.bin", version=old.id)
    assert (hub.get(repo, "b"), hub.get(repo, "b.bin")) == (b"old", b"old weights")


def test_copy_from_another_repository_is_left_to_the_caller(repo: Repo, open_hub: OpenHub) -> None:
    backend = open_hub()
    assert not backend.capabilities.copy_across
    with pytest.raises(UnsupportedOperation):
        backend.copy("a", "b", bucket="owner/other")


def test_local_file_is_sent_without_a_copy_of_it(
    repo: Repo, open_hub: OpenHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "a"
    local.write_bytes(WEIGHTS * 100)
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr("tempfile.tempdir", str(nowhere))
    backend = open_hub()
    backend.write("a.bin", file_payload(str(local), 100 * len(WEIGHTS)))
    with pytest.raises(DestinationError, match="TMPDIR"):
        backend.write("b.bin", Payload(lambda: io.BytesIO(WEIGHTS * 100), 100 * len(WEIGHTS)))


def test_local_file_that_changes_while_it_is_sent_is_not_committed(
    hub: Hub, repo: Repo, open_hub: OpenHub, tmp_path: Path
) -> None:
    local = tmp_path / "a"
    local.write_bytes(WEIGHTS * 100)

    def before(request: Request) -> Answer | None:
        if request.path.endswith("/verify"):
            local.write_bytes(b"X" * 100 * len(WEIGHTS) + b"X")
        return None

    hub.before = before
    with pytest.raises(IntegrityError, match="changed"):
        open_hub().write("a.bin", file_payload(str(local), 100 * len(WEIGHTS)))
    assert not repo.head().files


def test_payload_is_opened_once_or_twice(repo: Repo, hub: Hub, open_hub: OpenHub) -> None:
    opened: list[str] = []

    def payload(name: str, size: int, known: bool) -> Payload:
        def open_stream() -> io.BytesIO:
            opened.append(name)
            return io.BytesIO(b"1" * size)

        return Payload(open_stream, size if known else None)

    open_hub().write_many(
        [
            BatchItem("small.bin", payload("small", 1000, True)),
            BatchItem("small.txt", payload("small", 1000, True)),
            BatchItem("unknown.bin", payload("unknown", 1_000_000, False)),
            BatchItem("large.bin", payload("large", 1_000_000, True)),
        ]
    )
    assert sorted(opened) == ["large", "large", "small", "small", "unknown"]
    assert hub.get(repo, "unknown.bin") == hub.get(repo, "large.bin") == b"1" * 1_000_000


def test_first_failure_ends_the_other_uploads(hub: Hub, repo: Repo, open_hub: OpenHub) -> None:
    hub.before = lambda request: Answer(500) if request.method == "PUT" else None
    files = {f"{number}.bin": b"%d" % number * 1000 for number in range(200)}
    with pytest.raises(TransientError):
        open_hub().write_many(items(files))
    # On a busy machine it takes a while until whoever ends them has its turn.
    assert len(hub.asked("PUT", "")) < 100
    assert not repo.head().files


def test_interrupt_ends_the_other_uploads(
    hub: Hub, repo: Repo, open_hub: OpenHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("storage.backends.hf.upload.wait", interrupted)
    files = {f"{number}.bin": b"%d" % number * 1000 for number in range(200)}
    with pytest.raises(KeyboardInterrupt):
        open_hub().write_many(items(files))
    # On a busy machine it takes a while until whoever ends them has its turn.
    assert len(hub.asked("PUT", "")) < 100
    assert not repo.head().files


def test_storage_that_refuses_the_bytes_commits_nothing(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    hub.before = lambda request: Answer(503) if request.method == "PUT" else None
    with pytest.raises(TransientError):
        open_hub().write("a.bin", bytes_payload(WEIGHTS))
    assert not repo.head().files


def test_repeat_of_a_commit_whose_answer_was_lost_is_no_second_commit(
    hub: Hub, repo: Repo, open_hub: OpenHub
) -> None:
    lost: list[Request] = []

    def before(request: Request) -> Answer | None:
        if "/commit/" not in request.path or lost:
            return None
        lost.append(request)
        assert hub.routes.answer(request).status == 200
        return Answer(504)

    hub.before = before
    backend = open_hub()
    with pytest.raises(TransientError):
        backend.write("a.bin", bytes_payload(WEIGHTS))
    head = repo.head()
    backend.write("a.bin", bytes_payload(WEIGHTS))
    assert repo.head() is head


@pytest.mark.parametrize(
    "key", ["a/.git/b", ".GIT/config", "a//b", "./a", "a/..", "a/", "/a", "a\udcff"]
)
def test_key_that_git_cannot_hold_is_refused_before_anything_is_sent(
    hub: Hub, open_hub: OpenHub, key: str
) -> None:
    backend = open_hub()
    with pytest.raises(InvalidInput, match="key holds"):
        backend.write(key, bytes_payload(b"1"))
    with pytest.raises(InvalidInput):
        backend.write_many(items({"a": b"1", key: b"1"}))
    with pytest.raises(InvalidInput):
        backend.copy("a", key)
    assert not hub.requests
