"""One copy from URI to URI: by the store itself where it can, else through this machine."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from storage.backends.base import BatchBackend, ObjectInfo
from storage.digest import Digest
from storage.errors import InvalidInput, ObjectChangedError, UnsupportedOperation
from storage.transfer.copy import Source, stream_copy
from storage.transfer.engine import run_by_size, run_tasks
from storage.transfer.progress import Meter, ProgressCallback
from storage.transfer.sending import send_items
from storage.uri import Location

if TYPE_CHECKING:
    from storage.client.client import StorageClient

__all__ = ["Copy"]

# How often an object is begun again that was replaced while it was being read.
_RESTARTS = 3


class Copy:
    """What one call of ``copy_object`` was asked for, and the ways to do it."""

    def __init__(
        self,
        client: StorageClient,
        source: Location,
        target: Location,
        config: Any,
        target_config: Any,
        progress: ProgressCallback | None,
    ) -> None:
        """Keep the arguments; nothing is asked of a store yet."""
        self._client = client
        self._source = source
        self._target = target
        self._config = config
        self._progress = progress
        self._origin = client.backend(source, config)
        self._backend = client.backend(target, target_config)
        self._expected = None if source.digest is None else Digest.parse(source.digest)
        self._bucket: str | None = None
        self._by_store = False
        # Who expects a digest wants the bytes to be looked at.
        if self._expected is None:
            if self._origin is self._backend:
                self._by_store = self._backend.capabilities.copy
            elif self._backend.capabilities.copy_across:
                self._by_store = client.share_store(source, config, target, target_config)
                self._bucket = source.bucket

    def run(self) -> None:
        """Copy all objects of the source.

        Raises:
            InvalidInput: the source would be copied onto itself, or is a tree with a digest.
            IntegrityError: the bytes of the source are not what they should be.
        """
        source, client = self._source, self._client
        is_tree, found = client.run_retried(client.resolve_all, source, self._config)
        if self._expected is not None and is_tree:
            raise InvalidInput(
                f"{source} is a tree, and a copy checks the digest of one object only; download "
                "it with the digest, and upload what arrived"
            )
        pairs = [(info, self._key_of(info, is_tree)) for info in found]
        # An old version may become the newest again.
        same = self._origin is self._backend and source.version == self._target.version
        if same and any(info.key == key for info, key in pairs):
            raise InvalidInput(f"{source} cannot be copied onto itself")
        sizes = [info.size for info in found]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        meter = Meter("copy", str(source), total, len(found), self._progress)
        if self._backend.capabilities.batch_write:
            self._in_one_step(pairs, meter)
        else:
            self._one_by_one(pairs, meter)
        meter.finish()

    def _key_of(self, info: ObjectInfo, is_tree: bool) -> str:
        source, target = self._source, self._target
        if is_tree:
            return target.child(info.key[len(source.prefix) :]).key
        name = info.filename or source.name
        return target.child(name).key if target.forces_tree else target.key

    def _one_by_one(self, pairs: list[tuple[ObjectInfo, str]], meter: Meter) -> None:
        tasks = [(info.size, partial(self._copy, info, key, meter)) for info, key in pairs]
        budget = self._client.budget
        if self._by_store:
            run_tasks([task for _, task in tasks], budget, len(tasks))
            return
        run_by_size(tasks, budget, self._client.transfer_options.memory)

    def _copy(self, info: ObjectInfo, key: str, meter: Meter, cancel: threading.Event) -> None:
        if not (self._by_store and self._copied_by_store(info, key, meter)):
            self._streamed(info, key, meter, cancel)
        meter.add_object()

    def _streamed(
        self,
        info: ObjectInfo,
        key: str,
        meter: Meter,
        cancel: threading.Event,
        *,
        source: Source | None = None,
        if_absent: bool = False,
    ) -> tuple[Source, ObjectInfo]:
        """Write an object; return what was read and what is there now.

        ``source`` is what ``_read`` said of ``info`` just before, if anybody has asked it.
        """
        options = self._client.transfer_options
        again = _RESTARTS
        while True:
            try:
                source = source or self._read(info)
                written = stream_copy(
                    source,
                    self._backend,
                    key,
                    options=options,
                    meter=meter,
                    cancel=cancel,
                    if_absent=if_absent,
                )
            except ObjectChangedError:
                if not again or self._source.version is not None:
                    raise
                # Replaced midway: what is there now is as good, from its beginning.
                again -= 1
                source, info = None, replace(info, version=None)
            else:
                return source, written

    def _copied_by_store(self, info: ObjectInfo, key: str, meter: Meter) -> bool:
        version = self._source.version
        copy = partial(self._backend.copy, info.key, key, version=version, bucket=self._bucket)
        try:
            self._client.run_retried(copy)
        except UnsupportedOperation:
            return False
        meter.add_present(info.size or 0)
        return True

    def _in_one_step(self, pairs: list[tuple[ObjectInfo, str]], meter: Meter) -> None:
        backend = cast("BatchBackend", self._backend)
        if self._by_store:
            self._client.run_retried(backend.copy_many, [(info.key, key) for info, key in pairs])
            meter.add_present(sum(info.size or 0 for info, _ in pairs))
        else:
            items = [self._read(info).item(backend, key) for info, key in pairs]
            send_items(backend, items, self._client.transfer_options.retry, meter)
        for _ in pairs:
            meter.add_object()

    def _read(self, info: ObjectInfo) -> Source:
        return Source(
            self._origin,
            info,
            where=str(self._source),
            retry=self._client.transfer_options.retry,
            expected=self._expected,
            pinned=self._source.version is not None,
        )
