"""What is said of a version and may change: description, tags, configuration, metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from storage.errors import InvalidInput, ModelMissingError, ObjectChangedError, one_line
from storage.registry import layout
from storage.registry.documents import Attributes, Version, decode, encode, now, write_time
from storage.registry.log import Log, heads
from storage.registry.objects import ObjectStore

__all__ = ["Tags", "change", "changed", "current", "make_attributes"]

T = TypeVar("T")

Tags = Mapping[str, str | None] | Iterable[str]
"""Tags by name; names alone have an empty value. ``None`` as value takes a tag away."""


def make_attributes(
    description: str = "",
    tags: Tags = (),
    configuration: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Attributes:
    """Return what is said of a new version.

    Raises:
        InvalidInput: it is nothing that a registry can write down.
    """
    return _checked(
        Attributes(description, _by_name(tags), dict(configuration or {}), dict(metrics or {}))
    )


def changed(
    old: Attributes,
    description: str | None = None,
    tags: Tags | None = None,
    configuration: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | None] | None = None,
) -> Attributes:
    """Return ``old`` with what is given instead: each key by itself; ``None`` takes one away.

    Raises:
        InvalidInput: it is nothing that a registry can write down.
    """
    new = Attributes(
        old.description if description is None else description,
        _merged(old.tags, None if tags is None else _by_name(tags)),
        _merged(old.configuration, configuration),
        _merged(old.metrics, metrics),
    )
    return _checked(new)


def _by_name(tags: Tags) -> dict[str, Any]:
    if isinstance(tags, str):
        raise InvalidInput(f"tags are a mapping or a list of names, not the text {tags!r}")
    return dict(tags) if isinstance(tags, Mapping) else dict.fromkeys(tags, "")


def _merged(old: Mapping[str, T], new: Mapping[str, T | None] | None) -> dict[str, T]:
    new = new or {}
    kept = {name: value for name, value in old.items() if name not in new}
    return kept | {name: value for name, value in new.items() if value is not None}


def _checked(attributes: Attributes) -> Attributes:
    """Return what is written down and read again: a copy in which tuples are lists."""
    if not isinstance(attributes.description, str):
        raise InvalidInput(f"a description is text, not {attributes.description!r}")
    for name, value in attributes.tags.items():
        if not isinstance(value, str) or not name:
            raise InvalidInput(
                f"a tag has a name and a text, unlike {one_line(repr((name, value)))}"
            )
    for name, number in attributes.metrics.items():
        plain = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not plain or not _is_finite(number):
            raise InvalidInput(f"the metric {name!r} is {one_line(repr(number))}, no finite number")
    try:
        _check_keys(attributes.document(), "attributes")
    except RecursionError as exc:
        raise InvalidInput(
            "the configuration holds itself, or lists and dicts too deep in one another"
        ) from exc
    return Attributes.parse(decode(encode(attributes.document()), "attributes"), "attributes")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # of an int that no float can hold
        return False


def _check_keys(value: Any, where: str) -> None:
    # JSON's own writer turns numbers, booleans and None into text.
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str):
                raise InvalidInput(f"{one_line(where)} has the key {key!r}; keys are text")
            _check_keys(below, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for below in value:
            _check_keys(below, where)


def change(store: ObjectStore, version: Version, **changes: Any) -> Version:
    """Say something else of a version; see :func:`changed`.

    What others change meanwhile stays, but for the keys that are named here.

    Args:
        store: the registry's.
        version: as it was published.
        changes: arguments of :func:`changed`.

    Raises:
        InvalidInput: it is nothing that a registry can write down.
        ModelMissingError: it was deleted meanwhile.
    """
    log = Log(store, layout.attributes(version.model, version.number))
    while True:
        index, old = _head(store, version)
        new = changed(old, **changes)
        if new != old:
            try:
                log.append({**new.document(), "at": write_time(now())}, index)
            except ObjectChangedError:
                continue  # somebody else's change is in force
        # Then the log may be gone, and what was added to what was said at first.
        if store.info(layout.deleted(version.model, version.number)) is not None:
            raise ModelMissingError(
                store.where(layout.version(version.model, version.number)),
                f"{store.location}: version {version.number} of {version.model!r} was deleted "
                "meanwhile; `storage registry ls` lists those that are there",
            )
        return replace(version, attributes=new)


def current(store: ObjectStore, versions: list[Version]) -> list[Version]:
    """Return versions of one model with what is said of them now, unless they are deleted."""
    if not versions:
        return []
    if len(versions) == 1:
        return [replace(versions[0], attributes=_head(store, versions[0])[1])]
    model = versions[0].model
    newest = heads(store.names(layout.attribute_logs(model)))

    def look(version: Version) -> Version:
        name = newest.get(layout.attributes(model, version.number))
        data = None if name is None else store.read(name)
        if name is None or data is None:
            return version
        where = store.where(name)
        return replace(version, attributes=Attributes.parse(decode(data, where), where))

    return store.map(look, versions)


def _head(store: ObjectStore, version: Version) -> tuple[int, Attributes]:
    """Return the number of the newest change, 0 if there is none, and what is said since then."""
    prefix = layout.attributes(version.model, version.number)
    head = Log(store, prefix).head()
    if head is None:
        return 0, version.attributes
    index, document = head
    return index, Attributes.parse(document, store.where(layout.entry(prefix, index)))
