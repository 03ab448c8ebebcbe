"""What no archive may do, whatever bytes it is made of."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from storage import InvalidInput
from storage.container.archives import extract
from storage.container.archives.extract import ExtractionLimits, extract_archive
from tests.container.test_extract import tar, zip_of

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1


def header(
    name: bytes, size: int = 0, kind: bytes = b"0", target: bytes = b"", tail: bytes = b""
) -> bytes:
    member = tarfile.TarInfo("x")
    member.size, member.type = min(size, 8**11 - 1), kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[:100] = name.ljust(100, b"\0")
    block[157:257] = target.ljust(100, b"\0")
    if size >= 8**11:
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[386 : 386 + len(tail)] = tail
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    body = b""
    for key, value in records.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        body += str(length).encode() + rest
    return header(b"pax", len(body), b"x") + padded(body)


END = bytes(1024)
OLD_SPARSE = (
    # One piece of 0 bytes at the end; the size of the whole in base 256.
    b"%011o\0%011o\0" % (0, 0) + bytes(72) + b"\0"
)


def sparse_bomb(size: int) -> bytes:
    return header(b"f", 0, b"S", tail=OLD_SPARSE + b"\x80" + size.to_bytes(11, "big")) + END


# Each is refused as what it is, not by chance.
BAD: dict[str, tuple[bytes, str]] = {
    "drive": (header(b"C:\\x") + END, "leaves it"),
    "drive-slash": (header(b"c:/x") + END, "leaves it"),
    "backslash": (header(b"\\\\host\\x") + END, "leaves it"),
    "backslash-parent": (header(b"a\\..\\..\\x") + END, "leaves it"),
    "nul": (pax(path="a\0b") + header(b"x") + END, "leaves it"),
    "no-name": (header(b"") + END, "leaves it"),
    "itself": (header(b".") + END, "the folder itself"),
    "pax-parent": (pax(path="../x") + header(b"x") + END, "leaves it"),
    "pax-absolute": (pax(path="/x") + header(b"x") + END, "leaves it"),
    "pax-link": (pax(linkpath="/etc") + header(b"x", 0, b"2", b"y") + END, "leads out"),
    "gnu-name": (header(b"L", 5, b"L") + padded(b"../x\0") + header(b"x") + END, "leaves it"),
    "sparse-name": (
        pax(GNU__sparse__map="0,0", GNU__sparse__size="0", GNU__sparse__name="../x")
        + header(b"x")
        + END,
        "leaves it",
    ),
    "hard-link-through-link": (
        header(b"d", 0, b"2", b".") + header(b"x", 0, b"1", b"d/../../etc/passwd") + END,
        "leaves it",
    ),
    "hard-link-to-link": (
        header(b"f") + header(b"l", 0, b"2", b"f") + header(b"x", 0, b"1", b"l") + END,
        "no file in it",
    ),
    "size-in-pax": (pax(size="99999") + header(b"x", 3) + padded(b"abc") + END, "inside a member"),
    "size-no-number": (pax(size="1e3") + header(b"x", 3) + padded(b"abc") + END, "no size"),
    "size-too-long": (pax(size="9" * 30) + header(b"x") + END, "no size"),
    "size-negative": (header(b"x")[:124] + b"\xff" * 12 + header(b"x")[136:] + END, "damaged"),
    "pax-cut": (header(b"p", 4, b"x") + padded(b"99 a") + header(b"x") + END, "PAX"),
    "name-without-member": (header(b"L", 2, b"L") + padded(b"a\0") + END, "a member is missing"),
    "unknown-type": (header(b"x", 0, b"Z") + END, "unknown type"),
    "several-volumes": (header(b"x", 0, b"M") + END, "unknown type"),
    "sparse-old": (sparse_bomb(2**45), "more than"),
    "sparse-larger-than-any": (sparse_bomb(2**70), "no size"),
    "sparse-0.1": (
        pax(GNU__sparse__map="0,0", GNU__sparse__size=str(2**45)) + header(b"x") + END,
        "more than",
    ),
    "sparse-overlap": (
        pax(GNU__sparse__map="0,2,1,1", GNU__sparse__size="9") + header(b"x", 3) + END,
        "map",
    ),
    "sparse-odd": (
        pax(GNU__sparse__map="0,2,1", GNU__sparse__size="9") + header(b"x", 3) + END,
        "map",
    ),
    "sparse-beyond": (
        pax(GNU__sparse__map="8,3", GNU__sparse__size="9") + header(b"x", 3) + END,
        "map",
    ),
    "sparse-less-than-its-map": (
        pax(GNU__sparse__map="0,3", GNU__sparse__size="9") + header(b"x", 2) + END,
        "map",
    ),
    "sparse-1.0-count": (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9")
        + header(b"x", 512)
        + padded(b"9999999999\n")
        + END,
        "too long",
    ),
    "sparse-1.0-cut": (
        pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="9")
        + header(b"x", 512)
        + padded(b"9\n1\n")
        + END,
        "map",
    ),
}


BAD["link-that-was-turned-around"] = (
    header(b"a/b", 0, b"5")
    + header(b"p/q/r/s/t", 0, b"5")
    + header(b"a/k", 0, b"2", b"../p/q/r/s/t")
    + header(b"d", 0, b"2", b"a/b")
    # By another way than the one that is there at the end.
    + header(b"d/l", 0, b"2", b"../k/../../../../y")
    + header(b"d")
    + header(b"a/k", 0, b"2", b"../p")
    + END,
    "'a/b/l', which leads out",
)
BAD["hard-link-in-place-of-its-file"] = (
    header(b"d/f") + header(b"d", 0, b"1", b"d/f") + END,
    "replaces what it leads to",
)
BAD["hard-link-to-itself-by-another-way"] = (
    header(b"d/f") + header(b"e", 0, b"2", b"d") + header(b"e/f", 0, b"1", b"d/f") + END,
    "replaces what it leads to",
)
BAD["behind-a-dangling-link"] = (
    header(b"d/u", 0, b"2", b"a/../..") + header(b"d/u/d", 0, b"5") + END,
    "leads nowhere",
)


@pytest.mark.parametrize("kind", BAD)
def test_a_hostile_tar_is_refused(tmp_path: Path, kind: str) -> None:
    data, reason = BAD[kind]
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(InvalidInput, match=reason) as caught:
        extract_archive(tmp_path / "m", tmp_path / "out")
    assert len(str(caught.value)) < 600
    assert os.listdir(tmp_path) == ["m"]


def limited(tmp_path: Path, data: bytes, **limits: float) -> None:
    (tmp_path / "m").write_bytes(data)
    extract_archive(
        tmp_path / "m",
        tmp_path / "out",
        limits=ExtractionLimits(**limits),  # type: ignore[arg-type]
        overwrite=True,
    )


@pytest.mark.parametrize("make", [tar, lambda files: zip_of(zipfile.ZIP_DEFLATED, files)])
@pytest.mark.parametrize(
    ("files", "limit", "enough", "reason"),
    [
        ({"a": bytes(600), "b": bytes(400)}, "total_size", 999, "more than 999 bytes"),
        ({"a": b"", "b": b"", "c": b""}, "entries", 2, "more than 2 entries"),
        ({"n" * 50: b""}, "path_length", 49, "more than 49 bytes"),
        ({"a/b/c/d": b""}, "path_depth", 2, "more than 2 folders"),
    ],
)
def test_each_limit_is_where_it_says(
    tmp_path: Path,
    make: Callable[[dict[str, bytes]], bytes],
    files: dict[str, bytes],
    limit: str,
    enough: int,
    reason: str,
) -> None:
    data = make(files)
    with pytest.raises(InvalidInput, match=reason):
        limited(tmp_path, data, **{limit: enough})
    assert os.listdir(tmp_path) == ["m"]
    if limit == "total_size" and make is tar:
        enough += 10240  # what fills the last record is read, too
    limited(tmp_path, data, **{limit: enough + 1})


def test_hard_links_count_as_often_as_they_are_files(tmp_path: Path) -> None:
    links = b"".join(header(b"l%d" % number, 0, b"1", b"f") for number in range(9))
    data = header(b"f", 1000) + padded(b"x" * 1000) + links + END
    with pytest.raises(InvalidInput, match="more than 9999 bytes"):
        limited(tmp_path, data, total_size=9999)
    # The second half of the end mark counts too.
    limited(tmp_path, data, total_size=10_512)


def test_what_follows_the_end_of_a_tar_counts(tmp_path: Path) -> None:
    data = zstandard.compress(END + bytes(2_000_000))
    with pytest.raises(InvalidInput, match="more than"):
        limited(tmp_path, data, total_size=1_000_000)
    limited(tmp_path, data, total_size=3_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gzip", "zstd", "zstd-frames", "xz", "bzip2"])
def test_a_bomb_of_any_compression_is_refused(tmp_path: Path, kind: str) -> None:
    # By the default limits where it is quick.
    slow = kind in ("xz", "bzip2")
    size = (64 if slow else 1200) * 2**20
    limits = ExtractionLimits(total_size=2**25) if slow else None
    compressors = {
        "gzip": zlib.compressobj(1, wbits=31),
        "zstd": zstandard.ZstdCompressor(level=1).compressobj(),
        "xz": lzma.LZMACompressor(preset=0),
        "bzip2": bz2.BZ2Compressor(1),
    }
    if kind == "zstd-frames":
        frame = zstandard.compress(bytes(2**24))
        data = zstandard.compress(header(b"f", size)) + frame * (size >> 24)
    else:
        compressor = compressors[kind]
        data = compressor.compress(header(b"f", size))
        data += b"".join(compressor.compress(bytes(2**24)) for _ in range(size >> 24))
        data += compressor.flush()
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"unpacks to more than \d+ bytes"):
        extract_archive(tmp_path / "m", tmp_path / "out", limits=limits)
    assert os.listdir(tmp_path) == ["m"]


# -- ZIP -------------------------------------------------------------------------------------


def zip_by_hand(entries: list[tuple[bytes, bytes, int]], count: int | None = None) -> bytes:
    """A ZIP of one local entry, which the directory names several times; or with other lies.

    ``entries`` are name, packed bytes and offset of each in the directory.
    """
    body, directory = b"", b""
    for name, data, offset in entries:
        crc = zlib.crc32(data)
        local = struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, len(data), len(data), len(name), 0
        )
        at = len(body) if offset < 0 else offset
        if offset < 0:
            body += local + name + data
        directory += (
            struct.pack(
                "<4s6H3L5H2L",
                b"PK\1\2",
                20,
                20,
                0,
                0,
                0,
                0,
                crc,
                len(data),
                len(data),
                len(name),
                0,
                0,
                0,
                0,
                0,
                at,
            )
            + name
        )
    number = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number, number, len(directory), len(body), 0)
    return body + directory + end


NESTED = zip_by_hand([(b"a", b"x" * 100, -1)])[:-22]
LIES: dict[str, tuple[bytes, str]] = {
    "same-bytes-twice": (zip_by_hand([(b"a", b"x" * 100, -1), (b"a", b"x" * 100, 0)]), "overlap"),
    # The first entry holds the whole of the second one, its header included.
    # What is in front of the content of the first one holds the whole of the second one.
    "quoted-as-extra": (
        zip_by_hand([(b"a", b"x" * 90, -1), (b"b", b"y" * 200, -1)]).replace(
            b"\x01\x00\x00\x00a", b"\x01\x00\x5a\x00a", 1
        ),
        "overlap",
    ),
    "content-in-the-directory": (
        zip_by_hand([(b"a", b"x" * 90, -1)]).replace(b"\x01\x00\x00\x00a", b"\x01\x00\x09\x00a", 1),
        "is not inside it",
    ),
    "quoted": (zip_by_hand([(b"b", NESTED, -1), (b"a", b"x" * 100, 31)]), "overlap"),
    "fewer-than-told": (zip_by_hand([(b"a", b"1", -1)], count=2), "fewer entries"),
    "more-than-told": (zip_by_hand([(b"a", b"1", -1), (b"b", b"2", -1)], count=1), "more entries"),
    "many-told": (zip_by_hand([(b"a", b"1", -1)], count=65534), "fewer entries"),
    "outside": (zip_by_hand([(b"a", b"1", -1), (b"b", b"2", 10_000)]), "is not inside it"),
    "other-name-in-front": (zip_by_hand([(b"a", b"1", -1)]).replace(b"a", b"b", 1), "contradict"),
    "behind": (zip_by_hand([(b"a", b"1", -1)]) + b"x", "something follows"),
    "several-parts": (
        zip_by_hand([(b"a", b"1", -1)])[:-18] + b"\1" + zip_by_hand([(b"a", b"1", -1)])[-17:],
        "several parts",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_zip_that_lies_is_refused(tmp_path: Path, kind: str) -> None:
    data, reason = LIES[kind]
    (tmp_path / "m.zip").write_bytes(data)
    with pytest.raises(InvalidInput, match=reason):
        extract_archive(tmp_path / "m.zip", tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.zip"]


def test_an_honest_zip_by_hand_is_extracted(tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(zip_by_hand([(b"a", b"1", -1), (b"b", b"2", -1)]))
    extract_archive(tmp_path / "m.zip", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "b"]


@pytest.mark.parametrize("ratio", [200.0, 2000.0])
def test_the_ratio_of_one_member_counts_too(tmp_path: Path, ratio: float) -> None:
    # Among incompressible bytes, the archive as a whole looks harmless.
    data = zip_by_hand([(b"a", b"1" * 1000, -1)])
    at = data.rindex(b"PK\1\2")
    lying = data[: at + 24] + struct.pack("<L", 2**31) + data[at + 28 :]
    (tmp_path / "m.zip").write_bytes(lying)
    with pytest.raises(InvalidInput, match="1000 bytes that become 2147483648"):
        extract_archive(tmp_path / "m.zip", tmp_path / "out", limits=ExtractionLimits(ratio=ratio))


# -- memory and time -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["records", "names", "chain", "directory", "members"])
def test_headers_cost_no_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    if kind == "directory":
        path.write_bytes(zip_by_hand([(b"n" * 100, b"", -1)] * 30_000))
    elif kind == "members":
        path.write_bytes(zstandard.compress(b"".join(map(folder_header, range(50_000))) + END))
    else:
        compressor = zstandard.ZstdCompressor(level=1).compressobj()
        size = 2**31
        first = header(b"p", size, b"L" if kind == "names" else b"x")
        data = compressor.compress(first)
        if kind == "chain":
            data = compressor.compress((header(b"L", 2, b"L") + padded(b"a\0")) * 200_000)
        else:
            data += b"".join(compressor.compress(b"9" * 2**24) for _ in range(size >> 24))
        path.write_bytes(data + compressor.flush())
    script = (
        "import sys\nfrom storage.container.archives.extract import extract_archive\n"
        "try:\n    extract_archive(sys.argv[1], sys.argv[2])\nexcept ValueError as exc:\n"
        "    print(exc, file=sys.stderr)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path, tmp_path / "out"],
        cwd=Path(extract.__file__).parents[2],
        capture_output=True,
        check=True,
        timeout=200,
    )
    assert (tmp_path / "out").exists() == (kind in ("directory", "members"))
    assert int(done.stdout) < 160 * 1024
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def folder_header(number: int) -> bytes:
    return header(b"a/b/%d" % (number % 50), 0, b"5")


# -- any bytes -------------------------------------------------------------------------------


def corpus() -> list[bytes]:
    files = {"a": b"x" * 700, "d/" + "l" * 120 + "/" + "k" * 60: b"y", "é": b"z"}
    plain = tar(files)
    sparse = pax(GNU__sparse__map="0,3,9,3", GNU__sparse__size="20")
    sparse += header(b"s", 6) + padded(b"abcdef")
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    return [
        plain,
        tar(files, tarfile.GNU_FORMAT),
        header(b"f", 3)
        + padded(b"abc")
        + header(b"l", 0, b"2", b"f")
        + header(b"h", 0, b"1", b"f")
        + sparse
        + sparse_bomb(1000),
        gzip.compress(plain),
        bz2.compress(plain),
        lzma.compress(plain),
        zstandard.compress(plain[:1500]) + zstandard.compress(plain[1500:]),
        *(zip_of(method, files) for method in methods),
    ]


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        end = len(changed) if chance.random() < 0.5 else min(len(changed), 1600)
        at = chance.randrange(end + 1)
        how = chance.randrange(5)
        if how == 0:
            del changed[at : at + chance.choice((1, 9, 512))]
        elif how == 1:
            changed[at:at] = changed[: chance.choice((1, 40, 512))]
        elif how == 2:
            changed[at : at + 4] = chance.choice((b"\xff" * 4, bytes(4), b"\0\0\0\x80"))
        else:
            changed[at : at + 1] = bytes((chance.randrange(256),))
    if changed[257:262] == b"ustar":
        # Most changes are seen only where the checksum does not tell of them.
        for at in range(0, len(changed) - 511, 512):
            if changed[at + 257 : at + 262] == b"ustar":
                changed[at + 148 : at + 156] = b" " * 8
                changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_are_extracted_or_refused(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    archives = corpus()
    outcomes = set()
    limits = ExtractionLimits(total_size=10_000_000, entries=1000)
    for _ in range(150 * SOAK):
        data = mutated(chance.choice(archives), chance)
        (tmp_path / "m").write_bytes(data)
        try:
            extract_archive(tmp_path / "m", tmp_path / "out", limits=limits)
        except InvalidInput as exc:
            outcomes.add("refused" if "\n" not in str(exc) else str(exc))
        else:
            outcomes.add("extracted")
            shutil.rmtree(tmp_path / "out")
        assert os.listdir(tmp_path) == ["m"]
    assert outcomes == {"refused", "extracted"}


def test_no_archive_of_the_corpus_is_refused_as_it_is(tmp_path: Path) -> None:
    for number, data in enumerate(corpus()):
        (tmp_path / "m").write_bytes(data)
        extract_archive(tmp_path / "m", tmp_path / f"out{number}")
        assert os.listdir(tmp_path / f"out{number}")
