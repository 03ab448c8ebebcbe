"""Patterns choose by relative path, in the same way on every store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import InvalidInput, ModelMissingError, Storage
from tests.facade.stores import Store, tree_bytes

FILES = {
    "model.bin": b"1",
    "model.BIN": b"2",
    "config.json": b"3",
    "onnx/model.bin": b"4",
    "onnx/deep/model.onnx": b"5",
    "docs/[1].md": b"6",
}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"allow_patterns": "*.bin"}, {"model.bin", "onnx/model.bin"}),
        (
            {"allow_patterns": ["*.json", "onnx/*"]},
            {"config.json", "onnx/model.bin", "onnx/deep/model.onnx"},
        ),
        ({"allow_patterns": "onnx/"}, {"onnx/model.bin", "onnx/deep/model.onnx"}),
        ({"allow_patterns": ("model.bin",)}, {"model.bin"}),
        ({"allow_patterns": "model.?IN"}, {"model.BIN"}),
        ({"allow_patterns": "docs/[[]1].md"}, {"docs/[1].md"}),
        (
            {"ignore_patterns": "*.bin"},
            {"model.BIN", "config.json", "onnx/deep/model.onnx", "docs/[1].md"},
        ),
        ({"ignore_patterns": ["onnx/*", "docs/"]}, {"model.bin", "model.BIN", "config.json"}),
        ({"allow_patterns": "onnx/*", "ignore_patterns": "*.onnx"}, {"onnx/model.bin"}),
        ({"allow_patterns": None, "ignore_patterns": []}, set(FILES)),
    ],
)
def test_patterns_choose_files(
    store: Store, out: Path, options: dict[str, Any], chosen: set[str]
) -> None:
    store.put_all({f"tree/{path}": data for path, data in FILES.items()})
    expected = {path: FILES[path] for path in chosen}
    uri = store.uri("tree")
    assert tree_bytes(Storage.download(uri, out / "t", config=store.config, **options)) == expected
    # The same without a destination; from this machine too, where all files are at hand.
    assert tree_bytes(Storage.download(uri, config=store.config, **options)) == expected


@pytest.mark.parametrize(
    "options",
    [{"allow_patterns": "*.pt"}, {"ignore_patterns": "*"}, {"allow_patterns": []}],
)
def test_nothing_matched_is_an_error(store: Store, out: Path, options: dict[str, Any]) -> None:
    store.put_all({f"tree/{path}": data for path, data in FILES.items()})
    for path in ("tree", "tree/model.bin"):
        for dest in (out / "t", None):
            with pytest.raises(ModelMissingError, match="patterns"):
                Storage.download(store.uri(path), dest, config=store.config, **options)
    assert os.listdir(out) == []


def test_patterns_apply_to_the_name_of_one_object(store: Store, out: Path) -> None:
    store.put_raw("deep/model.bin", b"1")
    path = Storage.download(
        store.uri("deep/model.bin"), out / "f", config=store.config, allow_patterns="model.*"
    )
    assert Path(path).read_bytes() == b"1"


def test_trees_with_other_patterns_are_kept_apart(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_all({f"tree/{path}": data for path, data in FILES.items()})
    whole = Storage.download(store.uri("tree"))
    part = Storage.download(store.uri("tree"), allow_patterns="*.json")
    other = Storage.download(store.uri("tree"), ignore_patterns="*.json")
    assert len({whole, part, other}) == 3
    assert tree_bytes(whole) == FILES
    assert tree_bytes(part) == {"config.json": b"3"}
    assert Storage.download(store.uri("tree"), allow_patterns=["*.json"]) == part


@pytest.mark.parametrize("patterns", ["", [""], [None], [1], ["ok", ""]])
def test_what_is_no_pattern_is_refused(store: Store, out: Path, patterns: Any) -> None:
    store.put_raw("tree/f", b"1")
    for option in ("allow_patterns", "ignore_patterns"):
        with pytest.raises(InvalidInput, match="pattern"):
            Storage.download(
                store.uri("tree"), out / "t", config=store.config, **{option: patterns}
            )
    assert os.listdir(out) == []


def test_patterns_choose_what_is_uploaded(store: Store, tmp_path: Path) -> None:
    for path, data in FILES.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes(data)
    source = tmp_path / "source"
    uri, config = store.uri("tree"), store.config
    Storage.upload(source, uri, config=config, allow_patterns="onnx/", ignore_patterns="*.onnx")
    assert store.keys() == ["tree/onnx/model.bin"]
    with pytest.raises(InvalidInput, match="no file"):
        Storage.upload(source, uri, config=config, allow_patterns="*.pt")
    with pytest.raises(InvalidInput):
        Storage.upload(source / "model.bin", uri, config=config, ignore_patterns="*.bin")
    assert store.keys() == ["tree/onnx/model.bin"]
