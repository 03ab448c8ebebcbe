"""The spool of an edge client: what it reports is kept on disk until the store has it.

A spool is a folder::

    lock                              held by the process that writes; its process id
    mark                              what was delivered, and which batch is being sent
    segments/<number>-<stream>.seg    the records, in files that are only added to
    aside/<client>@<batch>.json       batches that the store refuses, as they would be sent
    damaged/                          what could not be read

A record that :meth:`Spool.append` has taken is the kernel's, so a killed process does not lose it.
With ``durable`` it is on the disk, and a power cut does not lose it either. Without, a power cut
can cost what was reported since the last batch. What a batch consists of is on the disk before the
batch is sent, always: it is the same batch under the same name whoever sends it again.

Numbers go on from one run of the program to the next. They count in a *stream*, which is another
one after each boot and in each copy of the folder, because only then is it certain that no number
was given to something else: a power cut may have taken the newest records, and a copied folder
goes on in two places.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from storage import files
from storage.errors import (
    ConfigurationError,
    DestinationError,
    InsufficientSpaceError,
    InvalidInput,
)
from storage.integrations.scaleout import batches, journal
from storage.integrations.scaleout.journal import Header, MarkFile, SegmentWriter
from storage.integrations.scaleout.processes import forget_in_child
from storage.integrations.scaleout.records import TELEMETRY, Report
from storage.transfer.lines import encode_line

__all__ = ["MAX_BYTES", "MAX_RECORD", "SEGMENT", "Spool"]

MAX_BYTES = 256 * 1024 * 1024
"""Bytes that a spool may take on the disk."""

MAX_RECORD = 256 * 1024
"""Bytes of one record."""

SEGMENT = 1024 * 1024
"""Bytes of a segment, and so of a batch, if no single record is longer."""

# Of the spool that a kind of record may fill. An observation is worth little; what is told of the
# training must still fit when weeks of observations are waiting.
_SHARES: Mapping[str, float] = {TELEMETRY: 0.75}

_log = logging.getLogger(__name__)


class Spool:
    """Takes reports and keeps them. Safe for many threads.

    :class:`~storage.integrations.scaleout.outgoing.Outgoing` gives them away; what it needs of
    a spool is at the end of this class.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        client: str,
        *,
        durable: bool = False,
        max_bytes: int = MAX_BYTES,
        max_record: int = MAX_RECORD,
        segment_bytes: int = SEGMENT,
    ) -> None:
        """Open a spool, or make it.

        Args:
            folder: for the spool alone, on a disk of this machine. Folders above it are made.
            client: the id under which all that is reported from now on is delivered.
            durable: force every report to disk before it counts as taken.
            max_bytes: bytes that all may take. What does not fit any more is refused; telemetry
                is when three quarters are taken.
            max_record: bytes of one record.
            segment_bytes: bytes of a file of it.

        Raises:
            ConfigurationError: another process has it open, or it cannot be locked there.
            DestinationError: it cannot be read or written.
            InvalidInput: the id is empty or too long.
        """
        self.folder = os.path.abspath(os.fspath(folder))
        self.client = client
        self.on_append: Callable[[], object] = lambda: None
        """Called after each report that was taken, by the thread that brought it."""
        batches.client_folder(client)  # refuses what cannot be delivered
        self._durable = durable
        self._max_bytes = max_bytes
        self._max_record = max_record
        self._segment_bytes = segment_bytes
        self.lock = threading.Lock()
        """Held while anything below changes."""
        self.segments: deque[str] = deque()
        """The names of the segments, oldest first."""
        self.settled = 0
        """The number up to which nothing waits to be sent: it was delivered, or set aside."""
        self.damaged = 0
        """How many pieces could not be read; each is a file in the folder ``damaged``."""
        self.used = 0
        """Bytes that all files take."""
        self._last = 0
        self._forked = False
        self._holder: int | None = None
        self._active: SegmentWriter | None = None
        self._marks: MarkFile | None = None
        with self.told("it cannot be opened"):
            for name in ("segments", "aside", "damaged"):
                for made in files.make_parents(self.path(name)):
                    files.sync(os.path.dirname(made))
            self._holder = _hold(self.path("lock"))
            try:
                self._open()
            except BaseException:
                self.close()
                raise
        forget_in_child(self)

    # -- taking reports -----------------------------------------------------------------------

    @property
    def last(self) -> int:
        """The highest number that was given."""
        return self._last

    @property
    def is_closed(self) -> bool:
        """Whether it takes and gives nothing any more, in this process."""
        return self._marks is None

    @property
    def pending(self) -> int:
        """How many records wait to be sent."""
        return max(0, self._last - self.settled)

    @property
    def delivered(self) -> int:
        """How many records were delivered, by all programs that ever had this spool."""
        return 0 if self._marks is None else self._marks.mark.delivered

    def append(self, report: Report) -> int:
        """Take a report; it is in the kernel, or with ``durable`` on the disk, when this returns.

        Returns:
            Its number.

        Raises:
            InvalidInput: it is longer than a record may be.
            InsufficientSpaceError: the spool or the disk is full.
            DestinationError: the spool is closed, belongs to the parent of this process, or its
                disk fails. The report was not taken, except where the disk fails even to forget
                it; then it may be delivered.
        """
        self._check_open()
        with self.lock:
            self._check_open()
            number = self._last + 1
            line = encode_line({"number": number, **report.document()})
            if len(line) > self._max_record:
                raise InvalidInput(
                    f"a {report.kind} of {len(line)} bytes is longer than the {self._max_record} "
                    "that a record may have; report less at once"
                )
            header = None if self._goes_on_with(line) else self._header()
            size = len(line) + (0 if header is None else len(header.line()))
            limit = self._max_bytes * _SHARES.get(report.kind, 1.0)
            if self.used + size > limit:
                raise InsufficientSpaceError(
                    f"{files.shown(self.folder)}: the spool has {self.used} of {int(limit)} bytes "
                    f"for a {report.kind}; it was not taken; let the store be reached, or allow "
                    "more"
                )
            with self.told("the report was not taken"):
                self._write(number, line, header)
        self.on_append()
        return number

    def _goes_on_with(self, line: bytes) -> bool:
        """Whether the newest segment takes this line too; else one begins with it."""
        segment = self._active
        if segment is None:
            return False
        if segment.is_gone:
            _log.error("%s was removed by somebody, with what was in it", files.shown(segment.path))
            self.retire()
            return False
        return 0 < segment.size <= self._segment_bytes - len(line)

    def _header(self) -> Header:
        return Header(self.client, self._stream, files.boot_id(), self._inode)

    def _write(self, number: int, line: bytes, header: Header | None) -> None:
        if header is not None:
            self.retire()
            name = journal.segment_name(number, self._stream)
            self._active = SegmentWriter(self.path("segments", name), header)
            if not self.segments or self.segments[-1] != name:
                self.segments.append(name)
        segment = self._active
        assert segment is not None
        before = segment.size
        try:
            segment.append(line, sync=self._durable)
        finally:
            # An interrupt may come when it is written already.
            if segment.broken or segment.size != before:
                self._last = number
                self.used += len(line) if segment.broken else segment.size - before
            if segment.broken:
                self.retire()

    def close(self) -> None:
        """Let another process have it. Safe to call twice."""
        with self.lock:
            self.retire()
            marks, self._marks = self._marks, None
            holder, self._holder = self._holder, None
            if marks is not None:
                marks.close()
            if holder is not None:
                os.close(holder)

    def forget(self) -> None:
        """Give up all that is the parent's; for the child of a fork, which has no other thread."""
        self.lock = threading.Lock()
        self._forked = True
        # The lock is held until the last descriptor of it is closed, so by a child as well.
        with contextlib.suppress(OSError):
            self.close()

    # -- opening ------------------------------------------------------------------------------

    def _open(self) -> None:
        names = sorted(filter(journal.first_number, os.listdir(self.path("segments"))))
        self._marks = MarkFile(self.path("mark"), is_new=not names)
        mark = self._marks.mark
        self._inode = os.stat(self.folder).st_ino
        self._stream = secrets.token_hex(8)
        self._last = self.settled = mark.number
        if mark.batch is not None and (fixed := batches.parse_name(mark.batch)):
            self._last = max(self._last, fixed.last)
        # By number alone: of two with the same one, the names say nothing of which came first.
        oldest = journal.first_number(mark.segment)
        for name in names:
            path = self.path("segments", name)
            is_behind = journal.first_number(name) < oldest and not mark.doubtful
            # Whoever was to remove it was killed; or to write the first record of it.
            if is_behind or not os.stat(path).st_size:
                os.unlink(path)
            else:
                self.segments.append(name)
        self._go_on()
        for unfinished in Path(self.folder).rglob(f"*{journal.UNFINISHED}"):
            unfinished.unlink()
        self.damaged = len(os.listdir(self.path("damaged")))
        self.used = sum(
            entry.stat().st_size
            for folder in ("segments", "aside", "damaged")
            for entry in os.scandir(self.path(folder))
        )

    def _go_on(self) -> None:
        """Read the newest segment, and add to it if this is the same stream."""
        if not self.segments:
            return
        name = self.segments[-1]
        path = self.path("segments", name)
        torn = journal.drop_torn_tail(path)
        if torn:
            _log.warning(
                "%s: the last %d bytes were cut off midway and are dropped; nobody was told that "
                "they had been taken",
                files.shown(path),
                torn,
            )
        size = os.stat(path).st_size
        if not size:
            self.segments.pop()
            os.unlink(path)
            self._go_on()
            return
        first = journal.first_number(name)
        number = first - 1
        for line in journal.lines(path, 0, size):
            number = line.highest(number)
        self._last = max(self._last, number)
        header = journal.read_header(path)
        if header is None:
            # Whatever it held: the next segment begins with another number.
            self._last = max(self._last, first)
            return
        ours = replace(self._header(), stream=header.stream)
        if header.boot is not None and header == ours:
            self._stream = header.stream
            self._active = SegmentWriter(path)
        elif number < first:
            # Its only record was cut off. The next segment begins with the same number, and by
            # their names either could be the newest.
            self.segments.pop()
            os.unlink(path)
            self._go_on()

    # -- for those who deliver ----------------------------------------------------------------

    @property
    def marks(self) -> MarkFile:
        """What was delivered.

        Raises:
            DestinationError: the spool is closed, or is the parent's.
        """
        self._check_open()
        assert self._marks is not None
        return self._marks

    def size_of(self, name: str) -> tuple[int, bool]:
        """Return how many bytes of a segment count, and whether more may be added to it.

        Raises:
            OSError: it cannot be asked.
        """
        path = self.path("segments", name)
        if self._active is not None and self._active.path == path:
            return self._active.size, True
        return os.stat(path).st_size, False

    def retire(self) -> None:
        """Add nothing more to the newest segment."""
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def path(self, *parts: str) -> str:
        """Return the path of a file of the spool."""
        return os.path.join(self.folder, *parts)

    def told(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Turn the system's errors into ours; ``what`` could not be done."""
        return journal.told_os_errors(self.folder, what)

    def _check_open(self) -> None:
        if self._forked:
            raise DestinationError(
                f"{files.shown(self.folder)}: this spool is the parent's of this process; a child "
                "needs a spool of its own, in another folder"
            )
        if self._marks is None:
            raise DestinationError(f"{files.shown(self.folder)}: this spool is closed")


def _hold(path: str) -> int:
    """Lock a spool for this process; the lock ends with the process.

    Raises:
        ConfigurationError: another one has it, or there are no locks.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        where = files.shown(os.path.dirname(path))
        if isinstance(exc, BlockingIOError):
            raise ConfigurationError(
                f"{where}: this spool is in use by process {holder or 'unknown'}; every process "
                "needs a folder of its own"
            ) from exc
        raise ConfigurationError(
            f"{where}: its file system has no locks ({exc.strerror}); keep the spool on a disk of "
            "this machine"
        ) from exc
    with contextlib.suppress(OSError):  # for messages only, and the disk may be full
        os.pwrite(descriptor, b"%-20d" % os.getpid(), 0)
    return descriptor
