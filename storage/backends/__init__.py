"""The stores: the only place that knows which backend serves which scheme.

A third party adds a scheme by an entry point in the group ``storage.backends``: its name is
the scheme, its object a :class:`~storage.backends.base.BackendFactory`. The backends here
win over entry points of the same name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from storage.errors import ConfigurationError

if TYPE_CHECKING:
    from storage.backends.base import Backend, BackendFactory, OpenOptions
    from storage.uri import Location

__all__ = ["ENTRY_POINT_GROUP", "open_backend"]

ENTRY_POINT_GROUP = "storage.backends"

_FACTORIES = {
    "s3": "storage.backends.s3.backend:open_backend",
    "gs": "storage.backends.gcs.backend:open_backend",
    "azure": "storage.backends.azure.backend:open_backend",
    "hf": "storage.backends.hf.backend:open_backend",
    "git+http": "storage.backends.git.backend:open_backend",
    "git+https": "storage.backends.git.backend:open_backend",
    "modelscope": "storage.backends.modelscope:open_backend",
    "azurefile": "storage.backends.azure.files:open_backend",
    "http": "storage.backends.http.backend:open_backend",
    "https": "storage.backends.http.backend:open_backend",
    "oci": "storage.backends.oci.backend:open_backend",
    "file": "storage.backends.local.backend:open_file_backend",
    "pvc": "storage.backends.local.backend:open_pvc_backend",
    "memory": "storage.backends.memory:open_backend",
}
_GENERIC = "storage.backends.drivers.fsspec:open_backend"


def open_backend(location: Location, config: Any, options: OpenOptions) -> Backend:
    """Return the backend of the store that ``location`` is in; inert.

    Raises:
        UnsupportedScheme: nothing serves the scheme.
    """
    return _factory(location.scheme)(location, config, options)


def _factory(scheme: str) -> BackendFactory:
    name = _FACTORIES.get(scheme)
    if name is None:
        if (plugin := _entry_point(scheme)) is not None:
            return plugin
        name = _GENERIC
    module, _, attribute = name.partition(":")
    return cast("BackendFactory", getattr(importlib.import_module(module), attribute))


def _entry_point(scheme: str) -> BackendFactory | None:
    from importlib.metadata import entry_points

    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=scheme):
        try:
            return cast("BackendFactory", entry_point.load())
        except Exception as exc:  # a plug-in may fail in any way; it must not look like ours
            raise ConfigurationError(
                f"the plug-in {entry_point.value!r} for {scheme}:// cannot be loaded: {exc}"
            ) from exc
    return None
