"""One download on its way into the cache: from verified files to a model that others find."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from storage.cache.cache import ModelCache
from storage.cache.index import Known, ObjectKey
from storage.cache.manifests import Manifest, ManifestFile
from storage.cache.partials import JOURNAL, give_up, new_partial
from storage.cache.refs import Pending, Ref, Source
from storage.cache.survey import folder_size
from storage.digest import Digest, hash_file

__all__ = ["Filling"]


class Filling:
    """A context manager around one download. What it leaves after a failure can be used again."""

    def __init__(
        self,
        cache: ModelCache,
        source: Source,
        keys: Iterable[ObjectKey | None],
        *,
        durable: bool,
        resumable: Callable[[str], bool] | None = None,
    ) -> None:
        """Prepare; nothing is touched.

        Args:
            cache: where to.
            source: what is downloaded.
            keys: of its objects in the index; ``None`` for one that cannot be told again.
            durable: force everything to disk before others find it.
            resumable: tells of the path of a journal that a download left whether to go on with
                that.
        """
        self._cache = cache
        self._source = source
        self._keys = tuple(keys)
        self._durable = durable
        self._resumable = resumable
        self._held: list[str] = []
        self._stack = ExitStack()
        self.folder: str
        """A folder for files that are not verified yet, on the file system of the cache."""
        self.journal: str
        """Where to write down what of them is there."""

    def __enter__(self) -> Self:
        upper = self._cache.upper
        with self._cache.writing():
            keys = tuple(key for key in self._keys if key is not None)
            upper.refs.begin(Pending(self._source, len(self._keys), keys))
            path = self._stack.enter_context(new_partial(upper.path, self._wants))
            self.folder = os.path.join(path, "files")
            self.journal = os.path.join(path, JOURNAL)
            os.makedirs(self.folder, exist_ok=True)
        return self

    def _wants(self, folder: str) -> bool:
        return self._resumable is not None and self._resumable(os.path.join(folder, JOURNAL))

    def weight(self) -> int:
        """Return how many bytes of what is to come count against the budget already."""
        return folder_size(self.folder)

    def leave(self) -> None:
        """Leave what has arrived to the next download; at the end of a failed one."""
        give_up(os.path.dirname(self.folder))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        with contextlib.suppress(OSError):
            self._cache.upper.index.flush()
        if exc_type is not None and not self._held:
            self._cache.upper.refs.end(self._source)
        self._cache.leases.release_blobs(self._held)

    def take(
        self,
        file: str,
        path: str,
        size: int,
        digests: Mapping[str, Digest],
        key: ObjectKey | None,
        *,
        executable: bool = False,
    ) -> ManifestFile:
        """Make a verified file a blob; safe for many threads.

        Args:
            file: where it lies, in :attr:`folder`; it is gone afterwards.
            path: its path in the model.
            size: in bytes.
            digests: of its content, the address among them.
            key: of its object in the index.
            executable: whether it is a program.
        """
        address = digests[self._cache.algorithm]
        others = tuple(digests[name] for name in sorted(digests) if name != address.algorithm)
        upper = self._cache.upper
        self._hold(address)
        with self._cache.writing():
            upper.blobs.add(file, address, size, durable=self._durable)
            upper.index.learn(Known(address, size, others), key)
        return ManifestFile(path, size, address, others, executable)

    def take_tree(self, folder: str) -> Manifest:
        """Make all files of an unpacked archive blobs and return what it was."""
        files: list[ManifestFile] = []
        links: list[tuple[str, str]] = []
        folders: list[str] = []
        for base, inner, names in os.walk(folder):
            relative = os.path.relpath(base, folder)
            prefix = "" if relative == "." else f"{relative}/"
            if prefix and not inner and not names:
                folders.append(relative)
            for name in (*inner, *names):
                place = os.path.join(base, name)
                if os.path.islink(place):
                    links.append((f"{prefix}{name}", os.readlink(place)))
                elif name in names:
                    status = os.stat(place)
                    digests = hash_file(place, (self._cache.algorithm,))
                    executable = bool(status.st_mode & 0o100)
                    files.append(
                        self.take(
                            place,
                            f"{prefix}{name}",
                            status.st_size,
                            digests,
                            None,
                            executable=executable,
                        )
                    )
        return Manifest(True, tuple(files), tuple(links), tuple(folders))

    def publish(
        self, manifest: Manifest, fingerprint: str | None, archive: Iterable[Digest] = ()
    ) -> None:
        """Make the model known under its source.

        Args:
            manifest: what it is; every file of it was taken, or is in the cache already. The
                caller has a lease on it.
            fingerprint: the state that the store told.
            archive: digests of the archive that it was.

        Raises:
            CacheShortfallError: a file of it is gone or damaged.
        """
        cache = self._cache
        with cache.writing():
            cache.upper.manifests.save(manifest, durable=self._durable)
        cache.check(manifest)
        cache.open(manifest, durable=self._durable)
        now = time.time()
        with cache.writing():
            ref = Ref(self._source, manifest.id, now, now, fingerprint, tuple(archive))
            cache.upper.refs.set(ref, durable=self._durable)

    def _hold(self, digest: Digest) -> None:
        text = str(digest)
        # Nobody has to wait for removals here: whoever publishes does, before the last look.
        self._cache.leases.hold(blobs=[text])
        self._held.append(text)
