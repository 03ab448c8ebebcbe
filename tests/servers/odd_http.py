"""A small HTTP server in this process that does what a test tells it to, right or wrong."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.servers.chunked import EndedEarlyError, read_chunks
from tests.servers.process import HOST

_BLOCK = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    target: str
    headers: Message
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def span(self) -> tuple[int, int] | None:
        """First and last byte of the range that is asked for, if one is."""
        text = self.headers.get("Range", "")
        if not text.startswith("bytes="):
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), int(last)


@dataclass
class Reply:
    """One answer.

    Attributes:
        length: ``Content-Length`` to announce; ``None`` for that of the body, -1 for none.
        chunked: send the body in chunks; then no length is announced.
        cut: bytes of the body after which the connection is cut.
        stall: what to wait for before it is cut.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    chunked: bool = False
    cut: int | None = None
    stall: threading.Event | None = None


Handler = Callable[[Request], Reply]


class OddHTTP:
    """Answers every request by ``handler``, and records it. A context manager.

    Attributes:
        handler: may be replaced at any time.
        connections: how many were made.
    """

    def __init__(self, handler: Handler, host: str = HOST, tls: ssl.SSLContext | None = None):
        """Listen from now on; answer once entered.

        Args:
            handler: makes the answers.
            host: in ``url``; ``localhost`` is another origin than 127.0.0.1.
            tls: for https.
        """
        self.handler = handler
        self.connections = 0
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._server = _Server(self)
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="odd-http", daemon=True
        )

    @property
    def requests(self) -> list[Request]:
        """What was asked so far."""
        with self._lock:
            return list(self._requests)

    def asked(self, method: str) -> list[Request]:
        """Return the requests of one method."""
        return [request for request in self.requests if request.method == method]

    def clear(self) -> None:
        """Forget what was asked."""
        with self._lock:
            self._requests.clear()

    def record(self, request: Request) -> None:
        """Note a request."""
        with self._lock:
            self._requests.append(request)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, odd: OddHTTP) -> None:
        self.odd = odd
        super().__init__((HOST, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection, and serve it."""
        self.odd.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients hang up, and handshakes fail, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def answer(self) -> None:
        # The path that the base class offers has lost its doubled slashes.
        target = self.requestline.split()[1]
        request = Request(self.command, target, self.headers, b"".join(self._body()))
        self.server.odd.record(request)
        reply = self.server.odd.handler(request)
        self.send_response_only(reply.status)
        names = {name.lower() for name in reply.headers}
        if "date" not in names:
            self.send_header("Date", self.date_time_string())
        for name, value in reply.headers.items():
            self.send_header(name, value)
        silent = self.command == "HEAD" or reply.status in (204, 304)
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif reply.length != -1 and "content-length" not in names:
            length = len(reply.body) if reply.length is None else reply.length
            self.send_header("Content-Length", str(length))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if silent:
            return
        body = reply.body if reply.cut is None else reply.body[: reply.cut]
        with contextlib.suppress(OSError):
            for start in range(0, len(body), _BLOCK):
                block = body[start : start + _BLOCK]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if reply.chunked else block)
            if reply.chunked and reply.cut is None:
                self.wfile.write(b"0\r\n\r\n")
        if reply.stall is not None:
            reply.stall.wait(600)
        if reply.cut is not None or len(reply.body) != (reply.length or len(reply.body)):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            # What came before the client hung up is a request, too.
            with contextlib.suppress(EndedEarlyError):
                yield from read_chunks(self.rfile)
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))


@dataclass
class StaticFile:
    """A handler: one file, served as well as the fields allow.

    Attributes:
        cuts: the connection is cut after this many bytes of each of the next GET answers.
    """

    data: bytes
    etag: str | None = '"v1"'
    modified: str | None = None
    head: int = 200
    head_length: bool = True
    ranges: bool = True
    announce: bool = True
    chunked: bool = False
    conditions: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)

    def __call__(self, request: Request) -> Reply:
        """Answer a request."""
        headers = dict(self.headers)
        if self.etag is not None:
            headers["ETag"] = self.etag
        if self.modified is not None:
            headers["Last-Modified"] = self.modified
        if self.announce and self.ranges:
            headers["Accept-Ranges"] = "bytes"
        if request.method == "HEAD":
            if self.head != 200:
                return Reply(self.head)
            return Reply(200, self.data, headers, length=None if self.head_length else -1)
        wanted = request.headers.get("If-Match")
        if self.conditions and wanted not in (None, self.etag):
            return Reply(412)
        body, status = self.data, 200
        if self.ranges and request.span is not None:
            first, last = request.span
            if first >= len(self.data):
                return Reply(416, headers={"Content-Range": f"bytes */{len(self.data)}"})
            body, status = self.data[first : last + 1], 206
            end = first + len(body) - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{len(self.data)}"
        cut = None
        if self.cuts and len(body) > 1:
            cut = self.cuts.pop(0)
        return Reply(status, body, headers, chunked=self.chunked, cut=cut)


@dataclass
class Taker:
    """A handler: takes what is PUT, and gives it back.

    Attributes:
        statuses: of the next answers to PUT; 201 after them.
        headers: of the answers to PUT.
        stored: what was put, by its path.
    """

    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, request: Request) -> Reply:
        """Answer a request."""
        if request.method == "PUT":
            self.stored[request.path] = request.body
            return Reply(self.statuses.pop(0) if self.statuses else 201, headers=self.headers)
        data = self.stored.get(request.path)
        return Reply(404) if data is None else Reply(200, data)
