"""Snapshots: the files of a manifest in one folder, as links to blobs.

A link leads to its blob by a relative path, so a cache can be moved; to a blob of a lower
cache, by an absolute one. What a link cannot be (an executable, or any file where the file
system has no symbolic links) is a copy that carries the mark of its blob.

A snapshot appears by one rename. Each use looks at every entry again: what is missing, too
many or leads elsewhere has the snapshot made anew from its manifest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from storage.cache.blobs import is_marked, make_read_only, set_mark
from storage.cache.layout import Layout
from storage.cache.manifests import Manifest, ManifestFile
from storage.cache.partials import new_partial
from storage.cache.records import force_name, make_folder_for
from storage.digest import Digest
from storage.files import exchange, materialise, sync_tree

__all__ = ["Snapshots"]

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Snapshots:
    """The snapshots of one cache."""

    def __init__(self, layout: Layout, find_blob: Callable[[Digest], str]) -> None:
        """Use those below the root of ``layout``.

        Args:
            layout: of the cache.
            find_blob: returns the path of a blob, in this cache or a lower one.
        """
        self._layout = layout
        self._find_blob = find_blob

    def path(self, manifest: Manifest) -> str:
        """Return the path of the file or of the tree, there or not."""
        folder = self._layout.snapshot(manifest.id)
        return folder if manifest.is_tree else os.path.join(folder, manifest.files[0].path)

    def is_whole(self, manifest: Manifest) -> bool:
        """Tell whether a snapshot is there and each of its entries is the right one.

        The blobs that it leads to are not looked at.
        """
        folder = self._layout.snapshot(manifest.id)
        missing: dict[str, ManifestFile | str | None] = {
            **{file.path: file for file in manifest.files},
            **dict(manifest.links),
            **dict.fromkeys(manifest.folders),
        }
        inner = {path[:index] for path in missing for index, char in enumerate(path) if char == "/"}
        waiting = [""]
        try:
            if os.path.islink(folder):
                return False
            while waiting:
                base = waiting.pop()
                with os.scandir(os.path.join(folder, base)) as entries:
                    for entry in entries:
                        path = f"{base}{entry.name}"
                        if path in inner and entry.is_dir(follow_symlinks=False):
                            waiting.append(f"{path}/")
                        elif path not in missing or not self._is_right(
                            path, entry, missing.pop(path)
                        ):
                            return False
        except OSError:
            return False
        return not missing

    def _is_right(
        self, path: str, entry: os.DirEntry[str], wanted: ManifestFile | str | None
    ) -> bool:
        if wanted is None:
            return entry.is_dir(follow_symlinks=False) and not os.listdir(entry.path)
        if isinstance(wanted, str):
            return entry.is_symlink() and os.readlink(entry.path) == wanted
        if entry.is_symlink():
            return not wanted.executable and os.readlink(entry.path) == self._target(path, wanted)
        found = entry.stat(follow_symlinks=False)
        return (
            found.st_size == wanted.size
            and is_marked(found, wanted.digest)
            and os.access(entry.path, os.R_OK)
        )

    def build(self, manifest: Manifest, *, durable: bool = False) -> str:
        """Make the snapshot of a manifest whose blobs are all there, and return its path.

        Raises:
            OSError: the cache cannot be written.
        """
        folder = self._layout.snapshot(manifest.id)
        with new_partial(self._layout.root) as partial:
            fresh = os.path.join(partial, "snapshot")
            os.mkdir(fresh)
            made = {""}
            for path in manifest.folders:
                self._make_parents(fresh, f"{path}/", made)
            for file in manifest.files:
                self._make_parents(fresh, file.path, made)
                self._place(file, fresh, durable)
            for path, target in manifest.links:
                self._make_parents(fresh, path, made)
                os.symlink(target, os.path.join(fresh, path))
            if durable:
                sync_tree(fresh)
            make_folder_for(folder)
            self._publish(fresh, folder, manifest)
            if durable:
                force_name(self._layout, folder)
        return self.path(manifest)

    def _publish(self, fresh: str, folder: str, manifest: Manifest) -> None:
        try:
            os.rename(fresh, folder)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if self.is_whole(manifest):
            return  # another process was faster
        if not exchange(fresh, folder):
            os.rename(folder, f"{fresh}.old")
            os.rename(fresh, folder)

    def _make_parents(self, fresh: str, path: str, made: set[str]) -> None:
        parent = path.rpartition("/")[0]
        if parent not in made:
            os.makedirs(os.path.join(fresh, parent), exist_ok=True)
            made.add(parent)

    def _place(self, file: ManifestFile, fresh: str, durable: bool) -> None:
        place = os.path.join(fresh, file.path)
        if not file.executable:
            try:
                os.symlink(self._target(file.path, file), place)
                return
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
        materialise(self._find_blob(file.digest), place, executable=file.executable)
        make_read_only(place)
        set_mark(place, file.digest, durable=durable)

    def _target(self, path: str, file: ManifestFile) -> str:
        """Return what the link at ``path`` of a snapshot says."""
        blob = self._find_blob(file.digest)
        inside = os.path.join(self._layout.root, "")
        if not blob.startswith(inside):
            return blob
        # From <root>/snapshots/<id>/…/ up to the root; relpath would ask for the current folder.
        return "../" * (2 + path.count("/")) + blob[len(inside) :]
