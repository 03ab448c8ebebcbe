"""What the tests of transfers share."""

from __future__ import annotations

import os
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.backends.base import Backend, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.errors import StorageError
from storage.transfer.engine import TransferOptions
from storage.transfer.retry import RetryPolicy

KIB = 1024
MIB = 1024 * KIB

FAST = RetryPolicy(attempts=4, timeout=30.0, wait_initial=0.0001, wait_max=0.001)
"""Retries that do not keep a test waiting."""


def options(part_size: int = 64 * KIB, connections: int = 4) -> TransferOptions:
    """Return options for small objects."""
    return TransferOptions(connections, part_size, FAST)


def files_of(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the content of every file below ``folder`` by its relative path."""
    root = Path(folder)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if not path.is_dir()
    }


def everything_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the relative path of every file and folder below ``folder``, sorted."""
    root = Path(folder)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def write_tree(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write ``files`` below ``folder`` and return it."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@contextmanager
def memory_bucket(files: Mapping[str, bytes] | None = None) -> Iterator[MemoryBackend]:
    """Yield a bucket of memory that holds ``files`` and is forgotten afterwards."""
    name = f"b{uuid.uuid4().hex}"
    backend = MemoryBackend(name)
    put_all(backend, files or {})
    try:
        yield backend
    finally:
        MemoryBackend.clear(name)


def put_all(backend: Backend, files: Mapping[str, bytes]) -> None:
    """Store ``files`` by their keys."""
    for key, data in files.items():
        backend.write(key, bytes_payload(data))


class Wrapped:
    """A backend that passes every call on; subclasses change some."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def assert_clear(error: BaseException, *secrets: str) -> None:
    """Check that an error is ours, says something in one line, and tells no secret."""
    assert isinstance(error, StorageError)
    text = str(error)
    assert text
    assert len(text.splitlines()) == 1
    shown = "".join([text, repr(error), *traceback.format_exception(error)])
    for secret in secrets:
        assert secret not in shown
