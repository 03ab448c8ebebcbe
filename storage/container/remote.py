"""The bytes of a container that is in a store, read by ranges as they are needed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from storage.container.loading import blocks_of, spool
from storage.container.source import Source
from storage.container.stored import LocalSource
from storage.digest import Digest, hash_file
from storage.errors import IntegrityError, InvalidInput, ObjectChangedError
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage import StorageClient
    from storage.backends.base import ObjectInfo

__all__ = ["RemoteSource", "open_source"]

# A request costs more than these bytes. The directory of a container and its metadata are much
# shorter as a rule, so that two requests bring both.
_BLOCK = 32 * 1024
_REMEMBERED = 4
_BUFFER = 1024 * 1024


def open_source(
    uri: str | os.PathLike[str],
    *,
    config: Any = None,
    client: StorageClient | None = None,
    cache: bool = False,
) -> Source:
    """Return the bytes at ``uri``; see :meth:`storage.container.ModelContainer.open`."""
    from storage import Storage

    location = parse_uri(uri)
    store = Storage if client is None else client
    if location.forces_tree:
        raise InvalidInput(f"{location} names a tree; a container is one object")
    if cache or location.is_local:
        return LocalSource.open(store._download_object(uri, config=config))
    try:
        return _open_remote(store.open, uri, config)
    except ObjectChangedError:
        # It was replaced at this very moment; or the server claims to serve ranges and does not,
        # which is known from now on.
        return _open_remote(store.open, uri, config)


def _open_remote(
    opening: Callable[..., BinaryIO], uri: str | os.PathLike[str], config: Any
) -> Source:
    location = parse_uri(uri)
    file = cast("io.BufferedReader", opening(uri, "rb", config=config))
    raw: Any = file.raw
    if not getattr(raw, "pins_ranges", False):
        return _fetched(file, location)
    if location.digest is not None:
        raise InvalidInput(
            f"{location} is expected to be {location.digest}, which only all of its bytes can "
            "tell; open it with cache=True to have it fetched and checked, or without the digest"
        )
    source = RemoteSource(raw)
    # The end of a container is what is looked at in any case.
    source.read_at(max(0, source.size - 1), 1)
    return source


class _PinnedObject(Protocol):
    """What an object that was opened has, where ranges of this very version can be read."""

    info: ObjectInfo
    name: str

    def part(self, start: int, end: int) -> io.RawIOBase: ...


class RemoteSource(Source):
    """An object in a store.

    What is short is read in blocks, and the last ones are remembered: the few reads that
    opening a container takes cost two requests as a rule, one at its end and one at its
    beginning. Every request is for a bounded range of the version that was there first; once
    another one is there, they raise ``ObjectChangedError``. Safe for several threads.
    """

    def __init__(self, opened: _PinnedObject) -> None:
        """Read an object that was opened; nothing is fetched yet."""
        assert opened.info.size is not None
        self.size = opened.info.size
        self.name = opened.name
        self._object: _PinnedObject | None = opened
        # One thing, which duplicates share.
        self._blocks: list[tuple[tuple[int, bytes], ...]] = [()]
        self._pid = os.getpid()

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes from ``offset`` on, fewer than ``length`` only at the end."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        (remembered,) = self._blocks
        for start, block in remembered:
            if start <= offset and end <= start + len(block):
                return block[offset - start : end - start]
        if end - offset > _BLOCK:
            return self._fetch(offset, end)
        # The last block of the object for what is near its end.
        stop = min(offset + _BLOCK, self.size)
        start = min(offset, max(0, stop - _BLOCK))
        block = self._fetch(start, stop)
        # Replaced, never changed: other threads may be looking for theirs.
        self._blocks[0] = (*remembered[1 - _REMEMBERED :], (start, block))
        return block[offset - start : end - start]

    def stream(self, offset: int, length: int) -> BinaryIO:
        """Return ``length`` bytes from ``offset`` on as a file: one request, made when it is read.

        It stays usable after the source is closed, and holds a connection until it is closed.
        """
        if length <= _BLOCK:
            return io.BytesIO(self.read_at(offset, length))
        return io.BufferedReader(self._opened().part(offset, offset + length), _BUFFER)

    def fileno(self) -> int | None:
        """Return ``None``: there is no file."""
        return None

    def duplicate(self) -> RemoteSource:
        """Return another source of the same bytes, with what this one remembers."""
        other = RemoteSource(self._opened())
        other._blocks = self._blocks
        return other

    def close(self) -> None:
        """Forget what was read; nothing can be read any more."""
        self._object = None
        self._blocks = [()]

    def _fetch(self, start: int, end: int) -> bytes:
        with self._opened().part(start, end) as part:
            return part.readall()

    def _opened(self) -> _PinnedObject:
        if self._object is None:
            raise InvalidInput(f"{self.name} is closed; open it again to read from it")
        if self._pid != os.getpid():
            raise InvalidInput(
                f"{self.name} was opened before this process was forked, and its connections "
                "stayed behind; open it again here"
            )
        return self._object


def _fetched(file: io.BufferedReader, location: Location) -> LocalSource:
    """Return all of an object, where the store has no ranges or cannot tell versions apart."""
    demands: list[tuple[str, Digest]] = []
    if location.digest is not None:
        demands.append(("the URI expects", Digest.parse(location.digest)))
    info: ObjectInfo | None = getattr(file.raw, "info", None)
    if info is not None:
        demands += [("the store says", digest) for digest in info.digests[:1]]
    if isinstance(file.raw, io.FileIO):
        # It has been fetched already.
        source = LocalSource.adopt(file, str(location))
    else:
        with file:
            source = spool(blocks_of(file), str(location))
    for says, digest in demands:
        with source.stream(0, source.size) as stream:
            found = hash_file(stream, (digest.algorithm,))[digest.algorithm]
        if found != digest:
            source.close()
            raise IntegrityError(
                f"{location}: {says} {digest}, but the bytes that arrived are {found}"
            )
    return source
