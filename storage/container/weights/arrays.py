"""Arrays as bytes: what the formats of model parameters share."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.errors import InvalidInput, UnsupportedOperation, one_line

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "array_bytes",
    "array_list",
    "as_array",
    "from_buffer",
    "import_numpy",
    "mapped",
    "read_bytes",
]

_BLOCK = 1024 * 1024


def import_numpy() -> Any:
    """Return the module ``numpy``.

    Raises:
        UnsupportedOperation: it is not installed.
    """
    try:
        import numpy
    except ImportError as exc:
        raise UnsupportedOperation(
            f"model parameters as arrays need numpy ({one_line(exc)}); "
            'run: pip install "modelstorage[container]"'
        ) from exc
    return numpy


def as_array(value: Any, name: str) -> np.ndarray[Any, Any]:
    """Return ``value`` as a plain array; one that is an array already is not copied.

    Args:
        value: an array, or what numpy makes one of.
        name: what a message calls it.

    Raises:
        InvalidInput: it is none, holds Python objects or masked values.
    """
    np = import_numpy()
    # Where nobody has imported this module yet there is no such array; it takes its time.
    if isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())):
        raise InvalidInput(f"array {name} is masked, and its mask would be lost; fill it first")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as exc:
        raise InvalidInput(f"array {name} is no array: {one_line(exc)}") from exc
    if array.dtype.hasobject:
        raise InvalidInput(
            f"array {name} holds Python objects ({array.dtype}); these would have to be pickled, "
            "and a pickle can run anything when it is loaded; expected numbers"
        )
    return array  # type: ignore[no-any-return]


def array_list(params: Any) -> list[np.ndarray[Any, Any]]:
    """Return the arrays of a list, a tuple or another iterable of arrays.

    Raises:
        InvalidInput: it is no such thing, or a mapping, whose names would be lost.
    """
    if isinstance(params, Mapping):
        raise InvalidInput(
            "this format keeps a list of arrays, without names, and a mapping was given; "
            'give list(params.values()), or use the helper "safetensors"'
        )
    if isinstance(params, str | bytes) or not isinstance(params, Iterable):
        raise InvalidInput(f"expected a list of arrays, found {type(params).__name__}")
    try:
        return [as_array(value, str(index)) for index, value in enumerate(params)]
    except TypeError as exc:  # an array without dimensions
        raise InvalidInput(f"expected a list of arrays: {one_line(exc)}") from exc


def array_bytes(
    array: np.ndarray[Any, Any], dtype: np.dtype[Any] | None = None
) -> Iterator[memoryview]:
    """Yield the bytes of ``array`` in C order; use each block before you take the next one.

    An array that lies in memory like that comes as one block, without a copy.

    Args:
        array: one from :func:`as_array`.
        dtype: convert to this type on the way.
    """
    np = import_numpy()
    dtype = array.dtype if dtype is None else dtype
    if array.nbytes == 0:
        return
    if array.dtype == dtype and array.flags.c_contiguous:
        yield memoryview(array.reshape(-1).view(np.uint8))
        return
    blocks = np.nditer(
        array,
        flags=["external_loop", "buffered", "zerosize_ok"],
        order="C",
        op_dtypes=[dtype],
        casting="same_kind",
        buffersize=max(1, _BLOCK // dtype.itemsize),
    )
    with blocks:
        for block in blocks:
            yield memoryview(np.ascontiguousarray(block).view(np.uint8))


def mapped(stream: BinaryIO) -> memoryview | None:
    """Return the memory that a mapped stream lies in; ``None`` if it is to be read.

    Memory of an ``io.BytesIO`` is not taken: it could not be closed while an array looks at it.
    """
    getbuffer = getattr(stream, "getbuffer", None)
    if getbuffer is None or isinstance(stream, io.BytesIO):
        return None
    view: memoryview = getbuffer()
    return view


def read_bytes(stream: BinaryIO, size: int | None = None) -> bytearray:
    """Read ``size`` bytes, or all that are left; fewer if the stream ends before.

    Takes memory for what there is, not for what was announced.
    """
    data = bytearray()
    while size is None or len(data) < size:
        block = stream.read(_BLOCK if size is None else min(_BLOCK, size - len(data)))
        if not block:
            break
        data += block
    return data


def from_buffer(
    buffer: Any, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int = 0, order: str = "C"
) -> np.ndarray[Any, Any]:
    """Return an array over ``buffer``, of which it has been checked that it is long enough.

    It is a copy only if the bytes do not lie where a processor wants numbers of this type.

    Raises:
        InvalidInput: numpy has no arrays of this shape.
    """
    np = import_numpy()
    try:
        if 0 in shape:
            return np.empty(shape, dtype, order)  # type: ignore[no-any-return]
        array = np.ndarray(shape, dtype, buffer, offset, order=order)
    except (ValueError, TypeError, OverflowError, MemoryError) as exc:
        raise InvalidInput(
            f"an array of {dtype} cannot have {len(shape)} dimensions like {one_line(shape, 80)}: "
            f"{one_line(exc)}"
        ) from exc
    return array if array.flags.aligned else array.copy(order)  # type: ignore[no-any-return]
