"""Parameters of models as bytes: numpy's NPZ, raw numbers, safetensors, and those of others."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.container.weights.helpers import (
    BinaryHelper,
    Helper,
    NumpyHelper,
    SafetensorsHelper,
    get_helper,
)
from storage.errors import InvalidInput, StorageError, UnsupportedOperation

MIB = 1024**2
Array = np.ndarray[Any, Any]


def saved(helper: Helper, params: Any) -> bytes:
    """Return what a helper writes."""
    stream = io.BytesIO()
    helper.save(params, stream)
    return stream.getvalue()


class Mapped:
    """A stream of a local file with ``getbuffer()``: private memory, as of a container's entry."""

    def __init__(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        self._file = path.open("rb")
        self.memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def close(self) -> None:
        self._file.close()

    def getbuffer(self) -> memoryview:
        return memoryview(self.memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class OneWay(io.RawIOBase):
    """A stream that only goes forward, in pieces."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._content.read(min(1000, len(buffer)))
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[Callable[[bytes], Any]]:
    """Return what makes a mapped stream."""
    with contextlib.ExitStack() as streams:
        yield lambda content: streams.enter_context(
            contextlib.closing(Mapped(tmp_path / "mapped", content))
        )


def same(found: Array, expected: Array) -> bool:
    """Tell whether two arrays have the same type, shape and bits."""
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        expected.tobytes(),
    )


def ways(content: bytes, mapping: Callable[[bytes], Any]) -> list[Any]:
    """Return streams of each kind."""
    return [io.BytesIO(content), OneWay(content), mapping(content)]


NUMBERS = np.arange(24).reshape(2, 3, 4)
ARRAYS = {
    "float32": NUMBERS.astype("f4"),
    "float64": NUMBERS.astype("f8"),
    "float16": NUMBERS.astype("f2"),
    "int8": NUMBERS.astype("i1"),
    "uint64": NUMBERS.astype("u8"),
    "bool": NUMBERS % 3 == 0,
    "complex": NUMBERS.astype("c16") * 1j,
    "no dimension": np.array(7.5),
    "empty": np.empty((0, 5), "f4"),
    "empty behind": np.empty((5, 0), "f4"),
    "not contiguous": NUMBERS[:, ::2, 1:].astype("f4")[:, :, ::2],
    "transposed": NUMBERS.astype("f4").T,
    "Fortran order": np.asfortranarray(NUMBERS.astype("f4")[0]),
    "big-endian": NUMBERS.astype(">f4"),
    "backward": NUMBERS.astype("f4")[::-1],
    "the same number often": np.broadcast_to(np.float32(3), (50, 60)),
    "not a number": np.array([np.nan, np.inf, -0.0]),
    "text": np.array(["weights", "größe"]),
    "dates": np.array(["2026-01-02"], "M8[D]"),
    "records": np.array([(1, 2.5)], [("a", "i4"), ("b", "<f8", (1,))]),
}


# -- numpy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_keeps_types_shapes_and_bits(name: str, mapping: Callable[[bytes], Any]) -> None:
    array = ARRAYS[name]
    content = saved(NumpyHelper(), [NUMBERS.astype("i1"), array])
    for stream in ways(content, mapping):
        first, found = NumpyHelper().load(stream)
        assert same(found, array)
        assert same(first, NUMBERS.astype("i1"))
        assert found.flags.writeable
    with np.load(io.BytesIO(content)) as theirs:
        assert theirs.files == ["0", "1"]
        assert same(theirs["1"], array)
        assert theirs["1"].flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_reads_what_numpy_writes(
    name: str, write: Any, mapping: Callable[[bytes], Any]
) -> None:
    stream = io.BytesIO()
    write(stream, **{"0": ARRAYS[name], "1": NUMBERS})
    for one in ways(stream.getvalue(), mapping):
        found, second = NumpyHelper().load(one)
        assert same(found, ARRAYS[name])
        assert same(second, NUMBERS)


@pytest.mark.parametrize("count", [0, 1, 12])
def test_numpy_keeps_the_order_of_any_number_of_arrays(count: int) -> None:
    arrays = [np.full(3, index, "i4") for index in range(count)]
    found = NumpyHelper().load(io.BytesIO(saved(NumpyHelper(), tuple(arrays))))
    assert [one.tolist() for one in found] == [one.tolist() for one in arrays]


def test_what_is_no_array_yet_becomes_one() -> None:
    found = NumpyHelper().load(io.BytesIO(saved(NumpyHelper(), ([1, 2], 3.5, np.float32(4)))))
    assert [one.tolist() for one in found] == [[1, 2], 3.5, 4.0]
    assert found[2].dtype == np.float32


def test_an_array_is_the_list_of_its_rows() -> None:
    found = NumpyHelper().load(io.BytesIO(saved(NumpyHelper(), np.eye(3))))
    assert np.array_equal(np.stack(found), np.eye(3))


@pytest.mark.parametrize(
    "params",
    [
        [np.array([{"a": 1}])],
        [None],
        [np.array([1, "a", None], dtype=object)],
        [[[1, 2], [3]]],
        [np.zeros(1, [("a", "O")])],
        [np.ma.masked_array([1.0, 2.0], [True, False])],
        {"a": np.zeros(2)},
        "weights",
        b"weights",
        7,
        None,
    ],
    ids=[
        "objects",
        "None",
        "mixed",
        "ragged",
        "objects in records",
        "masked",
        "by name",
        "text",
        "bytes",
        "a number",
        "nothing",
    ],
)
@pytest.mark.parametrize("helper", [NumpyHelper(), BinaryHelper()])
def test_what_cannot_be_kept_is_refused(helper: Helper, params: Any) -> None:
    with pytest.raises(InvalidInput):
        saved(helper, params)


def test_a_number_alone_is_no_list_of_arrays() -> None:
    with pytest.raises(InvalidInput, match="list of arrays"):
        saved(NumpyHelper(), np.array(7.0))


def test_a_type_that_would_come_back_as_another_is_refused() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(InvalidInput, match="array 1 of bfloat16"):
        saved(NumpyHelper(), [np.zeros(2), np.zeros(2, ml_dtypes.bfloat16)])


def test_mapped_arrays_are_views_that_change_no_file(mapping: Callable[[bytes], Any]) -> None:
    content = saved(NumpyHelper(), [np.zeros(1000, "f4"), NUMBERS.astype("f8")])
    stream = mapping(content)
    first, second = NumpyHelper().load(stream)
    whole = np.frombuffer(stream.memory, "u1")
    assert np.shares_memory(first, whole)
    assert np.shares_memory(second, whole)
    assert first.ctypes.data % 64 == second.ctypes.data % 64 == 0
    first += 1
    stream.close()
    assert first.sum() == 1000
    (again, _) = NumpyHelper().load(io.BytesIO((Path(stream.name)).read_bytes()))
    assert again.sum() == 0


def test_arrays_that_are_compressed_are_read_from_a_mapped_stream(
    mapping: Callable[[bytes], Any],
) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **{"0": NUMBERS})
    stream = mapping(file.getvalue())
    (found,) = NumpyHelper().load(stream)
    assert not np.shares_memory(found, np.frombuffer(stream.memory, "u1"))
    assert same(found, NUMBERS)


def test_the_same_arrays_give_the_same_bytes() -> None:
    assert saved(NumpyHelper(), [NUMBERS]) == saved(NumpyHelper(), [NUMBERS.copy()])


def npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """Return an array file with any header."""
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


def described(descr: str, shape: str, order: str = "False") -> bytes:
    """Return the header of an array file."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return text.encode().ljust(117) + b"\n"


def npz(*members: bytes, method: int = zipfile.ZIP_STORED, **named: bytes) -> bytes:
    """Return an archive of such files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for index, content in enumerate(members):
            archive.writestr(f"{index}.npy", content)
        for name, content in named.items():
            archive.writestr(name, content)
    return file.getvalue()


HOSTILE = {
    "no archive": b"\x93NUMPY\1\0",
    "nothing": b"",
    "a pickle": npz(npy(described("'|O'", "(1,)"), b"\x80\x04N.")),
    "a pickle in records": npz(npy(described("[('a', '|O')]", "(1,)"), bytes(8))),
    "no array": npz(b"\x80\x04N."),
    "cut in the header": npz(npy(described("'<f4'", "(1,)"))[:20]),
    "more than there is": npz(npy(described("'<f4'", "(2,)"), bytes(4))),
    "less than there is": npz(npy(described("'<f4'", "(1,)"), bytes(8))),
    "a shape beyond all": npz(npy(described("'<f8'", f"({2**62}, 8)"), bytes(64))),
    "a shape that wraps to nothing": npz(npy(described("'<f8'", f"({2**32}, {2**32})"))),
    "a shape of nothing and beyond all": npz(npy(described("'<f8'", f"(0, {10**30})"))),
    "a type without size": npz(npy(described("'V0'", f"({2**40}, {2**40})"))),
    "less than no numbers": npz(npy(described("'<f4'", "(-1,)"))),
    "less than no numbers twice": npz(npy(described("'<f4'", "(-1, -1)"), bytes(4))),
    "65 dimensions": npz(npy(described("'u1'", "(" + "1," * 65 + ")"), b"x")),
    "an order that is none": npz(npy(described("'<f4'", "(1,)", "7"), bytes(4))),
    "a shape that is none": npz(npy(described("'<f4'", "'abc'"), bytes(4))),
    "a type that is none": npz(npy(described("'<q9'", "(1,)"), bytes(4))),
    "a type of types": npz(npy(described("[[[]]]", "(1,)"), bytes(4))),
    "a giant type": npz(npy(described("[('a', '<f8', (2000000000, 2000000000))]", "(1,)"))),
    "code": npz(npy(described("__import__('os').getpid()", "(1,)"), bytes(4))),
    "another dict": npz(npy(b"{'a': 1}\n")),
    "no dict": npz(npy(b"7\n")),
    "brackets": npz(npy(b"(" * 5000 + b"\n")),
    "minuses": npz(npy(b"-" * 9000 + b"1\n")),
    "an open text": npz(npy(b"{'descr\n")),
    "a null byte": npz(npy(b"{\0}\n")),
    "no text": npz(npy(b"\xff\xfe" * 20, version=b"\3\0")),
    "a giant number": npz(npy(described("'<f4'", "(" + "9" * 5000 + ",)"))),
    "a header beyond all": npz(npy(b" " * 200_000, version=b"\2\0")),
    "a header that claims to be": npz(b"\x93NUMPY\2\0\xff\xff\xff\xff"),
    "another version": npz(npy(described("'<f4'", "(1,)"), bytes(4), version=b"\x09\0")),
    "Python 2": npz(npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1L,), }\n", bytes(4))),
    "other names": npz(arr_0=npy(described("'<f4'", "(1,)"), bytes(4))),
    "a number missing": npz(**{"1.npy": npy(described("'<f4'", "(1,)"), bytes(4))}),
    "a name twice": npz(
        npy(described("'<f4'", "(1,)"), bytes(4)), **{"0": npy(described("'<f4'", "(1,)"))}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_npz_files_are_refused(name: str, mapping: Callable[[bytes], Any]) -> None:
    content = HOSTILE[name]
    streams = ways(content, mapping) if content else [io.BytesIO(content), OneWay(content)]
    for stream in streams:
        with pytest.raises(StorageError) as caught:
            NumpyHelper().load(stream)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 800


def test_a_small_file_does_not_become_a_large_one() -> None:
    size = 3 * 1024**3
    zeros = npz(npy(described("'<u1'", f"({16 * MIB},)"), bytes(16 * MIB)), method=8)
    assert len(zeros) < MIB // 20
    with pytest.raises(InvalidInput, match=r"NumpyHelper\(limit=...\)"):
        NumpyHelper(limit=MIB).load(io.BytesIO(zeros))
    (found,) = NumpyHelper().load(io.BytesIO(zeros))
    assert found.nbytes == 16 * MIB
    # A claim of gigabytes that the directory repeats takes no memory.
    header = npy(described("'<u1'", f"({size},)"))
    lying = bytearray(npz(header + bytes(100), method=8))
    at = lying.rindex(b"PK\1\2")
    lying[at + 24 : at + 28] = struct.pack("<I", len(header) + size)
    with pytest.raises(StorageError):
        NumpyHelper().load(io.BytesIO(lying))


@pytest.mark.parametrize("write", [None, np.savez_compressed])
def test_one_wrong_bit_is_noticed(write: Any) -> None:
    weights = np.random.default_rng(1).standard_normal(5000).astype("f4")
    if write is None:
        content = bytearray(saved(NumpyHelper(), [weights]))
    else:
        file = io.BytesIO()
        write(file, **{"0": weights})
        content = bytearray(file.getvalue())
    content[len(content) // 2] ^= 1
    with pytest.raises(StorageError):
        NumpyHelper().load(io.BytesIO(content))


@given(st.data())
def test_damaged_npz_files_give_typed_errors_only(data: st.DataObject) -> None:
    content = bytearray(
        data.draw(st.sampled_from([PLAIN, npz(PLAIN_ARRAY, PLAIN_ARRAY, method=8)]))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    with contextlib.suppress(StorageError):
        NumpyHelper(limit=64 * MIB).load(io.BytesIO(content))


PLAIN_ARRAY = npy(described("'<f4'", "(2, 2)"), bytes(16))
PLAIN = npz(PLAIN_ARRAY, PLAIN_ARRAY)


# -- raw numbers -------------------------------------------------------------------------------


def test_binary_writes_all_arrays_as_doubles_one_after_another(
    mapping: Callable[[bytes], Any],
) -> None:
    arrays = [
        np.arange(4.0),
        NUMBERS.astype("f4"),
        NUMBERS.astype("i8").T,
        np.array([True, False]),
        NUMBERS.astype(">f8")[:, ::2],
        np.array(0.5),
        np.empty(0),
    ]
    content = saved(BinaryHelper(), arrays)
    expected = np.concatenate([array.astype("<f8").ravel() for array in arrays])
    assert content == expected.tobytes()
    for stream in ways(content, mapping):
        (found,) = BinaryHelper().load(stream)
        assert same(found, expected)
        assert found.flags.writeable


def test_binary_writes_doubles_as_scaleout_s_helper_does(tmp_path: Path) -> None:
    rows = [np.arange(6.0).reshape(3, 2), np.ones((1, 2))]
    np.concatenate(rows).tofile(tmp_path / "theirs")
    assert saved(BinaryHelper(), rows) == (tmp_path / "theirs").read_bytes()


def test_binary_takes_one_array_and_nothing(mapping: Callable[[bytes], Any]) -> None:
    (found,) = BinaryHelper().load(io.BytesIO(saved(BinaryHelper(), np.arange(3))))
    assert found.tolist() == [0, 1, 2]
    (found,) = BinaryHelper().load(io.BytesIO(saved(BinaryHelper(), [])))
    assert found.tolist() == []


@pytest.mark.parametrize("array", [np.zeros(2, "c8"), np.array(["a"]), np.array([1], "M8[s]")])
def test_binary_refuses_what_is_no_double(array: Array) -> None:
    with pytest.raises(InvalidInput, match="float64"):
        saved(BinaryHelper(), [array])


@pytest.mark.parametrize("size", [1, 7, 9, 8 * 1000 + 4])
def test_binary_refuses_half_a_number(size: int, mapping: Callable[[bytes], Any]) -> None:
    for stream in ways(bytes(size), mapping):
        with pytest.raises(InvalidInput, match=f"{size} bytes"):
            BinaryHelper().load(stream)


# -- safetensors -------------------------------------------------------------------------------

KEPT = [name for name in ARRAYS if ARRAYS[name].dtype.kind in "biuf"]


def tensors() -> dict[str, Array]:
    """Return arrays of all types and layouts that the format has."""
    return {"größe.weight": np.arange(5, dtype="i2")} | {name: ARRAYS[name] for name in KEPT}


def test_safetensors_keeps_names_types_and_numbers(mapping: Callable[[bytes], Any]) -> None:
    content = saved(SafetensorsHelper(), tensors())
    for stream in ways(content, mapping):
        found = SafetensorsHelper().load(stream)
        assert list(found) == list(tensors())
        for name, array in tensors().items():
            little = array.astype(array.dtype.newbyteorder("<"), order="C")
            assert same(found[name], little)
            assert found[name].flags.writeable


def test_safetensors_and_its_package_read_each_other(mapping: Callable[[bytes], Any]) -> None:
    package = pytest.importorskip("safetensors.numpy")
    theirs = package.load(saved(SafetensorsHelper(), tensors()))
    assert set(theirs) == set(tensors())
    for name, array in tensors().items():
        assert np.array_equal(theirs[name], array, equal_nan=array.dtype.kind == "f")
    content = package.save(theirs, metadata={"format": "np"})
    for stream in ways(content, mapping):
        found = SafetensorsHelper().load(stream)
        for name, array in tensors().items():
            assert np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f")


def test_safetensors_keeps_types_that_numpy_lacks() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    types = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    arrays = {np.dtype(one).name: NUMBERS.astype(one)[:, ::2] for one in types}
    found = SafetensorsHelper().load(io.BytesIO(saved(SafetensorsHelper(), arrays)))
    assert all(same(found[name], np.ascontiguousarray(array)) for name, array in arrays.items())


def test_mapped_tensors_are_views_at_multiples_of_their_size(
    mapping: Callable[[bytes], Any],
) -> None:
    arrays = {"a": np.ones(3, "u1"), "b": np.ones(3, "f8"), "c": np.ones(3, "f2")}
    stream = mapping(saved(SafetensorsHelper(), arrays))
    whole = np.frombuffer(stream.memory, "u1")
    for array in SafetensorsHelper().load(stream).values():
        assert np.shares_memory(array, whole)
        assert array.ctypes.data % array.itemsize == 0


@pytest.mark.parametrize(
    "params",
    [
        [np.zeros(2)],
        {1: np.zeros(2)},
        {"__metadata__": np.zeros(2)},
        {"a": np.array(["text"])},
        {"a": np.zeros(2, "c16")},
        {"a": np.array([None])},
        {"\ud800": np.zeros(2)},
    ],
    ids=["list", "number", "reserved", "text", "complex", "object", "no text"],
)
def test_safetensors_refuses_what_it_cannot_keep(params: Any) -> None:
    with pytest.raises(InvalidInput):
        saved(SafetensorsHelper(), params)


def tensor_file(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(kind: str = "F32", shape: Any = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    """Return the header of one tensor."""
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


WRONG_TENSORS = {
    "nothing": b"",
    "half a length": b"\0\0\0",
    "a header beyond all": struct.pack("<Q", 2**63),
    "a header that is not there": struct.pack("<Q", 100),
    "no JSON": tensor_file(b"{nonsense"),
    "no object": tensor_file([1]),
    "no text": tensor_file(b"\xff\xff"),
    "deep": tensor_file(b"[" * 100_000),
    "a name twice": tensor_file(b'{"a":{"dtype":"F32","dtype":"F64"}}'),
    "no description": tensor_file({"a": 7}),
    "no shape": tensor_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a shape that is none": tensor_file({"a": one(shape="ab")}, bytes(4)),
    "a dimension that is true": tensor_file({"a": one(shape=[True])}, bytes(4)),
    "a negative dimension": tensor_file({"a": one(shape=[-1])}, bytes(4)),
    "half a dimension": tensor_file({"a": one(shape=[0.5, 2])}, bytes(4)),
    "dimensions beyond all": tensor_file({"a": one(shape=[2**62, 4])}, bytes(4)),
    "a thousand dimensions": tensor_file({"a": one(shape=[1] * 1000)}, bytes(4)),
    "none and beyond all": tensor_file({"a": one(shape=[0, 2**62, 2**62], end=0)}),
    "70 digits": tensor_file({"a": one(shape=[10**70, 0], end=0)}),
    "a size that is not the shape's": tensor_file({"a": one(shape=[2])}, bytes(4)),
    "a gap": tensor_file({"a": one(), "b": one(begin=8, end=12)}, bytes(12)),
    "an overlap": tensor_file({"a": one(), "b": one(begin=2, end=6)}, bytes(6)),
    "an end before the beginning": tensor_file({"a": one(begin=4, end=0, shape=[-1])}, bytes(4)),
    "numbers missing": tensor_file({"a": one()}, bytes(3)),
    "numbers left": tensor_file({"a": one()}, bytes(5)),
    "a type of the future": tensor_file({"a": one("F4")}, bytes(4)),
    "a type that is none": tensor_file({"a": {**one(), "dtype": ["F32"]}}, bytes(4)),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_hostile_safetensors_files_are_refused(name: str, mapping: Callable[[bytes], Any]) -> None:
    content = WRONG_TENSORS[name]
    streams = ways(content, mapping) if content else [io.BytesIO(content), OneWay(content)]
    for stream in streams:
        with pytest.raises((InvalidInput, UnsupportedOperation)) as caught:
            SafetensorsHelper().load(stream)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


# -- by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("numpyhelper", NumpyHelper),
        ("binaryhelper", BinaryHelper),
        ("safetensors", SafetensorsHelper),
    ],
)
def test_built_in_helpers_are_found_by_name(name: str, kind: type) -> None:
    found = get_helper(name)
    assert type(found) is kind
    assert found.name == name
    assert isinstance(found, Helper)


PLUG_IN = """
class Reversed:
    name = "reversed"

    def save(self, params, stream):
        stream.write(params[::-1])

    def load(self, stream):
        return stream.read()[::-1]

class NoHelper:
    name = "half"

def greedy(argument):
    return Reversed()
"""
ENTRIES = """
[storage.helpers]
reversed = third_party_helpers:Reversed
half = third_party_helpers:NoHelper
greedy = third_party_helpers:greedy
gone = third_party_helpers:Gone
lost = third_party_lost:Helper
numpyhelper = third_party_helpers:Reversed
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that has helpers."""
    (tmp_path / "third_party_helpers.py").write_text(PLUG_IN)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third_party_helpers", raising=False)


@pytest.mark.usefixtures("plug_in")
def test_an_installed_package_brings_a_helper() -> None:
    helper = get_helper("reversed")
    assert saved(helper, b"abc") == b"cba"
    assert helper.load(io.BytesIO(b"cba")) == b"abc"


@pytest.mark.usefixtures("plug_in")
def test_a_package_does_not_replace_a_built_in_helper() -> None:
    assert type(get_helper("numpyhelper")) is NumpyHelper


@pytest.mark.usefixtures("plug_in")
@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("half", InvalidInput, "lacks name, save or load"),
        ("greedy", InvalidInput, "without arguments"),
        ("gone", UnsupportedOperation, "third_party_helpers:Gone"),
        ("lost", UnsupportedOperation, "third_party_lost"),
    ],
)
def test_a_package_whose_helper_is_none_is_named(
    name: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        get_helper(name)


@pytest.mark.usefixtures("plug_in")
@pytest.mark.parametrize("name", ["androidhelper", "", "../numpyhelper"])
def test_an_unknown_helper_is_told_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UnsupportedOperation) as caught:
        get_helper(name)
    for known in ("numpyhelper", "binaryhelper", "safetensors", "reversed", "storage.helpers"):
        assert known in str(caught.value)


@pytest.mark.parametrize("helper", [NumpyHelper(), BinaryHelper(), SafetensorsHelper()])
def test_without_numpy_the_message_says_what_to_install(
    helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(UnsupportedOperation, match=r"pip install \"modelstorage\[container\]\""):
        saved(helper, {"a": []} if isinstance(helper, SafetensorsHelper) else [[]])
