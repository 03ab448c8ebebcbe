"""The contract between the engine and the stores: one protocol, a few frozen values.

A backend serves *one* bucket (container, claim, host, repository) with *one* config. Keys
are literal and relative to it. Every backend obeys the docstrings of :class:`Backend`;
``storage.testing.conformance`` checks them, for third-party backends too.

Backends neither retry nor cache nor verify: the transfer layer does, the same way for all. A
backend makes one attempt and classifies its failure:

===============================  ========================================================
``ModelMissingError``            no such key (``BucketMissingError``: no such bucket)
``AuthenticationError``          401, 403 and their kin: asking again cannot help
``ObjectChangedError``           the pin of a read, or ``if_match`` of a write, failed
``ObjectExistsError``            ``if_absent`` of a write found something
``TransientError``               408, 429, 5xx, resets, time-outs, truncated bodies
``UnreachableError``             nobody answers at the address
``UnsupportedOperation``         this store or driver cannot do it
``InsufficientSpaceError``       the store's disk is full
``StorageError``                 anything else, permanent
===============================  ========================================================

No exception of an SDK escapes a backend.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

from storage.digest import Digest
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "Backend",
    "BatchBackend",
    "BatchItem",
    "Body",
    "Buffer",
    "ByteRange",
    "Capabilities",
    "ObjectInfo",
    "OpenOptions",
    "Payload",
    "bytes_payload",
    "check_prefix",
    "content_digests",
    "file_payload",
    "md5_hint",
]

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A non-empty range of bytes of an object."""

    start: int
    """Offset of the first byte."""

    end: int
    """Offset after the last byte."""

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; asked instead of its type."""

    list: bool = True
    """Objects below a prefix can be enumerated."""

    write: bool = True
    """Objects can be written."""

    delete: bool = True
    """Objects can be deleted."""

    copy: bool = True
    """The store copies within the bucket by itself; no byte passes through this machine."""

    copy_across: bool = False
    """The store also copies from its other buckets, those that the same config reaches."""

    batch_write: bool = False
    """Many objects are written in one step, all or none; see :class:`BatchBackend`."""

    ranged_read: bool = True
    """A part of an object can be read without what comes before it."""

    pinned_read: bool = True
    """A read can be tied to the version that ``stat`` saw; a changed object is noticed."""

    if_absent: bool = True
    """A write can be told to fail if the key exists, decided atomically by the store."""

    if_match: bool = False
    """A write can be told to replace only the version that ``stat`` saw, atomically."""

    metadata: bool = True
    """User metadata is kept with an object and given back by ``stat`` and ``read``."""

    sign: bool = False
    """Presigned URLs can be made."""

    checksums: bool = False
    """The store keeps digests that ``stat`` does not tell; see :meth:`Backend.checksums`."""

    repository: bool = False
    """All objects have one version, which is asked for by itself: ``backends.repositories``."""

    any_key: bool = True
    """Keys may hold empty and dot segments (``a//b``, ``a/../b``) and stay literal.

    Where this is false such keys are refused with ``InvalidInput``, never changed.
    """


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about one object."""

    key: str
    """The literal key."""

    size: int | None
    """Bytes; ``None`` only where a store (plain HTTP) does not tell."""

    etag: str | None = None
    """Entity tag as the store gives it, quotes included; weak ones start with ``W/``."""

    version: str | None = None
    """Version id or generation, where the store keeps versions."""

    modified: datetime | None = None
    """Time of last modification, with a time zone."""

    content_type: str | None = None
    """MIME type, where known."""

    digests: tuple[Digest, ...] = ()
    """Digests of the content that the store vouches for or our upload left, best first.

    A digest here is one that the content *must* have. What may or may not be a digest of the
    content (an S3 ETag that looks like an MD5) belongs in ``hint``.
    """

    hint: Digest | None = None
    """What is most likely a digest of the content; see ``Backend.is_digest``."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """User metadata, names in lower case."""

    ranged: bool = True
    """A part of this object can be read on its own; plain HTTP servers may not serve ranges."""

    filename: str | None = None
    """A name for the file, where the store gives one that says more than the key does."""

    @property
    def pin(self) -> str | None:
        """The strongest identity of this very content: version, else strong ETag, else none."""
        if self.version is not None:
            return self.version
        if self.etag is not None and not self.etag.startswith("W/"):
            return self.etag
        return None

    def differs_from(self, other: ObjectInfo) -> bool:
        """Tell whether two answers are certainly not about the same content."""
        for mine, theirs in (
            (self.version, other.version),
            (self.etag, other.etag),
            (self.size, other.size),
        ):
            if mine is not None and theirs is not None and mine != theirs:
                return True
        return False


class Body:
    """The bytes of a read as they arrive, and what the answer said about the object.

    Iterate once. Use it as a context manager, or call :meth:`close`, so that a read given up
    midway frees its connection.
    """

    def __init__(
        self,
        info: ObjectInfo,
        chunks: Iterator[Buffer],
        close: Callable[[], object] | None = None,
    ) -> None:
        """Wrap ``chunks``; ``close`` is called once, at the end."""
        self.info = info
        """About the whole object (``size`` is the object's, not the range's)."""
        self._chunks = chunks
        self._close = close

    def __iter__(self) -> Iterator[Buffer]:
        return self._chunks

    def close(self) -> None:
        """Free the connection. Safe to call twice."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def content_digests(metadata: Mapping[str, str]) -> tuple[Digest, ...]:
    """Return the digests that an upload of ours left in an object's user metadata.

    Cheapest to check first. What is not a digest is another tool's business and left out.
    """
    found = []
    for algorithm in ("blake3", "sha256"):
        try:
            found.append(Digest(algorithm, metadata.get(algorithm, "")))
        except InvalidInput:
            continue
    return tuple(found)


def md5_hint(etag: str | None) -> Digest | None:
    """Return an ETag as the MD5 that it looks like, if it does (S3's simple uploads)."""
    value = (etag or "").strip('"')
    return Digest("md5", value) if re.fullmatch(r"[0-9a-f]{32}", value) else None


def check_prefix(prefix: str) -> None:
    """Raise ``InvalidInput`` unless ``prefix`` is one for :meth:`Backend.list`."""
    if prefix and not prefix.endswith("/"):
        raise InvalidInput(f"a prefix is empty or ends in '/', unlike {prefix!r}")


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of a write. It can be opened again, so a failed attempt can be repeated."""

    open: Callable[[], BinaryIO]
    """Return a fresh stream that stands at the first byte. The caller closes it."""

    size: int | None
    """Total bytes; ``None`` if unknown before the end."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One object of a write of many."""

    key: str
    payload: Payload
    metadata: Mapping[str, str] = field(default_factory=dict)
    content_type: str | None = None


def bytes_payload(data: Buffer) -> Payload:
    """Return the payload of bytes held in memory."""
    return Payload(lambda: io.BytesIO(data), len(data))


def file_payload(path: str, size: int) -> Payload:
    """Return the payload of a local file of ``size`` bytes."""
    return Payload(lambda: open(path, "rb"), size)


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a backend talks to its store; the same for all of them."""

    connections: int = 16
    """Requests that may be under way at once."""

    connect_timeout: float = 10.0
    """Seconds for a connection to be made."""

    stall_timeout: float = 30.0
    """Seconds without a byte after which a request counts as dead."""

    memory: int = 128 * 1024 * 1024
    """Bytes that one write may hold in flight."""

    durable: bool = False
    """Whether what is written on a file system is forced to the disk before it counts as done.
    What a write with ``if_absent`` finds there is, too, before that is told."""


class Backend(Protocol):
    """One bucket of one store.

    Construction is inert: no network, no disk, no SDK before the first call. Methods may be
    called from many threads at once. Nothing survives ``fork``: a child makes its own.
    """

    @property
    def name(self) -> str:
        """Driver and store, for messages and events: ``s3 (obstore)``."""

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do with its store."""

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """Return what the store says about exactly ``key``.

        A prefix, a folder or a directory marker is not an object. Needs no more permission
        than reading that one object.

        Raises:
            ModelMissingError: there is no such object (or no such version of it).
        """

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with ``prefix``, at any depth, in any order.

        ``prefix`` is empty or ends in ``/`` and is literal. Directory markers (empty objects
        whose key ends in ``/``) are left out, empty files are not. A prefix that holds
        nothing yields nothing. Pages are fetched as needed; an object may be listed without
        its metadata and digests, never without its size.

        Raises:
            BucketMissingError: there is no such bucket.
        """

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """Start reading ``span`` of an object, or all of it.

        The body yields exactly the bytes asked for, in order, in buffers of any size, or
        raises; it never ends early in silence. A buffer is valid until the next one.

        Args:
            key: the object.
            span: within the object; all of it when ``None``. Ignored where
                ``capabilities.ranged_read`` is false, which the caller has to ask first.
            pin: what ``stat`` or ``list`` said; the read then fails rather than give
                bytes of another version.

        Raises:
            ModelMissingError: there is no such object.
            ObjectChangedError: the object is no longer what ``pin`` says.
        """

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
        """Store an object, replacing what is there. Idempotent.

        Atomic: readers see the old content or all of the new one. After a failure the old
        content (or nothing) is there and no part of the new one takes up space. Large
        payloads are sent in parts, in parallel, within ``OpenOptions.memory``.

        Args:
            key: the object.
            payload: its bytes.
            metadata: user metadata, kept where ``capabilities.metadata``.
            content_type: MIME type.
            if_absent: create only.
            if_match: replace only this version.
            on_bytes: called with the number of bytes handed over since the last call, from
                any thread.

        Returns:
            What is now there; ``size`` and, where the store tells, ``etag`` and ``version``.

        Raises:
            ObjectExistsError: ``if_absent`` and the key exists.
            ObjectChangedError: ``if_match`` and the object is another one.
        """

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """Copy within the store, by the store itself, metadata included.

        Args:
            source: the object to copy.
            key: its new key, in this bucket.
            version: the version to copy, instead of the newest.
            bucket: where ``source`` is, if not in this bucket; only where
                ``capabilities.copy_across``.

        Raises:
            ModelMissingError: there is no object ``source``.
            UnsupportedOperation: ``capabilities.copy`` is false, or the store cannot copy
                this one.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. A key that is not there is no error."""

    def sign(self, key: str, method: str, expires: float) -> str:
        """Return a URL that lets its holder ``method`` the object for ``expires`` seconds."""

    def is_digest(self, info: ObjectInfo) -> bool:
        """Tell whether ``info.hint`` really is a digest of the content.

        Asked only when the content does not match the hint, so it may be slow. S3 gives
        objects encrypted with a key of the user's an ETag that looks like an MD5 and is none.

        Raises:
            ObjectChangedError: another object is there now, so that nobody can tell.
            ModelMissingError: there is none any more.
        """

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """Return digests of an object's content that the store keeps but ``stat`` does not tell.

        They are of the very content that ``info`` is about (the same :attr:`ObjectInfo.pin`),
        and of all of it. Costs a request. Asked only where ``capabilities.checksums``, and only
        for objects that come with neither digests nor a hint.

        Returns:
            The digests, best first; none if the store keeps none that it could name, or if the
            object is another one by now.
        """

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """Return an fsspec file system with the same credentials, and this bucket's path in it."""

    def local_path(self, key: str) -> str | None:
        """Return the path of ``key`` on this machine, or ``None`` if the store is remote."""

    def close(self) -> None:
        """Free connections. The backend must not be used afterwards."""


class BatchBackend(Backend, Protocol):
    """A backend with ``capabilities.batch_write``."""

    def write_many(
        self,
        items: Sequence[BatchItem],
        *,
        if_absent: bool = False,
        on_bytes: Callable[[int], object] | None = None,
    ) -> list[ObjectInfo]:
        """Store several objects in one step: readers see all of them or none.

        Args:
            items: the objects, each with a key of its own.
            if_absent: create only; nothing is written if one of the keys exists.
            on_bytes: as for ``write``.

        Returns:
            What is now there, in the order of ``items``.

        Raises:
            ObjectExistsError: ``if_absent`` and a key exists.
        """

    def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copy within the bucket, by the store itself, several objects in one step.

        Args:
            pairs: for each object its key and its new key.

        Raises:
            ModelMissingError: one of the objects is not there; nothing was copied.
        """


class BackendFactory(Protocol):
    """What the table of schemes names: makes a backend for a location."""

    def __call__(self, location: Any, config: Any, options: OpenOptions) -> Backend:
        """Return a backend for the bucket of ``location``; inert."""
