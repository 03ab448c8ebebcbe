"""Layers as files of this machine: fetched, verified, unpacked, and only then told of."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from storage.backends.oci.manifests import Layer
from storage.backends.oci.overlay import Overlay
from storage.backends.oci.workspace import Workspace
from storage.digest import Digest
from storage.errors import IntegrityError, InvalidInput, TransientError, one_line
from storage.files import check_space, remove, translate_os_errors
from storage.unpacking.extraction import DamageError, ExtractionLimits
from storage.unpacking.tar import Stream, extract_tar
from storage.unpacking.zstd import is_zstd, open_zstd, zstandard_error

__all__ = ["Packed", "PackedFile", "Unpacking"]

_FOLDER = "files"
_GZIP = b"\x1f\x8b"
_DAMAGE = (DamageError, gzip.BadGzipFile, zlib.error, EOFError)

Fetch = Callable[[Layer, int], tuple[int, Iterator[bytes]]]
"""Start to read a blob from an offset; return the offset that it starts from, and its bytes."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer to be unpacked."""

    layer: Layer
    diff_id: Digest | None
    """The digest of the decompressed tar, where it is known."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file that came in a layer."""

    path: str
    """Where it lies, below the folder of all of them."""

    size: int


class Unpacking:
    """The files of some layers. Safe for threads; work that broke off is gone on with.

    What files there are is remembered. The files themselves go when all of them were read, which
    is what a download does, so that a model is not there twice as long as its process lives; they
    are fetched again if somebody reads one once more.
    """

    def __init__(
        self,
        where: str,
        packed: Sequence[Packed],
        root: tuple[str, ...] | None,
        fetch: Fetch,
        limits: ExtractionLimits,
    ) -> None:
        """Prepare; nothing is fetched.

        Args:
            where: the URI, for messages.
            packed: the layers, the lowest first.
            root: the folder of an image that is wanted; ``None`` for archives of files.
            fetch: reads blobs.
            limits: what all layers together may become.
        """
        self._where = where
        self._packed = packed
        self._root = root
        self._fetch = fetch
        self._limits = limits
        self._lock = threading.Lock()
        self._workspace: Workspace | None = None
        self._overlay: Overlay | None = None
        self._done = 0
        self._blob: _Blob | None = None
        self._files: dict[str, PackedFile] | None = None
        self._is_here = False
        self._unread: dict[str, int] = {}

    def files(self) -> dict[str, PackedFile]:
        """Return all files by their paths; fetch and unpack them for that if nobody has yet.

        Raises:
            IntegrityError: a layer is not what the manifest says.
            InvalidInput: a layer is damaged, or holds what is refused.
            InsufficientSpaceError: there is no room for them.
            TransientError: a layer could not be fetched; the next call goes on with it.
        """
        with self._lock:
            self._leave_to_parent()
            return self._found() if self._files is None else self._files

    def open(self, key: str) -> IO[bytes]:
        """Open a file that there is; raises what :meth:`files` does."""
        with self._lock:
            self._leave_to_parent()
            files = self._files
            if files is None or not self._is_here:
                files = self._found()
            assert self._workspace is not None
            path = os.path.join(self._workspace.path, _FOLDER, files[key].path)
            with translate_os_errors(path):
                return open(path, "rb", buffering=0)

    def was_read(self, key: str, count: int) -> None:
        """Note that ``count`` bytes of a file were handed over."""
        with self._lock:
            if key not in self._unread:
                return
            self._unread[key] -= count
            if self._unread[key] > 0:
                return
            del self._unread[key]
            if not self._unread:
                self._forget(files=False)

    def _found(self) -> dict[str, PackedFile]:
        try:
            self._files = self._unpack()
        except BaseException as exc:
            if not isinstance(exc, TransientError):
                self._forget()
            raise
        self._is_here = True
        self._unread = {key: file.size for key, file in self._files.items() if file.size}
        return self._files

    def close(self) -> None:
        """Remove the files."""
        with self._lock:
            self._forget()

    def _leave_to_parent(self) -> None:
        """Forget, after a fork, the files of the parent's, which removes them when it likes."""
        if self._workspace is not None and not self._workspace.is_own:
            self._forget(files=False)

    def _forget(self, *, files: bool = True) -> None:
        if self._blob is not None:
            self._blob.close()
        if self._workspace is not None:
            self._workspace.close()
        self._workspace = self._overlay = self._blob = None
        self._is_here, self._done, self._unread = False, 0, {}
        if files:
            self._files = None

    def _unpack(self) -> dict[str, PackedFile]:
        if self._workspace is None:
            self._workspace = Workspace()
        folder = os.path.join(self._workspace.path, _FOLDER)
        with translate_os_errors(self._workspace.path):
            total = sum(each.layer.size for each in self._packed)
            if self._overlay is None:
                os.mkdir(folder)
                self._overlay = Overlay(self._where, folder, total, self._limits)
                # Unpacked they take no less, and one of them is there twice for a while.
                largest = max((each.layer.size for each in self._packed), default=0)
                check_space(folder, total + largest)
            for index in range(self._done, len(self._packed)):
                self._take(self._packed[index])
                self._done = index + 1
            self._overlay.finish()
            return _index(folder, self._overlay, self._limits)

    def _take(self, packed: Packed) -> None:
        assert self._workspace is not None
        if self._blob is None:
            path = os.path.join(self._workspace.path, "layer")
            self._blob = _Blob(path, packed.layer, self._where)
        self._blob.fetch(self._fetch)
        self._extract(self._blob.file, packed)
        blob, self._blob = self._blob, None
        blob.close()
        remove(blob.path)

    def _extract(self, file: IO[bytes], packed: Packed) -> None:
        assert self._overlay is not None
        try:
            with _decompressed(file) as stream:
                checked = _Checked(stream, packed.diff_id)
                if self._root is None:
                    extract_tar(checked, self._overlay)
                else:
                    self._overlay.apply(checked, self._root)
        except _DAMAGE as exc:
            raise self._damaged(packed, exc) from exc
        except Exception as exc:
            # The class is known only where the package is installed.
            if type(exc).__name__ == "ZstdError" and isinstance(exc, zstandard_error()):
                raise self._damaged(packed, exc) from exc
            raise
        if packed.diff_id is not None and checked.digest() != packed.diff_id:
            raise IntegrityError(
                f"{self._where}: the content of the layer {packed.layer.digest} should be "
                f"{packed.diff_id}, and is {checked.digest()}; nothing of it is used"
            )

    def _damaged(self, packed: Packed, exc: Exception) -> InvalidInput:
        return InvalidInput(
            f"{self._where}: the layer {packed.layer.digest} cannot be unpacked: {one_line(exc)}; "
            "expected a whole tar, plain or compressed by gzip or zstd"
        )


class _Blob:
    """A blob on its way to a file; verified when all of it is there."""

    def __init__(self, path: str, layer: Layer, where: str) -> None:
        self.path = path
        self.file: IO[bytes] = open(path, "w+b", buffering=0)  # noqa: SIM115 -- closed by close()
        self._layer = layer
        self._where = where
        self._begin()

    def _begin(self) -> None:
        self._hasher = hashlib.new(self._layer.digest.algorithm)
        self._size = 0
        self.file.seek(0)
        self.file.truncate()

    def fetch(self, fetch: Fetch) -> None:
        """Fetch what is missing, and verify all of it; leave the file at its beginning."""
        layer = self._layer
        if self._size < layer.size:
            start, chunks = fetch(layer, self._size)
            if start != self._size:
                self._begin()
            for chunk in chunks:
                self._hasher.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[self.file.write(view) :]
                self._size += len(chunk)
        found = Digest(layer.digest.algorithm, self._hasher.hexdigest())
        if found != layer.digest:
            raise IntegrityError(
                f"{self._where}: a layer should be {layer.digest}, and what arrived is {found}; "
                "nothing of it is used; the registry or the way to it is damaged"
            )
        self.file.seek(0)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class _Checked:
    """A stream, hashed as it is read."""

    def __init__(self, stream: Stream, expected: Digest | None) -> None:
        self._stream = stream
        self._hasher = None if expected is None else hashlib.new(expected.algorithm)

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if self._hasher is not None:
            self._hasher.update(data)
        return data

    def digest(self) -> Digest | None:
        if self._hasher is None:
            return None
        return Digest(self._hasher.name, self._hasher.hexdigest())


@contextmanager
def _decompressed(file: IO[bytes]) -> Iterator[Any]:
    """Yield the tar in a file. What it is compressed by, the file itself tells best."""
    start = file.read(8)
    file.seek(0)
    if start.startswith(_GZIP):
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream
    elif is_zstd(start):
        with open_zstd(file) as stream:
            yield stream
    else:
        yield file


def _index(folder: str, overlay: Overlay, limits: ExtractionLimits) -> dict[str, PackedFile]:
    """Return the files below a folder, through links too, which lead nowhere else."""
    found: dict[str, PackedFile] = {}
    top, top_path = os.stat(folder), os.path.realpath(folder)
    stack = [("", top_path, frozenset([(top.st_dev, top.st_ino)]))]
    folders = 0
    while stack:
        prefix, path, above = stack.pop()
        folders += 1
        for name in sorted(os.listdir(path)):
            key, child = prefix + name, os.path.join(path, name)
            linked = os.path.islink(child)
            try:
                status = os.stat(child)
            except FileNotFoundError:
                raise overlay.refusal(f"holds the link {key!r}, which leads nowhere") from None
            if stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity not in above:
                    stack.append((f"{key}/", child, above | {identity}))
                continue
            if linked or os.path.realpath(path) != path:
                # Whoever fetches the files gets it once more.
                overlay.count(status.st_size)
            place = os.path.relpath(os.path.realpath(child), top_path)
            found[key] = PackedFile(place, status.st_size)
        # A few folders, each with links to the next one, can make more paths than can be counted.
        if len(found) + folders + len(stack) > limits.entries:
            raise overlay.refusal(f"holds more than {limits.entries} files and folders, links too")
    return found
