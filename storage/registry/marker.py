"""The object that says that there is a registry, and of which format."""

from __future__ import annotations

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
    try:
        return store.holds_any("")
    except BucketMissingError:
        return False  # the write tells whether that is true


def create_marker(store: ObjectStore, name: str, data: bytes) -> None:
    """Create an object, and then try it again: some stores ignore the condition, and say nothing.

    Raises:
        UnsupportedOperation: the store does so; the object is removed.
    """
    if not store.create(name, data):
        return
    try:
        store.create_once(name, data)
    except ObjectExistsError:
        return
    store.delete([name])
    raise UnsupportedOperation(
        f"{store.location}: {store.backend.name} overwrites an object that was to be created only "
        "if it is absent, so writers would overwrite what others wrote; keep the registry on "
        "another store"
    )
