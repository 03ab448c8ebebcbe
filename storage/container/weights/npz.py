"""Lists of arrays in an NPZ file, as Scaleout's numpy helper writes and reads them.

The arrays are the members ``0.npy``, ``1.npy``, … of a ZIP archive, each in the format of
``numpy.lib.format``. Members written here are stored at multiples of 64 bytes, and their headers
are multiples of 64 bytes long, so that a file which itself is stored at such a place can be
mapped.
"""

from __future__ import annotations

import ast
import io
import math
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.container.entries import Entry, data_offset, open_entry, read_directory
from storage.container.weights.arrays import (
    array_bytes,
    array_list,
    from_buffer,
    import_numpy,
    mapped,
)
from storage.container.zipped import ZipWriter
from storage.errors import InvalidInput, few, one_line

if TYPE_CHECKING:
    import numpy as np

__all__ = ["load_npz", "save_npz"]

_SUFFIX = ".npy"
_MAGIC = 8
# What numpy reads; Python's parser is not made for longer ones of strangers.
_LONGEST_HEADER = 10_000
_DIMENSIONS = 64
_BLOCK = 1024 * 1024
_GIB = 1024**3
_RATIO = 200
# What Python's parser and numpy raise about a header that is not theirs.
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    SyntaxError,
    MemoryError,
    RecursionError,
    Warning,
)


def save_npz(params: Any, stream: BinaryIO) -> None:
    """Write a list of arrays, forward and without compression.

    Raises:
        InvalidInput: it is none, or holds what the format cannot keep.
    """
    headers = [(array, _header(array, index)) for index, array in enumerate(array_list(params))]
    writer = ZipWriter(stream)
    for index, (array, header) in enumerate(headers):
        name = f"{index}{_SUFFIX}"
        # In this order, because the format has the name of an order that is not C's.
        laid_out = array.T if array.flags.f_contiguous else array
        if laid_out.flags.c_contiguous:
            writer.write(name, header, *array_bytes(laid_out), compress=False)
            continue
        with writer.entry(name, compress=False) as member:
            member.write(header)
            for block in array_bytes(array):
                member.write(block)
    writer.close()


def load_npz(stream: BinaryIO, limit: int | None = None) -> list[np.ndarray[Any, Any]]:
    """Return the arrays of an NPZ file.

    Of a mapped stream the arrays that are stored are mapped, too, and their checksums not
    looked at; all others are read and checked.

    Args:
        stream: the file; seekable, or it is copied to an unnamed temporary file first.
        limit: bytes of all arrays together; by default 1 GiB, or 200 times the file if that
            is more.

    Raises:
        InvalidInput: it is no such file, is damaged, or becomes larger than it may.
        IntegrityError: an array does not have its checksum.
    """
    if not stream.seekable() or getattr(stream, "compressed", False):
        # The directory is at the end, and a step back in compressed data begins again.
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked, _BLOCK)
            unpacked.seek(0)
            return load_npz(unpacked, limit)
    members = _members(stream)
    claimed = sum(entry.size for entry in members)
    bound = max(_GIB, _RATIO * stream.seek(0, io.SEEK_END)) if limit is None else limit
    if claimed > bound:
        raise InvalidInput(
            f"the arrays of the NPZ file take {claimed} bytes, and at most {bound} are loaded; "
            "NumpyHelper(limit=...) allows more"
        )
    buffer = mapped(stream)
    return [_load(stream, entry, buffer) for entry in members]


def _members(stream: BinaryIO) -> list[Entry]:
    """Return the arrays' entries in the order of their numbers."""
    directory = read_directory(stream)
    found = {name.removesuffix(_SUFFIX): entry for name, entry in directory.items()}
    expected = [str(index) for index in range(len(directory))]
    if sorted(found) != sorted(expected):
        raise InvalidInput(
            f"the NPZ file holds {one_line(few(sorted(directory)))}; expected the arrays 0.npy, "
            "1.npy, … that the helper writes; numpy.load reads other ones"
        )
    return [found[name] for name in expected]


# -- the format of one array: numpy.lib.format -------------------------------------------------


def _header(array: np.ndarray[Any, Any], index: int) -> bytes:
    np = import_numpy()
    layout = np.lib.format
    file = io.BytesIO()
    try:
        fields = None
        # A type of another package is named like raw bytes there.
        if array.dtype.fields is not None or np.dtype(array.dtype.str) == array.dtype:
            fields = layout.header_data_from_array_1_0(array)
        if not array.itemsize or (
            fields is None or layout.descr_to_dtype(fields["descr"]) != array.dtype
        ):
            raise ValueError("the type would be another one when it is loaded")
        layout.write_array_header_1_0(file, fields)
        if file.tell() > _LONGEST_HEADER:
            raise ValueError("the names in it are too long")
    except (ValueError, TypeError, Warning) as exc:
        raise InvalidInput(
            f"NPZ cannot keep array {index} of {array.dtype}: {one_line(exc)}; convert it, or use "
            'the helper "safetensors"'
        ) from exc
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class _Described:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    begin: int
    """Where the numbers begin."""


def _load(stream: BinaryIO, entry: Entry, buffer: memoryview | None) -> np.ndarray[Any, Any]:
    if buffer is not None and entry.method == zipfile.ZIP_STORED:
        offset = data_offset(stream, entry)
        member = buffer[offset : offset + entry.size]
        found = _described(io.BytesIO(member[:_LONGEST_HEADER]), entry)
        return from_buffer(member, found.dtype, found.shape, found.begin, found.order)
    np = import_numpy()
    with open_entry(stream, entry) as content:
        found = _described(content, entry)
        try:
            numbers = np.empty(entry.size - found.begin, np.uint8)
        except MemoryError as exc:
            raise _unreadable(entry, f"it does not fit into memory: {one_line(exc)}") from exc
        view = memoryview(numbers)
        while view and (count := content.readinto(view[:_BLOCK])):
            view = view[count:]
        # The read that reaches the end checks the sum.
        content.read(1)
    return from_buffer(numbers, found.dtype, found.shape, 0, found.order)


def _described(content: BinaryIO, entry: Entry) -> _Described:
    """Read the header of an array; what it says fits the size of the entry."""
    np = import_numpy()
    try:
        magic = content.read(_MAGIC)
        version = magic[6] if len(magic) == _MAGIC else 0
        if not magic.startswith(b"\x93NUMPY") or version not in (1, 2, 3):
            raise ValueError("it does not begin as one")
        prefix = content.read(2 if version == 1 else 4)
        length = int.from_bytes(prefix, "little")
        begin = _MAGIC + len(prefix) + length
        text = content.read(length) if begin <= min(_LONGEST_HEADER, entry.size) else b""
        if len(text) < length:
            raise ValueError(f"its header has {length} bytes")
        fields = ast.literal_eval(text.decode("utf-8" if version == 3 else "latin-1"))
        if type(fields) is not dict or sorted(fields) != ["descr", "fortran_order", "shape"]:
            raise ValueError("its header has other fields")
        shape, fortran = fields["shape"], fields["fortran_order"]
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
        if type(shape) is not tuple or type(fortran) is not bool or len(shape) > _DIMENSIONS:
            raise ValueError("its header has no shape or order")
        if not dtype.itemsize:
            raise ValueError(f"its type {dtype} has no size")
        if not all(type(one) is int and 0 <= one < 1 << 63 for one in shape):
            raise ValueError("its header has no shape")
    except _UNREADABLE as exc:
        raise _unreadable(entry, one_line(exc)) from exc
    if dtype.hasobject:
        raise _unreadable(
            entry, "it holds pickled objects, which can run anything when they are loaded"
        )
    size = math.prod(shape) * dtype.itemsize
    if size != entry.size - begin:
        raise _unreadable(
            entry, f"its shape needs {one_line(size, 40)} bytes, and {entry.size - begin} are there"
        )
    return _Described(dtype, shape, "F" if fortran else "C", begin)


def _unreadable(entry: Entry, why: str) -> InvalidInput:
    return InvalidInput(
        f"{one_line(repr(entry.name), 40)} of the NPZ file is no array that can be loaded: {why}"
    )
