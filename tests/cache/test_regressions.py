"""What was wrong once, and must not be again."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import (
    AzureConfig,
    ConfigurationError,
    InvalidInput,
    OfflineError,
    PVCConfig,
    StorageClient,
    StorageError,
)
from storage.cache.evict import evict
from storage.cache.gc import collect
from storage.cache.refs import identity_of
from storage.cache.usage import models
from storage.cache.verify import verify
from storage.client.sourcing import object_key, source_of
from storage.config import FsspecConfig
from storage.config.origin import origin_of
from storage.transfer.plan import Patterns
from storage.transfer.progress import Progress
from storage.uri import parse_uri
from tests.cache.conftest import MakeClient
from tests.cache.processes import as_nobody, forked
from tests.cache.support import (
    HubSource,
    S3Source,
    Source,
    blob_files,
    blocked_sockets,
    tree_bytes,
)
from tests.servers import CountingProxy

memory = pytest.mark.kinds("memory")
s3 = pytest.mark.kinds("s3")

EMULATOR = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=c2VjcmV0;"
    "BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1?sig=c2VjcmV0"
)


# -- another model than the one that was asked for -----------------------------------------


@s3
def test_what_is_replaced_while_it_comes_is_not_taken_for_what_was_planned(
    make_client: MakeClient, source: Source
) -> None:
    uri = source.put_model({"a": b"a" * 1000, "b": b"old"})
    replaced = threading.Event()

    def renew(_: Progress) -> None:
        # "b" is listed by now, and not fetched: there is one connection, and "a" has it.
        if not replaced.is_set():
            replaced.set()
            source.put_file("model/b", b"new")

    client = make_client(transfer={"connections": 1})
    mixed = client.download(uri, config=source.config, progress=renew)
    assert tree_bytes(mixed)["b"] == b"new"
    # The version that was planned comes back, ETag and all.
    source.put_file("model/b", b"old")
    for path in (f"{uri}/b", uri):
        found = client.download(path, config=source.config)
        content = tree_bytes(found)["b"] if os.path.isdir(found) else Path(found).read_bytes()
        assert content == b"old"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model=%ff", "model=%fe"),
        ("model=a+b", "model=a%20b"),
        ("a=1&&b=2", "a=1&b=2"),
        ("a", "a="),
        ("signature=serve", "signature=train"),
        ("signature=1&policy=serve", "signature=1&policy=train"),
        ("sig=1&sp=serve", "sig=1&sp=train"),
    ],
)
def test_urls_that_a_server_may_tell_apart_are_two_sources(one: str, other: str) -> None:
    urls = (f"https://models.example/get?{query}" for query in (one, other))
    first, second = (identity_of(parse_uri(url)) for url in urls)
    assert first != second


@pytest.mark.parametrize(
    "signature",
    [
        "X-Amz-Signature={0}&X-Amz-Credential=k{0}&X-Amz-Expires=60",
        "X-Goog-Signature={0}&X-Goog-Date=t{0}",
        "AWSAccessKeyId=k&Expires={0}&Signature={0}&x-amz-security-token={0}",
        "GoogleAccessId=k&Expires={0}&Signature={0}",
        "Policy={0}&Signature={0}&Key-Pair-Id=k",
        "sv=2024&sig={0}&se={0}",
    ],
)
def test_another_signature_makes_no_other_source(signature: str) -> None:
    urls = (f"https://models.example/a?part=2&{signature.format(n)}" for n in (1, 2))
    first, second = (identity_of(parse_uri(url)) for url in urls)
    assert first == second
    assert first != identity_of(parse_uri("https://models.example/a?part=3"))


@pytest.mark.kinds("hub")
def test_a_revision_that_the_config_names_is_a_source_of_its_own(
    client: StorageClient, source: HubSource
) -> None:
    uri = source.put_model({"model.bin": b"one"})
    (commit, *_) = reversed(source._repo.commits)
    source.put_model({"model.bin": b"two"})
    old = source.config.model_copy(update={"revision": commit})
    names = client.cache.upper.layout.root + ".txt"
    Path(names).write_text(uri)
    (prefetched,) = client.prefetch(names, config=old, pin=True)
    assert prefetched.error is None
    for config, content in ((source.config, b"two"), (old, b"one")):
        for options in ({"freshness": "cache-first"}, {"offline": True}):
            found = client.download(uri, config=config, **options)
            assert tree_bytes(found) == {"model.bin": content}


def test_claims_of_the_same_name_on_two_mounts_are_two_sources(
    client: StorageClient, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "claim" / "model"
        folder.mkdir(parents=True)
        (folder / "model.bin").write_text(name)
        found = client.download(
            "pvc://claim/model",
            config=PVCConfig(mount_root=tmp_path / name),
            allow_patterns="*.bin",
            freshness="cache-first",
        )
        assert Path(found, "model.bin").read_text() == name


@s3
@pytest.mark.parametrize("first", ["usual", "other"])
def test_the_model_of_another_endpoint_is_not_taken_unasked(
    client: StorageClient,
    source: S3Source,
    counting_proxy: Callable[[str], CountingProxy],
    monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:
    uri = source.put_file("model.bin", b"one")
    client.download(uri, config=source.config)
    (ref,) = client.cache.upper.refs.all()
    other = counting_proxy(source.proxy.endpoint)
    if first == "usual":
        # As if the store's own endpoint had given it, and this one is asked for by name.
        shutil.rmtree(client.cache.upper.layout.refs)
        usual = replace(ref.source, origin="")
        client.cache.upper.refs.set(replace(ref, source=usual))
        config = source.config.model_copy(update={"endpoint_url": other.endpoint})
    else:
        monkeypatch.setattr("storage.config.origin._VARIABLES", {})
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.endpoint)
        config = source.config.model_copy(update={"endpoint_url": None})
    client.download(uri, config=config, freshness="cache-first")
    assert other.count() > 0


def test_two_users_of_a_server_have_objects_of_their_own() -> None:
    keys = set()
    for user in ("alice", "bob"):
        location = parse_uri(f"sftp://{user}@host/home/model.bin")
        source = source_of(location, None, Patterns(), False)
        keys.add(object_key(source, location, location.key, '"1"'))
    assert len(keys) == 2
    assert "alice" not in repr(keys)


def test_an_origin_tells_stores_apart_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    location = parse_uri("azure://models/iris")
    by_config = origin_of(location, AzureConfig("x", connection_string=EMULATOR))
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", EMULATOR)
    by_variable = origin_of(location, None)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", EMULATOR.replace("10000", "10001"))
    assert origin_of(location, None) != by_variable
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:c2VjcmV0@minio.example/")
    by_endpoint = origin_of(parse_uri("s3://models/iris"), None)
    generic = parse_uri("sftp://host/models/iris")
    options = {"host": "c2VjcmV0", "password": "c2VjcmV0"}
    by_options = origin_of(generic, FsspecConfig(options))
    assert by_options != origin_of(generic, FsspecConfig(options | {"host": "other"}))
    assert origin_of(generic, None) == origin_of(generic, FsspecConfig()) == ""
    found = (by_config, by_variable, by_endpoint, by_options)
    assert all(text and "c2VjcmV0" not in text for text in found), found


# -- calls ---------------------------------------------------------------------------------


@s3
@pytest.mark.parametrize("offline", [1, 1.0])
def test_every_true_is_offline(client: StorageClient, source: Source, offline: Any) -> None:
    with blocked_sockets(), pytest.raises(OfflineError, match="never cached"):
        client.download(source.uri("model"), config=source.config, offline=offline)
    assert source.requests == 0


@memory
def test_the_digest_of_an_archive_is_known_after_it_is_gone(
    client: StorageClient, source: Source
) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model.bin", b"one")
    uri = source.put_file("model.zip", data.getvalue())
    path = client.download(uri, unpack=True)
    digest = f"sha256:{hashlib.sha256(data.getvalue()).hexdigest()}"
    assert client.download(uri, unpack=True, digest=digest, offline=True) == path
    source.forget()
    assert client.download(uri, unpack=True, digest=digest) == path
    assert source.requests == 0


@pytest.mark.parametrize("scheme", ["sftp", "smb", "http"])
@pytest.mark.parametrize("host", ["[host", "host]", "mod\u2100els.example"])
@pytest.mark.parametrize("user", ["", "user:S3cret@"])
def test_what_is_no_url_is_our_error(scheme: str, host: str, user: str) -> None:
    with pytest.raises(InvalidInput, match="is not a URL") as caught:
        parse_uri(f"{scheme}://{user}{host}/model")
    assert "S3" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_that_looks_like_a_port_is_not_shown() -> None:
    with pytest.raises(InvalidInput, match="is not a URL") as caught:
        parse_uri("https://user:S3/cret@models.example/model")
    assert "cret" not in str(caught.value)
    assert "S3" not in str(caught.value)


def test_half_a_character_is_refused(client: StorageClient) -> None:
    for uri in ("memory://models/\ud800", "https://models.example/\ud800", "/models/\ud800"):
        with pytest.raises(InvalidInput, match="half a character"):
            client.download(uri)


@memory
def test_a_child_forked_while_a_lock_is_held_goes_on(client: StorageClient, source: Source) -> None:
    uri = source.put_file("model.bin", b"one")
    path = client.download(uri)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with client.cache.upper.index._lock, client._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)

    def child() -> bool:
        signal.alarm(20)
        # Its memory is another place than its parent's, so it looks for the content.
        return Path(client.download(uri)).read_bytes() == Path(path).read_bytes()

    try:
        assert forked(child)
    finally:
        done.set()
        thread.join()


# -- damage --------------------------------------------------------------------------------


@memory
@pytest.mark.parametrize("kind", ["VERSION", "manifests", "refs", "index"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_in_the_place_of_a_record_is_put_aside(
    make_client: MakeClient, cache: Path, source: Source, kind: str, empty: bool
) -> None:
    uri = source.put_model({"model.bin": b"one", "a": b"two"})
    client = make_client()
    client.download(uri)
    client.cache.upper.index.flush()
    top = cache / kind
    records = [top] if top.is_file() else [path for path in top.rglob("*") if path.is_file()]
    assert records
    for record in records:
        record.unlink()
        record.mkdir()
        if not empty:
            (record / "something").write_bytes(b"")
    client = make_client()
    for _ in range(2):
        assert tree_bytes(client.download(uri)) == {"model.bin": b"one", "a": b"two"}
    source.put_file("model/a", b"three")
    client = make_client()
    assert tree_bytes(client.download(uri))["a"] == b"three"
    assert tree_bytes(client.download(uri, offline=True))["a"] == b"three"


@memory
def test_what_may_not_be_read_is_not_handed_over(
    client: StorageClient, cache: Path, source: Source
) -> None:
    uri = source.put_file("model.bin", b"one")
    client.download(uri)
    (blob,) = blob_files(cache)
    blob.chmod(0)

    def ask() -> bool:
        with pytest.raises(OfflineError, match="damaged"):
            client.download(uri, offline=True)
        return True

    with pytest.MonkeyPatch.context() as patch:
        # A forked child has another memory, which is no matter here.
        from storage.cache.owners import current_owner

        owner = current_owner()
        patch.setattr("storage.client.sourcing.current_owner", lambda: owner)
        _open_up(cache)
        assert as_nobody(ask)


@memory
@pytest.mark.parametrize("folder", ["refs", "manifests", "blobs", "partial"])
def test_a_folder_that_may_not_be_read_is_our_error(
    client: StorageClient, cache: Path, source: Source, folder: str
) -> None:
    uri = source.put_file("model.bin", b"one")
    client.download(uri)
    _open_up(cache)
    (cache / folder).chmod(0)

    def ask() -> bool:
        for call in (
            lambda: models(client.cache),
            lambda: verify(client.cache, full=True),
            lambda: client.download(uri, freshness="cache-first"),
            lambda: client.download(uri, offline=True),
        ):
            with suppress(StorageError):
                call()
        return True

    try:
        assert as_nobody(ask)
    finally:
        (cache / folder).chmod(0o755)


def _open_up(cache: Path) -> None:
    """Let everybody come to a cache below a temporary folder."""
    for parent in cache.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o755)


@memory
@pytest.mark.parametrize(
    "mine", ["snapshots/2024/photo.jpg", "index/a/b", "blobs/0a1b", "quarantine/old"]
)
def test_no_cache_is_made_of_a_folder_in_which_tidying_up_would_remove_things(
    make_client: MakeClient, cache: Path, source: Source, mine: str
) -> None:
    uri = source.put_file("model.bin", b"one")
    (cache / mine).parent.mkdir(parents=True)
    (cache / mine).write_text("mine")
    if not mine.startswith("blobs"):
        (cache / "notes.txt").write_text("mine")
    before = tree_bytes(cache)
    client = make_client()
    with pytest.raises(ConfigurationError, match="is no cache"):
        client.download(uri)
    collect(client.cache)
    assert {name: data for name, data in tree_bytes(cache).items() if name in before} == before


@memory
def test_a_cache_may_be_beside_other_things(
    make_client: MakeClient, cache: Path, source: Source
) -> None:
    (cache / "lost+found").mkdir(parents=True)
    (cache / "notes.txt").write_text("mine")
    uri = source.put_file("model.bin", b"one")
    assert Path(make_client().download(uri)).read_bytes() == b"one"
    assert (cache / "notes.txt").read_text() == "mine"


# -- leases --------------------------------------------------------------------------------


@memory
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("freshness", ["revalidate", "cache-first"])
def test_what_symbolic_links_lead_to_is_not_evicted_meanwhile(
    make_client: MakeClient, source: Source, tmp_path: Path, cached: bool, freshness: str
) -> None:
    uri = source.put_model({"model.bin": b"one", "a": b"two"})
    client = make_client(cache_grace=0)
    client.download(uri)
    client.cache.close()
    out = client.download(
        uri, tmp_path / "out", link="symlink", freshness=freshness, cache=cached or None
    )
    other = make_client(cache_grace=0).cache
    evict(other, 0)
    collect(other)
    assert tree_bytes(out) == {"model.bin": b"one", "a": b"two"}
    client.cache.close()
    evict(other, 0)
    assert blob_files(other.upper.path) == []
