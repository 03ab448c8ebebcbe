"""Locks: what is written down, what a text must be to be one, and downloads of exactly that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage import (
    ConfigurationError,
    Digest,
    HTTPConfig,
    IntegrityError,
    InvalidInput,
    LockedFile,
    LockedModel,
    LockFile,
    ModelMissingError,
    OfflineError,
    S3Config,
    Storage,
    StorageClient,
    StorageOperations,
    tree_digest,
)
from storage.backends.base import Backend
from storage.config import load_settings
from tests.facade.stores import MemoryStore, S3Store, Store, needs, tree_bytes
from tests.servers import CountingProxy, NginxHTTP
from tests.servers.nginx_http import put_file

# Sorted by bytes, not by folder: "a-b" comes before "a/b", and "Z" before "a".
TREE = {"Z": b"", "a b/é[1]": b"odd", "a-b": b"1", "a/b": b"2", "model.bin": b"weights" * 1000}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def listing(files: Mapping[str, bytes]) -> bytes:
    """Return the text whose hash is the digest of a tree."""
    return "".join(f"{sha256(data)}  {path}\n" for path, data in files.items()).encode()


def locked_files(files: Mapping[str, bytes]) -> tuple[LockedFile, ...]:
    paths = sorted(files, key=os.fsencode)
    return tuple(LockedFile(path, len(files[path]), sha256(files[path])) for path in paths)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def elsewhere(
    _connections: dict[Any, Backend], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Downloads what is locked on a machine where nothing is cached yet."""

    def download(*args: Any, **options: Any) -> Any:
        client = StorageClient(settings=load_settings(cache_dir=tmp_path_factory.mktemp("cache")))
        client._backends = _connections
        return client.download_locked(*args, **options)

    return download


# -- making ----------------------------------------------------------------------------------


def test_a_lock_names_every_file_and_the_digest_of_all(store: Store, out: Path) -> None:
    files = {path: data for path, data in TREE.items() if store.holds(path)}
    store.put_all({f"tree/{path}": data for path, data in files.items()})
    store.put_raw("alone.bin", b"alone")
    lock = Storage.lock([store.uri("tree"), store.uri("alone.bin")], config=store.config)
    tree, alone = lock.models
    assert tree.is_tree
    assert tree.files == locked_files(files)
    assert tree.digest == tree_digest(
        {path: Digest("sha256", sha256(data)) for path, data in files.items()}
    )
    assert not alone.is_tree
    assert alone.files == (LockedFile("alone.bin", 5, sha256(b"alone")),)
    assert alone.digest == Digest("sha256", sha256(b"alone"))
    # The text is one for good, and all that is needed.
    text = lock.dumps()
    assert LockFile.parse(text) == lock
    assert LockFile.parse(text).dumps() == text
    paths = Storage.download_locked(LockFile.parse(text), config=store.config)
    assert tree_bytes(paths[0]) == files
    assert Path(paths[1]).read_bytes() == b"alone"
    path = Storage.download_locked(lock, store.uri("tree"), out / "m", config=store.config)
    assert path == str(out / "m")
    assert tree_bytes(path) == files


def test_the_text_is_the_documented_one(memory: MemoryStore) -> None:
    memory.put_all({"tree/a": b"1", "tree/b.txt": b""})
    lock = Storage.lock(memory.uri("tree"), allow_patterns="*", ignore_patterns=["*.txt"])
    text = lock.dumps()
    assert text.endswith("}\n")
    assert json.loads(text) == {
        "version": 1,
        "models": [
            {
                "uri": memory.uri("tree"),
                "type": "tree",
                "digest": f"sha256:{sha256(listing({'a': b'1'}))}",
                "files": [{"path": "a", "size": 1, "sha256": sha256(b"1")}],
                "allow": ["*"],
                "ignore": ["*.txt"],
                "unpack": False,
            }
        ],
    }
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_the_patterns_belong_to_the_lock(memory: MemoryStore, tmp_path: Path, out: Path) -> None:
    for name, data in TREE.items():
        put_file(tmp_path / "local", name, data)
    memory.put_all({f"tree/{path}": data for path, data in TREE.items()})
    for source in (memory.uri("tree"), str(tmp_path / "local")):
        lock = Storage.lock(source, allow_patterns=["a*", "Z"], ignore_patterns="a/")
        assert [file.path for file in lock.models[0].files] == ["Z", "a b/é[1]", "a-b"]
        path = Storage.download_locked(lock, source, out / f"{len(source)}")
        assert sorted(tree_bytes(path)) == ["Z", "a b/é[1]", "a-b"]


def test_what_is_on_this_machine_is_locked_where_it_is(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("file", "pvc"):
        store = make_store(name)
        store.put_all({f"tree/{path}": data for path, data in TREE.items()})
        lock = Storage.lock(store.uri("tree"), config=store.config)
        assert lock.models[0].files == locked_files(TREE)
        found = Storage.download_locked(lock, config=store.config)
        assert found == [store.filesystem_path("tree")]
        store.put_raw("tree/model.bin", b"changed")
        with pytest.raises(IntegrityError, match=r"changed: model\.bin"):
            Storage.download_locked(lock, config=store.config)
    monkeypatch.chdir(store.filesystem_path(""))
    assert Storage.lock("tree").models[0].uri == store.filesystem_path("tree")


@pytest.mark.parametrize(
    "uri",
    [
        "https://host.example/model.bin?X-Amz-Signature=canary",
        "https://user:canary@host.example/model.bin",
        "https://account.blob.core.windows.net/container/model?sv=1&sig=canary",
        "sftp://user:canary@host.example/model",
        "https://host.example/model.bin?canary",
    ],
)
def test_a_source_with_a_credential_or_a_query_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput, match="no place for a query or a credential") as caught:
        Storage.lock([uri])
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/key with space/%41#1?",
        "s3://bucket/key?versionId=abc",
        "s3://bucket/",
        "gs://bucket/tree/",
        "gs://bucket/key?generation=12",
        "azure://container/key",
        "abfss://container@account.dfs.core.windows.net/key",
        "pvc://claim/key",
        "hf://gpt2",
        "hf://owner/model@v1.0/sub/file",
        "hf://owner/model@a%2Fbranch",
        "hf://datasets/owner/data@refs/pr/1",
        "https://host.example:8443/a%20b/model.bin",
        "https://host.example/model.bin?versionId=abc",
        "ftp://host.example/model",
        "/absolute/path with space/",
    ],
)
def test_every_kind_of_uri_survives_in_a_lock(uri: str) -> None:
    files = (LockedFile("model.bin", 1, sha256(b"1")),)
    lock = LockFile((LockedModel(uri, False, files),))
    assert LockFile.parse(lock.dumps()).find(uri) == lock.models[0]


def test_names_that_are_no_text_survive_in_a_lock(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.bin")
    put_file(tmp_path / "local", name, b"1")
    lock = Storage.lock(tmp_path / "local")
    assert [file.path for file in lock.models[0].files] == [name]
    text = lock.dumps().encode()
    assert LockFile.parse(text.decode()) == lock
    assert Storage.download_locked(lock) == [str(tmp_path / "local")]


def test_a_digest_of_the_uri_is_checked_and_left_out(memory: MemoryStore) -> None:
    memory.put_raw("m", b"1")
    uri = memory.uri("m")
    lock = Storage.lock(f"{uri}#sha256={sha256(b'1')}")
    assert lock.models[0].uri == uri
    assert lock.find(f"{uri}#sha256={sha256(b'1')}") == lock.models[0]
    with pytest.raises(IntegrityError):
        Storage.lock(f"{uri}#sha256={sha256(b'2')}")


def test_what_cannot_be_locked_is_an_error(memory: MemoryStore) -> None:
    memory.put_raw("m", b"1")
    with pytest.raises(InvalidInput, match="nothing to lock"):
        Storage.lock([])
    with pytest.raises(InvalidInput, match="twice"):
        Storage.lock([memory.uri("m"), memory.uri("m") + f"#sha256={sha256(b'1')}"])
    with pytest.raises(ModelMissingError):
        Storage.lock([memory.uri("m"), memory.uri("absent")])
    with pytest.raises(ConfigurationError, match="none of the sources"):
        Storage.lock([memory.uri("m")], config=HTTPConfig())


# -- downloads of what was locked ------------------------------------------------------------


def test_anything_but_what_was_locked_is_refused(
    store: Store, elsewhere: Callable[..., Any], out: Path
) -> None:
    store.put_all({f"tree/{path}": data for path, data in {"a": b"1", "b": b"22"}.items()})
    uri, config = store.uri("tree"), store.config
    lock = Storage.lock(uri, config=config)

    def refused(*words: str) -> None:
        for dest in (out / "model", None):
            with pytest.raises(IntegrityError) as caught:
                elsewhere(lock, uri, dest, config=config)
            for word in (uri.removeprefix("file://"), *words):
                assert word in str(caught.value)
        assert os.listdir(out) == []

    store.put_raw("tree/c", b"")
    refused("not locked: c")
    store.delete_raw("tree/c")
    store.put_raw("tree/b", b"23")  # of the same size
    refused("b")
    store.put_raw("tree/b", b"333")
    refused("changed: b")
    store.put_raw("tree/b", b"22")
    store.delete_raw("tree/a")
    refused("missing: a")
    store.put_raw("tree/d", b"1")
    refused("missing: a; not locked: d")
    store.delete_raw("tree/d")
    store.put_raw("tree/a", b"1")
    path = elsewhere(lock, uri, out / "model", config=config)
    assert tree_bytes(path) == {"a": b"1", "b": b"22"}


def test_many_differences_are_counted(memory: MemoryStore, elsewhere: Callable[..., Any]) -> None:
    memory.put_raw("tree/0", b"")
    lock = Storage.lock(memory.uri("tree"))
    memory.put_all({f"tree/{number}": b"" for number in range(1, 8)})
    with pytest.raises(IntegrityError, match="not locked: 1, 2, 3 and 4 more"):
        elsewhere(lock)


def test_an_object_is_no_tree_and_a_tree_no_object(
    memory: MemoryStore, elsewhere: Callable[..., Any], out: Path
) -> None:
    memory.put_raw("one/a", b"1")
    memory.put_raw("two", listing({"a": b"1"}))
    lock = Storage.lock([memory.uri("one"), memory.uri("two")])
    assert lock.models[0].digest == lock.models[1].digest
    memory.delete_raw("one/a")
    memory.delete_raw("two")
    memory.put_raw("one", listing({"a": b"1"}))
    memory.put_raw("two/a", b"1")
    with pytest.raises(IntegrityError, match="it is one object and was a tree"):
        elsewhere(lock, memory.uri("one"))
    with pytest.raises(IntegrityError, match="it is a tree and was one object"):
        elsewhere(lock, memory.uri("two"))
    for name in ("one", "two"):
        with pytest.raises(IntegrityError, match="is not what was locked: it is"):
            elsewhere(lock, memory.uri(name), out / "m")
    assert os.listdir(out) == []


def test_a_cached_tree_is_not_served_for_an_object(memory: MemoryStore) -> None:
    memory.put_raw("m/a", b"1")
    Storage.download(memory.uri("m"))
    text = listing({"a": b"1"})
    lock = LockFile((LockedModel(memory.uri("m"), False, locked_files({"m": text})),))
    for offline in (True, False):
        with pytest.raises(IntegrityError, match="it is a tree and was one object"):
            Storage.download_locked(lock, offline=offline)


@needs("S3")
def test_a_changed_file_ends_the_download_early(
    store: Store, counting_proxy: Callable[[str], CountingProxy], out: Path
) -> None:
    assert isinstance(store, S3Store)
    store.put_all({f"tree/{number:02}": b"%02d" % number for number in range(20)})
    lock = Storage.lock(store.uri("tree"), config=store.config)
    store.put_raw("tree/00", b"xx")
    proxy = counting_proxy(store.server.endpoint)
    settings = load_settings(transfer={"connections": 1}, cache_dir=out / "cache")
    with StorageClient(settings=settings) as client, pytest.raises(IntegrityError, match="/00"):
        client.download_locked(lock, config=store.through(proxy.endpoint))
    bodies = [request.path for request in proxy.requests if "list-type" not in request.path]
    assert not [path for path in bodies if path.endswith(("/10", "/19"))]


def test_the_lock_names_its_models_when_another_is_asked_for(memory: MemoryStore) -> None:
    memory.put_raw("one", b"1")
    lock = Storage.lock([memory.uri("one")])
    with pytest.raises(InvalidInput, match="is not in the lock file") as caught:
        Storage.download_locked(lock, memory.uri("two"))
    assert memory.uri("one") in str(caught.value)
    with pytest.raises(InvalidInput):
        Storage.download_locked(lock, "")


def test_a_digest_of_the_call_must_be_the_locked_one(memory: MemoryStore) -> None:
    memory.put_raw("one", b"1")
    uri = memory.uri("one")
    lock = Storage.lock(uri)
    path = Storage.download_locked(lock, f"{uri}#sha256={sha256(b'1')}")
    assert Path(path).read_bytes() == b"1"
    with pytest.raises(InvalidInput, match=sha256(b"2")):
        Storage.download_locked(lock, f"{uri}#sha256={sha256(b'2')}")


def test_a_destination_is_for_one_model(memory: MemoryStore, out: Path) -> None:
    memory.put_all({"one": b"1", "two": b"2"})
    one, both = (
        Storage.lock(memory.uri("one")),
        Storage.lock([memory.uri("one"), memory.uri("two")]),
    )
    assert Storage.download_locked(one, dest=out / "m") == [str(out / "m")]
    with pytest.raises(InvalidInput, match="2; name one"):
        Storage.download_locked(both, dest=out / "n")
    assert Storage.download_locked(both, memory.uri("two"), out / "n") == str(out / "n")
    assert tree_bytes(out) == {"m": b"1", "n": b"2"}
    assert Storage.download_locked(LockFile(())) == []


def test_the_path_of_a_lock_file_will_do(memory: MemoryStore, tmp_path: Path) -> None:
    memory.put_raw("one", b"1")
    file = tmp_path / "models.lock"
    file.write_text(Storage.lock(memory.uri("one")).dumps())
    for lock in (file, str(file)):
        (path,) = Storage.download_locked(lock)
        assert Path(path).read_bytes() == b"1"


@needs("remote")
def test_a_locked_model_is_served_offline(store: Store, out: Path) -> None:
    store.put_all({"tree/a": b"1", "tree/b": b"2"})
    uri, config = store.uri("tree"), store.config
    lock = Storage.lock(uri, config=config)
    assert tree_bytes(Storage.download_locked(lock, uri, offline=True, config=config)) == {
        "a": b"1",
        "b": b"2",
    }
    other = LockFile((LockedModel(uri, True, locked_files({"a": b"2"})),))
    with pytest.raises(IntegrityError):
        Storage.download_locked(other, offline=True, config=config)
    absent = LockFile((LockedModel(store.uri("absent"), False, locked_files({"a": b"2"})),))
    with pytest.raises(OfflineError):
        Storage.download_locked(absent, offline=True, config=config)


@needs("S3")
def test_what_is_cached_and_locked_is_not_asked_for(
    store: Store, counting_proxy: Callable[[str], CountingProxy]
) -> None:
    assert isinstance(store, S3Store)
    store.put_all({"tree/a": b"1", "tree/b": b"2"})
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    lock = Storage.lock(store.uri("tree"), config=config)
    first = Storage.download_locked(lock, config=config)
    store.put_raw("tree/a", b"changed since")
    proxy.clear()
    assert Storage.download_locked(lock, config=config) == first
    assert proxy.requests == []


def test_models_of_several_stores_are_in_one_lock(
    make_store: Callable[[str], Store],
    nginx_http: NginxHTTP,
    prefix: str,
    elsewhere: Callable[..., Any],
    out: Path,
) -> None:
    s3 = make_store("seaweedfs-obstore")
    s3.put_raw("tree/a", b"1")
    put_file(nginx_http.data, f"{prefix}/m.bin", b"2")
    web = f"{nginx_http.endpoint}/{prefix}/m.bin"
    lock = Storage.lock([s3.uri("tree"), web], config=s3.config)
    assert [model.uri for model in lock.models] == [s3.uri("tree"), web]
    tree, file = Storage.download_locked(lock, config=s3.config)
    assert tree_bytes(tree) == {"a": b"1"}
    assert Path(file).read_bytes() == b"2"
    put_file(nginx_http.data, f"{prefix}/m.bin", b"3")
    with pytest.raises(IntegrityError, match=r"m\.bin"):
        elsewhere(lock, web, out / "m")
    with pytest.raises(ConfigurationError):
        Storage.download_locked(lock, web, config=s3.config)
    assert os.listdir(out) == []


# -- reading ---------------------------------------------------------------------------------

GOOD: Mapping[str, Any] = {
    "version": 1,
    "models": [
        {
            "uri": "s3://bucket/tree",
            "type": "tree",
            "digest": f"sha256:{sha256(listing({'a': b'1', 'b/c': b'2'}))}",
            "files": [
                {"path": "a", "size": 1, "sha256": sha256(b"1")},
                {"path": "b/c", "size": 1, "sha256": sha256(b"2")},
            ],
            "allow": None,
            "ignore": ["*.txt"],
            "unpack": False,
        },
        {
            "uri": "s3://bucket/object",
            "type": "object",
            "digest": f"sha256:{sha256(b'1')}",
            "files": [{"path": "object", "size": 1, "sha256": sha256(b"1")}],
            "allow": None,
            "ignore": None,
            "unpack": False,
        },
    ],
}


def changed(path: tuple[str | int, ...], value: Any) -> str:
    """Return the text of a good lock with one value replaced; by itself it drops the field."""
    document = json.loads(json.dumps(GOOD))
    place = document
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document)


def test_the_good_lock_is_good() -> None:
    lock = LockFile.parse(json.dumps(GOOD))
    assert [model.is_tree for model in lock.models] == [True, False]
    assert lock.models[0].ignore == ("*.txt",)
    assert json.loads(lock.dumps()) == GOOD


FIRST = ("models", 0)
FILE = (*FIRST, "files", 1)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "expected version 1.* found 2"),
        (("version",), True, "version"),
        (("version",), "1", "expected version 1.* found '1'"),
        (("version",), ..., "expected version 1.* found None"),
        (("models",), {}, "models"),
        (("models",), ..., "models is missing"),
        (("extra",), 1, "'extra' is no field"),
        (FIRST, [], r"models\[0\]: expected an object, found list"),
        ((*FIRST, "uri"), ..., r"models\[0\]: uri is missing"),
        ((*FIRST, "uri"), 5, r"models\[0\]: uri is 5"),
        ((*FIRST, "uri"), "", r"models\[0\]"),
        ((*FIRST, "uri"), "gcs://bucket/tree", r"models\[0\]: .*canonical"),
        ((*FIRST, "uri"), f"s3://bucket/tree#sha256={'0' * 64}", r"models\[0\]: .*canonical"),
        ((*FIRST, "uri"), "https://h.example/m?sig=canary", r"models\[0\]: .*credential"),
        ((*FIRST, "uri"), "s3://bucket/object", "s3://bucket/object is there twice"),
        ((*FIRST, "type"), "folder", r"models\[0\]: type is 'folder'"),
        ((*FIRST, "type"), "object", r"models\[0\]: 2 files, which object cannot have"),
        ((*FIRST, "digest"), f"sha256:{'0' * 64}", r"models\[0\]: digest"),
        ((*FIRST, "digest"), "nonsense", r"models\[0\]: digest"),
        ((*FIRST, "unpack"), True, r"models\[0\]: unpack is true"),
        ((*FIRST, "unpack"), 0, r"models\[0\]: unpack"),
        ((*FIRST, "allow"), "*", r"models\[0\]: allow"),
        ((*FIRST, "allow"), [5], r"models\[0\]: .*pattern"),
        ((*FIRST, "files"), [], r"models\[0\]: 0 files"),
        ((*FIRST, "files"), [1], r"models\[0\]: files\[0\]: expected an object"),
        ((*FILE, "path"), "../c", r"models\[0\]: .*\.\."),
        ((*FILE, "path"), "/c", r"models\[0\]: .*absolute"),
        ((*FILE, "path"), "b//c", r"models\[0\]: .*empty part"),
        ((*FILE, "path"), "./c", r"models\[0\]: .*empty part"),
        ((*FILE, "path"), "", r"models\[0\]"),
        ((*FILE, "path"), "b\0c", r"models\[0\]: .*NUL"),
        ((*FILE, "path"), "a", r"models\[0\]: .*same file"),
        ((*FILE, "path"), "a/c", r"models\[0\]: .*file and a folder"),
        ((*FILE, "path"), "A", r"models\[0\]: .*order"),
        ((*FILE, "path"), "b/d", r"models\[0\]: digest"),
        ((*FILE, "path"), "b/\ud800", r"models\[0\]"),
        ((*FILE, "path"), ..., r"models\[0\]: files\[1\]: path is missing"),
        ((*FILE, "size"), -1, r"models\[0\]: files\[1\]: size is -1"),
        ((*FILE, "size"), True, r"models\[0\]: files\[1\]: size is True"),
        ((*FILE, "size"), 1.0, r"models\[0\]: files\[1\]: size is 1.0"),
        ((*FILE, "sha256"), sha256(b"2").upper(), r"models\[0\]: files\[1\]: "),
        ((*FILE, "sha256"), sha256(b"3"), r"models\[0\]: digest"),
        ((*FILE, "mode"), 1, r"models\[0\]: files\[1\]: 'mode' is no field"),
    ],
)
def test_whatever_is_wrong_in_a_lock_is_named(
    path: tuple[str | int, ...], value: Any, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        LockFile.parse(changed(path, value), "models.lock")
    message = str(caught.value)
    assert message.startswith("models.lock: ")
    assert "canary" not in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 1, "version": 1, "models": []}', "[" * 100_000]
)
def test_what_is_no_lock_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"models\.lock"):
        LockFile.parse(text, "models.lock")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"\xff')
    for name in ("absent", "latin", "."):
        with pytest.raises(ConfigurationError, match="cannot be read") as caught:
            LockFile.read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_lock_of_several_accounts_uses_the_settings(
    make_store: Callable[[str], Store],
) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    assert isinstance(store.config, S3Config)
    store.put_raw("m", b"1")
    entry = {
        "prefix": store.base,
        "access_key_id": store.server.access_key,
        "secret_access_key": store.server.secret_key,
        "endpoint_url": store.server.endpoint,
    }
    with StorageClient(settings=load_settings(stores={"mine": entry})) as client:
        lock = client.lock(store.uri("m"))
        assert Path(client.download_locked(lock, store.uri("m"))).read_bytes() == b"1"
    assert entry["secret_access_key"] not in lock.dumps()
    assert StorageOperations.list_objects(store.uri("m"), config=store.config) == ["m"]
