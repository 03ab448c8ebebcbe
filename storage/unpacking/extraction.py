"""A folder that an archive goes into, member by member, and never beyond it or its limits."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from storage.errors import InvalidInput, one_line

__all__ = ["DamageError", "Extraction", "ExtractionLimits", "leads_out", "least_size", "quoted"]

_GIB = 1024**3
# What unpacks to no more is never too much for its archive.
_FLOOR = _GIB
# A path that would lead elsewhere, here or on a system with other separators.
_OUTWARD = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|(?:^|[/\\])\.\.(?:$|[/\\])|\0")
_MAX_LINK = 4096
# Folders remembered as real ones; more are looked at again.
_REMEMBERED = 10_000


class DamageError(Exception):
    """An archive is not what its format demands; becomes an ``InvalidInput`` that names it."""


@dataclass(frozen=True, slots=True)
class ExtractionLimits:
    """What an archive may become."""

    total_size: int = 1024 * _GIB
    """Bytes of all files together, the holes of sparse files and every hard link included."""

    ratio: float = 200.0
    """Bytes of all files over bytes of the archive, and for each member of a ZIP by itself; not
    applied to less than 1 GiB."""

    entries: int = 1_000_000
    """Files, folders and links."""

    path_length: int = 2048
    """Bytes of a member's path."""

    path_depth: int = 128
    """Folders that a member's path goes through."""


class Extraction:
    """Makes files, folders and links below a folder, and counts them."""

    def __init__(self, name: str, folder: str, archive_size: int, limits: ExtractionLimits) -> None:
        """Begin in an empty folder that nobody else changes.

        Args:
            name: of the archive, for messages.
            folder: where to.
            archive_size: bytes of the archive.
            limits: what it may become.
        """
        self.name = name
        self._folder = folder
        self._root = os.path.realpath(folder)
        self._limits = limits
        self._bound = min(limits.total_size, self._by_ratio(archive_size))
        self._size = self._entries = 0
        self._links: set[str] = set()
        # Paths that are folders and no links on any part of their way.
        self._real = {folder}

    def refusal(self, what: str) -> InvalidInput:
        """Return an error that says why the archive is not extracted."""
        return InvalidInput(f"{self.name} {what}; it was refused")

    def entry(self) -> None:
        """Count a file, folder or link."""
        self._entries += 1
        if self._entries > self._limits.entries:
            raise self.refusal(f"holds more than {self._limits.entries} entries")

    def count(self, size: int) -> None:
        """Count bytes that are about to be in a file, or were decompressed."""
        self._size += size
        if self._size > self._bound:
            raise self.refusal(f"unpacks to more than {self._bound:.0f} bytes")

    def check_member(self, name: str, size: int, packed: int) -> None:
        """Refuse a member that becomes too large for what it is in the archive."""
        if size > self._by_ratio(packed):
            raise self.refusal(f"holds {quoted(name)}, {packed} bytes that become {size}")

    def _by_ratio(self, packed: int) -> float:
        return max(_FLOOR, packed * self._limits.ratio)

    def folder(self, name: str) -> None:
        """Make a folder, if it is not there yet."""
        self._make(self.place(name))

    @contextlib.contextmanager
    def file(self, name: str, executable: bool) -> Iterator[IO[bytes]]:
        """Make a file and yield it, open for writing."""
        path = self._free(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o777 if executable else 0o666)
        with open(descriptor, "wb", buffering=0) as target:
            yield target

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link."""
        path = self._free(name)
        landing = os.path.join(os.path.dirname(path), target)
        if (
            not target
            or "\0" in target
            or len(os.fsencode(target)) > _MAX_LINK - 1
            or os.path.isabs(target)
            or not self._holds(landing)
        ):
            raise self.refusal(f"holds the link {quoted(name)}, which leads out of it")
        os.symlink(target, path)
        # Where it is, not the way there, which a later member may turn elsewhere.
        place, own_name = os.path.split(path)
        self._links.add(os.path.join(os.path.realpath(place), own_name))

    def hard_link(self, name: str, target: str) -> None:
        """Make a file another name of one that is there."""
        source = self.place(target)
        if not os.path.isfile(source) or os.path.islink(source):
            raise self.refusal(
                f"holds the link {quoted(name)} to {quoted(target)}, which is no file in it"
            )
        if self.place(name) == source:
            return
        # Whoever reads the files reads it again.
        self.count(os.path.getsize(source))
        path = self._free(name)
        if not os.path.isfile(source):
            raise self.refusal(f"holds the link {quoted(name)}, which replaces what it leads to")
        try:
            os.link(source, path)
        except OSError:  # a file system without hard links
            shutil.copy(source, path)

    def finish(self) -> None:
        """Look once more whether all links stay in the folder."""
        for path in self._links:
            # A later member may have turned an earlier link's way around.
            if os.path.islink(path) and not self._holds(path):
                name = os.path.relpath(path, self._root)
                raise self.refusal(f"holds the link {quoted(name)}, which leads out of it")

    def forget(self) -> None:
        """Look at all folders again: some were removed, or became something else."""
        self._real = {self._folder}

    def _free(self, name: str) -> str:
        """Return the path of a file or link to be made. The last member of a name wins."""
        path = self.place(name)
        if path == self._folder:
            raise self.refusal(f"holds the file {quoted(name)}, which is the folder itself")
        self._make(os.path.dirname(path))
        # Never written through: what is there is removed, be it a link.
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
            self.forget()
        elif os.path.lexists(path):
            os.unlink(path)
        return path

    def _make(self, folder: str) -> None:
        if folder in self._real:
            return
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            name = os.path.relpath(folder, self._folder)
            raise self.refusal(f"holds {quoted(name)} as a file and as a folder") from exc
        except FileNotFoundError as exc:
            name = os.path.relpath(folder, self._folder)
            raise self.refusal(f"holds {quoted(name)} behind a link that leads nowhere") from exc
        if os.path.realpath(folder) == self._root + folder[len(self._folder) :]:
            if len(self._real) >= _REMEMBERED:
                self._real = {self._folder}
            while folder not in self._real:
                self._real.add(folder)
                folder = os.path.dirname(folder)

    def place(self, name: str) -> str:
        """Return where a member goes; follow the links that earlier members made."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not name or leads_out(name):
            raise self.refusal(f"holds the name {quoted(name)}, which leaves it")
        if len(os.fsencode(name)) > self._limits.path_length:
            raise self.refusal(f"holds a path of more than {self._limits.path_length} bytes")
        if len(parts) - 1 > self._limits.path_depth:
            raise self.refusal(f"holds a path through more than {self._limits.path_depth} folders")
        path = os.path.join(self._folder, *parts)
        parent = path if path == self._folder else os.path.dirname(path)
        if parent not in self._real and not self._holds(parent):
            raise self.refusal(f"holds {quoted(name)} behind a link that leaves it")
        return path

    def _holds(self, path: str) -> bool:
        """Tell whether ``path`` certainly stays in the folder, whatever links are on the way."""
        loose = os.path.realpath(path)
        while True:
            try:
                strict = os.path.realpath(path, strict=True)
            except (FileNotFoundError, NotADirectoryError):
                path = os.path.dirname(path)
            except OSError:
                # A circle, or longer than the system can follow: realpath() would take the
                # rest literally, and then the system might go elsewhere.
                return False
            else:
                break
        inside = self._root.rstrip("/") + "/"
        return all(found == self._root or found.startswith(inside) for found in (loose, strict))


def least_size(size: int) -> int:
    """Return the bytes an archive needs so that by default it may unpack to ``size``."""
    return 0 if size <= _FLOOR else math.ceil(size / ExtractionLimits().ratio)


def leads_out(name: str) -> bool:
    """Tell whether a member's name leads elsewhere, here or on another system."""
    return _OUTWARD.search(name) is not None


def quoted(name: str) -> str:
    """Return a name as a message shows it."""
    return one_line(repr(name), 200)
