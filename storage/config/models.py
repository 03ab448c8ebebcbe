"""The typed configs: one for each kind of store.

``None`` for any field, as from an unset environment variable, means that it was not given;
what is not given comes from the chain that the store's own clients follow. Fields that hold
secrets are ``SecretStr``: they take plain strings and are never shown.
"""

from __future__ import annotations

from storage.config.base import ConfigModel
from storage.config.object_stores import AzureConfig, GCSConfig, S3Config
from storage.config.other_stores import FsspecConfig, HFConfig, HTTPConfig, PVCConfig
from storage.config.repositories import GitConfig, ModelScopeConfig, OCIConfig

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
    "StorageConfig",
]

StorageConfig = (
    S3Config
    | GCSConfig
    | AzureConfig
    | HFConfig
    | HTTPConfig
    | GitConfig
    | ModelScopeConfig
    | OCIConfig
    | PVCConfig
    | FsspecConfig
)
"""Any of the configs."""
