from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from storage import tree_digest
from storage.digest import hash_file
from tests.cli.conftest import FILES, Command, read_tree


def _tree_digest(folder: Path) -> str:
    return str(
        tree_digest({name: hash_file(folder / name, ["sha256"])["sha256"] for name in FILES})
    )


def test_a_tree_is_downloaded_and_its_path_is_the_only_line_of_stdout(
    command: Command, uri: str, tmp_path: Path
) -> None:
    result = command("download", uri, tmp_path / "out")
    assert (result.status, result.lines) == (0, [str(tmp_path / "out")])
    assert read_tree(tmp_path / "out") == FILES


def test_json_tells_what_was_downloaded_and_nothing_is_on_stderr(
    command: Command, uri: str, stored: Path, tmp_path: Path
) -> None:
    # The option stands between the operands on purpose.
    result = command("download", uri, "--json", tmp_path / "out")
    document = result.json
    assert (result.status, result.err) == (0, "")
    assert document.pop("seconds") >= 0
    size = sum(map(len, FILES.values()))
    assert document == {
        "uri": str(stored),
        "path": str(tmp_path / "out"),
        "size": size,
        "objects": len(FILES),
        "moved": size,
    }


def test_an_object_goes_into_an_existing_folder(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("download", f"{uri}/weights.bin", tmp_path)
    assert result.lines == [str(tmp_path / "weights.bin")]
    assert (tmp_path / "weights.bin").read_bytes() == FILES["weights.bin"]


def test_a_relative_dest_that_begins_with_a_dash_follows_two_dashes(
    command: Command, uri: str, tmp_path: Path
) -> None:
    result = command("download", "--quiet", "--", uri, "-out", cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert read_tree(tmp_path / "-out") == FILES


def test_a_local_source_without_dest_stays_where_it_is(
    command: Command, uri: str, stored: Path
) -> None:
    plain = command("download", uri)
    assert plain.lines == [str(stored)]
    document = command("download", uri, "--json").json
    assert document["path"] == str(stored)
    assert (document["size"], document["objects"], document["moved"]) == (None, None, 0)


def test_patterns_choose_and_repeat(command: Command, uri: str, tmp_path: Path) -> None:
    result = command(
        "download", uri, tmp_path / "out", "--allow=*.txt", "--allow", "*.json", "--ignore", "tok*"
    )
    assert result.status == 0
    assert set(read_tree(tmp_path / "out")) == {"config.json", "empty.txt"}


def test_patterns_that_match_nothing_fail(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("download", uri, tmp_path / "out", "--allow", "*.onnx")
    assert result.status == 1
    assert "*.onnx" in result.error
    assert not (tmp_path / "out").exists()


def test_the_expected_digest_of_a_tree_is_checked(
    command: Command, uri: str, stored: Path, tmp_path: Path
) -> None:
    digest = _tree_digest(stored)
    assert command("download", uri, tmp_path / "good", "--digest", digest).status == 0
    (stored / "config.json").write_bytes(b"{}")
    result = command("download", uri, tmp_path / "bad", "--digest", digest, "--json")
    assert (result.status, result.out) == (1, b"")
    assert result.json_error["type"] == "IntegrityError"
    assert digest in result.json_error["message"]
    assert not (tmp_path / "bad").exists()


def test_a_digest_in_the_uri_is_checked(command: Command, uri: str, tmp_path: Path) -> None:
    wrong = hashlib.sha256(b"something else").hexdigest()
    result = command("download", f"{uri}/config.json#sha256={wrong}", tmp_path / "out")
    assert result.status == 1
    assert wrong in result.error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_plan_and_fetches_nothing(
    command: Command, uri: str, tmp_path: Path
) -> None:
    result = command("download", uri, tmp_path / "out", "--dry-run", "--ignore", "*.bin")
    assert result.status == 0
    assert [(line.split()[0], line.split()[-1]) for line in result.lines] == [
        (str(len(data)), name) for name, data in sorted(FILES.items()) if name != "weights.bin"
    ]
    assert result.err.startswith("would download 3 objects, ")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_gives_the_plan_as_json(command: Command, uri: str, stored: Path) -> None:
    result = command("download", f"{uri}/config.json", "--dry-run", "--json")
    document = result.json
    assert result.err == ""
    assert document["uri"] == f"{stored}/config.json"
    assert (document["type"], document["objects"]) == ("object", 1)
    assert document["size"] == document["files"][0]["size"] == len(FILES["config.json"])


def test_an_archive_is_unpacked(command: Command, stored: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "iris.tar.gz", "w:gz") as archive:
        for name in FILES:
            archive.add(stored / name, name)
    result = command("download", f"file://{tmp_path}/iris.tar.gz", tmp_path / "out", "--unpack")
    assert result.lines == [str(tmp_path / "out")]
    assert read_tree(tmp_path / "out") == FILES


def test_a_foreign_folder_is_replaced_only_with_overwrite(
    command: Command, uri: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused = command("download", uri, out, "--json")
    assert refused.status == 1
    assert refused.json_error["type"] == "ObjectExistsError"
    assert read_tree(out) == {"mine.txt": b"precious"}
    assert command("download", uri, out, "--overwrite").status == 0
    assert read_tree(out) == FILES


def test_offline_gives_what_was_cached_before_and_only_that(command: Command, stored: Path) -> None:
    # The generic driver's name for local files: to the command a store like any remote one.
    remote = f"local://{stored}"
    never = command("download", remote, "--offline", "--json")
    assert never.status == 1
    assert never.json_error["type"] == "OfflineError"
    online = command("download", remote)
    assert online.status == 0
    assert read_tree(Path(online.lines[0])) == FILES
    stored.rename(stored.with_name("gone"))
    assert command("download", remote).status == 1
    offline = command("download", remote, "--offline")
    assert (offline.status, offline.lines) == (0, online.lines)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_nothing_is_left_by_a_download_of_nothing(
    command: Command, uri: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = command("download", f"{uri}-v", tmp_path / "deep" / "out", *options)
    assert (result.status, result.out) == (1, b"")
    assert not (tmp_path / "deep").exists()
