"""The Hugging Face Hub: one repository, by the Hub's HTTP API.

What a revision means is asked anew by each ``stat`` and ``list``; what they return names the
commit (``ObjectInfo.version``), and reads pinned to it are of that commit whatever happens to
the branch meanwhile. So the files of one download are those of one commit.
"""

from __future__ import annotations

import builtins
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from storage.backends.base import (
    BatchItem,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
)
from storage.backends.drivers.web import extent
from storage.backends.hf.answers import (
    GIT_ID,
    Facts,
    HubObject,
    check_key,
    described,
)
from storage.backends.hf.errors import translated, understood
from storage.backends.hf.session import HubSession, check_online
from storage.digest import Digest
from storage.errors import (
    ConfigurationError,
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    TransientError,
    UnsupportedOperation,
)
from storage.uri import Location

if TYPE_CHECKING:
    import requests
    from fsspec import AbstractFileSystem

    from storage.config import HFConfig

__all__ = ["HubBackend", "HubObject", "open_backend"]

_CAPABILITIES = Capabilities(batch_write=True, if_match=True, metadata=False, any_key=False)
_BLOCK = 256 * 1024
_MAX_REDIRECTS = 5
_REFUSED = (400, 401, 403, 404, 410)
# The Hub signs an address for an hour; one of a commit's file always leads to the same bytes.
_LINK_SECONDS = 300.0
_MAX_LINKS = 1024


def open_backend(location: Location, config: HFConfig | None, options: OpenOptions) -> HubBackend:
    """Return a backend for the repository and revision of ``location``; inert."""
    revision = location.version or (config.revision if config is not None else None) or "main"
    session = HubSession(config, options)
    return HubBackend(location.repo_type or "model", location.bucket, revision, session, options)


class HubBackend:
    """One repository; see :class:`~storage.backends.base.BatchBackend`."""

    def __init__(
        self,
        repo_type: str,
        repo: str,
        revision: str,
        session: HubSession,
        options: OpenOptions,
    ) -> None:
        """Describe the repository; nothing is imported or asked yet.

        Args:
            repo_type: ``model``, ``dataset`` or ``space``.
            repo: ``owner/name``, or a name alone.
            revision: branch, tag, reference or commit.
            session: to send requests by.
            options: limits.
        """
        self.session = session
        self.options = options
        self.revision = revision
        self._kind = repo_type
        self._repo = repo
        self._prefix = "" if repo_type == "model" else f"{repo_type}s/"
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str, str], tuple[str, HubObject, float]] = {}
        self.unanswered: set[frozenset[str]] = set()
        """Keys of conditional commits of which nobody knows whether they were made."""

    @property
    def name(self) -> str:
        return "hf"

    @property
    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    def stat(self, key: str, version: str | None = None) -> HubObject:
        where = self.where(key, version)
        check_key(key, where, writing=False)
        url = self._file_url(key, version or self.revision)
        response, facts, _ = self._follow("HEAD", url, where, {})
        if response.status_code >= 400:
            raise self.session.error(response, where)
        self.session.discard(response)
        return facts.info(key, where)

    def list(self, prefix: str = "") -> Iterator[HubObject]:
        where = self.where(prefix)
        if prefix:
            check_key(prefix.removesuffix("/"), where, writing=True)
        return self._list(prefix, where)

    def _list(self, prefix: str, where: str) -> Iterator[HubObject]:
        commit = self.commit_of(self.revision, where)
        path = f"/{quote(prefix.removesuffix('/'), safe='')}" if prefix else ""
        url: str | None = self.api(f"tree/{commit}{path}?recursive=true&expand=false")
        while url is not None:
            response = self.session.call("GET", url, where, allow=("EntryNotFound",))
            if response.status_code == 404:
                return
            with understood(where):
                page = list(_files(response.json(), commit, where))
                url = self._next_page(response)
            yield from (info for info in page if info.key.startswith(prefix))

    def _next_page(self, response: requests.Response) -> str | None:
        following: str | None = response.links.get("next", {}).get("url")
        if following is None:
            return None
        # At the endpoint, whatever host a mirror passes on: the token goes nowhere else.
        parts = urlsplit(following)
        root = urlsplit(self.session.endpoint).path
        path = parts.path.removeprefix(root)
        return f"/{path.removeprefix('/')}?{parts.query}"

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        commit = pin.version if pin is not None else None
        where = self.where(key)
        check_key(key, where, writing=False)
        headers = {} if span is None else {"Range": f"bytes={span.start}-{span.end - 1}"}
        response, info = self._start(key, commit, headers, where)
        known = info.size if info.size is not None or pin is None else pin.size
        try:
            if pin is not None and pin.etag is not None and info.etag not in (None, pin.etag):
                raise ObjectChangedError(f"{where} is no longer the file that was asked for")
            size, skip, length = extent(where, span, response, known)
        except BaseException:
            response.close()
            raise
        info = replace(info, size=known if known is not None else size)
        chunks = _chunks(response, skip, length, where)
        if info.size and length == info.size and GIT_ID.fullmatch((info.etag or "").strip('"')):
            chunks = _as_in_git(chunks, info, where)
        return Body(info, chunks, response.close)

    def _start(
        self, key: str, commit: str | None, headers: Mapping[str, str], where: str
    ) -> tuple[requests.Response, HubObject]:
        """Send a read, straight to where an earlier one of the same commit was sent to."""
        link = (self.session.endpoint, commit or "", key)
        with self._lock:
            url, known, until = self._links.get(link, ("", None, 0.0))
        if known is not None and time.monotonic() < until:
            response = self.session.send("GET", url, where, headers=headers)
            if response.status_code < 300:
                return response, known
            if response.status_code >= 400 and response.status_code not in _REFUSED:
                raise self.session.error(response, where)
            # An address that is no longer good; the Hub gives another one.
            self.session.discard(response)
            with self._lock:
                self._links.pop(link, None)
        url = self._file_url(key, commit or self.revision)
        response, facts, last = self._follow("GET", url, where, headers)
        if response.status_code >= 300:
            error = self.session.error(response, where)
            if commit is not None and response.headers.get("X-Error-Code") == "RevisionNotFound":
                raise ObjectChangedError(f"{where}: the commit {commit} is gone") from error
            raise error
        try:
            info = facts.info(key, where)
        except BaseException:
            response.close()
            raise
        if info.version is not None and not self.session.speaks_for_the_hub(last):
            with self._lock:
                if len(self._links) >= _MAX_LINKS:
                    self._links.clear()
                place = (self.session.endpoint, info.version, key)
                self._links[place] = (last, info, time.monotonic() + _LINK_SECONDS)
        return response, info

    def _follow(
        self, method: str, url: str, where: str, headers: Mapping[str, str]
    ) -> tuple[requests.Response, Facts, str]:
        """Send a request for a file and go where the Hub sends it.

        A HEAD stops as soon as the Hub told what there is to know.

        Returns:
            The last answer, what the Hub said of the file, and where the last answer is from.
        """
        facts = Facts()
        for _ in range(_MAX_REDIRECTS):
            response = self.session.send(method, url, where, headers=headers)
            if self.session.speaks_for_the_hub(url):
                facts.learn(response)
            target = self.session.redirected(url, response, where)
            if target is None or (method == "HEAD" and facts.complete):
                break
            if method == "HEAD" and not self.session.speaks_for_the_hub(target):
                break
            self.session.discard(response)
            url = target
        return response, facts, url

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> HubObject:
        from storage.backends.hf.upload import Upload

        if if_match is not None and if_match.etag is None:
            raise InvalidInput(
                f"{self.where(key)}: if_match needs what stat said, which has an identity"
            )
        item = BatchItem(key, payload)
        return Upload(self, [item], if_absent, if_match, on_bytes).run()[0]

    def write_many(
        self,
        items: Sequence[BatchItem],
        *,
        if_absent: bool = False,
        on_bytes: Callable[[int], object] | None = None,
    ) -> builtins.list[ObjectInfo]:
        from storage.backends.hf.upload import Upload

        return [*Upload(self, items, if_absent, None, on_bytes).run()] if items else []

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        from storage.backends.hf.upload import copy

        if bucket is not None:
            raise UnsupportedOperation(f"{self.where(key)}: the Hub copies within a repository")
        copy(self, [(source, key)], version)

    def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copy several files within the repository in one commit; all of them or none."""
        from storage.backends.hf.upload import copy

        copy(self, pairs)

    def delete(self, keys: Sequence[str]) -> None:
        from storage.backends.hf.upload import delete

        delete(self, keys)

    def sign(self, key: str, method: str, expires: float) -> str:
        raise UnsupportedOperation(f"{self.where(key)}: the Hub signs no URLs for its users")

    def is_digest(self, info: ObjectInfo) -> bool:
        return False

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        try:
            from huggingface_hub import HfFileSystem
        except ImportError as exc:
            raise ConfigurationError(
                "a file system of the Hub needs the package huggingface_hub, which is not "
                'installed; run: pip install "modelstorage[hf]"'
            ) from exc
        # That package looks for the variable once, when it is imported.
        check_online(self.where(""))
        # ``False`` is "no token"; ``None`` would be whatever token is around.
        files = HfFileSystem(
            endpoint=self.session.endpoint,
            token=self.session.token() or False,
            skip_instance_cache=True,
        )
        revision = "" if self.revision == "main" else f"@{quote(self.revision, safe='')}"
        return files, f"{self._prefix}{self._repo}{revision}"

    def local_path(self, key: str) -> str | None:
        return None

    def close(self) -> None:
        self.session.close()

    # -- what the upload needs too -----------------------------------------------------------

    def where(self, key: str, version: str | None = None) -> str:
        """Return the URI of a key, for messages."""
        revision: str | None = version or self.revision
        if revision == "main" and "/" in self._repo:
            revision = None
        return str(Location("hf", self._repo, key, revision, repo_type=self._kind))

    def check_writable(self) -> None:
        """Refuse to write to what never changes.

        Raises:
            InvalidInput: the revision is a commit.
        """
        if GIT_ID.fullmatch(self.revision):
            raise InvalidInput(
                f"{self.where('')} names a commit, which never changes; name a branch to write to"
            )

    def api(self, action: str) -> str:
        """Return the path of a call about the repository."""
        return f"/api/{self._kind}s/{self._repo}/{action}"

    def git(self, action: str) -> str:
        """Return the path of a call of git about the repository."""
        return f"/{self._prefix}{self._repo}.git/{action}"

    def commit_of(self, revision: str, where: str) -> str:
        """Return the commit that a revision is now.

        Raises:
            BucketMissingError: there is no such repository.
            ModelMissingError: there is no such revision.
        """
        if GIT_ID.fullmatch(revision):
            return revision
        path = self.api(f"revision/{quote(revision, safe='')}?expand=sha")
        response = self.session.call("GET", path, where)
        with understood(where):
            return str(response.json()["sha"])

    def files_at(self, commit: str, keys: Sequence[str]) -> dict[str, HubObject]:
        """Return those of ``keys`` that are files of a commit."""
        found: dict[str, HubObject] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            where = self.where(some[0])
            form = [*(("paths", key) for key in some), ("expand", "false")]
            response = self.session.call("POST", self.api(f"paths-info/{commit}"), where, form=form)
            with understood(where):
                for info in _files(response.json(), commit, where):
                    found[info.key] = info
        return found

    def _file_url(self, key: str, revision: str) -> str:
        place = f"{self._prefix}{self._repo}/resolve/{quote(revision, safe='')}"
        return f"{self.session.endpoint}/{place}/{quote(key)}"


def _files(items: Sequence[Mapping[str, Any]], commit: str, where: str) -> Iterator[HubObject]:
    """Yield the files of a listing.

    Raises:
        TransientError: it holds what no listing does, so one of its letters may be wrong.
    """
    for item in items:
        if item["type"] == "file":
            yield described(item, commit)
        elif item["type"] not in ("directory", "unknown"):
            raise TransientError(f"{where}: the Hub's answer is damaged")


def _chunks(
    response: requests.Response, skip: int, length: int | None, where: str
) -> Iterator[bytes]:
    with translated(where):
        left = length
        for piece in response.raw.stream(_BLOCK):
            dropped = min(skip, len(piece))
            skip -= dropped
            piece = piece[dropped:]
            if left is not None:
                piece = piece[:left]
                left -= len(piece)
            if piece:
                yield piece
            if left == 0 and skip == 0 and length is not None:
                break
        if left:
            raise TransientError(f"{where}: the connection ended {left} bytes too early")


def _as_in_git(chunks: Iterator[bytes], info: HubObject, where: str) -> Iterator[bytes]:
    """Pass a whole small file on, and raise instead of ending if it is not the one in git.

    The id that git gives a file is no digest of its bytes alone, so nobody above can check it.
    Services that stand in for the Hub may give the SHA-1 of the bytes in its place.
    """
    expected, left = (info.etag or "").strip('"'), info.size or 0
    git = hashlib.sha1(b"blob %d\0" % left, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    for chunk in chunks:
        git.update(chunk)
        plain.update(chunk)
        left -= len(chunk)
        if left == 0 and expected not in (git.hexdigest(), plain.hexdigest()):
            raise IntegrityError(
                f"{where}: the Hub says that git's id of the file is {expected}, but that of the "
                f"bytes that arrived is {git.hexdigest()}; the file or the way to it is damaged"
            )
        yield chunk
