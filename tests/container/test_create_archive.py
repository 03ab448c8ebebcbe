"""Archives of models: the same content is the same bytes, and the hashes are right."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import blake3
import pytest
import zstandard

from storage import IntegrityError, InvalidInput
from storage.container.archives import create
from storage.container.archives.create import create_archive
from storage.container.archives.extract import extract_archive
from storage.container.archives.tar_headers import member_header
from storage.container.archives.zstd import Compressor
from storage.unpacking.zstd import open_zstd

FILES = {
    "weights.bin": random.Random(1).randbytes(3_000_001),
    "empty": b"",
    # Sorted by the parts of the paths, "a/z" comes before "a-b" and "a.txt".
    "a/z": b"1",
    "a-b": b"2",
    "a.txt": b"3",
    "a/b/c/d": b"4",
    "run.sh": b"#!/bin/sh\n",
    "é ü/ß 模型.txt": b"unicode",
    "long/" + "n" * 200 + "/" + "m" * 120: b"long",
    "prefix/" + "p" * 80 + "/" + "q" * 40: b"fits the old header",
    ".hidden": b"h",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", list(FILES))


def make_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(FILES[name])
    (root / "run.sh").chmod(0o755)
    (root / "kept").mkdir()
    (root / "link").symlink_to("a/z")
    return root


def members(archive: Path) -> dict[str, tarfile.TarInfo]:
    with archive.open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


def content_of(root: Path) -> bytes:
    """The bytes that the content's hashes are of, as pathlib sorts the files."""
    return b"".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def test_the_four_values_and_the_other_hashes_are_right(tree: Path) -> None:
    with create_archive(tree) as (archive, content_hash, size, archive_hash):
        data = archive.read_bytes()
        assert size == len(data)
        assert archive.name.endswith(".tar.zst")
        assert archive_hash == hashlib.md5(data).hexdigest()
        assert content_hash == hashlib.md5(content_of(tree)).hexdigest()
    assert not archive.exists()
    with create_archive(tree, digests=("sha256", "blake3")) as made:
        assert made.content_sha256 == hashlib.sha256(content_of(tree)).hexdigest()
        assert made.content_blake3 == blake3.blake3(content_of(tree)).hexdigest()
        assert made.archive_sha256 == hashlib.sha256(data).hexdigest()
        assert made.archive_blake3 == blake3.blake3(data).hexdigest()
        assert made.file_count == len(FILES)
        assert made.content_size == sum(map(len, FILES.values()))


def test_hashes_that_are_not_asked_for_are_not_made(tree: Path) -> None:
    with create_archive(tree) as made:
        assert made.content_blake3 is not None
        assert made.content_sha256 is None
        assert made.archive_sha256 is None
    with pytest.raises(InvalidInput, match="sha256, blake3"):
        create_archive(tree, digests=("crc32",))


def test_the_same_content_is_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    names = list(FILES)
    random.Random(2).shuffle(names)
    other = make_tree(tmp_path / "other name", names)
    (other / "a.txt").chmod(0o600)
    (other / "run.sh").chmod(0o711)
    (other / "kept").chmod(0o700)
    os.utime(other / "a-b", (1, 1))
    (other / "empty").unlink()
    (other / "same").write_bytes(b"")
    (other / "empty").hardlink_to(other / "same")
    (other / "same").unlink()
    hashes = set()
    for folder in (tree, other):
        for threads in (1, 2, 5, None):
            with create_archive(folder, threads=threads) as made:
                hashes.add((made.content_hash, made.size, made.archive_hash))
    assert len(hashes) == 1


def compressed(data: bytes, piece: int = 1 << 20, threads: int = 1) -> bytes:
    out = io.BytesIO()
    writer = Compressor(out, 1, threads)
    for at in range(0, len(data), piece):
        writer.write([data[at : at + piece]])
    writer.close()
    return out.getvalue()


def test_compressed_bytes_do_not_depend_on_how_the_data_comes() -> None:
    data = random.Random(3).randbytes(6_000_000) + b"text " * 1_000_000
    results = {
        compressed(data, piece, threads)
        for piece, threads in ((1 << 20, 1), (70_001, 3), (len(data), 2))
    }
    assert len(results) == 1


NOISE = random.Random(4).randbytes(2_500_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a",
        NOISE[:1],
        NOISE,
        b"text " * 500_000,
        NOISE + b"text " * 500_000 + NOISE,
        b"text " * 500_000 + NOISE + b"text " * 7,
        NOISE[: 1 << 20] * 2,
        bytes(1 << 20) + NOISE[: 128 * 1024],
    ],
    ids=len,
)
def test_what_is_stored_and_what_is_compressed_comes_out_as_it_was(
    data: bytes, tmp_path: Path
) -> None:
    packed = compressed(data)
    assert len(packed) < len(data) + len(data) // 10_000 + 64
    unpacked = zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(
        packed, read_across_frames=True
    )
    assert unpacked.read() == data
    with open_zstd(io.BytesIO(packed)) as reader:
        assert reader.read() == data
    # Every decoder has to read it, not only the library that ours is made with.
    if command := shutil.which("zstd"):
        ran = subprocess.run([command, "-dc"], input=packed, capture_output=True, check=True)
        assert ran.stdout == data


def test_headers_tell_of_nothing_but_content(tree: Path) -> None:
    with create_archive(tree) as made:
        found = members(made.path)
    assert set(found) >= {*FILES, "kept", "link", "a/b/c"}
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in found.values()} == {
        (0, 0, "", "", 315532800)
    }
    assert found["run.sh"].mode == 0o755
    assert found["a-b"].mode == 0o644
    assert found["link"].linkname == "a/z"
    assert found["kept"].isdir()


def test_records_stand_only_where_the_old_header_has_no_room(tree: Path) -> None:
    assert len(member_header("file", b"n" * 100)) == 512
    assert len(member_header("file", b"p" * 155 + b"/" + b"n" * 100)) == 512
    assert len(member_header("file", b"n" * 101)) == 3 * 512
    assert len(member_header("link", b"n", target=b"t" * 100)) == 512
    assert len(member_header("link", b"n", target=b"t" * 101)) == 3 * 512
    assert len(member_header("file", b"\xff" * 100)) == 512


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 2**40 + 1])
def test_files_of_more_than_8_gib_have_their_size(size: int) -> None:
    header = member_header("file", "é".encode(), size=size)
    with tarfile.open(fileobj=io.BytesIO(header)) as tar:
        member = tar.next()
    assert member is not None
    assert (member.name, member.size) == ("é", size)


def test_what_is_made_is_read_back(tree: Path, tmp_path: Path) -> None:
    (tree / "loop").symlink_to("loop2")
    name = os.fsdecode(b"bad\xff")
    (tree / name).write_bytes(b"no UTF-8")
    (tree / os.fsdecode(b"\xfe" * 200)).write_bytes(b"nor this")
    with create_archive(tree) as made:
        extract_archive(made.path, tmp_path / "out")
        with create_archive(tmp_path / "out") as again:
            assert (again.content_hash, again.archive_hash) == (
                made.content_hash,
                made.archive_hash,
            )
    assert (tmp_path / "out" / name).read_bytes() == b"no UTF-8"
    assert os.readlink(tmp_path / "out" / "loop") == "loop2"
    assert os.path.isdir(tmp_path / "out" / "kept")


def test_the_tar_of_the_system_reads_it(tree: Path, tmp_path: Path) -> None:
    archive = create_archive(tree, tmp_path / "m.tar.zst").path
    plain = zstandard.ZstdDecompressor().stream_reader(archive.read_bytes()).read()
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        ["tar", "-x", "-C", out], input=plain, capture_output=True, check=True, timeout=60
    )
    assert done.stderr == b""
    assert content_of(out) == content_of(tree)


def test_a_folder_without_files_is_an_archive_too(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with create_archive(tmp_path / "tree") as made:
        assert made.content_hash == hashlib.md5(b"").hexdigest()
        assert members(made.path) == {}
        extract_archive(made.path, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


# -- links -----------------------------------------------------------------------------------


def test_the_content_of_a_file_counts_for_each_name(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "b").write_bytes(b"data")
    (tree / "a").hardlink_to(tree / "b")
    (tree / "c").symlink_to("b")
    with create_archive(tree) as made:
        assert made.content_hash == hashlib.md5(b"data" * 3).hexdigest()
        assert {name: m.type for name, m in members(made.path).items()} == {
            "a": tarfile.REGTYPE,
            "b": tarfile.REGTYPE,
            "c": tarfile.SYMTYPE,
        }


@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_to_a_file_elsewhere_becomes_the_file(tmp_path: Path, absolute: bool) -> None:
    (tmp_path / "blob").write_bytes(b"data")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").symlink_to(tmp_path / "blob" if absolute else "../blob")
    with create_archive(tree) as made:
        assert members(made.path)["file"].isreg()
        assert made.content_hash == hashlib.md5(b"data").hexdigest()


@pytest.mark.parametrize("target", ["..", "/nowhere", "../nowhere"])
def test_links_that_lead_out_to_no_file_are_refused(tree: Path, target: str) -> None:
    (tree / "out").symlink_to(target)
    with pytest.raises(InvalidInput, match="out is a link to"):
        create_archive(tree)


# -- what is refused -------------------------------------------------------------------------


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets_are_refused_and_nothing_is_left(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "pipe":
        os.mkfifo(tree / "odd")
    else:
        monkeypatch.chdir(tree)  # the name of a socket may have 100 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("odd")
    with pytest.raises(InvalidInput, match="odd is a pipe, a socket or a device"):
        create_archive(tree, tmp_path / "new" / "folder" / "m.tar.zst")
    assert left_in(tmp_path) == ["tree"]


def test_a_file_is_no_folder(tree: Path, tmp_path: Path) -> None:
    for path in (tree / "a.txt", tmp_path / "none"):
        with pytest.raises(InvalidInput, match="is not a folder"):
            create_archive(path)


def test_what_may_not_be_read_is_named(tree: Path, tmp_path: Path) -> None:
    (tree / "a.txt").chmod(0)
    script = (
        "import sys\nfrom storage import InvalidInput\n"
        "from storage.container.archives.create import create_archive\n"
        "try:\n    create_archive(*sys.argv[1:])\nexcept InvalidInput as exc:\n    print(exc)\n"
    )
    command = [sys.executable, "-c", script, str(tree), str(tmp_path / "m.tar.zst")]
    if os.geteuid() == 0:
        # Root may read everything, unless it lacks these.
        if shutil.which("setpriv") is None:
            pytest.skip("root may read everything, and there is no setpriv")
        command[:0] = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        command[3:3] = ["--inh-caps", "-dac_override,-dac_read_search"]
    root = Path(create.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert "a.txt cannot be read: Permission denied" in done.stdout
    assert left_in(tmp_path) == ["tree"]


@pytest.mark.parametrize("name", ["a\\..\\b", "\\server", "c:/file"])
def test_names_that_would_not_be_extracted_again_are_refused(tree: Path, name: str) -> None:
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"")
    with pytest.raises(InvalidInput, match="leads elsewhere"):
        create_archive(tree)


@pytest.mark.slow
def test_a_model_of_zeros_is_extracted_again_by_the_default_limits(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    size = 2**30 + 2**25
    with (tree / "sparse").open("wb") as file:
        file.truncate(size)
    with create_archive(tree, digests=("sha256",)) as made:
        assert size < made.size * 200 < size * 1.01
        with made.path.open("rb") as packed:
            assert hashlib.file_digest(packed, "sha256").hexdigest() == made.archive_sha256
        extract_archive(made.path, tmp_path / "out")
        # What follows the frame is nothing to others.
        with zstandard.open(made.path) as stream:
            stream.read(1)
            assert sum(len(piece) for piece in iter(lambda: stream.read(2**20), b"")) > size
    assert (tmp_path / "out" / "sparse").stat().st_size == size
    shutil.rmtree(tmp_path / "out")


def test_a_file_that_holds_more_than_its_size_is_an_error(tree: Path, tmp_path: Path) -> None:
    # Its size is 0, and it has content: like a file that grows while it is read.
    (tree / "growing").symlink_to("/proc/self/status")
    with pytest.raises(IntegrityError, match="growing changed"):
        create_archive(tree, tmp_path / "m.tar.zst")
    assert left_in(tmp_path) == ["tree"]


@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * create.PIECE))
    os.utime(path, (1, 1))
    with path.open("rb") as file:
        pieces = create._pieces(file.fileno(), str(path), os.fstat(file.fileno()))
        next(pieces)
        if change == "shorter":
            os.truncate(path, create.PIECE)
        else:
            with path.open("r+b") as other:
                other.seek(0 if change == "rewritten" else 3 * create.PIECE)
                other.write(b"x")
        with pytest.raises(IntegrityError, match="file changed while it was being read"):
            list(pieces)


# -- where it goes ---------------------------------------------------------------------------


def test_a_destination_stays(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "old.tar.zst").write_bytes(b"old")
    with create_archive(tree, tmp_path / "old.tar.zst") as made:
        pass
    assert made.path.read_bytes() != b"old"
    assert not made.temporary
    (tmp_path / "into").mkdir()
    assert create_archive(tree, tmp_path / "into").path == tmp_path / "into" / "tree.tar.zst"
    assert create_archive(tree, f"{tmp_path}/new/").path == tmp_path / "new" / "tree.tar.zst"
    assert left_in(tmp_path) == ["into", "new", "old.tar.zst", "tree"]
    assert left_in(tmp_path / "new") == ["tree.tar.zst"]


def test_a_destination_inside_the_folder_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(tree)
    for place in (tree / "m.tar.zst", tree / "kept", tree / "new" / "m", tmp_path / "way" / "m"):
        with pytest.raises(InvalidInput, match="is inside"):
            create_archive(tree, place)
    assert not (tree / "new").exists()


@pytest.mark.parametrize("arguments", [{"level": 23}, {"level": -101}, {"threads": 0}])
def test_arguments_out_of_range_are_refused(tree: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        create_archive(tree, **arguments)  # type: ignore[arg-type]


def test_a_temporary_archive_goes_with_its_owner(tree: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = (
        "import os\nfrom storage.container.archives.create import create_archive\n"
        f"made = create_archive({str(tree)!r})\n"
        f"assert os.listdir({str(temporary)!r}) == [made.path.name]\n"
        "assert made.path.stat().st_mode & 0o077 == 0\n"
        "if not os.fork():\n    raise SystemExit\n"
        "os.wait()\nassert made.path.exists()\n"
    )
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(Path.cwd())}
    root = Path(create.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, check=True, timeout=60
    )
    assert left_in(temporary) == []


def test_closing_twice_removes_nothing_that_came_later(tree: Path) -> None:
    made = create_archive(tree)
    made.close()
    made.path.write_bytes(b"of somebody else")
    made.close()
    assert made.path.read_bytes() == b"of somebody else"
    made.path.unlink()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "large").open("wb") as file:
        file.truncate(2**31)
        for at in range(0, 2**31, 2**27):
            file.seek(at)
            file.write(random.Random(at).randbytes(2**22))
    script = (
        "from storage.container.archives.create import create_archive\n"
        "from storage.container.archives.extract import extract_archive, ExtractionLimits\n"
        f"made = create_archive({str(tree)!r}, digests=('blake3',))\n"
        f"extract_archive(made.path, {str(tmp_path / 'out')!r})\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    root = Path(create.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        check=True,
        timeout=120,
        capture_output=True,
    )
    shutil.rmtree(tmp_path / "out")
    assert int(done.stdout) < 160 * 1024
