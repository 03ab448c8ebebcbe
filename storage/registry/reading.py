"""Which versions there are, and what they are.

A version is seen if there is an object under its number and no mark that it was deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from storage.backends.base import ObjectInfo
from storage.errors import IntegrityError, ModelMissingError, UnsupportedOperation, few
from storage.registry import aliases, layout
from storage.registry.attributes import current
from storage.registry.documents import Version
from storage.registry.objects import ObjectStore

__all__ = ["find", "missing_model", "models", "numbers", "read_all", "resolve"]


def models(store: ObjectStore) -> list[str]:
    """Return the names of all models that have a version, sorted."""
    names = map(layout.model_of, store.names(layout.CATALOG))
    known = [name for name in names if name is not None]
    found = zip(known, store.map(partial(_is_seen, store), known), strict=True)
    return sorted(model for model, is_seen in found if is_seen)


def _is_seen(store: ObjectStore, model: str) -> bool:
    """Tell whether a model has a version, by a look at one if that does."""
    first = store.first_infos(layout.versions(model), 1)
    if not first:
        return False
    number = layout.number_of(first[0][0])
    if number is not None and store.info(layout.deleted(model, number)) is None:
        return True
    # One that somebody is about to remove, or died over.
    return bool(_listed(store, layout.versions(model)) - _listed(store, layout.deletions(model)))


def numbers(store: ObjectStore, model: str) -> list[int]:
    """Return the numbers of all versions of a model, sorted, without a look at any version."""
    prefixes = layout.versions(model), layout.deletions(model)
    seen, gone = store.map(partial(_listed, store), prefixes)
    return sorted(seen - gone)


def _listed(store: ObjectStore, prefix: str) -> set[int]:
    found = map(layout.number_of, store.names(prefix))
    return {number for number in found if number is not None}


def read_all(store: ObjectStore, model: str, wanted: Sequence[int]) -> list[Version]:
    """Return versions with what is said of them now; those that are not there are left out."""
    found = store.map(lambda number: _load(store, model, number), wanted)
    versions = current(store, [version for version in found if version is not None])
    # Who deletes a version marks it, and then removes what is said of it.
    gone = _listed(store, layout.deletions(model))
    return [version for version in versions if version.number not in gone]


def _load(store: ObjectStore, model: str, number: int) -> Version | None:
    name = layout.version(model, number)
    data = store.read(name)
    if data is None:
        return None
    version = Version.parse(data, store.where(name))
    if (version.model, version.number) != (model, number):
        raise IntegrityError(
            f"{store.where(name)} is damaged: it is version {version.number} of {version.model!r}"
        )
    return version


def resolve(store: ObjectStore, model: str, reference: int | str) -> int:
    """Return the number that a number, an alias or ``latest`` means.

    Raises:
        ModelMissingError: there is no such alias, or no version at all.
        InvalidInput: it cannot be one.
        UnsupportedOperation: the store has no listings, by which the latest one is found.
    """
    wanted = layout.parse_reference(reference)
    if isinstance(wanted, int):
        return wanted
    if wanted == layout.LATEST:
        if not _can_list(store):
            raise UnsupportedOperation(
                f"{store.location}: {store.backend.name} has no listings, by which the latest "
                f"version of {model!r} would be found; name it by its number or an alias"
            )
        there = numbers(store, model)
        if not there:
            raise missing_model(store, model)
        return there[-1]
    number = aliases.version_of(store, model, wanted)
    if number is None:
        known = ""
        if _can_list(store):
            known = f"; it has {few(sorted(aliases.targets(store, model))) or 'none'}"
        raise ModelMissingError(
            _name(store, model, wanted),
            f"{store.location}: the model {model!r} has no alias {wanted!r}{known}",
        )
    return number


def find(store: ObjectStore, model: str, reference: int | str, *, changed: bool = False) -> Version:
    """Return a version as it was published, or with what is said of it now if ``changed``.

    Raises:
        ModelMissingError: there is no such version, alias or model.
        IntegrityError: its document is damaged.
    """
    number = resolve(store, model, reference)
    while True:
        found, is_gone = _look(store, model, number, changed)
        if found is not None and not is_gone:
            return found
        # An alias may have been set to another version before this one was deleted.
        before, number = number, resolve(store, model, reference)
        if number == before:
            break
    if _can_list(store) and not numbers(store, model):
        raise missing_model(store, model)
    named = "" if str(reference) == str(number) else f", which {reference!r} is set to,"
    state = "was deleted" if is_gone else "is not there"
    raise ModelMissingError(
        _name(store, model, number),
        f"{store.location}: version {number} of {model!r}{named} {state}; "
        "`storage registry ls` lists those that are there",
    )


def _can_list(store: ObjectStore) -> bool:
    return store.backend.capabilities.list


def _look(
    store: ObjectStore, model: str, number: int, changed: bool
) -> tuple[Version | None, bool]:
    """Return what is under a number, and whether it was deleted."""
    mark = layout.deleted(model, number)
    if changed:
        found = _load(store, model, number)
        if found is not None:
            found = current(store, [found])[0]
        # Afterwards: who deletes a version marks it, and then removes what is said of it.
        return found, store.info(mark) is not None
    looks: tuple[Callable[[], Version | ObjectInfo | None], ...] = (
        lambda: _load(store, model, number),
        lambda: store.info(mark),
    )
    version, info = store.map(lambda look: look(), looks)
    return (version if isinstance(version, Version) else None), info is not None


def missing_model(store: ObjectStore, model: str) -> ModelMissingError:
    """Return the error that a model has no version."""
    return ModelMissingError(
        _name(store, model),
        f"{store.location}: there is no version of a model {model!r}; `storage registry ls` lists "
        "what there is",
    )


def _name(store: ObjectStore, model: str, reference: int | str = "") -> str:
    return store.where(f"{layout.MODELS}{model}{f'@{reference}' if reference else ''}")
