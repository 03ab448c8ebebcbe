"""Pins: sources whose models stay, whatever the budget says.

A pin names a source, not its content: what the source has next is pinned as well, with any
filters. The name of its file alone says what is pinned, so a damaged record unpins nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass

from storage.cache.layout import Layout, hash_text, listed
from storage.cache.records import DamagedRecordError, read_record, write_record
from storage.cache.refs import Source, identity_of
from storage.uri import Location

__all__ = ["Pin", "Pins", "pin_name"]

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Pin:
    """One pinned source."""

    scheme: str
    uri: str
    """Without anything that may be a credential."""

    pinned_at: float
    """Seconds since the epoch."""


def pin_name(source: Source | Location) -> str:
    """Return the name that a pin of ``source`` has; the same for all its filters."""
    if isinstance(source, Location):
        return hash_text(source.scheme, str(source), identity_of(source))[:32]
    return hash_text(source.scheme, source.uri, source.identity)[:32]


class Pins:
    """The pins of one cache."""

    def __init__(self, layout: Layout) -> None:
        """Use those below the root of ``layout``."""
        self._layout = layout

    def add(self, location: Location) -> bool:
        """Pin a source; tell whether it was not pinned yet.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self._layout.pin(pin_name(location))
        record = asdict(Pin(location.scheme, str(location), time.time()))
        with contextlib.suppress(DamagedRecordError):
            if read_record(path) is not None:
                return False
        write_record(self._layout, path, record, durable=True)
        return True

    def remove(self, location: Location) -> bool:
        """Unpin a source; tell whether it was pinned.

        Raises:
            OSError: the cache cannot be written.
        """
        try:
            os.unlink(self._layout.pin(pin_name(location)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self) -> frozenset[str]:
        """Return the names of all pins; see :func:`pin_name`."""
        return frozenset(
            name.removesuffix(_SUFFIX)
            for name in listed(self._layout.pins)
            if name.endswith(_SUFFIX)
        )

    def all(self) -> list[Pin]:
        """Return every pin that can be read, sorted by its URI."""
        found = []
        for name in self.names():
            with contextlib.suppress(DamagedRecordError, KeyError):
                record = read_record(self._layout.pin(name))
                if record is not None:
                    found.append(Pin(record["scheme"], record["uri"], record["pinned_at"]))
        return sorted(found, key=lambda pin: pin.uri)
