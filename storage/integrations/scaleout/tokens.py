"""The token of a client, as the stores know tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from storage.config import reveal
from storage.config.resolve import config_class

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.uri import Location

__all__ = ["access_token", "with_token"]

_log = logging.getLogger(__name__)

_FIELD = "token"


def with_token(client: StorageClient, location: Location, config: Any, token: str | None) -> Any:
    """Return the config for a store that is asked with ``token``.

    Args:
        client: knows the config that applies without it.
        location: in that store.
        config: what the runtime was given.
        token: ``None`` changes nothing. A store that knows no tokens is asked without it.

    Raises:
        ConfigurationError: the config is unusable.
    """
    if token is None:
        return config
    applies = client.resolve_config(location, config)
    kind: Any = config_class(location.type) if applies is None else type(applies)
    if kind is None or _FIELD not in kind.model_fields:
        _log.warning("%s takes no token; the client's is kept and not used", location)
        return config
    told = kind(token=token)
    return told if applies is None else applies.model_copy(update={_FIELD: told.token})


def access_token(client: StorageClient, location: Location, config: Any) -> str | None:
    """Return the token that a store is asked with, if its config has one.

    Raises:
        ConfigurationError: the config is unusable.
    """
    secret = getattr(client.resolve_config(location, config), _FIELD, None)
    return None if secret is None else str(reveal(secret))
