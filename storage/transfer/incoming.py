"""The bytes of one object on their way into one file: as one stream, or as many ranges."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from storage.backends.base import ByteRange, ObjectInfo
from storage.digest import Digest, MultiHasher
from storage.errors import IntegrityError, ObjectChangedError, TransientError
from storage.files import translate_os_errors
from storage.transfer.engine import CancelledError
from storage.transfer.plan import split
from storage.transfer.verify import OrderedHasher

if TYPE_CHECKING:
    from storage.transfer.download import Job

__all__ = ["RangedFetch", "Stream", "missing"]


def missing(size: int, part_size: int, here: Sequence[ByteRange]) -> list[ByteRange]:
    """Return the parts of ``size`` bytes that still have to be fetched.

    Args:
        size: of the object.
        part_size: bytes of one request.
        here: what is here already, sorted and apart.
    """
    gaps = zip(
        [0, *(span.end for span in here)], [*(span.start for span in here), size], strict=True
    )
    return [part for start, end in gaps for part in _cut(ByteRange(start, end), part_size)]


def _cut(span: ByteRange, part_size: int) -> Iterator[ByteRange]:
    for part in split(len(span), part_size):
        yield ByteRange(span.start + part.start, span.start + part.end)


class Stream:
    """One object as one stream; a broken one goes on at its position, or begins again."""

    def __init__(self, job: Job, descriptor: int, cancel: threading.Event) -> None:
        """Prepare to write ``job`` to the open file ``descriptor``, until ``cancel`` is set."""
        self.position = 0
        self.info: ObjectInfo
        self._job = job
        self._descriptor = descriptor
        self._cancel = cancel
        self._hasher: MultiHasher | None = None
        self._mark = self._noted = 0

    def progressed(self) -> bool:
        """Tell whether the last attempt got further than those before it."""
        further = self.position > self._mark
        self._mark = max(self._mark, self.position)
        return further and self._job.resumable

    def attempt(self) -> None:
        """Fetch what is missing."""
        job = self._job
        if self.position and not job.resumable:
            job.count(-self.position)
            self.position = 0
            self._hasher = None
            with translate_os_errors(job.path):
                os.ftruncate(self._descriptor, 0)
        span = None
        if self.position:
            if self.position == job.size:
                return
            span = ByteRange(self.position, job.size)
        with job.open_body(span) as body:
            self.info = job.check_answer(body.info)
            if self._hasher is None:
                self._hasher = MultiHasher(job.algorithms(self.info))
            step = job.step
            for chunk in body:
                if self._cancel.is_set():
                    raise CancelledError
                if self.info.size is not None and self.position + len(chunk) > self.info.size:
                    raise IntegrityError(
                        f"{job.where}: the store says {self.info.size} bytes, more arrived; "
                        "nothing was published"
                    )
                with translate_os_errors(job.path):
                    _write_all(self._descriptor, chunk, self.position)
                self._hasher.update(chunk)
                self.position += len(chunk)
                job.count(len(chunk))
                if self.position - self._noted >= step:
                    self.note()
        if self.info.size is not None and self.position < self.info.size:
            raise TransientError(
                f"{job.where}: the body ended after {self.position} of {self.info.size} bytes"
            )

    def note(self) -> None:
        """Write down what has arrived, for whoever goes on if this download does not."""
        self._job.note(self._descriptor, self._noted, self.position)
        self._noted = self.position

    def digests(self) -> dict[str, Digest]:
        """Return the digests of what arrived."""
        assert self._hasher is not None
        return self._hasher.digests()


class RangedFetch:
    """One object as many ranges, all pinned to the same version; some may be here already."""

    def __init__(
        self, job: Job, descriptor: int, here: Sequence[ByteRange], part_size: int
    ) -> None:
        """Plan the parts of ``job`` in the open file ``descriptor``; ``here`` needs no fetching."""
        self.job = job
        self.descriptor = descriptor
        present = {part.start: part for span in here for part in _cut(span, part_size)}
        absent = {part.start: part for part in missing(job.size, part_size, here)}
        starts = sorted(present.keys() | absent.keys())
        self._parts = [present.get(start) or absent[start] for start in starts]
        self._present = [index for index, start in enumerate(starts) if start in present]
        self._hasher = OrderedHasher(descriptor, self._parts)
        self._lock = threading.Lock()
        self._info: ObjectInfo | None = None

    def tasks(self) -> Iterator[Callable[[threading.Event], None]]:
        """Yield what there is to do; in any order, by any thread."""
        if self._present:
            yield self._take_present
        present = frozenset(self._present)
        for index in range(len(self._parts)):
            if index not in present:
                yield partial(self._fetch, index)

    def _take_present(self, cancel: threading.Event) -> None:
        job = self.job
        if self._present[0] == 0:
            try:
                self._info = job.describe(cancel)
            except ObjectChangedError:
                job.changed = True
        for index in self._present:
            if cancel.is_set():
                raise CancelledError
            if job.changed:
                return
            self._done(index)

    def _fetch(self, index: int, cancel: threading.Event) -> None:
        job = self.job
        if job.changed:
            return
        part = _Part(self, self._parts[index], cancel)
        try:
            job.run(part.attempt, part.progressed, cancel)
        except ObjectChangedError:
            job.changed = True
            return
        finally:
            part.note()
        self._done(index)

    def _done(self, index: int) -> None:
        if index == 0:
            assert self._info is not None
            self._hasher.start(self.job.algorithms(self._info))
        if self._hasher.part_done(index):
            assert self._info is not None
            self.job.close()
            self.job.arrived(self._info, self._parts[-1].end, self._hasher.digests())

    def answered(self, span: ByteRange, info: ObjectInfo) -> None:
        """Check that an answer is about the object, and remember the first one."""
        info = self.job.check_answer(info)
        with self._lock:
            if span.start == 0 and self._info is None:
                self._info = info

    def write(self, chunk: bytes | bytearray | memoryview, position: int) -> None:
        """Put bytes where they belong."""
        with translate_os_errors(self.job.path):
            _write_all(self.descriptor, chunk, position)
        self.job.count(len(chunk))


class _Part:
    """One range; a broken one goes on at its position."""

    def __init__(self, fetch: RangedFetch, span: ByteRange, cancel: threading.Event) -> None:
        self._fetch = fetch
        self._span = span
        self._cancel = cancel
        self._step = fetch.job.step
        self._position = self._mark = self._noted = span.start

    def progressed(self) -> bool:
        """Tell whether the last attempt got any further."""
        further = self._position > self._mark
        self._mark = self._position
        return further

    def note(self) -> None:
        """Write down what has arrived, for whoever goes on if this download does not."""
        self._fetch.job.note(self._fetch.descriptor, self._noted, self._position)
        self._noted = self._position

    def attempt(self) -> None:
        """Fetch what is missing."""
        fetch = self._fetch
        if self._position == self._span.end:
            return
        with fetch.job.open_body(ByteRange(self._position, self._span.end)) as body:
            fetch.answered(self._span, body.info)
            for chunk in body:
                if self._cancel.is_set():
                    raise CancelledError
                if fetch.job.changed:
                    raise ObjectChangedError(fetch.job.where)
                if self._position + len(chunk) > self._span.end:
                    raise TransientError(
                        f"{fetch.job.where}: the store sent more than the range asked for"
                    )
                fetch.write(chunk, self._position)
                self._position += len(chunk)
                if self._position - self._noted >= self._step:
                    self.note()
        if self._position < self._span.end:
            raise TransientError(
                f"{fetch.job.where}: a range ended {self._span.end - self._position} bytes early"
            )


def _write_all(descriptor: int, chunk: bytes | bytearray | memoryview, position: int) -> None:
    view = memoryview(chunk).cast("B")
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written
