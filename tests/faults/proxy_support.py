"""What the tests of the fault proxy share: a raw client, and what it saw."""

from __future__ import annotations

import random
import socket
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault
from tests.faults.scripts import once

DATA = random.Random(5).randbytes(300_000)
# Seconds without a byte that show a client that nothing more comes.
QUIET = 2.0
# Seconds in which comes what is to come, however busy the machine is.
PATIENCE = 60.0


class Seen(NamedTuple):
    """What a client saw of one answer, and how it ended."""

    head: str
    body: bytes
    ending: str
    """``whole``, ``closed``, ``reset``, or ``open`` if nothing more came."""

    @property
    def status(self) -> int:
        return int(self.head.split(" ")[1])

    def header(self, name: str) -> str | None:
        for line in self.head.split("\r\n")[1:]:
            field, _, value = line.partition(":")
            if field.lower() == name.lower():
                return value.strip()
        return None


class Client:
    """One raw connection."""

    def __init__(self, endpoint: str, context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)
        if context is not None:
            self.socket = context.wrap_socket(
                self.socket, server_hostname=parts.hostname, suppress_ragged_eofs=False
            )
        self._reset = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, method: str, target: str, *lines: str, body: bytes = b"") -> None:
        head = [f"{method} {target} HTTP/1.1", "Host: store.example", *lines]
        if body:
            head.append(f"Content-Length: {len(body)}")
        text = "\r\n".join(head).encode() + b"\r\n\r\n"
        # It may be reset midway; who has been told so while he sends is not told again.
        try:
            self.socket.sendall(text + body)
        except ConnectionResetError:
            self._reset = True
        except OSError:
            pass

    def receive(self, *, bodiless: bool = False, silent_after: int | None = None) -> Seen:
        """Read one answer, until it is whole or nothing more comes.

        Args:
            bodiless: whether it ends with its head.
            silent_after: bytes of the body after which nothing more is expected.
        """
        data = b""
        ending = ""
        while not ending:
            head, end, body = data.partition(b"\r\n\r\n")
            seen = Seen(head.decode("latin-1"), body, "whole")
            if end:
                length = seen.header("Content-Length")
                chunked = seen.header("Transfer-Encoding") == "chunked"
                if bodiless or (length is not None and len(body) >= int(length)):
                    return seen
                if chunked and body.endswith(b"0\r\n\r\n"):
                    return seen
            silent = silent_after is not None and end and len(body) >= silent_after
            self.socket.settimeout(QUIET if silent else PATIENCE)
            try:
                block = self.socket.recv(1 << 20)
                data += block
                ending = "" if block else "reset" if self._reset else "closed"
            except (ConnectionResetError, ssl.SSLEOFError):
                # Under TLS, Python shows a reset as an end without goodbye.
                ending = "reset"
            except TimeoutError:
                ending = "open"
        return Seen(head.decode("latin-1"), body, ending)

    def ask(
        self,
        method: str,
        target: str,
        *lines: str,
        body: bytes = b"",
        silent_after: int | None = None,
    ) -> Seen:
        self.send(method, target, *lines, body=body)
        return self.receive(bodiless=method == "HEAD", silent_after=silent_after)


def see(
    target: str,
    fault: Fault | None,
    method: str = "GET",
    path: str = "/model.bin",
    body: bytes = b"",
    silent_after: int | None = None,
    **options: object,
) -> Seen:
    """Return what a new client sees of its first request, which meets ``fault``."""
    script = None if fault is None else once(fault)
    with (
        FaultProxy(target, script, **options) as proxy,  # type: ignore[arg-type]
        Client(proxy.endpoint) as client,
    ):
        return client.ask(method, path, body=body, silent_after=silent_after)
