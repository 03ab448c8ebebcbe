"""Any fsspec file system as a backend: the driver of every scheme without one of its own.

What is common to all of them is here; ``fsspec_protocols`` holds what SFTP, FTP and WebDAV do
better in their own way, ``s3.fsspec`` the second driver of S3. A subclass overrides the few
methods whose docstring says "Hook".

fsspec says little about safety, so this driver assumes little: file systems are used by one
thread at a time, their caches of listings are off, nothing that globs is called, keys that a
file system would change are refused, and an object is written under a temporary name and
renamed wherever the store can rename.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

from storage.backends.base import (
    Backend,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
)
from storage.backends.drivers.fsspec_connect import FsspecStore, supported_schemes
from storage.backends.drivers.fsspec_errors import classify, translated
from storage.backends.drivers.fsspec_parts import (
    Chunks,
    Source,
    abandon,
    first,
    is_temporary,
    moment,
    overrides,
    temporary_key,
)
from storage.backends.drivers.streams import check_pin
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
    UnsupportedScheme,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.uri import Location

__all__ = ["MIB", "FsspecBackend", "classify", "open_backend", "supported_schemes"]

MIB = 1024 * 1024
_TIMES = ("mtime", "modified", "last_modified", "LastModified", "updated", "modify")
_TYPES = ("content_type", "ContentType", "contentType")
_LINKS = 40


def open_backend(location: Location, config: Any, options: OpenOptions) -> Backend:
    """Return a backend for the store of ``location``, any that fsspec knows; inert.

    Args:
        location: its ``url`` says where the store is and may hold credentials.
        config: its ``options``, if it has any, are arguments of the file system's class and
            win over what the URL says.
        options: how to talk to the store.

    Raises:
        UnsupportedScheme: fsspec knows no such scheme either.
    """
    from storage.backends.drivers import fsspec_protocols
    from storage.uri import SUPPORTED_PROTOCOLS

    scheme = location.scheme
    known = supported_schemes()
    if scheme not in known:
        raise UnsupportedScheme(
            f"no backend serves {scheme}://; known are plain paths and "
            f"{', '.join(sorted({*known, *SUPPORTED_PROTOCOLS, 'memory'}))}; a package adds "
            "another by an entry point in the group storage.backends, or in fsspec.specs"
        )
    arguments = getattr(config, "options", None) or {}
    reveal = getattr(arguments, "get_secret_value", None)
    if reveal is not None:
        arguments = reveal()
    url = location.url or f"{scheme}://{location.bucket}/"
    authority = url.partition("://")[2].partition("/")[0]
    backend = fsspec_protocols.CLASSES.get(scheme, FsspecBackend)
    return backend(scheme, authority, arguments, options)


class FsspecBackend(FsspecStore):
    """One store through fsspec; see :class:`~storage.backends.base.Backend`."""

    @property
    def capabilities(self) -> Capabilities:
        """As little as fsspec promises for any file system."""
        return Capabilities(
            copy=overrides(self._implementation(), "cp_file", "_cp_file"),
            pinned_read=False,
            if_absent=False,
            metadata=False,
            any_key=False,
        )

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. There are no versions."""
        if version is not None:
            raise ModelMissingError(
                self.where(key),
                f"no version {version} of {self.where(key)}: {self.name} keeps no versions",
            )
        with self._lease() as fs:
            return self._stat(fs, key)

    def _stat(self, fs: Any, key: str) -> ObjectInfo:
        if not key or key.endswith("/"):
            raise ModelMissingError(self.where(key))
        path = self._path(fs, key)
        with translated(self.where(key), self.error_kinds):
            fs.invalidate_cache()
            raw = self._lookup(fs, path)
        if raw.get("type") == "directory":
            raise ModelMissingError(self.where(key))
        return self._describe(key, raw)

    def _lookup(self, fs: Any, path: str) -> Mapping[str, Any]:
        """Hook. Return what is at a path, links followed, as fsspec's ``info`` does."""
        raw: Mapping[str, Any] = fs.info(path)
        return raw

    def _describe(self, key: str, raw: Mapping[str, Any]) -> ObjectInfo:
        """Hook. Return what fsspec's ``info`` of an object says."""
        size = raw.get("size")
        size = int(size) if size is not None else None
        modified = moment(first(raw, _TIMES))
        etag = first(raw, ("etag", "ETag"))
        if etag is None and modified is not None:
            # Weak: enough to notice most changes, not to join parts of a file by it.
            etag = f'W/"{modified.timestamp():.6f}-{size}"'
        return ObjectInfo(
            key,
            size,
            str(etag) if etag is not None else None,
            modified=modified,
            content_type=first(raw, _TYPES),
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`. Symbolic links are followed; one to nowhere is an error."""
        check_prefix(prefix)
        with self._lease() as fs:
            yield from self._walk(fs, prefix)

    def _walk(self, fs: Any, prefix: str) -> Iterator[ObjectInfo]:
        """Hook. Yield the objects below ``prefix``."""
        folders = [(prefix, 0)]
        while folders:
            folder, links = folders.pop()
            for name, raw in self._children(fs, folder, first=folder == prefix):
                key = folder + name
                kind, depth = raw.get("type"), links
                if kind == "link":
                    depth += 1
                    raw = self._resolve(fs, key, depth)
                    kind = raw.get("type")
                if kind == "directory":
                    folders.append((f"{key}/", depth))
                elif not is_temporary(name):
                    yield self._describe(key, raw)

    def _children(self, fs: Any, folder: str, first: bool) -> Iterator[tuple[str, Any]]:
        folder = folder.removesuffix("/")
        path = self._path(fs, folder)
        try:
            with translated(self.where(folder), self.error_kinds):
                fs.invalidate_cache()
                entries = self._entries(fs, path)
        except ModelMissingError:
            if first and not folder:
                raise BucketMissingError(self._uri) from None
            # Nothing there, or removed while the tree was being listed.
            return
        except StorageError as exc:
            # Not every server says in so many words that this is a file.
            if type(exc) is not StorageError or self._is_folder(fs, folder):
                raise
            return
        for raw in entries:
            whole = str(raw["name"]).rstrip("/")
            # A file is listed as itself by some, and it is not below its own name.
            if whole.strip("/") != path.strip("/"):
                yield whole.rpartition("/")[2], raw

    def _entries(self, fs: Any, path: str) -> Sequence[Mapping[str, Any]]:
        """Hook. Return what is directly in a folder, as fsspec's ``ls`` does."""
        entries: Sequence[Mapping[str, Any]] = fs.ls(path, detail=True)
        return entries

    def _resolve(self, fs: Any, key: str, links: int) -> Mapping[str, Any]:
        if links > _LINKS:
            raise StorageError(
                f"{self.where(key)}: more than {_LINKS} symbolic links lead there, probably in a "
                "circle; remove the link"
            )
        try:
            with translated(self.where(key), self.error_kinds):
                raw = self._lookup(fs, self._path(fs, key))
        except ModelMissingError as exc:
            raise StorageError(
                f"{self.where(key)}: the symbolic link leads to nothing; remove it, or put "
                "there what it means"
            ) from exc
        return raw

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`.

        The object is described before and after its bytes are read, and both have to agree.
        """
        lease = ExitStack()
        fs = lease.enter_context(self._lease())
        try:
            info = self._stat(fs, key)
            check_pin(info, pin, self.where(key))
            start = span.start if span is not None else 0
            length = len(span) if span is not None else info.size
            if span is not None and info.size is not None and span.end > info.size:
                raise ObjectChangedError(
                    f"{self.where(key)}: bytes up to {span.end} were asked for, the object has "
                    f"{info.size}"
                )
        except BaseException as exc:
            lease.__exit__(type(exc), exc, exc.__traceback__)
            raise
        chunks = Chunks(self._whole(fs, info, start, length), lease)
        return Body(info, chunks, chunks.close)

    def _whole(
        self, fs: Any, info: ObjectInfo, start: int, length: int | None
    ) -> Generator[Buffer]:
        """Yield exactly ``length`` bytes of the object that ``info`` describes."""
        where = self.where(info.key)
        arrived = 0
        last: Buffer | None = None
        with closing(self._pieces(fs, info, start, length)) as pieces:
            while length != 0:
                with translated(where, self.error_kinds):
                    piece = next(pieces, None)
                if piece is None:
                    break
                arrived += len(piece)
                if last is not None:
                    yield last
                last = piece
        if length is not None and arrived != length:
            raise TransientError(f"{where}: the body ended after {arrived} of {length} bytes")
        # The last piece waits for this: without it, no caller has a whole object.
        if last is not None:
            if info.differs_from(self._stat(fs, info.key)):
                raise ObjectChangedError(f"{where} was replaced while it was being read")
            yield last

    def _pieces(
        self, fs: Any, info: ObjectInfo, start: int, length: int | None
    ) -> Generator[Buffer]:
        """Hook. Yield bytes from ``start`` on, ``length`` of them or up to the end."""
        path = self._path(fs, info.key)
        file = fs.open(path, "rb", block_size=4 * MIB, cache_type="none")
        try:
            # Some answer each read by a request of its own, which should be worth it.
            size = 4 * MIB if hasattr(file, "_fetch_range") else MIB
            if start:
                file.seek(start)
            while length is None or length > 0:
                piece = file.read(size if length is None else min(size, length))
                if not piece:
                    return
                if length is not None:
                    length -= len(piece)
                yield piece
        finally:
            file.close()

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
        """See :meth:`Backend.write`. No conditions and no metadata."""
        if if_absent or if_match is not None:
            raise UnsupportedOperation(
                f"{self.where(key)}: {self.name} cannot write on a condition (create only, or "
                "replace only one version) atomically"
            )
        with payload.open() as stream:
            source = Source(stream, payload.size, on_bytes, self.where(key))
            with self._lease() as fs:
                path = self._path(fs, key)
                if not self._renames(fs):
                    self._store(fs, path, source, key)
                    return self._stat(fs, key)
                self._make_parents(fs, key)
            self._store_and_rename(temporary_key(key), key, source)
        with self._lease() as fs:
            return self._stat(fs, key)

    def _store_and_rename(self, temporary: str, key: str, source: Source) -> None:
        try:
            with self._lease() as fs:
                self._store(fs, self._path(fs, temporary), source, key)
                with translated(self.where(key), self.error_kinds):
                    self._rename(fs, self._path(fs, temporary), self._path(fs, key))
        except UnreachableError:
            raise
        except BaseException as exc:
            self._remove(temporary)
            if isinstance(exc, ObjectExistsError):
                raise UnsupportedOperation(
                    f"{self.where(key)} exists, and {self.name} cannot replace an object in one "
                    "step; delete it first"
                ) from exc
            raise

    def _remove(self, temporary: str) -> None:
        """Remove what a failed write left, by a new connection; the failed one is closed."""
        for pause in (0.0, 0.1, 0.3, 1.0):
            time.sleep(pause)
            try:
                with self._lease() as fs, translated(self.where(temporary), self.error_kinds):
                    fs.rm_file(self._path(fs, temporary))
                return
            except UnreachableError:
                return
            except TransientError:
                # Some servers keep a file locked until they notice that its writer is gone.
                continue
            except StorageError:
                return

    def _store(self, fs: Any, path: str, source: Source, key: str) -> None:
        with source.apart(), translated(self.where(key), self.error_kinds):
            self._send(fs, path, source)

    def _send(self, fs: Any, path: str, source: Source) -> None:
        """Hook. Write all of ``source`` to ``path``; what fails must not become an object."""
        file = fs.open(path, "wb", block_size=5 * MIB)
        try:
            while piece := source.read(MIB):
                file.write(piece)
            source.check()
        except BaseException:
            abandon(file)
            raise
        file.close()

    def _renames(self, fs: Any) -> bool:
        """Hook. Whether ``_rename`` replaces a file atomically."""
        # Stores that serve many requests at once are object stores, which cannot.
        return overrides(type(fs), "mv") and not getattr(type(fs), "async_impl", False)

    def _rename(self, fs: Any, old: str, new: str) -> None:
        """Hook. Rename a file, replacing what has the new name."""
        fs.mv(old, new)

    def _make_parents(self, fs: Any, key: str) -> None:
        folder = key.rpartition("/")[0]
        if not folder or self._is_folder(fs, folder):
            return
        for remaining in (2, 1, 0):
            try:
                with translated(self.where(key), self.error_kinds):
                    fs.makedirs(self._path(fs, folder), exist_ok=True)
                return
            except StorageError:
                # Another writer may have made one of them at the same time.
                if not remaining and not self._is_folder(fs, folder):
                    raise

    def _is_folder(self, fs: Any, folder: str) -> bool:
        try:
            with translated(self.where(folder), self.error_kinds):
                fs.invalidate_cache()
                path = self._path(fs, folder)
                return bool(self._lookup(fs, path)["type"] == "directory")
        except ModelMissingError:
            return False

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        if not self.capabilities.copy or bucket is not None:
            raise UnsupportedOperation(
                f"{self.where(source)}: {self.name} cannot copy within the store"
            )
        self.stat(source, version)
        if source == key:
            return
        with self._lease() as fs:
            path = self._path(fs, key)
            old = self._path(fs, source)
            if not self._renames(fs):
                with translated(self.where(source), self.error_kinds):
                    fs.cp_file(old, path)
                return
            self._make_parents(fs, key)
            temporary = self._path(fs, temporary_key(key))
            with translated(self.where(source), self.error_kinds):
                try:
                    fs.cp_file(old, temporary)
                    self._rename(fs, temporary, path)
                except BaseException:
                    with suppress(Exception):
                        fs.rm_file(temporary)
                    raise

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`. A folder is no object and stays."""
        with self._lease() as fs:
            for key in keys:
                self._path(fs, key)
            for key in keys:
                # Asked first: some file systems remove whole folders by the same call.
                with suppress(ModelMissingError):
                    self._stat(fs, key)
                    with translated(self.where(key), self.error_kinds):
                        fs.rm_file(self._path(fs, key))

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`."""
        raise UnsupportedOperation(f"{self.where(key)}: {self.name} has no presigned URLs")

    def is_digest(self, info: ObjectInfo) -> bool:
        """See :meth:`Backend.is_digest`."""
        return False

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """See :meth:`Backend.checksums`."""
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`. A new one, which the caller may keep."""
        fs = self._connect()
        return fs, self._root(type(fs))

    def local_path(self, key: str) -> str | None:
        """See :meth:`Backend.local_path`."""
        return None
