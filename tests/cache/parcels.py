"""Parcels to take in, right ones and others."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import IntegrityError
from storage.cache.cache import ModelCache
from storage.cache.parcel import Imported, export, import_
from storage.cache.verify import verify
from storage.errors import StorageError

MODEL = {"model.bin": b"weights" * 100_000, "config/a.json": b"{}", "empty": b""}
OTHER = {"model.bin": MODEL["model.bin"], "more": b"x" * 513}

memory = pytest.mark.kinds("memory")
Member = tuple[str, bytes]


def archive(folder: Path) -> Path:
    """Return an archive with a program, a link and an empty folder in it."""
    tree = folder / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "none").mkdir()
    (tree / "bin" / "run").write_bytes(b"#!/bin/sh\n" * 100)
    (tree / "bin" / "run").chmod(0o755)
    (tree / "data").write_bytes(b"data")
    (tree / "link").symlink_to("bin/run")
    with tarfile.open(folder / "model.tar", "w") as tar:
        tar.add(tree, ".")
    return folder / "model.tar"


def packed(cache: ModelCache, **options: Any) -> bytes:
    stream = io.BytesIO()
    export(cache, stream, **options)
    return stream.getvalue()


def take(cache: ModelCache, data: bytes) -> Imported:
    return import_(cache, io.BytesIO(data))


def members(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def joined(
    found: list[Member], edit: Callable[[tarfile.TarInfo], object] = lambda _: None
) -> bytes:
    """Return a parcel with these members, each changed by ``edit``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in found:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            edit(info)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def with_json(data: bytes, name: str, change: Callable[[Any], object]) -> bytes:
    """Return a parcel in which one record is changed, and its header fits."""
    found = members(data)
    for index, (member, content) in enumerate(found):
        if member.startswith(name):
            value = json.loads(content)
            change(value)
            found[index] = (member, json.dumps(value).encode())
            break
    if name != "parcel.json":
        header = json.loads(found[0][1])
        header["records"] = sum(
            len(content) for member, content in found[1:] if not member.startswith("blobs/")
        )
        found[0] = (found[0][0], json.dumps(header).encode())
    return joined(found)


def known(cache: ModelCache) -> list[str]:
    """Return all that the cache would tell of models."""
    layout = cache.upper.layout
    folders = (layout.refs, layout.manifests, layout.snapshots)
    return [str(path) for folder in folders for path in Path(folder).rglob("*") if path.is_file()]


def assert_refused(
    cache: ModelCache, data: bytes, error: type[StorageError] = IntegrityError
) -> str:
    with pytest.raises(error) as caught:
        take(cache, data)
    assert known(cache) == []
    assert os.listdir(cache.upper.layout.partial) == []
    assert verify(cache, full=True).problems == ()
    assert not cache.leases.held().manifests | cache.leases.held().blobs
    assert "\n" not in str(caught.value)
    return str(caught.value)
