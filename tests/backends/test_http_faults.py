"""HTTP through proxies that let things go wrong: the right bytes, or a clear error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from storage.backends.base import OpenOptions
from storage.backends.http.backend import open_backend
from storage.client import StorageClient
from storage.config import HTTPConfig
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ObjectChangedError,
    StorageError,
    TransferError,
    TransientError,
)
from storage.testing.conformance_support import content
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault
from storage.uri import parse_uri
from tests.backends.http_support import CANARY, b64, empty, fast_client, named, quiet
from tests.faults.scripts import once
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply, Request, StaticFile

PART = 64 * 1024
SIZE = 10 * PART + 7
DATA = content(SIZE)
OTHER = content(SIZE, 1)
PAGE = b"<!DOCTYPE html>\n<html><body>Please try again later.</body></html>\n"
HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    yield nginx_http
    empty(nginx_http.data)


@pytest.fixture(params=[PART, 2 * SIZE], ids=["parts", "stream"])
def part_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


def client_for(part_size: int, kind: str = "") -> StorageClient:
    """Return a client that is in a hurry where a fault of this ``kind`` is a silence."""
    config = HTTPConfig(read_timeout=0.4) if kind in ("stall", "stall_answer") else None
    return fast_client(config, part_size=part_size, connections=2, attempts=4)


@pytest.fixture
def client(part_size: int) -> Iterator[StorageClient]:
    with client_for(part_size) as client:
        yield client


def fetched(client: StorageClient, url: str, out: Path) -> bytes:
    return Path(client.download(url, out / "file")).read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


PASSING = [
    Fault("reset"),
    Fault("truncate"),
    Fault("truncate_unsized"),
    Fault("stall"),
    Fault("stall_answer"),
    Fault("throttle", seconds=0.2),
    Fault("error_body"),
    Fault("status", status=408),
    Fault("status", status=429, retry_after=0),
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=503, retry_after="Mon, 02 Nov 2020 10:00:00 GMT"),
]


@pytest.mark.parametrize("fault", PASSING, ids=named)
def test_download_survives_what_passes(
    nginx: NginxHTTP, part_size: int, tmp_path: Path, fault: Fault
) -> None:
    put_file(nginx.data, "m.bin", DATA)
    with (
        FaultProxy(nginx.endpoint, once(fault, "GET")) as proxy,
        client_for(part_size, fault.kind) as client,
    ):
        assert fetched(client, f"{proxy.endpoint}/m.bin", tmp_path) == DATA


@pytest.mark.parametrize("kind", ["reset", "truncate", "truncate_unsized", "stall"])
def test_stream_that_cannot_go_on_is_tried_as_often_as_others_and_never_put_together(
    odd_http: Callable[..., OddHTTP], part_size: int, tmp_path: Path, kind: str
) -> None:
    server = odd_http(StaticFile(DATA, ranges=False))
    with (
        FaultProxy(server.url, once(Fault(kind), "GET")) as proxy,
        client_for(part_size, kind) as client,
    ):
        assert fetched(client, f"{proxy.endpoint}/m.bin", tmp_path) == DATA
    spans = [one.span for one in server.asked("GET")]
    assert set(spans) == {None}
    # Who is in a hurry may also give up a request that only took its time.
    assert len(spans) == 2 or (kind == "stall" and len(spans) > 2)
    server.clear()
    with (
        FaultProxy(server.url, lambda one: Fault(kind) if one.method == "GET" else None) as proxy,
        client_for(part_size, kind) as client,
        pytest.raises(TransferError, match="4 times"),
    ):
        client.download(f"{proxy.endpoint}/m.bin", tmp_path / "never")
    tries = len(server.asked("GET"))
    # Or before it has come as far as the server.
    assert tries == 4 or (kind == "stall" and 0 < tries < 4)
    assert not (tmp_path / "never").exists()


def test_body_without_a_length_is_held_to_the_size_that_head_told(
    odd_http: Callable[..., OddHTTP],
) -> None:
    file = StaticFile(DATA)

    def handler(request: Request) -> Reply:
        reply = file(request)
        if request.method == "GET":
            reply.length, reply.body = -1, reply.body[:-1]
        return reply

    backend = open_backend(parse_uri(f"{odd_http(handler).url}/"), None, OpenOptions())
    info = backend.stat("m.bin")
    with pytest.raises(TransientError, match="fewer came"), backend.read("m.bin", None, info) as it:
        for _ in it:
            pass
    backend.close()


@pytest.mark.parametrize("vouched", ["server", "caller"])
def test_flipped_bit_is_noticed_where_anybody_vouches(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, vouched: str
) -> None:
    told = {"Repr-Digest": f"sha-256=:{b64(hashlib.sha256(DATA))}:"}
    server = odd_http(StaticFile(DATA, headers=told if vouched == "server" else {}))
    digest = sha256(DATA) if vouched == "caller" else None
    with (
        FaultProxy(server.url, once(Fault("flip"), "GET")) as proxy,
        pytest.raises(IntegrityError),
    ):
        client.download(f"{proxy.endpoint}/m.bin", tmp_path / "out", digest=digest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("etag", ["md5", "other"])
def test_etag_of_an_object_store_is_a_hint_and_no_more(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, etag: str
) -> None:
    md5 = hashlib.md5(DATA if etag == "md5" else b"name and time").hexdigest()
    file = StaticFile(DATA, etag=f'"{md5}"', headers={"x-amz-request-id": "1"})
    server = odd_http(file)
    url = f"{server.url}/m.bin"
    assert fetched(client, url, tmp_path) == DATA
    if etag == "md5":
        with (
            FaultProxy(server.url, once(Fault("flip"), "GET")) as proxy,
            pytest.raises(IntegrityError, match="ETag says"),
        ):
            client.download(f"{proxy.endpoint}/m.bin", tmp_path / "flipped")
        assert not (tmp_path / "flipped").exists()
        return
    # Once it is known that this server's ETags are none, nothing is read twice for them.
    server.clear()
    client.download(url, tmp_path / "again")
    assert sum(one.span is None for one in server.asked("GET")) <= 1


def test_digest_in_a_redirection_to_the_file_is_checked(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    network = odd_http(StaticFile(DATA), "localhost")
    linked = {"X-Linked-ETag": f'"{hashlib.sha256(DATA).hexdigest()}"'}
    headers = {"Location": f"{network.url}/m.bin", **linked}
    hub = odd_http(lambda one: Reply(302, headers=headers))
    assert fetched(client, f"{hub.url}/m.bin", tmp_path) == DATA
    assert "sha256" in client.get_object_metadata(f"{hub.url}/m.bin")["digests"]
    network.handler = StaticFile(OTHER)
    with pytest.raises(IntegrityError):
        client.download(f"{hub.url}/m.bin", tmp_path / "other")


# -- what is not the file ------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [True, False], ids=["head-too", "get-only"])
@pytest.mark.parametrize("name", ["model.safetensors", "m.tar.gz", "config.json"])
def test_web_page_with_the_status_of_a_success_is_no_model(
    odd_http: Callable[..., OddHTTP],
    client: StorageClient,
    tmp_path: Path,
    name: str,
    everywhere: bool,
) -> None:
    file = StaticFile(DATA)
    page = Reply(200, PAGE, HTML)
    server = odd_http(lambda one: page if everywhere or one.method == "GET" else file(one))
    with pytest.raises(TransferError, match=r"a web page|document of the type text/html"):
        client.download(f"{server.url}/{name}", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_error_page_that_passes_is_tried_again(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    file = StaticFile(DATA)
    pages = iter([Reply(200, PAGE, HTML)])
    server = odd_http(
        lambda one: next(pages, None) or file(one) if one.method == "GET" else file(one)
    )
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA


@pytest.mark.parametrize(
    ("name", "headers", "data"),
    [
        ("index.html", HTML, PAGE),
        ("Node.js", HTML, PAGE),
        # A server that calls everything a page.
        ("m.bin", HTML, DATA),
        ("page.bin", {"Content-Type": "application/octet-stream"}, PAGE),
    ],
)
def test_page_that_is_asked_for_is_a_file(
    odd_http: Callable[..., OddHTTP],
    client: StorageClient,
    tmp_path: Path,
    name: str,
    headers: dict[str, str],
    data: bytes,
) -> None:
    server = odd_http(StaticFile(data, headers=headers))
    assert fetched(client, f"{server.url}/{name}", tmp_path) == data


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["X-Amz-Signature", "Signature", "sig", "X-Goog-Signature"])
@pytest.mark.parametrize("status", [401, 403])
def test_signed_url_that_expires_midway_is_refused_once_and_named_as_such(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, query: str, status: int
) -> None:
    file = StaticFile(DATA)
    server = odd_http(file)
    seen = iter(range(100))

    def expiring(request: Request) -> Reply:
        return Reply(status) if request.method == "GET" and next(seen) >= 3 else file(request)

    server.handler = expiring
    with (
        fast_client(connections=1) as client,
        pytest.raises(AuthenticationError, match="it may have expired") as caught,
    ):
        client.download(f"{server.url}/m.bin?{query}={CANARY}", tmp_path / "out")
    assert quiet(caught.value)
    assert len(server.asked("GET")) == 4
    assert list(tmp_path.iterdir()) == []


def test_expired_token_in_the_words_of_an_object_store_is_no_bad_request(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    body = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>m</Message></Error>"
    server = odd_http(lambda one: Reply(400, body))
    with fast_client() as client, pytest.raises(AuthenticationError, match="may have expired"):
        client.download(f"{server.url}/m.bin?X-Amz-Signature=1", tmp_path / "out")
    assert [one.method for one in server.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_permanent_error_is_not_repeated(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, status: int
) -> None:
    file = StaticFile(DATA)
    server = odd_http(lambda one: Reply(status) if one.method == "GET" else file(one))
    with fast_client(connections=1) as client, pytest.raises(StorageError):
        client.download(f"{server.url}/m.bin", tmp_path / "out")
    assert len(server.asked("GET")) == 1


@pytest.mark.parametrize(("status", "throttled"), [(429, True), (503, True), (500, False)])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_wish_to_be_asked_later_is_passed_on(
    odd_http: Callable[..., OddHTTP], status: int, throttled: bool, form: str
) -> None:
    now = 1_700_000_000
    headers = {
        "Date": formatdate(now, usegmt=True),
        "Retry-After": "2" if form == "seconds" else formatdate(now + 2, usegmt=True),
    }
    server = odd_http(lambda one: Reply(status, headers=headers))
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    with pytest.raises(TransientError) as caught:
        backend.stat("m")
    backend.close()
    assert (caught.value.retry_after, caught.value.throttled) == (2.0, throttled)


# -- servers that do not agree with themselves ---------------------------------------------------


@pytest.mark.parametrize("conditions", [True, False], ids=["conditions", "no-conditions"])
def test_head_and_get_that_name_different_versions_end_in_one_stream(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, conditions: bool
) -> None:
    one, other = StaticFile(DATA), StaticFile(DATA, etag='"v1-gzip"', conditions=conditions)
    server = odd_http(lambda asked: one(asked) if asked.method == "HEAD" else other(asked))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    last = server.asked("GET")[-1]
    assert (last.span, last.headers["If-Match"]) == (None, None)


@pytest.mark.parametrize("size", [SIZE, SIZE - 100], ids=["same-size", "other-size"])
def test_mirrors_that_hold_different_versions_give_one_of_them_whole(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, size: int
) -> None:
    mirrors = [
        StaticFile(DATA, conditions=False, headers={"X-Checksum-Sha256": sha256(DATA)}),
        StaticFile(OTHER[:size], etag='"other"', conditions=False),
    ]
    turn = iter(range(10_000))
    server = odd_http(lambda one: mirrors[next(turn) % 2](one))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) in (DATA, OTHER[:size])


def test_parts_that_do_not_say_of_which_version_they_are_are_not_put_together(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    # Replaced within the second that Last-Modified is exact to.
    time = "Sun, 01 Mar 2020 00:00:00 GMT"
    head = StaticFile(DATA, modified=time)
    versions = [
        StaticFile(data, etag=None, modified=time, conditions=False) for data in (DATA, OTHER)
    ]
    turn = iter(range(10_000))

    def handler(request: Request) -> Reply:
        return head(request) if request.method == "HEAD" else versions[next(turn) % 2](request)

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) in (DATA, OTHER)


def test_message_says_what_differs(odd_http: Callable[..., OddHTTP]) -> None:
    one, other = StaticFile(DATA), StaticFile(DATA, etag='"v2"', conditions=False)
    server = odd_http(lambda asked: one(asked) if asked.method == "HEAD" else other(asked))
    backend = open_backend(parse_uri(f"{server.url}/"), None, OpenOptions())
    info = backend.stat("m.bin")
    with pytest.raises(ObjectChangedError, match='its ETag was "v1" and is "v2" now'):
        backend.read("m.bin", None, info)
    backend.close()


def test_file_that_is_replaced_midway_is_fetched_anew_with_its_identity(
    nginx: NginxHTTP, client: StorageClient, tmp_path: Path
) -> None:
    put_file(nginx.data, "m.bin", DATA)
    script = once(Fault("change", at=0.3), "GET")
    with FaultProxy(
        nginx.endpoint, script, on_change=lambda one: put_file(nginx.data, "m.bin", OTHER)
    ) as proxy:
        found = fetched(client, f"{proxy.endpoint}/m.bin", tmp_path)
        # One stream that began before the change may end as it began.
        assert found in (DATA, OTHER)
        assert client.get_object_metadata(f"{proxy.endpoint}/m.bin")["etag"] is not None


@pytest.mark.parametrize("how", ["other", "shorter", "multipart"])
def test_ranges_that_are_served_wrongly_become_one_stream(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, how: str
) -> None:
    file = StaticFile(DATA, headers={"X-Checksum-Sha256": sha256(DATA)})
    seen = iter(range(100))

    def handler(request: Request) -> Reply:
        reply = file(request)
        if request.span is None or next(seen) < 3:
            return reply
        first, last = request.span
        headers = dict(reply.headers)
        if how == "multipart":
            headers |= {"Content-Type": "multipart/byteranges; boundary=x"}
            del headers["Content-Range"]
        elif how == "shorter":
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{SIZE}"
            return Reply(206, reply.body[:-1], headers)
        else:
            headers["Content-Range"] = f"bytes 0-{last - first}/{SIZE}"
            return Reply(206, DATA[: last - first + 1], headers)
        return Reply(206, reply.body, headers)

    server = odd_http(handler)
    with fast_client() as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    last_request = server.asked("GET")[-1]
    # The file is still held to its identity, and to its digest.
    assert (last_request.span, last_request.headers["If-Match"]) == (None, '"v1"')


def test_server_that_forgets_ranges_midway_is_read_whole(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    data = content(20 * 1024 * 1024)
    file = StaticFile(data)
    seen = iter(range(100))

    def handler(request: Request) -> Reply:
        file.ranges = request.method == "HEAD" or next(seen) < 4
        return file(request)

    server = odd_http(handler)
    with fast_client(part_size=2 * 1024 * 1024) as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == data


def test_stall_is_told_from_other_failures(odd_http: Callable[..., OddHTTP]) -> None:
    server = odd_http(StaticFile(DATA))
    with FaultProxy(server.url, once(Fault("stall"), "GET")) as proxy:
        location = parse_uri(f"{proxy.endpoint}/")
        backend = open_backend(location, HTTPConfig(read_timeout=0.2), OpenOptions())
        with pytest.raises(TransientError) as caught, backend.read("m.bin") as body:
            for _ in body:
                pass
        backend.close()
    assert caught.value.stalled
