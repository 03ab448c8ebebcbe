"""The safetensors format (https://github.com/huggingface/safetensors, "Format").

Eight bytes with the length of a header in JSON, the header, then the numbers of all tensors
without a gap, little-endian and in C order. Written and read here piece by piece or mapped;
the package ``safetensors`` makes the whole file in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.container.weights.arrays import (
    array_bytes,
    as_array,
    from_buffer,
    import_numpy,
    mapped,
    read_bytes,
)
from storage.errors import InvalidInput, UnsupportedOperation, one_line

if TYPE_CHECKING:
    import numpy as np

__all__ = ["load_safetensors", "save_safetensors"]

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
# The reference takes 100 MB. The header of a model of thousands of layers has less than 1 MiB,
# and what JSON becomes in memory is many times as large.
_LONGEST_HEADER = 16 * 1024 * 1024
_ALIGNMENT = 64
# numpy has at most 64 dimensions; two offsets follow them.
_MOST_NUMBERS = 66
_NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
# Types that the package ml_dtypes adds to numpy.
_MORE_NAMES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NAMES = {numpy_name: name for name, numpy_name in (_NUMPY_NAMES | _MORE_NAMES).items()}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def save_safetensors(params: Any, stream: BinaryIO) -> None:
    """Write a mapping of names to arrays.

    Raises:
        InvalidInput: it is none, or holds what the format cannot keep.
    """
    if not isinstance(params, Mapping):
        raise InvalidInput(
            f"safetensors keeps arrays by name; expected a mapping, found {type(params).__name__}"
        )
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in params.items():
        if not isinstance(name, str) or name == _METADATA:
            raise InvalidInput(f"{one_line(repr(name))} is no name that a tensor can have")
        arrays[name] = as_array(value, repr(name))
        if arrays[name].dtype.name not in _NAMES:
            raise InvalidInput(
                f"safetensors has no type for {arrays[name].dtype} (array {name!r}); it has "
                f"{', '.join(_NAMES)}"
            )
    # Widest numbers first, so that all lie at multiples of their size.
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    ends: dict[str, int] = {}
    end = 0
    for name in order:
        end += arrays[name].nbytes
        ends[name] = end
    described = {
        name: {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [ends[name] - array.nbytes, ends[name]],
        }
        for name, array in arrays.items()
    }
    try:
        header = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as exc:
        raise InvalidInput(f"a tensor has a name that is no text: {one_line(exc)}") from exc
    if len(header) > _LONGEST_HEADER - _ALIGNMENT:
        raise InvalidInput(
            f"the names and shapes of {len(arrays)} tensors take {len(header)} bytes; at most "
            f"{_LONGEST_HEADER} can be read again"
        )
    header += b" " * (-(_LENGTH.size + len(header)) % _ALIGNMENT)
    stream.write(_LENGTH.pack(len(header)) + header)
    for name in order:
        array = arrays[name]
        for block in array_bytes(array, array.dtype.newbyteorder("<")):
            stream.write(block)


def load_safetensors(stream: BinaryIO) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays by name, in the order of the header.

    Raises:
        InvalidInput: it is no such file, or damaged.
        UnsupportedOperation: it has numbers of a type that numpy lacks.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > _LONGEST_HEADER:
        raise _damaged(f"its header claims {length} bytes, and at most {_LONGEST_HEADER} are read")
    tensors = _tensors(_exactly(stream, length))
    ordered = sorted(tensors, key=lambda one: (one.begin, one.end))
    size = 0
    for one in ordered:
        if one.begin != size:
            raise _damaged(f"{one.name!r} begins at byte {one.begin}, expected {size}")
        size = one.end
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    start = _LENGTH.size + length
    buffer = mapped(stream)
    if buffer is not None and len(buffer) != start + size:
        raise _damaged(f"its tensors end at byte {start + size} of {len(buffer)}")
    for one in ordered:
        if buffer is not None:
            arrays[one.name] = from_buffer(buffer, one.dtype, one.shape, start + one.begin)
        else:
            data = _exactly(stream, one.end - one.begin)
            arrays[one.name] = from_buffer(data, one.dtype, one.shape)
    if buffer is None and stream.read(1):
        raise _damaged("bytes follow its last tensor")
    return {one.name: arrays[one.name] for one in tensors}


def _tensors(header: bytearray) -> list[_Tensor]:
    try:
        described = json.loads(header.decode(), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as exc:
        raise _damaged(f"its header is no JSON: {one_line(exc)}") from exc
    if not isinstance(described, dict):
        raise _damaged("its header is no object")
    described.pop(_METADATA, None)
    return [_tensor(name, one) for name, one in described.items()]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _damaged("its header has a name twice")
    return found


def _tensor(name: str, described: Any) -> _Tensor:
    try:
        kind, shape, (begin, end) = (described[key] for key in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as exc:
        raise _damaged(f"{one_line(repr(name))} is not described") from exc
    if not isinstance(kind, str) or len(numbers) > _MOST_NUMBERS or not all(map(_size, numbers)):
        raise _damaged(f"{one_line(repr(name))} is not described")
    dtype = _dtype(kind, name)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(
            f"{one_line(repr(name))} has {end - begin} bytes, expected those of {kind} "
            f"{one_line(shape, 80)}"
        )
    return _Tensor(name, dtype, tuple(shape), begin, end)


def _size(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _dtype(kind: str, name: str) -> np.dtype[Any]:
    np = import_numpy()
    if kind in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[kind]).newbyteorder("<")  # type: ignore[no-any-return]
    if kind not in _MORE_NAMES:
        raise UnsupportedOperation(
            f"tensor {one_line(repr(name))} has the type {one_line(repr(kind), 40)}, which numpy "
            "lacks; read it with the package safetensors and the framework that it was made for"
        )
    try:
        import ml_dtypes
    except ImportError as exc:
        raise UnsupportedOperation(
            f"tensor {one_line(repr(name))} has the type {kind}, which numpy lacks; "
            "run: pip install ml_dtypes"
        ) from exc
    return np.dtype(getattr(ml_dtypes, _MORE_NAMES[kind]))  # type: ignore[no-any-return]


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    data = read_bytes(stream, size)
    if len(data) < size:
        raise _damaged(f"it ends {size - len(data)} bytes too early")
    return data


def _damaged(why: str) -> InvalidInput:
    return InvalidInput(f"the training model is no whole safetensors file: {why}")
