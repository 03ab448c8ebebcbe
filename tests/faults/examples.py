"""What the property tests of faulty backends share: buckets, mixes of faults, examples."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.backends.base import Backend
from storage.backends.local.backend import LocalBackend
from storage.backends.memory import MemoryBackend
from storage.cache.leases import release_all
from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import ModelMissingError, StorageError
from storage.testing.faulty_backend import FAULTS, FaultyBackend
from storage.transfer.engine import LARGE_WRITE
from storage.uri import Location
from tests.servers import SeaweedFS
from tests.transfer.support import KIB, assert_clear, everything_in, files_of, options, put_all

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1
STORES = ("memory", "filesystem", "s3")
PART = 64 * KIB
TREE = {
    "config.json": b"{}" * 250,
    "empty": b"",
    "exactly-one-part": b"exact" * 13107 + b"!",
    "one-byte-more": b"more!" * 13107 + b"!!",
    "sub/weights.bin": bytes(range(256)) * 1279,
}
assert len(TREE["exactly-one-part"]) == PART
assert len(TREE["one-byte-more"]) == PART + 1
BIG = "sub/weights.bin"
LARGE = b"in parts" * (LARGE_WRITE // 8) + b"and a little"
OLD = b"what was there before"


# -- a store for one example ---------------------------------------------------------------


class Bucket(Protocol):
    """A bucket whose backend works, and what a failed write left in it that is no object."""

    backend: Backend
    vouches: bool

    def litter(self) -> list[str]:
        """Return what takes up space beside the objects."""


class MemoryBucket:
    vouches = True

    def __init__(self) -> None:
        self.backend: Backend = MemoryBackend(f"b{uuid4().hex}")

    def litter(self) -> list[str]:
        return []


class Folder:
    vouches = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.backend: Backend = LocalBackend(str(path))

    def litter(self) -> list[str]:
        known = {info.key for info in self.backend.list()}
        return [name for name in files_of(self._path) if name not in known]


class S3Bucket:
    vouches = True

    def __init__(self, server: SeaweedFS, name: str, backend: Backend) -> None:
        self.backend = backend
        self._server = server
        self._name = name

    def litter(self) -> list[str]:
        return [key for key, _ in self._server.pending_uploads(self._name)]


class Client(StorageClient):
    """A client whose every bucket is one of two, whatever the scheme."""

    def __init__(self, near: Backend, far: Backend, cache: Path) -> None:
        super().__init__(settings=load_settings(cache_dir=cache))
        self._options = options(PART)
        self._near, self._far = near, far

    def backend(self, location: Location, config: Any = None) -> Backend:
        return self._far if location.bucket == "far" else self._near


@dataclass(frozen=True)
class Mix:
    """What may go wrong in one example."""

    seed: int
    faults: tuple[str, ...]
    probability: float

    def without(self, *faults: str) -> Mix:
        kept = tuple(fault for fault in self.faults if fault not in faults)
        return Mix(self.seed, kept, self.probability)


MIXES = st.builds(
    Mix,
    st.integers(0, 2**32 - 1),
    st.one_of(st.sampled_from([(fault,) for fault in FAULTS]), st.just(tuple(FAULTS))),
    st.sampled_from((0.1, 0.3, 0.8)),
)


def _name(mix: Mix) -> str:
    """Return the name of an example's prefix.

    What goes wrong depends on the keys too, so a test has the same names in every run. A soak
    has others each time.
    """
    if SOAK > 1:
        return uuid4().hex
    test = os.environ["PYTEST_CURRENT_TEST"]
    return hashlib.sha256(f"{test} {mix}".encode()).hexdigest()[:32]


class Example:
    """One example: a prefix in a faulty bucket, and a folder for what comes from it."""

    def __init__(self, bucket: Bucket, mix: Mix, folder: Path) -> None:
        self.bucket = bucket
        self.inner = bucket.backend
        self.prefix = f"m{_name(mix)}"
        self.folder = folder / self.prefix
        self.place = self.folder / "place"
        self.place.mkdir(parents=True)
        self.dest = self.place / "model"
        self.cache = self.folder / "cache"
        self.faulty = FaultyBackend(self.inner, mix.seed, mix.faults, mix.probability)
        self.client = Client(self.faulty, MemoryBackend(self.prefix), self.cache)
        self.mix = mix
        self._put: dict[str, bytes] = {}

    def __enter__(self) -> Example:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        release_all()
        with contextlib.suppress(ModelMissingError):
            self.inner.delete([info.key for info in self.inner.list(f"{self.prefix}/")])
        MemoryBackend.clear(self.prefix)
        shutil.rmtree(self.folder)

    def key(self, path: str) -> str:
        return f"{self.prefix}/{path}"

    def uri(self, path: str = "") -> str:
        return f"memory://near/{self.prefix}/{path}".rstrip("/")

    def put(self, files: Mapping[str, bytes]) -> None:
        """Store objects around the faults."""
        self._put |= files
        put_all(self.inner, {self.key(path): data for path, data in files.items()})

    def versions(self, path: str) -> list[bytes]:
        """Return every content that an object has had."""
        return [self._put[path], *self.faulty.replaced.get(self.key(path), ())]

    def was_written(self, path: str, data: bytes) -> bool:
        """Tell whether ``data``, or what somebody made of it afterwards, is all there is.

        A write whose answer was lost is recognised by its bytes, and the object may be replaced
        or removed when the last of them has been read.
        """
        found = self.stored()
        if not found:
            return ("read", self.key(path), "vanish") in self.faulty.happened
        contents = (data, *self.faulty.replaced.get(self.key(path), ()))
        return found in [{path: content} for content in contents]

    def stored(self) -> dict[str, bytes]:
        """Return what is below the prefix, read around the faults."""
        found = {}
        try:
            for info in list(self.inner.list(f"{self.prefix}/")):
                with self.inner.read(info.key) as body:
                    data = b"".join(bytes(chunk) for chunk in body)
                found[info.key.removeprefix(f"{self.prefix}/")] = data
        except ModelMissingError:
            assert not found, "a memory bucket appears with its first object"
        return found

    def check_error(self, error: StorageError) -> None:
        """Check that an error says what is the matter, and is somebody's fault."""
        assert_clear(error)
        assert type(error) is not StorageError, error
        assert self.faulty.happened

    def check_tree(self, folder: Path, names: Mapping[str, bytes] = TREE) -> None:
        """Check that a folder holds one version of each of ``names``, whole, and no more."""
        found = files_of(folder)
        # What was deleted before the tree was listed is no part of it.
        vanished = {key for _, key, fault in self.faulty.happened if fault == "vanish"}
        missing = set(names) - set(found)
        assert set(found) <= set(names)
        assert {self.key(path) for path in missing} <= vanished
        for path, data in found.items():
            assert data in self.versions(path), (path, self.faulty.happened)

    def check_nothing_here(self) -> None:
        """Check that a failed download left nothing."""
        assert everything_in(self.place) == []


def example(test: Callable[..., None]) -> Any:
    """Run a test with many seeds on all stores."""
    runner = settings(
        max_examples=15 * SOAK,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(given(mix=MIXES)(test))
    return pytest.mark.parametrize("store", STORES)(runner)
