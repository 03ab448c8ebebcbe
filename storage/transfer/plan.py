"""What a download will do, as a value: the objects, where they go, and in which parts.

Making a plan asks the store (one ``stat``, or a listing) and writes nothing. A plan can be
printed, compared, pickled and run elsewhere.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import InvalidInput, ModelMissingError, UnsupportedOperation
from storage.transfer.engine import PART_GRANULE
from storage.uri import Location

if TYPE_CHECKING:
    from storage.backends.base import Backend, ByteRange, ObjectInfo

__all__ = [
    "Patterns",
    "Plan",
    "PlannedFile",
    "even_part",
    "local_paths",
    "make_plan",
    "plan_at_version",
    "resolve",
    "split",
]

_MAX_NAME = 255
_LEAST_PART = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One object and the path of the file that it becomes."""

    path: str
    """Relative to the destination, with ``/``; the file's name for a single object."""

    info: ObjectInfo


@dataclass(frozen=True, slots=True)
class Plan:
    """The objects of one download."""

    uri: str
    """The source, without credentials."""

    is_tree: bool
    """Whether the source is a tree; else there is exactly one file."""

    files: tuple[PlannedFile, ...]

    pinned: bool = False
    """Whether the source names one version of an object; no other may take its place."""

    @property
    def size(self) -> int | None:
        """Bytes in all; ``None`` if the store does not tell for some object."""
        total = 0
        for file in self.files:
            if file.info.size is None:
                return None
            total += file.info.size
        return total

    def fingerprint(self) -> str | None:
        """Return an identity of the source's content, or ``None`` where it cannot be pinned.

        Two plans of the same source with the same fingerprint give the same tree.
        """
        text = [f"{self.is_tree}\n"]
        for file in sorted(self.files, key=lambda file: file.path):
            if file.info.pin is None:
                return None
            text.append(f"{file.path}\0{file.info.size}\0{file.info.pin}\n")
        return hashlib.sha256("".join(text).encode("utf-8", "surrogateescape")).hexdigest()


class Patterns:
    """Which relative paths are wanted: ``fnmatch``, case-sensitive, on the whole path.

    ``*`` matches slashes too, and a pattern that ends in ``/`` means everything below, as on
    the Hugging Face Hub.
    """

    def __init__(
        self,
        allow: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
    ) -> None:
        """Keep what matches one of ``allow`` (all if ``None``) and none of ``ignore``."""
        self.allow = _pattern_list(allow)
        self.ignore = _pattern_list(ignore)

    @property
    def active(self) -> bool:
        """Whether anything could be left out."""
        return self.allow is not None or bool(self.ignore)

    def wants(self, path: str) -> bool:
        """Tell whether ``path`` is wanted."""
        if self.allow is not None and not _matches(path, self.allow):
            return False
        return not (self.ignore and _matches(path, self.ignore))


def _pattern_list(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str):
        patterns = (patterns,)
    listed = tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str) or not pattern:
            raise InvalidInput(f"a pattern is a non-empty string, not {pattern!r}")
    return tuple(f"{pattern}*" if pattern.endswith("/") else pattern for pattern in listed)


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def resolve(backend: Backend, location: Location) -> tuple[bool, Iterator[ObjectInfo]]:
    """Decide what is at ``location``: one object, else a tree, else nothing.

    The exact key is asked first, so one object can be read without permission to list.

    Returns:
        Whether it is a tree, and its objects.

    Raises:
        ModelMissingError: there is nothing.
        UnsupportedOperation: it can only be a tree, and the store has no listings.
    """
    if not location.forces_tree:
        try:
            return False, iter((backend.stat(location.key, location.version),))
        except ModelMissingError:
            named = location.version is not None and not location.has_revisions
            if named or not backend.capabilities.list:
                raise
    if not backend.capabilities.list:
        raise UnsupportedOperation(
            f"{location} names a tree, and {backend.name} has no listings; name one file"
        )
    found = backend.list(location.prefix)
    first = next(found, None)
    if first is None:
        raise ModelMissingError(str(location))
    return True, _chain(first, found)


def _chain(first: ObjectInfo, rest: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
    yield first
    yield from rest


def make_plan(backend: Backend, location: Location, patterns: Patterns) -> Plan:
    """Return the plan to download ``location``, refusing what could not be written safely.

    Raises:
        ModelMissingError: nothing is there, or nothing of it is wanted.
        InvalidInput: a key cannot be a path below the destination, or two keys are one path.
    """
    is_tree, objects = resolve(backend, location)
    if is_tree:
        infos = sorted(objects, key=lambda info: info.key)
        relative = [info.key[len(location.prefix) :] for info in infos]
    else:
        infos = list(objects)
        relative = [infos[0].filename or location.name]
    wanted = [
        (path, info) for path, info in zip(relative, infos, strict=True) if patterns.wants(path)
    ]
    if not wanted:
        raise ModelMissingError(
            str(location),
            f"{location}: none of its {len(infos)} objects matches the patterns; "
            f"allowed {patterns.allow}, ignored {patterns.ignore}",
        )
    paths = local_paths((path for path, _ in wanted), str(location))
    files = (PlannedFile(path, info) for path, (_, info) in zip(paths, wanted, strict=True))
    pinned = location.version is not None and not location.has_revisions
    return Plan(str(location), is_tree, tuple(files), pinned)


def plan_at_version(uri: str, is_tree: bool, sizes: Mapping[str, int], version: str) -> Plan:
    """Return the plan of files that are known, as it would be if all had ``version``.

    Args:
        uri: of the source.
        is_tree: whether it is a tree.
        sizes: bytes of each file by its path.
        version: of a whole repository.
    """
    from storage.backends.base import ObjectInfo

    files = (
        PlannedFile(path, ObjectInfo(path, size, version=version)) for path, size in sizes.items()
    )
    return Plan(uri, is_tree, tuple(files))


def local_paths(keys: Iterable[str], source: str) -> list[str]:
    """Map relative keys to relative paths of files, or refuse them all.

    Empty and ``.`` segments inside a key vanish, as they do in any file system; what would
    then be one path for two keys, or a file and a folder at once, is refused.

    Raises:
        InvalidInput: a key is absolute, leaves the tree, holds a NUL or a name too long for a
            file system, or collides with another one.
    """
    mapped: dict[str, str] = {}
    for key in keys:
        path = _local_path(key, source)
        if path in mapped:
            raise InvalidInput(
                f"{source}: the keys {mapped[path]!r} and {key!r} would be the same file "
                f"{path!r}; rename one, or choose by patterns"
            )
        mapped[path] = key
    folders = {path[:index] for path in mapped for index, char in enumerate(path) if char == "/"}
    for path in folders & mapped.keys():
        raise InvalidInput(
            f"{source}: the key {mapped[path]!r} would be a file and a folder at once; "
            "rename it, or choose by patterns"
        )
    return list(mapped)


def _local_path(key: str, source: str) -> str:
    parts = key.split("/")
    problem = None
    if key.startswith("/") or not key:
        problem = "is absolute"
    elif ".." in parts:
        problem = "leaves the destination by '..'"
    elif "\0" in key:
        problem = "holds a NUL character"
    elif any(len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME for part in parts):
        problem = f"holds a name of more than {_MAX_NAME} bytes"
    else:
        parts = [part for part in parts if part not in ("", ".")]
        if not parts:
            problem = "names no file"
    if problem is not None:
        raise InvalidInput(
            f"{source}: the key {key!r} {problem} and cannot become a file; nothing was written"
        )
    return "/".join(parts)


def split(size: int, part_size: int) -> list[ByteRange]:
    """Cut ``size`` bytes into parts of ``part_size``; the last one may be shorter."""
    from storage.backends.base import ByteRange

    return [ByteRange(start, min(start + part_size, size)) for start in range(0, size, part_size)]


def even_part(total: int, part_size: int, connections: int) -> int:
    """Return the size of parts by which connections that are equally fast end together.

    Each connection gets the same number of parts, at least two of them, as long as parts have
    4 MiB: below that, the wait for an answer costs more than the connection gives.

    Args:
        total: bytes of the whole transfer.
        part_size: bytes of the largest part.
        connections: requests under way at once.

    Returns:
        Bytes, a multiple of ``PART_GRANULE``; at most ``part_size``.
    """
    least = min(_LEAST_PART, part_size)
    if total >= 2 * connections * least:
        rounds = max(2, -(-total // (connections * part_size)))
    else:
        rounds = 1
    part = -(-total // (rounds * connections))
    return min(part_size, max(least, -(-part // PART_GRANULE) * PART_GRANULE))
