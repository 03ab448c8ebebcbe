"""Is it what the store, the uploader and the caller say? Decided before anything is published."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from itertools import islice

from storage.backends.base import ByteRange, ObjectInfo
from storage.digest import Digest, MultiHasher, available, hash_file
from storage.errors import IntegrityError

__all__ = ["OrderedHasher", "algorithms_for", "check_checksums", "check_digests"]

_WINDOW = 8 * 1024 * 1024


def algorithms_for(info: ObjectInfo, wanted: Iterable[str], vouched: bool = False) -> set[str]:
    """Return the algorithms to run over an object's bytes.

    Those that the caller wants, and one that the store can be held to: the cheapest digest it
    vouches for, else the MD5 that its ETag seems to be. With ``vouched``, SHA-256 too if the
    store vouches for one: other stores are likely to name the same content by it.
    """
    algorithms = set(wanted)
    if vouched and any(digest.algorithm == "sha256" for digest in info.digests):
        algorithms.add("sha256")
    if not any(digest.algorithm in algorithms for digest in info.digests):
        computable = [each for each in info.digests if available(each.algorithm)]
        if computable:
            algorithms.add(computable[0].algorithm)
        elif info.hint is not None:
            algorithms.add(info.hint.algorithm)
    return algorithms


def check_digests(
    where: str, info: ObjectInfo, found: dict[str, Digest], expected: Digest | None
) -> Digest | None:
    """Compare the digests of the bytes that arrived with what is known about the object.

    Args:
        where: the object's URI, for the message.
        info: what the store says.
        found: digests of what arrived, by algorithm.
        expected: what the caller demands of this object.

    Returns:
        The hint (``ObjectInfo.hint``) if that alone does not match: the backend has to be
        asked what it is.

    Raises:
        IntegrityError: the bytes are wrong.
    """
    for source, digest in (
        ("the caller expects", expected),
        *(("the store says", digest) for digest in info.digests),
    ):
        if digest is None or digest.algorithm not in found:
            continue
        if found[digest.algorithm] != digest:
            raise IntegrityError(
                f"{where}: {source} {digest}, but the bytes that arrived are "
                f"{found[digest.algorithm]}; nothing was published; the object or the way to "
                "it is damaged, or the digest belongs to another version"
            )
    hint = info.hint
    if hint is not None and hint.algorithm in found and found[hint.algorithm] != hint:
        return hint
    return None


def check_checksums(
    where: str, kept: Sequence[Digest], found: dict[str, Digest], path: str
) -> None:
    """Compare a file with what the store says when it is asked for checksums.

    Args:
        where: the object's URI, for the message.
        kept: what the store says (``Backend.checksums``), best first.
        found: digests of what arrived, by algorithm; one more is added if none of ``kept``
            could be compared with them.
        path: of the file.

    Raises:
        IntegrityError: the bytes are wrong.
        OSError: the file cannot be read.
    """
    if found.keys().isdisjoint(digest.algorithm for digest in kept):
        known = (digest.algorithm for digest in kept if available(digest.algorithm))
        found |= hash_file(path, (*islice(known, 1),))
    check_digests(where, ObjectInfo("", None, digests=tuple(kept)), found, None)


class OrderedHasher:
    """Hashes a file whose parts are completed in any order, as soon as order allows.

    Whichever thread completes the next part in order hashes it, and what has been waiting
    behind it, from the page cache; no thread waits for another.
    """

    def __init__(self, descriptor: int, parts: Sequence[ByteRange]) -> None:
        """Watch the ``parts`` of the open file ``descriptor``."""
        self._descriptor = descriptor
        self._parts = parts
        self._complete: set[int] = set()
        self._hashed = 0
        self._busy = False
        self._told = False
        self._lock = threading.Lock()
        self._hasher: MultiHasher | None = None
        self._needed = False

    def start(self, algorithms: Iterable[str]) -> None:
        """Choose the algorithms; before part 0 is reported."""
        names = tuple(algorithms)
        self._hasher = MultiHasher(names)
        self._needed = bool(names)

    def part_done(self, index: int) -> bool:
        """Report that part ``index`` is in the file; tell whether that completed the hash."""
        with self._lock:
            self._complete.add(index)
            if self._busy:
                return False  # whoever is at it will see this part
            self._busy = True
        try:
            while (part := self._take()) is not None:
                self._hash(part)
                self._hashed += 1
        except BaseException:
            self._busy = False
            raise
        return self._finished()

    def _take(self) -> ByteRange | None:
        with self._lock:
            if self._hashed not in self._complete:
                self._busy = False
                return None
            self._complete.remove(self._hashed)
            return self._parts[self._hashed]

    def _finished(self) -> bool:
        """Tell whether every part is hashed; true only once, whoever asks."""
        with self._lock:
            if self._told or self._hashed < len(self._parts):
                return False
            self._told = True
            return True

    def _hash(self, part: ByteRange) -> None:
        assert self._hasher is not None, "start() comes before part 0"
        if not self._needed:
            return
        for start in range(part.start, part.end, _WINDOW):
            end = min(start + _WINDOW, part.end)
            # A mapping begins at a page.
            base = start - start % mmap.ALLOCATIONGRANULARITY
            with (
                mmap.mmap(
                    self._descriptor, end - base, mmap.MAP_SHARED, mmap.PROT_READ, offset=base
                ) as window,
                memoryview(window) as view,
                view[start - base :] as bytes_of_part,
            ):
                self._hasher.update(bytes_of_part)

    def digests(self) -> dict[str, Digest]:
        """Return the digests of the whole file; after every part was reported."""
        assert self._hasher is not None
        return self._hasher.digests()
