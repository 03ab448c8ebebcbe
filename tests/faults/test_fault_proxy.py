"""What clients see through the fault proxy, byte for byte, before real servers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import trustme

from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import KINDS, Fault, Request, Script, SeededScript
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.seaweedfs import SeaweedFS

DATA = random.Random(5).randbytes(300_000)
QUIET = 0.3


class Seen(NamedTuple):
    """What a client saw of one answer, and how it ended."""

    head: str
    body: bytes
    ending: str
    """``whole``, ``closed``, ``reset``, or ``open`` if nothing more came."""

    @property
    def status(self) -> int:
        return int(self.head.split(" ")[1])

    def header(self, name: str) -> str | None:
        for line in self.head.split("\r\n")[1:]:
            field, _, value = line.partition(":")
            if field.lower() == name.lower():
                return value.strip()
        return None


class Client:
    """One raw connection."""

    def __init__(self, endpoint: str, context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=10)
        if context is not None:
            self.socket = context.wrap_socket(
                self.socket, server_hostname=parts.hostname, suppress_ragged_eofs=False
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, method: str, target: str, *lines: str, body: bytes = b"") -> None:
        head = [f"{method} {target} HTTP/1.1", "Host: store.example", *lines]
        if body:
            head.append(f"Content-Length: {len(body)}")
        text = "\r\n".join(head).encode() + b"\r\n\r\n"
        # It may be reset midway.
        with contextlib.suppress(OSError):
            self.socket.sendall(text + body)

    def receive(self, *, bodiless: bool = False) -> Seen:
        """Read one answer, until it is whole or nothing more comes."""
        data = b""
        ending = ""
        while not ending:
            head, end, body = data.partition(b"\r\n\r\n")
            seen = Seen(head.decode("latin-1"), body, "whole")
            if end:
                length = seen.header("Content-Length")
                chunked = seen.header("Transfer-Encoding") == "chunked"
                if bodiless or (length is not None and len(body) >= int(length)):
                    return seen
                if chunked and body.endswith(b"0\r\n\r\n"):
                    return seen
            self.socket.settimeout(QUIET if data else 5)
            try:
                block = self.socket.recv(1 << 20)
                data += block
                ending = "" if block else "closed"
            except (ConnectionResetError, ssl.SSLEOFError):
                # Under TLS, Python shows a reset as an end without goodbye.
                ending = "reset"
            except TimeoutError:
                ending = "open"
        return Seen(head.decode("latin-1"), body, ending)

    def ask(self, method: str, target: str, *lines: str, body: bytes = b"") -> Seen:
        self.send(method, target, *lines, body=body)
        return self.receive(bodiless=method == "HEAD")


def once(fault: Fault) -> Script:
    """Return a script by which the first request meets ``fault``, and no other."""
    return lambda request: fault if request.number == 1 else None


def see(
    target: str,
    fault: Fault | None,
    method: str = "GET",
    path: str = "/model.bin",
    body: bytes = b"",
    **options: object,
) -> Seen:
    """Return what a new client sees of its first request, which meets ``fault``."""
    script = None if fault is None else once(fault)
    with (
        FaultProxy(target, script, **options) as proxy,  # type: ignore[arg-type]
        Client(proxy.endpoint) as client,
    ):
        return client.ask(method, path, body=body)


@pytest.fixture
def server(nginx_http: NginxHTTP) -> NginxHTTP:
    put_file(nginx_http.data, "model.bin", DATA)
    (nginx_http.data / "written").unlink(missing_ok=True)
    return nginx_http


@pytest.fixture
def echo(odd_http: Callable[..., OddHTTP]) -> OddHTTP:
    return odd_http(lambda request: Reply(body=request.body or b"nothing"))


# Nothing goes wrong.


def test_an_answer_passes_as_it_is_and_the_connection_lives_on(server: NginxHTTP) -> None:
    with FaultProxy(server.endpoint) as proxy, Client(proxy.endpoint) as client:
        for _ in range(3):
            seen = client.ask("GET", "/model.bin")
            assert seen.status == 200
            assert seen.body == DATA
            assert seen.header("ETag")
        assert client.ask("HEAD", "/model.bin").header("Content-Length") == str(len(DATA))
        ranged = client.ask("GET", "/model.bin", "Range: bytes=5-9")
        assert (ranged.status, ranged.body) == (206, DATA[5:10])
        tag = seen.header("ETag")
        client.send("GET", "/model.bin", f"If-None-Match: {tag}")
        assert client.receive(bodiless=True).status == 304
        assert client.ask("GET", "/missing").status == 404


def test_host_target_and_headers_pass_unchanged(echo: OddHTTP) -> None:
    target = "/a%2Fb//c/../d?x=%20&y=+&z"
    with FaultProxy(echo.url) as proxy, Client(proxy.endpoint) as client:
        client.ask("GET", target, "X-Amz-Date: now", "x-twice: 1", "x-twice: 2", "TE: trailers")
    (request,) = echo.requests
    assert request.target == target
    assert request.headers["Host"] == "store.example"
    assert request.headers["X-Amz-Date"] == "now"
    assert request.headers.get_all("x-twice") == ["1", "2"]
    assert request.headers["TE"] is None


def test_signatures_of_s3_stay_valid(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> None:
    with FaultProxy(seaweedfs.endpoint) as proxy:
        client = seaweedfs.client(endpoint=proxy.endpoint)
        try:
            client.put_object(Bucket=shared_bucket, Key=f"{prefix}a b", Body=DATA)
            body = client.get_object(Bucket=shared_bucket, Key=f"{prefix}a b")["Body"].read()
        finally:
            client.close()
        assert body == DATA
        assert proxy.count("PUT") == 1
        assert proxy.bytes_up == proxy.bytes_down == len(DATA)


def test_a_request_in_chunks_passes_with_its_trailers(echo: OddHTTP) -> None:
    with FaultProxy(echo.url) as proxy, Client(proxy.endpoint) as client:
        client.send("PUT", "/", "Transfer-Encoding: chunked", "Trailer: x-sum")
        client.socket.sendall(b"5\r\nfirst\r\n6;ext=1\r\nsecond\r\n0\r\nx-sum: 1\r\n\r\n")
        assert client.receive().body == b"firstsecond"
        assert proxy.bytes_up == len("firstsecond")
        assert client.ask("PUT", "/", body=b"next").body == b"next"


@pytest.mark.parametrize("reply", [Reply(body=DATA, chunked=True), Reply(body=DATA, length=-1)])
def test_an_answer_that_does_not_tell_its_length_passes(
    odd_http: Callable[..., OddHTTP], reply: Reply
) -> None:
    seen = see(odd_http(lambda request: reply).url, None)
    if reply.chunked:
        assert seen.ending == "whole"
        assert DATA[:50_000] in seen.body
    else:
        assert (seen.ending, seen.body) == ("closed", DATA)


def test_who_waits_for_100_continue_gets_it_from_the_server(server: NginxHTTP) -> None:
    with FaultProxy(server.endpoint) as proxy, Client(proxy.endpoint) as client:
        client.send("PUT", "/written", "Expect: 100-continue", f"Content-Length: {len(DATA)}")
        assert client.receive(bodiless=True).status == 100
        client.socket.sendall(DATA)
        assert client.receive(bodiless=True).status == 201
    assert (server.data / "written").read_bytes() == DATA


def test_an_answer_that_comes_before_the_body_reaches_the_client(server: NginxHTTP) -> None:
    # nginx refuses the method at once and reads on.
    with FaultProxy(server.odd) as proxy, Client(proxy.endpoint) as client:
        assert client.ask("PUT", "/read-only/model.bin", body=DATA * 20).status == 403


def test_a_server_that_is_not_there_is_a_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert see(f"http://127.0.0.1:{port}", None).status == 502


def test_what_is_no_http_ends_the_connection(echo: OddHTTP) -> None:
    with FaultProxy(echo.url) as proxy, Client(proxy.endpoint) as client:
        client.socket.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert client.receive().ending == "closed"
    assert not echo.requests


def test_large_bodies_pass_both_ways(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> None:
    block = os.urandom(1 << 20)
    with FaultProxy(seaweedfs.endpoint) as proxy:
        client = seaweedfs.client(endpoint=proxy.endpoint)
        try:
            client.put_object(Bucket=shared_bucket, Key=f"{prefix}large", Body=block * 64)
            body = client.get_object(Bucket=shared_bucket, Key=f"{prefix}large")["Body"]
            found = hashlib.sha256()
            for piece in body.iter_chunks(1 << 20):
                found.update(piece)
        finally:
            client.close()
        assert found.digest() == hashlib.sha256(block * 64).digest()
        assert proxy.bytes_up == proxy.bytes_down == 64 << 20


def test_clients_over_tls_are_served(server: NginxHTTP) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    faults = {2: Fault("truncate"), 3: Fault("reset"), 4: Fault("stall")}
    with FaultProxy(server.endpoint, lambda asked: faults.get(asked.number), tls=tls) as proxy:
        assert proxy.endpoint.startswith("https://")
        with Client(proxy.endpoint, trust) as client:
            assert client.ask("GET", "/model.bin").body == DATA
            cut = client.ask("GET", "/model.bin")
            assert (len(cut.body), cut.ending) == (len(DATA) // 2, "closed")
        with Client(proxy.endpoint, trust) as client:
            assert client.ask("GET", "/model.bin").ending == "reset"
        with Client(proxy.endpoint, trust) as client, Client(proxy.endpoint):
            assert client.ask("GET", "/model.bin").ending == "open"
            began = time.monotonic()
            proxy.__exit__(None, None, None)
            assert time.monotonic() - began < 1


# One fault of each kind.


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_reset_ends_an_answer_by_rst_when_its_share_has_arrived(
    server: NginxHTTP, share: float
) -> None:
    seen = see(server.endpoint, Fault("reset", share))
    assert (seen.status, seen.ending) == (200, "reset")
    assert seen.body == DATA[: min(int(share * len(DATA)), len(DATA) - 1)]


def test_reset_request_comes_while_the_body_goes_up(echo: OddHTTP) -> None:
    with FaultProxy(echo.url, once(Fault("reset_request", 0.25))) as proxy:
        with Client(proxy.endpoint) as client:
            assert client.ask("PUT", "/", body=DATA).ending == "reset"
        (exchange,) = proxy.exchanges
        assert exchange.bytes_up == len(DATA) // 4
        assert exchange.status is None


def test_reset_request_does_not_forward_what_has_no_body(echo: OddHTTP) -> None:
    assert see(echo.url, Fault("reset_request")).ending == "reset"
    assert not echo.requests


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_truncate_closes_before_the_promised_length(server: NginxHTTP, share: float) -> None:
    seen = see(server.endpoint, Fault("truncate", share))
    assert seen.header("Content-Length") == str(len(DATA))
    assert seen.ending == "closed"
    assert seen.body == DATA[: min(int(share * len(DATA)), len(DATA) - 1)]


def test_truncate_leaves_chunks_without_their_end(odd_http: Callable[..., OddHTTP]) -> None:
    seen = see(odd_http(lambda request: Reply(body=DATA, chunked=True)).url, Fault("truncate"))
    assert seen.header("Transfer-Encoding") == "chunked"
    assert seen.ending == "closed"
    assert not seen.body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("chunked", [False, True])
def test_truncate_unsized_looks_whole(odd_http: Callable[..., OddHTTP], chunked: bool) -> None:
    body = DATA[:40_000]
    origin = odd_http(lambda request: Reply(body=body, chunked=chunked))
    seen = see(origin.url, Fault("truncate_unsized"))
    assert seen.header("Content-Length") is None
    assert seen.header("Transfer-Encoding") is None
    assert (seen.body, seen.ending) == (body[:20_000], "closed")


def test_stall_stops_the_body_and_leaves_the_connection_open(server: NginxHTTP) -> None:
    seen = see(server.endpoint, Fault("stall"))
    assert (seen.body, seen.ending) == (DATA[: len(DATA) // 2], "open")


def test_stall_answer_forwards_and_says_nothing(echo: OddHTTP) -> None:
    with FaultProxy(echo.url, once(Fault("stall_answer"))) as proxy:
        with Client(proxy.endpoint) as client:
            client.socket.settimeout(QUIET)
            client.send("PUT", "/", body=b"written")
            with pytest.raises(TimeoutError):
                client.socket.recv(1)
        assert [request.body for request in echo.requests] == [b"written"]


@pytest.mark.parametrize("kind", ["stall", "stall_answer", "throttle"])
def test_what_lasts_for_a_while_passes_then(server: NginxHTTP, kind: str) -> None:
    began = time.monotonic()
    assert see(server.endpoint, Fault(kind, seconds=0.2)).body == DATA
    assert time.monotonic() - began >= 0.2


def test_throttle_lets_a_few_kib_a_second_pass(server: NginxHTTP) -> None:
    with (
        FaultProxy(server.endpoint, once(Fault("throttle", 0.0))) as proxy,
        Client(proxy.endpoint) as client,
    ):
        client.send("GET", "/model.bin")
        end = time.monotonic() + 1
        arrived = 0
        while time.monotonic() < end:
            arrived += len(client.socket.recv(1 << 20))
    assert 1_000 < arrived < 10_000


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_status_answers_without_asking_the_server(echo: OddHTTP, status: int) -> None:
    fault = Fault("status", status=status, retry_after=2)
    with FaultProxy(echo.url, once(fault)) as proxy, Client(proxy.endpoint) as client:
        seen = client.ask("PUT", "/", body=DATA)
        assert (seen.status, seen.header("Retry-After")) == (status, "2")
        assert not echo.requests
        # The body was read, and the connection can be used again.
        assert client.ask("PUT", "/", body=b"again").body == b"again"
        assert proxy.exchanges[0].bytes_up == len(DATA)


def test_status_to_who_waits_for_100_continue_comes_at_once(echo: OddHTTP) -> None:
    with FaultProxy(echo.url, once(Fault("status"))) as proxy, Client(proxy.endpoint) as client:
        client.send("PUT", "/", "Expect: 100-continue", "Content-Length: 5")
        seen = client.receive()
        assert (seen.status, seen.header("Connection")) == (503, "close")


@pytest.mark.parametrize(
    ("store", "word"),
    [
        ("s3", b"<Code>InternalError</Code>"),
        ("azure", b"<Code>InternalError</Code>"),
        ("gcs", b'"code": 500'),
        ("hf", b'"error"'),
        ("http", b"<html>"),
    ],
)
def test_error_body_is_a_success_with_an_error_in_it(
    echo: OddHTTP, store: str, word: bytes
) -> None:
    seen = see(echo.url, Fault("error_body"), store=store)
    assert (seen.status, seen.ending) == (200, "whole")
    assert word in seen.body
    assert not echo.requests


@pytest.mark.parametrize("answer", [b"mine", lambda request: f"{request.target}".encode()])
def test_an_answer_of_ones_own(echo: OddHTTP, answer: bytes | Callable[[Request], bytes]) -> None:
    seen = see(echo.url, Fault("error_body", answer=answer), path="/mine")
    assert seen.body.strip(b"/") == b"mine"


@pytest.mark.parametrize("status", [None, 500])
def test_lost_answer_applies_the_request(server: NginxHTTP, status: int | None) -> None:
    seen = see(server.endpoint, Fault("lost_answer", status=status), "PUT", "/written", DATA)
    assert (server.data / "written").read_bytes() == DATA
    if status is None:
        assert (seen.head, seen.ending) == ("", "reset")
    else:
        assert seen.status == 500


def test_flip_changes_one_bit_of_the_answer(server: NginxHTTP) -> None:
    seen = see(server.endpoint, Fault("flip", 0.3))
    assert seen.ending == "whole"
    different = [n for n, (a, b) in enumerate(zip(seen.body, DATA, strict=True)) if a != b]
    assert different == [int(0.3 * len(DATA))]


def test_flip_request_changes_one_bit_of_what_is_stored(server: NginxHTTP) -> None:
    assert see(server.endpoint, Fault("flip_request", 1.0), "PUT", "/written", DATA).status == 201
    written = (server.data / "written").read_bytes()
    assert (written[:-1], written[-1]) == (DATA[:-1], DATA[-1] ^ 1)


def test_change_is_called_while_the_body_is_midway(server: NginxHTTP) -> None:
    called: list[tuple[str, int]] = []

    def change(request: Request) -> None:
        called.append((request.target, proxy.bytes_down))
        put_file(server.data, "model.bin", b"new")

    with (
        FaultProxy(server.endpoint, once(Fault("change")), on_change=change) as proxy,
        Client(proxy.endpoint) as client,
    ):
        assert client.ask("GET", "/model.bin").body == DATA
        assert client.ask("GET", "/model.bin").body == b"new"
    assert called == [("/model.bin", len(DATA) // 2)]


@pytest.mark.parametrize(
    ("store", "status", "word"),
    [
        ("s3", 400, b"<Code>ExpiredToken</Code>"),
        ("azure", 403, b"<Code>AuthenticationFailed</Code>"),
        ("gcs", 401, b'"code": 401'),
        ("hf", 401, b"expired"),
        ("http", 401, b"expired"),
    ],
)
def test_expire_lasts_until_credentials_are_renewed(
    echo: OddHTTP, store: str, status: int, word: bytes
) -> None:
    script = SeededScript(1, ("expire",), probability=1, limit=1)
    with (
        FaultProxy(echo.url, script, store=store) as proxy,
        Client(proxy.endpoint) as client,
    ):
        for _ in range(3):
            seen = client.ask("GET", "/")
            assert seen.status == status
            assert word in seen.body
        assert script.expired
        script.renew()
        assert client.ask("GET", "/").body == b"nothing"
    assert len(script.happened) == 1


@pytest.mark.parametrize("kind", ["reset", "truncate", "truncate_unsized"])
def test_where_an_answer_has_no_body_its_end_replaces_it(server: NginxHTTP, kind: str) -> None:
    seen = see(server.endpoint, Fault(kind), "PUT", "/written", DATA)
    assert (seen.head, seen.ending) == ("", "reset" if kind == "reset" else "closed")
    assert (server.data / "written").read_bytes() == DATA


# Around it.


def test_exchanges_tell_what_passed(server: NginxHTTP) -> None:
    fault = Fault("truncate")
    with FaultProxy(server.endpoint, once(fault)) as proxy:
        began = time.monotonic()
        for method, body in (("GET", b""), ("PUT", DATA), ("HEAD", b"")):
            with Client(proxy.endpoint) as client:
                path = "/written" if method == "PUT" else "/model.bin"
                client.ask(method, path, body=body)
        first, second, third = proxy.exchanges
        assert (first.number, first.method, first.target) == (1, "GET", "/model.bin")
        assert (first.status, first.bytes_down, first.fault) == (200, len(DATA) // 2, fault)
        assert began <= first.started <= second.started <= third.started
        assert (second.status, second.bytes_up, second.bytes_down) == (201, len(DATA), 0)
        assert (third.status, third.bytes_down, third.fault) == (200, 0, None)
        assert (proxy.count(), proxy.count("GET")) == (3, 1)
        proxy.clear()
        assert proxy.bytes_down == proxy.bytes_up == proxy.count() == 0


@pytest.mark.parametrize("kind", ["stall", "stall_answer", "throttle", "change"])
def test_it_stops_within_a_second_whatever_hangs(server: NginxHTTP, kind: str) -> None:
    hanging = threading.Event()
    try:
        with contextlib.ExitStack() as clients:
            with FaultProxy(
                server.endpoint, once(Fault(kind)), on_change=lambda request: hanging.wait(30)
            ) as proxy:
                client = clients.enter_context(Client(proxy.endpoint))
                client.send("GET", "/model.bin")
                arrived = 0
                # The head comes with the first half, or never.
                while kind != "stall_answer" and arrived <= len(DATA) // 2:
                    arrived += len(client.socket.recv(1 << 20))
                idle = clients.enter_context(Client(proxy.endpoint))
                idle.socket.sendall(b"GET / HT")
                began = time.monotonic()
            assert time.monotonic() - began < 1
    finally:
        hanging.set()


def test_what_a_script_or_a_change_raises_comes_out(server: NginxHTTP) -> None:
    def fail(request: Request) -> Fault:
        raise LookupError("no such plan")

    with pytest.raises(LookupError, match="no such plan"):
        _run(server.endpoint, fail)
    with pytest.raises(ValueError, match="on_change"):
        see(server.endpoint, Fault("change"))


def _run(target: str, script: Script) -> None:
    with FaultProxy(target, script) as proxy, Client(proxy.endpoint) as client:
        assert client.ask("GET", "/model.bin").ending == "closed"


# Scripts.


def _drawn(seed: int, **options: object) -> list[Fault | None]:
    script = SeededScript(seed, **options)  # type: ignore[arg-type]
    drawn: list[Fault | None] = []
    for number in range(1, 301):
        drawn.append(script(Request(number, "GET", "/", {})))
        script.renew()
    return drawn


def test_the_same_seed_gives_the_same_faults() -> None:
    assert _drawn(7) == _drawn(7)
    assert _drawn(7) != _drawn(8)


def test_a_script_draws_every_kind_as_often_as_it_is_told() -> None:
    drawn = [fault for fault in _drawn(7, probability=0.5) if fault is not None]
    assert {fault.kind for fault in drawn} == set(KINDS)
    assert 120 <= len(drawn) <= 180


def test_a_script_keeps_to_its_limit_and_its_requests() -> None:
    script = SeededScript(1, ("flip",), 1.0, limit=2, only=lambda request: request.number > 3)
    for number in range(1, 9):
        script(Request(number, "GET", "/", {}))
    assert [number for number, _ in script.happened] == [4, 5]


def test_the_same_requests_meet_the_same_faults_through_the_proxy(server: NginxHTTP) -> None:
    def run() -> list[tuple[str, int | None, int, Fault | None]]:
        kinds = ("truncate", "status", "flip", "lost_answer", "error_body")
        with FaultProxy(server.endpoint, SeededScript(3, kinds, 0.5)) as proxy:
            for _ in range(30):
                with Client(proxy.endpoint) as client:
                    client.ask("GET", "/model.bin")
            return [(e.method, e.status, e.bytes_down, e.fault) for e in proxy.exchanges]

    first = run()
    assert first == run()
    assert sum(fault is not None for *_, fault in first) > 5


@pytest.mark.parametrize("kinds", [(), ("reset", "melt")])
def test_unknown_kinds_are_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="kind of fault"):
        SeededScript(1, kinds)


@pytest.mark.parametrize(("target", "store"), [("ftp://x", "s3"), ("http://127.0.0.1", "swift")])
def test_a_target_or_store_that_cannot_be_is_refused(target: str, store: str) -> None:
    with pytest.raises(ValueError, match=r"target|store"):
        FaultProxy(target, store=store)
