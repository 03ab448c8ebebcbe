"""What goes into containers, archives and signatures comes out again, whatever it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from storage.container import (
    BinaryHelper,
    FileChunk,
    ModelContainer,
    ModelContainerBuilder,
    NumpyHelper,
    SafetensorsHelper,
    create_archive,
    extract_archive,
    sign_tree,
    verify_tree,
)
from storage.errors import InvalidInput, SignatureError
from tests.container.fuzzing import Unseekable
from tests.container.signing_keys import key_pair

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * SOAK)]


def examples(count: int) -> settings:
    return settings(max_examples=count * SOAK, database=None)


# -- what models hold ------------------------------------------------------------------------

_OURS = {"model_id", "version", "_version", "helper_type", "training_model_format"}
_OURS |= {"inference_model_format"}
KEYS = st.text(max_size=8).filter(lambda key: key not in _OURS)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
METADATA = st.dictionaries(KEYS, JSON, max_size=4)
KINDS = ("?", "b1", "u1", "i1", "<u2", ">i2", "<i4", ">u4", "<i8", "<u8", "<f2", ">f4", "<f4")
MORE_KINDS = ("<f8", "<c8", ">c16", "S3", "<U2", "<M8[s]", "<m8[ns]", "V5")
RECORD = np.dtype([("a", "<i4"), ("b", ">f8", (2,))])
DTYPES = st.sampled_from([*map(np.dtype, KINDS + MORE_KINDS), RECORD])
SHAPES = stn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw: st.DrawFn, dtypes: st.SearchStrategy[np.dtype] = DTYPES) -> np.ndarray:
    """Draw an array of any bits, in memory in one of several ways."""
    dtype, shape = draw(dtypes), draw(SHAPES)
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(draw(st.integers(0, 1 << 32))).bytes(count)
    if dtype.kind == "b":
        bits = bytes(each & 1 for each in bits)
    elif dtype.kind == "U":
        bits = bytes(count)  # not all bits are text
    array = np.frombuffer(bits, dtype).reshape(shape) if count else np.zeros(shape, dtype)
    way = draw(st.sampled_from(("C", "Fortran", "turned", "every second")))
    if way == "Fortran":
        return np.asfortranarray(array)
    if way == "turned":
        return array.T
    return array[::2] if way == "every second" and array.ndim else array


def equal(found: Any, expected: Any) -> bool:
    """Tell whether arrays are the same to the last bit, types and byte orders included."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(
            equal(found[name], expected[name]) for name in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return bool(
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


PLAIN = st.sampled_from([np.dtype(kind) for kind in ("<f4", "<f8", "<i8", "u1", "<f2", "?", "<c8")])
CONTENTS = st.binary(max_size=200) | st.builds(
    lambda piece, count: piece * count, st.binary(max_size=20), st.integers(0, 3000)
)
MODELS: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.tuples(st.just(NumpyHelper()), st.lists(arrays(), max_size=4)),
    st.tuples(
        st.just(SafetensorsHelper()),
        st.dictionaries(st.text(max_size=5), arrays(PLAIN), max_size=4),
    ),
    st.tuples(
        st.just(BinaryHelper()),
        stn.arrays("<f8", st.integers(0, 20), elements=st.floats(width=64)).map(lambda one: [one]),
    ),
)


def content(container: ModelContainer) -> bytes:
    with container.get_file_stream() as stream:
        return stream.read()


def inference_model(container: ModelContainer) -> bytes | None:
    if not container.has_inference_model:
        return None
    with container.get_inference_model_stream() as stream:
        return stream.read()


# -- containers ------------------------------------------------------------------------------


def in_chunks(data: bytes, sizes: list[int]) -> Iterator[FileChunk]:
    """Yield messages of the sizes that were drawn, over and over; each goes over the wire."""
    at = index = 0
    while at < len(data):
        size = sizes[index % len(sizes)]
        yield FileChunk.FromString(FileChunk(data[at : at + size]).SerializeToString())
        at, index = at + size, index + 1


class Uneven(io.RawIOBase):
    """A stream that cannot seek, and gives as much at once as was drawn."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        super().__init__()
        self._pieces = in_chunks(data, sizes)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._rest = self._rest or next(self._pieces, FileChunk()).data
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


SIZES = st.lists(st.integers(1, 9000), min_size=1, max_size=4)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "model.zip")


def ways_in(path: str, sizes: list[int]) -> dict[str, Callable[[bytes], ModelContainer]]:
    def from_file(data: bytes) -> ModelContainer:
        # A new file each time: another container may have the old one open.
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(data)
        return ModelContainer.from_file(path)

    def opened(data: bytes) -> ModelContainer:
        from_file(data).close()
        return ModelContainer.open(path)

    return {
        "file": from_file,
        "open": opened,
        "stream": lambda data: ModelContainer.from_stream(io.BytesIO(data)),
        "uneven": lambda data: ModelContainer.from_stream(Uneven(data, sizes)),
        "chunks": lambda data: ModelContainer.from_filechunk_stream(in_chunks(data, sizes)),
    }


WAYS = sorted(ways_in("", [1]))


def test_what_goes_into_a_container_comes_out(path: str) -> None:
    @examples(250)
    @given(
        MODELS,
        METADATA,
        st.none() | CONTENTS,
        st.dictionaries(st.sampled_from(["a", "größe.txt", "x y"]), CONTENTS, max_size=3),
        st.sampled_from(WAYS),
        SIZES,
    )
    def run(
        model: tuple[Any, Any],
        metadata: dict[str, Any],
        inference: bytes | None,
        files: dict[str, bytes],
        way: str,
        sizes: list[int],
    ) -> None:
        helper, parameters = model

        def build() -> bytes:
            with ModelContainerBuilder() as builder:
                builder.set_training_model(parameters, helper).set_metadata_dict(metadata)
                builder.set_model_id("an id")
                if inference is not None:
                    builder.set_inference_model_stream(Uneven(inference, sizes), "onnx")
                for name, data in files.items():
                    builder.set_file(name, data)
                with builder.build() as made:
                    assert made.verify_checksum(made.checksum)
                    return content(made)

        data = build()
        assert build() == data, "the same content is the same bytes"
        with ways_in(path, sizes)[way](data) as container:
            assert not container.legacy_source
            assert container.checksum == hashlib.sha256(data).hexdigest()
            assert container.size == len(data)
            assert container.model_id == "an id"
            known = {key: value for key, value in container.metadata.items() if key not in _OURS}
            assert repr(known) == repr(metadata)
            assert inference_model(container) == inference
            assert container.get_inference_model_format() == (None if inference is None else "onnx")
            assert {name: container.get_file(name) for name in container.list_files()} == files
            assert equal(container.get_training_model(), parameters)
            mapped = container.get_training_model(mmap=True)
            chunks = list(container.get_filechunk_stream(sizes[0]))
            assert b"".join(chunk.data for chunk in chunks) == data
            assert all(len(chunk.data) == sizes[0] for chunk in chunks[:-1])
        assert equal(mapped, parameters), "what is mapped outlives the container"

    run()


# What a container should be, told in a few words: what a chain of changes is compared with.
STEPS = st.one_of(
    st.tuples(st.just("metadata"), KEYS, JSON),
    st.tuples(st.just("model_id"), st.text(min_size=1, max_size=8)),
    st.tuples(st.just("inference"), CONTENTS, st.sampled_from(["onnx", "pt"])),
    st.tuples(st.just("file"), st.sampled_from(["a", "b"]), CONTENTS),
    st.tuples(st.just("training"), MODELS),
    st.tuples(st.just("nothing")),
    st.tuples(st.just("reload"), st.sampled_from(WAYS)),
    st.tuples(st.just("save")),
)


def test_chains_of_changes_keep_all_that_they_do_not_change(tmp_path: Path, path: str) -> None:
    @examples(150)
    @given(MODELS, METADATA, st.lists(STEPS, max_size=7), SIZES)
    def run(
        model: tuple[Any, Any],
        metadata: dict[str, Any],
        steps: list[tuple[Any, ...]],
        sizes: list[int],
    ) -> None:
        helper, parameters = model
        metadata = dict(metadata)
        inference, files = None, {}
        container = ModelContainer.from_training_model(parameters, helper, metadata)
        for kind, *values in steps:
            model_id, before = container.model_id, container.checksum
            if kind == "reload":
                data = content(container)
                container.close()
                container = ways_in(path, sizes)[values[0]](data)
            elif kind == "save":
                saved = tmp_path / "saved.zip"
                container.save_to_file(saved)
                assert saved.read_bytes() == content(container)
            else:
                with container.to_builder() as builder:
                    container.close()
                    if kind == "metadata":
                        builder.set_metadata(*values)
                        metadata[values[0]] = values[1]
                    elif kind == "model_id":
                        builder.set_model_id(*values)
                    elif kind == "inference":
                        builder.set_inference_model(*values)
                        inference = tuple(values)
                    elif kind == "file":
                        builder.set_file(*values)
                        files[values[0]] = values[1]
                    elif kind == "training":
                        ((helper, parameters),) = values
                        builder.set_training_model(parameters, helper)
                    container = builder.build()
            if kind in ("nothing", "reload", "save"):
                assert (container.model_id, container.checksum) == (model_id, before)
            elif kind == "model_id":
                assert container.model_id == values[0]
            else:
                assert container.model_id != model_id
            known = {key: value for key, value in container.metadata.items() if key not in _OURS}
            assert known == metadata
            found = inference_model(container)
            assert (found, container.get_inference_model_format()) == (inference or (None, None))
            assert {name: container.get_file(name) for name in container.list_files()} == files
            assert equal(container.get_training_model(), parameters)
        container.close()

    run()


@given(st.binary(max_size=3000).filter(lambda data: not data.startswith(b"PK")), SIZES)
@examples(100)
def test_any_bytes_are_a_bare_model_and_kept(data: bytes, sizes: list[int]) -> None:
    with ModelContainer.from_stream(Uneven(data, sizes)) as container:
        assert container.legacy_source
        with container.get_training_model_stream() as stream:
            assert stream.read() == data
        with ModelContainer.from_stream(container.get_file_stream()) as again:
            assert again.checksum == container.checksum
            assert not again.legacy_source


# -- parameters ------------------------------------------------------------------------------


@given(st.lists(arrays(), max_size=5))
@examples(300)
def test_numpy_loads_what_is_saved_here(parameters: list[np.ndarray]) -> None:
    stream = io.BytesIO()
    NumpyHelper().save(parameters, stream)
    with np.load(io.BytesIO(stream.getvalue())) as found:
        assert equal([found[str(index)] for index in range(len(parameters))], parameters)
        assert len(found.files) == len(parameters)


@given(st.lists(arrays(), max_size=5), st.sampled_from([np.savez, np.savez_compressed]))
@examples(300)
def test_what_numpy_saves_is_loaded_here(
    parameters: list[np.ndarray], save: Callable[..., None]
) -> None:
    stream = io.BytesIO()
    save(stream, **{str(index): array for index, array in enumerate(parameters)})
    for source in (io.BytesIO(stream.getvalue()), io.BufferedReader(Unseekable(stream.getvalue()))):
        assert equal(NumpyHelper().load(source), parameters)


@given(st.dictionaries(st.text(max_size=5), arrays(PLAIN), max_size=4))
@examples(200)
def test_safetensors_go_both_ways(parameters: dict[str, np.ndarray]) -> None:
    stream = io.BytesIO()
    SafetensorsHelper().save(parameters, stream)
    found = safetensors.numpy.load(stream.getvalue())
    assert equal({name: found[name] for name in parameters}, parameters)
    plain = {name: array.copy("C") for name, array in parameters.items()}
    found = SafetensorsHelper().load(io.BytesIO(safetensors.numpy.save(plain)))
    assert equal({name: found[name] for name in parameters}, parameters)
    assert len(found) == len(parameters)


# -- archives --------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and not name.startswith("-"))
"""What a file can be called."""

TREES = st.recursive(
    st.tuples(CONTENTS, st.booleans()) | st.just("link"),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def portable(name: str) -> bool:
    """Tell whether a name is a plain one on every system; other ones are not extracted."""
    return "\\" not in name and ":" not in name and len(os.fsencode(name)) < 200


def make(folder: Path, tree: dict[str, Any], top: Path, made: list[str]) -> None:
    """Make a tree of files, folders and links to the files made before."""
    folder.mkdir()
    for name, below in tree.items():
        path = folder / name
        if isinstance(below, dict):
            make(path, below, top, made)
        elif below == "link":
            target = made[-1] if made else None
            if target is not None:
                path.symlink_to(os.path.relpath(target, folder))
        else:
            data, executable = below
            path.write_bytes(data)
            path.chmod(0o755 if executable else 0o644)
            made.append(str(path))


def seen(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: contents, links, and who may be executed."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            relative = os.path.relpath(path, folder)
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path))
            elif path.is_dir():
                found[relative] = "folder"
            else:
                found[relative] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


def names_of(tree: dict[str, Any]) -> Iterator[str]:
    for name, below in tree.items():
        yield name
        if isinstance(below, dict):
            yield from names_of(below)


def test_trees_go_through_archives(tmp_path: Path) -> None:
    @examples(120)
    @given(TREES.filter(lambda tree: all(map(portable, names_of(tree)))), st.integers(-5, 5))
    def run(tree: dict[str, Any], level: int) -> None:
        first, second, out = (tmp_path / name for name in ("first", "second", "out"))
        for folder in (first, second, out):
            shutil.rmtree(folder, ignore_errors=True)
        make(first, tree, first, [])
        # The same, made in another order, at another time.
        make(second, dict(reversed(tree.items())), second, [])
        os.utime(second, (1, 1))
        archive, other = tmp_path / "1.tar.zst", tmp_path / "2.tar.zst"
        made = create_archive(first, archive, digests=("sha256",), level=level)
        extract_archive(archive, out)
        assert seen(out) == seen(first)
        if seen(first) == seen(second):
            again = create_archive(second, other, level=level, threads=1)
            assert other.read_bytes() == archive.read_bytes()
            assert tuple(made)[1:] == tuple(again)[1:]
        assert made.archive_sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
        assert made.size == archive.stat().st_size
        # What came out makes the same archive.
        create_archive(out, other, level=level)
        assert other.read_bytes() == archive.read_bytes()

    run()


# -- signatures ------------------------------------------------------------------------------


def repacked(
    data: bytes, change: Callable[[dict[str, bytes]], Any] = lambda entries: None
) -> bytes:
    """Write a container anew, as zipfile does it, with its entries in another order."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in reversed(archive.namelist())}
    change(entries)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in entries.items():
            archive.writestr(name, each)
    return stream.getvalue()


CHANGES: dict[str, Callable[[dict[str, bytes], str, int], Any]] = {
    "flip": lambda entries, name, at: entries.update({name: _flipped(entries[name] or b"\0", at)}),
    "cut": lambda entries, name, at: (
        entries.update({name: entries[name][:-1]})
        if entries[name]
        else entries.update({name: b"x"})
    ),
    "lengthen": lambda entries, name, at: entries.update({name: entries[name] + b"\0"}),
    "remove": lambda entries, name, at: entries.pop(name),
    "rename": lambda entries, name, at: entries.update({name + "x": entries.pop(name)}),
    "add": lambda entries, name, at: entries.update({f"{name}.{at}": b""}),
    "attach": lambda entries, name, at: entries.update({f"files/{at}": b""}),
}


def _flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at % len(data)] ^= 1 << at % 8
    return bytes(changed)


def test_a_signature_holds_for_the_same_entries_and_no_others(path: str) -> None:
    @examples(150)
    @given(
        st.lists(arrays(), max_size=2),
        METADATA,
        CONTENTS,
        st.sampled_from(WAYS),
        st.sampled_from(sorted(CHANGES)),
        st.integers(0, 1 << 16),
    )
    def run(
        parameters: list[np.ndarray],
        metadata: dict[str, Any],
        inference: bytes,
        way: str,
        kind: str,
        at: int,
    ) -> None:
        with (
            ModelContainer.from_training_model(parameters, metadata=metadata) as plain,
            plain.to_builder().set_inference_model(inference, "onnx").build() as container,
        ):
            signature = json.loads(json.dumps(container.sign(KEY, "me")))
            container.save_to_file(path)
            data = content(container)
            names = list(container.entries)
        public = KEY.public_key()
        for same in (data, repacked(data)):
            with ways_in(path, [1000])[way](same) as again:
                assert again.verify_signature(public, signature)
                assert again.verify_signature(public, signature["signature"])
        with (
            ways_in(path, [1000])[way](data) as again,
            again.to_builder() as builder,
            builder.set_metadata("another", 1).build() as other,
        ):
            assert not other.verify_signature(public, signature)
        name = names[at % len(names)]
        if name == "metadata.json" and kind not in ("add", "attach"):
            name = "inference_model.bin"  # without metadata it is no container
        forged = repacked(data, lambda entries: CHANGES[kind](entries, name, at))
        with ways_in(path, [1000])[way](forged) as other:
            try:
                assert not other.verify_signature(public, signature)
            except InvalidInput:
                assert kind in ("add", "rename"), "what is no entry of a container"

    run()


def test_a_signed_tree_verifies_until_anything_changes(tmp_path: Path) -> None:
    keys = key_pair(tmp_path / "keys")

    @examples(40)
    @given(
        st.dictionaries(NAMES.filter(portable), CONTENTS, min_size=1, max_size=4),
        st.sampled_from(["flip", "cut", "remove", "rename", "add"]),
        st.integers(0, 1 << 16),
    )
    def run(files: dict[str, bytes], kind: str, at: int) -> None:
        tree, signature = tmp_path / "tree", tmp_path / "model.sig"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        for name, data in files.items():
            (tree / name).write_bytes(data)
        sign_tree(tree, signature, key=keys.private)
        verify_tree(tree, signature, key=keys.public)
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tree, copy)
        verify_tree(copy, signature, key=keys.public)
        CHANGES[kind](files, sorted(files)[at % len(files)], at)
        shutil.rmtree(copy)
        copy.mkdir()
        for name, data in files.items():
            (copy / name).write_bytes(data)
        with pytest.raises(SignatureError):
            verify_tree(copy, signature, key=keys.public)

    run()
