"""Append-only logs: numbered objects, each created once. Whoever creates the next one wins."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from storage.errors import ObjectChangedError
from storage.registry import layout
from storage.registry.documents import decode, encode
from storage.registry.objects import ObjectStore

__all__ = ["Log", "heads", "last_number"]


def last_number(store: ObjectStore, prefix: str, hint: int = 0) -> int:
    """Return the highest number below ``prefix``, 0 if there is none.

    The numbers have no gaps, so a few looks find it: about two for each doubling of the distance
    from ``hint``.

    Args:
        store: where to look.
        prefix: of numbered objects that are never removed.
        hint: a number that was there before.
    """

    def there(index: int) -> bool:
        return store.info(layout.entry(prefix, index)) is not None

    low, step = hint, 1
    while there(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        if there(middle):
            low = middle
        else:
            high = middle
    return low


def heads(names: Iterable[str]) -> dict[str, str]:
    """Return the name of the newest entry of each log out of a listing, by the log's prefix."""
    newest: dict[str, tuple[int, str]] = {}
    for name in names:
        index = layout.number_of(name)
        prefix = name[: name.rindex("/") + 1]
        if index is not None and index > newest.get(prefix, (0, ""))[0]:
            newest[prefix] = index, name
    return {prefix: name for prefix, (_, name) in newest.items()}


class Log:
    """One log; its newest entry is in force."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        """Address the log below ``prefix``, which may have no entry yet."""
        self._store = store
        self._prefix = prefix

    def head(self) -> tuple[int, dict[str, Any]] | None:
        """Return number and document of the newest entry; ``None`` if there is none."""
        numbers = self._numbers()
        return self._read(numbers[0]) if numbers else None

    def entries(self) -> list[tuple[int, dict[str, Any]]]:
        """Return number and document of each entry, the newest first."""
        found = self._store.map(self._read, self._numbers())
        return [entry for entry in found if entry is not None]

    def _numbers(self) -> list[int]:
        """Return the numbers of all entries, the highest first."""
        if not self._store.backend.capabilities.list:
            return list(range(last_number(self._store, self._prefix), 0, -1))
        found = map(layout.number_of, self._store.names(self._prefix))
        return sorted({index for index in found if index}, reverse=True)

    def _read(self, index: int) -> tuple[int, dict[str, Any]] | None:
        name = layout.entry(self._prefix, index)
        data = self._store.read(name)
        # The log may be removed meanwhile, with what it is about.
        return None if data is None else (index, decode(data, self._store.where(name)))

    def append(self, document: Mapping[str, Any], expected: int) -> int:
        """Add an entry.

        Args:
            document: the entry.
            expected: the number of the entry that it follows; 0 for none.

        Returns:
            Its number.

        Raises:
            ObjectChangedError: somebody else's entry follows that one.
            TransferError: the store does not answer; the entry may be there or not.
        """
        name = layout.entry(self._prefix, expected + 1)
        # What nobody else writes: a write whose answer was lost is known by it.
        if not self._store.create(name, encode({**document, "token": uuid.uuid4().hex})):
            raise ObjectChangedError(
                f"{self._store.where(name)} was written by somebody else: entry {expected} was to "
                "be the last one; look again and decide anew"
            )
        return expected + 1
