"""Requests to the service of a repository: one origin gets the credential, and no other.

A service may lead to another host for the bytes. Redirections are followed here, one by one, so
that each is looked at before anything is sent there.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from storage.backends.base import ByteRange, OpenOptions
from storage.backends.drivers.fsspec_errors import THROTTLED, error, kind_of_status, retry_after
from storage.backends.drivers.requests_errors import translated
from storage.backends.network import Network, hide_queries, with_timeouts
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)

if TYPE_CHECKING:
    import requests

    from storage.config.base import NetworkConfig

__all__ = [
    "CLIENT",
    "MAX_REDIRECTS",
    "REDIRECTS",
    "Connections",
    "WebSession",
    "cut",
    "extent",
    "origin",
    "pieces",
]

CLIENT = "modelstorage"
"""What requests say that they are from."""

REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
_BLOCK = 256 * 1024
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
# Small files may be sent whole where a part was asked for.
_MAX_SKIP = 32 * 1024 * 1024
_PLAIN_URL = re.compile(r"(?i)https?://[^\s\\/?#@\x00-\x20\x7f]+(?:[/?#]|$)")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port


def _quiet(session: requests.Session, connections: int) -> requests.Session:
    """Return ``session``, which from now on sends what it is told, once, and keeps no cookie."""
    import http.cookiejar

    from requests.adapters import HTTPAdapter

    # It would take a password from ~/.netrc, and mix the environment's proxies and authorities
    # with those of the config.
    session.trust_env = False
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    # Otherwise it reads the whole body of every redirection.
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
    adapter = HTTPAdapter(pool_maxsize=connections, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


class Connections:
    """How requests are sent with one config: proxy, authorities, time-outs. Inert until then."""

    def __init__(
        self,
        config: NetworkConfig | None,
        options: OpenOptions,
        *,
        store: str,
        address: str,
        make: Callable[[], requests.Session] | None = None,
    ) -> None:
        """Keep what to use.

        Args:
            config: proxy, authorities, time-outs.
            options: limits.
            store: what is asked, for messages.
            address: what a user gave that says where it is, for messages.
            make: makes a session; by default ``requests`` does.
        """
        self._config = config
        self._connections = options.connections
        options = with_timeouts(options, config)
        self._timeout = (options.connect_timeout, options.stall_timeout)
        self._names = (store, address)
        self._make = make
        self._lock = threading.Lock()
        self._opened: tuple[int, requests.Session] | None = None

    def close(self) -> None:
        """Free the connections. It may be used again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def check(self, url: str, where: str) -> None:
        """Refuse a URL of which two programs may see different hosts.

        Raises:
            ConfigurationError: it is such a URL, or none of HTTP.
        """
        try:
            plain = _PLAIN_URL.match(url) is not None and urlsplit(url).port != 0
        except ValueError:
            plain = False
        if not plain:
            store, address = self._names
            raise ConfigurationError(
                f"{where}: the address of {store}, or one that it named, is not a plain URL of "
                f"http or https; check {address} and the proxy"
            )

    def send(
        self,
        method: str,
        url: str,
        where: str,
        headers: Mapping[str, str],
        body: bytes | Mapping[str, str] | None = None,
    ) -> requests.Response:
        """Send one request and return the answer, its body not yet read; follow nothing.

        Args:
            method: of HTTP.
            url: complete; see :meth:`check`.
            where: the URI that an error is about.
            headers: of the request.
            body: what is sent, a mapping as a form.

        Raises:
            StorageError: there is no answer, or :meth:`check` refuses the URL.
        """
        store, address = self._names
        self.check(url, where)
        network = Network.of(self._config)
        if network.verify and network.bundle and not os.path.exists(network.bundle):
            raise ConfigurationError(
                f"the CA bundle {network.bundle} cannot be read: there is no such file"
            )
        if network.proxy is not None:
            proxies = {"http": network.proxy, "https": network.proxy}
        else:
            from requests.utils import get_environ_proxies

            proxies = dict(get_environ_proxies(url))
        session = self._session()
        with translated(where, store, address):
            return session.request(
                method,
                url,
                headers={"User-Agent": CLIENT, "Accept-Encoding": "identity", **headers},
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=self._timeout,
                proxies=proxies,
                verify=(network.bundle or True) if network.verify else False,
            )

    def _session(self) -> requests.Session:
        with self._lock:
            opened = self._opened
            # Sockets stayed with the parent.
            if opened is None or opened[0] != os.getpid():
                opened = self._opened = (os.getpid(), self._connect())
            return opened[1]

    def _connect(self) -> requests.Session:
        import warnings

        import requests
        from urllib3.exceptions import InsecureRequestWarning

        hide_queries()
        if not Network.of(self._config).verify:
            # Who switched the check off need not be told of it by every request.
            warnings.filterwarnings("ignore", category=InsecureRequestWarning)
        session = self._make() if self._make is not None else requests.Session()
        return _quiet(session, self._connections)


class WebSession:
    """Connections for one service with one config. Construction is inert."""

    def __init__(
        self,
        config: NetworkConfig | None,
        options: OpenOptions,
        *,
        store: str,
        address: str,
        home: Callable[[], str],
        credentials: Callable[[], Mapping[str, str]],
    ) -> None:
        """Describe the service.

        Args:
            config: proxy, authorities, time-outs.
            options: limits.
            store: what is asked, for messages.
            address: what a user gave that says where it is, for messages.
            home: gives a URL of the origin that gets the credential.
            credentials: gives the headers that say who asks.
        """
        self._names = (store, address)
        self._home = home
        self._credentials = credentials
        self._connections = Connections(config, options, store=store, address=address)

    def close(self) -> None:
        """Free the connections. It may be used again."""
        self._connections.close()

    def request(
        self,
        method: str,
        url: str,
        where: str,
        *,
        headers: Mapping[str, str] | None = None,
        foreign: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> requests.Response:
        """Send a request, go where it leads, and return the answer, its body not yet read.

        Args:
            method: of HTTP.
            url: complete.
            where: the URI that an error is about.
            headers: for every host on the way; no secret.
            foreign: more for the host of ``url`` alone; they go before the credential.
            body: what is sent; then nothing is followed but to the same origin.

        Raises:
            StorageError: there is no answer, or it leads where nothing may be sent.
        """
        self._check(url, where)
        first = origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = dict(headers or {})
            if origin(url) == first:
                sent |= foreign or {}
            given = {name.lower() for name in sent}
            if origin(url) == origin(self._home()) and "authorization" not in given:
                sent |= self._credentials()
            response = self._connections.send(method, url, where, sent, body)
            target = response.headers.get("Location")
            if response.status_code not in REDIRECTS or not target:
                return response
            response.close()
            url = self._followed(url, target, where)
            if body is not None and origin(url) != first:
                raise StorageError(
                    f"{where}: {self._names[0]} led a request with content to another host, "
                    f"{one_line(urlsplit(url).hostname)}; use the address that it leads to"
                )
        raise StorageError(f"{where}: more than {MAX_REDIRECTS} redirections, probably in a circle")

    def _followed(self, url: str, target: str, where: str) -> str:
        """Return where a redirection leads."""
        with contextlib.suppress(ValueError):  # what is none is refused as it is
            target = urljoin(url, target)
        self._check(target, where)
        return target

    def _check(self, url: str, where: str) -> None:
        """Refuse a URL of which two programs may see different hosts, or that anybody can read."""
        self._connections.check(url, where)
        store = self._names[0]
        if urlsplit(self._home()).scheme == "https" and urlsplit(url).scheme != "https":
            raise StorageError(
                f"{where}: {store} led from https to {one_line(url)}, which anybody on the way "
                "could read and change"
            )

    def read(self, response: requests.Response, where: str, limit: int) -> bytes:
        """Return a whole answer, and free its connection.

        Raises:
            StorageError: it is longer than ``limit`` bytes, or it broke off.
        """
        data = bytearray()
        try:
            for piece in self.chunks(response, where, None):
                data += piece
                if len(data) > limit:
                    raise StorageError(
                        f"{where}: the answer of {self._names[0]} is longer than {limit} bytes"
                    )
        finally:
            response.close()
        return bytes(data)

    def chunks(
        self, response: requests.Response, where: str, length: int | None
    ) -> Iterator[bytes]:
        """Yield the body of an answer, exactly ``length`` bytes of it unless that is ``None``."""
        arrived = 0
        with translated(where, *self._names):
            for piece in response.raw.stream(_BLOCK):
                arrived += len(piece)
                if length is not None and arrived > length:
                    break
                yield piece
        if length is not None and arrived != length:
            more = "more" if arrived > length else f"{arrived}"
            raise TransientError(f"{where}: {length} bytes were expected and {more} came")

    def error(
        self, response: requests.Response, where: str, message: str | None = None
    ) -> StorageError:
        """Return the error of ours for an error answer, and free its connection.

        Args:
            response: the answer.
            where: the URI that the error is about.
            message: what the service says in words; the answer's reason if none.
        """
        response.close()
        status = response.status_code
        kind = kind_of_status(status)
        text = f"{status}: {message or response.reason or ''}".rstrip(": ")
        if kind is AuthenticationError:
            sent = "Authorization" in response.request.headers
            host = one_line(urlsplit(response.url).hostname)
            did = "refused the credentials" if sent else "wants credentials, and none were sent"
            return AuthenticationError(
                f"{where}: {host} {did} ({one_line(text)}); check that they are there, valid, and "
                "permit this"
            )
        wait = retry_after({"retry-after": response.headers.get("Retry-After")})
        return error(kind, where, text, wait, throttled=status in THROTTLED)


def extent(
    where: str, span: ByteRange | None, response: requests.Response, known: int | None
) -> tuple[int | None, int, int | None]:
    """Return the object's size, the bytes to leave out first, and the bytes wanted.

    Args:
        where: the object's URI.
        span: that was asked for.
        response: that came.
        known: the object's size, by what the service said before.

    Raises:
        ObjectChangedError: the object is too short for ``span``.
    """
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise UnsupportedOperation(
            f"{where}: it came in the content coding {coding[:40]!r}, although none was asked "
            "for; a proxy may do that"
        )
    length = known
    if (text := response.headers.get("Content-Length", "")).isdigit():
        length = int(text)
    if span is None:
        return length, 0, length
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code == 206 and match is not None:
        begin, last, size = (int(number) for number in match.groups())
        if size >= span.end and (begin, last + 1) != (span.start, span.end):
            raise TransientError(
                f"{where}: bytes {span.start}-{span.end - 1} were asked for, {begin}-{last} sent"
            )
    elif response.status_code == 200 and length is not None and span.start <= _MAX_SKIP:
        begin, size = 0, length
    else:
        raise UnsupportedOperation(
            f"{where}: bytes {span.start}-{span.end - 1} were asked for and the whole file sent"
        )
    if size < span.end:
        raise ObjectChangedError(
            f"{where}: bytes up to {span.end} were asked for, the file has {size}"
        )
    if known is not None and size != known:
        raise TransientError(f"{where}: a file of {known} bytes was expected, one of {size} came")
    return size, span.start - begin, len(span)


def cut(chunks: Iterable[bytes], skip: int, length: int, where: str) -> Iterator[bytes]:
    """Yield ``length`` bytes of a body after its first ``skip``.

    Raises:
        TransientError: it ends too early.
    """
    if not length:
        return
    for chunk in chunks:
        part = chunk[skip : skip + length]
        skip = max(0, skip - len(chunk))
        length -= len(part)
        if part:
            yield part
        if not length:
            return
    raise TransientError(f"{where}: the connection ended {length} bytes too early")


def pieces(data: bytes, size: int = _BLOCK) -> Iterator[memoryview]:
    """Yield bytes in memory as buffers of at most ``size``, copying nothing."""
    view = memoryview(data)
    for start in range(0, len(view), size):
        yield view[start : start + size]
