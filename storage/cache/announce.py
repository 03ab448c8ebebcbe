"""Removals under way, announced to those who are about to use what may just be on its way out.

A removal is announced by a folder of this name in its folder of ``partial/``, from before it
reads the leases until all that is needed is back. Whoever takes a lease looks for such folders
afterwards: either the removal sees the lease, or its announcement is seen and its end awaited.
No lock is needed for that.
"""

from __future__ import annotations

import os
import time

from storage.cache.layout import Layout, listed
from storage.cache.owners import Owner, is_alive, is_locked

__all__ = ["REMOVED", "REMOVING", "wait_for_removals"]

REMOVING = "removing"
REMOVED = "removed"
"""What the folder is called afterwards, while what is in it is deleted."""

_TIMEOUT = 10.0
_PAUSE = 0.005


def wait_for_removals(layout: Layout) -> None:
    """Wait for the removals that may not have seen the leases there are now.

    Those that begin later see them. After some seconds it returns in any case.
    """
    deadline = time.monotonic() + _TIMEOUT
    for name in listed(layout.partial):
        folder = os.path.join(layout.partial, name)
        while os.path.exists(os.path.join(folder, REMOVING)) and time.monotonic() < deadline:
            owner = Owner.parse(name)
            alive = None if owner is None else is_alive(owner)
            if alive is False or (alive is None and not is_locked(os.path.join(folder, "lock"))):
                break
            time.sleep(_PAUSE)
