"""Objects to files: ranges in parallel, hashed in order, verified before anyone sees them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from storage.backends.base import Backend, Body, ByteRange, ObjectInfo
from storage.digest import Digest, MultiHasher
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    TransferError,
    TransientError,
)
from storage.files import translate_os_errors
from storage.transfer.engine import Budget, CancelledError, TransferOptions, run_tasks
from storage.transfer.plan import Plan, PlannedFile, split
from storage.transfer.progress import Meter
from storage.transfer.verify import OrderedHasher, algorithms_for, check_digests

__all__ = ["FetchedFile", "fetch"]

_RESTARTS = 3
# Bytes of an average request from which on the number of connections is found by trying.
_LONG_TASK = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One verified file of a download."""

    path: str
    """Relative to the destination."""

    size: int
    digests: dict[str, Digest]
    """Those that were computed, by algorithm."""

    info: ObjectInfo
    """The object that arrived: not the planned one if that was replaced meanwhile."""


def fetch(
    backend: Backend,
    plan: Plan,
    folder: str | None,
    file: str | None,
    *,
    options: TransferOptions,
    budget: Budget,
    meter: Meter,
    algorithms: Iterable[str] = (),
    vouched: bool = False,
    expected: Digest | None = None,
    expected_files: Mapping[str, Digest] | None = None,
    on_file: Callable[[FetchedFile, str], None] | None = None,
) -> list[FetchedFile]:
    """Fetch everything in ``plan`` and verify it.

    Args:
        backend: where the objects are.
        plan: what to fetch.
        folder: existing folder for the files of the plan, or ``None``
        file: path of the only file of the plan, if ``folder`` is ``None``.
        options: sizes and retries.
        budget: connections shared with other transfers.
        meter: is told about bytes and objects.
        algorithms: digests to compute in any case.
        vouched: compute SHA-256 too wherever the store advertises one.
        expected: digest that the only object of the plan must have.
        expected_files: digests that files of the plan must have, by their paths in it. A file
            that it does not name may be anything.
        on_file: called once for each file, with the path where it lies, as soon as it is
            verified and closed; by several threads at once. It may move the file away. What
            it raises ends the transfer.

    Returns:
        The files, in the order of the plan.

    Raises:
        IntegrityError: an object's bytes are not the ones that they should be.
        TransferError: retries are spent, or an object changed again and again.
    """
    wanted = frozenset(algorithms)
    demands = expected_files or {}
    jobs = []
    for planned in plan.files:
        path = file if folder is None else os.path.join(folder, planned.path)
        assert path is not None
        where = f"{plan.uri.rstrip('/')}/{planned.path}" if plan.is_tree else plan.uri
        demand = demands.get(planned.path, expected)
        algorithms_of = partial(
            algorithms_for,
            wanted=wanted if demand is None else wanted | {demand.algorithm},
            vouched=vouched,
        )
        jobs.append(
            _Job(backend, where, planned, path, options, meter, algorithms_of, demand, on_file)
        )
    if folder is not None:
        with translate_os_errors(folder):
            for parent in sorted({os.path.dirname(job.path) for job in jobs}):
                os.makedirs(parent, exist_ok=True)
    pending = jobs
    for _ in range(_RESTARTS + 1):
        parts = sum(job.part_count for job in pending)
        try:
            large = sum(job.size for job in pending) >= parts * _LONG_TASK
            run_tasks(_tasks(pending), budget, parts, meter.moved if large else None)
        finally:
            for job in pending:
                job.close()
        pending = [job for job in pending if job.changed]
        if not pending:
            return [job.result() for job in jobs]
        if plan.pinned:
            raise ObjectChangedError(
                f"{plan.uri}: the store gave bytes of another version than the one named; "
                "nothing was published; list the versions and name one that is there"
            )
        for job in pending:
            job.restart()
    raise TransferError(
        f"{pending[0].where}: the object was replaced {_RESTARTS + 1} times while it was being "
        "read; try again when its writer is done"
    )


def _tasks(jobs: Iterable[_Job]) -> Iterator[Callable[[threading.Event], None]]:
    for job in jobs:
        yield from job.tasks()


class _Job:
    """One object on its way into one file."""

    def __init__(
        self,
        backend: Backend,
        where: str,
        planned: PlannedFile,
        path: str,
        options: TransferOptions,
        meter: Meter,
        algorithms: Callable[[ObjectInfo], set[str]],
        expected: Digest | None,
        on_file: Callable[[FetchedFile, str], None] | None,
    ) -> None:
        self.path = path
        self.where = where
        self.algorithms = algorithms
        self.changed = False
        self._backend = backend
        self._planned = planned
        self._info = planned.info
        self._options = options
        self._meter = meter
        self._expected = expected
        self._on_file = on_file
        self._lock = threading.Lock()
        self._counted = 0
        self._descriptor: int | None = None
        self._result: FetchedFile | None = None

    @property
    def _ranged(self) -> bool:
        return self.resumable and self.size > self._options.part_size

    @property
    def part_count(self) -> int:
        """Requests that the object takes if nothing goes wrong."""
        return -(-self.size // self._options.part_size) if self._ranged else 1

    def restart(self) -> None:
        """Begin anew with what is in the store now."""
        self._meter.add_bytes(-self._counted)
        self._counted = 0
        self.changed = False
        os.unlink(self.path)
        self._info = self._options.retry.run(lambda: self._backend.stat(self._info.key))

    def result(self) -> FetchedFile:
        assert self._result is not None, "a job that did not fail has a result"
        return self._result

    def tasks(self) -> Iterator[Callable[[threading.Event], None]]:
        if not self._ranged:
            yield self._fetch_whole
            return
        parts = split(self.size, self._options.part_size)
        descriptor = self._open()
        with translate_os_errors(self.path):
            os.truncate(descriptor, self.size)
        ranged = _RangedFetch(self, descriptor, parts)
        for index in range(len(parts)):
            yield partial(ranged.fetch, index)

    def _open(self) -> int:
        with translate_os_errors(self.path):
            try:
                self._descriptor = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
                )
            except FileExistsError as exc:
                raise InvalidInput(
                    f"{self.where}: another key of this tree has the same name on the "
                    "destination's file system, which folds names; choose by patterns"
                ) from exc
        return self._descriptor

    def close(self) -> None:
        """Close the file, if it is open."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _fetch_whole(self, cancel: threading.Event) -> None:
        """Fetch the object by one request after another, hashing on the way."""
        try:
            stream = _Stream(self, self._open(), cancel)
            self.run(stream.attempt, stream.progressed)
            self.finish(stream.info, stream.position, stream.digests())
        except ObjectChangedError:
            self.changed = True
        finally:
            self.close()
        if not self.changed:
            self.hand_over()

    def finish(self, info: ObjectInfo, size: int, found: dict[str, Digest]) -> None:
        """Verify what arrived; only now is it a result."""
        if info.size is not None and size != info.size:
            raise IntegrityError(
                f"{self.where}: the store says {info.size} bytes, {size} arrived; "
                "nothing was published"
            )
        doubt = check_digests(self.where, info, found, self._expected)
        if doubt is not None and self._options.retry.run(lambda: self._backend.is_digest(info)):
            raise IntegrityError(
                f"{self.where}: the store's ETag says {doubt}, the bytes that arrived are "
                f"{found[doubt.algorithm]}; nothing was published; the object or the way to it "
                "is damaged"
            )
        self._meter.add_object()
        self._result = FetchedFile(self._planned.path, size, found, self._info)

    def hand_over(self) -> None:
        """Tell who waits for the file that it is there, verified and closed."""
        if self._on_file is not None:
            self._on_file(self.result(), self.path)

    def count(self, arrived: int) -> None:
        with self._lock:
            self._counted += arrived
        self._meter.add_bytes(arrived)

    def open_body(self, span: ByteRange | None) -> Body:
        pin = self._info if self._info.pin is not None else None
        if not self._backend.capabilities.pinned_read:
            pin = None
        return self._backend.read(self._info.key, span, pin)

    def check_answer(self, info: ObjectInfo) -> ObjectInfo:
        """Check that an answer is about the planned object; return what both say of it."""
        planned = self._info
        if planned.differs_from(info):
            raise ObjectChangedError(f"{self.where} was replaced while it was being read")
        return replace(
            info,
            size=info.size if info.size is not None else planned.size,
            digests=info.digests or planned.digests,
            hint=info.hint or planned.hint,
        )

    def run(self, step: Callable[[], None], progressed: Callable[[], bool]) -> None:
        """Run ``step`` under the transfer's retry policy."""
        self._options.retry.run(step, progressed)

    @property
    def resumable(self) -> bool:
        """Whether the parts of different answers certainly belong together."""
        capabilities = self._backend.capabilities
        return (
            capabilities.ranged_read
            and capabilities.pinned_read
            and self._info.ranged
            and self._info.pin is not None
            and bool(self._info.size)
        )

    @property
    def size(self) -> int:
        return self._info.size or 0


class _Stream:
    """One object as one stream; a broken one goes on at its position, or begins again."""

    def __init__(self, job: _Job, descriptor: int, cancel: threading.Event) -> None:
        self.position = 0
        self.info: ObjectInfo
        self._job = job
        self._descriptor = descriptor
        self._cancel = cancel
        self._hasher: MultiHasher | None = None
        self._mark = 0

    def progressed(self) -> bool:
        further = self.position > self._mark
        self._mark = max(self._mark, self.position)
        return further and self._job.resumable

    def attempt(self) -> None:
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
        if self.info.size is not None and self.position < self.info.size:
            raise TransientError(
                f"{job.where}: the body ended after {self.position} of {self.info.size} bytes"
            )

    def digests(self) -> dict[str, Digest]:
        assert self._hasher is not None
        return self._hasher.digests()


class _RangedFetch:
    """One large object as many ranges, all pinned to the same version."""

    def __init__(self, job: _Job, descriptor: int, parts: list[ByteRange]) -> None:
        self.job = job
        self._descriptor = descriptor
        self._parts = parts
        self._hasher = OrderedHasher(descriptor, parts)
        self._lock = threading.Lock()
        self._info: ObjectInfo | None = None

    def fetch(self, index: int, cancel: threading.Event) -> None:
        job = self.job
        if job.changed:
            return
        part = _Part(self, self._parts[index], cancel)
        try:
            job.run(part.attempt, part.progressed)
        except ObjectChangedError:
            job.changed = True
            return
        if self._hasher.part_done(index):
            assert self._info is not None
            job.finish(self._info, self._parts[-1].end, self._hasher.digests())
            job.close()
            job.hand_over()

    def answered(self, span: ByteRange, info: ObjectInfo) -> None:
        info = self.job.check_answer(info)
        with self._lock:
            if span.start == 0 and self._info is None:
                self._info = info
                self._hasher.start(self.job.algorithms(info))

    def write(self, chunk: bytes | bytearray | memoryview, position: int) -> None:
        with translate_os_errors(self.job.path):
            _write_all(self._descriptor, chunk, position)
        self.job.count(len(chunk))


class _Part:
    """One range; a broken one goes on at its position."""

    def __init__(self, fetch: _RangedFetch, span: ByteRange, cancel: threading.Event) -> None:
        self._fetch = fetch
        self._span = span
        self._cancel = cancel
        self._position = span.start
        self._mark = span.start

    def progressed(self) -> bool:
        further = self._position > self._mark
        self._mark = self._position
        return further

    def attempt(self) -> None:
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
