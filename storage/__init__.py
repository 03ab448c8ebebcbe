"""Move models between any store and the place where they run, whole and verified.

    from storage import Storage

    path = Storage.download("s3://models/iris/v3/", "/mnt/models")

Names are loaded on first use: importing this package loads no SDK and touches nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.client import StorageClient
    from storage.client.lockfile import LockedFile, LockedModel, LockFile
    from storage.client.mirror.options import MirrorFailure, MirrorResult
    from storage.client.prefetch import PrefetchResult
    from storage.client.signatures import SignaturePolicy
    from storage.client.watched import WatchedModel
    from storage.client.watcher import ModelWatcher
    from storage.config import (
        AzureConfig,
        FsspecConfig,
        GCSConfig,
        GitConfig,
        HFConfig,
        HTTPConfig,
        ModelScopeConfig,
        OCIConfig,
        PVCConfig,
        S3Config,
        Settings,
    )
    from storage.digest import Digest, tree_digest
    from storage.errors import (
        AuthenticationError,
        BucketMissingError,
        ConfigurationError,
        DestinationError,
        InferenceError,
        InsufficientSpaceError,
        IntegrityError,
        InvalidInput,
        MirrorError,
        ModelMissingError,
        ModelNotFound,
        ObjectChangedError,
        ObjectExistsError,
        OfflineError,
        SignatureError,
        StorageError,
        TransferError,
        UnreachableError,
        UnsupportedOperation,
        UnsupportedScheme,
    )
    from storage.facade import (
        AUTHENTICATION_METHODS,
        LocalPath,
        Storage,
        StorageConfig,
        StorageURI,
    )
    from storage.operations import ObjectList, StorageMetadata, StorageOperations
    from storage.transfer.plan import Plan
    from storage.transfer.progress import Progress
    from storage.uri import (
        AZURE_URI_FORMAT,
        GCS_URI_FORMAT,
        HF_URI_FORMAT,
        HTTP_URI_FORMAT,
        LOCAL_URI_FORMAT,
        OCI_URI_FORMAT,
        PVC_URI_FORMAT,
        S3_URI_FORMAT,
        SUPPORTED_PROTOCOLS,
    )

__version__ = "0.1.0"

_MODULES = {
    "storage.client": ("StorageClient",),
    "storage.client.lockfile": ("LockFile", "LockedFile", "LockedModel"),
    "storage.client.mirror.options": ("MirrorFailure", "MirrorResult"),
    "storage.client.prefetch": ("PrefetchResult",),
    "storage.client.signatures": ("SignaturePolicy",),
    "storage.client.watched": ("WatchedModel",),
    "storage.client.watcher": ("ModelWatcher",),
    "storage.config": (
        "AzureConfig",
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
    ),
    "storage.digest": ("Digest", "tree_digest"),
    "storage.errors": (
        "AuthenticationError",
        "BucketMissingError",
        "ConfigurationError",
        "DestinationError",
        "InferenceError",
        "InsufficientSpaceError",
        "IntegrityError",
        "InvalidInput",
        "MirrorError",
        "ModelMissingError",
        "ModelNotFound",
        "ObjectChangedError",
        "ObjectExistsError",
        "OfflineError",
        "SignatureError",
        "StorageError",
        "TransferError",
        "UnreachableError",
        "UnsupportedOperation",
        "UnsupportedScheme",
    ),
    "storage.facade": (
        "AUTHENTICATION_METHODS",
        "LocalPath",
        "Storage",
        "StorageConfig",
        "StorageURI",
    ),
    "storage.operations": ("ObjectList", "StorageMetadata", "StorageOperations"),
    "storage.transfer.plan": ("Plan",),
    "storage.transfer.progress": ("Progress",),
    "storage.uri": (
        "AZURE_URI_FORMAT",
        "GCS_URI_FORMAT",
        "HF_URI_FORMAT",
        "HTTP_URI_FORMAT",
        "LOCAL_URI_FORMAT",
        "OCI_URI_FORMAT",
        "PVC_URI_FORMAT",
        "S3_URI_FORMAT",
        "SUPPORTED_PROTOCOLS",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AUTHENTICATION_METHODS",
    "AZURE_URI_FORMAT",
    "GCS_URI_FORMAT",
    "HF_URI_FORMAT",
    "HTTP_URI_FORMAT",
    "LOCAL_URI_FORMAT",
    "OCI_URI_FORMAT",
    "PVC_URI_FORMAT",
    "S3_URI_FORMAT",
    "SUPPORTED_PROTOCOLS",
    "AuthenticationError",
    "AzureConfig",
    "BucketMissingError",
    "ConfigurationError",
    "DestinationError",
    "Digest",
    "FsspecConfig",
    "GCSConfig",
    "GitConfig",
    "HFConfig",
    "HTTPConfig",
    "InferenceError",
    "InsufficientSpaceError",
    "IntegrityError",
    "InvalidInput",
    "LocalPath",
    "LockFile",
    "LockedFile",
    "LockedModel",
    "MirrorError",
    "MirrorFailure",
    "MirrorResult",
    "ModelMissingError",
    "ModelNotFound",
    "ModelScopeConfig",
    "ModelWatcher",
    "OCIConfig",
    "ObjectChangedError",
    "ObjectExistsError",
    "ObjectList",
    "OfflineError",
    "PVCConfig",
    "Plan",
    "PrefetchResult",
    "Progress",
    "S3Config",
    "Settings",
    "SignatureError",
    "SignaturePolicy",
    "Storage",
    "StorageClient",
    "StorageConfig",
    "StorageError",
    "StorageMetadata",
    "StorageOperations",
    "StorageURI",
    "TransferError",
    "UnreachableError",
    "UnsupportedOperation",
    "UnsupportedScheme",
    "WatchedModel",
    "__version__",
    "tree_digest",
]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'storage' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
