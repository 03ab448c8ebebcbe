"""Models of known sizes in a bucket of this process, and what a cache has of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from storage import StorageClient
from storage.digest import Digest, hash_file
from storage.uri import Location, parse_uri
from tests.facade.stores import MemoryStore, tree_bytes

__all__ = ["KIB", "Models", "content"]

KIB = 1024


def content(seed: str, size: int = 100 * KIB) -> bytes:
    """Return so many bytes that no other seed gives."""
    return (seed.encode() * (size // len(seed) + 1))[:size]


class Models:
    """Models of one bucket, and the cache that a client fetches them into."""

    def __init__(self, client: StorageClient, folder: Path) -> None:
        """Fetch with ``client``; what goes to a destination goes below ``folder``."""
        self.use(client)
        self.files: dict[str, Mapping[str, bytes]] = {}
        self._store = MemoryStore()
        self._folder = folder

    def use(self, client: StorageClient) -> None:
        """Go on with the cache of another client."""
        self.client = client
        self.cache = client.cache

    def put(self, name: str, files: Mapping[str, bytes] | None = None) -> None:
        """Store a model; without ``files``, of one file of 100 KiB that no other model has."""
        for path in self.files.get(name, ()):
            self._store.delete_raw(f"{name}/{path}")
        self.files[name] = {"model.bin": content(name)} if files is None else files
        self._store.put_all({f"{name}/{path}": data for path, data in self.files[name].items()})

    def uri(self, name: str) -> str:
        """Return the URI of a model."""
        return self._store.uri(name)

    def location(self, name: str) -> Location:
        """Return where a model is."""
        return parse_uri(self.uri(name))

    def fetch(self, name: str, *, offline: bool = False) -> None:
        """Fetch a model through the cache to a destination, which keeps nothing in use."""
        target = self._folder / uuid4().hex
        self.client.download(self.uri(name), target, cache=True, offline=offline)
        assert tree_bytes(target) == self.files[name]

    def add(self, name: str, files: Mapping[str, bytes] | None = None) -> None:
        """Store a model and fetch it."""
        self.put(name, files)
        self.fetch(name)

    def keep(self, name: str) -> str:
        """Fetch a model into the cache and go on using it; return its path."""
        path = self.client.download(self.uri(name))
        assert tree_bytes(path) == self.files[name]
        return path

    def manifests(self) -> dict[str, str]:
        """Return the manifest of each model that the cache has something of."""
        names = {self.uri(name): name for name in self.files}
        return {names[ref.source.uri]: ref.manifest for ref in self.cache.upper.refs.all()}

    def there(self) -> set[str]:
        """Return the models that the cache has something of; each has to be whole and right."""
        found = set(self.manifests())
        for name in found:
            self.fetch(name, offline=True)
        return found

    def blobs(self) -> set[Digest]:
        """Return all blobs of the cache; each has to be what its name says."""
        found = {digest for digest, _ in self.cache.upper.blobs.all()}
        for digest in found:
            path = self.cache.upper.blobs.path(digest)
            assert hash_file(path, (digest.algorithm,))[digest.algorithm] == digest
        return found

    def used(self, name: str, ago: float) -> None:
        """Let a model be used last so many seconds ago."""
        when = time.time() - ago
        os.utime(self.cache.upper.layout.manifest(self.manifests()[name]), (when, when))
