"""Manifests: what an image or artifact consists of, and which of its layers are files.

Sources: OCI Image Specification 1.1 (manifests, indexes, descriptors), Docker's schema 2, the
ModelPack specification (``vnd.cncf.model.*``, formerly ``vnd.cnai.model.*``), and the annotations
of ORAS.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform as machine
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.digest import Digest
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    UnsupportedOperation,
    few,
    one_line,
)

__all__ = [
    "ACCEPT",
    "INDEXES",
    "Layer",
    "Manifest",
    "check_digest",
    "choose",
    "machine_platform",
    "parse_json",
    "read_diff_ids",
]

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
"""Media types of lists of manifests, one for each platform."""

ACCEPT = ", ".join((*MANIFESTS, *INDEXES))

_IMAGE_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?:nondistributable\.)?v1\.tar"
    r"|docker\.image\.rootfs\.(?:foreign\.)?diff\.tar)"
)
_LAYER_CODINGS = ("", "+gzip", ".gzip", "+zstd", ".zstd")
_DIRECTORY = "application/vnd.oci.image.layer.v1.tar+gzip"
_MODEL_TAR = re.compile(
    r"application/vnd\.(?:cncf|cnai)\.model\..+\.tar(?:\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.ai\.(?:.+\.)?tar"
)
_NAMES = (
    "org.cncf.model.filepath",
    "org.cnai.model.filepath",
    "org.opencontainers.image.title",
)
_UNPACK = "io.deis.oras.content.unpack"
_CONTENT_DIGEST = "io.deis.oras.content.digest"
_ARCHIVE_NAME = re.compile(r"(?i)\.(?:tar|tgz|gz|zst|tzst|bz2|xz|zip)$")
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i686": "386",
    "armv7l": "arm",
    "armv6l": "arm",
}
_MAX_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class Layer:
    """A descriptor: a blob, and what it is."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def filename(self) -> str | None:
        """The path of the file that it is, if it is one with a name."""
        for name in _NAMES:
            if path := self.annotations.get(name):
                return path
        return None

    @property
    def is_archive(self) -> bool:
        """Whether it is a tar of files, rather than a file. Of an artifact, not of an image.

        The Python client of ORAS marks folders by nothing but the media type of layers.
        """
        if (told := self.annotations.get(_UNPACK)) is not None:
            return told.lower() == "true"
        if _MODEL_TAR.fullmatch(self.media_type):
            return True
        name = self.filename
        folder = self.media_type == _DIRECTORY and not _ARCHIVE_NAME.search(name or "")
        return folder or (name is None and _is_layer(self.media_type))

    @property
    def diff_id(self) -> Digest | None:
        """The digest of the decompressed tar, if an annotation tells it."""
        try:
            return _registry_digest(self.annotations[_CONTENT_DIGEST])
        except (KeyError, InvalidInput):
            return None


def _is_layer(media_type: str) -> bool:
    found = _LAYER.match(media_type)
    return found is not None and media_type[found.end() :] in _LAYER_CODINGS


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image or artifact."""

    digest: Digest
    config: Layer | None
    layers: tuple[Layer, ...]
    is_image: bool
    """Whether the layers are those of a file system, rather than files of their own."""

    @classmethod
    def parse(cls, table: Mapping[str, Any], digest: Digest, where: str) -> Manifest:
        """Return what a manifest says.

        Raises:
            StorageError: it is none, or one of a kind that is not known.
        """
        if table.get("schemaVersion") != 2 or not isinstance(table.get("layers"), list):
            raise StorageError(
                f"{where}: the manifest is none of an image or artifact of OCI, or of Docker's "
                "schema 2; push it again with a client of today"
            )
        layers = tuple(_descriptor(layer, where) for layer in table["layers"])
        config = _descriptor(table["config"], where) if table.get("config") else None
        kind = config.media_type if config is not None else ""
        named = any(layer.filename is not None for layer in layers)
        is_image = kind in _IMAGE_CONFIGS and not table.get("artifactType")
        # Some clients give an image no config of one.
        bare = bool(layers) and not named and all(_is_layer(one.media_type) for one in layers)
        return cls(digest, config, layers, is_image or bare)

    def image_layers(self, where: str) -> tuple[tuple[int, Layer], ...]:
        """Return the layers of a file system, and the place of each among all layers.

        Raises:
            UnsupportedOperation: one is of a kind that cannot be read, encrypted for example.
        """
        found = []
        for place, layer in enumerate(self.layers):
            if _is_layer(layer.media_type):
                found.append((place, layer))
            elif _LAYER.match(layer.media_type):
                raise UnsupportedOperation(
                    f"{where}: a layer is of the type {one_line(layer.media_type)}, which cannot "
                    "be read; known are plain, gzip and zstd ones"
                )
        return tuple(found)


def parse_json(data: bytes, where: str) -> Mapping[str, Any]:
    """Return the JSON object in ``data``.

    Raises:
        StorageError: there is none.
    """
    table = None
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(data)
    if not isinstance(table, dict):
        raise StorageError(f"{where}: what the registry gave for a manifest or config is none")
    if "manifests" in table and {"layers", "config"} & table.keys():
        # Two programs would see two different things in it (CVE-2021-41190).
        raise StorageError(f"{where}: a manifest that is also an index was refused")
    return table


def check_digest(data: bytes, digest: Digest, where: str, what: str) -> None:
    """Compare content with its digest.

    Raises:
        IntegrityError: they differ.
    """
    found = hashlib.new(digest.algorithm, data).hexdigest()
    if found != digest.hex:
        raise IntegrityError(
            f"{where}: {what} should be {digest}, and what the registry gave is "
            f"{digest.algorithm}:{found}; nothing of it is used"
        )


def _registry_digest(text: Any) -> Digest:
    """Read a digest as registries use it."""
    digest = Digest.parse(str(text))
    if digest.algorithm not in ("sha256", "sha512"):
        raise InvalidInput(f"the algorithm {digest.algorithm} is none of a registry")
    return digest


def _descriptor(table: Any, where: str) -> Layer:
    try:
        digest, size = _registry_digest(table["digest"]), table["size"]
        annotations = table.get("annotations") or {}
        if type(size) is not int or not 0 <= size < _MAX_SIZE or not isinstance(annotations, dict):
            raise InvalidInput("size or annotations are of the wrong type")
        texts = {str(name): str(value) for name, value in annotations.items()}
        return Layer(str(table.get("mediaType") or ""), digest, size, texts)
    except (KeyError, TypeError, AttributeError, InvalidInput) as exc:
        raise StorageError(
            f"{where}: a descriptor in the manifest is damaged ({one_line(exc, 120)})"
        ) from exc


def read_diff_ids(config: Mapping[str, Any], count: int, where: str) -> tuple[Digest, ...]:
    """Return the digests of the decompressed layers that an image's config tells.

    Raises:
        IntegrityError: they are not as many as there are layers.
    """
    rootfs = config.get("rootfs")
    texts = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(texts, list) or len(texts) != count:
        found = len(texts) if isinstance(texts, list) else "no"
        raise IntegrityError(
            f"{where}: the image's config tells the digests of {found} layers, and its manifest "
            f"has {count}; one of the two is not of this image"
        )
    try:
        return tuple(map(_registry_digest, texts))
    except (InvalidInput, AttributeError, TypeError) as exc:
        raise IntegrityError(f"{where}: a digest in the image's config is none") from exc


def machine_platform() -> str:
    """Return the platform of images for this machine, as registries name it.

    The operating system is ``linux``: it is that of images for Kubernetes, wherever one looks.
    """
    name = machine.machine().lower()
    return f"linux/{_ARCHITECTURES.get(name, name)}"


def choose(table: Mapping[str, Any], platform: str, where: str) -> Digest:
    """Return the digest of the manifest for a platform out of an index.

    Raises:
        ModelMissingError: there is none.
    """
    entries = table.get("manifests")
    entries = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    wanted = platform.split("/")
    found: list[str] = []
    for entry in entries:
        told = entry.get("platform")
        names = _platform_of(told) if isinstance(told, dict) else []
        if names[: len(wanted)] == wanted:
            return _descriptor(entry, where).digest
        found.append("/".join(names) or "none")
    others = [one for one in found if not one.startswith("unknown")]
    if len(entries) == 1 and others == ["none"]:
        return _descriptor(entries[0], where).digest
    raise ModelMissingError(
        where,
        f"{where}: there is no image for {platform}, only for {few(others) or 'nothing'}; name one "
        "by platform of OCIConfig",
    )


def _platform_of(table: Mapping[str, Any]) -> list[str]:
    names = (table.get("os"), table.get("architecture"), table.get("variant"))
    return [str(name) for name in names if name]
