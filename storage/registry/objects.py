"""The objects below a registry's URI, by their names, with retries."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from storage.backends.base import ObjectInfo, bytes_payload
from storage.client.parallel import map_parallel
from storage.errors import (
    BucketMissingError,
    IntegrityError,
    ModelMissingError,
    ObjectExistsError,
    TransferError,
    TransientError,
    UnsupportedOperation,
)
from storage.files import sync, translate_os_errors
from storage.registry.documents import LONGEST, is_whole

if TYPE_CHECKING:
    from storage.backends.base import Backend
    from storage.client.client import StorageClient
    from storage.uri import Location

__all__ = ["ObjectStore"]

T = TypeVar("T")
R = TypeVar("R")

_DELETED_AT_ONCE = 1000
# Somebody may remove an object between the answer that it exists and the look at it.
_VANISHED = 10
_READS = 5
_TYPE = "application/json"


class ObjectStore:
    """What a registry needs of a store: create, read, list, remove. Safe for many threads.

    Names are relative to the registry's URI; see :mod:`storage.registry.layout`.
    """

    def __init__(self, client: StorageClient, location: Location, config: Any = None) -> None:
        """Address the registry at ``location``; nothing is asked of the store yet."""
        self.client = client
        self.location = location
        self.config = config

    @property
    def backend(self) -> Backend:
        """The backend, which syncs what it writes where the store is a file system."""
        if self.location.is_local:
            return self.client.backend(self.location, self.config, durable=True)
        return self.client.backend(self.location, self.config)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return what ``function`` returns for each of ``items``, in their order.

        It is called by as many threads as the client has connections, and does one thing after
        the other.
        """
        budget = self.client.budget
        return map_parallel(function, items, budget.connections, budget)

    def check(self) -> None:
        """Refuse to write to a store on which two writers could not be told apart.

        Raises:
            UnsupportedOperation: it lacks something that a registry needs.
        """
        backend = self.backend
        capabilities = backend.capabilities
        needed = {
            "create an object only if it is absent": capabilities.if_absent,
            "write": capabilities.write,
            "list": capabilities.list,
            "delete": capabilities.delete,
        }
        lacking = [what for what, there in needed.items() if not there]
        if lacking:
            raise UnsupportedOperation(
                f"{self.location}: {backend.name} cannot {lacking[0]}, without which writers would "
                "overwrite each other's versions; keep the registry on S3, GCS, Azure, the Hub, a "
                "claim or a directory"
            )

    def key(self, name: str) -> str:
        """Return the key of an object."""
        return f"{self.location.prefix}{name}"

    def where(self, name: str) -> str:
        """Return the URI of an object, for messages and events."""
        return str(self.location.child(name))

    # -- reading -----------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """Return the text of a document; ``None`` if it is not there.

        It is read again if it is not as it was written, for that may be the network's doing.
        Whoever decodes it is told if it stays so.

        Raises:
            IntegrityError: it is longer than any document.
            BucketMissingError: there is no such bucket.
        """
        where = self.where(name)
        data = b""
        for _ in range(_READS):
            try:
                data = self.client.run_retried(self._read, self.key(name), where, where=where)
            except BucketMissingError:
                raise
            except ModelMissingError:
                return None
            if is_whole(data):
                break
        return data

    def _read(self, key: str, where: str) -> bytes:
        data = bytearray()
        with self.backend.read(key) as body:
            for chunk in body:
                data += chunk
                if len(data) > LONGEST:
                    raise IntegrityError(
                        f"{where} has more than the {LONGEST} bytes that a document of a registry "
                        "may have; it was not written by this library"
                    )
        if body.info.size not in (None, len(data)):
            raise TransientError(f"{where}: {len(data)} of {body.info.size} bytes arrived")
        return bytes(data)

    def info(self, name: str) -> ObjectInfo | None:
        """Return what the store says of an object; ``None`` if it is not there."""
        where = self.where(name)
        try:
            return self.client.run_retried(self.backend.stat, self.key(name), where=where)
        except BucketMissingError:
            raise
        except ModelMissingError:
            return None

    def names(self, prefix: str) -> list[str]:
        """Return the names of all objects that begin with ``prefix`` (ends in ``/``), sorted."""
        return [name for name, _ in self.infos(prefix)]

    def infos(self, prefix: str) -> list[tuple[str, ObjectInfo]]:
        """Return names and descriptions of all objects that begin with ``prefix``, sorted."""
        return self.first_infos(prefix, None)

    def first_infos(self, prefix: str, most: int | None) -> list[tuple[str, ObjectInfo]]:
        """Return the same of the ``most`` objects that the store lists first."""
        skip = len(self.location.prefix)

        def collect() -> list[tuple[str, ObjectInfo]]:
            listed = itertools.islice(self.backend.list(self.key(prefix)), most)
            return [(info.key[skip:], info) for info in listed]

        found = self.client.run_retried(collect, where=self.where(prefix))
        return sorted(found, key=lambda item: item[0])

    def holds_any(self, prefix: str) -> bool:
        """Tell whether there is an object whose name begins with ``prefix``."""
        return bool(self.first_infos(prefix, 1))

    # -- writing -----------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """Create a document, unless something has its name.

        Args:
            name: of the document.
            data: its content. Where it matters who created it, it holds something that nobody
                else would write: a write whose answer was lost is known by that.

        Returns:
            Whether just this content is there, so that this call can have created it. If not,
            something else is there.
        """
        for _ in range(_VANISHED):
            try:
                self.create_once(name, data)
            except ObjectExistsError:
                found = self.read(name)
                if found is None:
                    continue
                return found == data
            return True
        raise TransferError(f"{self.where(name)} keeps being created and removed by others")

    def create_once(self, name: str, data: bytes) -> None:
        """Create a document.

        Raises:
            ObjectExistsError: something has its name; this content too, if an answer was lost.
        """
        self._write(name, data, if_absent=True)

    def settle(self, name: str) -> None:
        """Let an object that was found survive a power cut, as all that this store writes does.

        Whoever wrote it may not have come that far yet.
        """
        path = self.backend.local_path(self.key(name)) if self.location.is_local else None
        if path is not None:
            with translate_os_errors(path):
                sync(os.path.dirname(path))

    def replace(self, name: str, data: bytes) -> None:
        """Write a document, whatever is there."""
        self._write(name, data, if_absent=False)

    def _write(self, name: str, data: bytes, *, if_absent: bool) -> None:
        write = functools.partial(self.backend.write, content_type=_TYPE, if_absent=if_absent)
        self.client.run_retried(write, self.key(name), bytes_payload(data), where=self.where(name))

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects. One that is not there is no error."""
        for some in _batches(names):
            keys = [self.key(name) for name in some]
            self.client.run_retried(self.backend.delete, keys, where=self.where(some[0]))


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    listed = list(names)
    for start in range(0, len(listed), _DELETED_AT_ONCE):
        yield listed[start : start + _DELETED_AT_ONCE]
