"""Who hands out Entra tokens, played by a small server: the authority, and a machine's identity."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from tests.servers.process import HOST


class Asked(NamedTuple):
    """One request for a token."""

    path: str
    fields: Mapping[str, str]
    """Of the form, or of the query."""
    headers: Mapping[str, str]
    """Names in lower case."""


class IdentityServer:
    """Answers every request for a token with the same one, or a refusal.

    It speaks as much of OAuth 2 as azure-identity's client credentials need, and what the
    metadata service of a virtual machine and of App Service speak.
    """

    def __init__(self, token: str, folder: Path | None = None) -> None:
        """Hand out ``token``; with ``folder`` over TLS, its authority at ``ca`` in there."""
        self.token = token
        self.refuse = False
        self.asked: list[Asked] = []
        self._folder = folder
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        assert self._server is not None
        scheme = "http" if self._folder is None else "https"
        return f"{scheme}://{HOST}:{self._server.server_address[1]}"

    @property
    def ca(self) -> str:
        """PEM text of the authority to trust."""
        assert self._folder is not None
        return (self._folder / "identity-ca.pem").read_text()

    def __enter__(self) -> Self:
        identity = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path.endswith("/openid-configuration"):
                    self._answer(200, identity.discovery(parts.path.split("/")[1]))
                else:
                    self._token(parts.path, dict(parse_qsl(parts.query)))

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                self._token(self.path, dict(parse_qsl(self.rfile.read(size).decode())))

            def _token(self, path: str, fields: dict[str, str]) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                identity.asked.append(Asked(path, fields, headers))
                self._answer(*identity.answer())

            def _answer(self, status: int, fields: dict[str, Any]) -> None:
                body = json.dumps(fields).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        if self._folder is not None:
            import trustme

            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(self._folder / "identity-ca.pem"))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert(HOST).configure_cert(context)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def discovery(self, tenant: str) -> dict[str, Any]:
        """Return what an authority says of itself."""
        return {
            "issuer": f"{self.url}/{tenant}/v2.0",
            "authorization_endpoint": f"{self.url}/{tenant}/oauth2/v2.0/authorize",
            "token_endpoint": f"{self.url}/{tenant}/oauth2/v2.0/token",
        }

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return status and fields of the answer to a request for a token."""
        if self.refuse:
            return 401, {"error": "invalid_client", "error_description": "no such secret"}
        return 200, {
            "token_type": "Bearer",
            "access_token": self.token,
            "expires_in": 3600,
            "expires_on": str(int(time.time()) + 3600),
            "resource": "https://storage.azure.com/",
        }
