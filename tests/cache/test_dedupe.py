"""The same content is kept once, wherever it came from, and not fetched when it is known."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from storage import IntegrityError, StorageClient
from tests.cache.support import SOURCES, Source, blob_files, make_source

WEIGHTS = bytes(range(256)) * 40_000
"""Larger than what is worth a question for its digest alone."""


def test_the_same_bytes_from_every_store_are_one_blob(
    request: pytest.FixtureRequest, client: StorageClient, cache: Path
) -> None:
    sources = [make_source(request, kind) for kind in SOURCES]
    paths = {
        os.path.realpath(
            client.download(source.put_file("model.bin", WEIGHTS), config=source.config)
        )
        for source in sources
    }
    assert len(paths) == 1
    assert len(blob_files(cache)) == 1


def test_where_the_store_says_the_digest_no_body_is_fetched(
    request: pytest.FixtureRequest, client: StorageClient, tmp_path: Path
) -> None:
    web, hub, s3 = (make_source(request, kind) for kind in ("web", "hub", "s3"))
    client.download(web.put_file("model.bin", WEIGHTS), config=web.config)
    # The Hub vouches for the SHA-256 of large files; it was not computed for the web's.
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    client.download(f"{web.uri('model.bin')}#sha256={digest}", config=web.config)
    uri = hub.put_model({"model.bin": WEIGHTS})
    client.download(uri, config=hub.config)
    assert hub.bodies == []
    # An upload of ours leaves its digests with the object.
    local = tmp_path / "upload" / "model.bin"
    local.parent.mkdir()
    local.write_bytes(WEIGHTS)
    client.upload(local.parent, s3.uri("copy"), config=s3.config)
    s3.forget()
    tree = client.download(s3.uri("copy"), config=s3.config)
    assert s3.bodies == []
    assert Path(tree, "model.bin").read_bytes() == WEIGHTS


@pytest.mark.kinds("s3")
def test_an_object_of_a_cached_tree_is_known(client: StorageClient, source: Source) -> None:
    uri = source.put_model({"model.bin": WEIGHTS, "a": b"1"})
    tree = client.download(uri, config=source.config)
    source.forget()
    file = client.download(f"{uri}/model.bin", config=source.config)
    assert source.bodies == []
    assert os.path.samefile(file, Path(tree, "model.bin"))


@pytest.mark.kinds("s3", "hub")
def test_only_what_changed_is_fetched(client: StorageClient, source: Source) -> None:
    uri = source.put_model({"model.bin": WEIGHTS, "a": b"1"})
    client.download(uri, config=source.config)
    source.put_model({"model.bin": WEIGHTS, "a": b"2"})
    source.forget()
    client.download(uri, config=source.config)
    assert set(source.bodies) <= {"model/a"}


@pytest.mark.kinds("memory", "s3", "hub")
def test_a_destination_takes_from_the_cache_and_adds_nothing_to_it(
    client: StorageClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model({"model.bin": WEIGHTS, "a": b"1"})
    client.download(uri, tmp_path / "first", config=source.config)
    assert not blob_files(cache)
    client.download(uri, tmp_path / "second", config=source.config, cache=True)
    assert len(blob_files(cache)) == 2
    source.forget()
    third = Path(client.download(uri, tmp_path / "third", config=source.config))
    assert source.bodies == []
    assert (third / "model.bin").read_bytes() == WEIGHTS
    # A copy, which may be written to.
    assert not os.path.samefile(third / "model.bin", blob_files(cache)[0])
    with open(third / "a", "r+b") as file:
        file.write(b"X")
    assert tree_is_right(client.download(uri, config=source.config))


def tree_is_right(path: str) -> bool:
    return Path(path, "a").read_bytes() == b"1"


@pytest.mark.kinds("memory")
@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_links_are_made_when_asked_for(
    client: StorageClient, source: Source, cache: Path, tmp_path: Path, link: str
) -> None:
    uri = source.put_model({"model.bin": WEIGHTS})
    client.download(uri)
    out = Path(client.download(uri, tmp_path / "out", link=link))  # type: ignore[arg-type]
    assert os.path.samefile(out / "model.bin", blob_files(cache)[0])
    assert (out / "model.bin").is_symlink() == (link == "symlink")


@pytest.mark.kinds("memory")
def test_a_digest_that_the_content_does_not_have_is_refused_from_the_cache_too(
    client: StorageClient, source: Source, tmp_path: Path
) -> None:
    uri = source.put_file("model.bin", WEIGHTS)
    client.download(uri)
    wrong = hashlib.sha256(b"another").hexdigest()
    for options in ({}, {"offline": True}, {"freshness": "cache-first"}):
        for dest in (None, tmp_path / "out"):
            with pytest.raises(IntegrityError, match=wrong):
                client.download(uri, dest, digest=f"sha256:{wrong}", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.kinds("memory")
def test_the_address_may_be_a_sha256(source: Source, tmp_path: Path) -> None:
    from storage import ConfigurationError
    from storage.config import load_settings

    uri = source.put_file("model.bin", WEIGHTS)
    settings = load_settings(cache_dir=tmp_path / "c", digest_algorithm="sha256")
    with StorageClient(settings=settings) as client:
        client.download(uri)
    (blob,) = blob_files(tmp_path / "c")
    assert blob.name == hashlib.sha256(WEIGHTS).hexdigest()
    other = StorageClient(settings=load_settings(cache_dir=tmp_path / "c"))
    with pytest.raises(ConfigurationError, match="sha256 addresses"):
        other.download(uri)
