"""Where models of a pod come together: one folder for several sources, mounted more often than not.

::

    folder/.modelstorage.<16 hex>/     what one source is on its way into; locked while it lives
        object | tree  content/        what arrived; content's entries move into the folder, last
        moving                         the moves, from the first one to the last

Which entries a source put into the folder is noted in an extended attribute of the folder, or in
the file ``.modelstorage`` where there are none: model servers list the folder, so nothing
else is added to it. What a source had there before, and has not any more, goes; what others
put there stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Self

from storage import files
from storage.errors import InvalidInput, ObjectExistsError
from storage.files import shown, translate_os_errors
from storage.integrations.kserve.notes import (
    NEW_NOTE,
    Share,
    has_note,
    is_below,
    is_real_folder,
    is_reserved,
    read_note,
    read_shares,
    state_of,
    write_note,
)
from storage.transfer.trees import lock_folder

__all__ = ["Place", "abandon", "refuse_reserved"]

_STAGING = re.compile(r"\.modelstorage\.[0-9a-f]{16}")
# What a download leaves for the next one to go on with.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.partial", re.DOTALL)
_CONTENT, _OLD, _MOVING = "content", "old", "moving"
# Seconds; moving the entries takes a fraction of one.
_MOVE_TIMEOUT = 60.0
_log = logging.getLogger(__name__)
# Staging folders in use by this process.
_in_use: set[str] = set()


class Place:
    """A folder, while one source is brought into it; a context manager.

    Another process that brings the same source waits until this one is done.
    """

    def __init__(
        self,
        folder: str,
        source: str,
        *,
        beside: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> None:
        """Describe it; nothing is touched.

        Args:
            folder: where to; made if it is not there, and then it stays.
            source: what tells this source from others.
            beside: sources that came into the folder before, by the same call; nothing of
                theirs is replaced.
            only: all sources that the folder is to have; what was noted of others goes. ``None``:
                there may be any.
        """
        self.folder = os.path.realpath(folder)  # it may be a link
        self.key = _key(source)
        self._beside = {_key(other) for other in beside}
        self._only = None if only is None else {self.key, *map(_key, only)}
        self._staging = os.path.join(self.folder, f".modelstorage.{self.key}")
        self._descriptor: int | None = None
        self._maker = os.getpid()

    def path(self, name: str) -> str:
        """Return a path on the same file system, where ``name`` can be made."""
        return os.path.join(self._staging, name)

    @property
    def content(self) -> str:
        """The folder whose entries :meth:`publish` moves; not there yet."""
        return self.path(_CONTENT)

    def __enter__(self) -> Self:
        with translate_os_errors(self.folder):
            os.makedirs(self.folder, exist_ok=True)
            try:
                self._descriptor = self._claim()
                _in_use.add(self._staging)
                with self._alone():
                    self._settle()
                self._tidy()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A child forked meanwhile comes through here too.
        if os.getpid() == self._maker:
            self._release()

    # -- staging -----------------------------------------------------------------------------

    def _claim(self) -> int:
        """Make the staging folder, or take over what a killed process left; lock it."""
        while True:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._staging, 0o700)
            try:
                descriptor = _open_folder(self._staging)
            except FileNotFoundError:
                continue  # whoever had it is done
            try:
                lock_folder(descriptor, self._staging, _patience())
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._staging)):
                        return descriptor
            except BaseException:
                _unlock(descriptor)
                raise
            _unlock(descriptor)

    def _settle(self) -> None:
        """Finish the moves of killed processes, and remove what they left; not what lives."""
        self._finish(self._staging)
        files.remove(os.path.join(self.folder, NEW_NOTE))
        for name in filter(_STAGING.fullmatch, os.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if path == self._staging:
                continue
            try:
                descriptor = _open_folder(path)
            except OSError:
                continue  # gone meanwhile, or another user's
            try:
                if _is_free(descriptor):
                    # Not to be passed over: what it says of the others would be outdated.
                    self._finish(path)
                    with contextlib.suppress(OSError):
                        files.remove(path)
            finally:
                _unlock(descriptor)

    def _tidy(self) -> None:
        """Remove what is in the staging folder but for what can be gone on with."""
        for name in os.listdir(self._staging):
            if not _UNFINISHED.fullmatch(name):
                files.remove(os.path.join(self._staging, name))

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            # What could not be finished is for the next one.
            if not os.path.exists(self.path(_MOVING)):
                with contextlib.suppress(OSError):
                    self._tidy()
                    os.rmdir(self._staging)
        finally:
            _in_use.discard(self._staging)
            _unlock(descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep all others from moving entries of the folder."""
        descriptor = _open_folder(self.folder)
        try:
            lock_folder(descriptor, self.folder, _MOVE_TIMEOUT)
            yield
        finally:
            _unlock(descriptor)

    # -- publishing --------------------------------------------------------------------------

    def is_current(self, plan: str | None) -> bool:
        """Tell whether what the source has now is in the folder already, and untouched.

        Args:
            plan: fingerprint of the source's content; ``None`` if it has none.
        """
        shares = read_note(self.folder)
        share = shares.get(self.key)
        if self._stale(shares) or share is None or plan is None or share.plan != plan:
            return False
        with contextlib.suppress(OSError):
            return share.state == state_of(self.folder, share.paths)
        return False

    def publish(self, plan: str | None = None, *, durable: bool = False) -> None:
        """Move the entries of :attr:`content` into the folder.

        What this source had put there before goes. So does all of another source that has a
        file of the same name: of two versions of a model nothing is ever mixed.

        Args:
            plan: fingerprint of the source's content, if it has one.
            durable: whether the moves are forced to the disk; what is in the files has been.

        Raises:
            InvalidInput: a file of another source of the same call has the same path, or one has
                a name by which this library keeps account of folders.
            ObjectExistsError: a file is where a folder should go, or the other way round, or
                another volume is mounted there.
            DestinationError: the file system refuses.
        """
        with translate_os_errors(self.folder), self._alone():
            refuse_reserved(_paths_in(self.content))
            # Who was killed since this one began noted nothing of what is done here.
            self._settle()
            shares = read_note(self.folder)
            leaving = {self.key, *self._stale(shares)}
            moves = _Moves(self.folder, self.content, shares, leaving, self._beside)
            moves.shares[self.key] = Share(
                moves.new, plan, state_of(self.content, moves.new) if plan else None
            )
            os.mkdir(self.path(_OLD))
            record = {
                "old": moves.old,
                "new": moves.new,
                "shares": {key: asdict(share) for key, share in moves.shares.items()},
            }
            with open(self.path(f"{_MOVING}.new"), "w", encoding="ascii") as file:
                json.dump(record, file)
                file.flush()
                os.fsync(file.fileno())  # half of it would be as good as none
            os.rename(self.path(f"{_MOVING}.new"), self.path(_MOVING))
            try:
                self._finish(self._staging)
            except OSError:
                raise
            except BaseException:
                # An interrupt between two moves; what is left takes no time.
                self._finish(self._staging)
                raise
            for parent in {os.path.dirname(path) for path in moves.new} if durable else ():
                files.sync(os.path.join(self.folder, parent))

    def _stale(self, shares: Collection[str]) -> set[str]:
        return set() if self._only is None else set(shares) - self._only

    def _finish(self, staging: str) -> None:
        """Do what the record of moves in a staging folder says, or what is left of it."""
        record = os.path.join(staging, _MOVING)
        found = _read_moves(record)
        if found is None:
            return
        old, new, shares = found
        for index, path in enumerate(old):
            place, kept = os.path.join(self.folder, path), os.path.join(staging, _OLD, str(index))
            if os.path.lexists(place) and not os.path.lexists(kept):
                os.rename(place, kept)
        for path in new:
            source = os.path.join(staging, _CONTENT, path)
            if os.path.lexists(source):
                os.rename(source, os.path.join(self.folder, path))
        for path in old:
            self._remove_empty(os.path.dirname(path))
        write_note(self.folder, shares)
        os.unlink(record)

    def _remove_empty(self, path: str) -> None:
        """Remove folders that lost their last file."""
        while path:
            try:
                os.rmdir(os.path.join(self.folder, path))
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
                    return
            path = os.path.dirname(path)


def abandon() -> None:
    """Remove the staging folders of this process, which is about to end without looking back.

    Those of which entries are being moved stay; the next process finishes that.
    """
    for staging in list(_in_use):
        if not os.path.exists(os.path.join(staging, _MOVING)):
            with contextlib.suppress(OSError):
                files.remove(staging)


class _Moves:
    """Which entries leave the folder, and which come into it.

    Attributes:
        old: paths to move away.
        new: paths to move in, from below the content.
        shares: what the other sources have afterwards.
    """

    def __init__(
        self,
        folder: str,
        content: str,
        shares: dict[str, Share],
        leaving: Collection[str],
        beside: Collection[str],
    ) -> None:
        self._folder, self._content, self._beside = folder, content, beside
        gone = {path for key in leaving for path in self._taken(shares.pop(key, Share()))}
        while True:
            self.old: list[str] = []
            self.new: list[str] = []
            self.shares = {
                other: Share(list(share.paths), share.plan, share.state)
                for other, share in shares.items()
            }
            self._gone, self._displaced = gone, set[str]()
            for name in sorted(os.listdir(content)):
                self._visit(name)
            if not self._displaced:
                break
            # All of them goes, not only what is in the way; then it looks different here.
            for other in self._displaced:
                gone = gone | set(self._taken(shares.pop(other)))
        present = (path for path in sorted(gone) if os.path.lexists(os.path.join(folder, path)))
        self.old = [*present, *self.old]

    def _taken(self, share: Share) -> Iterator[str]:
        """Yield what goes with a share; a folder in it that has sources of its own does not."""
        for path in share.paths:
            yield from _around_places(self._folder, path)

    def _visit(self, path: str) -> None:
        here, there = os.path.join(self._folder, path), os.path.join(self._content, path)
        if not os.path.lexists(here) or path in self._gone:
            self.new.append(path)
            return
        if is_real_folder(here) and is_real_folder(there):
            if files.is_mount_point(here):
                raise ObjectExistsError(
                    f"{shown(here)} is another volume, and the source has a folder of that name; "
                    "what is moved stays on its volume; name another destination"
                )
            self._share_folder(path, os.listdir(here))
            for name in sorted(os.listdir(there)):
                self._visit(os.path.join(path, name))
            return
        owner = self._owner(path)
        if owner in self._beside:
            raise InvalidInput(
                f"{shown(here)} would come from two sources of this call; give them folders of "
                "their own, or choose by patterns"
            )
        if owner is not None:
            self._displaced.add(owner)
        elif is_real_folder(here) or is_real_folder(there):
            raise ObjectExistsError(
                f"{shown(here)} is {'a folder' if is_real_folder(here) else 'no folder'}, and the "
                "source has the opposite of that name; remove it, or name another destination"
            )
        else:
            self.old.append(path)
        self.new.append(path)

    def _share_folder(self, path: str, names: list[str]) -> None:
        """Let a folder be nobody's own any more: who had it has what is in it now."""
        for share in self.shares.values():
            if path in share.paths:
                share.paths.remove(path)
                share.paths += [os.path.join(path, name) for name in names]

    def _owner(self, path: str) -> str | None:
        for other, share in self.shares.items():
            if any(path == own or path.startswith(f"{own}/") for own in share.paths):
                return other
        return None


def _around_places(folder: str, path: str) -> Iterator[str]:
    place = os.path.join(folder, path)
    if not is_real_folder(place) or not any(has_note(root) for root, _, _ in os.walk(place)):
        yield path
    elif not has_note(place):
        for name in os.listdir(place):
            yield from _around_places(folder, os.path.join(path, name))


def _key(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _patience() -> float:
    from storage.config.plain import current_settings

    return current_settings().cache_lock_timeout


def refuse_reserved(paths: Iterable[str]) -> None:
    """Refuse a source that would forge a note, or moves for the next process to finish.

    Args:
        paths: of its files and folders, relative.

    Raises:
        InvalidInput: one of them has a name by which this library keeps account of folders.
    """
    for path in paths:
        if any(map(is_reserved, path.split("/"))):
            raise InvalidInput(
                f"the source has {shown(path)}, and by this name folders tell where their files "
                "came from; remove it there, or leave it out by patterns"
            )


def _paths_in(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield os.path.relpath(os.path.join(root, name), folder)


def _read_moves(record: str) -> tuple[list[str], list[str], dict[str, Share]] | None:
    """Return what moves out, what moves in, and the note for then; ``None`` if there is no record.

    One that cannot be read, or leads out of the folder, is none: it is not ours.
    """
    try:
        with open(record, encoding="ascii") as file:
            found = json.load(file)
        old, new = list(found["old"]), list(found["new"])
        if not all(map(is_below, (*old, *new))):
            raise ValueError("paths that lead out")
        return old, new, read_shares(found["shares"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as exc:
        _log.warning("%s is no record of moves (%s), and is passed over", record, exc)
        return None


def _unlock(descriptor: int) -> None:
    # Not by closing it alone: a child that was forked meanwhile has it, too.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_free(descriptor: int) -> bool:
    """Lock an open folder, if nobody has; false too where there are no locks to tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
