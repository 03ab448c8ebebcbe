"""One upload from this machine to a URI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from storage.errors import ObjectExistsError, UnsupportedOperation
from storage.transfer.plan import Patterns
from storage.transfer.progress import Meter, ProgressCallback
from storage.transfer.upload import SourceFile, scan
from storage.transfer.upload import upload as send
from storage.uri import Location

if TYPE_CHECKING:
    from storage.backends.base import Backend
    from storage.client.client import StorageClient

__all__ = ["upload"]


def upload(
    client: StorageClient,
    source: str,
    location: Location,
    config: Any,
    overwrite: bool,
    patterns: Patterns,
    progress: ProgressCallback | None,
) -> None:
    """Store a file or a folder; see :meth:`storage.Storage.upload`."""
    is_tree, files = scan(source, patterns)
    prefix = location.prefix if is_tree or location.forces_tree else None
    backend = client.backend(location, config)
    if not backend.capabilities.write:
        raise UnsupportedOperation(f"{location}: {backend.name} cannot be written to")
    if not overwrite and not backend.capabilities.if_absent:
        raise UnsupportedOperation(
            f"{location}: {backend.name} cannot decide safely whether something is there "
            "already; upload with overwrite=True, or to another name"
        )
    if not overwrite and is_tree and client.run_retried(_holds_anything, backend, prefix):
        raise ObjectExistsError(
            f"{location} holds objects already and overwrite=False; choose another name"
        )

    def place(file: SourceFile) -> Location:
        return location if prefix is None else location.child(file.path)

    meter = Meter("upload", str(location), sum(file.size for file in files), len(files), progress)
    send(
        backend,
        files,
        lambda file: place(file).key,
        where=lambda file: str(place(file)),
        options=client.transfer_options,
        budget=client.budget,
        meter=meter,
        if_absent=not overwrite,
    )
    meter.finish()


def _holds_anything(backend: Backend, prefix: str) -> bool:
    return next(iter(backend.list(prefix)), None) is not None
