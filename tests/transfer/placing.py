"""Putting files and trees at a destination, without a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from storage.transfer.destination import Destination
from tests.transfer.support import write_tree

OLD = {"a.bin": b"old a", "sub/b.bin": b"old b", "sub/only-old": b"x"}
NEW = {"a.bin": b"new a", "sub/b.bin": b"new b", "sub/empty": b"", "new/c": b"c"}


class GiveUpError(Exception):
    """Ends a download in the middle."""


def put_tree(path: str | os.PathLike[str], files: dict[str, bytes], **options: Any) -> str:
    """Publish a tree of ``files`` at ``path``."""
    with Destination(os.fspath(path), tree=True, **options) as destination:
        write_tree(Path(destination.content), files)
        return destination.publish()


def put_file(path: str | os.PathLike[str], data: bytes, **options: Any) -> str:
    """Publish a file at ``path``."""
    with Destination(os.fspath(path), tree=False, **options) as destination:
        Path(destination.content).write_bytes(data)
        return destination.publish()


def put(path: str | os.PathLike[str], tree: bool) -> str:
    """Publish something at ``path``."""
    return put_tree(path, NEW) if tree else put_file(path, NEW["a.bin"])


def give_up(path: str | os.PathLike[str], tree: bool = True) -> None:
    """Begin to download to ``path``, and fail."""
    with Destination(os.fspath(path), tree=tree) as destination:
        if tree:
            write_tree(Path(destination.content), NEW)
        else:
            Path(destination.content).write_bytes(b"x")
        raise GiveUpError


def paths_of(files: dict[str, bytes], folder: str) -> list[str]:
    """Return the paths of ``files`` in ``folder`` and of all folders on the way, sorted."""
    found = {folder}
    for name in files:
        path = Path(folder, name)
        found |= {path.as_posix(), *(above.as_posix() for above in path.parents)}
    return sorted(found - {"."})


def leftover(path: Path) -> Path:
    """Make what a killed download leaves, and return its path."""
    (path / "content").mkdir(parents=True)
    (path / "content" / "half").write_bytes(b"x")
    (path / "lock").touch()
    return path
