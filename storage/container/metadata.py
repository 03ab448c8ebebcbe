"""What a container says of itself: the entry ``metadata.json`` and what may be in it.

The format is that of ``scaleoututil`` (https://pypi.org/project/scaleoututil/), version 2: a ZIP
archive with ``metadata.json`` (UTF-8, one object), ``training_model.bin``, and, where they are
wanted, ``inference_model.bin`` and ``files/<name>``. The version is in the metadata, as
``"version"`` in what its releases before 1.1 write and as ``"_version"`` since.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from storage.errors import InvalidInput, one_line

if TYPE_CHECKING:
    from storage.container.weights.helpers import Helper

__all__ = [
    "FILES",
    "FORMAT_VERSION",
    "HELPER_KEYS",
    "INFERENCE_MODEL",
    "LONGEST_METADATA",
    "METADATA",
    "TRAINING_MODEL",
    "decode_metadata",
    "encode_metadata",
    "helper_label",
    "helper_name",
]

METADATA = "metadata.json"
TRAINING_MODEL = "training_model.bin"
INFERENCE_MODEL = "inference_model.bin"
FILES = "files/"
"""What the names of the entries of attached files begin with."""

FORMAT_VERSION = 2

LONGEST_METADATA = 16 * 1024 * 1024
"""Bytes of ``metadata.json`` that are read or written: all of it is kept in memory."""

_HELPER = "helper_type"
# For helpers that scaleoututil lacks: it opens no container whose helper_type it cannot import.
_HELPER_OF_OURS = "training_model_format"
HELPER_KEYS = (_HELPER, _HELPER_OF_OURS)
"""Keys that tell which helper wrote the training model."""

_STAMP = "version"
_STAMP_OF_1_1 = "_version"


def encode_metadata(metadata: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Write ``metadata.json``.

    The version is stamped as ``"version"``, which every release of the format's own library can
    read. If the caller has a key of that name it stays his, and the stamp is ``"_version"``.

    Returns:
        The bytes, and what a reader makes of them: a copy in which tuples are lists.

    Raises:
        InvalidInput: it is nothing that JSON can hold, or too long.
    """
    if _STAMP_OF_1_1 in metadata:
        raise InvalidInput(f"the metadata key {_STAMP_OF_1_1!r} is the format's own; use another")
    stamp = _STAMP_OF_1_1 if _STAMP in metadata else _STAMP
    try:
        text = json.dumps({**metadata, stamp: FORMAT_VERSION}).encode("ascii")
        _check_keys(metadata, "metadata")
    except (TypeError, ValueError, RecursionError) as exc:
        if isinstance(exc, InvalidInput):
            raise
        raise InvalidInput(
            f"the metadata cannot be written as JSON: {one_line(exc)}; use text, numbers, "
            "booleans, None, and lists and dicts of them"
        ) from exc
    if len(text) > LONGEST_METADATA:
        raise InvalidInput(
            f"the metadata takes {len(text)} bytes and may take {LONGEST_METADATA}; attach what "
            "is long as a file"
        )
    return text, decode_metadata(text, "the metadata")[0]


def _check_keys(value: Any, where: str) -> None:
    # JSON's own writer turns numbers, booleans and None into text.
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise InvalidInput(
                    f"{where} has the key {one_line(repr(key))}, a {type(key).__name__}; keys of "
                    "metadata are text"
                )
            _check_keys(below, one_line(f"{where}[{key!r}]"))
    elif isinstance(value, (list, tuple)):
        for below in value:
            _check_keys(below, where)


def decode_metadata(data: bytes, name: str) -> tuple[dict[str, Any], int]:
    """Read ``metadata.json``.

    Args:
        data: its bytes.
        name: of the container, for messages.

    Returns:
        The metadata without the stamp, and the version of the format. What has no stamp is of
        the newest version: a version that is not understood is always stamped.

    Raises:
        InvalidInput: it is no JSON object in UTF-8, or the version is newer than this one.
    """
    try:
        metadata = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(
            f"{name}: its {METADATA} is no JSON in UTF-8 ({one_line(exc)}); the container is "
            "damaged or made by something else"
        ) from exc
    if not isinstance(metadata, dict):
        raise InvalidInput(
            f"{name}: its {METADATA} holds a {type(metadata).__name__}; expected an object"
        )
    version = FORMAT_VERSION
    for stamp in (_STAMP_OF_1_1, _STAMP):
        # Anything but a number is a key of somebody's own.
        if type(metadata.get(stamp)) is int:
            version = metadata.pop(stamp)
            break
    if version > FORMAT_VERSION:
        raise InvalidInput(
            f"{name} has format version {one_line(version)}; this release reads versions up to "
            f"{FORMAT_VERSION}; upgrade modelstorage"
        )
    return metadata, version


def helper_label(helper: Helper) -> tuple[str, str]:
    """Return the key and the value by which metadata tell that ``helper`` wrote the model.

    Raises:
        InvalidInput: it has no name, so it is no helper.
    """
    own: str | None = getattr(helper, _HELPER_OF_OURS, None)
    if own is not None:
        return _HELPER_OF_OURS, own
    name = getattr(helper, "name", None)
    if not isinstance(name, str):
        raise InvalidInput(
            f"a {type(helper).__name__} is no helper: it lacks a name; a helper has name, "
            "save(params, stream) and load(stream)"
        )
    return _HELPER, name


def helper_name(metadata: dict[str, Any]) -> str | None:
    """Return the name of the helper that wrote the model; ``None`` if nothing tells.

    Raises:
        InvalidInput: what is there is no name.
    """
    for key in HELPER_KEYS:
        name = metadata.get(key)
        if name is not None and not isinstance(name, str):
            raise InvalidInput(
                f"the metadata's {key} is {one_line(repr(name), 80)}; expected a name"
            )
        if name:
            return name
    return None
