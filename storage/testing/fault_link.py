"""A slow, far or failing link, simulated above TCP: no privileges and no kernel module needed.

Bytes wait for their turn at the rates, then travel for the delay, in each direction. What is
under way at once is not bounded by a window, and there is no slow start: the link is as good
as a well-tuned one of its kind.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass

__all__ = ["Link", "LinkState", "Pace", "Wire"]

_SLACK = 0.02
"""Seconds of the rate that may be caught up with at once, beside those that a timer was late."""

_STEP = 0.008
_LEAST = 4 * 1024
_MOST = 64 * 1024
_WINDOW = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between the clients and the proxy."""

    delay: float = 0.0
    """Seconds each way. A new connection costs a way there and back before its first byte,
    and one more with TLS, as the handshakes do."""

    rate: float | None = None
    """Bytes a second of each connection, in each direction."""

    shared_rate: float | None = None
    """Bytes a second of all connections together, in each direction."""

    reset_every: tuple[int, int] | None = None
    """Bytes, (least, most), that the link carries between two resets, on all connections and both
    ways; each hits the connection whose turn it is."""

    seed: int = 0
    """Draws the bytes between two resets."""

    @property
    def limited(self) -> bool:
        """Whether there is a rate."""
        return self.rate is not None or self.shared_rate is not None


class Pace:
    """Hands out bytes at a rate, in the order in which they are asked for."""

    def __init__(self, rate: float) -> None:
        """Begin now, with ``rate`` bytes a second."""
        self.rate = rate
        self._free = self._late = 0.0

    @property
    def step(self) -> int:
        """Bytes to ask for at once: few enough that others get their turn soon."""
        return int(min(_MOST, max(_LEAST, self.rate * _STEP)))

    async def take(self, size: int) -> None:
        """Return when ``size`` bytes have passed."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        # Being woken late, on a busy machine, is made up for; being idle is not.
        self._free = due = max(self._free, now - _SLACK - self._late) + size / self.rate
        if due > now:
            await asyncio.sleep(due - now)
            self._late = loop.time() - due


class LinkState:
    """One link in use: the rates that its connections share."""

    def __init__(self, link: Link) -> None:
        """Begin with nothing sent."""
        self.link = link
        self._shared = (
            None if link.shared_rate is None else (Pace(link.shared_rate), Pace(link.shared_rate))
        )
        self._resets = None if link.reset_every is None else _Resets(link.reset_every, link.seed)

    def wires(self) -> tuple[Wire, Wire]:
        """Return the two directions of a new connection: up and down."""
        up, down = (
            Wire(self.link.delay, self._paces(direction), self._resets) for direction in (0, 1)
        )
        return up, down

    def _paces(self, direction: int) -> list[Pace]:
        paces = [] if self.link.rate is None else [Pace(self.link.rate)]
        return paces if self._shared is None else [*paces, self._shared[direction]]


class _Resets:
    """When connections are reset."""

    def __init__(self, every: tuple[int, int], seed: int) -> None:
        self._every = every
        self._draw = random.Random(seed)
        self._left = self._draw.randint(*every)

    def carried(self, size: int) -> None:
        self._left -= size

    def due(self) -> bool:
        """Tell whether somebody is to be reset: whoever asks first."""
        if self._left > 0:
            return False
        self._left = self._draw.randint(*self._every)
        return True


class Wire:
    """One direction of one connection.

    Attributes:
        writer: where it ends.
    """

    def __init__(self, delay: float, paces: list[Pace], resets: _Resets | None) -> None:
        """Carry nothing yet."""
        self.writer: asyncio.StreamWriter | None = None
        self._delay = delay
        self._paces = paces
        self._resets = resets
        self._way: deque[tuple[float, bytes | memoryview]] = deque()
        self._on_way = 0
        self._changed = asyncio.Event()
        self._broken: OSError | None = None
        self._pump: asyncio.Task[None] | None = None

    @property
    def breaks(self) -> bool:
        """Whether the connection is to be reset now; ``True`` only once."""
        return self._resets is not None and self._resets.due()

    async def send(self, data: bytes) -> None:
        """Return when ``data`` has left; it arrives after the delay.

        Raises:
            OSError: the connection is broken.
        """
        if self._resets is not None:
            self._resets.carried(len(data))
        if not self._paces:
            await self._depart(data)
            return
        step = min(pace.step for pace in self._paces)
        view = memoryview(data)
        for start in range(0, len(data), step):
            piece = view[start : start + step]
            for pace in self._paces:
                await pace.take(len(piece))
            await self._depart(piece)

    async def flush(self) -> None:
        """Return when all has arrived that was sent, or never will."""
        while self._way and self._broken is None:
            await self._change()

    def close(self) -> None:
        """Carry nothing more."""
        if self._pump is not None:
            self._pump.cancel()
        self._broken = ConnectionAbortedError("the link is closed")
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _depart(self, data: bytes | memoryview) -> None:
        if not self._delay:
            await self._arrive(data)
            return
        while self._on_way > _WINDOW and self._broken is None:
            await self._change()
        if self._broken is not None:
            raise self._broken
        if self._pump is None:
            self._pump = asyncio.create_task(self._carry())
        self._way.append((asyncio.get_running_loop().time() + self._delay, data))
        self._on_way += len(data)
        self._changed.set()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._way:
                    await self._change()
                due, data = self._way[0]
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self._arrive(data)
                self._way.popleft()
                self._on_way -= len(data)
                self._changed.set()
        except OSError as exc:
            self._broken = exc
            self._changed.set()

    async def _arrive(self, data: bytes | memoryview) -> None:
        if self.writer is None or self.writer.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self.writer.write(data)
        await self.writer.drain()
