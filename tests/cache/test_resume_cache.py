"""A download into the cache that was killed, or failed, is gone on with by the next one."""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from storage import StorageClient
from storage.cache.evict import evict, foresee
from storage.cache.gc import collect, collectable
from storage.cache.manifests import Manifest, ManifestFile
from storage.cache.owners import current_owner
from storage.cache.parcel import export
from storage.cache.partials import JOURNAL, give_up, new_partial, remove_dead
from storage.cache.survey import occupied
from storage.cache.verify import verify
from storage.config import load_settings
from storage.digest import Digest, hash_file
from storage.errors import IntegrityError, TransferError
from storage.testing.fault_proxy import FaultProxy
from storage.transfer import journal
from storage.transfer.engine import Budget
from tests.cache.processes import dead_owner, foreign_owner, forked, later
from tests.cache.support import blob_files, wrong_blobs
from tests.facade.stores import tree_bytes
from tests.servers import SeaweedFS
from tests.transfer.faulty import Poor
from tests.transfer.resume_support import (
    BIG,
    FILES,
    PART,
    PIECE,
    SIZE,
    STEP,
    TREE,
    Download,
    Metered,
)
from tests.transfer.resuming import MIB, Resuming, ends_of
from tests.transfer.support import KIB, memory_bucket, options, put_all
from tests.transfer.test_store_checksums import Keeping

LARGE = {
    "config.json": b"{}",
    "weights-1.bin": random.Random(29).randbytes(6 * MIB + 3),
    "weights-2.bin": random.Random(30).randbytes(3 * MIB),
}
LIMITS = {"connections": 4, "part_size": "1MiB"}


@pytest.fixture
def settings(cache: Path) -> dict[str, Any]:
    return {"cache_dir": str(cache)}


@pytest.fixture
def client(settings: dict[str, Any]) -> Iterator[StorageClient]:
    with StorageClient(settings=load_settings(**settings)) as found:
        found._options = options(PART)
        # Each connection that ends in the middle may lose the piece that it had in its hands.
        found._budget = Budget(4)
        yield found


@pytest.fixture
def download(client: StorageClient, monkeypatch: pytest.MonkeyPatch) -> Download:
    """Call it with a backend and a key to download into the cache."""
    monkeypatch.setattr(journal, "STEP", STEP)
    monkeypatch.setattr(journal, "WORTH", STEP)

    def run(backend: Any, key: str, **more: Any) -> str:
        monkeypatch.setattr("storage.client.base.open_backend", lambda *_: backend)
        client.close()
        return client.download(f"memory://bucket/{key}", **more)

    return run


def partials(cache: Path) -> list[Path]:
    return sorted((cache / "partial").iterdir())


def fail(download: Download, memory: Any, at: int, key: str = "m/sub/weights.bin") -> int:
    """Let a download break off; return the bytes that it has paid for."""
    broken = Metered(memory, at)
    with pytest.raises(TransferError):
        download(broken, key)
    return broken.read_bytes


# -- a process that lives on ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["m/sub/weights.bin", "m"])
@pytest.mark.parametrize("at", [3 * PART, 8 * PART])
def test_what_failed_is_gone_on_with_by_the_same_process(
    download: Download, cache: Path, key: str, at: int
) -> None:
    with memory_bucket(FILES) as memory:
        paid = fail(download, memory, at, key)
        whole = Metered(memory)
        path = download(whole, key)
        if key == "m":
            assert tree_bytes(path) == TREE
        else:
            assert Path(path).read_bytes() == BIG
        size = SIZE if key == "m" else len(BIG)
        assert whole.read_bytes + paid <= size + 8 * PIECE
    assert partials(cache) == []
    assert wrong_blobs(cache) == []


def test_it_fails_again_and_again_and_every_byte_comes_once(
    download: Download, cache: Path
) -> None:
    with memory_bucket(FILES) as memory:
        total = 0
        for _ in range(200):
            backend = Metered(memory, 4 * STEP)
            try:
                path = download(backend, "m")
                break
            except TransferError:
                assert len(partials(cache)) <= 1
            finally:
                total += backend.read_bytes
        assert tree_bytes(path) == TREE
        assert total <= SIZE + 200 * PIECE
    assert partials(cache) == []


def test_the_message_says_that_it_is_kept(download: Download, cache: Path) -> None:
    with memory_bucket(FILES) as memory, pytest.raises(TransferError) as caught:
        download(Metered(memory, 5 * PART), "m/sub/weights.bin")
    assert "bytes of it are kept in the cache, and the next download" in str(caught.value)
    (left,) = partials(cache)
    # Nobody's: this process, which lives, may go on as well as any other.
    assert left.name.startswith("given-up-")


def test_what_the_cache_has_got_already_is_not_kept_for_the_next_one(
    download: Download, client: StorageClient, cache: Path
) -> None:
    client._budget = Budget(1)
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError) as caught:
            download(Metered(memory, 4 * PART), "m")
        done = sum(path.stat().st_size for path in blob_files(cache))
        assert done >= PART
        whole = Metered(memory)
        download(whole, "m")
    assert f"; {SIZE - done - whole.read_bytes} bytes of it are kept" in str(caught.value)


def test_what_is_here_needs_no_free_space(
    download: Download, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("storage.client.cached.check_space", lambda _, size: needed.append(size))
    with memory_bucket(FILES) as memory:
        fail(download, memory, 5 * PART)
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin")
    assert needed == [len(BIG), whole.read_bytes]


def test_what_a_destination_has_in_part_and_the_cache_in_whole_comes_out_right(
    download: Download, tmp_path: Path
) -> None:
    dest = tmp_path / "place" / "model"
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m/sub/weights.bin", dest=dest)
        download(memory, "m")
        download(memory, "m/sub/weights.bin", dest=dest)
    assert dest.read_bytes() == BIG
    assert os.listdir(dest.parent) == ["model"]


def test_what_another_try_does_not_help_leaves_nothing(download: Download, cache: Path) -> None:
    def wrong() -> BaseException:
        return IntegrityError("wrong")

    with memory_bucket(FILES) as memory, pytest.raises(IntegrityError):
        download(Metered(memory, 5 * PART, wrong), "m/sub/weights.bin")
    assert partials(cache) == []


def test_without_a_strong_validator_nothing_is_left(download: Download, cache: Path) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(Poor(memory, weak=True), 5 * PART), "m/sub/weights.bin")
        assert partials(cache) == []


def test_another_source_leaves_it_alone(download: Download, cache: Path) -> None:
    with memory_bucket(FILES | {"n/sub/weights.bin": BIG[::-1]}) as memory:
        paid = fail(download, memory, 5 * PART)
        (left,) = partials(cache)
        other = Metered(memory)
        download(other, "n/sub/weights.bin")
        assert other.read_bytes == len(BIG)
        assert partials(cache) == [left]
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin")
        assert whole.read_bytes + paid <= len(BIG) + 8 * PIECE


def test_what_was_replaced_meanwhile_begins_again(download: Download, cache: Path) -> None:
    with memory_bucket(FILES) as memory:
        fail(download, memory, 5 * PART)
        put_all(memory, {"m/sub/weights.bin": BIG[::-1]})
        assert Path(download(memory, "m/sub/weights.bin")).read_bytes() == BIG[::-1]
    assert partials(cache) == []
    assert wrong_blobs(cache) == []


def test_an_archive_is_gone_on_with(download: Download, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(BIG)
    packed = Path(shutil.make_archive(str(tmp_path / "m"), "tar", tmp_path / "model")).read_bytes()
    with memory_bucket({"m.tar": packed}) as memory:
        broken = Metered(memory, 5 * PART)
        with pytest.raises(TransferError):
            download(broken, "m.tar", unpack=True)
        whole = Metered(memory)
        assert tree_bytes(download(whole, "m.tar", unpack=True)) == {"w.bin": BIG}
        assert whole.read_bytes + broken.read_bytes <= len(packed) + 8 * PIECE
    assert partials(cache) == []


def test_a_disk_that_lied_is_found_out(download: Download, cache: Path) -> None:
    with memory_bucket(FILES) as memory:
        fail(download, memory, 8 * PART)
        (left,) = partials(cache)
        with open(left / "files" / "weights.bin", "r+b") as file:
            file.write(b"lies")
        assert Path(download(memory, "m/sub/weights.bin")).read_bytes() == BIG
    assert wrong_blobs(cache) == []


# -- who may have it -----------------------------------------------------------------------


def test_it_is_given_to_one_only(tmp_path: Path) -> None:
    root = str(tmp_path)
    for _ in range(20):
        with new_partial(root) as path:
            Path(path, JOURNAL).write_bytes(b"1")
            give_up(path)
        with new_partial(root, lambda _: True) as one, new_partial(root, lambda _: True) as other:
            assert os.path.exists(os.path.join(one, JOURNAL))
            assert os.listdir(other) == ["lock"]
    assert partials(tmp_path) == []


def test_a_child_gives_up_nothing_of_its_parent(tmp_path: Path) -> None:
    with new_partial(str(tmp_path)) as path:
        Path(path, JOURNAL).write_bytes(b"1")
        assert forked(lambda: give_up(path) is None)
        assert partials(tmp_path) == [Path(path)]


def test_two_processes_never_get_the_same(tmp_path: Path) -> None:
    def take() -> bool:
        with new_partial(str(tmp_path), lambda _: True) as path:
            return os.path.exists(os.path.join(path, JOURNAL))

    for _ in range(10):
        with new_partial(str(tmp_path)) as path:
            Path(path, JOURNAL).write_bytes(b"1")
            give_up(path)
        found = []
        children = []
        for _ in range(3):
            pid = os.fork()
            if not pid:
                os._exit(0 if take() else 1)
            children.append(pid)
        found = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert sorted(found) == [0, 1, 1]


def test_what_a_living_process_works_at_is_not_given_away(tmp_path: Path) -> None:
    with new_partial(str(tmp_path)) as mine:
        Path(mine, JOURNAL).write_bytes(b"1")
        with new_partial(str(tmp_path), lambda _: True) as other:
            assert os.listdir(other) == ["lock"]

        def other_process() -> bool:
            with new_partial(str(tmp_path), lambda _: True) as path:
                return os.listdir(path) == ["lock"]

        assert forked(other_process)
        assert Path(mine, JOURNAL).exists()


@pytest.mark.parametrize(
    ("owner", "given"), [(dead_owner, True), (foreign_owner, False), (current_owner, False)]
)
def test_only_what_is_certainly_dead_is_given_away(
    tmp_path: Path, owner: Callable[[], Any], given: bool
) -> None:
    left = tmp_path / "partial" / f"{owner().token}-0badcafe"
    left.mkdir(parents=True)
    (left / JOURNAL).write_bytes(b"1")
    with new_partial(str(tmp_path), lambda _: True) as path:
        assert os.path.exists(os.path.join(path, JOURNAL)) == given
        assert left.exists() == (not given)


# -- how long it stays ---------------------------------------------------------------------


def leave(download: Download, memory: Any, cache: Path) -> Path:
    fail(download, memory, 5 * PART)
    (left,) = partials(cache)
    return left


def test_it_stays_for_a_day(download: Download, cache: Path) -> None:
    with memory_bucket(FILES) as memory:
        left = leave(download, memory, cache)
    assert remove_dead(str(cache), later(23)) == 0
    assert left.exists()
    assert remove_dead(str(cache), later(25)) > 0
    assert partials(cache) == []


def test_what_a_killed_process_left_stays_for_a_day_too(tmp_path: Path) -> None:
    left = tmp_path / "partial" / f"{dead_owner().token}-0badcafe"
    left.mkdir(parents=True)
    (left / JOURNAL).write_bytes(b"123")
    assert remove_dead(str(tmp_path), later(23)) == 0
    assert remove_dead(str(tmp_path), later(23), resumable=True) == 3
    left.mkdir()
    (left / JOURNAL).write_bytes(b"123")
    assert remove_dead(str(tmp_path), later(25)) == 3
    assert partials(tmp_path) == []


def test_what_was_killed_before_its_first_note_goes_at_once(tmp_path: Path) -> None:
    left = tmp_path / "partial" / f"{dead_owner().token}-0badcafe"
    left.mkdir(parents=True)
    (left / JOURNAL).touch()
    (left / "bytes").write_bytes(b"123")
    assert remove_dead(str(tmp_path)) == 3
    assert partials(tmp_path) == []


def test_garbage_collection_leaves_it_unless_it_is_to_leave_nothing(
    download: Download, client: StorageClient, cache: Path
) -> None:
    with memory_bucket(FILES) as memory:
        left = leave(download, memory, cache)
    assert collectable(client.cache) == 0
    collect(client.cache)
    assert left.exists()
    client.cache.grace = 0
    assert collectable(client.cache) >= len(BIG)
    assert collect(client.cache).bytes >= len(BIG)
    assert partials(cache) == []
    assert occupied(client.cache) == 0


def test_it_counts_and_is_the_first_to_make_room(
    download: Download, client: StorageClient, cache: Path
) -> None:
    with memory_bucket(FILES) as memory:
        kept = download(memory, "m/one-part")
        left = leave(download, memory, cache)
        size = occupied(client.cache)
        assert size >= len(BIG) + PART
        uris, freed = foresee(client.cache, size - 1)
        assert (uris, freed >= len(BIG)) == ([], True)
        client.cache.grace = 0
        client.cache.close()
        evict(client.cache, size - 1)
        assert not left.exists()
        assert Path(kept).exists()
        assert occupied(client.cache) == PART


def test_a_budget_counts_what_is_here_already_once(
    download: Download, client: StorageClient, cache: Path
) -> None:
    client.cache.budget = len(BIG) + 4 * KIB
    with memory_bucket(FILES) as memory:
        paid = fail(download, memory, 5 * PART)
        whole = Metered(memory)
        assert Path(download(whole, "m/sub/weights.bin")).read_bytes() == BIG
        assert whole.read_bytes + paid <= len(BIG) + 8 * PIECE


# -- processes that are killed -------------------------------------------------------------


@pytest.fixture
def remote(seaweedfs: SeaweedFS, shared_bucket: str, cache: Path) -> Iterator[tuple[Any, Any]]:
    folder = f"resume-{uuid4().hex}"
    for name, data in LARGE.items():
        seaweedfs.put_raw(shared_bucket, f"{folder}/{name}", data)
    with FaultProxy(seaweedfs.endpoint) as proxy:
        config = {
            "access_key_id": seaweedfs.access_key,
            "secret_access_key": seaweedfs.secret_key,
            "endpoint_url": proxy.endpoint,
        }

        def resuming(name: str = "", **more: Any) -> Resuming:
            uri = f"s3://{shared_bucket}/{folder}/{name}".rstrip("/")
            settings = {"transfer": LIMITS, "cache_dir": str(cache)}
            return Resuming(uri, None, config, settings=settings, step=128 * KIB, **more)

        yield resuming, proxy


def journals(cache: Path) -> list[Path]:
    """Return the journals that note something; a killed process may leave one that does not."""
    found = []
    for each in cache.glob(f"partial/*/{JOURNAL}"):
        records = [*journal._records(str(each))]
        dropped = {record.get("drop") for record in records}
        if any("file" in record and record["file"] not in dropped for record in records):
            found.append(each)
    return found


@pytest.mark.parametrize("name", ["weights-1.bin", ""], ids=["file", "tree"])
def test_a_killed_fill_is_gone_on_with(
    remote: tuple[Callable[..., Resuming], FaultProxy], cache: Path, name: str
) -> None:
    resuming, proxy = remote
    rng = random.Random(name)
    files = {name: LARGE[name]} if name else LARGE
    size = sum(map(len, files.values()))
    kills = 0
    for _ in range(4):
        kills += resuming(name).run(rng.randrange(1, size // 4)) is None
        # One that was killed at once has left nothing to go on with, and goes with the garbage.
        assert len(journals(cache)) <= 1
    path = resuming(name).run()
    assert path is not None
    assert (tree_bytes(path) if not name else {name: Path(path).read_bytes()}) == files
    assert kills
    assert proxy.bytes_down <= size + kills * 4 * MIB + 64 * KIB
    assert journals(cache) == []
    assert len(blob_files(cache)) == len(files)
    with StorageClient(settings=load_settings(cache_dir=cache)) as client:
        collect(client.cache)
        # A journal that notes nothing any more waits for its day.
        remove_dead(str(cache), resumable=True)
        assert partials(cache) == []
        assert verify(client.cache, full=True).problems == ()


def test_two_processes_at_once_pay_once(
    remote: tuple[Callable[..., Resuming], FaultProxy], cache: Path
) -> None:
    resuming, proxy = remote
    killed = resuming().start(4 * MIB)
    assert killed.end() is None
    both = [resuming().start(gate=True) for _ in range(2)]
    assert all(end is not None and tree_bytes(end) == LARGE for end in ends_of(both))
    assert proxy.bytes_down <= sum(map(len, LARGE.values())) + 4 * MIB + 64 * KIB
    # One that was killed before its first note has left a folder that is nothing to go on with.
    assert journals(cache) == []
    assert all(f"-{killed.pid}-" in left.name for left in partials(cache))


def test_another_boot_fills_anew(
    remote: tuple[Callable[..., Resuming], FaultProxy], cache: Path
) -> None:
    resuming, proxy = remote
    assert resuming("weights-1.bin").run(4 * MIB, boot="the first") is None
    before = proxy.bytes_down
    path = resuming("weights-1.bin").run(boot="the second")
    assert path is not None
    assert Path(path).read_bytes() == LARGE["weights-1.bin"]
    assert proxy.bytes_down - before >= len(LARGE["weights-1.bin"])


# -- what is kept of what the store says ---------------------------------------------------


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme"])
def test_a_checksum_is_compared_and_not_kept(
    download: Download, client: StorageClient, cache: Path, tmp_path: Path, algorithm: str
) -> None:
    (tmp_path / "x").write_bytes(BIG)
    right = hash_file(tmp_path / "x", (algorithm,))[algorithm]
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, (right,))
        for expected in (None, right):
            download(backend, "m/sub/weights.bin", digest=expected)
        assert backend.asked == ["m/sub/weights.bin"]
    parcel = io.BytesIO()
    export(client.cache, parcel)
    kept = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert not [data for data in (*kept, parcel.getvalue()) if algorithm.encode() in data]


def test_a_checksum_that_a_parcel_tells_is_passed_over() -> None:
    digest = Digest("blake3", "0" * 64)
    record = Manifest(False, (ManifestFile("a", 1, digest),)).as_record()
    record["files"][0]["others"] = ["crc64nvme:" + "0" * 16, "md5:" + "0" * 32]
    (file,) = Manifest.from_record(record).files
    assert file.others == (Digest("md5", "0" * 32),)
