"""Safe extraction of archives: what arrives in one must not reach beyond its folder.

Refused, before anything of the member is written: absolute names and ``..``, links that lead
out of the folder, devices and pipes, and archives whose total size, ratio or number of
entries look like a bomb. Modes keep the executable bit and lose setuid, setgid and sticky.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from storage.errors import InvalidInput

__all__ = ["ExtractionLimits", "extract_archive"]

_BLOCK = 1024 * 1024
_GIB = 1024**3


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
    meter = _Meter(name, os.path.getsize(archive), limits or ExtractionLimits())
    try:
        if zipfile.is_zipfile(archive):
            return sorted(_extract_zip(archive, folder, meter))
        with tarfile.open(archive, "r:*") as tar:
            return sorted(_extract_tar(tar, folder, meter))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError) as exc:
        raise InvalidInput(
            f"{name} cannot be unpacked: {exc}; expected a tar, tar.gz, tar.bz2, tar.xz or "
            "zip archive"
        ) from exc


class _Meter:
    """Counts what comes out, against the limits."""

    def __init__(self, name: str, archive_size: int, limits: ExtractionLimits) -> None:
        self.name = name
        self._limits = limits
        self._bound = min(limits.total_size, max(_GIB, int(archive_size * limits.ratio)))
        self._size = self._entries = 0

    def entry(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise InvalidInput(
                f"{self.name} holds more than {self._limits.entries} entries and was refused"
            )

    def copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        # The sizes in the headers are claims; the bytes are counted as they come.
        while block := source.read(_BLOCK):
            self._size += len(block)
            if self._size > self._bound:
                raise InvalidInput(
                    f"{self.name} unpacks to more than {self._bound} bytes and was refused"
                )
            target.write(block)


def _extract_tar(tar: tarfile.TarFile, folder: str, meter: _Meter) -> Iterable[str]:
    written = []
    for member in tar:
        meter.entry()
        try:
            # Python's "data" filter refuses names, links and devices that reach out.
            safe = tarfile.data_filter(member, folder)
        except tarfile.FilterError as exc:
            raise InvalidInput(f"{meter.name} was refused: {exc}") from exc
        path = _below(folder, safe.name, meter.name)
        if safe.isdir():
            os.makedirs(path, exist_ok=True)
        elif safe.isreg():
            source = tar.extractfile(member)
            assert source is not None
            with source, _create(path) as target:
                meter.copy(source, target)
            if safe.mode is not None and safe.mode & 0o100:
                _make_executable(path)
            written.append(os.path.relpath(path, folder))
        else:
            tar._extract_member(safe, path)  # type: ignore[attr-defined]
            written.append(os.path.relpath(path, folder))
    return written


def _extract_zip(archive: str, folder: str, meter: _Meter) -> Iterable[str]:
    written = []
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            meter.entry()
            path = _below(folder, member.filename, meter.name)
            mode = member.external_attr >> 16
            if member.is_dir():
                os.makedirs(path, exist_ok=True)
                continue
            if stat.S_ISLNK(mode):
                _extract_zip_link(zipped, member, path, folder, meter)
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise InvalidInput(f"{meter.name} holds a device or pipe and was refused")
            else:
                try:
                    with zipped.open(member) as source, _create(path) as target:
                        meter.copy(source, target)
                except RuntimeError as exc:
                    raise InvalidInput(f"{meter.name} cannot be unpacked: {exc}") from exc
                if mode & 0o100:
                    _make_executable(path)
            written.append(os.path.relpath(path, folder))
    return written


def _extract_zip_link(
    zipped: zipfile.ZipFile, member: zipfile.ZipInfo, path: str, folder: str, meter: _Meter
) -> None:
    if member.file_size > 4096:
        raise InvalidInput(f"{meter.name} holds a link of {member.file_size} bytes")
    target = os.fsdecode(zipped.read(member))
    landing = os.path.realpath(os.path.join(os.path.dirname(path), target))
    if os.path.isabs(target) or not _is_below(folder, landing):
        raise InvalidInput(f"{meter.name} holds a link that leads out of it and was refused")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.symlink(target, path)


def _below(folder: str, name: str, archive: str) -> str:
    """Return where a member goes; follow the links that earlier members made."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise InvalidInput(f"{archive} holds the name {name!r}, which leaves it; refused")
    path = os.path.join(folder, name)
    if not _is_below(folder, os.path.realpath(os.path.dirname(path))):
        raise InvalidInput(f"{archive} holds {name!r} behind a link that leaves it; refused")
    return path


def _is_below(folder: str, path: str) -> bool:
    root = os.path.realpath(folder)
    return path == root or path.startswith(os.path.join(root, ""))


def _create(path: str) -> IO[bytes]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(path) or os.path.exists(path):
        # The last member of a name wins, and never writes through a link.
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    return open(path, "xb")


def _make_executable(path: str) -> None:
    mode = os.stat(path).st_mode
    os.chmod(path, mode | (mode & 0o444) >> 2)
