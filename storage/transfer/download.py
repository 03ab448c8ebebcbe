"""Objects to files: ranges in parallel, hashed in order, verified before anyone sees them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from storage.backends.base import Backend, Body, ByteRange, ObjectInfo
from storage.digest import Digest, available
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    StorageError,
    TransferError,
    UnsupportedOperation,
)
from storage.files import translate_os_errors
from storage.transfer import events
from storage.transfer.engine import Budget, TransferOptions, run_tasks
from storage.transfer.incoming import RangedFetch, Stream, missing
from storage.transfer.journal import Journal, Tracked
from storage.transfer.plan import Plan, PlannedFile, even_part
from storage.transfer.progress import Meter
from storage.transfer.verify import algorithms_for, check_checksums, check_digests

__all__ = ["FetchedFile", "fetch"]

T = TypeVar("T")

_RESTARTS = 3
# Bytes of an average request from which on the number of connections is found by trying.
_LONG_TASK = 2 * 1024 * 1024


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
    journal: Journal | None = None,
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
        journal: tells which bytes of the files are here already, and is told about all that
            arrive.

    Returns:
        The files, in the order of the plan.

    Raises:
        IntegrityError: an object's bytes are not the ones that they should be.
        TransferError: retries are spent, or an object changed again and again.
    """
    if plan.size is not None:
        part_size = even_part(plan.size, options.part_size, options.connections)
        options = replace(options, part_size=part_size)
    wanted = frozenset(algorithms)
    demands = expected_files or {}
    refused = threading.Event()
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
            Job(
                backend,
                where,
                planned,
                path,
                options,
                meter,
                algorithms_of,
                demand,
                on_file,
                journal,
                refused,
                listed=plan.is_tree,
            )
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
        pending = [job for job in pending if job.changed or job.spoilt]
        if not pending:
            return [job.result() for job in jobs]
        if plan.pinned and any(job.changed for job in pending):
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


def _tasks(jobs: Iterable[Job]) -> Iterator[Callable[[threading.Event], None]]:
    for job in jobs:
        yield from job.tasks()


class Job:
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
        journal: Journal | None,
        refused: threading.Event,
        *,
        listed: bool,
    ) -> None:
        """Prepare; see :func:`fetch`.

        ``refused`` is set once the store has said that it never tells checksums; ``listed``
        says that it may tell more about the object when it is asked.
        """
        self.path = path
        self.where = where
        self.changed = False
        """Whether the object was replaced meanwhile."""
        self.spoilt = False
        """Whether what an earlier download left turned out to be wrong."""
        self._backend = backend
        self._planned = planned
        self._info = planned.info
        self._options = options
        self._meter = meter
        self._algorithms = algorithms
        self._expected = expected
        self._on_file = on_file
        self._journal = journal
        self._refused = refused
        self._listed = listed
        self._lock = threading.Lock()
        self._counted = 0
        self._descriptor: int | None = None
        self._kept: tuple[Digest, ...] = ()
        self._arrival: tuple[ObjectInfo, int, dict[str, Digest]] | None = None
        self._result: FetchedFile | None = None
        self._begin()

    def _begin(self) -> None:
        capabilities = self._backend.capabilities
        # Whether the parts of different answers certainly belong together.
        self.resumable = (
            capabilities.ranged_read
            and capabilities.pinned_read
            and self._info.ranged
            and self._info.pin is not None
            and bool(self._info.size)
        )
        self._tracked: Tracked | None = None
        if self._journal is not None and self.resumable:
            self._tracked = self._journal.track(self.path, self._info)
        self._here = [] if self._tracked is None else self._tracked.ranges
        self._present = sum(map(len, self._here))
        if self._present:
            self._meter.add_present(self._present)
            events.resumed(self.where, self._present, self.size)
        self._asks = capabilities.checksums and not (self._info.digests or self._info.hint)
        # Who is the last of those that fetch and those that ask goes on.
        self._open_ends = 1 + self._asks

    @property
    def _ranged(self) -> bool:
        return bool(self._here) or (self.resumable and self.size > self._options.part_size)

    @property
    def part_count(self) -> int:
        """Requests that the object takes if nothing goes wrong."""
        if not self._ranged:
            return 1 + self._asks
        parts = missing(self.size, self._options.part_size, self._here)
        return len(parts) + bool(self._here) + self._asks

    @property
    def size(self) -> int:
        """In bytes; 0 if it is not known."""
        return self._info.size or 0

    @property
    def step(self) -> int:
        """Bytes of one range that are worth a note in the journal."""
        return sys.maxsize if self._tracked is None else self._tracked.step

    def restart(self) -> None:
        """Begin anew, with what is in the store now."""
        self._meter.add_bytes(-self._counted)
        self._meter.add_present(-self._present)
        self._counted = 0
        if self._tracked is not None:
            self._tracked.drop()
        os.unlink(self.path)
        if self.changed:
            before = self._info.size
            self._info = self._retried(lambda: self._backend.stat(self._info.key))
            self._meter.resize(before, self._info.size)
        self.changed = self.spoilt = False
        self._kept, self._arrival = (), None
        self._begin()

    def result(self) -> FetchedFile:
        """Return the file, which is verified."""
        assert self._result is not None, "a job that did not fail has a result"
        return self._result

    def tasks(self) -> Iterator[Callable[[threading.Event], None]]:
        """Yield what there is to do; in any order, by any thread."""
        if self._ranged:
            descriptor = self._open()
            with translate_os_errors(self.path):
                os.truncate(descriptor, self.size)
            fetching = RangedFetch(self, descriptor, self._here, self._options.part_size)
            tasks = fetching.tasks()
            yield next(tasks)
            if self._asks:
                yield self._ask
            yield from tasks
            return
        yield self._fetch_whole
        if self._asks:
            yield self._ask

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        with translate_os_errors(self.path):
            if self._here:
                self._descriptor = os.open(self.path, flags)
                return self._descriptor
            try:
                self._descriptor = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
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
        stream = Stream(self, self._open(), cancel)
        try:
            try:
                self.run(stream.attempt, stream.progressed, cancel)
            except ObjectChangedError:
                self.changed = True
                return
            except BaseException:
                stream.note()
                raise
            if self._on_file is None:
                stream.note()
        finally:
            self.close()
        self.arrived(stream.info, stream.position, stream.digests())

    def _ask(self, cancel: threading.Event) -> None:
        """Ask for the digests that the store keeps and does not tell."""
        # Without them the object is what it would be in a store that keeps none.
        with contextlib.suppress(StorageError):
            try:
                if not self._refused.is_set():
                    self._kept = self._retried(lambda: self._backend.checksums(self._info), cancel)
            except (AuthenticationError, UnsupportedOperation):
                self._refused.set()
        self._end()

    def arrived(self, info: ObjectInfo, size: int, found: dict[str, Digest]) -> None:
        """Take note that all bytes are here, in a file that is closed, and what they are.

        Args:
            info: what the store says about the object.
            size: in bytes.
            found: digests of them.
        """
        self._arrival = info, size, found
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._open_ends -= 1
            if self._open_ends:
                return
        assert self._arrival is not None
        try:
            self._verify(*self._arrival)
        except ObjectChangedError:
            # What arrived is not right, and nobody can tell any more what it should have been.
            self.changed = True
            return
        except IntegrityError as exc:
            if not self._here:
                raise
            # A disk may have lost what it had; the store gets a chance to be right.
            events.verification_failed(self.where, exc)
            self.spoilt = True
            return
        _, size, found = self._arrival
        self._meter.add_object()
        self._result = FetchedFile(self._planned.path, size, found, self._info)
        if self._on_file is not None:
            self._on_file(self._result, self.path)
            if self._tracked is not None:
                self._tracked.drop()

    def _verify(self, info: ObjectInfo, size: int, found: dict[str, Digest]) -> None:
        """Compare what arrived with what is known; only then it is a result."""
        if info.size is not None and size != info.size:
            raise IntegrityError(
                f"{self.where}: the store says {info.size} bytes, {size} arrived; "
                "nothing was published"
            )
        doubt = check_digests(self.where, info, found, self._expected)
        if doubt is not None and self._retried(lambda: self._backend.is_digest(info)):
            raise IntegrityError(
                f"{self.where}: the store's ETag says {doubt}, the bytes that arrived are "
                f"{found[doubt.algorithm]}; nothing was published; the object or the way to it "
                "is damaged"
            )
        if self._kept and not (info.digests or info.hint):
            with translate_os_errors(self.path):
                check_checksums(self.where, self._kept, found, self.path)

    def algorithms(self, info: ObjectInfo) -> set[str]:
        """Return the digests to compute of the bytes of an object that is as ``info`` says."""
        if not info.digests and not info.hint:
            info = replace(
                info, digests=tuple(each for each in self._kept if available(each.algorithm))
            )
        return self._algorithms(info)

    def describe(self, cancel: threading.Event) -> ObjectInfo:
        """Return what the store says about the object, of which no body is going to say it.

        Raises:
            ObjectChangedError: it was replaced.
        """
        if not self._listed or self._info.digests:
            return self._info
        return self.check_answer(self._retried(lambda: self._backend.stat(self._info.key), cancel))

    def note(self, descriptor: int, start: int, end: int) -> None:
        """Write down that some bytes are in the file."""
        if self._tracked is not None:
            with translate_os_errors(self.path):
                self._tracked.add(descriptor, start, end)

    def count(self, arrived: int) -> None:
        """Count bytes that arrived."""
        with self._lock:
            self._counted += arrived
        self._meter.add_bytes(arrived)

    def open_body(self, span: ByteRange | None) -> Body:
        """Ask for some bytes of the object, or for all."""
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

    def run(
        self,
        step: Callable[[], None],
        progressed: Callable[[], bool],
        cancel: threading.Event | None = None,
    ) -> None:
        """Run ``step`` under the transfer's retry policy."""
        self._options.retry.run(step, progressed, where=self.where, cancel=cancel)

    def _retried(self, ask: Callable[[], T], cancel: threading.Event | None = None) -> T:
        return self._options.retry.run(ask, where=self.where, cancel=cancel)
