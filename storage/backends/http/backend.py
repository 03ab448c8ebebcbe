"""HTTP and HTTPS: single files, read by ranges where the server serves them, written by PUT.

One backend is one origin (scheme, host, port), one set of credentials and one query. Keys are
paths as they stand in the URL, percent-encoded; ``Location.child`` encodes literal ones.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit
from weakref import WeakValueDictionary

from storage.backends.base import (
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
)
from storage.backends.http.answers import (
    coding_to_undo,
    describe,
    difference,
    instead_of_file,
    is_page,
    page_instead_of_file,
)
from storage.backends.http.body import Upload, cut, decoded, no_page
from storage.backends.http.errors import is_signed, refusal
from storage.backends.http.headers import content_range, length, url_text, validators
from storage.backends.http.stored import (
    SIGNED_WITH_HEADERS,
    check_stored,
    digest_headers,
    local_digest,
)
from storage.digest import Digest, MultiHasher
from storage.errors import (
    AuthenticationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    redact,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.backends.http.session import Answer, Transport
    from storage.config import HTTPConfig
    from storage.uri import Location

__all__ = ["HTTPBackend", "open_backend"]

_CAPABILITIES = Capabilities(
    list=False,
    copy=False,
    # Servers that ignore If-None-Match on PUT are many, and nothing tells them from the others.
    if_absent=False,
    metadata=False,
    any_key=False,
)
# Answers to HEAD after which GET may still succeed: a URL may be signed for GET alone, and
# some servers have no HEAD, and say so in many ways.
_HEAD_REFUSED = (400, 403, 404, 405, 501)
_OK = (200, 203)
_WRITTEN = (200, 201, 202, 204)
_DELETED = (200, 202, 204, 404, 410)
# From this size on it is worth a request to learn whether ranges are served.
_WORTH_ASKING = 4 * 1024 * 1024
# Bytes to throw away rather than to begin again where a range was asked for and all came.
_SKIP = 8 * 1024 * 1024
# Seconds in which a name that was wrong once, and is told again, was not taken up anew.
_DOUBT = 120.0
_DOTS = re.compile(r"(?:^|/)\.{1,2}(?:/|$)")


def open_backend(
    location: Location, config: HTTPConfig | None, options: OpenOptions
) -> HTTPBackend:
    """Return a backend for the origin of ``location``; inert."""
    return HTTPBackend(location, config, options)


class HTTPBackend:
    """One origin; see :class:`~storage.backends.base.Backend`."""

    capabilities = _CAPABILITIES

    def __init__(self, location: Location, config: HTTPConfig | None, options: OpenOptions) -> None:
        """Describe the origin; nothing is opened yet."""
        self.name = f"{location.scheme} (requests)"
        url = location.url or f"{location.scheme}://{location.bucket}/"
        self._url = url
        self._base = f"{location.scheme}://{location.bucket}/"
        self._query = url_text(urlsplit(url).query, query=True)
        self._config = config
        self._options = options
        self._lock = threading.Lock()
        self._opened: Transport | None = None
        self._no_ranges: set[str] = set()
        self._no_pins: set[str] = set()
        self._refuted: dict[tuple[str, str], float] = {}
        self._etags_are_digests: bool | None = None
        self._writing: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def _transport(self) -> Transport:
        with self._lock:
            if self._opened is None:
                from storage.backends.http.access import make_access
                from storage.backends.http.session import Transport, check_files

                access = make_access(self._url, self._config, self._options)
                check_files(access)
                self._opened = Transport(access)
            return self._opened

    def _where(self, key: str) -> str:
        return redact(f"{self._base}{url_text(key)}")

    def _target(self, key: str) -> str:
        query = f"?{self._query}" if self._query else ""
        return f"/{url_text(key)}{query}"

    def _check(self, key: str) -> None:
        if not key or "\0" in key:
            raise InvalidInput(f"{self._where(key)}: a URL of a file has a path, without a NUL")
        if _DOTS.search(unquote(key)):
            raise InvalidInput(
                f"{self._where(key)}: a URL holds no parts '.' and '..', encoded ones included; "
                "write the path that is meant"
            )

    def _ask(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Upload] | None = None,
    ) -> Answer:
        """Return the answer; the caller closes it."""
        wanted = {
            "Accept": "*/*",
            # The bytes as they are: sizes, ranges and digests are about nothing else.
            "Accept-Encoding": "identity",
            "User-Agent": _user_agent(),
            **(headers or {}),
        }
        return self._transport().request(method, self._target(key), wanted, self._where(key), body)

    def _refusal(self, answer: Answer, key: str, method: str) -> StorageError:
        """Return the error for an answer that is no success, and free its connection."""
        text = answer.text() if answer.status == 400 else ""
        answer.discard()
        return refusal(
            answer.status,
            answer.headers,
            self._where(key),
            method=method,
            query=self._query,
            elsewhere=answer.elsewhere,
            text=text,
        )

    # -- reading -----------------------------------------------------------------------------

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        self._check_readable(key)
        info = self._head(key) or self._probe(key)
        refuted = self._refuted.get((key, info.pin or ""))
        if refuted is not None and time.monotonic() < refuted + _DOUBT:
            # It is called by this name again, though something else came when that was asked
            # for: several servers are behind the address, or HEAD and GET do not agree. Nobody
            # can tell which bytes this describes; but all bytes of one answer are of one file.
            self._no_pins.add(key)
            self._no_ranges.add(key)
            info = replace(info, size=None, digests=(), hint=None)
        if key in self._no_ranges:
            info = replace(info, ranged=False)
        if key in self._no_pins:
            # What HEAD calls it, GET does not, so nobody can tell which bytes it names.
            info = replace(info, etag=None, version=None)
        if version is not None and version != info.version:
            raise ModelMissingError(self._where(key), f"{self._where(key)}: no such version")
        return info

    def _head(self, key: str) -> ObjectInfo | None:
        """Ask for the headers; ``None`` if the answer is not to be relied on."""
        answer = self._ask("HEAD", key)
        answer.discard()
        if answer.status in _HEAD_REFUSED:
            return None
        headers = answer.headers
        if answer.status not in _OK:
            raise self._refusal(answer, key, "HEAD")
        self._check_page(answer, key)
        coding = coding_to_undo(key, headers, self._where(key))
        size = length(headers)
        ranged = "bytes" in headers.get("Accept-Ranges", "").lower()
        info = describe(key, headers, coding, size, ranged=ranged, whole=True)
        silent = "Accept-Ranges" not in headers and info.pin is not None
        # Zero is also what servers say that do not know.
        if not coding and (not size or (silent and size >= _WORTH_ASKING)):
            return None
        return info

    def _probe(self, key: str) -> ObjectInfo:
        """Ask for the first byte; the answer tells the rest."""
        answer = self._ask("GET", key, {"Range": "bytes=0-0"})
        headers = answer.headers
        part = content_range(headers)
        partial = answer.status == 206 and part is not None and part.start == 0
        if not partial and answer.status not in (*_OK, 416):
            error = self._refusal(answer, key, "GET")
            self._check_page(answer, key)
            raise error
        # All of it may be under way, and nobody wants it yet.
        answer.discard()
        self._check_page(answer, key)
        if answer.status == 416 and part is not None and part.total == 0:
            return describe(key, headers, "", 0, ranged=False, whole=False)
        if answer.status == 416:
            raise self._refusal(answer, key, "GET")
        coding = coding_to_undo(key, headers, self._where(key))
        size = part.total if partial and part is not None else length(headers)
        return describe(key, headers, coding, size, ranged=partial, whole=not partial)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        self._check_readable(key)
        headers = {}
        if span is not None:
            headers["Range"] = f"bytes={span.start}-{span.end - 1}"
        if pin is not None and pin.version is not None:
            headers["If-Unmodified-Since"] = pin.version
        elif pin is not None and pin.pin is not None:
            headers["If-Match"] = pin.pin
        answer = self._ask("GET", key, headers)
        try:
            return self._body(key, answer, span, pin)
        except BaseException:
            answer.close()
            raise

    def _body(
        self, key: str, answer: Answer, span: ByteRange | None, pin: ObjectInfo | None
    ) -> Body:
        where = self._where(key)
        self._check_page(answer, key)
        part = content_range(answer.headers)
        if span is not None and answer.status in (206, 416) and part is not None:
            if pin is not None and None not in (part.total, pin.size) and part.total != pin.size:
                raise self._changed(key, pin, f"it has {part.total} bytes, not {pin.size}")
            if answer.status == 206 and (part.start, part.end) != (span.start, span.end):
                raise self._without_ranges(key)
        if span is not None and answer.status == 416 and pin is not None:
            raise self._changed(key, pin, f"it has no bytes {span.start} to {span.end} any more")
        if answer.status == 412 and pin is not None:
            answer.discard()
            raise self._changed(key, pin, "the server says that another one is there")
        partial = answer.status == 206
        if not partial and answer.status not in _OK:
            raise self._refusal(answer, key, "GET")
        if partial and span is not None and part is None:
            raise self._without_ranges(key)
        if partial and (span is None or part is None):
            raise StorageError(f"{where}: the server sent parts in a form that nobody asked for")
        coding = coding_to_undo(key, answer.headers, where)
        size = part.total if partial and part is not None else length(answer.headers)
        info = describe(key, answer.headers, coding, size, ranged=partial, whole=not partial)
        if pin is not None:
            if not partial and instead_of_file(info, pin):
                raise TransientError(
                    f"{where}: instead of the file came a document of the type "
                    f"{info.content_type}, most likely about an error; what was asked for is "
                    f"{pin.content_type or 'of another type'}"
                )
            self._check_pin(key, info, pin, spliced=span is not None)
        if partial and coding:
            raise self._without_ranges(key)
        if partial and span is not None:
            return Body(info, answer.chunks(len(span), where), answer.close)
        announced = length(answer.headers)
        if announced is None and pin is not None and not coding:
            announced = pin.size
        chunks = answer.chunks(announced, where)
        if coding:
            chunks = decoded(chunks, coding, where)
        if page_instead_of_file(key, answer.headers):
            chunks = no_page(chunks, key, where)
        if span is not None:
            if span.start > _SKIP and pin is not None:
                raise self._without_ranges(key)
            chunks = cut(chunks, span, where)
        return Body(info, chunks, answer.close)

    def _check_pin(self, key: str, info: ObjectInfo, pin: ObjectInfo, *, spliced: bool) -> None:
        """Refuse bytes of another version, and ``spliced`` ones that may be of another."""
        moved = pin.version is not None and info.modified not in (None, pin.modified)
        if moved or pin.differs_from(info):
            raise self._changed(key, pin, difference(pin, info))
        if pin.pin is None or info.pin == pin.pin:
            return
        # It may be the same content, but the server does not say so.
        if spliced:
            raise self._without_ranges(key)
        if info.modified is None or info.modified != pin.modified:
            self._no_pins.add(key)
            self._no_ranges.add(key)
            raise ObjectChangedError(
                f"{self._where(key)}: the server says of which version it is when asked for the "
                "headers, and not when asked for the file; read it again, without that version"
            )

    def _changed(self, key: str, pin: ObjectInfo, how: str) -> ObjectChangedError:
        """Remember that ``pin`` does not describe what is read under its name."""
        if pin.pin is not None:
            self._refuted[key, pin.pin] = time.monotonic()
        return ObjectChangedError(
            f"{self._where(key)} is no longer the version that was asked for: {how}"
        )

    def _without_ranges(self, key: str) -> ObjectChangedError:
        """Remember that ranges of ``key`` cannot be relied on; the engine then begins anew."""
        self._no_ranges.add(key)
        return ObjectChangedError(
            f"{self._where(key)}: the server announced ranges and does not serve them reliably; "
            "read it whole"
        )

    def _check_readable(self, key: str) -> None:
        if key and not key.endswith("/"):
            self._check(key)
            return
        raise ModelMissingError(
            self._where(key),
            f"{self._where(key)}: a URL that ends in a slash names a folder, and HTTP lists "
            "none; name one file",
        )

    def _check_page(self, answer: Answer, key: str) -> None:
        """Refuse what is no file: a folder, or a page to which the server redirected."""
        if answer.slash_added and (
            answer.status in (403, 404) or (answer.status in _OK and is_page(answer.headers))
        ):
            raise ModelMissingError(self._where(key), f"{self._where(key)} is a folder")
        if (
            answer.redirected
            and answer.status in (*_OK, 206)
            and page_instead_of_file(key, answer.headers)
        ):
            raise AuthenticationError(
                f"{self._where(key)}: redirected to a web page at {redact(answer.url)}, most "
                "likely one for logging in; give the credentials that the server wants in an "
                "HTTPConfig"
            )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise UnsupportedOperation(f"{self._where(prefix)}: HTTP has no listings; name one file")

    # -- writing -----------------------------------------------------------------------------

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
    ) -> ObjectInfo:
        self._check(key)
        where = self._where(key)
        if key.endswith("/"):
            raise InvalidInput(f"{where}: a file is not stored under the name of a folder")
        if if_absent or if_match is not None:
            raise UnsupportedOperation(
                f"{where}: too many servers ignore the condition of a PUT; none is sent, and "
                "nothing was written"
            )
        signed, plain = is_signed(self._query), self._base.startswith("http:")
        wanted = self._config.verify_uploads if self._config is not None else None
        algorithm = digest = None
        if wanted is not False and (signed or plain or wanted):
            # Object stores, which sign, know the MD5 of what they store.
            algorithm = "md5" if signed else "sha256"
            digest = local_digest(payload, algorithm)
        headers = digest_headers(digest, self._query) if digest is not None else {}
        if not SIGNED_WITH_HEADERS.search(self._query):
            headers["Content-Type"] = content_type or "application/octet-stream"
        if payload.size is not None:
            headers["Content-Length"] = str(payload.size)
        bodies: list[Upload] = []

        def open_body() -> Upload:
            for earlier in bodies:
                earlier.rewind()
            unknown = algorithm if digest is None else None
            bodies.append(Upload(payload, where, on_bytes, unknown))
            return bodies[-1]

        # Over TLS nothing is damaged on the way without notice, and a signature for PUT is none
        # for GET.
        read_back = algorithm is not None and not signed
        with self._alone(key) if read_back else contextlib.nullcontext():
            answer = self._ask("PUT", key, headers, open_body)
            if answer.status not in _WRITTEN:
                raise self._refusal(answer, key, "PUT")
            answer.discard()
            total, sent = bodies[-1].total, digest or bodies[-1].digest()
            if sent is not None:
                read = (lambda: self.read(key)) if read_back else None
                check_stored(answer.headers, sent, total, where, read)
        etag = validators(answer.headers).etag
        return ObjectInfo(key, total, etag, content_type=content_type)

    def _alone(self, key: str) -> threading.Lock:
        """Return the lock of those who write ``key`` and then read back what they wrote."""
        with self._lock:
            lock = self._writing.get(key)
            if lock is None:
                lock = self._writing[key] = threading.Lock()
            return lock

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        raise UnsupportedOperation(f"{self._where(source)}: HTTP servers copy nothing themselves")

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._check(key)
        for key in keys:
            try:
                self.stat(key)
            except ModelMissingError:
                continue
            except AuthenticationError:
                pass  # A URL may be signed for DELETE alone.
            # A WebDAV server deletes a folder with all that is in it, but not to depth 0.
            answer = self._ask("DELETE", key, {"Depth": "0"})
            if answer.status not in _DELETED:
                raise self._refusal(answer, key, "DELETE")
            answer.discard()

    def sign(self, key: str, method: str, expires: float) -> str:
        raise UnsupportedOperation(f"{self._where(key)}: HTTP servers sign no URLs")

    # -- the rest ----------------------------------------------------------------------------

    def is_digest(self, info: ObjectInfo) -> bool:
        # Nothing but the bytes themselves can tell, so they are asked for once more.
        if info.hint is None or self._etags_are_digests is False:
            return False
        hasher = MultiHasher((info.hint.algorithm,))
        with self.read(info.key, None, info) as body:
            for chunk in body:
                hasher.update(chunk)
        self._etags_are_digests = info.hint in hasher.digests().values()
        return self._etags_are_digests

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        from storage.backends.http.filesystem import HTTPFileSystem

        return HTTPFileSystem(self, self._base), self._base

    def local_path(self, key: str) -> str | None:
        return None

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()


@cache
def _user_agent() -> str:
    from storage import __version__

    return f"modelstorage/{__version__}"
