"""A disk that loses power: what is on it after each change, and what might be left of that.

What was forced to disk stays: the content of a file, and the names in a folder. Of everything
else a power cut may leave the new state, the old one, or a file whose content is not there.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["DAMAGES", "Camera", "Disk", "File", "restore", "state"]

# Calls after which something else is on the disk, or on it for good.
_CHANGES = (
    *("mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove"),
    *("utime", "chmod"),
)

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[:-1] + b"\0",
    "a page of zeros": lambda data: bytes(min(len(data), 4096)) + data[4096:],
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(byte ^ 0xA5 for byte in data),
}
"""What a power cut may make of a content, by a name."""


@dataclass(frozen=True)
class File:
    """What a file is, name aside."""

    data: bytes
    time: int
    mode: int


Entry = tuple[str, int | str]
"""What a name stands for: ``("file", inode)``, ``("folder", inode)`` or ``("link", target)``."""


@dataclass(frozen=True)
class Disk:
    """What is on a disk, by inode, and what of it was forced to be."""

    top: int
    folders: dict[int, dict[str, Entry]]
    files: dict[int, File]
    safe_folders: dict[int, dict[str, Entry]]
    safe_files: dict[int, File]


class Camera:
    """Takes a picture of a disk after each change that this process makes; a context manager.

    The disk has to give no inode's number twice, as tmpfs does.
    """

    def __init__(self, top: Path) -> None:
        """Watch everything below ``top``, which is the root of its file system."""
        self._top = top
        self._device = top.stat().st_dev
        self._lock = threading.RLock()
        self._files: dict[int, File] = {}
        self._folders: dict[int, dict[str, Entry]] = {}
        self._safe_files: dict[int, File] = {}
        self._safe_folders: dict[int, dict[str, Entry]] = {}
        self._patch = pytest.MonkeyPatch()
        self.pictures: list[Disk] = []

    def __enter__(self) -> Camera:
        from storage.cache import snapshots

        for name in _CHANGES:
            self._hook(os, name)
        self._hook(snapshots, "exchange")
        real = os.fsync

        def fsync(descriptor: int) -> None:
            with self._lock:
                real(descriptor)
                self._note(descriptor)

        self._patch.setattr(os, "fsync", fsync)
        self._shoot()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patch.undo()
        self._shoot()

    def _hook(self, module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                try:
                    return real(*args, **kwargs)
                finally:
                    self._shoot()

        self._patch.setattr(module, name, call)

    def _note(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if found.st_dev != self._device:
            return
        path = f"/proc/self/fd/{descriptor}"
        if stat.S_ISDIR(found.st_mode):
            self._safe_folders[found.st_ino] = self._names(path)
        else:
            self._safe_files[found.st_ino] = _file(path, found)
        self._shoot()

    def _shoot(self) -> None:
        for _ in self._walk(str(self._top)):
            pass
        picture = Disk(
            self._top.stat().st_ino,
            dict(self._folders),
            dict(self._files),
            dict(self._safe_folders),
            dict(self._safe_files),
        )
        if not self.pictures or picture != self.pictures[-1]:
            self.pictures.append(picture)

    def _walk(self, folder: str) -> Iterator[None]:
        names = self._names(folder)
        self._folders[os.stat(folder).st_ino] = names
        for name, (kind, inode) in names.items():
            path = os.path.join(folder, name)
            if kind == "folder":
                yield from self._walk(path)
            elif kind == "file":
                assert isinstance(inode, int)
                self._files[inode] = _file(path, os.lstat(path), self._files.get(inode))
        yield

    def _names(self, folder: str) -> dict[str, Entry]:
        names: dict[str, Entry] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    names[entry.name] = ("link", os.readlink(entry.path))
                else:
                    kind = "folder" if entry.is_dir() else "file"
                    names[entry.name] = (kind, entry.inode())
        return names


def _file(path: str, found: os.stat_result, before: File | None = None) -> File:
    mode = stat.S_IMODE(found.st_mode)
    known = before is not None and (before.time, len(before.data)) == (
        found.st_mtime_ns,
        found.st_size,
    )
    # Nothing writes to the same place twice without a new time.
    data = before.data if known and before is not None else Path(path).read_bytes()
    return File(data, found.st_mtime_ns, mode)


def restore(
    disk: Disk,
    target: Path,
    *,
    lost: Callable[[str], bool],
    damage: Callable[[bytes], bytes] = lambda data: bytes(len(data)),
) -> None:
    """Make at ``target`` what a power cut may leave of a disk.

    Args:
        disk: what was on it.
        target: a folder that is not there.
        lost: tells of each change that was not forced to disk whether it is lost: one of a
            ``name``, of a ``content``, or of the ``times`` of a file.
        damage: what the content of a file becomes that is lost while its name and times are not.
    """
    _restore_folder(disk, disk.top, target, lost, damage)


def _restore_folder(
    disk: Disk,
    inode: int,
    target: Path,
    lost: Callable[[str], bool],
    damage: Callable[[bytes], bytes],
) -> None:
    target.mkdir()
    now, safe = disk.folders.get(inode, {}), disk.safe_folders.get(inode, {})
    for name in sorted(now.keys() | safe.keys()):
        entry, before = now.get(name), safe.get(name)
        if entry != before and lost("name"):
            entry = before
        if entry is None:
            continue
        kind, what = entry
        path = target / name
        if kind == "link":
            path.symlink_to(str(what))
        elif kind == "folder":
            assert isinstance(what, int)
            _restore_folder(disk, what, path, lost, damage)
        else:
            assert isinstance(what, int)
            file = disk.files[what]
            forced = disk.safe_files.get(what)
            if forced is not None and forced.data == file.data:
                file = forced if lost("times") else file
            elif lost("content"):
                file = File(damage(file.data), file.time, file.mode)
            path.write_bytes(file.data)
            path.chmod(file.mode)
            os.utime(path, ns=(file.time, file.time))


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return, of all that is in a folder, whatever a write would change."""
    found = {}
    for base, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            path = os.path.join(base, name)
            it = os.lstat(path)
            found[path] = (it.st_ino, it.st_mode, it.st_size, it.st_mtime_ns, it.st_ctime_ns)
    return found
