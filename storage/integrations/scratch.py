"""Folders to work in, beside where something is to appear; what killed processes left goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial

from storage.cache.owners import Owner, may_live, new_name
from storage.files import remove

__all__ = ["remove_dead", "scratch"]

_PREFIX = ".modelstorage-"


@contextlib.contextmanager
def scratch(folder: str) -> Iterator[str]:
    """Make a hidden folder in ``folder`` that is this caller's alone, and remove it at the end.

    Those that dead processes left in ``folder`` are removed first. On the same file system as
    ``folder``, what is made in it can be moved there by a rename.
    """
    remove_dead(folder)
    path, maker = os.path.join(folder, f"{_PREFIX}{new_name()}"), os.getpid()
    os.mkdir(path, 0o700)
    try:
        yield path
    finally:
        # A child forked meanwhile comes through here too.
        if os.getpid() == maker:
            remove(path)


def remove_dead(folder: str) -> None:
    """Remove what dead processes left; what cannot be removed stays.

    What another machine or container left goes after a day without any change.
    """
    now = time.time()
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX)]
        for path in (os.path.join(folder, name) for name in names):
            owner = Owner.parse(os.path.basename(path).removeprefix(_PREFIX))
            with contextlib.suppress(OSError):
                # A name that tells no owner is not ours to judge; nothing here has a lock.
                if owner is not None and not may_live(owner, path, partial(_changed, path), now):
                    remove(path)


def _changed(path: str) -> float:
    return os.lstat(path).st_ctime
