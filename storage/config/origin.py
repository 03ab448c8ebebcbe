"""Which of several stores of one kind a URI means: its endpoint and account, if not the usual."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

from storage.errors import redact
from storage.uri import Location

__all__ = ["origin_of"]

# Those that each store's backend follows where a config says nothing; the first one counts.
_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "azure": (
        "AZURE_STORAGE_SERVICE_ENDPOINT",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_STORAGE_ACCOUNT",
        "AZURE_STORAGE_ACCOUNT_NAME",
    ),
    "hf": ("HF_ENDPOINT",),
    "modelscope": ("MODELSCOPE_ENDPOINT",),
}
# What the connection string of a storage account says beside its secrets.
_PUBLIC = re.compile(
    r"(?:^|;)\s*(?:AccountName|BlobEndpoint|FileEndpoint|EndpointSuffix)\s*=\s*([^;?]+)",
    re.IGNORECASE,
)


def origin_of(location: Location, config: Any) -> str:
    """Return what tells a store from others with the same URIs; empty for the usual one.

    Args:
        location: what is asked for.
        config: the config that applies to it, if any.

    Returns:
        Text that holds no secret.
    """
    if location.scheme == "pvc":
        return "" if config is None else str(config.folder(location.bucket))
    if location.scheme == "oci" and config is not None:
        # The same name gives other files for another platform, or from another folder.
        chosen = [name for name in ("platform", "model_folder") if config.explicit(name)]
        return " ".join(f"{name}={getattr(config, name)}" for name in chosen)
    if getattr(config, "uri_type", "") == "*":
        # Any option may say which store it is, and any may be a secret.
        options = sorted(config.options.get_secret_value().items())
        digest = hashlib.sha256(ascii(options).encode()).hexdigest()
        return f"options {digest[:32]}" if options else ""
    named = [getattr(config, name, None) for name in ("endpoint_url", "endpoint", "account")]
    secret = getattr(config, "connection_string", None)
    if secret is not None:
        named += _PUBLIC.findall(secret.get_secret_value())
    if not any(named) and location.type == "azure":
        named = _PUBLIC.findall(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    if not any(named):
        variables = map(os.environ.get, _VARIABLES.get(location.type, ()))
        named = [next(filter(None, variables), None)]
    return " ".join(redact(str(text)).strip().rstrip("/") for text in named if text)
