"""The first driver for S3, GCS and Azure: ``obstore``, bindings of Rust's ``object_store``.

Everything here is true of all three stores; what one of them needs goes into its own module,
which hands over the arguments and, for what obstore cannot do, a second driver.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
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
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
    one_line,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["ObstoreBackend"]

_MIB = 1024 * 1024
_STREAM_CHUNK = _MIB
_PART_SIZE = 8 * _MIB
_UNKNOWN_SIZE_PART = 16 * _MIB
_MAX_PARTS = 10_000
_SINGLE_PUT_LIMIT = 8 * _MIB
# object_store parses keys as paths and refuses these; the second driver takes them as they are.
_INEXPRESSIBLE = re.compile(r"(?:^|/)(?:\.{0,2})(?:/|$)|[\x00-\x1f\x7f]")
# Both are read from the debug form of an error, where names and bodies are quoted and escaped:
# a key cannot pretend to be a status.
_STATUS = re.compile(r"\bStatus \{\s*\n\s*status: (\d{3})")
_KIND = re.compile(r"\bHttpError \{\s*\n\s*kind: (\w+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")


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
            copy_limit: bytes above which a copy within the store is left to ``second``.
        """
        self.name = f"{scheme} (obstore)"
        self.capabilities = capabilities
        self._uri = uri
        self._make_store = make_store
        self._options = options
        self._make_second = second
        self._copy_limit = copy_limit
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        self._second_opened: tuple[int, Backend] | None = None

    # A store holds threads and sockets, which a forked child has lost: one for each process.
    def _store(self) -> Any:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            with self._lock:
                opened = self._opened
                if opened is None or opened[0] != os.getpid():
                    opened = self._opened = (os.getpid(), self._make_store())
        return opened[1]

    def _second(self) -> Backend:
        with self._lock:
            opened = self._second_opened
            if opened is None or opened[0] != os.getpid():
                opened = self._second_opened = (os.getpid(), self._make_second())
            return opened[1]

    def _where(self, key: str) -> str:
        return f"{self._uri}{key}"

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        if not _expressible(key):
            return self._second().stat(key, version)
        options: dict[str, Any] = {"head": True}
        if version is not None:
            options["version"] = version
        with _translated(self._where(key)):
            return _info(key, _obstore().get(self._store(), key, options=options))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix and not _expressible(prefix[:-1]):
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
        with _translated(self._where(prefix)):
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
        if not _expressible(key):
            return self._second().read(key, span, pin)
        options: dict[str, Any] = {}
        if span is not None:
            options["range"] = (span.start, span.end)
        if pin is not None and pin.etag is not None and not pin.etag.startswith("W/"):
            options["if_match"] = pin.etag
        if pin is not None and pin.version is not None:
            options["version"] = pin.version
        with _translated(self._where(key)):
            result = _obstore().get(self._store(), key, options=options)
            start, end = result.range
        expected = end - start
        if span is not None and (start, end) != (span.start, span.end):
            # A store that ignores Range answers with the whole object.
            raise TransientError(
                f"{self._where(key)}: asked for bytes {span.start}-{span.end - 1}, the store "
                f"answered with {start}-{end - 1}"
            )
        return Body(_info(key, result), self._chunks(key, result, expected))

    def _chunks(self, key: str, result: Any, expected: int) -> Iterator[Buffer]:
        arrived = 0
        with _translated(self._where(key)):
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
        conditional = if_absent or if_match is not None
        small = payload.size is not None and payload.size <= _SINGLE_PUT_LIMIT
        # A conditional put of obstore's is one request with everything in memory.
        if not _expressible(key) or (conditional and not small):
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
        mode: Any = "overwrite"
        if if_absent:
            mode = "create"
        elif if_match is not None:
            mode = {"e_tag": if_match.etag}
            if if_match.version is not None:
                mode["version"] = if_match.version
        part_size = _part_size(payload.size)
        with payload.open() as stream, _translated(self._where(key)):
            blocks = _Blocks(stream, part_size, on_bytes)
            result = _obstore().put(
                self._store(),
                key,
                b"".join(blocks) if small else blocks,
                attributes=attributes or None,
                mode=mode,
                use_multipart=not small,
                chunk_size=part_size,
                max_concurrency=max(
                    1, min(self._options.connections, self._options.memory // part_size)
                ),
            )
        return ObjectInfo(
            key,
            blocks.total,
            result["e_tag"],
            _version(result["version"]),
            hint=md5_hint(result["e_tag"]),
        )

    def copy(self, source: str, key: str, *, version: str | None = None) -> None:
        awkward = version is not None or not (_expressible(source) and _expressible(key))
        if not awkward and self._copy_limit is not None:
            size = self.stat(source).size
            awkward = size is None or size > self._copy_limit
        if awkward:
            self._second().copy(source, key, version=version)
            return
        with _translated(self._where(source)):
            _obstore().copy(self._store(), source, key)

    def delete(self, keys: Sequence[str]) -> None:
        awkward = [key for key in keys if not _expressible(key)]
        plain = [key for key in keys if _expressible(key)]
        if awkward:
            self._second().delete(awkward)
        if not plain:
            return
        try:
            with _translated(self._uri):
                _obstore().delete(self._store(), plain)
        except BucketMissingError:
            raise
        except ModelMissingError:
            # GCS and Azure report a missing key, and may have stopped at it.
            for key in plain:
                self._delete_one(key)

    def _delete_one(self, key: str) -> None:
        try:
            with _translated(self._where(key)):
                _obstore().delete(self._store(), key)
        except ModelMissingError:
            return

    def sign(self, key: str, method: str, expires: float) -> str:
        if not _expressible(key):
            return self._second().sign(key, method, expires)
        with _translated(self._where(key)):
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


def _obstore() -> Any:
    try:
        import obstore
    except ImportError as exc:
        raise ConfigurationError(
            "this store needs the package obstore, which is not installed; "
            'run: pip install "modelstorage[all]" (or the extra s3, gcs or azure)'
        ) from exc
    return obstore


def _expressible(key: str) -> bool:
    return _INEXPRESSIBLE.search(key) is None


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


class _Blocks:
    """A stream as blocks of one part each, counted as they are taken."""

    def __init__(
        self, stream: BinaryIO, size: int, on_bytes: Callable[[int], object] | None
    ) -> None:
        self._stream = stream
        self._size = size
        self._on_bytes = on_bytes
        self.total = 0

    def __iter__(self) -> Iterator[bytes]:
        while block := self._stream.read(self._size):
            self.total += len(block)
            yield block
            if self._on_bytes is not None:
                self._on_bytes(len(block))


class _translated:  # noqa: N801 -- used as a statement
    """Turn obstore's exceptions into ours."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None or isinstance(exc, StorageError) or not isinstance(exc, Exception):
            return
        error = _classify(exc, self._where)
        if error is not None:
            raise error from exc


def _classify(exc: Exception, where: str) -> StorageError | None:
    from obstore import exceptions

    text = str(exc)
    summary = one_line(text.split("\n\nDebug source:")[0].split(" - ", 1)[-1])
    code = match.group(1) if (match := _CODE.search(text)) else None
    if isinstance(exc, exceptions.AlreadyExistsError):
        return ObjectExistsError(f"{where} exists already and is not to be overwritten")
    if isinstance(exc, exceptions.PreconditionError):
        return ObjectChangedError(f"{where} is no longer the version that was asked for")
    if isinstance(exc, FileNotFoundError):
        if code in ("NoSuchBucket", "ContainerNotFound"):
            return BucketMissingError(where)
        return ModelMissingError(where)
    if isinstance(exc, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
        return _denied(where, summary)
    if isinstance(exc, (exceptions.NotSupportedError, NotImplementedError)):
        return UnsupportedOperation(f"{where}: the store cannot do that: {summary}")
    if isinstance(exc, exceptions.InvalidPathError):
        return InvalidInput(f"{where}: the key cannot be expressed: {summary}")
    if isinstance(exc, exceptions.BaseError):
        return _classify_response(text, where, summary, code)
    if isinstance(exc, (ConnectionError, TimeoutError)):
        return TransientError(f"{where}: {summary}")
    if isinstance(exc, ValueError):
        return ConfigurationError(f"{where}: the store's settings are refused: {summary}")
    return None


def _classify_response(text: str, where: str, summary: str, code: str | None) -> StorageError:
    if match := _STATUS.search(text):
        status = int(match.group(1))
        if status in (401, 403):
            return _denied(where, summary)
        if status == 404:
            if code in ("NoSuchBucket", "ContainerNotFound") or code is None:
                return BucketMissingError(where)
            return ModelMissingError(where)
        if status == 412:
            return ObjectChangedError(f"{where} is no longer the version that was asked for")
        if status == 507:
            return InsufficientSpaceError(f"{where}: the store's disk is full: {summary}")
        if status in (408, 409, 429) or status >= 500:
            return TransientError(f"{where}: the store answered {summary}")
        return StorageError(f"{where}: the store refused the request: {summary}")
    if "invalid peer certificate" in text or "InvalidCertificate" in text:
        return ConfigurationError(
            f"{where}: the store's TLS certificate is not trusted; name its authority in "
            "ca_bundle, or SSL_CERT_FILE"
        )
    if match := _KIND.search(text):
        if match.group(1) == "Connect":
            return UnreachableError(
                f"{where}: nobody answers at the store's address: {summary}; check the "
                "endpoint, the network and the proxy"
            )
        return TransientError(f"{where}: {summary}")
    if "redential" in text:
        # The credential provider failed: its own message stands in the debug form's head.
        return _denied(where, summary)
    return TransientError(f"{where}: {summary}")


def _denied(where: str, summary: str) -> AuthenticationError:
    return AuthenticationError(
        f"{where}: the store refused access: {summary}; check the credentials and that they "
        "permit this operation"
    )
