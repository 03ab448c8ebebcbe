"""What clients see of each kind of fault that the fault proxy has, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request, SeededScript
from tests.faults.proxy_support import DATA, PATIENCE, QUIET, Client, see
from tests.faults.scripts import once
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply


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
    half = len(DATA) // 2
    seen = see(server.endpoint, Fault("stall"), silent_after=half)
    assert (seen.body, seen.ending) == (DATA[:half], "open")


def test_stall_answer_forwards_and_says_nothing(echo: OddHTTP) -> None:
    with FaultProxy(echo.url, once(Fault("stall_answer"))) as proxy:
        with Client(proxy.endpoint) as client:
            client.send("PUT", "/", body=b"written")
            end = time.monotonic() + PATIENCE
            while not echo.requests and time.monotonic() < end:
                time.sleep(0.01)
            client.socket.settimeout(QUIET)
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
        began = time.monotonic()
        client.send("GET", "/model.bin")
        arrived = 0
        while arrived < 5_000:
            block = client.socket.recv(1 << 20)
            assert block
            arrived += len(block)
            # How much has come by now, with the head and the piece that is let through at once.
            # Who looks late sees more, but no more than the time since then allows.
            assert arrived <= 1_500 + 4_096 * (time.monotonic() - began)
        assert time.monotonic() - began < PATIENCE


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
