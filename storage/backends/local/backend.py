"""Files as objects: ``file:///path``, plain paths and ``pvc://claim/path``.

A key is a path below the root. What a file system cannot hold as a name (empty and dot
segments, NUL, parts over 255 bytes) is refused, never changed. A directory is no object.

The ETag is made of inode, modification time and size, so a file that is replaced or written
over gets another one.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from storage.backends.base import (
    Backend,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
)
from storage.backends.local import files, writes
from storage.backends.local.files import reporting
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    UnsupportedOperation,
)

if TYPE_CHECKING:
    from io import FileIO

    from fsspec import AbstractFileSystem

__all__ = ["LocalBackend", "open_file_backend", "open_pvc_backend"]

_CHUNK = 1024 * 1024
_DEFAULT_MOUNT_ROOT = "/mnt/pvc"

_Identity = tuple[int, int]


class LocalBackend:
    """A directory of this machine as a bucket."""

    def __init__(
        self,
        root: str,
        *,
        name: str = "file",
        prefix: str | None = None,
        contained: bool = False,
        durable: bool = False,
    ) -> None:
        """Address the directory ``root``; it need not exist yet.

        Args:
            root: absolute path.
            name: of the driver, for messages.
            prefix: what stands before a key in messages; the root when ``None``.
            contained: refuse symbolic links that lead out of the root.
            durable: sync every written file and its directory to the disk.
        """
        self._root = root.rstrip("/") or "/"
        self._name = name
        self._prefix = prefix if prefix is not None else self._root.rstrip("/") + "/"
        self._contained = contained
        self._durable = durable
        self._swept: set[str] = set()

    @property
    def name(self) -> str:
        """Driver and store."""
        return self._name

    @property
    def capabilities(self) -> Capabilities:
        """No metadata, no URLs, and no keys that are not paths."""
        return Capabilities(if_match=True, metadata=False, any_key=False)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. There are no versions to ask for."""
        info = self._look(key)[1]
        if version is not None:
            raise ModelMissingError(
                self._uri(key), f"no version {version} of {self._uri(key)}: files have none"
            )
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`.

        Symbolic links are followed, except to a directory that holds the link. A link to
        nowhere, a pipe, a socket or a device is an error: a tree is given whole or not.
        """
        check_prefix(prefix)
        root = self._check_root()
        start = self._resolve(prefix[:-1]) if prefix else root
        with reporting("listing", self._uri(prefix)):
            try:
                status = os.stat(start)
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                return
        if modes.S_ISDIR(status.st_mode):
            yield from self._walk(prefix, start, status)

    def _walk(self, prefix: str, path: str, status: os.stat_result) -> Iterator[ObjectInfo]:
        # A stack, not recursion: a path may have more parts than Python has frames.
        stack = [(prefix, path, frozenset([_identity(status)]))]
        while stack:
            prefix, path, above = stack.pop()
            below = []
            for name in self._names(prefix, path):
                key, child = prefix + name, os.path.join(path, name)
                found = self._entry(key, child)
                if found is None:
                    continue
                if not modes.S_ISDIR(found.st_mode):
                    yield files.info_of(key, self._uri(key), found)
                elif _identity(found) not in above:
                    below.append((key + "/", child, above | {_identity(found)}))
            stack.extend(reversed(below))

    def _names(self, prefix: str, path: str) -> Sequence[str]:
        with reporting("listing", self._uri(prefix)):
            try:
                names = sorted(os.listdir(path))
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                return []  # removed since the directory above was read
        # What fsck keeps at the top of a volume belongs to no model.
        private = {"lost+found"} if self._contained and not prefix else set()
        return [name for name in names if name not in private and not files.is_temporary(name)]

    def _entry(self, key: str, path: str) -> os.stat_result | None:
        with reporting("listing", self._uri(key)):
            try:
                status = os.lstat(path)
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                return None
            if not modes.S_ISLNK(status.st_mode):
                return status
            self._contain(key, path)
            try:
                return os.stat(path)
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                raise InvalidInput(
                    f"{self._uri(key)} is a symbolic link to {os.readlink(path)!r}, which does "
                    "not exist: remove or repair it"
                ) from exc

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`. Yields views of one buffer of at most 1 MiB."""
        file, info = self._open(key)
        try:
            files.check_pin(self._uri(key), info, pin)
            size = info.size or 0
            start, end = (span.start, span.end) if span is not None else (0, size)
            if span is not None and not 0 <= start < end <= size:
                raise InvalidInput(
                    f"bytes {start}-{end} of {self._uri(key)} were asked for, "
                    f"but it has {size} bytes"
                )
        except BaseException:
            file.close()
            raise
        return Body(info, self._chunks(info, file, start, end), file.close)

    def _chunks(self, info: ObjectInfo, file: FileIO, start: int, end: int) -> Iterator[memoryview]:
        uri = self._uri(info.key)
        view = memoryview(bytearray(min(_CHUNK, end - start)))
        with file:
            at = start
            while at < end:
                with reporting("reading", uri):
                    if at == start:
                        file.seek(start)
                    got = file.readinto(view[: min(end - at, len(view))]) or 0
                    at += got
                    # A file written over in place may give bytes of two versions. Checked
                    # before the last ones go out: who gets them all has no mixture.
                    if at == end or not got:
                        status = os.fstat(file.fileno())
                        files.check_pin(uri, files.info_of(info.key, uri, status), info)
                if not got:
                    raise ObjectChangedError(
                        f"{uri} ended early: expected {info.size} bytes, found {at}; ask again"
                    )
                yield view[:got]

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> ObjectInfo:
        """See :meth:`Backend.write`. Missing directories are created.

        A symbolic link is replaced, not followed: what it points to is another object.
        """
        if if_match is not None and (if_absent or if_match.pin is None):
            raise InvalidInput("if_match needs an object's etag, and no if_absent")
        target = self._target(key, if_absent, if_match)
        fill = writes.fill_from(payload, target.uri, on_bytes)
        return writes.put(target, fill, payload.size, self._swept)

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`. Shares the blocks where the file system can."""
        if bucket is not None:
            raise UnsupportedOperation(f"{self._uri(source)} is on another file system than {key}")
        if version is not None:
            self.stat(source, version)
        file, info = self._open(source)
        with file:
            target = self._target(key)

            def fill(fd: int) -> int:
                with reporting("copying to", target.uri):
                    total = files.copy_all(file.fileno(), fd)
                    found = files.info_of(source, self._uri(source), os.fstat(file.fileno()))
                    files.check_pin(self._uri(source), found, info)
                    return total

            writes.put(target, fill, info.size, self._swept)

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`. Directories stay, empty or not."""
        for target in [self._target(key) for key in keys]:
            writes.delete(target)

    def sign(self, key: str, method: str, expires: float) -> str:
        """Raise ``UnsupportedOperation``: files have no URL to sign."""
        raise UnsupportedOperation(f"{self._uri(key)}: files have no URL to sign")

    def is_digest(self, info: ObjectInfo) -> bool:
        """Return ``False``: a file system knows no digests."""
        return False

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """Return nothing: a file system knows no digests."""
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`."""
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=True), self._root

    def local_path(self, key: str) -> str | None:
        """Return the path of an object, or of a tree if ``key`` is empty or ends in ``/``."""
        bare = key.removesuffix("/")
        if not bare:
            return self._root
        self._resolve(bare)
        return os.path.join(self._root, bare)

    def close(self) -> None:
        """Do nothing: nothing is open between two calls."""

    def _uri(self, key: str) -> str:
        return self._prefix + key

    def _check_root(self) -> str:
        with reporting("looking into", self._uri("")):
            try:
                if modes.S_ISDIR(os.stat(self._root).st_mode):
                    return self._root
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
        raise BucketMissingError(
            self._uri(""),
            f"{self._uri('')} is not there: expected a directory at {self._root}, found none; "
            "check that it is mounted, and where the config says that",
        )

    def _check_key(self, key: str) -> None:
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise InvalidInput(
                f"{self._uri(key)}: a key of a file system has no empty, '.' or '..' part"
            )
        try:
            usable = b"\0" not in os.fsencode(key)
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise InvalidInput(f"{key!r} cannot be the name of a file")

    def _resolve(self, key: str) -> str:
        """Return the path of ``key``, which need not exist."""
        self._check_key(key)
        return self._contain(key, os.path.join(self._root, key))

    def _contain(self, key: str, path: str) -> str:
        if not self._contained:
            return path
        root, real = os.path.realpath(self._root), os.path.realpath(path)
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise InvalidInput(
                f"{self._uri(key)} leads to {real}, out of {root}: symbolic links may not leave it"
            )
        return real

    def _target(
        self, key: str, if_absent: bool = False, if_match: ObjectInfo | None = None
    ) -> writes.Target:
        directory = self._check_root()
        self._check_key(key)
        above, _, name = key.rpartition("/")
        if files.is_temporary(name):
            raise InvalidInput(f"{self._uri(key)}: names of this form are kept for partial files")
        # The last part is not followed: it is replaced or removed, link or not.
        if above:
            directory = self._resolve(above)
        uri = self._uri(key)
        return writes.Target(key, uri, directory, name, if_absent, if_match, self._durable)

    def _look(self, key: str) -> tuple[str, ObjectInfo]:
        """Return path and status of the object ``key``."""
        self._check_root()
        path = self._resolve(key.removesuffix("/")) if key else ""
        if not key or key.endswith("/"):
            raise ModelMissingError(self._uri(key))
        with reporting("looking at", self._uri(key)):
            try:
                status = os.stat(path)
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                raise ModelMissingError(self._uri(key)) from exc
        return path, files.info_of(key, self._uri(key), status)

    def _open(self, key: str) -> tuple[FileIO, ObjectInfo]:
        # Looked at before it is opened, because opening a device may do something; and
        # opened without blocking, because a named pipe may have taken its place since.
        path, _ = self._look(key)

        def opener(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)

        with reporting("reading", self._uri(key)):
            try:
                file = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115
            except OSError as exc:
                if not files.is_missing(exc):
                    raise
                raise ModelMissingError(self._uri(key)) from exc
            try:
                return file, files.info_of(key, self._uri(key), os.fstat(file.fileno()))
            except BaseException:
                file.close()
                raise


def open_file_backend(location: Any, config: Any, options: OpenOptions) -> Backend:
    """Return the backend of local paths; keys are absolute paths without the first slash."""
    return LocalBackend("/", durable=options.durable or bool(getattr(config, "durable", False)))


def open_pvc_backend(location: Any, config: Any, options: OpenOptions) -> Backend:
    """Return the backend of a Kubernetes volume claim, which is mounted somewhere.

    ``config.mounts`` gives the directory of a claim; one that it does not name is at
    ``config.mount_root``, else at ``/mnt/pvc``, under its own name.
    """
    claim = location.bucket
    root = (getattr(config, "mounts", None) or {}).get(claim)
    if root is None:
        mount_root = getattr(config, "mount_root", None) or _DEFAULT_MOUNT_ROOT
        root = os.path.join(os.fspath(mount_root), claim)
    return LocalBackend(
        os.path.abspath(os.fspath(root)),
        name="pvc",
        prefix=f"pvc://{claim}/",
        contained=True,
        durable=options.durable or bool(getattr(config, "durable", False)),
    )


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
