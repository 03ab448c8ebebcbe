"""Model containers, archives, and signatures of both.

    from storage.container import ModelContainer

    with ModelContainer.open("s3://models/iris.zip") as container:
        print(container.model_id, container.metadata)

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.container.archives.create import Archive, create_archive
    from storage.container.archives.extract import ExtractionLimits, extract_archive
    from storage.container.builder import ModelContainerBuilder
    from storage.container.filechunks import FileChunk
    from storage.container.model import ModelContainer
    from storage.container.signatures.bundles import sign_tree, verify_tree
    from storage.container.weights.helpers import (
        BinaryHelper,
        Helper,
        NumpyHelper,
        SafetensorsHelper,
        get_helper,
    )

_HOME = {
    "Archive": "archives.create",
    "BinaryHelper": "weights.helpers",
    "ExtractionLimits": "archives.extract",
    "FileChunk": "filechunks",
    "Helper": "weights.helpers",
    "ModelContainer": "model",
    "ModelContainerBuilder": "builder",
    "NumpyHelper": "weights.helpers",
    "SafetensorsHelper": "weights.helpers",
    "create_archive": "archives.create",
    "extract_archive": "archives.extract",
    "get_helper": "weights.helpers",
    "sign_tree": "signatures.bundles",
    "verify_tree": "signatures.bundles",
}

__all__ = [
    "Archive",
    "BinaryHelper",
    "ExtractionLimits",
    "FileChunk",
    "Helper",
    "ModelContainer",
    "ModelContainerBuilder",
    "NumpyHelper",
    "SafetensorsHelper",
    "create_archive",
    "extract_archive",
    "get_helper",
    "sign_tree",
    "verify_tree",
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
