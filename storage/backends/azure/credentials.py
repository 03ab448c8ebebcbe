"""Which account, at which address, with which credential: the same for both drivers.

What obstore and adlfs would find in the environment by themselves is not left to them, because
they do not look for the same things and would mix them with what a config says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from storage.addresses import azure_account, azure_host
from storage.backends.azure.tokens import Tokens
from storage.backends.network import Network
from storage.errors import ConfigurationError, InvalidInput, StorageError, one_line

if TYPE_CHECKING:
    from storage.config import AzureConfig
    from storage.uri import Location

__all__ = ["Access", "find_access", "may_sign"]

_HOST = re.compile(r"([a-z0-9]{3,24})(?:\.privatelink)?\.(?:blob|dfs)\.core\.([a-z0-9.-]+)")
_EMULATORS = re.compile(r"localhost|[0-9.]+|.*:.*")
# What every Azure emulator answers to; documented, so no secret.
_EMULATOR = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/"
    "K1SZFPTOtr/KBHBeksoGMGw==;BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1"
)
_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
_KEYS = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY")
_ENDPOINTS = ("AZURE_STORAGE_SERVICE_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


@dataclass(frozen=True, slots=True)
class Access:
    """An account, its address and one credential. Without any, requests are anonymous."""

    account: str
    endpoint: str
    """URL of the blob service, without a slash at its end."""

    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)
    """Without its leading ``?``."""

    tokens: Tokens | None = field(default=None, repr=False)

    @property
    def anonymous(self) -> bool:
        """Whether there is no credential."""
        return self.key is None and self.sas is None and self.tokens is None


@dataclass(frozen=True, slots=True)
class _Named:
    """What one source of settings (a config, the environment) says."""

    account: str | None
    endpoint: str | None
    key: str | None = field(repr=False)
    sas: str | None = field(repr=False)
    suffix: str | None = None

    @property
    def cloud(self) -> str | None:
        """Domain of the cloud that is named, if one is."""
        if self.endpoint is not None and (cloud := _cloud_of(self.endpoint)) is not None:
            return cloud
        return self.suffix.removeprefix("core.") if self.suffix is not None else None


def find_access(
    location: Location,
    config: AzureConfig | None,
    network: Network,
    environ: Mapping[str, str] | None = None,
) -> Access:
    """Return how to come to the account that ``location`` is in.

    Args:
        location: a SAS in it is the credential for it.
        config: goes before the environment.
        network: how tokens are fetched.
        environ: the variables; ``os.environ`` if none.

    Raises:
        ConfigurationError: no account is known, or the credential is for another one.
    """
    environ = os.environ if environ is None else environ
    given = _from_config(config)
    ambient = _from_environment(environ)
    account = location.account or given.account or (None if given.endpoint else ambient.account)
    # A variable about another account, or another cloud, is no business of this one.
    fits = ambient.account == account or (ambient.account is None and location.account is None)
    cloud = location.domain or given.cloud
    fits = fits and (cloud is None or ambient.cloud in (None, cloud))
    if not fits:
        ambient = _Named(None, None, None, None)
    endpoint = given.endpoint
    if endpoint is None and (location.account is None or ambient.account is not None):
        endpoint = ambient.endpoint
    if account is None and endpoint is not None:
        account = _account_of(endpoint)
    if account is None:
        raise ConfigurationError(
            f"{location}: no storage account is known; name it in the URI "
            "(abfss://container@account.dfs.core.windows.net/path), in AzureConfig(account_name), "
            "or in AZURE_STORAGE_ACCOUNT"
        )
    if endpoint is None:
        suffix = given.suffix or ambient.suffix or "core.windows.net"
        host = f"{account}.blob.{suffix}"
        if location.domain is not None:
            host = azure_host(account, "blob", location.domain)
        endpoint = f"https://{host}"
    _check_account(location, account, endpoint, given)
    domain = _cloud_of(endpoint) or location.domain or "windows.net"
    key, sas, tokens = _credential(location, config, given, ambient, network, domain)
    if tokens is not None and not endpoint.startswith("https://"):
        raise ConfigurationError(
            f"{location}: a bearer token is sent over https only, not to {endpoint}; use an "
            "endpoint with TLS, or a shared key"
        )
    return Access(account, endpoint, key, sas, tokens)


def may_sign(location: Location, config: AzureConfig | None) -> bool:
    """Tell whether there is, or may be, a credential that makes SAS URLs."""
    try:
        access = find_access(location, config, Network())
    except StorageError:
        return False
    return access.key is not None or access.tokens is not None


def _credential(
    location: Location,
    config: AzureConfig | None,
    given: _Named,
    ambient: _Named,
    network: Network,
    domain: str,
) -> tuple[str | None, str | None, Tokens | None]:
    sas = _sas_of_url(location)
    if sas is not None:
        return None, sas, None
    if config is not None and config.anonymous:
        return None, None, None
    for found in (given, ambient if config is None or not _has_identity(config) else None):
        if found is not None and found.key is not None:
            return found.key, None, None
        if found is not None and found.sas is not None:
            return None, found.sas, None
    return None, None, Tokens(config, network, domain)


def _has_identity(config: AzureConfig) -> bool:
    return (
        bool(config.token or config.client_secret or config.federated_token_file)
        or config.managed_identity
    )


def _sas_of_url(location: Location) -> str | None:
    if location.query is None:
        return None
    fields = {name.lower() for name, _ in parse_qsl(location.query, keep_blank_values=True)}
    if "sig" in fields:
        return location.query.lstrip("?")
    if fields & {"snapshot", "comp", "restype"}:
        raise InvalidInput(
            f"{location}: the URL asks for something other than a blob (a snapshot, or a request "
            "of the service's own); name the blob, and a version by ?versionId="
        )
    return None


def _from_config(config: AzureConfig | None) -> _Named:
    if config is None:
        return _Named(None, None, None, None)
    text = config.connection_string
    if text is not None:
        found = _parse(text.get_secret_value(), "AzureConfig.connection_string")
    else:
        found = _Named(None, None, None, None)
    key = config.account_key.get_secret_value() if config.account_key is not None else None
    sas = config.sas_token.get_secret_value() if config.sas_token is not None else None
    if found.key is not None or found.sas is not None:
        key, sas = found.key, found.sas
    endpoint = config.endpoint_url or found.endpoint
    return _Named(
        config.account_name or found.account,
        _cleaned(endpoint) if endpoint is not None else None,
        key,
        sas.lstrip("?") if sas is not None else None,
        found.suffix,
    )


def _from_environment(environ: Mapping[str, str]) -> _Named:
    text = environ.get("AZURE_STORAGE_CONNECTION_STRING")
    if text:
        return _parse(text, "AZURE_STORAGE_CONNECTION_STRING")
    sas = environ.get("AZURE_STORAGE_SAS_TOKEN") or None
    endpoint = _first(environ, _ENDPOINTS)
    endpoint = _cleaned(endpoint) if endpoint is not None else None
    account = _first(environ, _ACCOUNTS)
    if account is None and endpoint is not None:
        account = _surely_of(endpoint)
    return _Named(
        account,
        endpoint,
        _first(environ, _KEYS),
        sas.lstrip("?") if sas is not None else None,
    )


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _parse(text: str, source: str) -> _Named:
    """Read a connection string, as the portal shows it."""
    pairs = [part.partition("=") for part in text.strip().rstrip(";").split(";")]
    if not all(name.strip() and equals and value for name, equals, value in pairs):
        raise ConfigurationError(
            f"{source}: a connection string is name=value;name=value;…, and this is not; copy it "
            "again from the account's access keys"
        )
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if fields.get("usedevelopmentstorage", "").lower() == "true":
        return _parse(_EMULATOR, source)
    account, suffix = fields.get("accountname"), fields.get("endpointsuffix")
    endpoint = fields.get("blobendpoint")
    if endpoint is None and account is not None and "defaultendpointsprotocol" in fields:
        protocol = fields["defaultendpointsprotocol"]
        endpoint = f"{protocol}://{account}.blob.{suffix or 'core.windows.net'}"
    if endpoint is not None:
        endpoint = _cleaned(endpoint)
        account = account or _account_of(endpoint)
    sas = fields.get("sharedaccesssignature")
    return _Named(
        account,
        endpoint,
        fields.get("accountkey"),
        sas.lstrip("?") if sas is not None else None,
        suffix,
    )


def _cleaned(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"{one_line(endpoint)!r} is not the URL of a blob service; expected "
            "https://ACCOUNT.blob.core.windows.net"
        )
    netloc = parts.netloc.rpartition("@")[2]
    if _of_azure(parts.hostname) is not None:
        netloc = netloc.lower().replace(".dfs.", ".blob.", 1)
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"


def _cloud_of(endpoint: str) -> str | None:
    found = _of_azure(urlsplit(endpoint).hostname or "")
    return found[1] if found is not None else None


def _of_azure(host: str) -> tuple[str, str] | None:
    """Return the account and the cloud (or the DNS zone) of a host of Azure's."""
    if (found := azure_account(host)) is not None:
        return found[0], found[2]
    match = _HOST.fullmatch(host)
    return (match.group(1), match.group(2)) if match is not None else None


def _surely_of(endpoint: str) -> str | None:
    """Return the account of an address that can be no other's, unlike that of a custom domain."""
    parts = urlsplit(endpoint)
    if (found := _of_azure(parts.hostname or "")) is not None:
        return found[0]
    if _EMULATORS.fullmatch(parts.hostname or ""):
        return parts.path.strip("/").partition("/")[0] or None
    return None


def _account_of(endpoint: str) -> str | None:
    parts = urlsplit(endpoint)
    if (account := _surely_of(endpoint)) is not None:
        return account
    # Emulators have the account in the path, other hosts (a custom domain) in their name.
    return parts.path.strip("/").partition("/")[0] or (parts.hostname or "").partition(".")[0]


def _check_account(location: Location, account: str, endpoint: str, given: _Named) -> None:
    """Refuse what would send one account's credential to another."""
    for other in (given.account, _surely_of(endpoint)):
        if other is not None and other != account:
            raise ConfigurationError(
                f"{location} is in the storage account {account!r}, and the config is for "
                f"{other!r}: no credential is sent to another account; pass the right one"
            )
    for cloud in (given.cloud, _cloud_of(endpoint)):
        if cloud is not None and location.domain is not None and cloud != location.domain:
            raise ConfigurationError(
                f"{location} is in the cloud {location.domain}, and the config is for {cloud}; "
                "pass the right one"
            )
