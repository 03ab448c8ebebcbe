"""Mirrors: every direction, any executor of the standard library, what is in place already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import (
    MirrorError,
    MirrorResult,
    StorageClient,
    StorageOperations,
)
from storage.transfer.progress import Progress
from tests.facade.mirror.support import (
    ENDS,
    FILES,
    MIB,
    Counting,
    content,
    counts,
    many,
    mirror,
    processes,
)
from tests.facade.stores import BucketStore, FileStore, Store, s3_config
from tests.servers import CountingProxy
from tests.servers.nginx_http import NginxHTTP

# A process that has threads is forked on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

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
