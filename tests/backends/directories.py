"""What the tests of local files and claims share."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage.backends import open_backend
from storage.backends.base import (
    Backend,
    OpenOptions,
)
from storage.uri import parse_uri


class DirectoryRaw:
    """Plain file operations on the bucket's directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes) -> None:
        path = self._root / key
        if key.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def get(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def keys(self) -> set[str]:
        return {
            os.path.relpath(os.path.join(folder, name), self._root)
            for folder, _, names in os.walk(self._root)
            for name in names
        }


def claim(mount_root: Path, name: str) -> Backend:
    config = SimpleNamespace(mount_root=str(mount_root), mounts={})
    return open_backend(parse_uri(f"pvc://{name}/x"), config, OpenOptions())


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join([bytes(piece) for piece in body])


def files_in(root: Path) -> set[str]:
    return DirectoryRaw(root).keys()


def without(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refuse)
