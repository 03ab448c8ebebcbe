"""Large objects in parts: fetched by ranges, and never put together from two versions."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import (
    ModelMissingError,
    Progress,
    StorageClient,
    StorageError,
    TransferError,
)
from storage.config import load_settings
from tests.facade.stores import S3Store, Store, needs, tree_bytes
from tests.servers import CountingProxy

MIB = 1024 * 1024


@functools.cache
def content(seed: int, size: int = 10 * MIB) -> bytes:
    return random.Random(seed).randbytes(size)


@needs("S3")
def test_ten_parts_are_ten_ranges(
    store: Store,
    small_parts: StorageClient,
    counting_proxy: Callable[[str], CountingProxy],
    out: Path,
) -> None:
    assert isinstance(store, S3Store)
    data = content(1)
    store.put_raw("model.bin", data)
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    path = small_parts.download(store.uri("model.bin"), out / "f", config=config)
    assert Path(path).read_bytes() == data
    statuses = [request.status for request in proxy.requests if request.method == "GET"]
    assert statuses == [206] * 10
    assert proxy.count("HEAD") == 1


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 2 * MIB, 10 * MIB + 17])
def test_every_size_comes_down_whole(
    store: Store, small_parts: StorageClient, out: Path, size: int
) -> None:
    data = content(size, size)
    store.put_raw("model.bin", data)
    events: list[Progress] = []
    path = small_parts.download(
        store.uri("model.bin"), out / "f", config=store.config, progress=events.append
    )
    assert Path(path).read_bytes() == data
    assert events[-1].finished
    assert events[-1].bytes_done == events[-1].bytes_total == size
    assert [event.finished for event in events[:-1]] == [False] * (len(events) - 1)


def test_a_tree_of_large_and_small_objects_comes_down_whole(
    store: Store, small_parts: StorageClient, out: Path
) -> None:
    files = {
        f"{number}/f": content(number, size)
        for number, size in enumerate((0, 1, 3 * MIB + 1, 5, MIB, 2 * MIB, 7 * MIB))
    }
    store.put_all({f"tree/{path}": data for path, data in files.items()})
    path = small_parts.download(store.uri("tree"), out / "t", config=store.config)
    assert tree_bytes(path) == files
    kept = small_parts.download(store.uri("tree"), config=store.config)
    assert tree_bytes(kept) == files


def test_clients_have_limits_of_their_own(
    make_store: Callable[[str], Store], counting_proxy: Callable[[str], CountingProxy], out: Path
) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", content(1))
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    # Parts are even ones of at most that size, and as many as there are connections for.
    limits = [("2MiB", 16, 5), ("3MiB", 16, 4), ("4MiB", 1, 3), ("32MiB", 16, 3), ("32MiB", 1, 2)]
    for number, (part_size, connections, parts) in enumerate(limits):
        settings = load_settings(transfer={"part_size": part_size, "connections": connections})
        proxy.clear()
        with StorageClient(config, settings) as client:
            client.download(store.uri("model.bin"), out / str(number))
        assert proxy.count("GET") == parts


# -- an object that is replaced meanwhile ----------------------------------------------------


class AtFirstByte:
    """A progress callback that does something once: when the first bytes have arrived."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self.done = 0
        self.last: Progress

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        if self.done == 0 and progress.bytes_done and not progress.finished:
            self.done = 1
            self._action()


@needs("only the newest")
@pytest.mark.parametrize(
    ("size", "kept"),
    [(10 * MIB, False), (9 * MIB + 5, False), (100, False), (10 * MIB, True)],
    ids=["same-size", "smaller", "tiny", "into-the-cache"],
)
def test_a_replaced_object_is_never_spliced(
    store: Store, small_parts: StorageClient, out: Path, size: int, kept: bool
) -> None:
    kept = kept and not store.lacks("remote")
    old, new = content(1), content(2, size)
    store.put_raw("model.bin", old)
    replace = AtFirstByte(lambda: store.put_raw("model.bin", new))
    path = small_parts.download(
        store.uri("model.bin"),
        None if kept else out / "f",
        config=store.config,
        progress=replace,
    )
    assert replace.done == 1
    assert Path(path).read_bytes() == new
    assert os.listdir(out) == ([] if kept else ["f"])
    assert replace.last.finished
    assert replace.last.bytes_done == replace.last.bytes_total == size


def test_a_small_object_replaced_midway_is_never_spliced(store: Store, out: Path) -> None:
    # Below the size of a part: one request, and perhaps its answer is complete already.
    old, new = content(1, 6 * MIB), content(2, 6 * MIB)
    store.put_raw("model.bin", old)
    replace = AtFirstByte(lambda: store.put_raw("model.bin", new))
    with StorageClient() as client:
        path = client.download(
            store.uri("model.bin"), out / "f", config=store.config, progress=replace
        )
    assert replace.done == 1
    assert Path(path).read_bytes() in (old, new)


@needs("only the newest")
def test_an_object_of_a_tree_that_is_replaced_is_fetched_anew(
    store: Store, small_parts: StorageClient, out: Path
) -> None:
    old, new = content(1), content(2)
    store.put_all({"tree/a.bin": old, "tree/z": b"small"})
    replace = AtFirstByte(lambda: store.put_raw("tree/a.bin", new))
    path = small_parts.download(store.uri("tree"), out / "t", config=store.config, progress=replace)
    assert replace.done == 1
    assert tree_bytes(path) == {"a.bin": new, "z": b"small"}


def test_a_repository_that_changes_midway_is_that_of_the_beginning(
    make_store: Callable[[str], Store], small_parts: StorageClient, out: Path
) -> None:
    store = make_store("hub")
    files = {"a.bin": content(1), "z": b"small"}
    store.put_all({f"tree/{path}": data for path, data in files.items()})

    def change() -> None:
        store.put_raw("tree/a.bin", content(2))
        store.delete_raw("tree/z")

    begun = AtFirstByte(change)
    options = {"config": store.config, "progress": begun}
    path = small_parts.download(store.uri("tree"), out / "t", **options)
    assert begun.done == 1
    assert tree_bytes(path) == files
    again = small_parts.download(store.uri("tree"), out / "new", config=store.config)
    assert tree_bytes(again) == {"a.bin": content(2)}


@needs("only the newest")
def test_what_is_deleted_midway_is_an_error(
    store: Store, small_parts: StorageClient, out: Path
) -> None:
    store.put_raw("model.bin", content(1))
    delete = AtFirstByte(lambda: store.delete_raw("model.bin"))
    with pytest.raises(ModelMissingError):
        small_parts.download(
            store.uri("model.bin"), out / "f", config=store.config, progress=delete
        )
    assert delete.done == 1
    assert os.listdir(out) == []


@needs("S3")
def test_what_is_replaced_again_and_again_is_given_up(
    store: Store, small_parts: StorageClient, out: Path
) -> None:
    assert isinstance(store, S3Store)
    server, looks = store.server, []

    def replace(number: int, method: str, path: str) -> None:
        if method == "HEAD":
            looks.append(path)
        else:
            store.put_raw("model.bin", b"%d" % number * 3 * MIB)

    store.put_raw("model.bin", content(1, 3 * MIB))
    with CountingProxy(server.endpoint, replace) as proxy:
        config = store.through(proxy.endpoint)
        with pytest.raises(TransferError, match="replaced 4 times") as caught:
            small_parts.download(store.uri("model.bin"), out / "f", config=config)
    assert "\n" not in str(caught.value)
    assert 4 <= len(looks) <= 5
    assert os.listdir(out) == []


def test_an_error_of_the_callback_stops_the_download(
    store: Store, small_parts: StorageClient, out: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(_: Progress) -> None:
        raise StopError

    store.put_raw("model.bin", content(1))
    with pytest.raises(StopError):
        small_parts.download(store.uri("model.bin"), out / "f", config=store.config, progress=stop)
    assert os.listdir(out) == []
    # The client is as good as before.
    path = small_parts.download(store.uri("model.bin"), out / "f", config=store.config)
    assert Path(path).read_bytes() == content(1)


def test_errors_of_a_tree_stop_what_has_not_begun(
    make_store: Callable[[str], Store], small_parts: StorageClient, out: Path
) -> None:
    store = make_store("moto-obstore")
    assert isinstance(store, S3Store)
    store.put_all({f"tree/{number:03}": content(number, 1000) for number in range(50)})
    wrong = {"x-amz-meta-sha256": "0" * 64}
    store.server.put_raw(store.bucket, f"{store._prefix}tree/000", b"tampered", wrong)
    with pytest.raises(StorageError, match="tree/000"):
        small_parts.download(store.uri("tree"), out / "t", config=store.config)
    assert os.listdir(out) == []
