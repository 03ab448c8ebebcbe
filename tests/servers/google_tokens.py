"""Who issues Google's tokens, played: OAuth, STS, IAM credentials and the metadata server."""

from __future__ import annotations

import json
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.servers.process import HOST

EMAIL = "robot@test-project.iam.gserviceaccount.com"
GOOGLE_HOSTS = ("iamcredentials.googleapis.com", "oauth2.googleapis.com")
_AUDIENCE = "https://oauth2.googleapis.com/token"


def new_key() -> str:
    """Return a new RSA key as PEM, good for nothing but tests."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    return (
        rsa.generate_private_key(public_exponent=65537, key_size=2048)
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        .decode()
    )


class GoogleTokens:
    """Gives tokens to those whose proof is right. A context manager.

    Attributes:
        private_key: of the service account ``EMAIL``.
        asked: the paths that were asked for, in order.
        lifetime: seconds for which tokens are good.
        instead: status and JSON value of the next answers to who asks for one, in their place.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        """Prepare; with ``certificate`` (chain and key) it speaks TLS."""
        self.private_key = new_key()
        self.lifetime = 3600
        self.refuse = False
        self.instead: list[tuple[int, Any]] = []
        self._lock = threading.Lock()
        self._asked: list[str] = []
        self._server = _Server(self)
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="google-tokens", daemon=True
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Its URL, without a trailing slash."""
        return f"{self._scheme}://{HOST}:{self.port}"

    @property
    def asked(self) -> list[str]:
        """The paths that were asked for, in order."""
        with self._lock:
            return list(self._asked)

    def note(self, path: str) -> None:
        """Remember a request."""
        with self._lock:
            self._asked.append(path)

    def service_account(self) -> dict[str, Any]:
        """Return the key file of ``EMAIL``."""
        return {
            "type": "service_account",
            "project_id": "test-project",
            "private_key_id": "1",
            "private_key": self.private_key,
            "client_email": EMAIL,
            "client_id": "1",
            "token_uri": f"{self.url}/token",
        }

    def authorized_user(self) -> dict[str, Any]:
        """Return the file that ``gcloud auth application-default login`` leaves."""
        return {
            "type": "authorized_user",
            "client_id": "id",
            "client_secret": "secret",
            "refresh_token": "refresh",
        }

    def external_account(self, subject: Path) -> dict[str, Any]:
        """Return the file of a workload that proves itself by the token in ``subject``."""
        return {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": f"{self.url}/sts",
            "credential_source": {"file": str(subject)},
        }

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

    def __init__(self, tokens: GoogleTokens) -> None:
        self.tokens = tokens
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that do not trust it hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.tokens.note(self.path)
        path = urlsplit(self.path).path
        account = "/computeMetadata/v1/instance/service-accounts/default"
        if path != "/" and self.headers.get("Metadata-Flavor") != "Google":
            self._answer(403, {})
        elif path == f"{account}/token":
            self._token("token-of-the-machine")
        elif path == f"{account}/":
            self._answer(200, {"email": EMAIL, "scopes": [], "aliases": ["default"]})
        elif path == "/computeMetadata/v1/project/project-id":
            self._answer(200, "test-project")
        else:
            self._answer(200 if path == "/" else 404, "")

    def do_POST(self) -> None:
        tokens = self.server.tokens
        tokens.note(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if tokens.instead:
            self._answer(*tokens.instead.pop(0))
        elif tokens.refuse:
            self._answer(400, {"error": "invalid_grant", "error_description": "no such account"})
        elif self.path == "/token":
            form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            if form.get("refresh_token") == "refresh" and "scope" in form:
                # What the user granted is what there is.
                self._answer(400, {"error": "invalid_scope"})
            elif form.get("refresh_token") == "refresh":
                self._token("token-of-the-user")
            elif self._is_signed(form.get("assertion", "")):
                self._token("token-of-the-robot")
            else:
                self._answer(401, {"error": "invalid_grant"})
        elif self.path == "/sts":
            form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
            known = form.get("subject_token") == "proof-of-the-workload"
            if known:
                self._token("token-of-the-workload", issued_token_type="access_token")
            else:
                self._answer(401, {"error": "invalid_grant"})
        elif self.path.endswith(":generateAccessToken"):
            who = self.path.rpartition("/")[2].partition(":")[0]
            expires = datetime.now(UTC) + timedelta(seconds=tokens.lifetime)
            self._answer(
                200,
                {
                    "accessToken": f"token-of-{who.partition('@')[0]}-by-"
                    f"{self.headers.get('Authorization', '').removeprefix('Bearer ')}",
                    "expireTime": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
            )
        else:
            self._answer(404, {})

    def _is_signed(self, assertion: str) -> bool:
        from cryptography.hazmat.primitives import serialization
        from google.auth import jwt

        key = serialization.load_pem_private_key(self.server.tokens.private_key.encode(), None)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        try:
            claims = jwt.decode(assertion, public)  # type: ignore[no-untyped-call]
        except ValueError:
            return False
        # Whatever URL the key names, the proof is made for Google's.
        return bool(claims["iss"] == EMAIL and claims["aud"] == _AUDIENCE)

    def _token(self, token: str, **more: str) -> None:
        lifetime = self.server.tokens.lifetime
        self._answer(
            200, {"access_token": token, "expires_in": lifetime, "token_type": "Bearer", **more}
        )

    def _answer(self, status: int, content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response_only(status)
        self.send_header("Metadata-Flavor", "Google")
        kind = "text/plain" if isinstance(content, str) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
