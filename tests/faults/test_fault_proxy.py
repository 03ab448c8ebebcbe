"""What clients see through the fault proxy, byte for byte, before real servers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import trustme

from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import KINDS, Fault, Request, Script, SeededScript
from tests.faults.proxy_support import DATA, PATIENCE, Client, see
from tests.faults.scripts import once
from tests.servers.nginx_http import NginxHTTP
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.seaweedfs import SeaweedFS

# Seconds in which a proxy ends at once, however busy the machine is; what hangs hangs for longer.
SOON = 30.0

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


def dechunked(body: bytes) -> bytes:
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return whole
        whole, body = whole + body[:length], body[length + 2 :]


@pytest.mark.parametrize("reply", [Reply(body=DATA, chunked=True), Reply(body=DATA, length=-1)])
def test_an_answer_that_does_not_tell_its_length_passes(
    odd_http: Callable[..., OddHTTP], reply: Reply
) -> None:
    seen = see(odd_http(lambda request: reply).url, None)
    if reply.chunked:
        assert seen.ending == "whole"
        assert dechunked(seen.body) == DATA
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


def test_who_reads_late_gets_the_end_of_an_answer_too(odd_http: Callable[..., OddHTTP]) -> None:
    """For one of these sizes the end is neither sent nor too much to wait when it all ends."""
    with ThreadPoolExecutor(4) as pool:
        sizes = range(128 * 1024, 1024 * 1024, 32 * 1024)
        origin = odd_http(lambda request: Reply(body=bytes(int(request.path[1:]))))
        for size, arrived in zip(sizes, pool.map(partial(_late, origin.url), sizes), strict=True):
            assert arrived == size - 1


def _late(target: str, size: int) -> int:
    """Return how many bytes of a body come to who reads them when nothing more can be sent."""
    # The link keeps what lies in the machine's buffers small.
    link = Link(rate=1e9)
    with (
        FaultProxy(target, once(Fault("truncate", 1.0)), link=link) as proxy,
        socket.socket() as raw,
    ):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(PATIENCE)
        raw.connect(("127.0.0.1", int(proxy.endpoint.rpartition(":")[2])))
        raw.sendall(f"GET /{size} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        end = time.monotonic() + 0.5
        while proxy.bytes_down < size - 1 and time.monotonic() < end:
            time.sleep(0.01)
        data = b""
        while block := raw.recv(1 << 20):
            data += block
    return len(data.partition(b"\r\n\r\n")[2])


def test_a_server_that_is_not_there_is_a_502() -> None:
    # Nobody listens there, and nobody else can, not even the proxy itself.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
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


def test_clients_over_tls_are_served(server: NginxHTTP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.testing.fault_proxy._HANDSHAKE", 4 * SOON)
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
            half = len(DATA) // 2
            assert client.ask("GET", "/model.bin", silent_after=half).ending == "open"
            began = time.monotonic()
            proxy.__exit__(None, None, None)
            assert time.monotonic() - began < SOON


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
def test_it_stops_soon_whatever_hangs(server: NginxHTTP, kind: str) -> None:
    hanging = threading.Event()
    try:
        with contextlib.ExitStack() as clients:
            with FaultProxy(
                server.endpoint, once(Fault(kind)), on_change=lambda request: hanging.wait(240)
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
            assert time.monotonic() - began < SOON
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
