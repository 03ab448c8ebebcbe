"""A reverse proxy that injects faults, between any client and a real HTTP server.

Give the clients its :attr:`FaultProxy.endpoint` in place of the server's. The ``Host`` header,
the target and all end-to-end headers pass unchanged, so that signatures (SigV4, SharedKey,
presigned URLs) stay valid; only what concerns a single connection is rewritten. Bodies are
streamed both ways. It needs nothing but the standard library.

Example::

    script = SeededScript(seed=7, kinds=("reset", "status"))
    with FaultProxy("http://127.0.0.1:8333", script, store="s3") as proxy:
        client = connect(proxy.endpoint)
        ...
    print(script.happened, proxy.bytes_down)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from time import monotonic
from typing import Self
from urllib.parse import urlsplit

from storage.testing.fault_answers import STORES
from storage.testing.fault_connection import Connection, Exchange
from storage.testing.fault_http import BLOCK
from storage.testing.fault_link import Link, LinkState
from storage.testing.fault_script import Fault, Request, Script

__all__ = ["Exchange", "FaultProxy"]

_HOST = "127.0.0.1"
_BACKLOG = 1024
_LINK_BUFFER = 128 * 1024
_HANDSHAKE = 10.0
_END = 1.0


class FaultProxy:
    """Forwards to one server, and lets go wrong what its script says.

    It runs in a thread of its own from ``__enter__`` to ``__exit__``, which ends every
    connection at once, whatever hangs there.
    """

    def __init__(
        self,
        target: str,
        script: Script | None = None,
        *,
        link: Link | None = None,
        tls: ssl.SSLContext | None = None,
        on_change: Callable[[Request], object] | None = None,
        store: str = "http",
    ) -> None:
        """Prepare to forward.

        Args:
            target: URL of the server: scheme, host and port. One with ``https`` must have a
                certificate that the machine trusts.
            script: decides what each request meets; ``None``: nothing goes wrong.
            link: what lies between the clients and the proxy; ``None``: nothing.
            tls: for TLS with the clients.
            on_change: what a ``change`` does, in a thread of its own; it may use the store,
                but not by this proxy unless the script lets it pass.
            store: whose manner the answers have that the proxy gives itself: ``s3``,
                ``gcs``, ``azure``, ``hf`` or ``http``.

        Raises:
            ValueError: the target is no such URL, or there is no such store.
        """
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"the target is an http or https URL, not {target!r}")
        if store not in STORES:
            raise ValueError(f"no such store: {store!r}; there are {', '.join(STORES)}")
        secure = parts.scheme == "https"
        self.store = store
        self.script = script
        self._address = (parts.hostname, parts.port or (443 if secure else 80))
        self._target_tls = ssl.create_default_context() if secure else None
        self._link = link
        self._tls = tls
        self._on_change = on_change
        self._lock = threading.Lock()
        self._exchanges: list[Exchange] = []
        self._seen = 0
        self._failure: BaseException | None = None
        self._port: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._link_state: LinkState | None = None

    @property
    def endpoint(self) -> str:
        """URL of the proxy, without a trailing slash."""
        if self._port is None:
            raise RuntimeError("the proxy is not running")
        return f"{'http' if self._tls is None else 'https'}://{_HOST}:{self._port}"

    @property
    def exchanges(self) -> list[Exchange]:
        """What has passed so far and what is under way, in the order of the requests."""
        with self._lock:
            return list(self._exchanges)

    @property
    def bytes_down(self) -> int:
        """Bytes of answers' bodies that were sent to clients; not all of them may be read."""
        return sum(exchange.bytes_down for exchange in self.exchanges)

    @property
    def bytes_up(self) -> int:
        """Bytes of requests' bodies that were taken from clients."""
        return sum(exchange.bytes_up for exchange in self.exchanges)

    def count(self, method: str | None = None) -> int:
        """Return how many requests, of one method or of all, have come."""
        return sum(method in (None, exchange.method) for exchange in self.exchanges)

    def clear(self) -> None:
        """Forget the exchanges. Numbers of requests go on."""
        with self._lock:
            self._exchanges.clear()

    def __enter__(self) -> Self:
        """Start listening on a free port of 127.0.0.1."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if self._link is not None and self._link.limited:
            # What lies in the machine's buffers has not passed the link.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LINK_BUFFER)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LINK_BUFFER)
        listener.bind((_HOST, 0))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._port = listener.getsockname()[1]
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, ready)),
            name="fault-proxy",
            daemon=True,
        )
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End all connections; raise what the script or ``on_change`` raised, if anything.

        Once more does nothing; the counts can be read for as long as one likes.
        """
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()
        self._port = None
        failure, self._failure = self._failure, None
        if failure is not None and exc_info[0] is None:
            raise failure

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._link_state = LinkState(self._link or Link())
        self._loop.add_reader(listener, self._accept, listener)
        ready.set()
        await self._stop.wait()
        self._loop.remove_reader(listener)
        listener.close()
        # What was accepted a moment ago has to begin before it can be ended.
        await asyncio.sleep(0)
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, _ = listener.accept()
        except OSError:
            # The client did not wait.
            return
        accepted.setblocking(False)
        task = asyncio.ensure_future(self._serve_one(accepted))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve_one(self, accepted: socket.socket) -> None:
        assert self._link_state is not None
        loop = asyncio.get_running_loop()
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = asyncio.StreamReader(BLOCK)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else _HANDSHAKE,
                ssl_shutdown_timeout=None if self._tls is None else _END,
            )
        except OSError:
            # The client does not trust the certificate, or has hung up.
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await Connection(self, reader, writer, self._link_state).run()
        except Exception as exc:  # noqa: BLE001 -- raised when the context ends
            self.failed(exc)

    # What connections ask of their proxy.

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a new connection to the server."""
        host, port = self._address
        return await asyncio.open_connection(host, port, limit=BLOCK, ssl=self._target_tls)

    def admit(
        self, method: str, target: str, headers: dict[str, str]
    ) -> tuple[Request, Fault | None, Exchange]:
        """Number a request, note it, and ask the script what it meets."""
        with self._lock:
            self._seen += 1
            request = Request(self._seen, method, target, headers)
            exchange = Exchange(request.number, method, target, monotonic())
            self._exchanges.append(exchange)
        if self.script is not None:
            try:
                exchange.fault = self.script(request)
            except Exception as exc:
                self.failed(exc)
                raise ConnectionAbortedError("the script failed") from exc
        return request, exchange.fault, exchange

    def failed(self, failure: BaseException) -> None:
        """Keep what the user's own code raised, to be raised when the context ends."""
        self._failure = self._failure or failure

    async def change(self, request: Request) -> None:
        """Call ``on_change`` and wait for it."""
        if self._on_change is None:
            self.failed(ValueError("a fault 'change' needs the proxy's on_change"))
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        change = self._on_change

        def work() -> None:
            try:
                change(request)
            except BaseException as exc:  # noqa: BLE001 -- raised when the context ends
                self.failed(exc)
            # The proxy may have been stopped meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_finish, done)

        threading.Thread(target=work, name="fault-proxy-change", daemon=True).start()
        await done


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
