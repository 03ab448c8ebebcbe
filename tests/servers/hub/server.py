"""The test Hub as a running server on two origins: the Hub and its content network."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.servers.hub.files import BlobStore
from tests.servers.hub.routes import Denied, Routes, ranged
from tests.servers.hub.state import Account, Commit, Entry, Repo, State
from tests.servers.hub.uploads import Uploads
from tests.servers.hub.wire import Answer, Endpoint, Request

__all__ = ["Hub"]

WRITER = Account("owner", "hf_writerTOKEN0123456789")
READER = Account("reader", "hf_readerTOKEN0123456789", writes=False)


class Hub:
    """A Hub in this process; a context manager.

    Attributes:
        writer: account that owns the repositories below ``owner/``.
        reader: account that may read what is public, and write nothing.
        url: the Hub's own origin. What it is set to, such as a proxy's, is what answers name.
        cdn: the origin that large files come from and go to; never sees a token. The same.
        page: entries of one page of a listing.
        part_size: bytes above which an upload goes in parts; ``None``: never.
        direct: whether small files are answered at once, and not by a redirect as the public
            Hub does.
        before: called with each request; what it returns, if anything, is the answer.
        leaks: requests that brought a credential to the content network.
        failures: exceptions that requests ended with.
    """

    writer = WRITER
    reader = READER

    def __init__(self, tls: Any = None) -> None:
        """Start nothing yet; ``tls`` is the ``ssl.SSLContext`` of both origins."""
        self._tls = tls
        self._folder = Path()
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._secret = secrets.token_hex(16)
        self.url = self.cdn = ""
        self._set_defaults()

    def _set_defaults(self) -> None:
        self.page = 200
        self.part_size: int | None = 8 * 1024 * 1024
        self.direct = False
        self.before: Callable[[Request], Answer | None] | None = None
        self.leaks: list[Request] = []
        self.failures: list[Exception] = []

    def start(self) -> Self:
        """Serve from a folder of its own."""
        self._folder = Path(tempfile.mkdtemp(prefix="hub-"))
        self._begin()
        self._hub_end = Endpoint("127.0.0.1", "hub", self._answer, self._failed, self._tls)
        self._cdn_end = Endpoint("localhost", "cdn", self._answer, self._failed, self._tls)
        self._name_origins()
        return self

    def _name_origins(self) -> None:
        self.url, self.cdn = self._hub_end.url, self._cdn_end.url

    def _begin(self) -> None:
        self.state = State(BlobStore(self._folder))
        self.routes = Routes(self)
        self.uploads = Uploads(self)
        for account in (self.writer, self.reader):
            self.state.accounts[account.token] = account

    def reset(self) -> None:
        """Forget everything: repositories, files, requests, and what was set."""
        for path in self._folder.iterdir():
            # A client that was killed may have left an upload, which goes just now.
            path.unlink(missing_ok=True)
        self._set_defaults()
        self._name_origins()
        self._begin()
        self.forget()

    def stop(self) -> None:
        """End both origins and delete the files."""
        self._hub_end.stop()
        self._cdn_end.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # -- for tests ---------------------------------------------------------------------------

    def repo(self, name: str, kind: str = "model", **options: Any) -> Repo:
        """Add an empty repository."""
        return self.state.add_repo(Repo(kind, name, **options))

    def put(self, repo: Repo, files: Mapping[str, bytes], branch: str = "main") -> Commit:
        """Commit files around HTTP."""
        return self.state.put(repo, files, branch)

    def get(self, repo: Repo, path: str, revision: str = "main") -> bytes:
        """Return a file's bytes around HTTP.

        Raises:
            FileNotFoundError: there is no such file.
        """
        commit = repo.find(revision)
        if commit is None or path not in commit.files:
            raise FileNotFoundError(path)
        return self.state.blobs.path(commit.files[path].sha256).read_bytes()

    def damage(self, repo: Repo, path: str) -> None:
        """Change the first byte of a stored file, and nothing that is said about it."""
        stored = self.state.blobs.path(repo.head().files[path].sha256)
        data = bytearray(stored.read_bytes())
        data[0] ^= 1
        stored.write_bytes(data)

    @property
    def requests(self) -> list[Request]:
        """What arrived since the last ``forget``, in order."""
        with self._lock:
            return list(self._requests)

    def forget(self) -> None:
        """Begin to record anew."""
        with self._lock:
            self._requests.clear()

    def asked(self, method: str, pattern: str) -> list[Request]:
        """Return the requests of one method whose path matches ``pattern`` somewhere."""
        return [
            request
            for request in self.requests
            if request.method == method and re.search(pattern, request.path)
        ]

    # -- answering ---------------------------------------------------------------------------

    def cdn_url(self, entry: Entry) -> str:
        """Return a signed address of a large file."""
        return f"{self.cdn}/files/{entry.sha256}?X-Amz-Signature={self._secret}"

    def _answer(self, request: Request) -> Answer:
        with self._lock:
            self._requests.append(request)
        if self.before is not None and (answer := self.before(request)) is not None:
            return answer
        try:
            if request.origin == "cdn":
                return self._from_cdn(request)
            return self.routes.answer(request)
        except Denied as denied:
            return denied.answer

    def _from_cdn(self, request: Request) -> Answer:
        if "authorization" in request.headers or "cookie" in request.headers:
            self.leaks.append(request)
            return Answer(400, body=b"<Error><Code>InvalidArgument</Code></Error>")
        if request.method == "PUT" and request.parts[0] == "upload":
            return self.uploads.put(request)
        if request.method not in ("GET", "HEAD") or request.parts[0] != "files":
            return Answer(405)
        if request.argument("X-Amz-Signature") != self._secret:
            return Answer(403, body=b"<Error><Code>AccessDenied</Code></Error>")
        blob = self.state.blobs.get(request.parts[1])
        if blob is None:
            return Answer(404)
        # The ETag of the storage below. It looks like the file's SHA-256 and is none.
        headers = {"ETag": f'"{blob.sha256[::-1]}"'}
        return ranged(request, self.state.blobs.path(blob.sha256), blob.size, headers)

    def _failed(self, request: Request, exc: Exception) -> None:
        if not isinstance(exc, ConnectionError):
            self.failures.append(exc)

    def expire_links(self) -> None:
        """Make every signed address that was given out invalid."""
        self._secret = secrets.token_hex(16)
