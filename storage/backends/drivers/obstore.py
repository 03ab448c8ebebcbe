"""The first driver for S3, GCS and Azure: ``obstore``, bindings of Rust's ``object_store``.

Everything here is true of all three stores; what one of them needs goes into its own module,
which hands over the arguments and, for what obstore cannot do, a second driver.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.backends.base import (
    Backend,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    content_digests,
    md5_hint,
)
from storage.backends.drivers.obstore_errors import Classify, check_headers, translated
from storage.backends.drivers.streams import check_size, exactly
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    TransientError,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["ObstoreBackend", "expressible"]

_MIB = 1024 * 1024
_STREAM_CHUNK = _MIB
_PART_SIZE = 8 * _MIB
_UNKNOWN_SIZE_PART = 16 * _MIB
_MAX_PARTS = 10_000
_SINGLE_PUT_LIMIT = 8 * _MIB
# object_store parses keys as paths and refuses these; the second driver takes them as they are.
_INEXPRESSIBLE = re.compile(r"(?:^|/)(?:\.{0,2})(?:/|$)|[\x00-\x1f\x7f]")


class ObstoreBackend:
    """One bucket through ``obstore``; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        uri: str,
        scheme: str,
        make_store: Callable[[], Any],
        options: OpenOptions,
        capabilities: Capabilities,
        second: Callable[[], Backend],
        classify: Classify,
        copy_limit: int | None = None,
    ) -> None:
        """Describe the bucket; nothing is opened yet.

        Args:
            uri: the bucket's URI with a trailing slash, for messages.
            scheme: canonical scheme, for the name.
            make_store: returns the ``obstore`` store of the bucket.
            options: connections, time-outs, memory.
            capabilities: of the store through both drivers.
            second: returns the second driver for the same bucket.
            classify: what the store's error answers mean.
            copy_limit: bytes above which a copy within the store is left to ``second``.
        """
        self.name = f"{scheme} (obstore)"
        self._capabilities = capabilities
        self._uri = uri
        self._make_store = make_store
        self._options = options
        self._make_second = second
        self._classify = classify
        self._copy_limit = copy_limit
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        self._second_opened: tuple[int, Backend] | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Of the store through both drivers."""
        return self._capabilities

    # A store holds threads and sockets, which a forked child has lost: one for each process.
    def _store(self) -> Any:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with self._lock:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    opened = self._opened = (os.getpid(), self._make_store())
                    _used_by(opened[0])
        return opened[1]

    def _reader(self) -> Any:
        """Hook. Return the store through which objects are looked at and read."""
        return self._store()

    def _describe(self, key: str, result: Any) -> ObjectInfo:
        """Hook. Return what an answer of obstore's says about an object."""
        return _info(key, result)

    def _attributes(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Hook. Return user metadata as the store can hold it."""
        return dict(metadata)

    def _second(self) -> Backend:
        with self._lock:
            opened = self._second_opened
            if opened is None or opened[0] != os.getpid():
                opened = self._second_opened = (os.getpid(), self._make_second())
            return opened[1]

    def _where(self, key: str) -> str:
        return f"{self._uri}{key}"

    def _translated(self, key: str) -> AbstractContextManager[None]:
        return translated(self._where(key), self._classify)

    def _takes(self, key: str) -> bool:
        """Tell whether obstore serves ``key``, here; if not, the second driver does."""
        if not key or "\0" in key:
            raise InvalidInput(f"{self._where(key)!r}: a key is not empty and holds no NUL")
        return expressible(key) and not _is_lost()

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        if not self._takes(key):
            return self._second().stat(key, version)
        options: dict[str, Any] = {"head": True}
        if version is not None:
            options["version"] = version
        try:
            with self._translated(key):
                info = self._describe(key, _obstore().get(self._reader(), key, options=options))
        except StorageError as exc:
            if type(exc) is not StorageError:
                raise
            # Refused for a reason that only the body of an answer tells: expired credentials,
            # or a version that cannot be one. obstore asks by HEAD, which has none.
            return self._second().stat(key, version)
        if version is not None and info.version != version:
            # A store without versions ignores the wish for one.
            raise ModelMissingError(
                self._where(key), f"{self._where(key)} has no version {version!r}"
            )
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if _is_lost() or (prefix and not self._takes(prefix[:-1])):
            yield from self._second().list(prefix)
            return
        seen: set[str] = set()
        try:
            for info in self._list(prefix):
                seen.add(info.key)
                yield info
        except InvalidInput:
            # The store holds a key that object_store cannot express; s3fs and its kin can.
            for info in self._second().list(prefix):
                if info.key not in seen:
                    yield info

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        empty: set[str] = set()
        with self._translated(prefix):
            pages = _obstore().list(self._store(), prefix[:-1] or None, chunk_size=1000)
            for page in pages:
                for meta in page:
                    key = meta["path"]
                    if meta["size"] == 0:
                        # obstore drops the slash of a directory marker, so "a/" looks like
                        # an empty file "a". Only the store knows which it is.
                        if key in empty or not self._exists(key):
                            continue
                        empty.add(key)
                    yield ObjectInfo(
                        key,
                        meta["size"],
                        meta["e_tag"],
                        _version(meta["version"]),
                        meta["last_modified"],
                        hint=md5_hint(meta["e_tag"]),
                    )

    def _exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except ModelMissingError:
            return False
        return True

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        if not self._takes(key):
            return self._second().read(key, span, pin)
        options: dict[str, Any] = {}
        if span is not None:
            options["range"] = (span.start, span.end)
        if pin is not None and pin.etag is not None and not pin.etag.startswith("W/"):
            options["if_match"] = pin.etag
        if pin is not None and pin.version is not None:
            options["version"] = pin.version
        try:
            with self._translated(key):
                result = _obstore().get(self._reader(), key, options=options)
        except AuthenticationError:
            if not {"version", "if_match"} <= options.keys():
                raise
            # To name a version takes a permission of its own; the ETag is as strict.
            del options["version"]
            with self._translated(key):
                result = _obstore().get(self._reader(), key, options=options)
        start, end = result.range
        expected = end - start
        if span is not None and (start, end) != (span.start, span.end):
            # A store that ignores Range answers with the whole object.
            raise TransientError(
                f"{self._where(key)}: asked for bytes {span.start}-{span.end - 1}, the store "
                f"answered with {start}-{end - 1}"
            )
        return Body(self._describe(key, result), self._chunks(key, result, expected))

    def _chunks(self, key: str, result: Any, expected: int) -> Iterator[Buffer]:
        arrived = 0
        with self._translated(key):
            for chunk in result.stream(min_chunk_size=_STREAM_CHUNK):
                arrived += len(chunk)
                yield chunk
        if arrived != expected:
            raise TransientError(
                f"{self._where(key)}: the body ended after {arrived} of {expected} bytes"
            )

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
        mode = self._mode(key, if_absent, if_match)
        conditional = if_absent or if_match is not None
        small = payload.size is not None and payload.size <= _SINGLE_PUT_LIMIT
        # A conditional put of obstore's is one request with everything in memory.
        if not self._takes(key) or (conditional and not small):
            return self._second().write(
                key,
                payload,
                metadata=metadata,
                content_type=content_type,
                if_absent=if_absent,
                if_match=if_match,
                on_bytes=on_bytes,
            )
        attributes = self._attributes(metadata or {})
        if content_type is not None:
            attributes["Content-Type"] = content_type
        check_headers(self._where(key), attributes)
        part_size = _part_size(payload.size)
        with payload.open() as stream, self._translated(key):
            blocks = _Blocks(stream, part_size, payload.size, self._where(key), on_bytes)
            coming = iter(blocks)
            if payload.size is None:
                # An upload in parts that turns out to be empty loses its attributes on GCS.
                first = next(coming, b"")
                small, coming = len(first) <= _SINGLE_PUT_LIMIT, chain((first,), coming)
            result = _obstore().put(
                self._store(),
                key,
                b"".join(coming) if small else _read_apart(coming),
                attributes=attributes or None,
                mode=mode,
                use_multipart=not small,
                chunk_size=part_size,
                # A part is in memory twice while it is handed over.
                max_concurrency=max(
                    1, min(self._options.connections, self._options.memory // (2 * part_size))
                ),
            )
        return ObjectInfo(
            key,
            blocks.total,
            result["e_tag"],
            _version(result["version"]),
            hint=md5_hint(result["e_tag"]),
        )

    def _mode(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> Any:
        """Hook. Return obstore's mode of a put."""
        if if_match is None:
            return "create" if if_absent else "overwrite"
        if if_match.etag is None:
            raise InvalidInput(f"{self._where(key)}: if_match needs an ETag to compare with")
        mode = {"e_tag": if_match.etag}
        if if_match.version is not None:
            mode["version"] = if_match.version
        return mode

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        awkward = (
            version is not None
            or bucket is not None
            or not (self._takes(source) and self._takes(key))
        )
        if not awkward and self._copy_limit is not None:
            size = self.stat(source).size
            awkward = size is None or size > self._copy_limit
        if awkward:
            self._second().copy(source, key, version=version, bucket=bucket)
            return
        with self._translated(source):
            _obstore().copy(self._store(), source, key)

    def delete(self, keys: Sequence[str]) -> None:
        awkward = [key for key in keys if not self._takes(key)]
        plain = [key for key in keys if self._takes(key)]
        if awkward:
            self._second().delete(awkward)
        if not plain:
            return
        try:
            with self._translated(""):
                _obstore().delete(self._store(), plain)
        except BucketMissingError:
            raise
        except ModelMissingError:
            # GCS and Azure report a missing key, and may have stopped at it.
            for key in plain:
                self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            with self._translated(key):
                _obstore().delete(self._store(), key)
        except ModelMissingError:
            return

    def sign(self, key: str, method: str, expires: float) -> str:
        if not self._takes(key):
            return self._second().sign(key, method, expires)
        with self._translated(key):
            url: str = _obstore().sign(self._store(), method, key, timedelta(seconds=expires))
        return url

    def is_digest(self, info: ObjectInfo) -> bool:
        return self._second().is_digest(info)

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        return self._second().filesystem()

    def local_path(self, key: str) -> str | None:
        return None

    def close(self) -> None:
        with self._lock:
            self._opened = None
            second, self._second_opened = self._second_opened, None
        if second is not None and second[0] == os.getpid():
            second[1].close()


def expressible(key: str) -> bool:
    """Tell whether obstore can name ``key``; it would take others for another object's."""
    return _INEXPRESSIBLE.search(key) is None


# All stores of a process share obstore's threads, which begin with the first request. A child
# forked after that has none, and waits for ever: there, the second driver does all the work.
_runtime_of: int | None = None


def _used_by(pid: int) -> None:
    global _runtime_of
    _runtime_of = _runtime_of or pid


def _is_lost() -> bool:
    return _runtime_of not in (None, os.getpid())


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as exc:
        raise ConfigurationError(
            "this store needs the package obstore, which is not installed; "
            'run: pip install "modelstorage[all]" (or the extra s3, gcs or azure)'
        ) from exc
    return obstore


def _version(version: str | None) -> str | None:
    # S3 answers "null" for objects written while the bucket kept no versions.
    return None if version == "null" else version


def _info(key: str, result: Any) -> ObjectInfo:
    meta = result.meta
    attributes = {str(name).lower(): value for name, value in result.attributes.items()}
    content_type = attributes.pop("content-type", None)
    for standard in (
        "content-disposition",
        "content-encoding",
        "content-language",
        "cache-control",
        "storage-class",
    ):
        attributes.pop(standard, None)
    return ObjectInfo(
        key,
        meta["size"],
        meta["e_tag"],
        _version(meta["version"]),
        meta["last_modified"],
        content_type,
        content_digests(attributes),
        md5_hint(meta["e_tag"]),
        attributes,
    )


def _part_size(size: int | None) -> int:
    if size is None:
        return _UNKNOWN_SIZE_PART
    smallest = -(-size // _MAX_PARTS)
    return max(_PART_SIZE, -(-smallest // _MIB) * _MIB)


def _read_apart(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield ``blocks``, each taken by a thread of its own.

    obstore asks for them where it may not be called again, and they may come from it too: a
    copy from one store to another.
    """
    source = iter(blocks)
    with ThreadPoolExecutor(1, thread_name_prefix="storage-read") as reader:
        while block := reader.submit(next, source, b"").result():
            yield block


class _Blocks:
    """A stream as blocks of one part each, counted as they are taken.

    Raises instead of ending if the stream is not of the announced size, so that no wrong
    object is completed.
    """

    def __init__(
        self,
        stream: BinaryIO,
        part_size: int,
        announced: int | None,
        where: str,
        on_bytes: Callable[[int], object] | None,
    ) -> None:
        self._stream = stream
        self._part_size = part_size
        self._announced = announced
        self._where = where
        self._on_bytes = on_bytes
        self.total = 0

    def __iter__(self) -> Iterator[bytes]:
        while block := exactly(self._stream, self._part_size):
            self.total += len(block)
            yield block
            if self._on_bytes is not None:
                self._on_bytes(len(block))
        check_size(self._where, self._announced, self.total)
