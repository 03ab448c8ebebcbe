"""What leaves a spool: batches in order, and those that were set aside.

A batch is *fixed* before it is sent: its records and its name are on the disk. Until it is settled
or set aside it is the same batch, for this process and for the one after a kill.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage import files
from storage.integrations.scaleout import batches, journal
from storage.integrations.scaleout.batches import Batch
from storage.registry import documents

if TYPE_CHECKING:
    from storage.integrations.scaleout.spool import Spool

__all__ = ["Outgoing"]

_log = logging.getLogger(__name__)


class Outgoing:
    """The way out of a spool. One thread at a time has it."""

    def __init__(self, spool: Spool) -> None:
        """Take from ``spool``."""
        self._spool = spool
        self._skip: dict[str, int] = {}
        self._spoilt: set[str] = set()
        self._listed: str | None = None
        self._recovered = False

    # -- what was delivered already -----------------------------------------------------------

    @property
    def is_doubtful(self) -> bool:
        """Whether more may have been delivered than the spool knows, because its mark is damaged.

        Then ask the store, and call :meth:`recover`.
        """
        return self._spool.marks.mark.doubtful and not self._recovered

    def clients(self) -> set[str]:
        """Return the clients of which there are records.

        Raises:
            DestinationError: a segment cannot be read.
        """
        spool = self._spool
        with spool.told("what is to be sent cannot be read"):
            with spool.lock:
                paths = [spool.path("segments", name) for name in spool.segments]
            headers = [journal.read_header(path) for path in paths if os.path.exists(path)]
        return {header.client for header in headers if header is not None}

    def recover(self, delivered: Mapping[str, int]) -> None:
        """Leave out what was delivered.

        Args:
            delivered: the highest number of each stream that the store has.
        """
        self._skip = dict(delivered)
        for name in self.aside():
            found = batches.parse_name(name)
            if found is not None:
                self._skip[found.stream] = max(found.last, self._skip.get(found.stream, 0))
        self._recovered = True

    # -- batches in order ---------------------------------------------------------------------

    def next(self, most: int) -> Batch | None:
        """Return the oldest records that wait, fixed as a batch; ``None`` if there are none.

        Args:
            most: records of a batch.

        Raises:
            DestinationError: the spool is closed, or its disk fails.
        """
        spool = self._spool
        with spool.told("what is to be sent cannot be read"):
            while True:
                with spool.lock:
                    mark = spool.marks.mark
                    name = self._first()
                    end, is_active = spool.size_of(name) if name else (0, True)
                    start = mark.offset if name == mark.segment else 0
                    if is_active and start >= end:
                        spool.settled = spool.last
                        if mark.doubtful:
                            spool.marks.write(replace(mark, doubtful=False))
                        return None
                batch = self._gather(name, start, end, most)
                if batch is not None:
                    return batch
                with spool.lock:
                    is_active = spool.size_of(name)[1] if self._exists(name) else False
                if not is_active:
                    self._leave(name)

    def _first(self) -> str:
        """Return the name of the oldest segment, empty if there is none."""
        spool = self._spool
        while spool.segments and not self._exists(spool.segments[0]):
            gone = spool.segments.popleft()
            _log.error("%s was removed by somebody, with what was in it", files.shown(gone))
        return spool.segments[0] if spool.segments else ""

    def _exists(self, name: str) -> bool:
        return os.path.exists(self._spool.path("segments", name))

    def _gather(self, name: str, start: int, end: int, most: int) -> Batch | None:
        """Return what stands between two offsets of a segment, as a batch that is fixed."""
        spool = self._spool
        path = spool.path("segments", name)
        header = journal.read_header(path)
        if header is None:
            with spool.lock:
                if spool.size_of(name)[1]:
                    spool.retire()
                self._quarantine(path, name)
            return None
        mark = spool.marks.mark
        fixed = mark.batch if mark.segment == name else None
        if fixed is not None:
            end, most = mark.end, mark.end
        skip = 0 if fixed is not None else self._skip.get(header.stream, 0)
        found: list[dict[str, Any]] = []
        passed = max(mark.number, journal.first_number(name) - 1)
        for line in journal.lines(path, start, end):
            passed = line.highest(passed)
            if line.record is None:
                self._keep_damaged(name, line)
            elif line.record["number"] > skip:
                start = start if found else line.start
                found.append(line.record)
                if len(found) >= most:
                    end = line.end
                    break
        if not found and fixed is None:
            # Also of what is not sent, the numbers were given: the next time others go on.
            last = min(passed, spool.last)
            self._pass(Batch("", b"", 0, last, name, start, end), sync=False)
            return None
        if not found:
            said = batches.parse_name(fixed or "")
            last = mark.number if said is None else said.last
            return Batch(fixed or "", b"", 0, last, name, start, end, fixed)
        batch = Batch.of(header, found, (name, start, end))
        if fixed is not None:
            return batch if batch.name == fixed else replace(batch, fixed=fixed)
        # After a power cut the same batch has to be there, and with it the note of it.
        files.sync(path)
        if self._listed != name:
            files.sync(os.path.dirname(path))
            self._listed = name
        return self.fix(batch)

    def fix(self, batch: Batch) -> Batch:
        """Note on the disk that a batch is sent, and under which name.

        Raises:
            DestinationError: that cannot be written.
        """
        spool = self._spool
        with spool.told("what is to be sent cannot be noted"), spool.lock:
            mark = replace(
                spool.marks.mark,
                segment=batch.segment,
                offset=batch.start,
                batch=batch.name,
                end=batch.end,
            )
            spool.marks.write(mark)
        self._sync_mark()
        return replace(batch, fixed=None)

    def _sync_mark(self) -> None:
        # Without the lock: whoever reports does not wait for a disk.
        with self._spool.told("what is to be sent cannot be noted"):
            self._spool.marks.sync()

    def settle(self, batch: Batch) -> None:
        """Note that a batch was delivered.

        It need not be on the disk: if a power cut takes the note, the same batch is sent again.

        Raises:
            DestinationError: that cannot be written.
        """
        self._pass(batch, delivered=batch.records, sync=False)

    def _pass(self, batch: Batch, *, delivered: int = 0, sync: bool) -> None:
        """Note that all up to the end of a batch is dealt with."""
        spool = self._spool
        with spool.told("what was delivered cannot be noted"), spool.lock:
            mark = spool.marks.mark
            number = max(mark.number, batch.last)
            passed = replace(
                mark,
                segment=batch.segment,
                offset=batch.end,
                number=number,
                delivered=mark.delivered + delivered,
                batch=None,
                end=0,
            )
            spool.marks.write(passed)
            spool.settled = max(spool.settled, number)
        if sync:
            self._sync_mark()

    def _leave(self, name: str) -> None:
        """Remove a segment of which all is dealt with.

        One that has something damaged for which there was no room elsewhere is moved away.
        """
        spool = self._spool
        path = spool.path("segments", name)
        with spool.lock:
            # Whether the disk knows that or not: what is not there is not sent again.
            with contextlib.suppress(FileNotFoundError):
                if name in self._spoilt:
                    os.replace(path, spool.path("damaged", name))
                else:
                    size = os.stat(path).st_size
                    os.unlink(path)
                    spool.used -= size
            self._spoilt.discard(name)
            spool.segments.popleft()

    # -- batches that were set aside ----------------------------------------------------------

    def set_aside(self, batch: Batch) -> None:
        """Keep a batch for later, so that it does not hold up the others.

        Raises:
            DestinationError: it cannot be written.
        """
        spool = self._spool
        with spool.told("a batch cannot be set aside"):
            journal.write_file(self._aside_path(batch.name), batch.data)
        with spool.lock:
            spool.used += len(batch.data)
        self._pass(batch, sync=True)

    def aside(self) -> list[str]:
        """Return the names of the batches that were set aside, oldest first.

        Raises:
            DestinationError: they cannot be listed.
        """
        spool = self._spool
        with spool.told("what was set aside cannot be listed"):
            found = os.listdir(spool.path("aside"))
        return sorted(each.replace("@", "/") for each in found if each.endswith(".json"))

    def read_aside(self, name: str) -> bytes | None:
        """Return the content of a batch that was set aside; ``None`` if it is damaged.

        What is damaged is moved away.

        Raises:
            DestinationError: it cannot be read.
        """
        spool = self._spool
        path = self._aside_path(name)
        with spool.told("what was set aside cannot be read"):
            with open(path, "rb") as file:
                data = file.read()
            if documents.is_whole(data):
                return data
            with spool.lock:
                self._quarantine(path, os.path.basename(path))
        return None

    def settle_aside(self, name: str, data: bytes) -> None:
        """Note that a batch that was set aside was delivered.

        Raises:
            DestinationError: that cannot be written.
        """
        spool = self._spool
        said = batches.parse_name(name)
        records = 0 if said is None else said.last - said.first + 1
        with spool.told("what was set aside cannot be removed"), spool.lock:
            files.remove(self._aside_path(name))
            spool.used -= len(data)
            mark = spool.marks.mark
            spool.marks.write(replace(mark, delivered=mark.delivered + records))

    def _aside_path(self, name: str) -> str:
        # No name of a batch holds this character.
        return self._spool.path("aside", name.replace("/", "@"))

    # -- what cannot be read ------------------------------------------------------------------

    def _keep_damaged(self, segment: str, line: journal.Line) -> None:
        spool = self._spool
        path = spool.path("damaged", f"{segment}-{line.start}")
        if os.path.exists(path):
            return
        try:
            journal.write_file(path, line.text)
        except OSError:
            # A disk that is full must not stop the delivery, which is what empties it.
            path = spool.path("damaged", segment)
            self._spoilt.add(segment)
        with spool.lock:
            spool.damaged += 1
            spool.used += 0 if segment in self._spoilt else len(line.text)
        _log.error(
            "%s: a record of %d bytes is damaged and cannot be delivered; what is left of it is "
            "in %s",
            files.shown(spool.folder),
            len(line.text),
            files.shown(path),
        )

    def _quarantine(self, path: str, name: str) -> None:
        spool = self._spool
        kept = spool.path("damaged", name)
        os.replace(path, kept)
        spool.damaged += 1
        _log.error(
            "%s: a file is damaged and cannot be delivered; it is in %s",
            files.shown(spool.folder),
            files.shown(kept),
        )
