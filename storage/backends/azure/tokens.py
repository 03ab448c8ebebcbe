"""Entra tokens for Azure, from ``azure-identity`` whoever moves the bytes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.backends.drivers.fsspec_errors import THROTTLED, retry_after
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    StorageError,
    TransientError,
    one_line,
    redact,
)

if TYPE_CHECKING:
    from storage.backends.network import Network
    from storage.config import AzureConfig

__all__ = ["Tokens"]

_SCOPE = "https://storage.azure.com/.default"
_RESOURCE = "https://storage.azure.com/"
_METADATA_PATH = "/metadata/identity/oauth2/token"
_AUTHORITIES = {
    "usgovcloudapi.net": "https://login.microsoftonline.us",
    "chinacloudapi.cn": "https://login.chinacloudapi.cn",
}
_KNOWN_AUTHORITY = re.compile(
    r"https://login\.(?:microsoftonline\.(?:com|us)|microsoft\.com|windows\.net"
    r"|chinacloudapi\.cn|partner\.microsoftonline\.cn)/?"
)
_FAR = datetime(9999, 12, 31, tzinfo=UTC)
_TIMEOUT = 30.0
# azure-identity gets a new token so long before the old one expires.
_MARGIN = timedelta(minutes=5)


class Tokens:
    """Bearer tokens for storage, for both drivers: fetched when needed, kept while they last."""

    def __init__(self, config: AzureConfig | None, network: Network, domain: str) -> None:
        """Describe them; nothing is imported or asked.

        Args:
            config: what it leaves out is azure-identity's own chain, variables included.
            network: the way to the authority.
            domain: of the cloud that the account is in.
        """
        self._parts = (config, network, domain)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._credential: Any = None
        self._kept: tuple[str, datetime] | None = None
        self._renewed = 0.0

    def __getstate__(self) -> object:
        return self._parts

    def __setstate__(self, parts: tuple[AzureConfig | None, Network, str]) -> None:
        self.__init__(*parts)  # type: ignore[misc]

    def fetch(self) -> tuple[str, datetime]:
        """Return a token that is valid now, and until when.

        Raises:
            AuthenticationError: nobody gives us one.
        """
        if self._pid != os.getpid():
            # Sockets and locks stayed with the parent.
            self._forget()
        try:
            with self._lock:
                if self._credential is None:
                    self._credential = _credential(*self._parts)
                credential = self._credential
            token = credential.get_token(_SCOPE)
        except StorageError:
            raise
        except Exception as exc:  # azure-identity has no common base for what its sources raise
            raise _refused(exc) from exc
        found = str(token.token), datetime.fromtimestamp(token.expires_on, UTC)
        with self._lock:
            if credential is self._credential:
                self._kept = found
        return found

    def renew(self, begun: float) -> bool:
        """Do without the token that was good until now, because the store refused it.

        Args:
            begun: when the refused request began, by ``time.monotonic``; whoever shares this
                may have a new token since.

        Returns:
            Whether there may be a new one; false for a token that was given.
        """
        config = self._parts[0]
        if config is not None and config.token is not None:
            return False
        with self._lock:
            if self._renewed < begun:
                # Each credential keeps its tokens for itself.
                self._credential = self._kept = None
                self._renewed = time.monotonic()
        return True

    def __call__(self) -> dict[str, Any]:
        """Return a token as obstore wants it."""
        token, expires = self.fetch()
        return {"token": token, "expires_at": None if expires >= _FAR else expires}

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        """Return a token as azure-storage-blob's asynchronous clients want it."""
        from azure.core.credentials import AccessToken

        kept = self._kept
        if kept is None or self._pid != os.getpid() or kept[1] - datetime.now(UTC) < _MARGIN:
            kept = await asyncio.to_thread(self.fetch)
        # Over at once, so that the client asks before each request and keeps none for itself:
        # it would go on with one that the store refused.
        return AccessToken(kept[0], 0)

    def close(self) -> None:
        """Free the connections of the credential. It may be used again."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            credential, self._credential = self._credential, None
            self._kept = None
        close = getattr(credential, "close", None)
        if close is not None:
            close()


def _refused(exc: Exception) -> StorageError:
    if isinstance(exc, ImportError):
        return ConfigurationError(
            f"Entra tokens need the package azure-identity, which is not installed "
            f'({one_line(exc)}); run: pip install "modelstorage[azure]"'
        )
    if isinstance(exc, (ValueError, FileNotFoundError)):
        return ConfigurationError(f"Azure credentials are unusable: {one_line(exc)}")
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(status, int) and (status in (408, 429) or status >= 500):
        return TransientError(f"no Entra token could be obtained for Azure: {one_line(exc)}")
    return AuthenticationError(
        f"no Entra token could be obtained for Azure: {one_line(exc)}; give account_key, "
        "sas_token, connection_string or an identity in an AzureConfig, or "
        "AzureConfig(anonymous=True) for a public container"
    )


@dataclass(frozen=True, slots=True)
class _Token:
    token: str
    expires_on: float


class _FixedToken:
    def __init__(self, token: str) -> None:
        self._token = _Token(token, _FAR.timestamp())

    def get_token(self, scope: str) -> _Token:
        return self._token


class _MetadataToken:
    """Managed-identity tokens of an endpoint that a config names.

    azure-identity finds its endpoints by variables only, and those belong to the whole process.
    """

    def __init__(self, endpoint: str, client_id: str | None, header: str | None) -> None:
        self._endpoint = endpoint
        self._client_id = client_id
        self._header = header
        self._lock = threading.Lock()
        self._kept: _Token | None = None

    def get_token(self, scope: str) -> _Token:
        with self._lock:
            if self._kept is None or self._kept.expires_on < time.time() + 300:
                self._kept = self._ask()
            return self._kept

    def _ask(self) -> _Token:
        import requests

        url = self._endpoint
        if not urlsplit(url).path.strip("/"):
            url = url.rstrip("/") + _METADATA_PATH
        parameters = {"api-version": "2018-02-01", "resource": _RESOURCE}
        headers = {"Metadata": "true"}
        if self._header is not None:
            # App Service, Functions and Container Apps.
            parameters["api-version"] = "2019-08-01"
            headers["X-IDENTITY-HEADER"] = self._header
        if self._client_id is not None:
            parameters["client_id"] = self._client_id
        with requests.Session() as session:
            # It is on this machine or beside it, never behind a proxy.
            session.trust_env = False
            answer = session.get(
                url,
                params=parameters,
                headers=headers,
                timeout=_TIMEOUT,
                allow_redirects=False,
            )
        if answer.status_code == 429 or answer.status_code >= 500:
            raise TransientError(
                f"the managed identity of this machine is not to be had: {redact(url)} answered "
                f"{answer.status_code}; try again",
                retry_after({name.lower(): value for name, value in answer.headers.items()}),
                throttled=answer.status_code in THROTTLED,
            )
        if answer.status_code != 200:
            raise AuthenticationError(
                f"the managed identity of this machine was refused: {redact(url)} answered "
                f"{answer.status_code} {one_line(answer.text, 120)}; check client_id and that "
                "the identity is assigned"
            )
        try:
            found = answer.json()
            expires = found.get("expires_on") or time.time() + float(found["expires_in"])
            return _Token(str(found["access_token"]), float(expires))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise TransientError(
                f"the managed identity of this machine is not to be had: {redact(url)} answered "
                "with something that is no token; try again"
            ) from exc


def _header_for(endpoint: str) -> str | None:
    """Return the secret of the environment for its own endpoint, and for no other."""
    own = os.environ.get("IDENTITY_ENDPOINT")
    if own and urlsplit(own)[:2] != urlsplit(endpoint)[:2]:
        return None
    return os.environ.get("IDENTITY_HEADER")


def _credential(config: AzureConfig | None, network: Network, domain: str) -> Any:
    """Return the credential that a config, else the environment, stands for."""
    if config is not None and config.token is not None:
        return _FixedToken(config.token.get_secret_value())
    # A library is silent unless asked; without a handler warnings would go to stderr.
    logging.getLogger("azure").addHandler(logging.NullHandler())
    tenant = config.tenant_id if config is not None else None
    client = config.client_id if config is not None else None
    arguments = _identity_arguments(config, network, domain)
    if config is not None and config.client_secret is not None:
        tenant = tenant or os.environ.get("AZURE_TENANT_ID")
        client = client or os.environ.get("AZURE_CLIENT_ID")
        if not tenant or not client:
            raise ConfigurationError(
                "AzureConfig: client_secret goes with tenant_id and client_id; give all three"
            )
        from azure.identity import ClientSecretCredential

        secret = config.client_secret.get_secret_value()
        return ClientSecretCredential(tenant, client, secret, **arguments)
    if config is not None and config.federated_token_file is not None:
        from azure.identity import WorkloadIdentityCredential

        return WorkloadIdentityCredential(
            tenant_id=tenant,
            client_id=client,
            token_file_path=config.federated_token_file,
            **arguments,
        )
    if config is not None and config.msi_endpoint is not None:
        return _MetadataToken(config.msi_endpoint, client, _header_for(config.msi_endpoint))
    if config is not None and config.managed_identity:
        from azure.identity import ManagedIdentityCredential

        # Without the proxy: the endpoint is on this machine or beside it.
        return ManagedIdentityCredential(client_id=client)
    from azure.identity import DefaultAzureCredential

    if client is not None:
        arguments |= {"managed_identity_client_id": client, "workload_identity_client_id": client}
    if tenant is not None:
        arguments["workload_identity_tenant_id"] = tenant
    return DefaultAzureCredential(**arguments)


def _identity_arguments(
    config: AzureConfig | None, network: Network, domain: str
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "retry_total": 0,
        "connection_timeout": _TIMEOUT,
        "read_timeout": _TIMEOUT,
    }
    authority = config.authority_host if config is not None else None
    authority = authority or os.environ.get("AZURE_AUTHORITY_HOST") or _AUTHORITIES.get(domain)
    if authority is not None:
        arguments["authority"] = authority
        if not _KNOWN_AUTHORITY.fullmatch(authority):
            # Or it would be asked of Microsoft's cloud whether there is such an authority.
            arguments["disable_instance_discovery"] = True
    if network.proxy is not None:
        arguments["proxies"] = {"http": network.proxy, "https": network.proxy}
    if network.bundle is not None:
        arguments["connection_verify"] = network.bundle
    if not network.verify:
        arguments["connection_verify"] = False
    return arguments
