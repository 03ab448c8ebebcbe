"""Logs and documents: what many writers append to, and what is refused when it is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from storage import IntegrityError, InvalidInput, ObjectChangedError, UnsupportedOperation
from storage.registry import ModelRegistry, Version, layout
from storage.registry.documents import decode, encode
from storage.registry.log import Log, last_number
from storage.registry.objects import ObjectStore
from tests.registry.conftest import MakeFolder

PREFIX = "models/iris/numbers/"


@pytest.fixture
def store(here: ModelRegistry) -> ObjectStore:
    return here.store


def later(text: bytes) -> bytes:
    """Return the text of a document as a later release may write it."""
    return text.replace(b'"format":1', b'"format":2')


# -- logs ------------------------------------------------------------------------------------


def test_the_newest_entry_is_in_force(registry: ModelRegistry) -> None:
    log = Log(registry.store, layout.alias("iris", "production"))
    assert log.head() is None
    for index in range(3):
        assert log.append({"value": index}, index) == index + 1
    head = log.head()
    assert head is not None
    assert (head[0], head[1]["value"]) == (3, 2)
    assert [(index, entry["value"]) for index, entry in log.entries()] == [(3, 2), (2, 1), (1, 0)]


def test_of_two_who_append_to_the_same_entry_one_loses(registry: ModelRegistry) -> None:
    log = Log(registry.store, layout.alias("iris", "production"))
    log.append({"value": "first"}, 0)
    with pytest.raises(ObjectChangedError, match="written by somebody else"):
        log.append({"value": "first"}, 0)
    assert len(log.entries()) == 1


def test_each_of_many_appends_is_there_once(store: ObjectStore) -> None:
    log = Log(store, "models/m/aliases/a/")

    def append(value: int) -> int:
        while True:
            head = log.head()
            try:
                return log.append({"value": value}, head[0] if head else 0)
            except ObjectChangedError:
                continue

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(append, range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert {index: entry["value"] for index, entry in log.entries()} == {
        number: value for value, number in enumerate(numbers)
    }


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 20])
@pytest.mark.parametrize("hint", [0, 1, 5])
def test_the_last_number_is_found(store: ObjectStore, count: int, hint: int) -> None:
    for index in range(1, count + 1):
        store.create(layout.entry(PREFIX, index), b"x")
    assert last_number(store, PREFIX, min(hint, count)) == count


def test_an_entry_of_a_later_release_is_refused(store: ObjectStore) -> None:
    log = Log(store, PREFIX)
    store.create(layout.entry(PREFIX, 1), later(encode({})))
    with pytest.raises(UnsupportedOperation, match=r"has format 2.*upgrade modelstorage"):
        log.head()


# -- objects ---------------------------------------------------------------------------------


def test_whoever_creates_first_has_created(registry: ModelRegistry) -> None:
    store = registry.store
    assert store.create("models/x", b"mine") is True
    assert store.create("models/x", b"mine") is True
    assert store.create("models/x", b"yours") is False
    assert store.read("models/x") == b"mine"
    assert store.info("models/y") is None
    assert store.read("models/y") is None
    store.delete(["models/x", "models/y"])
    assert store.names("models/") == []


def test_a_document_that_is_too_long_is_not_read(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.registry.objects.LONGEST", 10)
    store.create("models/x", b"x" * 11)
    with pytest.raises(IntegrityError, match="more than the 10 bytes"):
        store.read("models/x")


# -- documents -------------------------------------------------------------------------------


@pytest.fixture
def version(here: ModelRegistry, folder: MakeFolder) -> Version:
    return here.push("iris", folder({"a": b"1", "b/c": b"2"}), parent="text", tags=["t"])


def test_a_version_is_read_as_it_was_written(version: Version) -> None:
    text = version.dumps()
    assert Version.parse(text, "here") == version
    assert Version.parse(text, "here").dumps() == text


def test_fields_that_nobody_knows_are_left_alone(version: Version) -> None:
    document = decode(version.dumps(), "here") | {"later": 1}
    assert Version.parse(encode(document), "here") == version


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 0},
        {"number": True},
        {"number": "1"},
        {"model": "a/b"},
        {"content": "0" * 64},
        {"created": "yesterday"},
        {"created": "2026-01-01T00:00:00"},
        {"files": {}},
        {"files": [1]},
        {"tags": {"a": 1}},
        {"metrics": {"a": "1"}},
        {"metrics": {"a": True}},
        {"parent": 1.5},
        {"upload": None},
    ],
)
def test_damage_is_told(version: Version, changes: dict[str, Any]) -> None:
    document = decode(version.dumps(), "here") | changes
    with pytest.raises(IntegrityError, match=r"^here.* is damaged"):
        Version.parse(encode(document), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "../a"},
        {"path": "/etc/passwd"},
        {"path": "b"},
        {"path": "b/c"},
        {"path": "z"},
        {"path": ""},
        {"size": -1},
        {"size": 1.0},
        {"size": 2},
        {"blake3": "x"},
        {"sha256": "x" * 64},
        {"blob": "../../../secret"},
        {"blob": ""},
    ],
)
def test_damage_of_a_file_is_told(version: Version, changes: dict[str, Any]) -> None:
    document = decode(version.dumps(), "here")
    document["files"][0] |= changes
    with pytest.raises(IntegrityError, match=r"^here.* is damaged"):
        Version.parse(encode(document), "here")


def test_every_wrong_byte_is_told(version: Version) -> None:
    text = version.dumps()
    for index in range(len(text)):
        wrong = bytearray(text)
        wrong[index] ^= 1
        with pytest.raises((IntegrityError, UnsupportedOperation)):
            Version.parse(bytes(wrong), "here")
        with pytest.raises(IntegrityError):
            Version.parse(text[:index], "here")
    with pytest.raises(IntegrityError):
        Version.parse(text + b" ", "here")
    with pytest.raises(IntegrityError, match="its checksum is not that of its text"):
        Version.parse(text.replace(b'"number":1', b'"number":3'), "here")


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"none", b"{", b"{}", b'{"format":0}', b'{"format":1}']
)
def test_what_is_no_document_is_told(text: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^here is damaged"):
        decode(text, "here")


def test_a_version_under_another_number_is_damage(here: ModelRegistry, version: Version) -> None:
    here.store.create(layout.version("iris", 2), version.dumps())
    with pytest.raises(IntegrityError, match="it is version 1 of 'iris'"):
        here.find("iris", 2)


def test_a_registry_of_a_later_release_is_refused(here: ModelRegistry) -> None:
    for marker, problem in (
        (later(encode({"digest": "blake3"})), "has format 2"),
        (encode({"digest": "blake4"}), "addressed by 'blake4'"),
    ):
        here.store.replace(layout.MARKER, marker)
        for call in (here.exists, here.init, ModelRegistry(str(here.location)).models):
            with pytest.raises(UnsupportedOperation, match=problem):
                call()


def test_what_is_too_long_for_a_document_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.registry.documents.LONGEST", 150)
    with pytest.raises(InvalidInput, match="keep what is long in a file"):
        encode({"text": "x" * 100})
