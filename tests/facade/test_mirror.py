"""Mirrors: every direction, any executor of the standard library, and what goes wrong midway."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import (
    IntegrityError,
    InvalidInput,
    MirrorError,
    MirrorResult,
    ModelMissingError,
    PVCConfig,
    S3Config,
    StorageClient,
    StorageOperations,
    UnsupportedOperation,
    tree_digest,
)
from storage.client.mirror import batch as batches
from storage.client.mirror import run as mirrors
from storage.config import reveal
from storage.config.settings import load_settings
from storage.digest import Digest
from storage.transfer.progress import Progress
from storage.uri import parse_uri
from tests.facade.stores import BucketStore, FileStore, Store, s3_config
from tests.servers import CountingProxy, SeaweedFS
from tests.servers.nginx_http import NginxHTTP

# A process that has threads is forked on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

MIB = 1024 * 1024
ENDS = ("seaweedfs-obstore", "azurite-obstore", "gcs-fsspec", "file")
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "odd name+%20#[1].bin": os.urandom(700),
    "sub/deep/weights.bin": os.urandom(300_000),
    "sub/vocab.txt": b"a\nb\n",
}


@pytest.fixture(scope="module", autouse=True)
def _workers_of_this_process() -> Iterator[None]:
    """Close what batches in threads of this process opened: a server waits for its clients."""
    yield
    for client in batches._clients.values():
        client.close()


def mirror(source: Store, target: Store, **options: Any) -> MirrorResult:
    """Mirror the place of one store to that of another."""
    return StorageOperations.mirror(
        options.pop("src_uri", source.base),
        options.pop("dest_uri", target.base),
        config=source.config,
        dest_config=target.config,
        **options,
    )


def content(store: Store) -> dict[str, bytes]:
    """Return all that a store holds, read around the code under test."""
    paths = store.keys()
    return {path: store.get_raw(path) for path in paths}


def many(count: int, size: int = 300) -> dict[str, bytes]:
    return {f"part-{number % 5}/{number:04}.bin": os.urandom(size) for number in range(count)}


def counts(result: MirrorResult) -> tuple[int, int, int, int]:
    return result.copied, result.skipped, result.deleted, result.failed


def processes(method: str, number: int = 2) -> Callable[[], ProcessPoolExecutor]:
    context = multiprocessing.get_context(method)
    return partial(ProcessPoolExecutor, number, mp_context=context)


# -- every direction -------------------------------------------------------------------------


@pytest.mark.parametrize("target", ENDS)
@pytest.mark.parametrize("source", ENDS)
def test_a_tree_goes_from_any_store_to_any_other_and_then_nothing_moves(
    make_store: Callable[[str], Store], tmp_path_factory: Any, source: str, target: str
) -> None:
    one = make_store(source)
    # A place below the prefix of the test's own, so that one store can be both ends.
    two = make_store(target)
    two.base = f"{two.base}-copy"
    if isinstance(two, BucketStore):
        two._prefix = f"{two._prefix.rstrip('/')}-copy/"
    elif isinstance(two, FileStore):
        two.folder = Path(f"{two.folder}-copy")
    one.put_all(FILES)

    first = mirror(one, two)
    assert counts(first) == (len(FILES), 0, 0, 0)
    assert first.bytes == sum(map(len, FILES.values()))
    assert content(two) == FILES

    again = mirror(one, two)
    assert counts(again) == (0, len(FILES), 0, 0)
    assert again.bytes == 0

    one.put_raw("sub/vocab.txt", b"a\nc\n")
    changed = mirror(one, two)
    assert counts(changed) == (1, len(FILES) - 1, 0, 0)
    assert content(two) == FILES | {"sub/vocab.txt": b"a\nc\n"}


def test_a_hub_takes_a_mirror_in_commits_of_a_batch(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("file"), make_store("hub")
    one.put_all(many(12))
    with ThreadPoolExecutor(1) as pool:
        assert counts(mirror(one, two, executor=pool, batch_size=5)) == (12, 0, 0, 0)
    assert content(two) == content(one)
    assert counts(mirror(one, two)) == (0, 12, 0, 0)
    for name in ("pvc", "azurite-obstore"):
        back = make_store(name)
        assert counts(mirror(two, back)) == (12, 0, 0, 0)
        assert counts(mirror(two, back)) == (0, 12, 0, 0)
        assert content(back) == content(one)


def test_a_file_of_a_web_server_goes_where_it_is_wanted(
    make_store: Callable[[str], Store], nginx_http: NginxHTTP
) -> None:
    data = os.urandom(5000)
    (nginx_http.data / "mirrored").mkdir(exist_ok=True)
    (nginx_http.data / "mirrored" / "model.bin").write_bytes(data)
    two = make_store("azurite-obstore")
    uri = f"{nginx_http.endpoint}/mirrored/model.bin"
    for expected in ((1, 0, 0, 0), (0, 1, 0, 0)):
        with processes("spawn", 1)() as pool:
            result = StorageOperations.mirror(
                uri, two.uri("model.bin"), dest_config=two.config, executor=pool
            )
        assert counts(result) == expected
    assert content(two) == {"model.bin": data}


def test_a_claim_is_filled_and_read_as_any_store(
    make_store: Callable[[str], Store],
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("pvc")
    one.put_all(FILES)
    with processes("spawn")() as pool:
        assert counts(mirror(one, two, executor=pool, batch_size=2)) == (len(FILES), 0, 0, 0)
    assert content(two) == FILES
    back = make_store("memory")
    assert counts(mirror(two, back)) == (len(FILES), 0, 0, 0)
    assert content(back) == FILES


def test_one_object_goes_to_a_name_or_into_a_folder(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("file"), make_store("azurite-obstore")
    one.put_all(FILES)
    file = one.uri("sub/vocab.txt")
    assert counts(mirror(one, two, src_uri=file, dest_uri=two.uri("named"))) == (1, 0, 0, 0)
    assert counts(mirror(one, two, src_uri=file, dest_uri=two.uri("folder/"))) == (1, 0, 0, 0)
    assert counts(mirror(one, two, src_uri=file, dest_uri=two.uri("named"))) == (0, 1, 0, 0)
    assert content(two) == dict.fromkeys(("named", "folder/vocab.txt"), FILES["sub/vocab.txt"])


def test_within_a_store_no_byte_passes_through_here(
    make_store: Callable[[str], Store], counting_proxy: Callable[[str], CountingProxy]
) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, BucketStore)
    store.put_all({f"one/{path}": data for path, data in FILES.items()})
    proxy = counting_proxy(store.server.endpoint)
    config = s3_config(store.server, "obstore", endpoint=proxy.endpoint)
    client = StorageClient(config)
    result = client.mirror(store.uri("one"), store.uri("two"))
    assert counts(result) == (len(FILES), 0, 0, 0)
    # What is read are the two listings.
    gets = [request for request in proxy.requests if request.method == "GET"]
    assert len(gets) == 2
    client.close()
    assert {path: store.get_raw(f"two/{path}") for path in FILES} == FILES


# -- executors -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "fork", "spawn", "forkserver"])
def test_any_executor_does_the_batches(make_store: Callable[[str], Store], kind: str) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(60)
    one.put_all(files)
    # The connections of this process have been used, so a fork has something to inherit.
    StorageOperations.list_objects(one.base, config=one.config)
    StorageOperations.mirror(
        one.uri("part-0"), two.uri("before"), config=one.config, dest_config=two.config
    )
    told: list[Progress] = []
    make = partial(ThreadPoolExecutor, 2) if kind == "threads" else processes(kind)
    with make() as pool:
        result = mirror(
            one,
            two,
            dest_uri=two.uri("all"),
            executor=pool,
            batch_size=7,
            in_flight=3,
            progress=told.append,
        )
        again = mirror(one, two, dest_uri=two.uri("all"), executor=pool, batch_size=7)
        # It is the caller's, who goes on with it.
        assert pool.submit(os.getpid).result() > 0
    assert counts(result) == (60, 0, 0, 0)
    assert result.resubmitted == 0
    assert counts(again) == (0, 60, 0, 0)
    held = content(two)
    assert {p.removeprefix("all/"): d for p, d in held.items() if p.startswith("all/")} == files
    last = told[-1]
    assert (last.finished, last.objects_done, last.objects_total) == (True, 60, 60)
    assert (last.bytes_done, last.bytes_total, last.bytes_present) == (18_000, 18_000, 0)
    assert [one.bytes_done for one in told] == sorted(one.bytes_done for one in told)
    assert last.operation == "mirror"


class Counting(ThreadPoolExecutor):
    """Threads that note how many batches there were at once, and how large they were."""

    def __init__(self) -> None:
        super().__init__(2)
        self.most = 0
        self.sizes: list[int] = []
        self._now: set[Future[Any]] = set()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.sizes.append(len(args[0].items))
        future = super().submit(fn, *args, **kwargs)
        self._now = {one for one in self._now if not one.done()} | {future}
        self.most = max(self.most, len(self._now))
        return future


def test_batches_and_those_under_way_are_bounded(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("memory"), make_store("memory")
    one.put_all(many(101, 3))
    with Counting() as pool:
        assert mirror(one, two, executor=pool, batch_size=10, in_flight=4).copied == 101
    assert pool.sizes == [10] * 10 + [1]
    assert pool.most <= 4


def test_a_large_plan_stays_out_of_memory(tmp_path: Path) -> None:
    import tracemalloc

    from storage.backends.base import ObjectInfo
    from storage.client.mirror.plan import MirrorItem, MirrorPlan

    def items(count: int) -> Iterator[MirrorItem]:
        for number in range(count):
            name = f"{'long name of a shard ' * 5}/{number:07}.bin"
            yield MirrorItem(name, ObjectInfo(f"models/{name}", number, etag=f'"{number}"'), name)

    tracemalloc.start()
    with MirrorPlan() as plan:
        plan.list_wanted(items(20_000), "s3://bucket")
        plan.list_present(item.path for item in items(10_000))
        seen = sum(item.look for item in plan.items())
        assert plan.totals() == (20_000, sum(range(20_000)))
        assert plan.find_folder() is None
        assert list(plan.leftovers()) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == 10_000
    assert peak < 6 * MIB


# -- what is in place already ----------------------------------------------------------------


def test_a_multipart_object_is_known_again_though_no_digest_tells_it(
    make_store: Callable[[str], Store],
) -> None:
    """Its ETag is no MD5, and a store that got it in blocks has none either."""
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    assert isinstance(one, BucketStore)
    key = f"{one._prefix}large.bin"

    def put(data: bytes) -> None:
        part = {"Bucket": one.bucket, "Key": key}
        raw = one.server.raw  # type: ignore[attr-defined]
        part["UploadId"] = raw.create_multipart_upload(**part)["UploadId"]
        tags = []
        for number, body in enumerate((data[: 5 * MIB], data[5 * MIB :]), 1):
            answer = raw.upload_part(**part, PartNumber=number, Body=body)
            tags.append({"PartNumber": number, "ETag": answer["ETag"]})
        raw.complete_multipart_upload(**part, MultipartUpload={"Parts": tags})

    data = os.urandom(9 * MIB)
    put(data)
    assert "-" in one.server.head_raw(one.bucket, key)["ETag"]
    assert one.server.head_raw(one.bucket, key)["Metadata"] == {}
    assert counts(mirror(one, two)) == (1, 0, 0, 0)
    assert counts(mirror(one, two)) == (0, 1, 0, 0)
    assert two.get_raw("large.bin") == data
    # Another object of the same size is not taken for it.
    data = os.urandom(9 * MIB)
    put(data)
    assert counts(mirror(one, two)) == (1, 0, 0, 0)
    assert two.get_raw("large.bin") == data
    # Other bytes of the same size, written around the mirror: nothing vouches for them.
    two.put_raw("large.bin", bytes(9 * MIB))
    assert counts(mirror(one, two)) == (1, 0, 0, 0)
    assert two.get_raw("large.bin") == data


@pytest.mark.parametrize("target", ["seaweedfs-obstore", "azurite-obstore", "gcs-fsspec", "file"])
def test_what_has_the_same_size_and_other_bytes_is_replaced(
    make_store: Callable[[str], Store], target: str
) -> None:
    one, two = make_store("memory"), make_store(target)
    one.put_all({"a": b"right bytes", "b": b"same bytes!"})
    two.put_all({"a": b"wrong bytes", "b": b"same bytes!"})
    assert mirror(one, two, dry_run=True).copied >= 1
    assert two.get_raw("a") == b"wrong bytes"
    mirror(one, two)
    assert content(two) == content(one)


def test_a_dry_run_tells_and_does_nothing(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("file"), make_store("azurite-obstore")
    one.put_all(FILES)
    two.put_all({"config.json": b"{}", "empty": b"not", "stray": b"1"})
    before = content(two)
    would = mirror(one, two, delete=True, dry_run=True)
    assert counts(would) == (len(FILES) - 1, 1, 1, 0)
    assert would.bytes == sum(map(len, FILES.values())) - 2
    assert content(two) == before
    done = mirror(one, two, delete=True)
    assert counts(done) == counts(would)
    assert done.bytes == would.bytes
    assert content(two) == FILES


def test_without_overwrite_other_content_stays_and_is_told(
    make_store: Callable[[str], Store],
) -> None:
    one, two = make_store("file"), make_store("seaweedfs-obstore")
    one.put_all(FILES)
    two.put_all({"config.json": b"{1}", "sub/vocab.txt": FILES["sub/vocab.txt"]})
    with pytest.raises(MirrorError, match=r"config\.json: ObjectExistsError") as caught:
        mirror(one, two, overwrite=False)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert counts(result) == (len(FILES) - 2, 1, 0, 1)
    assert [one.path for one in result.failures] == ["config.json"]
    assert content(two) == FILES | {"config.json": b"{1}"}


def test_deleting_leaves_alone_what_patterns_leave_out(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("file"), make_store("gcs-fsspec")
    one.put_all({"a.bin": b"1", "b.txt": b"2"})
    two.put_all({"old.bin": b"3", "old.txt": b"4", "sub/old.bin": b"5"})
    result = mirror(one, two, allow_patterns="*.bin", delete=True)
    assert counts(result) == (1, 0, 2, 0)
    assert content(two) == {"a.bin": b"1", "old.txt": b"4"}


def test_nothing_is_deleted_when_something_failed(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("memory"), make_store("file")
    one.put_all({"a": b"1", f"{'n' * 240}/{'x' * 255}": b"2", "b": b"3"})
    two.put_all({"stray": b"1", "b/in the way": b"2"})
    with pytest.raises(MirrorError, match="1 failed") as caught:
        mirror(one, two, delete=True)
    assert [each.path for each in caught.value.result.failures] == ["b"]  # type: ignore[attr-defined]
    assert two.get_raw("stray") == b"1"
    assert two.get_raw("a") == b"1"


# -- digests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_the_digest_of_a_tree_is_that_of_every_byte_also_of_those_in_place(
    make_store: Callable[[str], Store], algorithm: str
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    one.put_all(FILES)
    digest = digest_of(FILES, algorithm)
    with processes("spawn")() as pool:
        first = mirror(one, two, digest=digest, executor=pool, batch_size=2)
        assert counts(first) == (len(FILES), 0, 0, 0)
        # What is in place is read, and hashed.
        again = mirror(one, two, digest=digest, executor=pool, batch_size=2)
        assert counts(again) == (0, len(FILES), 0, 0)
    one.put_raw("config.json", b"[]")
    two.put_raw("stray", b"1")
    with pytest.raises(IntegrityError, match=f"expected the digest {algorithm}:"):
        mirror(one, two, digest=digest, delete=True)
    assert two.get_raw("stray") == b"1"


def digest_of(files: Mapping[str, bytes], algorithm: str = "sha256") -> Digest:
    from storage.digest import MultiHasher

    found = {}
    for path, data in files.items():
        hasher = MultiHasher([algorithm])
        hasher.update(data)
        found[path] = hasher.digests()[algorithm]
    return tree_digest(found, algorithm)


def test_one_object_with_another_digest_than_expected_is_never_written(
    make_store: Callable[[str], Store],
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    one.put_raw("m.bin", b"tampered")
    wrong = f"{one.uri('m.bin')}#sha256={'0' * 64}"
    with pytest.raises(MirrorError, match="IntegrityError"):
        mirror(one, two, src_uri=wrong, dest_uri=two.uri("m.bin"))
    assert two.keys() == []
    # Also not when the same wrong bytes are in place.
    two.put_raw("m.bin", b"tampered")
    with pytest.raises(MirrorError, match="IntegrityError"):
        mirror(one, two, src_uri=wrong, dest_uri=two.uri("m.bin"))


# -- what goes wrong -------------------------------------------------------------------------


def test_an_object_that_changes_after_the_listing_arrives_whole_as_it_is_then(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    one.put_all({"a": b"old", "b": b"same"})
    listed = mirrors.MirrorPlan.totals

    def change(plan: Any) -> Any:
        one.put_raw("a", b"new and longer")
        return listed(plan)

    told: list[Progress] = []
    monkeypatch.setattr(mirrors.MirrorPlan, "totals", change)
    result = mirror(one, two, progress=told.append)
    assert counts(result) == (2, 0, 0, 0)
    assert result.bytes == len(b"new and longer") + len(b"same")
    assert content(two) == {"a": b"new and longer", "b": b"same"}
    assert (told[-1].bytes_done, told[-1].bytes_total) == (result.bytes, result.bytes)


def test_an_object_that_is_replaced_while_it_is_read_is_never_a_mixture(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    old, new = bytes(3 * MIB), b"n" * (3 * MIB)
    one.put_raw("big", old)
    read = batches._MirrorCopy._read
    replaced: list[bool] = []

    def replace_after_asking(self: Any, info: Any) -> Any:
        source = read(self, info)
        if not replaced:
            replaced.append(True)
            one.put_raw("big", new)
        return source

    monkeypatch.setattr(batches._MirrorCopy, "_read", replace_after_asking)
    assert counts(mirror(one, two)) == (1, 0, 0, 0)
    assert two.get_raw("big") == new


def test_an_object_that_vanishes_is_told_and_the_others_arrive(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(20)
    one.put_all(files)
    gone = sorted(files)[7]
    listed = mirrors.MirrorPlan.totals

    def remove(plan: Any) -> Any:
        one.delete_raw(gone)
        return listed(plan)

    told: list[Progress] = []
    monkeypatch.setattr(mirrors.MirrorPlan, "totals", remove)
    with ThreadPoolExecutor(2) as pool, pytest.raises(MirrorError, match="19 of 20") as caught:
        mirror(one, two, executor=pool, batch_size=4, progress=told.append)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert counts(result) == (19, 0, 0, 1)
    assert result.bytes == 19 * 300
    (failure,) = result.failures
    assert (failure.path, failure.error) == (gone, "ModelMissingError")
    assert not any(one.finished for one in told)
    assert content(two).keys() == files.keys() - {gone}


def test_failures_without_end_end(make_store: Callable[[str], Store], monkeypatch: Any) -> None:
    monkeypatch.setattr(mirrors, "_MOST_FAILURES", 30)
    one, two = make_store("file"), make_store("memory")
    one.put_all(many(200, 5))
    original = mirrors.MirrorPlan.totals

    def remove_all(plan: Any) -> Any:
        held = one.keys()
        for path in held:
            one.delete_raw(path)
        return original(plan)

    monkeypatch.setattr(mirrors.MirrorPlan, "totals", remove_all)
    with ThreadPoolExecutor(1) as pool, pytest.raises(MirrorError, match="were not tried"):
        mirror(one, two, executor=pool, batch_size=10, in_flight=2)


def test_what_cannot_be_right_is_refused_before_a_byte_moves(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    memory, file = make_store("memory"), make_store("file")
    memory.put_all({"a": b"1", "sub/b": b"2"})
    with pytest.raises(InvalidInput, match="overlap"):
        mirror(memory, memory, dest_uri=memory.uri("sub"))
    with pytest.raises(InvalidInput, match="overlap"):
        mirror(memory, memory)
    with pytest.raises(InvalidInput, match="one object"):
        mirror(memory, file, src_uri=memory.uri("a"), delete=True)
    with pytest.raises(InvalidInput, match="digest"):
        mirror(memory, file, dest_uri=f"{file.base}#sha256={'0' * 64}")
    with pytest.raises(InvalidInput, match="batch_size"):
        mirror(memory, file, batch_size=0)
    with pytest.raises(InvalidInput, match="executor"):
        mirror(memory, file, executor=3)
    with pytest.raises(ModelMissingError, match="patterns"):
        mirror(memory, file, allow_patterns="*.none")
    with pytest.raises(ModelMissingError):
        mirror(memory, file, src_uri=memory.uri("nothing"))
    memory.put_all({"x//y": b"1", "x/y": b"2"})
    with pytest.raises(InvalidInput, match="'x/y'"):
        mirror(memory, file)
    memory.delete_raw("x//y")
    memory.put_all({"x": b"1"})
    with pytest.raises(InvalidInput, match="'x/y'"):
        mirror(memory, file)
    memory.delete_raw("x")
    memory.put_all({"../out": b"1"})
    with pytest.raises(InvalidInput, match=r"\.\."):
        mirror(memory, file)
    assert file.keys() == []


def test_places_that_overlap_are_told_by_the_store_and_not_by_who_asks(
    make_store: Callable[[str], Store], seaweedfs: SeaweedFS, tmp_path: Path
) -> None:
    """To delete what the source lacks would delete the source."""
    store = make_store("seaweedfs-obstore")
    store.put_all({"sub/a": b"1", "b": b"2"})
    other = s3_config(seaweedfs, "fsspec")
    assert other != store.config
    for src, dest in (("sub", ""), ("", "sub")):
        with pytest.raises(InvalidInput, match="overlap"):
            StorageOperations.mirror(
                store.uri(src), store.uri(dest), config=store.config, dest_config=other, delete=True
            )
    (tmp_path / "real" / "claim" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "claim" / "sub" / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InvalidInput, match="overlap"):
        StorageOperations.mirror(
            "pvc://claim/sub",
            tmp_path / "link" / "claim",
            config=PVCConfig(mount_root=tmp_path / "real"),
            delete=True,
        )
    assert content(store) == {"sub/a": b"1", "b": b"2"}


def test_a_file_whose_name_no_store_takes_fails_alone(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("file"), make_store("seaweedfs-obstore")
    assert isinstance(one, FileStore)
    one.put_all({"a": b"1", "b": b"2"})
    (one.folder / os.fsdecode(b"not \xff text")).write_bytes(b"3")
    for executor in (None, partial(ThreadPoolExecutor, 1)):
        with pytest.raises(MirrorError, match="1 failed") as caught:
            mirror(one, two, executor=executor)
        assert "WorkerLost" not in str(caught.value)
    assert content(two) == {"a": b"1", "b": b"2"}


def test_a_worker_that_cannot_open_a_store_says_why(make_store: Callable[[str], Store]) -> None:
    """What is installed here may be missing there."""
    one, two = make_store("file"), make_store("pvc")
    one.put_all({"a": b"1"})

    class Poor(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            ends = replace(args[0].ends, source=parse_uri("nosuchscheme://x/y"))
            return super().submit(fn, replace(args[0], ends=ends))

    with Poor(1) as pool, pytest.raises(MirrorError, match="UnsupportedScheme") as caught:
        mirror(one, two, executor=pool)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert result.resubmitted == 0


def test_workers_with_a_memory_or_a_disk_of_their_own_are_noticed(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, file, target = make_store("memory"), make_store("file"), make_store("pvc")
    file.put_all({"a": b"1"})
    with pytest.raises(UnsupportedOperation, match="memory of their own"):
        mirror(file, memory, executor=processes("spawn"))
    monkeypatch.setattr(mirrors, "_SEEN_WITHIN", 0.0)
    with Elsewhere() as pool, pytest.raises(UnsupportedOperation, match="file system"):
        mirror(file, target, executor=pool)


class Elsewhere(ThreadPoolExecutor):
    """Says that all was copied, as a machine does that wrote to its own disk."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        items = args[0].items
        future.set_result(tuple(batches.ItemOutcome(i.path, True, 1, True) for i in items))
        return future


# -- workers that die ------------------------------------------------------------------------


def _die_once(marker: str, batch: batches.Batch) -> Any:
    """Do a part of a batch; the first process that comes by dies then."""
    part = batches.Batch(f"{batch.name}-part", batch.ends, batch.items[:2])
    batches.run_batch(part)
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return batches.run_batch(batch)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _die(marker: str, batch: batches.Batch) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(ProcessPoolExecutor):
    """Does something else than a batch."""

    def __init__(self, instead: Any, method: str = "fork") -> None:
        super().__init__(2, mp_context=multiprocessing.get_context(method))
        self._instead = instead

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(self._instead, *args, **kwargs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_batches_of_a_process_that_was_killed_are_done_by_others(
    make_store: Callable[[str], Store], tmp_path: Path, method: str
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(40)
    one.put_all(files)
    instead = partial(_die_once, str(tmp_path / "died"))
    made: list[Executor] = []

    def make() -> Executor:
        made.append(Deadly(instead, method))
        return made[-1]

    told: list[Progress] = []
    result = mirror(one, two, executor=make, batch_size=10, progress=told.append)
    assert (tmp_path / "died").exists()
    assert len(made) == 2
    assert 1 <= result.resubmitted <= 4
    # The dead one had copied two at least; whoever comes next finds them in place.
    assert result.copied + result.skipped == 40
    assert result.skipped >= 2
    assert result.bytes == 300 * result.copied
    assert content(two) == files
    assert (told[-1].objects_done, told[-1].bytes_done) == (40, 40 * 300)
    for pool in made:
        with pytest.raises((RuntimeError, BrokenProcessPool)):
            pool.submit(os.getpid)


def test_a_broken_executor_that_cannot_be_made_again_ends_the_mirror_with_what_is_done(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    files = many(40)
    one.put_all(files)
    with (
        Deadly(partial(_die_once, str(tmp_path / "died"))) as pool,
        pytest.raises(MirrorError, match="pass a function that makes it") as caught,
    ):
        mirror(one, two, executor=pool, batch_size=10)
    result = caught.value.result
    assert isinstance(result, MirrorResult)
    assert result.failed == 0
    assert result.copied + result.skipped < 40
    # The dead one could not remove what it was writing; nobody lists or reads that.
    held = {path: data for path, data in content(two).items() if not path.endswith(".partial")}
    assert held.items() <= files.items()
    assert StorageOperations.list_objects(two.base) == sorted(held)
    again = mirror(one, two)
    assert again.copied + again.skipped == 40
    assert again.skipped == len(held) >= 2
    assert {path: two.get_raw(path) for path in files} == files


def test_a_batch_that_kills_whoever_does_it_is_given_up(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    one, two = make_store("file"), make_store("pvc")
    one.put_all({"a": b"1", "b": b"2"})
    made: list[Executor] = []

    def make() -> Executor:
        made.append(Deadly(partial(_die, "")))
        return made[-1]

    with pytest.raises(MirrorError, match="brought no result, 4 times") as caught:
        mirror(one, two, executor=make)
    assert [one.error for one in caught.value.result.failures] == ["WorkerLost"] * 2  # type: ignore[attr-defined]
    assert len(made) == 4


def test_doing_a_batch_twice_at_once_is_as_good_as_once(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    files = many(30)
    one.put_all(files)

    class Twice(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            super().submit(fn, *args, **kwargs)
            return super().submit(fn, *args, **kwargs)

    with Twice(4) as pool:
        assert counts(mirror(one, two, executor=pool, batch_size=5))[3] == 0
    assert content(two) == files


def test_an_interrupt_gives_out_no_more_work(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("memory"), make_store("memory")
    one.put_all(many(200, 3))
    main = threading.main_thread().ident
    assert main is not None
    given = Counting()

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with given, pytest.raises(KeyboardInterrupt):
        mirror(one, two, executor=given, batch_size=5, in_flight=2, progress=interrupt)
    assert len(given.sizes) < 10
    assert counts(mirror(one, two))[3] == 0
    assert content(two) == content(one)


# -- secrets ---------------------------------------------------------------------------------


def test_batches_carry_secrets_and_show_none(
    make_store: Callable[[str], Store], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    one, two = make_store("seaweedfs-obstore"), make_store("azurite-obstore")
    assert isinstance(one, BucketStore)
    one.put_all({"a": b"1", "b": b"2"})
    secrets = [reveal(one.config.secret_access_key), reveal(two.config.account_key)]
    seen: list[batches.Batch] = []

    class Watching(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            seen.append(args[0])
            return super().submit(fn, pickle.loads(pickle.dumps(args[0])), **kwargs)

    wrong = S3Config("AKIDEXAMPLE", "a secret that is wrong", endpoint_url=one.server.endpoint)
    with caplog.at_level(logging.DEBUG), Watching(1) as pool:
        result = mirror(one, two, executor=pool)
        with pytest.raises(Exception, match="s3://") as caught:
            StorageOperations.mirror(
                one.base, two.uri("x"), config=wrong, dest_config=two.config, executor=pool
            )
    carried = pickle.dumps(seen[0])
    for secret in secrets:
        assert secret.encode() in carried
        for text in (repr(seen), str(seen), repr(result), caplog.text, str(caught.value)):
            assert secret not in text
    assert "a secret that is wrong" not in f"{caught.value!r}{caplog.text}"


def test_limits_and_named_stores_of_the_client_hold_for_its_workers(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own environment knows neither."""
    one, two = make_store("seaweedfs-obstore"), make_store("file")
    one.put_all({"a": b"1"})
    fields = {
        name: reveal(value)
        for name, value in one.config
        if name in one.config.model_fields_set and value is not None
    }
    settings = load_settings(
        transfer={"connections": 3, "attempts": 2},
        stores={"main": {"prefix": one.base, "type": "s3", **fields}},
    )
    seen: list[batches.Batch] = []

    class Watching(ProcessPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            seen.append(args[0])
            return super().submit(fn, *args, **kwargs)

    with (
        StorageClient(settings=settings) as client,
        Watching(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        assert counts(client.mirror(one.base, two.base, executor=pool)) == (1, 0, 0, 0)
    assert content(two) == {"a": b"1"}
    assert (seen[0].ends.transfer.connections, seen[0].ends.transfer.attempts) == (3, 2)


def test_a_cancelled_mirror_gives_out_no_more_work(make_store: Callable[[str], Store]) -> None:
    one, two = make_store("memory"), make_store("file")
    one.put_all(many(300, 3))
    with Counting() as pool:

        async def run() -> None:
            task: asyncio.Task[Any]

            def cancel(progress: Progress) -> None:
                loop.call_soon_threadsafe(task.cancel)
                time.sleep(0.05)

            loop = asyncio.get_running_loop()
            task = asyncio.ensure_future(
                StorageOperations.amirror(
                    one.base, two.base, executor=pool, batch_size=5, in_flight=2, progress=cancel
                )
            )
            await task

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
        assert len(pool.sizes) < 20
    assert counts(mirror(one, two))[3] == 0
    assert content(two) == content(one)
