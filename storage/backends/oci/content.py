"""What an image or artifact holds: files that are blobs by themselves, and files in layers."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from storage.backends.base import ObjectInfo
from storage.backends.oci.layers import Fetch, Packed, PackedFile, Unpacking
from storage.backends.oci.manifests import Layer, Manifest
from storage.digest import Digest
from storage.unpacking.extraction import ExtractionLimits

__all__ = ["Content"]


class Content:
    """The objects of one manifest. They never change; safe for threads."""

    def __init__(
        self,
        manifest: Manifest,
        version: str,
        model_folder: str,
        diff_ids: tuple[Digest, ...],
        where: str,
        fetch: Fetch,
    ) -> None:
        """Look at the layers; fetch none of them.

        Args:
            manifest: what there is.
            version: of all objects.
            model_folder: the folder of an image that is wanted.
            diff_ids: digests of the decompressed layers of an image, if they are known.
            where: the URI, for messages.
            fetch: reads blobs.

        Raises:
            UnsupportedOperation: a layer of an image cannot be read.
        """
        self.version = version
        self.has_layers = manifest.is_image and bool(manifest.layers)
        """Whether it is an image that has anything in it."""

        self.blobs: dict[str, Layer] = {}
        """Files that are blobs, by their paths."""

        self.clashes: list[str] = []
        root: tuple[str, ...] | None = None
        packed: list[Packed] = []
        if manifest.is_image:
            root = tuple(model_folder.strip("/").split("/"))
            for place, layer in manifest.image_layers(where):
                packed.append(Packed(layer, diff_ids[place] if diff_ids else None))
        else:
            for layer in manifest.layers:
                if layer.is_archive:
                    packed.append(Packed(layer, layer.diff_id))
                    continue
                name = layer.filename or str(layer.digest)
                path = posixpath.normpath(name) if name.startswith("./") else name
                if path in self.blobs and self.blobs[path].digest != layer.digest:
                    self.clashes.append(path)
                self.blobs[path] = layer
        self._unpacking = None
        if packed:
            self._unpacking = Unpacking(where, packed, root, fetch, ExtractionLimits())

    def info(self, key: str, size: int, digest: Digest | None = None) -> ObjectInfo:
        """Return what is told of an object."""
        digests = () if digest is None else (digest,)
        return ObjectInfo(key, size, version=self.version, digests=digests)

    def find(self, key: str) -> ObjectInfo | None:
        """Return what is known of exactly ``key``; unpack layers only if it may be in them."""
        if (layer := self.blobs.get(key)) is not None:
            return self.info(key, layer.size, layer.digest)
        file = self.packed_file(key)
        return None if file is None else self.info(key, file.size)

    def packed_file(self, key: str) -> PackedFile | None:
        """Return a file that came in a layer."""
        return None if self._unpacking is None else self._unpacking.files().get(key)

    def open_packed(self, key: str) -> IO[bytes]:
        """Open such a file."""
        assert self._unpacking is not None
        return self._unpacking.open(key)

    def was_read(self, key: str, count: int) -> None:
        """Note that ``count`` bytes of such a file were handed over."""
        if self._unpacking is not None:
            self._unpacking.was_read(key, count)

    def all(self) -> Iterator[ObjectInfo]:
        """Yield all objects; a key that two layers claim comes twice, and is refused above."""
        for key, layer in self.blobs.items():
            yield self.info(key, layer.size, layer.digest)
        for key in self.clashes:
            yield replace(self.info(key, self.blobs[key].size), digests=())
        if self._unpacking is not None:
            for key, file in self._unpacking.files().items():
                yield self.info(key, file.size)

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._unpacking is not None:
            self._unpacking.close()
