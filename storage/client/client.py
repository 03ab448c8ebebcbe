"""`StorageClient`: the one place where configs, backends, transfers and the cache meet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast, overload

from storage.awaitable import awaitable
from storage.client.arguments import local_path, writable
from storage.client.base import ClientBase
from storage.client.download import Download, DownloadOptions, Link
from storage.client.offline import Offline
from storage.config.freshness import Freshness
from storage.digest import Digest
from storage.errors import InvalidInput, UnsupportedOperation
from storage.transfer import events
from storage.transfer.plan import Patterns, Plan, make_plan, resolve
from storage.transfer.progress import ProgressCallback
from storage.uri import parse_uri

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.backends.base import ObjectInfo
    from storage.client.asynchronous import AsyncOpening
    from storage.client.lockfile import LockFile
    from storage.client.mirror import MirrorResult
    from storage.client.prefetch import PrefetchResult
    from storage.client.repair import Fetch, Repair
    from storage.client.signatures import RequireSignature

__all__ = ["StorageClient"]

T = TypeVar("T")
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
PatternArgument = str | Iterable[str] | None


class StorageClient(ClientBase):
    """Moves models between stores and this machine, with one set of limits and settings.

    The facades :class:`storage.Storage` and :class:`storage.StorageOperations` use one that is
    made from the environment. Make your own for other settings, a config for all calls, or
    limits that are not shared with the rest of the program. Safe for many threads; a forked
    child opens its own connections.
    """

    # -- downloads ---------------------------------------------------------------------------

    def download(
        self,
        uri: Source,
        dest: str | os.PathLike[str] | None = None,
        *,
        config: Any = None,
        allow_patterns: PatternArgument = None,
        ignore_patterns: PatternArgument = None,
        digest: str | Digest | None = None,
        unpack: bool = False,
        offline: Offline = None,
        freshness: Freshness | None = None,
        cache: bool | None = None,
        link: Link | None = None,
        durable: bool | None = None,
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
        require_signature: RequireSignature = None,
    ) -> str:
        """Bring an object or a tree here, verified, and return its local path.

        See :meth:`storage.Storage.download`, which this is.
        """
        if isinstance(uri, (list, tuple)):
            from storage.client.sources import download_first

            return download_first(
                self,
                uri,
                dest,
                config=config,
                digest=digest,
                offline=offline,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                unpack=unpack,
                freshness=freshness,
                cache=cache,
                link=link,
                durable=durable,
                overwrite=overwrite,
                progress=progress,
                require_signature=require_signature,
            )
        options = DownloadOptions(
            config=config,
            patterns=Patterns(allow_patterns, ignore_patterns),
            digest=None if digest is None else Digest.parse(digest),
            unpack=unpack,
            offline=offline,
            freshness=freshness,
            cache=cache,
            link=link,
            durable=durable,
            overwrite=overwrite,
            progress=progress,
            require_signature=require_signature,
        )
        location = parse_uri(cast("str | os.PathLike[str]", uri))
        return Download(self, location, options).run(None if dest is None else local_path(dest))

    adownload = awaitable(download)

    def download_many(
        self,
        uris: Sequence[Source],
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
        from storage.client.parallel import map_parallel

        # The sources share the connections of the client; only the threads are bounded here.
        pairs = list(zip(uris, places, strict=True))
        return map_parallel(lambda pair: self.download(*pair, **options), pairs)

    adownload_many = awaitable(download_many)

    def lock(
        self,
        uris: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        config: Any = None,
        allow_patterns: PatternArgument = None,
        ignore_patterns: PatternArgument = None,
        progress: ProgressCallback | None = None,
    ) -> LockFile:
        """Write down what sources are now; see :meth:`storage.Storage.lock`."""
        from storage.client.locked import make_lock

        several = [uris] if isinstance(uris, (str, os.PathLike)) else list(uris)
        patterns = Patterns(allow_patterns, ignore_patterns)
        return make_lock(self, several, config, patterns, progress)

    alock = awaitable(lock)

    @overload
    def download_locked(
        self,
        lock: LockFile | str | os.PathLike[str],
        uri: str | os.PathLike[str],
        dest: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> str: ...

    @overload
    def download_locked(
        self,
        lock: LockFile | str | os.PathLike[str],
        uri: None = None,
        dest: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> list[str]: ...

    def download_locked(
        self,
        lock: LockFile | str | os.PathLike[str],
        uri: str | os.PathLike[str] | None = None,
        dest: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Download exactly what was locked; see :meth:`storage.Storage.download_locked`."""
        from storage.client.locked import download_locked

        return download_locked(self, lock, uri, dest, options)

    adownload_locked = awaitable(download_locked)

    def prefetch(
        self,
        file: str | os.PathLike[str],
        *,
        config: Any = None,
        pin: bool = False,
        jobs: int = 4,
        require_signature: RequireSignature = None,
    ) -> list[PrefetchResult]:
        """Fill the cache with all that a file names, safe from a power cut.

        Args:
            file: a lock file, or text with one source a line; several sources of one model
                are separated by spaces, and lines that begin with ``#`` are comments.
            config: for those sources whose type it fits.
            pin: never evict them.
            jobs: models fetched at once.
            require_signature: as for a download.

        Returns:
            What became of each entry, in order; a failure does not keep others from coming.

        Raises:
            ConfigurationError: the file cannot be read, or a line or an entry is unusable.
        """
        from storage.client.prefetch import prefetch

        return prefetch(self, file, config, pin, jobs, require_signature)

    aprefetch = awaitable(prefetch)

    def repair(
        self,
        *,
        full: bool = False,
        config: Any = None,
        progress: ProgressCallback | None = None,
        fetch: Fetch | None = None,
    ) -> list[Repair]:
        """Verify the cache, and fetch again what is damaged or missing from where it came from.

        Args:
            full: hash every blob; else only those that are in doubt.
            config: for those sources whose type it fits.
            progress: called while bytes move.
            fetch: downloads a source again; ``storage.registry.fetch_again`` also knows what
                was pulled from a registry.

        Returns:
            What became of each model that was not in order; none if all are.

        Raises:
            ConfigurationError: what is there is another kind of cache.
        """
        from storage.client.repair import repair

        return repair(self, full=full, config=config, progress=progress, fetch=fetch)

    arepair = awaitable(repair)

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
        backend = self.backend(location, config)
        return self.run_retried(make_plan, backend, location, patterns, where=str(location))

    aplan_download = awaitable(plan_download)

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
        location = writable(parse_uri(uri))
        patterns = Patterns(allow_patterns, ignore_patterns)
        with events.transfer("upload", str(location)):
            # Here and below: a process that finds its model in the cache should not import what
            # only the others need.
            from storage.client.uploading import upload

            upload(self, os.fspath(src), location, config, overwrite, patterns, progress)
        return True

    aupload = awaitable(upload)

    # -- objects -----------------------------------------------------------------------------

    def list_objects(self, uri: str | os.PathLike[str], *, config: Any = None) -> list[str]:
        """List what is below a URI; see :meth:`storage.StorageOperations.list_objects`."""
        return [path for path, _ in self.list_infos(uri, config=config)]

    alist_objects = awaitable(list_objects)

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

        return self.run_retried(collect, where=str(location))

    alist_infos = awaitable(list_infos)

    def get_object_metadata(
        self, uri: str | os.PathLike[str], *, config: Any = None
    ) -> dict[str, Any]:
        """Describe an object or a tree; see :meth:`storage.StorageOperations`."""
        location = parse_uri(uri)
        where = str(location)
        is_tree, found = self.run_retried(self.resolve_all, location, config, where=where)
        from storage.client.objects import describe

        return describe(location, is_tree, found)

    aget_object_metadata = awaitable(get_object_metadata)

    def delete_object(
        self, uri: str | os.PathLike[str], *, config: Any = None, recursive: bool = False
    ) -> bool:
        """Delete an object or a tree; see :meth:`storage.StorageOperations.delete_object`."""
        location = writable(parse_uri(uri))
        where = str(location)
        is_tree, found = self.run_retried(self.resolve_all, location, config, where=where)
        if is_tree and not recursive:
            raise InvalidInput(
                f"{location} is a tree of {len(found)} objects; "
                "pass recursive=True (storage rm -r) to delete them all"
            )
        backend = self.backend(location, config)
        if not backend.capabilities.delete:
            raise UnsupportedOperation(f"{location}: {backend.name} cannot delete")
        self.run_retried(backend.delete, [info.key for info in found], where=where)
        return True

    adelete_object = awaitable(delete_object)

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
        source, target = parse_uri(src_uri), writable(parse_uri(dest_uri))
        # "local" is what the generic driver calls this machine.
        here = target.is_local or target.scheme == "local"
        if here and self.signature_policy is not None:
            raise UnsupportedOperation(
                f"{source} would be copied to this machine without its signature being verified, "
                "which this client requires; download it"
            )
        if dest_config is None and source.type == target.type:
            dest_config = config
        from storage.client.copy import Copy

        with events.transfer("copy", str(source)):
            Copy(self, source, target, config, dest_config, progress).run()
        return True

    acopy_object = awaitable(copy_object)

    def mirror(
        self, src_uri: str | os.PathLike[str], dest_uri: str | os.PathLike[str], **options: Any
    ) -> MirrorResult:
        """Mirror a tree, by any executor; see :meth:`storage.StorageOperations.mirror`."""
        from storage.client.mirror import MirrorOptions, mirror

        return mirror(self, src_uri, dest_uri, MirrorOptions(**options))

    amirror = awaitable(mirror)

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
        if mode == "rb" and self.signature_policy is not None:
            return open(self._download_object(uri, config=config), "rb")
        if mode == "rb":
            where = str(location)
            info = self.run_retried(backend.stat, location.key, location.version, where=where)
            from storage.transfer.reader import open_reader

            return open_reader(backend, info, retry, where)
        if mode in ("wb", "xb"):
            writable(location)
            from storage.transfer.writer import open_writer

            return open_writer(backend, location.key, retry, str(location), if_absent=mode == "xb")
        raise InvalidInput(f"the mode is {mode!r}; expected 'rb', 'wb' or 'xb'")

    def aopen(
        self, uri: str | os.PathLike[str], mode: str = "rb", *, config: Any = None
    ) -> AsyncOpening:
        """Open an object as a file for coroutines; see :meth:`storage.Storage.aopen`."""
        from storage.client.asynchronous import AsyncOpening

        return AsyncOpening(lambda: self, uri, mode, config)

    def _download_object(self, uri: str | os.PathLike[str], *, config: Any = None) -> str:
        """Download as :meth:`download` does; a tree is refused before its first byte."""
        options = DownloadOptions(config=config, single=True)
        return Download(self, parse_uri(uri), options).run(None)

    def filesystem(self, uri: str | os.PathLike[str], *, config: Any = None) -> AbstractFileSystem:
        """Return an fsspec file system; see :meth:`storage.Storage.filesystem`."""
        if self.signature_policy is not None:
            raise UnsupportedOperation(
                f"{parse_uri(uri)}: a file system reads what was not verified, and this client "
                "requires signatures; download it, or use a client without require_signature"
            )
        return self.backend(parse_uri(uri), config).filesystem()[0]

    afilesystem = awaitable(filesystem)
