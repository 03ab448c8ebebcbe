"""What a folder notes of its sources, and that nobody else writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from storage.errors import InvalidInput
from tests.integrations.kserve.support import V1, put, tree


@pytest.fixture
def without_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without extended attributes."""

    def refuse(*args: Any) -> Any:
        raise OSError(95, "Operation not supported")

    for name in ("getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuse)


@pytest.mark.usefixtures("without_attributes")
def test_without_attributes_one_hidden_file_is_enough(tmp_path: Path) -> None:
    put(tmp_path, "s3://b/one", {"one": b"1", "two": b"1"})
    put(tmp_path, "s3://b/two", {"three": b"1"})
    put(tmp_path, "s3://b/one", {"one": b"2"})

    assert sorted(os.listdir(tmp_path)) == [".modelstorage", "one", "three"]


def test_a_note_that_is_too_long_for_an_attribute_is_a_file(tmp_path: Path) -> None:
    many = {f"{'x' * 200}{number}": b"" for number in range(400)}
    put(tmp_path, "s3://b/m", many)
    assert sorted(os.listdir(tmp_path)) == sorted([".modelstorage", *many])
    put(tmp_path, "s3://b/m", {"few": b""})
    assert os.listdir(tmp_path) == ["few"]


@pytest.mark.parametrize("note", [b"", b"[]", b'{"a": 1}', b'{"a": {"paths": ["../x", "/y"]}}'])
@pytest.mark.usefixtures("without_attributes")
def test_a_damaged_note_is_as_good_as_none(note: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "x").write_bytes(b"mine")
    (folder / ".modelstorage").write_bytes(note)

    put(folder, "s3://b/m", {"a": b"1"})
    put(folder, "s3://b/m", {"b": b"1"})

    assert sorted(os.listdir(folder)) == [".modelstorage", "b"]
    assert (tmp_path / "x").read_bytes() == b"mine"


FORGED = f".modelstorage.{'f' * 16}"


@pytest.mark.parametrize("name", [".modelstorage", ".modelstorage.new", f"{FORGED}/moving"])
@pytest.mark.parametrize("below", ["", "adapter/"])
def test_a_source_cannot_forge_what_is_noted(below: str, name: str, tmp_path: Path) -> None:
    put(tmp_path, "s3://b/m", V1)
    with pytest.raises(InvalidInput, match=r"\.modelstorage"):
        put(tmp_path, "s3://b/m", {"a": b"2", f"{below}{name}": b"{}"})

    assert tree(tmp_path) == V1
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.bin", "old"]


@pytest.mark.parametrize(
    "record",
    [
        {"old": ["../mine"], "new": [], "shares": {}},
        {"old": [], "new": ["../theirs"], "shares": {}},
        {"old": ["a"], "new": [], "shares": []},
        {"old": ["a"]},
        "",
    ],
)
def test_moves_that_this_library_never_recorded_are_not_made(
    record: object, tmp_path: Path
) -> None:
    folder, forged = tmp_path / "models", tmp_path / "models" / FORGED
    (forged / "old").mkdir(parents=True)
    (forged / "content").mkdir()
    (forged / "theirs").write_bytes(b"2")
    (folder / "a").write_bytes(b"1")
    (tmp_path / "mine").write_bytes(b"1")
    (forged / "moving").write_text(json.dumps(record) if record else "")

    put(folder, "s3://b/m", V1)

    assert tree(tmp_path) == {
        "mine": b"1",
        "models/a": b"1",
        **{f"models/{path}": content for path, content in V1.items()},
    }
