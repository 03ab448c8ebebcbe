"""Sessions of botocore for s3fs that do not read the same files again for every client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = ["PLAIN_ARGUMENTS", "new_session"]

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
