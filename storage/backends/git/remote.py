"""A git server, asked by ``dulwich`` through our own requests: what a revision is, and a commit.

The protocol is git's "smart HTTP", version 2 where the server speaks it. What ``dulwich`` would
send by a session of its own goes through ours: proxies, authorities, time-outs and redirections
are those of the config, and one call is one attempt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.backends.drivers.web import WebSession
from storage.backends.git.pack import Incoming, Pack
from storage.errors import (
    BucketMissingError,
    ConfigurationError,
    ModelMissingError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)

if TYPE_CHECKING:
    import requests

__all__ = ["COMMIT", "Remote"]

COMMIT = re.compile(r"[0-9a-f]{40}")
"""The name of a commit, in full."""

_PEELED = "^{}"
# Bytes of the names of branches and tags, which are kept in memory; old servers send all.
_MAX_NAMES = 64 * 1024 * 1024
# What a server sends instead of an answer, after the length of its line.
_COMPLAINT = re.compile(rb"[0-9a-f]{4}ERR ([^\n]*)")


class Remote:
    """One repository on a server. Construction is inert."""

    def __init__(self, url: str, session: WebSession, where: str) -> None:
        """Describe it.

        Args:
            url: of the repository, without a user.
            session: to send requests by.
            where: the repository's URI, for messages.
        """
        self._url = url
        self._session = session
        self._where = where

    def commit_of(self, revision: str) -> str:
        """Return the commit that a revision is now; the server is not asked what a commit is.

        A branch goes before a tag of the same name, as for ``git clone --branch``.

        Raises:
            BucketMissingError: there is no such repository.
            ModelMissingError: there is no such revision.
        """
        if COMMIT.fullmatch(revision):
            return revision
        names = [revision] if revision == "HEAD" or revision.startswith("refs/") else []
        names = names or [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        client = self._client(partial(self._ask, limit=_MAX_NAMES))
        with self._understood():
            answer = client.get_refs("", ref_prefix=[name.encode() for name in names])
        if answer.object_format not in (None, "sha1"):
            raise UnsupportedOperation(
                f"{self._where}: the objects of the repository are named by "
                f"{one_line(answer.object_format)}; those of SHA-1 can be read"
            )
        refs = {name.decode("utf-8", "replace"): found for name, found in answer.refs.items()}
        for name in names:
            # What a tag with a message is about; the tag itself is an object of its own.
            found = refs.get(name + _PEELED) or refs.get(name)
            if found:
                return str(found.decode("ascii"))
        advice = "commits are named in full (40 digits)"
        if revision == "HEAD":
            advice = "the repository is empty, or its HEAD names a branch that is not there"
        raise ModelMissingError(
            self._where,
            f"{self._where}: the repository has no branch or tag {one_line(repr(revision))}; "
            f"{advice}",
        )

    def fetch(self, commit: str) -> Pack:
        """Return all objects of one commit, without its history.

        Raises:
            ModelMissingError: the server has no such commit, or does not give it away.
            TransientError: what came is cut or damaged.
        """
        incoming = Incoming(self._where)
        client = self._client(self._ask)
        wanted = [commit.encode("ascii")]
        try:
            with self._understood():
                client.fetch_pack(
                    "",
                    lambda refs, depth=None: wanted,
                    _NoHistory(),
                    incoming.write,
                    depth=1,
                    # The names of all branches are of no use here.
                    ref_prefix=[b"HEAD"],
                )
            pack = incoming.finish()
        except BaseException:
            incoming.close()
            raise
        if bytes.fromhex(commit) not in pack:
            raise TransientError(f"{self._where}: the server sent a pack without {commit}")
        return pack

    def _client(self, ask: Callable[..., Any]) -> Any:
        try:
            from dulwich.client import AbstractHttpGitClient
        except ImportError as exc:
            raise ConfigurationError(
                f"{self._where}: git needs the package dulwich, which is not installed; run: "
                'pip install "modelstorage[git]"'
            ) from exc

        class Client(AbstractHttpGitClient):
            """Sends its requests by our session."""

            def __init__(self, url: str, ask: Callable[..., Any]) -> None:
                # Without "thin" packs: each has all that its differences are from.
                super().__init__(url, thin_packs=False, quiet=True)
                self._ask = ask

            def _http_request(self, *args: Any, **kwargs: Any) -> Any:
                return self._ask(*args, **kwargs)

        return Client(self._url, ask)

    def _ask(
        self,
        url: str,
        headers: dict[str, str] | None = None,
        data: bytes | Iterator[bytes] | None = None,
        raise_for_status: bool = True,
        limit: int | None = None,
    ) -> tuple[_Answer, Callable[..., bytes]]:
        """Do what ``dulwich`` asks of its transport."""
        if data is not None and not isinstance(data, bytes):
            data = b"".join(data)
        method = "GET" if data is None else "POST"
        response = self._session.request(method, url, self._where, headers=headers, body=data)
        if response.status_code != 200:
            raise self._refusal(response)
        kind = response.headers.get("Content-Type", "")
        if not kind.startswith("application/x-git-"):
            response.close()
            raise StorageError(
                f"{self._where}: the answer of {one_line(urlsplit(url).hostname)} is "
                f"{one_line(kind) or 'of no type'}, not git's smart HTTP protocol; check that "
                "this is the address that git clones from"
            )
        chunks = self._session.chunks(response, self._where, None)
        chunks = chunks if limit is None else self._limited(chunks, limit)
        try:
            first = next(chunks, b"")
            if (complaint := _COMPLAINT.match(first)) is not None:
                # ``dulwich`` takes it for the end of the conversation.
                raise self._said(complaint[1].decode("utf-8", "replace"))
        except BaseException:
            response.close()
            raise
        return _Answer(response, url), _Bytes(first, chunks).read

    def _limited(self, chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
        left = limit
        for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                raise UnsupportedOperation(
                    f"{self._where}: the names of all branches and tags take more than {limit} "
                    "bytes; name the commit instead"
                )
            yield chunk

    def _said(self, complaint: str) -> StorageError:
        """Return the error of ours for what a server says instead of an answer."""
        said = one_line(complaint)
        # What upload-pack says of a commit that it does not have, or may not give.
        if re.search(r"not our ref|unadvertised object", said):
            return ModelMissingError(
                self._where,
                f"{self._where}: the server has no such commit, or gives only those away that a "
                f"branch or a tag names ({said})",
            )
        return StorageError(f"{self._where}: the git server refuses ({said})")

    def _refusal(self, response: requests.Response) -> StorageError:
        error = self._session.error(response, self._where)
        if isinstance(error, ModelMissingError):
            return BucketMissingError(
                self._where,
                f"{self._where}: the server shows no such repository; its name is wrong, or it is "
                "private and the credentials are missing (GitConfig(username=…, password=…))",
            )
        return error

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Turn what ``dulwich`` raises in the block into an error of ours."""
        try:
            yield
        except StorageError:
            raise
        except Exception as exc:  # what it raises when an answer is damaged has no common base
            said = one_line(exc) or type(exc).__name__
            # Older servers complain within the conversation.
            if "not our ref" in said:
                raise self._said(said) from exc
            raise TransientError(
                f"{self._where}: the conversation with the git server broke off ({said})"
            ) from exc


class _Answer:
    """The head of an answer, as ``dulwich`` looks at it."""

    def __init__(self, response: requests.Response, url: str) -> None:
        self._response = response
        self.content_type = response.headers.get("Content-Type")
        self.redirect_location = response.url if response.url != url else ""
        self.status = response.status_code

    def close(self) -> None:
        self._response.close()


class _Bytes:
    """A body as it arrives, read by the number of bytes."""

    def __init__(self, first: bytes, rest: Iterator[bytes]) -> None:
        self._chunks = rest
        self._held = first
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, fewer at the end."""
        parts: list[bytes] = []
        left = size
        while left != 0:
            if self._at >= len(self._held):
                self._held, self._at = next(self._chunks, b""), 0
                if not self._held:
                    break
            end = len(self._held) if left < 0 else self._at + left
            part = self._held[self._at : end]
            self._at += len(part)
            parts.append(part)
            left -= len(part) if left > 0 else 0
        return b"".join(parts)


class _NoHistory:
    """Tells the server that nothing is here yet."""

    shallow: frozenset[bytes] = frozenset()

    def __next__(self) -> None:
        return None

    def ack(self, sha: bytes) -> None:
        """Take note of nothing."""

    def nak(self) -> None:
        """Take note of nothing."""
