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
    from storage.container.builder import ModelContainerBuilder
    from storage.container.bundles import sign_tree, verify_tree
    from storage.container.create import Archive, create_archive
    from storage.container.extract import ExtractionLimits, extract_archive
    from storage.container.filechunks import FileChunk
    from storage.container.helpers import (
        BinaryHelper,
        Helper,
        NumpyHelper,
        SafetensorsHelper,
        get_helper,
    )
    from storage.container.model import ModelContainer

_HOME = {
    "Archive": "create",
    "BinaryHelper": "helpers",
    "ExtractionLimits": "extract",
    "FileChunk": "filechunks",
    "Helper": "helpers",
    "ModelContainer": "model",
    "ModelContainerBuilder": "builder",
    "NumpyHelper": "helpers",
    "SafetensorsHelper": "helpers",
    "create_archive": "create",
    "extract_archive": "extract",
    "get_helper": "helpers",
    "sign_tree": "bundles",
    "verify_tree": "bundles",
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
