"""What the tests of watchers share: versions of a model, and a server that is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import storage
from storage import (
    WatchedModel,
)
from tests.facade.stores import S3Store, Store, tree_bytes

MIB = 1024 * 1024
OFTEN = 0.05
"""Seconds between two looks."""


class Told:
    """What a server was told, in order."""

    def __init__(self, fail: int = 0) -> None:
        self.models: list[WatchedModel] = []
        self.errors: list[Exception] = []
        self.contents: list[dict[str, bytes]] = []
        self.fail = fail

    def change(self, model: WatchedModel) -> None:
        if self.fail:
            self.fail -= 1
            raise KeyError("the server cannot load it")
        self.contents.append(tree_bytes(model.path))
        self.models.append(model)

    def error(self, exc: Exception) -> None:
        self.errors.append(exc)

    def has(self, count: int) -> bool:
        return len(self.models) >= count


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "that did not come to be"
        time.sleep(0.01)


def put_version(store: Store, number: int, files: int = 3) -> dict[str, bytes]:
    content = {f"{index}": b"%d" % number * 1000 for index in range(files)}
    store.put_all({f"model/{name}": data for name, data in content.items()})
    return content


def version(number: int, files: int = 3) -> dict[str, bytes]:
    return {f"{index}": b"%d" % number * 1000 for index in range(files)}


def program_environment(store: S3Store) -> dict[str, str]:
    """Return the environment of a program that uses this code and ``store``."""
    fields = {
        "type": "s3",
        "access_key_id": store.server.admin.access_key,
        "secret_access_key": store.server.admin.secret_key,
        "endpoint_url": store.server.endpoint,
    }
    return os.environ | {
        "PYTHONPATH": str(Path(storage.__file__).parents[1]),
        "STORAGE_CONFIG": json.dumps(fields),
    }
