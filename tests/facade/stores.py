"""The stores of this suite, each reached in two ways: by the facade, and around it."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from storage import AzureConfig, GCSConfig, HFConfig, PVCConfig, S3Config
from storage.backends.base import bytes_payload
from storage.backends.memory import MemoryBackend
from storage.transfer.lines import decode_line
from tests.servers import Keys, S3Server
from tests.servers.hub import Hub
from tests.servers.hub.state import Change

__all__ = [
    "CONFIGS",
    "GAPS",
    "STORES",
    "AzureStore",
    "BucketStore",
    "FileStore",
    "GCSStore",
    "HubStore",
    "MemoryStore",
    "PVCStore",
    "S3Store",
    "Store",
    "needs",
    "noted_bytes",
    "s3_config",
    "sha256_of_files",
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
    "gcs-fsspec",
    "azurite-obstore",
    "azurite-fsspec",
    "hub",
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
        "hub": "a repository has no such path",
    },
    "dot segments": {
        "file": "'..' is the folder above",
        "pvc": "'..' is the folder above; such a URI is refused",
        "seaweedfs-obstore": "the server refuses keys with '..'",
        "seaweedfs-fsspec": "the server refuses keys with '..'",
        "hub": "a repository has no such path",
    },
    "backslash": {
        "seaweedfs-obstore": "the server stores a\\b as a/b",
        "seaweedfs-fsspec": "the server stores a\\b as a/b",
        "azurite-obstore": "Azure stores a\\b as a/b",
        "azurite-fsspec": "Azure stores a\\b as a/b",
    },
    "final dots": {
        "azurite-obstore": "Azure drops the dots at the end of a part of a name",
        "azurite-fsspec": "Azure drops the dots at the end of a part of a name",
    },
    "file and folder": {
        "file": "a path is a file or a folder, never both",
        "pvc": "a path is a file or a folder, never both",
        "hub": "a path is a file or a folder, never both",
    },
    "NUL": {
        "file": "no path holds a NUL",
        "pvc": "no path holds a NUL",
        "seaweedfs-obstore": "the server refuses keys with a NUL",
        "seaweedfs-fsspec": "the server refuses keys with a NUL",
        "azurite-obstore": "the server cannot list a key with a NUL",
        "azurite-fsspec": "the server cannot list a key with a NUL",
        "hub": "a repository has no such path",
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
        "hub": "a file has no user metadata",
    },
    "only the newest": {
        "hub": "every commit stays readable, and a download keeps to the one that it began with",
    },
    "time": {
        "hub": "only commits have times",
    },
    "remote": {
        "file": "the bytes are on this machine already",
        "pvc": "the bytes are on this machine already",
    },
    "S3": {
        name: "it speaks another protocol"
        for name in STORES
        if name.partition("-")[0] not in ("seaweedfs", "moto")
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

    def holds(self, key: str) -> bool:
        """Tell whether the table of gaps lets this store hold ``key`` as it is."""
        backslash = "\\" in key and self.lacks("backslash")
        dots = any(part.endswith(".") for part in key.split("/")) and self.lacks("final dots")
        return not backslash and not dots

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

    def put_described(self, path: str, data: bytes, metadata: Mapping[str, str]) -> None:
        """Store an object with user metadata, around the facade."""
        raise NotImplementedError

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

    def put_described(self, path: str, data: bytes, metadata: Mapping[str, str]) -> None:
        backend = MemoryBackend(self._bucket)
        backend.write(self._prefix + path, bytes_payload(data), metadata=metadata)

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


class BucketStore(Store):
    """A prefix in a bucket of a server, for one of the two drivers."""

    scheme: str

    def __init__(
        self, name: str, server: Any, driver: str, bucket: str, prefix: str, config: Any
    ) -> None:
        self.name = name
        self.server: Any = server
        self.driver = driver
        self.bucket = bucket
        self.config = config
        self.base = f"{self.scheme}://{bucket}/{prefix}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def put_raw(self, path: str, data: bytes) -> None:
        self.server.put_raw(self.bucket, self._prefix + path, data)

    def put_all(self, files: Mapping[str, bytes]) -> None:
        if len(files) <= 50:
            # In order: SeaweedFS loses one of "a" and "a/b" if they come at the same moment.
            super().put_all(files)
            return
        first, *rest = files.items()
        self.put_raw(*first)  # a client is made before the threads ask for it
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: self.put_raw(*item), rest))

    def get_raw(self, path: str) -> bytes:
        data: bytes = self.server.get_raw(self.bucket, self._prefix + path)
        return data

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
            yield type(self)(self.name, self.server, self.driver, bucket, "", self.config)


class S3Store(BucketStore):
    """On SeaweedFS or moto."""

    scheme = "s3"
    server: S3Server

    def put_described(self, path: str, data: bytes, metadata: Mapping[str, str]) -> None:
        headers = {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        self.server.put_raw(self.bucket, self._prefix + path, data, headers)

    def through(self, endpoint: str) -> S3Config:
        """Return the config that reaches this store by another address."""
        return s3_config(self.server, self.driver, endpoint=endpoint)


class GCSStore(BucketStore):
    """On fake-gcs-server."""

    scheme = "gs"

    def put_described(self, path: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.put_raw(path, data)
        key = self._prefix + path
        self.server.patch_raw(self.bucket, key, {"metadata": dict(metadata)})


class AzureStore(BucketStore):
    """On Azurite."""

    scheme = "azure"

    def put_described(self, path: str, data: bytes, metadata: Mapping[str, str]) -> None:
        headers = {f"x-ms-meta-{name}": value for name, value in metadata.items()}
        self.server.put_raw(self.bucket, self._prefix + path, data, headers)

    def keys(self) -> list[str]:
        found = self.server.keys_raw(self.bucket)
        mine = [key.removeprefix(self._prefix) for key in found if key.startswith(self._prefix)]
        return [key for key in mine if not key.endswith("/")]

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        with self.server.container(f"whole-{uuid4().hex}") as name:
            yield AzureStore(self.name, self.server, self.driver, name, "", self.config)


class HubStore(Store):
    """A folder of a model's repository on the test Hub."""

    name = "hub"

    def __init__(self, hub: Hub, place: str = "place") -> None:
        self._hub = hub
        self._repo = hub.repo(f"owner/m{uuid4().hex}")
        self._prefix = f"{place}/" if place else ""
        self.config = HFConfig(hub.writer.token, hub.url)
        self.base = f"hf://{self._repo.id}/{place}".rstrip("/")

    def put_raw(self, path: str, data: bytes) -> None:
        self.put_all({path: data})

    def put_all(self, files: Mapping[str, bytes]) -> None:
        # A repository has no folders of their own, so no markers of them.
        kept = {self._prefix + path: data for path, data in files.items() if path[-1:] != "/"}
        if kept:
            self._hub.put(self._repo, kept)

    def get_raw(self, path: str) -> bytes:
        return self._hub.get(self._repo, self._prefix + path)

    def delete_raw(self, path: str) -> None:
        self._repo.commit([Change(self._prefix + path)], "delete")

    def keys(self) -> list[str]:
        found = self._repo.head().files
        return sorted(
            key.removeprefix(self._prefix) for key in found if key.startswith(self._prefix)
        )

    def filesystem_path(self, path: str) -> str:
        return f"{self._repo.id}/{self._prefix}{path}"

    @contextmanager
    def whole_bucket(self) -> Iterator[Store]:
        yield HubStore(self._hub, "")


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


CONFIGS: Mapping[str, Callable[[Any, str], Any]] = {
    "seaweedfs": s3_config,
    "moto": s3_config,
    # The server takes any token for a good one.
    "gcs": lambda server, driver: GCSConfig(
        project_id=server.project, token="any", endpoint_url=server.endpoint, driver=driver
    ),
    "azurite": lambda server, driver: AzureConfig(
        *server.main, endpoint_url=server.account_url(), driver=driver
    ),
}
"""Makes the config of an administrator, by the kind of server."""


def tree_bytes(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the content of every file below ``folder``, hidden ones too, by relative path."""
    return {
        os.path.relpath(os.path.join(root, name), folder): Path(root, name).read_bytes()
        for root, _, names in os.walk(folder)
        for name in names
    }


def noted_bytes(*folders: str | os.PathLike[str]) -> int:
    """Return how many bytes downloads below ``folders`` have, as their journals say now."""
    lines: list[bytes] = []
    for root in (root for folder in folders for root, _, _ in os.walk(folder)):
        with suppress(FileNotFoundError):
            lines += Path(root, "journal").read_bytes().splitlines(keepends=True)
    records = [record for line in lines if (record := decode_line(line)) is not None]
    spans = [record["range"] for record in records if "range" in record]
    return sum(int(end) - int(start) for start, end in spans)


def sha256_of_files(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``, by relative path."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, folder)] = digest
    return found


def stores_with(features: Iterable[str]) -> list[str]:
    """Return the names of the stores that have all of ``features``."""
    return [name for name in STORES if not any(name in GAPS[feature] for feature in features)]


def cached_content() -> list[str]:
    """Return what the cache holds that a download left: not its version and its locks."""
    cache = Path(os.environ["STORAGE_CACHE_DIR"])
    files = (path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.parts[0] not in ("VERSION", "locks"))
