"""Git LFS: the large files of a repository, of which git itself has only pointers.

By the `batch API <https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>`_ of the
repository's own host; a ``.lfsconfig`` that names another one is not followed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.backends.base import Body, ByteRange, ObjectInfo
from storage.backends.drivers.streams import extent
from storage.backends.drivers.web import WebSession
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)

if TYPE_CHECKING:
    import requests

__all__ = ["MAX_POINTER", "LargeFiles", "Pointer"]

MAX_POINTER = 1024
"""Bytes below which a file may be a pointer, by git LFS's own rule."""

_VERSION = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
_POINTER = re.compile(
    rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v1\r?\n"
    rb"oid sha256:(?P<oid>[0-9a-f]{64})\r?\nsize (?P<size>[0-9]{1,15})\s*"
)
_TYPE = "application/vnd.git-lfs+json"
_MAX_ANSWER = 1024 * 1024
_LINK_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Pointer:
    """What git has in the place of a large file."""

    oid: str
    """SHA-256 of the content, in hex."""

    size: int
    """Bytes of the content."""

    @classmethod
    def read(cls, data: bytes, where: str) -> Pointer | None:
        """Return the pointer that the content of a file is, if it is one.

        Raises:
            UnsupportedOperation: it is one of a kind that is not understood.
        """
        if _VERSION.match(data) is None:
            return None
        found = _POINTER.fullmatch(data)
        if found is None:
            raise UnsupportedOperation(
                f"{where} is a pointer of git LFS that is not understood (another version, or an "
                "extension); it is not handed over as the file"
            )
        return cls(found["oid"].decode(), int(found["size"]))


@dataclass(frozen=True, slots=True)
class _Link:
    href: str
    headers: dict[str, str]
    until: float


class LargeFiles:
    """The large files of one repository. Construction is inert."""

    def __init__(self, url: str, session: WebSession) -> None:
        """Describe them.

        Args:
            url: of the repository, without a user.
            session: to send requests by.
        """
        self._url = f"{url if url.endswith('.git') else f'{url}.git'}/info/lfs/objects/batch"
        self._session = session
        self._lock = threading.Lock()
        self._links: dict[str, _Link] = {}

    def read(self, pointer: Pointer, info: ObjectInfo, span: ByteRange | None, where: str) -> Body:
        """Start to read a large file, or a part of it; see ``Backend.read``."""
        link, fresh = self._link(pointer, where)
        headers = {} if span is None else {"Range": f"bytes={span.start}-{span.end - 1}"}
        response = self._session.request(
            "GET", link.href, where, headers=headers, foreign=link.headers
        )
        if response.status_code not in (200, 206):
            with self._lock:
                self._links.pop(pointer.oid, None)
            error = self._session.error(response, where)
            if not fresh and isinstance(error, (AuthenticationError, ModelMissingError)):
                # Addresses expire; the next attempt gets another one.
                raise TransientError(str(error))
            raise error
        try:
            text = response.headers.get("Content-Length", "")
            given = int(text) if text.isdigit() else None
            size, length = extent(where, span, given, response.headers.get("Content-Range"))
            if size is not None and size != pointer.size:
                raise StorageError(
                    f"{where}: git says that the file has {pointer.size} bytes, and its host gives "
                    f"one of {size}"
                )
        except BaseException:
            response.close()
            raise
        chunks = self._session.chunks(
            response, where, length if length is not None else pointer.size
        )
        return Body(info, chunks, response.close)

    def _link(self, pointer: Pointer, where: str) -> tuple[_Link, bool]:
        """Return the address of a file, and whether it was given just now."""
        with self._lock:
            link = self._links.get(pointer.oid)
        if link is not None and time.monotonic() < link.until:
            return link, False
        link = self._ask(pointer, where)
        with self._lock:
            self._links[pointer.oid] = link
        return link, True

    def _ask(self, pointer: Pointer, where: str) -> _Link:
        body = {
            "operation": "download",
            "transfers": ["basic"],
            "objects": [{"oid": pointer.oid, "size": pointer.size}],
            "hash_algo": "sha256",
        }
        response = self._session.request(
            "POST",
            self._url,
            where,
            headers={"Accept": _TYPE, "Content-Type": _TYPE},
            body=json.dumps(body).encode(),
        )
        if response.status_code != 200:
            raise self._refusal(response, where)
        data = self._session.read(response, where, _MAX_ANSWER)
        try:
            found: Any = json.loads(data)["objects"][0]
            if found["oid"] != pointer.oid:
                raise ValueError
            if "error" in found:
                raise _error_of(found["error"], where)
            action = found["actions"]["download"]
            headers = {str(name): str(value) for name, value in action.get("header", {}).items()}
            seconds = min(_LINK_SECONDS, float(action.get("expires_in") or _LINK_SECONDS) / 2)
            return _Link(str(action["href"]), headers, time.monotonic() + seconds)
        except StorageError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as exc:
            raise TransientError(
                f"{where}: the answer of the host's large file storage is damaged or none of git "
                f"LFS ({type(exc).__name__})"
            ) from exc

    def _refusal(self, response: requests.Response, where: str) -> StorageError:
        error = self._session.error(response, where)
        if isinstance(error, (ModelMissingError, UnsupportedOperation)):
            return UnsupportedOperation(
                f"{where}: git has only a pointer to this file (git LFS), and the repository's "
                "host offers no large file storage; download it from where it is kept"
            )
        return error


def _error_of(told: Any, where: str) -> StorageError:
    """Return the error of ours for what a host says of one file."""
    code, said = int(told["code"]), one_line(told.get("message") or "")
    if code in (404, 410):
        return ModelMissingError(
            where, f"{where}: its host does not have this large file ({code}: {said})"
        )
    text = f"{where}: its host does not give this large file away ({code}: {said})"
    if code in (401, 403):
        return AuthenticationError(f"{text}; check the credentials")
    return TransientError(text) if code == 429 or code >= 500 else StorageError(text)
