"""Downloads without a destination: kept in the cache, found again, served offline."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import (
    InvalidInput,
    OfflineError,
    Progress,
    S3Config,
    Storage,
    StorageClient,
    UnreachableError,
)
from storage.config import load_settings
from tests.facade.stores import S3Store, Store, cached_content, needs, s3_config, tree_bytes
from tests.servers import CountingProxy

TREE = {"model.bin": b"weights", "config/params.json": b"{}", "empty": b""}

MakeProxy = Callable[[str], CountingProxy]


def bodies(proxy: CountingProxy) -> list[str]:
    """Return the paths of requests that fetched an object's content."""
    return [
        request.path
        for request in proxy.requests
        if request.method == "GET" and "list-type" not in request.path
    ]


@needs("remote")
def test_a_tree_is_a_folder_and_an_object_keeps_its_name(store: Store) -> None:
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    tree = Storage.download(store.uri("iris"), config=store.config)
    file = Storage.download(store.uri("iris/model.bin"), config=store.config)
    for path in (tree, file):
        assert path.startswith(os.environ["STORAGE_CACHE_DIR"] + "/")
    assert os.path.basename(file) == "model.bin"
    assert os.path.isdir(tree)
    assert os.path.isfile(file)
    assert tree_bytes(tree) == TREE
    assert Path(file).read_bytes() == b"weights"


@needs("remote")
def test_a_repeat_moves_nothing_and_gives_the_same_path(store: Store) -> None:
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    for path in ("iris", "iris/model.bin", "iris/empty"):
        first = Storage.download(store.uri(path), config=store.config)
        events: list[Progress] = []
        again = Storage.download(store.uri(path), config=store.config, progress=events.append)
        assert again == first
        assert events[-1].finished
        assert events[-1].bytes_done == events[-1].bytes_present == events[-1].bytes_total


@needs("S3")
def test_a_repeat_fetches_no_body(store: Store, counting_proxy: MakeProxy) -> None:
    assert isinstance(store, S3Store)
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    for path, count in (("iris", 3), ("iris/model.bin", 1)):
        proxy.clear()
        first = Storage.download(store.uri(path), config=config)
        # An empty object may need no request of its own.
        assert count - 1 <= len(bodies(proxy)) <= count
        proxy.clear()
        assert Storage.download(store.uri(path), config=config) == first
        assert bodies(proxy) == []
        # One look at one object; a look for an object and one page for a tree. obstore cannot
        # tell a marker from an empty file by a listing, and asks about those.
        assert 1 <= proxy.count() <= (3 if path == "iris" else 1)


@needs("remote")
def test_what_has_changed_is_fetched_anew_and_the_old_path_stays(store: Store) -> None:
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    uri, config = store.uri("iris"), store.config
    first = Storage.download(uri, config=config)
    store.put_raw("iris/model.bin", b"changed")  # of the same size
    second = Storage.download(uri, config=config)
    assert second != first
    assert tree_bytes(second) == TREE | {"model.bin": b"changed"}
    assert tree_bytes(first) == TREE
    store.delete_raw("iris/model.bin")
    third = Storage.download(uri, config=config)
    assert sorted(tree_bytes(third)) == ["config/params.json", "empty"]
    store.put_raw("iris/new", b"n")
    assert sorted(tree_bytes(Storage.download(uri, config=config))) == [
        "config/params.json",
        "empty",
        "new",
    ]


@pytest.mark.parametrize("name", ["file", "pvc"])
def test_what_is_on_this_machine_stays_where_it_is(
    make_store: Callable[[str], Store], name: str
) -> None:
    store = make_store(name)
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    for path in ("iris", "iris/", "iris/model.bin"):
        for offline in (None, True, "auto"):
            found = Storage.download(store.uri(path), config=store.config, offline=offline)
            assert found == store.filesystem_path(path).rstrip("/")
    assert cached_content() == []


def test_plain_paths_stay_where_they_are(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store("file")
    store.put_raw("[1] #%41/model.bin", b"weights")
    folder = Path(store.filesystem_path(""))
    monkeypatch.chdir(folder)
    for path in (
        str(folder / "[1] #%41" / "model.bin"),
        folder / "[1] #%41" / "model.bin",
        "[1] #%41/model.bin",
        "./[1] #%41/../[1] #%41/model.bin",
        f"file://localhost{folder}/[1] #%41/model.bin",
    ):
        assert Storage.is_local(path)
        assert Storage.download(path) == str(folder / "[1] #%41" / "model.bin")
    assert cached_content() == []


@needs("remote")
def test_many_threads_get_the_same_whole_tree(store: Store) -> None:
    store.put_all({f"iris/{number}": bytes([number]) * 5000 for number in range(20)})
    expected = {str(number): bytes([number]) * 5000 for number in range(20)}
    barrier = threading.Barrier(6)

    def download(_: int) -> str:
        barrier.wait(30)
        return Storage.download(store.uri("iris"), config=store.config)

    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(download, range(6)))
    assert len(paths) == 1
    assert tree_bytes(paths.pop()) == expected
    leftovers = [path for path in cached_content() if ".partial" in str(path)]
    assert leftovers == []


def test_what_lost_its_content_is_fetched_again(
    make_store: Callable[[str], Store],
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", b"weights")
    path = Path(Storage.download(store.uri("model.bin")))
    path.resolve().unlink()
    with pytest.raises(OfflineError, match="only in part"):
        Storage.download(store.uri("model.bin"), offline=True)
    assert Path(Storage.download(store.uri("model.bin"))).read_bytes() == b"weights"


# -- offline ---------------------------------------------------------------------------------


@needs("remote")
def test_what_was_kept_is_served_offline(store: Store, out: Path) -> None:
    store.put_all({f"iris/{path}": data for path, data in TREE.items()})
    tree = Storage.download(store.uri("iris"), config=store.config)
    file = Storage.download(store.uri("iris/model.bin"), config=store.config)
    for path in TREE:
        store.delete_raw(f"iris/{path}")
    assert Storage.download(store.uri("iris"), config=store.config, offline=True) == tree
    assert Storage.download(store.uri("iris/model.bin"), config=store.config, offline=True) == file
    found = Storage.download(store.uri("iris"), out / "tree", config=store.config, offline=True)
    assert found == str(out / "tree")
    assert tree_bytes(found) == TREE
    found = Storage.download(store.uri("iris/model.bin"), out, config=store.config, offline=True)
    assert found == str(out / "model.bin")
    assert (out / "model.bin").read_bytes() == b"weights"
    assert sorted(os.listdir(out)) == ["model.bin", "tree"]


@needs("S3")
def test_offline_asks_nobody(store: Store, counting_proxy: MakeProxy) -> None:
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    proxy = counting_proxy(store.server.endpoint)
    config = store.through(proxy.endpoint)
    path = Storage.download(store.uri("model.bin"), config=config)
    proxy.clear()
    assert Storage.download(store.uri("model.bin"), config=config, offline=True) == path
    with pytest.raises(OfflineError, match="never cached"):
        Storage.download(store.uri("other.bin"), config=config, offline=True)
    assert proxy.requests == []


@needs("remote")
def test_what_was_never_kept_is_not_served_offline(store: Store, out: Path) -> None:
    store.put_raw("iris/model.bin", b"weights")
    # With a destination nothing is kept.
    Storage.download(store.uri("iris/model.bin"), out / "a", config=store.config)
    for dest in (None, out / "b"):
        with pytest.raises(OfflineError, match="never cached"):
            Storage.download(store.uri("iris/model.bin"), dest, config=store.config, offline=True)
    Storage.download(store.uri("iris"), config=store.config)
    with pytest.raises(OfflineError, match="never cached"):
        Storage.download(store.uri("iris"), config=store.config, allow_patterns="*", offline=True)
    assert os.listdir(out) == ["a"]


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_environment_may_say_offline(
    make_store: Callable[[str], Store],
    fresh_default_client: None,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", b"weights")
    monkeypatch.setenv("STORAGE_OFFLINE", value)
    with pytest.raises(OfflineError):
        Storage.download(store.uri("model.bin"))
    # The call has the last word.
    path = Storage.download(store.uri("model.bin"), offline=False)
    assert Storage.download(store.uri("model.bin")) == path


def impatient() -> StorageClient:
    return StorageClient(settings=load_settings(transfer={"attempts": 1, "connect_timeout": 5}))


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
def test_auto_falls_back_to_what_was_kept(
    make_store: Callable[[str], Store], out: Path, driver: str
) -> None:
    store = make_store(f"seaweedfs-{driver}")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    uri = store.uri("model.bin")
    with impatient() as client, CountingProxy(store.server.endpoint) as proxy:
        nobody = store.through(proxy.endpoint)
        kept = client.download(uri, config=nobody, offline="auto")
    with impatient() as client:
        with pytest.warns(RuntimeWarning, match="the cached copy is used"):
            assert client.download(uri, config=nobody, offline="auto") == kept
        with pytest.warns(RuntimeWarning, match="the cached copy is used"):
            client.download(uri, out / "a", config=nobody, offline="auto")
        with pytest.raises(UnreachableError):
            client.download(uri, config=nobody)
        with pytest.raises(UnreachableError):
            client.download(store.uri("never.bin"), config=nobody, offline="auto")
    assert tree_bytes(out) == {"a": b"weights"}


def test_auto_does_not_hide_what_the_store_says(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", b"weights")
    Storage.download(store.uri("model.bin"))
    store.delete_raw("model.bin")
    with pytest.raises(FileNotFoundError):
        Storage.download(store.uri("model.bin"), offline="auto")


@pytest.mark.parametrize("offline", ["yes", "", 2])
def test_what_is_neither_online_nor_offline_is_refused(
    make_store: Callable[[str], Store], offline: object
) -> None:
    store = make_store("memory")
    store.put_raw("model.bin", b"weights")
    with pytest.raises(InvalidInput, match="offline"):
        Storage.download(store.uri("model.bin"), offline=offline)  # type: ignore[arg-type]


def test_offline_needs_no_usable_config(make_store: Callable[[str], Store]) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    path = Storage.download(store.uri("model.bin"), config=store.config)
    assert Storage.download(store.uri("model.bin"), offline=True) == path
    endpoint = store.config.endpoint_url
    unusable = S3Config("someone", "else", endpoint_url=endpoint)
    assert Storage.download(store.uri("model.bin"), config=unusable, offline=True) == path


def test_offline_a_bucket_of_the_same_name_elsewhere_is_another(
    make_store: Callable[[str], Store],
) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    Storage.download(store.uri("model.bin"), config=store.config)
    elsewhere = S3Config("someone", "else", endpoint_url="http://127.0.0.1:1")
    with pytest.raises(OfflineError, match="never cached"):
        Storage.download(store.uri("model.bin"), config=elsewhere, offline=True)


# -- several at once -------------------------------------------------------------------------


def test_several_are_downloaded_in_order(make_store: Callable[[str], Store], out: Path) -> None:
    store = make_store("seaweedfs-obstore")
    for number in range(12):
        store.put_raw(f"m{number}/model.bin", b"%d" % number)
    uris = [store.uri(f"m{number}") for number in range(12)]
    kept = Storage.download_many(uris, config=store.config)
    assert [tree_bytes(path) for path in kept] == [{"model.bin": b"%d" % n} for n in range(12)]
    dests = [out / str(number) for number in range(12)]
    assert Storage.download_many(uris, dests, config=store.config) == [str(dest) for dest in dests]
    assert tree_bytes(out) == {f"{n}/model.bin": b"%d" % n for n in range(12)}
    mixed = Storage.download_many(uris[:2], [None, out / "last"], config=store.config)
    assert mixed == [kept[0], str(out / "last")]
    assert Storage.download_many([]) == []


def test_options_of_several_hold_for_each(make_store: Callable[[str], Store]) -> None:
    store = make_store("memory")
    store.put_all({"a/x.bin": b"1", "a/y": b"2", "b/x.bin": b"3", "b/y": b"4"})
    paths = Storage.download_many([store.uri("a"), store.uri("b")], allow_patterns="*.bin")
    assert [tree_bytes(path) for path in paths] == [{"x.bin": b"1"}, {"x.bin": b"3"}]


def test_the_failure_of_one_of_several_is_raised(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_raw("a", b"1")
    with pytest.raises(FileNotFoundError, match="absent"):
        Storage.download_many([store.uri("a"), store.uri("absent")], [out / "a", out / "b"])
    assert set(os.listdir(out)) <= {"a"}


def test_several_that_contradict_themselves_are_refused(
    make_store: Callable[[str], Store], out: Path
) -> None:
    store = make_store("memory")
    store.put_all({"a": b"1", "b": b"2"})
    uris = [store.uri("a"), store.uri("b")]
    for wrong, dests in (
        (store.uri("a"), None),
        (uris, [out / "a"]),
        (uris, [out / "same", f"{out}/x/../same"]),
    ):
        with pytest.raises(InvalidInput):
            Storage.download_many(wrong, dests)  # type: ignore[arg-type]
    assert os.listdir(out) == []


def test_two_stores_of_one_kind_serve_one_process(
    make_store: Callable[[str], Store], out: Path
) -> None:
    """The same bucket and key on two servers, in turn and at once."""
    one, two = make_store("seaweedfs-obstore"), make_store("moto-obstore")
    assert isinstance(one, S3Store)
    assert isinstance(two, S3Store)
    with one.server.bucket("same-name") as bucket, two.server.bucket("same-name"):
        one.server.put_raw(bucket, "model", b"from seaweedfs")
        two.server.put_raw(bucket, "model", b"from moto")
        configs = {
            (store.server.name, driver): s3_config(store.server, driver)
            for store in (one, two)
            for driver in ("obstore", "fsspec")
        }

        def download(item: tuple[int, tuple[str, str]]) -> tuple[str, bytes]:
            number, which = item
            path = Storage.download(
                "s3://same-name/model", out / str(number), config=configs[which]
            )
            return which[0], Path(path).read_bytes()

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(download, enumerate(list(configs) * 3)))
        for server, data in found:
            assert data == f"from {server}".encode()
        for server, driver in configs:
            kept = Storage.download("s3://same-name/model", config=configs[server, driver])
            assert Path(kept).read_bytes() == f"from {server}".encode()
