"""What a registry writes down: JSON in UTF-8, checked field by field when it is read.

Every document holds ``"format": 1``. Fields that a reader does not know are left alone, so that
later releases can add some; what changes the meaning of others gets another format.

The first field, ``_blake3``, is the BLAKE3 of all that comes after its 64 digits, from the quote
on: one wrong byte of an alias would be another version.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from storage.digest import Digest, new_hasher
from storage.errors import IntegrityError, InvalidInput, UnsupportedOperation, one_line
from storage.registry import layout
from storage.transfer.plan import local_paths

__all__ = [
    "FORMAT",
    "LONGEST",
    "Attributes",
    "Parent",
    "Version",
    "VersionFile",
    "content_id",
    "decode",
    "encode",
    "is_whole",
    "now",
    "read_fields",
    "read_time",
    "write_time",
]

FORMAT = 1
LONGEST = 64 * 1024 * 1024
"""Bytes of a document at most: all of it is kept in memory."""

_CHECKSUM = "_blake3"
_BEGIN = f'{{"{_CHECKSUM}":"'.encode()

Parent = int | str | None
"""What a version was made from: the number of a version of the same model, or a text."""


# -- text ------------------------------------------------------------------------------------


def encode(document: Mapping[str, Any]) -> bytes:
    """Return the text of a document; the same document gives the same text.

    Raises:
        InvalidInput: it holds something that JSON cannot, or is too long.
    """
    try:
        fields = json.dumps(
            {**document, "format": FORMAT},
            allow_nan=False,
            ensure_ascii=False,
            separators=(",", ":"),
            sort_keys=True,
        ).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInput(
            f"{one_line(exc)}: a registry keeps text, finite numbers, booleans, None, and lists "
            "and dicts of them, with text as keys"
        ) from exc
    rest = b'",' + fields[1:]
    text = _BEGIN + _checksum(rest) + rest
    if len(text) > LONGEST:
        raise InvalidInput(
            f"{len(text)} bytes are too long for a document of a registry, which has {LONGEST} at "
            "most; keep what is long in a file of the model, and many files in an archive"
        )
    return text


def _checksum(rest: bytes) -> bytes:
    hasher = new_hasher("blake3")
    hasher.update(rest)
    return hasher.hexdigest().encode()


def is_whole(data: bytes) -> bool:
    """Tell whether the text of a document is as it was written."""
    at = len(_BEGIN)
    return data.startswith(_BEGIN) and data[at : at + 64] == _checksum(data[at + 64 :])


def decode(data: bytes, where: str) -> dict[str, Any]:
    """Read the text of a document.

    Args:
        data: the text.
        where: its URI, for messages.

    Raises:
        IntegrityError: it is damaged.
        UnsupportedOperation: it is of a format that this release does not know.
    """
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as exc:
        raise _damaged(where, one_line(exc)) from exc
    if not isinstance(document, dict):
        raise _damaged(where, f"expected an object, found a {type(document).__name__}")
    found = document.get("format")
    if type(found) is not int or found < 1:
        raise _damaged(where, f"its format is {one_line(repr(found), 40)}")
    if found > FORMAT:
        raise UnsupportedOperation(
            f"{where} has format {found} and this release reads formats up to {FORMAT}; "
            "upgrade modelstorage"
        )
    if not is_whole(data):
        raise _damaged(where, "its checksum is not that of its text")
    del document[_CHECKSUM]
    return document


def read_fields(document: Any, where: str, /, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """Return those fields of ``document`` that are named, each of its type.

    Raises:
        IntegrityError: one is missing or of another type.
    """
    if not isinstance(document, dict):
        raise _damaged(where, f"expected an object, found a {type(document).__name__}")
    found = {}
    for name, kind in types.items():
        if name not in document:
            raise _damaged(where, f"{name} is missing")
        value = document[name]
        # A bool is an int to Python, and no number to anyone else.
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise _damaged(where, f"{name} is {one_line(repr(value), 40)}, which it cannot be")
        found[name] = value
    return found


def now() -> datetime:
    """Return the time by this machine's clock, with a time zone, in whole milliseconds."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def write_time(moment: datetime) -> str:
    """Return a time as ISO 8601, in UTC."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_time(text: str, where: str) -> datetime:
    """Return the time that :func:`write_time` wrote.

    Raises:
        IntegrityError: it is none.
    """
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("it has no time zone")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise _damaged(where, f"{one_line(repr(text), 40)} is no time") from exc


def _damaged(where: str, reason: str) -> IntegrityError:
    return IntegrityError(f"{where} is damaged, or was not written by this library: {reason}")


# -- versions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One file of a version."""

    path: str
    """Relative, with ``/``."""

    size: int
    """Bytes."""

    blake3: str
    """Hex digest of the content."""

    sha256: str
    """Hex digest of the content."""

    blob: str
    """Which of the blobs with this content it is."""

    @property
    def name(self) -> str:
        """The name of its blob in the registry."""
        return layout.blob(self.blake3, self.blob)

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Both digests, the cheaper one first."""
        return Digest("blake3", self.blake3), Digest("sha256", self.sha256)

    @classmethod
    def parse(cls, document: Any, where: str) -> Self:
        """Read a file of a version's document.

        Raises:
            IntegrityError: it is damaged.
        """
        fields = read_fields(document, where, path=str, size=int, blake3=str, sha256=str, blob=str)
        file = cls(**fields)
        try:
            _ = file.digests
            file.path.encode()
        except (InvalidInput, UnicodeEncodeError) as exc:
            raise _damaged(where, one_line(exc)) from exc
        if file.size < 0 or layout.blob_digest(file.name) is None:
            raise _damaged(where, f"size is {file.size} and blob {one_line(repr(file.blob), 40)}")
        return file


def content_id(files: Iterable[VersionFile]) -> str:
    """Return the identity of what ``files`` are together.

    It is the BLAKE3 of a JSON list without spaces in UTF-8, which holds for each file the list of
    its path, size and BLAKE3, sorted by the bytes of the path.
    """
    listed = sorted(([file.path, file.size, file.blake3] for file in files), key=_path_bytes)
    hasher = new_hasher("blake3")
    hasher.update(json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode())
    return hasher.hexdigest()


def _path_bytes(listed: list[Any]) -> bytes:
    return os.fsencode(listed[0])


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is said of a version, and may be changed later."""

    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Names and values; a tag that is only a name has an empty one."""

    configuration: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: whatever JSON holds."""

    metrics: Mapping[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the fields of a document."""
        return {
            "description": self.description,
            "tags": dict(self.tags),
            "configuration": dict(self.configuration),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def parse(cls, document: Any, where: str) -> Self:
        """Read the fields of a document.

        Raises:
            IntegrityError: it is damaged.
        """
        fields = read_fields(
            document, where, description=str, tags=dict, configuration=dict, metrics=dict
        )
        read_fields(fields["tags"], f"{where}: tags", **dict.fromkeys(fields["tags"], str))
        numbers = dict.fromkeys(fields["metrics"], (int, float))
        read_fields(fields["metrics"], f"{where}: metrics", **numbers)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model. What it consists of never changes."""

    model: str
    number: int
    """From 1; numbers that were begun and not finished are left out."""

    content: str
    """Identity of all files together; see :func:`content_id`."""

    files: tuple[VersionFile, ...]
    """Sorted by the bytes of their paths."""

    created: datetime
    """By the clock of who published it, in UTC."""

    attributes: Attributes
    parent: Parent = None
    upload: str = ""
    """The pending version that it was."""

    is_new: bool = field(default=False, compare=False)
    """Whether the call that returned it has published it, and not somebody before."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def blobs(self) -> frozenset[str]:
        """The names of the blobs that it consists of."""
        return frozenset(file.name for file in self.files)

    def document(self) -> dict[str, Any]:
        """Return the fields of its document."""
        return {
            "model": self.model,
            "number": self.number,
            "content": self.content,
            "files": [asdict(file) for file in self.files],
            "created": write_time(self.created),
            "parent": self.parent,
            "upload": self.upload,
            **self.attributes.document(),
        }

    def dumps(self) -> bytes:
        """Return the text of its document.

        Raises:
            InvalidInput: an attribute cannot be written down.
        """
        return encode(self.document())

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read the text of a document.

        Args:
            data: the text.
            where: its URI, for messages.

        Raises:
            IntegrityError: it is damaged, or its files are not what it calls its content.
            UnsupportedOperation: it is of a format that this release does not know.
        """
        return cls.read(decode(data, where), where)

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str) -> Self:
        """Read a decoded document; see :meth:`parse`."""
        fields = read_fields(
            document,
            where,
            model=str,
            number=int,
            content=str,
            files=list,
            created=str,
            parent=(int, str, type(None)),
            upload=str,
        )
        fields["files"] = files = tuple(
            VersionFile.parse(file, f"{where}: files[{index}]")
            for index, file in enumerate(fields["files"])
        )
        fields["created"] = read_time(fields["created"], where)
        paths = [file.path for file in files]
        try:
            layout.check_model(fields["model"])
            if local_paths(paths, where) != paths:
                raise InvalidInput("a path holds an empty part or a dot")
        except InvalidInput as exc:
            raise _damaged(where, one_line(exc)) from exc
        if fields["number"] < 1 or paths != sorted(paths, key=os.fsencode):
            raise _damaged(where, "its number is below 1, or its files are not in order")
        if content_id(files) != fields["content"]:
            raise _damaged(where, "its files are not what it calls its content")
        return cls(**fields, attributes=Attributes.parse(document, where))
