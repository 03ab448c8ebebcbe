"""How an origin is reached, and as whom: the config, the URL and the environment together."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from storage.backends.base import OpenOptions
from storage.backends.http.session import Access, Origin
from storage.backends.network import Network, with_timeouts
from storage.config import reveal
from storage.errors import ConfigurationError, InvalidInput, redact

if TYPE_CHECKING:
    from storage.config import HTTPConfig

__all__ = ["host_headers", "make_access"]

_KSERVE_SUFFIX = "-headers"


def make_access(url: str, config: HTTPConfig | None, options: OpenOptions) -> Access:
    """Return how the origin of ``url`` is reached.

    Credentials are those of the config; else those in the URL; else the headers in KServe's
    variable for the host.

    Raises:
        InvalidInput: the URL has no usable host.
        ConfigurationError: KServe's variable is malformed.
    """
    try:
        origin = Origin.of(url)
    except ValueError as exc:
        raise InvalidInput(f"{redact(url)}: its host is no name of one") from exc
    cert = None
    if config is not None and config.client_cert is not None:
        # A key in the same file is named too: only then is an encrypted one noticed.
        cert = (config.client_cert, config.client_key or config.client_cert)
    network = Network.of(config)
    options = with_timeouts(options, config)
    return Access(
        origin,
        _headers(url, origin, config),
        verify=network.verify,
        # A folder of them will do for requests, other than for the clients of other stores.
        ca_bundle=network.bundle or os.environ.get("SSL_CERT_DIR") or None,
        client_cert=cert,
        proxy=network.proxy,
        connect_timeout=options.connect_timeout,
        stall_timeout=options.stall_timeout,
        max_redirects=config.max_redirects if config is not None else 10,
        downgrade=config is not None and config.insecure_redirects,
        connections=options.connections,
    )


def _headers(url: str, origin: Origin, config: HTTPConfig | None) -> dict[str, str]:
    headers: dict[str, str] = {}
    authorization = None
    if config is not None:
        headers = {name: reveal(value) for name, value in config.headers.items()}
        if config.token is not None:
            token = reveal(config.token)
            if re.search(r"[\x00-\x20\x7f]", token):
                raise ConfigurationError(
                    f"{origin}: the token of its HTTPConfig holds a space or a line break, which "
                    "no token does; give it alone"
                )
            authorization = f"Bearer {token}"
        elif config.username is not None:
            authorization = _basic(config.username, reveal(config.password) or "")
    if not headers and authorization is None:
        headers = host_headers(origin.host, os.environ)
        parts = urlsplit(url)
        if parts.username is not None:
            authorization = _basic(unquote(parts.username), unquote(parts.password or ""))
    if authorization is not None and "authorization" not in (name.lower() for name in headers):
        headers["Authorization"] = authorization
    return headers


def _basic(user: str, password: str) -> str:
    # Variables may hold bytes that are no text.
    text = f"{user}:{password}".encode(errors="surrogateescape")
    return "Basic " + base64.b64encode(text).decode("ascii")


def host_headers(host: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers in KServe's variable ``<host>-headers``, a JSON object.

    Raises:
        ConfigurationError: it holds something else.
    """
    variable = f"{host}{_KSERVE_SUFFIX}"
    text = environ.get(variable, "").strip()
    if not text:
        return {}
    # The parser's error keeps the whole text, so it is not chained.
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        from storage.config import HTTPConfig

        try:
            config = HTTPConfig(headers=found)
        except ConfigurationError as exc:
            raise ConfigurationError(f"the variable {variable}: {exc}") from None
        return {name: reveal(value) for name, value in config.headers.items()}
    raise ConfigurationError(
        f"the variable {variable}: a JSON object of texts is needed, such as "
        '{"Authorization": "Bearer …"}'
    )
