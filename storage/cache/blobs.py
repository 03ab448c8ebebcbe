"""Content by its digest: read-only files that say by a mark whether they are to be trusted.

A blob's *modification time* is the mark: a second between 1980 and 1997 that follows from its
digest and from a word. The word is ``synced`` once the content was forced to disk, else the id
of the boot in which it was written. One ``stat`` therefore tells all there is to know:

* whoever writes to a blob moves its time to now, and the mark is gone;
* after a power cut, the mark of what was never synced is that of another boot;
* a tool that copies a cache without its times copies no mark.

A blob without a valid mark is *in doubt*. It is hashed once before it is used, and gets a new
mark or goes to quarantine. Bytes that rot on the disk change no time; ``verify`` in full finds
those.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import stat
from collections.abc import Iterator

from storage.cache.layout import Layout, listed
from storage.cache.owners import boot_id
from storage.cache.records import force_name, make_folder_for
from storage.digest import Digest, hash_file
from storage.files import sync

__all__ = ["Blobs", "State", "is_marked", "make_read_only", "set_mark"]

_NOT_WRITABLE = 0o555
_SYNCED = "synced"
_FIRST_SECOND = 315_619_200  # 1980-01-02, which every file system can keep
_SPAN = 2**28


class State(enum.Enum):
    """What one look at a blob tells."""

    CLEAN = "clean"
    ABSENT = "absent"
    DOUBTFUL = "in doubt"
    DAMAGED = "damaged"


class Blobs:
    """The blobs of one cache."""

    def __init__(self, layout: Layout, *, read_only: bool = False) -> None:
        """Use those below the root of ``layout``; ``read_only``: and change nothing of them."""
        self._layout = layout
        self._read_only = read_only
        # Verified by this process where no mark could be set: path's inode and time.
        self._verified: dict[Digest, tuple[int, int]] = {}

    def path(self, digest: Digest) -> str:
        """Return the path that a blob has or would have."""
        return self._layout.blob(digest)

    def look(self, digest: Digest, size: int) -> State:
        """Tell by one ``stat`` what is known about a blob of ``size`` bytes."""
        try:
            found = os.stat(self.path(digest))
        except (FileNotFoundError, NotADirectoryError):
            return State.ABSENT
        except OSError:
            return State.DAMAGED
        if found.st_size != size or not stat.S_ISREG(found.st_mode):
            return State.DAMAGED
        if not found.st_mode & stat.S_IROTH and not os.access(self.path(digest), os.R_OK):
            return State.DAMAGED
        if is_marked(found, digest) or self._verified.get(digest) == _identity(found):
            return State.CLEAN
        return State.DOUBTFUL

    def settle(self, digest: Digest, size: int) -> State:
        """Tell whether a blob can be used, hashing it if that is in doubt.

        What turns out to be damaged goes to quarantine, where the cache can be written.

        Returns:
            ``CLEAN``, ``ABSENT`` or ``DAMAGED``, which a blob in quarantine stays.
        """
        state = self.look(digest, size)
        if state in (State.DOUBTFUL, State.DAMAGED):
            # Looked at again, as the file that is judged is the one that has to go.
            state, seen = self._verify(digest, size)
            if state is State.DAMAGED and seen is not None:
                self.quarantine(digest, seen)
        elif state is State.ABSENT and self._in_quarantine(digest):
            return State.DAMAGED
        return state

    def verify(self, digest: Digest, size: int) -> tuple[State, str | None]:
        """Hash a blob whatever its mark says; mark it if it is right, else put it away.

        Returns:
            ``CLEAN``, ``ABSENT`` or ``DAMAGED``, and where a damaged one is now; ``None`` if it
            could not be moved.
        """
        state, seen = self._verify(digest, size)
        if state is State.CLEAN or seen is None:
            return state, None
        return state, self.quarantine(digest, seen)

    def _verify(self, digest: Digest, size: int) -> tuple[State, os.stat_result | None]:
        """Return what hashing a blob tells, and the file that was judged.

        One that cannot even be opened, as when this process has too many files open, is not.
        """
        path = self.path(digest)
        before = None
        try:
            with open(path, "rb", buffering=0) as file:
                before = os.fstat(file.fileno())
                if before.st_size != size:
                    return State.DAMAGED, before
                found = hash_file(file, (digest.algorithm,))[digest.algorithm]
                if found != digest:
                    return State.DAMAGED, before
                if not is_marked(before, digest):
                    if not self._read_only:
                        with contextlib.suppress(OSError):
                            os.fsync(file.fileno())
                            # By its descriptor: another file may have come under the name.
                            set_mark(file.fileno(), digest, durable=True)
                    after = os.fstat(file.fileno())
                    if not is_marked(after, digest):
                        # A cache that is not ours, or a file system that keeps no times: each
                        # process has to find out for itself.
                        self._verified[digest] = _identity(after)
        except FileNotFoundError:
            return State.ABSENT, None
        except OSError:
            return State.DAMAGED, before
        return State.CLEAN, before

    def add(self, file: str, digest: Digest, size: int, *, durable: bool) -> str:
        """Take over a file whose content is known to be right.

        Args:
            file: on the same file system; it is gone afterwards.
            digest: of its content, just computed.
            size: in bytes.
            durable: force it to disk before it gets its name.

        Returns:
            The path of the blob.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self.path(digest)
        if self.look(digest, size) is State.CLEAN and (not durable or self.secure(digest)):
            os.unlink(file)
            return path
        make_read_only(file)
        # Without a boot to name, only what was synced can ever be trusted.
        durable = durable or boot_id() is None
        # Marked before it is synced: until the rename nobody looks at the mark.
        set_mark(file, digest, durable=durable)
        if durable:
            sync(file)
        try:
            os.replace(file, path)
        except FileNotFoundError:
            make_folder_for(path)
            os.replace(file, path)
        except IsADirectoryError:
            self.quarantine(digest)
            os.replace(file, path)
        if durable:
            force_name(self._layout, path)
        return path

    def is_secure(self, digest: Digest) -> bool:
        """Tell whether the mark of a blob is one for all boots."""
        return os.stat(self.path(digest)).st_mtime_ns // 10**9 == _mark(digest, _SYNCED)

    def secure(self, digest: Digest) -> bool:
        """Force a clean blob to disk, so that its mark outlives this boot; tell if that worked."""
        path = self.path(digest)
        try:
            if not self.is_secure(digest):
                sync(path)
                set_mark(path, digest, durable=True)
                force_name(self._layout, path)
        except OSError:
            return False
        return True

    def quarantine(self, digest: Digest, seen: os.stat_result | None = None) -> str | None:
        """Put a blob where nothing looks for it; return its new path.

        Args:
            digest: its address.
            seen: the file that is damaged. Another process may have put a right one in its
                place since; that one stays.

        Returns:
            ``None`` if it is gone, or the cache cannot be written.
        """
        if self._read_only:
            return None
        path = self.path(digest)
        name = f"{_quarantined(digest)}{os.urandom(4).hex()}"
        target = os.path.join(self._layout.quarantine, name)
        try:
            if seen is not None and not os.path.samestat(os.stat(path), seen):
                return None
            make_folder_for(target)
            os.rename(path, target)
            if seen is not None and not os.path.samestat(os.stat(target), seen):
                os.rename(target, path)
                return None
        except OSError:
            return None
        return target

    def _in_quarantine(self, digest: Digest) -> bool:
        start = _quarantined(digest)
        return any(name.startswith(start) for name in listed(self._layout.quarantine))

    def all(self) -> Iterator[tuple[Digest, os.stat_result]]:
        """Yield every blob and its ``stat``, in no order."""
        for algorithm in listed(self._layout.blobs):
            folder = os.path.join(self._layout.blobs, algorithm)
            for prefix in listed(folder):
                for name in listed(os.path.join(folder, prefix)):
                    with contextlib.suppress(ValueError, OSError):
                        digest = Digest(algorithm, name)
                        yield digest, os.stat(self.path(digest))


def _quarantined(digest: Digest) -> str:
    return f"{digest.algorithm}-{digest.hex}."


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_ino, found.st_mtime_ns


def make_read_only(path: str) -> None:
    """Let nobody write to a file; who may read it stays as the umask had it."""
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) & _NOT_WRITABLE)


def is_marked(found: os.stat_result, digest: Digest) -> bool:
    """Tell whether a file's times say that it holds the content of ``digest``."""
    seconds = found.st_mtime_ns // 10**9
    boot = boot_id()
    return seconds == _mark(digest, _SYNCED) or (
        boot is not None and seconds == _mark(digest, boot)
    )


def set_mark(path: str | int, digest: Digest, *, durable: bool) -> None:
    """Mark a file as holding the content of ``digest``.

    Args:
        path: of the file, or its descriptor.
        digest: of its content.
        durable: for later boots too; it is on the disk.
    """
    word = boot_id()
    seconds = _mark(digest, _SYNCED if durable or word is None else word)
    os.utime(path, (seconds, seconds))


def _mark(digest: Digest, word: str) -> int:
    seed = hashlib.sha256(f"{digest}:{word}".encode()).digest()[:4]
    # Even, as some file systems count in pairs of seconds.
    return _FIRST_SECOND + 2 * (int.from_bytes(seed, "big") % _SPAN)
