"""Archives of all kinds become folders, whole or not at all."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from storage import DestinationError, InvalidInput, ObjectExistsError
from storage.container.archives.extract import extract_archive

DATA = random.Random(1).randbytes(300_000)
FILES = {"a/model.bin": DATA, "empty": b"", "é/ß": b"text", "run": b"#!"}


def tar(files: dict[str, bytes] = FILES, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755 if name == "run" else 0o644
            made.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def small_frames(data: bytes) -> bytes:
    """As one program of the field compresses: every 1,024 bytes by themselves."""
    compressor = zstandard.ZstdCompressor(level=3)
    return b"".join(compressor.compress(data[at : at + 1024]) for at in range(0, len(data), 1024))


def skippable(data: bytes) -> bytes:
    return struct.pack("<LL", 0x184D2A53, len(data)) + data


def zip_of(method: int, files: dict[str, bytes] = FILES) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, data in files.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = method
            member.external_attr = (0o100755 if name == "run" else 0o100644) << 16
            made.writestr(member, data)
    return buffer.getvalue()


def zip64() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in FILES.items():
            with made.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    data = bytearray(buffer.getvalue())
    end = len(data) - 22
    _, _, _, _, count, size, offset, _ = struct.unpack("<4s4H2LH", data[end:])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    place = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return bytes(data[:end]) + record + place + last


GOOD: dict[str, Callable[[], bytes]] = {
    "pax": tar,
    "gnu": lambda: tar(form=tarfile.GNU_FORMAT),
    "ustar": lambda: tar(form=tarfile.USTAR_FORMAT),
    "gzip": lambda: gzip.compress(tar()),
    "gzip-members": lambda: gzip.compress(tar()[:1000]) + gzip.compress(tar()[1000:]),
    "bzip2-streams": lambda: bz2.compress(tar()[:1000]) + bz2.compress(tar()[1000:]),
    "xz-streams": lambda: lzma.compress(tar()[:1000]) + bytes(8) + lzma.compress(tar()[1000:]),
    "lzma": lambda: lzma.compress(tar(), lzma.FORMAT_ALONE),
    "zstd": lambda: zstandard.compress(tar()),
    "zstd-small-frames": lambda: small_frames(tar()),
    "zstd-skippable": lambda: (
        skippable(b"x" * 99)
        + zstandard.compress(tar()[:9])
        + skippable(b"")
        + zstandard.compress(b"")
        + zstandard.compress(tar()[9:])
        + skippable(b"end")
    ),
    "zip-stored": lambda: zip_of(zipfile.ZIP_STORED),
    "zip-deflated": lambda: zip_of(zipfile.ZIP_DEFLATED),
    "zip-bzip2": lambda: zip_of(zipfile.ZIP_BZIP2),
    "zip-lzma": lambda: zip_of(zipfile.ZIP_LZMA),
    "zip-behind-a-program": lambda: b"#!/bin/sh\n" * 100 + zip_of(zipfile.ZIP_DEFLATED),
    "zip64": zip64,
}


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", GOOD)
def test_an_archive_becomes_a_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "archive").write_bytes(GOOD[kind]())
    out = tmp_path / "new" / "out"
    assert extract_archive(tmp_path / "archive", out) == str(out)
    assert found(out) == FILES
    if kind not in ("zip64",):
        assert (out / "run").stat().st_mode & stat.S_IXUSR
    assert not (out / "empty").stat().st_mode & stat.S_IXUSR
    assert os.listdir(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("kind", ["zstd", "zstd-skippable", "bzip2-streams", "xz-streams", "zip64"])
def test_a_cut_or_lengthened_archive_is_damaged(tmp_path: Path, kind: str) -> None:
    whole = GOOD[kind]()
    cuts = {1, 4, 5, 6, 17, 18, 100, len(whole) // 2, *range(len(whole) - 40, len(whole))}
    changed = [whole[:at] for at in sorted(cuts)]
    changed += [whole + more for more in (b"x", b"\0\0\0x", b"garbage" * 9)]
    # A frame that is left out takes the end of the tar with it, or its last part may.
    accepted = [data for data in changed if not refuses(tmp_path, data) and data != whole]
    if kind == "zstd-skippable":
        # Cut right before the last frame, which holds nothing.
        accepted.remove(whole[: -len(skippable(b"end"))])
    assert [len(data) for data in accepted] == []


def refuses(folder: Path, data: bytes) -> bool:
    (folder / "archive").write_bytes(data)
    try:
        extract_archive(folder / "archive", folder / "out", overwrite=True)
    except InvalidInput:
        return True
    return False


def test_a_frame_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "m").write_bytes(compressor.compress(tar()) + compressor.flush())
    with pytest.raises(InvalidInput, match="cannot be unpacked"):
        extract_archive(tmp_path / "m", tmp_path / "out")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=posix", "--sparse-version=0.0"),
        ("--format=posix", "--sparse-version=0.1"),
        ("--format=posix", "--sparse-version=1.0"),
    ],
    ids=lambda options: options[-1],
)
@pytest.mark.parametrize("parts", [0, 1, 60])
def test_sparse_files_keep_their_holes(
    tmp_path: Path, options: tuple[str, ...], parts: int
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        for number in range(parts):
            file.seek(number * 65536 + 5)
            file.write(b"data %d" % number)
        file.truncate(5_000_001)
    (tree / "tail").write_bytes(b"what comes next")
    archive = tmp_path / "m.tar"
    subprocess.run(["tar", "-S", *options, "-cf", archive, "-C", tree, "."], check=True, timeout=60)
    assert archive.stat().st_size < 1_000_000
    extract_archive(archive, tmp_path / "out")
    assert found(tmp_path / "out") == found(tree)
    assert (tmp_path / "out" / "sparse").stat().st_blocks * 512 < 1_000_000


def test_old_tars_mark_folders_by_a_slash(tmp_path: Path) -> None:
    data = bytearray(tar({"folder/": b"", "folder/a": b"1"}))
    for at in (0, 512):
        # No magic, no type: a header as of 1979.
        data[at + 257 : at + 512] = bytes(255)
        data[at + 156] = 0
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (tmp_path / "m").write_bytes(data)
    extract_archive(tmp_path / "m", tmp_path / "out")
    assert found(tmp_path / "out") == {"folder/a": b"1"}


def test_names_that_unix_wrote_are_taken_as_they_are(tmp_path: Path) -> None:
    # As the zip command writes a name that is not UTF-8.
    data = bytearray(zip_of(zipfile.ZIP_STORED, {"abc": b"1"}))
    while b"abc" in data:
        at = data.index(b"abc")
        data[at : at + 3] = b"a\xff\xfe"
    (tmp_path / "m.zip").write_bytes(data)
    extract_archive(tmp_path / "m.zip", tmp_path / "out")
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"a\xff\xfe"]


@pytest.mark.parametrize("more", [-1, 0, 1, 11, 200, 258, 259])
def test_a_deflated_entry_ends_anywhere_in_a_piece(tmp_path: Path, more: int) -> None:
    # All input may be taken while some output is still to come.
    size = 2**20 + more
    (tmp_path / "m.zip").write_bytes(zip_of(zipfile.ZIP_DEFLATED, {"zeros": bytes(size)}))
    extract_archive(tmp_path / "m.zip", tmp_path / "out")
    assert (tmp_path / "out" / "zeros").stat().st_size == size


# -- the target ------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "m.tar.zst"
    path.write_bytes(zstandard.compress(tar({"new": b"new"})))
    return path


def test_an_empty_folder_is_filled(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "way").symlink_to("out")
    extract_archive(archive, tmp_path / "way")
    assert found(tmp_path / "out") == {"new": b"new"}
    assert (tmp_path / "way").is_symlink()


def test_a_folder_with_files_is_replaced_only_if_told_to(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    with pytest.raises(ObjectExistsError, match="overwrite=True"):
        extract_archive(archive, tmp_path / "out")
    assert found(tmp_path / "out") == {"old": b"old"}
    extract_archive(archive, tmp_path / "out", overwrite=True)
    assert found(tmp_path / "out") == {"new": b"new"}
    assert sorted(os.listdir(tmp_path)) == ["m.tar.zst", "out"]
    with pytest.raises(ObjectExistsError, match="is not a folder"):
        extract_archive(archive, archive, overwrite=True)


def test_a_failure_leaves_what_was_there(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    for folder in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(InvalidInput, match=r"m\.tar\.zst cannot be unpacked"):
            extract_archive(archive, folder, overwrite=True)
    assert found(tmp_path / "out") == {"old": b"old"}
    assert sorted(os.listdir(tmp_path)) == ["m.tar.zst", "out"]


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read"):
            extract_archive(path, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_extraction_left_goes_with_the_next_one(
    archive: Path, tmp_path: Path
) -> None:
    script = (
        "import sys\nfrom storage.container.archives import extract\n"
        "def wait(archive, folder, limits):\n"
        "    open(folder + '/half', 'w').close()\n    print(flush=True)\n    sys.stdin.read()\n"
        "extract.extract_into = wait\nextract.extract_archive(*sys.argv[1:])\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, archive, tmp_path / "out"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"\n"
            (left,) = tmp_path.glob(".extract.*.partial")
            # One that lives keeps its folder, and so does one to another place.
            extract_archive(archive, tmp_path / "out")
            assert (left / "content" / "half").exists()
        finally:
            other.kill()
    extract_archive(archive, tmp_path / "elsewhere")
    assert left.exists()
    extract_archive(archive, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "m.tar.zst", "out"]


def test_a_mount_point_is_refused_before_anything_is_done(archive: Path) -> None:
    with pytest.raises(DestinationError, match=r"mount point.*Storage\.download"):
        extract_archive(archive, "/proc", overwrite=True)
