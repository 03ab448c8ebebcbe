"""Containers in local files: the user's, and unnamed ones that vanish with their owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import stat
import tempfile
import weakref
from typing import BinaryIO

from storage.container.source import Section, Source
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    StorageError,
)
from storage.files import shown, translate_os_errors

__all__ = ["LocalSource", "copy_bytes", "discard", "map_file", "publish", "unnamed_file"]

_BUFFER = 64 * 1024
_BLOCK = 1024 * 1024
# Bytes that the kernel is asked to copy at once; an interrupt has to wait for them.
_STEP = 64 * _BLOCK
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_CANNOT_LINK = (*_CANNOT_COPY, errno.ENOENT, errno.EMLINK)
_LONGEST_NAME = 150


class LocalSource(Source):
    """A file that is held open, and found out if it is written to meanwhile.

    Reads have no position, so that several threads, and children after a fork, may share one.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Own ``file``, an open file of the system with all its content."""
        file.flush()
        self._file = file
        self._close = weakref.finalize(self, file.close)
        self.name = name
        status = os.fstat(file.fileno())
        self.size = status.st_size
        self._state = _state(status)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LocalSource:
        """Open a file of the user.

        Raises:
            ModelMissingError: there is none.
            AuthenticationError: this user may not read it.
            InvalidInput: it is no file.
        """
        name = os.fsdecode(path)
        try:
            # A pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise ModelMissingError(name, f"there is no file {shown(name)}") from exc
        except PermissionError as exc:
            raise AuthenticationError(f"{shown(name)} may not be read by this user") from exc
        except ValueError as exc:
            raise InvalidInput(f"{shown(name)} is no path: {exc}") from exc
        except OSError as exc:
            raise StorageError(f"{shown(name)} cannot be opened: {exc.strerror}") from exc
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidInput(f"{shown(name)} is a folder or a device; a file is needed")
        return cls(io.FileIO(descriptor), shown(name))

    @classmethod
    def adopt(cls, file: BinaryIO, name: str) -> LocalSource:
        """Own an open file that is complete, such as an :func:`unnamed_file`."""
        return cls(file, name)

    def read_at(self, offset: int, length: int) -> bytes:
        descriptor = self.fileno()
        wanted = max(0, min(length, self.size - offset))
        blocks = []
        while wanted:
            block = os.pread(descriptor, wanted, offset)
            if not block:
                raise self._changed()
            blocks.append(block)
            offset += len(block)
            wanted -= len(block)
        self.fileno()  # which looks whether it is still the same
        return b"".join(blocks)

    def stream(self, offset: int, length: int) -> BinaryIO:
        return io.BufferedReader(_LocalSection(self.duplicate(), offset, length), _BUFFER)

    def fileno(self) -> int:
        if self._file.closed:
            raise InvalidInput(f"{self.name} is closed; open it again to read from it")
        descriptor = self._file.fileno()
        if _state(os.fstat(descriptor)) != self._state:
            raise self._changed()
        return descriptor

    def duplicate(self) -> LocalSource:
        descriptor = self.fileno()
        try:
            file = io.FileIO(os.dup(descriptor))
        except OSError as exc:
            raise StorageError(f"{self.name} cannot be opened again: {exc.strerror}") from exc
        other = LocalSource(file, self.name)
        other.size, other._state = self.size, self._state
        return other

    def close(self) -> None:
        self._close()

    def _changed(self) -> IntegrityError:
        return IntegrityError(
            f"{self.name} was written to since it was opened, so its parts may not fit together; "
            "open it again, and replace models by renaming new files over them"
        )


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _LocalSection(Section):
    def __init__(self, source: LocalSource, offset: int, length: int) -> None:
        super().__init__(max(0, min(length, source.size - offset)))
        self._source = source
        self._offset = offset

    def _read(self, position: int, view: memoryview) -> int:
        count = os.preadv(self._source.fileno(), [view], self._offset + position)
        self._source.fileno()  # which looks whether it is still the same
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def map_file(source: Source, offset: int, length: int) -> memoryview | None:
    """Return bytes of a local file as memory of this process; ``None`` if it is none.

    They are read when they are first used. What is written to them stays in this process. The
    memory is let go with the last view of it. A file that is cut short meanwhile ends the
    process at the next look (``SIGBUS``), so it must not be.
    """
    descriptor = source.fileno()
    if descriptor is None:
        return None
    if not length:
        return memoryview(bytearray())
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    # Without a claim on swap for pages that are never written, as far as Python knows the flag.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        mapped = mmap.mmap(
            descriptor, offset - begin + length, flags=flags, prot=protection, offset=begin
        )
    except (OSError, ValueError) as exc:
        raise StorageError(
            f"{length} bytes of {source.name} cannot be mapped: {exc}; read them instead"
        ) from exc
    return memoryview(mapped)[offset - begin :]


def unnamed_file(folder: str | os.PathLike[str] | None = None) -> BinaryIO:
    """Make an empty file without a name, for reading and writing.

    Whatever becomes of the process, the file is gone once it is closed.

    Args:
        folder: on whose file system it is; by default that of the system's temporary files.

    Raises:
        OSError: as the system says.
        InvalidInput: ``folder`` is no path.
    """
    place = tempfile.gettempdir() if folder is None else os.fspath(folder)
    try:
        # The mode is for publish(); without a name nobody else can open it.
        descriptor = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except ValueError as exc:
        raise InvalidInput(f"{shown(place)} is no path: {exc}") from exc
    except (OSError, AttributeError):
        try:
            return tempfile.TemporaryFile(dir=place)
        except OSError as exc:
            exc.filename = place  # not a name in it that nobody gave
            raise
    return open(descriptor, "w+b")


def discard(file: BinaryIO) -> None:
    """Close a file whose content nobody wants any more, even if it cannot be written."""
    with contextlib.suppress(OSError):
        file.close()


def publish(source: Source, path: str | os.PathLike[str]) -> LocalSource | None:
    """Give what a source holds the name ``path``, whole or not at all.

    An :func:`unnamed_file` on the same file system is not copied. The file's mode is as the
    umask says. What had the name before is replaced.

    Args:
        source: its bytes.
        path: in a folder that exists.

    Returns:
        The source of the new file; ``None`` if it is that of ``source`` itself, which has this
        name now or had it before.

    Raises:
        DestinationError: it cannot be written; nothing is left.
        InvalidInput: ``path`` is a folder, or no path.
        IntegrityError: the source was written to while it was copied.
    """
    target = os.path.abspath(os.fsdecode(path))
    descriptor = source.fileno()
    with translate_os_errors(target):
        with contextlib.suppress(FileNotFoundError):
            there = _stat(target)
            if stat.S_ISDIR(there.st_mode):
                raise InvalidInput(f"{shown(target)} is a folder; the name of a file is needed")
            if descriptor is not None and os.path.samestat(there, os.fstat(descriptor)):
                return None
        if descriptor is not None and _link(descriptor, target):
            return None
        copy = unnamed_file(os.path.dirname(target))
        with contextlib.ExitStack() as undo:
            undo.callback(discard, copy)
            if _is_unnamed(copy.fileno()):
                copy_bytes(source, 0, source.size, copy)
                copy.flush()
                if _link(copy.fileno(), target):
                    undo.pop_all()
                    return LocalSource.adopt(copy, shown(target))
        return _publish_beside(source, target)


def _stat(path: str) -> os.stat_result:
    try:
        return os.lstat(path)
    except ValueError as exc:
        raise InvalidInput(f"{shown(path)} is no path: {exc}") from exc


def _publish_beside(source: Source, target: str) -> LocalSource:
    """Write a copy under another name first: where no file can do without, such as on NFS."""
    staged = _beside(target)
    try:
        with open(staged, "xb") as file:
            copy_bytes(source, 0, source.size, file)
        # The very file, should somebody save another one there just now.
        written = LocalSource.open(staged)
        written.name = shown(target)
        try:
            os.replace(staged, target)
        except BaseException:
            written.close()
            raise
    except BaseException:
        _drop(staged)
        raise
    return written


def copy_bytes(source: Source, offset: int, length: int, file: BinaryIO) -> None:
    """Copy a part of a source to where ``file`` stands, in the kernel where that is possible.

    Raises:
        IntegrityError: the source was written to meanwhile, or has fewer bytes.
    """
    left = length
    descriptor = source.fileno()
    # Other objects that have a descriptor may hold other bytes than it does (gzip's do).
    real = isinstance(file, (io.FileIO, io.BufferedRandom, io.BufferedWriter))
    if descriptor is not None and real:
        left = _copy_in_kernel(descriptor, offset, length, file)
        source.fileno()  # as before
    if left:
        with source.stream(offset + length - left, left) as stream:
            while left and (block := stream.read(min(left, _BLOCK))):
                _write(file, block)
                left -= len(block)
    if left:
        raise IntegrityError(
            f"{source.name} ends {left} bytes before it should; fetch or make it again"
        )


def _copy_in_kernel(descriptor: int, offset: int, length: int, file: BinaryIO) -> int:
    """Return how many bytes are left, because the kernel cannot."""
    try:
        written = file.fileno()
    except OSError:  # a buffered file over something else
        return length
    file.flush()
    begin = end = file.tell()
    try:
        while length > end - begin and (
            count := os.copy_file_range(
                descriptor,
                written,
                min(length - (end - begin), _STEP),
                offset + end - begin,
                end,
            )
        ):
            end += count
    except OSError as exc:
        if exc.errno not in _CANNOT_COPY:
            raise
    file.seek(end)
    return length - (end - begin)


def _write(file: BinaryIO, data: bytes) -> None:
    with memoryview(data) as rest:
        written = 0
        while written < len(rest):
            written += file.write(rest[written:])


def _is_unnamed(descriptor: int) -> bool:
    """Tell whether a file never had a name, so that it can be given one."""
    flag = getattr(os, "O_TMPFILE", 0)
    return bool(flag) and (
        fcntl.fcntl(descriptor, fcntl.F_GETFL) & flag == flag and os.fstat(descriptor).st_nlink == 0
    )


def _link(descriptor: int, target: str) -> bool:
    """Give an unnamed file its name; tell whether that is possible."""
    if not _is_unnamed(descriptor):
        return False
    opened = f"/proc/self/fd/{descriptor}"
    # Python follows links (linkat with AT_SYMLINK_FOLLOW) only if it is given a folder.
    folder = os.open(os.path.dirname(target), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(opened, os.path.basename(target), dst_dir_fd=folder, follow_symlinks=True)
            return True
        staged = _beside(target)
        try:
            os.link(opened, os.path.basename(staged), dst_dir_fd=folder, follow_symlinks=True)
            os.replace(staged, target)
        except BaseException:
            _drop(staged)
            raise
    except OSError as exc:
        if exc.errno in _CANNOT_LINK:
            return False
        raise
    finally:
        os.close(folder)
    return True


def _beside(target: str) -> str:
    folder, name = os.path.split(target)
    # Names of a file system have at most 255 bytes.
    short = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    return os.path.join(folder, f".{short}.{os.urandom(6).hex()}")


def _drop(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
