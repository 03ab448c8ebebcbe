"""The cache against a model of it that fits on a page, through any sequence of events."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage import ModelMissingError, OfflineError, StorageClient
from storage.backends.base import bytes_payload
from storage.backends.memory import MemoryBackend
from storage.cache.blobs import State
from storage.cache.evict import evict
from storage.cache.gc import collect
from storage.config import load_settings
from storage.digest import Digest, MultiHasher
from storage.uri import parse_uri
from tests.cache.support import flip_byte, tree_bytes, wrong_blobs

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1

NAMES = st.sampled_from(["iris", "bert", "llama"])
# Few contents, so that models share them.
CONTENTS = st.sampled_from([b"", b"a", b"weights" * 100, b"config", bytes(5000)])
TREES = st.dictionaries(
    st.sampled_from(["model.bin", "config/a.json", "config/b.json", "z"]), CONTENTS, min_size=1
)
Tree = dict[str, bytes]


def digest_of(data: bytes) -> Digest:
    hasher = MultiHasher(("blake3",))
    hasher.update(data)
    return hasher.digests()["blake3"]


class CacheMachine(RuleBasedStateMachine):
    """Events, and what has to be true after each of them."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.bucket = f"b{uuid4().hex}"
        self.remote: dict[str, Tree] = {}
        self.cached: dict[str, Tree] = {}
        self.leased: list[Tree] = []
        self.pinned: set[str] = set()
        self.hit: set[bytes] = set()
        self.paths: dict[str, str] = {}
        self.patch = pytest.MonkeyPatch()
        self.client = self.new_client()

    def teardown(self) -> None:
        self.client.cache.close()
        self.client.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    def new_client(self) -> StorageClient:
        return StorageClient(
            settings=load_settings(cache_dir=self.folder / "cache", cache_grace=0.0)
        )

    def uri(self, name: str) -> str:
        return f"memory://{self.bucket}/{name}"

    # -- the store ---------------------------------------------------------------------------

    @rule(name=NAMES, tree=TREES)
    def publish(self, name: str, tree: Tree) -> None:
        self.forget(name)
        backend = MemoryBackend(self.bucket)
        for path, data in tree.items():
            backend.write(f"{name}/{path}", bytes_payload(data))
        self.remote[name] = tree

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        for path in self.remote.pop(name, {}):
            MemoryBackend(self.bucket).delete([f"{name}/{path}"])

    # -- what is on the disk -----------------------------------------------------------------

    def place_of(self, data: bytes) -> Path:
        """Return where the blob of a content has to be, there or not, right or not."""
        return Path(self.client.cache.upper.blobs.path(digest_of(data)))

    def is_right(self, data: bytes) -> bool:
        place = self.place_of(data)
        return place.exists() and place.read_bytes() == data

    def is_damaged(self, data: bytes) -> bool:
        """Tell whether a content is wrong, or was once and nobody has tidied up since."""
        if self.place_of(data).exists():
            return not self.is_right(data)
        away = self.folder / "cache" / "quarantine"
        return any(digest_of(data).hex in path.name for path in away.glob("*"))

    # -- downloads ---------------------------------------------------------------------------

    def is_whole(self, name: str) -> bool:
        return name in self.cached and self.hit.isdisjoint(self.cached[name].values())

    def arrived(self, name: str, path: str, tree: Tree) -> None:
        assert tree_bytes(path) == tree
        self.cached[name] = tree
        self.leased.append(tree)
        self.paths[name] = path
        self.hit -= set(tree.values())

    @rule(name=NAMES)
    def download(self, name: str) -> None:
        if name not in self.remote:
            with pytest.raises(ModelMissingError):
                self.client.download(self.uri(name))
            return
        self.arrived(name, self.client.download(self.uri(name)), self.remote[name])

    @rule(name=NAMES)
    def download_cache_first(self, name: str) -> None:
        expected = self.cached[name] if self.is_whole(name) else self.remote.get(name)
        if expected is None:
            with pytest.raises(ModelMissingError):
                self.client.download(self.uri(name), freshness="cache-first")
            return
        path = self.client.download(self.uri(name), freshness="cache-first")
        self.arrived(name, path, expected)

    @rule(name=NAMES)
    def download_to(self, name: str) -> None:
        if name in self.remote:
            out = self.folder / "out" / uuid4().hex
            assert tree_bytes(self.client.download(self.uri(name), out)) == self.remote[name]

    @rule(name=NAMES)
    def download_offline(self, name: str) -> None:
        if self.is_whole(name):
            path = self.client.download(self.uri(name), offline=True)
            self.arrived(name, path, self.cached[name])
            return
        if name not in self.cached:
            expected = "never cached"
        elif any(map(self.is_damaged, self.cached[name].values())):
            expected = "damaged"
        else:
            expected = "only in part"
        with pytest.raises(OfflineError, match=expected):
            self.client.download(self.uri(name), offline=True)

    # -- accidents ---------------------------------------------------------------------------

    @precondition(lambda self: any(self.cached.values()))
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        everything = sorted({each for tree in self.cached.values() for each in tree.values()})
        content = data.draw(st.sampled_from(everything))
        if content and content not in self.hit:
            assert self.is_right(content)
            flip_byte(self.place_of(content))
            self.hit.add(content)

    @precondition(lambda self: any(self.cached.values()))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        everything = sorted({each for tree in self.cached.values() for each in tree.values()})
        content = data.draw(st.sampled_from(everything))
        if content not in self.hit:
            assert self.is_right(content)
            self.place_of(content).unlink()
            self.hit.add(content)

    @rule()
    def restart(self) -> None:
        self.client.cache.close()
        self.client.close()
        self.leased.clear()
        self.paths.clear()
        self.client = self.new_client()

    @rule()
    def power_cut(self) -> None:
        self.restart()
        boot = uuid4().hex
        self.patch.setattr("storage.cache.blobs.boot_id", lambda: boot)

    # -- upkeep ------------------------------------------------------------------------------

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        if name in self.cached:
            self.client.cache.pin(parse_uri(self.uri(name)))
            self.pinned.add(name)
        else:
            with pytest.raises(ModelMissingError):
                self.client.cache.pin(parse_uri(self.uri(name)))

    @rule(name=NAMES)
    def unpin(self, name: str) -> None:
        assert self.client.cache.unpin(parse_uri(self.uri(name))) == (name in self.pinned)
        self.pinned.discard(name)

    @rule()
    def evict_all(self) -> None:
        kept = [*self.leased, *(self.cached[name] for name in self.pinned)]
        needed = {data for tree in kept for data in tree.values()}
        # One that gives no byte back does not go for nothing.
        self.cached = {
            name: tree
            for name, tree in self.cached.items()
            if not any(
                data and self.place_of(data).exists()
                for data in tree.values()
                if data not in needed
            )
        }
        evict(self.client.cache, 0)

    @rule()
    def collect(self) -> None:
        collect(self.client.cache)

    # -- what is always true -----------------------------------------------------------------

    @invariant()
    def what_was_handed_over_is_right(self) -> None:
        for name, path in getattr(self, "paths", {}).items():
            if self.is_whole(name):
                assert tree_bytes(path) == self.cached[name]

    @invariant()
    def a_wrong_blob_has_no_mark(self) -> None:
        if not hasattr(self, "client"):
            return
        for blob in wrong_blobs(self.folder / "cache"):
            digest = Digest(blob.parts[-3], blob.name)
            assert (
                self.client.cache.upper.blobs.look(digest, blob.stat().st_size) is not State.CLEAN
            )


CacheMachine.TestCase.settings = settings(
    max_examples=60 * SOAK,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
TestCache = pytest.mark.slow(CacheMachine.TestCase)
