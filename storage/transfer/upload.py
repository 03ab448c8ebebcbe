"""Files to objects: hashed first, sent in parallel, with the digests kept beside the bytes."""

from __future__ import annotations

import contextlib
import io
import mimetypes
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from storage import cancellation
from storage.backends.base import Backend, BatchBackend, BatchItem, ObjectInfo, Payload
from storage.digest import hash_file
from storage.errors import DestinationError, IntegrityError, InvalidInput
from storage.transfer.engine import Budget, TransferOptions, run_by_size
from storage.transfer.plan import Patterns
from storage.transfer.progress import Meter
from storage.transfer.retry import RetryPolicy
from storage.transfer.sending import send_item, send_items

__all__ = ["SourceFile", "scan", "upload"]

_METADATA_DIGESTS = ("blake3", "sha256")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to be uploaded."""

    path: str
    """Relative to the source, with ``/``; the file's name for a single file."""

    local: str
    size: int
    mtime_ns: int


def scan(source: str, patterns: Patterns) -> tuple[bool, list[SourceFile]]:
    """Find the files of ``source``, a file or a folder. Links are followed.

    Returns:
        Whether it is a folder, and its files sorted by path.

    Raises:
        InvalidInput: there is nothing there, nothing wanted, or something that is neither a
            file nor a folder (a socket, a device, a link to nowhere or back up).
    """
    try:
        mode = os.stat(source).st_mode
    except OSError as exc:
        raise InvalidInput(
            f"{source} cannot be uploaded: {exc.strerror}; expected a file or a folder"
        ) from exc
    if not stat.S_ISDIR(mode):
        name = os.path.basename(source)
        found = [_source_file(name, source)] if patterns.wants(name) else []
        is_tree = False
    else:
        found = [file for file in _walk(source, "", ()) if patterns.wants(file.path)]
        is_tree = True
    if not found:
        raise InvalidInput(
            f"{source} holds no file to upload; allowed {patterns.allow}, ignored {patterns.ignore}"
        )
    return is_tree, sorted(found, key=lambda file: file.path)


def _walk(folder: str, base: str, above: tuple[tuple[int, int], ...]) -> Iterator[SourceFile]:
    try:
        status = os.stat(folder)
        names = sorted(os.listdir(folder))
    except OSError as exc:
        raise InvalidInput(f"{folder} cannot be read: {exc.strerror}") from exc
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise InvalidInput(f"{folder} is a link to a folder that holds it; remove the link")
    for name in names:
        path = os.path.join(folder, name)
        relative = f"{base}{name}"
        if os.path.isdir(path):
            yield from _walk(path, f"{relative}/", (*above, identity))
        else:
            yield _source_file(relative, path)


def _source_file(relative: str, path: str) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError as exc:
        raise InvalidInput(f"{path} cannot be uploaded: {exc.strerror}") from exc
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput(f"{path} is neither a file nor a folder and cannot be uploaded")
    try:
        relative.encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(
            f"{relative!r} is not UTF-8 and cannot be the name of an object; rename the file"
        ) from exc
    return SourceFile(relative, path, status.st_size, status.st_mtime_ns)


def upload(
    backend: Backend,
    files: Sequence[SourceFile],
    key_of: Callable[[SourceFile], str],
    *,
    where: Callable[[SourceFile], str] = lambda _: "",
    options: TransferOptions,
    budget: Budget,
    meter: Meter,
    if_absent: bool,
) -> list[ObjectInfo]:
    """Upload ``files``, each to the key that ``key_of`` gives it.

    Args:
        backend: where they go.
        files: what goes there.
        key_of: gives the key of a file.
        where: gives the URI of a file, for events.
        options: sizes and retries.
        budget: connections shared with other transfers.
        meter: is told about bytes and objects.
        if_absent: create only.

    Returns:
        What is now there, in the order of ``files``.

    Raises:
        ObjectExistsError: ``if_absent`` and a key is there.
        IntegrityError: a file changed while it was being read; nothing is stored, or its object
            is removed again.
        TransferError: retries are spent.
    """
    if backend.capabilities.batch_write:
        return _send_all(cast("BatchBackend", backend), files, key_of, options, meter, if_absent)
    results: dict[str, ObjectInfo] = {}

    def send(file: SourceFile, cancel: threading.Event) -> None:
        item = _item(backend, file, key_of(file))
        info = send_item(
            backend,
            item,
            options.retry,
            meter,
            if_absent=if_absent,
            where=where(file),
            cancel=cancel,
        )
        _check_unchanged(backend, file, item.key, info, options.retry)
        meter.add_object()
        results[file.path] = info

    run_by_size(((file.size, partial(send, file)) for file in files), budget, options.memory)
    return [results[file.path] for file in files]


def _send_all(
    backend: BatchBackend,
    files: Sequence[SourceFile],
    key_of: Callable[[SourceFile], str],
    options: TransferOptions,
    meter: Meter,
    if_absent: bool,
) -> list[ObjectInfo]:
    """Upload all files in one step of the store."""
    items = [_item(backend, file, key_of(file)) for file in files]
    infos = send_items(backend, items, options.retry, meter, if_absent=if_absent)
    for file, item, info in zip(files, items, infos, strict=True):
        _check_unchanged(backend, file, item.key, info, options.retry)
        meter.add_object()
    return infos


def _item(backend: Backend, file: SourceFile, key: str) -> BatchItem:
    metadata: dict[str, str] = {}
    try:
        if backend.capabilities.metadata:
            digests = hash_file(file.local, _METADATA_DIGESTS)
            metadata = {name: digest.hex for name, digest in digests.items()}
    except OSError as exc:
        raise DestinationError(f"{file.local} cannot be read: {exc.strerror}") from exc
    content_type = mimetypes.guess_type(file.path)[0] or "application/octet-stream"
    payload = Payload(lambda: io.BufferedReader(_Steady(file)), file.size)
    return BatchItem(key, payload, metadata, content_type)


class _Steady(io.FileIO):
    """A file that raises instead of ending if it was changed since it was looked at.

    The writer must not see the end of bytes that nobody has hashed.
    """

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.local)
        self._file = file
        # It may be read by threads that know nothing of the caller.
        self._token = cancellation.current()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        self._check_wanted()
        count = super().readinto(buffer)
        if not count or self.tell() >= self._file.size:
            self._check()
        return count or 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._check_wanted()
        data = super().read(-1 if size is None else size) or b""
        if not data or self.tell() >= self._file.size:
            self._check()
        return data

    def readall(self) -> bytes:
        return self.read()

    def _check_wanted(self) -> None:
        if self._token is not None:
            self._token.check()

    def _check(self) -> None:
        status = os.fstat(self.fileno())
        if (status.st_size, status.st_mtime_ns) != (self._file.size, self._file.mtime_ns):
            raise IntegrityError(
                f"{self._file.local} changed while it was being uploaded; nothing was stored; "
                "upload it when its writer is done"
            )


def _check_unchanged(
    backend: Backend, file: SourceFile, key: str, info: ObjectInfo, retry: RetryPolicy
) -> None:
    try:
        status = os.stat(file.local)
        now = (status.st_size, status.st_mtime_ns)
    except OSError:
        now = (-1, -1)
    if now == (file.size, file.mtime_ns) and info.size == file.size:
        return
    stored = backend.local_path(key)
    with contextlib.suppress(OSError):  # one of them is not there any more
        if stored is not None and os.path.samefile(stored, file.local):
            # It was put onto itself, all of it. Its object must not be removed: it is the file.
            return
    retry.run(partial(backend.delete, [key]))
    raise IntegrityError(
        f"{file.local} changed while it was being uploaded; its object was removed again; "
        "upload it when its writer is done"
    )
