"""The first driver for S3, GCS and Azure: ``obstore``, bindings of Rust's ``object_store``.

Everything here is true of all three stores; what one of them needs goes into its own module,
which hands over the arguments and, for what obstore cannot do, a second driver.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain
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
    content_digests,
    md5_hint,
)
from storage.backends.drivers.obstore_blocks import Blocks, read_apart
from storage.backends.drivers.obstore_errors import Classify, check_headers, translated
from storage.backends.drivers.streams import check_pin, genuine
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["SINGLE_PUT_LIMIT", "ObstoreBackend", "expressible", "is_lost", "obstore"]

_MIB = 1024 * 1024
_STREAM_CHUNK = _MIB
_PART_SIZE = 8 * _MIB
_UNKNOWN_SIZE_PART = 16 * _MIB
_MAX_PARTS = 10_000
SINGLE_PUT_LIMIT = 8 * _MIB
"""Bytes of a payload of known size that goes up in one request."""

# object_store parses keys as paths and refuses these; the second driver takes them as they are.
_INEXPRESSIBLE = re.compile(r"(?:^|/)(?:\.{0,2})(?:/|$)|[\x00-\x1f\x7f]")


class ObstoreBackend:
    """One bucket through ``obstore``; see :class:`~storage.backends.base.Backend`."""

    _versions_are_guarded = True
    """Hook. Whether to name a version takes a permission of its own."""

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
        self._sends_slowly = False

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
        return genuine(_info(key, result), self._where(key))

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
        return expressible(key) and not is_lost()

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        if not self._takes(key):
            return self._second().stat(key, version)
        options: dict[str, Any] = {"head": True}
        if version is not None:
            options["version"] = version
        try:
            with self._translated(key):
                info = self._describe(key, obstore().get(self._reader(), key, options=options))
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
                result = obstore().get(self._reader(), key, options=options)
        except AuthenticationError:
            if not self._versions_are_guarded or not {"version", "if_match"} <= options.keys():
                raise
            # The ETag is as strict.
            del options["version"]
            with self._translated(key):
                result = obstore().get(self._reader(), key, options=options)
        start, end = result.range
        expected = end - start
        if span is not None and (start, end) != (span.start, span.end):
            # A store that ignores Range answers with the whole object.
            raise TransientError(
                f"{self._where(key)}: asked for bytes {span.start}-{span.end - 1}, the store "
                f"answered with {start}-{end - 1}"
            )
        info = self._describe(key, result)
        if pin is not None and pin.etag is not None and info.etag is None:
            # No object at all: an error that calls itself a success.
            raise ObjectChangedError(f"{self._where(key)}: the answer has no entity tag any more")
        check_pin(info, pin, self._where(key))
        return Body(info, self._chunks(key, result, expected))

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
        small = payload.size is not None and payload.size <= SINGLE_PUT_LIMIT
        # A conditional put of obstore's is one request with everything in memory.
        if not self._takes(key) or (conditional and not small) or self._sends_slowly:
            return self._second().write(
                key,
                payload,
                metadata=metadata,
                content_type=content_type,
                if_absent=if_absent,
                if_match=if_match,
                on_bytes=on_bytes,
            )
        attributes = dict(metadata or {})
        if content_type is not None:
            attributes["Content-Type"] = content_type
        check_headers(self._where(key), attributes)
        part_size = _part_size(payload.size)
        try:
            with payload.open() as stream, self._translated(key):
                where, hashed = self._where(key), self._hashed(payload.size)
                blocks = Blocks(stream, part_size, payload.size, where, on_bytes, hashed)
                coming = iter(blocks)
                if payload.size is None:
                    # An upload in parts that turns out to be empty loses its attributes on GCS.
                    first = next(coming, b"")
                    small, coming = len(first) <= SINGLE_PUT_LIMIT, chain((first,), coming)
                watch = nullcontext() if small else self._in_parts(key, payload, blocks)
                with watch, self._translated(key):
                    result = obstore().put(
                        self._store(),
                        key,
                        b"".join(coming) if small else read_apart(coming),
                        attributes=attributes or None,
                        mode=mode,
                        use_multipart=not small,
                        chunk_size=part_size,
                        # A part is in memory twice while it is handed over.
                        max_concurrency=max(
                            1,
                            min(self._options.connections, self._options.memory // (2 * part_size)),
                        ),
                    )
        except TransientError as exc:
            # obstore takes the time in which it sends for silence, and so gives up on every
            # link that is slower than its parts are large. The second driver sees bytes go.
            if exc.stalled and not self._sends_slowly:
                self._sends_slowly = self._second_can_write()
            raise
        etag = result["e_tag"]
        stored = ObjectInfo(
            key, blocks.total, etag, _version(result["version"]), hint=md5_hint(etag)
        )
        self._check_arrived(stored, blocks, created=if_absent)
        return stored

    def _second_can_write(self) -> bool:
        """Hook. Tell whether the second driver can write to this server, too."""
        return True

    def _hashed(self, size: int | None) -> int:
        """Hook. Return how many of the first blocks of ``size`` bytes an MD5 is wanted of."""
        return 0

    def _in_parts(
        self, key: str, payload: Payload, blocks: Blocks
    ) -> AbstractContextManager[object]:
        """Hook. Return what an upload in parts happens in; it sees every failure."""
        return nullcontext()

    def _check_arrived(self, stored: ObjectInfo, blocks: Blocks, *, created: bool) -> None:
        """Hook. Raise ``TransientError`` if the store got other bytes than those of ``blocks``.

        Args:
            stored: what the store says.
            blocks: what was sent.
            created: whether the write was told to fail if the key exists.
        """

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
        self._copy(source, key)

    def _copy(self, source: str, key: str) -> None:
        """Hook. Let the store copy an object whose keys obstore can name."""
        with self._translated(source):
            obstore().copy(self._store(), source, key)

    def delete(self, keys: Sequence[str]) -> None:
        awkward = [key for key in keys if not self._takes(key)]
        plain = [key for key in keys if self._takes(key)]
        if awkward:
            self._second().delete(awkward)
        if not plain:
            return
        try:
            with self._translated(""):
                obstore().delete(self._store(), plain)
        except BucketMissingError:
            raise
        except ModelMissingError:
            # GCS and Azure report a missing key, and may have stopped at it.
            for key in plain:
                self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            with self._translated(key):
                obstore().delete(self._store(), key)
        except ModelMissingError:
            return

    def sign(self, key: str, method: str, expires: float) -> str:
        if not self._takes(key):
            return self._second().sign(key, method, expires)
        with self._translated(key):
            url: str = obstore().sign(self._store(), method, key, timedelta(seconds=expires))
        return url

    def is_digest(self, info: ObjectInfo) -> bool:
        return self._second().is_digest(info)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        return self._second().checksums(info)

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


def is_lost() -> bool:
    """Tell whether obstore would wait for ever in this process."""
    return _runtime_of not in (None, os.getpid())


def obstore() -> Any:
    """Return the package."""
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
