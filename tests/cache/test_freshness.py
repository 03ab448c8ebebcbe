"""How old a cached model may be, and what asking costs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from storage import InvalidInput, ModelMissingError, StorageClient
from storage.cache.refs import Refs
from tests.cache.conftest import MakeClient
from tests.cache.support import Source, tree_bytes

FIRST = {"model.bin": b"one", "config/a.json": b"{}", "old.txt": b"goes"}
SECOND = {"model.bin": b"two", "config/b.json": b"{}"}


@pytest.mark.kinds("memory", "s3", "hub")
def test_a_changed_tree_comes_without_a_stale_file(client: StorageClient, source: Source) -> None:
    uri = source.put_model(FIRST)
    before = client.download(uri, config=source.config)
    assert tree_bytes(before) == FIRST
    source.put_model(SECOND)
    source.forget()
    after = client.download(uri, config=source.config)
    assert tree_bytes(after) == SECOND
    # Whoever still reads the old one is not disturbed.
    assert tree_bytes(before) == FIRST
    # The content of config/b.json was that of config/a.json.
    assert set(source.fetched) <= {"model/model.bin", "model/config/b.json"}


@pytest.mark.kinds("memory", "s3")
def test_an_unchanged_tree_costs_one_request(client: StorageClient, source: Source) -> None:
    uri = source.put_model(FIRST)
    first = client.download(uri, config=source.config)
    for _ in range(2):
        source.forget()
        assert client.download(uri, config=source.config) == first
        assert (source.requests, source.bodies) == (1, [])


def test_an_unchanged_object_costs_one_request(client: StorageClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"weights")
    first = client.download(uri, config=source.config)
    source.forget()
    assert client.download(uri, config=source.config) == first
    assert (source.requests, source.bodies) == (1, [])


@pytest.mark.kinds("hub")
def test_an_unchanged_repository_is_not_fetched_again(
    client: StorageClient, source: Source
) -> None:
    uri = source.put_model(FIRST)
    first = client.download(uri, config=source.config)
    source.forget()
    assert client.download(uri, config=source.config) == first
    assert source.bodies == []


@pytest.mark.parametrize("freshness", ["cache-first", "max-age=3600", 3600, 1e9])
def test_what_is_young_enough_costs_no_request(
    client: StorageClient, source: Source, freshness: str | float
) -> None:
    uri = source.put_file("model.bin", b"one")
    first = client.download(uri, config=source.config)
    source.put_file("model.bin", b"two, which is longer")
    source.forget()
    assert client.download(uri, config=source.config, freshness=freshness) == first
    assert source.requests == 0
    assert Path(client.download(uri, config=source.config)).read_bytes().startswith(b"two")


@pytest.mark.kinds("memory")
def test_what_grew_too_old_is_asked_for(
    client: StorageClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = source.put_file("model.bin", b"one")
    client.download(uri)
    (ref,) = client.cache.upper.refs.all()
    now = ref.validated_at
    for later, asked in ((50, 0), (70, 1), (100, 0), (-1000, 1)):
        source.forget()
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        client.download(uri, freshness=60)
        assert source.requests == asked, later


@pytest.mark.kinds("memory")
def test_the_settings_may_say_how_fresh(make_client: MakeClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"one")
    client = make_client(freshness="cache-first")
    client.download(uri)
    source.forget()
    client.download(uri)
    assert source.requests == 0
    client.download(uri, freshness="revalidate")
    assert source.requests == 1
    with pytest.raises(InvalidInput, match="freshness"):
        client.download(uri, freshness="fresh")


@pytest.mark.kinds("memory")
def test_cache_first_fetches_what_is_not_there(client: StorageClient, source: Source) -> None:
    uri = source.put_model(FIRST)
    assert tree_bytes(client.download(uri, freshness="cache-first")) == FIRST


@pytest.mark.kinds("memory", "s3")
def test_what_is_gone_from_the_store_is_missing(client: StorageClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"one")
    kept = client.download(uri, config=source.config)
    source.delete("model.bin")
    with pytest.raises(ModelMissingError):
        client.download(uri, config=source.config)
    assert client.download(uri, config=source.config, offline=True) == kept


@pytest.mark.kinds("memory")
def test_a_tree_that_became_an_object_is_one(client: StorageClient, source: Source) -> None:
    uri = source.put_model(FIRST)
    client.download(uri)
    for path in FIRST:
        source.delete(f"model/{path}")
    source.put_file("model", b"an object now")
    assert Path(client.download(uri)).read_bytes() == b"an object now"


@pytest.mark.kinds("memory", "s3", "hub")
def test_filters_have_models_of_their_own_and_share_the_content(
    client: StorageClient, source: Source
) -> None:
    uri = source.put_model(FIRST)
    client.download(uri, config=source.config)
    source.forget()
    some = client.download(uri, config=source.config, allow_patterns="*.json")
    assert tree_bytes(some) == {"config/a.json": b"{}"}
    assert source.bodies == []
    assert tree_bytes(client.download(uri, config=source.config)) == FIRST


@pytest.mark.kinds("memory", "s3", "hub")
def test_with_a_digest_nobody_is_asked_for_what_has_it(
    client: StorageClient, source: Source
) -> None:
    from storage.digest import hash_file

    uri = source.put_file("model.bin", b"one")
    path = client.download(uri, config=source.config)
    for algorithm in ("sha256", "blake3"):
        digest = hash_file(path, (algorithm,))[algorithm]
        source.forget()
        assert client.download(uri, config=source.config, digest=digest) == path
        assert source.requests == 0


@pytest.mark.kinds("memory")
def test_use_is_noted_where_it_can_be_seen(client: StorageClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"one")
    client.download(uri)
    (ref,) = client.cache.upper.refs.all()
    manifest = client.cache.upper.layout.manifest(ref.manifest)
    os.utime(manifest, (1, 1))
    client.download(uri, freshness="cache-first")
    assert time.time() - client.cache.upper.manifests.last_use(ref.manifest) < 3600


@pytest.mark.kinds("memory")
def test_a_note_that_cannot_be_read_is_written_anew(client: StorageClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"one")
    path = client.download(uri)
    (note,) = [
        found for found in Path(client.cache.upper.layout.refs).rglob("*.json") if found.is_file()
    ]
    note.write_bytes(note.read_bytes()[:-40])
    source.forget()
    assert client.download(uri) == path
    assert source.bodies == []
    assert isinstance(next(Refs(client.cache.upper.layout).all()).manifest, str)
