"""Images and artifacts made by hand, pushed by the registry's plain HTTP API."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import zstandard

from storage.backends.base import OpenOptions
from storage.backends.oci.backend import OCIBackend
from storage.config import OCIConfig
from storage.uri import parse_uri
from tests.servers.process import HOST
from tests.servers.registry import Registry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
EMPTY = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A member of a layer: a file, unless it says something else."""

    name: str
    data: bytes = b""
    link: str | None = None
    hard: str | None = None
    folder: bool = False
    kind: bytes | None = None


def tar_of(entries: Iterable[Entry | tuple[str, bytes]]) -> bytes:
    """Return a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for given in entries:
            entry = given if isinstance(given, Entry) else Entry(*given)
            info = tarfile.TarInfo(entry.name)
            if entry.link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, entry.link
            elif entry.hard is not None:
                info.type, info.linkname = tarfile.LNKTYPE, entry.hard
            elif entry.folder:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif entry.kind is not None:
                info.type = entry.kind
            else:
                info.size = len(entry.data)
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def compressed(data: bytes, coding: str) -> bytes:
    """Return ``data`` as a layer of a coding has it: ``""``, ``gzip`` or ``zstd``."""
    if coding == "gzip":
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if coding == "zstd" else data


def sha256(data: bytes) -> str:
    """Return the digest of ``data`` as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Pusher:
    """Puts blobs and manifests into one repository."""

    port: int
    repository: str
    host: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    _there: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, registry: Registry, name: str, **headers: str) -> Pusher:
        """Return one for a repository that is called like ``name``."""
        repository = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return cls(registry.port, repository, registry.host, headers)

    def uri(self, reference: str = "", host: str = "") -> str:
        """Return the URI of a tag (``:v1``), digest (``@sha256:…``), or of nothing named."""
        return f"oci://{host or self.host}/{self.repository}{reference}"

    def _call(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, Mapping[str, str]]:
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=60)) as connection:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300, (method, path, answer.status)
            return answer.status, dict(answer.getheaders())

    def blob(self, data: bytes, media_type: str, **annotations: str) -> Descriptor:
        """Push a blob and return its descriptor."""
        if sha256(data) not in self._there:
            _, headers = self._call("POST", f"/v2/{self.repository}/blobs/uploads/")
            location = headers["Location"].partition(str(self.port))[2] or headers["Location"]
            query = urlencode({"digest": sha256(data)})
            kind = {"Content-Type": "application/octet-stream"}
            self._call("PUT", f"{location}{'&' if '?' in location else '?'}{query}", data, **kind)
            self._there.add(sha256(data))
        found = {"mediaType": media_type, "digest": sha256(data), "size": len(data)}
        return found | ({"annotations": dict(annotations)} if annotations else {})

    def manifest(
        self, table: Mapping[str, Any], tag: str, media_type: str = MANIFEST
    ) -> Descriptor:
        """Push a manifest and return its descriptor."""
        data = json.dumps({"schemaVersion": 2, "mediaType": media_type, **table}).encode()
        path = f"/v2/{self.repository}/manifests/{tag}"
        self._call("PUT", path, data, **{"Content-Type": media_type})
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def image(
        self,
        tag: str,
        layers: Sequence[Iterable[Entry | tuple[str, bytes]]],
        coding: str = "gzip",
        **fields: Any,
    ) -> Descriptor:
        """Push an image of layers, the lowest first."""
        tars = [tar_of(layer) for layer in layers]
        kind = f"{LAYER}+{coding}" if coding else LAYER
        return self.image_of(
            tag, [self.blob(compressed(tar, coding), kind) for tar in tars], tars, **fields
        )

    def image_of(
        self, tag: str, layers: Sequence[Descriptor], tars: Sequence[bytes], **fields: Any
    ) -> Descriptor:
        """Push an image of layers that are there."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
        }
        described = self.blob(json.dumps(config).encode(), CONFIG)
        return self.manifest({"config": described, "layers": list(layers), **fields}, tag)

    def artifact(
        self, tag: str, layers: Sequence[Descriptor], kind: str = "application/vnd.example"
    ) -> Descriptor:
        """Push an artifact."""
        config = self.blob(b"{}", EMPTY)
        return self.manifest({"artifactType": kind, "config": config, "layers": list(layers)}, tag)


def open_oci(uri: str, config: OCIConfig | None = None) -> OCIBackend:
    """Return a backend for a URI."""
    return OCIBackend(parse_uri(uri), config, OpenOptions(connections=4))


@contextlib.contextmanager
def opened(uri: str, config: OCIConfig | None = None) -> Iterator[OCIBackend]:
    """Yield a backend that is closed at the end."""
    backend = open_oci(uri, config)
    try:
        yield backend
    finally:
        backend.close()


def tree_of(backend: OCIBackend, prefix: str = "") -> dict[str, bytes]:
    """Return all objects and their content, each read pinned to what was listed."""
    found = {}
    for info in backend.list(prefix):
        with backend.read(info.key, None, info) as body:
            found[info.key] = b"".join(bytes(chunk) for chunk in body)
            assert len(found[info.key]) == info.size
    return found
