"""One object, a tree, or nothing: the same answer from every store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from storage import (
    AuthenticationError,
    BucketMissingError,
    InvalidInput,
    ModelMissingError,
    Progress,
    Storage,
    StorageOperations,
)
from tests.facade.stores import (
    GAPS,
    STORES,
    AzureStore,
    BucketStore,
    FileStore,
    MemoryStore,
    Store,
    cached_content,
    needs,
    s3_config,
    tree_bytes,
)
from tests.servers import SeaweedFS
from tests.servers.azurite import AzureError
from tests.servers.hub.state import CommitError

IRIS = {"model.bin": b"weights", "config/params.json": b"{}"}


def fill(store: Store, files: dict[str, bytes], prefix: str = "") -> None:
    store.put_all({prefix + path: data for path, data in files.items()})


def download(store: Store, path: str, dest: Path | str | None = None, **options: Any) -> str:
    return Storage.download(store.uri(path), dest, config=store.config, **options)


def listed(store: Store, path: str = "") -> list[str]:
    return StorageOperations.list_objects(store.uri(path), config=store.config)


def described(store: Store, path: str = "") -> dict[str, Any]:
    return StorageOperations.get_object_metadata(store.uri(path), config=store.config)


def check_missing(store: Store, path: str, out: Path) -> None:
    """Check that every operation says that nothing is at ``path``, and changes nothing."""
    before = store.keys()
    uri, config = store.uri(path), store.config
    operations: list[Callable[[], object]] = [
        lambda: Storage.download(uri, out / "missing", config=config),
        lambda: Storage.download(uri, config=config),
        lambda: StorageOperations.list_objects(uri, config=config),
        lambda: StorageOperations.get_object_metadata(uri, config=config),
        lambda: StorageOperations.delete_object(uri, config=config, recursive=True),
        lambda: StorageOperations.copy_object(uri, store.uri("copied"), config=config),
    ]
    if not path.endswith("/"):
        operations.append(lambda: Storage.open(uri, config=config))
    for operation in operations:
        with pytest.raises(ModelMissingError) as caught:
            operation()
        assert path.rstrip("/") in str(caught.value)
        assert "\n" not in str(caught.value)
    assert store.keys() == before
    assert not (out / "missing").exists()


# -- the table of gaps -----------------------------------------------------------------------


def test_the_table_of_gaps_names_stores() -> None:
    for gaps in GAPS.values():
        assert gaps.keys() < set(STORES)


def test_gaps_of_servers_are_real(store: Store) -> None:
    if isinstance(store, (MemoryStore, FileStore)):
        return  # test_what_a_file_system_cannot_hold_… is about them
    for path, feature, becomes in (
        ("m//x", "empty segments", "m/x"),
        ("b\\x", "backslash", "b/x"),
        ("t/../evil", "dot segments", None),
        ("a\0b", "NUL", None),
        ("n" * 256, "long names", None),
    ):
        if not store.lacks(feature):
            store.put_raw(path, b"data")
            assert store.keys() == [path]
            store.delete_raw(path)
        elif becomes is not None and isinstance(store, BucketStore):
            store.put_raw(path, b"data")
            assert store.keys() == [becomes]
            store.delete_raw(path)
        elif feature == "NUL" and isinstance(store, AzureStore):
            # In a container of its own: what it breaks stays broken.
            with store.whole_bucket() as bucket:
                bucket.put_raw(path, b"data")
                with pytest.raises(AzureError, match="500"):
                    bucket.keys()
        else:
            with pytest.raises((ClientError, CommitError), match=r"400|Invalid|too long"):
                store.put_raw(path, b"data")
    if store.lacks("final dots"):
        # The real one drops them, the one of the tests does not.
        with (
            pytest.raises(InvalidInput, match="dots"),
            Storage.open(store.uri("d./x."), "wb", config=store.config) as file,
        ):
            file.write(b"data")
        assert store.keys() == []
    if store.lacks("file and folder"):
        store.put_raw("both", b"data")
        with pytest.raises(CommitError, match="a part of it is a file"):
            store.put_raw("both/child", b"data")


def test_what_a_file_system_cannot_hold_is_refused_or_follows_its_rules(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new")
    claim = make_store("pvc")
    claim.put_raw("m/x", b"data")
    # A claim's keys are literal: what a path would fold is refused, never changed.
    for path in ("m//x", "m/./x", "m/../m/x"):
        with pytest.raises(InvalidInput):
            download(claim, path)
        with pytest.raises(InvalidInput):
            Storage.upload(source, claim.uri(path), config=claim.config)
    assert claim.keys() == ["m/x"]
    # A plain path is what the system takes it for.
    files = make_store("file")
    files.put_raw("m/x", b"data")
    for path in ("m//x", "m/./x", "m/../m/x"):
        assert Path(download(files, path)) == Path(files.filesystem_path("m/x"))
    for store in (claim, files):
        assert store.lacks("file and folder")
        with pytest.raises(InvalidInput):
            Storage.upload(source, store.uri("m"), config=store.config)
        with pytest.raises(InvalidInput):
            Storage.upload(source, store.uri("m/x/child"), config=store.config)
        with pytest.raises(InvalidInput):
            Storage.upload(source, store.uri("n" * 256), config=store.config)
        assert store.keys() == ["m/x"]
        assert store.lacks("metadata")
        Storage.upload(source, store.uri("plain"), config=store.config)
        assert described(store, "plain")["metadata"] == {}
    for name in STORES:
        assert Storage.is_local(make_store(name).base) == (name in GAPS["remote"])


# -- object, tree or nothing -----------------------------------------------------------------


def test_exact_key_is_one_object(store: Store, out: Path) -> None:
    fill(store, IRIS, "models/iris/")
    path = download(store, "models/iris/model.bin", out / "file")
    assert path == str(out / "file")
    assert Path(path).read_bytes() == b"weights"
    assert listed(store, "models/iris/model.bin") == ["model.bin"]
    found = described(store, "models/iris/model.bin")
    assert (found["type"], found["size"]) == ("object", 7)


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_is_below_a_key_is_a_tree(store: Store, out: Path, slash: str) -> None:
    fill(store, IRIS, "models/iris/")
    path = download(store, "models/iris" + slash, out / "tree")
    assert path == str(out / "tree")
    assert tree_bytes(path) == IRIS
    assert listed(store, "models/iris" + slash) == sorted(IRIS)
    found = described(store, "models/iris" + slash)
    assert (found["type"], found["size"], found["objects"]) == ("tree", 9, 2)


@pytest.mark.parametrize("path", ["absent", "absent/", "absent/deep/model.bin"])
def test_nothing_is_an_error(store: Store, out: Path, path: str) -> None:
    store.put_raw("present", b"data")
    check_missing(store, path, out)


def test_nothing_is_an_error_in_an_empty_place(store: Store, out: Path) -> None:
    with store.whole_bucket() as empty:
        check_missing(empty, "model", out)


def test_sibling_prefix_is_not_downloaded(store: Store, out: Path) -> None:
    siblings = {
        "models/iris-v2/model.bin": b"v2",
        "models/iris.old/model.bin": b"old",
        "models/iris2": b"two",
        "models/irisé/model.bin": b"e",
    }
    fill(store, IRIS, "models/iris/")
    fill(store, siblings)
    assert tree_bytes(download(store, "models/iris", out / "a")) == IRIS
    assert tree_bytes(download(store, "models/iris/", out / "b")) == IRIS
    assert listed(store, "models/iris") == sorted(IRIS)
    assert described(store, "models/iris")["objects"] == len(IRIS)
    StorageOperations.copy_object(store.uri("models/iris"), store.uri("copy"), config=store.config)
    assert listed(store, "copy") == sorted(IRIS)
    StorageOperations.delete_object(store.uri("copy"), config=store.config, recursive=True)
    StorageOperations.delete_object(store.uri("models/iris"), config=store.config, recursive=True)
    assert store.keys() == sorted(siblings)


@pytest.mark.parametrize("part", ["models/iri", "models/iri/", "models/iris/model", "model"])
def test_part_of_a_name_is_nothing(store: Store, out: Path, part: str) -> None:
    fill(store, IRIS, "models/iris/")
    check_missing(store, part, out)


@needs("file and folder")
def test_trailing_slash_forces_a_tree_even_where_the_object_exists(store: Store, out: Path) -> None:
    store.put_raw("both", b"object")
    store.put_raw("both/child", b"child")
    assert Path(download(store, "both", out / "object")).read_bytes() == b"object"
    assert listed(store, "both") == ["both"]
    assert tree_bytes(download(store, "both/", out / "tree")) == {"child": b"child"}
    assert listed(store, "both/") == ["child"]
    assert described(store, "both/")["objects"] == 1


def test_trailing_slash_never_means_an_object(store: Store, out: Path) -> None:
    store.put_raw("only", b"object")
    check_missing(store, "only/", out)


@pytest.mark.parametrize("slash", ["", "/"])
def test_whole_bucket_is_a_tree(store: Store, out: Path, slash: str) -> None:
    with store.whole_bucket() as bucket:
        fill(bucket, IRIS)
        bucket.put_raw("top", b"t")
        uri = bucket.base + slash
        path = Storage.download(uri, out / "tree", config=bucket.config)
        assert tree_bytes(path) == IRIS | {"top": b"t"}
        assert StorageOperations.list_objects(uri, config=bucket.config) == sorted([*IRIS, "top"])
        kept = Storage.download(uri, config=bucket.config)
        assert tree_bytes(kept) == IRIS | {"top": b"t"}


def test_missing_bucket_is_its_own_error(make_store: Callable[[str], Store], out: Path) -> None:
    for name in STORES:
        if name == "file":
            continue
        store = make_store(name)
        scheme = store.base.partition("://")[0]
        owner = "owner/" if scheme == "hf" else ""
        uri = f"{scheme}://{owner}no-such-bucket/tree/"
        for operation in (
            lambda: Storage.download(uri, out / "tree", config=store.config),  # noqa: B023
            lambda: StorageOperations.list_objects(uri, config=store.config),  # noqa: B023
        ):
            with pytest.raises(BucketMissingError, match="no-such-bucket"):
                operation()
    assert os.listdir(out) == []


def test_zero_byte_files_are_kept(store: Store, out: Path) -> None:
    files = {"__init__.py": b"", "deep/empty": b"", "full": b"x"}
    fill(store, files, "tree/")
    assert listed(store, "tree") == sorted(files)
    assert tree_bytes(download(store, "tree", out / "tree")) == files
    assert described(store, "tree")["objects"] == 3


def test_a_tree_of_nothing_but_zero_byte_files_is_a_tree(store: Store, out: Path) -> None:
    fill(store, {"a": b"", "b/c": b""}, "tree/")
    assert tree_bytes(download(store, "tree", out / "tree")) == {"a": b"", "b/c": b""}


def test_zero_byte_object_is_an_object(store: Store, out: Path) -> None:
    fill(store, {"zero": b"", "zero.txt": b"sibling", "zeros/x": b"sibling"})
    path = download(store, "zero", out / "file")
    assert os.path.isfile(path)
    assert Path(path).read_bytes() == b""
    assert described(store, "zero")["size"] == 0
    assert listed(store, "zero") == ["zero"]
    with Storage.open(store.uri("zero"), config=store.config) as file:
        assert file.read() == b""


@needs("file and folder")
def test_zero_byte_object_does_not_fall_through_to_what_is_below_it(
    store: Store, out: Path
) -> None:
    fill(store, {"zero": b"", "zero/child": b"child"})
    path = download(store, "zero", out / "file")
    assert os.path.isfile(path)
    assert os.listdir(out) == ["file"]


def test_directory_markers_are_not_files(store: Store, out: Path) -> None:
    for marker in ("tree/", "tree/empty/", "tree/sub/"):
        store.put_raw(marker, b"")
    fill(store, {"a": b"a", "sub/b": b"b"}, "tree/")
    assert listed(store, "tree") == ["a", "sub/b"]
    assert described(store, "tree")["objects"] == 2
    path = download(store, "tree", out / "tree")
    assert tree_bytes(path) == {"a": b"a", "sub/b": b"b"}
    assert sorted(os.listdir(path)) == ["a", "sub"]


def test_a_marker_alone_is_nothing(store: Store, out: Path) -> None:
    store.put_raw("alone/", b"")
    check_missing(store, "alone", out)
    check_missing(store, "alone/", out)


def test_nested_trees_keep_their_paths(store: Store, out: Path) -> None:
    files = {"/".join("abcdefghij"[:depth]) + "/leaf": bytes([depth]) for depth in range(1, 11)}
    fill(store, files, "tree/")
    assert tree_bytes(download(store, "tree", out / "tree")) == files
    assert listed(store, "tree/a/b") == sorted(
        path[4:] for path in files if path.startswith("a/b/")
    )


# -- an object that may be read where nothing may be listed ----------------------------------


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
@pytest.mark.parametrize("identity", ["reader", "object_reader"])
def test_exact_object_is_readable_where_listing_is_forbidden(
    seaweedfs: SeaweedFS, readable_bucket: str, out: Path, driver: str, identity: str
) -> None:
    keys = getattr(seaweedfs, identity)
    config = s3_config(seaweedfs, driver, keys)
    seaweedfs.put_raw(readable_bucket, "model.bin", b"weights")
    seaweedfs.put_raw(readable_bucket, "model.bin.d/part", b"part")
    uri = f"s3://{readable_bucket}/model.bin"
    path = Storage.download(uri, out / "file", config=config)
    assert Path(path).read_bytes() == b"weights"
    assert Path(Storage.download(uri, config=config)).read_bytes() == b"weights"
    assert StorageOperations.get_object_metadata(uri, config=config)["size"] == 7
    assert StorageOperations.list_objects(uri, config=config) == ["model.bin"]
    with Storage.open(uri, config=config) as file:
        assert file.read() == b"weights"
    for tree in (f"{uri}.d/", f"{uri}.d"):
        with pytest.raises(AuthenticationError) as caught:
            Storage.download(tree, out / "tree", config=config)
        assert isinstance(caught.value, PermissionError)
        assert keys.secret_key not in str(caught.value)
    assert os.listdir(out) == ["file"]


# -- what could not become files -------------------------------------------------------------


def check_refused(store: Store, path: str, out: Path) -> str:
    """Check that a tree is refused before a byte of it is fetched; return the message."""
    events: list[Progress] = []
    messages = []
    for dest in (out / "tree", None):
        with pytest.raises(InvalidInput) as caught:
            download(store, path, dest, progress=events.append)
        messages.append(str(caught.value))
        assert "\n" not in messages[-1]
    assert events == []
    assert os.listdir(out) == []
    assert cached_content() == []
    assert messages[0] == messages[1]
    return messages[0]


@needs("empty segments")
def test_keys_that_would_be_the_same_file_are_refused(store: Store, out: Path) -> None:
    fill(store, {"m//x": b"one", "m/x": b"two", "fine": b"three"}, "tree/")
    assert listed(store, "tree") == ["fine", "m//x", "m/x"]
    message = check_refused(store, "tree", out)
    assert "'m//x'" in message
    assert "'m/x'" in message
    # Patterns may choose one of them, and each is an object of its own.
    path = download(store, "tree", out / "chosen", ignore_patterns="m//x")
    assert tree_bytes(path) == {"m/x": b"two", "fine": b"three"}
    assert Path(download(store, "tree/m//x", out / "one")).read_bytes() == b"one"
    assert Path(download(store, "tree/m/x", out / "two")).read_bytes() == b"two"


@needs("dot segments", "empty segments")
def test_dot_segments_that_fold_two_keys_into_one_are_refused(store: Store, out: Path) -> None:
    fill(store, {"m/./x": b"one", "m/x": b"two"}, "tree/")
    check_refused(store, "tree", out)


@needs("dot segments")
@pytest.mark.parametrize("key", ["../evil", "a/../../evil", "..", "a/.."])
def test_keys_that_leave_the_tree_are_refused(store: Store, out: Path, key: str) -> None:
    store.put_raw("tree/fine", b"fine")
    store.put_raw("tree/" + key, b"evil")
    assert "'..'" in check_refused(store, "tree", out)


@needs("empty segments")
def test_absolute_keys_are_refused(store: Store, out: Path) -> None:
    store.put_raw("tree/fine", b"fine")
    store.put_raw("tree//etc/evil", b"evil")
    assert "is absolute" in check_refused(store, "tree", out)


@needs("file and folder")
def test_a_key_that_would_be_file_and_folder_is_refused(store: Store, out: Path) -> None:
    fill(store, {"a": b"file", "a/b": b"below", "c": b"fine"}, "tree/")
    assert "'a'" in check_refused(store, "tree", out)
    path = download(store, "tree", out / "tree", ignore_patterns="a/*")
    assert tree_bytes(path) == {"a": b"file", "c": b"fine"}


@needs("NUL")
def test_keys_with_a_nul_are_refused(store: Store, out: Path) -> None:
    store.put_raw("tree/fine", b"fine")
    store.put_raw("tree/a\0b", b"evil")
    try:
        assert "NUL" in check_refused(store, "tree", out)
    finally:
        # The server's own listing of versions breaks over it.
        store.delete_raw("tree/a\0b")


def test_a_uri_with_a_nul_is_refused_everywhere(store: Store, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    uri, config = store.uri("a\0b"), store.config
    for operation in (
        lambda: Storage.download(uri, out / "x", config=config),
        lambda: Storage.upload(source, uri, config=config),
        lambda: Storage.open(uri, config=config),
        lambda: Storage.open(uri, "wb", config=config),
        lambda: StorageOperations.list_objects(uri, config=config),
        lambda: StorageOperations.get_object_metadata(uri, config=config),
        lambda: StorageOperations.delete_object(uri, config=config),
        lambda: StorageOperations.copy_object(uri, store.uri("c"), config=config),
        lambda: StorageOperations.copy_object(store.uri("c"), uri, config=config),
        lambda: Storage.is_local(uri),
        lambda: Storage.get_storage_spec(uri),
    ):
        with pytest.raises(InvalidInput, match="NUL"):
            operation()
    with pytest.raises(InvalidInput):
        download(store, "x", str(out / "a\0b"))
    assert os.listdir(out) == []
    assert store.keys() == []


@needs("long names")
def test_a_name_too_long_for_a_file_system_is_refused(store: Store, out: Path) -> None:
    store.put_raw("tree/" + "n" * 256, b"long")
    assert "255" in check_refused(store, "tree", out)
