"""Azure Blob Storage: one config, the arguments of both drivers side by side.

``obstore`` moves the bytes; ``adlfs`` is the second, complete driver. ``driver="fsspec"`` in
the config chooses adlfs for everything.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from storage.addresses import azure_host
from storage.backends.azure.credentials import Access, find_access, may_sign
from storage.backends.base import Backend, Capabilities, OpenOptions
from storage.backends.network import Network, with_timeouts
from storage.errors import ConfigurationError

if TYPE_CHECKING:
    from storage.config import AzureConfig
    from storage.uri import Location

__all__ = ["adlfs_arguments", "obstore_arguments", "open_backend"]


def open_backend(location: Location, config: AzureConfig | None, options: OpenOptions) -> Backend:
    """Return a backend for the container of ``location``; inert."""
    uri = f"azure://{location.bucket}/"
    if location.account is not None:
        host = azure_host(location.account, "blob", location.domain)
        uri = f"https://{host}/{location.bucket}/"
    options = with_timeouts(options, config)
    signs = may_sign(location, config)

    @cache
    def access() -> Access:
        return find_access(location, config, Network.of(config))

    def second() -> Backend:
        from storage.backends.azure.fsspec import AzureFsspecBackend

        return AzureFsspecBackend(
            location.bucket,
            access,
            lambda: adlfs_arguments(location, config, access()),
            lambda: Network.of(config),
            options,
            signs=signs,
            uri=uri,
        )

    if config is not None and config.driver == "fsspec":
        return second()
    from storage.backends.azure.obstore import AzureObstoreBackend

    def make_store() -> Any:
        try:
            from obstore.store import AzureStore
        except ImportError as exc:
            raise ConfigurationError(
                "Azure needs the package obstore, which is not installed; "
                'run: pip install "modelstorage[azure]"'
            ) from exc
        arguments = obstore_arguments(location, config, options, access())
        if provider := arguments.get("credential_provider"):
            provider()  # what fails in here keeps its own error; obstore would wrap it
        return AzureStore(location.bucket, **arguments)

    capabilities = Capabilities(copy_across=True, if_match=True, sign=signs)
    return AzureObstoreBackend(uri, make_store, options, capabilities, second, access)


def obstore_arguments(
    location: Location,
    config: AzureConfig | None,
    options: OpenOptions,
    access: Access | None = None,
) -> dict[str, Any]:
    """Return what ``obstore.store.AzureStore`` gets beside the container.

    Credentials always go through a provider, and what obstore would read from the environment
    is given, so that nothing of it is mixed with a config.
    """
    network = Network.of(config)
    access = access or find_access(location, config, network)
    arguments: dict[str, Any] = {
        **network.obstore_arguments(options, allow_http=access.endpoint.startswith("http://")),
        "account_name": access.account,
        "endpoint": access.endpoint,
        "skip_signature": access.anonymous,
        "credential_type": "auto",
        "use_emulator": False,
        "use_fabric_endpoint": False,
        "use_azure_cli": False,
    }
    if not access.anonymous:
        arguments["credential_provider"] = _provider(access)
    return arguments


def _provider(access: Access) -> Any:
    if access.tokens is not None:
        return access.tokens
    found: dict[str, Any] = {"expires_at": None}
    if access.key is not None:
        found["access_key"] = access.key
    else:
        found["sas_token"] = access.sas
    return lambda: found


def adlfs_arguments(
    location: Location, config: AzureConfig | None, access: Access | None = None
) -> dict[str, Any]:
    """Return what ``adlfs.AzureBlobFileSystem`` gets."""
    access = access or find_access(location, config, Network.of(config))
    scheme, _, host = access.endpoint.partition("://")
    arguments: dict[str, Any] = {
        "account_name": access.account,
        "skip_instance_cache": True,
        "use_listings_cache": False,
        "anon": access.anonymous,
        "account_host": host,
    }
    # A connection string goes before all else with adlfs, one in the environment included, and
    # only such a one can name an address without TLS.
    parts = {
        "DefaultEndpointsProtocol": scheme,
        "AccountName": access.account,
        "BlobEndpoint": access.endpoint,
    }
    if access.tokens is not None:
        arguments["credential"] = access.tokens
        return arguments
    if access.key is not None:
        parts["AccountKey"] = arguments["account_key"] = access.key
    elif access.sas is not None:
        parts["SharedAccessSignature"] = arguments["sas_token"] = access.sas
    text = ";".join(f"{name}={value}" for name, value in parts.items())
    arguments["connection_string"] = text
    return arguments
