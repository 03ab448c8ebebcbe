"""What the Hub's refusals and failures become; and that no message holds a secret."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, ByteRange, OpenOptions, bytes_payload
from storage.backends.hf.errors import from_answer
from storage.config import HFConfig
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    InsufficientSpaceError,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransferError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)
from storage.uri import parse_uri
from tests.servers.hub import Answer, Hub, Repo, Request
from tests.servers.process import free_port

Open = Callable[..., Backend]
WEIGHTS = b"weights" * 100_000
WHERE = "hf://owner/m/a.txt"


@pytest.fixture
def repo(hub: Hub) -> Repo:
    repo = hub.repo("owner/m")
    hub.put(repo, {"a.txt": b"12345", "a.bin": WEIGHTS})
    return repo


@pytest.fixture
def open_hub(hub: Hub) -> Iterator[Open]:
    opened: list[Backend] = []

    def make(uri: str = "hf://owner/m", token: str | None = hub.writer.token) -> Backend:
        config = HFConfig(token, hub.url, anonymous=token is None)
        opened.append(open_backend(parse_uri(uri), config, OpenOptions()))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def read(backend: Backend, key: str, span: ByteRange | None = None) -> bytes:
    with backend.read(key, span) as body:
        return b"".join(bytes(piece) for piece in body)


def calls(backend: Backend) -> list[Callable[[], object]]:
    """One of each operation."""
    return [
        lambda: backend.stat("a.txt"),
        lambda: list(backend.list()),
        lambda: read(backend, "a.bin"),
        lambda: backend.write("b.bin", bytes_payload(b"1")),
        lambda: backend.write("b.bin", bytes_payload(b"1"), if_absent=True),
        lambda: backend.copy("a.txt", "b.txt"),
        lambda: backend.delete(["a.txt"]),
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, StorageError),
        (401, AuthenticationError),
        (402, StorageError),
        (403, AuthenticationError),
        (404, ModelMissingError),
        (405, UnsupportedOperation),
        (407, AuthenticationError),
        (408, TransientError),
        (409, StorageError),
        (410, ModelMissingError),
        (412, ObjectChangedError),
        (413, StorageError),
        (416, ObjectChangedError),
        (425, TransientError),
        (429, TransientError),
        (500, TransientError),
        (501, UnsupportedOperation),
        (502, TransientError),
        (503, TransientError),
        (504, TransientError),
        (507, InsufficientSpaceError),
    ],
)
def test_status_means_one_kind_of_error(status: int, kind: type[StorageError]) -> None:
    assert type(from_answer(WHERE, status, {})) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("RepoNotFound", BucketMissingError),
        ("RevisionNotFound", ModelMissingError),
        ("EntryNotFound", ModelMissingError),
        ("GatedRepo", AuthenticationError),
    ],
)
@pytest.mark.parametrize("status", [401, 403, 404])
def test_code_says_more_than_the_status(code: str, kind: type[StorageError], status: int) -> None:
    error = from_answer(WHERE, status, {"X-Error-Code": code})
    assert type(error) is kind
    assert WHERE in str(error)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed";"api";q=500;w=300'}, 55.0),
        ({"RateLimit": '"api";r=12;t=55'}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "3"}, 3.0),
        ({"Retry-After": "soon"}, None),
    ],
)
def test_time_to_wait_is_told(
    hub: Hub, open_hub: Open, headers: dict[str, str], wait: float
) -> None:
    hub.before = lambda request: Answer(429, dict(headers))
    for call in calls(open_hub()):
        with pytest.raises(TransientError) as caught:
            call()
        assert caught.value.retry_after == wait


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_one_call_is_one_attempt(hub: Hub, repo: Repo, open_hub: Open, status: int) -> None:
    hub.before = lambda request: Answer(status)
    for call in calls(open_hub()):
        hub.forget()
        with pytest.raises(TransientError):
            call()
        assert len(hub.requests) == 1


@pytest.mark.parametrize("token", ["writer", "anonymous"])
def test_missing_repository_may_be_a_private_one(hub: Hub, open_hub: Open, token: str) -> None:
    backend = open_hub("hf://owner/none", hub.writer.token if token == "writer" else None)
    for call in calls(backend):
        with pytest.raises(BucketMissingError, match="private") as caught:
            call()
        assert ("no token was sent" in str(caught.value)) is (token == "anonymous")


def test_private_repository_is_read_by_its_owner_only(hub: Hub, open_hub: Open) -> None:
    hub.put(hub.repo("owner/secret", private=True), {"a.txt": b"1", "a.bin": WEIGHTS})
    assert read(open_hub("hf://owner/secret"), "a.bin") == WEIGHTS
    for token in (hub.reader.token, None):
        with pytest.raises(BucketMissingError, match="private"):
            read(open_hub("hf://owner/secret", token), "a.bin")


def test_gated_repository_tells_to_accept_its_terms(hub: Hub, open_hub: Open) -> None:
    repo = hub.repo("owner/gated", gated=True)
    hub.put(repo, {"a.txt": b"1", "a.bin": WEIGHTS})
    for token in (hub.reader.token, None):
        backend = open_hub("hf://owner/gated", token)
        for key in ("a.txt", "a.bin"):
            with pytest.raises(AuthenticationError, match="accept its terms"):
                backend.stat(key)
            with pytest.raises(AuthenticationError, match="accept its terms"):
                read(backend, key)
    repo.admitted.add(hub.reader.name)
    assert read(open_hub("hf://owner/gated", hub.reader.token), "a.bin") == WEIGHTS


def test_token_that_nobody_has_is_refused(hub: Hub, repo: Repo, open_hub: Open) -> None:
    for call in calls(open_hub(token="hf_nobodys")):
        with pytest.raises(AuthenticationError, match="Invalid credentials"):
            call()


@pytest.mark.parametrize("token", ["reader", "anonymous"])
def test_writing_without_the_right_to_write_is_refused(
    hub: Hub, repo: Repo, open_hub: Open, token: str
) -> None:
    backend = open_hub(token=hub.reader.token if token == "reader" else None)
    head = repo.head()
    hub.forget()
    for call in calls(backend)[3:]:
        with pytest.raises(AuthenticationError):
            call()
    assert repo.head() is head
    assert not hub.asked("PUT", "")


@pytest.mark.parametrize("after", [0, 1, 100_000])
def test_body_that_breaks_off_is_no_end(hub: Hub, repo: Repo, open_hub: Open, after: int) -> None:
    def before(request: Request) -> Answer | None:
        if request.origin == "hub":
            return None
        hub.before = None
        answer = hub._answer(request)
        answer.break_after = after
        return answer

    backend = open_hub()
    hub.before = before
    with pytest.raises(TransientError):
        read(backend, "a.bin")
    hub.before = before
    with pytest.raises(TransientError):
        read(backend, "a.bin", ByteRange(10, 300_000))
    hub.before = None
    assert read(backend, "a.bin") == WEIGHTS


def test_other_part_than_asked_for_is_refused(hub: Hub, repo: Repo, open_hub: Open) -> None:
    def before(request: Request) -> Answer | None:
        if request.origin == "hub":
            return None
        headers = {"Content-Range": f"bytes 5-9/{len(WEIGHTS)}"}
        return Answer(206, headers, WEIGHTS[5:10])

    hub.before = before
    with pytest.raises(TransferError, match="5-9 sent"):
        read(open_hub(), "a.bin", ByteRange(0, 5))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"files": 1}'])
def test_answer_that_is_not_the_hubs_is_an_error_of_ours(
    hub: Hub, repo: Repo, open_hub: Open, body: bytes
) -> None:
    hub.before = lambda request: Answer(200, {"Content-Type": "application/json"}, body)
    backend = open_hub()
    for call in calls(backend):
        with pytest.raises(StorageError, match="not one of a Hub"):
            call()


def test_no_message_holds_a_token_or_a_signature(hub: Hub, repo: Repo, open_hub: Open) -> None:
    token = hub.writer.token
    errors: list[BaseException] = []

    def refuse(origin: str, status: int) -> None:
        def before(request: Request) -> Answer | None:
            if request.origin != origin:
                return None
            said = f"no entry for Authorization: Bearer {token} at {request.path}?{request.query}"
            return Answer(status, {"X-Error-Message": said})

        hub.before = before
        for call in calls(open_hub()):
            try:
                call()
            except StorageError as exc:
                errors.append(exc)

    for status in (400, 401, 403, 404, 429, 500):
        for origin in ("hub", "cdn"):
            refuse(origin, status)
    assert len(errors) > 40
    for error in errors:
        text = f"{error} {error!r} {error.args}"
        assert token not in text
        assert "X-Amz-Signature=" not in text


def test_cause_of_an_error_holds_no_token_and_no_signature(
    hub: Hub, repo: Repo, open_hub: Open
) -> None:
    backend = open_hub()
    place = f"http://127.0.0.1:{free_port()}/a?X-Amz-Signature=s3cret"
    hub.before = lambda request: Answer(302, {"Location": place, "X-Repo-Commit": "a" * 40})
    with pytest.raises(UnreachableError) as caught:
        read(backend, "a.bin")
    error: BaseException | None = caught.value
    assert "s3cret" not in "".join(traceback.format_exception(error))
    while error is not None:
        # A request that hangs on an exception brings its headers along.
        assert not hasattr(error, "request")
        error = error.__cause__ or error.__context__


def test_public_hub_does_not_say_what_is_missing_to_those_without_a_name(
    hub: Hub, repo: Repo, open_hub: Open
) -> None:
    hub.before = lambda request: Answer(401, {"X-Error-Message": "Invalid username or password."})
    nameless = open_hub(token=None)
    for call in (lambda: nameless.stat("a.txt"), lambda: list(nameless.list())):
        with pytest.raises(BucketMissingError, match="private and no token was sent"):
            call()
    with pytest.raises(AuthenticationError, match=r"HFConfig\(token=…\)"):
        nameless.write("b.txt", bytes_payload(b"1"))
    with pytest.raises(AuthenticationError, match="refused the token"):
        open_hub().stat("a.txt")


def test_answer_without_an_end_is_not_kept_in_memory(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.backends.hf.session._MAX_ANSWER", 1000)
    hub.before = lambda request: Answer(200, {"Content-Type": "application/json"}, b" " * 200_000)
    with pytest.raises(StorageError, match="longer than any of a Hub"):
        list(open_hub().list())


def test_description_of_the_backend_shows_no_token(hub: Hub, open_hub: Open) -> None:
    backend = open_hub()
    assert hub.writer.token not in f"{backend!r} {backend.name} {vars(backend)!r}"
