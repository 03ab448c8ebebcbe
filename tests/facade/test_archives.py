"""``unpack=True``: archives become trees, and nothing in one reaches beyond its tree."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import zstandard

from storage import (
    DestinationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    OfflineError,
    Storage,
    StorageError,
)
from storage.container.archives.extract import extract_into
from storage.unpacking.extraction import ExtractionLimits
from tests.facade.stores import Store, cached_content, tree_bytes

FILES = {
    "model.bin": random.Random(1).randbytes(100_000),
    "empty": b"",
    "a/deep/folder/config.json": b"{}",
    "run.sh": b"#!/bin/sh\nexit 0\n",
    "é ü/%41 [1]#+": b"odd",
}
MODES = {"run.sh": 0o755}


def tar_bytes(members: Iterable[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for member, data in members:
            tar.addfile(member, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def tar_file(name: str, data: bytes = b"x", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    return member, data


def tar_link(
    name: str, target: str, kind: bytes = tarfile.SYMTYPE
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, target, 0o777
    return member, b""


def tar_folder(name: str) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o755
    return member, b""


def tar_special(name: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.devmajor, member.devminor = kind, 1, 3
    return member, b""


def zip_bytes(members: Iterable[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for member, data in members:
            zipped.writestr(member, data)
    return buffer.getvalue()


def zip_entry(
    name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644
) -> tuple[zipfile.ZipInfo, bytes]:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    return member, data


def zip_link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    return zip_entry(name, target.encode(), stat.S_IFLNK | 0o777)


def good_tar(mode: str) -> bytes:
    members = [tar_file(name, data, MODES.get(name, 0o644)) for name, data in FILES.items()]
    return tar_bytes([*members, tar_link("a/current", "../model.bin"), tar_folder("kept")], mode)


def good_zip() -> bytes:
    members = [
        zip_entry(name, data, stat.S_IFREG | MODES.get(name, 0o644)) for name, data in FILES.items()
    ]
    folder = zip_entry("kept/", b"", stat.S_IFDIR | 0o755)
    return zip_bytes([*members, zip_link("a/current", "../model.bin"), folder])


GOOD: dict[str, Callable[[], bytes]] = {
    "model.tar": lambda: good_tar("w"),
    "model.tar.gz": lambda: good_tar("w:gz"),
    "model.tar.bz2": lambda: good_tar("w:bz2"),
    "model.tar.xz": lambda: good_tar("w:xz"),
    "model.tar.zst": lambda: zstandard.ZstdCompressor(write_checksum=True).compress(good_tar("w")),
    "model.zip": good_zip,
    # Known by its content, not by its name.
    "model.pkl.gz": lambda: good_tar("w:gz"),
    "zip": good_zip,
}


def check_tree(path: str) -> None:
    assert tree_bytes(path) == FILES | {"a/current": FILES["model.bin"]}
    assert os.readlink(os.path.join(path, "a/current")) == "../model.bin"
    executable = {
        name for name in FILES if os.stat(os.path.join(path, name)).st_mode & stat.S_IXUSR
    }
    assert executable == {"run.sh"}
    assert os.path.isdir(os.path.join(path, "kept"))


@pytest.mark.parametrize("name", GOOD)
def test_archive_becomes_a_tree(make_store: Callable[[str], Store], out: Path, name: str) -> None:
    store = make_store("memory")
    store.put_raw(name, GOOD[name]())
    path = Storage.download(store.uri(name), out / "tree", unpack=True)
    assert path == str(out / "tree")
    check_tree(path)
    assert os.listdir(out) == ["tree"]


def test_every_store_can_be_unpacked_from(store: Store, out: Path) -> None:
    store.put_raw("model.tar.gz", GOOD["model.tar.gz"]())
    path = Storage.download(
        store.uri("model.tar.gz"), out / "tree", unpack=True, config=store.config
    )
    check_tree(path)
    assert os.listdir(out) == ["tree"]


def test_without_dest_the_tree_is_kept_in_the_cache(store: Store) -> None:
    uri = store.uri("model.zip")
    store.put_raw("model.zip", GOOD["model.zip"]())
    path = Storage.download(uri, unpack=True, config=store.config)
    check_tree(path)
    assert Storage.download(uri, unpack=True, config=store.config) == path
    # The archive itself is another thing than what is in it.
    packed = Storage.download(uri, config=store.config)
    assert packed != path
    assert Path(packed).read_bytes() == GOOD["model.zip"]()


def test_the_unpacked_tree_is_served_offline(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_raw("model.zip", GOOD["model.zip"]())
    path = Storage.download(store.uri("model.zip"), unpack=True)
    assert Storage.download(store.uri("model.zip"), unpack=True, offline=True) == path
    with pytest.raises(OfflineError):
        Storage.download(store.uri("model.zip"), offline=True)


def test_a_digest_is_that_of_the_archive(make_store: Callable[[str], Store], out: Path) -> None:
    import hashlib

    store = make_store("memory")
    data = GOOD["model.tar"]()
    store.put_raw("model.tar", data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    check_tree(Storage.download(store.uri("model.tar"), out / "a", unpack=True, digest=digest))
    with pytest.raises(IntegrityError):
        Storage.download(
            store.uri("model.tar"), out / "b", unpack=True, digest="sha256:" + "0" * 64
        )
    assert os.listdir(out) == ["a"]


def test_no_file_of_an_older_archive_survives(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_raw("model.tar", good_tar("w"))
    Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    store.put_raw("model.tar", tar_bytes([tar_file("new.bin", b"new")]))
    path = Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert tree_bytes(path) == {"new.bin": b"new"}


def test_a_folder_that_is_not_ours_is_not_unpacked_into(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_raw("model.tar", good_tar("w"))
    (out / "mine").write_bytes(b"precious")
    with pytest.raises(ObjectExistsError):
        Storage.download(store.uri("model.tar"), out, unpack=True)
    assert tree_bytes(out) == {"mine": b"precious"}


def test_a_real_tar_of_the_system_is_unpacked(
    make_store: Callable[[str], Store], tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "source"
    for name, data in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    (source / "run.sh").chmod(0o755)
    (source / "same.bin").hardlink_to(source / "model.bin")
    archive = tmp_path / "model.tar.gz"
    subprocess.run(["tar", "-C", source, "-czf", archive, "."], check=True, timeout=60)
    store = make_store("memory")
    store.put_raw("model.tar.gz", archive.read_bytes())
    path = Storage.download(store.uri("model.tar.gz"), out / "tree", unpack=True)
    assert tree_bytes(path) == FILES | {"same.bin": FILES["model.bin"]}


def test_hard_links_inside_are_kept(make_store: Callable[[str], Store], out: Path) -> None:
    store = make_store("memory")
    store.put_raw(
        "model.tar",
        tar_bytes([tar_file("a/one", b"data"), tar_link("b/two", "a/one", tarfile.LNKTYPE)]),
    )
    path = Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert tree_bytes(path) == {"a/one": b"data", "b/two": b"data"}


@pytest.mark.parametrize("last", ["weights.npz", "model.pt"])
def test_a_tar_that_ends_in_a_zip_is_still_a_tar(
    make_store: Callable[[str], Store], out: Path, last: str
) -> None:
    inner = zip_bytes([zip_entry("archive/data.pkl", b"tensors")])
    store = make_store("memory")
    store.put_raw("model.tar", tar_bytes([tar_file("config.json", b"{}"), tar_file(last, inner)]))
    path = Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert tree_bytes(path) == {"config.json": b"{}", last: inner}


def test_the_last_member_of_a_name_wins_and_writes_through_no_link(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    members = [
        tar_file("target", b"kept"),
        tar_link("name", "target"),
        tar_file("name", b"new"),
        tar_file("twice", b"one"),
        tar_file("twice", b"two"),
    ]
    store.put_raw("model.tar", tar_bytes(members))
    path = Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert tree_bytes(path) == {"target": b"kept", "name": b"new", "twice": b"two"}
    assert not os.path.islink(os.path.join(path, "name"))


def test_modes_lose_what_could_harm(make_store: Callable[[str], Store], out: Path) -> None:
    store = make_store("memory")
    store.put_raw("a.tar", tar_bytes([tar_file("run", b"x", 0o7777)]))
    store.put_raw("a.zip", zip_bytes([zip_entry("run", b"x", stat.S_IFREG | 0o7777)]))
    for name in ("a.tar", "a.zip"):
        path = Storage.download(store.uri(name), out / name.replace(".", "-"), unpack=True)
        mode = os.stat(os.path.join(path, "run")).st_mode
        assert not mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | stat.S_IWOTH)
        assert mode & stat.S_IXUSR


# -- what is refused -------------------------------------------------------------------------

# Sixteen folders behind sixteen links: as one path they are too long for the system to resolve,
# and a check that gives up takes the rest of the path literally.
LONG = "d" * 247
STEPS = "abcdefghijklmnop"


def too_long_to_resolve(outside: Path) -> bytes:
    members, path = [], ""
    for step in STEPS:
        members += [tar_folder(path + LONG), tar_link(path + step, LONG)]
        path += LONG + "/"
    chain = "/".join(STEPS) + "/" + "l" * 254
    members.append(tar_link(chain, "../" * len(STEPS)))
    members.append(tar_link("escape", f"{chain}/../../{outside.name}"))
    return tar_bytes([*members, tar_file("escape/evil", b"evil")])


BAD: dict[str, Callable[[Path], bytes]] = {
    "tar-parent": lambda outside: tar_bytes([tar_file("ok"), tar_file("../outside/evil")]),
    "tar-parent-inside-a-name": lambda outside: tar_bytes([tar_file("a/../../outside/evil")]),
    "tar-absolute": lambda outside: tar_bytes([tar_file(f"{outside}/evil")]),
    "tar-link-out": lambda outside: tar_bytes([tar_link("l", "../outside")]),
    "tar-absolute-link": lambda outside: tar_bytes([tar_link("l", str(outside))]),
    "tar-write-through-link": lambda outside: tar_bytes(
        [tar_link("l", "../outside"), tar_file("l/evil")]
    ),
    "tar-hard-link-out": lambda outside: tar_bytes(
        [tar_link("l", "../outside/secret", tarfile.LNKTYPE)]
    ),
    "tar-absolute-hard-link": lambda outside: tar_bytes(
        [tar_link("l", f"{outside}/secret", tarfile.LNKTYPE)]
    ),
    "tar-hard-link-to-nothing": lambda outside: tar_bytes(
        [tar_link("l", "not there", tarfile.LNKTYPE)]
    ),
    "tar-link-that-a-later-member-turns-outward": lambda outside: tar_bytes(
        [
            tar_file("x/y/z", b"z"),
            tar_link("pivot", "x/y"),
            tar_link("l", "pivot/../../outside"),
            tar_link("pivot", "."),
            tar_file("l/evil"),
        ]
    ),
    "tar-link-turned-outward-and-not-used": lambda outside: tar_bytes(
        [
            tar_file("x/y/z", b"z"),
            tar_link("pivot", "x/y"),
            tar_link("l", "pivot/../.."),
            tar_link("pivot", "."),
        ]
    ),
    "tar-too-long-to-resolve": too_long_to_resolve,
    "tar-device": lambda outside: tar_bytes([tar_special("null", tarfile.CHRTYPE)]),
    "tar-block-device": lambda outside: tar_bytes([tar_special("disk", tarfile.BLKTYPE)]),
    "tar-pipe": lambda outside: tar_bytes([tar_special("pipe", tarfile.FIFOTYPE)]),
    "zip-parent": lambda outside: zip_bytes([zip_entry("ok"), zip_entry("../outside/evil")]),
    "zip-absolute": lambda outside: zip_bytes([zip_entry(f"{outside}/evil")]),
    "zip-link-out": lambda outside: zip_bytes([zip_link("l", "../outside")]),
    "zip-absolute-link": lambda outside: zip_bytes([zip_link("l", str(outside))]),
    "zip-write-through-link": lambda outside: zip_bytes(
        [zip_link("l", "../outside"), zip_entry("l/evil")]
    ),
    "zip-link-that-a-later-member-turns-outward": lambda outside: zip_bytes(
        [
            zip_entry("x/y/z"),
            zip_link("pivot", "x/y"),
            zip_link("l", "pivot/../../outside"),
            zip_link("pivot", "."),
            zip_entry("l/evil"),
        ]
    ),
    "zip-pipe": lambda outside: zip_bytes([zip_entry("pipe", b"", stat.S_IFIFO | 0o644)]),
    "zip-device": lambda outside: zip_bytes([zip_entry("null", b"", stat.S_IFCHR | 0o644)]),
}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("kind", BAD)
def test_what_reaches_out_is_refused_and_leaves_nothing(
    make_store: Callable[[str], Store], out: Path, kind: str
) -> None:
    outside = out.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    # The staging folder is one level deeper than the destination: both must be out of reach.
    (out / "outside").mkdir()
    store = make_store("memory")
    store.put_raw("model", BAD[kind](outside))
    with pytest.raises(InvalidInput) as caught:
        Storage.download(store.uri("model"), out / "tree", unpack=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(out) == ["outside"]
    assert os.listdir(out / "outside") == []
    assert os.listdir(outside) == ["secret"]
    with pytest.raises(StorageError):
        Storage.download(store.uri("model"), unpack=True)
    with pytest.raises(OfflineError):
        Storage.download(store.uri("model"), unpack=True, offline=True)
    assert cached_content() == []


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
        + data[middle + 64 :]
    )


@pytest.mark.parametrize("how", ["cut", "damaged"])
@pytest.mark.parametrize(
    "name",
    [
        "model.tar",
        "model.tar.gz",
        "model.tar.bz2",
        "model.tar.xz",
        "model.tar.zst",
        "model.zip",
    ],
)
def test_a_broken_archive_is_refused_and_leaves_nothing(
    make_store: Callable[[str], Store], out: Path, name: str, how: str
) -> None:
    data = GOOD[name]()
    broken = data[: len(data) // 2] if how == "cut" else damaged(data)
    if (name, how) == ("model.tar", "damaged"):
        # It has no checksum over the content, only over each header: here the second one's.
        at = 512 + -(-len(FILES["model.bin"]) // 512) * 512
        broken = data[:at] + b"?" * 512 + data[at + 512 :]
    store = make_store("memory")
    store.put_raw(name, broken)
    with pytest.raises(InvalidInput) as caught:
        Storage.download(store.uri(name), out / "tree", unpack=True)
    assert name in str(caught.value)
    assert os.listdir(out) == []


def test_a_tar_cut_between_two_members_is_refused(
    make_store: Callable[[str], Store], out: Path
) -> None:
    whole = tar_bytes([tar_file("one", b"1"), tar_file("two", b"2")])
    store = make_store("memory")
    store.put_raw("model.tar", whole[:1024])
    with pytest.raises(InvalidInput, match="cannot be unpacked"):
        Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert os.listdir(out) == []


@pytest.mark.parametrize("data", [b"", b"not an archive", b"\x1f\x8b", b"PK\x03\x04 and no more"])
def test_what_is_no_archive_is_refused(
    make_store: Callable[[str], Store], out: Path, data: bytes
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", data)
    with pytest.raises(InvalidInput, match="cannot be unpacked"):
        Storage.download(store.uri("model.bin"), out / "tree", unpack=True)
    assert os.listdir(out) == []


def test_a_tree_cannot_be_unpacked(store: Store, out: Path) -> None:
    store.put_raw("tree/model.tar", good_tar("w"))
    with pytest.raises(InvalidInput, match="unpack"):
        Storage.download(store.uri("tree"), out / "tree", unpack=True, config=store.config)
    with pytest.raises(ModelMissingError):
        Storage.download(store.uri("none"), out / "tree", unpack=True, config=store.config)
    assert os.listdir(out) == []


def test_an_encrypted_zip_is_refused(make_store: Callable[[str], Store], out: Path) -> None:
    data = bytearray(zip_bytes([zip_entry("a", b"secret")]))
    # The flag of encryption, in the local header and in the directory.
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    store = make_store("memory")
    store.put_raw("model.zip", bytes(data))
    with pytest.raises(InvalidInput, match="encrypted"):
        Storage.download(store.uri("model.zip"), out / "tree", unpack=True)
    assert os.listdir(out) == []


def test_a_name_that_is_both_file_and_folder_is_an_error(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_raw("model.tar", tar_bytes([tar_file("a", b"file"), tar_file("a/b", b"below")]))
    with pytest.raises((InvalidInput, DestinationError)):
        Storage.download(store.uri("model.tar"), out / "tree", unpack=True)
    assert os.listdir(out) == []


# -- bombs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (ExtractionLimits(total_size=1_000_000), "more than 1000000 bytes"),
        (ExtractionLimits(entries=3), "more than 3 entries"),
    ],
)
def test_limits_stop_an_extraction(
    tmp_path: Path, kind: str, limits: ExtractionLimits, what: str
) -> None:
    names = [f"f{number}" for number in range(4)]
    zeros = bytes(300_000)
    archive = tmp_path / f"bomb.{kind}"
    if kind == "zip":
        archive.write_bytes(zip_bytes([zip_entry(name, zeros) for name in names]))
    else:
        archive.write_bytes(tar_bytes([tar_file(name, zeros) for name in names], "w:gz"))
    folder = tmp_path / "tree"
    folder.mkdir()
    with pytest.raises(InvalidInput, match=what):
        extract_into(archive, str(folder), limits)
    assert sum(len(data) for data in tree_bytes(folder).values()) <= 1_000_000
    extract_into(archive, str(folder))
    assert sorted(tree_bytes(folder)) == names


def test_a_header_that_lies_about_its_size_is_found_out(
    make_store: Callable[[str], Store], out: Path
) -> None:
    data = bytearray(zip_bytes([zip_entry("a", bytes(100_000))]))
    directory = data.index(b"PK\x01\x02")
    for offset in (22, directory + 24):
        data[offset : offset + 4] = (10).to_bytes(4, "little")
    store = make_store("memory")
    store.put_raw("model.zip", bytes(data))
    with pytest.raises(InvalidInput):
        Storage.download(store.uri("model.zip"), out / "tree", unpack=True)
    assert os.listdir(out) == []


@pytest.mark.slow
def test_a_bomb_is_refused_and_leaves_nothing(
    make_store: Callable[[str], Store], tmp_path: Path, out: Path
) -> None:
    buffer = io.BytesIO()
    block = bytes(16 * 1024 * 1024)
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped,
        zipped.open("zeros", "w") as entry,
    ):
        for _ in range(80):
            entry.write(block)
    assert 200 * len(buffer.getvalue()) < 80 * len(block)
    store = make_store("memory")
    store.put_raw("bomb.zip", buffer.getvalue())
    with pytest.raises(
        InvalidInput, match=r"bomb\.zip holds 'zeros', \d+ bytes that become 1342177280"
    ):
        Storage.download(store.uri("bomb.zip"), out / "tree", unpack=True)
    assert os.listdir(out) == []
