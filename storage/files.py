"""Files and folders of this machine: make, copy, swap, remove and sync them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
from collections.abc import Iterator
from typing import Literal

from storage import cancellation
from storage.errors import DestinationError, InsufficientSpaceError, InvalidInput, StorageError

__all__ = [
    "boot_id",
    "check_space",
    "exchange",
    "is_locked",
    "is_mount_point",
    "make_parents",
    "materialise",
    "remove",
    "shown",
    "sync",
    "sync_tree",
    "translate_os_errors",
]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_MIB = 1024 * 1024
# Bytes that the kernel is asked to copy at once; an interrupt has to wait for them.
_STEP = 64 * _MIB
# What says that the kernel or the file system does not copy by itself, or not between these two.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_CANNOT_LINK = (errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@functools.cache
def boot_id() -> str | None:
    """Return what identifies this boot of this machine; ``None`` if the system does not tell."""
    try:
        with open(_BOOT_ID, encoding="ascii", errors="replace") as file:
            return file.read().strip() or None
    except OSError:
        return None


def is_locked(path: str) -> bool:
    """Tell whether somebody, this process included, holds the lock (``flock``) of a file.

    False too if there is no such file, or no locks on its file system; true if this user may
    not find out.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        return isinstance(exc, PermissionError)
    try:
        # Shared, so that two who ask at once do not take each other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:
        return isinstance(exc, (BlockingIOError, PermissionError))
    finally:
        os.close(descriptor)
    return False


def make_parents(folder: str) -> list[str]:
    """Make ``folder`` and what is missing above it; return what was made, outermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    made: list[str] = []
    try:
        for path in reversed(missing):
            # Noted first: an interrupt may come before the call returns.
            made.append(path)
            try:
                os.mkdir(path)
            except FileExistsError:
                made.pop()
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise
    return made


def is_mount_point(path: str) -> bool:
    """Tell whether something is mounted at ``path``, bind mounts included."""
    if os.path.ismount(path):
        return True
    # A bind mount within one file system looks like any folder to stat.
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    escaped = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found.group()[0], os.fsencode(path))
    return any(line.split(b" ")[4] == escaped for line in lines)


def exchange(left: str, right: str) -> bool:
    """Swap two paths atomically; tell whether this system can (Linux's renameat2)."""
    try:
        import ctypes

        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (ImportError, OSError, AttributeError):
        return False
    result = renameat2(
        _AT_FDCWD,
        ctypes.c_char_p(os.fsencode(left)),
        _AT_FDCWD,
        ctypes.c_char_p(os.fsencode(right)),
        ctypes.c_uint(_RENAME_EXCHANGE),
    )
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), right)


def materialise(
    source: str,
    target: str,
    link: Literal["hardlink", "symlink"] | None = None,
    *,
    executable: bool = False,
) -> None:
    """Put the content of a file at another path.

    A copy shares its blocks with the source where the file system can (reflinks of XFS and
    btrfs, server-side copies of NFS), else the bytes are copied. It is as any new file: its
    mode follows the umask and its times are now, whatever the source's are. A copy that fails
    leaves nothing.

    Args:
        source: path of the file.
        target: path that does not exist yet, in a folder that does.
        link: make a hard link, or a symbolic link to the absolute path, instead of a copy;
            where the file system, or its limit of links, does not allow that, a copy is made.
        executable: whether a copy may be executed.

    Raises:
        OSError: as the system says; ``FileExistsError`` if ``target`` exists.
    """
    cancellation.check()
    if link is not None:
        real = os.path.realpath(source, strict=True)
        try:
            (os.link if link == "hardlink" else os.symlink)(real, target)
            return
        except OSError as exc:
            if exc.errno not in _CANNOT_LINK:
                raise
    _copy(source, target, 0o777 if executable else 0o666)


def _copy(source: str, target: str, mode: int) -> None:
    with open(source, "rb", buffering=0) as reading:
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(made, "wb", buffering=0) as writing:
                try:
                    # Linux makes a reflink of it, if both are on a file system that can.
                    while os.copy_file_range(reading.fileno(), made, _STEP):
                        pass
                except OSError as exc:
                    if exc.errno not in _CANNOT_COPY:
                        raise
                # Nothing is left, unless the kernel could not; both stand where it stopped.
                while chunk := memoryview(reading.read(_MIB)):
                    while chunk:
                        chunk = chunk[writing.write(chunk) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)
            raise


def remove(path: str) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        import shutil  # with all the compressions that it knows, so not before it is needed

        try:
            shutil.rmtree(path)
        except PermissionError:
            # Folders that somebody made read-only, as models often are once they are in place.
            for root, _, _ in os.walk(path):
                os.chmod(root, 0o700)
            shutil.rmtree(path)


def sync_tree(path: str) -> None:
    """Force a file, or a folder and everything in it, to disk."""
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(root, name)):
                sync(os.path.join(root, name))
        sync(root)
    if not os.path.isdir(path):
        sync(path)


def sync(path: str) -> None:
    """Force one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(path: str, needed: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        InsufficientSpaceError: the file system of ``path`` has less than ``needed`` bytes free.
    """
    with translate_os_errors(path):
        status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    # Some file systems tell nothing about their size.
    if status.f_blocks and needed > free:
        raise InsufficientSpaceError(
            f"{shown(path)}: {needed} bytes are needed and {free} are free on its file system; "
            "nothing was transferred; free some space or choose another destination"
        )


@contextlib.contextmanager
def translate_os_errors(path: str) -> Iterator[None]:
    """Turn an operating system's error about the destination into ours."""
    try:
        yield
    except StorageError:
        raise
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientSpaceError(
                f"{shown(path)}: its file system is full ({reason}); nothing was published; "
                "free some space or choose another destination"
            ) from exc
        if exc.errno == errno.ENAMETOOLONG:
            raise InvalidInput(f"{shown(path)}: a name is too long for the file system") from exc
        error = DestinationError(
            f"{shown(exc.filename or path)} cannot be written: {reason}; nothing was published; "
            "choose a destination that this user may write"
        )
        error.errno = exc.errno
        raise error from exc


def shown(path: object) -> str:
    """Return a path as a message shows it: on one line, whatever the name holds."""
    text = str(path)
    return text if text.isprintable() else repr(text)
