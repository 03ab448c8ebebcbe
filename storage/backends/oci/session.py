"""Requests to one registry for one repository: whom to ask, as whom, through what.

``oras`` brings the connections (a session that keeps no cookies) and knows the addresses of the
API. Its own way of sending is not used: it gives passwords to whatever host a challenge names,
keeps whole blobs in memory, and repeats what fails, which is done here once for all stores.
"""

from __future__ import annotations

import ipaddress
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from storage.backends.base import OpenOptions
from storage.backends.drivers.web import CLIENT, MAX_REDIRECTS, REDIRECTS, Connections, origin
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
from storage.lazy import lazy_property

if TYPE_CHECKING:
    import requests

    from storage.config import OCIConfig

__all__ = ["RegistrySession"]

_MAX_TOKEN = 1024 * 1024
# What `docker pull` asks where the public registry is meant.
_HOSTS = {"docker.io": "registry-1.docker.io"}


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
        self._connections = Connections(
            config, options, store="the registry", address="the host and the port", make=self._make
        )
        self._renewing = threading.Lock()
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
        return f"{self.scheme}://{self._container.manifest_url(reference)}"

    def blob_url(self, digest: str) -> str:
        """Return the address of a blob."""
        return f"{self.scheme}://{self._container.get_blob_url(digest)}"

    def tags_url(self) -> str:
        """Return the address of the list of tags, of one of them."""
        return f"{self.scheme}://{self._container.tags_url(N=1)}"

    def close(self) -> None:
        """Free the connections."""
        self._connections.close()

    def ask(
        self, method: str, url: str, where: str, headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        """Send a request and return the answer, which is a success; the caller closes it.

        Redirections are followed; only the registry's own origin gets credentials.

        Raises:
            StorageError: the registry, or the store that it leads to, refuses.
        """
        self._connections.check(url, where)
        start = url
        for _ in range(MAX_REDIRECTS + 1):
            own = origin(url) == origin(start)
            response = self._send(method, url, where, headers or {}, own)
            if response.status_code not in REDIRECTS or not response.headers.get("Location"):
                break
            url = self._following(url, response, where)
        else:
            raise StorageError(
                f"{where}: the registry redirects more than {MAX_REDIRECTS} times; check its "
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
        if authorization is not None:
            headers = {**headers, "Authorization": authorization}
        return self._connections.send(method, url, where, headers, form)

    def _following(self, url: str, response: requests.Response, where: str) -> str:
        response.close()
        try:
            target = urljoin(url, response.headers["Location"])
        except ValueError:
            target = ""
        self._connections.check(target, where)
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
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
        self._connections.check(realm, where)
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
                "client_id": CLIENT,
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

    @property
    def _host(self) -> str:
        host = _HOSTS.get(self.registry, self.registry)
        if not re.search(r"[.:]", host):
            # Only so oras takes it for a host.
            host += ":80" if self.scheme == "http" else ":443"
        return host

    @lazy_property
    def _container(self) -> Any:
        with _oras():
            from oras.container import Container
        return Container(f"{self._host}/{self.repository}")

    def _make(self) -> requests.Session:
        with _oras():
            from oras.provider import Registry
        verify = self._config is None or self._config.verify_ssl
        insecure = self.scheme == "http"
        registry = Registry(hostname=self._host, insecure=insecure, tls_verify=verify)
        session: requests.Session = registry.session
        return session


@contextmanager
def _oras() -> Iterator[None]:
    try:
        yield
    except ImportError as exc:
        raise ConfigurationError(
            "OCI registries need the package oras, which is not installed; "
            'run: pip install "modelstorage[oci]"'
        ) from exc


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
