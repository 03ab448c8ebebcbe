"""Any backend as an fsspec file system, for libraries that read and write through fsspec.

Imported only by those who ask for one, because fsspec is. Directories are made up from the
keys: one exists as long as something lies below it.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, cast

from fsspec import AbstractFileSystem
from fsspec.compression import compr
from fsspec.core import get_compression

from storage.backends.base import (
    Backend,
    ByteRange,
    ObjectInfo,
    Payload,
    bytes_payload,
    file_payload,
)
from storage.backends.spool import spooled
from storage.errors import (
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    UnsupportedOperation,
)

__all__ = ["BackendFileSystem"]

_BLOCK = 5 * 1024 * 1024
_IN_MEMORY = 8 * 1024 * 1024

Entry = dict[str, Any]


class BackendFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """One bucket; paths are its keys.

    Files opened for reading are tied to the version that was there, and raise
    ``ObjectChangedError`` when it is replaced. A file opened for writing appears when it is
    closed, whole; it does not if its ``with`` block is left by an exception.
    """

    protocol = "storage-backend"
    cachable = False

    def __init__(self, backend: Backend, **kwargs: Any) -> None:
        """Serve the bucket of ``backend``."""
        super().__init__(**kwargs)
        self.backend = backend

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List one level, sorted. Reads the whole listing below ``path``."""
        path = self._strip_protocol(path)
        prefix = f"{path}/" if path else ""
        found: dict[tuple[str, str], Entry] = {}
        for info in self.backend.list(prefix):
            name, slash, _ = info.key[len(prefix) :].partition("/")
            entry = _directory(prefix + name) if slash else _file(info)
            found[entry["name"], entry["type"]] = entry
        if not found and path:
            entry = _file(self.backend.stat(path))
            found[entry["name"], entry["type"]] = entry
        entries = [found[at] for at in sorted(found)]
        return entries if detail else sorted({entry["name"] for entry in entries})

    def info(self, path: str, **kwargs: Any) -> Entry:
        """Describe the object ``path``, else the directory of that name."""
        path = self._strip_protocol(path)
        if not path:
            return _directory("")
        try:
            return _file(self.backend.stat(path))
        except ModelMissingError:
            if self._has_children(path):
                return _directory(path)
            raise

    def _has_children(self, path: str) -> bool:
        if not self.backend.capabilities.list:
            return False
        return next(iter(self.backend.list(f"{path}/")), None) is not None

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **kwargs: Any,
    ) -> Any:
        """List every file below ``path`` with one listing; failures are raised, not left out."""
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        path = self._strip_protocol(path)
        prefix = f"{path}/" if path else ""
        found: dict[str, Entry] = {}
        for info in self.backend.list(prefix):
            parts = info.key[len(prefix) :].split("/")
            for depth in range(1, len(parts)) if withdirs else ():
                if maxdepth is None or depth <= maxdepth:
                    name = prefix + "/".join(parts[:depth])
                    found.setdefault(name, _directory(name))
            if maxdepth is None or len(parts) <= maxdepth:
                found[info.key] = _file(info)
        if found and path and withdirs:
            found.setdefault(path, _directory(path))
        elif not found and path:
            with contextlib.suppress(ModelMissingError):
                found[path] = _file(self.backend.stat(path))
        return {name: found[name] for name in sorted(found)} if detail else sorted(found)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Tell whether there is an object or directory; a store that fails is an error."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def modified(self, path: str) -> Any:
        """Return the time of the last modification, with a time zone."""
        return self.backend.stat(self._strip_protocol(path)).modified

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """Return the bytes of a file, or the slice ``[start:end]`` of them."""
        path = self._strip_protocol(path)
        if start is None and end is None:
            return _collect(self.backend, path)
        info = self.backend.stat(path)
        if info.size is None or not (self.backend.capabilities.ranged_read and info.ranged):
            return _collect(self.backend, path)[start:end]
        first, last, _ = slice(start, end).indices(info.size)
        if first >= last:
            return b""
        return _collect(self.backend, path, ByteRange(first, last), info)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Store bytes; ``mode="create"`` fails if the file exists."""
        path = self._strip_protocol(path)
        self.backend.write(path, bytes_payload(value), if_absent=mode == "create")

    def rm_file(self, path: str) -> None:
        """Delete one file.

        Raises:
            ModelMissingError: it is not there.
        """
        path = self._strip_protocol(path)
        self.backend.stat(path)
        self.backend.delete([path])

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rm(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None
    ) -> None:
        """Delete files, and with ``recursive`` whole directories. Paths may be globs."""
        expanded = self.expand_path(path, recursive=recursive, maxdepth=maxdepth)
        keys = [name for name in expanded if self.isfile(name)]
        if not keys:
            raise ModelMissingError(str(path))
        self.backend.delete(keys)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy one file, inside the store where it can do that."""
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.backend.capabilities.copy:
            self.backend.copy(source, target)
            return
        info = self.backend.stat(source)
        with _Spool() as spool, self.backend.read(source, pin=info) as body:
            for piece in body:
                spool.write(piece)
            self.backend.write(
                target, spool.payload(), metadata=info.metadata, content_type=info.content_type
            )

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict[str, Any] | None = None,
        compression: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a file as fsspec does; modes ``r``, ``w`` and ``x``, binary or text."""
        if "r" in mode and "+" not in mode:
            return super().open(path, mode, block_size, cache_options, compression, **kwargs)
        text = {name: kwargs.pop(name, None) for name in ("encoding", "errors", "newline")}
        binary = mode if "b" in mode else mode.replace("t", "") + "b"
        file = super().open(path, binary, block_size, cache_options, None, **kwargs)
        if (name := get_compression(path, compression)) is not None:
            file = _CompressedWriter(file, compr[name](file, mode="wb"))
        return file if "b" in mode else _TextWriter(file, **text)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if mode in ("wb", "xb"):
            return _Writer(self.backend, path, create=mode == "xb", autocommit=autocommit)
        if mode != "rb":
            raise UnsupportedOperation(
                f"{path} cannot be opened in mode {mode!r}: objects are read or replaced whole; "
                "use rb, wb or xb"
            )
        info = self.backend.stat(path)
        if info.size is None or not (self.backend.capabilities.ranged_read and info.ranged):
            return spooled(self.backend.read(path))
        return _Reader(self.backend, info, block_size or _BLOCK)


class _Ranges(io.RawIOBase):
    """Every read is one ranged read of the version seen first."""

    def __init__(self, backend: Backend, info: ObjectInfo) -> None:
        super().__init__()
        self._backend = backend
        self._pin = info
        self._size = info.size or 0
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise InvalidInput(f"cannot seek to {base + offset}, before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        return self._fetch(len(view), lambda at, piece: view.__setitem__(at, piece))

    def readall(self) -> bytes:
        data = bytearray(max(0, self._size - self._at))
        self._fetch(len(data), lambda at, piece: data.__setitem__(at, piece))
        return bytes(data)

    def _fetch(self, wanted: int, put: Callable[[slice, Any], object]) -> int:
        end = min(self._at + wanted, self._size)
        if self._at >= end:
            return 0
        done = 0
        span = ByteRange(self._at, end)
        with self._backend.read(self._pin.key, span, self._pin) as body:
            for piece in body:
                put(slice(done, done + len(piece)), piece)
                done += len(piece)
        self._at += done
        return done


class _Reader(io.BufferedReader):
    """A seekable stream with what fsspec's users expect of one."""

    def __init__(self, backend: Backend, info: ObjectInfo, block_size: int) -> None:
        super().__init__(_Ranges(backend, info), max(1, min(block_size, info.size or 1)))
        self.path = info.key
        self.size = info.size


class _Spool:
    """Bytes kept in memory while they are few, in a temporary file when they are not."""

    def __init__(self) -> None:
        self.size = 0
        self._memory: io.BytesIO | None = io.BytesIO()
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, data: Any) -> int:
        if self._memory is not None and self.size + len(data) > _IN_MEMORY:
            self._file = tempfile.NamedTemporaryFile(prefix="storage-")  # noqa: SIM115
            self._file.write(self._memory.getbuffer())
            self._memory = None
        (self._memory or self._file).write(data)
        self.size += len(data)
        return len(data)

    def payload(self) -> Payload:
        if self._memory is not None:
            return bytes_payload(self._memory.getvalue())
        self._file.flush()
        return file_payload(self._file.name, self.size)

    def close(self) -> None:
        self._memory = None
        if self._file is not None:
            self._file.close()


class _Publishing(io.BufferedIOBase):
    """A stream whose content is stored by ``close`` and by nothing else."""

    def discard(self) -> None:
        """Close without storing anything."""
        raise NotImplementedError

    def writable(self) -> bool:
        return True

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        # io's own would close, and so publish what nobody finished.
        with contextlib.suppress(Exception):
            self.discard()


class _Writer(_Publishing):
    """Gathers what is written and stores it as one object."""

    def __init__(self, backend: Backend, path: str, *, create: bool, autocommit: bool) -> None:
        super().__init__()
        if create and _is_there(backend, path):
            raise ObjectExistsError(f"{path} exists, and was to be created only")
        self.path = path
        self._backend = backend
        self._create = create
        self._autocommit = autocommit
        self._spool: _Spool | None = _Spool()

    def tell(self) -> int:
        return self._writing().size

    def write(self, data: Any) -> int:
        return self._writing().write(memoryview(data).cast("B"))

    def _writing(self) -> _Spool:
        if self.closed or self._spool is None:
            raise ValueError("I/O operation on closed file")
        return self._spool

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self._autocommit:
                self.commit()
        finally:
            super().close()

    def commit(self) -> None:
        """Store what was written; for fsspec's transactions."""
        spool, self._spool = self._spool, None
        if spool is not None:
            with spool:
                self._backend.write(self.path, spool.payload(), if_absent=self._create)

    def discard(self) -> None:
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()
        super().close()


class _CompressedWriter(_Publishing):
    """A compressor, and the file below it, which compressors leave open."""

    def __init__(self, file: Any, compressor: Any) -> None:
        super().__init__()
        self._file = file
        self._compressor = compressor

    def write(self, data: Any) -> int:
        self._compressor.write(data)
        return memoryview(data).nbytes

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._compressor.close()
            self._file.close()

    def discard(self) -> None:
        if not self.closed:
            super().close()
            with contextlib.suppress(Exception):
                self._compressor.close()
            self._file.discard()


class _TextWriter(io.TextIOWrapper):
    def discard(self) -> None:
        cast(_Publishing, self.buffer).discard()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.discard()
        else:
            self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.discard()


def _is_there(backend: Backend, key: str) -> bool:
    try:
        backend.stat(key)
    except ModelMissingError:
        return False
    return True


def _collect(
    backend: Backend, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None
) -> bytes:
    with backend.read(key, span, pin) as body:
        return b"".join([bytes(piece) for piece in body])


def _directory(name: str) -> Entry:
    return {"name": name, "size": 0, "type": "directory"}


def _file(info: ObjectInfo) -> Entry:
    return {
        "name": info.key,
        "size": info.size,
        "type": "file",
        "etag": info.etag,
        "version": info.version,
        "mtime": info.modified,
        "content_type": info.content_type,
        "metadata": dict(info.metadata),
    }
