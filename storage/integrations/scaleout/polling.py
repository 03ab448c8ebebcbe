"""The loop of a client: signs of life, and looks for tasks, with a store that comes and goes."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from storage.errors import StorageError, one_line
from storage.integrations.scaleout.binding import Binding
from storage.integrations.scaleout.tasks import TaskRunner

__all__ = ["Polling"]

_log = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0
_SLOW = 2.0
# Times that a look took, for which there is no other one.
_REST = 3.0


class Polling:
    """Looks at the board on a thread of its own, until it is stopped."""

    def __init__(
        self,
        binding: Binding,
        runner: TaskRunner,
        name: Callable[[], str],
        *,
        interval: float,
        heartbeat: float | None,
        looks_for_tasks: bool,
    ) -> None:
        """Prepare.

        Args:
            binding: the client.
            runner: looks for tasks, and does them.
            name: what the client is called.
            interval: seconds between looks.
            heartbeat: seconds between signs of life; ``None`` for one at the beginning alone.
            looks_for_tasks: whether to look for tasks at all.
        """
        self._binding = binding
        self._runner = runner
        self._name = name
        self._interval = interval
        self._heartbeat = heartbeat
        self._looks_for_tasks = looks_for_tasks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scaleout polling", daemon=True)
        self._has_joined = False
        self._signed: float | None = None
        self._failures = 0
        self.is_reachable: bool | None = None
        """Whether the store answered last time; ``None`` before the first."""

        self.is_slow = False
        """Whether it took its time."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End, and say so in the store if it can be reached."""
        self._stop.set()
        if self._thread.ident is None:
            return
        self._thread.join(timeout)
        if self._signed is not None and self.is_reachable:
            try:
                self._binding.sign(self._name(), self._runner.running(), is_stopped=True)
            except StorageError as exc:
                _log.warning("the store was not told that the client stops: %s", one_line(exc))

    def _run(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self._look()
            except StorageError as exc:
                self._failed(one_line(exc))
            except Exception:  # noqa: BLE001 -- a thread that ends does nothing any more
                _log.exception("a look at the board failed")
                self._failed("see above")
            else:
                self._succeeded(time.monotonic() - begun)
            took = time.monotonic() - begun
            # A board with many tasks takes long to list, and costs whoever pays for the store.
            rest = min(_REST * took, _LONGEST_WAIT) if self.is_reachable else 0.0
            self._stop.wait(max(rest, self._wait() - took))

    def _look(self) -> None:
        if not self._has_joined:
            # Before the first claim: what has no sign of life counts as gone.
            self._sign()
            self._binding.join()
            self._has_joined = True
        due = self._signed is None or (
            self._heartbeat is not None and time.monotonic() - self._signed >= self._heartbeat
        )
        if due:
            self._sign()
        if self._looks_for_tasks:
            self._runner.poll()

    def _sign(self) -> None:
        self._binding.sign(self._name(), self._runner.running())
        self._signed = time.monotonic()

    def _failed(self, reason: str) -> None:
        if self.is_reachable is not False:
            _log.warning("the store is asked again, less and less often: %s", reason)
        self.is_reachable = False
        self._failures += 1

    def _succeeded(self, took: float) -> None:
        if self.is_reachable is False:
            _log.warning("the store answers again")
            self._binding.wake()
        self.is_reachable = True
        self.is_slow = took > _SLOW
        self._failures = 0

    def _wait(self) -> float:
        """Return the seconds from one look to the next."""
        wait = min(
            self._interval * 2.0 ** min(self._failures, 10), max(_LONGEST_WAIT, self._interval)
        )
        # Clients that lost the store at the same moment should not come back at the same moment.
        return wait if not self._failures else wait * random.uniform(0.5, 1.0)
