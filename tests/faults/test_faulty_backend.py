"""Whatever a store does, for every seed: a version that it really had, or an error and nothing.

A flipped byte of an object that nobody vouches for cannot be seen by anybody. So the file
system, which tells no digests, gets flips only where the caller expects a digest; and where
a copy has to rely on what ``stat`` said, flips and answers without an entity tag do not meet.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from storage.backends.base import Backend, Body, ObjectInfo, bytes_payload
from storage.backends.memory import MemoryBackend
from storage.cache.verify import verify
from storage.digest import Digest, tree_digest
from storage.errors import ObjectExistsError, StorageError
from tests.faults.examples import (
    BIG,
    LARGE,
    OLD,
    TREE,
    Bucket,
    Client,
    Example,
    Mix,
    S3Bucket,
    example,
)
from tests.transfer.support import (
    Wrapped,
    everything_in,
    files_of,
    put_all,
    write_tree,
)

# -- downloads -----------------------------------------------------------------------------


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


DIGEST_OF_TREE = tree_digest(
    {path: Digest("sha256", hashlib.sha256(data).hexdigest()) for path, data in TREE.items()}
)


@example
def test_a_tree(make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, mix: Mix) -> None:
    bucket = make_bucket(store)
    if not bucket.vouches:
        mix = mix.without("flip")
    with Example(bucket, mix, tmp_path) as case:
        case.put(TREE)
        try:
            case.client.download(case.uri(), case.dest)
        except StorageError as exc:
            case.check_error(exc)
            case.check_nothing_here()
        else:
            case.check_tree(case.dest)
            assert os.listdir(case.place) == ["model"]


@pytest.mark.parametrize("path", ["config.json", BIG])
@example
def test_one_object(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, path: str, mix: Mix
) -> None:
    bucket = make_bucket(store)
    if not bucket.vouches:
        mix = mix.without("flip")
    with Example(bucket, mix, tmp_path) as case:
        case.put({path: TREE[path]})
        case.dest.write_bytes(OLD)
        try:
            case.client.download(case.uri(path), case.dest)
        except StorageError as exc:
            case.check_error(exc)
            assert case.dest.read_bytes() == OLD
        else:
            assert case.dest.read_bytes() in case.versions(path)
        assert os.listdir(case.place) == ["model"]


@pytest.mark.parametrize("path", ["", "config.json", BIG])
@example
def test_what_is_expected(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, path: str, mix: Mix
) -> None:
    with Example(make_bucket(store), mix, tmp_path) as case:
        case.put(TREE)
        digest = digest_of(TREE[path]) if path else DIGEST_OF_TREE
        try:
            case.client.download(case.uri(path), case.dest, digest=digest)
        except StorageError as exc:
            case.check_error(exc)
            case.check_nothing_here()
        else:
            assert (files_of(case.dest) if not path else case.dest.read_bytes()) == (
                TREE if not path else TREE[path]
            )


@example
def test_the_cache(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, mix: Mix
) -> None:
    bucket = make_bucket(store)
    if not bucket.vouches:
        mix = mix.without("flip")
    with Example(bucket, mix, tmp_path) as case:
        case.put(TREE)
        for _ in range(2):
            try:
                case.check_tree(Path(case.client.download(case.uri())))
            except StorageError as exc:
                case.check_error(exc)
                assert not case.cache.exists() or everything_in(case.cache / "partial") == []
        if case.cache.exists():
            assert verify(case.client.cache, full=True).problems == ()


@example
def test_an_archive(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, mix: Mix
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, data in TREE.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    # What replaces an archive would be none, and refused as such.
    bucket = make_bucket(store)
    mix = mix.without("replace", "resize", *(() if bucket.vouches else ("flip",)))
    with Example(bucket, mix, tmp_path) as case:
        case.put({"model.tar.gz": packed.getvalue()})
        try:
            case.client.download(case.uri("model.tar.gz"), case.dest, unpack=True)
        except StorageError as exc:
            case.check_error(exc)
            case.check_nothing_here()
        else:
            assert files_of(case.dest) == TREE


def test_a_flipped_byte_is_seen_although_the_object_is_replaced_before_anybody_asks(
    s3_bucket: S3Bucket, tmp_path: Path
) -> None:
    """The entity tag of another object says nothing, not even that all is well."""
    new = b"another version"

    class Neighbour(Wrapped):
        asked = 0

        def read(self, *args: Any) -> Body:
            body = self.inner.read(*args)
            data = bytearray(b"".join(bytes(chunk) for chunk in body))
            if not self.asked:
                data[0] ^= 1
            return Body(body.info, iter([bytes(data)]))

        def is_digest(self, info: ObjectInfo) -> bool:
            self.asked += 1
            self.inner.write(info.key, bytes_payload(new))
            return self.inner.is_digest(info)

    with Example(s3_bucket, Mix(0, (), 0.0), tmp_path) as case:
        case.put({"model": b"weights"})
        backend = Neighbour(s3_bucket.backend)
        client = Client(cast("Backend", backend), case.inner, case.cache)
        assert Path(client.download(case.uri("model"), case.dest)).read_bytes() == new
        assert backend.asked == 1


# -- uploads -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [{}, {"config.json": OLD, BIG: OLD}], ids=["new", "old"])
@example
def test_upload_of_a_tree(
    make_bucket: Callable[[str], Bucket],
    tmp_path: Path,
    store: str,
    before: Mapping[str, bytes],
    mix: Mix,
) -> None:
    with Example(make_bucket(store), mix, tmp_path) as case:
        case.put(before)
        source = write_tree(case.folder / "source", TREE)
        try:
            assert case.client.upload(source, case.uri())
        except StorageError as exc:
            case.check_error(exc)
            # Each object is there as a whole, or what was there before.
            for path, data in case.stored().items():
                assert data in (TREE[path], before.get(path)), path
            assert before.keys() <= case.stored().keys()
        else:
            assert case.stored() == TREE
        assert case.bucket.litter() == []


@pytest.mark.parametrize("data", [b"", b"small", LARGE], ids=["empty", "small", "large"])
@pytest.mark.parametrize("before", [None, OLD], ids=["new", "old"])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "create"])
@example
def test_upload_of_one_object(
    make_bucket: Callable[[str], Bucket],
    tmp_path: Path,
    store: str,
    data: bytes,
    before: bytes | None,
    overwrite: bool,
    mix: Mix,
) -> None:
    with Example(make_bucket(store), mix, tmp_path) as case:
        old = {} if before is None else {"model": before}
        case.put(old)
        source = case.folder / "source"
        source.write_bytes(data)
        try:
            assert case.client.upload(source, case.uri("model"), overwrite=overwrite)
            assert overwrite or before is None
        except ObjectExistsError:
            assert not overwrite
            # A store that keeps no digests cannot tell who wrote what is there.
            mine = not case.inner.capabilities.metadata and case.faulty.happened
            assert case.stored() == old or (mine and case.stored() == {"model": data})
        except StorageError as exc:
            case.check_error(exc)
            assert case.stored() in (old, {"model": data})
            assert overwrite or before is None or case.stored() == old
        else:
            assert case.was_written("model", data)
        assert case.bucket.litter() == []


# -- copies --------------------------------------------------------------------------------

# A copy knows of an object what stat said of it; see above.
VOUCHED = pytest.mark.parametrize("missing", ["flip", "anonymous"])


@pytest.mark.parametrize("path", ["", BIG])
@example
def test_copy_by_the_store(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, path: str, mix: Mix
) -> None:
    mix = mix.without("flip")
    with Example(make_bucket(store), mix, tmp_path) as case:
        below = {f"from/{name}": data for name, data in TREE.items() if name.startswith(path)}
        case.put(below)
        try:
            assert case.client.copy_object(case.uri(f"from/{path}"), case.uri(f"to/{path}"))
        except StorageError as exc:
            case.check_error(exc)
            done = False
        else:
            done = True
        found = case.stored()
        copied = {name for name in found if name.startswith("to/")}
        for name in copied:
            assert found[name] in case.versions(f"from/{name.removeprefix('to/')}")
        assert not done or copied == {name.replace("from/", "to/") for name in below}
        assert case.bucket.litter() == []


@VOUCHED
@pytest.mark.parametrize("path", ["", BIG])
@example
def test_copy_to_another_store(
    make_bucket: Callable[[str], Bucket],
    tmp_path: Path,
    store: str,
    path: str,
    missing: str,
    mix: Mix,
) -> None:
    bucket = make_bucket(store)
    mix = mix.without(missing, *(() if bucket.vouches else ("flip",)))
    with Example(bucket, mix, tmp_path) as case:
        below = {name: data for name, data in TREE.items() if name.startswith(path)}
        case.put(below)
        try:
            assert case.client.copy_object(case.uri(path), f"gs://far/{path or 'to'}")
        except StorageError as exc:
            case.check_error(exc)
            done = False
        else:
            done = True
        far = MemoryBackend(case.prefix)
        far.write("known", bytes_payload(b""))
        copied = {info.key.removeprefix("to/"): info.key for info in far.list()}
        del copied["known"]
        for name, key in copied.items():
            data = b"".join(bytes(chunk) for chunk in far.read(key))
            assert data in case.versions(name)
        assert not done or copied.keys() == below.keys()


@pytest.mark.parametrize("path", ["", BIG])
@example
def test_copy_from_another_store(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, path: str, mix: Mix
) -> None:
    with Example(make_bucket(store), mix, tmp_path) as case:
        below = {name: data for name, data in TREE.items() if name.startswith(path)}
        far = MemoryBackend(case.prefix)
        put_all(far, {f"from/{name}": data for name, data in below.items()})
        try:
            assert case.client.copy_object(f"gs://far/from/{path}", case.uri(path))
        except StorageError as exc:
            case.check_error(exc)
            for name, data in case.stored().items():
                assert data == below[name]
        else:
            assert case.stored() == below
        assert case.bucket.litter() == []


# -- files ---------------------------------------------------------------------------------


@example
def test_open_to_read(
    make_bucket: Callable[[str], Bucket], tmp_path: Path, store: str, mix: Mix
) -> None:
    # It is read in pieces, in any order, so that no digest can be compared.
    with Example(make_bucket(store), mix.without("flip"), tmp_path) as case:
        case.put({BIG: TREE[BIG]})
        read = bytearray()
        try:
            with case.client.open(case.uri(BIG)) as file:
                while piece := file.read(10_000):
                    read += piece
        except StorageError as exc:
            case.check_error(exc)
            # Not a byte of what came before it is of another version.
            assert any(version.startswith(read) for version in case.versions(BIG))
        else:
            assert read in case.versions(BIG)


@pytest.mark.parametrize("mode", ["wb", "xb"])
@pytest.mark.parametrize("before", [None, OLD], ids=["new", "old"])
@example
def test_open_to_write(
    make_bucket: Callable[[str], Bucket],
    tmp_path: Path,
    store: str,
    mode: str,
    before: bytes | None,
    mix: Mix,
) -> None:
    with Example(make_bucket(store), mix, tmp_path) as case:
        old = {} if before is None else {"model": before}
        case.put(old)
        new = {"model": TREE[BIG]}
        try:
            with case.client.open(case.uri("model"), mode) as file:
                file.write(TREE[BIG])
            assert mode == "wb" or before is None
        except ObjectExistsError:
            assert mode == "xb"
            assert case.stored() == old or (before is None and case.faulty.happened)
        except StorageError as exc:
            case.check_error(exc)
            assert case.stored() in (old, new)
            assert mode == "wb" or before is None or case.stored() == old
        else:
            assert case.was_written("model", TREE[BIG])
        assert case.bucket.litter() == []
