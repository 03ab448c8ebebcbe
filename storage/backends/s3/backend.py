"""S3 and what speaks its protocol: one config, the arguments of both drivers side by side.

``obstore`` moves the bytes; ``s3fs`` is the second, complete driver. ``driver="fsspec"`` in
the config chooses s3fs for everything.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from storage.addresses import endpoint_fault
from storage.backends.base import Backend, Capabilities, OpenOptions
from storage.backends.network import Network, with_timeouts
from storage.backends.s3.answers import from_code
from storage.errors import AuthenticationError, ConfigurationError, one_line

if TYPE_CHECKING:
    from storage.backends.s3.signed import Refusal, SignedClient
    from storage.config import S3Config
    from storage.uri import Location

__all__ = ["obstore_arguments", "open_backend", "s3fs_arguments"]

_COPY_LIMIT = 5 * 1024**3
_AMAZON = re.compile(
    r"https?://s3(-[a-z0-9-]+)?(\.dualstack)?(\.[a-z0-9-]+)?\.amazonaws\.com(\.cn)?", re.IGNORECASE
)
_AMAZON_GLOBAL = re.compile(r"(https?)://s3\.amazonaws\.com", re.IGNORECASE)
_CREDENTIALS_TTL = timedelta(minutes=10)
_CAPABILITIES = Capabilities(copy_across=True, if_match=True, sign=True, checksums=True)


def open_backend(location: Location, config: S3Config | None, options: OpenOptions) -> Backend:
    """Return a backend for the bucket of ``location``; inert."""
    bucket = location.bucket
    uri = f"s3://{bucket}/"
    copy_limit = config.copy_part_limit if config is not None else _COPY_LIMIT
    options = with_timeouts(options, config)
    checksum = _upload_checksum(config)

    @functools.cache
    def client(options: OpenOptions, refusal: Refusal = from_code) -> SignedClient:
        from storage.backends.s3.signed import SignedClient

        arguments = obstore_arguments(bucket, config, options)
        return SignedClient(bucket, arguments, _network(config), options, refusal)

    def second() -> Backend:
        from storage.backends.s3.fsspec import S3FsspecBackend

        return S3FsspecBackend(
            bucket,
            s3fs_arguments(config),
            options,
            copy_limit=copy_limit,
            checksum=checksum,
            client=client,
        )

    if config is not None and config.driver == "fsspec":
        return second()
    from storage.backends.s3.obstore import S3ObstoreBackend

    signed_with: dict[str, Any] = {}

    def make_store() -> Any:
        try:
            from obstore.store import S3Store
        except ImportError as exc:
            raise ConfigurationError(
                "S3 needs the package obstore, which is not installed; "
                'run: pip install "modelstorage[s3]"'
            ) from exc
        arguments = obstore_arguments(bucket, config, options)
        if provider := arguments.get("credential_provider"):
            # What fails in here keeps its own error; obstore would wrap it.
            signed_with.update(provider())
        return S3Store(bucket, **arguments)

    def renewed() -> bool:
        provider = obstore_arguments(bucket, config, options).get("credential_provider")
        if provider is None or not signed_with:
            return False
        found = provider()
        client.cache_clear()
        return any(
            found[name] != signed_with[name]
            for name in ("access_key_id", "secret_access_key", "token")
        )

    return S3ObstoreBackend(
        uri,
        make_store,
        options,
        _CAPABILITIES,
        second,
        copy_limit,
        client,
        renewed,
        checksum=checksum,
    )


def obstore_arguments(bucket: str, config: S3Config | None, options: OpenOptions) -> dict[str, Any]:
    """Return what ``obstore.store.S3Store`` gets beside the bucket.

    Credentials always go through a provider: given as plain arguments they would be mixed
    with those of the environment (a session token of another account, for one).
    """
    endpoint = _endpoint(config)
    arguments: dict[str, Any] = {
        **_network(config).obstore_arguments(
            options, allow_http=endpoint is not None and endpoint.startswith("http://")
        ),
        "region": _region(config),
        "skip_signature": bool(config is not None and config.anonymous),
    }
    style = config.addressing_style if config is not None else "auto"
    if style == "auto":
        # A certificate of Amazon's is for one label; other stores may have no names of buckets.
        style = "virtual" if _is_amazon(endpoint) and "." not in bucket else "path"
    if endpoint is not None:
        if style == "virtual":
            scheme, _, host = endpoint.partition("://")
            endpoint = f"{scheme}://{bucket}.{host}"
        # The second name wins over the first one, also when it comes from the environment.
        arguments["endpoint"] = arguments["aws_endpoint_url_s3"] = endpoint
    arguments["virtual_hosted_style_request"] = style == "virtual"
    if not arguments["skip_signature"]:
        arguments["credential_provider"] = _credential_provider(config)
    if config is not None and config.requester_pays:
        arguments["request_payer"] = True
    checksum = _upload_checksum(config)
    if checksum in ("sha256", "crc64nvme"):
        arguments["checksum_algorithm"] = checksum.upper()
    return arguments


def s3fs_arguments(config: S3Config | None) -> dict[str, Any]:
    """Return what ``s3fs.S3FileSystem`` gets; the driver adds time-outs and pool sizes.

    Two are for the session that the driver makes: ``credential_provider``, as obstore's, and
    ``metadata_endpoint``.
    """
    client: dict[str, Any] = {"region_name": _region(config)}
    botocore: dict[str, Any] = {}
    arguments: dict[str, Any] = {
        "client_kwargs": client,
        "config_kwargs": botocore,
        "skip_instance_cache": True,
        "use_listings_cache": False,
    }
    endpoint = _endpoint(config)
    if endpoint is not None:
        arguments["endpoint_url"] = endpoint
    network = _network(config)
    if not network.verify:
        client["verify"] = False
    elif network.bundle is not None:
        client["verify"] = network.bundle
    if config is None:
        return arguments
    if config.anonymous:
        arguments["anon"] = True
    elif config.access_key_id is not None and config.role_arn is None:
        arguments["key"] = config.access_key_id
        if config.secret_access_key is not None:
            arguments["secret"] = config.secret_access_key.get_secret_value()
        if config.session_token is not None:
            arguments["token"] = config.session_token.get_secret_value()
    elif config.role_arn is not None:
        arguments["credential_provider"] = _credential_provider(config)
    elif config.profile is not None:
        arguments["profile"] = config.profile
    elif config.metadata_endpoint is not None:
        arguments["metadata_endpoint"] = config.metadata_endpoint
    if config.requester_pays:
        arguments["requester_pays"] = True
    if network.proxy is not None:
        botocore["proxies"] = {"http": network.proxy, "https": network.proxy}
    s3: dict[str, Any] = {}
    if config.addressing_style != "auto":
        s3["addressing_style"] = config.addressing_style
    if config.use_accelerate:
        s3["use_accelerate_endpoint"] = True
    if s3:
        botocore["s3"] = s3
    return arguments


def _region(config: S3Config | None) -> str:
    if config is not None and config.explicit("region"):
        return config.region
    ambient = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return ambient or (config.region if config is not None else "us-east-1")


def _endpoint(config: S3Config | None) -> str | None:
    named = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")}
    if config is not None:
        named = {"endpoint_url": config.endpoint_url, **named}
    origin, endpoint = next(((name, url) for name, url in named.items() if url), ("", None))
    use_ssl = config is None or config.use_ssl
    if endpoint is None:
        if config is not None and config.use_accelerate:
            return f"http{'s' if use_ssl else ''}://s3-accelerate.amazonaws.com"
        return None if use_ssl else f"http://s3.{_region(config)}.amazonaws.com"
    if "://" not in endpoint:
        endpoint = f"http{'s' if use_ssl else ''}://{endpoint}"
    fault = endpoint_fault(endpoint)
    if fault is not None:
        raise ConfigurationError(f"{origin}: {fault}; it is {one_line(repr(endpoint), 80)}")
    endpoint = endpoint.rstrip("/")
    known = _AMAZON_GLOBAL.fullmatch(endpoint)
    if known and _region(config) != "us-east-1":
        # It answers for one region and redirects from all the others.
        return f"{known[1]}://s3.{_region(config)}.amazonaws.com"
    return endpoint


def _is_amazon(endpoint: str | None) -> bool:
    return endpoint is None or _AMAZON.fullmatch(endpoint) is not None


def _upload_checksum(config: S3Config | None) -> str:
    chosen = config.upload_checksum if config is not None else "auto"
    if chosen != "auto":
        return chosen
    # Stores other than AWS's have known the one for longer than the other.
    return "crc64nvme" if _is_amazon(_endpoint(config)) else "sha256"


def _network(config: S3Config | None) -> Network:
    return Network.of(config, "AWS_CA_BUNDLE")


def _credential_provider(config: S3Config | None) -> Callable[[], dict[str, Any]]:
    if config is not None and config.role_arn is None:
        key, secret, token = (
            config.access_key_id,
            config.secret_access_key,
            config.session_token,
        )
        if key is not None and secret is not None:
            return _fixed(
                key,
                secret.get_secret_value(),
                token.get_secret_value() if token is not None else None,
            )
    profile = config.profile if config is not None else None
    if profile is None and (config is None or config.role_arn is None):
        # The common case of the chain, without the second that botocore takes to import.
        key = os.environ.get("AWS_ACCESS_KEY_ID")
        secret_text = os.environ.get("AWS_SECRET_ACCESS_KEY")
        if key and secret_text and not os.environ.get("AWS_PROFILE"):
            return _fixed(key, secret_text, os.environ.get("AWS_SESSION_TOKEN"))
    return _BotocoreCredentials(config)


def _fixed(key: str, secret: str, token: str | None) -> Callable[[], dict[str, Any]]:
    credentials = {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": token or None,
        "expires_at": None,
    }
    return lambda: credentials


class _BotocoreCredentials:
    """AWS's own chain: profile, SSO, process, web identity, container and instance metadata."""

    def __init__(self, config: S3Config | None) -> None:
        self._config = config
        self._session: Any = None

    def __call__(self) -> dict[str, Any]:
        try:
            return self._role() if self._config and self._config.role_arn else self._chain()
        except AuthenticationError:
            raise
        except Exception as exc:  # botocore has no common base for what its sources raise
            raise AuthenticationError(
                f"S3 credentials could not be obtained: {one_line(exc)}"
            ) from exc

    def _chain(self) -> dict[str, Any]:
        credentials = self._botocore_session().get_credentials()
        if credentials is None:
            raise AuthenticationError(
                "no S3 credentials were found: expected access_key_id and secret_access_key in "
                "an S3Config, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an "
                "instance role; for a public bucket use S3Config(anonymous=True)"
            )
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_TTL,
        }

    def _role(self) -> dict[str, Any]:
        config = self._config
        assert config is not None
        request: dict[str, Any] = {
            "RoleArn": config.role_arn,
            "RoleSessionName": config.role_session_name or "modelstorage",
        }
        if config.external_id is not None:
            request["ExternalId"] = config.external_id
        from botocore.config import Config

        network = _network(config)
        proxy = network.proxy
        client = self._botocore_session().create_client(
            "sts",
            region_name=_region(config),
            verify=network.bundle if network.verify else False,
            config=Config(proxies={"http": proxy, "https": proxy} if proxy else None),
        )
        answer = client.assume_role(**request)["Credentials"]
        return {
            "access_key_id": answer["AccessKeyId"],
            "secret_access_key": answer["SecretAccessKey"],
            "token": answer["SessionToken"],
            # obstore takes no other time zone than this object.
            "expires_at": answer["Expiration"].astimezone(UTC),
        }

    def _botocore_session(self) -> Any:
        if self._session is None:
            import botocore.session

            config = self._config
            session = botocore.session.Session(profile=config.profile if config else None)
            if config is not None and config.metadata_endpoint is not None:
                session.set_config_variable(
                    "ec2_metadata_service_endpoint", config.metadata_endpoint
                )
            if config is not None and config.access_key_id and config.secret_access_key:
                token = config.session_token
                session.set_credentials(
                    config.access_key_id,
                    config.secret_access_key.get_secret_value(),
                    token.get_secret_value() if token is not None else None,
                )
            self._session = session
        return self._session
