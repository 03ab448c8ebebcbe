"""What goes wrong and when: faults, and scripts that hand them out.

A script is any callable that is told of each :class:`Request` and returns the :class:`Fault`
it shall meet, or ``None``. :class:`SeededScript` draws them: the same seed gives the same
fault to the same request, by its number.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["KINDS", "Fault", "Request", "Script", "SeededScript"]

KINDS = (
    "reset",
    "reset_request",
    "truncate",
    "truncate_unsized",
    "stall",
    "stall_answer",
    "throttle",
    "status",
    "error_body",
    "lost_answer",
    "flip",
    "flip_request",
    "change",
    "expire",
)
"""All kinds of faults; :class:`Fault` says what each of them is."""

_STATUSES = (408, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as far as a script is told of it."""

    number: int
    """From 1, in the order in which the heads of the requests came."""

    method: str
    target: str
    """Path and query, as they were sent."""

    headers: Mapping[str, str]
    """By their names in lower case."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    ======================  =============================================================
    kind                    what the client meets
    ======================  =============================================================
    ``reset``               the connection is reset while the answer's body comes
    ``reset_request``       the connection is reset while the request's body goes up; a
                            request without a body is not forwarded
    ``truncate``            the connection is closed while ``Content-Length`` (or chunked
                            coding) promised more
    ``truncate_unsized``    the same, but the answer never told its length: its end is the
                            end of the connection, so the body looks whole
    ``stall``               the body stops and the connection stays open
    ``stall_answer``        the request is forwarded (and applied), and no answer comes
    ``throttle``            the body goes on at 4 KiB a second
    ``status``              ``status`` (503 if not given), with ``Retry-After`` if set;
                            nothing is forwarded
    ``error_body``          status 200 with an error's document instead of what was asked
                            for; nothing is forwarded
    ``lost_answer``         the request is forwarded and applied, and its answer replaced by
                            ``status``, or by a reset if that is not given
    ``flip``                one bit of the answer's body is flipped
    ``flip_request``        one bit of the request's body is flipped
    ``change``              the proxy's ``on_change`` is called while the body is midway
    ``expire``              the store's own answer to expired credentials; nothing is
                            forwarded
    ======================  =============================================================

    Where the answer has no body, ``reset``, ``truncate`` and ``truncate_unsized`` replace it,
    ``stall`` is ``stall_answer``, and ``throttle``, ``flip`` and ``flip_request`` do nothing.
    """

    kind: str
    at: float = 0.5
    """The share of the body that passes first, from 0 to 1. At least its last byte is held
    back. Of a body whose length is not told, the first 64 KiB are taken for the whole."""

    status: int | None = None
    retry_after: int | str | None = None
    """The header's value: seconds, or a date as HTTP writes it."""

    seconds: float | None = None
    """How long a stall or the throttling lasts, after which the rest comes as if nothing had
    been; ``None``: for good."""

    answer: bytes | Callable[[Request], bytes] | None = None
    """The body of an answer that the proxy gives itself; by default the store's own manner."""

    def __post_init__(self) -> None:
        """Refuse a kind that no proxy knows."""
        if self.kind not in KINDS:
            raise ValueError(f"no such kind of fault: {self.kind!r}; there are {', '.join(KINDS)}")


Script: TypeAlias = Callable[[Request], Fault | None]
"""Decides what a request meets. It is called in the proxy's thread and must not block."""


class SeededScript:
    """Draws faults by a seed.

    What a request meets depends on the seed and on the request's number only (and on
    ``limit``), so the requests of one connection meet the same faults in every run; requests
    that race for their numbers may swap them.

    Attributes:
        seed: what it was made with, to be told when a test fails.
        happened: number of the request and fault, in the order in which they were handed out.
    """

    def __init__(
        self,
        seed: int,
        kinds: Iterable[str] = KINDS,
        probability: float = 0.3,
        limit: int | None = None,
        only: Callable[[Request], bool] | None = None,
    ) -> None:
        """Draw nothing yet.

        Args:
            seed: which faults.
            kinds: out of these.
            probability: that a request meets one.
            limit: faults in all; ``None``: without end.
            only: which requests may meet one.

        Raises:
            ValueError: there is no such kind, or none at all.
        """
        self.seed = seed
        self.kinds = tuple(kinds)
        if not self.kinds:
            raise ValueError("a script needs at least one kind of fault")
        for kind in self.kinds:
            Fault(kind)
        self.probability = probability
        self.limit = limit
        self.only = only
        self.happened: list[tuple[int, Fault]] = []
        self._expired = threading.Event()

    @property
    def expired(self) -> bool:
        """Whether credentials are refused: since an ``expire``, until :meth:`renew`."""
        return self._expired.is_set()

    def renew(self) -> None:
        """Let requests pass again; to be called by whoever fetches new credentials."""
        self._expired.clear()

    def __call__(self, request: Request) -> Fault | None:
        """Return what ``request`` meets."""
        if self.expired:
            return Fault("expire")
        if self.limit is not None and len(self.happened) >= self.limit:
            return None
        if self.only is not None and not self.only(request):
            return None
        draw = random.Random(f"{self.seed}:{request.number}")
        if draw.random() >= self.probability:
            return None
        fault = self._draw(draw)
        self.happened.append((request.number, fault))
        if fault.kind == "expire":
            self._expired.set()
        return fault

    def _draw(self, draw: random.Random) -> Fault:
        kind = draw.choice(self.kinds)
        at = round(draw.random(), 3)
        status = None
        retry_after = None
        if kind == "status":
            status = draw.choice(_STATUSES)
            retry_after = 1 if status in (429, 503) and draw.random() < 0.5 else None
        elif kind == "lost_answer":
            status = draw.choice((500, None))
        return Fault(kind, at, status, retry_after)
