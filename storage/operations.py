"""The static facade `StorageOperations`, over the same client as `Storage`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from storage.awaitable import awaitable_function
from storage.facade import StorageURI, default_client

if TYPE_CHECKING:
    from storage.facade import StorageConfig
    from storage.transfer.progress import ProgressCallback

__all__ = ["ObjectList", "StorageMetadata", "StorageOperations"]

StorageMetadata = dict[str, Any]
"""What :meth:`StorageOperations.get_object_metadata` returns."""

ObjectList = list[str]
"""What :meth:`StorageOperations.list_objects` returns."""


class StorageOperations:
    """Single objects of a store: list, describe, delete, copy."""

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
