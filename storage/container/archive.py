"""Safe extraction of archives: what arrives in one must not reach beyond its folder.

Refused, before anything of the member is written: absolute names and ``..``, links that lead
out of the folder, devices and pipes, and archives whose total size, ratio or number of
entries look like a bomb. Refused as damaged: what does not end with the mark of its format,
or fails its checksum. Modes keep the executable bit and lose setuid, setgid and sticky.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile  # type: ignore[attr-defined]
from typing import IO, Any, Self

from storage.errors import InvalidInput, one_line

__all__ = ["ExtractionLimits", "extract_archive"]

_BLOCK = 1024 * 1024
_GIB = 1024**3
_MAX_LINK = 4096
_COMPRESSIONS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"]\x00\x00": lzma.open,
}
# What the formats' modules raise about content that is not theirs, or not any more.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ExtractionLimits:
    """What an archive may become."""

    total_size: int = 1024 * _GIB
    """Bytes of all files together."""

    ratio: float = 200.0
    """Bytes of all files over bytes of the archive; not applied to less than 1 GiB."""

    entries: int = 1_000_000
    """Files, folders and links."""


def extract_archive(archive: str, folder: str, limits: ExtractionLimits | None = None) -> list[str]:
    """Extract a tar (plain, gzip, bzip2 or xz) or zip archive into an existing folder.

    The format is recognised by content, not by name. On failure the folder may hold some of
    the files; the caller extracts into a staging folder and drops it.

    Returns:
        The relative paths of the files, sorted.

    Raises:
        InvalidInput: it is no such archive, is damaged, or holds what is refused.
    """
    name = os.path.basename(archive)
    extraction = _Extraction(name, folder, os.path.getsize(archive), limits or ExtractionLimits())
    try:
        if _is_zip(archive):
            _extract_zip(archive, extraction)
        else:
            _extract_tar(archive, extraction)
        return extraction.finish()
    except InvalidInput:
        raise
    except _DAMAGE as exc:
        raise _unusable(name, exc) from exc
    except OSError as exc:
        if exc.errno is not None:
            raise
        # bz2 has no exception of its own.
        raise _unusable(name, exc) from exc


def _unusable(name: str, exc: Exception) -> InvalidInput:
    return InvalidInput(
        f"{name} cannot be unpacked: {one_line(exc)}; expected a whole tar, tar.gz, tar.bz2, "
        "tar.xz or zip archive"
    )


def _is_zip(archive: str) -> bool:
    # A zip is known by its end, and a tar may end with a zip as its last member.
    with open(archive, "rb") as file:
        if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
            return True
    return not tarfile.is_tarfile(archive) and zipfile.is_zipfile(archive)


class _Extraction:
    """The folder that an archive goes into; counts what comes out, against the limits."""

    def __init__(self, name: str, folder: str, archive_size: int, limits: ExtractionLimits) -> None:
        self.name = name
        self._folder = folder
        self._root = os.path.realpath(folder)
        self._limits = limits
        self._bound = min(limits.total_size, max(_GIB, int(archive_size * limits.ratio)))
        self._size = self._entries = 0
        self._written: set[str] = set()

    def entry(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise InvalidInput(
                f"{self.name} holds more than {self._limits.entries} entries and was refused"
            )

    def folder(self, name: str) -> None:
        self._make(self._below(name))

    def file(self, name: str, source: IO[bytes], executable: bool) -> None:
        path = self._free(name)
        with open(path, "xb") as target:
            for block in self.counted(source):
                target.write(block)
        if executable:
            mode = os.stat(path).st_mode
            os.chmod(path, mode | (mode & 0o444) >> 2)

    def counted(self, source: IO[bytes]) -> Iterator[bytes]:
        # The sizes in the headers are claims; the bytes are counted as they come.
        while block := source.read(_BLOCK):
            self._size += len(block)
            if self._size > self._bound:
                raise InvalidInput(
                    f"{self.name} unpacks to more than {self._bound} bytes and was refused"
                )
            yield block

    def link(self, name: str, target: str) -> None:
        path = self._free(name)
        landing = os.path.join(os.path.dirname(path), target)
        if not target or "\0" in target or os.path.isabs(target) or not self._holds(landing):
            raise InvalidInput(
                f"{self.name} holds the link {name!r}, which leads out of it; refused"
            )
        os.symlink(target, path)

    def hard_link(self, name: str, target: str) -> None:
        source = self._below(target)
        if not os.path.isfile(source) or os.path.islink(source):
            raise InvalidInput(
                f"{self.name} holds the link {name!r} to {target!r}, which is no file in it"
            )
        if os.path.normpath(name) == os.path.normpath(target):
            return
        path = self._free(name)
        try:
            os.link(source, path)
        except OSError:  # a file system without hard links
            shutil.copy(source, path)

    def finish(self) -> list[str]:
        """Return the relative paths of the files and links, sorted."""
        for path in self._written:
            # A later member may have turned an earlier link's way around.
            if os.path.islink(path) and not self._holds(path):
                name = os.path.relpath(path, self._folder)
                raise InvalidInput(
                    f"{self.name} holds the link {name!r}, which leads out of it; refused"
                )
        return sorted(
            os.path.relpath(path, self._folder) for path in self._written if os.path.lexists(path)
        )

    def _free(self, name: str) -> str:
        """Return the path of a file or link to be made. The last member of a name wins."""
        path = self._below(name)
        self._make(os.path.dirname(path))
        # Never written through: what is there is removed, be it a link.
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)
        self._written.add(path)
        return path

    def _make(self, folder: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            name = os.path.relpath(folder, self._folder)
            raise InvalidInput(
                f"{self.name} holds {name!r} as a file and as a folder; refused"
            ) from exc

    def _below(self, name: str) -> str:
        """Return where a member goes; follow the links that earlier members made."""
        parts = name.split("/")
        if not name or "\0" in name or name.startswith("/") or ".." in parts:
            raise InvalidInput(f"{self.name} holds the name {name!r}, which leaves it; refused")
        path = os.path.join(self._folder, *(part for part in parts if part not in ("", ".")))
        if not self._holds(path if path == self._folder else os.path.dirname(path)):
            raise InvalidInput(f"{self.name} holds {name!r} behind a link that leaves it; refused")
        return path

    def _holds(self, path: str) -> bool:
        """Tell whether ``path`` certainly stays in the folder, whatever links are on the way."""
        loose = os.path.realpath(path)
        while True:
            try:
                strict = os.path.realpath(path, strict=True)
            except (FileNotFoundError, NotADirectoryError):
                path = os.path.dirname(path)
            except OSError:
                # A circle, or longer than the system can follow: realpath() would take the
                # rest literally, and then the system might go elsewhere.
                return False
            else:
                break
        inside = self._root.rstrip("/") + "/"
        return all(found == self._root or found.startswith(inside) for found in (loose, strict))


class _Member(tarfile.TarInfo):
    """Notices where an archive ends; ``tarfile`` takes a damaged or missing header for it."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as exc:
            raise ReadError(
                f"at byte {tarfile.offset} a header is damaged or missing ({exc})"
            ) from exc


def _extract_tar(archive: str, extraction: _Extraction) -> None:
    with _decompressed(archive) as stream:
        # As a stream, because a step back in compressed data means to begin again.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK, tarinfo=_Member) as tar:
            for member in tar:
                extraction.entry()
                _extract_tar_member(tar, member, extraction)
        # Only the end of the stream tells whether its checksum is right.
        for _ in extraction.counted(stream):
            pass


def _extract_tar_member(tar: TarFile, member: tarfile.TarInfo, extraction: _Extraction) -> None:
    if member.isdir():
        extraction.folder(member.name)
    elif member.isreg():
        source = tar.extractfile(member)
        assert source is not None
        with source:
            extraction.file(member.name, source, bool(member.mode & 0o100))
    elif member.issym():
        extraction.link(member.name, member.linkname)
    elif member.islnk():
        extraction.hard_link(member.name, member.linkname)
    else:
        raise InvalidInput(
            f"{extraction.name} holds {member.name!r}, a device or pipe, and was refused"
        )


@contextlib.contextmanager
def _decompressed(archive: str) -> Iterator[IO[bytes]]:
    with open(archive, "rb") as file:
        start = file.read(6)
    found = (opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic))
    with next(found, _open_plain)(archive) as stream:
        yield stream


def _open_plain(path: str) -> IO[bytes]:
    return open(path, "rb")


def _extract_zip(archive: str, extraction: _Extraction) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            extraction.entry()
            mode = member.external_attr >> 16
            if member.is_dir():
                extraction.folder(member.filename)
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFLNK):
                raise InvalidInput(
                    f"{extraction.name} holds {member.filename!r}, a device or pipe, and was "
                    "refused"
                )
            else:
                try:
                    source = zipped.open(member)
                except RuntimeError as exc:  # encrypted, or a compression of another build
                    raise _unusable(extraction.name, exc) from exc
                with source:
                    if stat.S_ISLNK(mode):
                        extraction.link(member.filename, _link_target(source, extraction.name))
                    else:
                        extraction.file(member.filename, source, bool(mode & 0o100))


def _link_target(source: IO[bytes], name: str) -> str:
    target = source.read(_MAX_LINK + 1)
    if len(target) > _MAX_LINK:
        raise InvalidInput(f"{name} holds a link of more than {_MAX_LINK} bytes and was refused")
    return os.fsdecode(target)
