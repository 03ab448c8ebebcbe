"""Git over HTTP: the real ``git http-backend`` behind a small server, with Basic and with LFS.

What git LFS's batch API answers is this server's own; the files are given away on another origin
(``localhost``), as hosts of repositories do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tests.servers.process import HOST
from tests.servers.provision import debian_program

USER = "reader"
PASSWORD = "s3cr3t-of-git"
_LFS = "application/vnd.git-lfs+json"
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


def git_program() -> tuple[str, dict[str, str]]:
    """Return the path of git and what it needs in its environment."""
    found = shutil.which("git")
    if found is not None:
        return found, {}
    found = debian_program("git", "usr/bin/git")
    core = str(Path(found).parents[1] / "lib" / "git-core")
    return found, {"GIT_EXEC_PATH": core}


class GitHTTP:
    """Serves the repositories of its folder below ``/open`` and, with Basic, ``/private``.

    Attributes:
        requests: method, path and ``Authorization`` of each request, the oldest first.
        mangle: called with the path and the body of each answer of git; what it returns is sent.
        large: the large files, by SHA-256.
        leaks: requests to the other origin that brought a password along.
        status: called with the path of each request; the status to answer by, or ``None``.
        newest: version of the protocol that is spoken, 0 or 2.
    """

    def __init__(self, folder: Path) -> None:
        """Start nothing yet; repositories are kept in ``folder``."""
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.mangle: Callable[[str, bytes], bytes] | None = None
        self.large: dict[str, bytes] = {}
        self.leaks: list[str] = []
        self.status: Callable[[str], int | None] = lambda path: None
        self.newest = 2
        self._git, environment = git_program()
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.org",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.org",
            **environment,
        }
        self._server: ThreadingHTTPServer | None = None
        self._advertised: dict[str, tuple[int, dict[str, str], bytes]] = {}

    # -- repositories ------------------------------------------------------------------------

    def git(self, *command: str, cwd: Path | None = None, data: bytes | None = None) -> str:
        """Run git, and return what it printed, as text."""
        return self.run(*command, cwd=cwd, data=data).decode().strip()

    def run(self, *command: str, cwd: Path | None = None, data: bytes | None = None) -> bytes:
        """Run git, and return what it printed."""
        result = subprocess.run(
            [self._git, *command],
            cwd=cwd or self.folder,
            env=self._environment,
            input=data,
            capture_output=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr.decode(errors="replace")
        return result.stdout

    def create(self, name: str) -> Path:
        """Make an empty repository ``name.git``, and return the folder to commit from."""
        bare = self.create_bare(name)
        work = self.folder / f"{name}.work"
        self.git("clone", "-q", str(bare), str(work))
        self.git("checkout", "-q", "-B", "main", cwd=work)
        return work

    def create_bare(self, name: str) -> Path:
        """Make an empty repository ``name.git``, and return its folder."""
        bare = self.folder / f"{name}.git"
        self.git("init", "-q", "--bare", "-b", "main", str(bare))
        return bare

    def commit(self, name: str, files: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Write, delete (``None``) and push files, and return the commit."""
        work = self.folder / f"{name}.work"
        self.git("checkout", "-q", "-B", branch, cwd=work)
        for path, data in files.items():
            target = work / path
            if data is None:
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return self.push(name, branch)

    def push(self, name: str, branch: str = "main") -> str:
        """Push all that is in the folder, and return the commit."""
        work = self.folder / f"{name}.work"
        self.git("add", "-A", cwd=work)
        self.git("commit", "-q", "--allow-empty", "-m", "more", cwd=work)
        self.git("push", "-q", "--tags", "origin", branch, cwd=work)
        return self.git("rev-parse", "HEAD", cwd=work)

    def pointer(self, data: bytes, *, keep: bool = True) -> bytes:
        """Return what git has of a large file; the file is ``keep`` kept here."""
        oid = hashlib.sha256(data).hexdigest()
        if keep:
            self.large[oid] = data
        return _POINTER.format(oid, len(data)).encode()

    # -- the server --------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def uri(self, name: str, rest: str = "", *, private: bool = False, user: str = "") -> str:
        """Return the URI of a repository."""
        place = "private" if private else "open"
        at = f"{user}@" if user else ""
        return f"git+http://{at}{HOST}:{self.port}/{place}/{name}.git{rest}"

    def packs(self) -> int:
        """Return how many packs were asked for."""
        return sum(
            method == "POST" and path.endswith("/git-upload-pack")
            for method, path, _ in self.requests
        ) - sum(body for body in self._listings)

    def __enter__(self) -> Self:
        self._listings: list[int] = []
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server((HOST, 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Return what ``git http-backend`` answers."""
        version = headers.get("Git-Protocol", "") if self.newest == 2 else ""
        # Of version 2 it holds what the server can do, and nothing of a repository.
        known = self._advertised.get(path) if "version=2" in version else None
        if known is not None and self.mangle is None:
            return known
        environment = {
            **self._environment,
            "GIT_PROJECT_ROOT": str(self.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": method,
            "CONTENT_TYPE": headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_ADDR": HOST,
        }
        if version:
            environment["GIT_PROTOCOL"] = version
        result = subprocess.run(
            [self._git, "http-backend"],
            env=environment,
            input=body,
            capture_output=True,
            check=False,
        )
        if path.endswith("/git-upload-pack") and b"command=ls-refs" in body:
            self._listings.append(1)
        head, _, content = result.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        status = int(fields.pop("Status", "200 OK").split()[0])
        if self.mangle is not None and status == 200:
            content = self.mangle(path, content)
        elif path.endswith("/info/refs") and "version=2" in version and status == 200:
            self._advertised[path] = (status, fields, content)
        return status, fields, content


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up: it would be in what a later test captures."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    owner: GitHTTP

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a GET."""
        self._serve()

    def do_POST(self) -> None:
        """Answer a POST."""
        self._serve()

    def _serve(self) -> None:
        owner = self.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        given = self.headers.get("Authorization")
        owner.requests.append((self.command, self.path, given))
        if (status := owner.status(parts.path)) is not None:
            return self._send(status, {"Retry-After": "0"}, b"")
        _, place, rest = parts.path.split("/", 2)
        if place == "large":
            return self._large(rest, given)
        if place == "moved":
            target = f"http://localhost:{owner.port}/open/{rest}"
            return self._send(301, {"Location": f"{target}?{parts.query}"}, b"")
        expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if place == "private" and given != f"Basic {expected}":
            return self._send(401, {"WWW-Authenticate": 'Basic realm="git"'}, b"")
        if self.headers.get("Host", "").startswith("localhost") and given is not None:
            owner.leaks.append(self.path)
        if rest.endswith("/info/lfs/objects/batch"):
            return self._batch(body)
        answer = owner.answer(self.command, f"/{rest}", parts.query, dict(self.headers), body)
        return self._send(*answer)

    def _batch(self, body: bytes) -> None:
        if not self.owner.large:
            return self._send(404, {}, b"")
        wanted = json.loads(body)
        objects: list[dict[str, Any]] = []
        for one in wanted["objects"]:
            if one["oid"] not in self.owner.large:
                objects.append({**one, "error": {"code": 404, "message": "not here"}})
                continue
            href = f"http://localhost:{self.owner.port}/large/{one['oid']}"
            action = {"href": href, "header": {"X-Ticket": "of-one-file"}, "expires_in": 600}
            objects.append({**one, "actions": {"download": action}})
        answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
        return self._send(200, {"Content-Type": _LFS}, answer)

    def _large(self, oid: str, given: str | None) -> None:
        if given is not None:
            self.owner.leaks.append(self.path)
        if self.headers.get("X-Ticket") != "of-one-file":
            return self._send(403, {}, b"")
        data = self.owner.large[oid]
        if wanted := self.headers.get("Range"):
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(last) + 1]
            span = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            return self._send(206, {"Content-Range": span}, part)
        return self._send(200, {}, data)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
