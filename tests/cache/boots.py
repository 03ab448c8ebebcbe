"""Another boot of the machine, as far as a cache can tell, and how often content is hashed."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any
from uuid import uuid4

import pytest

from storage import files
from storage.cache import blobs, leases, owners

__all__ = ["count_hashes", "reboot", "run_in_boot"]


def reboot(patch: pytest.MonkeyPatch, boot: str | None = "") -> None:
    """Let this process go on in another boot; nothing that it held is held any more.

    Args:
        patch: ends it.
        boot: its id, else a new one; ``None`` for a system that tells none.
    """
    leases.release_all()
    name = uuid4().hex if boot == "" else boot
    for module in (blobs, files, owners):
        patch.setattr(module, "boot_id", lambda: name)
    # One that remembers nothing, and is forgotten with the patch.
    patch.setattr(owners, "_owner", functools.lru_cache(maxsize=1)(owners._owner.__wrapped__))


def run_in_boot(boot: str) -> str:
    """Return code that, in front of a program, lets it run in another boot."""
    return (
        "from storage.cache import owners\n"
        f"owners.boot_id = lambda: {boot!r}\n"
        "from storage.cache import blobs\n"
        f"assert blobs.boot_id() == {boot!r}\n"
    )


def count_hashes(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Count from now on how often each blob is hashed to see whether it is right."""
    counted: Counter[str] = Counter()
    real = blobs.hash_file

    def hash_file(file: Any, *args: Any) -> Any:
        counted[file.name] += 1
        return real(file, *args)

    patch.setattr(blobs, "hash_file", hash_file)
    return counted
