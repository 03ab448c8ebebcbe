"""What holds for a registry on every store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    UnsupportedOperation,
)
from storage.registry import ModelRegistry, layout
from tests.facade.stores import BucketStore, MemoryStore, S3Store, Store, s3_config
from tests.registry.conftest import MakeFolder, OpenRegistry
from tests.servers import NginxHTTP, S3Server

FILES = {"model.bin": b"weights" * 1000, "config/params.json": b"{}", "empty": b"", "ü +%#": b"x"}


def test_a_life_of_a_model(
    registry: ModelRegistry, open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    first = registry.push("iris", folder(FILES), description="one", metrics={"accuracy": 0.9})
    second = registry.push("iris", folder(FILES | {"model.bin": b"better"}), parent=first.number)
    assert (first.number, second.number, second.parent) == (1, 2, 1)
    assert first.content != second.content
    registry.set_alias("iris", "production", 1)

    other = open_registry()
    assert other.models() == ["iris"]
    assert other.numbers("iris") == [1, 2]
    assert other.show("iris", "production") == first
    assert other.show("iris") == second
    assert [file.path for file in other.show("iris", 1).files] == sorted(FILES, key=str.encode)
    assert other.versions("iris") == [first, second]
    assert other.set_alias("iris", "production", "latest", expected=1) == 2
    assert registry.aliases("iris") == {"production": 2}
    assert [entry.version for entry in registry.alias_history("iris", "production")] == [2, 1]
    assert other.pending() == []


def test_content_that_is_there_is_not_uploaded_again(
    registry: ModelRegistry,
    open_registry: OpenRegistry,
    registry_store: Store,
    folder: MakeFolder,
) -> None:
    first = registry.push("iris", folder(FILES))
    before = registry_store.keys()
    assert open_registry().push("iris", folder(FILES), description="ignored") == first
    assert registry_store.keys() == before
    other = registry.push("tulip", folder({"same": FILES["model.bin"]}))
    assert {file.name for file in other.files} <= first.blobs
    blobs = [key for key in list(registry_store.keys()) if key.startswith(layout.BLOBS)]
    assert len(blobs) == len(FILES)


def test_what_is_kept_says_nothing_of_this_machine(
    registry: ModelRegistry, registry_store: Store, folder: MakeFolder
) -> None:
    source = folder(FILES)
    registry.push("iris", source)
    for key in list(registry_store.keys()):
        if key.endswith(".json") and not key.startswith(layout.BLOBS):
            assert source.name.encode() not in registry_store.get_raw(key)


def test_writers_at_once_get_a_number_each(
    open_registry: OpenRegistry, registry: ModelRegistry, folder: MakeFolder
) -> None:
    sources = [folder({"model": b"%d" % index}) for index in range(4)]
    with ThreadPoolExecutor(len(sources)) as pool:
        made = list(pool.map(lambda source: open_registry().push("iris", source), sources))
    numbers = sorted(version.number for version in made)
    assert len(set(numbers)) == len(sources)
    assert registry.numbers("iris") == numbers
    assert all(registry.find("iris", version.number) == version for version in made)


def test_writers_of_the_same_get_one_version(
    open_registry: OpenRegistry, registry: ModelRegistry, folder: MakeFolder
) -> None:
    sources = [folder(FILES) for _ in range(3)]
    with ThreadPoolExecutor(len(sources)) as pool:
        made = list(pool.map(lambda source: open_registry().push("iris", source), sources))
    assert made.count(made[0]) == len(sources)
    assert registry.numbers("iris") == [made[0].number]


def test_of_two_who_set_an_alias_by_what_they_saw_one_wins(
    registry: ModelRegistry, open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    for index in range(3):
        registry.push("iris", folder({"model": b"%d" % index}))
    registry.set_alias("iris", "production", 1, expected=None)
    registry.set_alias("iris", "production", 2, expected=1)
    with pytest.raises(ObjectChangedError, match="is set to version 2, and was expected to be"):
        open_registry().set_alias("iris", "production", 3, expected=1)
    assert registry.resolve("iris", "production") == 2


def test_a_version_that_is_deleted_is_gone_for_good(
    registry: ModelRegistry, open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    source = folder(FILES)
    first = registry.push("iris", source)
    registry.push("iris", folder({"model": b"2"}))
    registry.delete("iris", 1)
    assert open_registry().numbers("iris") == [2]
    with pytest.raises(ModelMissingError, match="version 1 of 'iris' was deleted"):
        open_registry().show("iris", 1)
    # As if whoever deleted it had died after the mark.
    registry.store.create(layout.version("iris", 1), first.dumps())
    assert open_registry().numbers("iris") == [2]
    with pytest.raises(ModelMissingError, match="version 1 of 'iris' was deleted"):
        open_registry().show("iris", 1)
    again = open_registry().push("iris", source)
    assert again.number == 3
    assert registry.show("iris") == again


def test_a_place_without_a_registry_says_so(
    open_registry: OpenRegistry, folder: MakeFolder
) -> None:
    nothing = open_registry()
    assert nothing.exists() is False
    for call in (nothing.models, lambda: nothing.push("iris", folder(FILES))):
        with pytest.raises(ModelMissingError, match="no registry at"):
            call()


def test_init_twice_changes_nothing(
    registry: ModelRegistry, open_registry: OpenRegistry, registry_store: Store
) -> None:
    assert registry_store.keys() == [layout.MARKER]
    open_registry().init()
    assert registry_store.keys() == [layout.MARKER]
    assert open_registry().exists()


def test_a_registry_is_not_made_among_other_things(
    open_registry: OpenRegistry, registry_store: Store
) -> None:
    registry_store.put_raw("something/else", b"x")
    with pytest.raises(InvalidInput, match="holds something that is no registry"):
        open_registry().init()
    assert registry_store.keys() == ["something/else"]


def test_a_store_that_overwrites_what_is_to_be_created_is_refused(
    rclone_s3: S3Server, rclone_bucket: str
) -> None:
    store: BucketStore = S3Store(
        "rclone", rclone_s3, "obstore", rclone_bucket, "place", s3_config(rclone_s3, "obstore")
    )
    with pytest.raises(UnsupportedOperation, match="keep the registry on another store"):
        ModelRegistry(store.base, config=store.config).init()
    assert store.keys() == []


@pytest.mark.parametrize("uri", ["https://example.com/registry", "ftp://example.com/registry"])
def test_a_store_without_conditions_is_refused(uri: str) -> None:
    with pytest.raises(UnsupportedOperation, match="only if it is absent"):
        ModelRegistry(uri).init()
    with pytest.raises(UnsupportedOperation, match="only if it is absent"):
        ModelRegistry(uri).delete_alias("iris", "production")


def test_a_store_that_can_only_be_read_is_read_by_number_and_alias(
    nginx_http: NginxHTTP, prefix: str, tmp_path: Path, folder: MakeFolder
) -> None:
    writer = ModelRegistry(nginx_http.data / prefix)
    writer.init()
    for index in range(3):
        writer.push("iris", folder(FILES | {"index": b"%d" % index}))
    writer.set_alias("iris", "production", 1)
    writer.set_alias("iris", "production", 2)
    writer.update("iris", 2, description="better")
    writer.delete("iris", 3)

    reader = ModelRegistry(f"{nginx_http.endpoint}/{prefix}")
    for reference in (2, "production"):
        path = Path(reader.pull("iris", reference, tmp_path / str(reference)))
        assert (path / "index").read_bytes() == b"1"
        assert reader.show("iris", reference).attributes.description == "better"
    with pytest.raises(ModelMissingError, match="version 3 of 'iris' was deleted"):
        reader.show("iris", 3)
    with pytest.raises(ModelMissingError, match=r"has no alias 'staging'$"):
        reader.pull("iris", "staging")
    with pytest.raises(UnsupportedOperation, match="name it by its number or an alias"):
        reader.pull("iris")
    with pytest.raises(UnsupportedOperation, match="only if it is absent"):
        reader.push("iris", folder(FILES))


def test_a_whole_bucket_can_be_a_registry(folder: MakeFolder) -> None:
    with MemoryStore().whole_bucket() as bucket:
        registry = ModelRegistry(bucket.base)
        registry.init()
        assert registry.push("iris", folder(FILES)).number == 1
        assert bucket.keys()[0].startswith(layout.BLOBS)
