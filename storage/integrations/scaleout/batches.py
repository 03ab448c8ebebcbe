"""Batches: records that are sent as one object, and the names of these objects.

::

    <client>/<first number>-<last number>-<stream>-<digest>.json

All batches of a client sort as its records do. A name holds the digest of the content, so there
is nothing else that could have it: whoever finds the name taken finds the batch delivered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from storage.digest import new_hasher
from storage.errors import InvalidInput
from storage.integrations.scaleout.journal import Header
from storage.registry import documents

__all__ = ["Batch", "BatchName", "client_folder", "client_of", "parse_name"]

_LONGEST_CLIENT = 150
_NAME = re.compile(r"([^/@]+)/(\d{16})-(\d{16})-([0-9a-f]{16})-([0-9a-f]{16})\.json")


def client_folder(client: str) -> str:
    """Return the name of the folder in which the batches of a client are; it holds no ``/``.

    Raises:
        InvalidInput: the id is empty or too long.
    """
    name = quote(client, safe="", errors="surrogatepass")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    if not 0 < len(name) <= _LONGEST_CLIENT:
        raise InvalidInput(
            f"the id of a client has 1 to {_LONGEST_CLIENT} characters when it is written in a "
            f"URI; this one has {len(name)}"
        )
    return name


def client_of(folder: str) -> str:
    """Return the client of which :func:`client_folder` made the name of a folder."""
    return unquote(folder, errors="surrogatepass")


@dataclass(frozen=True, slots=True)
class BatchName:
    """What the name of a batch says."""

    client: str
    first: int
    last: int
    stream: str
    digest: str


def parse_name(name: str) -> BatchName | None:
    """Return what the name of an object says; ``None`` if it is not that of a batch."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return BatchName(client_of(found[1]), int(found[2]), int(found[3]), found[4], found[5])


@dataclass(frozen=True, slots=True)
class Batch:
    """Records on their way."""

    name: str
    """Of the object."""

    data: bytes
    """The content: a document of :mod:`storage.registry.documents`."""

    records: int
    """How many there are. None is left if all were damaged since the name was fixed."""

    last: int
    """The highest number."""

    segment: str
    start: int
    end: int
    """Where the records are."""

    fixed: str | None = None
    """The name under which these records may have been sent already, if some of them have been
    damaged since, so that their name is another one now."""

    @classmethod
    def of(
        cls,
        header: Header,
        records: Sequence[dict[str, Any]],
        place: tuple[str, int, int],
    ) -> Batch:
        """Return the batch of some records; the same records always give the same.

        Args:
            header: of their segment.
            records: in order, at least one.
            place: the segment, and where in it they begin and end.
        """
        first, last = records[0]["number"], records[-1]["number"]
        data = documents.encode(
            {"client": header.client, "stream": header.stream, "records": list(records)}
        )
        hasher = new_hasher("blake3")
        hasher.update(data)
        parts = f"{first:016d}", f"{last:016d}", header.stream, hasher.hexdigest()[:16]
        name = f"{client_folder(header.client)}/{'-'.join(parts)}.json"
        return cls(name, data, len(records), last, *place)
