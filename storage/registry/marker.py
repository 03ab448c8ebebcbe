"""The object that says that there is a registry, and of which format."""

from __future__ import annotations

import contextlib
import uuid

from storage.errors import (
    BucketMissingError,
    InvalidInput,
    ObjectExistsError,
    UnsupportedOperation,
)
from storage.registry import layout
from storage.registry.documents import decode, encode
from storage.registry.objects import ObjectStore

__all__ = ["create_marker", "is_there", "make"]

_DIGEST = "blake3"
_LOOKED_AT = 100


def is_there(store: ObjectStore) -> bool:
    """Tell whether there is a registry that this release knows.

    Raises:
        IntegrityError: what is there is damaged.
        UnsupportedOperation: it is of a format that this release does not know.
    """
    try:
        data = store.read(layout.MARKER)
    except BucketMissingError:
        return False
    if data is None:
        return False
    where = store.where(layout.MARKER)
    digest = decode(data, where).get("digest")
    if digest != _DIGEST:
        raise UnsupportedOperation(
            f"{where}: content is addressed by {digest!r}, and this release knows {_DIGEST}; "
            "upgrade modelstorage"
        )
    return True


def make(store: ObjectStore) -> None:
    """Make a registry, unless there is one.

    Raises:
        UnsupportedOperation: the store cannot hold one: two writers could not be told apart.
        InvalidInput: something else is there.
    """
    store.check()
    if is_there(store):
        return
    if _holds_something(store) and not is_there(store):
        raise InvalidInput(
            f"{store.location} holds something that is no registry; name an empty folder"
        )
    create_marker(store, layout.MARKER, encode({"digest": _DIGEST}))
    is_there(store)


def _holds_something(store: ObjectStore) -> bool:
    """Tell whether there is more than what others try the store out with."""
    try:
        found = store.first_infos("", _LOOKED_AT)
    except BucketMissingError:
        return False  # the write tells whether that is true
    return not all(name.startswith(layout.probe(layout.MARKER)) for name, _ in found)


def create_marker(store: ObjectStore, name: str, data: bytes) -> None:
    """Create an object that says what a place is for, unless there is one.

    Some stores ignore the condition that an object is absent, and say nothing. So that is tried
    out before, on an object that nobody else writes: a marker is on no store that does so.

    Raises:
        UnsupportedOperation: the store does so; nothing is left there.
    """
    with contextlib.suppress(BucketMissingError):  # the write tells whether that is true
        if store.info(name) is not None:
            return
    probe = layout.probe(name, uuid.uuid4().hex)
    store.create(probe, data)
    try:
        store.create_once(probe, data)
        is_fit = False
    except ObjectExistsError:
        is_fit = True
    finally:
        store.delete([probe])
    if not is_fit:
        raise UnsupportedOperation(
            f"{store.location}: {store.backend.name} overwrites an object that was to be created "
            "only if it is absent, so writers would overwrite what others wrote; keep the registry "
            "on another store"
        )
    store.create(name, data)
