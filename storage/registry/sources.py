"""Files on their way into a registry: hashed once, and held to that when they are sent."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any, cast

from storage.backends.base import Payload
from storage.client.parallel import map_parallel
from storage.digest import hash_file, new_hasher
from storage.errors import DestinationError, IntegrityError
from storage.transfer.plan import Patterns
from storage.transfer.upload import SourceFile, scan

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["LocalFile", "hash_files"]

_THREADS = 8
_BUFFER = 1024 * 1024


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine that belongs to a version."""

    path: str
    """In the version."""

    local: str
    size: int
    blake3: str
    sha256: str

    @property
    def payload(self) -> Payload:
        """Its bytes, which raise before the last of them if they are not what was hashed."""
        return Payload(lambda: io.BufferedReader(_Verified(self), _BUFFER), self.size)


def hash_files(source: str, folder: str, patterns: Patterns) -> list[LocalFile]:
    """Hash a file, or the files of a folder, by several threads.

    Args:
        source: a file or a folder. Links are followed.
        folder: of the version, that it goes into.
        patterns: which files are wanted.

    Raises:
        InvalidInput: there is nothing that can be published.
        IntegrityError: a file changed meanwhile.
    """
    _, found = scan(source, patterns)
    base = folder.strip("/")
    base = f"{base}/" if base else ""
    return map_parallel(partial(_hash, base), found, min(_THREADS, os.cpu_count() or 1))


def _hash(base: str, file: SourceFile) -> LocalFile:
    size = 0

    def count(more: int) -> None:
        nonlocal size
        size += more

    try:
        digests = hash_file(file.local, ("blake3", "sha256"), count)
    except OSError as exc:
        raise _unreadable(file.local, exc) from exc
    if size != file.size:
        raise _changed(file.local)
    return LocalFile(
        f"{base}{file.path}", file.local, size, digests["blake3"].hex, digests["sha256"].hex
    )


class _Verified(io.RawIOBase):
    """A file that raises instead of giving its last bytes if it is not what was hashed."""

    def __init__(self, file: LocalFile) -> None:
        super().__init__()
        self._file = file
        self._left = file.size
        self._hasher = new_hasher("blake3")
        try:
            self._raw: IO[bytes] = open(file.local, "rb", buffering=0)  # noqa: SIM115 -- see close
        except OSError as exc:
            raise _unreadable(file.local, exc) from exc

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if not self._left:
            return 0
        with memoryview(buffer).cast("B")[: self._left] as view:
            try:
                count: int = cast("Any", self._raw).readinto(view)
            except OSError as exc:
                raise _unreadable(self._file.local, exc) from exc
            self._left -= count
            self._hasher.update(view[:count])
        if not count or (not self._left and self._hasher.hexdigest() != self._file.blake3):
            raise _changed(self._file.local)
        return count

    def close(self) -> None:
        raw = getattr(self, "_raw", None)
        if raw is not None:
            raw.close()
        super().close()


def _changed(path: str) -> IntegrityError:
    return IntegrityError(
        f"{path} changed while it was being published; nothing was published; publish it when its "
        "writer is done"
    )


def _unreadable(path: str, exc: OSError) -> DestinationError:
    return DestinationError(f"{path} cannot be read: {exc.strerror}")
