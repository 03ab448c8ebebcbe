"""Git's packs: what a server sends of a commit, kept on the disk and read from there.

The format is described in git's own manual, ``gitformat-pack``. A file that the server sends as
it is, compressed, is read in a stream. One that it sends as a difference from another is put
together in memory (by ``dulwich``), so there is a limit to those; git makes none of files above
512 MiB.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.backends.drivers.web import pieces
from storage.errors import (
    DestinationError,
    InsufficientSpaceError,
    StorageError,
    TransientError,
    UnsupportedOperation,
)

__all__ = ["MAX_DELTA", "Incoming", "Pack"]

MAX_DELTA = 1024 * 1024 * 1024
"""Bytes of the largest file that is put together in memory."""

_MIB = 1024 * 1024
_BLOCK = 64 * 1024
# Of contents from which others are made, so much is kept in memory at once; the others are put
# together again.
_HELD = 64 * _MIB
_HASH = 20
_TYPES = {1: b"commit", 2: b"tree", 3: b"blob", 4: b"tag"}
_BY_OFFSET, _BY_NAME = 6, 7


@dataclass(frozen=True, slots=True)
class _Entry:
    """One object as it is in the pack."""

    start: int
    data: int
    """Where its compressed bytes begin."""

    kind: bytes
    """What it is; empty for a difference."""

    size: int
    """Bytes of the content, or of the difference."""

    base: int | bytes | None = None
    """Where the object is that a difference is from, or what it is called."""


@dataclass(frozen=True, slots=True)
class _Found:
    """An object by its name."""

    kind: bytes
    size: int
    entry: _Entry
    base: _Found | None = None


class Incoming:
    """A pack on its way to a file of this machine's that nobody else sees."""

    def __init__(self, where: str) -> None:
        """Open the file.

        Args:
            where: the repository's URI, for messages.

        Raises:
            DestinationError: the folder for temporary files cannot be written.
        """
        self._where = where
        self._hash = hashlib.sha1(usedforsecurity=False)
        self._tail = b""
        self.size = 0
        try:
            # Without a name: nothing is left behind, however this process ends.
            self._file = tempfile.TemporaryFile(prefix="modelstorage-git-")  # noqa: SIM115
        except OSError as exc:
            raise self._refused(exc) from exc

    def write(self, data: bytes) -> int:
        """Take in more of it."""
        whole = self._tail + data
        self._hash.update(whole[:-_HASH])
        self._tail = whole[-_HASH:]
        try:
            self._file.write(data)
        except OSError as exc:
            raise self._refused(exc) from exc
        self.size += len(data)
        return len(data)

    def finish(self) -> Pack:
        """Return the pack, all of it looked at.

        Raises:
            TransientError: it was cut or damaged on its way.
        """
        if self.size <= 12 + _HASH or self._hash.digest() != self._tail:
            raise TransientError(
                f"{self._where}: what git calls the checksum of the pack is not that of the "
                f"{self.size} bytes that came; they were cut or damaged on the way"
            )
        try:
            self._file.flush()
        except OSError as exc:
            raise self._refused(exc) from exc
        with self._file:
            return Pack(os.dup(self._file.fileno()), self.size - _HASH, self._where)

    def close(self) -> None:
        """Forget what came."""
        self._file.close()

    def _refused(self, exc: OSError) -> DestinationError:
        text = (
            f"{self._where}: what git sends is kept on the disk, and the folder for temporary "
            f"files cannot hold it: {exc.strerror}; name another one by TMPDIR"
        )
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        return (InsufficientSpaceError if full else DestinationError)(text)


class Pack:
    """The objects of a pack, by their names. Safe for threads, and after a fork."""

    def __init__(self, descriptor: int, size: int, where: str) -> None:
        """Look at every object, which takes as long as it takes to read the pack.

        Args:
            descriptor: of the open file; it is closed when the last reader has gone.
            size: bytes before the checksum.
            where: the repository's URI, for messages.

        Raises:
            TransientError: the pack is damaged.
            UnsupportedOperation: an object would have to be put together in memory and is too
                large for that.
        """
        self._descriptor = descriptor
        # Readers hold this object, and a backend may go on to the next commit meanwhile.
        weakref.finalize(self, os.close, descriptor)
        self._size = size
        self._where = where
        self._found: dict[bytes, _Found] = {}
        self._index()

    def __contains__(self, name: bytes) -> bool:
        return name in self._found

    def size_of(self, name: bytes) -> int:
        """Return the bytes of an object's content."""
        return self._found[name].size

    def kind_of(self, name: bytes) -> bytes:
        """Return what an object is: ``commit``, ``tree``, ``blob`` or ``tag``."""
        return self._found[name].kind

    def read(self, name: bytes) -> Iterator[bytes | memoryview]:
        """Yield the content of an object."""
        found = self._found[name]
        if found.base is None:
            return self._inflated(found.entry)
        return pieces(self._joined(found))

    def content(self, name: bytes) -> bytes:
        """Return the content of an object that is small."""
        return b"".join(self.read(name))

    # -- looking at it -----------------------------------------------------------------------

    def _index(self) -> None:
        head = os.pread(self._descriptor, 12, 0)
        count = int.from_bytes(head[8:12], "big")
        if head[:4] != b"PACK" or int.from_bytes(head[4:8], "big") not in (2, 3):
            raise self._damaged()
        position = 12
        by_place: dict[int, _Found] = {}
        later: dict[int | bytes, list[_Entry]] = {}
        for _ in range(count):
            entry = self._entry(position)
            hasher = hashlib.sha1(b"%s %d\0" % (entry.kind, entry.size), usedforsecurity=False)
            position = self._pass(entry, hasher if entry.kind else None)
            if entry.base is not None:
                later.setdefault(entry.base, []).append(entry)
                continue
            found = _Found(entry.kind, entry.size, entry)
            self._found[hasher.digest()] = by_place[entry.start] = found
        if position != self._size:
            raise self._damaged()
        if later:
            self._join(later, list(self._found.items()))

    def _entry(self, start: int) -> _Entry:
        head = os.pread(self._descriptor, 64, start)
        try:
            byte, at = head[0], 1
            kind, size, shift = byte >> 4 & 7, byte & 15, 4
            while byte & 128:
                byte = head[at]
                size |= (byte & 127) << shift
                at, shift = at + 1, shift + 7
            base: int | bytes | None = None
            if kind == _BY_NAME:
                base, at = head[at : at + _HASH], at + _HASH
            elif kind == _BY_OFFSET:
                byte = head[at]
                back, at = byte & 127, at + 1
                while byte & 128:
                    byte = head[at]
                    back, at = (back + 1) << 7 | byte & 127, at + 1
                base = start - back
            elif kind not in _TYPES:
                raise self._damaged()
        except IndexError:
            raise self._damaged() from None
        return _Entry(start, start + at, _TYPES.get(kind, b""), size, base)

    def _pass(self, entry: _Entry, hasher: object | None) -> int:
        """Read over an object, and return where the next one begins."""
        end = entry.data
        for place, block in self._blocks(entry):
            end = place
            if hasher is not None:
                hasher.update(block)  # type: ignore[attr-defined]
        return end

    def _inflated(self, entry: _Entry) -> Iterator[bytes]:
        for _, block in self._blocks(entry):
            if block:
                yield block

    def _blocks(self, entry: _Entry) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of an entry, each time with the place behind what they were made of."""
        inflater = zlib.decompressobj()
        position, arrived = entry.data, 0
        size = min(_BLOCK, entry.size + 256)
        while not inflater.eof:
            data = os.pread(self._descriptor, size, position)
            if not data:
                raise self._damaged()
            position += len(data)
            size = _BLOCK
            while data and not inflater.eof:
                try:
                    # In steps: what is small here may be huge, whatever it says of its size.
                    block = inflater.decompress(data, _MIB)
                except zlib.error:
                    raise self._damaged() from None
                data = inflater.unconsumed_tail
                arrived += len(block)
                if arrived > entry.size:
                    raise self._damaged()
                yield position - len(inflater.unused_data), block
        if arrived != entry.size:
            raise self._damaged()

    # -- differences -------------------------------------------------------------------------

    def _join(
        self, later: dict[int | bytes, list[_Entry]], roots: list[tuple[bytes, _Found]]
    ) -> None:
        """Find the names of the objects that came as differences."""
        for name, root in roots:
            pending: list[tuple[bytes, _Found, bytes | None]] = [(name, root, None)]
            held = 0
            while pending:
                name, base, data = pending.pop()
                held -= len(data or b"")
                entries = later.pop(base.entry.start, []) + later.pop(name, [])
                if entries and data is None:
                    data = self._joined(base)
                for entry in entries:
                    assert data is not None
                    content = self._applied(data, entry)
                    found = _Found(base.kind, len(content), entry, base)
                    head = b"%s %d\0" % (base.kind, len(content))
                    hasher = hashlib.sha1(head, usedforsecurity=False)
                    hasher.update(content)
                    self._found[hasher.digest()] = found
                    more = entry.start in later or hasher.digest() in later
                    if more:
                        kept = content if held + len(content) <= _HELD else None
                        held += len(kept or b"")
                        pending.append((hasher.digest(), found, kept))
        if later:
            raise self._damaged()

    def _joined(self, found: _Found) -> bytes:
        """Return the content of an object, which is put together if it has to be."""
        chain = [found]
        while chain[-1].base is not None:
            chain.append(chain[-1].base)
        root = chain.pop()
        self._check(root.size)
        data = b"".join(self._inflated(root.entry))
        for one in reversed(chain):
            data = self._applied(data, one.entry)
        return data

    def _applied(self, base: bytes, entry: _Entry) -> bytes:
        from dulwich.errors import ApplyDeltaError
        from dulwich.pack import apply_delta

        self._check(entry.size)
        delta = b"".join(self._inflated(entry))
        self._check(_target_size(delta))
        try:
            chunks: Iterable[bytes] = apply_delta(base, delta)
        except (ApplyDeltaError, IndexError, ValueError, AssertionError):
            raise self._damaged() from None
        return b"".join(chunks)

    def _check(self, size: int) -> None:
        if size > MAX_DELTA:
            raise UnsupportedOperation(
                f"{self._where}: git sends a file of {size} bytes as a difference from another, "
                f"which is put together in memory, and {MAX_DELTA} bytes are the limit; keep such "
                "files in large file storage (git lfs)"
            )

    def _damaged(self) -> StorageError:
        return TransientError(f"{self._where}: the pack that git sent is damaged")


def _target_size(delta: bytes) -> int:
    """Return the bytes of what a difference leads to, which it says after those of its base."""
    sizes = []
    at = 0
    for _ in range(2):
        size = shift = 0
        while True:
            byte = delta[at] if at < len(delta) else 0
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if not byte & 128 or shift > 63:
                break
        sizes.append(size)
    return sizes[1]
