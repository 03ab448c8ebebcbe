"""What it costs to open a container in a store, counted between the client and the server."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from storage import StorageClient
from storage.container import ModelContainer, NumpyHelper
from tests.facade.stores import MemoryStore, Store
from tests.faults.stores import SITES, Site, make_site

KIB = 1024
MIB = 1024 * KIB
METADATA = {"model_id": "m-1", "helper_type": "numpyhelper", "name": "Größe 模型"}
# What opening may take; a container of 64 MiB, or of 64 GiB.
MAX_REQUESTS = 4
MAX_BYTES = 100 * KIB


def _pack(weights: list[np.ndarray], inference: bytes) -> bytes:
    """Return a container as other tools write it: its bytes are no doing of this library."""
    npz = io.BytesIO()
    np.savez(npz, **{str(number): array for number, array in enumerate(weights)})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("metadata.json", json.dumps({**METADATA, "version": 2}))
        archive.writestr("training_model.bin", npz.getvalue())
        archive.writestr("inference_model.bin", inference, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


WEIGHTS: list[np.ndarray] = [
    np.random.default_rng(3).random((1024, 2560)),
    np.arange(5, dtype=np.float32),
]
INFERENCE = np.random.default_rng(4).bytes(2 * MIB) + b"zeros" * MIB


@pytest.fixture(scope="module")
def small() -> bytes:
    return _pack(WEIGHTS, INFERENCE)


@pytest.fixture(scope="module")
def large() -> bytes:
    """64 MiB."""
    data = _pack([np.random.default_rng(5).random(8 * MIB)], b"onnx")
    assert len(data) > 64 * MIB
    return data


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest) -> Site:
    return make_site(request, request.param, "down")


class Opened:
    """A container in a store behind proxies."""

    def __init__(self, site: Site, store: Store, client: StorageClient) -> None:
        self._site = site
        self.store = store
        self.container = ModelContainer.open(
            store.uri("model.zip"), config=store.config, client=client
        )

    def taken(self) -> tuple[int, int]:
        """Return the requests and the bytes of answers since the last time."""
        exchanges = [each for proxy in self._site.proxies for each in proxy.exchanges]
        for proxy in self._site.proxies:
            proxy.clear()
        return len(exchanges), sum(each.bytes_down for each in exchanges)


@contextmanager
def opened(site: Site, data: bytes) -> Iterator[Opened]:
    with site.place(None) as store, StorageClient() as client:
        store.put_raw("model.zip", data)
        found = Opened(site, store, client)
        with found.container:
            yield found


def test_opening_takes_a_few_requests_and_not_the_weights(site: Site, large: bytes) -> None:
    with opened(site, large) as found:
        container = found.container
        assert container.metadata == METADATA
        assert container.model_id == "m-1"
        assert container.has_training_model
        assert container.has_inference_model
        assert not container.legacy_source
        requests, size = found.taken()
        assert 0 < requests <= MAX_REQUESTS
        assert 0 < size <= MAX_BYTES


def test_one_entry_comes_without_the_others(site: Site, small: bytes) -> None:
    with opened(site, small) as found:
        found.taken()
        with found.container.get_inference_model_stream() as stream:
            assert stream.read() == INFERENCE
        requests, size = found.taken()
        packed = found.container.entries["inference_model.bin"].compressed_size
        # Its header may take one of its own.
        assert requests <= 2
        assert packed <= size <= packed + 64 * KIB < WEIGHTS[0].nbytes
        # Where it begins is known from then on.
        with found.container.get_inference_model_stream() as stream:
            assert stream.read() == INFERENCE
        assert found.taken()[0] <= 1


def test_weights_are_loaded_from_the_store(site: Site, small: bytes) -> None:
    with opened(site, small) as found:
        found.taken()
        for helper in (None, NumpyHelper()):
            loaded = found.container.get_training_model(helper)
            assert len(loaded) == len(WEIGHTS)
            assert all(map(np.array_equal, loaded, WEIGHTS))
        _, size = found.taken()
        npz = found.container.entries["training_model.bin"].size
        # Whoever reads an NPZ looks at its end first.
        assert 2 * npz <= size < 2 * npz + 2 * MIB


def test_all_of_it_is_what_was_stored(site: Site, small: bytes) -> None:
    with opened(site, small) as found:
        with found.container.get_file_stream() as stream:
            assert stream.read() == small
        assert b"".join(chunk.data for chunk in found.container.get_filechunk_stream()) == small


def test_a_part_of_an_entry_is_one_short_request(site: Site, small: bytes) -> None:
    with opened(site, small) as found, found.container.get_training_model_stream() as stream:
        whole = io.BytesIO(small)
        with zipfile.ZipFile(whole) as archive:
            npz = archive.read("training_model.bin")
        found.taken()
        assert stream.seek(-100, io.SEEK_END) == len(npz) - 100
        assert stream.read() == npz[-100:]
        requests, size = found.taken()
        assert requests <= 2
        assert size < 100 * KIB
        stream.seek(MIB + 1)
        assert stream.read(10) == npz[MIB + 1 :][:10]


def test_memory_is_a_store_like_any(small: bytes) -> None:
    store = MemoryStore()
    store.put_raw("model.zip", small)
    with ModelContainer.open(store.uri("model.zip")) as container:
        assert container.metadata == METADATA
        assert all(map(np.array_equal, container.get_training_model(), WEIGHTS))
