"""Sessions and settings of botocore for s3fs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_parts import send_once

__all__ = ["PLAIN_ARGUMENTS", "client_config", "new_session", "sending_once"]

PLAIN_ARGUMENTS = frozenset(
    (
        "anon",
        "client_kwargs",
        "config_kwargs",
        "endpoint_url",
        "key",
        "requester_pays",
        "secret",
        "skip_instance_cache",
        "token",
        "use_listings_cache",
    )
)
"""Arguments of s3fs that do not concern its session. With a session given, s3fs ignores all
that it does not know, so one that is misspelt must not meet a session."""

_loader: Any = None


def client_config(bucket: str, options: OpenOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``botocore.config.Config`` for a client of ``bucket``.

    Args:
        bucket: its name.
        options: connections, time-outs.
        given: what the user's config says; it goes first where it can.
    """
    config: dict[str, Any] = {
        "connect_timeout": options.connect_timeout,
        "read_timeout": options.stall_timeout,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **given,
        # Twice what the engine uses, because a thread that writes what it reads from the
        # same bucket holds two connections and must not wait for the second for ever.
        "max_pool_connections": 2 * options.connections,
        # One call is one attempt; the transfer layer repeats.
        "retries": {"total_max_attempts": 1, "mode": "standard"},
    }
    if not bucket.endswith("--x-s3"):
        # Or presigned URLs are of version 2 in some regions. Express buckets sign their way.
        config.setdefault("signature_version", "s3v4")
    return config


def sending_once() -> dict[str, Any]:
    """Return the argument of ``AioConfig`` by which no PUT is sent again behind our back.

    An older aiobotocore has no such argument, and this returns nothing.
    """
    from inspect import signature

    from aiobotocore.config import AioConfig
    from aiobotocore.httpsession import AIOHTTPSession

    if "http_session_cls" not in signature(AioConfig.__init__).parameters or not hasattr(
        AIOHTTPSession, "_get_session"
    ):
        return {}

    class SendingOnce(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: Any) -> Any:
            session = await super()._get_session(proxy_url)
            send_once(session)
            return session

    return {"http_session_cls": SendingOnce}


def new_session(
    credential_provider: Callable[[], dict[str, Any]] | None = None,
    metadata_endpoint: str | None = None,
) -> Any:
    """Return a session of its own, which shares only the descriptions of AWS's services.

    Reading them takes most of the time that a client takes to make.

    Args:
        credential_provider: gives credentials instead of AWS's chain, as obstore asks for
            them; asked again when they run out.
        metadata_endpoint: URL of the instance metadata service.
    """
    global _loader
    from aiobotocore.session import AioSession

    session = AioSession()
    if metadata_endpoint is not None:
        session.set_config_variable("ec2_metadata_service_endpoint", metadata_endpoint)
    if credential_provider is not None:
        session._credentials = _refreshable(credential_provider)
    if _loader is None:
        _loader = session.get_component("data_loader")
    else:
        session.register_component("data_loader", _loader)
    return session


async def presigned(fs: Any, operation: str, parameters: Mapping[str, str], expires: int) -> str:
    """Return a URL that lets its holder do ``operation`` for ``expires`` seconds."""
    await fs.set_session()
    client = await fs.get_s3(parameters["Bucket"])
    url: str = await client.generate_presigned_url(operation, Params=parameters, ExpiresIn=expires)
    return url


def _refreshable(provider: Callable[[], dict[str, Any]]) -> Any:
    from aiobotocore.credentials import AioDeferredRefreshableCredentials

    async def refresh() -> dict[str, str]:
        found = await asyncio.to_thread(provider)
        return {
            "access_key": found["access_key_id"],
            "secret_key": found["secret_access_key"],
            "token": found["token"],
            "expiry_time": found["expires_at"].isoformat(),
        }

    return AioDeferredRefreshableCredentials(refresh, "modelstorage")
