"""The local end of a download: staged out of sight, then published as a whole.

::

    parent/.name.<16 hex>.partial/     one running download; ``lock`` tells that it lives
        lock  content/                 content becomes parent/name by one rename

Files and trees appear under their final name whole or not at all. What a killed download left
is recognised by its free lock and removed by the next download to the same place. Where the
destination is a mount point, or its parent cannot be written, the staging folder is inside
the destination and the entries are moved one by one, last; ``moving`` lists them, so that an
interrupted move can be undone.

A tree that this library published carries the extended attribute ``user.modelstorage.tree``:
a fingerprint of its paths and sizes. It is what allows a later download to replace the tree,
and it stops doing so as soon as somebody adds, removes or resizes a file in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from filelock import BaseFileLock, FileLock, Timeout

from storage.errors import (
    DestinationError,
    InsufficientSpaceError,
    InvalidInput,
    ObjectExistsError,
    StorageError,
)

__all__ = ["Destination", "check_space", "translate_os_errors"]

_XATTR = "user.modelstorage.tree"
_CONTENT = "content"
_LOCK = "lock"
_MOVING = "moving"
_INSIDE = ".storage"
# The root of an ext4 volume has it; an otherwise empty mount point counts as empty.
_FIXTURES = frozenset({"lost+found"})
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Destination:
    """Where one file or tree is to appear; a context manager around one download.

    Entering checks that the destination may be written, removes what killed downloads left
    and makes the staging folder. Leaving removes the staging folder and, if nothing was
    published, every folder made on the way.
    """

    def __init__(
        self, path: str, *, tree: bool, overwrite: bool = False, durable: bool = False
    ) -> None:
        """Describe the destination; nothing is touched.

        Args:
            path: the final path of the file or of the tree itself.
            tree: whether a tree is to appear.
            overwrite: whether a tree may replace what this library did not put there.
            durable: whether everything is forced to disk before it is published.
        """
        path = os.path.abspath(path)
        # A link to a folder stays a link; the tree goes where it leads.
        self.path = os.path.realpath(path) if tree and os.path.isdir(path) else path
        self._tree = tree
        self._overwrite = overwrite
        self._durable = durable
        self._inside = False
        self._made: list[str] = []
        self._staging: str | None = None
        self._lock: BaseFileLock | None = None
        self._published = False

    @property
    def content(self) -> str:
        """Path of the file, or of the folder, that is to be filled and then published."""
        assert self._staging is not None, "a destination is used as a context manager"
        return os.path.join(self._staging, _CONTENT)

    def scratch(self, name: str) -> str:
        """Return a path for a file that is needed on the way and is never published."""
        assert self._staging is not None, "a destination is used as a context manager"
        return os.path.join(self._staging, f"scratch.{name}")

    def __enter__(self) -> Self:
        try:
            with translate_os_errors(self.path):
                parent = os.path.dirname(self.path)
                self._made = _make_parents(parent)
                self._inside = self._must_stage_inside(parent)
                self._remove_leftovers()
                self._check()
                self._staging, self._lock = _new_staging(*self._staging_place())
                if self._tree:
                    os.mkdir(self.content)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clean_up()

    def publish(self) -> str:
        """Make the content appear under its final name and return that.

        Raises:
            ObjectExistsError: something else has appeared there meanwhile.
            DestinationError: the file system refuses.
        """
        with translate_os_errors(self.path):
            self._check()
            if self._durable:
                _sync_tree(self.content)
            if not self._tree:
                os.replace(self.content, self.path)
            elif self._inside:
                self._move_entries()
            else:
                _mark(self.content)
                self._rename_tree()
            if self._durable:
                _sync_folder(os.path.dirname(self.path))
        self._published = True
        return self.path

    def _must_stage_inside(self, parent: str) -> bool:
        if not self._tree or not os.path.isdir(self.path):
            return False
        return _is_mount_point(self.path) or not os.access(parent, os.W_OK | os.X_OK)

    def _staging_place(self) -> tuple[str, str]:
        if self._inside:
            return self.path, _INSIDE
        return os.path.dirname(self.path), f".{os.path.basename(self.path)}"

    def _check(self) -> None:
        """Refuse a destination that holds what is not ours to replace."""
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not self._tree:
            if stat.S_ISDIR(mode) or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise ObjectExistsError(
                    f"{self.path} is not a regular file and will not be replaced by one; "
                    "name another destination"
                )
            return
        if not stat.S_ISDIR(mode):
            raise ObjectExistsError(
                f"{self.path} is not a folder, and a tree is to go there; "
                "name another destination or remove it"
            )
        if self._overwrite or not self._entries() or _is_marked(self.path):
            return
        raise ObjectExistsError(
            f"{self.path} holds files that this library did not put there, or that were "
            "changed since; expected an absent or empty folder; pass overwrite=True to "
            "replace everything in it"
        )

    def _entries(self) -> list[str]:
        """Return the names in the destination that are not of the file system or of ours."""
        keep = _FIXTURES if self._inside else frozenset()
        staged = _staging_pattern(_INSIDE)
        return [
            name
            for name in os.listdir(self.path)
            if name not in keep and not staged.fullmatch(name)
        ]

    def _rename_tree(self) -> None:
        if not os.path.lexists(self.path):
            os.rename(self.content, self.path)
            return
        if not self._entries():
            # rename(2) replaces an empty folder by itself, atomically.
            os.rename(self.content, self.path)
            return
        if _exchange(self.content, self.path):
            return  # the old tree is now in the staging folder and goes with it
        assert self._staging is not None
        os.rename(self.path, os.path.join(self._staging, "old"))
        os.rename(self.content, self.path)

    def _move_entries(self) -> None:
        assert self._staging is not None
        with contextlib.suppress(OSError):
            os.removexattr(self.path, _XATTR)
        new = os.listdir(self.content)
        record = os.path.join(self._staging, _MOVING)
        with open(record, "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(new, file)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        for name in self._entries():
            _remove(os.path.join(self.path, name))
        for name in new:
            os.rename(os.path.join(self.content, name), os.path.join(self.path, name))
        os.unlink(record)
        _mark(self.path)

    def _remove_leftovers(self) -> None:
        """Remove the staging folders of killed downloads to this destination."""
        folder, prefix = self._staging_place()
        pattern = _staging_pattern(prefix)
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                self._remove_leftover(os.path.join(folder, name))

    def _remove_leftover(self, staging: str) -> None:
        lock = FileLock(os.path.join(staging, _LOCK))
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError, NotImplementedError):
            return  # alive, just removed by somebody else, or no telling without locks
        try:
            record = os.path.join(staging, _MOVING)
            if self._inside and os.path.exists(record):
                with open(record, encoding="utf-8", errors="surrogateescape") as file:
                    text = file.read()
                for name in _names(text):
                    _remove(os.path.join(self.path, name))
            # Out of the way first: whoever has just made this folder and waits for its lock
            # must find that it is gone, not see it vanish later.
            folder, prefix = self._staging_place()
            doomed = _staging_path(folder, prefix)
            with contextlib.suppress(FileNotFoundError):
                os.rename(staging, doomed)
                _remove(doomed)
        finally:
            lock.release()

    def _clean_up(self) -> None:
        if self._staging is not None:
            _remove(self._staging)
        if self._lock is not None:
            self._lock.release()
        self._staging = self._lock = None
        if not self._published:
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def check_space(path: str, needed: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        InsufficientSpaceError: the file system of ``path`` has less than ``needed`` bytes free.
    """
    with translate_os_errors(path):
        status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise InsufficientSpaceError(
            f"{path}: {needed} bytes are needed and {free} are free on its file system; "
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
                f"{path}: its file system is full ({reason}); nothing was published; "
                "free some space or choose another destination"
            ) from exc
        if exc.errno == errno.ENAMETOOLONG:
            raise InvalidInput(f"{path}: a name is too long for the file system") from exc
        error = DestinationError(
            f"{exc.filename or path} cannot be written: {reason}; nothing was published; "
            "choose a destination that this user may write"
        )
        error.errno = exc.errno
        raise error from exc


def _make_parents(folder: str) -> list[str]:
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    made: list[str] = []
    try:
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
                made.append(path)
    except OSError:
        for path in reversed(made):
            os.rmdir(path)
        raise
    return made


def _staging_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(_staging_prefix(prefix)) + r"\.[0-9a-f]{16}\.partial")


def _staging_prefix(prefix: str) -> str:
    # The name has to stay within 255 bytes whatever the destination is called.
    encoded = os.fsencode(prefix)
    if len(encoded) <= 200:
        return prefix
    return os.fsdecode(encoded[:160]) + "." + hashlib.sha256(encoded).hexdigest()[:16]


def _staging_path(folder: str, prefix: str) -> str:
    return os.path.join(folder, f"{_staging_prefix(prefix)}.{secrets.token_hex(8)}.partial")


def _new_staging(folder: str, prefix: str) -> tuple[str, BaseFileLock]:
    while True:
        path = _staging_path(folder, prefix)
        os.mkdir(path, 0o700)
        lock_path = os.path.join(path, _LOCK)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
            # Somebody who looks for leftovers may have come between mkdir and the lock.
            if os.path.exists(lock_path):
                return path, lock
        except NotImplementedError:
            return path, lock  # no locks on this file system: leftovers stay for the user
        except (Timeout, FileNotFoundError):
            pass
        lock.release()


def _is_mount_point(path: str) -> bool:
    if os.path.ismount(path):
        return True
    # A bind mount within one file system looks like any folder to stat.
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(path).replace(b"\\", b"\\134").replace(b" ", b"\\040")
    return any(line.split(b" ")[4] == escaped for line in lines)


def _exchange(left: str, right: str) -> bool:
    """Swap two paths atomically; tell whether this system can (Linux's renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
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


def _listing_fingerprint(folder: str) -> str:
    """Hash the paths and sizes of everything in ``folder``."""
    lines = []
    staged = _staging_pattern(_INSIDE)
    for root, folders, files in os.walk(folder):
        base = os.path.relpath(root, folder)
        if base == ".":
            folders[:] = [
                name for name in folders if name not in _FIXTURES and not staged.fullmatch(name)
            ]
        folders.sort()
        lines += [f"{base}/{name}/" for name in folders]
        lines += [f"{base}/{name}\0{os.lstat(os.path.join(root, name)).st_size}" for name in files]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _mark(folder: str) -> None:
    # Without extended attributes a later download needs overwrite=True; that is safe.
    with contextlib.suppress(OSError):
        os.setxattr(folder, _XATTR, _listing_fingerprint(folder).encode())


def _is_marked(folder: str) -> bool:
    try:
        mark = os.getxattr(folder, _XATTR).decode("ascii", "replace")
    except OSError:
        return False
    return mark == _listing_fingerprint(folder)


def _names(text: str) -> list[str]:
    """Return the names in a record of moves; none if it was cut off before it was complete."""
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return [name for name in names if name not in ("", ".", "..") and "/" not in name]


def _remove(path: str) -> None:
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return


def _sync_tree(path: str) -> None:
    if not os.path.isdir(path):
        _sync_folder(path)
        return
    for root, _, files in os.walk(path, topdown=False):
        for name in files:
            _sync_folder(os.path.join(root, name))
        _sync_folder(root)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
