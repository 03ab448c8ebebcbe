"""No byte is moved twice: counted at the server, over several nodes with caches of their own."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storage import StorageClient
from storage.config import load_settings
from storage.digest import hash_file
from storage.errors import TransferError
from storage.registry import ModelRegistry
from tests.facade.conftest import bucket_store
from tests.facade.stores import BucketStore, tree_bytes
from tests.servers import CountingProxy, Recorded

KIB = 1024
MIB = 1024 * KIB
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_BLOB = re.compile(r"/registry/blobs/[0-9a-f]{2}/([0-9a-f]{64})/[^/?]+(?:\?(.*))?$")

FIRST = {
    "config.json": b'{"layers": 2}',
    "weights-1.bin": random.Random(1).randbytes(3 * MIB + 7),
    "weights-2.bin": random.Random(2).randbytes(200 * KIB),
    "again.bin": random.Random(2).randbytes(200 * KIB),
}
SECOND = FIRST | {"config.json": b'{"layers": 3}', "head.bin": random.Random(3).randbytes(MIB)}

# What the documents and listings of a few calls may come to: less than any content but one.
LITTLE = 64 * KIB


class Traffic:
    """A registry on a server behind a proxy, and what went through that."""

    def __init__(self, store: BucketStore, proxy: CountingProxy, folder: Path) -> None:
        self.proxy = proxy
        self._store = store
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._clients: list[StorageClient] = []
        address = str(store.config.endpoint_url).replace(store.server.endpoint, proxy.endpoint)
        self.config = store.config.model_copy(update={"endpoint_url": address})
        self.uri = store.uri("registry")

    def node(self, name: str, **settings: Any) -> ModelRegistry:
        """Return the registry as a machine of this ``name``, with a cache of its own, sees it."""
        cache = self._folder / name
        client = StorageClient(settings=load_settings(cache_dir=cache, **settings))
        self._clients.append(client)
        return ModelRegistry(self.uri, config=self.config, client=client)

    def tree(self, files: dict[str, bytes]) -> Path:
        """Return a new folder of files, whose content is recognised from now on."""
        folder = self._folder / "src"
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._sizes[hash_file(str(path), ("blake3",))["blake3"].hex] = len(data)
        return folder

    @property
    def blobs(self) -> list[str]:
        """Names of the blobs that the server has."""
        keys = self._store.keys()
        return [key for key in keys if key.startswith("registry/blobs/")]

    @contextmanager
    def moves(self, *, sent: int = 0, fetched: int = 0) -> Iterator[None]:
        """Demand that so many bytes of content pass, counted by what came through the proxy."""
        self.proxy.clear()
        yield
        assert sent <= self.proxy.received < sent + LITTLE
        assert fetched <= self.proxy.answered < fetched + LITTLE

    def _moved(self, method: str) -> dict[str, int]:
        moved: Counter[str] = Counter()
        for request in self.proxy.requests:
            found = _BLOB.search(request.path)
            if found and request.method == method and request.status in (200, 206):
                moved[found[1]] += self._bytes(found[1], request)
        return dict(moved)

    def _bytes(self, digest: str, request: Recorded) -> int:
        if request.method == "PUT":
            return int(request.headers["content-length"])
        span = _RANGE.fullmatch(request.headers.get("range", ""))
        return int(span[2]) + 1 - int(span[1]) if span else self._sizes[digest]

    @property
    def fetched(self) -> dict[str, int]:
        """Bytes of each content that were asked for, by BLAKE3."""
        return {digest: size for digest, size in self._moved("GET").items() if size}

    @property
    def sent(self) -> dict[str, int]:
        """Bytes of each content that were stored."""
        return {digest: size for digest, size in self._moved("PUT").items() if size}

    def contents(self, files: dict[str, bytes]) -> dict[str, int]:
        """Return what :attr:`fetched` and :attr:`sent` are if each content moved once."""
        folder = self.tree(files)
        hexes = [hash_file(str(folder / name), ("blake3",))["blake3"].hex for name in files]
        return {digest: self._sizes[digest] for digest in hexes if self._sizes[digest]}

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def traffic(
    request: pytest.FixtureRequest,
    prefix: str,
    counting_proxy: Callable[[str], CountingProxy],
    tmp_path: Path,
) -> Iterator[Traffic]:
    store = bucket_store(request, getattr(request, "param", "seaweedfs-obstore"), prefix)
    found = Traffic(store, counting_proxy(store.server.endpoint), tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize(
    "traffic", ["seaweedfs-obstore", "gcs-fsspec", "azurite-obstore"], indirect=True
)
def test_what_a_node_has_does_not_pass_the_network_again(traffic: Traffic) -> None:
    one, two, three = map(traffic.node, ("one", "two", "three"))
    one.init()
    size = sum(traffic.contents(FIRST).values())
    with traffic.moves(sent=size):
        assert one.push("iris", traffic.tree(FIRST)).number == 1
    with traffic.moves(fetched=size):
        assert tree_bytes(two.pull("iris")) == FIRST
    blobs = traffic.blobs
    assert len(blobs) == len(traffic.contents(FIRST))

    # Published again from another node, which has it from the registry.
    with traffic.moves(fetched=size):
        elsewhere = three.pull("iris", 1)
    with traffic.moves():
        assert three.push("iris", elsewhere).number == 1
        assert three.push("lily", elsewhere).number == 1
    assert traffic.blobs == blobs
    with traffic.moves():
        for model, reference in (("iris", "latest"), ("iris", 1), ("lily", 1)):
            assert tree_bytes(two.pull(model, reference)) == FIRST

    # With one file changed, and one more.
    new = sum(len(SECOND[name]) for name in SECOND if FIRST.get(name) != SECOND[name])
    with traffic.moves(sent=new):
        assert three.push("iris", traffic.tree(SECOND)).number == 2
    assert len(set(traffic.blobs) - set(blobs)) == 2
    with traffic.moves(fetched=new):
        assert tree_bytes(two.pull("iris")) == SECOND

    # Other processes with the cache of that node, or with one of their own above it.
    with traffic.moves():
        assert tree_bytes(traffic.node("two").pull("iris")) == SECOND
        above = traffic.node("above", cache_lower=[two.client.cache.upper.path])
        assert tree_bytes(above.pull("iris")) == SECOND


def test_what_two_pull_into_one_cache_at_the_same_time_comes_once(traffic: Traffic) -> None:
    one = traffic.node("one")
    one.init()
    one.push("iris", traffic.tree(FIRST))
    nodes = [traffic.node("shared") for _ in range(4)]
    with (
        traffic.moves(fetched=sum(traffic.contents(FIRST).values())),
        ThreadPoolExecutor(len(nodes)) as pool,
    ):
        paths = set(pool.map(lambda node: node.pull("iris", 1), nodes))
    assert [tree_bytes(path) for path in paths] == [FIRST]


def test_a_version_that_is_pulled_published_elsewhere_and_pulled_again_moves_no_byte_twice(
    traffic: Traffic,
) -> None:
    one, two = traffic.node("one"), traffic.node("two")
    one.init()
    once = traffic.contents(FIRST)
    assert one.push("iris", traffic.tree(FIRST)).number == 1
    # Two files are of one content.
    assert traffic.sent == once
    assert sum(once.values()) == sum(map(len, FIRST.values())) - len(FIRST["again.bin"])
    pulled = two.pull("iris")
    assert tree_bytes(pulled) == FIRST
    assert traffic.fetched == once

    # The same content, from the other node: the same version.
    traffic.proxy.clear()
    assert two.push("iris", pulled).number == 1
    assert tree_bytes(two.pull("iris")) == FIRST
    assert tree_bytes(two.pull("iris", 1)) == FIRST
    assert (traffic.sent, traffic.fetched) == ({}, {})

    # Another content that shares files, from a third one: only what is new moves.
    new = traffic.contents(SECOND).items() - once.items()
    three = traffic.node("three")
    assert three.push("iris", traffic.tree(SECOND)).number == 2
    assert traffic.sent == dict(new)
    assert tree_bytes(two.pull("iris")) == SECOND
    assert traffic.fetched == dict(new)

    # And back again; under another name, too.
    traffic.proxy.clear()
    assert one.push("iris", traffic.tree(FIRST)).number == 1
    assert two.push("lily", traffic.tree(SECOND)).number == 1
    assert tree_bytes(two.pull("iris", 1)) == FIRST
    assert tree_bytes(two.pull("lily")) == SECOND
    assert (traffic.sent, traffic.fetched) == ({}, {})


def test_what_came_from_one_registry_does_not_come_from_another(
    traffic: Traffic, tmp_path: Path
) -> None:
    folder = traffic.tree(FIRST)
    elsewhere = ModelRegistry(tmp_path / "elsewhere", client=traffic.node("one").client)
    elsewhere.init()
    elsewhere.push("rose", folder)
    elsewhere.pull("rose")
    registry = traffic.node("two")
    registry.init()
    registry.push("iris", folder)
    assert tree_bytes(traffic.node("one").pull("iris")) == FIRST
    assert traffic.fetched == {}


def test_a_destination_gets_each_content_once(traffic: Traffic, tmp_path: Path) -> None:
    registry = traffic.node("one")
    registry.init()
    registry.push("iris", traffic.tree(FIRST))
    out = registry.pull("iris", 1, tmp_path / "out")
    assert tree_bytes(out) == FIRST
    assert traffic.fetched == traffic.contents(FIRST)
    registry.pull("iris", 1)
    traffic.proxy.clear()
    assert tree_bytes(registry.pull("iris", 1, tmp_path / "other")) == FIRST
    assert traffic.fetched == {}


def test_large_files_come_in_parts_and_nothing_else_is_asked_of_them(traffic: Traffic) -> None:
    publisher = traffic.node("one")
    publisher.init()
    publisher.push("iris", traffic.tree(FIRST))
    traffic.proxy.clear()
    registry = traffic.node("two", transfer={"part_size": "1MiB", "connections": 2})
    assert tree_bytes(registry.pull("iris", 1)) == FIRST
    blobs = [each for each in traffic.proxy.requests if "/blobs/" in each.path]
    assert {request.method for request in blobs} == {"GET"}
    ranged = [request for request in blobs if "range" in request.headers]
    assert len(ranged) >= 3
    assert traffic.fetched == traffic.contents(FIRST)
    # Of the registry: that it is one, the version, and that it was not deleted.
    assert len(traffic.proxy.requests) - len(blobs) <= 3


def test_a_pull_that_broke_off_goes_on_where_it_was(traffic: Traffic) -> None:
    files = {"large.bin": random.Random(4).randbytes(24 * MIB)}
    registry = traffic.node("one")
    registry.init()
    registry.push("iris", traffic.tree(files))
    settings = {"part_size": "1MiB", "connections": 2, "attempts": 1}
    cut = traffic.node("two", transfer=settings)
    # Nothing more is answered after so many parts.
    traffic.proxy.clear()
    traffic.proxy.fault = lambda number, method, path: (
        503 if len(_ranges(traffic.proxy.requests)) >= 14 and "/blobs/" in path else None
    )
    with pytest.raises(TransferError):
        cut.pull("iris", 1)
    traffic.proxy.fault = None
    before = sum(traffic.fetched.values())
    assert 10 * MIB <= before <= 18 * MIB
    traffic.proxy.clear()
    assert tree_bytes(cut.pull("iris", 1)) == files
    assert before + sum(traffic.fetched.values()) <= 24 * MIB + 4 * MIB


def _ranges(requests: list[Recorded]) -> list[Recorded]:
    return [each for each in requests if "range" in each.headers and each.status == 206]
