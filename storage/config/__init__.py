"""How stores are reached: typed configs, settings, and which of them applies to a URI.

The config of a URI is, in this order: the call's ``config=``; the ``[stores]`` entry of the
settings with the longest matching prefix; KServe's ``STORAGE_CONFIG``; none, which leaves the
choice to the store's own SDK (its variables, profiles, roles and metadata services).

Names are loaded on first use, because pydantic takes longer to import than the rest of the
library together. Nothing here writes to ``os.environ``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.config.base import ConfigModel
    from storage.config.kserve import kserve_config
    from storage.config.models import StorageConfig
    from storage.config.object_stores import AzureConfig, GCSConfig, S3Config
    from storage.config.other_stores import FsspecConfig, HFConfig, HTTPConfig, PVCConfig
    from storage.config.repositories import GitConfig, ModelScopeConfig, OCIConfig
    from storage.config.resolve import make_config, resolve_config
    from storage.config.settings import Settings, TransferSettings, load_settings, named_config

__all__ = [
    "AzureConfig",
    "ConfigModel",
    "FsspecConfig",
    "GCSConfig",
    "GitConfig",
    "HFConfig",
    "HTTPConfig",
    "ModelScopeConfig",
    "OCIConfig",
    "PVCConfig",
    "S3Config",
    "Settings",
    "StorageConfig",
    "TransferSettings",
    "kserve_config",
    "load_settings",
    "make_config",
    "named_config",
    "resolve_config",
    "reveal",
]

_MODULES = {
    "AzureConfig": "object_stores",
    "ConfigModel": "base",
    "FsspecConfig": "other_stores",
    "GCSConfig": "object_stores",
    "GitConfig": "repositories",
    "HFConfig": "other_stores",
    "HTTPConfig": "other_stores",
    "ModelScopeConfig": "repositories",
    "OCIConfig": "repositories",
    "PVCConfig": "other_stores",
    "S3Config": "object_stores",
    "Settings": "settings",
    "StorageConfig": "models",
    "TransferSettings": "settings",
    "kserve_config": "kserve",
    "load_settings": "settings",
    "make_config": "resolve",
    "named_config": "settings",
    "resolve_config": "resolve",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def reveal(secret: Any) -> Any:
    """Return what a secret field holds: the value of a ``SecretStr``, anything else as it is.

    The one way from a config to an SDK; its result belongs in no message and no log.
    """
    get = getattr(secret, "get_secret_value", None)
    return secret if get is None else get()
