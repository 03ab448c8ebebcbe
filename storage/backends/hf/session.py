"""Requests to a Hub with one config: whom to ask, as whom, through what.

The Hub's own client sends everything through one HTTP session for the whole process, and
which library that is differs between its releases. Two accounts, proxies or authorities in
one process need sessions of their own, and one call must be one attempt; so the requests are
sent by ``requests``. ``huggingface_hub`` knows the login and gives the fsspec file system.
"""

from __future__ import annotations

import json as encoder
import os
import re
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urljoin, urlsplit

from storage.backends.base import OpenOptions
from storage.backends.hf.errors import from_answer, from_storage, translated
from storage.backends.network import Network, hide_queries, with_timeouts
from storage.config.ambient import is_true
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    OfflineError,
    StorageError,
    one_line,
)

if TYPE_CHECKING:
    import requests

    from storage.config import HFConfig

__all__ = ["HubSession", "check_online", "hub_endpoint", "hub_token"]

_PUBLIC = "https://huggingface.co"
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
# The Hub answers a commit when all of it is written; that may take so many stall timeouts.
_PATIENCE = 10
_SMALL = 64 * 1024
_MAX_ANSWER = 64 * 1024 * 1024
_PLAIN_URL = re.compile(r"(?i)https?://[^\s\\/?#@\x00-\x20\x7f]+(?:[/?#]|$)")


def check_online(where: str) -> None:
    """Refuse to ask the Hub where ``HF_HUB_OFFLINE`` is set.

    Raises:
        OfflineError: it is.
    """
    if is_true("HF_HUB_OFFLINE"):
        raise OfflineError(
            f"{where}: the Hub would have to be asked, but HF_HUB_OFFLINE is set; unset it, "
            "or download while it can be reached"
        )


def hub_endpoint(config: HFConfig | None) -> str:
    """Return the URL of the Hub, without a slash at its end."""
    endpoint = config.endpoint if config is not None else None
    return (endpoint or os.environ.get("HF_ENDPOINT") or _PUBLIC).rstrip("/")


def hub_token(config: HFConfig | None) -> str | None:
    """Return the token to send: the config's, that of the environment, or of the last login.

    Raises:
        AuthenticationError: a token should be exchanged for another one, which failed.
    """
    if config is not None and config.anonymous:
        return None
    if config is not None and config.token is not None:
        return _clean(config.token.get_secret_value())
    if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    if not os.environ.get("HF_OIDC_RESOURCE"):
        ambient = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        if token := _clean(ambient or ""):
            return token
    return _login()


def _login() -> str | None:
    path = _login_path()
    try:
        with open(path, encoding="utf-8") as file:
            stored = _clean(file.read())
    except (OSError, UnicodeDecodeError):
        stored = None
    if stored is None and not os.environ.get("HF_OIDC_RESOURCE"):
        return None
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return stored
    if os.path.abspath(constants.HF_TOKEN_PATH) != os.path.abspath(path):
        # It read the environment when it was imported, and that has changed.
        return stored
    try:
        # Renews what expires, and exchanges the identity that a CI system gives.
        return get_token()
    except Exception as exc:  # each way to get a token fails in a way of its own
        raise AuthenticationError(f"no token of the Hub was obtained: {one_line(exc)}") from exc


def _login_path() -> str:
    if path := os.environ.get("HF_TOKEN_PATH"):
        return os.path.expanduser(path)
    home = os.environ.get("HF_HOME")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = os.path.join(cache, "huggingface")
    return os.path.join(os.path.expanduser(home), "token")


def _clean(token: str) -> str | None:
    return token.replace("\r", "").replace("\n", "").strip() or None


class HubSession:
    """Connections to one Hub with one config. Construction is inert."""

    def __init__(self, config: HFConfig | None, options: OpenOptions) -> None:
        """Keep what to use; the environment is read with each request."""
        self._config = config
        self._connections = options.connections
        options = with_timeouts(options, config)
        self._timeout = (options.connect_timeout, options.stall_timeout)
        self._lock = threading.Lock()
        self._session: requests.Session | None = None

    @property
    def endpoint(self) -> str:
        """URL of the Hub."""
        return hub_endpoint(self._config)

    def token(self) -> str | None:
        """Return the token that requests to the Hub carry."""
        return hub_token(self._config)

    def close(self) -> None:
        """Free the connections."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def send(
        self,
        method: str,
        url: str,
        where: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        patient: bool = False,
    ) -> requests.Response:
        """Send one request and return its answer, whatever the answer is.

        The token goes to the Hub's own origin and to no other. Redirects are not followed.

        Args:
            method: of HTTP.
            url: complete.
            where: the URI that an error is about.
            headers: more headers.
            body: bytes, or an iterable of them that has a length.
            patient: whether the answer may take minutes.

        Raises:
            OfflineError: ``HF_HUB_OFFLINE`` is set.
            StorageError: the URL is one that nothing is sent to.
        """
        check_online(where)
        _check_url(url, where)
        self._check_encrypted(url, where)
        sent = {"User-Agent": "modelstorage", "Accept-Encoding": "identity", **(headers or {})}
        if self.is_hub(url) and (token := self.token()) is not None:
            sent["Authorization"] = f"Bearer {token}"
        connect, stall = self._timeout
        if body is not None:
            # urllib3 sends the body under the time limit of the connection.
            connect = max(connect, stall)
        with translated(where):
            return self._opened().request(
                method,
                url,
                headers=sent,
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=(connect, stall * _PATIENCE if patient else stall),
                proxies=self._proxies(url),
                verify=self._verify(),
            )

    def call(
        self,
        method: str,
        path: str,
        where: str,
        *,
        json: Any = None,
        form: Any = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        allow: Iterable[str] = (),
        patient: bool = False,
    ) -> requests.Response:
        """Ask the Hub's API, follow its own redirects, and read the answer.

        Args:
            method: of HTTP.
            path: below the endpoint, with a slash before it; or a URL.
            where: the URI that an error is about.
            json: value to send.
            form: pairs to send as a form.
            headers: more headers.
            body: anything else to send; see ``send``.
            allow: error codes (``EntryNotFound``) whose answers are returned.
            patient: as for ``send``.

        Raises:
            StorageError: the Hub refuses.
        """
        url = f"{self.endpoint}{path}" if path.startswith("/") else path
        sent = dict(headers or {})
        if json is not None:
            body = encoder.dumps(json).encode()
            sent.setdefault("Content-Type", "application/json")
        elif form is not None:
            body = urlencode(form).encode()
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        for _ in range(_MAX_REDIRECTS):
            response = self.send(method, url, where, headers=sent, body=body, patient=patient)
            target = self.redirected(url, response, where)
            if target is None or not self.is_hub(target):
                break
            self.discard(response)
            url = target
        if response.status_code >= 300 and response.headers.get("X-Error-Code", "") not in allow:
            raise self.error(response, where)
        with translated(where):
            data = bytearray()
            for piece in response.iter_content(_SMALL):
                data += piece
                if len(data) > _MAX_ANSWER:
                    response.close()
                    raise StorageError(
                        f"{where}: the answer is longer than any of a Hub; check the endpoint"
                    )
        response._content = bytes(data)
        return response

    def discard(self, response: requests.Response) -> None:
        """Be done with an answer whose body does not matter, and keep its connection."""
        length = response.headers.get("Content-Length", "")
        try:
            if response.request.method == "HEAD" or (length.isdigit() and int(length) < _SMALL):
                response.content  # noqa: B018 -- a connection is free when the body is read
        except Exception:  # noqa: BLE001 -- then it is closed below
            pass
        finally:
            response.close()

    def redirected(self, url: str, response: requests.Response, where: str) -> str | None:
        """Return where an answer leads, if it leads elsewhere.

        Raises:
            StorageError: nobody should go there; the answer is closed.
        """
        location = response.headers.get("Location")
        if response.status_code not in _REDIRECTS or not location:
            return None
        try:
            target = urljoin(url, location)
        except ValueError:
            target = ""
        try:
            _check_url(target, where)
            self._check_encrypted(target, where)
        except StorageError:
            response.close()
            raise
        return target

    def error(
        self, response: requests.Response, where: str, *, fresh: bool = False
    ) -> StorageError:
        """Return the error of ours for an error answer, and free its connection.

        Args:
            response: the answer.
            where: the URI that the error is about.
            fresh: whether the address that was asked was given a moment ago.
        """
        message = ""
        data = b""
        try:
            data = response.raw.read(_SMALL)
            if "json" in response.headers.get("Content-Type", ""):
                found = encoder.loads(data)
                message = str(found.get("error") or found.get("message") or "")
        except Exception:  # noqa: BLE001 -- the status says enough
            message = ""
        finally:
            response.close()
        if not self.speaks_for_the_hub(response.url):
            host = urlsplit(response.url).hostname or ""
            text = data.decode("utf-8", "replace")
            return from_storage(
                where, host, response.status_code, response.headers, text, fresh=fresh
            )
        return from_answer(
            where,
            response.status_code,
            response.headers,
            message,
            anonymous="Authorization" not in response.request.headers,
            reading=response.request.method in ("GET", "HEAD"),
        )

    def own_url(self, url: str) -> str:
        """Return a URL that the Hub gave, at the endpoint that stands in for it."""
        endpoint = self.endpoint
        if url.startswith(f"{_PUBLIC}/") and endpoint != _PUBLIC:
            return endpoint + url.removeprefix(_PUBLIC)
        return url

    def is_hub(self, url: str) -> bool:
        """Tell whether a URL is of the Hub's own origin, which gets the token."""
        return _origin(url) == _origin(self.endpoint)

    def speaks_for_the_hub(self, url: str) -> bool:
        """Tell whether answers from a URL may say what a file is.

        Mirrors lead to the public Hub for that; it is not sent their token.
        """
        return self.is_hub(url) or urlsplit(url).hostname in ("huggingface.co", "hf.co")

    def _check_encrypted(self, url: str, where: str) -> None:
        if urlsplit(self.endpoint).scheme == "https" and urlsplit(url).scheme != "https":
            raise StorageError(
                f"{where}: the Hub led from https to {one_line(url)}, which anybody on the way "
                "could read and change; check the endpoint and the proxy"
            )

    def _opened(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                import http.cookiejar

                import requests
                from requests.adapters import HTTPAdapter

                class Session(requests.Session):
                    """Leaves redirections alone; otherwise each is looked at, its body read."""

                    def get_redirect_target(self, resp: requests.Response) -> None:
                        return None

                hide_queries()
                session = Session()
                # It would take a password from ~/.netrc, and mix the environment's proxies
                # and authorities with those of the config.
                session.trust_env = False
                session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
                adapter = HTTPAdapter(pool_maxsize=self._connections, max_retries=0)
                session.mount("https://", adapter)
                session.mount("http://", adapter)
                self._session = session
            return self._session

    def _proxies(self, url: str) -> dict[str, str]:
        if (proxy := Network.of(self._config).proxy) is not None:
            return {"http": proxy, "https": proxy}
        from requests.utils import get_environ_proxies

        return dict(get_environ_proxies(url))

    def _verify(self) -> str | bool:
        path = Network.of(self._config).bundle
        if path and not os.path.exists(path):
            raise ConfigurationError(f"the CA bundle {path} cannot be read: there is no such file")
        return path or True


def _check_url(url: str, where: str) -> None:
    """Refuse a URL of which two programs may see different hosts.

    What decides about the token has to see the host that is connected to: a backslash ends it
    for urllib3, and belongs to the name of a user for ``urllib.parse``.

    Raises:
        ConfigurationError: it is such a URL, or none of a server.
    """
    try:
        plain = _PLAIN_URL.match(url) is not None and urlsplit(url).port != 0
    except ValueError:
        plain = False
    if not plain:
        raise ConfigurationError(
            f"{where}: the address of the Hub, or one that it named, is not a plain URL of http "
            "or https; check the endpoint and the proxy"
        )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port
