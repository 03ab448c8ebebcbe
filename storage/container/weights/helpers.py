"""Helpers: what turns the parameters of a model into bytes and back.

A helper is any object with ``name``, ``save(params, stream)`` and ``load(stream)``, so those of
``scaleoututil`` work here and these work there. A package brings more by entry points of the
group ``storage.helpers``: the name of the entry point is the helper's, and what it refers to is
called without arguments and returns one, so it may be the class::

    [project.entry-points."storage.helpers"]
    my-format = "my_package.formats:MyHelper"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

from storage.container.weights.arrays import (
    array_bytes,
    array_list,
    from_buffer,
    import_numpy,
    mapped,
    read_bytes,
)
from storage.errors import InvalidInput, UnsupportedOperation, one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import numpy as np

__all__ = ["BinaryHelper", "Helper", "NumpyHelper", "SafetensorsHelper", "get_helper"]

_GROUP = "storage.helpers"


@runtime_checkable
class Helper(Protocol):
    """Writes and reads the parameters of a model."""

    @property
    def name(self) -> str:
        """What a container's metadata call it, as ``helper_type``."""

    def save(self, params: Any, stream: Any, /) -> object:
        """Write ``params`` to ``stream``, a new binary file; what is returned is ignored.

        The stream is a file of the system, with ``fileno()``. A helper that needs none says so
        by an attribute ``streams = True``, and writes right into the container.
        """

    def load(self, stream: Any, /) -> Any:
        """Return the parameters that ``stream``, a binary file open for reading, holds.

        A stream that is mapped has ``getbuffer()``, as ``io.BytesIO`` has: memory that may be
        written to, which changes no file. What refers to it may outlive the stream.
        """


class NumpyHelper:
    """A list of arrays in an NPZ file: the format of Scaleout's helper of that name.

    What is written is not compressed, for trained weights do not shrink, and can be mapped.
    Nothing is ever pickled: arrays of Python objects are refused, both ways.
    """

    name = "numpyhelper"
    streams = True

    def __init__(self, limit: int | None = None) -> None:
        """Make a helper.

        Args:
            limit: bytes of all arrays together that a file may become; by default 1 GiB, or
                200 times the file if that is more.
        """
        self.limit = limit

    def save(self, params: Any, stream: BinaryIO) -> None:
        """Write a list, a tuple or another iterable of arrays.

        Raises:
            InvalidInput: it is something else (a mapping, objects, masked arrays), or has a
                type that NPZ cannot keep, such as ``bfloat16``.
        """
        from storage.container.weights.npz import save_npz

        save_npz(params, stream)

    def load(self, stream: BinaryIO) -> list[np.ndarray[Any, Any]]:
        """Return the arrays.

        Arrays that are stored in a mapped stream are views of it: nothing is read before it is
        used, changes stay in this process, and checksums are not looked at. All other arrays
        are read and checked.

        Raises:
            InvalidInput: it is no such file, is damaged, or becomes larger than it may.
            IntegrityError: an array does not have its checksum.
        """
        from storage.container.weights.npz import load_npz

        return load_npz(stream, self.limit)


class BinaryHelper:
    """Numbers without shape or type: what Scaleout's helper of that name reads.

    All arrays, one after the other, as 64-bit floating point, little-endian.
    """

    name = "binaryhelper"
    streams = True

    def save(self, params: Any, stream: BinaryIO) -> None:
        """Write an array, or a list, a tuple or another iterable of arrays, as float64.

        Raises:
            InvalidInput: it is something else, or holds numbers that are no float64.
        """
        np = import_numpy()
        double = np.dtype("<f8")
        for index, array in enumerate(
            array_list([params] if isinstance(params, np.ndarray) else params)
        ):
            if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, double):
                raise InvalidInput(
                    f"array {index} of {array.dtype} cannot be kept as float64; convert it, or "
                    'use the helper "numpyhelper"'
                )
            for block in array_bytes(array, double):
                stream.write(block)

    def load(self, stream: BinaryIO) -> list[np.ndarray[Any, Any]]:
        """Return a list of one flat array; that of a mapped stream is a view of it.

        Raises:
            InvalidInput: the length is no multiple of eight bytes.
        """
        np = import_numpy()
        double = np.dtype("<f8")
        found = mapped(stream)
        data = read_bytes(stream) if found is None else found
        count, rest = divmod(len(data), double.itemsize)
        if rest:
            raise InvalidInput(
                f"the training model has {len(data)} bytes; expected numbers of 8 bytes, as "
                "the helper binaryhelper writes"
            )
        return [from_buffer(data, double, (count,))]


class SafetensorsHelper:
    """A mapping of names to arrays in the safetensors format.

    ``scaleoututil`` has no such helper and cannot open a container whose ``helper_type`` it
    does not know, so this one is noted under another key, ``training_model_format``.
    """

    name = "safetensors"
    training_model_format = "safetensors"
    streams = True

    def save(self, params: Any, stream: BinaryIO) -> None:
        """Write a mapping of names to arrays.

        Raises:
            InvalidInput: it is something else, or holds what the format cannot keep.
        """
        from storage.container.weights.tensors import save_safetensors

        save_safetensors(params, stream)

    def load(self, stream: BinaryIO) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays by name; those of a mapped stream are views of it.

        Raises:
            InvalidInput: it is no such file, or damaged.
            UnsupportedOperation: it has numbers of a type that numpy lacks.
        """
        from storage.container.weights.tensors import load_safetensors

        return load_safetensors(stream)


_BUILT_IN: dict[str, Callable[[], Helper]] = {
    helper.name: helper for helper in (NumpyHelper, BinaryHelper, SafetensorsHelper)
}


def get_helper(name: str) -> Helper:
    """Return the helper of that name: a built-in one, or one of an installed package.

    Raises:
        UnsupportedOperation: there is none, or its package cannot be imported.
        InvalidInput: what the package has under this name is no helper.
    """
    if make := _BUILT_IN.get(name):
        return make()
    from importlib.metadata import entry_points

    found = entry_points(group=_GROUP)
    if name not in found.names:
        raise UnsupportedOperation(
            f"no helper {one_line(repr(name), 80)}; there are "
            f"{', '.join(sorted({*_BUILT_IN, *found.names}))}; give one, or install the package "
            f"that has it (entry points of the group {_GROUP})"
        )
    return _load(found[name])


def _load(entry_point: EntryPoint) -> Helper:
    where = f"the helper {one_line(repr(entry_point.name), 80)} ({one_line(entry_point.value, 80)})"
    try:
        helper = entry_point.load()()
    except (ImportError, AttributeError) as exc:
        raise UnsupportedOperation(f"{where} cannot be imported: {one_line(exc)}") from exc
    except TypeError as exc:
        raise InvalidInput(
            f"{where} cannot be made: {one_line(exc)}; expected a class, or a function without "
            "arguments"
        ) from exc
    if not isinstance(helper, Helper):
        raise InvalidInput(f"{where} lacks name, save or load, which a helper has")
    return helper
