"""The client that adlfs is built on, with our address, credential, limits and patience."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_errors import causes
from storage.backends.drivers.fsspec_parts import run, send_once
from storage.backends.drivers.streams import Watched
from storage.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from storage.backends.azure.credentials import Access
    from storage.backends.network import Network

__all__ = ["Answer", "Connection", "connect", "encoded", "is_refusal", "md5"]

_SHORT = 256 * 1024


class Answer:
    """The head of an answer, and its body as it arrives."""

    def __init__(self, loop: Any, response: Any, headers: Mapping[str, str]) -> None:
        """Keep the ``response`` of aiohttp and its ``headers``, names in lower case."""
        self.headers = headers
        self._loop = loop
        self._response = response

    async def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes as they were stored, none at the end."""
        block: bytes = await self._response.content.read(size)
        return block

    def drop(self) -> None:
        """Free the connection; it is closed if the body has not been read to its end."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._response.close)


class Connection:
    """A client of one account's blob service, on fsspec's event loop."""

    def __init__(self, loop: Any, service: Any, access: Access, options: OpenOptions) -> None:
        """Keep the parts; ``service`` is azure-storage-blob's client, its session open."""
        self.loop = loop
        self.service = service
        self._access = access
        self._stall_timeout = options.stall_timeout
        self.slots = asyncio.Semaphore(options.connections)
        """Requests that may be under way, so that waiting for a connection is no stall."""

    def close(self) -> None:
        """Free the connections."""
        run(self, self.service.close())
        if self._access.tokens is not None:
            self._access.tokens.close()

    async def get(
        self, container: str, key: str, headers: Mapping[str, str], version: str | None = None
    ) -> Answer:
        """Begin to read a blob.

        The client's own method reads ahead, joins several requests and repeats them.
        """
        query = {} if version is None else {"versionid": version}
        response = await self.renewing(
            lambda: self._send("GET", container, key, query, headers, stream=True)
        )
        answer = Answer(self.loop, response.internal_response, _lower(response.headers))
        if response.status_code not in (200, 206):
            # 304 and the like: no failure, and not what was asked for.
            answer.drop()
            raise _error(response)
        return answer

    async def put(
        self,
        container: str,
        key: str,
        headers: Mapping[str, str],
        data: bytes,
        query: Mapping[str, str] | None = None,
    ) -> Mapping[str, str]:
        """Send a body and its MD5; return the answer's headers, names in lower case.

        Azure refuses bytes that were damaged on their way.

        Raises:
            TimeoutError: the store stopped to take the body.
        """
        headers = {
            # The client would add one after the request is signed.
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(data)),
            "Content-MD5": encoded(await md5(data)),
            **headers,
        }

        def once() -> Coroutine[Any, Any, Any]:
            body = Watched(data, self._stall_timeout)
            return body.sent_by(
                lambda: self._send(
                    "PUT", container, key, query or {}, headers, body if data else None
                ),
                self.slots,
            )

        response = await self.renewing(once)
        if response.status_code != 201:
            # A redirect, or somebody else's page: nothing was stored.
            raise _error(response)
        return _lower(response.headers)

    async def renewing(self, request: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Make a request, once more with a new token if the store refused the old one."""
        begun = time.monotonic()
        try:
            return await request()
        except Exception as exc:
            tokens = self._access.tokens
            if tokens is None or not is_refusal(exc) or not tokens.renew(begun):
                raise
        return await request()

    async def _send(
        self,
        method: str,
        container: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: Any = None,
        *,
        stream: bool = False,
    ) -> Any:
        from azure.core.pipeline.transport import HttpRequest

        blob = self.service.get_blob_client(container, key)
        request = HttpRequest(
            method, blob.url, {"x-ms-version": blob.api_version, **headers}, data=body
        )
        request.format_parameters({name: _quoted(value) for name, value in query.items()})
        # A refused bearer token would be offered once more, with what is left of the body.
        hook = {} if body is None else {"raw_response_hook": _stop_at_refusal}
        answer = await self.service._pipeline.run(request, stream=stream, **hook)
        response = answer.http_response
        if response.status_code >= 400:
            if stream:
                await response.load_body()
            raise _error(response)
        return response


async def md5(data: bytes) -> bytes:
    """Return the MD5 of ``data``; that of much data by another thread."""

    def work() -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()

    return work() if len(data) < _SHORT else await asyncio.to_thread(work)


def encoded(digest: bytes) -> str:
    """Return a digest as Azure writes it."""
    return base64.b64encode(digest).decode()


def is_refusal(exc: BaseException) -> bool:
    """Tell whether an answer says that a token is not good, or not any more."""
    for cause in causes(exc):
        response = getattr(cause, "response", None)
        if response is not None:
            code = (getattr(response, "headers", None) or {}).get("x-ms-error-code")
            return getattr(response, "status_code", 0) == 401 or code == "AuthenticationFailed"
    return False


def _stop_at_refusal(answer: Any) -> None:
    if answer.http_response.status_code == 401:
        raise _error(answer.http_response)


def _error(response: Any) -> Exception:
    from azure.core.exceptions import HttpResponseError

    text = response.body().decode("utf-8", "replace") if response.status_code >= 400 else ""
    return HttpResponseError(message=text or str(response.reason), response=response)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _quoted(value: str) -> str:
    from urllib.parse import quote

    return quote(value, safe="")


def connect(
    access: Access, network: Network, options: OpenOptions, attempts: int | None
) -> Connection:
    """Return a new client; no connection is made yet.

    Args:
        access: the account, its address and the credential.
        network: proxy and certificates.
        options: time-outs and the number of connections.
        attempts: of each request; the client's own choice if none.
    """
    try:
        import aiohttp
        from azure.core.credentials import AzureSasCredential
        from azure.core.pipeline.transport import AioHttpTransport
        from azure.storage.blob.aio import BlobServiceClient
    except ImportError as exc:
        raise ConfigurationError(
            f"Azure needs the package adlfs with all that it needs ({one_line(exc)}); "
            'run: pip install "modelstorage[azure]"'
        ) from exc
    from fsspec.asyn import get_loop

    # A library is silent unless asked; without a handler warnings would go to stderr.
    logging.getLogger("azure").addHandler(logging.NullHandler())
    arguments: dict[str, Any] = {"permit_redirects": False}
    if attempts is not None:
        arguments["retry_total"] = attempts - 1
    if (proxy := network.proxy or _ambient_proxy(access.endpoint)) is not None:
        arguments["proxies"] = {"http": proxy, "https": proxy}
    credential: Any = access.tokens
    if access.key is not None:
        credential = {"account_name": access.account, "account_key": access.key}
    elif access.sas is not None:
        credential = AzureSasCredential(access.sas)
    tls = _tls(network)

    async def make() -> Connection:
        # Twice what the engine uses, because a thread that writes what it reads from the same
        # container holds two connections and must not wait for the second for ever.
        connector = aiohttp.TCPConnector(limit=2 * options.connections, **tls)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            # It would take passwords of a netrc for the store's, too.
            trust_env=False,
        )
        send_once(session)
        try:
            transport = AioHttpTransport(
                session=session,
                connection_timeout=options.connect_timeout,
                read_timeout=options.stall_timeout,
            )
            service = BlobServiceClient(
                access.endpoint,
                credential=credential,
                transport=transport,
                **arguments,
            )
        except BaseException:
            await session.close()
            raise
        weakref.finalize(service, _free, session, loop, os.getpid())
        return Connection(loop, service, access, options)

    loop = get_loop()
    return asyncio.run_coroutine_threadsafe(make(), loop).result()


def _free(session: Any, loop: Any, pid: int) -> None:
    """Close what nobody has closed, before aiohttp complains of it on stderr."""
    if session.closed or os.getpid() != pid or not loop.is_running():
        return
    closed = asyncio.run_coroutine_threadsafe(session.close(), loop)
    with suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            return
    with suppress(Exception):
        closed.result(timeout=1)


def _ambient_proxy(endpoint: str) -> str | None:
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(endpoint)
    if not parts.hostname or proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


def _tls(network: Network) -> dict[str, Any]:
    import ssl

    if not network.verify:
        return {"ssl": False}
    if network.bundle is None:
        return {}
    try:
        return {"ssl": ssl.create_default_context(cafile=network.bundle)}
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            f"the CA bundle {network.bundle} cannot be used: {one_line(exc)}"
        ) from exc
