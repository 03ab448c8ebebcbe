"""HTTP for the test Hub: requests and answers as values, one recorded list of both."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.servers.chunked import EndedEarlyError, read_chunks

__all__ = ["Answer", "Endpoint", "Request", "problem"]

_BLOCK = 256 * 1024


@dataclass(slots=True)
class Request:
    """One request that arrived; ``status`` and ``sent`` tell of its answer."""

    origin: str
    """``hub`` or ``cdn``."""

    method: str
    path: str
    """As it was sent, percent-encoded, without the query."""

    query: str
    headers: Mapping[str, str]
    """Names in lower case."""

    stream: BufferedIOBase = field(repr=False)
    status: int = 0
    sent: int = 0
    """Bytes of the answer's body."""

    received: int = 0
    """Bytes of the request's body."""

    _done: bool = field(default=False, repr=False)

    @property
    def parts(self) -> list[str]:
        """Segments of the path, each decoded on its own."""
        return [unquote(part) for part in self.path.split("/")[1:]]

    @property
    def arguments(self) -> dict[str, list[str]]:
        return parse_qs(self.query, keep_blank_values=True)

    def argument(self, name: str) -> str | None:
        return next(iter(self.arguments.get(name, ())), None)

    @property
    def token(self) -> str | None:
        """The bearer token that was sent."""
        scheme, _, value = self.headers.get("authorization", "").partition(" ")
        return value if scheme.lower() == "bearer" and value else None

    def body(self) -> Iterator[bytes]:
        """Yield the body; at most once."""
        if self._done:
            return
        self._done = True
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            for piece in read_chunks(self.stream):
                self.received += len(piece)
                yield piece
            return
        left = int(self.headers.get("content-length") or 0)
        while left:
            piece = self.stream.read(min(left, _BLOCK))
            if not piece:
                raise EndedEarlyError("the body of a request ended early")
            left -= len(piece)
            self.received += len(piece)
            yield piece

    def data(self) -> bytes:
        return b"".join(self.body())

    def json(self) -> Any:
        return json.loads(self.data() or b"null")


@dataclass(slots=True)
class Answer:
    """What is sent back."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    """The body, if it is not ``body``; ``span`` of it."""

    span: tuple[int, int] | None = None
    break_after: int | None = None
    """Bytes of the body after which the connection is cut."""

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(
            status,
            {"Content-Type": "application/json; charset=utf-8", **headers},
            json.dumps(value).encode(),
        )

    @property
    def length(self) -> int:
        if self.file is None:
            return len(self.body)
        start, end = self.span or (0, self.file.stat().st_size)
        return end - start

    def pieces(self) -> Iterator[bytes]:
        if self.file is None:
            yield self.body
            return
        start, end = self.span or (0, self.file.stat().st_size)
        with open(self.file, "rb") as file:
            file.seek(start)
            while start < end and (piece := file.read(min(_BLOCK, end - start))):
                start += len(piece)
                yield piece


def problem(status: int, message: str, code: str | None = None) -> Answer:
    """Return an error as the Hub words it: in headers and in the body."""
    headers = {"X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    answer = Answer.json({"error": message}, status)
    answer.headers.update(headers)
    return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024
    disable_nagle_algorithm = True
    timeout = 120
    server: _Server

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        if "://" in path:  # as a proxy is asked
            path = "/" + path.split("/", 3)[3]
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.origin, self.command, path, query, headers, self.rfile)
        try:
            answer = self.server.answer(request)
            for _ in request.body():  # else the rest of it would be taken for a request
                pass
        except Exception as exc:  # noqa: BLE001 -- a client must get an answer, a test the reason
            self.server.failed(request, exc)
            answer = problem(500, f"{type(exc).__name__}: {exc}")
            self.close_connection = True
        self._send(request, answer)

    def _send(self, request: Request, answer: Answer) -> None:
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(answer.length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if request.method != "HEAD":
            for piece in answer.pieces():
                if answer.break_after is not None:
                    piece = piece[: answer.break_after - request.sent]
                if piece:
                    self.wfile.write(piece)
                request.sent += len(piece)
                if request.sent == answer.break_after:
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
        self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            # That fails where the client has hung up, and leaves the socket to the collector.
            self.rfile.close()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        origin: str,
        answer: Callable[[Request], Answer],
        failed: Callable[[Request, Exception], None],
    ) -> None:
        super().__init__(address, _Handler)
        self.origin = origin
        self.answer = answer
        self.failed = failed
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away midway is no news

    def close_all(self) -> None:
        """End the connections that clients keep open."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Endpoint:
    """One origin: a port of loopback that answers."""

    def __init__(
        self,
        host: str,
        origin: str,
        answer: Callable[[Request], Answer],
        failed: Callable[[Request, Exception], None],
        tls: Any = None,
    ) -> None:
        """Start to listen; ``tls`` is an ``ssl.SSLContext``."""
        self._server = _Server(("127.0.0.1", 0), origin, answer, failed)
        scheme = "http"
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            scheme = "https"
        self.url = f"{scheme}://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.close_all()
        self._server.server_close()
        self._thread.join(10)
