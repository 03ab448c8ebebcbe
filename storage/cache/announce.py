"""Removals under way, announced to those who are about to use what may just be on its way out.

A removal is announced by a folder of this name in its folder of ``partial/``, from before it
reads the leases until all that is needed is back. Whoever takes a lease looks for such folders
afterwards: either the removal sees the lease, or its announcement is seen and its end awaited.
Two removals exclude one another in the same way. No lock is needed for either.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from storage.cache.layout import Layout, listed
from storage.cache.owners import Owner, is_alive
from storage.errors import DestinationError
from storage.files import is_locked

__all__ = ["REMOVED", "REMOVING", "announce_removal", "wait_for_removals"]

REMOVING = "removing"
REMOVED = "removed"
"""What the folder is called afterwards, while what is in it is deleted."""

_TIMEOUT = 10.0
_PAUSE = 0.005


def announce_removal(layout: Layout, folder: str) -> str:
    """Announce a removal once no other is under way, or after some seconds in any case.

    Args:
        layout: of the cache.
        folder: of the removal in ``partial/``.

    Returns:
        The path of the folder that announces it.
    """
    path = os.path.join(folder, REMOVING)
    deadline = time.monotonic() + _TIMEOUT
    while True:
        os.mkdir(path)
        # Of two who come at once, at least one sees the other here, or both do.
        others = (name for name in _under_way(layout) if name != os.path.basename(folder))
        if next(others, None) is None or time.monotonic() > deadline:
            return path
        os.rmdir(path)
        wait_for_removals(layout)
        # Not the module for it, which takes longer to import than a hit.
        time.sleep(_PAUSE * os.urandom(1)[0] / 256)


def wait_for_removals(layout: Layout) -> None:
    """Wait for the removals that may not have seen the leases there are now.

    Those that begin later see them. After some seconds it returns in any case.
    """
    deadline = time.monotonic() + _TIMEOUT
    for name in _under_way(layout):
        while _is_under_way(layout, name) and time.monotonic() < deadline:
            time.sleep(_PAUSE)


def _under_way(layout: Layout) -> Iterator[str]:
    """Yield the names of the removals under way in ``partial/``."""
    # Whoever may not look there holds no leases either.
    with contextlib.suppress(DestinationError):
        for name in listed(layout.partial):
            if _is_under_way(layout, name):
                yield name


def _is_under_way(layout: Layout, name: str) -> bool:
    folder = os.path.join(layout.partial, name)
    if not os.path.exists(os.path.join(folder, REMOVING)):
        return False
    owner = Owner.parse(name)
    alive = None if owner is None else is_alive(owner)
    return is_locked(os.path.join(folder, "lock")) if alive is None else alive
