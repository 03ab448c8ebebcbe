"""A reverse proxy that records what passes, so that a test can count attempts."""

from __future__ import annotations

import http.client
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from tests.servers.chunked import read_chunks
from tests.servers.process import HOST

_BLOCK = 256 * 1024
_TIMEOUT = 120.0
# They concern one connection, not the message. "Expect" was answered here.
_HOP_BY_HOP = frozenset(
    {"connection", "expect", "keep-alive", "proxy-connection", "transfer-encoding"}
)

Fault = Callable[[int, str, str], int | None]
"""Number of the request (from 1), method, path → a status to answer instead of forwarding."""


class Recorded(NamedTuple):
    """One request that passed."""

    method: str
    path: str
    """The request's target as it was sent, query included."""
    status: int
    """What was answered; 502 if the server behind did not."""
    headers: Mapping[str, str]
    """The request's headers, by their names in lower case."""


class CountingProxy:
    """Forwards every request to one server and records it before the answer goes out.

    The ``Host`` header and the target pass unchanged, so signatures stay valid. Use it as a
    context manager and give clients its ``endpoint``.
    """

    def __init__(self, target: str, fault: Fault | None = None) -> None:
        """Prepare to forward to ``target``, a URL of scheme, host and port."""
        parts = urlsplit(target)
        assert parts.hostname is not None
        self.address = (parts.hostname, parts.port or 80)
        self.fault = fault
        self._lock = threading.Lock()
        self._requests: list[Recorded] = []
        self._seen = 0
        self._received = self._answered = 0
        self._server: _ProxyServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """URL of the proxy, without a trailing slash."""
        assert self._server is not None, "the proxy is not running"
        return f"http://{HOST}:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Recorded]:
        """What has passed so far, in the order of the answers."""
        with self._lock:
            return list(self._requests)

    @property
    def received(self) -> int:
        """Bytes of all bodies of requests so far."""
        with self._lock:
            return self._received

    @property
    def answered(self) -> int:
        """Bytes of all bodies of answers so far."""
        with self._lock:
            return self._answered

    def clear(self) -> None:
        """Forget what has passed; numbers for ``fault`` start at 1 again."""
        with self._lock:
            self._requests.clear()
            self._seen = self._received = self._answered = 0

    def count(self, method: str | None = None) -> int:
        """Return how many requests, of one method or of all, have passed."""
        return sum(method in (None, request.method) for request in self.requests)

    def __enter__(self) -> Self:
        self._server = _ProxyServer(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="counting-proxy", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def admit(self, method: str, path: str) -> int | None:
        """Number a request, and return the status to answer it with if it must not pass."""
        with self._lock:
            self._seen += 1
            number = self._seen
        return self.fault(number, method, path) if self.fault else None

    def record(self, method: str, path: str, status: int, headers: Mapping[str, str]) -> None:
        """Note an answer."""
        with self._lock:
            self._requests.append(Recorded(method, path, status, headers))

    def count_bytes(self, *, received: int = 0, answered: int = 0) -> None:
        """Count bytes of bodies, before they go on."""
        with self._lock:
            self._received += received
            self._answered += answered


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: CountingProxy) -> None:
        self.proxy = proxy
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client may hang up at any time.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _ProxyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _TIMEOUT

    def handle_any(self) -> None:
        status = self.server.proxy.admit(self.command, self.path)
        if status is not None:
            # Else the answer could be lost: a sender whose connection breaks reads no further.
            for _ in self._body():
                pass
            self._answer_alone(status)
            return
        upstream = http.client.HTTPConnection(*self.server.proxy.address, timeout=_TIMEOUT)
        with closing(upstream):
            try:
                self._send(upstream)
                answer = upstream.getresponse()
            except (OSError, http.client.HTTPException):
                self._answer_alone(502)
                return
            self._relay(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = do_PATCH = handle_any  # noqa: N815

    def _record(self, status: int) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.proxy.record(self.command, self.path, status, headers)

    def _answer_alone(self, status: int) -> None:
        self._record(status)
        # The request's body may be unread.
        self.close_connection = True
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, upstream: http.client.HTTPConnection) -> None:
        chunked = self._is_chunked()
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        if chunked:
            upstream.putheader("Transfer-Encoding", "chunked")
        upstream.endheaders()
        try:
            for block in self._body():
                self.server.proxy.count_bytes(received=len(block))
                upstream.send(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
            if chunked:
                upstream.send(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            # The server has answered without reading on; what is left of the body is unread.
            self.close_connection = True

    def _is_chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def _body(self) -> Iterator[bytes]:
        if self._is_chunked():
            yield from read_chunks(self.rfile)
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (block := self.rfile.read(min(left, _BLOCK))):
            left -= len(block)
            yield block

    def _relay(self, answer: http.client.HTTPResponse) -> None:
        self._record(answer.status)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        has_body = self.command != "HEAD" and answer.status not in (204, 304)
        chunked = has_body and answer.getheader("Content-Length") is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not has_body:
            return
        try:
            while block := answer.read1(_BLOCK):
                self.server.proxy.count_bytes(answered=len(block))
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif answer.length:
            # The server hung up midway: so do we, and the client sees a short body.
            self.close_connection = True
