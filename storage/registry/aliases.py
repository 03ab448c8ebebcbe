"""Aliases: names for versions that move, each a log of what it was set to."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from storage.errors import ModelMissingError, ObjectChangedError
from storage.registry import layout
from storage.registry.documents import decode, now, read_fields, read_time, write_time
from storage.registry.log import Log, heads
from storage.registry.objects import ObjectStore

__all__ = ["ANY", "AliasEntry", "Expected", "history", "set_alias", "targets", "version_of"]


class _Any(enum.Enum):
    ANY = "any"


ANY: Final = _Any.ANY
"""Whatever an alias was set to before."""

Expected = int | None | _Any
"""The version that an alias has to be set to before it is changed; ``None``: it is not set."""


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """One version that an alias was set to."""

    index: int
    """From 1, for each alias."""

    version: int | None
    """Number of the version; ``None`` if the alias was deleted."""

    at: datetime
    """By the clock of who set it, in UTC."""


def _entry(index: int, document: Mapping[str, Any], where: str) -> AliasEntry:
    fields = read_fields(document, where, version=(int, type(None)), at=str)
    return AliasEntry(index, fields["version"], read_time(fields["at"], where))


def history(store: ObjectStore, model: str, alias: str) -> list[AliasEntry]:
    """Return all that an alias was set to, the newest first; the first one is in force."""
    prefix = layout.alias(model, alias)
    where = store.where(prefix)
    return [_entry(*entry, where) for entry in Log(store, prefix).entries()]


def version_of(store: ObjectStore, model: str, alias: str) -> int | None:
    """Return the number of the version that an alias is set to; ``None`` if it is not set."""
    head = _head(store, model, alias)
    return None if head is None else head.version


def _head(store: ObjectStore, model: str, alias: str) -> AliasEntry | None:
    prefix = layout.alias(model, alias)
    head = Log(store, prefix).head()
    return None if head is None else _entry(*head, store.where(prefix))


def targets(store: ObjectStore, model: str) -> dict[str, int]:
    """Return the numbers of the versions that the aliases of a model are set to, by alias."""
    newest = heads(store.names(layout.aliases(model)))

    def look(prefix: str) -> tuple[str, int | None]:
        alias = prefix.rstrip("/").rpartition("/")[2]
        name = newest[prefix]
        data = store.read(name)
        if data is None:
            return alias, None
        where = store.where(name)
        return alias, _entry(0, decode(data, where), where).version

    found = store.map(look, sorted(newest))
    return {alias: version for alias, version in found if version is not None}


def set_alias(
    store: ObjectStore, model: str, alias: str, version: int | None, expected: Expected = ANY
) -> None:
    """Set an alias to a version that is there, or delete it.

    Args:
        store: the registry's.
        model: of the alias.
        alias: its name.
        version: number of the version; ``None`` to delete the alias.
        expected: what it has to be set to before.

    Raises:
        ObjectChangedError: it is set to something else than ``expected``.
        ModelMissingError: somebody deletes the version; the alias is as it was, or not set if
            what it was is deleted, too.
    """
    log = Log(store, layout.alias(model, alias))
    while True:
        head = _head(store, model, alias)
        index, before = (0, None) if head is None else (head.index, head.version)
        if expected is not ANY and expected != before:
            raise ObjectChangedError(
                f"{store.location}: the alias {alias!r} of {model!r} is {_shown(before)}, and was "
                f"expected to be {_shown(expected)}; nothing was changed; decide anew"
            )
        if before == version:
            return
        try:
            index = log.append(_document(version), index)
            break
        except ObjectChangedError:
            continue  # look at what it is now
    # Whoever deletes a version says so and looks at the aliases afterwards; here, the alias is set
    # first. So one of the two sees the other.
    if version is not None and _goes(store, model, version):
        # If this is too late, somebody has set it to something else already.
        with contextlib.suppress(ObjectChangedError):
            index = log.append(_document(before), index)
            if before is not None and _goes(store, model, before):
                log.append(_document(None), index)
        raise ModelMissingError(
            store.where(layout.version(model, version)),
            f"{store.location}: version {version} of {model!r} is being deleted; the alias "
            f"{alias!r} was not set to it; choose another version",
        )


def _goes(store: ObjectStore, model: str, version: int) -> bool:
    if store.holds_any(layout.deleting(model, version)):
        return True
    return store.info(layout.deleted(model, version)) is not None


def _document(version: int | None) -> dict[str, Any]:
    return {"version": version, "at": write_time(now())}


def _shown(version: object) -> str:
    return "not set" if version is None else f"set to version {version}"
