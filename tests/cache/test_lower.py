"""Lower caches: read through, in their order, and never written, locked or tidied up."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import ConfigurationError, ModelMissingError, OfflineError
from storage.cache.evict import evict
from storage.cache.gc import collect
from storage.cache.verify import verify
from storage.uri import parse_uri
from tests.cache.boots import count_hashes
from tests.cache.conftest import MakeClient
from tests.cache.disk import state
from tests.cache.support import Source, blob_files, flip_byte, tree_bytes
from tests.servers import read_only_view

MODEL = {"model.bin": b"weights" * 1000, "config/a.json": b"{}"}
MORE = MODEL | {"adapter.bin": b"adapter" * 100}
LARGE = len(MODEL["model.bin"])

pytestmark = pytest.mark.kinds("memory")


def large_blob(cache: Path) -> Path:
    return next(path for path in blob_files(cache) if path.stat().st_size == LARGE)


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """Root of a lower cache, which is not there yet."""
    return tmp_path / "lower"


@pytest.fixture
def fill(make_client: MakeClient, lower: Path, source: Source) -> Callable[..., str]:
    """Download into the lower cache, by a client that is closed."""

    def call(uri: str, root: Path = lower) -> str:
        client = make_client(cache_dir=root)
        path = client.download(uri, config=source.config)
        client.cache.close()
        client.close()
        return path

    return call


# -- reading through -----------------------------------------------------------------------


@pytest.mark.kinds("memory", "s3")
def test_what_is_whole_below_is_used_there_without_a_lock_or_a_write(
    make_client: MakeClient,
    source: Source,
    lower: Path,
    cache: Path,
    tmp_path: Path,
    fill: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = source.put_model(MODEL)
    path = Path(fill(uri))
    before = state(lower)
    touched: list[str] = []

    def flock(descriptor: int, operation: int) -> None:
        touched.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(fcntl, "flock", flock)
    with read_only_view(lower) as view:
        client = make_client(cache_lower=[view])
        there = str(view / path.relative_to(lower))
        source.forget()
        assert client.download(uri, config=source.config) == there
        assert (source.requests, source.bodies) == (1, [])
        assert client.download(uri, config=source.config, offline=True) == there
        assert client.download(uri, config=source.config, freshness="cache-first") == there
        out = client.download(uri, tmp_path / "out", config=source.config)
        off = client.download(uri, tmp_path / "off", config=source.config, offline=True)
        assert tree_bytes(there) == tree_bytes(out) == tree_bytes(off) == MODEL
        assert source.bodies == []
        assert not any(name.startswith(str(view)) for name in touched)
    assert state(lower) == before
    assert blob_files(cache) == []
    assert not (cache / "snapshots").exists()


def test_where_it_could_be_written_it_is_not_either(
    make_client: MakeClient, source: Source, lower: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    path = fill(uri)
    for blob in blob_files(lower):
        os.utime(blob)
    old = Path(make_client(cache_dir=lower).cache.upper.layout.manifests)
    for note in old.rglob("*.json"):
        os.utime(note, (1, 1))
    before = state(lower)
    client = make_client(cache_lower=[lower])
    for options in ({}, {"offline": True}, {"freshness": "cache-first"}):
        found = client.download(uri, **options)
        assert tree_bytes(found) == MODEL
        assert found == path
    assert state(lower) == before


def test_blobs_in_doubt_below_are_hashed_once(
    make_client: MakeClient,
    source: Source,
    lower: Path,
    fill: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    # As after `COPY` into an image.
    for blob in blob_files(lower):
        os.utime(blob)
    hashes = count_hashes(monkeypatch)
    client = make_client(cache_lower=[lower])
    for _ in range(3):
        client.download(uri, offline=True)
    assert sorted(hashes.values()) == [1, 1]


def test_of_a_model_that_is_there_in_part_the_rest_is_fetched(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    source.put_file("model/adapter.bin", MORE["adapter.bin"])
    before = state(lower)
    client = make_client(cache_lower=[lower])
    source.forget()
    path = Path(client.download(uri))
    assert tree_bytes(path) == MORE
    assert source.bodies == ["model/adapter.bin"]
    assert [blob.read_bytes() for blob in blob_files(cache)] == [MORE["adapter.bin"]]
    assert os.path.samefile(path / "model.bin", large_blob(lower))
    assert os.readlink(path / "model.bin") == str(large_blob(lower))
    assert path.is_relative_to(cache)
    for options in ({"offline": True}, {"freshness": "cache-first"}):
        assert client.download(uri, **options) == str(path)
    assert state(lower) == before


def test_the_upper_cache_comes_first(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    new = {"model.bin": b"second version"}
    source.put_model(new)
    client = make_client(cache_lower=[lower])
    path = client.download(uri)
    assert tree_bytes(path) == new
    assert client.download(uri, offline=True) == path
    assert tree_bytes(make_client(cache_dir=lower).download(uri, offline=True)) == MODEL


def test_a_snapshot_that_is_wrong_below_is_made_above(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    shutil.rmtree(lower / "snapshots")
    before = state(lower)
    client = make_client(cache_lower=[lower])
    source.forget()
    path = Path(client.download(uri))
    assert tree_bytes(path) == MODEL
    assert source.bodies == []
    assert path.is_relative_to(cache)
    assert os.path.samefile(path / "model.bin", large_blob(lower))
    assert blob_files(cache) == []
    assert client.download(uri, offline=True) == str(path)
    assert state(lower) == before


# -- damage --------------------------------------------------------------------------------


def test_what_is_damaged_below_is_fetched_above(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    flip_byte(large_blob(lower))
    before = state(lower)
    client = make_client(cache_lower=[lower])
    for _ in range(2):
        with pytest.raises(OfflineError, match=r"damaged: 'model\.bin'"):
            client.download(uri, offline=True)
    source.forget()
    path = Path(client.download(uri))
    assert tree_bytes(path) == MODEL
    assert source.bodies == ["model/model.bin"]
    assert os.path.samefile(path / "model.bin", large_blob(cache))
    assert os.path.realpath(path / "config/a.json").startswith(f"{lower}/")
    source.forget()
    for options in ({}, {"offline": True}, {"freshness": "cache-first"}):
        assert client.download(uri, **options) == str(path)
    assert source.bodies == []
    assert state(lower) == before


@pytest.mark.parametrize("folder", ["manifests", "refs", "index"])
def test_a_damaged_note_below_is_written_above(
    make_client: MakeClient,
    source: Source,
    lower: Path,
    cache: Path,
    fill: Callable[..., str],
    folder: str,
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    for note in (lower / folder).rglob("*"):
        if note.is_file():
            note.write_bytes(note.read_bytes()[:-20])
    before = state(lower)
    client = make_client(cache_lower=[lower])
    if folder != "index":
        with pytest.raises(OfflineError, match="damaged"):
            client.download(uri, offline=True)
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    assert source.bodies == []
    assert tree_bytes(client.download(uri, offline=True)) == MODEL
    assert state(lower) == before


# -- several -------------------------------------------------------------------------------


def test_several_are_asked_in_their_order(
    make_client: MakeClient, source: Source, tmp_path: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    first, second = tmp_path / "first", tmp_path / "second"
    fill(uri, second)
    new = {"model.bin": b"second version"}
    source.put_model(new)
    fill(uri, first)
    for order, expected in (((first, second), new), ((second, first), MODEL)):
        client = make_client(cache_dir=tmp_path / "upper", cache_lower=order)
        assert tree_bytes(client.download(uri, offline=True)) == expected
        # The store decides what it is now.
        assert tree_bytes(client.download(uri, tmp_path / order[0].name / "out")) == new


def test_the_parts_of_a_model_may_be_in_several(
    make_client: MakeClient, source: Source, tmp_path: Path, fill: Callable[..., str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    uri = source.put_model(MORE)
    fill(f"{uri}/model.bin", first)
    fill(f"{uri}/adapter.bin", second)
    client = make_client(cache_lower=[first, second])
    source.forget()
    path = Path(client.download(uri))
    assert tree_bytes(path) == MORE
    assert source.bodies == ["model/config/a.json"]
    roots = {
        name: next(
            root
            for root in (first, second, tmp_path / "cache")
            if os.path.realpath(path / name).startswith(f"{root}/")
        )
        for name in MORE
    }
    assert roots == {
        "model.bin": first,
        "adapter.bin": second,
        "config/a.json": tmp_path / "cache",
    }


# -- what goes away ------------------------------------------------------------------------


def test_what_was_below_and_is_gone_is_fetched_again(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    source.put_file("model/adapter.bin", MORE["adapter.bin"])
    with read_only_view(lower) as view:
        client = make_client(cache_lower=[view])
        path = client.download(uri)
        assert tree_bytes(path) == MORE
        # Whole in the lower cache alone; what is there leaves with it.
    with pytest.raises(OfflineError, match=r"only in part: 1 of 3 files.*model\.bin"):
        client.download(uri, offline=True)
    source.forget()
    assert client.download(uri) == path
    assert tree_bytes(path) == MORE
    assert sorted(source.bodies) == ["model/config/a.json", "model/model.bin"]
    assert len(blob_files(cache)) == 3
    assert client.download(uri, offline=True) == path


def test_what_was_only_below_was_never_cached_when_that_is_gone(
    make_client: MakeClient, source: Source, lower: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    with read_only_view(lower) as view:
        client = make_client(cache_lower=[view])
        client.download(uri, offline=True)
    with pytest.raises(OfflineError, match="never cached"):
        client.download(uri, offline=True)
    assert tree_bytes(client.download(uri)) == MODEL
    assert tree_bytes(client.download(uri, offline=True)) == MODEL


def test_a_lower_cache_that_is_not_there_is_none(
    make_client: MakeClient, source: Source, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    (tmp_path / "file").write_text("mine")
    client = make_client(cache_lower=[tmp_path / "gone", tmp_path / "file"])
    assert tree_bytes(client.download(uri)) == MODEL
    assert tree_bytes(client.download(uri, offline=True)) == MODEL
    assert not (tmp_path / "gone").exists()


def test_a_lower_cache_with_other_addresses_is_refused(
    make_client: MakeClient, source: Source, lower: Path, fill: Callable[..., str]
) -> None:
    fill(source.put_model(MODEL))
    client = make_client(cache_lower=[lower], digest_algorithm="sha256")
    with pytest.raises(ConfigurationError, match=r"lower .*blake3"):
        client.download(source.uri("model"))


# -- upkeep --------------------------------------------------------------------------------


def test_nothing_below_is_tidied_up_evicted_or_repaired(
    make_client: MakeClient,
    source: Source,
    lower: Path,
    cache: Path,
    fill: Callable[..., str],
    tmp_path: Path,
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    # Everything that would go if it were above.
    (lower / "partial" / "old").mkdir(parents=True)
    (lower / "quarantine").mkdir()
    (lower / "quarantine" / "old").write_text("x")
    (lower / "blobs" / "stray").write_text("x")
    (lower / "snapshots" / "stray").mkdir()
    next((lower / "refs").rglob("*.json")).with_name("torn.json").write_text("x")
    source.put_file("model/adapter.bin", MORE["adapter.bin"])
    flip_byte(large_blob(lower), keep_times=True)
    before = state(lower)
    client = make_client(cache_lower=[lower], cache_grace=0.0)
    client.download(uri, tmp_path / "out", cache=True)
    assert len(blob_files(cache)) == 1
    evict(client.cache, 0)
    assert blob_files(cache) == []
    client.download(uri, tmp_path / "out2", cache=True)
    client.cache.close()
    collect(client.cache, grace=0.0)
    assert verify(client.cache, full=True).problems
    client.repair(full=True, config=source.config)
    assert state(lower) == before


def test_blobs_that_are_only_below_keep_a_model_above_usable(
    make_client: MakeClient, source: Source, lower: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    source.put_file("model/adapter.bin", MORE["adapter.bin"])
    client = make_client(cache_lower=[lower])
    client.download(uri)
    client.cache.close()
    assert collect(client.cache, grace=0.0).counts["models"] == 0
    source.forget()
    assert tree_bytes(client.download(uri, offline=True)) == MORE


def test_what_is_below_is_pinned_and_leased_above(
    make_client: MakeClient, source: Source, lower: Path, cache: Path, fill: Callable[..., str]
) -> None:
    uri = source.put_model(MODEL)
    fill(uri)
    before = state(lower)
    client = make_client(cache_lower=[lower])
    assert client.cache.pin(parse_uri(uri))
    client.download(uri)
    assert list((cache / "leases").iterdir())
    assert client.cache.unpin(parse_uri(uri))
    with pytest.raises(ModelMissingError):
        client.cache.pin(parse_uri(source.uri("never")))
    assert state(lower) == before


def test_the_setting_may_come_from_the_environment(
    source: Source,
    lower: Path,
    tmp_path: Path,
    fill: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from storage import StorageClient

    uri = source.put_model(MODEL)
    path = fill(uri)
    monkeypatch.setenv("STORAGE_CACHE_LOWER", f"{tmp_path / 'none'}:{lower}")
    client: Any
    with StorageClient() as client:
        assert client.download(uri, offline=True) == path
