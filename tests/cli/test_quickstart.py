from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage import tree_digest
from storage.cli.quickstart import quickstart
from storage.digest import hash_file
from tests.cli.conftest import Command, read_tree

_NAMES = ["config.json", "tokenizer/merges.txt", "vocab.txt", "weights.bin"]


def test_quickstart_moves_a_model_and_refuses_a_tampered_one(
    command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "quick"
    document = command("quickstart", root, "--json").json
    assert document["ok"] is True
    assert document["folder"] == str(root)
    model, served = read_tree(Path(document["model"])), read_tree(Path(document["path"]))
    assert sorted(model) == _NAMES
    assert model == served == read_tree(Path(document["cached_path"]))
    assert document["size"] == sum(map(len, model.values())) > 8 * 1024 * 1024
    digest = tree_digest(
        {name: hash_file(Path(document["path"], name), ["sha256"])["sha256"] for name in _NAMES}
    )
    assert document["digest"] == str(digest)
    assert document["tampered"]["published"] is False
    assert document["digest"] in document["tampered"]["message"]
    assert os.listdir(root / "served") == ["quickstart"]


def test_what_quickstart_made_is_there_for_the_other_commands(
    command: Command, tmp_path: Path
) -> None:
    result = command("quickstart", tmp_path / "quick")
    assert (result.status, result.err) == (0, "")
    uri = f"file://{tmp_path}/quick/store/models/quickstart/v1/"
    assert f"  {uri}" in result.lines
    assert f"  {tmp_path}/quick/served/quickstart" in result.lines
    assert command("ls", uri).lines == _NAMES
    digest = next(line.strip() for line in result.lines if line.startswith("  sha256:"))
    assert command("download", uri, tmp_path / "again", "--digest", digest).status == 0
    tampered = uri.replace("v1", "v1-tampered")
    assert command("download", tampered, tmp_path / "bad", "--digest", digest).status == 1


def test_quickstart_runs_again_in_the_same_folder(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "quick"
    first = command("quickstart", root, "--json").json
    # What somebody tried out meanwhile is part of the second run's model, or is replaced.
    (root / "model" / "extra.txt").write_text("mine")
    (root / "served" / "quickstart" / "config.json").write_text("changed")
    second = command("quickstart", root, "--json").json
    assert second["objects"] == 5
    assert second["digest"] != first["digest"]
    assert read_tree(root / "served" / "quickstart") == read_tree(root / "model")
    (root / "model" / "extra.txt").unlink()
    third = command("quickstart", root, "--json").json
    assert third["digest"] == first["digest"]
    assert sorted(read_tree(root / "served" / "quickstart")) == _NAMES
    assert sorted(path.name for path in (root / "cache" / "snapshots").iterdir()) != []


def test_quickstart_stays_out_of_a_folder_with_other_files(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("precious")
    result = command("quickstart", tmp_path, "--json")
    assert (result.status, result.out) == (1, b"")
    assert result.json_error["type"] == "DestinationError"
    assert read_tree(tmp_path) == {"model/config.json": b"precious"}


def test_quickstart_makes_a_folder_of_its_own_and_writes_nowhere_else(
    command: Command, tmp_path: Path
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "STORAGE_CACHE_DIR": str(home / "cache"),
        "STORAGE_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = command("quickstart", "--quiet", env=environment)
    assert (result.status, result.err) == (0, "")
    assert result.lines == [str(path) for path in temporary.iterdir()]
    assert list(home.iterdir()) == []


def test_quickstart_in_a_folder_that_cannot_be_written_fails(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = command("quickstart", tmp_path / "file" / "below")
    assert result.status == 1
    assert "cannot be written" in result.error


def test_a_relative_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = quickstart("here")
    assert report.folder == str(tmp_path / "here")
    assert report.path == str(tmp_path / "here" / "served" / "quickstart")
    assert set(report.seconds) == {"upload", "download", "cache", "cached"}
