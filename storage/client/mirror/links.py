"""Symbolic links among the folders that a mirror fills: where its files would really be."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from storage.errors import InvalidInput

__all__ = ["check_links"]


def check_links(
    root: str,
    wanted: Iterable[str],
    leftovers: Iterable[str],
    source: str | None,
) -> None:
    """Refuse links by which one file of a mirror is another one, or none of the mirror's.

    A folder of the destination may be a link to one somewhere else. What is there is written as
    the mirror says, but is never removed: others may use it, too.

    Args:
        root: folder that the mirror fills.
        wanted: paths in it that are to be there, sorted.
        leftovers: paths in it that are to be removed, sorted.
        source: the source, if it is on this machine.

    Raises:
        InvalidInput: there is such a link.
    """
    real_root = os.path.realpath(root)
    apart = [real_root] if source is None else [real_root, os.path.realpath(source)]
    seen: dict[str, str] = {}
    for folder, real in _linked(real_root, wanted):
        other = seen.setdefault(real, folder)
        if other != folder or any(_overlap(real, place) for place in apart):
            raise InvalidInput(
                f"{os.path.join(root, folder)} is, by a symbolic link, {real}, which holds other "
                "files of this mirror; remove the link, or choose by patterns"
            )
    for folder, real in _linked(real_root, leftovers):
        raise InvalidInput(
            f"{os.path.join(root, folder)} is, by a symbolic link, {real}, and delete=True would "
            "remove files there; remove the link, leave delete out, or choose by patterns"
        )


def _linked(root: str, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the folders of ``paths`` that are behind links, and where they really are."""
    last = ""
    for path in paths:
        folder = os.path.dirname(path)
        if folder in ("", last):
            continue
        last, here = folder, os.path.join(root, folder)
        real = os.path.realpath(here)
        if real != here:
            yield folder, real


def _overlap(one: str, two: str) -> bool:
    one, two = one.rstrip("/") + "/", two.rstrip("/") + "/"
    return one.startswith(two) or two.startswith(one)
