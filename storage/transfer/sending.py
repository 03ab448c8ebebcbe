"""Writing one object until it is there, also when the answer that says so is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from storage.backends.base import (
    Backend,
    BatchBackend,
    BatchItem,
    ObjectInfo,
    content_digests,
)
from storage.digest import CHECKSUMS, MultiHasher, available
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    ModelMissingError,
    ObjectExistsError,
    TransientError,
    UnreachableError,
)
from storage.transfer.engine import LARGE_WRITE
from storage.transfer.progress import Meter
from storage.transfer.retry import RetryPolicy

__all__ = ["find_written", "send_item", "send_items", "write_item"]

T = TypeVar("T")

# Writes that have stalled go few at a time: on a slow link, what many connections have in the
# system's buffers takes longer to leave than a store may be silent.
_NARROW = 2
_narrow = threading.BoundedSemaphore(_NARROW)


def _after_fork() -> None:
    # The threads that held it do not exist in the child.
    global _narrow
    _narrow = threading.BoundedSemaphore(_NARROW)


os.register_at_fork(after_in_child=_after_fork)


def write_item(
    backend: Backend, item: BatchItem, meter: Meter, *, if_absent: bool = False
) -> ObjectInfo:
    """Write one object, once; its bytes are counted while they go, and not if it fails."""
    with meter.attempt(item.payload.size) as count:
        return backend.write(
            item.key,
            item.payload,
            metadata=item.metadata,
            content_type=item.content_type,
            if_absent=if_absent,
            on_bytes=count,
        )


def send_item(
    backend: Backend,
    item: BatchItem,
    retry: RetryPolicy,
    meter: Meter,
    *,
    if_absent: bool = False,
    where: str = "",
    cancel: threading.Event | None = None,
) -> ObjectInfo:
    """Write one object, again and again as ``retry`` says.

    A write may be done and only its answer be lost. Then the next try of a write that must not
    replace anything finds an object, its own; and the next try of a large one would send bytes
    that are there. Both look at what is there first.

    Args:
        backend: where it goes.
        item: the object.
        retry: how often it is tried.
        meter: counts the bytes.
        if_absent: create only.
        where: its URI, for events.
        cancel: set when nobody wants the result any more.

    Raises:
        ObjectExistsError: ``if_absent``, and there is an object that is not this one or was
            there before.
        IntegrityError: ``if_absent``, and an earlier try left a damaged object.
        TransferError: retries are spent.
    """

    def look() -> ObjectInfo | None:
        try:
            info = find_written(backend, item)
        except IntegrityError:
            if if_absent:
                raise
            return None  # it is replaced
        if info is not None:
            # They went there, in the try before.
            meter.add_bytes(item.payload.size or 0)
        return info

    large = (item.payload.size or 0) > LARGE_WRITE and bool(content_digests(item.metadata))
    write = partial(write_item, backend, item, meter, if_absent=if_absent)
    return _until_done(write, look, large, retry, where, cancel)


def send_items(
    backend: BatchBackend,
    items: Sequence[BatchItem],
    retry: RetryPolicy,
    meter: Meter,
    *,
    if_absent: bool = False,
    where: str = "",
) -> list[ObjectInfo]:
    """Write several objects in one step of the store; see :func:`send_item`."""
    size = sum(item.payload.size or 0 for item in items)

    def write() -> list[ObjectInfo]:
        with meter.attempt(size) as count:
            return backend.write_many(items, if_absent=if_absent, on_bytes=count)

    def look() -> list[ObjectInfo] | None:
        infos = []
        for item in items:
            info = find_written(backend, item)
            if info is None:
                return None
            infos.append(info)
        meter.add_bytes(size)
        return infos

    return _until_done(write, look, False, retry, where, None)


def _until_done(
    write: Callable[[], T],
    look: Callable[[], T | None],
    look_first: bool,
    retry: RetryPolicy,
    where: str,
    cancel: threading.Event | None,
) -> T:
    unanswered = stalled = False

    def attempt() -> T:
        nonlocal unanswered, stalled
        found = look() if unanswered and look_first else None
        if found is not None:
            return found
        try:
            with _narrow if stalled else nullcontext():
                return write()
        except UnreachableError:
            raise  # nothing was sent
        except TransientError as exc:
            unanswered = True
            stalled = stalled or exc.stalled
            raise
        except ObjectExistsError:
            found = look() if unanswered else None
            if found is None:
                raise
            return found

    return retry.run(attempt, where=where, cancel=cancel)


def find_written(backend: Backend, item: BatchItem) -> ObjectInfo | None:
    """Return what is stored at the key of ``item`` if it is just what ``item`` says.

    Where metadata is kept, it is ours by the digests that we left there; they came with the
    bytes and do not tell what became of those, so what the store itself says of them has to
    agree. Elsewhere it is known by the digests that the store tells, else by its bytes.

    Raises:
        IntegrityError: it is ours by its metadata, and its bytes are not.
    """
    try:
        info = backend.stat(item.key)
    except (AuthenticationError, ModelMissingError):
        return None  # who may write may not look
    size, named = item.payload.size, backend.capabilities.metadata
    if named and not (
        content_digests(item.metadata) and item.metadata.items() <= info.metadata.items()
    ):
        return None
    fits = None in (info.size, size) or info.size == size
    if fits and _is_stored(backend, info, item, named):
        # Whoever compares sizes may rely on it.
        return replace(info, size=size) if info.size is None else info
    if named:
        raise IntegrityError(
            f"{item.key}: what was written is damaged in the store, though its metadata is as it "
            "should be; delete it, and write it again"
        )
    return None


def _is_stored(backend: Backend, info: ObjectInfo, item: BatchItem, named: bool) -> bool:
    """Tell whether the bytes of ``info`` are those of ``item``."""
    left = content_digests(info.metadata)
    known = [one for one in info.digests if one not in left]
    if not known and info.hint is None and backend.capabilities.checksums:
        with suppress(AuthenticationError, ModelMissingError):
            known = list(backend.checksums(info))
    known = [
        one
        for one in known
        if available(one.algorithm) and (named or one.algorithm not in CHECKSUMS)
    ]
    hints = [] if known or info.hint is None else [info.hint]
    if known or hints:
        hasher = MultiHasher([one.algorithm for one in (*known, *hints)])
        with item.payload.open() as mine:
            while chunk := mine.read(LARGE_WRITE):
                hasher.update(chunk)
        found = hasher.digests().values()
        if all(one in found for one in (*known, *hints)):
            return True
        if known:
            return False
    elif named:
        return True  # the store says nothing, and checked each part before it put them together
    return _same_bytes(backend, info, item)


def _same_bytes(backend: Backend, info: ObjectInfo, item: BatchItem) -> bool:
    pin = info if backend.capabilities.pinned_read and info.pin is not None else None
    with backend.read(item.key, None, pin) as body, item.payload.open() as mine:
        for chunk in body:
            theirs = memoryview(chunk).cast("B")
            if mine.read(len(theirs)) != theirs:
                return False
        return not mine.read(1)
