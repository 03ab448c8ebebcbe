"""Archives of ``arkindex-base-worker`` are extracted here, and ours there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from storage.container import create_archive, extract_archive
from tests.peers import trees
from tests.peers.environments import Peer

# The peer writes all the zeros, twice, and packs them 1 KiB at a time: 5 GiB take two minutes.
SPARSE = (5 if os.environ.get("STORAGE_SOAK") == "1" else 1) * 1024**3
kinds = pytest.mark.parametrize("name", trees.TREES)


@kinds
def test_theirs_is_extracted_here(arkindex: Peer, tmp_path: Path, name: str) -> None:
    root = trees.make(name, tmp_path)
    archive, target = tmp_path / "theirs.tar.zst", tmp_path / "out"
    reported = arkindex("create", folder=root, target=archive)
    extract_archive(archive, target)
    assert trees.seen(target) == trees.seen(root)
    assert reported["size"] == archive.stat().st_size
    assert reported["archive_hash"] == hashlib.md5(archive.read_bytes()).hexdigest()


@kinds
def test_ours_is_extracted_there(arkindex: Peer, tmp_path: Path, name: str) -> None:
    root = trees.make(name, tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    with create_archive(root) as (archive, _, size, archive_hash):
        arkindex("extract", archive=archive, folder=target)
        assert size == archive.stat().st_size
        assert archive_hash == arkindex("md5", path=archive)
    assert trees.seen(target) == trees.seen(root)


@kinds
def test_the_content_has_the_same_hash_on_both_sides(
    arkindex: Peer, tmp_path: Path, name: str
) -> None:
    root = trees.make(name, tmp_path)
    theirs, ours = tmp_path / "theirs.tar.zst", tmp_path / "ours.tar.zst"
    reported = arkindex("create", folder=root, target=theirs)
    made = create_archive(root, ours)
    if "content_hash" in reported:
        assert made.content_hash == reported["content_hash"]
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    extract_archive(theirs, here)
    arkindex("extract", archive=ours, folder=there)
    # A copy that went through the other side is the same model, down to the archive's bytes.
    for copy in (here, there):
        again = create_archive(copy, tmp_path / f"{copy.name}.tar.zst")
        assert (again.content_hash, again.archive_hash) == (made.content_hash, made.archive_hash)


@pytest.mark.slow
@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_a_large_sparse_file_passes_between_the_two(
    newest_arkindex: Peer, roomy: Path, maker: str
) -> None:
    root, archive, target = roomy / "tree", roomy / "model.tar.zst", roomy / "out"
    root.mkdir()
    trees.sparse(root, SPARSE)
    if maker == "ours":
        create_archive(root, archive)
        target.mkdir()
        newest_arkindex("extract", archive=archive, folder=target)
    else:
        newest_arkindex("create", folder=root, target=archive)
        extract_archive(archive, target)
    assert trees.seen(target) == trees.seen(root)
