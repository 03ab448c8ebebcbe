"""Which bytes of a download are here, written down so that a killed one goes on where it was.

A journal is a file beside the files that are under way, in a folder that one download has for
itself. Each line is a record with a checksum of its own; the first one says whose it is::

    <crc32> {"journal": 1, "source": "<hash>", "boot": "<id of the boot>", "synced": false}
    <crc32> {"file": 0, "path": "content/a.bin", "content": "<hash>", "size": 9, "range": [0, 5]}
    <crc32> {"more": 0, "range": [5, 9]}
    <crc32> {"drop": 0}

A range is noted when its bytes are in the file, never before. What the kernel has, a killed
process has not lost; a machine that loses power may have, so that the records of another boot
count only if everything was forced to disk before it was noted (``synced``). Reading ends at the
first line that is cut, damaged or makes no sense: what was noted after it is fetched again.

``content`` stands for an object's key, version and size. Only the bytes of one and the same
version belong together, so that nothing is noted of an object that has no strong validator. What
is found is hashed with the rest of its file before that is published; the journal only says
where bytes are. Beside relative paths it holds nothing that tells the source, and no credential:
``source`` and ``content`` are hashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from storage import files
from storage.backends.base import ByteRange, ObjectInfo
from storage.cancellation import OperationCancelledError
from storage.errors import AuthenticationError, ObjectChangedError, TransferError
from storage.transfer.lines import decode_line, encode_line

__all__ = ["NAME", "STEP", "WORTH", "Journal", "Tracked"]

NAME = "journal"
"""Of the file, in the folder of the download."""

STEP = 2 * 1024 * 1024
"""Bytes of one range that are fetched between two notes."""

WORTH = 8 * 1024 * 1024
"""Bytes from which on it is worth while to go on with a download rather than to begin anew."""

_FORMAT = 1
# Credentials that expire midway are renewed by somebody, and then the rest can be fetched.
_WORTH_ANOTHER_TRY = (
    TransferError,
    AuthenticationError,
    KeyboardInterrupt,
    SystemExit,
    OperationCancelledError,
)


class Journal:
    """The journal of one download, which has its folder for itself. Safe for many threads."""

    def __init__(self, path: str, source: str, *, durable: bool = False) -> None:
        """Read what is there; nothing is written yet.

        Args:
            path: of the journal; the files it speaks of are in its folder.
            source: what tells this download from all others; a hash. What another one left is
                as if it was not there.
            durable: force bytes to disk before they are noted, so that a power cut does not
                count.
        """
        self.path = path
        self.folder = os.path.dirname(path)
        self._source = source
        self._durable = durable
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._begun = self._broken = False
        self._count = 0
        self._files: dict[str, Tracked] = {}
        for name, content, size, ranges in _read(path, source):
            place = os.path.join(self.folder, name)
            if _is_usable(place, ranges):
                self._files[place] = Tracked(self, place, content, size, ranges)

    @property
    def noted(self) -> int:
        """How many bytes of all files are noted."""
        return sum(file.noted for file in tuple(self._files.values()))

    def keep_only(self, wanted: Mapping[str, ObjectInfo]) -> None:
        """Remove from the folder all that is of no use to those who want some files.

        Args:
            wanted: by its path, the object that each file is to become.

        Raises:
            OSError: the folder cannot be written.
        """
        if not os.path.exists(self.path):
            return  # a folder that was made just now
        self._files = {
            path: file
            for path, file in self._files.items()
            if path in wanted and file.content == _content(wanted[path])
        }
        for path in _strangers(self.folder, {*self._files, self.path}):
            files.remove(path)
        if not self._files:
            files.remove(self.path)
            return
        # Anew, without what is over, and as of this boot.
        lines = [self._header()]
        for file in self._files.values():
            if self._durable:
                files.sync(file.path)
            lines += file.lines(self._next())
        fresh = f"{self.path}.new"
        with open(fresh, "wb") as out:
            out.writelines(lines)
            if self._durable:
                out.flush()
                os.fsync(out.fileno())
        os.replace(fresh, self.path)
        self._begun = True

    def has(self, path: str) -> bool:
        """Tell whether some of a file is here."""
        return path in self._files

    def track(self, path: str, info: ObjectInfo) -> Tracked:
        """Return the notes of a file, those of earlier downloads included.

        Args:
            path: of the file, in the folder of the journal.
            info: the object that it becomes; it has a pin and a size.
        """
        content = _content(info)
        found = self._files.get(path)
        if found is None or found.content != content:
            found = self._files[path] = Tracked(self, path, content, info.size or 0)
        return found

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            self._broken = True
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def is_worth_keeping(self, error: BaseException | None) -> bool:
        """Tell whether a download that ends by ``error`` should leave what it has got.

        It should if another try may succeed, and has enough to begin with.
        """
        if isinstance(error, ObjectChangedError):
            return False  # of the version that was asked for there is no more
        return isinstance(error, _WORTH_ANOTHER_TRY) and self.noted >= WORTH

    def tell(self, error: BaseException | None, where: str) -> None:
        """Add to the message of ``error`` that what has arrived is kept, and where."""
        if isinstance(error, (TransferError, AuthenticationError)):
            error.args = (
                f"{error}; {self.noted} bytes of it are kept {where}, and the next download of "
                "the same to the same place goes on from there",
                *error.args[1:],
            )

    def write(self, file: Tracked, span: tuple[int, int]) -> None:
        """Note a range of a file; for :class:`Tracked`."""
        with self._lock:
            if self._broken:
                return
            if file.number is None:
                self._append(*file.lines(self._next(), [span]))
            else:
                self._append(encode_line({"more": file.number, "range": span}))
            file.noted += 0 if self._broken else span[1] - span[0]

    def drop(self, file: Tracked) -> None:
        """Note that a file is of no use; for :class:`Tracked`."""
        with self._lock:
            if self._files.get(file.path) is file:
                del self._files[file.path]
            if file.number is not None:
                self._append(encode_line({"drop": file.number}))
                if self._broken:
                    # What comes to be in the file is not what the journal says.
                    with contextlib.suppress(OSError):
                        os.unlink(self.path)

    def _append(self, *lines: bytes) -> None:
        if self._broken:
            return
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                if not self._begun:
                    flags |= os.O_TRUNC
                    lines = (self._header(), *lines)
                self._descriptor = os.open(self.path, flags, 0o600)
            data = b"".join(lines)
            self._broken = os.write(self._descriptor, data) != len(data)
        except OSError:
            # What is not noted is fetched again some day; this download does not need it.
            self._broken = True

    def _header(self) -> bytes:
        return encode_line(
            {
                "journal": _FORMAT,
                "source": self._source,
                "boot": files.boot_id(),
                "synced": self._durable,
            }
        )

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    @property
    def durable(self) -> bool:
        """Whether bytes are forced to disk before they are noted."""
        return self._durable


class Tracked:
    """What is noted of one file."""

    def __init__(
        self,
        journal: Journal,
        path: str,
        content: str,
        size: int,
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        """Begin with ``ranges``, which are sorted and apart from one another."""
        self.path = path
        self.content = content
        self.number: int | None = None
        """Of the file in the journal, once it is in there."""
        self.size = size
        self.ranges = [ByteRange(start, end) for start, end in ranges or ()]
        """What was here when the download began."""
        self.noted = sum(map(len, self.ranges))
        """How many bytes are here now."""
        # To sync is to wait for all of the file that is not on the disk yet.
        self.step = sys.maxsize if journal.durable else STEP
        """Bytes of one range that are worth a note, if it goes on."""
        self._journal = journal

    def add(self, descriptor: int, start: int, end: int) -> None:
        """Note that the bytes from ``start`` to ``end`` are in the open file ``descriptor``.

        Raises:
            OSError: they cannot be forced to disk.
        """
        if start == end:
            return
        if self._journal.durable:
            os.fdatasync(descriptor)
        self._journal.write(self, (start, end))

    def drop(self) -> None:
        """Note that what is in the file is of no use."""
        self.ranges = []
        self.noted = 0
        self._journal.drop(self)

    def lines(self, number: int, spans: list[tuple[int, int]] | None = None) -> list[bytes]:
        """Return the records that begin the file, as number ``number`` of its journal."""
        if spans is None:
            spans = [(span.start, span.end) for span in self.ranges]
        self.number = number
        name = self.path[len(self._journal.folder) + 1 :]
        first = {"file": number, "path": name, "content": self.content, "size": self.size}
        lines = [encode_line(first | {"range": spans[0]})]
        return lines + [encode_line({"more": number, "range": span}) for span in spans[1:]]


def _content(info: ObjectInfo) -> str:
    """Return what stands for one version of an object."""
    text = f"{info.key}\0{info.pin}\0{info.size}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _records(path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal up to the first that is not as it was written."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as lines:
        for line in lines:
            record = decode_line(line)
            if record is None:
                return
            yield record


_Found = tuple[str, str, int, list[tuple[int, int]]]


def _read(path: str, source: str) -> list[_Found]:
    """Return path, content, size and ranges of each file that a journal speaks of."""
    found: dict[int, _Found] = {}
    # Not only damage ends it: another release may have written what this one does not know.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if not _is_private(os.path.dirname(path)):
            return []
        records = _records(path)
        head = next(records, None)
        if head is None or head["journal"] != _FORMAT or head["source"] != source:
            return []
        boot = files.boot_id()
        if not head["synced"] and (boot is None or head["boot"] != boot):
            return []
        for record in records:
            if "drop" in record:
                found.pop(record["drop"], None)
                continue
            start, end = record["range"]
            if "file" in record:
                entry: _Found = (_checked(record["path"]), record["content"], record["size"], [])
                found[record["file"]] = entry
            else:
                entry = found[record["more"]]
            if not 0 <= start < end <= entry[2]:
                break
            entry[3].append((start, end))
    # A path that came twice is what it was the last time.
    last = {name: (content, size, spans) for name, content, size, spans in found.values()}
    return [(name, content, size, _merged(spans)) for name, (content, size, spans) in last.items()]


def _checked(path: str) -> str:
    if path.startswith("/") or "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(path)
    return path


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _is_private(folder: str) -> bool:
    """Tell whether nobody else can have put there what is in a folder."""
    found = os.lstat(folder)
    mine = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return mine and stat.S_ISDIR(found.st_mode)


def _is_usable(path: str, ranges: list[tuple[int, int]]) -> bool:
    """Tell whether a file can have ranges of bytes, and can be written further."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (
        bool(ranges)
        and stat.S_ISREG(found.st_mode)
        # One that has been put somewhere else as well is not ours any more.
        and found.st_nlink == 1
        and bool(found.st_mode & stat.S_IWUSR)
        and found.st_size >= ranges[-1][1]
    )


def _strangers(folder: str, known: set[str]) -> Iterator[str]:
    """Yield what is in a folder beside ``known`` files and the lock of the folder."""
    needed = {*known, os.path.join(folder, "lock")}
    for path in known:
        while len(path := os.path.dirname(path)) > len(folder):
            needed.add(path)
    for base, inner, names in os.walk(folder):
        for name in (*inner, *names):
            path = os.path.join(base, name)
            if path not in needed:
                yield path
        inner[:] = [name for name in inner if os.path.join(base, name) in needed]
