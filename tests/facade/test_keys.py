"""Keys are literal: whatever a store can hold goes up and comes down under the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage import Storage, StorageOperations
from tests.facade.stores import Store, slow_on, tree_bytes

NINE_HUNDRED = "/".join([*(letter * 200 for letter in "abcd"), "e" * 96])

ODD_KEYS = {
    "space": "a model",
    "spaces around": " model ",
    "percent": "100%",
    "percent-encoded letter": "%41",
    "percent-encoded slash": "a%2Fb",
    "plus": "a+b",
    "brackets": "[1]",
    "star": "*",
    "braces": "{a,b}",
    "hash": "#",
    "hash in the middle": "model#1.bin",
    "almost a digest": "model#sha256=abc",
    "question mark": "?",
    "almost a version": "model?versionId=1&more",
    "ampersand": "&",
    "composed accent": "\u00e9",
    "decomposed accent": "e\u0301",
    "beyond the basic plane": "模型🤗",
    "quotes": 'it\'s "here"',
    "angle brackets": "<a>&amp;</a>",
    "punctuation": "~!@$^()_-=;:,.",
    "backslash": "a\\b",
    "hidden": ".hidden",
    "dots": "...",
    "dash": "-rf",
    "scheme": "s3:",
    "deep": "a b/%41/+/[1]/#/é",
    "900 characters": NINE_HUNDRED,
}


def test_the_long_key_is_long() -> None:
    assert len(NINE_HUNDRED) == 900
    assert max(map(len, NINE_HUNDRED.split("/"))) <= 255


@slow_on("moto-obstore", "moto-fsspec")
@pytest.mark.parametrize("kind", ODD_KEYS)
def test_odd_key_as_one_object(store: Store, tmp_path: Path, out: Path, kind: str) -> None:
    key = ODD_KEYS[kind]
    if not store.holds(key):
        return  # see the table of gaps
    uri, config = store.uri(key), store.config
    data = f"content of {kind}".encode()
    source = tmp_path / "source"
    source.write_bytes(data)
    assert Storage.upload(source, uri, config=config) is True
    assert store.keys() == [key]
    assert store.get_raw(key) == data
    assert StorageOperations.list_objects(store.base, config=config) == [key]
    found = StorageOperations.get_object_metadata(uri, config=config)
    assert (found["type"], found["size"]) == ("object", len(data))
    path = Storage.download(uri, f"{out}/", config=config)
    assert path == str(out / key.rpartition("/")[2])
    assert tree_bytes(out) == {key.rpartition("/")[2]: data}
    assert Path(Storage.download(uri, config=config)).read_bytes() == data
    with Storage.open(uri, config=config) as file:
        assert file.read() == data
    copy = store.uri(f"copy/{key}")
    assert StorageOperations.copy_object(uri, copy, config=config) is True
    assert store.get_raw(f"copy/{key}") == data
    for each in (uri, copy):
        assert StorageOperations.delete_object(each, config=config) is True
    assert store.keys() == []


def test_odd_keys_inside_a_tree(store: Store, tmp_path: Path, out: Path) -> None:
    files = {
        key: f"content of {kind}".encode() for kind, key in ODD_KEYS.items() if store.holds(key)
    }
    source = tmp_path / "source"
    for key, data in files.items():
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        (source / key).write_bytes(data)
    uri, config = store.uri("tree [1] #%41/é"), store.config
    assert Storage.upload(source, uri, config=config) is True
    assert store.keys() == sorted(f"tree [1] #%41/é/{key}" for key in files)
    assert StorageOperations.list_objects(uri, config=config) == sorted(files)
    assert tree_bytes(Storage.download(uri, out / "tree", config=config)) == files
    StorageOperations.copy_object(uri, store.uri("copy"), config=config)
    assert StorageOperations.list_objects(store.uri("copy"), config=config) == sorted(files)
    for each in (uri, store.uri("copy")):
        StorageOperations.delete_object(each, config=config, recursive=True)
    assert store.keys() == []


@pytest.mark.parametrize("kind", ODD_KEYS)
def test_odd_name_of_a_tree(make_store: Callable[[str], Store], out: Path, kind: str) -> None:
    store = make_store("memory")
    store.put_raw(f"{ODD_KEYS[kind]}/f", b"data")
    for dest in (None, out / "tree"):
        path = Storage.download(store.uri(ODD_KEYS[kind]), dest)
        assert tree_bytes(path) == {"f": b"data"}


# -- many ------------------------------------------------------------------------------------

COUNT = 2_500


@slow_on("seaweedfs-fsspec", "moto-obstore", "moto-fsspec")
def test_many_keys_are_listed_downloaded_and_deleted_whole(store: Store, out: Path) -> None:
    # More than one page of a listing, and more than one request of S3 can delete.
    files = {f"{number % 7}/n{number:05}": b"%d" % number for number in range(COUNT)}
    store.put_all({f"many/{path}": data for path, data in files.items()})
    store.put_raw("many-more", b"kept")
    uri, config = store.uri("many"), store.config
    assert StorageOperations.list_objects(uri, config=config) == sorted(files)
    assert StorageOperations.get_object_metadata(uri, config=config)["objects"] == COUNT
    assert tree_bytes(Storage.download(uri, out / "tree", config=config)) == files
    StorageOperations.delete_object(uri, config=config, recursive=True)
    assert store.keys() == ["many-more"]
