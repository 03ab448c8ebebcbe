"""Publishing: content first, then one object that commits it, then its number.

1. The files are hashed. If their content is a version already, that is the result.
2. A lease names the content, so that no collection takes a blob of it.
3. What the store lacks is uploaded, under names that were never used before; every byte is hashed
   once more on its way. A blob that a collection condemned counts as lacking.
4. A number is claimed.
5. The next entry of the content's log is created with all that the version is: the commit. If
   somebody else was faster, his version is the result. If a collector took this publisher for dead
   and wrote that entry itself, all begins again at 2.
6. The version is created under its number: now it is seen. Whoever finds a version that is
   committed and not seen does the same, so it does not matter who dies when.
7. The lease is removed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self, cast

from storage.backends.base import BatchBackend, BatchItem
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ObjectChangedError,
    StorageError,
    TransferError,
)
from storage.registry import layout
from storage.registry.documents import (
    Attributes,
    Parent,
    Version,
    VersionFile,
    content_id,
    decode,
    encode,
    now,
    read_fields,
)
from storage.registry.leases import Lease, condemned
from storage.registry.log import Log, last_number
from storage.registry.objects import ObjectStore
from storage.registry.sources import LocalFile, hash_files
from storage.transfer import events
from storage.transfer.engine import run_by_size
from storage.transfer.plan import Patterns, local_paths
from storage.transfer.progress import Meter, ProgressCallback
from storage.transfer.sending import send_item, send_items

__all__ = ["PendingVersion"]

# A page of a listing has a thousand names, and takes about three times as long as an empty one,
# of which sixteen are asked for at once.
_MANY = 64
_MANY_MORE = 20
_LISTED = 100_000
_TYPE = "application/octet-stream"
_Blob = tuple[str, int | None]


class PendingVersion:
    """A version on its way: it can be uploaded to, and is not seen before it is committed.

    A context manager; leaving it without :meth:`commit` aborts it. For one thread at a time.
    """

    def __init__(
        self,
        store: ObjectStore,
        model: str,
        attributes: Attributes,
        parent: Parent = None,
        hints: MutableMapping[str, int] | None = None,
    ) -> None:
        """Prepare; see :meth:`storage.registry.ModelRegistry.begin`.

        Args:
            store: the registry's.
            model: name of the model.
            attributes: what is said of the version.
            parent: what it was made from.
            hints: the highest number that was seen, by model, of models that are in the catalog;
                kept up to date.
        """
        self._store = store
        self._attributes = attributes
        self._parent = parent
        self._hints = {} if hints is None else hints
        self._files: dict[str, LocalFile] = {}
        self._lease: Lease | None = None
        self._number: int | None = None
        self._ended = False
        self.model = model
        self.id = uuid.uuid4().hex
        """What tells it from other pending versions."""

        self.started = now()

    # -- life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(StorageError):
            self.abort()

    def begin(self) -> Self:
        """Let others see that it is pending."""
        self._take()
        return self

    def abort(self) -> None:
        """Give it up. What was uploaded for it alone is removed by the next collection."""
        self._ended = True
        self._release()

    def _take(self, content: str = "", attempt: int = 0) -> None:
        """Take a lease on all files so far, and only then give back the one before it."""
        if self.model not in self._hints:
            self._catalog()
            self._hints[self.model] = 0
        lease = Lease.take(
            self._store,
            self.model,
            {file.blake3 for file in self._files.values()},
            pending=self.id,
            started=self.started,
            content=content,
            attempt=attempt,
        )
        old, self._lease = self._lease, lease
        if old is not None:
            # One that cannot be removed is no worse than one of somebody who died.
            with contextlib.suppress(StorageError):
                old.release()

    def _catalog(self) -> None:
        """Enter the model into the catalog, unless it is there."""
        name = layout.catalog(self.model)
        mine = encode({"model": self.model})
        data = self._store.read(name)
        if data is None:
            if self._store.create(name, mine):
                return
            data = self._store.read(name) or mine
        where = self._store.where(name)
        found = read_fields(decode(data, where), where, model=str)["model"]
        if found != self.model:
            # Two models in one folder would be the end of both.
            raise InvalidInput(
                f"{self._store.location} does not tell upper from lower case and has a model "
                f"{found!r}; publish to that, or choose a name that differs from {self.model!r} "
                "by more"
            )

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _check_open(self) -> None:
        if self._ended:
            raise InvalidInput(
                f"the pending version {self.id} of {self.model!r} is committed or aborted; begin "
                "another one"
            )

    # -- files -------------------------------------------------------------------------------

    def add(
        self,
        source: str | os.PathLike[str],
        path: str = "",
        *,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """Upload a file, or the files of a folder.

        Args:
            source: a file or a folder of this machine. Links are followed.
            path: the folder of the version that it goes into; its top if empty.
            allow_patterns: only these paths, relative to ``source``.
            ignore_patterns: not these.
            progress: called while bytes move.

        Raises:
            InvalidInput: there is nothing, or a path is taken by another content already.
            IntegrityError: a file changed meanwhile.
            TransferError: the store does not answer.
        """
        self._check_open()
        before = self._files
        try:
            self.scan(source, path, allow_patterns, ignore_patterns)
            self._take()
            self._place(
                [file for name, file in self._files.items() if name not in before], progress
            )
        except BaseException:
            self._files = before
            raise

    def scan(
        self,
        source: str | os.PathLike[str],
        path: str = "",
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
    ) -> None:
        """Hash a file, or the files of a folder, as a part of the version; upload nothing yet."""
        patterns = Patterns(allow_patterns, ignore_patterns)
        try:
            path.encode()
        except UnicodeEncodeError as exc:
            raise InvalidInput(f"the folder {path!r} is not UTF-8; choose another path") from exc
        files = dict(self._files)
        for file in hash_files(os.fspath(source), path, patterns):
            other = files.setdefault(file.path, file)
            if other.blake3 != file.blake3:
                raise InvalidInput(
                    f"{file.path!r} is {other.local} already and cannot be {file.local}, too; "
                    "choose another path"
                )
        where = f"a version of {self.model!r}"
        for name, path_there in zip(files, local_paths(files, where), strict=True):
            if name != path_there:
                raise InvalidInput(f"{where} cannot have the path {name!r}: it has an empty part")
        # What cannot be written down is not uploaded. All that is not known yet has its length.
        tokens = {file.blake3: self.id for file in files.values()}
        draft = self._version(sys.maxsize, "0" * 64, _described(files.values(), tokens))
        encode({**draft.document(), "token": self.id})
        self._files = files

    def _version(self, number: int, content: str, files: tuple[VersionFile, ...]) -> Version:
        return Version(
            self.model, number, content, files, now(), self._attributes, self._parent, self.id
        )

    # -- committing --------------------------------------------------------------------------

    def commit(self, *, progress: ProgressCallback | None = None) -> Version:
        """Publish it.

        Args:
            progress: called while bytes move, if something has to be uploaded again.

        Returns:
            The version, or the one that has just these files already; its ``is_new`` tells.

        Raises:
            InvalidInput: it has no files.
            IntegrityError: something has to be uploaded again, and its file is another one now; or
                it is committed, and somebody has put something else where it is to be seen.
            TransferError: the store does not answer. If that was while it was committed it may be
                there or not; publish it again to get it for certain.
        """
        self._check_open()
        if not self._files:
            raise InvalidInput(f"a version of {self.model!r} needs files; add some")
        content = content_id(_described(self._files.values(), {}))
        while True:
            head, version = self._look(content)
            if version is None:
                self._take(content, head + 1)
                version = self._try(content, head, self._place(self._files.values(), progress))
            if version is not None:
                break
        self._show(version)
        self._ended = True
        # It is published, whatever becomes of the lease.
        with contextlib.suppress(StorageError):
            self._release()
        return replace(version, is_new=version.upload == self.id)

    def _look(self, content: str) -> tuple[int, Version | None]:
        """Return the number of the newest entry of a content's log, and the version it is."""
        prefix = layout.content_log(self.model, content)
        found = Log(self._store, prefix).head()
        if found is None:
            return 0, None
        index, document = found
        if "revoked" in document:
            return index, None
        where = self._store.where(layout.entry(prefix, index))
        version = Version.read(document, where)
        if (version.model, version.content) != (self.model, content):
            raise IntegrityError(
                f"{where} is damaged: it is version {version.number} of {version.model!r}"
            )
        gone = self._store.info(layout.deleted(self.model, version.number))
        return index, version if gone is None else None

    def _try(self, content: str, head: int, placed: dict[str, str]) -> Version | None:
        """Write the entry after ``head``; return the version unless somebody else was faster."""
        if self._number is None:
            self._number = self._claim()
        files = _described(self._files.values(), placed)
        version = self._version(self._number, content, files)
        log = Log(self._store, layout.content_log(self.model, content))
        # Until it is known what became of the entry only a collector may settle it.
        lease, self._lease = self._lease, None
        assert lease is not None
        try:
            log.append(version.document(), head)
        except ObjectChangedError:
            self._lease = lease
            return None
        except BaseException as exc:
            # It may still be written with this number; no other content may get it.
            self._number = None
            lease.abandon()
            if not isinstance(exc, TransferError):
                raise
            raise TransferError(
                f"{exc}; whether version {version.number} of {self.model!r} was published is not "
                "known; publish it again: if it was, that gives the same version, else another one"
            ) from exc
        self._lease = lease
        return version

    def _claim(self) -> int:
        """Take the next number, for good."""
        prefix = layout.numbers(self.model)
        number = last_number(self._store, prefix, self._hints.get(self.model, 0)) + 1
        document = encode({"model": self.model, "upload": self.id})
        while not self._store.create(layout.entry(prefix, number), document):
            number += 1
        self._hints[self.model] = max(number, self._hints.get(self.model, 0))
        return number

    def _show(self, version: Version) -> None:
        """Let a committed version be seen under its number."""
        store, name = self._store, layout.version(version.model, version.number)
        is_mine = version.upload == self.id
        if not is_mine and store.info(name) is not None:
            store.settle(name)
        elif not store.create(name, version.dumps()) and not self._is(name, version):
            log = store.where(layout.content_log(version.model, version.content))
            raise IntegrityError(
                f"{store.where(name)} is not the version {version.number} that is committed below "
                f"{log}: it is damaged, or somebody else wrote it; remove it, and publish the same "
                "files again, which writes it anew"
            )

    def _is(self, name: str, version: Version) -> bool:
        """Tell whether an object is a version; a later release writes it with more fields."""
        data = self._store.read(name)
        try:
            # It may be deleted meanwhile.
            return data is None or Version.parse(data, self._store.where(name)) == version
        except IntegrityError:
            return False

    # -- blobs -------------------------------------------------------------------------------

    def _place(
        self, files: Iterable[LocalFile], progress: ProgressCallback | None
    ) -> dict[str, str]:
        """Upload what the store lacks of ``files``; return the token of a blob for each BLAKE3."""
        # In this order: the lease is there, then the collections, then the blobs.
        banned = condemned(self._store)
        files = list({file.blake3: file for file in files}.values())

        found: list[str | None] = []
        for file, blobs in zip(files, self._look_for(files), strict=True):
            usable = (name for name, size in blobs if name not in banned and size == file.size)
            found.append(next(usable, None))
        names = {
            file.blake3: name or layout.blob(file.blake3, uuid.uuid4().hex)
            for file, name in zip(files, found, strict=True)
        }
        where = str(self._store.location)
        size = sum(file.size for file in files)
        with events.transfer("upload", where):
            meter = Meter("upload", where, size, len(files), progress)
            missing = []
            for file, name in zip(files, found, strict=True):
                if name is None:
                    missing.append(file)
                else:
                    self._store.settle(name)
                    meter.add_present(file.size)
                    meter.add_object()
            self._upload(missing, names, meter)
            meter.finish()
        return {digest: layout.last_part(name) for digest, name in names.items()}

    def _look_for(self, files: Sequence[LocalFile]) -> list[list[_Blob]]:
        """Return the blobs with the content of each of ``files``."""
        if len(files) >= _MANY and not self._store.location.is_local:
            # A request for each takes longer than a listing of all, unless there are many more.
            most = min(_MANY_MORE * len(files), _LISTED)
            listed = self._store.first_infos(layout.BLOBS, most)
            if len(listed) < most:
                blobs: dict[str | None, list[_Blob]] = {}
                for name, info in listed:
                    blobs.setdefault(layout.blob_digest(name), []).append((name, info.size))
                return [blobs.get(file.blake3, []) for file in files]

        def look(file: LocalFile) -> list[_Blob]:
            prefix = layout.blob_incarnations(file.blake3)
            found = self._store.infos(prefix)
            return [(name, info.size) for name, info in found if layout.blob_digest(name)]

        return self._store.map(look, files)

    def _upload(self, files: Sequence[LocalFile], names: dict[str, str], meter: Meter) -> None:
        client, backend = self._store.client, self._store.backend
        options = client.transfer_options
        items = [_item(self._store, file, names[file.blake3]) for file in files]
        if backend.capabilities.batch_write:
            if items:
                batch = cast("BatchBackend", backend)
                send_items(batch, items, options.retry, meter, where=str(self._store.location))
            for _ in items:
                meter.add_object()
            return

        def send(item: BatchItem, where: str, cancel: threading.Event) -> None:
            send_item(backend, item, options.retry, meter, where=where, cancel=cancel)
            meter.add_object()

        tasks = [
            (file.size, partial(send, item, self._store.where(names[file.blake3])))
            for file, item in zip(files, items, strict=True)
        ]
        run_by_size(tasks, client.budget, options.memory)


def _described(files: Iterable[LocalFile], placed: Mapping[str, str]) -> tuple[VersionFile, ...]:
    """Return files of a version; ``placed`` is the token of a blob for each BLAKE3."""
    return tuple(
        VersionFile(file.path, file.size, file.blake3, file.sha256, placed.get(file.blake3, ""))
        for file in sorted(files, key=lambda file: os.fsencode(file.path))
    )


def _item(store: ObjectStore, file: LocalFile, name: str) -> BatchItem:
    metadata = {}
    if store.backend.capabilities.metadata:
        metadata = {"blake3": file.blake3, "sha256": file.sha256}
    return BatchItem(store.key(name), file.payload, metadata, _TYPE)
