r"""Digests of files and trees: a hash never travels without the name of its algorithm.

The digest of a *tree* is the digest of its listing: one line ``<hex digest>  <path>`` for
each file, sorted by the bytes of the path, exactly what ``sha256sum`` (or ``b3sum``) prints
for the sorted paths. It can be checked without this library::

    find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Protocol

from storage import cancellation
from storage.errors import ConfigurationError, InvalidInput

__all__ = [
    "ALGORITHMS",
    "CHECKSUMS",
    "Digest",
    "Hasher",
    "MultiHasher",
    "available",
    "digest_of_ordered",
    "hash_file",
    "new_hasher",
    "tree_digest",
]

_HEX_LENGTH = {
    "md5": 32,
    "sha1": 40,
    "sha256": 64,
    "sha512": 128,
    "blake3": 64,
    "crc32c": 8,
    "crc64nvme": 16,
}
ALGORITHMS = tuple(_HEX_LENGTH)
"""Algorithms a digest may name. ``md5``, ``sha1``, ``crc32c`` (RFC 3720) and ``crc64nvme``
(NVM Express) detect accidents, not attackers; the last two need a package that an extra brings,
see :func:`available`."""

CHECKSUMS = frozenset({"crc32c", "crc64nvme"})
"""Those of them that do not tell one content from another."""

_READ_SIZE = 1024 * 1024


class Hasher(Protocol):
    """What every hash object offers (``hashlib`` and ``blake3`` alike)."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object:
        """Feed more bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes fed so far, in lower-case hex."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A hash and the algorithm that made it."""

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        length = _HEX_LENGTH.get(self.algorithm)
        if length is None:
            raise InvalidInput(
                f"unknown digest algorithm {self.algorithm!r}; known: {', '.join(ALGORITHMS)}"
            )
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.hex):
            raise InvalidInput(
                f"a {self.algorithm} digest is {length} lower-case hex digits, not {self.hex!r}"
            )

    @classmethod
    def parse(cls, text: str | Digest) -> Digest:
        """Read ``sha256:<hex>`` or ``sha256=<hex>``; a bare 64-digit hex means SHA-256.

        Raises:
            InvalidInput: it is none of these.
        """
        if isinstance(text, Digest):
            return text
        match = re.fullmatch(r"(?:([a-z0-9]+)[:=])?([0-9A-Fa-f]+)", text.strip())
        if match is None:
            raise InvalidInput(
                f"{text!r} is not a digest; expected sha256:<64 hex digits> or blake3:<64>"
            )
        return cls(match.group(1) or "sha256", match.group(2).lower())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def available(algorithm: str) -> bool:
    """Tell whether :func:`new_hasher` can compute ``algorithm`` here.

    False for names that are unknown, and for a CRC if no package that computes it is installed
    (``google-crc32c`` or ``awscrt`` for ``crc32c``, ``awscrt`` for ``crc64nvme``).
    """
    if algorithm in _CRCS:
        return _CRCS[algorithm]() is not None
    return algorithm in _HEX_LENGTH


def new_hasher(algorithm: str) -> Hasher:
    """Return a fresh hash object of ``algorithm`` (one of :data:`ALGORITHMS`).

    Raises:
        InvalidInput: there is no such algorithm.
        ConfigurationError: it is not :func:`available` here.
    """
    if algorithm == "blake3":
        from blake3 import blake3

        return blake3()
    if algorithm in _CRCS:
        extend = _CRCS[algorithm]()
        if extend is None:
            raise ConfigurationError(
                f"a {algorithm} cannot be computed: the package awscrt is not installed; "
                'run: pip install "modelstorage[s3]"'
            )
        return _Crc(extend, _HEX_LENGTH[algorithm])
    if algorithm in _HEX_LENGTH:
        return hashlib.new(algorithm, usedforsecurity=algorithm not in ("md5", "sha1"))
    raise InvalidInput(f"unknown digest algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")


_Extend = Callable[[memoryview, int], int]


@functools.cache
def _crc32c() -> _Extend | None:
    try:
        import google_crc32c
    except ImportError:
        return _of_awscrt("crc32c")
    if google_crc32c.implementation != "c":  # its other form, in Python, is too slow to be of use
        return _of_awscrt("crc32c")
    return lambda data, before: google_crc32c.extend(before, bytes(data))


@functools.cache
def _crc64nvme() -> _Extend | None:
    return _of_awscrt("crc64nvme")


def _of_awscrt(name: str) -> _Extend | None:
    try:
        from awscrt import checksums  # type: ignore[import-untyped]
    except ImportError:
        return None
    # Releases before 0.23 have no CRC64NVME.
    extend: _Extend | None = getattr(checksums, name, None)
    return extend


_CRCS: dict[str, Callable[[], _Extend | None]] = {"crc32c": _crc32c, "crc64nvme": _crc64nvme}


class _Crc:
    """A cyclic redundancy check in the shape of a hash object."""

    def __init__(self, extend: _Extend, length: int) -> None:
        self._extend = extend
        self._length = length
        self._value = 0

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        with memoryview(data) as view, view.cast("B") as octets:
            for start in range(0, len(octets), _READ_SIZE):
                with octets[start : start + _READ_SIZE] as piece:
                    self._value = self._extend(piece, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._length}x}"


class MultiHasher:
    """Several hashes of one stream of bytes, fed in order."""

    def __init__(self, algorithms: Iterable[str]) -> None:
        """Start one hash for each of ``algorithms``."""
        self._hashers = {name: new_hasher(name) for name in algorithms}

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Feed the next bytes to every hash."""
        for hasher in self._hashers.values():
            hasher.update(data)

    def digests(self) -> dict[str, Digest]:
        """Return the digest of all bytes fed so far, by algorithm."""
        return {name: Digest(name, hasher.hexdigest()) for name, hasher in self._hashers.items()}


def hash_file(
    file: str | os.PathLike[str] | IO[bytes],
    algorithms: Iterable[str],
    on_bytes: Callable[[int], object] | None = None,
) -> dict[str, Digest]:
    """Hash a file, or an open binary stream from where it stands, in bounded memory.

    Args:
        file: a path or a binary stream.
        algorithms: names out of :data:`ALGORITHMS`.
        on_bytes: called with the number of bytes after each piece.

    Returns:
        The digests by algorithm.
    """
    hasher = MultiHasher(algorithms)
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb", buffering=0) as stream:
            return _hash_stream(stream, hasher, on_bytes)
    return _hash_stream(file, hasher, on_bytes)


def _hash_stream(
    stream: IO[bytes], hasher: MultiHasher, on_bytes: Callable[[int], object] | None
) -> dict[str, Digest]:
    while block := stream.read(_READ_SIZE):
        cancellation.check()
        hasher.update(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return hasher.digests()


def tree_digest(files: Mapping[str, Digest], algorithm: str = "sha256") -> Digest:
    """Return the digest of a tree, as the module's text defines it.

    Args:
        files: the digest of each file, in ``algorithm``, by its path relative to the tree.
        algorithm: of the files' digests and of the result.
    """
    ordered = ((path, files[path]) for path in sorted(files, key=os.fsencode))
    return digest_of_ordered(ordered, algorithm)


def digest_of_ordered(files: Iterable[tuple[str, Digest]], algorithm: str) -> Digest:
    """Return the digest of a tree whose files come sorted by the bytes of their paths."""
    hasher = new_hasher(algorithm)
    for path, digest in files:
        if digest.algorithm != algorithm:
            raise InvalidInput(f"{path}: a {algorithm} digest is needed, not {digest}")
        hasher.update(_checksum_line(digest.hex, os.fsencode(path)))
    return Digest(algorithm, hasher.hexdigest())


def _checksum_line(hexdigest: str, path: bytes) -> bytes:
    # coreutils escapes a name that would break the line and says so by a leading backslash.
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    prefix = b"\\" if escaped != path else b""
    return prefix + hexdigest.encode() + b"  " + escaped + b"\n"
