"""Archives of models: a folder as one tar.zst, with the hashes of what is in it and of itself.

The same content gives the same bytes: members are sorted by the parts of their paths, owners
and times are left out, and of modes only the executable bit is kept. (Another release of zstd
may compress otherwise.) Everything is read once; hashing and compressing go on beside it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from storage.container.archives.lanes import PIECE, Lanes, Take, usable_cores
from storage.container.archives.tar_headers import BLOCK, END, RECORD, member_header
from storage.container.archives.zstd import Compressor, filling
from storage.digest import MultiHasher
from storage.errors import IntegrityError, InvalidInput
from storage.files import make_parents, shown, translate_os_errors
from storage.unpacking.extraction import leads_out, least_size

__all__ = ["Archive", "create_archive"]

SUFFIX = ".tar.zst"
LEVEL = 1
"""What shrinks at all shrinks by it; what does not is stored, at any level."""

DIGESTS = ("sha256", "blake3")
"""Hashes that can be had beside MD5."""

# Parts that one writev may have on Linux.
_MOST_AT_ONCE = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class Archive:
    """An archive that :func:`create_archive` made; all hashes are lower-case hex.

    A context manager that removes the archive at the end if it is a temporary one. As a
    sequence it is location, content hash, size and archive hash, so that
    ``with create_archive(path) as (archive, content_hash, size, archive_hash)`` works.
    """

    path: Path
    """Where it is."""

    size: int
    """Its bytes."""

    content_size: int
    """Bytes of all files in it."""

    file_count: int
    """How many those are."""

    content_hash: str
    """MD5 of the bytes of all files, one after another, in the order of their paths' parts."""

    content_sha256: str | None
    """SHA-256 of the same bytes; ``None`` if it was not asked for."""

    content_blake3: str | None
    """BLAKE3 of the same bytes; ``None`` if it was not asked for."""

    archive_hash: str
    """MD5 of the archive."""

    archive_sha256: str | None
    """SHA-256 of the archive; ``None`` if it was not asked for."""

    archive_blake3: str | None
    """BLAKE3 of the archive; ``None`` if it was not asked for."""

    temporary: bool
    """Whether :meth:`close` removes it."""

    def __post_init__(self) -> None:
        removal = weakref.finalize(self, _remove, str(self.path), os.getpid())
        if not self.temporary:
            removal.detach()
        object.__setattr__(self, "_removal", removal)

    def close(self) -> None:
        """Remove the archive if it is temporary; more than once is fine."""
        removal: weakref.finalize[[str, int], Archive] = self._removal  # type: ignore[attr-defined]
        removal()

    def __iter__(self) -> Iterator[Path | str | int]:
        return iter((self.path, self.content_hash, self.size, self.archive_hash))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _remove(path: str, maker: int) -> None:
    # A child forked meanwhile comes through here too.
    if os.getpid() == maker:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def create_archive(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    *,
    digests: Collection[str] = ("blake3",),
    level: int = LEVEL,
    threads: int | None = None,
) -> Archive:
    """Make a tar.zst archive of what is in a folder.

    Links that stay inside the folder are kept as links. A link to a file elsewhere, as in the
    trees of a cache, becomes that file. Files that are linked together (hard links) become
    files of their own. Empty folders are kept.

    Args:
        path: the folder; its own name is not in the archive.
        destination: path of the archive, which replaces a file that is there; or an existing
            folder, or a path with a slash at the end, to put it into under the name of ``path``.
            If not given, it is a temporary file, which :meth:`Archive.close`, the end of
            ``with`` and the end of the process remove.
        digests: hashes beside MD5, out of ``sha256`` and ``blake3``. Hashing takes most of the
            time where there are few cores: SHA-256 half as much as MD5, BLAKE3 a sixth.
        level: zstd's level of compression, negative (fast) to 22.
        threads: how many compress; if not given, as many as this process has cores. The
            archive does not depend on it.

    Returns:
        The archive and its hashes. Until it is whole, there is nothing under its name.

    Raises:
        InvalidInput: ``path`` is no folder, holds what no archive should (a pipe, socket or
            device, a link that leads nowhere or to a folder elsewhere) or what cannot be read,
            or ``destination`` is inside it.
        IntegrityError: a file was changed while it was being read.
        ConfigurationError: the package ``zstandard`` is not installed.
        DestinationError: the archive cannot be written.
    """
    folder = os.path.abspath(path)
    if not os.path.isdir(folder):
        raise InvalidInput(f"{shown(folder)} is not a folder; an archive is made of a folder")
    if not -100 <= level <= 22:
        raise InvalidInput(f"level is -100 to 22, not {level}")
    if threads is not None and threads < 1:
        raise InvalidInput(f"threads is 1 or more, not {threads}")
    if not set(digests) <= set(DIGESTS):
        raise InvalidInput(f"digests are out of {', '.join(DIGESTS)}, not {digests!r}")
    root = os.path.realpath(folder)
    if destination is None:
        final, where = None, tempfile.gettempdir()
    else:
        final = os.fspath(destination)
        if final.endswith("/") or os.path.isdir(final):
            final = os.path.join(final, (os.path.basename(root) or "archive") + SUFFIX)
        final = os.path.abspath(final)
        where = os.path.dirname(final)
        if f"{os.path.realpath(where)}/".startswith(os.path.join(root, "")):
            raise InvalidInput(
                f"{shown(final)} is inside {shown(folder)}, which is to be archived; "
                "choose a destination elsewhere"
            )
        if os.path.lexists(final) and not os.path.isfile(final):
            raise InvalidInput(f"{shown(final)} is there and is no file; choose another path")
    with translate_os_errors(final or where), contextlib.ExitStack() as undo:
        if final is not None:
            for made in make_parents(where):
                undo.callback(_remove_empty, made)
        with _fresh(where, temporary=final is None) as (file, keep):
            with _Writer(file, digests, level, threads) as writer:
                _add_all(root, writer)
            content, archive = writer.content.digests(), writer.archive.digests()
            placed = keep(final)
        undo.pop_all()
        return Archive(
            path=Path(placed),
            size=writer.size,
            content_size=writer.content_size,
            file_count=writer.file_count,
            content_hash=content["md5"],
            content_sha256=content.get("sha256"),
            content_blake3=content.get("blake3"),
            archive_hash=archive["md5"],
            archive_sha256=archive.get("sha256"),
            archive_blake3=archive.get("blake3"),
            temporary=final is None,
        )


def _remove_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def _fresh(
    folder: str, *, temporary: bool
) -> Iterator[tuple[IO[bytes], Callable[[str | None], str]]]:
    """Open a new file, and yield with it what gives it a name; without one it is gone."""
    name = os.path.join(folder, f".archive.{os.urandom(8).hex()}.partial")
    mode = 0o600 if temporary else 0o666
    try:
        # It has no name yet, so that even a killed process leaves nothing.
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        named = False
    except OSError:  # a file system that does not know such files
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
        named = True

    def keep(final: str | None) -> str:
        nonlocal named
        if not named:
            # With a descriptor, for without one Python would link to the link in /proc.
            os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=descriptor)
            named = True
        if final is None:
            final = os.path.join(folder, f"model-{os.urandom(8).hex()}{SUFFIX}")
        os.replace(name, final)
        named = False
        return final

    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield file, keep
    finally:
        if named:
            os.unlink(name)


class _Hashes:
    """The hashes of one stream of bytes, some of them beside the others."""

    def __init__(self, digests: Collection[str], *, beside: bool) -> None:
        # MD5 takes as long as the others together.
        groups = [("md5",), digests] if beside else [("md5", *digests)]
        self._hashers = [MultiHasher(group) for group in groups]

    @property
    def takes(self) -> list[Take]:
        return [partial(_update, hasher) for hasher in self._hashers]

    def digests(self) -> dict[str, str]:
        return {
            name: digest.hex
            for hasher in self._hashers
            for name, digest in hasher.digests().items()
        }


def _update(hasher: MultiHasher, pieces: Sequence[bytes | memoryview]) -> None:
    for piece in pieces:
        hasher.update(piece)


class _Writer:
    """Writes one archive; a context manager, after which it is whole."""

    def __init__(
        self, file: IO[bytes], digests: Collection[str], level: int, threads: int | None
    ) -> None:
        # Two cores have enough to do with two of them.
        beside = usable_cores() > 2
        self.content = _Hashes(digests, beside=beside)
        self.archive = _Hashes(digests, beside=beside)
        self.content_size = self.file_count = 0
        self._level, self._threads = level, threads
        self._file = file

    def __enter__(self) -> Self:
        # None of them knows this object: in a circle their memory would wait for the collector.
        self._out = Lanes(*self.archive.takes, partial(_write, self._file))
        self._compressing = Compressor(self._out, self._level, self._threads)
        self._tar = Lanes(self._compressing.write)
        self._content = Lanes(*self.content.takes)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        whole = exc is None
        try:
            if whole:
                self.add(END)
                self.add(bytes(-self._tar.size % RECORD))
        finally:
            # Each feeds the next one.
            with contextlib.ExitStack() as stack:
                stack.callback(self._out.end, whole=whole)
                if whole:
                    stack.callback(self._finish)
                stack.callback(self._tar.end, whole=whole)
                stack.callback(self._content.end, whole=whole)

    def _finish(self) -> None:
        self._compressing.close()
        # Zeros become almost nothing, and a reader that fears bombs would not have them back.
        for piece in filling(least_size(self._tar.size) - self._out.size):
            self._out.write(piece)

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self._out.size

    def add(self, piece: bytes) -> None:
        """Add bytes of the tar."""
        self._tar.write(piece)

    def add_file(self, name: bytes, path: str) -> None:
        """Add a file, and count and hash its content."""
        with _open_regular(path) as descriptor:
            status = os.fstat(descriptor)
            size = status.st_size
            executable = bool(status.st_mode & stat.S_IXUSR)
            self.add(member_header("file", name, size=size, executable=executable))
            for piece in _pieces(descriptor, path, status):
                self.add(piece)
                self._content.write(piece)
            self.add(bytes(-size % BLOCK))
        self.content_size += size
        self.file_count += 1

    def add_link(self, name: bytes, target: bytes, path: str | None) -> None:
        """Add a link; the content of the file ``path`` that it leads to is hashed again."""
        self.add(member_header("link", name, target=target))
        if path is not None:
            with _open_regular(path) as descriptor:
                for piece in _pieces(descriptor, path, os.fstat(descriptor)):
                    self._content.write(piece)


def _write(file: IO[bytes], pieces: Sequence[bytes | memoryview]) -> None:
    waiting = [memoryview(piece) for piece in pieces if piece]
    while waiting:
        written = os.writev(file.fileno(), waiting[:_MOST_AT_ONCE])
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if written:
            waiting[0] = waiting[0][written:]


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InvalidInput(f"{shown(path)} cannot be read: {exc.strerror}") from exc


@contextlib.contextmanager
def _open_regular(path: str) -> Iterator[int]:
    with _reading(path):
        # What is no file by now must not block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInput(f"{shown(path)} is neither a file, a folder nor a link")
        yield descriptor
    finally:
        os.close(descriptor)


def _pieces(descriptor: int, path: str, status: os.stat_result) -> Iterator[bytes]:
    """Yield the content of a file, which must stay as ``status`` says."""
    left = status.st_size
    while left:
        with _reading(path):
            piece = os.read(descriptor, min(left, PIECE))
        if not piece:
            break
        left -= len(piece)
        yield piece
    now = os.fstat(descriptor)
    # Some files of the system hold more than they say.
    if (
        left
        or os.read(descriptor, 1)
        or (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns)
    ):
        raise IntegrityError(
            f"{shown(path)} changed while it was being read; no archive was made; "
            "try again when its writer is done"
        )


def _add_all(root: str, writer: _Writer) -> None:
    """Add everything below ``root``, sorted by the parts of the paths."""
    inside = os.path.join(root, "")
    # Folders on the way down, each with the names that are left in it, the last one first.
    waiting = [("", _names(root))]
    while waiting:
        base, names = waiting[-1]
        if not names:
            waiting.pop()
            continue
        relative = base + names.pop()
        path = os.path.join(root, relative)
        name = os.fsencode(relative)
        if leads_out(relative):
            raise InvalidInput(
                f"{shown(path)} has a name that leads elsewhere on some systems, and would not be "
                "extracted again; rename it"
            )
        with _reading(path):
            mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            writer.add(member_header("folder", name))
            waiting.append((f"{relative}/", _names(path)))
        elif stat.S_ISREG(mode):
            writer.add_file(name, path)
        elif stat.S_ISLNK(mode):
            _add_symlink(name, path, inside, writer)
        else:
            raise InvalidInput(
                f"{shown(path)} is a pipe, a socket or a device, which no model needs; remove it"
            )


def _names(folder: str) -> list[str]:
    with _reading(folder):
        return sorted(os.listdir(folder), reverse=True)


def _add_symlink(name: bytes, path: str, inside: str, writer: _Writer) -> None:
    with _reading(path):
        target = os.readlink(path)
    place = os.path.realpath(path)
    is_file = os.path.isfile(path)
    if not os.path.isabs(target) and f"{place}/".startswith(inside) and not os.path.islink(place):
        writer.add_link(name, os.fsencode(target), place if is_file else None)
    elif is_file:
        writer.add_file(name, path)
    else:
        raise InvalidInput(
            f"{shown(path)} is a link to {shown(target)}, which is no file and not in the folder "
            "that is archived; remove the link or put there what it leads to"
        )
