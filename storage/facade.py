"""The static facade `Storage` over one default client; `StorageOperations` is beside it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, overload

from storage.awaitable import awaitable_function
from storage.uri import parse_uri

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.client import StorageClient
    from storage.client.asynchronous import AsyncOpening
    from storage.client.lockfile import LockFile
    from storage.client.signatures import RequireSignature
    from storage.config import (
        AzureConfig,
        FsspecConfig,
        GCSConfig,
        GitConfig,
        HFConfig,
        HTTPConfig,
        ModelScopeConfig,
        OCIConfig,
        PVCConfig,
        S3Config,
    )
    from storage.config.freshness import Freshness
    from storage.digest import Digest
    from storage.transfer.progress import ProgressCallback

    StorageConfig = (
        S3Config
        | GCSConfig
        | AzureConfig
        | HFConfig
        | HTTPConfig
        | GitConfig
        | ModelScopeConfig
        | OCIConfig
        | PVCConfig
        | FsspecConfig
    )

__all__ = [
    "AUTHENTICATION_METHODS",
    "LocalPath",
    "Storage",
    "StorageConfig",
    "StorageURI",
    "default_client",
]

StorageURI = str
"""A URI of section "URIs" in the documentation, or a plain path."""

LocalPath = str
"""A path on this machine."""

AUTHENTICATION_METHODS: dict[str, list[str]] = {
    "s3": ["access_key", "iam_role", "instance_profile"],
    "gs": ["service_account", "default_credentials", "workload_identity"],
    "azure": ["account_key", "sas_token", "managed_identity"],
    "hf": ["access_token", "login"],
}
"""How one may authenticate, by type of store."""

_lock = threading.Lock()
_client: StorageClient | None = None


def default_client() -> StorageClient:
    """Return the client behind the facades, made from the environment on first use."""
    global _client
    if _client is None:
        from storage.client import StorageClient

        with _lock:
            if _client is None:
                _client = StorageClient()
    return _client


def _after_fork() -> None:
    # The thread that held it does not exist in the child.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def __getattr__(name: str) -> Any:
    # The union of all configs; building it imports them, which nobody needs at run time.
    if name == "StorageConfig":
        from storage.config import StorageConfig

        return StorageConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Storage:
    """Models to and from this machine.

    Every method takes ``config``: a typed config (``S3Config`` and its siblings) or a dict of
    its fields. Without one, the settings file, KServe's ``STORAGE_CONFIG`` and the store's own
    environment variables and profiles apply, in this order.
    """

    @staticmethod
    def download(
        uri: StorageURI | os.PathLike[str] | Sequence[StorageURI | os.PathLike[str]],
        dest: LocalPath | os.PathLike[str] | None = None,
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        digest: str | Digest | None = None,
        unpack: bool = False,
        offline: bool | Literal["auto"] | None = None,
        freshness: Freshness | None = None,
        cache: bool | None = None,
        link: Literal["hardlink", "symlink"] | None = None,
        durable: bool | None = None,
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
        require_signature: RequireSignature = None,
    ) -> LocalPath:
        """Bring an object or a tree to this machine, verified, and return its path.

        The exact key is one object; else everything under ``key/`` is a tree. A trailing slash
        means a tree. What appears at the returned path is whole: a failed or killed download
        leaves nothing there.

        Args:
            uri: what to download; or several sources of the same model, best first. The next
                one is asked when one fails, unless the call itself or this machine is at fault.
            dest: for an object its path, or an existing folder (or a path that ends in ``/``)
                to put it into; for a tree its own path, whether it exists or not. ``None``
                keeps it in the cache; what is on this machine already stays where it is.
            config: credentials and options of the store; of several sources, for those whose
                type it fits.
            allow_patterns: ``fnmatch`` patterns of relative paths; the rest is left out.
            ignore_patterns: patterns of what is left out.
            digest: expected digest, ``sha256:…`` or ``blake3:…``; of a tree as
                :func:`storage.tree_digest` defines it. The same for several sources. If the
                cache has what the source was, and it is that, no store is asked.
            unpack: extract the one archive (tar, tar.gz, zip, …) that ``uri`` is.
            offline: ``True`` uses the cache alone, ``"auto"`` falls back to it when the store
                cannot be reached; of several sources, when none of them gives the model.
                Default from the settings.
            freshness: how old a cached copy may be: ``"revalidate"`` asks the store each time,
                by one request where nothing changed; ``"cache-first"`` never; ``"max-age=60"``
                or ``60`` only after so many seconds. Default from the settings.
            cache: keep a copy in the cache although there is a ``dest``. What is cached is
                used in any case.
            link: make cached files at ``dest`` ``"hardlink"`` or ``"symlink"`` instead of
                copies; whoever then writes to one of them damages the cache. What symbolic
                links lead to stays until this process ends, and longer if it is pinned.
            durable: force everything to disk before it counts as done. Default from the
                settings.
            overwrite: let a tree replace a folder that this library did not put there.
            progress: called with :class:`storage.Progress` while it runs.
            require_signature: a :class:`storage.SignaturePolicy`: who has to have signed it.
                Nothing is handed over before that is verified, and of an archive to be
                unpacked nothing is unpacked. ``False`` needs no signature. Default from the
                settings.

        Returns:
            The path of the file, or of the tree's folder.

        Raises:
            ModelMissingError: nothing is there.
            AuthenticationError: the store refuses access.
            IntegrityError: the bytes are not the expected ones.
            SignatureError: it is not signed, by somebody else, or only in part.
            OfflineError: nobody may be asked, and it is not cached, or not all of it.
            TransferError: retries are spent (``UnreachableError``: nobody answers).
            DestinationError: ``dest`` cannot be written (``InsufficientSpaceError``: no room).
            StorageError: base of them all. If several sources failed, the message names each;
                the type is the one that their errors share, else ``TransferError``.
        """
        return default_client().download(
            uri,
            dest,
            config=config,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            digest=digest,
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

    adownload = staticmethod(awaitable_function(download))

    @staticmethod
    def download_many(
        uris: Sequence[StorageURI | os.PathLike[str] | Sequence[StorageURI | os.PathLike[str]]],
        dests: Sequence[LocalPath | os.PathLike[str] | None] | None = None,
        **options: Any,
    ) -> list[LocalPath]:
        """Download several models at once and return their paths in the same order.

        Args:
            uris: what to download; for each model its source, or a list of sources.
            dests: a destination for each, or ``None``.
            options: those of :meth:`download`, for all of them.

        Raises:
            StorageError: the first failure; what was complete by then stays.
        """
        return default_client().download_many(uris, dests, **options)

    adownload_many = staticmethod(awaitable_function(download_many))

    @staticmethod
    def lock(
        uris: StorageURI | os.PathLike[str] | Sequence[StorageURI | os.PathLike[str]],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> LockFile:
        """Write down what models are now, so that a deployment can be repeated exactly.

        Everything is downloaded into the cache and hashed. ``dumps()`` of the result is the
        text of a lock file, which :meth:`download_locked` and ``storage prefetch`` read.

        Args:
            uris: the sources. What needs a credential takes it from a config.
            config: as in :meth:`download`.
            allow_patterns: as in :meth:`download`; they become part of the lock.
            ignore_patterns: as in :meth:`download`; they become part of the lock.
            progress: as in :meth:`download`.

        Raises:
            InvalidInput: a URI holds a credential or a query, or is there twice.
            StorageError: as in :meth:`download`.
        """
        return default_client().lock(
            uris,
            config=config,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            progress=progress,
        )

    alock = staticmethod(awaitable_function(lock))

    @overload
    @staticmethod
    def download_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: StorageURI | os.PathLike[str],
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LocalPath: ...

    @overload
    @staticmethod
    def download_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: None = None,
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> list[LocalPath]: ...

    @staticmethod
    def download_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: StorageURI | os.PathLike[str] | None = None,
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LocalPath | list[LocalPath]:
        """Download what was locked, exactly: the same files with the same bytes, or nothing.

        Args:
            lock: a lock, or the path of a lock file.
            uri: which of its models; all of them if ``None``.
            dest: as in :meth:`download`; needs ``uri`` if the lock has several models.
            options: those of :meth:`download` that the lock does not fix: ``config``,
                ``offline``, ``freshness``, ``cache``, ``link``, ``durable``, ``overwrite``,
                ``progress`` and ``require_signature``.

        Returns:
            The path of the model, or a list with the paths of all.

        Raises:
            IntegrityError: a file is missing, additional or different.
            InvalidInput: ``uri`` is not in the lock.
            ConfigurationError: the lock file is unusable.
            StorageError: as in :meth:`download`.
        """
        return default_client().download_locked(lock, uri, dest, **options)

    # Of static methods with several signatures type checkers would see one only.
    @overload
    @staticmethod
    async def adownload_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: StorageURI | os.PathLike[str],
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LocalPath: ...

    @overload
    @staticmethod
    async def adownload_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: None = None,
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> list[LocalPath]: ...

    @staticmethod
    async def adownload_locked(
        lock: LockFile | LocalPath | os.PathLike[str],
        uri: StorageURI | os.PathLike[str] | None = None,
        dest: LocalPath | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LocalPath | list[LocalPath]:
        """Await what :meth:`download_locked` does, in a thread; cancelling ends it."""
        return await default_client().adownload_locked(lock, uri, dest, **options)

    @staticmethod
    def upload(
        src: LocalPath | os.PathLike[str],
        uri: StorageURI,
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        overwrite: bool = True,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> bool:
        """Store a file, or every file of a folder, and return ``True``.

        A file becomes the object ``uri``, or goes below it if ``uri`` ends in ``/``. The files
        of a folder go below ``uri``, each under its relative path; objects that are there
        under other names stay. Links are followed. Digests are kept as metadata.

        Args:
            src: a file or a folder.
            uri: where to.
            config: credentials and options of the store.
            overwrite: ``False`` fails if the object, or anything below ``uri``, exists.
            allow_patterns: as in :meth:`download`.
            ignore_patterns: as in :meth:`download`.
            progress: as in :meth:`download`.

        Raises:
            InvalidInput: there is nothing to upload, or it is neither file nor folder.
            ObjectExistsError: see ``overwrite``.
            StorageError: as in :meth:`download`.
        """
        return default_client().upload(
            src,
            uri,
            config=config,
            overwrite=overwrite,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            progress=progress,
        )

    aupload = staticmethod(awaitable_function(upload))

    @staticmethod
    def is_local(uri: StorageURI | os.PathLike[str]) -> bool:
        """Tell whether ``uri`` is on this machine: a path, ``file://`` or a mounted claim."""
        return parse_uri(uri).is_local

    @staticmethod
    def get_storage_spec(uri: StorageURI | os.PathLike[str]) -> dict[str, Any]:
        """Return what a URI says: ``type``, ``scheme``, ``bucket``, ``path`` and more.

        Raises:
            InvalidInput: it is no URI.
        """
        return parse_uri(uri).spec()

    @staticmethod
    def open(
        uri: StorageURI | os.PathLike[str],
        mode: Literal["rb", "wb", "xb"] = "rb",
        *,
        config: StorageConfig | dict[str, Any] | None = None,
    ) -> BinaryIO:
        """Open one object as a binary file.

        Reading is seekable and fetches ranges as they are needed, all of the same version.
        Writing spools to local disk; the object appears, whole, when the file is closed, and
        not at all if a ``with`` block is left by an error. ``xb`` refuses an existing object.
        Where the settings require signatures, what is read is downloaded and verified first.

        Raises:
            ModelMissingError: nothing to read is there.
            InvalidInput: another mode, or a tree.
        """
        return default_client().open(uri, mode, config=config)

    @staticmethod
    def aopen(
        uri: StorageURI | os.PathLike[str],
        mode: Literal["rb", "wb", "xb"] = "rb",
        *,
        config: StorageConfig | dict[str, Any] | None = None,
    ) -> AsyncOpening:
        """Open one object as a binary file for coroutines, as :meth:`open` does.

        ::

            async with Storage.aopen("s3://models/iris.bin") as file:
                await file.seek(-16, os.SEEK_END)
                tail = await file.read()

        Returns:
            What ``async with`` enters and ``await`` turns into the file.
        """
        from storage.client.asynchronous import AsyncOpening

        return AsyncOpening(default_client, uri, mode, config)

    @staticmethod
    def _download_object(uri: StorageURI | os.PathLike[str], *, config: Any = None) -> str:
        return default_client()._download_object(uri, config=config)

    @staticmethod
    def filesystem(
        uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
    ) -> AbstractFileSystem:
        """Return the fsspec file system of a URI's store, with the same credentials.

        Raises:
            UnsupportedOperation: the settings require signatures, which it could not verify.
        """
        return default_client().filesystem(uri, config=config)

    afilesystem = staticmethod(awaitable_function(filesystem))
