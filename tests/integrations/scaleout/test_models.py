"""Models of a fleet: by their ids, as messages, and from other stores."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.container import ModelContainer
from storage.container.filechunks import FileChunk
from storage.errors import InvalidInput, ModelMissingError
from storage.integrations.scaleout.models import ModelStore
from storage.uri import parse_uri
from tests.integrations.scaleout.support import SCALEOUT_CLIENT, SIDE, Fleet
from tests.peers.environments import Peer, PeerError


@pytest.fixture
def peer(scaleout: None, tmp_path: Path) -> Iterator[Peer]:
    """A process of scaleout without a client."""
    with Peer(SCALEOUT_CLIENT, str(SIDE), tmp_path) as found:
        yield found


@pytest.mark.parametrize("chunk_size", [1000, 1024 * 1024])
def test_messages_are_those_of_the_generated_class(
    peer: Peer, tmp_path: Path, chunk_size: int
) -> None:
    path = tmp_path / "model.zip"
    values = np.random.default_rng(1).random(3000).tolist()
    peer("make_model", path=path, values=values, model_id="m-1")
    theirs = peer("peer_chunks", path=path, chunk_size=chunk_size)
    store = _store(tmp_path)
    chunks = [FileChunk.FromString(bytes.fromhex(each)) for each in theirs]
    store.accept("m-1", chunks)
    ours = [each.SerializeToString().hex() for each in store.chunks("m-1", chunk_size=chunk_size)]
    assert ours == theirs
    model_id, first = peer("read_chunks", messages=ours)
    assert (model_id, first) == ("m-1", pytest.approx(values[0]))


def test_a_client_gives_and_takes_messages_of_the_generated_class(
    fleet: Fleet, tmp_path: Path
) -> None:
    path = tmp_path / "model.zip"
    client = fleet.start("edge-1")
    client("make_model", path=path, values=[7.0], model_id="m-2")
    assert client("send_model", client_id="edge-1", path=path)
    assert fleet.weights("m-2") == [7.0]
    stored = b"".join(each.data for each in fleet.board.models.chunks("m-2"))
    assert stored == path.read_bytes()
    (message,) = client("chunks_of", client_id="edge-1", model_id="m-2")
    assert message == ["FileChunk", FileChunk(path.read_bytes()).SerializeToString().hex()]


def test_models_come_from_other_stores_bare_weights_too(fleet: Fleet, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    bare = io.BytesIO()
    np.savez(bare, **{"0": np.array([3.0], dtype=np.float32)})
    (other / "m-3.npz").write_bytes(bare.getvalue())
    client = fleet.start("edge-1", models=[f"{other}/no/{{model_id}}", f"{other}/{{model_id}}.npz"])
    assert client("stage", client_id="edge-1", model_id="m-3") == ["m-3", 3.0]
    with pytest.raises(PeerError, match=r"ValueError: .*m-4 not found"):
        client("stage", client_id="edge-1", model_id="m-4")


def test_a_model_under_the_name_of_another_is_not_used(fleet: Fleet) -> None:
    made = ModelContainer.from_training_model([np.array([1.0], dtype=np.float32)])
    with made, made.to_builder().set_model_id("other").build() as model:
        fleet.board.models.accept("m-5", model.get_filechunk_stream())
    client = fleet.start("edge-1")
    with pytest.raises(PeerError, match="IntegrityError: the model m-5 says that it is 'other'"):
        client("stage", client_id="edge-1", model_id="m-5")


def test_a_model_in_the_cache_asks_no_store_and_leaves_nothing_else(tmp_path: Path) -> None:
    store, root = _store(tmp_path, folder=str(tmp_path / "work")), tmp_path / "fleet"
    store.accept("m-6", [FileChunk(b"some"), FileChunk(b" bytes")])
    with store.open("m-6") as file:
        assert file.read() == b"some bytes"
    assert list((tmp_path / "work").iterdir()) == []
    assert [path.name for path in (root / "models").iterdir()] == ["m-6.scm"]


def test_ids_that_are_no_names_are_refused(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for model_id in ("../x", "a/b", "", ".hidden", "x" * 201):
        with pytest.raises(InvalidInput, match="cannot be the id of a model"):
            store.accept(model_id, [])
    with pytest.raises(ModelMissingError):
        list(store.chunks("missing"))
    with pytest.raises(InvalidInput, match=r"no \{model_id\} in it"):
        _store(tmp_path, others="s3://bucket/models")


def test_a_file_is_published_under_the_id_that_it_says_or_gets(tmp_path: Path) -> None:
    store, path, bare = _store(tmp_path), tmp_path / "model.zip", tmp_path / "weights.npz"
    with ModelContainer.from_training_model([np.array([1.0], dtype=np.float32)]) as made:
        made.save_to_file(path)
        own = made.model_id
    assert store.publish(path) == own
    with store.open(str(own)) as file:
        assert file.read() == path.read_bytes()
    assert store.publish(path, "m-7") == "m-7"
    with ModelContainer.from_filechunk_stream(store.chunks("m-7")) as found:
        assert found.model_id == "m-7"
        assert found.get_training_model()[0].tolist() == [1.0]
    bare.write_bytes(b"any weights")
    assert store.publish(bare, "m-8") == "m-8"
    with pytest.raises(InvalidInput, match="no container"):
        store.publish(bare)
    with pytest.raises(InvalidInput, match="expected a file"):
        store.publish(tmp_path / "missing", "m-9")


def _store(tmp_path: Path, **options: object) -> ModelStore:
    from storage import StorageClient

    return ModelStore(StorageClient(), parse_uri(tmp_path / "fleet"), **options)  # type: ignore[arg-type]
