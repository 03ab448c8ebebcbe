"""`storage cache …`, `storage lock`, `storage prefetch`, and `storage download` with them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.cache.support import blob_files, flip_byte
from tests.cli.conftest import FILES, Command, read_tree, write_tree

SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def remote(stored: Path) -> str:
    """The model by the generic driver's name for local files: a store like any remote one."""
    return f"local://{stored}"


@pytest.fixture
def cached(command: Command, remote: str) -> Path:
    """Where the model is in the cache."""
    result = command("download", remote, "--quiet")
    assert result.status == 0
    return Path(result.lines[0])


@pytest.fixture
def root() -> Path:
    return Path(os.environ["STORAGE_CACHE_DIR"])


def largest(root: Path) -> Path:
    return max(blob_files(root), key=lambda path: path.stat().st_size)


# -- looking -------------------------------------------------------------------------------


def test_an_empty_cache_is_in_order(command: Command, root: Path) -> None:
    assert command("cache", "ls").out == b""
    assert command("cache", "ls", "--json").json == []
    assert command("cache", "du", "--json").json["total_bytes"] == 0
    assert command("cache", "verify").status == 0
    assert command("cache", "repair", "--json").json == []
    assert command("cache", "gc").status == 0
    assert not root.exists()


def test_ls_tells_what_is_cached(command: Command, remote: str, cached: Path) -> None:
    command("download", remote, "--quiet", "--allow", "*.json")
    result = command("cache", "ls")
    assert (result.status, result.err) == (0, "")
    rows = [line.split() for line in result.lines]
    assert [(row[0], row[1], row[3], row[4:]) for row in rows if len(row) == 5] == [
        (str(SIZE), str(len(FILES)), "-", [remote])
    ]
    assert [row[4:] for row in rows if len(row) > 5] == [[remote, "--allow", "*.json"]]
    first = next(each for each in command("cache", "ls", "--json").json if each["allow"] is None)
    assert first["uri"] == remote
    assert (first["path"], first["size"], first["files"]) == (str(cached), SIZE, len(FILES))
    assert (first["complete"], first["pinned"], first["leased"]) == (True, False, False)


def test_ls_of_a_uri_tells_what_is_there_and_below(
    command: Command, remote: str, cached: Path
) -> None:
    parent = remote.rpartition("/")[0]
    assert len(command("cache", "ls", remote).lines) == 1
    assert len(command("cache", "ls", parent).lines) == 1
    longer = command("cache", "ls", remote[:-1])
    assert (longer.status, longer.out) == (1, b"")
    assert "is not in the cache" in longer.error


def test_du_adds_up(command: Command, cached: Path, root: Path) -> None:
    document = command("cache", "du", "--json").json
    assert document["root"] == str(root)
    assert (document["models"], document["blobs"]) == (1, len(FILES))
    assert document["blob_bytes"] == SIZE
    assert document["total_bytes"] >= SIZE + document["other_bytes"] > SIZE
    assert command("cache", "du").lines[0].endswith(f"{root}: 1 model")


def test_path_prints_where_a_model_is_and_asks_nobody(
    command: Command, remote: str, cached: Path, stored: Path
) -> None:
    stored.rename(stored.with_name("gone"))
    assert command("cache", "path", remote).lines == [str(cached)]
    assert command("cache", "path", remote, "--json").json == {"uri": remote, "path": str(cached)}
    for arguments in ([f"{remote}-v"], [remote, "--allow", "*.json"]):
        result = command("cache", "path", *arguments, "--json")
        assert (result.status, result.out) == (1, b"")
        assert result.json_error["type"] == "OfflineError"


# -- right or wrong --------------------------------------------------------------------------


def test_damage_is_found_and_repaired(
    command: Command, remote: str, cached: Path, root: Path
) -> None:
    assert command("cache", "verify", "--full").status == 0
    blob = largest(root)
    flip_byte(blob, 99, keep_times=True)
    assert command("cache", "verify").status == 0
    result = command("cache", "verify", "--full", "--json")
    assert result.status == 1
    assert (result.json["ok"], result.json["checked"]) == (False, len(FILES))
    (problem,) = result.json["problems"]
    assert (problem["kind"], problem["path"], problem["uris"]) == ("blob", str(blob), [remote])
    assert Path(problem["quarantined_to"]).exists()
    assert result.json_error["type"] == "IntegrityError"
    again = command("cache", "verify", "--quiet")
    assert again.status == 1
    assert again.lines[0].startswith("missing: ")
    assert "storage cache repair" in again.error
    repaired = command("cache", "repair", "--json")
    assert repaired.status == 0
    assert [(each["uri"], each["outcome"]) for each in repaired.json] == [(remote, "repaired")]
    assert read_tree(cached) == FILES
    assert command("cache", "verify", "--full").status == 0


def test_what_cannot_be_repaired_is_an_error(
    command: Command, remote: str, cached: Path, stored: Path, root: Path
) -> None:
    largest(root).unlink()
    stored.rename(stored.with_name("gone"))
    result = command("cache", "repair", "--quiet")
    assert result.status == 1
    assert result.lines[0].startswith(f"failed: {remote}: ")
    assert remote in result.error
    assert "storage cache rm" in result.error


# -- what stays and what goes ----------------------------------------------------------------


def test_pins_keep_a_model_and_gc_evicts_to_a_size(
    command: Command, remote: str, cached: Path, root: Path
) -> None:
    assert command("cache", "pin", remote, "--json").json["changed"] is True
    assert command("cache", "pin", remote, "--json").json["changed"] is False
    assert "pinned" in command("cache", "ls").lines[0]
    kept = command("cache", "gc", "--size", "1kB", "--grace", "0", "--json")
    assert (kept.status, kept.json["left"]) == (1, SIZE)
    assert "pinned" in kept.json_error["message"]
    assert command("cache", "unpin", remote).status == 0
    assert command("cache", "unpin", remote, "--json").json["changed"] is False
    dry = command("cache", "gc", "--size", "1kB", "--grace", "0", "--dry-run", "--json").json
    assert dry == {"bytes": SIZE, "uris": [remote]}
    assert command("cache", "gc", "--size", "1kB", "--dry-run").out == b""
    # It was just used.
    assert command("cache", "gc", "--size", "1kB", "--quiet").status == 1
    gone = command("cache", "gc", "--size", "1kB", "--grace", "0", "--json")
    assert gone.status == 0
    assert (gone.json["left"], gone.json["removed"]["models"]) == (0, 1)
    assert gone.json["bytes"] >= SIZE
    assert blob_files(root) == []


def test_rm_removes_one_model(command: Command, remote: str, cached: Path, root: Path) -> None:
    other = f"{remote}-v2"
    command("download", other)
    assert command("cache", "rm", remote, "--json").json["models"] == 1
    assert [each["uri"] for each in command("cache", "ls", "--json").json] == [other]
    missing = command("cache", "rm", remote, "--json")
    assert (missing.status, missing.json_error["type"]) == (1, "ModelMissingError")
    assert command("cache", "pin", remote).status == 1


# -- for a machine without a network ---------------------------------------------------------


def test_a_parcel_goes_to_another_machine(
    command: Command, remote: str, cached: Path, stored: Path, tmp_path: Path
) -> None:
    parcel = tmp_path / "models.tar"
    parcel.write_bytes(b"what was there before")
    exported = command("cache", "export", parcel, remote, "--json")
    assert exported.json == {
        "file": str(parcel),
        "uris": [remote],
        "blobs": len(FILES),
        "size": SIZE,
    }
    assert tarfile.is_tarfile(parcel)
    stored.rename(stored.with_name("gone"))
    there = {"STORAGE_CACHE_DIR": str(tmp_path / "there"), "STORAGE_OFFLINE": "1"}
    imported = command("cache", "import", parcel, env=there)
    assert (imported.status, imported.lines) == (0, [remote])
    assert f"{len(FILES)} of {len(FILES)} blobs are new" in imported.err
    path = command("download", remote, env=there).lines[0]
    assert Path(path).is_relative_to(tmp_path / "there")
    assert read_tree(Path(path)) == FILES
    assert command("cache", "verify", "--full", env=there).status == 0


def test_a_parcel_goes_through_a_pipe(
    command: Command, remote: str, cached: Path, tmp_path: Path
) -> None:
    source = command.start("cache", "export", "-")
    there = {"STORAGE_CACHE_DIR": str(tmp_path / "there")}
    result = command("cache", "import", "-", "--json", env=there, stdin=source.stdout)
    assert (result.status, result.json["new"]) == (0, len(FILES))
    assert source.wait(60) == 0


@pytest.mark.parametrize("damage", ["cached", "missing"])
def test_an_export_that_fails_leaves_no_file(
    command: Command, remote: str, cached: Path, root: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.tar").write_bytes(b"old")
    if damage == "cached":
        flip_byte(largest(root), keep_times=True)
        result = command("cache", "export", out / "old.tar", "--json")
        assert result.json_error["type"] == "IntegrityError"
    else:
        result = command("cache", "export", out / "old.tar", f"{remote}-v", "--json")
        assert result.json_error["type"] == "ModelMissingError"
    assert (result.status, result.out) == (1, b"")
    assert read_tree(out) == {"old.tar": b"old"}


@pytest.mark.parametrize("name", ["cut.tar", "absent.tar", "."])
def test_an_import_that_fails_gives_nothing(
    command: Command, remote: str, cached: Path, tmp_path: Path, name: str
) -> None:
    command("cache", "export", tmp_path / "models.tar")
    data = (tmp_path / "models.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    there = {"STORAGE_CACHE_DIR": str(tmp_path / "there")}
    result = command("cache", "import", tmp_path / name, env=there)
    assert (result.status, result.out) == (1, b"")
    assert result.error
    assert command("cache", "ls", env=there).out == b""


# -- locks and lists -------------------------------------------------------------------------


def test_what_was_locked_is_downloaded_or_nothing(
    command: Command, remote: str, stored: Path, tmp_path: Path
) -> None:
    locked = command("lock", remote, f"{remote}-v2", "--quiet")
    assert locked.status == 0
    lock = tmp_path / "models.lock"
    lock.write_bytes(locked.out)
    assert [model["uri"] for model in json.loads(locked.out)["models"]] == [remote, f"{remote}-v2"]
    everything = command("download", "--locked", lock)
    assert [read_tree(Path(path)) for path in everything.lines] == [
        FILES,
        {"other.bin": b"another model"},
    ]
    assert command("download", "--locked", lock, remote, tmp_path / "out").status == 0
    assert read_tree(tmp_path / "out") == FILES
    (stored / "config.json").write_bytes(b"tampered")
    # What was locked is cached here.
    assert command("download", "--locked", lock, remote, tmp_path / "out").status == 0
    there = {"STORAGE_CACHE_DIR": str(tmp_path / "there")}
    arguments = ("download", "--locked", lock, remote, tmp_path / "bad", "--json")
    refused = command(*arguments, env=there)
    assert (refused.status, refused.json_error["type"]) == (1, "IntegrityError")
    assert "config.json" in refused.json_error["message"]
    assert not (tmp_path / "bad").exists()
    document = command("download", "--locked", lock, f"{remote}-v2", "--json").json
    assert document["uri"] == f"{remote}-v2"
    assert command("download", "--locked", lock, f"{remote}-v3").status == 1


def test_all_of_a_lock_as_json(command: Command, remote: str, tmp_path: Path) -> None:
    lock = tmp_path / "models.lock"
    lock.write_bytes(command("lock", remote, "--allow", "*.json").out)
    document = command("download", "--locked", lock, "--json").json
    assert [model["uri"] for model in document["models"]] == [remote]
    assert set(read_tree(Path(document["models"][0]["path"]))) == {"config.json"}


def test_prefetch_fills_the_cache_and_pins(
    command: Command, remote: str, stored: Path, tmp_path: Path
) -> None:
    names = tmp_path / "models.txt"
    names.write_text(f"# ours\n{remote}\n\n{remote}-v2\n")
    result = command("prefetch", names, "--pin", "--quiet")
    assert (result.status, result.err, len(result.lines)) == (0, "", 2)
    assert all(each["pinned"] for each in command("cache", "ls", "--json").json)
    stored.rename(stored.with_name("gone"))
    assert command("download", remote, "--offline").lines == result.lines[:1]
    names.write_text(f"{remote}\n{remote}-v2\n")
    failed = command("prefetch", names, "--json")
    assert failed.status == 1
    assert [model["path"] is None for model in failed.json["models"]] == [True, False]
    assert remote in failed.json_error["message"]


# -- downloads -------------------------------------------------------------------------------


def test_a_mirror_is_asked_if_the_first_source_fails(
    command: Command, remote: str, tmp_path: Path
) -> None:
    arguments = ("download", f"{remote}-gone", "--mirror", remote, tmp_path / "out", "--quiet")
    assert command(*arguments).status == 0
    assert read_tree(tmp_path / "out") == FILES
    failed = command("download", f"{remote}-gone", "--mirror", f"{remote}-v3", "--quiet")
    assert failed.status == 1
    assert f"{remote}-gone" in failed.error
    assert f"{remote}-v3" in failed.error


def test_cache_first_does_not_ask_the_store(
    command: Command, remote: str, cached: Path, stored: Path
) -> None:
    (stored / "config.json").write_bytes(b"new")
    for policy, expected in (
        ("cache-first", FILES["config.json"]),
        ("max-age=3600", FILES["config.json"]),
        ("revalidate", b"new"),
    ):
        path = Path(command("download", remote, "--freshness", policy).lines[0])
        assert (path / "config.json").read_bytes() == expected


def test_a_copy_is_kept_beside_a_destination_if_asked(
    command: Command, remote: str, root: Path, tmp_path: Path
) -> None:
    assert command("download", remote, tmp_path / "a").status == 0
    assert blob_files(root) == []
    assert command("download", remote, tmp_path / "b", "--cache").status == 0
    assert len(blob_files(root)) == len(FILES)
    assert read_tree(tmp_path / "b") == FILES


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_cached_files_are_linked_if_asked(
    command: Command, remote: str, cached: Path, root: Path, tmp_path: Path, link: str
) -> None:
    result = command("download", remote, tmp_path / "out", "--link", link, "--offline")
    assert result.status == 0
    weights = tmp_path / "out" / "weights.bin"
    assert weights.samefile(largest(root))
    assert weights.is_symlink() == (link == "symlink")


# -- misuse ----------------------------------------------------------------------------------


def test_a_parcel_and_json_do_not_share_standard_output(command: Command) -> None:
    result = command("cache", "export", "-", "--json")
    assert (result.status, result.out) == (2, b"")
    assert result.json_error["type"] == "InvalidInput"


def test_help_of_the_cache_names_its_commands(command: Command) -> None:
    text = command("cache", "--help").out.decode()
    for name in ("ls", "du", "path", "verify", "repair", "gc", "pin", "unpin", "export", "import"):
        assert f"    {name} " in text
    assert "--full" in command("cache", "repair", "--help").out.decode()


def test_options_stand_between_the_operands(command: Command, cached: Path, tmp_path: Path) -> None:
    parcel = tmp_path / "models.tar"
    assert command("cache", "export", parcel, "--quiet").lines == [str(parcel)]
    assert hashlib.sha256(parcel.read_bytes()).hexdigest()


def test_a_hit_without_a_store_loads_nothing_of_the_other_commands(
    command: Command, remote: str, cached: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, storage.cli as cli\n"
        f"assert cli.main(['download', {remote!r}, '--offline', '--quiet']) == 0\n"
        "heavy = {'filelock', 'fsspec', 'obstore', 'pydantic', 'requests', 'rich', 'tarfile',\n"
        "    'concurrent.futures', 'storage.cache.verify', 'storage.cache.parcel',\n"
        "    'storage.cache.evict', 'storage.cache.gc', 'storage.cli.cache_commands',\n"
        "    'storage.client.repair', 'storage.client.lockfile', 'storage.client.prefetch'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    assert command.python(script) == 0


def test_a_reader_that_goes_away_ends_an_export(command: Command, cached: Path, root: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = command.start("cache", "export", "-", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.wait(60) == 141


def test_a_secret_of_a_uri_is_not_shown(command: Command, tmp_path: Path) -> None:
    uri = "https://user:PASSWORD@host.example/x?sig=SECRET"
    for arguments in (["path", uri], ["rm", uri], ["pin", uri], ["export", tmp_path / "f", uri]):
        result = command("cache", *arguments)
        assert result.status == 1
        assert "PASSWORD" not in result.err
        assert "SECRET" not in result.err


def test_a_model_of_one_file_is_exported_too(command: Command, remote: str, tmp_path: Path) -> None:
    write_tree(tmp_path, {"store/models/single.bin": b"one"})
    uri = f"local://{tmp_path}/store/models/single.bin"
    path = Path(command("download", uri).lines[0])
    assert (path.name, path.read_bytes()) == ("single.bin", b"one")
    assert command("cache", "export", tmp_path / "models.tar").status == 0
    there = {"STORAGE_CACHE_DIR": str(tmp_path / "there")}
    assert command("cache", "import", tmp_path / "models.tar", env=there).status == 0
    path = Path(command("cache", "path", uri, env=there).lines[0])
    assert (path.name, path.read_bytes()) == ("single.bin", b"one")
