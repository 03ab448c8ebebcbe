"""The local end of a download: staged out of sight, then published as a whole.

::

    parent/.name.<16 hex>.partial/     one running download; ``lock`` tells that it lives
        lock  journal  content/        content becomes parent/name by one rename

Files and trees appear under their final name whole or not at all. What a killed download left
is recognised by its free lock. The next download to the same place goes on with it, if it is one
of the same source (:mod:`storage.transfer.journal`), and else removes it.

Where the destination is a mount point or the working directory, or its parent cannot be
written, the staging folder is inside the destination, and the entries move one by one, last:
the old ones into ``old/``, then the new ones to their place. ``moving`` lists them from the
first rename to the last. Only while it exists is the destination neither old nor new; the next
download finishes what it lists, before anything else. A move that fails is undone.

A tree that this library published carries the extended attribute ``user.modelstorage.tree``:
a fingerprint of its paths and sizes. It is what allows a later download to replace the tree,
and it stops doing so as soon as somebody adds, removes or resizes a file in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from storage import files
from storage.errors import ObjectExistsError
from storage.files import shown, translate_os_errors
from storage.transfer import trees
from storage.transfer.journal import NAME, Journal

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from storage.backends.base import ObjectInfo

__all__ = ["NOT_OF_TREE", "Destination"]

_CONTENT = "content"
_LOCK = "lock"
_MOVING = "moving"
_OLD = "old"
_INSIDE = ".storage"
# The root of an ext4 volume has it; an otherwise empty mount point counts as empty.
_FIXTURES = frozenset({"lost+found"})
# Seconds; moving the entries of a tree takes a fraction of one.
_MOVE_TIMEOUT = 60.0
# Looks at a destination that others replace meanwhile.
_SWAPS = 10
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class Destination:
    """Where one file or tree is to appear; a context manager around one download.

    Entering checks that the destination may be written, removes what killed downloads left, or
    takes it over, and makes the staging folder. Leaving removes the staging folder and, if
    nothing was published, every folder made on the way; unless the download failed in a way
    that makes another try worth while, and has a good part already.
    """

    def __init__(
        self,
        path: str,
        *,
        tree: bool,
        overwrite: bool = False,
        durable: bool = False,
        source: str | None = None,
    ) -> None:
        """Describe the destination; nothing is touched.

        Args:
            path: the final path of the file or of the tree itself.
            tree: whether a tree is to appear.
            overwrite: whether a tree may replace what this library did not put there.
            durable: whether everything is forced to disk before it is published.
            source: what tells the download from those of other sources, a hash; a later one
                with the same goes on where this one stops. ``None``: it leaves nothing.
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
        self._source = source
        self._journal: Journal | None = None
        self._published = False
        self._maker = os.getpid()

    @property
    def content(self) -> str:
        """Path of the file, or of the folder, that is to be filled and then published."""
        assert self._staging is not None, "a destination is used as a context manager"
        return os.path.join(self._staging, _CONTENT)

    def scratch(self, name: str) -> str:
        """Return a path for a file that is needed on the way and is never published."""
        assert self._staging is not None, "a destination is used as a context manager"
        return os.path.join(self._staging, f"scratch.{name}")

    def reserved(self, purpose: str) -> str:
        """Return the path of a staging folder that is always the same, for those who take turns.

        It lives, like any other, as long as the file ``lock`` in it is locked.

        Args:
            purpose: what tells one such folder from another, a hash in hex.
        """
        self._inside = self._must_stage_inside(os.path.dirname(self.path))
        folder, prefix = self._staging_place()
        return os.path.join(folder, f"{_staging_prefix(prefix)}.{purpose[:16]}.partial")

    def tidy(self) -> None:
        """Remove what killed downloads to the same place left, instead of using the destination.

        What cannot be removed stays.
        """
        self._source = None  # nobody goes on with it
        self._inside = self._must_stage_inside(os.path.dirname(self.path))
        with contextlib.suppress(OSError), self._alone():
            self._remove_leftovers()

    def resume(self, wanted: Mapping[str, ObjectInfo]) -> Journal | None:
        """Keep, of what an earlier download left, what some files can go on with.

        Args:
            wanted: the object that each file is to become, by the path of the file here.

        Returns:
            What tells which bytes are here; ``None`` if nobody is to go on with this download.
        """
        if self._journal is not None:
            with translate_os_errors(self.path):
                self._journal.keep_only(wanted)
                if self._tree:
                    os.makedirs(self.content, exist_ok=True)
        return self._journal

    def __enter__(self) -> Self:
        try:
            with translate_os_errors(self.path):
                parent = os.path.dirname(self.path)
                self._made = files.make_parents(parent)
                self._inside = self._must_stage_inside(parent)
                with self._alone():
                    self._remove_leftovers()
                    self._check()
                if self._journal is None:
                    self._make_staging()
                if self._tree:
                    os.makedirs(self.content, exist_ok=True)
        except BaseException as exc:
            self._clean_up(exc)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._clean_up(exc)

    def publish(self) -> str:
        """Make the content appear under its final name and return that.

        Raises:
            ObjectExistsError: something else has appeared there meanwhile.
            DestinationError: the file system refuses.
        """
        with translate_os_errors(self.path), self._alone():
            self._check()
            if self._tree and not self._inside:
                trees.mark(self.content, NOT_OF_TREE)
            if self._durable:
                files.sync_tree(self.content)
            journal, self._journal = self._journal, None
            if journal is not None:
                # From here on there is something else in our folder than it says.
                journal.close()
                files.remove(journal.path)
            if not self._tree:
                os.replace(self.content, self.path)
            elif self._inside:
                self._move_entries()
            else:
                self._rename_tree()
            if self._durable:
                for folder in self._changed_folders():
                    files.sync(folder)
        self._published = True
        return self.path

    def _changed_folders(self) -> list[str]:
        """Return the folders that got a new name by publishing, and by what was made for it."""
        if self._inside:
            return [self.path]
        return [os.path.dirname(path) for path in (self.path, *reversed(self._made))]

    def _must_stage_inside(self, parent: str) -> bool:
        if not self._tree or not os.path.isdir(self.path):
            return False
        with contextlib.suppress(OSError):
            # A folder that is replaced vanishes under whoever stands in it.
            if os.path.samefile(self.path, os.curdir):
                return True
        return files.is_mount_point(self.path) or not os.access(parent, os.W_OK | os.X_OK)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other downloads from a destination whose entries move one by one."""
        if not self._inside:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            trees.lock_folder(descriptor, self.path, _MOVE_TIMEOUT)
            yield
        finally:
            os.close(descriptor)

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
                    f"{shown(self.path)} is not a regular file and will not be replaced by one; "
                    "name another destination"
                )
            return
        if not stat.S_ISDIR(mode):
            raise ObjectExistsError(
                f"{shown(self.path)} is not a folder, and a tree is to go there; "
                "name another destination or remove it"
            )
        if self._overwrite or not self._entries() or self._is_ours():
            return
        raise ObjectExistsError(
            f"{shown(self.path)} holds files that this library did not put there, or that were "
            "changed since; expected an absent or empty folder; pass overwrite=True to "
            "replace everything in it"
        )

    def _is_ours(self) -> bool:
        """Tell whether the tree is as this library published it."""
        for _ in range(_SWAPS):
            before = os.stat(self.path)
            if trees.is_marked(self.path, NOT_OF_TREE):
                return True
            # Another download may have put its tree there while this one was being looked at.
            if os.path.samestat(before, os.stat(self.path)):
                return False
        return False

    def _entries(self) -> list[str]:
        """Return the names in the destination that are not of the file system or of ours."""
        ignored = NOT_OF_TREE if self._inside else _STAGED_INSIDE
        return [name for name in os.listdir(self.path) if not ignored.fullmatch(name)]

    def _rename_tree(self) -> None:
        try:
            # This replaces an empty folder too, atomically.
            os.rename(self.content, self.path)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Another download may have been faster than this one.
        self._check()
        if files.exchange(self.content, self.path):
            return  # the old tree is now in the staging folder and goes with it
        old = self.scratch(_OLD)
        os.rename(self.path, old)
        try:
            os.rename(self.content, self.path)
        except BaseException:
            os.rename(old, self.path)
            raise

    def _move_entries(self) -> None:
        assert self._staging is not None
        moves = {"old": self._entries(), "new": os.listdir(self.content)}
        os.mkdir(os.path.join(self._staging, _OLD))
        record = os.path.join(self._staging, _MOVING)
        try:
            with open(record, "w", encoding="utf-8", errors="surrogateescape") as file:
                json.dump(moves, file)
            if self._durable:
                files.sync(record)
                files.sync(self._staging)
            self._finish_move(self._staging)
        except BaseException:
            self._undo_move(moves["new"])
            raise

    def _finish_move(self, staging: str) -> None:
        """Do what the record of moves says, or what is left of it."""
        record = os.path.join(staging, _MOVING)
        moves = _read_moves(record)
        if moves is None:
            return
        waiting = set(os.listdir(os.path.join(staging, _CONTENT)))
        settled = {*moves["new"]} - waiting | {*os.listdir(os.path.join(staging, _OLD))}
        present = set(os.listdir(self.path))
        for name in moves["old"]:
            if name in present and name not in settled:
                _move(name, self.path, os.path.join(staging, _OLD))
        for name in waiting:
            _move(name, os.path.join(staging, _CONTENT), self.path)
        # Else somebody has put something there meanwhile: it is not ours to replace.
        if set(self._entries()) == set(moves["new"]):
            trees.mark(self.path, NOT_OF_TREE)
        os.unlink(record)

    def _undo_move(self, new: list[str]) -> None:
        assert self._staging is not None
        try:
            if os.path.lexists(os.path.join(self._staging, _MOVING)):
                for name in set(new) - set(os.listdir(self.content)):
                    _move(name, self.path, self.content)
                for name in os.listdir(os.path.join(self._staging, _OLD)):
                    _move(name, os.path.join(self._staging, _OLD), self.path)
                os.unlink(os.path.join(self._staging, _MOVING))
        except BaseException:
            # What it holds is needed to repair the destination; the next download will.
            self._staging = None
            raise

    def _make_staging(self) -> None:
        # Not before a destination is used: what comes from the cache should not wait for it.
        from filelock import FileLock, Timeout

        folder, prefix = self._staging_place()
        while True:
            path = os.path.join(folder, f"{_staging_prefix(prefix)}.{os.urandom(8).hex()}.partial")
            # Known before it exists, so that an interrupt at any point leaves nothing.
            self._staging, self._lock = path, FileLock(os.path.join(path, _LOCK))
            os.mkdir(path, 0o700)
            try:
                self._lock.acquire(timeout=0)
            except (Timeout, FileNotFoundError, FileExistsError):
                continue  # whoever looks for leftovers came between, and removes it
            except NotImplementedError:
                return  # no locks on this file system: leftovers stay for the user
            except OSError as exc:
                if exc.errno not in _CANNOT_LOCK:
                    raise
                return
            if os.path.exists(os.path.join(path, _LOCK)):
                if self._source is not None:
                    self._journal = Journal(
                        os.path.join(path, NAME), self._source, durable=self._durable
                    )
                return
            self._lock.release()

    def _remove_leftovers(self) -> None:
        """Take over the best of what killed downloads to this destination left; remove the rest."""
        folder, prefix = self._staging_place()
        pattern = _staging_pattern(prefix)
        for name in os.listdir(folder):
            if pattern.fullmatch(name):
                self._settle_leftover(os.path.join(folder, name))

    def _settle_leftover(self, staging: str) -> None:
        from filelock import FileLock

        lock: BaseFileLock = FileLock(os.path.join(staging, _LOCK))
        try:
            if os.path.isdir(staging):  # or the lock would make it
                lock.acquire(timeout=0)
        except (OSError, NotImplementedError):
            return  # alive (a Timeout is an OSError), gone, somebody else's, or no locks here
        try:
            if self._inside:
                self._finish_move(staging)
            if self._source is not None and files.is_locked(os.path.join(staging, _LOCK)):
                journal = Journal(os.path.join(staging, NAME), self._source, durable=self._durable)
                if journal.noted > (0 if self._journal is None else self._journal.noted):
                    worse, its_lock = self._staging, self._lock
                    self._staging, self._lock, self._journal = staging, lock, journal
                    if worse is None or its_lock is None:
                        return
                    staging, lock = worse, its_lock
            _drop(staging, lock)
        finally:
            if lock is not self._lock:
                lock.release()

    def _clean_up(self, error: BaseException | None) -> None:
        # A child forked meanwhile comes through here too.
        if os.getpid() != self._maker:
            return
        journal, self._journal = self._journal, None
        if journal is not None:
            kept = self._staging is not None and journal.is_worth_keeping(error)
            journal.close()
            if kept:
                journal.tell(error, f"in {shown(self._staging)}")
                self._staging = None
        if self._staging is not None and self._lock is not None:
            _drop(self._staging, self._lock)
        if self._lock is not None:
            self._lock.release()
        self._staging = self._lock = None
        if not self._published:
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _staging_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(_staging_prefix(prefix)) + r"\.[0-9a-f]{16}\.partial")


def _staging_prefix(prefix: str) -> str:
    # The name has to stay within 255 bytes whatever the destination is called.
    encoded = os.fsencode(prefix)
    if len(encoded) <= 200:
        return prefix
    return os.fsdecode(encoded[:160]) + "." + hashlib.sha256(encoded).hexdigest()[:16]


# Names that are no part of a tree that is staged inside its own folder.
_STAGED_INSIDE = _staging_pattern(_INSIDE)
NOT_OF_TREE = re.compile("|".join((_STAGED_INSIDE.pattern, *map(re.escape, _FIXTURES))))


def _drop(staging: str, lock: BaseFileLock) -> None:
    """Remove a staging folder whose lock is ours, as far as possible.

    The lock goes last: as long as it is there, nobody else begins to remove the folder. What
    cannot be removed is left to the next download; this one has ended already, well or badly.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(staging):
            if name != _LOCK:
                files.remove(os.path.join(staging, name))
        files.remove(os.path.join(staging, _LOCK))
        lock.release()
        os.rmdir(staging)


def _move(name: str, source: str, target: str) -> None:
    os.rename(os.path.join(source, name), os.path.join(target, name))


def _read_moves(record: str) -> dict[str, list[str]] | None:
    """Return a record of moves; none if there is none, or it was cut off before any move."""
    try:
        with open(record, encoding="utf-8", errors="surrogateescape") as file:
            moves = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    names = [*moves["old"], *moves["new"]]
    return None if any(name in ("", ".", "..") or "/" in name for name in names) else moves
