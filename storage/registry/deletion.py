"""Deleting versions: a version is gone when its mark is there, for ever.

The mark is written once and never removed, for those who publish and those who collect act on it.
What a killed deletion leaves behind nobody sees, and a collection removes it: so with what somebody
still says of the version meanwhile. What was said of it goes after the mark is there. So who reads
that first and looks for the mark afterwards has read all of it, unless the mark is there.

Who sets an alias writes it and looks for deletions afterwards; who deletes says so and looks at the
aliases afterwards. So nobody's alias is left on a version that was deleted meanwhile.
"""

from __future__ import annotations

import uuid

from storage.errors import InvalidInput, ModelMissingError, few
from storage.registry import layout
from storage.registry.aliases import targets
from storage.registry.documents import encode, now, write_time
from storage.registry.objects import ObjectStore

__all__ = ["delete_version"]


def delete_version(store: ObjectStore, model: str, number: int, *, force: bool = False) -> None:
    """Delete a version. Its number is not used again; its blobs are left to a collection.

    Args:
        store: the registry's.
        model: its name.
        number: of the version.
        force: whether it goes although an alias points to it, which is then good for nothing.

    Raises:
        ModelMissingError: there is no such version, or somebody else deletes it now.
        InvalidInput: an alias points to it; nothing was changed.
    """
    version, deleted = layout.version(model, number), layout.deleted(model, number)
    if store.info(version) is None or store.info(deleted) is not None:
        raise _missing(store, model, number)
    token = uuid.uuid4().hex
    intent = f"{layout.deleting(model, number)}{token}.json"
    mark = encode({"token": token, "at": write_time(now())})
    if not force:
        store.create(intent, mark)
        aliases = sorted(name for name, to in targets(store, model).items() if to == number)
        if aliases:
            store.delete([intent])
            raise InvalidInput(
                f"{store.location}: version {number} of {model!r} is {few(aliases)} and is not "
                "deleted; set the alias to another version first, or force it"
            )
    is_mine = store.create(deleted, mark)
    attributes = store.names(layout.attributes(model, number))
    store.delete([version, *attributes, intent])
    if not is_mine:
        raise _missing(store, model, number)


def _missing(store: ObjectStore, model: str, number: int) -> ModelMissingError:
    where = store.where(layout.version(model, number))
    return ModelMissingError(
        where,
        f"{store.location}: there is no version {number} of {model!r}, or it was deleted; "
        "`storage registry ls` lists those that are there",
    )
