"""`models.lock`: the bytes that a deployment consists of, as a value and as text.

::

    {
      "models": [
        {
          "allow": null,
          "digest": "sha256:…",
          "files": [{"path": "model.bin", "sha256": "…", "size": 1024}],
          "ignore": null,
          "type": "tree",
          "unpack": false,
          "uri": "s3://models/iris/v3/"
        }
      ],
      "version": 1
    }

``digest`` is that of the object, or of the tree as :func:`storage.tree_digest` defines it.
``allow`` and ``ignore`` are the patterns that chose the files. The order of keys, files and
spaces is fixed, so the same models give the same text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from storage.digest import Digest, tree_digest
from storage.errors import ConfigurationError, InvalidInput, one_line
from storage.transfer.plan import Patterns, local_paths
from storage.uri import Location, parse_uri

__all__ = ["LockFile", "LockedFile", "LockedModel", "lockable", "repeated"]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class LockedFile:
    """One file of a locked model."""

    path: str
    """Relative to the tree; the name of a single object."""

    size: int
    """Bytes."""

    sha256: str
    """Hex digest of the content."""


@dataclass(frozen=True, slots=True)
class LockedModel:
    """One source and the bytes that it has to give."""

    uri: str
    """Where it is; without credentials and without a digest."""

    is_tree: bool
    files: tuple[LockedFile, ...]
    """Sorted by the bytes of their paths; exactly one unless it is a tree."""

    allow: tuple[str, ...] | None = None
    """Patterns of the files that belong to it; all if ``None``."""

    ignore: tuple[str, ...] | None = None
    """Patterns of files that do not."""

    @property
    def digest(self) -> Digest:
        """SHA-256 of the object, or of the tree."""
        digests = self.digests
        return tree_digest(digests) if self.is_tree else digests[self.files[0].path]

    @property
    def digests(self) -> dict[str, Digest]:
        """SHA-256 of each file by its path."""
        return {file.path: Digest("sha256", file.sha256) for file in self.files}


@dataclass(frozen=True, slots=True)
class LockFile:
    """The models of a deployment, in the order in which they were named."""

    models: tuple[LockedModel, ...]

    @classmethod
    def parse(cls, text: str, name: str = "the lock file") -> Self:
        """Read what :meth:`dumps` wrote.

        Args:
            text: JSON.
            name: of the file, for messages.

        Raises:
            ConfigurationError: it is not exactly of that form, or contradicts itself; the
                message says which entry.
        """
        try:
            document = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"{name} is no lock file: {one_line(exc)}") from exc
        if not isinstance(document, dict) or document.get("version") != _VERSION:
            found = document.get("version") if isinstance(document, dict) else None
            raise ConfigurationError(
                f"{name}: expected version {_VERSION} of a lock file, found "
                f"{one_line(repr(found), 40)}; make it anew with `storage lock`"
            )
        entries = _fields(document, name, version=int, models=list)["models"]
        models = [
            _parse_model(entry, f"{name}: models[{index}]") for index, entry in enumerate(entries)
        ]
        twice = repeated(model.uri for model in models)
        if twice is not None:
            raise ConfigurationError(f"{name}: {twice} is there twice; keep one entry")
        return cls(tuple(models))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a lock file.

        Raises:
            ConfigurationError: it cannot be read, or as :meth:`parse` says.
        """
        name = os.fspath(path)
        try:
            # A mark at the begin, as some editors set it, is none of the text.
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
            raise ConfigurationError(f"the lock file {name} cannot be read: {why}") from exc
        return cls.parse(text, name)

    def dumps(self) -> str:
        """Return the text of the file: JSON that ends with a line break, the same every time."""
        models = [
            {
                "uri": model.uri,
                "type": "tree" if model.is_tree else "object",
                "digest": str(model.digest),
                "files": [asdict(file) for file in model.files],
                "allow": model.allow,
                "ignore": model.ignore,
                "unpack": False,
            }
            for model in self.models
        ]
        document = {"version": _VERSION, "models": models}
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    def find(self, uri: str | os.PathLike[str]) -> LockedModel:
        """Return the entry for ``uri``.

        Raises:
            InvalidInput: there is none.
        """
        wanted = str(replace(parse_uri(uri), digest=None))
        for model in self.models:
            if model.uri == wanted:
                return model
        there = ", ".join(model.uri for model in self.models) or "nothing"
        raise InvalidInput(f"{wanted} is not in the lock file; locked: {one_line(there)}")


def lockable(location: Location) -> str:
    """Return the URI of a source to write down, which holds no credential and no digest.

    Raises:
        InvalidInput: it would hold one.
    """
    plain = replace(location, digest=None)
    # What comes back different has lost something that may have been a credential.
    if parse_uri(str(plain)) != plain:
        raise InvalidInput(
            f"{location}: a lock file is no place for a query or a credential; name the source "
            "without it and give the credential by a config"
        )
    return str(plain)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"the key {twice!r} is there twice")
    return dict(pairs)


def repeated(items: Iterable[str]) -> str | None:
    """Return the first of ``items`` that was there before."""
    seen: set[str] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def _fields(entry: Any, where: str, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Return ``entry``, which has exactly the fields of ``types``."""
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{where}: expected an object, found {type(entry).__name__}")
    for name in sorted(types.keys() | entry.keys()):
        if name not in entry:
            raise ConfigurationError(f"{where}: {name} is missing")
        if name not in types:
            raise ConfigurationError(f"{where}: {one_line(repr(name), 40)} is no field of it")
        value = entry[name]
        # A bool is an int to Python, and no number to anyone else.
        if not isinstance(value, types[name]) or (
            isinstance(value, bool) and types[name] is not bool
        ):
            raise ConfigurationError(
                f"{where}: {name} is {one_line(repr(value), 40)}, which it cannot be"
            )
    return entry


def _parse_model(entry: Any, where: str) -> LockedModel:
    optional = (list, type(None))
    fields = _fields(
        entry,
        where,
        uri=str,
        type=str,
        digest=str,
        files=list,
        allow=optional,
        ignore=optional,
        unpack=bool,
    )
    is_tree = fields["type"] == "tree"
    if not is_tree and fields["type"] != "object":
        raise ConfigurationError(
            f"{where}: type is {one_line(repr(fields['type']), 40)}, not object or tree"
        )
    if fields["unpack"]:
        raise ConfigurationError(f"{where}: unpack is true; an archive is locked as it is")
    files = [
        _parse_file(file, f"{where}: files[{number}]")
        for number, file in enumerate(fields["files"])
    ]
    paths = [file.path for file in files]
    try:
        if lockable(parse_uri(fields["uri"])) != fields["uri"]:
            raise InvalidInput(f"{one_line(fields['uri'])!r} is no canonical URI")
        patterns = Patterns(fields["allow"], fields["ignore"])
        if local_paths(paths, "files") != paths:
            raise InvalidInput("files: a path holds an empty part or a dot")
        if paths != sorted(paths, key=os.fsencode):
            raise InvalidInput("files are not in order")
    except (InvalidInput, UnicodeError) as exc:
        raise ConfigurationError(f"{where}: {one_line(exc)}") from exc
    if not files or (len(files) > 1 and not is_tree):
        raise ConfigurationError(f"{where}: {len(files)} files, which {fields['type']} cannot have")
    model = LockedModel(fields["uri"], is_tree, tuple(files), patterns.allow, patterns.ignore)
    if str(model.digest) != fields["digest"]:
        raise ConfigurationError(
            f"{where}: digest is {one_line(fields['digest'], 80)}, but that of its files is "
            f"{model.digest}; make the lock anew instead of editing it"
        )
    return model


def _parse_file(entry: Any, where: str) -> LockedFile:
    fields = _fields(entry, where, path=str, size=int, sha256=str)
    try:
        digest = Digest("sha256", fields["sha256"])
    except InvalidInput as exc:
        raise ConfigurationError(f"{where}: {exc}") from exc
    if fields["size"] < 0:
        raise ConfigurationError(f"{where}: size is {fields['size']}")
    return LockedFile(fields["path"], fields["size"], digest.hex)
