"""Requests to Google Cloud Storage, each sent once by the HTTP client of gcsfs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec import FsspecBackend
from storage.backends.drivers.fsspec_errors import Kind
from storage.backends.drivers.fsspec_parts import run, send_once
from storage.backends.drivers.streams import Watched
from storage.backends.gcs.answers import from_answer, said, translated
from storage.backends.gcs.sign import Signer
from storage.backends.gcs.upload import Answer
from storage.errors import (
    BucketMissingError,
    ConfigurationError,
    ModelMissingError,
    StorageError,
    TransientError,
    one_line,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["GcsClient", "lower_names", "quoted", "refusal"]


class GcsClient(FsspecBackend):
    """One bucket, the client of gcsfs that reaches it, and the requests that both send."""

    def __init__(
        self,
        bucket: str,
        arguments: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        options: OpenOptions | None = None,
        name: str = "gs (gcsfs)",
        *,
        tls: Callable[[], Any] | None = None,
        signer: Signer | None = None,
    ) -> None:
        """Describe the bucket; nothing is imported or opened yet.

        Args:
            bucket: its name.
            arguments: of ``gcsfs.GCSFileSystem``, or what returns them when they are needed.
            options: how to talk to the store.
            name: of the driver, for messages.
            tls: returns the TLS context of its connections, where not the usual one.
            signer: makes presigned URLs, where the credentials allow it.
        """
        super().__init__("gs", bucket, {}, options, name)
        self._bucket = bucket
        self._given = arguments
        self._tls = tls
        self._signer = signer

    def _implementation(self) -> type[Any]:
        try:
            # The package's own name for it is a class that asks for the kind of each bucket by
            # gRPC, which emulators and private endpoints do not speak.
            from gcsfs.core import GCSFileSystem
        except ImportError as exc:
            raise ConfigurationError(
                f"{self._uri}: this driver needs the package gcsfs, which is not installed "
                f'({one_line(exc)}); run: pip install "modelstorage[gcs]"'
            ) from exc
        cls: type[Any] = GCSFileSystem
        return cls

    def _from_url(self, cls: type[Any]) -> dict[str, Any]:
        return {}

    def _new(self, **session: Any) -> Any:
        cls = self._implementation()
        with translated(self._uri):
            arguments = dict(self._given() if callable(self._given) else self._given)
            arguments["session_kwargs"] = {**(arguments.get("session_kwargs") or {}), **session}
            arguments["skip_instance_cache"] = True
            fs = cls(**arguments)
            # Not among the arguments, so that the file system can be pickled.
            context = self._tls() if self._tls is not None else None
            if context is not None:
                fs.session_kwargs = dict(fs.session_kwargs)
                fs.session_kwargs["connector"] = run(fs, _connector(context))
        return fs

    def _connect(self) -> Any:
        with translated(self._uri):
            # Stored bytes are wanted, whatever their encoding.
            fs = self._new(auto_decompress=False, timeout=self._timeouts())
            run(fs, fs._set_session())
            send_once(fs._session)
        # Waiting for a connection is not to look like a store that takes no bytes.
        fs.upload_slots = asyncio.Semaphore(self._options.connections)
        return fs

    def _timeouts(self) -> Any:
        from aiohttp import ClientTimeout

        return ClientTimeout(
            total=None,
            sock_connect=self._options.connect_timeout,
            sock_read=self._options.stall_timeout,
        )

    def _disconnect(self, fs: Any) -> None:
        run(fs, fs._session.close())

    def _open(
        self, method: str, path: str, query: Mapping[str, str], **arguments: Any
    ) -> Callable[[], Coroutine[Any, Any, Any]]:
        """Return what sends one request once, authenticated, and returns its open answer."""
        fs = self._shared()
        headers = {"Accept-Encoding": "identity", **arguments.pop("headers", {})}
        # Here and not on the event loop: a new token is asked for in a blocking way.
        fs.credentials.apply(headers)
        if fs.requester_pays:
            headers["x-goog-user-project"] = str(fs.requester_pays)
        url = path if "://" in path else f"{fs._location.rstrip('/')}{path}"
        if query:
            url += ("&" if "?" in url else "?") + urlencode(query, quote_via=quote)

        async def send() -> Any:
            from yarl import URL

            return await fs._session.request(
                method,
                URL(url, encoded=True),
                headers=headers,
                allow_redirects=False,
                **arguments,
            )

        return send

    def _renewed(self, begun: float) -> bool:
        """Tell whether there is a new token in place of one that the store refused with a 401.

        Args:
            begun: when the refused request began, by ``time.monotonic``.
        """
        renew = getattr(self._shared().credentials.credentials, "renew", None)
        return renew is not None and bool(renew(begun))

    def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        **arguments: Any,
    ) -> Coroutine[Any, Any, Answer]:
        """Return one request and its whole answer, to be run on the event loop."""
        send = self._open(method, path, query, **arguments)

        async def receive() -> Answer:
            async with await send() as response:
                return Answer(response.status, lower_names(response.headers), await response.read())

        return receive()

    def _call(
        self,
        where: str,
        method: str,
        path: str,
        query: Mapping[str, str],
        missing: Kind = ModelMissingError,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Return what the JSON API answers to a request."""
        with translated(where):
            fs = self._shared()
            begun = time.monotonic()
            answer = run(fs, self._answer(method, path, query, **arguments))
            if answer.status == 401 and self._renewed(begun):
                answer = run(fs, self._answer(method, path, query, **arguments))
            if answer.status >= 300:
                raise from_answer(where, answer.status, answer.headers, answer.body, missing)
            return said(where, answer.body)

    def _object(self, key: str, bucket: str | None = None) -> str:
        return f"/storage/v1/b/{quoted(bucket or self._bucket)}/o/{quoted(key)}"

    def _sent(
        self,
        where: str,
        data: bytes,
        method: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        missing: Kind = BucketMissingError,
    ) -> Answer:
        """Send a body; return the answer, which is a success or says that more is expected."""
        fs = self._shared()

        def once() -> Answer:
            watched = Watched(data, self._options.stall_timeout)
            request = self._answer(method, path, query, data=watched, headers=headers)
            return run(fs, watched.sent_by(lambda: request, fs.upload_slots))

        with translated(where):
            begun = time.monotonic()
            answer = once()
            if answer.status == 401 and self._renewed(begun):
                answer = once()
        if answer.status >= 300 and answer.status != 308:
            raise from_answer(where, answer.status, answer.headers, answer.body, missing)
        return answer

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`. A ``gcsfs.GCSFileSystem`` with all its own habits."""
        fs: AbstractFileSystem = self._new()
        return fs, self._bucket


async def _connector(context: Any) -> Any:
    from aiohttp import TCPConnector

    return TCPConnector(ssl=context)


def refusal(where: str, answer: Answer) -> StorageError | None:
    """Return what the answer to a deletion has against it, if it has something."""
    if answer.status >= 300:
        return from_answer(where, answer.status, answer.headers, answer.body, ModelMissingError)
    if answer.body.strip() not in (b"", b"null", b"{}"):
        return TransientError(
            f"{where}: the store did not confirm that it is deleted; check the endpoint and the "
            "proxy"
        )
    return None


def quoted(text: str) -> str:
    """Return ``text`` as one segment of a path."""
    return quote(text, safe="")


def lower_names(headers: Any) -> dict[str, str]:
    """Return an answer's headers, names in lower case, those given twice joined by a comma."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        found[lower] = f"{found[lower]},{value}" if lower in found else value
    return found
