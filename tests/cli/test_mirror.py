"""``storage mirror``, as a process of its own, between folders."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import FILES, Command, read_tree

SIZE = sum(map(len, FILES.values()))


def test_a_tree_is_mirrored_and_then_in_place(command: Command, uri: str, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    result = command("mirror", uri, target)
    assert (result.status, result.out) == (0, b"")
    assert f"copied {len(FILES)} objects" in result.err
    assert read_tree(target) == FILES
    (target / "stray").write_bytes(b"1")
    again = command("mirror", uri, target, "--delete", "--json")
    assert (again.status, again.err) == (0, "")
    document = again.json
    assert (document["ok"], document["copied"], document["skipped"]) == (True, 0, len(FILES))
    assert (document["deleted"], document["bytes"], document["failures"]) == (1, 0, [])
    assert read_tree(target) == FILES


def test_processes_share_the_work(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("mirror", uri, tmp_path / "copy", "--processes", "2", "--json")
    assert (result.status, result.json["copied"], result.json["bytes"]) == (0, len(FILES), SIZE)
    assert read_tree(tmp_path / "copy") == FILES


def test_a_dry_run_writes_nothing(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("mirror", uri, tmp_path / "copy", "--dry-run", "--ignore", "*.bin")
    assert result.status == 0
    assert f"would have copied {len(FILES) - 1} objects" in result.err
    assert not (tmp_path / "copy").exists()


def test_what_fails_is_told_by_status_and_document(
    command: Command, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_bytes(b"mine")
    result = command("mirror", uri, tmp_path / "copy", "--no-overwrite", "--json")
    assert result.status == 1
    assert result.json_error["type"] == "MirrorError"
    (failure,) = json.loads(result.out)["failures"]
    assert (failure["path"], failure["error"]) == ("config.json", "ObjectExistsError")
    assert read_tree(tmp_path / "copy") == FILES | {"config.json": b"mine"}
    plain = command("mirror", uri, tmp_path / "copy", "--no-overwrite")
    assert plain.status == 1
    assert "config.json" in plain.error


def test_misuse_is_one_line(command: Command, uri: str, tmp_path: Path) -> None:
    for options in (("--processes", "0"), ("--processes", "many"), ("--digest", "x")):
        result = command("mirror", uri, tmp_path / "copy", *options)
        assert result.status == 2
        assert options[0] in result.error
