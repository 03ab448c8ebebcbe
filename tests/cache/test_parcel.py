"""Models in one file: they come out as they went in, or not at all."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from storage import IntegrityError, ModelMissingError, OfflineError
from storage.cache import blobs as blobs_module
from storage.cache.blobs import State
from storage.cache.cache import ModelCache
from storage.cache.parcel import Imported, export, import_
from storage.cache.verify import verify
from storage.digest import Digest, hash_file
from tests.cache.conftest import MakeClient
from tests.cache.parcels import (
    MODEL,
    memory,
    packed,
    take,
)
from tests.cache.support import Source, blob_files, blocked_sockets, flip_byte, tree_bytes

# -- there and back --------------------------------------------------------------------------


@pytest.mark.kinds("memory", "s3", "hub")
def test_models_come_out_as_they_went_in(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    here = make_client().cache
    stream = io.BytesIO()
    exported = export(here, stream, creator="me 1")
    size = sum(map(len, MODEL.values())) + 513
    assert (set(exported.uris), exported.blobs, exported.size) == (set(models), 4, size)
    imported = take(far, stream.getvalue())
    assert imported == Imported(exported.uris, 4, size, 4)
    with blocked_sockets():
        # Of whatever endpoint: this machine knows none.
        client = make_client(cache_dir=far.upper.path, offline=True)
        for uri, files in models.items():
            assert tree_bytes(client.download(uri)) == files
    assert verify(far, full=True).problems == ()
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        names = tar.getnames()
    assert [name.partition("/")[0] for name in names] == [
        *("parcel.json", "manifests", "manifests", "refs.json"),
        *["blobs"] * 4,
    ]


@memory
def test_the_same_models_give_the_same_bytes(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    data = packed(make_client().cache)
    assert data == packed(make_client().cache)
    take(far, data)
    assert packed(far) == data


@memory
def test_only_the_chosen_models_are_exported(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    here = make_client().cache
    chosen = next(iter(models))
    refs = [ref for ref in here.upper.refs.all() if ref.source.uri == chosen]
    assert take(far, packed(here, refs=refs)).uris == (chosen,)
    other = next(uri for uri in models if uri != chosen)
    with pytest.raises(OfflineError):
        make_client(cache_dir=far.upper.path).download(other, offline=True)


@memory
def test_an_import_may_be_repeated(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    data = packed(make_client().cache)
    first = take(far, data)
    before = {path: path.stat().st_ino for path in blob_files(far.upper.path)}
    again = take(far, data)
    assert (first.new, again.new) == (4, 0)
    assert {path: path.stat().st_ino for path in blob_files(far.upper.path)} == before
    # What is damaged here is not taken for what is there already.
    flip_byte(next(iter(before)))
    assert take(far, data).new == 1
    assert verify(far, full=True).problems == ()


def test_programs_links_and_empty_folders_survive(
    make_client: MakeClient, served_archive: str, far: ModelCache
) -> None:
    model = served_archive
    make_client().download(model, unpack=True)
    take(far, packed(make_client().cache))
    client = make_client(cache_dir=far.upper.path)
    path = Path(client.download(model, unpack=True, offline=True))
    assert os.access(path / "bin" / "run", os.X_OK)
    assert os.readlink(path / "link") == "bin/run"
    assert (path / "none").is_dir()


@memory
def test_what_comes_in_is_on_the_disk(
    make_client: MakeClient,
    models: dict[str, dict[str, bytes]],
    far: ModelCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = packed(make_client().cache)
    # One of them is here already, and not synced.
    content = MODEL["config/a.json"]
    place = Path(far.upper.path, "file")
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    digest = hash_file(place, ("blake3",))["blake3"]
    far.upper.blobs.add(str(place), digest, len(content), durable=False)
    take(far, data)
    monkeypatch.setattr(blobs_module, "boot_id", lambda: "another boot")
    for blob in blob_files(far.upper.path):
        size = blob.stat().st_size
        assert far.upper.blobs.look(Digest("blake3", blob.name), size) is State.CLEAN


@memory
def test_the_newer_of_two_states_stays(
    make_client: MakeClient, source: Source, tmp_path: Path, far: ModelCache
) -> None:
    parcels = []
    for number in range(2):
        uri = source.put_model({"a": b"%d" % number})
        make_client().download(uri)
        parcels.append(packed(make_client().cache))
    client = make_client(cache_dir=far.upper.path)
    for order, expected in (((0, 1), b"1"), ((1, 0), b"1")):
        shutil.rmtree(far.upper.path, ignore_errors=True)
        for number in order:
            take(make_client(cache_dir=far.upper.path).cache, parcels[number])
        assert tree_bytes(client.download(uri, offline=True)) == {"a": expected}


@pytest.mark.kinds("s3")
def test_a_machine_that_knows_the_endpoint_gets_the_newer_state_too(
    make_client: MakeClient, source: Source, far: ModelCache
) -> None:
    uri = source.put_model({"a": b"old"})
    client = make_client(cache_dir=far.upper.path)
    client.download(uri, config=source.config)
    source.put_model({"a": b"new"})
    make_client().download(uri, config=source.config)
    take(far, packed(make_client().cache))
    found = client.download(uri, config=source.config, offline=True)
    assert tree_bytes(found) == {"a": b"new"}
    # What the parcel says of the state of the source is true: nothing is fetched again.
    source.forget()
    client.download(uri, config=source.config)
    assert source.bodies == []


@memory
def test_what_is_exported_is_leased_meanwhile(
    make_client: MakeClient, models: dict[str, dict[str, bytes]]
) -> None:
    here = make_client().cache
    seen = []

    class Stream(io.BytesIO):
        def write(self, data: Any, /) -> int:
            seen.append(here.leases.held().manifests)
            return super().write(data)

    export(here, Stream())
    assert set(seen) == {frozenset(here.upper.manifests.ids())}
    assert here.leases.held().manifests == frozenset()


# -- what is not whole does not go out -------------------------------------------------------


@memory
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_damaged_model_is_not_exported(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], cache: Path, keep_times: bool
) -> None:
    flip_byte(max(blob_files(cache), key=lambda path: path.stat().st_size), keep_times=keep_times)
    here = make_client().cache
    with pytest.raises(IntegrityError, match="damaged"):
        packed(here)
    assert here.leases.held().manifests == frozenset()


@memory
def test_a_model_with_a_missing_file_is_not_exported(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], cache: Path
) -> None:
    blob_files(cache)[0].unlink()
    with pytest.raises(IntegrityError, match="only in part"):
        packed(make_client().cache)


def test_an_empty_cache_gives_no_parcel(make_client: MakeClient) -> None:
    with pytest.raises(ModelMissingError):
        packed(make_client().cache)


@pytest.fixture
def slowly(parcel: bytes) -> io.RawIOBase:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self._stream = io.BytesIO(parcel)

        def read(self, size: int = -1, /) -> bytes:
            return self._stream.read(min(size, 777))

    return Slow()


@memory
def test_a_stream_may_give_less_than_is_asked_for(slowly: io.RawIOBase, far: ModelCache) -> None:
    assert import_(far, slowly).new == 4
    assert verify(far, full=True).problems == ()
