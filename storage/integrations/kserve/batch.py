"""Several sources of one call, one after the other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence

from storage.errors import InvalidInput, redact
from storage.files import translate_os_errors
from storage.integrations.kserve.environment import Environment
from storage.integrations.kserve.model import bring
from storage.integrations.kserve.wish import Wish
from storage.transfer.progress import ProgressCallback

__all__ = ["bring_all"]

_log = logging.getLogger(__name__)

Path = str | os.PathLike[str]
Watch = Callable[[str, str | None], ProgressCallback]


def bring_all(
    uris: Sequence[Path],
    folders: Sequence[Path | None],
    allow: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    *,
    complete: bool = True,
    watch: Watch | None = None,
) -> list[str]:
    """Bring sources to their folders, which are all made first; stop at the first failure.

    Args:
        uris: the sources.
        folders: as many; see :meth:`storage.integrations.kserve.Storage.download`.
        allow: patterns for all of them.
        ignore: patterns for all of them.
        complete: whether these are all that the folders are to have; then what was brought there
            from other sources goes.
        watch: returns what is called while a source is on its way.

    Returns:
        The folders.

    Raises:
        InvalidInput: there are more of the one than of the other, or one is none, or a folder is
            a URI.
        StorageError: a source cannot be had.
    """
    if len(uris) != len(folders):
        raise InvalidInput(
            f"{len(uris)} sources and {len(folders)} folders were given; expected as many of one "
            "as of the other"
        )
    pairs = [
        (_text(uri, "a source is a URI or a path"), None if folder is None else _folder(folder))
        for uri, folder in zip(uris, folders, strict=True)
    ]
    for _, folder in pairs:
        if folder is not None:
            with translate_os_errors(folder):
                os.makedirs(folder, exist_ok=True)
    environment = Environment()
    patterns = environment.patterns(allow, ignore)
    done: list[str] = []
    for index, (uri, folder) in enumerate(pairs):
        sharing = [other == folder or _same(folder, other) for _, other in pairs]
        beside = tuple(
            pair[0] for pair, shares in zip(pairs[:index], sharing, strict=False) if shares
        )
        only = tuple(pair[0] for pair, shares in zip(pairs, sharing, strict=True) if shares)
        progress = None if watch is None else watch(uri, folder)
        began = time.monotonic()
        _log.info("bringing %s to %s", redact(uri), folder or "this machine")
        wish = Wish(uri, folder, patterns, beside, only if complete else None, progress)
        done.append(bring(wish, environment))
        _log.info("brought %s in %.1f s", redact(uri), time.monotonic() - began)
    return done


def _same(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and os.path.realpath(one or "") == os.path.realpath(other or "")


def _folder(path: Path) -> str:
    text = _text(path, "a destination is a path")
    if "://" in text:
        raise InvalidInput(
            f"a destination is a folder of this machine, not {redact(text)}; are the two in order?"
        )
    return text


def _text(path: Path, expected: str) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInput(f"{expected}, not {path!r}")
    return text
