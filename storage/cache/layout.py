"""Where things are in a cache: names of files below one root, and the VERSION file.

::

    <root>/VERSION                       format and address algorithm; a record
      blobs/<algorithm>/ab/<hex>         content, read-only
      index/<algorithm>/ab               → blobs: what stores advertised, once verified
      index/source/ab/<hex>              → blobs: the objects of one folder of a store
      manifests/ab/<id>.json             paths, sizes and digests of one model; its content only
      refs/<scheme>/<uri>/<variant>.json what a source had last; ``.pending``: began, not ended
      snapshots/<id>/…                   the files of a manifest, as links
      partial/  pins/  leases/  locks/  quarantine/

Everything but ``blobs`` can be thrown away; what is lost then is time.
"""

from __future__ import annotations

import hashlib
import os
from urllib.parse import quote

from storage.cache.owners import new_name
from storage.digest import Digest
from storage.errors import DestinationError
from storage.files import shown

__all__ = ["Layout", "hash_text", "listed"]

_MAX_NAME = 150


def hash_text(*parts: str) -> str:
    """Return the SHA-256 of some texts, each with its length, in hex."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        hasher.update(b"%d:" % len(data) + data)
    return hasher.hexdigest()


def listed(folder: str) -> list[str]:
    """Return the names in a folder; none if it is not there.

    Raises:
        DestinationError: it cannot be read.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        error = DestinationError(
            f"{shown(folder)} cannot be read: {exc.strerror}; let this user read the cache, or "
            "set STORAGE_CACHE_DIR to another folder"
        )
        error.errno = exc.errno
        raise error from exc


class Layout:
    """The paths below ``root``. Nothing is touched."""

    def __init__(self, root: str) -> None:
        """Name paths below ``root``."""
        self.root = root
        self.forced: set[str] = set()
        """Folders whose names were forced to disk, by this process."""
        self.version = os.path.join(root, "VERSION")
        self.blobs = os.path.join(root, "blobs")
        self.index = os.path.join(root, "index")
        self.manifests = os.path.join(root, "manifests")
        self.refs = os.path.join(root, "refs")
        self.snapshots = os.path.join(root, "snapshots")
        self.partial = os.path.join(root, "partial")
        self.pins = os.path.join(root, "pins")
        self.locks = os.path.join(root, "locks")
        self.quarantine = os.path.join(root, "quarantine")

    @property
    def kept(self) -> tuple[str, ...]:
        """The folders that hold what is kept; the others come and go with processes."""
        return (
            self.blobs,
            self.index,
            self.manifests,
            self.refs,
            self.snapshots,
            self.pins,
            self.quarantine,
        )

    def blob(self, digest: Digest) -> str:
        """Return the path of the blob with this address."""
        return os.path.join(self.blobs, digest.algorithm, digest.hex[:2], digest.hex)

    def advertised(self, digest: Digest) -> str:
        """Return the path of the record that says which blob has this other digest."""
        return os.path.join(self.index, digest.algorithm, digest.hex[:2])

    def source(self, folder: str) -> str:
        """Return the path of the record of one folder of a store, which is given as a hash."""
        return os.path.join(self.index, "source", folder[:2], folder)

    def manifest(self, manifest_id: str) -> str:
        """Return the path of a manifest."""
        return os.path.join(self.manifests, manifest_id[:2], f"{manifest_id}.json")

    def snapshot(self, manifest_id: str) -> str:
        """Return the folder with the files of a manifest."""
        return os.path.join(self.snapshots, manifest_id)

    def ref_folder(self, scheme: str, uri: str) -> str:
        """Return the folder with the refs of a source; ``uri`` is without credentials."""
        name = quote(uri, safe="", errors="surrogateescape")
        if len(name) > _MAX_NAME:
            name = f"{name[:_MAX_NAME]}~{hash_text(uri)[:16]}"
        return os.path.join(self.refs, scheme, name)

    def pin(self, name: str) -> str:
        """Return the path of the record of a pin; ``name`` is a hash."""
        return os.path.join(self.pins, f"{name}.json")

    def temporary(self) -> str:
        """Return a name in ``partial/`` that nobody else uses; it says whose it is."""
        return os.path.join(self.partial, new_name())
