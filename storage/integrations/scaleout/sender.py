"""Brings the records of a spool to the store, each once, whenever the store can be reached.

A batch is one object that is created only if it is absent, under a name that was written down
before the first try. So it may be sent as often as need be: after an answer that was lost, a kill
or a power cut, the object is there already, and has the same content.

What fails for a passing reason is tried again for as long as it takes, with waits that grow. What
the store refuses three times is set aside and does not hold up the others; it is tried again later,
and after each start.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    DestinationError,
    IntegrityError,
    ObjectExistsError,
    OfflineError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)
from storage.integrations.scaleout import batches
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.processes import forget_in_child

if TYPE_CHECKING:
    from storage.integrations.scaleout.batches import Batch
    from storage.integrations.scaleout.spool import Spool
    from storage.registry.objects import ObjectStore

__all__ = ["MOST", "Counts", "Sender"]

MOST = 1000
"""Records of one batch."""

_REFUSALS = 3
"""Tries after which a batch is set aside."""

_ASIDE_WAIT = 60.0
_ASIDE_WAIT_MAX = 3600.0
# Seconds that a request under way may hold up the end of a program that did not close its sender.
_AT_EXIT = 5.0
# Not the fault of a batch: no other one would fare better.
_OF_THE_STORE = (BucketMissingError, ConfigurationError, DestinationError, OfflineError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Counts:
    """How a spool and its delivery are doing."""

    pending: int
    """Records that wait to be sent."""

    delivered: int
    """Records that were delivered, by all programs that ever had this spool."""

    aside: int
    """Batches that the store refuses."""

    damaged: int
    """Pieces of the spool that could not be read."""

    failures: int
    """Tries that failed since the start."""

    last_error: str | None
    """Why the newest try failed; ``None`` if it did not."""

    reachable: bool | None
    """Whether the newest try got an answer; ``None`` before the first."""


class Sender:
    """A thread that empties a spool into a store. Its methods are safe for many threads."""

    def __init__(
        self,
        spool: Spool,
        store: ObjectStore,
        *,
        linger: float = 5.0,
        wait_initial: float = 1.0,
        wait_max: float = 60.0,
        most: int = MOST,
    ) -> None:
        """Describe the delivery; nothing is sent before :meth:`start`.

        Args:
            spool: what is emptied.
            store: where the batches go. It has to create objects only if they are absent.
            linger: seconds for which a record waits for others, so that not each is an object.
            wait_initial: seconds to wait after a failure; each further one doubles them.
            wait_max: seconds to wait at most.
            most: records of a batch.

        Raises:
            UnsupportedOperation: the store cannot create an object only if it is absent.
        """
        capabilities = store.backend.capabilities
        if not (capabilities.write and capabilities.if_absent):
            raise UnsupportedOperation(
                f"{store.location}: {store.backend.name} cannot create an object only if it is "
                "absent, so what is sent again would be there twice; keep reports on S3, GCS, "
                "Azure, the Hub, a claim or a directory"
            )
        self._spool = spool
        self._store = store
        self._linger = linger
        self._wait_initial = wait_initial
        self._wait_max = wait_max
        self._most = most
        self._outgoing = Outgoing(spool)
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # All of these are guarded by it.
        self._urgent = False
        self._hurried = False
        self._stopping = False
        self._flushing = 0
        self._rounds = 0
        self._wanted: float = math.inf
        self._failures = 0
        self._error: str | None = None
        self._reachable: bool | None = None
        # These are the thread's own.
        self._delay = 0.0
        self._refused = 0
        self._aside_at = 0.0
        self._aside_delay = _ASIDE_WAIT
        self._aside = len(self._outgoing.aside())
        forget_in_child(self)

    # -- for the program ----------------------------------------------------------------------

    def start(self) -> None:
        """Begin to deliver; once."""
        self._spool.on_append = self._appended
        self._thread = threading.Thread(target=self._run, name="scaleout-reports", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        """End the thread before the interpreter does, which would not ask what it is doing."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_AT_EXIT)

    def wake(self) -> None:
        """Try at once, whatever was to be waited for: the store seems to work again."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()

    def hurry(self) -> None:
        """Let what is there wait for no others. A store that failed is not asked any sooner."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Deliver all that was reported before this call.

        Args:
            timeout: seconds to wait for it.

        Returns:
            Whether all of it is delivered.
        """
        if self._thread is None or os.getpid() != self._pid:
            return False
        target = self._spool.last
        with self._changed:
            rounds = self._rounds
            self._flushing += 1
            self._urgent = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._is_done(target, rounds), timeout)
            finally:
                self._flushing -= 1
            return self._spool.settled >= target and not self._aside

    def _is_done(self, target: int, rounds: int) -> bool:
        if self._thread is None or not self._thread.is_alive():
            return True
        is_tried = not self._aside or self._rounds > rounds
        return is_tried and self._spool.settled >= target

    def close(self, timeout: float) -> bool:
        """Deliver what there is, and end the thread.

        What is not delivered then stays in the spool, for the next program that opens it. A
        request under way is not interrupted; its thread ends after it.

        Args:
            timeout: seconds for both.

        Returns:
            Whether all of it is delivered.
        """
        deadline = time.monotonic() + timeout
        flushed = self.flush(timeout)
        if os.getpid() != self._pid:
            return False
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if not self._thread.is_alive():
                atexit.unregister(self._end)
        return flushed

    def forget(self) -> None:
        """Give up what threads of the parent may hold; for the child of a fork."""
        self._changed = threading.Condition()

    def counts(self) -> Counts:
        """Return how it goes."""
        with self._changed:
            return Counts(
                self._spool.pending,
                self._spool.delivered,
                self._aside,
                self._spool.damaged,
                self._failures,
                self._error,
                self._reachable,
            )

    def _appended(self) -> None:
        # Whoever waits said how many records are worth to be told.
        if self._spool.pending >= self._wanted:
            with self._changed:
                self._changed.notify_all()

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._spool.is_closed:
            try:
                busy = self._step()
            except Exception as exc:  # noqa: BLE001 -- nobody would deliver after that
                self._failed(exc)
                pause = self._pause
            else:
                self._delay = 0.0
                pause = _go_on if busy else self._idle
            with self._changed:
                self._changed.notify_all()
                if not self._stopping:
                    pause()
                if self._stopping:
                    return

    def _step(self) -> bool:
        """Send one batch; tell whether there was any."""
        if self._outgoing.is_doubtful:
            self._outgoing.recover(self._ask_what_is_there())
        batch = self._outgoing.next(self._most)
        if batch is not None:
            try:
                self._deliver(batch)
            except StorageError as exc:
                self._refuse(batch, exc)
                raise
            self._refused = 0
            self._answered()
        if self._aside and time.monotonic() >= self._aside_at:
            self._retry_aside()
        return batch is not None

    def _deliver(self, batch: Batch) -> None:
        if batch.fixed is not None:
            # Some of it is damaged now that was not when it was sent, perhaps, under that name.
            if not batch.records or self._store.info(batch.fixed) is not None:
                self._outgoing.settle(batch)
                return
            batch = self._outgoing.fix(batch)
        self._put(batch.name, batch.data)
        self._outgoing.settle(batch)

    def _put(self, name: str, data: bytes) -> None:
        """Create an object; it may be there, if this is not the first try."""
        try:
            self._store.create_once(name, data)
            return
        except ObjectExistsError:
            pass
        try:
            found = self._store.read(name)
        except AuthenticationError:
            # Who may write but not read has to trust the name, which holds the content's digest.
            return
        if found is None:
            raise TransientError(f"{self._store.where(name)} was there, and now it is not")
        if found != data:
            raise IntegrityError(
                f"{self._store.where(name)} has another content than its name says; something "
                "else wrote it; remove it"
            )

    def _answered(self) -> None:
        with self._changed:
            self._error = None
            self._reachable = True

    def _failed(self, exc: Exception) -> None:
        text = one_line(exc)
        with self._changed:
            self._failures += 1
            is_news = self._error != text
            self._error = text
            if not isinstance(exc, DestinationError):
                self._reachable = _is_refusal(exc)
        # A store that is away for days is told of once.
        _log.log(
            logging.WARNING if is_news else logging.DEBUG,
            "%d reports wait, for they cannot be delivered to %s: %s",
            self._spool.pending,
            self._store.location,
            text,
            # What is not ours is a fault of the program.
            exc_info=None if isinstance(exc, StorageError) else exc,
        )

    def _refuse(self, batch: Batch, exc: StorageError) -> None:
        """Count a refusal; what is refused too often makes way for the others."""
        if not _is_refusal(exc):
            return
        self._refused += 1
        if self._refused < _REFUSALS or not batch.records:
            return
        self._outgoing.set_aside(batch)
        self._refused = 0
        self._aside_at = time.monotonic() + self._aside_delay
        with self._changed:
            self._aside += 1
        _log.error(
            "%s is refused and set aside, with %d reports; it is tried again later: %s",
            self._store.where(batch.name),
            batch.records,
            one_line(exc),
        )

    def _retry_aside(self) -> None:
        names = self._outgoing.aside()
        try:
            for name in names:
                data = self._outgoing.read_aside(name)
                if data is None:
                    continue
                try:
                    self._put(name, data)
                except StorageError as exc:
                    if not _is_refusal(exc):
                        raise
                    continue
                self._outgoing.settle_aside(name, data)
                self._answered()
                self._aside_delay = _ASIDE_WAIT
            with self._changed:
                self._rounds += 1
        finally:
            left = len(self._outgoing.aside())
            self._aside_at = time.monotonic() + self._aside_delay
            self._aside_delay = min(2 * self._aside_delay, _ASIDE_WAIT_MAX)
            with self._changed:
                self._aside = left

    def _ask_what_is_there(self) -> dict[str, int]:
        """Return the highest number of each stream that the store has from our clients."""
        found: dict[str, int] = {}
        skip = len(self._store.location.prefix)

        def look(prefix: str) -> None:
            for info in self._store.backend.list(self._store.key(prefix)):
                name = batches.parse_name(info.key[skip:])
                if name is not None:
                    found[name.stream] = max(name.last, found.get(name.stream, 0))

        for client in sorted(self._outgoing.clients()):
            prefix = f"{batches.client_folder(client)}/"
            where = self._store.where(prefix)
            try:
                self._store.client.run_retried(functools.partial(look, prefix), where=where)
            except AuthenticationError as exc:
                _log.error(
                    "the mark of the spool is damaged, and what is in %s may not be listed, so "
                    "some records may be sent there once more; Reports shows them once: %s",
                    where,
                    one_line(exc),
                )
        return found

    # -- waiting; the condition is held -------------------------------------------------------

    def _pause(self) -> None:
        """Wait after a failure, unless somebody knows better."""
        self._delay = min(self._wait_max, max(self._wait_initial, 2 * self._delay))
        # Clients that lost a store together should not come back together.
        self._wait(random.uniform(0.5, 1.0) * self._delay)

    def _idle(self) -> None:
        """Wait for records, and then for more of them."""
        until = max(0.0, self._aside_at - time.monotonic()) if self._aside else None
        self._wait_for_pending(1, until)
        if self._spool.pending and not self._flushing:
            self._wait_for_pending(self._most, self._linger, lambda: self._hurried)
        self._hurried = False
        self._heard()

    def _wait_for_pending(
        self, wanted: int, timeout: float | None, is_enough: Callable[[], bool] = bool
    ) -> None:
        # Said before the look at it: whoever adds a record does these two in the other order.
        self._wanted = wanted
        self._changed.wait_for(
            lambda: self._spool.pending >= wanted or self._is_called() or is_enough(), timeout
        )
        self._wanted = math.inf

    def _wait(self, seconds: float) -> None:
        self._changed.wait_for(self._is_called, seconds)
        self._heard()

    def _is_called(self) -> bool:
        return self._urgent or self._stopping

    def _heard(self) -> None:
        if self._urgent:
            self._urgent = False
            self._delay = 0.0
            self._aside_at = 0.0


def _go_on() -> None:
    """Wait for nothing."""


def _is_refusal(exc: Exception) -> bool:
    """Tell whether the store gave an answer that it would give again to the same batch."""
    if not isinstance(exc, StorageError):
        return False
    if isinstance(exc, (TransientError, *_OF_THE_STORE)):
        return False
    return not isinstance(exc.__cause__, TransientError)
