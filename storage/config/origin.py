"""Which of several stores of one kind a URI means: its endpoint and account, if not the usual."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["origin_of"]

# Those that each store's backend follows where a config says nothing.
_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "azure": ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"),
    "hf": ("HF_ENDPOINT",),
}


def origin_of(kind: str, config: Any) -> str:
    """Return what tells a store from others with the same URIs; empty for the usual one.

    Args:
        kind: type of the URI.
        config: the config that applies to it, if any.
    """
    named = [getattr(config, name, None) for name in ("endpoint_url", "endpoint", "account")]
    if not any(named):
        named = [next(filter(None, map(os.environ.get, _VARIABLES.get(kind, ()))), None)]
    return " ".join(str(text).rstrip("/") for text in named if text)
