"""The static facade `StorageOperations`, over the same client as `Storage`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from storage.awaitable import awaitable_function
from storage.facade import StorageURI, default_client

if TYPE_CHECKING:
    from collections.abc import Iterable

    from storage.client.mirror import MirrorResult
    from storage.client.mirror.crew import AnyExecutor
    from storage.digest import Digest
    from storage.facade import StorageConfig
    from storage.transfer.progress import ProgressCallback

__all__ = ["ObjectList", "StorageMetadata", "StorageOperations"]

StorageMetadata = dict[str, Any]
"""What :meth:`StorageOperations.get_object_metadata` returns."""

ObjectList = list[str]
"""What :meth:`StorageOperations.list_objects` returns."""


class StorageOperations:
    """Single objects of a store: list, describe, delete, copy; and mirrors of many."""

    @staticmethod
    def list_objects(
        uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
    ) -> ObjectList:
        """Return the paths of all objects below ``uri``, relative to it, sorted.

        If ``uri`` is one object, its name.

        Raises:
            ModelMissingError: nothing is there.
        """
        return default_client().list_objects(uri, config=config)

    alist_objects = staticmethod(awaitable_function(list_objects))

    @staticmethod
    def get_object_metadata(
        uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
    ) -> StorageMetadata:
        """Describe an object.

        Returns:
            ``type`` (``object`` or ``tree``), ``size`` (bytes), ``modified_time`` (datetime),
            ``etag``, ``version``, ``content_type``, ``digests`` (hex by algorithm),
            ``metadata`` (the user's) and ``uri``. Of a tree: the total ``size``, the number
            of ``objects`` and the latest ``modified_time``.

        Raises:
            ModelMissingError: nothing is there.
        """
        return default_client().get_object_metadata(uri, config=config)

    aget_object_metadata = staticmethod(awaitable_function(get_object_metadata))

    @staticmethod
    def delete_object(
        uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        recursive: bool = False,
    ) -> bool:
        """Delete an object, or with ``recursive`` a tree, and return ``True``.

        Raises:
            ModelMissingError: nothing is there.
            InvalidInput: it is a tree, and ``recursive`` is not set.
        """
        return default_client().delete_object(uri, config=config, recursive=recursive)

    adelete_object = staticmethod(awaitable_function(delete_object))

    @staticmethod
    def copy_object(
        src_uri: StorageURI | os.PathLike[str],
        dest_uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        dest_config: StorageConfig | dict[str, Any] | None = None,
        progress: ProgressCallback | None = None,
    ) -> bool:
        """Copy an object or a tree between any two stores and return ``True``.

        Within one bucket the store copies by itself; else the bytes stream through this
        machine in bounded memory and are verified.

        Args:
            src_uri: what to copy.
            dest_uri: the new object; a path that ends in ``/`` takes the source's name.
            config: of the source; of the destination too if both are of one type and
                ``dest_config`` is ``None``.
            dest_config: of the destination.
            progress: as in :meth:`Storage.download`.

        Raises:
            ModelMissingError: there is no source.
            UnsupportedOperation: the settings require signatures and ``dest_uri`` is on this
                machine.
        """
        return default_client().copy_object(
            src_uri, dest_uri, config=config, dest_config=dest_config, progress=progress
        )

    acopy_object = staticmethod(awaitable_function(copy_object))

    @staticmethod
    def mirror(
        src_uri: StorageURI | os.PathLike[str],
        dest_uri: StorageURI | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        dest_config: StorageConfig | dict[str, Any] | None = None,
        executor: AnyExecutor | None = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        digest: str | Digest | None = None,
        overwrite: bool = True,
        delete: bool = False,
        dry_run: bool = False,
        batch_size: int = 50,
        in_flight: int = 64,
        progress: ProgressCallback | None = None,
    ) -> MirrorResult:
        """Bring all objects of a tree to another place, by any executor.

        What is in place already, with the same content, is left alone. So a mirror that was
        interrupted goes on when it is called again, and a batch may be done twice: the batches
        of a worker that died are given to another one. Bytes are verified as by
        :meth:`copy_object`, and the store copies by itself where it can. See the page "Fleets".

        Args:
            src_uri: a tree, or one object.
            dest_uri: what it goes to, in any store; a single object goes into what ends in ``/``.
            config: of the source; of the destination too if both are of one type and
                ``dest_config`` is ``None``.
            dest_config: of the destination.
            executor: a ``concurrent.futures.Executor``: threads, processes,
                ``dask.distributed.Client.get_executor()``. Or a function that makes one; then
                another one is made if it breaks. Without one, the work is done by threads of
                this process.
            allow_patterns: as in :meth:`storage.Storage.download`.
            ignore_patterns: as in :meth:`storage.Storage.download`.
            digest: expected digest, of the object or of the tree. Every byte is hashed for it,
                also of what is in place already. Of one object nothing else is ever written; of
                a tree it can be told only when all of it was copied.
            overwrite: replace objects that have other content. If not, they are failures.
            delete: at last, if nothing failed, remove what the source does not have and the
                patterns do not leave out.
            dry_run: compare, write nothing, and return what would be done.
            batch_size: objects that a worker is given at once, at most; 1 GiB is enough, too.
            in_flight: batches given out at once, at most.
            progress: as in :meth:`storage.Storage.download`; with an executor, told after each
                batch.

        Returns:
            How many objects were copied, were in place, and were deleted.

        Raises:
            ModelMissingError: there is no source, or the patterns want nothing of it.
            MirrorError: some objects failed; all others are in place. It has the result, with
                the reasons. Beyond 1,000 failures the others are not tried.
            IntegrityError: the digest of the tree is not the expected one.
            InvalidInput: the places overlap, or two objects would become one file.
            UnsupportedOperation: the destination cannot be written, or not without overwriting;
                or the workers do not see what is here.
        """
        return default_client().mirror(
            src_uri,
            dest_uri,
            config=config,
            dest_config=dest_config,
            executor=executor,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            digest=digest,
            overwrite=overwrite,
            delete=delete,
            dry_run=dry_run,
            batch_size=batch_size,
            in_flight=in_flight,
            progress=progress,
        )

    amirror = staticmethod(awaitable_function(mirror))
