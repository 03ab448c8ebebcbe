"""Snapshots: complete downloads, named after their source and its state.

::

    <root>/snapshots/<id>/<name>     the file or the tree itself, published as a whole
    <root>/refs/<id>.json            the snapshot that a source had last, for offline use

The id of a snapshot is a hash of the source, the filters and the state that the store told
(paths, sizes, versions or ETags); so an unchanged source is found without moving a byte, and
a changed one gets a folder of its own. Everything appears by rename; nothing rests on locks.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass

from storage.errors import DestinationError, OfflineError

__all__ = ["Snapshot", "SnapshotStore", "source_id"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a source was when it was fetched last."""

    uri: str
    path: str
    """Relative to the root of the store."""

    is_tree: bool
    fetched_at: float
    """Seconds since the epoch."""


def source_id(uri: str, *parts: object) -> str:
    """Return the id of a source with its filters and, for a snapshot, its state."""
    text = "\0".join((uri, *(repr(part) for part in parts)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class SnapshotStore:
    """The snapshots below one root. Construction touches nothing."""

    def __init__(self, root: str) -> None:
        """Keep them below ``root``, which is made when it is first needed."""
        self.root = root

    def place(self, snapshot_id: str, name: str) -> str:
        """Return the path that the file or tree ``name`` of a snapshot has or will have."""
        return os.path.join(self.root, "snapshots", snapshot_id, name)

    def remember(self, ref_id: str, snapshot: Snapshot) -> None:
        """Note which snapshot a source has now."""
        path = self._ref(ref_id)
        temporary = f"{path}.{secrets.token_hex(8)}.partial"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
                json.dump(asdict(snapshot), file)
            os.replace(temporary, path)
        except OSError as exc:
            raise DestinationError(
                f"the cache {self.root} cannot be written: {exc.strerror}; "
                "set STORAGE_CACHE_DIR to a folder that this user may write"
            ) from exc

    def recall(self, ref_id: str, uri: str) -> str:
        """Return the path of the snapshot that a source had last, without asking the source.

        Raises:
            OfflineError: it was never fetched, or its files are gone.
        """
        try:
            with open(self._ref(ref_id), encoding="utf-8", errors="surrogateescape") as file:
                path = os.path.join(self.root, json.load(file)["path"])
        except FileNotFoundError as exc:
            raise OfflineError(
                f"{uri} was never cached with these filters, and offline nothing is fetched; "
                f"download it once while the store can be reached (cache: {self.root})"
            ) from exc
        except (OSError, ValueError, KeyError) as exc:
            raise OfflineError(
                f"{uri}: its entry in the cache {self.root} is damaged; "
                "download it again while the store can be reached"
            ) from exc
        if not os.path.exists(path):
            raise OfflineError(
                f"{uri} was cached, but its files are gone from {path}; "
                "download it again while the store can be reached"
            )
        return path

    def new_snapshot(self, uri: str, path: str, is_tree: bool) -> Snapshot:
        """Describe the snapshot at ``path`` as fetched now."""
        return Snapshot(uri, os.path.relpath(path, self.root), is_tree, time.time())

    def _ref(self, ref_id: str) -> str:
        return os.path.join(self.root, "refs", f"{ref_id}.json")
