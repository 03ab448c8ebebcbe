"""How a file appears whole or not at all: written beside its place, then put there at once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from storage.backends.base import ObjectInfo, Payload
from storage.backends.local import files
from storage.backends.local.files import reporting
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    ObjectExistsError,
)

__all__ = ["Target", "delete", "fill_from", "put"]

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where a file goes, and under which conditions."""

    key: str
    uri: str
    directory: str
    name: str
    if_absent: bool = False
    if_match: ObjectInfo | None = None
    durable: bool = False

    @property
    def path(self) -> str:
        """The path that the file gets."""
        return os.path.join(self.directory, self.name)


def put(
    target: Target, fill: Callable[[int], int], size: int | None, swept: set[str]
) -> ObjectInfo:
    """Write a file and publish it.

    Args:
        target: where it goes.
        fill: writes the content to a file descriptor and returns the number of bytes.
        size: bytes expected, if known.
        swept: directories that were cleaned of what killed writers left; added to.
    """
    with _temporary(target, swept) as (fd, temporary, created):
        with reporting("writing", target.uri):
            _check_target(target)
        total = fill(fd)
        if size is not None and total != size:
            raise IntegrityError(
                f"{target.uri}: {size} bytes were announced, but the source gave {total}; "
                "nothing was stored"
            )
        with reporting("writing", target.uri):
            files.flush(fd)
            # The kernel's clock for files is coarse: two contents of one size within the
            # same tick, in an inode used again, would have the same ETag.
            now = time.time_ns()
            os.utime(fd, ns=(now, now))
            if target.durable:
                os.fsync(fd)
            info = files.info_of(target.key, target.uri, os.fstat(fd))
            _publish(target, temporary)
            if target.durable:
                for path in [target.directory, *map(os.path.dirname, created)]:
                    files.sync_directory(path)
    return info


def fill_from(
    payload: Payload, uri: str, on_bytes: Callable[[int], object] | None
) -> Callable[[int], int]:
    """Return what :func:`put` takes to write ``payload``."""

    def fill(fd: int) -> int:
        total = 0
        # What goes wrong with the source is not the store's fault and passes unchanged.
        with payload.open() as stream:
            while piece := stream.read(_CHUNK):
                with reporting("writing", uri):
                    files.write_all(fd, piece)
                total += len(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
        return total

    return fill


def delete(target: Target) -> None:
    """Remove a file or a link; a directory or nothing at all is left as it is."""
    with reporting("deleting", target.uri):
        try:
            if files.kind_of(os.lstat(target.path)) == "a directory":
                return
            with files.holding(target.directory, target.name, required=False):
                os.unlink(target.path)
        except OSError as exc:
            if not files.is_missing(exc):
                raise


@contextlib.contextmanager
def _temporary(target: Target, swept: set[str]) -> Iterator[tuple[int, str, Sequence[str]]]:
    """Make the directories and a locked temporary file; undo all of it after a failure."""
    created: list[str] = []
    fd, path = -1, ""
    try:
        with reporting("writing", target.uri):
            fd, path = _begin(target, swept, created)
        yield fd, path, created
    except BaseException:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)
        files.remove_created(created)
        raise
    else:
        # Gone already if it was renamed; a second name of the file if it was linked.
        with contextlib.suppress(OSError):
            os.unlink(path)
    finally:
        if fd >= 0:
            os.close(fd)


def _begin(target: Target, swept: set[str], created: list[str]) -> tuple[int, str]:
    for _ in range(10):
        files.make_parents(target.directory, created)
        if target.directory not in swept:
            swept.add(target.directory)
            files.sweep(target.directory)
        # A failed writer may take back a directory that it had made.
        with contextlib.suppress(FileNotFoundError):
            return files.create(target.directory, target.name)
    return files.create(target.directory, target.name)


def _check_target(target: Target) -> None:
    """Refuse, before a byte is copied, what could not be published."""
    try:
        os.lstat(target.path)
    except FileNotFoundError:
        if target.if_match is not None:
            _check_current(target, target.if_match)
        return
    with contextlib.suppress(FileNotFoundError):  # a link to nowhere may be replaced
        if kind := files.kind_of(os.stat(target.path)):
            raise InvalidInput(
                f"{target.uri} is {kind}, which a file may not replace; use another name"
            )
    if target.if_absent:
        raise _exists(target)
    if target.if_match is not None:
        _check_current(target, target.if_match)


def _check_current(target: Target, expected: ObjectInfo) -> None:
    # Opened, not only looked at: on a network file system this is what asks the server.
    try:
        fd = os.open(target.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise ObjectChangedError(
            f"{target.uri} was removed: expected etag {expected.pin}, found nothing; "
            "decide anew whether to write it"
        ) from exc
    try:
        found = files.info_of(target.key, target.uri, os.fstat(fd))
    finally:
        os.close(fd)
    files.check_pin(target.uri, found, expected)


def _publish(target: Target, temporary: str) -> None:
    if target.if_absent:
        try:
            files.link_or_rename(temporary, target.directory, target.name)
        except FileExistsError as exc:
            raise _exists(target) from exc
        return
    required = target.if_match is not None
    with files.holding(target.directory, target.name, required=required):
        if target.if_match is not None:
            _check_current(target, target.if_match)
        os.replace(temporary, target.path)


def _exists(target: Target) -> ObjectExistsError:
    if target.durable:
        # Whoever put it there may not have come that far, and is relied upon from now on.
        files.sync_directory(target.directory)
    return ObjectExistsError(f"{target.uri} exists, and was to be created only")
