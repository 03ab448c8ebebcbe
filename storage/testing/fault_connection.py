"""One client's connection through the proxy, and what can go wrong on it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http
import socket
import struct
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.testing.fault_answers import Answer, error_answer, expired_answer
from storage.testing.fault_http import Body, Head, ProtocolError, read_head
from storage.testing.fault_link import LinkState, Pace
from storage.testing.fault_script import Fault, Request

if TYPE_CHECKING:
    from storage.testing.fault_proxy import FaultProxy

__all__ = ["Connection", "Exchange"]

_THROTTLED = 4096.0
_UNTOLD = 64 * 1024
_DRAIN = 10.0
_LOOKS = 1000
_PAUSE = 0.005
_ALONE = frozenset({"status", "error_body", "expire"})
_BROKEN = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ProtocolError)


@dataclass(slots=True)
class Exchange:
    """One request and its answer, as far as they have come."""

    number: int
    method: str
    target: str
    """Path and query, as they were sent."""

    started: float
    """When the request's head had come, by ``time.monotonic``."""

    status: int | None = None
    """What the client was answered; ``None`` if nothing was."""

    bytes_up: int = 0
    """Of the request's body, taken from the client."""

    bytes_down: int = 0
    """Of the answer's body, sent to the client."""

    fault: Fault | None = None


class _EndedError(Exception):
    """The connection with the client is over."""


class Connection:
    """Serves one client, request by request."""

    def __init__(
        self,
        proxy: FaultProxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: LinkState,
    ) -> None:
        """Do nothing yet."""
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._delay = link.link.delay
        self._up, self._down = link.wires()
        self._down.writer = writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Serve until one side ends the connection."""
        try:
            # As between the client and a server: what was sent arrives, and then the end.
            with contextlib.suppress(_EndedError, *_BROKEN):
                await self._shake_hands()
                while await self._exchange():
                    pass
            await self._down.flush()
            self._drop_server()
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        finally:
            self._up.close()
            self._down.close()
            self._drop_server()
            # asyncio's transport, if it ended with bytes left to send, does not know that it has.
            with contextlib.suppress(AttributeError):
                self._writer.transport.abort()

    async def _shake_hands(self) -> None:
        ways = 2 if self._writer.get_extra_info("ssl_object") is None else 4
        await asyncio.sleep(ways * self._delay)

    async def _exchange(self) -> bool:
        """Serve one request; tell whether the connection can be used again."""
        head = await read_head(self._reader)
        if head is None:
            return False
        if len(head.words) != 3:
            raise ProtocolError(f"no request: {head.first[:80]!r}")
        body = Body.of_request(head, self._reader)
        request, fault, exchange = self._proxy.admit(head.words[0], head.words[1], head.headers())
        if fault is not None and fault.kind in _ALONE:
            return await self._answer_alone(request, head, body, fault, exchange)
        if fault is not None and fault.kind == "reset_request" and body.empty:
            await self._reset()
        return await self._forward(request, head, body, fault, exchange)

    # Answers that the proxy gives itself.

    async def _answer_alone(
        self, request: Request, head: Head, body: Body, fault: Fault, exchange: Exchange
    ) -> bool:
        # Who waits for a "100 Continue" sends no body after a final answer.
        whole = body.empty or (head.get("expect") is None and await self._swallow(body, exchange))
        await asyncio.sleep(self._delay)
        answer = self._own_answer(request, fault)
        return await self._send_answer(answer, head, exchange, fault, keep=whole)

    def _own_answer(self, request: Request, fault: Fault) -> Answer:
        store = self._proxy.store
        if fault.kind == "expire":
            answer = expired_answer(store)
        elif fault.kind == "error_body":
            answer = error_answer(store, 500, sent_as=fault.status or 200)
        else:
            answer = error_answer(store, fault.status or 503)
        if fault.answer is not None:
            text = fault.answer if isinstance(fault.answer, bytes) else fault.answer(request)
            answer = answer._replace(body=text)
        return answer

    async def _send_answer(
        self, answer: Answer, head: Head, exchange: Exchange, fault: Fault, *, keep: bool
    ) -> bool:
        keep = keep and head.keeps_alive
        headers = [*answer.headers, ("Content-Length", str(len(answer.body)))]
        if fault.retry_after is not None:
            headers.append(("Retry-After", str(fault.retry_after)))
        if not keep:
            headers.append(("Connection", "close"))
        reason = http.HTTPStatus(answer.status).phrase
        lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{k}: {v}" for k, v in headers)]
        text = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        exchange.status = answer.status
        if exchange.method != "HEAD":
            text += answer.body
            exchange.bytes_down += len(answer.body)
        await self._down.send(text)
        return keep

    async def _swallow(self, body: Body, exchange: Exchange) -> bool:
        try:
            async with asyncio.timeout(_DRAIN):
                async for block in body.blocks():
                    exchange.bytes_up += len(block)
        except TimeoutError:
            return False
        return True

    # Answers of the server.

    async def _forward(
        self, request: Request, head: Head, body: Body, fault: Fault | None, exchange: Exchange
    ) -> bool:
        reused = self._server is not None and not self._server[0].at_eof()
        while True:
            try:
                await self._connect()
            except OSError:
                answer = error_answer(self._proxy.store, 502, message="the server is not there")
                bare = Fault("status")
                return await self._send_answer(answer, head, exchange, bare, keep=False)
            sending = asyncio.create_task(self._send_request(head, body, fault, exchange))
            try:
                answer_head = await self._answer_head()
                if answer_head is None and sending.done():
                    sending.result()
                if answer_head is None and reused and body.empty:
                    # The server ended an idle connection as the request came.
                    reused = False
                    self._drop_server()
                    continue
                if answer_head is None:
                    return False
                keep = await self._relay(request, answer_head, fault, exchange)
                if not sending.done():
                    keep = keep and head.get("expect") is None
                    # A client that is closed upon while it sends may never see the answer.
                    await asyncio.wait([sending], timeout=0 if head.get("expect") else _DRAIN)
                return keep and sending.done() and sending.result() and head.keeps_alive
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, _EndedError, *_BROKEN):
                    await sending

    async def _connect(self) -> None:
        if self._server is not None and self._server[0].at_eof():
            self._drop_server()
        if self._server is None:
            self._server = await self._proxy.connect()
            self._up.writer = self._server[1]

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server[1].transport.abort()
            self._server = None

    async def _send_request(
        self, head: Head, body: Body, fault: Fault | None, exchange: Exchange
    ) -> bool:
        """Send the request on; tell whether the server took all of it."""
        more = ["Transfer-Encoding: chunked"] if body.chunked else []
        try:
            taken = await self._send_up(head.encode(*more))
            async for block in self._spoiled(body, fault):
                exchange.bytes_up += len(block)
                taken = taken and await self._send_up(_coded(block, body.chunked))
            if body.chunked:
                taken = taken and await self._send_up(b"0\r\n" + body.trailers + b"\r\n")
            await self._up.flush()
            return taken
        except (*_BROKEN, _EndedError):
            # The client is gone: the server must not take this for the end of the body.
            self._drop_server()
            raise

    async def _send_up(self, data: bytes) -> bool:
        try:
            await self._up.send(data)
        except OSError:
            # The server answered without reading on; the client's bytes go nowhere.
            return False
        await self._may_break()
        return True

    async def _spoiled(self, body: Body, fault: Fault | None) -> AsyncIterator[bytes]:
        if fault is None or fault.kind not in ("reset_request", "flip_request"):
            async for block in body.blocks():
                yield block
            return
        async for block, due in _cut(body.blocks(), body.length, fault.at):
            if not due:
                yield block
            elif fault.kind == "flip_request":
                yield _flipped(block)
            else:
                await self._up.flush()
                await self._reset()

    async def _answer_head(self) -> Head | None:
        """Return the final head; the interim ones before it pass."""
        assert self._server is not None
        reader = self._server[0]
        while (head := await read_head(reader)) is not None:
            if not head.words[1].startswith("1"):
                return head
            await self._down.send(head.encode())
        return None

    async def _relay(
        self, request: Request, head: Head, fault: Fault | None, exchange: Exchange
    ) -> bool:
        assert self._server is not None
        body = Body.of_answer(head, request.method, self._server[0])
        kind = None if fault is None else fault.kind
        if fault is not None and (body.empty or kind in ("stall_answer", "lost_answer")):
            await self._instead_of_answer(request, body, fault)
            if kind == "lost_answer":
                answer = error_answer(self._proxy.store, fault.status or 500)
                return await self._send_answer(answer, head, exchange, fault, keep=False)
        exchange.status = int(head.words[1])
        unsized = kind == "truncate_unsized" and not body.empty
        ends = unsized or (body.length is None and not body.chunked)
        chunked = body.chunked and not unsized
        more = ["Transfer-Encoding: chunked"] if chunked else []
        if ends or not head.keeps_alive:
            more.append("Connection: close")
        await self._send_down(head.encode(*more, without=("content-length",) if unsized else ()))
        blocks = body.blocks()
        if fault is not None and not body.empty:
            blocks = self._troubled(request, body, fault)
        async for block in blocks:
            exchange.bytes_down += len(block)
            await self._send_down(_coded(block, chunked))
        if chunked:
            await self._send_down(b"0\r\n" + body.trailers + b"\r\n")
        if not head.keeps_alive:
            self._drop_server()
        return not ends and head.keeps_alive

    async def _instead_of_answer(self, request: Request, body: Body, fault: Fault) -> None:
        """Do what ``fault`` means where no body of an answer passes."""
        if fault.kind in ("stall", "stall_answer"):
            await self._stall(fault)
        elif fault.kind == "change":
            await self._proxy.change(request)
        elif fault.kind in ("truncate", "truncate_unsized"):
            raise _EndedError
        elif fault.kind == "reset":
            await self._reset()
        elif fault.kind == "lost_answer":
            async for _ in body.blocks():
                pass
            if fault.status is None:
                await self._reset()

    async def _troubled(self, request: Request, body: Body, fault: Fault) -> AsyncIterator[bytes]:
        """Yield an answer's body as ``fault`` lets it pass."""
        slow: Pace | None = None
        until = None
        loop = asyncio.get_running_loop()
        async for block, due in _cut(body.blocks(), body.length, fault.at):
            piece = block
            if due:
                if fault.kind in ("truncate", "truncate_unsized"):
                    raise _EndedError
                if fault.kind == "reset":
                    await self._reset()
                if fault.kind == "stall":
                    await self._stall(fault)
                elif fault.kind == "change":
                    await self._proxy.change(request)
                elif fault.kind == "flip":
                    piece = _flipped(block)
                elif fault.kind == "throttle":
                    slow = Pace(_THROTTLED)
                    until = None if fault.seconds is None else loop.time() + fault.seconds
            while slow is not None and piece and (until is None or loop.time() < until):
                drop, piece = piece[:512], piece[512:]
                await slow.take(len(drop))
                yield drop
            if piece:
                yield piece

    async def _send_down(self, data: bytes) -> None:
        await self._down.send(data)
        await self._may_break()

    async def _may_break(self) -> None:
        if self._down.breaks:
            await self._reset()

    async def _stall(self, fault: Fault) -> None:
        """Wait as long as ``fault`` says, or until the client hangs up."""
        loop = asyncio.get_running_loop()
        end = None if fault.seconds is None else loop.time() + fault.seconds
        while end is None or loop.time() < end:
            if self._reader.at_eof() or self._writer.transport.is_closing():
                raise _EndedError
            left = 1.0 if end is None else end - loop.time()
            await asyncio.sleep(max(0.0, min(_PAUSE * 4, left)))

    async def _reset(self) -> None:
        """Reset the connection, after what was sent before has arrived.

        Raises:
            _EndedError: always.
        """
        await self._down.flush()
        raw = self._writer.get_extra_info("socket")
        transport = self._writer.transport
        # Looks are counted, not seconds: a machine that stands still delivers nothing meanwhile.
        for _ in range(_LOOKS):
            if transport.is_closing():
                break
            if not transport.get_write_buffer_size() and not _unsent(raw):
                break
            await asyncio.sleep(_PAUSE)
        # A socket that does not linger is closed by RST instead of FIN.
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        self._drop_server()
        raise _EndedError


def _unsent(raw: socket.socket) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        return 0


def _coded(block: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(block), block) if chunked else block


def _flipped(block: bytes) -> bytes:
    return bytes([block[0] ^ 1]) + block[1:]


async def _cut(
    blocks: AsyncIterator[bytes], length: int | None, at: float
) -> AsyncIterator[tuple[bytes, bool]]:
    """Yield the blocks, cut at a share of the body: that one begins there which says so.

    Where the length is not told, the first 64 KiB are waited for and taken for the whole.
    """
    first = b""
    if length is None:
        async for block in blocks:
            first += block
            if len(first) >= _UNTOLD:
                break
        length = min(len(first), _UNTOLD)
    point: int | None = min(int(at * length), length - 1)
    passed = 0
    async for block in _chain(first, blocks):
        if point is not None and passed + len(block) > point >= 0:
            if point > passed:
                yield block[: point - passed], False
            yield block[point - passed :], True
            point = None
        else:
            yield block, False
        passed += len(block)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for block in rest:
        yield block
