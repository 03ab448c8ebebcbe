"""In what two versions differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.registry.documents import Version, VersionFile

__all__ = ["VersionDiff", "diff"]


@dataclass(frozen=True, slots=True)
class VersionDiff:
    """What has to be done to one version to get another."""

    old: Version
    new: Version

    added: tuple[VersionFile, ...]
    removed: tuple[VersionFile, ...]

    changed: tuple[tuple[VersionFile, VersionFile], ...]
    """Files of the same path and another content, old and new."""

    unchanged: tuple[VersionFile, ...]

    attributes: Mapping[str, tuple[Any, Any]]
    """Old and new of what is said of them, by its name: ``description``, ``parent``, and each
    key as ``tags.stage`` or ``metrics.accuracy``; ``None`` for what is not there."""

    @property
    def fetched(self) -> int:
        """Bytes that somebody who has the old version does not have of the new one."""
        here = {file.blake3 for file in self.old.files}
        return sum(
            {file.blake3: file.size for file in self.new.files if file.blake3 not in here}.values()
        )


def diff(old: Version, new: Version) -> VersionDiff:
    """Compare two versions, of one model or of two."""
    before = {file.path: file for file in old.files}
    after = {file.path: file for file in new.files}
    same = [path for path in before if path in after and before[path].blake3 == after[path].blake3]
    other = [path for path in before if path in after and before[path].blake3 != after[path].blake3]
    said = _flat(old), _flat(new)
    return VersionDiff(
        old,
        new,
        tuple(file for file in new.files if file.path not in before),
        tuple(file for file in old.files if file.path not in after),
        tuple((before[path], after[path]) for path in other),
        tuple(after[path] for path in same),
        {
            name: (said[0].get(name), said[1].get(name))
            for name in sorted(said[0].keys() | said[1].keys())
            if said[0].get(name) != said[1].get(name)
        },
    )


def _flat(version: Version) -> dict[str, Any]:
    flat: dict[str, Any] = {"parent": version.parent}
    for name, value in version.attributes.document().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": below for key, below in value.items()}
        else:
            flat[name] = value
    return flat
