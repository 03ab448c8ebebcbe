"""Digests: of bytes, of files, of trees, against hashlib and coreutils."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import digest
from storage.digest import (
    ALGORITHMS,
    Digest,
    MultiHasher,
    available,
    hash_file,
    new_hasher,
    tree_digest,
)
from storage.errors import ConfigurationError, InvalidInput


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("sha256:" + "a" * 64, "sha256"),
        ("sha256=" + "A" * 64, "sha256"),
        ("b" * 64, "sha256"),
        (" blake3:" + "c" * 64 + " ", "blake3"),
        ("md5:" + "d" * 32, "md5"),
    ],
)
def test_digest_is_read(text: str, algorithm: str) -> None:
    digest = Digest.parse(text)
    assert digest.algorithm == algorithm
    assert Digest.parse(str(digest)) == digest
    assert Digest.parse(digest) is digest


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:12", "crc32:12345678", "x" * 64, "a" * 63])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Digest.parse(text)


@given(st.binary(max_size=5000))
def test_hash_equals_that_of_hashlib(data: bytes) -> None:
    found = hash_file(io.BytesIO(data), ("sha256", "md5", "blake3"))
    assert found["sha256"].hex == hashlib.sha256(data).hexdigest()
    assert found["md5"].hex == hashlib.md5(data).hexdigest()
    blake3 = new_hasher("blake3")
    blake3.update(data)
    assert found["blake3"].hex == blake3.hexdigest()


def test_every_algorithm_hashes() -> None:
    hasher = MultiHasher(ALGORITHMS)
    hasher.update(b"a")
    hasher.update(memoryview(b"bc"))
    digests = hasher.digests()
    assert set(digests) == set(ALGORITHMS)
    # The first vector of the BLAKE3 and SHA-2 papers.
    assert digests["sha256"].hex.startswith("ba7816bf8f01cfea")
    assert digests["blake3"].hex.startswith("6437b3ac38465133")


# The check values that the catalogues of CRCs give for these nine digits.
@pytest.mark.parametrize(
    ("algorithm", "check"), [("crc32c", "e3069283"), ("crc64nvme", "ae8b14860a799888")]
)
def test_checksums_of_stores_are_computed(algorithm: str, check: str) -> None:
    hasher = new_hasher(algorithm)
    for piece in (b"12", bytearray(b"345"), memoryview(b"x678x")[1:-1], b"", b"9"):
        hasher.update(piece)
    assert hasher.hexdigest() == check
    assert new_hasher(algorithm).hexdigest() == "0" * len(check)
    assert Digest.parse(f"{algorithm}:{check}").hex == check


def test_all_algorithms_are_available_here() -> None:
    assert all(map(available, ALGORITHMS))
    assert not available("crc32")


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme"])
def test_checksum_without_its_package_is_not_available(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("google_crc32c", "awscrt"):
        monkeypatch.setitem(sys.modules, package, None)
    for found in (digest._crc32c, digest._crc64nvme):
        found.cache_clear()
    try:
        assert not available(algorithm)
        with pytest.raises(ConfigurationError, match="awscrt"):
            new_hasher(algorithm)
    finally:
        for found in (digest._crc32c, digest._crc64nvme):
            found.cache_clear()


def test_crc32c_is_the_same_by_either_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 9000
    first = hash_file(io.BytesIO(data), ("crc32c",))
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    digest._crc32c.cache_clear()
    try:
        assert hash_file(io.BytesIO(data), ("crc32c",)) == first
    finally:
        digest._crc32c.cache_clear()


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(InvalidInput, match="crc32"):
        new_hasher("crc32")


def test_progress_of_hashing_adds_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3_000_000)
    pieces: list[int] = []
    hash_file(file, ("blake3",), pieces.append)
    assert sum(pieces) == 3_000_000
    assert len(pieces) > 1


def test_tree_digest_is_what_coreutils_say(tmp_path: Path) -> None:
    names = ["a", "b/c", "B", "é", "sp ace", "b\\s", "b/\nline", "b/\rreturn"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() * 3)
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    answer = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    files = {name: hash_file(tmp_path / name, ("sha256",))["sha256"] for name in names}
    assert tree_digest(files) == Digest("sha256", answer.split()[0])


def test_tree_digest_needs_digests_of_its_algorithm() -> None:
    with pytest.raises(InvalidInput, match="sha256"):
        tree_digest({"a": Digest("md5", "0" * 32)})
