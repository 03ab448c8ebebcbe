"""What the faulty transfers move, and how each of them may end."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from storage.cache.verify import verify
from storage.client import StorageClient
from storage.digest import Digest, tree_digest
from storage.errors import IntegrityError, ObjectExistsError, OfflineError, StorageError
from storage.testing.fault_script import Request
from storage.transfer.engine import LARGE_WRITE
from storage.transfer.journal import WORTH
from tests.facade.stores import Store, tree_bytes
from tests.faults.stores import Site
from tests.transfer.support import everything_in, write_tree

__all__ = ["Download", "Transfer", "Upload", "Wrong"]

KIB = 1024
MIB = 1024 * KIB

_SINGLE = ("small", "large", "larger")
_DOWNLOADS = (*_SINGLE, "tree", "cache")
_UPLOADS = ("small", "large", "tree", "create")

TREE = {
    "config.json": b'{"model": "of this test"}' * 40,
    "empty": b"",
    "tokenizer.json": random.Random(1).randbytes(300 * KIB),
    "sub/a.bin": random.Random(2).randbytes(1000),
    "sub/weights.bin": random.Random(3).randbytes(2 * MIB + 77),
}
SMALL = random.Random(4).randbytes(150 * KIB)
LARGE = random.Random(5).randbytes(4 * MIB + 5)
IN_PARTS = random.Random(6).randbytes(LARGE_WRITE + 2 * MIB + 9)
OLD = b"what was there before"


class Wrong(AssertionError):
    """A transfer ended in a way that must never be."""


class Transfer:
    """What is moved, where it lies, and how it may end."""

    shape: str
    damaged = False
    """Whether the store was sent wrong bytes."""

    first: int | None = None
    """The request that a fault meets at the latest, if it has to be a certain one."""

    def __init__(self, site: Site, seed: int, kinds: Sequence[str], folder: Path) -> None:
        self._site = site
        self._seed = seed
        self._kinds = kinds
        self._folder = folder
        self._dice = random.Random(f"{seed} shape")
        self._store: Any = None

    def change(self, request: Request) -> None:
        """Replace an object while it is read."""

    def prepare(self, store: Store) -> None:
        """Put what has to be there, around the proxy."""

    def act(self, client: StorageClient) -> None:
        """Move it."""

    def check_whole(self) -> None:
        """Check that all of it is there."""

    def check_failed(self, error: StorageError) -> None:
        """Check that nothing of it is there."""

    def check_refused(self, error: StorageError) -> None:
        """Check that it may fail even now that nothing goes wrong any more."""
        raise Wrong(f"it fails again, without a fault: {error}")

    def check_left(self, expired: bool) -> list[str]:
        """Check that nothing else was left, or return what nobody could have removed."""
        return []


class Download(Transfer):
    def __init__(self, site: Site, seed: int, kinds: Sequence[str], folder: Path) -> None:
        super().__init__(site, seed, kinds, folder)
        shapes = _DOWNLOADS if site.lists else _SINGLE
        self.shape = self._dice.choice(shapes)
        self._files: Mapping[str, bytes] = TREE
        if self.shape == "small":
            self._files = {"model.bin": SMALL}
        elif self.shape in ("large", "larger"):
            self._files = {"model.bin": LARGE if self.shape == "large" else IN_PARTS}
        self._single = self.shape in _SINGLE
        self._versions = {path: [data] for path, data in self._files.items()}
        self._lock = threading.Lock()
        self._place = folder / "place"
        self._place.mkdir(parents=True)
        self._dest = self._place / "model"
        self._old = self._single and self._dice.random() < 0.5
        if self._old:
            self._dest.write_bytes(OLD)
        self._client: StorageClient | None = None
        self._path: Path | None = None
        # A store that vouches for nothing has to be held to what the caller knows.
        self._expects = self._dice.random() < 0.2 or (not site.vouches and "flip" in kinds)

    def prepare(self, store: Store) -> None:
        self._store = store
        store.put_all({f"m/{path}": data for path, data in self._files.items()})

    def change(self, request: Request) -> None:
        target = unquote(request.target)
        with self._lock:
            # Where the target is a digest, it is a large file's.
            largest = max(self._files, key=lambda path: len(self._files[path]))
            path = next((path for path in self._files if path in target), largest)
            versions = self._versions[path]
            dice = random.Random(f"{self._seed} {len(versions)}")
            versions.append(dice.randbytes(len(versions[0]) + dice.choice((0, 100))))
            self._store.put_raw(f"m/{path}", versions[-1])

    def act(self, client: StorageClient) -> None:
        self._client = client
        uri = self._store.uri("m/model.bin" if self._single else "m")
        digest = None
        if self._expects:
            digests = {
                path: Digest("sha256", hashlib.sha256(data).hexdigest())
                for path, data in self._files.items()
            }
            digest = digests["model.bin"] if self._single else tree_digest(digests)
        dest = None if self.shape == "cache" else self._dest
        self._path = Path(client.download(uri, dest, digest=digest))

    def check_whole(self) -> None:
        assert self._path is not None
        if self._single:
            self._check_one("model.bin", self._path.read_bytes())
            return
        found = tree_bytes(self._path)
        assert set(found) == set(self._files)
        for path, data in found.items():
            self._check_one(path, data)

    def _check_one(self, path: str, data: bytes) -> None:
        versions = self._versions[path][:1] if self._expects else self._versions[path]
        if data not in versions:
            raise Wrong(f"{path} has {len(data)} bytes that are no version of it")

    def check_refused(self, error: StorageError) -> None:
        changed = any(len(versions) > 1 for versions in self._versions.values())
        if not (changed and self._expects and isinstance(error, IntegrityError)):
            super().check_refused(error)

    def check_failed(self, error: StorageError) -> None:
        kept = [name for name in os.listdir(self._place) if name != "model"]
        # What is worth to be gone on with may stay, until that has happened.
        if kept and not (sum(map(len, self._files.values())) >= WORTH and len(kept) == 1):
            raise Wrong(f"left behind: {kept}")
        if self._old:
            assert self._dest.read_bytes() == OLD
        else:
            assert not os.path.lexists(self._dest)
        if self.shape == "cache":
            assert self._client is not None
            try:
                path = self._client.download(self._store.uri("m"), offline=True)
            except OfflineError:
                return
            raise Wrong(f"the cache serves {path}")

    def check_left(self, expired: bool) -> list[str]:
        left = [name for name in everything_in(self._place) if name.split("/")[0] != "model"]
        assert left == []
        if (self._folder / "cache" / "VERSION").exists():
            assert self._client is not None
            assert verify(self._client.cache, full=True).problems == ()
        return []


class Upload(Transfer):
    def __init__(self, site: Site, seed: int, kinds: Sequence[str], folder: Path) -> None:
        super().__init__(site, seed, kinds, folder)
        self.shape = self._dice.choice(_UPLOADS if site.vouches else _UPLOADS[:-1])
        self._source = folder / "source"
        if self.shape == "tree":
            self._new = {f"m/{path}": data for path, data in TREE.items()}
            write_tree(self._source, TREE)
        else:
            data = IN_PARTS if self.shape == "large" else SMALL
            self._new = {"m/model.bin": data}
            folder.mkdir(parents=True, exist_ok=True)
            self._source.write_bytes(data)
        if self.shape in ("small", "create"):
            self.first = 1  # there may be no other
        self._before: dict[str, bytes] = {}
        if self._dice.random() < (0.2 if self.shape == "create" else 0.5):
            self._before = dict.fromkeys(list(self._new)[-1:], OLD)
        self._litter: set[str] = set()
        self.damaged = False

    def prepare(self, store: Store) -> None:
        self._store = store
        store.put_all(self._before)
        self._litter = set(self._site.litter())

    def act(self, client: StorageClient) -> None:
        uri = self._store.uri("m" if self.shape == "tree" else "m/model.bin")
        client.upload(self._source, uri, overwrite=self.shape != "create")

    def _stored(self) -> dict[str, bytes]:
        keys: list[str] = self._store.keys()
        return {key: self._store.get_raw(key) for key in keys}

    def check_whole(self) -> None:
        if self.shape == "create" and self._before:
            raise Wrong("it replaced what it was to leave")
        found = self._stored()
        assert found.keys() == self._new.keys()
        for key, data in found.items():
            if data != self._new[key]:
                raise Wrong(f"{key} has {len(data)} bytes that are not those of the file")

    def check_refused(self, error: StorageError) -> None:
        if not (self.shape == "create" and isinstance(error, ObjectExistsError)):
            super().check_refused(error)

    def check_failed(self, error: StorageError) -> None:
        if isinstance(error, ObjectExistsError):
            assert self.shape == "create"
        found = self._stored()
        assert self._before.keys() <= found.keys() <= self._new.keys()
        for key, data in found.items():
            if self.damaged and not self._site.undoes:
                continue
            old = data == self._before.get(key)
            # It may be there as a whole if only the answer was lost.
            if not old and (data != self._new[key] or (self.shape == "create" and self._before)):
                raise Wrong(f"{key} has {len(data)} bytes that are neither the old nor the new")
        if self._site.batch and len(found) not in (len(self._before), len(self._new)):
            raise Wrong(f"a part of one commit is there: {sorted(found)}")

    def check_left(self, expired: bool) -> list[str]:
        left = sorted(set(self._site.litter()) - self._litter)
        # Whose credentials have expired cannot clean up either.
        if left and not expired:
            raise Wrong(f"left unfinished: {left}")
        return left
