"""What both halves of the local backend stand on: errors, identities, temporary files, locks.

A temporary file lies beside its target as ``.<name>.<16 hex digits>.partial`` and is locked
(``flock``) by its writer as long as that lives, so that what a killed writer left can be told
from work in progress and is removed by the next writer in that directory.

Replacing, removing and comparing happen under a lock file of the same form, one for each
name, whose digits are all zero. It exists only while it is held.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat as modes
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from storage.backends.base import ObjectInfo
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)

__all__ = [
    "check_pin",
    "copy_all",
    "create",
    "flush",
    "holding",
    "info_of",
    "is_missing",
    "is_temporary",
    "kind_of",
    "link_or_rename",
    "make_parents",
    "remove_created",
    "reporting",
    "sweep",
    "sync_directory",
    "write_all",
]

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.partial|\.nfs[0-9a-f]{24}", re.DOTALL)
_NAME_MAX = 255
_LOCK_DIGITS = "0" * 16
_LOCK_TIMEOUT = 30.0
# After this time even a temporary file of another machine has no writer any more.
_ABANDONED = 24 * 3600.0

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "it is a directory",
    errno.ELOOP: "its symbolic links go round in a circle",
    errno.EINVAL: "this file system does not allow the name",
    errno.EILSEQ: "this file system does not allow the name",
}
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
_KINDS = {
    modes.S_IFDIR: "a directory",
    modes.S_IFIFO: "a named pipe",
    modes.S_IFSOCK: "a socket",
    modes.S_IFCHR: "a device",
    modes.S_IFBLK: "a device",
}
_CANNOT_LINK = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOENT,
}


@contextlib.contextmanager
def reporting(doing: str, uri: str) -> Iterator[None]:
    """Turn an operating system's error into ours; ``doing`` and ``uri`` say what failed."""
    try:
        yield
    except StorageError:
        raise  # some of ours are an OSError too
    except OSError as exc:
        raise _translate(exc, f"{doing} {uri} failed") from exc


def _translate(exc: OSError, failed: str) -> StorageError:
    reason = exc.strerror or one_line(exc)
    if exc.errno in _DENIED:
        return AuthenticationError(
            f"{failed}: {reason}; check the permissions of the path for user {os.geteuid()}"
        )
    if exc.errno in _FULL:
        return InsufficientSpaceError(f"{failed}: {reason}; free some space and try again")
    if exc.errno in _UNUSABLE:
        return InvalidInput(f"{failed}: {_UNUSABLE[exc.errno]}; use another name")
    if exc.errno in _TRANSIENT:
        return TransientError(f"{failed}: {reason}")
    return StorageError(f"{failed}: {reason}")


def is_missing(exc: OSError) -> bool:
    """Return whether nothing is there; a name too long to exist is not there either."""
    return exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def kind_of(status: os.stat_result) -> str | None:
    """Return what a special file or directory is, in words; ``None`` for a regular file."""
    kind = modes.S_IFMT(status.st_mode)
    return None if kind == modes.S_IFREG else _KINDS.get(kind, "a special file")


def info_of(key: str, uri: str, status: os.stat_result) -> ObjectInfo:
    """Return what the status of a file says about the object ``key``.

    Raises:
        ModelMissingError: it is a directory.
        InvalidInput: it is a pipe, socket or device.
    """
    if modes.S_ISDIR(status.st_mode):
        raise ModelMissingError(uri)
    if kind := kind_of(status):
        raise InvalidInput(f"{uri} is {kind}, not a regular file, and is never opened")
    etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
    modified = None
    with contextlib.suppress(ValueError, OverflowError, OSError):  # a time before year 1
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
    return ObjectInfo(key, status.st_size, etag=etag, modified=modified)


def check_pin(uri: str, found: ObjectInfo, pin: ObjectInfo | None) -> None:
    """Raise ``ObjectChangedError`` unless ``found`` is the version that ``pin`` names."""
    if pin is not None and pin.pin is not None and pin.pin != found.pin:
        raise ObjectChangedError(
            f"{uri} was changed: expected {pin.size} bytes with etag {pin.pin}, found "
            f"{found.size} bytes with {found.pin}; ask for it again"
        )


def is_temporary(name: str) -> bool:
    """Return whether ``name`` is that of a file in the making, or NFS's for a deleted one."""
    return _TEMPORARY.fullmatch(name) is not None


def make_parents(directory: str, created: list[str]) -> None:
    """Create ``directory`` and what is missing above it; add what was made to ``created``."""
    missing = []
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        else:
            created.append(path)


def remove_created(created: list[str]) -> None:
    """Undo :func:`make_parents`, as far as nobody else put something there."""
    for path in reversed(created):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def create(directory: str, name: str) -> tuple[int, str]:
    """Create and lock a temporary file for ``name``; return its descriptor and path."""
    while True:
        digits = _machine() + secrets.token_hex(4)
        path = os.path.join(directory, _temporary_name(name, digits))
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, 0o666)
        except FileExistsError:
            continue
        # Whoever sweeps may come between the two calls and take the file away.
        if _lock_new(fd) and _is_at(fd, path):
            return fd, path
        os.close(fd)


def _lock_new(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: nobody else can tell, and nobody sweeps
    return True


def sweep(directory: str) -> None:
    """Remove the temporary files that killed writers left in ``directory``."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".partial") and is_temporary(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry.path, entry.name)


def _remove_if_abandoned(path: str, name: str) -> None:
    # Locks of another machine may be invisible here (NFS mounted with nolock): its files
    # count as abandoned only when they are old.
    digits = name.rsplit(".", 2)[-2]
    status = os.lstat(path)
    age = time.time() - status.st_mtime
    if not digits.startswith(_machine()) and age < _ABANDONED:
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(fd, path):
            os.unlink(path)
    finally:
        os.close(fd)


@contextlib.contextmanager
def holding(directory: str, name: str, *, required: bool) -> Iterator[None]:
    """Exclude everyone else who replaces or removes ``name`` in ``directory``.

    Args:
        directory: must exist.
        name: of the file; it need not exist.
        required: fail where the file system cannot lock, rather than go on without.

    Raises:
        UnsupportedOperation: ``required``, and the file system cannot lock.
        TransientError: somebody else held the lock for 30 seconds.
    """
    path = os.path.join(directory, _temporary_name(name, _LOCK_DIGITS))
    fd = -1
    try:
        fd = _acquire(path)
    except OSError as exc:
        if required and exc.errno in _CANNOT_LOCK:
            raise UnsupportedOperation(
                f"{directory}: this file system cannot lock files ({exc.strerror}), and a "
                "write that depends on what is there needs that; use another store"
            ) from exc
        if required:
            raise
    try:
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(fd)


def _acquire(path: str) -> int:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    pause = 0.0005
    while True:
        fd = _open_lock(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former holder removed the file: a lock on it keeps nobody out.
            if _is_still(fd, path):
                return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise TransientError(
                    f"{path}: somebody else has held this lock for {_LOCK_TIMEOUT:.0f} s"
                ) from None
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        except OSError:
            # Locks do not work here, so nobody holds this file.
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _open_lock(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    for attempt in range(5):
        try:
            return os.open(path, flags | os.O_CREAT | os.O_RDWR, 0o666)
        except PermissionError:
            # Another user's lock can be opened for reading, which is enough to wait for it.
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags | os.O_RDONLY)
            if attempt == 4:
                raise
    raise AssertionError("unreachable")


def _is_still(fd: int, path: str) -> bool:
    # Opened, not only looked up: on NFS this is what asks the server.
    try:
        again = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(fd), os.fstat(again))
    finally:
        os.close(again)


def link_or_rename(temporary: str, directory: str, name: str) -> None:
    """Give the finished ``temporary`` its name, unless the name is taken.

    Raises:
        FileExistsError: it is taken.
        UnsupportedOperation: the file system has neither hard links nor locks.
    """
    path = os.path.join(directory, name)
    try:
        os.link(temporary, path)
    except OSError as exc:
        if exc.errno not in _CANNOT_LINK:
            raise
        with holding(directory, name, required=True):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            os.replace(temporary, path)


def flush(fd: int) -> None:
    """Bring out what a network file system reports only when a file is closed."""
    os.close(os.dup(fd))


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte of ``data`` to ``fd``."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def copy_all(source: int, target: int) -> int:
    """Copy a file's bytes, inside the kernel where it can; return their number."""
    total = 0
    if hasattr(os, "copy_file_range"):
        # Not across every pair of file systems; what fails here fails below in clear words.
        with contextlib.suppress(OSError):
            while copied := os.copy_file_range(source, target, 1 << 30, total, total):
                total += copied
            return total
    buffer = bytearray(1024 * 1024)
    view = memoryview(buffer)
    os.lseek(source, total, os.SEEK_SET)
    os.lseek(target, total, os.SEEK_SET)
    while got := os.readv(source, [buffer]):
        write_all(target, view[:got])
        total += got
    return total


def sync_directory(path: str) -> None:
    """Make the names in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary_name(name: str, digits: str) -> str:
    # The name is cut, between characters, so that the whole fits what a directory can hold.
    room = _NAME_MAX - len(f"..{digits}.partial")
    encoded = os.fsencode(name)[:room]
    return f".{encoded.decode('utf-8', 'ignore')}.{digits}.partial"


def _machine() -> str:
    node = os.uname().nodename
    return hashlib.sha256(node.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
