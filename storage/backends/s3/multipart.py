"""Uploads to S3 in parts: bounded, parallel, and gone without a trace when they fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Self

from storage.backends.base import OpenOptions
from storage.backends.drivers import streams
from storage.backends.drivers.fsspec_parts import run
from storage.backends.drivers.streams import Watched
from storage.backends.s3.answers import translated
from storage.errors import one_line

__all__ = ["MultipartUpload", "Request", "part_sizes"]

Answer = dict[str, Any]
Request = Callable[..., Coroutine[Any, Any, Answer]]

_MIB = 1024 * 1024
_SMALLEST_PART = 5 * _MIB
_MAX_PARTS = 10_000
_log = logging.getLogger(__name__)


part_sizes = partial(
    streams.part_sizes, smallest=_SMALLEST_PART, most=_MAX_PARTS, double_after=1_000
)
"""The sizes of the parts of an object of some size, out of some memory."""


class MultipartUpload:
    """One object on its way up in parts. Leaving the block by an exception aborts it."""

    def __init__(
        self,
        fs: Any,
        request: Request,
        attributes: Mapping[str, Any],
        options: OpenOptions,
        where: str,
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        """Describe the upload; entering the block begins it.

        Args:
            fs: the file system whose event loop runs the requests.
            request: makes a request to the bucket out of a method and its arguments.
            attributes: ``Key`` and what else the object is to have.
            options: how many requests and bytes may be under way.
            where: the object's URI, for messages.
            on_bytes: called with the size of each part that has arrived.
        """
        self._fs = fs
        self._request = request
        self._attributes = attributes
        self._options = options
        self._where = where
        self._on_bytes = on_bytes
        self._upload: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pending: dict[Future[Answer], int] = {}
        self._parts: list[Answer] = []
        self._number = 0

    def __enter__(self) -> Self:
        request = self._request("create_multipart_upload", **self._attributes)
        future = asyncio.run_coroutine_threadsafe(request, self._fs.loop)
        with translated(self._where):
            try:
                self._upload = self._named(future.result())
            except BaseException:
                # Given up while the answer is on its way: what it begins must end, too.
                future.add_done_callback(self._abort_late)
                raise
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None:
            return
        try:
            run(self._fs, self._abort())
        except Exception as problem:  # noqa: BLE001 -- the first failure is the one to report
            _log.warning(
                "%s: the parts of a failed upload could not be removed and may be charged for: %s",
                self._where,
                one_line(problem),
            )

    def send(self, data: bytes) -> None:
        """Upload the next part, once there is room for it."""

        async def upload(number: int) -> Answer:
            body = Watched(data, self._options.stall_timeout)
            answer = await body.sent_by(
                lambda: self._request("upload_part", PartNumber=number, Body=body, **self._upload),
                self._fs.upload_slots,
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        # A part is in memory twice while it is sent. Two more are: this one, and the one that
        # is read meanwhile.
        self._start(upload, len(data), max(1, self._options.memory // (2 * len(data)) - 2))

    def copy(self, **arguments: Any) -> None:
        """Let the store copy the next part from another object."""

        async def copy(number: int) -> Answer:
            answer = await self._request(
                "upload_part_copy", PartNumber=number, **arguments, **self._upload
            )
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        self._start(copy, 0, self._options.connections)

    def complete(self, condition: Mapping[str, str]) -> Answer:
        """Make one object of the parts; return the store's answer."""
        self._collect(0)
        parts = sorted(self._parts, key=lambda part: part["PartNumber"])
        with translated(self._where):
            return run(
                self._fs,
                self._request(
                    "complete_multipart_upload",
                    MultipartUpload={"Parts": parts},
                    **self._upload,
                    **condition,
                ),
            )

    def _start(
        self, make: Callable[[int], Coroutine[Any, Any, Answer]], size: int, limit: int
    ) -> None:
        self._collect(min(limit, self._options.connections) - 1)
        self._number += 1
        part = self._tracked(make(self._number))
        self._pending[asyncio.run_coroutine_threadsafe(part, self._fs.loop)] = size

    def _collect(self, room: int) -> None:
        """Wait until at most ``room`` parts are under way."""
        while len(self._pending) > room:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                size = self._pending.pop(future)
                with translated(self._where):
                    self._parts.append(future.result())
                if self._on_bytes is not None:
                    self._on_bytes(size)

    async def _tracked(self, part: Coroutine[Any, Any, Answer]) -> Answer:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await part
        finally:
            self._tasks.discard(task)

    def _named(self, answer: Answer) -> dict[str, Any]:
        return {"Key": self._attributes["Key"], "UploadId": answer["UploadId"]}

    async def _abort(self) -> None:
        # A part that arrives after the abort would stay: wait until each has ended.
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._request("abort_multipart_upload", **self._upload)

    def _abort_late(self, future: Future[Answer]) -> None:
        if not future.cancelled() and future.exception() is None:
            abort = self._request("abort_multipart_upload", **self._named(future.result()))
            asyncio.run_coroutine_threadsafe(abort, self._fs.loop)
