"""Expected digests, of objects and trees: right ones pass, wrong ones publish nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from storage import (
    Digest,
    IntegrityError,
    InvalidInput,
    Storage,
    StorageClient,
    StorageOperations,
    tree_digest,
)
from tests.facade.stores import Store, cached_content, needs, tree_bytes

DATA = b"weights" * 1000
HASHES: dict[str, Callable[[bytes], str]] = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "blake3": lambda data: blake3(data).hexdigest(),
}
TREE = {
    "model.bin": DATA,
    "empty": b"",
    "a b/%41+[1]#é": b"odd",
    # Sorted by bytes, not by folder: "a-b" comes before "a/", "a b" before both.
    "a-b": b"1",
    "a/b": b"2",
    "a.b": b"3",
    "back\\slash": b"escaped by coreutils",
}


def shell_digest(folder: str) -> str:
    """Ask coreutils for the digest of a tree, in the words of the library's documentation."""
    done = subprocess.run(
        [
            "sh",
            "-c",
            r"find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()[0]


@pytest.mark.parametrize("algorithm", HASHES)
def test_the_right_digest_passes(store: Store, out: Path, algorithm: str) -> None:
    store.put_raw("model.bin", DATA)
    digest, uri, config = HASHES[algorithm](DATA), store.uri("model.bin"), store.config
    fragment = f"{uri}#{algorithm}={digest}"
    for path in (
        Storage.download(fragment, out / "a", config=config),
        Storage.download(fragment, config=config),
        Storage.download(fragment, config=config),
        Storage.download(f"{uri}#{algorithm}={digest.upper()}", out / "b", config=config),
        Storage.download(uri, out / "c", config=config, digest=f"{algorithm}:{digest}"),
        Storage.download(uri, out / "d", config=config, digest=f"{algorithm}={digest}"),
        Storage.download(uri, out / "e", config=config, digest=Digest(algorithm, digest)),
        Storage.download(fragment, out / "f", config=config, digest=f"{algorithm}:{digest}"),
    ):
        assert Path(path).read_bytes() == DATA
    assert sorted(os.listdir(out)) == list("abcdef")


@pytest.mark.parametrize("algorithm", HASHES)
def test_the_wrong_digest_publishes_nothing(store: Store, out: Path, algorithm: str) -> None:
    store.put_raw("model.bin", DATA)
    wrong, uri, config = HASHES[algorithm](b"other"), store.uri("model.bin"), store.config
    for expected in (f"{uri}#{algorithm}={wrong}",):
        for dest in (out / "a", f"{out}/folder/", None):
            with pytest.raises(IntegrityError) as caught:
                Storage.download(expected, dest, config=config)
            # What was expected and what was found.
            assert wrong in str(caught.value)
            assert HASHES[algorithm](DATA) in str(caught.value)
    with pytest.raises(IntegrityError):
        Storage.download(uri, out / "a", config=config, digest=f"{algorithm}:{wrong}")
    assert os.listdir(out) == []
    assert cached_content() == []


def test_a_bare_digest_is_a_sha256(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", DATA)
    path = Storage.download(store.uri("model.bin"), digest=HASHES["sha256"](DATA))
    assert Path(path).read_bytes() == DATA


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha512"])
def test_other_algorithms_may_be_expected_by_argument(
    make_store: Callable[[str], Store], out: Path, algorithm: str
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", DATA)
    digest = hashlib.new(algorithm, DATA).hexdigest()
    Storage.download(store.uri("model.bin"), out / "a", digest=f"{algorithm}:{digest}")
    with pytest.raises(IntegrityError):
        Storage.download(
            store.uri("model.bin"), out / "b", digest=f"{algorithm}:{'0' * len(digest)}"
        )
    assert os.listdir(out) == ["a"]


def test_a_digest_that_was_right_once_is_checked_again(store: Store, out: Path) -> None:
    store.put_raw("model.bin", DATA)
    uri, config = store.uri("model.bin"), store.config
    Storage.download(uri, config=config)
    for _ in range(2):
        with pytest.raises(IntegrityError):
            Storage.download(uri, config=config, digest="sha256:" + "0" * 64)
    if not store.lacks("remote"):
        with pytest.raises(IntegrityError):
            Storage.download(uri, config=config, digest="sha256:" + "0" * 64, offline=True)
        with pytest.raises(IntegrityError):
            Storage.download(
                uri, out / "a", config=config, digest="sha256:" + "0" * 64, offline=True
            )
    assert os.listdir(out) == []
    path = Storage.download(uri, config=config, digest="sha256:" + HASHES["sha256"](DATA))
    assert Path(path).read_bytes() == DATA


def test_two_digests_that_differ_are_refused(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", DATA)
    uri = f"{store.uri('model.bin')}#sha256={'0' * 64}"
    with pytest.raises(InvalidInput, match="drop one"):
        Storage.download(uri, digest="sha256:" + "1" * 64)


@pytest.mark.parametrize(
    "digest", ["", "sha256:abc", "crc32:00000000", "sha256:" + "g" * 64, "nonsense", "0" * 63]
)
def test_what_is_no_digest_is_refused(
    make_store: Callable[[str], Store], out: Path, digest: str
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", DATA)
    with pytest.raises(InvalidInput):
        Storage.download(store.uri("model.bin"), out / "a", digest=digest)
    assert os.listdir(out) == []


# -- trees -----------------------------------------------------------------------------------


def test_the_digest_of_a_tree_is_what_coreutils_say(store: Store, out: Path) -> None:
    files = {path: data for path, data in TREE.items() if store.holds(path)}
    store.put_all({f"tree/{path}": data for path, data in files.items()})
    uri, config = store.uri("tree"), store.config
    plain = Storage.download(uri, out / "plain", config=config)
    expected = shell_digest(plain)
    by_hand = tree_digest(
        {path: Digest("sha256", HASHES["sha256"](data)) for path, data in files.items()}
    )
    assert str(by_hand) == f"sha256:{expected}"
    for path in (
        Storage.download(uri, out / "a", config=config, digest=f"sha256:{expected}"),
        Storage.download(f"{uri}#sha256={expected}", out / "b", config=config),
        Storage.download(f"{uri}/#sha256={expected}", config=config),
        Storage.download(uri, config=config, digest=by_hand),
    ):
        assert tree_bytes(path) == files


@pytest.mark.parametrize("algorithm", HASHES)
def test_the_wrong_digest_of_a_tree_publishes_nothing(
    store: Store, out: Path, algorithm: str
) -> None:
    store.put_all({"tree/a": b"1", "tree/b": b"2"})
    uri, config = store.uri("tree"), store.config
    right = tree_digest(
        {
            name: Digest(algorithm, HASHES[algorithm](data))
            for name, data in (("a", b"1"), ("b", b"2"))
        },
        algorithm,
    )
    assert tree_bytes(Storage.download(uri, out / "right", config=config, digest=right))
    store.put_raw("tree/b", b"3")
    for dest in (out / "wrong", None):
        with pytest.raises(IntegrityError) as caught:
            Storage.download(uri, dest, config=config, digest=right)
        assert right.hex in str(caught.value)
    assert os.listdir(out) == ["right"]


def test_the_digest_of_a_tree_sees_names_and_missing_files(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_all({"one/a": b"1", "one/b": b"", "two/a": b"1", "three/a": b"1", "three/c": b""})
    digest = tree_digest(
        {name: Digest("sha256", HASHES["sha256"](data)) for name, data in (("a", b"1"), ("b", b""))}
    )
    Storage.download(store.uri("one"), out / "one", digest=digest)
    for other in ("two", "three"):
        with pytest.raises(IntegrityError):
            Storage.download(store.uri(other), out / other, digest=digest)
    # Patterns choose first: the digest is that of the files that arrive.
    with pytest.raises(IntegrityError):
        Storage.download(store.uri("one"), out / "part", digest=digest, allow_patterns="a")
    assert os.listdir(out) == ["one"]


# -- digests that come with an object --------------------------------------------------------


@needs("metadata")
@pytest.mark.parametrize("algorithm", HASHES)
def test_a_tampered_object_is_never_handed_over(store: Store, out: Path, algorithm: str) -> None:
    store.put_described("tree/model.bin", b"tampered", {algorithm: HASHES[algorithm](DATA)})
    store.put_raw("tree/other", b"fine")
    for path in ("tree/model.bin", "tree"):
        for dest in (out / "a", None):
            with pytest.raises(IntegrityError, match=HASHES[algorithm](b"tampered")):
                Storage.download(store.uri(path), dest, config=store.config)
    assert os.listdir(out) == []


@needs("metadata")
def test_a_tampered_object_is_not_copied_elsewhere(store: Store, out: Path) -> None:
    store.put_described("model.bin", b"tampered", {"sha256": HASHES["sha256"](DATA)})
    with pytest.raises(IntegrityError):
        StorageOperations.copy_object(
            store.uri("model.bin"), str(out / "copy"), config=store.config
        )
    assert os.listdir(out) == []


@needs("metadata")
def test_metadata_of_others_is_no_digest(store: Store, out: Path) -> None:
    store.put_described("model.bin", DATA, {"sha256": "unknown", "blake3": "", "kind": "iris"})
    path = Storage.download(store.uri("model.bin"), out / "a", config=store.config)
    assert Path(path).read_bytes() == DATA
    found = StorageOperations.get_object_metadata(store.uri("model.bin"), config=store.config)
    assert found["metadata"]["kind"] == "iris"
    assert not {"sha256", "blake3"} & found["digests"].keys()


@pytest.mark.parametrize("size", [1024 * 1024, 1024 * 1024 + 1, 3_500_000])
def test_digests_of_objects_in_parts_are_checked(
    store: Store, small_parts: StorageClient, out: Path, size: int
) -> None:
    data = os.urandom(size)
    store.put_raw("model.bin", data)
    uri, config = store.uri("model.bin"), store.config
    for algorithm, digest_of in HASHES.items():
        digest = f"{algorithm}:{digest_of(data)}"
        path = small_parts.download(uri, out / algorithm, config=config, digest=digest)
        assert Path(path).read_bytes() == data
        with pytest.raises(IntegrityError):
            small_parts.download(uri, out / "no", config=config, digest=f"{algorithm}:{'0' * 64}")
    assert sorted(os.listdir(out)) == ["blake3", "sha256"]


# -- where a digest is of no use -------------------------------------------------------------


def test_a_copy_checks_the_digest_of_its_source(store: Store) -> None:
    store.put_raw("model.bin", DATA)
    uri, config = store.uri("model.bin"), store.config
    right, wrong = HASHES["sha256"](DATA), "0" * 64
    with pytest.raises(IntegrityError):
        StorageOperations.copy_object(f"{uri}#sha256={wrong}", store.uri("copy"), config=config)
    assert store.keys() == ["model.bin"]
    StorageOperations.copy_object(f"{uri}#sha256={right}", store.uri("copy"), config=config)
    assert store.get_raw("copy") == DATA
    store.put_raw("tree/f", b"1")
    with pytest.raises(InvalidInput, match="tree"):
        StorageOperations.copy_object(
            f"{store.uri('tree')}#sha256={right}", store.uri("copied"), config=config
        )


def test_a_digest_of_what_is_to_be_written_or_deleted_is_refused(
    store: Store, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    store.put_raw("f", b"1")
    uri, config = f"{store.uri('f')}#sha256={'0' * 64}", store.config
    for operation in (
        lambda: Storage.upload(source, uri, config=config),
        lambda: Storage.open(uri, "wb", config=config),
        lambda: StorageOperations.delete_object(uri, config=config),
        lambda: StorageOperations.copy_object(store.uri("f"), uri, config=config),
    ):
        with pytest.raises(InvalidInput, match="digest"):
            operation()
    assert store.get_raw("f") == b"1"
