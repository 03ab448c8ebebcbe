"""Any backend, breaking in the ways in which networks, stores and neighbours break.

For authors of backends and of what uses them: put it around a backend, run what is to be
tested with many seeds, and demand each time that the result is right or that there is an
error of :mod:`storage.errors` and nothing else. For a whole client, let it have its backends
from here::

    class Client(StorageClient):
        def backend(self, location, config=None):
            return FaultyBackend(super().backend(location, config), seed)

It breaks the contract of :class:`~storage.backends.base.Backend` on purpose, in the ways in
which backends do that are deceived by their stores: a body that ends early in silence or is
too long, an answer that is out of date. What a fault does is said at :data:`FAULTS`.

One fault cannot be seen by anybody: a flipped byte of an object that nobody vouches for. A
store that tells no digests has to be used with an expected digest, or without ``flip``.
"""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from storage.backends.base import (
    Backend,
    BatchBackend,
    BatchItem,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    Payload,
    bytes_payload,
)
from storage.digest import Digest
from storage.errors import ModelMissingError, TransientError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.digest import Digest

__all__ = ["FAULTS", "FaultyBackend"]

FAULTS: Mapping[str, str] = {
    "refuse": "the call fails at once, as for a 503",
    "retry_after": "the same, and the store says how long to wait",
    "slow": "the answer waits for a moment, and so does its body",
    "reset": "the body of a read, or a listing, ends midway by an error",
    "truncate": "the body of a read ends midway in silence",
    "extra": "the body of a read goes on after its last byte",
    "flip": "one byte of the body of a read is another one",
    "replace": "somebody replaces the object while it is read; its size stays",
    "resize": "somebody replaces the object while it is read by one of another size",
    "vanish": "somebody deletes the object while it is read",
    "stale": "an answer has the entity tag of another version, and no digest",
    "anonymous": "an answer has no entity tag, no version and no digest that rests on them",
    "partial": "a write fails after a part of its bytes was sent",
    "lost_answer": "a write, copy or deletion is done, and reported as failed",
}
"""What can happen, by name."""

_ANSWER = ("refuse", "retry_after", "slow", "stale", "anonymous")
_BODY = ("reset", "truncate", "extra", "flip", "replace", "resize", "vanish")
_FITTING = {
    "stat": _ANSWER,
    "read": (*_ANSWER, *_BODY),
    "list": ("refuse", "retry_after", "slow", "reset", "stale", "anonymous"),
    "checksums": ("refuse", "retry_after", "slow"),
    "write": ("refuse", "retry_after", "slow", "partial", "lost_answer"),
    "copy": ("refuse", "retry_after", "slow", "lost_answer"),
    "delete": ("refuse", "retry_after", "slow", "lost_answer"),
}
_PIECE = 64 * 1024

T = TypeVar("T")
# The class below has a method of the name "list".
_Infos = list[ObjectInfo]
_Log = list[tuple[str, str, str]]
_Contents = dict[str, list[bytes]]


class FaultyBackend:
    """Passes calls on to a backend, and lets some of them go wrong as its seed says.

    What happens to a call depends on the seed, on what is asked for, and on how often just
    that was asked before; not on the order in which threads come. So a seed repeats itself.

    Attributes:
        happened: method, key and fault of everything that went wrong so far.
        replaced: the contents that ``replace`` and ``resize`` gave to objects, by key, in order.
    """

    def __init__(
        self,
        backend: Backend,
        seed: int,
        faults: Sequence[str] = tuple(FAULTS),
        probability: float = 0.3,
        *,
        wait: float = 0.001,
    ) -> None:
        """Wrap ``backend``; nothing is asked of it yet.

        Args:
            backend: what works.
            seed: decides which calls go wrong, how, and where in their bytes.
            faults: names out of :data:`FAULTS`. For a method that none of them fits, nothing
                goes wrong.
            probability: of a fault, for each call.
            wait: seconds that ``slow`` takes, and that ``retry_after`` asks for.
        """
        unknown = set(faults) - FAULTS.keys()
        if unknown:
            raise ValueError(f"no such faults: {', '.join(sorted(unknown))}")
        self._inner = backend
        self._seed = seed
        self._faults = tuple(faults)
        self._probability = probability
        self._wait = wait
        self._lock = threading.Lock()
        self._asked: Counter[str] = Counter()
        self.happened: _Log = []
        self.replaced: _Contents = {}

    # -- calls that may go wrong --------------------------------------------------------------

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        fault = self._begin("stat", key, version)
        return fault.answer(self._inner.stat(key, version))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        fault = self._begin("list", prefix)
        # Not all at once: a listing may have no end that is near.
        stop = int(fault.at * 10) if fault.kind == "reset" else None
        for number, info in enumerate(self._inner.list(prefix)):
            if number == stop:
                raise fault.error("the listing was cut off")
            yield fault.answer(info)
        if stop is not None:
            raise fault.error("the listing was cut off")

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        fault = self._begin("read", key, span)
        body = self._inner.read(key, span, pin)
        if fault.kind not in (*_BODY, "slow"):
            return Body(fault.answer(body.info), iter(body), body.close)
        size = (body.info.size or 0) if span is None else len(span)
        return Body(body.info, self._broken(body, fault, int(fault.at * size)), body.close)

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
        fault = self._begin("write", key)
        return fault.done(
            self._inner.write(
                key,
                fault.cut(payload),
                metadata=metadata,
                content_type=content_type,
                if_absent=if_absent,
                if_match=if_match,
                on_bytes=on_bytes,
            )
        )

    def write_many(
        self,
        items: Sequence[BatchItem],
        *,
        if_absent: bool = False,
        on_bytes: Callable[[int], object] | None = None,
    ) -> _Infos:
        fault = self._begin("write", items[0].key if items else "", len(items))
        if fault.kind == "partial" and items:
            items = [*items[:-1], replace(items[-1], payload=fault.cut(items[-1].payload))]
        backend = cast("BatchBackend", self._inner)
        return fault.done(backend.write_many(items, if_absent=if_absent, on_bytes=on_bytes))

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        fault = self._begin("copy", key)
        self._inner.copy(source, key, version=version, bucket=bucket)
        fault.done(None)

    def copy_many(self, pairs: Sequence[tuple[str, str]]) -> None:
        fault = self._begin("copy", pairs[0][1] if pairs else "", len(pairs))
        cast("BatchBackend", self._inner).copy_many(pairs)
        fault.done(None)

    def delete(self, keys: Sequence[str]) -> None:
        fault = self._begin("delete", keys[0] if keys else "", len(keys))
        self._inner.delete(keys)
        fault.done(None)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        self._begin("checksums", info.key)
        return self._inner.checksums(info)

    # -- calls that do not --------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def sign(self, key: str, method: str, expires: float) -> str:
        return self._inner.sign(key, method, expires)

    def is_digest(self, info: ObjectInfo) -> bool:
        return self._inner.is_digest(info)

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        return self._inner.filesystem()

    def local_path(self, key: str) -> str | None:
        return self._inner.local_path(key)

    def close(self) -> None:
        self._inner.close()

    # -- how they go wrong --------------------------------------------------------------------

    def _begin(self, method: str, key: str, detail: object = None) -> _Fault:
        """Decide what happens to a call, and let it happen if that is at its beginning."""
        what = f"{method} {key} {detail}"
        with self._lock:
            self._asked[what] += 1
            dice = random.Random(f"{self._seed} {what} {self._asked[what]}")
            fitting = [fault for fault in self._faults if fault in _FITTING[method]]
            if not fitting or dice.random() >= self._probability:
                return _Fault("", key, 1.0, 0.0)
            fault = _Fault(dice.choice(fitting), key, dice.random(), self._wait)
            self.happened.append((method, key, fault.kind))
        if fault.kind == "refuse":
            raise fault.error("refused")
        if fault.kind == "retry_after":
            raise TransientError(f"{key}: too many requests", self._wait, throttled=True)
        if fault.kind == "slow":
            time.sleep(self._wait)
        return fault

    def _broken(self, body: Body, fault: _Fault, at: int) -> Iterator[Buffer]:
        """Yield the bytes of ``body``; at offset ``at`` of them something happens."""
        position = 0
        happened = False
        for chunk in body:
            view = memoryview(chunk).cast("B")
            while view:
                # Small pieces, so that something is there before the fault and after it.
                step = min(_PIECE, len(view))
                if not happened and position + step > at:
                    step = at - position
                piece, view = view[:step], view[step:]
                if piece:
                    yield piece
                    position += len(piece)
                if not happened and position == at:
                    happened = True
                    if fault.kind == "truncate":
                        return
                    if fault.kind == "flip" and view:
                        yield bytes([view[0] ^ 1])
                        position += 1
                        view = view[1:]
                    self._happen(fault)
        if not happened and fault.kind != "truncate":
            self._happen(fault)
        if fault.kind == "extra":
            yield b"!"

    def _happen(self, fault: _Fault) -> None:
        if fault.kind == "reset":
            raise fault.error("the connection was reset")
        if fault.kind == "slow":
            time.sleep(self._wait)
        if fault.kind == "vanish":
            self._inner.delete([fault.key])
        if fault.kind in ("replace", "resize"):
            self._replace(fault)

    def _replace(self, fault: _Fault) -> None:
        try:
            old = self._inner.stat(fault.key)
        except ModelMissingError:
            return
        with self._lock:
            contents = self.replaced.setdefault(fault.key, [])
            dice = random.Random(f"{self._seed} {fault.key} {len(contents)}")
            size = old.size or 0
            if fault.kind == "resize":
                size = max(0, size + dice.choice((-1, 1)) * dice.randrange(1, 1000))
            contents.append(dice.randbytes(size))
            # Under the lock, so that the last of them is the last one written.
            self._inner.write(fault.key, bytes_payload(contents[-1]))


class _Fault:
    """What happens to one call; nothing, if it has no kind."""

    def __init__(self, kind: str, key: str, at: float, wait: float) -> None:
        self.kind = kind
        self.key = key
        self.at = at
        self._wait = wait

    def error(self, what: str) -> TransientError:
        return TransientError(f"{self.key}: {what} by the test")

    def answer(self, info: ObjectInfo) -> ObjectInfo:
        if self.kind == "stale":
            return replace(info, etag='"of-another-version"', version=None, hint=None, digests=())
        if self.kind == "anonymous":
            return replace(info, etag=None, version=None, hint=None)
        return info

    def done(self, result: T) -> T:
        if self.kind == "lost_answer":
            raise self.error("the answer was lost")
        return result

    def cut(self, payload: Payload) -> Payload:
        """Return a payload that fails midway, if that is what happens."""
        if self.kind != "partial":
            return payload
        left = int(self.at * (payload.size or 0))

        def open_cut() -> BinaryIO:
            stream = _Cut(payload.open(), left, self.error("the connection was reset"))
            return cast("BinaryIO", io.BufferedReader(stream))

        return replace(payload, open=open_cut)


class _Cut(io.RawIOBase):
    """A stream that fails after some bytes, as a connection would that carries them."""

    def __init__(self, stream: BinaryIO, left: int, error: TransientError) -> None:
        super().__init__()
        self._stream = stream
        self._left = left
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._left:
            raise self._error
        view = memoryview(buffer).cast("B")
        data = self._stream.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
