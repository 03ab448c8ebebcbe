"""Clients of Scaleout Edge that work with a store alone, and who gives them tasks.

:class:`StorageRuntime` is the runtime of an ``EdgeClient``; :class:`TaskBoard` submits tasks,
waits for them and shows what became of them; :class:`Reports` reads the metrics, attributes and
telemetry that clients reported. Only the first needs the package ``scaleout``, and imports it when
it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.integrations.scaleout.board import ClientStatus, TaskBoard, TaskHandle
    from storage.integrations.scaleout.documents import Result
    from storage.integrations.scaleout.reports import Reports
    from storage.integrations.scaleout.runtime import StorageRuntime

__all__ = ["ClientStatus", "Reports", "Result", "StorageRuntime", "TaskBoard", "TaskHandle"]

_MODULES = {
    "ClientStatus": "board",
    "Reports": "reports",
    "Result": "documents",
    "StorageRuntime": "runtime",
    "TaskBoard": "board",
    "TaskHandle": "board",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
