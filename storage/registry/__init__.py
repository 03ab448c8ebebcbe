"""Versioned models on any store that many writers share, without a server.

    from storage.registry import ModelRegistry

    registry = ModelRegistry("s3://models/registry")
    registry.init()  # once
    version = registry.push("iris", "out/model", metrics={"accuracy": 0.97})
    registry.set_alias("iris", "production", version.number)
    path = registry.pull("iris", "production")

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.registry.aliases import ANY, AliasEntry
    from storage.registry.diff import VersionDiff
    from storage.registry.documents import Attributes, Version, VersionFile
    from storage.registry.gc import Collection
    from storage.registry.leases import Pending
    from storage.registry.publish import PendingVersion
    from storage.registry.pull import fetch_again
    from storage.registry.registry import ModelRegistry
    from storage.registry.watching import RegistryWatcher

_HOME = {
    "ANY": "aliases",
    "AliasEntry": "aliases",
    "Attributes": "documents",
    "Collection": "gc",
    "ModelRegistry": "registry",
    "Pending": "leases",
    "PendingVersion": "publish",
    "RegistryWatcher": "watching",
    "Version": "documents",
    "VersionDiff": "diff",
    "VersionFile": "documents",
    "fetch_again": "pull",
}

__all__ = [
    "ANY",
    "AliasEntry",
    "Attributes",
    "Collection",
    "ModelRegistry",
    "Pending",
    "PendingVersion",
    "RegistryWatcher",
    "Version",
    "VersionDiff",
    "VersionFile",
    "fetch_again",
]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
