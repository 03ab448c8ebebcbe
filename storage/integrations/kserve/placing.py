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
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Self

from storage import files
from storage.errors import InvalidInput, ObjectExistsError
from storage.files import shown, translate_os_errors
from storage.transfer.trees import lock_folder

__all__ = ["Place", "abandon"]

_XATTR = "user.modelstorage.sources"
_NOTE = ".modelstorage"
_NEW_NOTE = f"{_NOTE}.new"
_STAGING = re.compile(r"\.modelstorage\.[0-9a-f]{16}")
# What a download leaves for the next one to go on with.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.partial", re.DOTALL)
_CONTENT, _OLD, _MOVING = "content", "old", "moving"
# Seconds; moving the entries takes a fraction of one.
_MOVE_TIMEOUT = 60.0
# Staging folders in use by this process.
_in_use: set[str] = set()


@dataclass
class _Share:
    """What one source has put into the folder."""

    paths: list[str] = field(default_factory=list)
    """Files and folders that are its own, relative; a folder with all in it."""

    plan: str | None = None
    """Fingerprint of the source's content, if it has one."""

    state: str | None = None
    """Fingerprint of what was put there."""


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
        self.folder = os.path.abspath(folder)
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
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _settle(self) -> None:
        """Finish the moves of killed processes, and remove what they left; not what lives."""
        self._finish(self._staging)
        files.remove(os.path.join(self.folder, _NEW_NOTE))
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
                os.close(descriptor)

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
            os.close(descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep all others from moving entries of the folder."""
        descriptor = _open_folder(self.folder)
        try:
            lock_folder(descriptor, self.folder, _MOVE_TIMEOUT)
            yield
        finally:
            os.close(descriptor)

    # -- publishing --------------------------------------------------------------------------

    def is_current(self, plan: str | None) -> bool:
        """Tell whether what the source has now is in the folder already, and untouched.

        Args:
            plan: fingerprint of the source's content; ``None`` if it has none.
        """
        shares = self._read_note()
        share = shares.get(self.key)
        if self._stale(shares) or share is None or plan is None or share.plan != plan:
            return False
        with contextlib.suppress(OSError):
            return share.state == _state(self.folder, share.paths)
        return False

    def publish(self, plan: str | None = None, *, durable: bool = False) -> None:
        """Move the entries of :attr:`content` into the folder.

        What this source had put there before goes. So does all of another source that has a
        file of the same name: of two versions of a model nothing is ever mixed.

        Args:
            plan: fingerprint of the source's content, if it has one.
            durable: whether the moves are forced to the disk; what is in the files has been.

        Raises:
            InvalidInput: a file of another source of the same call has the same path.
            ObjectExistsError: a file is where a folder should go, or the other way round.
            DestinationError: the file system refuses.
        """
        with translate_os_errors(self.folder), self._alone():
            shares = self._read_note()
            leaving = {self.key, *self._stale(shares)}
            moves = _Moves(self.folder, self.content, shares, leaving, self._beside)
            moves.shares[self.key] = _Share(
                moves.new, plan, _state(self.content, moves.new) if plan else None
            )
            os.mkdir(self.path(_OLD))
            record = {
                "old": moves.old,
                "new": moves.new,
                "shares": {key: asdict(share) for key, share in moves.shares.items()},
            }
            with open(self.path(f"{_MOVING}.new"), "w", encoding="ascii") as file:
                json.dump(record, file)
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
        try:
            with open(record, encoding="ascii") as file:
                moves = json.load(file)
        except FileNotFoundError:
            return
        for index, path in enumerate(moves["old"]):
            place, kept = os.path.join(self.folder, path), os.path.join(staging, _OLD, str(index))
            if os.path.lexists(place) and not os.path.lexists(kept):
                os.rename(place, kept)
        for path in moves["new"]:
            source = os.path.join(staging, _CONTENT, path)
            if os.path.lexists(source):
                os.rename(source, os.path.join(self.folder, path))
        for path in moves["old"]:
            self._remove_empty(os.path.dirname(path))
        self._write_note({key: _Share(**share) for key, share in moves["shares"].items()})
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

    # -- the note ----------------------------------------------------------------------------

    def _read_note(self) -> dict[str, _Share]:
        try:
            text = os.getxattr(self.folder, _XATTR)
        except OSError:
            try:
                with open(os.path.join(self.folder, _NOTE), "rb") as file:
                    text = file.read()
            except OSError:
                return {}
        try:
            shares = {str(key): _Share(**share) for key, share in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError):
            return {}  # it was damaged, or is somebody else's; then nothing is ours
        for share in shares.values():
            share.paths = [path for path in share.paths if _is_below(path)]
        return shares

    def _write_note(self, shares: dict[str, _Share]) -> None:
        text = json.dumps({key: asdict(share) for key, share in shares.items()}).encode()
        note = os.path.join(self.folder, _NOTE)
        try:
            os.setxattr(self.folder, _XATTR, text)
        except OSError:  # none on this file system, or it is too long for one
            fresh = os.path.join(self.folder, _NEW_NOTE)
            with open(fresh, "wb") as file:
                file.write(text)
            os.rename(fresh, note)
            with contextlib.suppress(OSError):
                os.removexattr(self.folder, _XATTR)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(note)


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
        shares: dict[str, _Share],
        leaving: Collection[str],
        beside: Collection[str],
    ) -> None:
        self._folder, self._content, self._beside = folder, content, beside
        gone = {path for key in leaving for path in self._taken(shares.pop(key, _Share()))}
        while True:
            self.old: list[str] = []
            self.new: list[str] = []
            self.shares = {
                other: _Share(list(share.paths), share.plan, share.state)
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

    def _taken(self, share: _Share) -> Iterator[str]:
        """Yield what goes with a share; a folder in it that has sources of its own does not."""
        for path in share.paths:
            yield from _around_places(self._folder, path)

    def _visit(self, path: str) -> None:
        here, there = os.path.join(self._folder, path), os.path.join(self._content, path)
        if not os.path.lexists(here) or path in self._gone:
            self.new.append(path)
            return
        if _is_real_folder(here) and _is_real_folder(there):
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
        elif _is_real_folder(here) or _is_real_folder(there):
            raise ObjectExistsError(
                f"{shown(here)} is {'a folder' if _is_real_folder(here) else 'no folder'}, and the "
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
    if not _is_real_folder(place) or not any(_has_note(root) for root, _, _ in os.walk(place)):
        yield path
    elif not _has_note(place):
        for name in os.listdir(place):
            yield from _around_places(folder, os.path.join(path, name))


def _has_note(folder: str) -> bool:
    try:
        os.getxattr(folder, _XATTR)
    except OSError:
        return os.path.lexists(os.path.join(folder, _NOTE))
    return True


def _key(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _patience() -> float:
    from storage.config.plain import current_settings

    return current_settings().cache_lock_timeout


def _open_folder(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_free(descriptor: int) -> bool:
    """Lock an open folder, if nobody has; false too where there are no locks to tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_real_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _is_below(path: object) -> bool:
    return isinstance(path, str) and path != "" and not {"", ".", ".."} & set(path.split("/"))


def _state(folder: str, paths: Collection[str]) -> str:
    """Return a hash of the names, sizes and times of all files at ``paths``.

    What is in folders that have sources of their own does not count.

    Raises:
        OSError: one is not there.
    """
    lines = []

    def note(path: str) -> None:
        found = os.lstat(path)
        name = os.path.relpath(path, folder)
        lines.append(f"{name}\0{found.st_mode}\0{found.st_size}\0{found.st_mtime_ns}")

    for path in paths:
        place = os.path.join(folder, path)
        if not _is_real_folder(place):
            note(place)
            continue
        for root, folders, names in os.walk(place):
            folders[:] = [name for name in folders if not _has_note(os.path.join(root, name))]
            for name in (*names, *(each for each in folders if os.path.islink(f"{root}/{each}"))):
                note(os.path.join(root, name))
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
