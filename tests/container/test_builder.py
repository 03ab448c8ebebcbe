"""What a builder makes of what it is told: the rules of the format's own library, and no others."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from storage.container import (
    BinaryHelper,
    ModelContainer,
    ModelContainerBuilder,
    NumpyHelper,
    SafetensorsHelper,
)
from storage.errors import InsufficientSpaceError, InvalidInput, UnsupportedOperation
from tests.container.conftest import WEIGHTS, content, same

Builder = ModelContainerBuilder
Step = Callable[[Builder], Builder]

# What stands for the model_id that it had, and for one that nobody has had before.
KEPT, FRESH = "kept", "fresh"


def starts(data: bytes, bare: bytes) -> dict[str, Callable[[], Builder]]:
    return {
        "loaded": lambda: Builder.from_stream(io.BytesIO(data)),
        "copied": lambda: ModelContainer.from_stream(io.BytesIO(data)).to_builder(),
        "new": lambda: Builder.from_training_model(WEIGHTS),
        "bare": lambda: Builder.from_stream(io.BytesIO(bare)),
        "blank": Builder,
    }


# Steps, and the model_id when a container was loaded, of parameters, of bare bytes, of nothing;
# None if there is nothing to build. What scaleoututil 1.0.7 and 1.1.0 do, both run.
IDS: dict[str, tuple[Step, str, str, str, str | None]] = {
    "nothing": (lambda b: b, KEPT, FRESH, FRESH, None),
    "metadata": (lambda b: b.set_metadata("k", "v"), FRESH, FRESH, FRESH, FRESH),
    "no metadata": (lambda b: b.set_metadata_dict({}), KEPT, FRESH, FRESH, None),
    "id as metadata": (lambda b: b.set_metadata("model_id", "X"), FRESH, FRESH, FRESH, FRESH),
    "id in a dict": (lambda b: b.set_metadata_dict({"model_id": "X"}), FRESH, FRESH, FRESH, FRESH),
    "id": (lambda b: b.set_model_id("X"), "X", FRESH, "X", "X"),
    "id, then another as metadata": (
        lambda b: b.set_model_id("X").set_metadata("model_id", "Y"),
        *("Y", FRESH, "Y", "Y"),
    ),
    "another as metadata, then id": (
        lambda b: b.set_metadata("model_id", "Y").set_model_id("X"),
        *("X", FRESH, "X", "X"),
    ),
    "id and metadata": (lambda b: b.set_model_id("X").set_metadata("k", 1), "X", FRESH, "X", "X"),
    "inference model": (lambda b: b.set_inference_model(b"i", "pt"), FRESH, FRESH, FRESH, FRESH),
    "empty inference model": (
        lambda b: b.set_inference_model(b"", "pt"),
        *(FRESH, FRESH, FRESH, FRESH),
    ),
    "inference model and id": (
        lambda b: b.set_inference_model_stream(io.BytesIO(b"i"), "pt").set_model_id("X"),
        *("X", FRESH, "X", "X"),
    ),
    "weights": (lambda b: b.set_training_model(WEIGHTS), FRESH, FRESH, FRESH, FRESH),
    "weights and id": (
        lambda b: b.set_training_model(WEIGHTS).set_model_id("X"),
        *("X", FRESH, "X", "X"),
    ),
    "a file": (lambda b: b.set_file("f", b"f"), FRESH, FRESH, FRESH, FRESH),
    "helper": (lambda b: b.set_helper(NumpyHelper()), KEPT, FRESH, FRESH, None),
    "helper by name": (lambda b: b.set_helper_type("numpyhelper"), KEPT, FRESH, FRESH, None),
}


@pytest.mark.parametrize("start", ["loaded", "copied", "new", "bare", "blank"])
@pytest.mark.parametrize("steps", IDS)
def test_the_model_id_is_kept_made_or_taken(
    start: str, steps: str, data: bytes, bare: bytes
) -> None:
    step, loaded, new, of_bare, blank = IDS[steps]
    expected = {"loaded": loaded, "copied": loaded, "new": new, "bare": of_bare, "blank": blank}
    before = ModelContainer.from_stream(io.BytesIO(data)).model_id
    builder = step(starts(data, bare)[start]())
    if expected[start] is None:
        with pytest.raises(InvalidInput, match="nothing to build"):
            builder.build()
        return
    container = builder.build()
    found = container.model_id
    assert found is not None
    if expected[start] == KEPT:
        assert found == before
    elif expected[start] == FRESH:
        assert found not in ("X", "Y", before)
        assert uuid.UUID(found).version == 4
    else:
        assert found == expected[start]
    # And the file says the same as the object.
    again = ModelContainer.from_stream(container.get_file_stream())
    assert again.metadata == container.metadata


def test_each_build_of_parameters_has_an_id_of_its_own() -> None:
    builder = Builder.from_training_model(WEIGHTS)
    assert builder.build().model_id != builder.build().model_id


# Steps, and what metadata say of the helper afterwards, when a container of numpy's was loaded.
LABELS: dict[str, tuple[Step, dict[str, str]]] = {
    "weights": (lambda b: b.set_training_model(WEIGHTS), {"helper_type": "numpyhelper"}),
    "a helper that nothing was written by": (
        lambda b: b.set_helper(BinaryHelper()).set_metadata("k", 1),
        {"helper_type": "numpyhelper"},
    ),
    "weights by another helper": (
        lambda b: b.set_training_model([np.ones(3)], BinaryHelper()),
        {"helper_type": "binaryhelper"},
    ),
    "weights by another helper, by name": (
        lambda b: b.set_helper_type("binaryhelper").set_training_model([np.ones(3)]),
        {"helper_type": "binaryhelper"},
    ),
    "the last helper counts": (
        lambda b: (
            b.set_helper_type("binaryhelper").set_helper(NumpyHelper()).set_training_model(WEIGHTS)
        ),
        {"helper_type": "numpyhelper"},
    ),
    "metadata say it": (
        lambda b: b.set_metadata("helper_type", "mine"),
        {"helper_type": "mine"},
    ),
    "metadata say it of weights": (
        lambda b: b.set_training_model(WEIGHTS).set_metadata("helper_type", "mine"),
        {"helper_type": "mine"},
    ),
    "safetensors, which the peer could not import": (
        lambda b: b.set_training_model({"w": np.ones(3)}, SafetensorsHelper()),
        {"training_model_format": "safetensors"},
    ),
}


@pytest.mark.parametrize("steps", LABELS)
def test_metadata_tell_what_wrote_the_weights(steps: str, data: bytes) -> None:
    step, expected = LABELS[steps]
    found = step(Builder.from_stream(io.BytesIO(data))).build().metadata
    keys = ("helper_type", "training_model_format")
    assert {key: found[key] for key in keys if key in found} == expected


def test_a_helper_of_bare_bytes_is_noted(bare: bytes) -> None:
    container = Builder.from_stream(io.BytesIO(bare)).set_helper(NumpyHelper()).build()
    assert container.metadata == {"helper_type": "numpyhelper", "model_id": container.model_id}
    assert same(container.get_training_model())


def test_a_helper_that_is_not_there_matters_only_when_it_is_needed(data: bytes) -> None:
    unknown = Builder.from_stream(io.BytesIO(data)).set_metadata("helper_type", "of-others").build()
    tagged = unknown.to_builder().set_metadata("k", "v").build()
    with pytest.raises(UnsupportedOperation, match="of-others"):
        tagged.get_training_model()
    assert same(tagged.get_training_model(NumpyHelper()))
    with pytest.raises(UnsupportedOperation, match="of-others"):
        tagged.to_builder().set_training_model(WEIGHTS).build()
    with pytest.raises(UnsupportedOperation, match="nobody-s"):
        tagged.to_builder().set_helper_type("nobody-s").build()


def test_the_format_of_the_inference_model_is_that_of_its_bytes(data: bytes) -> None:
    builder = Builder.from_stream(io.BytesIO(data)).set_inference_model(b"i", "pt")
    container = builder.set_metadata("inference_model_format", "wrong").build()
    assert container.get_inference_model_format() == "pt"
    retagged = container.to_builder().set_metadata("inference_model_format", "torch").build()
    assert retagged.get_inference_model_format() == "torch"


@pytest.mark.parametrize("data_of", ["text", bytearray(b"x"), memoryview(b"x"), None])
def test_only_bytes_are_an_inference_model(data_of: Any) -> None:
    with pytest.raises(TypeError, match="must be bytes"):
        Builder().set_inference_model(data_of, "onnx")
    with pytest.raises(TypeError, match="must be bytes"):
        Builder().set_file("name", data_of)


def test_files_are_attached_replaced_and_kept() -> None:
    first = Builder().set_file("a.json", b"{}").set_file_stream("ü b", io.BytesIO(b"u")).build()
    second = first.to_builder().set_file("a.json", b"[]").set_metadata("k", 1).build()
    assert sorted(second.list_files()) == ["a.json", "ü b"]
    assert (second.get_file("a.json"), second.get_file("ü b")) == (b"[]", b"u")
    assert second.has_file("ü b")
    assert not second.has_file("c")
    assert first.get_file("a.json") == b"{}"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\\b", "/", "a\0b"])
def test_an_attached_file_has_a_plain_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        Builder().set_file(name, b"")
    with pytest.raises(InvalidInput, match="name"):
        Builder().set_file_stream(name, io.BytesIO())


@pytest.mark.parametrize("name", ["\ud800", "x" * 65_530])
def test_a_name_that_no_archive_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be the name of another entry"):
        Builder().set_file(name, b"").build()


@pytest.mark.parametrize("name", ["metadata.json", "training_model.bin", ".", "ü", "a\nb"])
def test_an_attached_file_is_no_other_entry(name: str) -> None:
    container = Builder.from_training_model(WEIGHTS).set_file(name, b"mine").build()
    assert container.list_files() == [name]
    assert container.get_file(name) == b"mine"
    assert same(container.get_training_model())
    assert "model_id" in container.metadata


# -- metadata --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        -1.5,
        "ünïcødé \u0000 \U0001f600",
        "\ud800",
        [1, [2]],
        {"a": {"b": []}},
        10**300,
    ],
)
def test_metadata_survive(value: Any) -> None:
    container = Builder().set_metadata("k", value).build()
    again = ModelContainer.from_stream(container.get_file_stream())
    assert container.metadata["k"] == again.metadata["k"] == value


def test_numbers_that_json_lacks_survive_as_python_writes_them() -> None:
    container = Builder().set_metadata_dict({"a": math.nan, "b": math.inf}).build()
    again = ModelContainer.from_stream(container.get_file_stream())
    assert math.isnan(again.metadata["a"])
    assert again.metadata["b"] == math.inf


def loop() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    "metadata",
    [
        {1: "a"},
        {None: "a"},
        {"k": {True: 1}},
        {"k": [{2: 1}]},
        {(1, 2): 1},
        {"k": object()},
        {"k": b"bytes"},
        {"k": {1, 2}},
        {"k": np.float32(1)},
        {"k": loop()},
        {"k": deep()},
        {"k": 10**5000},
        {"_version": 2},
        {"k": "x" * (16 << 20)},
    ],
    ids=lambda each: str(type(next(iter(each.values()))).__name__) + str(next(iter(each)))[:9],
)
def test_metadata_that_json_cannot_hold_are_refused_before_anything_is_written(
    metadata: dict[Any, Any], temporary: Path
) -> None:
    saved = []

    class Helper(NumpyHelper):
        def save(self, params: Any, stream: BinaryIO) -> None:
            saved.append(params)

    builder = Builder.from_training_model(WEIGHTS, Helper()).set_metadata_dict(metadata)
    with pytest.raises(InvalidInput) as caught:
        builder.build()
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert not saved


def test_a_key_named_version_stays_the_user_s(data: bytes) -> None:
    container = Builder.from_stream(io.BytesIO(data)).set_metadata("version", 7).build()
    with zipfile.ZipFile(container.get_file_stream()) as zipped:
        written = json.loads(zipped.read("metadata.json"))
    assert (written["version"], written["_version"]) == (7, 2)
    again = ModelContainer.from_stream(container.get_file_stream())
    assert again.metadata["version"] == 7
    assert again.to_builder().set_metadata("k", 1).build().metadata["version"] == 7
    assert "_version" not in again.metadata


def test_the_builder_s_metadata_are_not_the_container_s() -> None:
    tags = ["a"]
    builder = Builder().set_metadata("tags", tags)
    container = builder.build()
    tags.append("b")
    builder.set_metadata("k", 1)
    assert container.metadata["tags"] == ["a"]
    assert builder.build().metadata["tags"] == ["a", "b"]


# -- what is written ---------------------------------------------------------------------------


def test_the_archive_is_what_the_format_says() -> None:
    container = (
        Builder.from_training_model(WEIGHTS)
        .set_metadata("k", "v")
        .set_file("f", b"file")
        .set_inference_model(b"model", "pt")
        .build()
    )
    with zipfile.ZipFile(container.get_file_stream()) as zipped:
        assert zipped.testzip() is None
        assert zipped.namelist() == [
            "metadata.json",
            "training_model.bin",
            "inference_model.bin",
            "files/f",
        ]
        assert json.loads(zipped.read("metadata.json")) == {
            "k": "v",
            "helper_type": "numpyhelper",
            "inference_model_format": "pt",
            "model_id": container.model_id,
            "version": 2,
        }
        assert zipped.read("inference_model.bin") == b"model"
        with np.load(io.BytesIO(zipped.read("training_model.bin"))) as arrays:
            assert same([arrays[str(index)] for index in range(len(WEIGHTS))])
    assert list(container.entries) == zipped.namelist()
    assert container.format_version == 2
    assert container.size == len(content(container))


def test_changed_metadata_take_over_the_compressed_bytes_as_they_are(file: Path) -> None:
    # Deflated by another program; its weights are damaged inside, so that nobody can unpack them.
    weights = np.random.default_rng(2).integers(0, 4, 50_000).astype("u1").tobytes()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("metadata.json", '{"model_id": "m", "_version": 2}')
        zipped.writestr("training_model.bin", weights)
        zipped.writestr("of-a-later-release", b"later" * 100)
        info = zipped.getinfo("training_model.bin")
    raw = bytearray(file.read_bytes())
    begin = info.header_offset + 30 + len(info.filename)
    end = begin + info.compress_size
    raw[begin + 1000 : begin + 2000] = bytes(1000)
    file.write_bytes(raw)

    with ModelContainer.from_file(file) as container:
        retagged = container.to_builder().set_metadata("tag", "v2").build()
    entry = retagged.entries["training_model.bin"]
    assert (entry.compressed_size, entry.crc, entry.method) == (info.compress_size, info.CRC, 8)
    assert bytes(raw[begin:end]) in content(retagged)
    assert retagged.metadata["tag"] == "v2"
    assert retagged.get_training_model_stream is not None
    with zipfile.ZipFile(retagged.get_file_stream()) as zipped:
        assert zipped.read("of-a-later-release") == b"later" * 100


def test_a_builder_builds_as_often_as_it_is_asked_to(bare: bytes) -> None:
    builder = (
        Builder.from_stream(io.BytesIO(bare))
        .set_inference_model_stream(io.BytesIO(b"inference"), "pt")
        .set_file_stream("f", io.BytesIO(b"file"))
    )
    first, second = builder.build(), builder.build()
    builder.close()
    for container in (first, second):
        assert same(container.get_training_model())
        with container.get_inference_model_stream() as stream:
            assert stream.read() == b"inference"
        assert container.get_file("f") == b"file"
    with pytest.raises(InvalidInput, match="closed"):
        builder.build()


def test_streams_are_read_when_they_are_given(data: bytes) -> None:
    builder = Builder()
    with io.BytesIO(b"skipped, read") as stream:
        stream.seek(9)
        builder.set_inference_model_stream(stream, "pt")
    with builder.build().get_inference_model_stream() as found:
        assert found.read() == b"read"
    with io.BytesIO(data) as stream:
        stream.seek(100)
        builder = Builder.from_stream(stream)
        assert not stream.closed
    assert same(builder.build().get_training_model())


def test_a_stream_that_cannot_seek_is_read_too(data: bytes) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as stream:
        with open(writing, "wb") as sink:
            sink.write(data[: 32 * 1024])
            sink.flush()
            rest = data[32 * 1024 :]
            assert len(rest) < 32 * 1024
            sink.write(rest)
        container = ModelContainer.from_stream(stream)
    assert content(container) == data


def test_helpers_need_name_save_and_load_and_nothing_else() -> None:
    class Lines:
        name = "lines"

        def save(self, params: Any, stream: BinaryIO) -> str:
            # As those that need a file of the system do.
            with open(os.dup(stream.fileno()), "wb") as file:
                file.writelines(line.encode() + b"\n" for line in params)
            return "ignored"

        def load(self, stream: BinaryIO) -> list[str]:
            return [line.decode().rstrip("\n") for line in stream]

    helper = Lines()
    container = ModelContainer.from_training_model(["a", "b"], helper)
    assert container.metadata["helper_type"] == "lines"
    assert container.get_training_model() == ["a", "b"]
    again = ModelContainer.from_stream(container.get_file_stream())
    assert again.get_training_model(helper) == ["a", "b"]


def test_what_has_no_name_is_no_helper() -> None:
    with pytest.raises(InvalidInput, match="lacks a name"):
        ModelContainer.from_training_model([], object())  # type: ignore[arg-type]


def test_a_full_disk_is_reported_as_one() -> None:
    class Helper(NumpyHelper):
        streams = False

        def save(self, params: Any, stream: BinaryIO) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InsufficientSpaceError, match="full"):
        ModelContainer.from_training_model(WEIGHTS, Helper())
