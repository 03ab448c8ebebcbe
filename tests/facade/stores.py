"""The stores of this suite, each reached in two ways: by the facade, and around it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from storage import PVCConfig, S3Config
from storage.backends.base import bytes_payload
from storage.backends.memory import MemoryBackend
from tests.servers import Keys, S3Server

__all__ = [
    "GAPS",
    "STORES",
    "FileStore",
    "MemoryStore",
    "PVCStore",
    "S3Store",
    "Store",
    "needs",
    "s3_config",
    "slow_on",
    "stores_with",
    "tree_bytes",
]

STORES = (
    "memory",
    "file",
    "pvc",
    "seaweedfs-obstore",
    "seaweedfs-fsspec",
    "moto-obstore",
    "moto-fsspec",
)

_Test = TypeVar("_Test", bound=Callable[..., object])

# What a store cannot hold or do, and why. A test that needs one of these runs on the other
# stores only; test_gaps_are_real checks that every entry is true.
GAPS: Mapping[str, Mapping[str, str]] = {
    "empty segments": {
        "file": "a path has no empty part: m//x and m/x are the same file",
        "pvc": "a path has no empty part; such a URI is refused",
        "seaweedfs-obstore": "the server stores m//x as m/x",
        "seaweedfs-fsspec": "the server stores m//x as m/x",
    },
    "dot segments": {
        "file": "'..' is the folder above",
        "pvc": "'..' is the folder above; such a URI is refused",
        "seaweedfs-obstore": "the server refuses keys with '..'",
        "seaweedfs-fsspec": "the server refuses keys with '..'",
    },
    "backslash": {
        "seaweedfs-obstore": "the server stores a\\b as a/b",
        "seaweedfs-fsspec": "the server stores a\\b as a/b",
    },
    "file and folder": {
        "file": "a path is a file or a folder, never both",
        "pvc": "a path is a file or a folder, never both",
    },
    "NUL": {
        "file": "no path holds a NUL",
        "pvc": "no path holds a NUL",
        "seaweedfs-obstore": "the server refuses keys with a NUL",
        "seaweedfs-fsspec": "the server refuses keys with a NUL",
    },
    "long names": {
        "file": "a name has at most 255 bytes",
        "pvc": "a name has at most 255 bytes",
        "seaweedfs-obstore": "the server refuses parts of more than 255 bytes",
        "seaweedfs-fsspec": "the server refuses parts of more than 255 bytes",
    },
    "metadata": {
        "file": "a file has no user metadata",
        "pvc": "a file has no user metadata",
    },
    "remote": {
        "file": "the bytes are on this machine already",
        "pvc": "the bytes are on this machine already",
    },
    "network": {
        "memory": "it is this process",
        "file": "the bytes are on this machine already",
        "pvc": "the bytes are on this machine already",
    },
}


def needs(*features: str) -> Callable[[_Test], _Test]:
    """Run a test only on the stores that have ``features``, which are keys of ``GAPS``."""
    assert set(features) <= GAPS.keys()

    def mark(test: _Test) -> _Test:
        test.__dict__["needed_features"] = features
        return test

    return mark


def slow_on(*stores: str) -> Callable[[_Test], _Test]:
    """Mark a test as slow on some ``stores`` only."""

    def mark(test: _Test) -> _Test:
        test.__dict__["slow_stores"] = stores
        return test

    return mark


class Store(ABC):
    """One store with a fresh, empty place in it.

    Attributes:
        name: out of ``STORES``.
        base: URI of the place, without a slash at its end.
        config: for the facade's ``config=``.
    """

    name: str
    base: str
    config: Any = None

    def uri(self, path: str = "") -> str:
        """Return the URI of ``path`` below the place."""
        return f"{self.base}/{path}"

    def lacks(self, feature: str) -> bool:
        """Tell whether the table of gaps says that this store has no ``feature``."""
        return self.name in GAPS[feature]

    @abstractmethod
    def put_raw(self, path: str, data: bytes) -> None:
        """Store an object around the facade; ``put_raw("dir/", b"")`` makes a folder marker."""

    @abstractmethod
    def get_raw(self, path: str) -> bytes:
        """Return an object's bytes, around the facade."""

    @abstractmethod
    def delete_raw(self, path: str) -> None:
        """Delete an object, around the facade."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Return every path below the place, sorted, without markers; around the facade."""

    @abstractmethod
    def filesystem_path(self, path: str) -> str:
        """Return what the store's fsspec file system calls ``path``."""

    def put_all(self, files: Mapping[str, bytes]) -> None:
        """Store many objects around the facade."""
        for path, data in files.items():
            self.put_raw(path, data)

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        """Give a store whose place is a whole, empty bucket."""
        raise NotImplementedError
        yield


class MemoryStore(Store):
    """A bucket in this process."""

    name = "memory"

    def __init__(self) -> None:
        self._bucket = f"b{uuid4().hex}"
        self.base = f"memory://{self._bucket}/place"
        self._prefix = "place/"

    def put_raw(self, path: str, data: bytes) -> None:
        backend = MemoryBackend(self._bucket)
        key = self._prefix + path
        if "\0" in key:
            # The backend refuses it; a store that another library filled might not.
            backend.write("like this one", bytes_payload(data))
            backend._put(key, data, backend.stat("like this one"))
            backend.delete(["like this one"])
            return
        backend.write(key, bytes_payload(data))

    def get_raw(self, path: str) -> bytes:
        with MemoryBackend(self._bucket).read(self._prefix + path) as body:
            return b"".join(bytes(chunk) for chunk in body)

    def delete_raw(self, path: str) -> None:
        MemoryBackend(self._bucket).delete([self._prefix + path])

    def keys(self) -> list[str]:
        bucket = MemoryBackend._buckets.get(self._bucket)
        found = bucket.objects if bucket is not None else {}
        return sorted(
            key.removeprefix(self._prefix)
            for key in found
            if key.startswith(self._prefix) and not key.endswith("/")
        )

    def filesystem_path(self, path: str) -> str:
        return self._prefix + path

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        other = MemoryStore()
        other.base, other._prefix = f"memory://{other._bucket}", ""
        # A bucket appears with its first object, and stays.
        other.put_raw("first", b"")
        MemoryBackend(other._bucket).delete(["first"])
        yield other


class FileStore(Store):
    """A folder of this machine."""

    name = "file"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = f"file://{folder}"

    def _path(self, path: str) -> Path:
        return self.folder / path

    def put_raw(self, path: str, data: bytes) -> None:
        target = self._path(path)
        if path.endswith("/"):
            # What comes closest to a marker: a folder with nothing in it.
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def get_raw(self, path: str) -> bytes:
        return self._path(path).read_bytes()

    def delete_raw(self, path: str) -> None:
        self._path(path).unlink()

    def keys(self) -> list[str]:
        return sorted(tree_bytes(self.folder))

    def filesystem_path(self, path: str) -> str:
        return str(self._path(path))

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        # The root of this machine's files is no bucket to be filled; a folder has to do.
        other = FileStore(self.folder / f"bucket-{uuid4().hex}")
        other.folder.mkdir(parents=True)
        yield other


class PVCStore(FileStore):
    """A Kubernetes claim that is "mounted" in a folder."""

    name = "pvc"

    def __init__(self, mount_root: Path, claim: str = "claim", place: str = "place") -> None:
        super().__init__(mount_root / claim / place)
        self._mount_root = mount_root
        (mount_root / claim).mkdir(parents=True, exist_ok=True)
        self.config = PVCConfig(mount_root=mount_root)
        self.base = f"pvc://{claim}/{place}" if place else f"pvc://{claim}"

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        yield PVCStore(self._mount_root, f"claim-{uuid4().hex}", "")


class S3Store(Store):
    """A prefix in a bucket of an S3 server, for one of the two drivers."""

    def __init__(self, server: S3Server, driver: str, bucket: str, prefix: str) -> None:
        self.name = f"{server.name}-{driver}"
        self.server = server
        self.driver = driver
        self.bucket = bucket
        self.config = s3_config(server, driver)
        self.base = f"s3://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def through(self, endpoint: str) -> S3Config:
        """Return the config that reaches this store by another address."""
        return s3_config(self.server, self.driver, endpoint=endpoint)

    def put_raw(self, path: str, data: bytes) -> None:
        self.server.put_raw(self.bucket, self._prefix + path, data)

    def put_all(self, files: Mapping[str, bytes]) -> None:
        if len(files) <= 50:
            # In order: SeaweedFS loses one of "a" and "a/b" if they come at the same moment.
            super().put_all(files)
            return
        client = self.server.raw  # made before the threads ask for it

        def put(item: tuple[str, bytes]) -> None:
            client.put_object(Bucket=self.bucket, Key=self._prefix + item[0], Body=item[1])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, files.items()))

    def get_raw(self, path: str) -> bytes:
        return self.server.get_raw(self.bucket, self._prefix + path)

    def delete_raw(self, path: str) -> None:
        self.server.delete_raw(self.bucket, self._prefix + path)

    def keys(self) -> list[str]:
        found = self.server.keys_raw(self.bucket, self._prefix)
        return sorted(key.removeprefix(self._prefix) for key in found if not key.endswith("/"))

    def filesystem_path(self, path: str) -> str:
        return f"{self.bucket}/{self._prefix}{path}"

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        with self.server.bucket(f"whole-{uuid4().hex}") as bucket:
            yield S3Store(self.server, self.driver, bucket, "")


def s3_config(
    server: S3Server, driver: str, keys: Keys | None = None, endpoint: str | None = None
) -> S3Config:
    """Return the config for ``server``, as its administrator unless ``keys`` say otherwise."""
    keys = keys or server.admin
    return S3Config(
        keys.access_key,
        keys.secret_key,
        endpoint_url=endpoint or server.endpoint,
        driver=driver,  # type: ignore[arg-type]
    )


def tree_bytes(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the content of every file below ``folder``, hidden ones too, by relative path."""
    return {
        os.path.relpath(os.path.join(root, name), folder): Path(root, name).read_bytes()
        for root, _, names in os.walk(folder)
        for name in names
    }


def stores_with(features: Iterable[str]) -> list[str]:
    """Return the names of the stores that have all of ``features``."""
    return [name for name in STORES if not any(name in GAPS[feature] for feature in features)]
