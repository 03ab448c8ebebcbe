"""What a container tells of itself, and what it makes of bytes, whoever wrote them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import storage.container
from storage.container import FileChunk, ModelContainer, ModelContainerBuilder, NumpyHelper
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
)
from tests.container.conftest import WEIGHTS, content, same


def zipped(entries: dict[str, bytes], prefix: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, value in entries.items():
            archive.writestr(name, value)
    return prefix + stream.getvalue()


def with_metadata(metadata: bytes) -> bytes:
    return zipped({"metadata.json": metadata, "training_model.bin": b"weights"})


# -- where containers come from --------------------------------------------------------------


def test_a_container_is_not_made_by_its_class() -> None:
    with pytest.raises(TypeError, match="from_training_model"):
        ModelContainer()


def test_it_says_what_it_is(data: bytes) -> None:
    container = ModelContainer.from_stream(io.BytesIO(data))
    model_id = container.model_id
    assert repr(container) == f"<ModelContainer model_id={model_id} helper=numpyhelper>"
    assert container.metadata == {
        "tag": "v1",
        "helper_type": "numpyhelper",
        "inference_model_format": "onnx",
        "model_id": model_id,
    }
    assert container.has_training_model
    assert container.has_inference_model
    assert container.get_inference_model_format() == "onnx"
    assert container.list_files() == []
    assert container.format_version == 2
    assert not container.legacy_source
    blank = ModelContainer.from_stream(io.BytesIO(zipped({"metadata.json": b"{}"})))
    assert repr(blank) == "<ModelContainer model_id=? helper=?>"
    assert (blank.model_id, blank.get_inference_model_format(), blank.metadata) == (None, None, {})
    assert not blank.has_training_model
    assert not blank.has_inference_model


def test_nobody_changes_a_container(data: bytes) -> None:
    container = (
        ModelContainer.from_stream(io.BytesIO(data))
        .to_builder()
        .set_metadata("deep", {"list": [1]})
        .build()
    )
    container.metadata["deep"]["list"].append(2)
    container.metadata.clear()
    assert container.metadata["deep"] == {"list": [1]}
    with pytest.raises(AttributeError):
        container.model_id = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        container.entries["x"] = None  # type: ignore[index]
    # Not by way of a builder either.
    container.to_builder().set_metadata("deep", 1).build()
    assert container.metadata["deep"] == {"list": [1]}


def test_every_way_in_gives_the_same_bytes(file: Path, data: bytes) -> None:
    ways: list[Callable[[], ModelContainer]] = [
        lambda: ModelContainer.from_file(file),
        lambda: ModelContainer.from_file(str(file)),
        lambda: ModelContainer.from_stream(io.BytesIO(data)),
        lambda: ModelContainer.from_filechunk_stream(
            FileChunk(data[at : at + 1000]) for at in range(-1000, len(data), 1000)
        ),
        lambda: ModelContainer.open(file),
        lambda: ModelContainer.from_file(file).to_builder().build(),
        lambda: ModelContainer.from_filechunk_stream(
            ModelContainer.from_file(file).get_filechunk_stream(777)
        ),
    ]
    for way in ways:
        with way() as container:
            assert content(container) == data
            assert container.checksum == hashlib.sha256(data).hexdigest()
            assert same(container.get_training_model())


def test_what_gives_no_file_chunks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="FileChunk"):
        ModelContainer.from_filechunk_stream([b"bytes"])


def test_messages_have_the_size_and_the_class_that_was_asked_for(file: Path, data: bytes) -> None:
    class Message:
        def __init__(self, data: bytes) -> None:
            self.data = data

    with ModelContainer.from_file(file) as container:
        found = list(container.get_filechunk_stream(1000, Message))
        assert {type(each) for each in found} == {Message}
        assert [len(each.data) for each in found[:-1]] == [1000] * (len(data) // 1000)
        assert b"".join(each.data for each in found) == data
        assert len(list(container.get_filechunk_stream())) == 1
        with pytest.raises(InvalidInput, match="chunk_size"):
            list(container.get_filechunk_stream(0))


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError):
        ModelContainer.from_file(tmp_path / "missing")
    with pytest.raises(InvalidInput):
        ModelContainer.from_file(tmp_path)
    assert ModelContainer.detect_format_file(tmp_path / "missing") == "legacy"
    assert ModelContainer.detect_format_file(tmp_path) == "legacy"


# -- what is a container, and what the bare weights ------------------------------------------

# Bytes, and the format as a stream and as a file: what scaleoututil 1.0.7 and 1.1.0 find.
FORMATS: dict[str, tuple[bytes, str, str]] = {
    "a container": (with_metadata(b"{}"), "zip", "zip"),
    "metadata alone": (zipped({"metadata.json": b"{}"}), "zip", "zip"),
    "a ZIP without metadata": (zipped({"training_model.bin": b"x"}), "legacy", "legacy"),
    "an empty ZIP": (zipped({}), "legacy", "legacy"),
    "an NPZ": (zipped({"0.npy": b"x", "1.npy": b"y"}), "legacy", "legacy"),
    "something before it": (zipped({"metadata.json": b"{}"}, b"junk"), "legacy", "zip"),
    "PK before it": (zipped({"metadata.json": b"{}"}, b"PKjunk"), "zip", "zip"),
    "nothing": (b"", "legacy", "legacy"),
    "P": (b"P", "legacy", "legacy"),
    "PK": (b"PK", "legacy", "legacy"),
    "PK and no more of a ZIP": (b"PK\x03\x04" + bytes(100), "legacy", "legacy"),
    "numbers": (np.ones(10).tobytes(), "legacy", "legacy"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_apart(kind: str, tmp_path: Path) -> None:
    data, as_stream, as_file = FORMATS[kind]
    path = tmp_path / "file"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    assert ModelContainer.detect_format(stream) == as_stream
    assert stream.tell() == 0
    assert not stream.closed
    assert ModelContainer.detect_format_file(str(path)) == as_file
    for expected, container in [
        (as_stream, ModelContainer.from_stream(stream)),
        (as_file, ModelContainer.from_file(path)),
        (as_stream, ModelContainer.from_filechunk_stream([FileChunk(data)])),
    ]:
        assert container.legacy_source == (expected == "legacy")
        if expected == "legacy":
            with container.get_training_model_stream() as weights:
                assert weights.read() == data
            assert container.metadata == {"model_id": container.model_id}
            again = ModelContainer.from_stream(container.get_file_stream())
            assert not again.legacy_source
            assert again.metadata == container.metadata


def test_bare_arrays_are_read_as_numpy_s(bare: bytes, tmp_path: Path) -> None:
    container = ModelContainer.from_stream(io.BytesIO(bare))
    assert same(container.get_training_model())
    assert container.to_builder().build().legacy_source
    assert container.to_builder().set_model_id("m").build().legacy_source


def test_bytes_that_no_helper_is_known_for_are_not_guessed() -> None:
    container = ModelContainer.from_stream(io.BytesIO(b"of something else"))
    with pytest.raises(ValueError, match="give the helper"):
        container.get_training_model()


def test_a_bare_file_that_changes_while_it_is_wrapped_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "bare"
    path.write_bytes(b"weights")
    builder = ModelContainerBuilder.from_file(path)
    path.write_bytes(b"others!")
    os.utime(path, (1, 1))
    with pytest.raises(IntegrityError, match="written to"):
        builder.build()


@pytest.mark.parametrize("kept", [60, 0.5, 0.9, -1])
def test_a_container_that_was_cut_short_is_not_taken_for_bare_weights(
    kept: float, data: bytes, tmp_path: Path
) -> None:
    cut = data[: int(len(data) * kept) if isinstance(kept, float) else kept]
    path = tmp_path / "cut.zip"
    path.write_bytes(cut)
    for way in (
        lambda: ModelContainer.from_stream(io.BytesIO(cut)),
        lambda: ModelContainer.from_file(path),
    ):
        with pytest.raises(InvalidInput, match="cut short"):
            way()


def test_a_container_in_one_that_was_cut_short_is_not_taken_for_it(data: bytes) -> None:
    outer = content(
        ModelContainerBuilder().set_inference_model(os.urandom(5000) + data, "container").build()
    )
    with pytest.raises(InvalidInput, match="cut short"):
        ModelContainer.from_stream(io.BytesIO(outer[: outer.index(data) + len(data)]))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b"1", "int"),
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"\xff{}", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"version": 3}', "version 3"),
        (b'{"_version": 3}', "version 3"),
        (b'{"_version": ' + b"9" * 4000 + b"}", "version 999"),
        (b'{"a": "' + b"x" * (16 << 20) + b'"}', "bytes"),
    ],
    ids=lambda each: repr(each[:12]) if isinstance(each, bytes) else "",
)
def test_metadata_that_are_none_are_refused(metadata: bytes, message: str, tmp_path: Path) -> None:
    data = with_metadata(metadata)
    path = tmp_path / "model.zip"
    path.write_bytes(data)
    for way in (
        lambda: ModelContainer.from_stream(io.BytesIO(data)),
        lambda: ModelContainer.from_file(path),
    ):
        with pytest.raises(InvalidInput, match=message) as caught:
            way()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("written", "version", "found"),
    [
        ({"a": 1}, 2, {"a": 1}),
        ({"a": 1, "version": 2}, 2, {"a": 1}),
        ({"a": 1, "version": 1}, 1, {"a": 1}),
        ({"a": 1, "_version": 2}, 2, {"a": 1}),
        ({"version": "1.5", "_version": 2}, 2, {"version": "1.5"}),
        ({"version": 7, "_version": 2}, 2, {"version": 7}),
        ({"version": "1.5"}, 2, {"version": "1.5"}),
        ({"_version": "own", "version": 2}, 2, {"_version": "own"}),
    ],
)
def test_the_stamp_of_the_format_is_no_metadata(
    written: dict[str, Any], version: int, found: dict[str, Any]
) -> None:
    data = with_metadata(json.dumps(written).encode())
    container = ModelContainer.from_stream(io.BytesIO(data))
    assert (container.format_version, container.metadata) == (version, found)


@pytest.mark.parametrize("label", [{"helper_type": 5}, {"training_model_format": ["x"]}])
def test_a_helper_s_name_that_is_none_is_refused_when_it_is_needed(label: dict[str, Any]) -> None:
    data = with_metadata(json.dumps(label).encode())
    container = ModelContainer.from_stream(io.BytesIO(data))
    with pytest.raises(InvalidInput, match="expected a name"):
        container.get_training_model()


# -- reading ------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(data: bytes) -> None:
    container = ModelContainer.from_training_model(WEIGHTS)
    with (
        pytest.raises(ModelMissingError, match=r"inference_model\.bin"),
        container.get_inference_model_stream(),
    ):
        pass
    with pytest.raises(ModelMissingError, match="files/config"):
        container.get_file("config")
    nothing = ModelContainer.from_stream(io.BytesIO(zipped({"metadata.json": b"{}"})))
    with pytest.raises(ModelMissingError, match=r"training_model\.bin"):
        nothing.get_training_model()


def test_the_old_name_still_works_and_says_so(file: Path) -> None:
    with ModelContainer.from_file(file) as container:
        with pytest.warns(DeprecationWarning, match="get_training_model"):
            assert same(container.get_model_params())
        with pytest.warns(DeprecationWarning, match="get_training_model"):
            assert same(container.get_model_params(NumpyHelper()))


def test_a_helper_that_is_given_reads_from_then_on(file: Path) -> None:
    class Count:
        name = "count"

        def save(self, params: Any, stream: Any) -> None:
            raise AssertionError

        def load(self, stream: Any) -> int:
            return len(stream.read())

    with ModelContainer.from_file(file) as container:
        size = container.entries["training_model.bin"].size
        assert container.get_training_model(Count()) == size
        assert container.get_training_model() == size
        assert same(container.get_training_model(NumpyHelper()))
        assert same(container.get_training_model())


def test_mapped_weights_outlive_the_container_and_change_nothing(file: Path, data: bytes) -> None:
    with ModelContainer.from_file(file) as container:
        found = container.get_training_model(mmap=True)
    assert same(found)
    found[0][:] = 0
    assert file.read_bytes() == data


def test_weights_are_mapped_only_when_that_is_asked_for(file: Path) -> None:
    class Look:
        name = "look"

        def __init__(self) -> None:
            self.mapped: list[bool] = []

        def save(self, params: Any, stream: Any) -> None:
            raise AssertionError

        def load(self, stream: Any) -> None:
            self.mapped.append(hasattr(stream, "getbuffer"))

    look = Look()
    with ModelContainer.from_file(file) as container:
        container.get_training_model(look)
        container.get_training_model(look, mmap=True)
    assert look.mapped == [False, True]


def test_damaged_weights_are_not_handed_over(file: Path, data: bytes) -> None:
    with ModelContainer.from_file(file) as container:
        entry = container.entries["training_model.bin"]
    at = entry.header_offset + entry.compressed_size // 2
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with ModelContainer.from_file(file) as container:
        assert container.metadata["tag"] == "v1"
        with (
            container.get_training_model_stream() as stream,
            pytest.raises(IntegrityError, match=r"training_model\.bin"),
        ):
            stream.read()
        with pytest.raises((IntegrityError, InvalidInput)):
            container.get_training_model()


def test_file_streams_are_independent(file: Path, data: bytes) -> None:
    with ModelContainer.from_file(file) as container:
        one, two = container.get_file_stream(), container.get_file_stream()
    with one, two:
        assert one.read(10) == data[:10]
        assert two.seek(0, os.SEEK_END) == len(data)
        assert one.read() == data[10:]


# -- whether it is the right one ----------------------------------------------------------------


def test_the_checksum_is_that_of_the_file(file: Path, data: bytes) -> None:
    with ModelContainer.from_file(file) as container:
        assert container.checksum == hashlib.sha256(data).hexdigest()
        assert container.verify_checksum(container.checksum)
        assert container.verify_checksum(None)
        assert not container.verify_checksum("0" * 64)
        # It is kept, so it is there when the file is not.
        container.close()
        assert container.checksum == hashlib.sha256(data).hexdigest()


def test_a_signature_is_of_the_content_and_by_the_key(file: Path) -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with ModelContainer.from_file(file) as container:
        signature = container.sign(key, "node-a")
        assert signature.keys() == {"model_id", "algorithm", "signature", "signer_id"}
        assert signature["model_id"] == container.model_id
        assert signature["algorithm"] == "ed25519"
        assert "signer_id" not in container.sign(key)
        assert container.verify_signature(key.public_key(), signature["signature"])
        assert container.verify_signature(key.public_key(), signature)
        assert not container.verify_signature(other.public_key(), signature["signature"])
        assert not container.verify_signature(key.public_key(), "no base64!")
        changed = container.to_builder().set_metadata("tag", "v2").build()
        assert not changed.verify_signature(key.public_key(), signature["signature"])


# -- the package --------------------------------------------------------------------------------


def test_all_public_names_are_there() -> None:
    for name in storage.container.__all__:
        assert getattr(storage.container, name) is not None
    assert dir(storage.container) == storage.container.__all__
    with pytest.raises(AttributeError):
        storage.container.nothing  # noqa: B018


def test_opening_a_container_imports_no_package_it_does_not_need(file: Path) -> None:
    code = (
        "import sys, storage.container as c\n"
        "m = c.ModelContainer.from_file(sys.argv[1])\n"
        "m.metadata, m.to_builder().set_metadata('k', 1).build()\n"
        "heavy = {'numpy', 'cryptography', 'zstandard', 'safetensors', 'model_signing'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_building_one_of_arrays_imports_of_numpy_what_it_needs() -> None:
    code = (
        "import sys, numpy\n"
        "before = set(sys.modules)\n"
        "from storage.container import ModelContainer\n"
        "with ModelContainer.from_training_model([numpy.ones(3)]) as container:\n"
        "    container.get_training_model(mmap=True)\n"
        "print(sorted({'numpy.ma', 'inspect', 'pydantic', 'asyncio'} & set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
