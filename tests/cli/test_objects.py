from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.cli.conftest import FILES, Command, read_tree, write_tree

_SIZE = sum(map(len, FILES.values()))


def test_a_folder_is_uploaded(command: Command, stored: Path, tmp_path: Path) -> None:
    result = command("upload", stored, f"file://{tmp_path}/up/v1")
    assert (result.status, result.out) == (0, b"")
    assert read_tree(tmp_path / "up" / "v1") == FILES


def test_upload_reports_as_json(command: Command, stored: Path) -> None:
    result = command("upload", "--json", stored / "weights.bin", "memory://models/iris/w")
    document = result.json
    assert (result.status, result.err) == (0, "")
    assert document.pop("seconds") >= 0
    assert document == {
        "ok": True,
        "source": str(stored / "weights.bin"),
        "uri": "memory://models/iris/w",
        "size": len(FILES["weights.bin"]),
        "objects": 1,
        "moved": len(FILES["weights.bin"]),
    }


def test_upload_with_patterns_leaves_the_rest_out(
    command: Command, stored: Path, tmp_path: Path
) -> None:
    assert command("upload", stored, tmp_path / "up", "--ignore", "*.bin").status == 0
    assert set(read_tree(tmp_path / "up")) == FILES.keys() - {"weights.bin"}


def test_upload_can_refuse_to_overwrite(command: Command, uri: str, tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text("{}")
    result = command("upload", tmp_path / "new.json", f"{uri}/config.json", "--no-overwrite")
    assert result.status == 1
    assert "config.json" in result.error
    assert command("cat", f"{uri}/config.json").out == FILES["config.json"]


def test_upload_of_nothing_fails(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("upload", tmp_path / "absent", uri, "--json")
    assert result.status == 1
    assert result.json_error["type"] == "InvalidInput"


def test_ls_lists_relative_paths_and_no_sibling(command: Command, uri: str) -> None:
    result = command("ls", uri)
    assert (result.status, result.lines, result.err) == (0, sorted(FILES), "")


def test_ls_long_has_sizes_and_times(command: Command, uri: str) -> None:
    rows = [line.split() for line in command("ls", "-l", uri).lines]
    assert [(int(size), path) for size, _, path in rows] == [
        (len(data), name) for name, data in sorted(FILES.items())
    ]
    for _, when, _ in rows:
        assert when.endswith("Z")
        assert datetime.fromisoformat(when).tzinfo is UTC


def test_ls_as_json(command: Command, uri: str, stored: Path) -> None:
    result = command("ls", uri, "--json")
    assert result.err == ""
    assert [entry["path"] for entry in result.json] == sorted(FILES)
    first = result.json[0]
    assert set(first) == {"path", "size", "modified_time", "etag"}
    assert first["size"] == len(FILES["config.json"])
    modified = datetime.fromisoformat(first["modified_time"])
    expected = datetime.fromtimestamp((stored / "config.json").stat().st_mtime, UTC)
    assert abs((modified - expected).total_seconds()) < 1


def test_ls_of_an_object_gives_its_name(command: Command, uri: str) -> None:
    assert command("ls", f"{uri}/config.json").lines == ["config.json"]


def test_ls_filters(command: Command, uri: str) -> None:
    assert command("ls", uri, "--allow", "*.txt").lines == ["empty.txt", "tokenizer/merges.txt"]
    result = command("ls", uri, "--allow", "*.onnx", "--json")
    assert result.status == 1
    assert result.json_error["type"] == "ModelMissingError"


def test_names_are_given_back_byte_by_byte(command: Command, tmp_path: Path) -> None:
    name = "é [1] #%41+ ümlaut"
    write_tree(tmp_path / "odd", {name: b"x"})
    assert command("ls", tmp_path / "odd").lines == [name]
    assert command("ls", tmp_path / "odd", "--json").json[0]["path"] == name
    assert command("cat", tmp_path / "odd" / name).out == b"x"


def test_stat_describes_an_object(command: Command, uri: str) -> None:
    document = command("stat", f"{uri}/weights.bin", "--json").json
    assert (document["type"], document["size"]) == ("object", len(FILES["weights.bin"]))
    assert datetime.fromisoformat(document["modified_time"]).tzinfo is not None
    lines = command("stat", f"{uri}/weights.bin").lines
    assert f"size: {document['size']}" in lines
    assert f"modified_time: {document['modified_time']}" in lines
    assert f"etag: {document['etag']}" in lines


def test_stat_describes_a_tree(command: Command, uri: str) -> None:
    document = command("stat", uri, "--json").json
    assert (document["type"], document["size"]) == ("tree", _SIZE)
    assert document["objects"] == len(FILES)
    assert "objects: 4" in command("stat", uri).lines


def test_cp_copies_a_tree_between_stores(command: Command, uri: str, tmp_path: Path) -> None:
    result = command("cp", uri, tmp_path / "copy")
    assert (result.status, result.out) == (0, b"")
    assert read_tree(tmp_path / "copy") == FILES
    document = command("cp", uri, "memory://copies/iris", "--json").json
    assert document["ok"] is True
    assert document["uri"] == "memory://copies/iris"
    assert (document["objects"], document["size"], document["moved"]) == (4, _SIZE, _SIZE)


def test_rm_deletes_an_object(command: Command, uri: str, stored: Path) -> None:
    assert command("rm", f"{uri}/config.json").out == b""
    assert set(read_tree(stored)) == FILES.keys() - {"config.json"}
    again = command("rm", f"{uri}/config.json", "--json")
    assert again.status == 1
    assert again.json_error["type"] == "ModelMissingError"


def test_rm_deletes_a_tree_only_if_told_so(command: Command, uri: str, stored: Path) -> None:
    refused = command("rm", uri)
    assert refused.status == 1
    assert "-r" in refused.error
    assert read_tree(stored) == FILES
    result = command("rm", "-r", uri, "--json")
    assert (result.status, result.json) == (0, {"ok": True, "uri": str(stored)})
    assert read_tree(stored.parent) == {"iris-v2/other.bin": b"another model"}


def test_spec_shows_what_a_uri_says_without_its_secrets(command: Command) -> None:
    uri = "https://user:PASSWORD@host.example/models/iris.bin?X-Amz-Signature=SECRET"
    plain, document = command("spec", uri), command("spec", uri, "--json")
    assert "host: host.example" in plain.lines
    assert document.json["type"] == "http"
    for result in (plain, document):
        assert b"PASSWORD" not in result.out
        assert b"SECRET" not in result.out


def test_cat_writes_the_bytes(command: Command, uri: str) -> None:
    result = command("cat", f"{uri}/weights.bin")
    assert (result.status, result.out, result.err) == (0, FILES["weights.bin"], "")
    assert command("cat", f"{uri}/empty.txt").out == b""


def test_cat_of_a_tree_fails(command: Command, uri: str) -> None:
    assert command("cat", f"{uri}/").error
    missing = command("cat", uri, "--json")
    assert (missing.status, missing.out) == (1, b"")
    assert missing.json_error["type"] == "ModelMissingError"


@pytest.mark.parametrize("data", [b"", b"short", bytes(5 * 1024 * 1024 // 2)])
def test_cat_never_gives_all_bytes_of_a_wrong_object(
    command: Command, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "object"
    path.write_bytes(data)
    right = command("cat", f"{path}#sha256={hashlib.sha256(data).hexdigest()}")
    assert (right.status, right.out) == (0, data)
    wrong = command("cat", f"{path}#sha256={'0' * 64}")
    assert wrong.status == 1
    assert "0" * 64 in wrong.error
    assert len(wrong.out) < max(1, len(data))


def test_cat_streams_and_a_reader_that_leaves_is_no_error(command: Command, tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(4 * 1024**3)
    process = command.start("cat", tmp_path / "big")
    assert process.stdout is not None
    assert process.stdout.read(1000) == bytes(1000)
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 200 * 1024
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("options", [(), ("--json",), ("--help",)])
def test_results_without_a_reader_are_no_error(
    command: Command, uri: str, options: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    # Before the command begins, which may be done before this process is heard of again.
    os.close(reading)
    process = command.start("ls", uri, *options, stdout=writing)
    os.close(writing)
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_output_that_cannot_be_written_is_an_error(command: Command, uri: str) -> None:
    with open("/dev/full", "wb") as full:
        result = command("ls", uri, stdout=full)
    assert result.status == 1
    assert "standard output cannot be written" in result.error


def _pvc_config(folder: Path, root: Path) -> Path:
    path = folder / f"{root.name}.toml"
    path.write_text(f'type = "pvc"\nmount_root = "{root}"\n')
    return path


def test_a_config_comes_from_a_file_and_by_name(
    command: Command, stored: Path, tmp_path: Path
) -> None:
    file = _pvc_config(tmp_path, stored.parents[1])
    assert command("ls", "pvc://models/iris", "--config", file).lines == sorted(FILES)
    settings = tmp_path / "settings.toml"
    settings.write_text(f"[stores.team]\n{file.read_text()}")
    environment = {"STORAGE_SETTINGS_FILE": str(settings)}
    named = command("ls", "pvc://models/iris", "--config", "team", env=environment)
    assert named.lines == sorted(FILES)


def test_both_ends_of_a_copy_have_a_config(command: Command, stored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "models").mkdir(parents=True)
    result = command(
        "cp",
        *("pvc://models/iris", "pvc://models/copy"),
        *("--config", _pvc_config(tmp_path, stored.parents[1])),
        *("--dest-config", _pvc_config(tmp_path, other)),
    )
    assert result.status == 0, result.err
    assert read_tree(other / "models" / "copy") == FILES


def test_a_name_that_no_config_has_fails(command: Command) -> None:
    result = command("ls", "pvc://models/iris", "--config", "nobody", "--json")
    assert result.status == 1
    assert result.json_error["type"] == "ConfigurationError"


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_end_the_command_with_one_line(
    command: Command, tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    with open(tmp_path / "big", "wb") as file:
        file.truncate(4 * 1024**3)
    process: subprocess.Popen[bytes] = command.start("cat", tmp_path / "big")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.send_signal(number)
    assert process.stderr.read().decode() == f"storage: error: {word}\n"
    assert process.wait(60) == status
