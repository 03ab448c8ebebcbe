"""An OCI registry, Debian's docker-registry, and a gate before it that asks for tokens."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from tests.servers.process import HOST, Server, free_port
from tests.servers.provision import debian_program

USER, PASSWORD = "reader", "SECRETEXAMPLE"
# The same as a bcrypt hash, the only kind that the registry takes.
_HTPASSWD = f"{USER}:$2b$04$YMlQOEJsQ5RFzl81XcTKLeXO2wx4nwgIjav7PIUzfSvXYcRRa75I6\n"

_CONFIG = """\
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {@STORAGE@, maintenance: {uploadpurging: {enabled: false}}}
http: {addr: "@ADDRESS@"}
"""
_AUTH = """\
auth: {htpasswd: {realm: registry, path: @FOLDER@/htpasswd}}
"""
_TIMEOUT = 60.0


def find_registry() -> str:
    """Return the path of docker-registry: the installed one, else one unpacked for the tests.

    Raises:
        ServerError: there is none, and Debian's package cannot be had.
    """
    return shutil.which("docker-registry") or debian_program(
        "docker-registry", "usr/bin/docker-registry"
    )


def find_umoci() -> str:
    """Return the path of umoci, which makes images; as above."""
    return shutil.which("umoci") or debian_program("umoci", "usr/bin/umoci")


class Registry(Server):
    """One docker-registry with an empty store.

    In its memory it is quick with many small blobs and slow with large ones; on the disk it is the
    other way round.
    """

    name = "docker-registry"
    health_path = "/"

    def __init__(self, *, password: bool = False, on_disk: bool = False) -> None:
        """Start nothing yet; with ``password`` only :data:`USER` may read and push."""
        super().__init__()
        self._on_disk = on_disk
        self._password = password

    def command(self) -> Sequence[str]:
        """Write the configuration and return the command line."""
        self.port = free_port()
        text = _CONFIG + (_AUTH if self._password else "")
        place = "filesystem: {rootdirectory: @FOLDER@/data}" if self._on_disk else "inmemory: {}"
        text = text.replace("@STORAGE@", place).replace("@FOLDER@", str(self.folder))
        file = self.folder / "registry.yml"
        file.write_text(text.replace("@ADDRESS@", f"{HOST}:{self.port}"), encoding="utf-8")
        (self.folder / "htpasswd").write_text(_HTPASSWD, encoding="utf-8")
        return [find_registry(), "serve", str(file)]

    def environment(self) -> Mapping[str, str]:
        """Keep the exporter of its traces quiet."""
        return {"OTEL_TRACES_EXPORTER": "none"}

    @property
    def host(self) -> str:
        """Host and port, as the names of images have them."""
        return f"{HOST}:{self.port}"


class Asked(NamedTuple):
    """One request that a gate got."""

    origin: str
    """Host and port that were asked, as the client named them."""

    method: str
    path: str
    authorization: str | None
    range: str | None


class Gate:
    """A server before a registry that answers as large public ones do.

    It demands bearer tokens, which it gives to who brings the password at ``/token``, and may
    lead to blobs on another origin, ``localhost`` instead of ``127.0.0.1``.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        tokens: bool = False,
        realm_host: str = HOST,
        blobs_elsewhere: bool = False,
        drop_ranges: bool = False,
        alter: Callable[[str, bytes], bytes] | None = None,
        refuse: Callable[[str, str], tuple[int, Mapping[str, str]] | None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            registry: what is behind.
            tokens: whether a token is demanded.
            realm_host: the host at which tokens are given.
            blobs_elsewhere: whether blobs are redirected.
            drop_ranges: whether ranges are not served.
            alter: changes the body of an answer, of the path and the body.
            refuse: status and headers to answer a method and a path with instead of passing on.
        """
        self.registry = registry
        self.tokens = tokens
        self.realm_host = realm_host
        self.blobs_elsewhere = blobs_elsewhere
        self.drop_ranges = drop_ranges
        self.alter = alter
        self.refuse = refuse
        self.valid = {"token-1"}
        self.asked: list[Asked] = []
        self.body_bytes = 0
        self._server = _GateServer(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def host(self) -> str:
        """Host and port, as the names of images have them."""
        return f"{HOST}:{self.port}"

    def clear(self) -> None:
        """Forget what was asked."""
        self.asked.clear()
        self.body_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _GateServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        super().__init__((HOST, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client may hang up at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: _GateServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        gate = self.server.gate
        sent = self.headers.get("Authorization")
        origin = self.headers.get("Host", "")
        gate.asked.append(Asked(origin, self.command, self.path, sent, self.headers.get("Range")))
        path = urlsplit(self.path).path
        if gate.refuse is not None and (found := gate.refuse(self.command, self.path)) is not None:
            self._answer(found[0], found[1], b"")
        elif path == "/token":
            self._give_token(sent)
        elif path.startswith("/elsewhere/"):
            self._pass_on(path.removeprefix("/elsewhere"))
        elif gate.tokens and sent not in {f"Bearer {token}" for token in gate.valid}:
            realm = f"http://{gate.realm_host}:{gate.port}/token"
            repository = path.removeprefix("/v2/").split("/manifests/")[0].split("/blobs/")[0]
            scope = f"repository:{repository}:pull"
            challenge = f'Bearer realm="{realm}",service="gate",scope="{scope}"'
            body = json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": "log in"}]})
            self._answer(401, {"WWW-Authenticate": challenge}, body.encode())
        elif gate.blobs_elsewhere and "/blobs/" in path:
            self._answer(307, {"Location": f"http://localhost:{gate.port}/elsewhere{path}"}, b"")
        else:
            self._pass_on(path)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _give_token(self, sent: str | None) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        form = parse_qs(self.rfile.read(length).decode())
        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        query = parse_qs(urlsplit(self.path).query)
        scope = (form or query).get("scope", [""])[0]
        good = sent == f"Basic {basic}" or form.get("refresh_token") == [PASSWORD]
        if good and scope.startswith("repository:") and scope.endswith(":pull"):
            token = sorted(self.server.gate.valid)[0]
            self._answer(200, {}, json.dumps({"token": token, "expires_in": 60}).encode())
        else:
            self._answer(401, {}, b"{}")

    def _pass_on(self, path: str) -> None:
        registry = self.server.gate.registry
        names = ("Accept",) if self.server.gate.drop_ranges else ("Accept", "Range")
        wanted = {name: self.headers[name] for name in names if name in self.headers}
        with closing(http.client.HTTPConnection(HOST, registry.port, timeout=_TIMEOUT)) as behind:
            behind.request(self.command, path, headers=wanted)
            answer = behind.getresponse()
            body = answer.read()
        if self.server.gate.alter is not None and self.command == "GET":
            body = self.server.gate.alter(path, body)
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "connection", "date", "transfer-encoding")
        }
        length = len(body)
        if self.command == "HEAD":
            length = int(answer.getheader("Content-Length") or 0)
        self._answer(answer.status, kept, body, length)

    def _answer(
        self, status: int, headers: Mapping[str, str], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            if status in (200, 206) and "/blobs/" in self.path:
                self.server.gate.body_bytes += len(body)
            self.wfile.write(body)
