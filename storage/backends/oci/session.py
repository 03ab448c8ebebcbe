"""Requests to one registry for one repository: whom to ask, as whom, through what.

``oras`` brings the connections (a session that keeps no cookies) and knows the addresses of the
API. Its own way of sending is not used: it gives passwords to whatever host a challenge names,
keeps whole blobs in memory, and repeats what fails, which is done here once for all stores.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from storage.backends.base import OpenOptions
from storage.backends.network import Network, hide_queries, with_timeouts
from storage.backends.oci.answers import error_of, scheme_of, translated
from storage.backends.oci.logins import Login, find_login
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    StorageError,
    TransientError,
    conceal,
    one_line,
)

if TYPE_CHECKING:
    import requests

    from storage.config import OCIConfig

__all__ = ["RegistrySession"]

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_MAX_TOKEN = 1024 * 1024
_CLIENT = "modelstorage"
# What `docker pull` asks where the public registry is meant.
_HOSTS = {"docker.io": "registry-1.docker.io"}
_PLAIN_URL = re.compile(r"(?i)https?://[^\s\\/?#@\x00-\x20\x7f]+(?:[/?#]|$)")


class RegistrySession:
    """Connections to one registry with one config. Construction is inert."""

    def __init__(
        self, registry: str, repository: str, config: OCIConfig | None, options: OpenOptions
    ) -> None:
        """Keep what to use.

        Args:
            registry: host, and port if it is not the usual one.
            repository: in it.
            config: how it is reached.
            options: limits.
        """
        self.registry = registry
        self.repository = repository
        self._config = config
        self._connections = options.connections
        options = with_timeouts(options, config)
        self._timeout = (options.connect_timeout, options.stall_timeout)
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._session: requests.Session | None = None
        self._container: Any = None
        self._authorization: str | None = None
        self._login: Login | None = None
        self._looked = False

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        plain = self._config.plain_http if self._config is not None else None
        if plain is None:
            plain = _is_here(self.registry)
        return "http" if plain else "https"

    def manifest_url(self, reference: str) -> str:
        """Return the address of a manifest by its tag or digest."""
        self._opened()
        return f"{self.scheme}://{self._container.manifest_url(reference)}"

    def blob_url(self, digest: str) -> str:
        """Return the address of a blob."""
        self._opened()
        return f"{self.scheme}://{self._container.get_blob_url(digest)}"

    def tags_url(self) -> str:
        """Return the address of the list of tags, of one of them."""
        self._opened()
        return f"{self.scheme}://{self._container.tags_url(N=1)}"

    def close(self) -> None:
        """Free the connections."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def ask(
        self, method: str, url: str, where: str, headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        """Send a request and return the answer, which is a success; the caller closes it.

        Redirections are followed; only the registry's own origin gets credentials.

        Raises:
            StorageError: the registry, or the store that it leads to, refuses.
        """
        start = url
        for _ in range(_MAX_REDIRECTS + 1):
            own = _origin(url) == _origin(start)
            response = self._send(method, url, where, headers or {}, own)
            if response.status_code not in _REDIRECTS or not response.headers.get("Location"):
                break
            url = self._following(url, response, where)
        else:
            raise StorageError(
                f"{where}: the registry redirects more than {_MAX_REDIRECTS} times; check its "
                "address"
            )
        if response.status_code >= 300:
            raise error_of(response, where, who=self._who(), own=own)
        return response

    def _send(
        self, method: str, url: str, where: str, headers: Mapping[str, str], own: bool
    ) -> requests.Response:
        """Send a request; once more with credentials if the registry asks for them."""
        sent = self._authorization if own else None
        response = self._once(method, url, where, headers, sent)
        if response.status_code != 401 or not own:
            return response
        challenge = response.headers.get("WWW-Authenticate", "")
        answer = self._answer(challenge, sent, where)
        if answer is None or answer == sent:
            return response
        response.close()
        return self._once(method, url, where, headers, answer)

    def _once(
        self,
        method: str,
        url: str,
        where: str,
        headers: Mapping[str, str],
        authorization: str | None,
        form: Mapping[str, str] | None = None,
    ) -> requests.Response:
        session = self._opened()
        _check_url(url, where)
        sent = {"User-Agent": _CLIENT, "Accept-Encoding": "identity", **headers}
        if authorization is not None:
            sent["Authorization"] = authorization
        network = Network.of(self._config)
        if network.verify and network.bundle and not os.path.exists(network.bundle):
            raise ConfigurationError(f"the CA bundle {network.bundle} cannot be read: no such file")
        with translated(where):
            return session.request(
                method,
                url,
                headers=sent,
                data=form,
                stream=True,
                allow_redirects=False,
                timeout=self._timeout,
                proxies=_proxies(network, url),
                verify=(network.bundle or True) if network.verify else False,
            )

    def _following(self, url: str, response: requests.Response, where: str) -> str:
        response.close()
        try:
            target = urljoin(url, response.headers["Location"])
        except ValueError:
            target = ""
        _check_url(target, where)
        if url.startswith("https:") and not target.startswith("https:"):
            raise StorageError(
                f"{where}: the registry led from https to {one_line(target)}, which anybody on the "
                "way could read and change; check the address and the proxy"
            )
        return target

    # -- credentials -------------------------------------------------------------------------

    def _who(self) -> str:
        return "with these credentials" if self._login is not None else "without credentials"

    def _answer(self, challenge: str, sent: str | None, where: str) -> str | None:
        """Return the ``Authorization`` that a challenge asks for; ``None`` if there is none."""
        with self._renewing:
            if self._authorization != sent:
                return self._authorization  # another thread was here meanwhile
            if not self._looked:
                self._login = find_login(self.registry, self.repository, self._config)
                self._looked = True
            scheme, login = scheme_of(challenge), self._login
            if login is not None and login.bearer is not None:
                found: str | None = f"Bearer {login.bearer}"
            elif scheme == "bearer":
                found = f"Bearer {self._token(challenge, where)}"
            elif scheme == "basic" and login is not None and login.basic is not None:
                found = f"Basic {login.basic}"
            else:
                found = None
            self._authorization = found
            return found

    def _token(self, challenge: str, where: str) -> str:
        """Get a bearer token from where the challenge says (Docker's token authentication)."""
        from oras.auth.utils import parse_auth_header

        asked = parse_auth_header(challenge)
        realm = asked.realm or ""
        _check_url(realm, where)
        login = self._login
        if login is not None and not self._may_have_secrets(realm):
            raise AuthenticationError(
                f"{where}: the registry asks for a login at {one_line(realm)}, and credentials go "
                "there only by https; ask its operators, or use anonymous=True of OCIConfig"
            )
        query = {"service": asked.service or "", "scope": asked.scope or ""}
        query = {name: value for name, value in query.items() if value}
        if login is not None and login.identity_token is not None:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": login.identity_token,
                "client_id": _CLIENT,
                **query,
            }
            response = self._once("POST", realm, where, {}, None, form)
        else:
            basic = f"Basic {login.basic}" if login is not None and login.basic else None
            response = self._once("GET", _with_query(realm, query), where, {}, basic)
        if response.status_code >= 300:
            raise error_of(response, where, who=self._who())
        token = _token_in(response, where)
        conceal(token)
        return token

    def _may_have_secrets(self, realm: str) -> bool:
        """Tell whether credentials may be sent to where tokens are given.

        By TLS to whom the registry names, as all clients do; without it only to the host that
        would get them without TLS anyway.
        """
        parts = urlsplit(realm)
        if parts.scheme == "https":
            return True
        own = urlsplit(f"{self.scheme}://{_HOSTS.get(self.registry, self.registry)}")
        return own.scheme == "http" and parts.hostname == own.hostname

    def _opened(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                try:
                    from oras.container import Container
                    from oras.provider import Registry
                except ImportError as exc:
                    raise ConfigurationError(
                        "OCI registries need the package oras, which is not installed; "
                        'run: pip install "modelstorage[oci]"'
                    ) from exc
                from requests.adapters import HTTPAdapter

                hide_queries()
                host = _HOSTS.get(self.registry, self.registry)
                if not re.search(r"[.:]", host):
                    # Only so oras takes it for a host.
                    host += ":80" if self.scheme == "http" else ":443"
                verify = self._config is None or self._config.verify_ssl
                insecure = self.scheme == "http"
                registry = Registry(hostname=host, insecure=insecure, tls_verify=verify)
                session: requests.Session = registry.session
                # It would take a password from ~/.netrc, and mix the environment's proxies and
                # authorities with those of the config.
                session.trust_env = False
                # Otherwise it reads the whole body of every redirection.
                session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
                adapter = HTTPAdapter(pool_maxsize=self._connections, max_retries=0)
                session.mount("https://", adapter)
                session.mount("http://", adapter)
                self._container = Container(f"{host}/{self.repository}")
                self._session = session
            return self._session


def _proxies(network: Network, url: str) -> dict[str, str]:
    if network.proxy is not None:
        return {"http": network.proxy, "https": network.proxy}
    from requests.utils import get_environ_proxies

    return dict(get_environ_proxies(url))


def _with_query(url: str, query: Mapping[str, str]) -> str:
    from urllib.parse import urlencode

    parts = urlsplit(url)
    joined = "&".join(filter(None, (parts.query, urlencode(query))))
    return parts._replace(query=joined, fragment="").geturl()


def _token_in(response: requests.Response, where: str) -> str:
    try:
        with translated(where):
            data = response.raw.read(_MAX_TOKEN, decode_content=False)
    finally:
        response.close()
    try:
        table = json.loads(data)
        token = table.get("token") or table.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        raise TransientError(f"{where}: what should be a token of the registry is none")
    return token


def _is_here(registry: str) -> bool:
    """Tell whether a registry is on this machine. Docker speaks to such ones without TLS, too."""
    host = urlsplit(f"//{registry}").hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _check_url(url: str, where: str) -> None:
    """Refuse a URL of which two programs may see different hosts.

    Raises:
        StorageError: it is such a URL, or none of a server.
    """
    try:
        plain = _PLAIN_URL.match(url) is not None and urlsplit(url).port != 0
    except ValueError:
        plain = False
    if not plain:
        raise StorageError(
            f"{where}: an address that the registry named is not a plain URL of http or https; "
            "check the registry and the proxy"
        )
