"""Sessions of botocore for s3fs that do not read the same files again for every client."""

from __future__ import annotations

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


def new_session() -> Any:
    """Return a session of its own, which shares only the descriptions of AWS's services.

    Reading them takes most of the time that a client takes to make.
    """
    global _loader
    from aiobotocore.session import AioSession

    session = AioSession()
    if _loader is None:
        _loader = session.get_component("data_loader")
    else:
        session.register_component("data_loader", _loader)
    return session
