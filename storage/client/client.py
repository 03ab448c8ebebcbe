"""`StorageClient`: the one place where configs, backends, transfers and the cache meet."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, TypeVar
from urllib.parse import urlsplit

from storage.backends import open_backend
from storage.backends.base import Backend, ObjectInfo, OpenOptions
from storage.client.copy import Copy
from storage.client.download import Download
from storage.digest import Digest
from storage.errors import InvalidInput, ObjectExistsError, UnsupportedOperation, redact
from storage.transfer.engine import PART_GRANULE, Budget, TransferOptions, run_tasks
from storage.transfer.plan import Patterns, Plan, make_plan, resolve
from storage.transfer.progress import Meter, ProgressCallback
from storage.transfer.reader import open_reader
from storage.transfer.retry import RetryPolicy
from storage.transfer.upload import SourceFile, scan, upload
from storage.transfer.writer import open_writer
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.config import Settings

__all__ = ["StorageClient"]

T = TypeVar("T")
Offline = bool | Literal["auto"] | None
PatternArgument = str | Iterable[str] | None


class StorageClient:
    """Moves models between stores and this machine, with one set of limits and settings.

    The facades :class:`storage.Storage` and :class:`storage.StorageOperations` use one that is
    made from the environment. Make your own for other settings, a config for all calls, or
    limits that are not shared with the rest of the program. Safe for many threads; a forked
    child opens its own connections.
    """

    def __init__(self, config: Any = None, settings: Settings | None = None) -> None:
        """Prepare; no network, no disk, no SDK.

        Args:
            config: config for every call that brings none of its own.
            settings: limits, cache folder, offline mode; read from the environment and the
                settings file on first use if ``None``.
        """
        self._config = config
        self._given_settings = settings
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._backends: dict[Any, Backend] = {}
        self._budget: Budget | None = None
        self._options: TransferOptions | None = None

    # -- downloads ---------------------------------------------------------------------------

    def download(
        self,
        uri: str | os.PathLike[str],
        dest: str | os.PathLike[str] | None = None,
        *,
        config: Any = None,
        allow_patterns: PatternArgument = None,
        ignore_patterns: PatternArgument = None,
        digest: str | Digest | None = None,
        unpack: bool = False,
        offline: Offline = None,
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Bring an object or a tree here, verified, and return its local path.

        See :meth:`storage.Storage.download`, which this is.
        """
        job = Download(
            self,
            parse_uri(uri),
            config,
            Patterns(allow_patterns, ignore_patterns),
            digest,
            unpack,
            offline,
            overwrite,
            progress,
        )
        return job.run(None if dest is None else _local_path(dest))

    def download_many(
        self,
        uris: Sequence[str | os.PathLike[str]],
        dests: Sequence[str | os.PathLike[str] | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Download several sources at once; see :meth:`storage.Storage.download_many`."""
        if isinstance(uris, (str, os.PathLike)):
            raise InvalidInput("download_many takes a list of URIs; use download for one")
        if dests is not None and len(dests) != len(uris):
            raise InvalidInput(
                f"download_many was given {len(uris)} URIs and {len(dests)} destinations; "
                "expected as many of one as of the other"
            )
        places = dests if dests is not None else [None] * len(uris)
        taken = [os.path.abspath(place) for place in places if place is not None]
        if len(set(taken)) != len(taken):
            raise InvalidInput("download_many was given the same destination twice")
        results: list[str] = [""] * len(uris)

        def download(index: int, _: threading.Event) -> None:
            results[index] = self.download(uris[index], places[index], **options)

        # The sources share the connections of the client; this only bounds the threads.
        tasks = [partial(download, index) for index in range(len(uris))]
        run_tasks(tasks, Budget(min(8, max(1, len(uris)))), len(uris))
        return results

    def plan_download(
        self,
        uri: str | os.PathLike[str],
        *,
        config: Any = None,
        allow_patterns: PatternArgument = None,
        ignore_patterns: PatternArgument = None,
    ) -> Plan:
        """Return what :meth:`download` would fetch, and fetch nothing."""
        location = parse_uri(uri)
        patterns = Patterns(allow_patterns, ignore_patterns)
        return self.run_retried(make_plan, self.backend(location, config), location, patterns)

    # -- uploads -----------------------------------------------------------------------------

    def upload(
        self,
        src: str | os.PathLike[str],
        uri: str | os.PathLike[str],
        *,
        config: Any = None,
        overwrite: bool = True,
        allow_patterns: PatternArgument = None,
        ignore_patterns: PatternArgument = None,
        progress: ProgressCallback | None = None,
    ) -> bool:
        """Store a file or a folder; see :meth:`storage.Storage.upload`."""
        location = _writable(parse_uri(uri))
        source = os.fspath(src)
        is_tree, files = scan(source, Patterns(allow_patterns, ignore_patterns))
        prefix = location.prefix if is_tree or location.forces_tree else None
        backend = self.backend(location, config)
        if not backend.capabilities.write:
            raise UnsupportedOperation(f"{location}: {backend.name} cannot be written to")
        if not overwrite and not backend.capabilities.if_absent:
            raise UnsupportedOperation(
                f"{location}: {backend.name} cannot decide safely whether something is there "
                "already; upload with overwrite=True, or to another name"
            )
        if not overwrite and is_tree and self.run_retried(_holds_anything, backend, prefix):
            raise ObjectExistsError(
                f"{location} holds objects already and overwrite=False; choose another name"
            )

        def key_of(file: SourceFile) -> str:
            return location.key if prefix is None else location.child(file.path).key

        meter = Meter(
            "upload", str(location), sum(file.size for file in files), len(files), progress
        )
        upload(
            backend,
            files,
            key_of,
            options=self.transfer_options,
            budget=self.budget,
            meter=meter,
            if_absent=not overwrite,
        )
        meter.finish()
        return True

    # -- objects -----------------------------------------------------------------------------

    def list_objects(self, uri: str | os.PathLike[str], *, config: Any = None) -> list[str]:
        """List what is below a URI; see :meth:`storage.StorageOperations.list_objects`."""
        return [path for path, _ in self.list_infos(uri, config=config)]

    def list_infos(
        self, uri: str | os.PathLike[str], *, config: Any = None
    ) -> list[tuple[str, ObjectInfo]]:
        """Return the relative path and the description of every object at ``uri``, sorted."""
        location = parse_uri(uri)
        backend = self.backend(location, config)

        def collect() -> list[tuple[str, ObjectInfo]]:
            is_tree, found = resolve(backend, location)
            if not is_tree:
                return [(info.filename or location.name, info) for info in found]
            skip = len(location.prefix)
            return sorted(((info.key[skip:], info) for info in found), key=lambda item: item[0])

        return self.run_retried(collect)

    def get_object_metadata(
        self, uri: str | os.PathLike[str], *, config: Any = None
    ) -> dict[str, Any]:
        """Describe an object or a tree; see :meth:`storage.StorageOperations`."""
        location = parse_uri(uri)
        is_tree, found = self.run_retried(self.resolve_all, location, config)
        if not is_tree:
            return {"uri": str(location), "type": "object"} | _describe(found[0])
        modified = [info.modified for info in found if info.modified is not None]
        return {
            "uri": str(location),
            "type": "tree",
            "size": sum(info.size or 0 for info in found),
            "objects": len(found),
            "modified_time": max(modified, default=None),
            "etag": None,
            "content_type": None,
            "digests": {},
            "metadata": {},
        }

    def delete_object(
        self, uri: str | os.PathLike[str], *, config: Any = None, recursive: bool = False
    ) -> bool:
        """Delete an object or a tree; see :meth:`storage.StorageOperations.delete_object`."""
        location = _writable(parse_uri(uri))
        is_tree, found = self.run_retried(self.resolve_all, location, config)
        if is_tree and not recursive:
            raise InvalidInput(
                f"{location} is a tree of {len(found)} objects; "
                "pass recursive=True (storage rm -r) to delete them all"
            )
        backend = self.backend(location, config)
        if not backend.capabilities.delete:
            raise UnsupportedOperation(f"{location}: {backend.name} cannot delete")
        self.run_retried(backend.delete, [info.key for info in found])
        return True

    def copy_object(
        self,
        src_uri: str | os.PathLike[str],
        dest_uri: str | os.PathLike[str],
        *,
        config: Any = None,
        dest_config: Any = None,
        progress: ProgressCallback | None = None,
    ) -> bool:
        """Copy an object or a tree; see :meth:`storage.StorageOperations.copy_object`."""
        source, target = parse_uri(src_uri), _writable(parse_uri(dest_uri))
        if dest_config is None and source.type == target.type:
            dest_config = config
        Copy(self, source, target, config, dest_config, progress).run()
        return True

    # -- files -------------------------------------------------------------------------------

    def open(
        self, uri: str | os.PathLike[str], mode: str = "rb", *, config: Any = None
    ) -> BinaryIO:
        """Open an object as a file; see :meth:`storage.Storage.open`."""
        location = parse_uri(uri)
        backend = self.backend(location, config)
        retry = self.transfer_options.retry
        if location.forces_tree:
            raise InvalidInput(f"{location} names a tree; only an object can be opened")
        if mode == "rb":
            info = self.run_retried(backend.stat, location.key, location.version)
            return open_reader(backend, info, retry, str(location))
        if mode in ("wb", "xb"):
            _writable(location)
            return open_writer(backend, location.key, retry, str(location), if_absent=mode == "xb")
        raise InvalidInput(f"the mode is {mode!r}; expected 'rb', 'wb' or 'xb'")

    def filesystem(self, uri: str | os.PathLike[str], *, config: Any = None) -> AbstractFileSystem:
        """Return an fsspec file system; see :meth:`storage.Storage.filesystem`."""
        return self.backend(parse_uri(uri), config).filesystem()[0]

    # -- life --------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the connections. A later call opens new ones."""
        with self._lock:
            backends, self._backends = self._backends, {}
            mine = self._pid == os.getpid()
        if mine:
            for backend in backends.values():
                backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- what the parts share ----------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force; read from the environment and the file on first use."""
        if self._given_settings is None:
            from storage.config import load_settings

            self._given_settings = load_settings()
        return self._given_settings

    def backend(self, location: Location, config: Any = None) -> Backend:
        """Return the backend for the bucket of ``location``, the same one for the same config."""
        config = self._resolve_config(location, config)
        transfer = self.settings.transfer
        key = (_store_of(location), location.bucket, config)
        with self._lock:
            if self._pid != os.getpid():
                # Sockets and threads stayed with the parent.
                self._pid, self._backends, self._budget = os.getpid(), {}, None
            backend = self._backends.get(key)
            if backend is None:
                options = OpenOptions(
                    transfer.connections,
                    transfer.connect_timeout,
                    transfer.stall_timeout,
                    transfer.memory,
                )
                backend = self._backends[key] = open_backend(location, config, options)
        return backend

    def _resolve_config(self, location: Location, config: Any) -> Any:
        from storage.config import resolve_config

        if config is None and self._config is not None and self._default_fits(location):
            config = self._config
        return resolve_config(location, config, self.settings)

    def share_store(self, one: Location, config: Any, other: Location, other_config: Any) -> bool:
        """Tell whether two locations are in buckets of the same store, with the same config."""
        return _store_of(one) == _store_of(other) and self._resolve_config(
            one, config
        ) == self._resolve_config(other, other_config)

    def _default_fits(self, location: Location) -> bool:
        """Tell whether the client's own config is meant for stores of this kind."""
        kind = getattr(self._config, "uri_type", location.type)
        return kind in (location.type, "*") and location.scheme not in ("file", "memory")

    def resolve_all(self, location: Location, config: Any) -> tuple[bool, list[ObjectInfo]]:
        """Return whether there is a tree at ``location``, and all objects of it; one attempt."""
        is_tree, found = resolve(self.backend(location, config), location)
        return is_tree, list(found)

    @property
    def transfer_options(self) -> TransferOptions:
        """Sizes and retries of this client's transfers."""
        if self._options is None:
            transfer = self.settings.transfer
            self._options = TransferOptions(
                transfer.connections,
                -(-transfer.part_size // PART_GRANULE) * PART_GRANULE,
                RetryPolicy(transfer.attempts, transfer.retry_timeout),
                self.settings.durable,
            )
        return self._options

    @property
    def budget(self) -> Budget:
        """The connections that all transfers of this client share."""
        with self._lock:
            if self._budget is None:
                self._budget = Budget(self.settings.transfer.connections)
            return self._budget

    def run_retried(self, function: Callable[..., T], *args: Any) -> T:
        """Call a short operation of a backend, and again if it failed for a passing reason."""
        return self.transfer_options.retry.run(partial(function, *args))


def _local_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput(f"a destination is the path of a file or folder, not {path!r}")
    if "://" in text:
        raise InvalidInput(f"{redact(text)!r} is a URI; a destination is a local path")
    return text


def _store_of(location: Location) -> tuple[object, ...]:
    """Return what tells one store from another: who serves it, and as what we come to it."""
    return (
        location.scheme,
        location.account,
        location.domain,
        location.repo_type,
        location.query,
        _authority(location),
        # All that is done in a repository is done at one revision of it.
        location.version if location.scheme == "hf" else None,
    )


def _authority(location: Location) -> str | None:
    """Return the parts of a URL that may hold credentials: who is asked, and for HTTP how."""
    if location.url is None:
        return None
    authority = "/".join(location.url.split("/", 3)[:3])
    return f"{authority}?{urlsplit(location.url).query}" if location.type == "http" else authority


def _writable(location: Location) -> Location:
    if location.digest is not None:
        raise InvalidInput(
            f"{location} is given with a digest, which says what is expected of a source; "
            "nothing is written or deleted by its digest; leave it out"
        )
    if location.version is not None and location.scheme != "hf":
        raise InvalidInput(f"{location} names one version of an object; versions are never written")
    return location


def _holds_anything(backend: Backend, prefix: str) -> bool:
    return next(iter(backend.list(prefix)), None) is not None


def _describe(info: ObjectInfo) -> dict[str, Any]:
    return {
        "size": info.size,
        "modified_time": info.modified,
        "etag": info.etag,
        "version": info.version,
        "content_type": info.content_type,
        "digests": {digest.algorithm: digest.hex for digest in info.digests},
        "metadata": dict(info.metadata),
    }
