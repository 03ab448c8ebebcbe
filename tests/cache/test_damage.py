"""Whatever happens to the files of a cache: what is handed over is right, or nothing is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import DestinationError, OfflineError, StorageClient
from storage.cache.verify import verify
from tests.cache.conftest import MakeClient
from tests.cache.support import Source, blob_files, flip_byte, tree_bytes, wrong_blobs

MODEL = {"model.bin": b"weights" * 1000, "config/a.json": b"{}", "zero": b""}
LARGE = len(MODEL["model.bin"])

memory = pytest.mark.kinds("memory")


def large_blob(cache: Path) -> Path:
    return next(path for path in blob_files(cache) if path.stat().st_size == LARGE)


def writable(path: Path) -> Path:
    path.chmod(0o644)
    return path


def assert_healed(client: StorageClient, source: Source, cache: Path, uri: str) -> None:
    """See that the model is right, and known to be so without being fetched again."""
    for options in ({}, {"offline": True}, {"freshness": "cache-first"}):
        source.forget()
        path = client.download(uri, config=source.config, **options)
        assert tree_bytes(path) == MODEL
        assert source.bodies == []
    assert wrong_blobs(cache) == []
    # What was missed on the way would be a problem.
    assert verify(client.cache, full=True).problems == ()


# -- blobs ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(writable(path), LARGE - 1)


def empty(path: Path) -> None:
    os.truncate(writable(path), 0)


def grow(path: Path) -> None:
    with open(writable(path), "ab") as file:
        file.write(b"more")


def fill_with_zeros(path: Path) -> None:
    writable(path).write_bytes(bytes(LARGE))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("mine")


def replace_by_a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_another_blob(path: Path) -> None:
    other = next(each for each in blob_files(path.parents[3]) if each != path)
    shutil.copy2(other, writable(path))


def with_its_times(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    def call(path: Path) -> None:
        times = path.stat()
        damage(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    call.__name__ = f"{damage.__name__}_with_its_times"
    return call


DAMAGES = [
    *(flip_byte, cut, empty, grow, fill_with_zeros),
    *(replace_by_folder, replace_by_a_link_to_nowhere, replace_by_another_blob),
    *(with_its_times(cut), with_its_times(grow)),
]


@memory
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_blob_is_not_served_and_fetched_again_by_itself(
    make_client: MakeClient, source: Source, cache: Path, damage: Callable[[Path], object]
) -> None:
    uri = source.put_model(MODEL)
    client = make_client()
    client.download(uri)
    damage(large_blob(cache))
    # Neither in this process nor in another one.
    for each in (client, make_client()):
        for options in ({"offline": True}, {"offline": True, "freshness": "cache-first"}):
            expected = "damaged|in part" if damage is replace_by_a_link_to_nowhere else "damaged"
            with pytest.raises(OfflineError, match=f"{expected}.*model.bin"):
                each.download(uri, **options)
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    assert source.bodies == ["model/model.bin"]
    assert_healed(client, source, cache, uri)


@pytest.mark.kinds("s3", "hub")
@pytest.mark.parametrize("freshness", ["revalidate", "cache-first"])
def test_of_a_damaged_model_one_body_is_fetched(
    client: StorageClient, source: Source, cache: Path, tmp_path: Path, freshness: str
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri, config=source.config)
    flip_byte(large_blob(cache), LARGE // 2)
    source.forget()
    path = client.download(uri, config=source.config, freshness=freshness)
    assert tree_bytes(path) == MODEL
    assert source.fetched == {"model/model.bin": LARGE}
    (put_away,) = (cache / "quarantine").iterdir()
    assert put_away.stat().st_size == LARGE
    assert_healed(client, source, cache, uri)


@pytest.mark.kinds("web")
def test_a_damaged_file_of_a_web_server_is_fetched_again(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_file("model.bin", MODEL["model.bin"])
    client.download(uri)
    flip_byte(large_blob(cache), -1)
    source.forget()
    assert Path(client.download(uri)).read_bytes() == MODEL["model.bin"]
    assert source.bodies == ["model.bin"]


@memory
@pytest.mark.parametrize("link", [None, "hardlink", "symlink"])
def test_no_destination_gets_what_is_damaged(
    client: StorageClient, source: Source, cache: Path, tmp_path: Path, link: str | None
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri)
    flip_byte(large_blob(cache))
    with pytest.raises(OfflineError, match="damaged"):
        client.download(uri, tmp_path / "off", offline=True, link=link)  # type: ignore[arg-type]
    assert not (tmp_path / "off").exists()
    source.forget()
    out = client.download(uri, tmp_path / "on", link=link)  # type: ignore[arg-type]
    assert tree_bytes(out) == MODEL
    assert source.bodies == ["model/model.bin"]


@memory
def test_whoever_writes_through_a_snapshot_damages_a_blob_and_is_found_out(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    other = source.put_model({"same.bin": MODEL["model.bin"]}, "other")
    path = Path(client.download(uri))
    client.download(other)
    with open(writable(path / "model.bin"), "r+b") as file:
        file.write(b"mine")
    for damaged in (uri, other):
        with pytest.raises(OfflineError, match="damaged"):
            client.download(damaged, offline=True)
    source.forget()
    assert tree_bytes(client.download(other)) == {"same.bin": MODEL["model.bin"]}
    assert source.bodies == ["other/same.bin"]
    # They share it, so it is right for both again.
    assert_healed(client, source, cache, uri)


@memory
def test_a_byte_that_rots_is_found_by_a_full_verification_and_repaired(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri)
    blob = large_blob(cache)
    flip_byte(blob, 3000, keep_times=True)
    (problem,) = verify(client.cache, full=True).problems
    assert (problem.kind, problem.uris) == ("blob", (uri,))
    assert problem.quarantined_to is not None
    assert Path(problem.quarantined_to).parent == cache / "quarantine"
    with pytest.raises(OfflineError, match="damaged"):
        client.download(uri, offline=True)
    source.forget()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "repaired")
    assert source.bodies == ["model/model.bin"]
    assert_healed(client, source, cache, uri)


@memory
def test_a_digest_is_compared_with_what_is_there(
    client: StorageClient, source: Source, cache: Path
) -> None:
    # Nothing is asked of the store where the digest is known, so the cache has to be right.
    uri = source.put_file("model.bin", MODEL["model.bin"])
    digest = f"sha256:{hashlib.sha256(MODEL['model.bin']).hexdigest()}"
    client.download(uri, digest=digest)
    flip_byte(large_blob(cache))
    source.forget()
    assert Path(client.download(uri, digest=digest)).read_bytes() == MODEL["model.bin"]
    assert source.bodies == ["model.bin"]


# -- snapshots -----------------------------------------------------------------------------


def lead_elsewhere(folder: Path) -> None:
    (folder / "model.bin").unlink()
    (folder.parents[1] / "mine").write_bytes(MODEL["model.bin"][::-1])
    (folder / "model.bin").symlink_to("../../mine")


SNAPSHOTS: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "an entry leads elsewhere": lead_elsewhere,
    "an entry is missing": lambda folder: (folder / "config/a.json").unlink(),
    "a folder is missing": lambda folder: shutil.rmtree(folder / "config"),
    "an extra file": lambda folder: (folder / "config/extra.json").write_bytes(b"mine"),
    "an extra folder": lambda folder: (folder / "logs").mkdir(),
    "no folder any more": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"mine")),
}


@memory
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_that_was_changed_is_made_anew(
    client: StorageClient, source: Source, cache: Path, name: str, offline: bool
) -> None:
    uri = source.put_model(MODEL)
    path = client.download(uri)
    SNAPSHOTS[name](Path(path))
    source.forget()
    assert client.download(uri, offline=offline) == path
    assert tree_bytes(path) == MODEL
    assert source.bodies == []
    assert_healed(client, source, cache, uri)


# -- notes ---------------------------------------------------------------------------------


def notes(cache: Path, folder: str) -> list[Path]:
    found = cache / folder
    return [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file()]


TEARS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-20],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
    "begin": lambda data: data[:1],
    "garbage": lambda data: b"\xff\n" * len(data),
}


@memory
@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("folder", ["VERSION", "manifests", "refs", "index"])
def test_a_torn_note_is_not_believed_and_healed_by_the_next_download(
    make_client: MakeClient, source: Source, cache: Path, folder: str, tear: str
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    found = notes(cache, folder)
    assert found
    for note in found:
        note.write_bytes(TEARS[tear](note.read_bytes()))
    client = make_client()
    if folder in ("manifests", "refs"):
        with pytest.raises(OfflineError, match="damaged"):
            client.download(uri, offline=True)
    else:
        # Nobody needs to know it.
        assert tree_bytes(client.download(uri, offline=True)) == MODEL
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    # What the content is, is told by more than one note.
    assert source.bodies == []
    assert_healed(client, source, cache, uri)


@memory
@pytest.mark.parametrize("tear", TEARS)
def test_with_all_notes_torn_everything_is_fetched_once(
    make_client: MakeClient, source: Source, cache: Path, tear: str
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    for folder in ("VERSION", "manifests", "refs", "index"):
        for note in notes(cache, folder):
            note.write_bytes(TEARS[tear](note.read_bytes()))
    client = make_client()
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    assert len(source.bodies) == len(set(source.bodies))
    assert_healed(client, source, cache, uri)


@memory
def test_a_note_about_another_content_is_no_way_to_it(
    make_client: MakeClient, source: Source, cache: Path
) -> None:
    # Somebody copies what one source has over what another has: whole notes, in wrong places.
    client = make_client()
    mine, yours = source.put_model(MODEL), source.put_model({"other": b"theirs"}, "other")
    client.download(mine)
    client.download(yours)
    first, second = sorted(notes(cache, "manifests"))
    shutil.copyfile(first, second)
    assert tree_bytes(make_client().download(mine)) == MODEL
    assert tree_bytes(make_client().download(yours)) == {"other": b"theirs"}


@memory
@pytest.mark.parametrize("folder", ["VERSION", "manifests", "refs", "index", "snapshots", "blobs"])
def test_what_is_taken_away_comes_again(
    make_client: MakeClient, source: Source, cache: Path, folder: str
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    if folder == "VERSION":
        (cache / folder).unlink()
    else:
        shutil.rmtree(cache / folder)
    client = make_client()
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    bodies = {f"model/{path}" for path in MODEL} if folder == "blobs" else set()
    assert set(source.bodies) <= bodies
    assert bool(source.bodies) == bool(bodies)
    assert_healed(client, source, cache, uri)


@memory
def test_a_cache_that_is_removed_under_a_process_is_made_anew(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    path = client.download(uri)
    shutil.rmtree(cache)
    with pytest.raises(OfflineError, match="never cached"):
        client.download(uri, offline=True)
    assert client.download(uri) == path
    assert tree_bytes(path) == MODEL
    assert_healed(client, source, cache, uri)


@memory
def test_a_file_in_the_place_of_the_cache_is_told(
    client: StorageClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    cache.write_text("mine")
    with pytest.raises(DestinationError):
        client.download(uri)
    assert tree_bytes(client.download(uri, tmp_path / "out")) == MODEL
    assert cache.read_text() == "mine"
