"""``memory://name/path``: objects held by this process, the reference for every other backend.

All buckets live in one dict of the process and vanish with it. A bucket appears with its
first write. Each write gets a version of its own that is never used again; older versions
are not kept.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

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
    content_digests,
)
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    UnsupportedOperation,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["MemoryBackend", "open_backend"]

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    info: ObjectInfo


@dataclass(slots=True)
class _Bucket:
    objects: dict[str, _Object] = field(default_factory=dict)


class MemoryBackend:
    """One bucket of this process's memory."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _buckets: ClassVar[dict[str, _Bucket]] = {}
    _versions: ClassVar[Iterator[int]] = count(1)

    def __init__(self, bucket: str) -> None:
        """Address ``bucket``; it need not exist yet."""
        self._bucket = bucket

    @classmethod
    def clear(cls, bucket: str | None = None) -> None:
        """Forget ``bucket`` and all that it holds; every bucket when ``None``. For tests."""
        with cls._lock:
            if bucket is None:
                cls._buckets.clear()
            else:
                cls._buckets.pop(bucket, None)

    @property
    def name(self) -> str:
        """Driver and store."""
        return "memory"

    @property
    def capabilities(self) -> Capabilities:
        """Everything but presigned URLs."""
        return Capabilities(copy_across=True, if_match=True)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. Only the current version can be found."""
        return self._get(key, version).info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`. Sorted; a snapshot of the moment of the first item."""
        check_prefix(prefix)
        with self._lock:
            found = [
                entry.info
                for key, entry in self._existing().objects.items()
                if key.startswith(prefix) and not _is_marker(entry.info)
            ]
        yield from sorted(found, key=lambda info: info.key)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`. Yields views of at most 1 MiB."""
        entry = self._get(key)
        if pin is not None and not _same(entry.info, pin):
            raise ObjectChangedError(
                f"{self._uri(key)} was replaced: expected version {pin.pin}, "
                f"found {entry.info.pin}; ask for it again"
            )
        start, end = (span.start, span.end) if span is not None else (0, len(entry.data))
        if span is not None and not 0 <= start < end <= len(entry.data):
            raise InvalidInput(
                f"bytes {start}-{end} of {self._uri(key)} were asked for, "
                f"but it has {len(entry.data)} bytes"
            )
        view = memoryview(entry.data)[start:end]
        return Body(entry.info, (view[at : at + _CHUNK] for at in range(0, len(view), _CHUNK)))

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
        """See :meth:`Backend.write`."""
        if not key or "\0" in key:
            raise InvalidInput(f"{key!r} is no key: expected at least one character and no NUL")
        if if_match is not None and (if_absent or if_match.pin is None):
            raise InvalidInput("if_match needs an object's version or etag, and no if_absent")
        # Refused before the bytes are copied, and decided again below.
        with self._lock:
            self._check(key, if_absent, if_match)
        data = _drain(payload, self._uri(key), on_bytes)
        meta = {name.lower(): value for name, value in (metadata or {}).items()}
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        info = ObjectInfo(
            key,
            len(data),
            etag=f'"{md5}"',
            content_type=content_type,
            digests=content_digests(meta),
            hint=Digest("md5", md5),
            metadata=meta,
        )
        with self._lock:
            self._check(key, if_absent, if_match)
            return self._put(key, data, info)

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        if not key or "\0" in key:
            raise InvalidInput(f"{key!r} is no key: expected at least one character and no NUL")
        origin = self if bucket is None else MemoryBackend(bucket)
        entry = origin._get(source, version)
        with self._lock:
            self._put(key, entry.data, entry.info)

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`."""
        with self._lock:
            objects = self._existing().objects
            for key in keys:
                objects.pop(key, None)

    def sign(self, key: str, method: str, expires: float) -> str:
        """Raise ``UnsupportedOperation``: no one else can reach this memory."""
        raise UnsupportedOperation(f"{self._uri(key)}: objects in memory have no URL to sign")

    def is_digest(self, info: ObjectInfo) -> bool:
        """Return whether there is a hint: it is always the MD5 of the content."""
        return info.hint is not None

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """Return nothing: ``stat`` tells all that there is."""
        return ()

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`."""
        from storage.backends.filesystem import BackendFileSystem

        return BackendFileSystem(self), ""

    def local_path(self, key: str) -> str | None:
        """Return ``None``: memory has no path."""
        return None

    def close(self) -> None:
        """Do nothing; the bucket stays."""

    def _uri(self, key: str) -> str:
        return f"memory://{self._bucket}/{key}"

    def _existing(self) -> _Bucket:
        bucket = self._buckets.get(self._bucket)
        if bucket is None:
            raise BucketMissingError(
                self._uri(""),
                f"no bucket {self._bucket!r} in the memory of this process: nothing was "
                "written to it; a bucket appears with its first object",
            )
        return bucket

    def _get(self, key: str, version: str | None = None) -> _Object:
        with self._lock:
            entry = self._existing().objects.get(key)
        if entry is None or _is_marker(entry.info):
            raise ModelMissingError(self._uri(key))
        if version is not None and version != entry.info.version:
            raise ModelMissingError(
                self._uri(key),
                f"no version {version} of {self._uri(key)}: only the last one is kept, "
                f"which is {entry.info.version}",
            )
        return entry

    def _check(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> None:
        bucket = self._buckets.get(self._bucket)
        entry = bucket.objects.get(key) if bucket is not None else None
        if if_absent and entry is not None:
            raise ObjectExistsError(f"{self._uri(key)} exists, and was to be created only")
        if if_match is not None and (entry is None or not _same(entry.info, if_match)):
            found = f"version {entry.info.version}" if entry is not None else "nothing"
            raise ObjectChangedError(
                f"{self._uri(key)} was changed: expected version {if_match.pin}, found {found}; "
                "read it again before writing"
            )

    def _put(self, key: str, data: bytes, info: ObjectInfo) -> ObjectInfo:
        version, now = str(next(self._versions)), datetime.now(UTC)
        info = replace(info, key=key, version=version, modified=now)
        self._buckets.setdefault(self._bucket, _Bucket()).objects[key] = _Object(data, info)
        return info


def open_backend(location: Any, config: Any, options: OpenOptions) -> Backend:
    """Return the backend of a ``memory`` location; there is nothing to configure."""
    return MemoryBackend(location.bucket)


def _is_marker(info: ObjectInfo) -> bool:
    return info.size == 0 and info.key.endswith("/")


def _same(found: ObjectInfo, pin: ObjectInfo) -> bool:
    if pin.version is not None:
        return pin.version == found.version
    return pin.pin is None or pin.etag == found.etag


def _drain(payload: Payload, uri: str, on_bytes: Callable[[int], object] | None) -> bytes:
    pieces: list[Buffer] = []
    total = 0
    with payload.open() as stream:
        while piece := stream.read(_CHUNK):
            pieces.append(piece)
            total += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    if payload.size is not None and total != payload.size:
        raise IntegrityError(
            f"{uri}: {payload.size} bytes were announced, but the source gave {total}; "
            "nothing was stored"
        )
    return b"".join(pieces)
