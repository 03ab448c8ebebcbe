"""Safe extraction of archives: what arrives in one must not reach beyond its folder.

Refused: absolute names and ``..``, links that lead out of the folder, devices and pipes,
encrypted entries, and archives that look like a bomb
(:class:`~storage.unpacking.extraction.ExtractionLimits`). Refused as damaged: what does
not end with the mark of its format, or fails its checksum. Modes keep the executable bit and lose
all else.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from storage.container.archives.extract_zip import ends_as_zip, extract_zip
from storage.errors import DestinationError, InvalidInput, ObjectExistsError, one_line
from storage.files import (
    exchange,
    is_mount_point,
    make_parents,
    remove,
    shown,
    translate_os_errors,
)
from storage.unpacking.extraction import DamageError, Extraction, ExtractionLimits
from storage.unpacking.tar import Stream, extract_tar, is_tar
from storage.unpacking.zstd import is_zstd, open_zstd, zstandard_error

__all__ = ["ExtractionLimits", "extract_archive", "extract_into"]

_BLOCK = 1024 * 1024
_MAX_XZ_MEMORY = 160 * 1024 * 1024
# What the formats' modules raise about content that is not theirs, or not any more.
_DAMAGE = (DamageError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def extract_archive(
    archive: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    limits: ExtractionLimits | None = None,
    overwrite: bool = False,
) -> str:
    """Extract a tar (plain, gzip, bzip2, xz or zstd) or ZIP archive to a folder.

    The format is recognised by content, not by name. The folder appears when everything is
    extracted, or not at all.

    Args:
        archive: path of the archive.
        folder: where its members go; absent or empty.
        limits: what it may become.
        overwrite: replace what is in the folder, as a whole.

    Returns:
        The absolute path of the folder.

    Raises:
        InvalidInput: it is no such archive, is damaged, or holds what is refused.
        ObjectExistsError: the folder holds something, or is none.
        DestinationError: it cannot be written, or is a mount point.
    """
    target = os.path.abspath(folder)
    if os.path.isdir(target):
        target = os.path.realpath(target)
    _check(target, overwrite)
    parent = os.path.dirname(target)
    with translate_os_errors(target), contextlib.ExitStack() as undo:
        for made in make_parents(parent):
            undo.callback(_remove_empty, made)
        with _staging(target) as staging:
            content = os.path.join(staging, "content")
            os.mkdir(content)
            extract_into(archive, content, limits)
            _publish(content, target, overwrite)
        undo.pop_all()
    return target


@contextlib.contextmanager
def _staging(target: str) -> Iterator[str]:
    """Make a folder beside ``target`` that is gone at the end; remove those that were killed."""
    parent, name = os.path.split(target)
    prefix = f".extract.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    pattern = re.compile(re.escape(prefix) + r"\.[0-9a-f]{16}\.partial")
    with contextlib.suppress(OSError):
        for left in filter(pattern.fullmatch, os.listdir(parent)):
            path = os.path.join(parent, left)
            with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                if alone:
                    with contextlib.suppress(OSError):
                        remove(path)
    while True:
        path = os.path.join(parent, f"{prefix}.{os.urandom(8).hex()}.partial")
        with contextlib.ExitStack() as cleaning:
            cleaning.callback(remove, path)
            os.mkdir(path, 0o700)
            cleaning.enter_context(_locked(path, fcntl.LOCK_EX))
            if os.path.isdir(path):  # or whoever removes leftovers came between
                yield path
                return


@contextlib.contextmanager
def _locked(folder: str, how: int) -> Iterator[bool]:
    """Lock a folder, as long as this process lives; tell whether that was possible."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        locked = True
        try:
            fcntl.flock(descriptor, how)
        except OSError:  # held, or no locks on this file system
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def extract_into(
    archive: str | os.PathLike[str], folder: str, limits: ExtractionLimits | None = None
) -> None:
    """Extract an archive into an empty folder that nobody else uses.

    On failure the folder may hold some of the files; the caller drops it.

    Raises:
        InvalidInput: it is no such archive, is damaged, or holds what is refused.
    """
    path = os.fspath(archive)
    name = shown(os.path.basename(path))
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        extraction = Extraction(name, folder, size, limits or ExtractionLimits())
        try:
            _extract(file, extraction)
        except _DAMAGE as exc:
            raise _unusable(name, exc) from exc
        except OSError as exc:
            if exc.errno is not None:
                raise
            # bz2 has no exception of its own.
            raise _unusable(name, exc) from exc
        extraction.finish()


def _unusable(name: str, exc: Exception) -> InvalidInput:
    return InvalidInput(
        f"{name} cannot be unpacked: {one_line(exc)}; expected a whole tar, tar.gz, tar.bz2, "
        "tar.xz, tar.zst or zip archive"
    )


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 -- closed below
    except OSError as exc:
        raise InvalidInput(f"{shown(path)} cannot be read: {exc.strerror}") from exc
    with file:
        yield file


def _extract(file: IO[bytes], extraction: Extraction) -> None:
    start = file.read(512)
    if start[:4] in (b"PK\3\4", b"PK\5\6"):
        extract_zip(file, extraction)
        return
    if is_zstd(start):
        with open_zstd(file) as stream:
            try:
                extract_tar(stream, extraction)
            except zstandard_error() as exc:
                raise _unusable(extraction.name, exc) from exc
        return
    # A ZIP may have something in front, and a tar may end with a ZIP as its last member.
    if not start.startswith(_MAGIC) and not is_tar(start) and ends_as_zip(file):
        extract_zip(file, extraction)
        return
    file.seek(0)
    extract_tar(_decompressed(file, start), extraction)


_MAGIC = (_GZIP, _BZIP2, _XZ, _LZMA) = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"]\x00\x00")


def _decompressed(file: IO[bytes], start: bytes) -> Stream:
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(_BZIP2):
        return _Streams(file, bz2.BZ2Decompressor)
    if start.startswith((_XZ, _LZMA)):
        return _Streams(file, _xz_decompressor)
    return file


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY)


class _Streams:
    """Reads all streams of a file, one after another, and nothing but streams.

    The readers of ``bz2`` and ``lzma`` take whatever follows the first one for nothing, and
    know no limit of memory.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any]) -> None:
        self._file = file
        self._make = make
        self._decoder = make()
        # Streams of xz may be filled up with zeros.
        self._padding = b"\0" if make is _xz_decompressor else b""

    def read(self, size: int) -> bytes:
        """Return some bytes, up to ``size``; none at the end."""
        while size:
            if self._decoder.eof:
                rest = self._decoder.unused_data
                while not (rest := rest.lstrip(self._padding)):
                    if not (rest := self._file.read(_BLOCK)):
                        return b""
                self._decoder = self._make()
            elif self._decoder.needs_input:
                rest = self._file.read(_BLOCK)
                if not rest:
                    raise EOFError("a compressed stream is cut off")
            else:
                rest = b""
            data: bytes = self._decoder.decompress(rest, size)
            if data:
                return data
        return b""


def _check(target: str, overwrite: bool) -> None:
    with translate_os_errors(target):
        if not os.path.lexists(target):
            return
        if not os.path.isdir(target):
            raise ObjectExistsError(
                f"{shown(target)} is not a folder, and an archive is to be extracted there; "
                "name another folder or remove it"
            )
        if is_mount_point(target):
            raise DestinationError(
                f"{shown(target)} is a mount point, which no folder can replace at once; name a "
                "folder in it, or let Storage.download(archive, folder, unpack=True) fill it"
            )
        if os.listdir(target) and not overwrite:
            raise ObjectExistsError(
                f"{shown(target)} holds files; expected an absent or empty folder; "
                "pass overwrite=True to replace everything in it"
            )


def _publish(content: str, target: str, overwrite: bool) -> None:
    try:
        # This replaces an empty folder too, atomically.
        os.rename(content, target)
        return
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _check(target, overwrite)
    if exchange(content, target):
        return  # what was there goes with the staging folder
    old = f"{content}.old"
    os.rename(target, old)
    try:
        os.rename(content, target)
    except BaseException:
        os.rename(old, target)
        raise


def _remove_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)
