"""Uploads, copies and deletions: what is in the store afterwards, seen around the facade."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from blake3 import blake3

from storage import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    Progress,
    Storage,
    StorageOperations,
)
from storage.digest import MultiHasher
from tests.facade.stores import STORES, S3Store, Store, needs, tree_bytes

FILES = {"model.bin": b"weights", "config/params.json": b"{}", "empty": b"", "a/b/c": b"deep"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a few files."""
    folder = tmp_path / "source"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def has_digests(found: Mapping[str, str], data: bytes) -> bool:
    """Tell whether our own digests are there, and nothing that is not of these bytes.

    Google and Azure tell the MD5 beside them, Google the CRC-32C too.
    """
    told = MultiHasher(("md5", "crc32c"))
    told.update(data)
    expected = digests(data) | {name: each.hex for name, each in told.digests().items()}
    return found.items() <= expected.items() and digests(data).keys() <= found.keys()


def digests(data: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "blake3": blake3(data).hexdigest()}


# -- upload ----------------------------------------------------------------------------------


def test_a_file_becomes_the_object(store: Store, source: Path) -> None:
    assert Storage.upload(source / "model.bin", store.uri("m/v1.pt"), config=store.config) is True
    assert store.keys() == ["m/v1.pt"]
    assert store.get_raw("m/v1.pt") == b"weights"


def test_a_file_goes_below_a_trailing_slash(store: Store, source: Path) -> None:
    Storage.upload(source / "model.bin", store.uri("m/"), config=store.config)
    assert store.keys() == ["m/model.bin"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_goes_below_the_uri(store: Store, source: Path, slash: str) -> None:
    assert Storage.upload(source, store.uri("m/v1" + slash), config=store.config) is True
    assert store.keys() == sorted(f"m/v1/{path}" for path in FILES)
    assert {path: store.get_raw(f"m/v1/{path}") for path in FILES} == FILES


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_whole_bucket_is_filled(store: Store, source: Path, slash: str) -> None:
    with store.whole_bucket() as bucket:
        Storage.upload(source, bucket.base + slash, config=bucket.config)
        assert bucket.keys() == sorted(FILES)
    if slash:
        with store.whole_bucket() as bucket:
            Storage.upload(source / "model.bin", bucket.base + slash, config=bucket.config)
            assert bucket.keys() == ["model.bin"]


def test_what_is_there_is_replaced_and_other_names_stay(store: Store, source: Path) -> None:
    store.put_all({"m/model.bin": b"something longer from before", "m/other": b"kept"})
    Storage.upload(source, store.uri("m"), config=store.config)
    assert store.keys() == sorted([*(f"m/{path}" for path in FILES), "m/other"])
    assert store.get_raw("m/model.bin") == b"weights"
    assert store.get_raw("m/other") == b"kept"


@pytest.mark.parametrize("link", [False, True], ids=["itself", "a link to it"])
def test_what_is_put_onto_itself_stays(tmp_path: Path, source: Path, link: bool) -> None:
    given = source
    if link:
        given = tmp_path / "link"
        given.symlink_to(source)
    Storage.upload(given, str(source))
    Storage.upload(given / "model.bin", str(source / "model.bin"))
    assert tree_bytes(source) == FILES


def test_what_disappears_while_it_is_uploaded_is_an_error(tmp_path: Path, source: Path) -> None:
    file, place = source / "model.bin", tmp_path / "copy.bin"

    def remove(progress: Progress) -> None:
        if progress.bytes_done:
            file.unlink(missing_ok=True)

    with pytest.raises(IntegrityError, match="changed while it was being uploaded"):
        Storage.upload(file, str(place), progress=remove)
    assert not place.exists()


def test_without_overwrite_an_object_is_made_once(store: Store, source: Path) -> None:
    uri, config = store.uri("m/model.bin"), store.config
    Storage.upload(source / "model.bin", uri, config=config, overwrite=False)
    (source / "model.bin").write_bytes(b"other")
    with pytest.raises(ObjectExistsError) as caught:
        Storage.upload(source / "model.bin", uri, config=config, overwrite=False)
    assert isinstance(caught.value, FileExistsError)
    with pytest.raises(ObjectExistsError):
        Storage.upload(source / "model.bin", store.uri("m/"), config=config, overwrite=False)
    assert store.get_raw("m/model.bin") == b"weights"
    assert store.keys() == ["m/model.bin"]


def test_without_overwrite_a_tree_is_made_once(store: Store, source: Path) -> None:
    uri, config = store.uri("m"), store.config
    store.put_raw("m-other", b"a sibling is no obstacle")
    Storage.upload(source, uri, config=config, overwrite=False)
    store_before = store.keys()
    (source / "new").write_bytes(b"new")
    with pytest.raises(ObjectExistsError):
        Storage.upload(source, uri, config=config, overwrite=False)
    assert store.keys() == store_before
    store.put_raw("busy/something", b"of others")
    with pytest.raises(ObjectExistsError):
        Storage.upload(source, store.uri("busy"), config=config, overwrite=False)
    assert store.get_raw("busy/something") == b"of others"


@needs("metadata")
def test_digests_are_kept_with_the_object(store: Store, source: Path) -> None:
    (source / "large").write_bytes(large := os.urandom(9_000_000))
    Storage.upload(source, store.uri("m"), config=store.config)
    for path, data in (FILES | {"large": large}).items():
        found = StorageOperations.get_object_metadata(store.uri(f"m/{path}"), config=store.config)
        assert found["size"] == len(data)
        assert has_digests(found["digests"], data)
        assert found["metadata"] == digests(data)
        if isinstance(store, S3Store):
            head = store.server.head_raw(store.bucket, f"{store._prefix}m/{path}")
            assert head["Metadata"] == digests(data)
    if isinstance(store, S3Store):
        head = store.server.head_raw(store.bucket, f"{store._prefix}m/config/params.json")
        assert head["ContentType"] == "application/json"


def test_a_large_file_goes_up_whole(store: Store, tmp_path: Path, out: Path) -> None:
    data = os.urandom(20 * 1024 * 1024 + 17)
    (tmp_path / "large").write_bytes(data)
    events: list[Progress] = []
    Storage.upload(
        tmp_path / "large", store.uri("large"), config=store.config, progress=events.append
    )
    assert store.get_raw("large") == data
    assert events[-1].finished
    assert events[-1].bytes_done == events[-1].bytes_total == len(data)
    assert (events[-1].operation, events[-1].objects_done) == ("upload", 1)
    path = Storage.download(store.uri("large"), out / "large", config=store.config)
    assert Path(path).read_bytes() == data
    if isinstance(store, S3Store):
        pending = store.server.pending_uploads(store.bucket)
        assert [key for key, _ in pending if key.startswith(store._prefix)] == []


def test_links_are_followed(store: Store, source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"linked")
    (source / "folder").symlink_to(tmp_path / "elsewhere")
    (source / "file").symlink_to("model.bin")
    Storage.upload(source, store.uri("m"), config=store.config)
    assert store.get_raw("m/folder/f") == b"linked"
    assert store.get_raw("m/file") == b"weights"
    assert len(store.keys()) == len(FILES) + 2


def make_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def make_dangling_link(folder: Path) -> None:
    (folder / "dangling").symlink_to("nowhere")


def make_circle(folder: Path) -> None:
    (folder / "a" / "circle").symlink_to("..")


def make_undecodable_name(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9")).write_bytes(b"latin-1")


@pytest.mark.parametrize(
    "spoil", [make_pipe, make_dangling_link, make_circle, make_undecodable_name]
)
def test_what_cannot_be_uploaded_whole_is_refused_before_it_begins(
    store: Store, source: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(source)
    with pytest.raises(InvalidInput):
        Storage.upload(source, store.uri("m"), config=store.config)
    assert store.keys() == []


def test_there_must_be_something_to_upload(store: Store, tmp_path: Path) -> None:
    (tmp_path / "hollow" / "below").mkdir(parents=True)
    for source in (tmp_path / "absent", tmp_path / "hollow"):
        with pytest.raises(InvalidInput, match=str(source)):
            Storage.upload(source, store.uri("m"), config=store.config)
    assert store.keys() == []


def test_a_missing_bucket_is_not_made(make_store: Callable[[str], Store], source: Path) -> None:
    for name in STORES[2:]:
        store = make_store(name)
        scheme = store.base.partition("://")[0]
        with pytest.raises(ModelMissingError):
            Storage.upload(
                source / "model.bin", f"{scheme}://no-such-bucket/m", config=store.config
            )


# -- delete ----------------------------------------------------------------------------------


def test_an_object_is_deleted_and_nothing_else(store: Store) -> None:
    store.put_all({"m/a": b"1", "m/ab": b"2", "m/b": b"3", "m.": b"4"})
    assert StorageOperations.delete_object(store.uri("m/a"), config=store.config) is True
    assert store.keys() == ["m.", "m/ab", "m/b"]
    with pytest.raises(ModelMissingError):
        StorageOperations.delete_object(store.uri("m/a"), config=store.config)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_tree_is_deleted_only_on_purpose(store: Store, slash: str) -> None:
    store.put_all({"m/a": b"1", "m/b/c": b"2", "m2": b"3"})
    uri, config = store.uri("m" + slash), store.config
    with pytest.raises(InvalidInput, match="recursive"):
        StorageOperations.delete_object(uri, config=config)
    assert store.keys() == ["m/a", "m/b/c", "m2"]
    assert StorageOperations.delete_object(uri, config=config, recursive=True) is True
    assert store.keys() == ["m2"]
    with pytest.raises(ModelMissingError):
        StorageOperations.delete_object(uri, config=config, recursive=True)


@needs("file and folder")
def test_the_object_is_deleted_and_what_is_below_its_name_stays(store: Store) -> None:
    store.put_all({"m": b"1", "m/a": b"2"})
    StorageOperations.delete_object(store.uri("m"), config=store.config)
    assert store.keys() == ["m/a"]
    store.put_raw("m", b"1")
    StorageOperations.delete_object(store.uri("m/"), config=store.config, recursive=True)
    assert store.keys() == ["m"]


# -- describe --------------------------------------------------------------------------------


def test_metadata_says_what_an_object_is(store: Store, source: Path) -> None:
    Storage.upload(source / "model.bin", store.uri("m/model.bin"), config=store.config)
    found = StorageOperations.get_object_metadata(store.uri("m/model.bin"), config=store.config)
    assert found["type"] == "object"
    assert found["size"] == 7
    assert found["etag"] or found["version"]
    assert found["uri"].endswith("/m/model.bin")
    assert {"version", "content_type", "digests", "metadata"} <= found.keys()
    tree = StorageOperations.get_object_metadata(store.uri("m"), config=store.config)
    assert (tree["type"], tree["objects"], tree["size"]) == ("tree", 1, 7)
    if not store.lacks("time"):
        assert found["modified_time"].tzinfo is not None
        assert abs((tree["modified_time"] - found["modified_time"]).total_seconds()) < 1.5


# -- copy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", STORES)
def test_objects_and_trees_are_copied_between_all_stores(
    store: Store,
    make_store: Callable[[str], Store],
    source: Path,
    destination: str,
) -> None:
    target = make_store(destination)
    Storage.upload(source, store.uri("from"), config=store.config)
    options = {"config": store.config, "dest_config": target.config}

    def copy(path: str, to: str) -> None:
        assert StorageOperations.copy_object(store.uri(path), target.uri(to), **options) is True

    copy("from/model.bin", "one.pt")
    copy("from/empty", "nothing")
    copy("from/model.bin", "into/")
    copy("from", "tree/a")
    copy("from/a/", "tree/b/")
    # Both may be the same store: "from" is its own.
    copied = [path for path in list(target.keys()) if not path.startswith("from/")]
    found = {path: target.get_raw(path) for path in copied}
    assert found == {
        "one.pt": b"weights",
        "nothing": b"",
        "into/model.bin": b"weights",
        "tree/b/b/c": b"deep",
        **{f"tree/a/{path}": data for path, data in FILES.items()},
    }
    if not store.lacks("metadata") and not target.lacks("metadata"):
        for path, data in found.items():
            described = StorageOperations.get_object_metadata(
                target.uri(path), config=target.config
            )
            assert has_digests(described["digests"], data)


@pytest.mark.parametrize(
    ("origin", "destination"),
    [
        ("seaweedfs-obstore", "moto-fsspec"),
        ("seaweedfs-obstore", "moto-obstore"),
        ("moto-fsspec", "seaweedfs-obstore"),
        ("memory", "seaweedfs-fsspec"),
        ("seaweedfs-fsspec", "pvc"),
        ("file", "moto-obstore"),
        ("seaweedfs-obstore", "seaweedfs-obstore"),
        ("moto-fsspec", "moto-fsspec"),
    ],
)
def test_a_large_object_is_copied(
    make_store: Callable[[str], Store], tmp_path: Path, origin: str, destination: str
) -> None:
    one, two = make_store(origin), make_store(destination)
    data = os.urandom(20 * 1024 * 1024 + 17)
    (tmp_path / "large").write_bytes(data)
    Storage.upload(tmp_path / "large", one.uri("large"), config=one.config)
    events: list[Progress] = []
    StorageOperations.copy_object(
        one.uri("large"),
        two.uri("copy"),
        config=one.config,
        dest_config=two.config,
        progress=events.append,
    )
    assert two.get_raw("copy") == data
    assert events[-1].finished
    assert (events[-1].operation, events[-1].bytes_done) == ("copy", len(data))


def test_the_config_of_the_source_serves_both_ends_of_one_kind(store: Store) -> None:
    store.put_raw("a", b"1")
    StorageOperations.copy_object(store.uri("a"), store.uri("b"), config=store.config)
    assert store.get_raw("b") == b"1"


def test_a_copy_onto_itself_is_refused(store: Store) -> None:
    store.put_all({"a": b"1", "t/x": b"2"})
    for source, target in (("a", "a"), ("t", "t"), ("t/", "t/"), ("t/x", "t/")):
        with pytest.raises(InvalidInput, match="itself"):
            StorageOperations.copy_object(store.uri(source), store.uri(target), config=store.config)
    assert store.keys() == ["a", "t/x"]


def test_a_copy_replaces_what_is_there(store: Store) -> None:
    store.put_all({"a": b"new", "b": b"something older and longer"})
    StorageOperations.copy_object(store.uri("a"), store.uri("b"), config=store.config)
    assert store.get_raw("b") == b"new"


@needs("remote")
def test_a_copy_from_and_to_plain_paths(store: Store, source: Path, out: Path) -> None:
    StorageOperations.copy_object(str(source), store.uri("m"), dest_config=store.config)
    assert store.keys() == sorted(f"m/{path}" for path in FILES)
    StorageOperations.copy_object(store.uri("m"), out / "back", config=store.config)
    assert tree_bytes(out / "back") == FILES
