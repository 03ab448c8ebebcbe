"""The objects below one URI: read by way of the cache, offline too, and written."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from storage.backends.base import BatchItem, bytes_payload
from storage.client.arguments import writable
from storage.client.download import Download, DownloadOptions
from storage.client.offline import offline_mode, warn_of_copy
from storage.digest import Digest, MultiHasher
from storage.errors import (
    BucketMissingError,
    IntegrityError,
    ModelMissingError,
    UnreachableError,
)
from storage.facade import default_client
from storage.integrations.forml import naming
from storage.registry.documents import decode, encode
from storage.registry.marker import create_marker
from storage.registry.objects import ObjectStore
from storage.transfer import events
from storage.transfer.progress import Meter
from storage.transfer.sending import send_item
from storage.uri import parse_uri

__all__ = ["Place", "digest_of"]


class Place:
    """The objects below one URI, moved by the default client."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        """Address them; nothing is asked of the store yet.

        Raises:
            InvalidInput: the URI cannot be written to.
        """
        location = writable(parse_uri(uri))
        self.location = replace(location, key=location.key.rstrip("/"))
        # A path may be relative to where this process is.
        self.uri = str(self.location) if self.location.is_local else os.fspath(uri)
        self._documents: dict[str, Mapping[str, Any]] = {}

    @property
    def objects(self) -> ObjectStore:
        """The objects themselves."""
        return ObjectStore(default_client(), self.location)

    def names(self, prefix: str) -> list[str]:
        """Return the names of what is below ``prefix``; what is cached where that has to do."""
        objects = self.objects
        offline = offline_mode(objects.client.settings, self.location, None)
        if self.location.is_local or not offline:
            return objects.names(prefix)
        if offline is True:
            return self._cached(prefix)
        try:
            return objects.names(prefix)
        except UnreachableError as exc:
            warn_of_copy(str(exc))
            return self._cached(prefix)

    def _cached(self, prefix: str) -> list[str]:
        """Return the names below ``prefix`` of all that was ever downloaded here by itself."""
        objects = self.objects
        base = objects.where("")
        uris = {ref.source.uri for root in objects.client.cache.roots for ref in root.refs.all()}
        found = (uri.removeprefix(base) for uri in uris if uri.startswith(f"{base}{prefix}"))
        return sorted(found)

    def fetch(self, name: str, dest: str | None = None, digest: Digest | None = None) -> str:
        """Bring an object, or the tree of a name that ends in a slash, by way of the cache."""
        options = DownloadOptions(digest=digest, cache=True)
        return Download(default_client(), self.location.child(name), options).run(dest)

    def read(self, name: str, digest: Digest | None = None) -> bytes:
        """Return the bytes of an object, these very bytes verified."""
        data = pathlib.Path(self.fetch(name, digest=digest)).read_bytes()
        if digest is not None and (found := digest_of(data, digest.algorithm)) != digest:
            raise IntegrityError(
                f"{self.objects.where(name)}: expected {digest}, found {found} in the copy on this "
                "machine; `storage cache verify` finds what is damaged"
            )
        return data

    def document(self, name: str, *, cached: bool = True) -> Mapping[str, Any] | None:
        """Return a document; ``None`` if there is none. What was there once is not asked for again.

        Args:
            name: of the document.
            cached: whether it comes by way of the cache. Whoever writes asks the store.
        """
        if name not in self._documents:
            try:
                data = self.read(name) if cached else self.objects.read(name)
            except BucketMissingError:
                raise
            except ModelMissingError:
                data = None
            if data is None:
                return None
            self._documents[name] = decode(data, self.objects.where(name))
        return self._documents[name]

    def check(self) -> None:
        """Refuse a store on which two writers could not be told apart.

        Raises:
            UnsupportedOperation: it creates no objects only if they are absent, or says so and
                overwrites them.
        """
        self.objects.check()
        create_marker(self.objects, naming.MARKER, encode({}))

    def send(self, name: str, data: bytes, content_type: str, *, if_absent: bool) -> None:
        """Write an object."""
        objects = self.objects
        where = objects.where(name)
        metadata = {}
        if objects.backend.capabilities.metadata:
            metadata["blake3"] = digest_of(data, "blake3").hex
        item = BatchItem(objects.key(name), bytes_payload(data), metadata, content_type)
        with events.transfer("upload", where):
            meter = Meter("upload", where, len(data), 1, None)
            retry = objects.client.transfer_options.retry
            send_item(objects.backend, item, retry, meter, if_absent=if_absent, where=where)
            meter.add_object()
            meter.finish()


def digest_of(data: bytes, algorithm: str = "blake3") -> Digest:
    """Return the digest of ``data``."""
    hasher = MultiHasher((algorithm,))
    hasher.update(data)
    return hasher.digests()[algorithm]
