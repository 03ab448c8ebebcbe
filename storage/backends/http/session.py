"""The one module that knows ``requests``: one request, its redirections, its body.

``requests.Session`` is not used: it follows redirections with headers that belong to another
host, reads ``~/.netrc`` and rewrites URLs. Its adapter, below, does none of it, and brings
pooled connections, proxies and TLS.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, ClassVar
from urllib.parse import urljoin, urlsplit

import requests
import requests.adapters
import requests.cookies
import requests.utils
import urllib3.exceptions

from storage.backends.http.body import Upload
from storage.backends.http.errors import failure
from storage.backends.http.headers import url_text
from storage.backends.network import hide_queries
from storage.errors import ConfigurationError, StorageError, TransientError, redact

__all__ = ["Access", "Answer", "Origin", "Transport", "check_files"]

_CHUNK = 256 * 1024
_SMALL = 64 * 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_SAME_METHOD = (307, 308)
# Says of the file what it is, in an answer that only leads to it.
_LINKED = "X-Linked-ETag"
_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: who is asked. Credentials are for one of them."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Return the origin of a URL; ``ValueError`` if it has none."""
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError("no host")
        host = parts.hostname.lower()
        if not host.isascii():
            import idna

            host = idna.encode(host, uts46=True).decode()
        return cls(parts.scheme.lower(), host, parts.port or _port(parts.scheme.lower()))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _port(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


def _port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


@dataclass(frozen=True, slots=True)
class Access:
    """How an origin is reached, and as whom."""

    origin: Origin
    headers: Mapping[str, str] = field(repr=False)
    """Headers for this origin alone, credentials among them."""
    verify: bool
    ca_bundle: str | None
    """File or folder of the authorities to trust; ``None`` for those of ``requests``."""
    client_cert: tuple[str, str] | None
    """Certificate and key, shown to this origin alone."""
    proxy: str | None = field(repr=False)
    """Proxy for everything; ``None`` for those of the environment."""
    connect_timeout: float
    stall_timeout: float
    max_redirects: int
    downgrade: bool
    """Whether a redirection from https to http is followed."""
    connections: int


class Answer:
    """The head of an answer; the body is still to come."""

    def __init__(
        self,
        response: requests.Response,
        access: Access,
        url: str,
        redirected: bool,
        trusted: bool,
        slash_added: bool,
    ) -> None:
        """Wrap a ``response``."""
        self.status = int(response.status_code)
        self.headers: Mapping[str, str] = response.headers
        self.reason = str(response.reason or "")
        self.url = url
        """Who answered in the end; may hold a credential."""
        self.redirected = redirected
        self.elsewhere = None if trusted else str(Origin.of(url))
        """Who answered, if that is somebody to whom no credentials were sent."""
        self.slash_added = slash_added
        """Whether the redirection only added a slash, as servers do for folders."""
        self._raw: Any = response.raw
        self._access = access

    def chunks(self, expected: int | None, where: str) -> Iterator[bytes]:
        """Yield the body as it comes, undecoded; raise unless it is of ``expected`` bytes."""
        found = 0
        problem: tuple[StorageError, BaseException | None] | None = None
        try:
            for chunk in self._raw.stream(_CHUNK, decode_content=False):
                found += len(chunk)
                if expected is not None and found > expected:
                    break
                yield chunk
        except _FAILURES as exc:
            problem = failure(exc, where, self._access.stall_timeout)
        if problem is not None:
            raise problem[0] from problem[1]
        if expected is not None and found != expected:
            short = "fewer" if found < expected else "more"
            raise TransientError(f"{where}: {expected} bytes were announced and {short} came")

    def discard(self) -> None:
        """Free the connection; keep it if what is left of the body is short."""
        # Of an answer to HEAD nothing is left, whatever length it tells.
        left = self._raw.length_remaining
        if left is not None and left <= _SMALL:
            with contextlib.suppress(*_FAILURES):
                self._raw.read(_SMALL, decode_content=False)
        self.close()

    def text(self) -> str:
        """Return the beginning of the body, as far as it comes, and free the connection."""
        data = b""
        with contextlib.suppress(*_FAILURES):
            data = self._raw.read(_SMALL, decode_content=False)
        self.close()
        return data.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the connection."""
        self._raw.close()


class Transport:
    """Sends requests to one origin, and follows it to others. Safe for many threads."""

    def __init__(self, access: Access) -> None:
        """Prepare; nothing is opened yet."""
        self.access = access
        self._pools = _Pools.acquire(access.connections)

    def close(self) -> None:
        """Free the connections, if nobody else uses them."""
        self._pools.release()

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        where: str,
        body: Callable[[], Upload] | None = None,
    ) -> Answer:
        """Send a request and return the first answer that is no redirection.

        Args:
            method: upper case.
            target: path and query, as they are sent.
            headers: beside those of the access; these win.
            where: the URL for messages.
            body: makes the body, for each redirection anew.

        Raises:
            StorageError: no answer, or a redirection that is not followed.
        """
        access = self.access
        url = f"{access.origin}{target}"
        origin, trusted, slash_added = access.origin, True, False
        linked = None
        # One for each origin: by the rules of browsers a cookie is sent to all ports of a host.
        jars: dict[Origin, requests.cookies.RequestsCookieJar] = {}
        for hop in range(access.max_redirects + 1):
            jar = jars.setdefault(Origin.of(url), requests.cookies.RequestsCookieJar())
            response = self._send(method, url, headers, where, body, trusted, jar)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                if linked is not None:
                    response.headers.setdefault(_LINKED, linked)
                return Answer(response, access, url, hop > 0, trusted, slash_added)
            linked = response.headers.get(_LINKED, linked)
            Answer(response, access, url, True, trusted, False).discard()
            if method not in ("GET", "HEAD") and response.status_code not in _SAME_METHOD:
                raise StorageError(
                    f"{where}: {method} was answered by a redirection "
                    f"({response.status_code}), which would turn it into a download: perhaps "
                    "to a page for logging in; check the credentials and the address"
                )
            following = _resolve(url, location)
            problem = _objection(url, following, access.downgrade)
            if problem is not None:
                raise StorageError(f"{where}: {problem}")
            slash_added = _adds_slash(url, following)
            new = Origin.of(following)
            trusted = trusted and new == origin
            url = following
        raise StorageError(
            f"{where}: redirected more than {access.max_redirects} times, last to "
            f"{redact(url)}; check the address, or raise max_redirects"
        )

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        where: str,
        body: Callable[[], Upload] | None,
        trusted: bool,
        jar: requests.cookies.RequestsCookieJar,
    ) -> requests.Response:
        access = self.access
        request = requests.PreparedRequest()
        request.method = method
        request.url = url
        request.headers = requests.structures.CaseInsensitiveDict(
            {**headers, **(access.headers if trusted else {})}
        )
        # What the request means is not for a config to change.
        for name, value in headers.items():
            if name.lower() not in _OVERRIDABLE:
                request.headers[name] = value
        if len(jar) and "Cookie" not in request.headers:
            request.prepare_cookies(jar)
        for name, value in request.headers.items():
            if isinstance(value, str) and not value.isascii():
                request.headers[name] = value.encode()  # type: ignore[assignment]
        made = body() if body is not None else None
        request.body = made  # type: ignore[assignment]
        if access.proxy is not None:
            proxies = {"http": access.proxy, "https": access.proxy}
        else:
            proxies = requests.utils.get_environ_proxies(url, no_proxy=None)
        verify: bool | str = access.verify
        if verify and access.ca_bundle is not None:
            verify = access.ca_bundle
        connect_timeout = access.connect_timeout
        if made is not None:
            # urllib3 sends the body under the time limit of the connection.
            connect_timeout = max(connect_timeout, access.stall_timeout)
        problem: tuple[StorageError, BaseException | None] | None = None
        # Raised outside: what requests raises holds the request, credentials included, and
        # would come along as the context.
        try:
            response = self._pools.adapter().send(
                request,
                stream=True,
                timeout=(connect_timeout, access.stall_timeout),
                verify=verify,
                cert=access.client_cert if trusted else None,
                proxies=dict(proxies),
            )
        except (*_FAILURES, ValueError) as exc:
            problem = failure(exc, where, access.stall_timeout)
        finally:
            if made is not None:
                made.close()
        if problem is not None and made is not None and made.error is not None:
            raise made.error
        if problem is not None:
            raise problem[0] from problem[1]
        extract: Any = requests.cookies.extract_cookies_to_jar
        extract(jar, request, response.raw)
        return response


# Names that a config may set although we send them too.
_OVERRIDABLE = frozenset(
    {"accept", "accept-encoding", "content-type", "user-agent", "host", "depth"}
)


def _resolve(url: str, location: str) -> str:
    """Return the absolute URL of a ``Location``, without user, password and fragment."""
    # A header is shown as Latin-1, and servers send UTF-8.
    text = location.strip().encode("latin-1", "replace").decode("utf-8", "replace")
    try:
        parts = urlsplit(urljoin(url, text))
        origin = Origin.of(parts.geturl()) if parts.scheme in ("http", "https") else None
    except ValueError:
        return ""
    if origin is None:
        return f"{parts.scheme}:"
    query = f"?{url_text(parts.query, query=True)}" if parts.query else ""
    return f"{origin}{url_text(parts.path) or '/'}{query}"


def _objection(url: str, following: str, downgrade: bool) -> str | None:
    """Return why a redirection must not be followed."""
    scheme = following.partition(":")[0]
    if not following or scheme not in ("http", "https"):
        return f"redirected to {scheme or 'what is no URL'}, where nothing is fetched from"
    if url.startswith("https:") and scheme == "http" and not downgrade:
        return (
            f"redirected from https to {redact(following)}, which anybody on the way could "
            "read and change; use insecure_redirects=True of HTTPConfig if that must be"
        )
    return None


def _adds_slash(url: str, following: str) -> bool:
    before, after = urlsplit(url), urlsplit(following)
    return before.path + "/" == after.path and Origin.of(url) == Origin.of(following)


class _Adapter(requests.adapters.HTTPAdapter):
    """Sends targets as they are given."""

    def request_url(self, request: requests.PreparedRequest, proxies: Any) -> str:
        url = request.url or ""
        proxy = requests.utils.select_proxy(url, proxies)
        if proxy and url.startswith("http:") and not proxy.lower().startswith("socks"):
            return url
        return re.sub(r"^[a-z]+://[^/]*", "", url)


class _Pools:
    """The connections of this process, shared by all backends with as many of them.

    Credentials are given with each request, so nobody sees another's; and a thousand presigned
    URLs, each a store of its own, do not hold a thousand pools.
    """

    _lock = threading.Lock()
    _shared: ClassVar[dict[int, _Pools]] = {}

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._users = 0
        self._opened: tuple[int, _Adapter] | None = None

    @classmethod
    def acquire(cls, connections: int) -> _Pools:
        hide_queries()
        with cls._lock:
            pools = cls._shared.setdefault(connections, cls(connections))
            pools._users += 1
            return pools

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            opened = None
            if self._users <= 0:
                opened, self._opened = self._opened, None
        # A child must not say goodbye on connections of its parent.
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def adapter(self) -> _Adapter:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with self._lock:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    adapter = _Adapter(pool_connections=16, pool_maxsize=self._connections)
                    opened = self._opened = (os.getpid(), adapter)
        return opened[1]


os.register_at_fork(after_in_child=lambda: setattr(_Pools, "_lock", threading.Lock()))


def check_files(access: Access) -> None:
    """Look for the files that TLS needs, so that a missing one is named.

    Raises:
        ConfigurationError: one is not there.
    """
    named = [("ca_bundle", access.ca_bundle)] if access.verify else []
    if access.client_cert is not None:
        named += zip(("client_cert", "client_key"), access.client_cert, strict=True)
    for name, path in named:
        if path is not None and not os.path.exists(path):
            raise ConfigurationError(f"{name}: there is no file {path}")
