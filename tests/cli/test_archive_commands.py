"""``storage archive``: folders become archives, and archives folders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.cli.conftest import FILES, Command, write_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", FILES)


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_archive_is_made_and_extracted(command: Command, tree: Path, tmp_path: Path) -> None:
    made = command("archive", "create", tree, tmp_path / "m.tar.zst")
    assert (made.status, made.err) == (0, "")
    lines = dict(line.split(": ", 1) for line in made.lines)
    data = (tmp_path / "m.tar.zst").read_bytes()
    assert lines["path"] == str(tmp_path / "m.tar.zst")
    assert lines["archive_hash"] == hashlib.md5(data).hexdigest()
    result = command("archive", "extract", tmp_path / "m.tar.zst", tmp_path / "out")
    assert (result.status, result.lines) == (0, [str(tmp_path / "out")])
    assert found(tmp_path / "out") == FILES


def test_json_and_quiet_tell_the_same(command: Command, tree: Path, tmp_path: Path) -> None:
    document = command("archive", "create", tree, "--json", "--level", "3", cwd=tmp_path).json
    assert document["path"] == str(tmp_path / "tree.tar.zst")
    assert document["size"] == (tmp_path / "tree.tar.zst").stat().st_size
    assert document["files"] == len(FILES)
    assert document["content_size"] == sum(map(len, FILES.values()))
    content = b"".join(FILES[name] for name in sorted(FILES))
    assert document["content_sha256"] == hashlib.sha256(content).hexdigest()
    quiet = command("archive", "create", tree, "--quiet", cwd=tmp_path)
    assert quiet.lines == [str(tmp_path / "tree.tar.zst")]
    out = command("archive", "extract", "tree.tar.zst", "out", "--json", cwd=tmp_path)
    assert out.json == {"path": str(tmp_path / "out")}


def test_the_archive_may_be_in_a_store(command: Command, tree: Path, tmp_path: Path) -> None:
    command("archive", "create", tree, tmp_path / "m.tar.zst")
    uri = (tmp_path / "m.tar.zst").as_uri()
    result = command("archive", "extract", uri, tmp_path / "out", "--quiet")
    assert (result.status, result.lines) == (0, [str(tmp_path / "out")])
    assert found(tmp_path / "out") == FILES


def test_a_failure_is_one_line_and_leaves_nothing(
    command: Command, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.zip").write_bytes(b"PK\3\4 and no more")
    result = command("archive", "extract", tmp_path / "m.zip", tmp_path / "out")
    assert result.status == 1
    assert result.error.startswith("m.zip cannot be unpacked")
    missing = command("archive", "create", tmp_path / "none", "--json", cwd=tmp_path)
    assert missing.status == 1
    assert missing.json_error["type"] == "InvalidInput"
    assert sorted(os.listdir(tmp_path)) == ["m.zip", "tree"]


def test_a_folder_with_files_is_not_replaced_unasked(
    command: Command, tree: Path, tmp_path: Path
) -> None:
    command("archive", "create", tree, tmp_path / "m.tar.zst")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"mine")
    arguments = ("archive", "extract", tmp_path / "m.tar.zst", tmp_path / "out")
    assert command(*arguments).status == 1
    assert found(tmp_path / "out") == {"mine": b"mine"}
    assert command(*arguments, "--overwrite").status == 0
    assert found(tmp_path / "out") == FILES


def test_limits_are_options(command: Command, tree: Path, tmp_path: Path) -> None:
    command("archive", "create", tree, tmp_path / "m.tar.zst")
    arguments = ("archive", "extract", tmp_path / "m.tar.zst", tmp_path / "out")
    assert "more than 1000 bytes" in command(*arguments, "--max-size", "1000").error
    assert "more than 2 entries" in command(*arguments, "--max-entries", "2").error
    assert not (tmp_path / "out").exists()
    assert command(*arguments, "--max-ratio", "1000", "--max-size", "1GB").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("create",),
        ("create", "s3://bucket/tree"),
        ("create", "tree", "--level", "23"),
        ("extract", "m.zip"),
        ("extract", "m.zip", "s3://bucket/out"),
        ("extract", "s3://bucket/m.zip", "out", "--max-size", "1GB"),
        ("extract", "m.zip", "out", "--max-ratio", "0"),
        ("extract", "m.zip", "out", "--config", "name"),
    ],
)
def test_misuse_is_told(command: Command, arguments: tuple[str, ...]) -> None:
    result = command("archive", *arguments)
    assert result.status == 2
    assert "archive" in result.error
