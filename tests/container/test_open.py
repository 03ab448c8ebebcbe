"""Containers opened where they are: what is right, what is refused, and what happens meanwhile."""

from __future__ import annotations

import hashlib
import io
import mmap
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import storage.facade
from storage import StorageClient
from storage.backends.base import Backend, Body, Buffer, ByteRange, ObjectInfo, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.cache.evict import delete as evict
from storage.container import ModelContainer, NumpyHelper
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    TransientError,
)
from storage.testing.fault_script import Fault, Request
from storage.uri import parse_uri
from tests.facade.stores import MemoryStore, PVCStore
from tests.faults.stores import SITES, HubSite, Site, make_site
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.odd_http import Request as HTTPRequest
from tests.transfer.support import MIB, Wrapped

WEIGHTS: list[np.ndarray] = [np.random.default_rng(1).random((64, 1024))]
INFERENCE = np.random.default_rng(2).bytes(500_000)


@pytest.fixture(autouse=True)
def _default_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test have a default client of its own, with the cache of that test."""
    monkeypatch.setattr(storage.facade, "_client", None)
    yield
    if storage.facade._client is not None:
        storage.facade._client.close()


def build(tag: str = "one", weights: list[np.ndarray] | None = None) -> bytes:
    builder = (
        ModelContainer.from_training_model(weights or WEIGHTS, metadata={"tag": tag})
        .to_builder()
        .set_inference_model(INFERENCE, "onnx")
        .set_model_id(tag)
    )
    with builder.build() as container, container.get_file_stream() as stream:
        data: bytes = stream.read()
        return data


@pytest.fixture(scope="module")
def data() -> bytes:
    return build()


@pytest.fixture(scope="module")
def other() -> bytes:
    """Another container of the same length."""
    found = build("two", [WEIGHTS[0] + 1])
    assert len(found) == len(build())
    return found


@pytest.fixture
def uri(data: bytes) -> str:
    store = MemoryStore()
    store.put_raw("model.zip", data)
    return store.uri("model.zip")


def replace(uri: str, data: bytes) -> None:
    bucket, _, key = uri.removeprefix("memory://").partition("/")
    MemoryBackend(bucket).write(key, bytes_payload(data))


def delete(uri: str) -> None:
    bucket, _, key = uri.removeprefix("memory://").partition("/")
    MemoryBackend(bucket).delete([key])


def check(container: ModelContainer, tag: str = "one") -> None:
    """Read all parts of a container and compare them."""
    assert container.model_id == tag
    assert container.metadata["tag"] == tag
    assert np.array_equal(container.get_training_model()[0], WEIGHTS[0] + (tag == "two"))
    assert container.get_inference_model_format() == "onnx"
    with container.get_inference_model_stream() as stream:
        assert stream.read() == INFERENCE


# -- on this machine -------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path, lambda path: f"file://{path}"])
def test_a_file_of_this_machine_is_mapped(
    tmp_path: Path, data: bytes, form: Callable[[Path], Any]
) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(data)
    with ModelContainer.open(form(path)) as container:
        check(container)
        (mapped,) = container.get_training_model(mmap=True)
        assert _is_mapped(mapped)
    assert path.read_bytes() == data


def test_a_claim_is_on_this_machine(tmp_path: Path, data: bytes) -> None:
    store = PVCStore(tmp_path)
    store.put_raw("model.zip", data)
    with ModelContainer.open(store.uri("model.zip"), config=store.config) as container:
        check(container)


def _is_mapped(array: np.ndarray) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base is not None


# -- in a store ------------------------------------------------------------------------------


def test_what_a_local_container_can_a_remote_one_can(uri: str, data: bytes, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    with ModelContainer.open(uri) as container:
        check(container)
        assert container.checksum == hashlib.sha256(data).hexdigest()
        assert container.verify_checksum(container.checksum)
        signature = container.sign(key, "me")
        assert container.verify_signature(key.public_key(), signature["signature"])
        with container.to_builder().set_metadata("tag", "two").build() as tagged:
            assert tagged.metadata["tag"] == "two"
            assert np.array_equal(tagged.get_training_model()[0], WEIGHTS[0])
        assert container.metadata["tag"] == "one"
        container.save_to_file(tmp_path / "saved.zip")
    assert (tmp_path / "saved.zip").read_bytes() == data


def test_several_entries_are_read_side_by_side(uri: str) -> None:
    with (
        ModelContainer.open(uri) as container,
        container.get_training_model_stream() as one,
        container.get_inference_model_stream() as other,
    ):
        pieces = []
        while piece := other.read(100_000):
            pieces.append(piece)
            one.read(7)
        assert b"".join(pieces) == INFERENCE


def test_a_stored_entry_is_seekable(uri: str) -> None:
    with ModelContainer.open(uri) as container:
        assert container.entries["inference_model.bin"].size == len(INFERENCE)
        with container.get_inference_model_stream() as stream:
            assert stream.seekable()
            for position in (400_000, 3, 499_990, 0):
                assert stream.seek(position) == position
                assert stream.read(20) == INFERENCE[position : position + 20]


def test_a_closed_container_says_so(uri: str) -> None:
    container = ModelContainer.open(uri)
    container.close()
    container.close()
    with pytest.raises((ValueError, InvalidInput), match="closed"):
        container.get_training_model()


@pytest.mark.parametrize("size", [0, 1, 30, 100_000])
def test_what_is_no_container_is_wrapped_as_a_legacy_model(size: int) -> None:
    raw = np.random.default_rng(size).bytes(size)
    store = MemoryStore()
    store.put_raw("model.bin", raw)
    with ModelContainer.open(store.uri("model.bin")) as container:
        assert container.legacy_source
        with container.get_training_model_stream() as stream:
            assert stream.read() == raw
        # It has been fetched, and needs the store no more.
        store.delete_raw("model.bin")
        with container.get_training_model_stream() as stream:
            assert stream.read() == raw


def test_a_bare_npz_is_wrapped_too() -> None:
    npz = io.BytesIO()
    np.savez(npz, **{"0": WEIGHTS[0]})
    store = MemoryStore()
    store.put_raw("model.npz", npz.getvalue())
    with ModelContainer.open(store.uri("model.npz")) as container:
        assert container.legacy_source
        assert np.array_equal(container.get_training_model(NumpyHelper())[0], WEIGHTS[0])


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_nothing_there_is_the_usual_error(cache: bool, tmp_path: Path, uri: str) -> None:
    for missing in (f"{uri}.missing", str(tmp_path / "missing.zip")):
        with pytest.raises(ModelMissingError):
            ModelContainer.open(missing, cache=cache)


@pytest.mark.parametrize("cache", [False, True])
def test_a_tree_is_no_container(cache: bool, tmp_path: Path, data: bytes) -> None:
    store = MemoryStore()
    store.put_raw("models/a.zip", data)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.zip").write_bytes(data)
    for tree in (f"{store.base}/models/", str(tmp_path / "models"), f"{tmp_path}/models/"):
        with pytest.raises(InvalidInput, match="tree"):
            ModelContainer.open(tree, cache=cache)
    with pytest.raises((InvalidInput, ModelMissingError)):
        ModelContainer.open(f"{store.base}/models", cache=cache)
    with StorageClient() as client:
        # Nothing of it was fetched to find that out.
        blobs = Path(client.cache.upper.layout.blobs)
        assert not [path for path in blobs.rglob("*") if path.is_file()]


def test_a_damaged_entry_is_noticed(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry = archive.getinfo("inference_model.bin")
    damaged = bytearray(data)
    damaged[entry.header_offset + 200_000] ^= 1
    store = MemoryStore()
    store.put_raw("model.zip", bytes(damaged))
    with ModelContainer.open(store.uri("model.zip")) as container:
        assert np.array_equal(container.get_training_model()[0], WEIGHTS[0])
        with container.get_inference_model_stream() as stream, pytest.raises(IntegrityError):
            stream.read()


# -- digests ---------------------------------------------------------------------------------


def test_ranges_do_not_tell_a_digest(uri: str, data: bytes) -> None:
    digest = f"#sha256={hashlib.sha256(data).hexdigest()}"
    with pytest.raises(InvalidInput, match="cache=True"):
        ModelContainer.open(uri + digest)
    with ModelContainer.open(uri + digest, cache=True) as container:
        check(container)


@pytest.mark.parametrize("where", ["cache", "file"])
def test_another_digest_is_noticed(where: str, uri: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(data)
    place = uri if where == "cache" else str(tmp_path / "model.zip")
    with pytest.raises(IntegrityError):
        ModelContainer.open(f"{place}#sha256={'0' * 64}", cache=where == "cache")


# -- through the cache -----------------------------------------------------------------------


def test_a_cached_container_stays_and_is_mapped(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelContainer.open(uri, cache=True) as container:
        check(container)
        (mapped,) = container.get_training_model(mmap=True)
        assert _is_mapped(mapped)
        # What is written to it is its own.
        mapped[0, 0] = -1.0
    delete(uri)
    with pytest.raises(ModelMissingError):
        ModelContainer.open(uri, cache=True)
    monkeypatch.setenv("STORAGE_OFFLINE", "1")
    with (
        StorageClient() as client,
        ModelContainer.open(uri, client=client, cache=True) as container,
    ):
        check(container)


def test_a_cached_container_outlives_the_cache(uri: str) -> None:
    with (
        StorageClient() as client,
        ModelContainer.open(uri, client=client, cache=True) as container,
    ):
        client.cache.close()
        evict(client.cache, parse_uri(uri))
        check(container)


# -- an object that is replaced, and links that break ----------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_a_container_replaced_meanwhile_is_never_mixed(
    request: pytest.FixtureRequest, name: str, data: bytes, other: bytes
) -> None:
    site = make_site(request, name, "down")
    with site.place(None) as store, StorageClient() as client:
        store.put_raw("model.zip", data)
        with ModelContainer.open(
            store.uri("model.zip"), config=store.config, client=client
        ) as container:
            store.put_raw("model.zip", other)
            if isinstance(site, HubSite):
                # Every commit stays readable.
                check(container)
                return
            with pytest.raises(ObjectChangedError):
                container.get_training_model()
            with (
                pytest.raises(ObjectChangedError),
                container.get_inference_model_stream() as stream,
            ):
                stream.read()


@pytest.mark.parametrize("name", SITES)
def test_a_reset_in_the_midst_of_an_entry_is_repaired(
    request: pytest.FixtureRequest, name: str, data: bytes
) -> None:
    site = make_site(request, name, "down")
    breaks = _ResetLongReads(site)
    with site.place(breaks) as store, StorageClient() as client:
        store.put_raw("model.zip", data)
        with ModelContainer.open(
            store.uri("model.zip"), config=store.config, client=client
        ) as container:
            check(container)
    assert breaks.left == 0


class _ResetLongReads:
    """Resets the first reads of an object that are longer than what opening takes."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.left = 2

    def __call__(self, request: Request) -> Fault | None:
        span = re.fullmatch(
            r"bytes=(\d+)-(\d+)",
            request.headers.get("range") or request.headers.get("x-ms-range") or "",
        )
        if not self._site.reads_object(request) or span is None or not self.left:
            return None
        if int(span[2]) - int(span[1]) < 100_000:
            return None
        self.left -= 1
        return Fault("reset", at=0.4)


class _Breaking(Wrapped):
    """Breaks long bodies off, and calls ``between`` then."""

    def __init__(self, inner: Backend, between: Callable[[], object]) -> None:
        super().__init__(inner)
        self.between = between
        self.opened = self.closed = 0

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self.inner.read(key, span, pin)
        self.opened += 1
        return Body(body.info, self._chunks(body, span is None or len(span)), self._close)

    def _close(self) -> None:
        self.closed += 1

    def _chunks(self, body: Body, size: int) -> Iterator[Buffer]:
        whole = b"".join(bytes(chunk) for chunk in body)
        yield whole[: size // 2]
        if size > 100_000:
            self.between()
            raise TransientError("reset by peer")
        yield whole[size // 2 :]


def _through(uri: str, client: StorageClient, between: Callable[[], object]) -> _Breaking:
    """Make ``client`` read the bucket of ``uri`` through a backend that breaks."""
    client.backend(parse_uri(uri))
    ((key, backend),) = client._backends.items()
    breaking = _Breaking(backend, between)
    client._backends[key] = breaking
    return breaking


def test_an_entry_that_breaks_is_not_continued_with_another_version(uri: str, other: bytes) -> None:
    with StorageClient() as client:
        _through(uri, client, lambda: replace(uri, other))
        with (
            ModelContainer.open(uri, client=client) as container,
            container.get_inference_model_stream() as stream,
            pytest.raises(ObjectChangedError),
        ):
            stream.read()


def test_every_request_is_let_go(uri: str) -> None:
    with StorageClient() as client:
        backend = _through(uri, client, lambda: None)
        with ModelContainer.open(uri, client=client) as container:
            for _ in range(3):
                with container.get_inference_model_stream() as stream:
                    stream.read(10)
        assert backend.opened > 3
        assert backend.opened == backend.closed


# -- servers without ranges ------------------------------------------------------------------


@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', None])
@pytest.mark.parametrize("claims", [True, False])
def test_a_server_without_ranges_gives_all_of_it_once(
    odd_http: Callable[..., OddHTTP], data: bytes, etag: str | None, claims: bool
) -> None:
    large = data if etag is None or not claims else _padded(data)
    headers = {"Accept-Ranges": "bytes" if claims else "none"}
    if etag is not None:
        headers["ETag"] = etag
    server = odd_http(lambda request: Reply(body=large, headers=headers))
    with ModelContainer.open(f"{server.url}/model.zip") as container:
        check(container)
        check(container)
        bodies = [each for each in server.asked("GET") if each.span is None]
        assert len(bodies) == 1
        assert _is_mapped(container.get_training_model(mmap=True)[0])


def _padded(data: bytes) -> bytes:
    """Return a container so long that nobody skips to its end for the sake of one part."""
    with (
        ModelContainer.from_stream(io.BytesIO(data)) as container,
        container.to_builder()
        .set_file("z", np.random.default_rng(3).bytes(9 * MIB))
        .set_model_id("one")
        .build() as padded,
        padded.get_file_stream() as stream,
    ):
        found: bytes = stream.read()
        return found


def test_what_such_a_server_gives_must_have_the_digest(
    odd_http: Callable[..., OddHTTP], data: bytes
) -> None:
    def answer(request: HTTPRequest) -> Reply:
        return Reply(body=data)

    url = f"{odd_http(answer).url}/model.zip"
    with ModelContainer.open(f"{url}#sha256={hashlib.sha256(data).hexdigest()}") as container:
        check(container)
    with pytest.raises(IntegrityError, match="the URI expects"):
        ModelContainer.open(f"{url}#sha256={'0' * 64}")
