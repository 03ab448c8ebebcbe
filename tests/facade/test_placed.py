"""What is at a destination already is not fetched again, and only if it is what it should be."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from storage import IntegrityError, ObjectExistsError, SignatureError, Storage, StorageClient
from storage.client.placed import _Turn
from storage.client.signatures import SignaturePolicy
from storage.digest import hash_file
from storage.transfer.destination import Destination
from storage.transfer.progress import Progress
from tests.facade.stores import S3Store, Store
from tests.servers.proxy import CountingProxy

FILES = {"model/a": b"a" * 300_000, "model/b/c": b"c" * 200_000}
SIZE = 500_000
NOTE = "user.modelstorage.placed"


@pytest.fixture
def s3(make_store: Callable[[str], Store]) -> S3Store:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_all(FILES)
    return store


@pytest.fixture
def proxy(s3: S3Store) -> Iterator[CountingProxy]:
    with CountingProxy(s3.server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def client(s3: S3Store, proxy: CountingProxy) -> Iterator[StorageClient]:
    with StorageClient(s3.through(proxy.endpoint)) as client:
        yield client


@pytest.fixture
def placed(client: StorageClient, s3: S3Store, proxy: CountingProxy, out: Path) -> Path:
    """A model that was downloaded to a folder."""
    client.download(s3.uri("model/"), out / "model")
    assert proxy.answered >= SIZE
    proxy.clear()
    return out / "model"


def fetched_bytes(proxy: CountingProxy) -> bool:
    """Tell whether anything of the model's content has come since the last look."""
    came = proxy.answered
    proxy.clear()
    return came > 100_000


def test_what_is_there_is_left_there(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, placed: Path
) -> None:
    before = placed.stat().st_ino
    seen: list[Progress] = []
    assert client.download(s3.uri("model/"), placed, progress=seen.append) == str(placed)
    assert not fetched_bytes(proxy)
    assert placed.stat().st_ino == before
    assert seen[-1].finished
    assert seen[-1].bytes_present == seen[-1].bytes_done == SIZE
    assert seen[-1].objects_done == 2


def touched(path: Path) -> None:
    (path / "a").write_bytes(b"x" * 300_000)


def resized(path: Path) -> None:
    with (path / "a").open("ab") as file:
        file.write(b"x")


def replaced(path: Path) -> None:
    """By a file of the same size and time."""
    status = (path / "a").stat()
    (path / "new").write_bytes(b"x" * 300_000)
    os.utime(path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (path / "new").rename(path / "a")


def removed(path: Path) -> None:
    (path / "a").unlink()


def copied(path: Path) -> None:
    """With all attributes, as by ``cp -a``."""
    note = os.getxattr(path, NOTE)
    marked = os.getxattr(path, "user.modelstorage.tree")
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    path.with_name("copy").rename(path)
    os.setxattr(path, NOTE, note)
    os.setxattr(path, "user.modelstorage.tree", marked)


def garbled(path: Path) -> None:
    os.setxattr(path, NOTE, b"\xff{")


def of_another_boot(path: Path) -> None:
    note = json.loads(os.getxattr(path, NOTE))
    assert note["boot"]
    os.setxattr(path, NOTE, json.dumps(note | {"boot": "another"}).encode())


@pytest.mark.parametrize(
    "change", [touched, resized, replaced, removed, copied, garbled, of_another_boot]
)
def test_what_somebody_changed_is_fetched_again(
    client: StorageClient,
    s3: S3Store,
    proxy: CountingProxy,
    placed: Path,
    change: Callable[[Path], None],
) -> None:
    change(placed)
    client.download(s3.uri("model/"), placed, overwrite=True)
    assert fetched_bytes(proxy)
    assert (placed / "a").read_bytes() == FILES["model/a"]
    assert (placed / "b" / "c").read_bytes() == FILES["model/b/c"]
    client.download(s3.uri("model/"), placed)
    assert not fetched_bytes(proxy)


def test_a_file_that_somebody_added_is_still_refused(
    client: StorageClient, s3: S3Store, placed: Path
) -> None:
    (placed / "mine").write_text("precious")
    with pytest.raises(ObjectExistsError):
        client.download(s3.uri("model/"), placed)
    assert (placed / "mine").read_text() == "precious"


def test_a_new_version_in_the_store_is_fetched(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, placed: Path
) -> None:
    s3.put_raw("model/a", b"b" * 300_000)
    client.download(s3.uri("model/"), placed)
    assert fetched_bytes(proxy)
    assert (placed / "a").read_bytes() == b"b" * 300_000


def test_other_patterns_are_another_source(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, placed: Path
) -> None:
    client.download(s3.uri("model/"), placed, allow_patterns="a")
    assert fetched_bytes(proxy)
    assert [path.name for path in placed.iterdir()] == ["a"]


def test_another_model_of_the_same_files_is_another_source(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, placed: Path
) -> None:
    s3.put_all({path.replace("model/", "twin/"): data for path, data in FILES.items()})
    client.download(s3.uri("twin/"), placed)
    assert fetched_bytes(proxy)


def test_a_demanded_digest_is_compared_with_the_bytes_and_not_with_the_note(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    data = b"m" * 400_000
    s3.put_raw("model.bin", data)
    digest = str(hash_file(io.BytesIO(data), ("sha256",))["sha256"])
    path = out / "model.bin"
    client.download(s3.uri("model.bin"), path)
    proxy.clear()
    client.download(s3.uri("model.bin"), path, digest=digest)
    assert not fetched_bytes(proxy)
    # Whoever may write there can make a note, too; the bytes are others.
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    client.download(s3.uri("model.bin"), path, digest=digest)
    assert fetched_bytes(proxy)
    assert path.read_bytes() == data
    with pytest.raises(IntegrityError):
        client.download(s3.uri("model.bin"), path, digest=f"sha256:{'0' * 64}")
    assert path.read_bytes() == data


def test_a_demanded_signature_is_verified_although_all_is_there(
    client: StorageClient, s3: S3Store, placed: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    policy = SignaturePolicy.key(generate_private_key(SECP256R1()).public_key())
    with pytest.raises(SignatureError):
        client.download(s3.uri("model/"), placed, require_signature=policy)


def test_what_was_not_forced_to_disk_is_fetched_again_for_those_who_demand_that(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, placed: Path
) -> None:
    client.download(s3.uri("model/"), placed, durable=True)
    assert fetched_bytes(proxy)
    client.download(s3.uri("model/"), placed, durable=True)
    assert not fetched_bytes(proxy)
    # Of another boot it counts, too.
    assert json.loads(os.getxattr(placed, NOTE))["boot"] is None
    client.download(s3.uri("model/"), placed)
    assert not fetched_bytes(proxy)


def test_an_archive_that_was_unpacked_is_not_fetched_again(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("weights")
        member.size = 300_000
        archive.addfile(member, io.BytesIO(b"w" * 300_000))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "weights"
        archive.addfile(link)
    s3.put_raw("model.tar", packed.getvalue())
    client.download(s3.uri("model.tar"), out / "model", unpack=True)
    proxy.clear()
    client.download(s3.uri("model.tar"), out / "model", unpack=True)
    assert not fetched_bytes(proxy)
    # Not unpacked it is another thing.
    client.download(s3.uri("model.tar"), f"{out}/packed/")
    assert fetched_bytes(proxy)


def test_links_into_the_cache_are_made_anew(client: StorageClient, s3: S3Store, out: Path) -> None:
    for link in ("symlink", "hardlink"):
        for _ in range(2):
            client.download(s3.uri("model/"), out / link, cache=True, link=link)
        with pytest.raises(OSError, match="No data"):
            os.getxattr(out / link, NOTE)
    client.download(s3.uri("model/"), out / "symlink")
    assert not (out / "symlink" / "a").is_symlink()


def test_what_the_cache_keeps_too_is_put_there_once(
    client: StorageClient, s3: S3Store, out: Path
) -> None:
    client.download(s3.uri("model/"), out / "model", cache=True)
    before = (out / "model").stat().st_ino
    client.download(s3.uri("model/"), out / "model", cache=True)
    assert (out / "model").stat().st_ino == before


def test_threads_of_one_process_take_turns_too(
    client: StorageClient, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            client.download(s3.uri("model/"), out / "deep" / "model")
        except BaseException as exc:  # noqa: BLE001 -- for the assertion
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert proxy.answered < SIZE + 100_000
    assert os.listdir(out / "deep") == ["model"]


def test_those_who_waited_do_not_hold_each_other_up(tmp_path: Path) -> None:
    """Each of them may have gigabytes to compare with a digest."""
    together = threading.Barrier(3, timeout=120)

    def turn_at(destination: Destination) -> _Turn:
        return _Turn(destination, "5" * 64, "1", durable=False, timeout=240)

    def look() -> tuple[bool, list[str]]:
        with turn_at(Destination(str(tmp_path / "m"), tree=False)) as turn:
            together.wait()
            return turn.found, os.listdir(tmp_path)

    with ThreadPoolExecutor(3) as pool:
        destination = Destination(str(tmp_path / "m"), tree=False)
        with turn_at(destination) as first:
            looks = [pool.submit(look) for _ in range(3)]
            with destination:
                Path(destination.content).write_bytes(b"m")
                # Nobody has the turn before this one ends, or sees what is there.
                assert wait(looks, timeout=0.5).done == set()
                first.publish("1")
        assert [each.result() for each in looks] == [(True, ["m"])] * 3


def test_a_failed_download_leaves_no_folder_for_turns(
    client: StorageClient, s3: S3Store, out: Path
) -> None:
    with pytest.raises(IntegrityError):
        client.download(s3.uri("model/"), out / "deep" / "model", digest=f"sha256:{'0' * 64}")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("came", ["2", None])
def test_the_note_tells_what_came_and_not_what_was_expected(
    tmp_path: Path, came: str | None
) -> None:
    destination = Destination(str(tmp_path / "m"), tree=False, overwrite=False, durable=False)
    with _Turn(destination, "5" * 64, "1", durable=False, timeout=5) as turn, destination:
        Path(destination.content).write_bytes(b"replaced meanwhile")
        turn.publish(came)
    for version in ("1", "2"):
        with _Turn(destination, "5" * 64, version, durable=False, timeout=5) as turn:
            assert turn.found == (version == came)
    assert os.listdir(tmp_path) == ["m"]


def test_who_does_not_get_a_turn_in_time_fetches_without(
    s3: S3Store, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.cache.locks import SourceLock
    from storage.config import load_settings

    folders: list[str] = []
    reserved = Destination.reserved

    def seen(self: Destination, purpose: str) -> str:
        folders.append(reserved(self, purpose))
        return folders[-1]

    monkeypatch.setattr(Destination, "reserved", seen)
    Storage.download(s3.uri("model/"), out / "model", config=s3.config)
    shutil.rmtree(out / "model")
    settings = load_settings(cache_lock_timeout=0.2)
    with (
        SourceLock(f"{folders[0]}/lock", timeout=1) as held,
        StorageClient(s3.config, settings) as client,
    ):
        assert held.acquired
        client.download(s3.uri("model/"), out / "model")
        assert (out / "model" / "a").read_bytes() == FILES["model/a"]
        # The folder of the one whose turn it is stays.
        assert os.path.exists(f"{folders[0]}/lock")
    client.download(s3.uri("model/"), out / "other")
    # What a killed process leaves goes with the next download there.
    client.download(s3.uri("model/"), out / "model", allow_patterns="a")
    assert sorted(os.listdir(out)) == ["model", "other"]
