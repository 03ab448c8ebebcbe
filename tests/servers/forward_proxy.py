"""A forward proxy: CONNECT for TLS, absolute URLs for the rest; it notes who is asked."""

from __future__ import annotations

import base64
import contextlib
import http.client
import select
import socket
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

from tests.servers.process import HOST

_BLOCK = 64 * 1024
_TIMEOUT = 60.0
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authorization", "proxy-connection", "transfer-encoding"}
)


class ForwardProxy:
    """Takes every request anywhere, and records where. A context manager.

    ``hosts`` lets names that do not exist be asked: a client that resolves them itself fails,
    one that leaves them to the proxy does not.
    """

    def __init__(
        self,
        user: str | None = None,
        password: str = "",
        hosts: dict[str, tuple[str, int]] | None = None,
    ) -> None:
        """Prepare.

        Args:
            user: who alone may pass, by basic authentication; anybody if ``None``.
            password: of that user.
            hosts: addresses of made-up hosts.
        """
        self._wanted = None
        if user is not None:
            token = base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
            self._wanted = f"Basic {token}"
        self.hosts = hosts or {}
        self._lock = threading.Lock()
        self._asked: list[str] = []
        self.refused = 0
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="forward-proxy", daemon=True
        )

    @property
    def url(self) -> str:
        """URL of the proxy, without user and password."""
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{HOST}:{self._server.server_address[1]}"

    @property
    def asked(self) -> list[str]:
        """``host:port`` of every request that was let through, in order."""
        with self._lock:
            return list(self._asked)

    def admit(self, authorization: str | None, host: str) -> bool:
        """Record a request; tell whether it may pass."""
        with self._lock:
            if self._wanted is not None and authorization != self._wanted:
                self.refused += 1
                return False
            self._asked.append(host)
            return True

    def resolve(self, host: str, port: int) -> tuple[str, int]:
        """Return where ``host`` is."""
        return self.hosts.get(host, (host, port))

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

    def __init__(self, proxy: ForwardProxy) -> None:
        self.proxy = proxy
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = _TIMEOUT

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _admitted(self, host: str) -> bool:
        if self.server.proxy.admit(self.headers.get("Proxy-Authorization"), host):
            return True
        self.close_connection = True
        self.send_response_only(407)
        self.send_header("Proxy-Authenticate", 'Basic realm="proxy"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_CONNECT(self) -> None:
        if not self._admitted(self.path):
            return
        host, _, port = self.path.rpartition(":")
        self.close_connection = True
        try:
            upstream = socket.create_connection(
                self.server.proxy.resolve(host.strip("[]"), int(port)), timeout=_TIMEOUT
            )
        except OSError:
            self.send_response_only(502)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with closing(upstream):
            self.send_response_only(200, "Connection established")
            self.end_headers()
            with contextlib.suppress(OSError):
                _pump(self.connection, upstream)

    def forward(self) -> None:
        parts = urlsplit(self.path)
        if parts.hostname is None:
            self.send_error(400)
            return
        port = parts.port or 80
        if not self._admitted(f"{parts.hostname}:{port}"):
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = self.server.proxy.resolve(parts.hostname, port)
        with closing(http.client.HTTPConnection(*address, timeout=_TIMEOUT)) as upstream:
            target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            upstream.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            if answer.getheader("Content-Length") is None:
                self.close_connection = True
                self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                while block := answer.read(_BLOCK):
                    self.wfile.write(block)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815


def _pump(client: socket.socket, upstream: socket.socket) -> None:
    """Pass bytes both ways until one side ends."""
    pairs = {client: upstream, upstream: client}
    while True:
        ready, _, _ = select.select(list(pairs), [], [], _TIMEOUT)
        if not ready:
            return
        for source in ready:
            data = source.recv(_BLOCK)
            if not data:
                return
            pairs[source].sendall(data)
