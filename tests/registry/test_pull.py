"""Pulling versions: from every store, whole and verified, through the cache, and offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    OfflineError,
    StorageClient,
    UnreachableError,
)
from storage.cache.parcel import export, import_
from storage.config import load_settings
from storage.digest import hash_file, tree_digest
from storage.registry import ModelRegistry, fetch_again
from tests.cache.support import blob_files, blocked_sockets, wrong_blobs
from tests.facade.conftest import bucket_store
from tests.facade.stores import (
    FileStore,
    MemoryStore,
    PVCStore,
    S3Store,
    Store,
    tree_bytes,
)
from tests.servers import CountingProxy

MODEL = {
    "config.json": b'{"layers": 2}',
    "empty.txt": b"",
    "sub/weights.bin": bytes(range(256)) * 500,
}
NEXT = MODEL | {"config.json": b'{"layers": 3}'}

MakeClient = Callable[..., StorageClient]


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[MakeClient]:
    """Make clients, by default of one cache; they are closed at the end."""
    made: list[StorageClient] = []

    def make(cache: str = "cache", **settings: Any) -> StorageClient:
        client = StorageClient(settings=load_settings(cache_dir=tmp_path / cache, **settings))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def s3(request: pytest.FixtureRequest, prefix: str) -> S3Store:
    store = bucket_store(request, "seaweedfs-obstore", prefix)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture(params=["file", "pvc"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    """A store on a file system of this machine."""
    return FileStore(tmp_path / "store") if request.param == "file" else PVCStore(tmp_path / "pvc")


def registry_of(store: Store, client: StorageClient) -> ModelRegistry:
    return ModelRegistry(store.uri("registry"), config=store.config, client=client)


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def publish(tmp_path: Path, make_client: MakeClient) -> Callable[..., ModelRegistry]:
    """Call it with a store and the files of each version of ``iris``."""

    def run(store: Store, *versions: dict[str, bytes]) -> ModelRegistry:
        registry = registry_of(store, make_client())
        registry.init()
        for number, files in enumerate(versions, 1):
            version = registry.push("iris", write_tree(tmp_path / "src", files))
            assert version.number == number
        return registry

    return run


# -- from every store ------------------------------------------------------------------------


def test_a_version_comes_by_number_alias_and_as_the_latest(
    registry_store: Store, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(registry_store, MODEL, NEXT)
    registry.set_alias("iris", "production", 1)
    for reference, files in (
        (1, MODEL),
        ("2", NEXT),
        ("production", MODEL),
        ("latest", NEXT),
    ):
        out = registry.pull("iris", reference, tmp_path / f"out-{reference}")
        assert out == str(tmp_path / f"out-{reference}")
        assert tree_bytes(out) == files
        assert tree_bytes(registry.pull("iris", reference)) == files
    assert tree_bytes(registry.pull("iris")) == NEXT


def test_what_is_not_there_is_missing(
    registry_store: Store, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(registry_store, MODEL)
    for model, reference in (("iris", 2), ("iris", "production"), ("lily", "latest")):
        with pytest.raises(ModelMissingError):
            registry.pull(model, reference, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidInput):
        registry.pull("iris", "../1")
    with pytest.raises(InvalidInput):
        registry.pull("../iris")


def test_a_tampered_blob_is_refused(
    registry_store: Store, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(registry_store, MODEL)
    (large,) = (file for file in registry.show("iris", 1).files if file.path == "sub/weights.bin")
    name = f"registry/{large.name}"
    good = registry_store.get_raw(name)
    cache = Path(registry.client.cache.upper.path)
    for wrong, found in (
        (b"\x01" + good[1:], "arrived are"),
        (good[:-1], f"has {len(good) - 1} bytes"),
        (good + b"\x00", f"has {len(good) + 1} bytes"),
        (b"", "has 0 bytes"),
    ):
        make_writable(registry_store, name)
        registry_store.put_raw(name, wrong)
        for options in ({"dest": tmp_path / "out"}, {}, {"dest": tmp_path / "out", "cache": True}):
            with pytest.raises(IntegrityError, match=found):
                registry.pull("iris", 1, **options)
        assert not (tmp_path / "out").exists()
        assert wrong_blobs(cache) == []
        # One on this machine is asked, whatever the network.
        with pytest.raises(
            IntegrityError if isinstance(registry_store, FileStore) else OfflineError
        ):
            registry.pull("iris", 1, offline=True)
    registry_store.put_raw(name, good)
    assert tree_bytes(registry.pull("iris", 1)) == MODEL


def make_writable(store: Store, name: str) -> None:
    if isinstance(store, FileStore):
        os.chmod(store.folder / name, 0o644)


def test_a_blob_that_is_gone_is_damage(
    registry_store: Store, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(registry_store, MODEL)
    registry_store.delete_raw(f"registry/{registry.show('iris', 1).files[0].name}")
    with pytest.raises(IntegrityError, match="lacks the content"):
        registry.pull("iris", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- what is verified ------------------------------------------------------------------------


def test_digests_that_the_store_tells_do_not_count(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(memory, MODEL)
    (file,) = (each for each in registry.show("iris", 1).files if each.path == "config.json")
    other = b'{"layers": 9}'
    assert len(other) == file.size
    path = tmp_path / "other"
    path.write_bytes(other)
    digests = hash_file(str(path), ("blake3", "sha256"))
    metadata = {name: digest.hex for name, digest in digests.items()}
    memory.put_described(f"registry/{file.name}", other, metadata)
    for dest in (None, tmp_path / "out"):
        with pytest.raises(IntegrityError):
            registry.pull("iris", 1, dest)
    assert not (tmp_path / "out").exists()


def test_a_digest_of_the_whole_can_be_expected(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(memory, MODEL, NEXT)
    folder = write_tree(tmp_path / "src", MODEL)
    expected = tree_digest(
        {name: hash_file(str(folder / name), ("sha256",))["sha256"] for name in MODEL}, "sha256"
    )
    for dest in (None, tmp_path / "out"):
        assert tree_bytes(registry.pull("iris", 1, dest, digest=expected)) == MODEL
        with pytest.raises(IntegrityError):
            registry.pull("iris", 2, dest, digest=expected)
    assert tree_bytes(tmp_path / "out") == MODEL


# -- filters and destinations ----------------------------------------------------------------


def test_patterns_choose_files(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(memory, MODEL)
    wanted = {"config.json": MODEL["config.json"]}
    assert tree_bytes(registry.pull("iris", 1, allow_patterns="*.json")) == wanted
    out = registry.pull("iris", 1, tmp_path / "out", ignore_patterns=["sub/", "*.txt"])
    assert tree_bytes(out) == wanted
    assert tree_bytes(registry.pull("iris", 1, allow_patterns="*.json", offline=True)) == wanted
    with pytest.raises(OfflineError, match="with these filters"):
        registry.pull("iris", 1, offline=True)
    with pytest.raises(ModelMissingError, match="none of its 3 files matches"):
        registry.pull("iris", 1, allow_patterns="*.onnx")


def test_a_destination_is_replaced_as_a_whole(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    less = {"config.json": b"{}"}
    registry = publish(memory, MODEL, less)
    out = tmp_path / "out"
    registry.pull("iris", 1, out)
    registry.pull("iris", 2, out)
    assert tree_bytes(out) == less
    foreign = write_tree(tmp_path / "foreign", {"mine.txt": b"mine"})
    with pytest.raises(Exception, match="overwrite"):
        registry.pull("iris", 1, foreign)
    assert tree_bytes(foreign) == {"mine.txt": b"mine"}
    assert tree_bytes(registry.pull("iris", 1, foreign, overwrite=True)) == MODEL


def test_a_destination_can_be_links_into_the_cache(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    registry = publish(memory, MODEL)
    out = registry.pull("iris", 1, tmp_path / "out", cache=True, link="symlink")
    assert (Path(out) / "sub/weights.bin").is_symlink()
    assert tree_bytes(out) == MODEL


def test_files_of_one_content_are_files_of_their_own(
    memory: MemoryStore, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    twins = {"a/x.bin": b"same" * 999, "b/y.bin": b"same" * 999, "c.bin": b"other", "d": b"other"}
    registry = publish(memory, twins)
    out = Path(registry.pull("iris", 1, tmp_path / "out"))
    assert tree_bytes(out) == twins
    (out / "a/x.bin").write_bytes(b"changed")
    assert (out / "b/y.bin").read_bytes() == twins["b/y.bin"]
    assert tree_bytes(registry.pull("iris", 1)) == twins
    assert len(blob_files(registry.client.cache.upper.path)) == 2


def test_a_registry_in_a_folder_is_not_overwritten_by_what_it_holds(
    publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "store")
    registry = publish(store, MODEL)
    before = store.keys()
    for dest in (tmp_path / "store", tmp_path / "store/registry", tmp_path / "store/registry/out"):
        with pytest.raises(InvalidInput, match="inside one another"):
            registry.pull("iris", 1, dest, overwrite=True)
    assert store.keys() == before


# -- offline ---------------------------------------------------------------------------------


def test_what_was_pulled_is_there_without_a_network(
    s3: S3Store,
    publish: Callable[..., ModelRegistry],
    make_client: MakeClient,
    tmp_path: Path,
) -> None:
    registry = publish(s3, MODEL, NEXT)
    registry.set_alias("iris", "production", 1)
    registry.pull("iris", "production")
    registry.pull("iris", "latest")
    # What it is from now on is not known here.
    registry.set_alias("iris", "production", 2)
    with blocked_sockets():
        client = make_client(offline=True)
        away = registry_of(s3, client)
        assert tree_bytes(away.pull("iris", "production")) == MODEL
        assert tree_bytes(away.pull("iris")) == NEXT
        # By their numbers they were not asked for.
        assert tree_bytes(away.pull("iris", 1)) == MODEL
        assert tree_bytes(away.pull("iris", "2", tmp_path / "out")) == NEXT
        for model, reference in (("iris", 3), ("iris", "staging"), ("lily", 1)):
            with pytest.raises(OfflineError, match="was never cached"):
                away.pull(model, reference)
        assert client._backends == {}
    assert tree_bytes(registry.pull("iris", "production")) == NEXT
    assert tree_bytes(registry.pull("iris", "production", offline=True)) == NEXT


def test_offline_imports_no_sdk(
    s3: S3Store, publish: Callable[..., ModelRegistry], tmp_path: Path
) -> None:
    path = publish(s3, MODEL).pull("iris", "latest")
    uri = s3.uri("registry")
    program = (
        "import sys\n"
        "from storage.registry import ModelRegistry\n"
        f"assert ModelRegistry({uri!r}).pull('iris', offline=True) == {path!r}\n"
        "heavy = {'obstore', 's3fs', 'fsspec', 'botocore', 'requests', 'huggingface_hub',\n"
        "         'pydantic', 'filelock', 'asyncio', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    environ = {**os.environ, "STORAGE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_damaged_cache_is_not_served(
    memory: MemoryStore, publish: Callable[..., ModelRegistry]
) -> None:
    registry = publish(memory, MODEL)
    registry.pull("iris", 1)
    blob = max(blob_files(registry.client.cache.upper.path), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    with pytest.raises(OfflineError, match="damaged"):
        registry.pull("iris", 1, offline=True)
    assert tree_bytes(registry.pull("iris", 1)) == MODEL
    assert tree_bytes(registry.pull("iris", 1, offline=True)) == MODEL


def test_the_cache_stands_in_for_a_registry_that_cannot_be_reached(
    s3: S3Store,
    seaweedfs: Any,
    publish: Callable[..., ModelRegistry],
    make_client: MakeClient,
) -> None:
    publish(s3, MODEL)
    with CountingProxy(seaweedfs.endpoint) as proxy:
        config = s3.through(proxy.endpoint)
        ModelRegistry(s3.uri("registry"), config=config, client=make_client()).pull("iris")
    client = make_client(transfer={"attempts": 2, "retry_wait": 0.01})
    away = ModelRegistry(s3.uri("registry"), config=config, client=client)
    with pytest.raises(UnreachableError):
        away.pull("iris")
    with pytest.warns(RuntimeWarning, match="the cached copy is used"):
        assert tree_bytes(away.pull("iris", offline="auto")) == MODEL
    with pytest.raises(UnreachableError):
        away.pull("iris", 7, offline="auto")


def test_a_registry_on_this_machine_is_asked_offline_and_the_cache_if_it_is_not_there(
    local: FileStore,
    publish: Callable[..., ModelRegistry],
    make_client: MakeClient,
    tmp_path: Path,
) -> None:
    publish(local, MODEL)
    registry = registry_of(local, make_client("another", offline=True))
    assert tree_bytes(registry.pull("iris")) == MODEL
    with pytest.raises(ModelMissingError):
        registry.pull("lily")
    local.folder.rename(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="there is no registry"):
        assert tree_bytes(registry.pull("iris")) == MODEL
    with pytest.raises(ModelMissingError):
        registry.pull("iris", offline=False)


def test_freshness_decides_whether_the_registry_is_asked(
    memory: MemoryStore,
    publish: Callable[..., ModelRegistry],
    make_client: MakeClient,
) -> None:
    registry = publish(memory, MODEL)
    registry.pull("iris", "latest")
    with_next = publish_next(registry, make_client)
    assert tree_bytes(registry.pull("iris", "latest", freshness="cache-first")) == MODEL
    assert tree_bytes(registry.pull("iris", "latest", freshness=3600)) == MODEL
    assert tree_bytes(registry.pull("iris", "latest")) == NEXT
    assert with_next == 2


def publish_next(registry: ModelRegistry, make_client: MakeClient) -> int:
    folder = Path(registry.client.cache.upper.path).with_name("next")
    return registry.push("iris", write_tree(folder, NEXT)).number


# -- errors ----------------------------------------------------------------------------------


def test_a_version_that_is_deleted_meanwhile_is_missing(
    memory: MemoryStore,
    publish: Callable[..., ModelRegistry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = publish(memory, MODEL, NEXT)
    version = registry.find("iris", 2)
    found = registry.find

    def find_and_delete(model: str, reference: int | str) -> Any:
        monkeypatch.setattr(registry, "find", found)
        registry.delete("iris", 2)
        for file in version.files:
            memory.delete_raw(f"registry/{file.name}")
        return version

    monkeypatch.setattr(registry, "find", find_and_delete)
    with pytest.raises(ModelMissingError, match=re.escape("2")):
        registry.pull("iris", 2)


# -- what the cache's own commands make of it --------------------------------------------------


def test_what_was_pulled_is_repaired_from_its_registry(
    local: FileStore, publish: Callable[..., ModelRegistry]
) -> None:
    registry = publish(local, MODEL)
    registry.pull("iris", "latest")
    client = registry.client
    blob = max(blob_files(client.cache.upper.path), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(b"other")
    found = client.repair(config=local.config, fetch=fetch_again)
    assert sorted((each.uri.rpartition("@")[2], each.outcome) for each in found) == [
        ("1/", "repaired"),
        ("latest/", "repaired"),
    ]
    assert client.repair(fetch=fetch_again) == []


def test_what_was_pulled_is_exported_to_a_machine_without_a_network(
    memory: MemoryStore,
    publish: Callable[..., ModelRegistry],
    make_client: MakeClient,
    tmp_path: Path,
) -> None:
    registry = publish(memory, MODEL)
    registry.pull("iris", "latest")
    parcel = tmp_path / "parcel"
    with parcel.open("wb") as file:
        export(registry.client.cache, file)
    far = make_client("far", offline=True)
    with parcel.open("rb") as file:
        import_(far.cache, file)
    for reference in (1, "latest"):
        assert tree_bytes(registry_of(memory, far).pull("iris", reference)) == MODEL
