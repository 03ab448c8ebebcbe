"""KServe: the storage initializer of its pods, and the class that its model servers import.

``from storage.integrations.kserve import Storage`` takes the place of
``from kserve_storage import Storage``; the command ``storage-initializer`` that of the entry point
of KServe's image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

__all__ = ["Storage"]

Path = str | os.PathLike[str]


class Storage:
    """The interface of ``kserve_storage.Storage``.

    Each call reads KServe's variables anew and writes none. What fails is a
    :class:`storage.StorageError`, which is a ``RuntimeError``.
    """

    @staticmethod
    def download(
        uri: Path,
        out_dir: Path | None = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
    ) -> str:
        """Bring a model into a folder, whole or not at all.

        One object becomes a file of its name in the folder, a tree its content, and one archive
        (tar, tar.gz, tar.bz2, tar.xz, zip) what it holds. What this source put there before and
        has no more goes; what others put there stays, unless a file of theirs is replaced: then
        all of it goes.

        Args:
            uri: any source that KServe or :mod:`storage` knows, a local path included.
            out_dir: the folder, made if it is not there. ``None``: of a local source its own
                path; else a folder in the cache, which is not to be changed, or a temporary one
                where there can be no cache.
            allow_patterns: only files of a tree whose relative path matches one of these
                (``fnmatch``); ``STORAGE_ALLOW_PATTERNS`` if ``None``.
            ignore_patterns: none that match one of these; ``STORAGE_IGNORE_PATTERNS`` if
                ``None``.

        Returns:
            The folder; ``out_dir`` if that is given.

        Raises:
            StorageError: the model cannot be had; nothing of it is in the folder.
        """
        return _bring((uri,), (out_dir,), allow_patterns, ignore_patterns, complete=False)[0]

    @staticmethod
    def download_files(
        source_uris: Sequence[Path],
        out_dirs: Sequence[Path | None],
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
    ) -> list[str]:
        """Bring several models, one after the other; see :meth:`download`.

        All folders are made before the first is brought. Several sources may share one, if they
        have no file in common. What earlier calls brought there from other sources goes.

        Args:
            source_uris: the sources.
            out_dirs: as many folders.
            allow_patterns: for all of them.
            ignore_patterns: for all of them.

        Raises:
            InvalidInput: there are more of the one than of the other, or two sources of a folder
                have a file of the same name.
            StorageError: one cannot be had; those before it are in their folders.
        """
        return _bring(source_uris, out_dirs, allow_patterns, ignore_patterns, complete=True)


def _bring(
    uris: Sequence[Path],
    folders: Sequence[Path | None],
    allow: str | Iterable[str] | None,
    ignore: str | Iterable[str] | None,
    *,
    complete: bool,
) -> list[str]:
    # A model server that imports this may never call it.
    from storage.integrations.kserve.batch import bring_all

    return bring_all(uris, folders, allow, ignore, complete=complete)
