"""One faulty transfer: what goes wrong by its seed, and what has to hold in the end."""

from __future__ import annotations

import faulthandler
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from storage.cache.leases import release_all
from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import StorageError
from storage.testing.fault_script import KINDS, Fault, Request, SeededScript
from tests.facade.stores import Store
from tests.faults.stores import Site
from tests.faults.transfers import Download, Transfer, Upload, Wrong
from tests.transfer.support import assert_clear

__all__ = ["BOUND", "DOWN", "SLOW", "STALL", "UP", "WAIT", "WRONG", "Outcome", "run"]

STALL = 1.5
"""Seconds without a byte after which a request counts as dead; half of it for a store that is
patient with some of them."""

WAIT = 1.0
"""Seconds that the proxy asks a client to wait, at most."""

SLOW = 0.3
"""Seconds that a throttled answer is slow; then it goes on as usual. A link may be slow for
ever, and nobody calls that a stall."""

BOUND = 20.0
"""Seconds that a transfer without faults may take here, by far. A fault costs at most the time
in which it is noticed (``STALL``), the wait that the store asks for, and what has to be done
again; so a transfer with n faults ends within ``BOUND + n * (STALL + WAIT + 0.5)``. Where the
store is patient with a request, ``STALL`` is so many times as much."""

DOWN = tuple(kind for kind in KINDS if kind != "flip_request")
"""What can go wrong with a download."""

UP = tuple(kind for kind in KINDS if kind not in ("flip", "change"))
"""What can go wrong with an upload."""

_MIXED = 3
_COSTLY = ("stall", "stall_answer", "throttle")


WRONG = "wrong"


@dataclass
class Outcome:
    """What became of one transfer."""

    site: str
    direction: str
    seed: int
    shape: str
    ended: str = ""
    """``whole``, the name of the error, or ``wrong``."""

    faults: list[str] = field(default_factory=list)
    """The kinds that happened, in order."""

    seconds: float = 0.0
    message: str = ""
    left: list[str] = field(default_factory=list)
    """Keys of uploads that are unfinished because the credentials expired midway."""

    def line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self))


class TransferScript:
    """Hands out the faults of one transfer; at least one if there is a request that fits it.

    The first comes at the latest with request ``first``, or one of the first three; how many
    there are in all, and how often, is drawn by the seed too.
    """

    def __init__(
        self,
        seed: int,
        kinds: Sequence[str],
        fits: Callable[[str, Request], bool],
        first: int | None = None,
    ) -> None:
        dice = random.Random(f"{seed} script")
        self.happened: list[Fault] = []
        self._often = SeededScript(seed, kinds, dice.choice((0.1, 0.3, 0.6)))
        self._surely = SeededScript(seed, kinds, 1.0)
        self._first = first or dice.randrange(1, 4)
        self.limit = dice.choice((1, 2, 3, 6, 15))
        if set(kinds) & set(_COSTLY):
            self.limit = min(self.limit, 2 if len(kinds) == 1 else 5)
        self._fits = fits
        self._lock = threading.Lock()
        self._number = 0
        self.expired = False
        """Whether credentials are refused."""
        self.over = False
        """Set it to let everything pass from now on."""

    def __call__(self, request: Request) -> Fault | None:
        with self._lock:
            if self.over:
                return None
            if self.expired:
                return Fault("expire")
            # A store may be behind two proxies.
            self._number += 1
            request = replace(request, number=self._number)
            if len(self.happened) >= self.limit:
                return None
            sure = not self.happened and self._number >= self._first
            fault = (self._surely if sure else self._often)(request)
            if fault is None or not self._fits(fault.kind, request):
                return None
            if fault.kind == "throttle":
                fault = replace(fault, seconds=SLOW)
            self.expired = fault.kind == "expire"
            self.happened.append(fault)
            return fault


def kinds_of(site: Site, direction: str, seed: int) -> tuple[str, ...]:
    """Return what may go wrong: mostly one kind, so that its effect is seen; else all."""
    kinds = DOWN if direction == "down" else tuple(kind for kind in UP if kind not in site.blind)
    index = seed % (len(kinds) + _MIXED)
    return kinds[index : index + 1] or kinds


def run(site: Site, direction: str, seed: int, folder: Path) -> Outcome:
    """Run the transfer of a seed and check what became of it."""
    kinds = kinds_of(site, direction, seed)
    # Only what some store could notice: who flips a byte of a listing lies about the names.
    suited = site.reads_object if direction == "down" else site.sends_object

    def fits(kind: str, request: Request) -> bool:
        return kind not in ("flip", "flip_request", "change") or suited(request)

    transfer = (Download if direction == "down" else Upload)(site, seed, kinds, folder)
    script = TransferScript(seed, kinds, fits, transfer.first)
    outcome = Outcome(site.name, direction, seed, transfer.shape)
    stall = STALL if site.patience == 1 else STALL / 2
    cost = stall * site.patience + WAIT + 0.5
    try:
        with site.place(script, transfer.change) as store:
            transfer.prepare(store)
            with _client(store, folder / "cache", stall) as client:
                _carry_out(transfer, client, script, cost, outcome)
    except AssertionError as exc:
        outcome.message = f"{outcome.ended} {outcome.message}: {exc}"
        outcome.ended = WRONG
    finally:
        release_all()
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _carry_out(
    transfer: Transfer,
    client: StorageClient,
    script: TransferScript,
    cost: float,
    outcome: Outcome,
) -> None:
    began = time.monotonic()
    try:
        error = _watched(lambda: transfer.act(client), BOUND + script.limit * cost)
    finally:
        script.over = True
        outcome.seconds = time.monotonic() - began
        outcome.faults = [fault.kind for fault in script.happened]
    transfer.damaged = "flip_request" in outcome.faults
    if outcome.seconds > BOUND + len(outcome.faults) * cost:
        raise Wrong(f"it ended too late; {BOUND + len(outcome.faults) * cost:.1f} s are enough")
    if error is None:
        outcome.ended = "whole"
        transfer.check_whole()
    else:
        outcome.ended, outcome.message = type(error).__name__, str(error)
        transfer.check_failed(_known(error))
        # And as soon as nothing goes wrong any more, all is well.
        again = _watched(lambda: transfer.act(client), BOUND)
        if again is None:
            transfer.check_whole()
        else:
            transfer.check_refused(_known(again))
    outcome.left = transfer.check_left(script.expired)


@contextmanager
def _client(store: Store, cache: Path, stall: float) -> Iterator[StorageClient]:
    limits = {
        "part_size": "1MiB",
        "connections": 4,
        "attempts": 5,
        "stall_timeout": stall,
        "connect_timeout": 5,
        "retry_wait": 0.02,
        "throttle_wait": 0.05,
    }
    settings = load_settings(transfer=limits, cache_dir=cache)
    with StorageClient(store.config, settings) as client:
        yield client


def _watched(act: Callable[[], object], seconds: float) -> BaseException | None:
    """Call ``act`` and return what it raised.

    Raises:
        Wrong: it did not end; where its threads stand is printed.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except BaseException as exc:  # noqa: BLE001 -- looked at by the caller
            raised.append(exc)

    thread = threading.Thread(target=work, name="transfer", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(sys.__stderr__)
        raise Wrong(f"it hangs: no end after {seconds:.1f} s")
    return raised[0] if raised else None


def _known(error: BaseException) -> StorageError:
    if not isinstance(error, StorageError):
        raise Wrong(f"{error!r} is no error of this library") from error
    assert_clear(error)
    return error
