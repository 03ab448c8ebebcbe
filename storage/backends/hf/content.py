"""What is sent to the Hub: payloads that can be read anywhere, and the lines of a commit."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from storage.backends.base import Payload
from storage.backends.drivers.streams import exactly
from storage.errors import (
    DestinationError,
    InsufficientSpaceError,
    IntegrityError,
    TransientError,
)

__all__ = ["Content", "Operations", "Source", "Stretch", "git_oid"]

SAMPLE = 512
_BLOCK = 1024 * 1024
_SMALL = 256 * 1024
_COMMIT_MEMORY = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes that can be read from any place, by many threads at once."""

    size: int
    read_at: Callable[[int, int], bytes]
    """``(length, position)`` → at least one byte, unless it is past the end."""

    @classmethod
    def of_file(cls, descriptor: int, size: int) -> Content:
        """Return what an open file holds."""
        return cls(size, lambda length, position: os.pread(descriptor, length, position))

    @classmethod
    def of_bytes(cls, data: bytes) -> Content:
        """Return bytes in memory."""
        return cls(len(data), lambda length, position: data[position : position + length])

    def sha256(self) -> str:
        """Return the SHA-256 of all of it, in hex."""
        hasher = hashlib.sha256()
        for block in Stretch(self, 0, self.size):
            hasher.update(block)
        return hasher.hexdigest()

    def data(self) -> bytes:
        """Return all of it."""
        return b"".join(Stretch(self, 0, self.size))


class Stretch:
    """A part of a content as a request's body: blocks with a length, each time anew."""

    def __init__(
        self,
        content: Content,
        start: int,
        end: int,
        on_bytes: Callable[[int], object] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Describe the part.

        Args:
            content: what it is a part of.
            start: offset of its first byte.
            end: offset after its last byte.
            on_bytes: called with the size of each block that was taken.
            stop: once it is set, the next block is an error.
        """
        self._content = content
        self._start = start
        self._end = end
        self._on_bytes = on_bytes
        self._stop = stop

    def __len__(self) -> int:
        return self._end - self._start

    def __iter__(self) -> Iterator[bytes]:
        position = self._start
        while position < self._end:
            if self._stop is not None and self._stop.is_set():
                raise TransientError("given up, because another file of the upload failed")
            block = self._content.read_at(min(_BLOCK, self._end - position), position)
            if not block:
                raise IntegrityError("a file became shorter while it was being sent")
            position += len(block)
            yield block
            if self._on_bytes is not None:
                self._on_bytes(len(block))


class Source:
    """The payloads of one upload, as contents.

    Small ones are kept in memory, up to a limit in all, so that they are read once. A local
    file is used where it is. Anything else is kept on the disk while it is sent, one at a
    time; those whose size is unknown until they have been read, from then on.
    """

    def __init__(self, memory: int) -> None:
        """Keep at most ``memory`` bytes of small payloads."""
        self._room = memory
        self._kept: dict[str, Content] = {}
        self._one_at_a_time = threading.Lock()
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.close()

    def look(self, key: str, payload: Payload, where: str) -> tuple[int, bytes]:
        """Return the size of a payload and its first bytes.

        Raises:
            IntegrityError: it is not of the size that it announces.
        """
        with payload.open() as stream:
            if payload.size is None:
                content = self._files.enter_context(_on_disk(stream))
                self._kept[key] = content
            elif payload.size <= min(_SMALL, self._room):
                # One more than announced, to see whether there is more.
                data = exactly(stream, payload.size + 1)
                _check_size(where, payload.size, len(data))
                content = self._kept[key] = Content.of_bytes(data)
                self._room -= len(data)
            else:
                return payload.size, exactly(stream, SAMPLE)
        return content.size, content.read_at(SAMPLE, 0)

    @contextmanager
    def opened(self, key: str, payload: Payload, where: str) -> Iterator[Content]:
        """Give the content of a payload that was looked at.

        Raises:
            IntegrityError: it is not of the size that it announces, or changed meanwhile.
        """
        if key in self._kept:
            yield self._kept[key]
            return
        with payload.open() as stream:
            if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
                before = os.fstat(stream.fileno())
                _check_size(where, payload.size, before.st_size)
                yield Content.of_file(stream.fileno(), before.st_size)
                after = os.fstat(stream.fileno())
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise IntegrityError(f"{where}: its file changed while it was being sent")
                return
            with self._one_at_a_time, _on_disk(stream) as content:
                _check_size(where, payload.size, content.size)
                yield content


class Operations:
    """The lines of a commit, on disk if they are many."""

    def __init__(self, on_bytes: Callable[[int], object] | None = None) -> None:
        """Begin without a line.

        Args:
            on_bytes: called with the bytes of small files that were sent, as they are outside of
                the commit; negative: that have to be sent again.
        """
        self._file = tempfile.SpooledTemporaryFile(_COMMIT_MEMORY)  # noqa: SIM115 -- see __exit__
        self._on_bytes = on_bytes
        self._content = self._told = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Add a line."""
        with _disk_errors():
            self._file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")

    def add_file(self, path: str, data: bytes) -> None:
        """Add a small file with its content."""
        self._content += len(data)
        content = base64.b64encode(data).decode()
        self.add("file", {"content": content, "path": path, "encoding": "base64"})

    def add_large(self, path: str, sha256: str, size: int | None) -> None:
        """Add a file that is in large file storage."""
        self.add("lfsFile", {"path": path, "algo": "sha256", "oid": sha256, "size": size})

    def after(self, header: Mapping[str, Any]) -> _Lines:
        """Return the body of a commit with this header."""
        first = json.dumps({"key": "header", "value": header}).encode() + b"\n"
        return _Lines(first, self)

    def size(self) -> int:
        """Return the length of all lines."""
        return self._file.seek(0, os.SEEK_END)

    def blocks(self) -> Iterator[bytes]:
        """Yield all lines, each time anew."""
        size, position = self.size(), 0
        self._file.seek(0)
        self._tell(0)
        while block := self._file.read(_BLOCK):
            yield block
            position += len(block)
            self._tell(self._content * position // size)

    def _tell(self, moved: int) -> None:
        if self._on_bytes is not None and moved != self._told:
            self._on_bytes(moved - self._told)
        self._told = moved


class _Lines:
    """A header and the lines after it, as an iterable with a length."""

    def __init__(self, first: bytes, operations: Operations) -> None:
        self._first = first
        self._operations = operations
        self._length = len(first) + operations.size()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        yield self._first
        yield from self._operations.blocks()


def git_oid(data: bytes) -> str:
    """Return the id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def _on_disk(stream: BinaryIO) -> Iterator[Content]:
    """Give the rest of a stream as a content on this machine's disk."""
    with _disk_errors():
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 -- closed below
    with file:
        size = 0
        while block := stream.read(_BLOCK):
            size += len(block)
            view = memoryview(block)
            with _disk_errors():
                while view:
                    view = view[file.write(view) :]
        yield Content.of_file(file.fileno(), size)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        text = (
            "what is sent to the Hub is kept on the disk meanwhile, and the folder for temporary "
            f"files cannot hold it: {exc.strerror}; name another one by TMPDIR"
        )
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (InsufficientSpaceError if full else DestinationError)(text) from exc


def _check_size(where: str, announced: int | None, found: int) -> None:
    if announced is not None and announced != found:
        some = f"more than {announced}" if found > announced else f"only {found}"
        raise IntegrityError(
            f"{where}: {announced} bytes were announced and {some} came; nothing was written"
        )
