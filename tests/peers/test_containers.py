"""Containers of ``scaleoututil`` open here, and ours open there."""

from __future__ import annotations

import base64
import itertools
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from storage import StorageError
from storage.container import FileChunk, ModelContainer, ModelContainerBuilder, get_helper
from tests.peers.environments import SCALEOUT, Peer, PeerError
from tests.peers.inside.containers import Interpreter, facts_of_arrays, load_arrays
from tests.peers.models import GIB, KINDS, Inputs, Steps

# What depends on how the bytes are packed, which each side does in its own way.
_PACKING = {"checksum", "file", "training_bytes", "model_id"}
kinds = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


class Ours:
    """The tasks of the peer's script, done by this library."""

    def __init__(self) -> None:
        self.steps = Interpreter(ModelContainer, ModelContainerBuilder, get_helper, FileChunk)

    def __call__(self, task: str, **arguments: Any) -> Any:
        return getattr(self, task)(**arguments)

    def run(self, steps_: Steps, helper: str | None = None, decode: bool = True) -> Any:
        with self.steps.run(steps_) as model:
            return self.steps.describe(model, helper, decode)

    def make(self, steps_: Steps) -> None:
        self.steps.run(steps_).close()

    def detect(self, path: str) -> list[str]:
        with open(path, "rb") as stream:
            return [ModelContainer.detect_format_file(path), ModelContainer.detect_format(stream)]


ours = Ours()


def without_stamp(facts: Any, maker: Ours | Peer, reader: Ours | Peer) -> Any:
    """Take off the one thing that is seen but was not meant.

    The format's version is stamped here as the releases before 1.1 do it. The newest knows
    another key for it, and shows this one, in what those releases made as well.
    """
    if isinstance(maker, Ours) and isinstance(reader, Peer) and reader.release is SCALEOUT:
        assert facts["metadata"].pop("version") == 2
    return facts


def described(side: Ours | Peer, path: Path, name: str) -> Any:
    kind = KINDS[name]
    return side(
        "run", steps_=[["from_file", str(path)], ["build"]], helper=kind.helper, decode=kind.decode
    )


@kinds
@pytest.mark.parametrize("direction", ["theirs is read here", "ours is read there"])
def test_a_container_says_the_same_to_its_maker_and_to_the_other(
    scaleout: Peer, inputs: Inputs, tmp_path: Path, direction: str, name: str
) -> None:
    maker, reader = (scaleout, ours) if direction.startswith("theirs") else (ours, scaleout)
    kind, path = KINDS[name], tmp_path / "model.zip"
    steps = [*kind.steps(inputs), ["build"], ["reopen", str(path)]]
    made = maker("run", steps_=steps, helper=kind.helper, decode=kind.decode)
    assert without_stamp(described(reader, path, name), maker, reader) == made
    assert uuid.UUID(made["model_id"]) if made["model_id"] != "given" else True


@kinds
def test_the_same_steps_make_the_same_model(scaleout: Peer, inputs: Inputs, name: str) -> None:
    kind = KINDS[name]
    steps = [*kind.steps(inputs), ["build"]]
    theirs, here = (
        side("run", steps_=steps, helper=kind.helper, decode=kind.decode)
        for side in (scaleout, ours)
    )
    for facts in (theirs, here):
        facts["metadata"].pop("model_id")
        if kind.decode:
            for fact in _PACKING:
                facts.pop(fact, None)
        else:  # the weights are what they were given
            for fact in _PACKING - {"training_bytes"}:
                facts.pop(fact)
    assert here == theirs


@kinds
def test_a_chain_of_new_tags_by_both_in_turn_keeps_the_content(
    scaleout: Peer, inputs: Inputs, tmp_path: Path, name: str
) -> None:
    kind, path = KINDS[name], tmp_path / "0.zip"
    steps = [*kind.steps(inputs), ["build"], ["reopen", str(path)]]
    first = ours("run", steps_=steps, helper=kind.helper, decode=kind.decode)
    seen = {first["model_id"]}
    for number, side in enumerate([scaleout, ours, scaleout, ours, ours, scaleout], start=1):
        target = tmp_path / f"{number}.zip"
        steps = [
            ["from_file", str(path)],
            ["set_metadata", f"tag {number}", number],
            ["build"],
            ["reopen", str(target)],
        ]
        if number % 3 == 0:
            steps[2:2] = [["build"], ["to_builder"], ["set_metadata", "via", "to_builder"]]
        facts = side("run", steps_=steps, helper=kind.helper, decode=kind.decode)
        path = target
        assert facts["model_id"] not in seen, "new metadata is a new model"
        seen.add(facts["model_id"])
        for fact in ("training_bytes", "training_arrays", "inference_bytes", "inference_format"):
            assert facts.get(fact) == first.get(fact), (number, fact)
        assert [facts["metadata"].get(f"tag {n}") for n in range(1, number + 1)] == list(
            range(1, number + 1)
        )
    assert described(ours, path, name) == described(scaleout, path, name)


@pytest.mark.parametrize("name", ["weights and inference model", "4 MB of noise", "raw, empty"])
@pytest.mark.parametrize("chunk", [None, 64 * 1024, 1_000_003])
@pytest.mark.parametrize("direction", ["theirs", "ours"])
def test_a_stream_of_chunks_arrives_on_the_other_side(
    scaleout: Peer,
    inputs: Inputs,
    tmp_path: Path,
    direction: str,
    chunk: int | None,
    name: str,
) -> None:
    sender, receiver = (scaleout, ours) if direction == "theirs" else (ours, scaleout)
    kind, wire = KINDS[name], tmp_path / "wire"
    send = ["send", str(wire), *([] if chunk is None else [chunk])]
    path = tmp_path / "model.zip"
    sent = sender(
        "run",
        steps_=[*kind.steps(inputs), ["build"], send, ["reopen", str(path)]],
        helper=kind.helper,
        decode=kind.decode,
    )
    received = receiver(
        "run",
        steps_=[["from_chunks", str(wire)], ["build"]],
        helper=kind.helper,
        decode=kind.decode,
    )
    assert without_stamp(received, sender, receiver) == sent
    sizes = [len(message.data) for message in ours.steps.read_chunks(str(wire))]
    whole = chunk or 1024 * 1024
    assert sizes[:-1] == [whole] * (len(sizes) - 1)
    assert sum(sizes) == sent["file"][1]


def test_the_peers_own_message_class_goes_both_ways(
    scaleout: Peer, inputs: Inputs, tmp_path: Path
) -> None:
    message = _message(base64.b64decode(scaleout("descriptor")))
    with ModelContainer.from_training_model([], metadata={"ü": 1}) as model:
        chunks = list(model.get_filechunk_stream(chunk_size=100, message=message))
        assert {type(chunk) for chunk in chunks} == {message}
        with ModelContainer.from_filechunk_stream(iter(chunks)) as again:
            assert (again.metadata, again.checksum) == (model.metadata, model.checksum)
        plain = list(model.get_filechunk_stream(chunk_size=100))
    assert [c.SerializeToString() for c in plain] == [c.SerializeToString() for c in chunks]
    for size in (0, 1, 127, 128, 16_383, 16_384, 3_000_000):
        data = random.Random(size).randbytes(size)
        wire = message(data=data).SerializeToString()
        assert FileChunk(data=data).SerializeToString() == wire
        assert FileChunk.FromString(wire).data == data


def _message(described: bytes) -> Any:
    """Make the class that the peer's generated module has."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto.FromString(described)
    pool = descriptor_pool.DescriptorPool()
    for needed in file.dependency:
        name = needed.removesuffix(".proto").replace("/", ".") + "_pb2"
        module = __import__(name, fromlist=["DESCRIPTOR"])
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    package = f"{file.package}." if file.package else ""
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}FileChunk"))


def _oddities(inputs: Inputs, whole: bytes) -> dict[str, bytes]:
    npz = Path(inputs.npz()).read_bytes()
    return {
        "container": whole,
        "NPZ": npz,
        "nothing": b"",
        "P": b"P",
        "PK": b"PK",
        "PK and noise": b"PK\x03\x04" + bytes(range(256)),
        "an empty ZIP": b"PK\x05\x06" + bytes(18),
        "noise": random.Random(1).randbytes(1000),
        "cut": whole[:-1],
        "cut in half": whole[: len(whole) // 2],
        "something before": b"junk" + whole,
        "something after": whole + b"junk",
        "PK before": b"PK" + whole,
        "a pickle": b"\x80\x04N.",
    }


def test_both_tell_containers_from_other_files_alike(
    scaleout: Peer, inputs: Inputs, tmp_path: Path
) -> None:
    path = tmp_path / "model.zip"
    ours("run", steps_=[["set_metadata", "a", 1], ["build"], ["reopen", str(path)]])
    found = {}
    for name, content in _oddities(inputs, path.read_bytes()).items():
        odd = tmp_path / "odd"
        odd.write_bytes(content)
        found[name] = ours("detect", path=str(odd)), scaleout("detect", path=str(odd))
    assert {name: here for name, (here, _) in found.items()} == {
        name: theirs for name, (_, theirs) in found.items()
    }


@pytest.mark.parametrize("name", ["weights and inference model", "no weights", "raw, 1 byte"])
def test_metadata_says_the_version_where_the_peer_looks_for_it(
    scaleout: Peer, inputs: Inputs, tmp_path: Path, name: str
) -> None:
    for side in (ours, scaleout):
        path = tmp_path / "model.zip"
        steps = [*KINDS[name].steps(inputs), ["build"], ["reopen", str(path)]]
        facts = side("run", steps_=steps, decode=False)
        stored = scaleout("stored_metadata", path=str(path))
        hidden = {key: stored[key] for key in stored.keys() - facts["metadata"].keys()}
        assert hidden
        assert set(hidden) <= {"version", "_version"}
        assert set(hidden.values()) == {2}


def test_files_that_the_peers_users_attach_survive_a_new_tag(
    newest_scaleout: Peer, inputs: Inputs, tmp_path: Path
) -> None:
    plain, attached, tagged = (str(tmp_path / name) for name in ("plain", "attached", "tagged"))
    steps: Steps = [["from_training_model", inputs.weights()], ["build"], ["reopen", plain]]
    ours("run", steps_=steps)
    files = {"config.json": inputs.file("config", b'{"a": 1}'), "ü": inputs.file("empty", b"")}
    newest_scaleout("attach", path=plain, target=attached, files=files)
    steps = [["from_file", attached], ["set_metadata", "tag", 2], ["build"], ["reopen", tagged]]
    ours("run", steps_=steps)
    assert newest_scaleout("attached", path=tagged) == {"config.json": '{"a": 1}', "ü": ""}


@pytest.mark.parametrize("helper", ["numpyhelper", "binaryhelper"])
def test_the_peers_own_helper_works_in_our_container(
    scaleout: Peer, inputs: Inputs, tmp_path: Path, helper: str
) -> None:
    path, arrays = tmp_path / "model.zip", inputs.arrays("one", [1.0, 2.0])
    metadata, loaded = scaleout(
        "helpers_of_theirs_here",
        repository=Path(__file__).parents[2],
        arrays=arrays,
        path=path,
        helper=helper,
    )
    assert metadata["helper_type"] == helper
    saved = facts_of_arrays(load_arrays(arrays))
    assert loaded == (saved if helper == "numpyhelper" else [])
    read = ours("run", steps_=[["from_file", str(path)], ["build"]])
    assert read["training_arrays"] == saved


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of which a machine that does nothing else needs 30
@pytest.mark.parametrize("direction", ["theirs is read here", "ours is read there"])
def test_5_gib_of_zeros_pass_between_the_two(
    newest_scaleout: Peer, inputs: Inputs, tmp_path: Path, direction: str
) -> None:
    maker, reader = (
        (newest_scaleout, ours) if direction.startswith("theirs") else (ours, newest_scaleout)
    )
    size, path = 5 * GIB, tmp_path / "model.zip"
    steps = [["from_stream", inputs.sparse(size)], ["build"], ["reopen", str(path)]]
    maker("make", steps_=steps)
    assert path.stat().st_size < size / 100
    read = reader("run", steps_=[["from_file", str(path)], ["build"]], decode=False)
    # The SHA-256 of 5 GiB of zeros.
    assert read["training_bytes"] == [
        "7f06c62352aebd8125b2a1841e2b9e1ffcbed602f381c3dcb3200200e383d1d5",
        size,
    ]


def rules(inputs: Inputs, source: str, empty: str, chunks: str) -> dict[str, Steps]:
    """Name every way to a model's id; the builder is built at the end."""
    weights = inputs.weights()
    onnx = inputs.file("onnx", b"\x08\x07" * 5000)
    new: list[Any] = ["from_training_model", weights]
    load: list[Any] = ["from_file", source]
    mine, other = ["set_model_id", "mine"], ["set_metadata", "model_id", "other"]
    table: dict[str, Steps] = {
        "new": [new],
        "new, id": [new, mine],
        "new, id in the metadata": [new, other],
        "new, id in a dict": [new, ["set_metadata_dict", {"model_id": "other"}]],
        "new, own helper_type": [new, ["set_metadata", "helper_type", "numpyhelper"]],
        "new, helper": [["from_training_model", weights, "numpyhelper"]],
        "new, helper type": [new, ["set_helper_type", "numpyhelper"]],
        "new, inference model and id": [new, ["set_inference_model", onnx, "onnx"], mine],
        "new, other weights": [new, ["set_training_model", inputs.arrays("two", [2.0])]],
        "nothing": [["set_metadata_dict", {}]],
        "only an id": [mine],
        "only metadata": [["set_metadata", "a", 1]],
        "load": [load],
        "load, no metadata": [load, ["set_metadata_dict", {}]],
        "load, metadata": [load, ["set_metadata", "a", 1]],
        "load, the metadata it has": [load, ["set_metadata", "session_id", "s1"]],
        "load, id": [load, mine],
        "load, id in the metadata": [load, other],
        "load, id then id in the metadata": [load, mine, other],
        "load, id in the metadata then id": [load, other, mine],
        "load, id in a dict then id": [load, ["set_metadata_dict", {"model_id": "other"}], mine],
        "load, metadata and id": [load, ["set_metadata", "a", 1], mine],
        "load, helper": [load, ["set_helper", "numpyhelper"]],
        "load, helper type": [load, ["set_helper_type", "numpyhelper"]],
        "load, unknown helper type": [load, ["set_helper_type", "nohelper"]],
        "load, inference model": [load, ["set_inference_model", onnx, "onnx"]],
        "load, inference model and format": [
            load, ["set_metadata", "inference_model_format", "x"],
            ["set_inference_model_stream", onnx, "onnx"],
        ],
        "load, inference model and id": [load, ["set_inference_model", onnx, "onnx"], mine],
        "load, weights": [load, ["set_training_model", weights]],
        "load, weights and id": [load, ["set_training_model", weights], mine],
        "load, weights and helper": [load, ["set_training_model", weights, "numpyhelper"]],
        "load, weights by another helper": [
            load, ["set_training_model", inputs.arrays("flat", [1.0]), "binaryhelper"],
        ],
        "load without helper": [["from_file", empty]],
        "load without helper, helper": [["from_file", empty], ["set_helper", "numpyhelper"]],
        "load without helper, helper and tag": [
            ["from_file", empty], ["set_helper", "numpyhelper"], ["set_metadata", "a", 1],
        ],
        "load without helper, weights": [["from_file", empty], ["set_training_model", weights]],
        "stream": [["from_stream", source]],
        "stream, id": [["from_stream", source], mine],
        "stream, metadata": [["from_stream", source], ["set_metadata", "a", 1]],
        "chunks": [["from_chunks", chunks]],
        "chunks, metadata": [["from_chunks", chunks], ["set_metadata", "a", 1]],
        "raw": [["from_file", inputs.npz()]],
        "raw, id": [["from_file", inputs.npz()], mine],
        "raw, id in the metadata": [["from_file", inputs.npz()], other],
        "raw, metadata": [["from_stream", inputs.npz()], ["set_metadata", "a", 1]],
        "raw, weights": [["from_file", inputs.npz()], ["set_training_model", weights]],
        "raw, helper": [["from_file", inputs.npz()], ["set_helper", "numpyhelper"]],
    }  # fmt: skip
    again: list[Steps] = [
        [],
        [mine],
        [other],
        [["set_metadata", "b", 2]],
        [["set_inference_model", onnx, "onnx"]],
        [["set_training_model", weights]],
        [["set_helper_type", "numpyhelper"]],
    ]
    for first, (number, second) in itertools.product(
        ("new", "load", "load, metadata", "load, id", "raw", "only metadata"), enumerate(again)
    ):
        table[f"{first}, built, again {number}"] = [
            *table[first], ["build"], ["to_builder"], *second,
        ]  # fmt: skip
    return {name: [*steps, ["build"]] for name, steps in table.items()}


def differences(here: Any, theirs: Any) -> Any:
    if "refused" in (here, theirs):
        return {} if here == theirs else {"here": here, "theirs": theirs}
    facts = here.keys() | theirs.keys()
    found = {fact: (here.get(fact), theirs.get(fact)) for fact in facts}
    return {fact: pair for fact, pair in found.items() if pair[0] != pair[1]}


def test_both_follow_the_same_rules_for_ids_and_metadata(
    scaleout: Peer, inputs: Inputs, tmp_path: Path
) -> None:
    source, empty, chunks = (str(tmp_path / name) for name in ("source", "empty", "chunks"))
    kind = KINDS["weights and inference model"]
    made = scaleout(
        "run",
        steps_=[*kind.steps(inputs), ["build"], ["send", chunks], ["reopen", source]],
    )
    bare = scaleout("run", steps_=[["set_metadata", "a", 0], ["build"], ["reopen", empty]])
    known = {"mine", "other", made["model_id"], bare["model_id"]}

    def outcome(side: Ours | Peer, steps: Steps) -> Any:
        try:
            facts = side("run", steps_=steps, decode=False)
        except (StorageError, PeerError):  # which one, is each side's own affair
            return "refused"
        model_id = facts["model_id"]
        if model_id not in known:
            assert uuid.UUID(model_id).version == 4
            facts["metadata"]["model_id"] = facts["model_id"] = "a new one"
        facts["as it was"] = facts.pop("checksum") in (made["checksum"], bare["checksum"])
        facts.pop("file")
        if any("training_model" in name for name, *_ in steps):
            facts.pop("training_bytes")  # each side's helper packs arrays in its own way
        return facts

    table = rules(inputs, source, empty, chunks)
    assert len(table) > 80
    theirs = {name: outcome(scaleout, steps) for name, steps in table.items()}
    here = {name: outcome(ours, steps) for name, steps in table.items()}
    # The one thing that is done otherwise on purpose: by the label that the peer leaves on these
    # weights, nobody can read them.
    odd = "load, weights by another helper"
    assert theirs[odd]["metadata"].pop("helper_type") == "numpyhelper"
    assert here[odd]["metadata"].pop("helper_type") == "binaryhelper"
    unlike = {name: differences(here[name], theirs[name]) for name in table}
    assert {name: found for name, found in unlike.items() if found} == {}
