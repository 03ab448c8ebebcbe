"""What a caller is told of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from storage.uri import Location

if TYPE_CHECKING:
    from storage.backends.base import ObjectInfo

__all__ = ["describe"]


def describe(location: Location, is_tree: bool, found: Sequence[ObjectInfo]) -> dict[str, Any]:
    """Describe an object or a tree; see :meth:`storage.StorageOperations.get_object_metadata`.

    Args:
        location: what was asked for.
        is_tree: whether it is a tree.
        found: the object, or all objects of the tree.
    """
    if not is_tree:
        return {"uri": str(location), "type": "object"} | _describe_object(found[0])
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


def _describe_object(info: ObjectInfo) -> dict[str, Any]:
    return {
        "size": info.size,
        "modified_time": info.modified,
        "etag": info.etag,
        "version": info.version,
        "content_type": info.content_type,
        "digests": {digest.algorithm: digest.hex for digest in info.digests},
        "metadata": dict(info.metadata),
    }
