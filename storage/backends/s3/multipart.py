"""Uploads to S3 in parts: bounded, parallel, and gone without a trace when they fail."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, Self

from storage.backends.base import OpenOptions
from storage.backends.drivers import streams
from storage.backends.drivers.fsspec_parts import run
from storage.backends.drivers.streams import Watched
from storage.backends.s3.answers import code_of, translated
from storage.backends.s3.leftovers import Leftovers, advice
from storage.backends.s3.protection import Protection
from storage.errors import StorageError, TransientError

__all__ = ["MultipartUpload", "Request", "part_sizes"]

Answer = dict[str, Any]
Request = Callable[..., Coroutine[Any, Any, Answer]]

_MIB = 1024 * 1024
_SMALLEST_PART = 5 * _MIB
_MAX_PARTS = 10_000
# Seconds before each attempt to abort.
_ABORTS = (0.0, 0.3, 1.0, 2.0)
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
        protection: Protection | None = None,
        leftovers: Leftovers | None = None,
    ) -> None:
        """Describe the upload; entering the block begins it.

        Args:
            fs: the file system whose event loop runs the requests.
            request: makes a request to the bucket out of a method and its arguments.
            attributes: ``Key`` and what else the object is to have.
            options: how many requests and bytes may be under way.
            where: the object's URI, for messages.
            on_bytes: called with the size of each part that has arrived.
            protection: what goes with the parts that are sent.
            leftovers: removes what this upload cannot remove itself.
        """
        self._fs = fs
        self._request = request
        self._attributes = attributes
        self._key: str = attributes["Key"]
        self._options = options
        self._where = where
        self._on_bytes = on_bytes
        self._protection = protection or Protection("off")
        self._leftovers = leftovers
        self._watch = ExitStack()
        self._upload: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pending: dict[Future[Answer], int] = {}
        self._parts: list[Answer] = []
        self._number = 0

    def __enter__(self) -> Self:
        watch = nullcontext() if self._leftovers is None else self._leftovers.removed(self._key)
        with ExitStack() as stack:
            failed = stack.enter_context(watch)
            try:
                self._begin()
            except TransientError:
                # The store may have begun it, and told nobody its name.
                if failed is not None:
                    failed(lambda _, etags: not etags)
                raise
            self._watch = stack.pop_all()
        return self

    def _begin(self) -> None:
        arguments = {**self._attributes, **self._protection.announced()}
        request = self._request("create_multipart_upload", **arguments)
        future = asyncio.run_coroutine_threadsafe(request, self._fs.loop)
        with translated(self._where):
            try:
                self._upload = self._named(future.result())
            except BaseException:
                # Given up while the answer is on its way: what it begins must end, too.
                future.add_done_callback(self._abort_late)
                raise

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        with self._watch:
            if exc is not None:
                self._give_up()

    def _give_up(self) -> None:
        problem: Exception | None = None
        for pause in _ABORTS:
            time.sleep(pause)
            try:
                with translated(self._where):
                    run(self._fs, self._abort())
                if self._is_gone():
                    return
                problem = TransientError(f"the store still has the upload {self._upload}")
            except TransientError as exc:
                if code_of(exc) == "NoSuchUpload":
                    return  # aborted the last time, and the answer was lost
                problem = exc
            except Exception as exc:  # noqa: BLE001 -- the first failure is the one to report
                problem = exc
                break
        if problem is not None:
            _log.warning("%s", advice(self._where, problem))

    def _is_gone(self) -> bool:
        """Tell whether an abort has done all: a part may have come after it."""
        try:
            with translated(self._where):
                run(self._fs, self._request("list_parts", **self._upload))
        except TransientError as exc:
            return code_of(exc) == "NoSuchUpload"
        except StorageError:
            return True  # who may upload need not be allowed to look
        return False

    def send(self, data: bytes) -> None:
        """Upload the next part, once there is room for it."""
        sent = self._protection.of(data)

        async def upload(number: int) -> Answer:
            body = Watched(data, self._options.stall_timeout)
            answer = await body.sent_by(
                lambda: self._request(
                    "upload_part", PartNumber=number, Body=body, **self._upload, **sent.headers
                ),
                self._fs.upload_slots,
            )
            sent.check(self._where, answer)
            return {"PartNumber": number, "ETag": answer["ETag"], **sent.headers}

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
        return {"Key": self._key, "UploadId": answer["UploadId"]}

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
