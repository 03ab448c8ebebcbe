"""Google Cloud Storage: one config, the arguments of both drivers side by side.

``obstore`` moves the bytes; ``gcsfs`` is the second, complete driver. ``driver="fsspec"`` in the
config chooses gcsfs for everything. Both take their bearer tokens from one place, google-auth.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.backends.base import Backend, OpenOptions
from storage.backends.network import Network, with_timeouts
from storage.errors import ConfigurationError

if TYPE_CHECKING:
    from storage.backends.gcs.auth import TokenSource
    from storage.backends.gcs.json_api import JsonApi
    from storage.backends.gcs.sign import Signer
    from storage.config import GCSConfig
    from storage.uri import Location

__all__ = ["gcsfs_arguments", "obstore_arguments", "open_backend", "tls_context"]


def open_backend(location: Location, config: GCSConfig | None, options: OpenOptions) -> Backend:
    """Return a backend for the bucket of ``location``; inert."""
    bucket = location.bucket
    options = with_timeouts(options, config)
    signer = _signer(bucket, config)
    # One for all that is made of this config, so that a token is asked for once.
    tokens = functools.cache(lambda: _tokens(config, options))

    def second() -> Backend:
        from storage.backends.gcs.fsspec import GcsFsspecBackend

        return GcsFsspecBackend(
            bucket,
            lambda: gcsfs_arguments(config, options, tokens),
            options,
            tls=lambda: tls_context(config),
            signer=signer,
        )

    if config is not None and config.driver == "fsspec":
        return second()
    from storage.backends.gcs.obstore import GcsObstoreBackend

    def json_api() -> JsonApi:
        from storage.backends.gcs.json_api import JsonApi

        return JsonApi(
            bucket,
            _endpoint(config),
            None if _anonymous(config) else tokens(),
            Network.of(config),
            options,
            _paying_project(config),
        )

    return GcsObstoreBackend(
        bucket,
        lambda: obstore_arguments(config, options, tokens),
        options,
        second,
        signer,
        json_api,
        lambda begun: not _anonymous(config) and tokens().renew(begun),
        reads_only=_reads_only(config),
    )


def obstore_arguments(
    config: GCSConfig | None,
    options: OpenOptions,
    tokens: Callable[[], TokenSource] | None = None,
) -> dict[str, Any]:
    """Return what ``obstore.store.GCSStore`` gets beside the bucket; ``tokens`` gives its tokens.

    Credentials always go through a provider: obstore's own chain knows neither federation nor
    impersonation, and given as plain arguments they would be mixed with the environment's.
    """
    endpoint = _endpoint(config)
    arguments: dict[str, Any] = {
        **Network.of(config).obstore_arguments(options, allow_http=endpoint.startswith("http://")),
        "base_url": endpoint,
        "skip_signature": _anonymous(config),
    }
    if _anonymous(config):
        # Never asked. Without one obstore reads the files that the environment names, and fails
        # on those of federation.
        arguments["credential_provider"] = _nobody
    else:
        arguments["credential_provider"] = _Provider(
            tokens() if tokens else _tokens(config, options)
        )
    if project := _paying_project(config):
        arguments["client_options"]["default_headers"] = {"x-goog-user-project": project}
    return arguments


def gcsfs_arguments(
    config: GCSConfig | None,
    options: OpenOptions,
    tokens: Callable[[], TokenSource] | None = None,
) -> dict[str, Any]:
    """Return what ``gcsfs.GCSFileSystem`` gets; the driver adds time-outs and TLS."""
    endpoint = _endpoint(config)
    arguments: dict[str, Any] = {
        "endpoint_url": endpoint,
        "project": _project(config) or "",
        "token": "anon",
        "use_listings_cache": False,
        "skip_instance_cache": True,
    }
    if not _anonymous(config):
        from storage.backends.gcs.auth import SharedCredentials

        source = tokens() if tokens else _tokens(config, options)
        arguments["token"] = SharedCredentials(source)
    if project := _paying_project(config):
        arguments["requester_pays"] = project
    if proxy := _proxy(config, endpoint):
        arguments["session_kwargs"] = {"proxy": proxy}
    return arguments


def tls_context(config: GCSConfig | None) -> Any:
    """Return aiohttp's TLS setting: a context, false for no check, ``None`` for the usual."""
    network = Network.of(config)
    if not network.verify:
        return False
    bundle = network.read_bundle()
    if bundle is None:
        return None
    import ssl

    context = ssl.create_default_context()
    try:
        context.load_verify_locations(cadata=bundle.decode())
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigurationError(
            f"the CA bundle {network.bundle} cannot be used: PEM certificates are expected in it"
        ) from exc
    return context


def _endpoint(config: GCSConfig | None) -> str:
    if config is not None and config.endpoint_url is not None:
        return config.endpoint_url.rstrip("/")
    emulator = _emulator()
    if emulator is not None:
        return emulator
    universe = os.environ.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN") or "googleapis.com"
    return f"https://storage.{universe}"


def _emulator() -> str | None:
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host or host == "default":
        return None
    return (host if "://" in host else f"http://{host}").rstrip("/")


def _anonymous(config: GCSConfig | None) -> bool:
    if config is not None:
        if config.anonymous:
            return True
        if config.token or config.service_account_key or config.impersonate_service_account:
            return False
        if config.endpoint_url is not None:
            return False
    # As Google's own client: an emulator gets no credentials but those made for it.
    return _emulator() is not None


def _reads_only(config: GCSConfig | None) -> bool:
    """Tell whether obstore is to change nothing in the store.

    It does not write without credentials. It writes by the XML API, which Google's own service
    has but emulators often lack; there the choice is left to who names the driver.
    """
    if _anonymous(config):
        return True
    host = urlsplit(_endpoint(config)).hostname or ""
    universe = os.environ.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN") or "googleapis.com"
    chosen = config is not None and config.driver is not None
    return not (chosen or host.endswith((f".{universe}", ".googleapis.com")))


def _tokens(config: GCSConfig | None, options: OpenOptions) -> TokenSource:
    from storage.backends.gcs.auth import TokenSource

    network = Network.of(config)
    verify = network.bundle if network.verify else False
    if config is None:
        return TokenSource(verify=verify, timeout=options.stall_timeout)
    token = config.token.get_secret_value() if config.token is not None else None
    return TokenSource(
        None if token else config.service_account_json,
        None if token else config.service_account_file,
        config.impersonate_service_account,
        token=token,
        proxy=network.proxy,
        verify=verify,
        timeout=options.stall_timeout,
    )


def _nobody() -> dict[str, str | datetime | None]:
    return {"token": "", "expires_at": None}


class _Provider:
    """A token source as obstore asks for it."""

    def __init__(self, tokens: TokenSource) -> None:
        self._tokens = tokens

    def __call__(self) -> dict[str, str | datetime | None]:
        token, expiry = self._tokens()
        return {"token": token, "expires_at": expiry}


def _project(config: GCSConfig | None) -> str | None:
    if config is not None and config.project_id is not None:
        return config.project_id
    named = os.environ.get("GOOGLE_CLOUD_PROJECT") or os.environ.get("GCLOUD_PROJECT")
    if named or config is None or config.service_account_json is None:
        return named or None
    found = json.loads(config.service_account_json).get("project_id")
    return found if isinstance(found, str) else None


def _paying_project(config: GCSConfig | None) -> str | None:
    if config is None or not config.requester_pays:
        return None
    project = _project(config)
    if project is None:
        raise ConfigurationError(
            "requester_pays needs to know who pays; set project_id in the GCSConfig, or "
            "GOOGLE_CLOUD_PROJECT"
        )
    return project


def _proxy(config: GCSConfig | None, endpoint: str) -> str | None:
    """Return the proxy on the way to ``endpoint``; aiohttp looks at no variables by itself."""
    if (given := Network.of(config).proxy) is not None:
        return given
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(endpoint)
    proxies = getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or proxy_bypass(parts.netloc):
        return None
    return found if "://" in found else f"http://{found}"


def _signer(bucket: str, config: GCSConfig | None) -> Signer:
    from storage.backends.gcs.sign import Signer

    def key() -> str | None:
        if config is None or config.anonymous or config.token is not None:
            return None
        if config.impersonate_service_account is not None:
            return None
        if config.service_account_file is None:
            return config.service_account_json
        with open(config.service_account_file, encoding="utf-8") as file:
            return file.read()

    return Signer(bucket, lambda: _endpoint(config), key)
