"""The Hub behind proxies that let things go wrong: the right bytes, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from storage.backends.base import BatchItem, ByteRange, OpenOptions, bytes_payload
from storage.backends.hf.backend import open_backend
from storage.client import StorageClient
from storage.config import HFConfig, load_settings
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from storage.testing.conformance_support import content
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request, Script
from storage.transfer.progress import Progress
from storage.uri import parse_uri
from tests.backends.hf_support import hub_backends, read
from tests.backends.http_support import named
from tests.faults.scripts import once
from tests.servers.hub import Answer, Hub, Repo

PART = 64 * 1024
WEIGHTS = content(10 * PART + 7)
TEXT = content(5 * PART + 3, 1)
FILES = {"config.json": TEXT, "model.safetensors": WEIGHTS}


class Through(Protocol):
    def __call__(
        self,
        hub: Script | None = None,
        cdn: Script | None = None,
        on_change: Callable[[Request], object] | None = None,
        *,
        patience: float = 60.0,
    ) -> StorageClient: ...


@pytest.fixture
def repo(hub: Hub) -> Iterator[Repo]:
    yield hub.repo("owner/m")
    assert not hub.leaks


@pytest.fixture
def through(hub: Hub) -> Iterator[Through]:
    """Call it with scripts for the Hub and its content network to get a client behind them."""
    with ExitStack() as stack:

        def make(
            hub_script: Script | None = None,
            cdn: Script | None = None,
            on_change: Callable[[Request], object] | None = None,
            *,
            patience: float = 60.0,
        ) -> StorageClient:
            proxies = [
                stack.enter_context(FaultProxy(url, script, store=store, on_change=on_change))
                for url, script, store in ((hub.url, hub_script, "hf"), (hub.cdn, cdn, "s3"))
            ]
            hub.url, hub.cdn = (proxy.endpoint for proxy in proxies)
            config = HFConfig(hub.writer.token, hub.url, read_timeout=patience)
            options = {
                "part_size": PART,
                "connections": 1,
                "retry_wait": 0.01,
                "throttle_wait": 0.02,
            }
            client = StorageClient(config, load_settings(transfer=options))
            return stack.enter_context(client)

        yield make


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


# As long as nothing stalls on purpose, what stalls is the machine, and no client shall notice.
HASTE = 1.0


def patience_with(fault: Fault) -> float:
    return HASTE if fault.kind.startswith("stall") else 60.0


PASSING = [
    Fault("reset"),
    Fault("truncate"),
    Fault("truncate_unsized"),
    Fault("stall"),
    Fault("stall_answer"),
    Fault("status", status=500),
    Fault("status", status=408),
    Fault("status", status=429, retry_after=0),
    Fault("status", status=503),
]


@pytest.mark.parametrize("fault", PASSING, ids=named)
@pytest.mark.parametrize(
    "where",
    ["/revision/", "/tree/", "config.json", "model.safetensors", "cdn"],
    ids=["revision", "listing", "small", "address", "large"],
)
def test_download_survives_what_passes(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path, fault: Fault, where: str
) -> None:
    hub.put(repo, FILES)
    if where == "cdn":
        client = through(cdn=once(fault, "GET", to="/files/"), patience=patience_with(fault))
    else:
        client = through(once(fault, "GET", to=where), patience=patience_with(fault))
    client.download("hf://owner/m", tmp_path / "m")
    assert tree(tmp_path / "m") == FILES


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("broken", [False, True], ids=["at-once", "after-a-break"])
def test_flipped_bit_is_noticed_in_large_and_small_files(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path, key: str, broken: bool
) -> None:
    hub.put(repo, FILES)
    faults = [Fault("truncate"), Fault("flip", at=0.1)] if broken else [Fault("flip")]

    def script(request: Request) -> Fault | None:
        body = "/resolve-cache/" in request.target or "/files/" in request.target
        return faults.pop(0) if faults and request.method == "GET" and body else None

    with pytest.raises(IntegrityError):
        through(script, script).download(f"hf://owner/m@main/{key}", tmp_path / "out")
    assert not faults
    assert list(tmp_path.iterdir()) == []


def test_small_file_is_never_read_in_parts_that_nobody_can_check(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path
) -> None:
    hub.put(repo, FILES)
    client = through()
    client.download("hf://owner/m", tmp_path / "m")
    with client.open("hf://owner/m@main/config.json") as file:
        file.seek(-10, 2)
        assert file.read() == TEXT[-10:]
    small = hub.asked("GET", "config.json")
    assert small
    assert all("range" not in one.headers for one in small)


def test_opened_small_file_that_is_damaged_does_not_end(
    hub: Hub, repo: Repo, through: Through
) -> None:
    hub.put(repo, FILES)
    client = through(once(Fault("flip"), "GET", to="/resolve-cache/"))
    with client.open("hf://owner/m@main/config.json") as file, pytest.raises(IntegrityError):
        file.read()


def test_error_with_the_status_of_a_success_is_no_model(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path
) -> None:
    hub.put(repo, FILES)
    client = through(cdn=once(Fault("error_body"), "GET", to="/files/"))
    client.download("hf://owner/m", tmp_path / "m")
    assert tree(tmp_path / "m") == FILES


@pytest.mark.parametrize("where", ["/tree/", "config.json"])
def test_error_in_place_of_the_hubs_own_answer_publishes_nothing(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path, where: str
) -> None:
    hub.put(repo, FILES)
    client = through(once(Fault("error_body"), "GET", to=where))
    with pytest.raises(StorageError):
        client.download("hf://owner/m", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_address_that_expires_midway_is_asked_for_anew_and_no_byte_twice(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path
) -> None:
    hub.put(repo, FILES)
    broken = once(Fault("truncate"), "GET", to="/files/")

    def script(request: Request) -> Fault | None:
        fault = broken(request)
        if fault is not None:
            hub.expire_links()
        return fault

    client = through(cdn=script)
    client.download("hf://owner/m@main/model.safetensors", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == WEIGHTS
    answers = [one.status for one in hub.asked("GET", "/files/")]
    assert answers.count(403) == 1
    assert len(hub.asked("GET", "/resolve/")) == 2
    sizes = [one.sent for one in hub.asked("GET", "/files/") if one.status == 206]
    # The first part came in half, and the half that was missing came once more.
    assert sum(sizes) <= len(WEIGHTS) + PART


def test_address_that_is_never_accepted_ends_in_an_error(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path
) -> None:
    hub.put(repo, FILES)
    client = through(cdn=lambda request: Fault("status", status=403))
    with pytest.raises(StorageError, match="did not accept the address") as caught:
        client.download("hf://owner/m@main/model.safetensors", tmp_path / "out")
    assert "X-Amz-Signature" not in str(caught.value)


def test_token_that_expires_midway_is_refused_once(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path
) -> None:
    hub.put(repo, {f"{number}.txt": b"%d" % number for number in range(5)})
    expired = iter([False, False, True])

    def script(request: Request) -> Fault | None:
        if "/resolve/" not in request.target:
            return None
        return Fault("expire") if next(expired, True) else None

    client = through(script)
    with pytest.raises(AuthenticationError, match="refused the token"):
        client.download("hf://owner/m", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    assert next(expired, None) is None
    assert len(hub.asked("GET", "/resolve/")) == 2


@pytest.mark.parametrize("status", [400, 401, 403])
def test_permanent_error_is_one_request(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path, status: int
) -> None:
    hub.put(repo, FILES)
    client = through()
    hub.forget()
    hub.before = lambda request: Answer(status)
    with pytest.raises(StorageError):
        client.get_object_metadata("hf://owner/m@main/config.json")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_hub_that_is_asked_too_often_says_so(hub: Hub, repo: Repo, status: int) -> None:
    hub.put(repo, FILES)
    hub.before = lambda request: Answer(status, {"Retry-After": "2"})
    with hub_backends(hub) as open_backend, pytest.raises(TransientError) as caught:
        open_backend().stat("config.json")
    assert (caught.value.throttled, caught.value.retry_after) == (True, 2.0)


@pytest.mark.parametrize("uri", ["hf://owner/m", "hf://owner/m@main/model.safetensors"])
def test_download_stays_at_its_commit_though_the_branch_moves(
    hub: Hub, repo: Repo, through: Through, tmp_path: Path, uri: str
) -> None:
    hub.put(repo, FILES)
    new = {key: data[::-1] for key, data in FILES.items()}
    change = Fault("change")
    client = through(
        once(change, "GET", to="config.json"),
        once(change, "GET", to="/files/"),
        lambda request: hub.put(repo, new),
    )
    client.download(uri, tmp_path / "out")
    if uri.endswith("m"):
        assert tree(tmp_path / "out") == FILES
    else:
        assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert hub.get(repo, "model.safetensors") == new["model.safetensors"]


# -- uploads -------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for key, data in FILES.items():
        (folder / key).write_bytes(data)
    return folder


UPLOAD_FAULTS = [
    Fault("reset_request"),
    Fault("stall_answer"),
    Fault("lost_answer"),
    Fault("lost_answer", status=500),
    *(fault for fault in PASSING if fault.kind == "status"),
]


@pytest.mark.parametrize(
    ("where", "fault", "overwrite"),
    [
        pytest.param(where, fault, overwrite, id=f"{where}-{named(fault)}-{overwrite}")
        for where in ("preupload", "batch", "PUT", "verify", "commit", "paths-info")
        for fault in UPLOAD_FAULTS
        for overwrite in ((True, False) if where in ("commit", "paths-info") else (True,))
        # The Hub may take minutes to answer these.
        if fault.kind != "stall_answer" or where not in ("PUT", "commit")
    ],
)
def test_upload_survives_what_passes_and_is_one_commit(
    hub: Hub, repo: Repo, through: Through, model: Path, fault: Fault, overwrite: bool, where: str
) -> None:
    if where == "PUT":
        client = through(cdn=once(fault, "PUT", to="/upload/"), patience=patience_with(fault))
    else:
        client = through(once(fault, "POST", to=where), patience=patience_with(fault))
    before = len(repo.commits)
    assert client.upload(model, "hf://owner/m", overwrite=overwrite)
    assert {key: hub.get(repo, key) for key in FILES} == FILES
    assert set(repo.head().files) == set(FILES)
    assert len(repo.commits) == before + 1


@pytest.mark.parametrize("overwrite", [True, False])
def test_single_file_whose_commit_was_not_answered_is_there_once(
    hub: Hub, repo: Repo, through: Through, model: Path, overwrite: bool
) -> None:
    client = through(once(Fault("lost_answer"), "POST", to="commit/"))
    before = len(repo.commits)
    client.upload(model / "config.json", "hf://owner/m@main/c.json", overwrite=overwrite)
    assert hub.get(repo, "c.json") == TEXT
    assert len(repo.commits) == before + 1


def test_what_somebody_else_created_is_not_taken_for_an_unanswered_try(
    hub: Hub, repo: Repo
) -> None:
    def before(request: object) -> Answer | None:
        if "/commit/" not in str(getattr(request, "path", "")):
            return None
        hub.before = None
        hub.put(repo, {"a.txt": b"theirs"})
        return Answer(504)

    hub.before = before
    with hub_backends(hub) as open_backend:
        backend = open_backend()
        with pytest.raises(TransientError):
            backend.write("a.txt", bytes_payload(b"ours"), if_absent=True)
        with pytest.raises(ObjectExistsError):
            backend.write("a.txt", bytes_payload(b"ours"), if_absent=True)
        # What was tried before is no excuse for other content.
        hub.put(repo, {"a.txt": b"ours"})
        with pytest.raises(ObjectExistsError):
            backend.write("a.txt", bytes_payload(b"more"), if_absent=True)
        # Nor is it when it is known that it came to nothing.
        with pytest.raises(ObjectExistsError):
            backend.write("a.txt", bytes_payload(b"ours"), if_absent=True)
    assert hub.get(repo, "a.txt") == b"ours"


def test_replacement_whose_answer_was_lost_is_known_again(hub: Hub, repo: Repo) -> None:
    hub.put(repo, {"a.txt": b"old"})

    def before(request: object) -> Answer | None:
        if "/commit/" not in str(getattr(request, "path", "")):
            return None
        hub.before = None
        assert hub.routes.answer(request).status == 200  # type: ignore[arg-type]
        return Answer(504)

    with hub_backends(hub) as open_backend:
        backend = open_backend()
        old = backend.stat("a.txt")
        hub.before = before
        with pytest.raises(TransientError):
            backend.write("a.txt", bytes_payload(b"new"), if_match=old)
        head = repo.head()
        info = backend.write("a.txt", bytes_payload(b"new"), if_match=old)
        assert (repo.head(), info.version) == (head, head.id)
        assert info.etag == backend.stat("a.txt").etag


@pytest.mark.parametrize(("status", "kind"), [(403, AuthenticationError), (404, StorageError)])
def test_fresh_address_that_takes_nothing_is_asked_once(
    hub: Hub, repo: Repo, through: Through, model: Path, status: int, kind: type[StorageError]
) -> None:
    before = len(repo.commits)
    client = through(cdn=lambda request: Fault("status", status=status))
    with pytest.raises(kind, match="did not accept the address"):
        client.upload(model, "hf://owner/m")
    assert len(hub.asked("POST", "/objects/batch")) == 1
    assert len(repo.commits) == before


def test_address_for_an_upload_that_expired_is_asked_for_anew(
    hub: Hub, repo: Repo, through: Through, model: Path
) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    client = through(cdn=once(Fault("status", status=403, answer=body), "PUT", to="/upload/"))
    client.upload(model, "hf://owner/m")
    assert {key: hub.get(repo, key) for key in FILES} == FILES
    assert len(hub.asked("POST", "/objects/batch")) == 2


@pytest.mark.parametrize("part_size", [None, 4 * PART], ids=["one-request", "parts"])
def test_damaged_large_file_is_sent_again(
    hub: Hub, repo: Repo, through: Through, model: Path, part_size: int | None
) -> None:
    hub.part_size = part_size
    client = through(cdn=once(Fault("flip_request"), "PUT", to="/upload/"))
    client.upload(model, "hf://owner/m")
    assert {key: hub.get(repo, key) for key in FILES} == FILES
    assert not hub.uploads.unfinished


@pytest.mark.parametrize("overwrite", [True, False])
def test_damaged_commit_is_never_taken_for_a_success(
    hub: Hub, repo: Repo, through: Through, model: Path, overwrite: bool
) -> None:
    repaired = 0
    for number in range(8):
        fault = Fault("flip_request", at=0.2 + number / 20)
        client = through(once(fault, "POST", to="commit/"))
        key, before = f"{number}.json", len(repo.commits)
        try:
            client.upload(model / "config.json", f"hf://owner/m@main/{key}", overwrite=overwrite)
        except StorageError:
            # What is no base64 any more is refused.
            assert key not in repo.head().files
            continue
        assert hub.get(repo, key) == TEXT
        repaired += len(repo.commits) - before == 2
    assert repaired


def test_damaged_copy_of_a_small_file_is_no_success(hub: Hub, repo: Repo, through: Through) -> None:
    hub.put(repo, {"a.txt": TEXT})
    copied = 0
    for number in range(8):
        fault = Fault("flip_request", at=0.2 + number / 20)
        client = through(once(fault, "POST", to="commit/"))
        key = f"{number}.txt"
        try:
            client.copy_object("hf://owner/m@main/a.txt", f"hf://owner/m@main/{key}")
        except StorageError:
            assert repo.head().files.get(key) is None
            continue
        assert hub.get(repo, key) == TEXT
        copied += 1
    assert copied


def test_only_bytes_that_moved_are_counted(hub: Hub, repo: Repo) -> None:
    hub.put(repo, {"there.bin": WEIGHTS})
    refused = iter([True])

    def before(request: object) -> Answer | None:
        # Somebody else commits first: the small file's bytes have to move again.
        if "/commit/" in str(getattr(request, "path", "")) and next(refused, False):
            hub.put(repo, {"other.txt": b"1"})
        return None

    hub.before = before
    counts: list[int] = []
    items = [
        BatchItem("there-too.bin", bytes_payload(WEIGHTS)),
        BatchItem("new.txt", bytes_payload(TEXT)),
        BatchItem("new.bin", bytes_payload(TEXT)),
    ]
    with hub_backends(hub) as open_backend:
        open_backend().write_many(items, if_absent=True, on_bytes=counts.append)
    assert sum(counts) == 2 * len(TEXT)
    assert -len(TEXT) in counts


def test_progress_of_an_upload_ends_at_all_bytes_though_some_were_there(
    hub: Hub, repo: Repo, through: Through, model: Path
) -> None:
    client = through(lambda request: None)
    sizes = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    for present in (0, sizes):
        told: list[Progress] = []
        client.upload(model, "hf://owner/m", progress=told.append)
        last = told[-1]
        assert last.finished
        assert (last.bytes_done, last.bytes_total, last.bytes_present) == (sizes, sizes, present)


def test_range_of_a_small_file_is_still_given_to_who_asks(hub: Hub, repo: Repo) -> None:
    hub.put(repo, FILES)
    with hub_backends(hub) as open_backend:
        assert read(open_backend(), "config.json", ByteRange(5, 9)) == TEXT[5:9]


def test_stall_is_told_from_other_failures(hub: Hub, repo: Repo) -> None:
    hub.put(repo, FILES)
    with FaultProxy(hub.cdn, lambda request: Fault("stall")) as proxy:
        hub.cdn = proxy.endpoint
        config = HFConfig(hub.writer.token, hub.url, read_timeout=0.2)
        backend = open_backend(parse_uri("hf://owner/m"), config, OpenOptions())
        with pytest.raises(TransientError) as caught:
            read(backend, "model.safetensors")
        backend.close()
    assert caught.value.stalled
