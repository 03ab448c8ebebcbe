"""Which process of a client this is, and whether an earlier one may still be at work.

A task that a client has begun is taken up again by the next process of that client, and must not be
done by two at the same time. So a process is taken for gone only if one of these tells:

* it said so when it ended,
* it worked in the folder that this process has locked,
* the process table of this machine says so,
* nothing was heard of it for a long time, by the clock of the store.
"""

from __future__ import annotations

import contextlib
import os
import uuid

from storage.cache.owners import Owner, is_alive, new_name
from storage.errors import IntegrityError
from storage.files import make_parents, translate_os_errors
from storage.integrations.scaleout import layout
from storage.integrations.scaleout.documents import Claim, SignOfLife
from storage.registry.objects import ObjectStore

__all__ = ["SILENCE", "Presence", "folder_id"]

SILENCE = 600.0
"""Seconds without a sign of life after which a process on another machine counts as gone."""

_ID = "folder-id"


def folder_id(folder: str) -> str:
    """Return what tells a folder from all others; it is made up when it is first asked for.

    Raises:
        DestinationError: the folder cannot be written to.
    """
    path = os.path.join(folder, _ID)
    with translate_os_errors(folder):
        make_parents(folder)
        if not os.path.exists(path):
            own = f"{path}-{uuid.uuid4().hex}"
            with open(own, "w", encoding="ascii") as file:
                file.write(uuid.uuid4().hex)
            # Whoever comes first: a folder has one id for ever.
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
            os.unlink(own)
        with open(path, encoding="ascii", errors="replace") as file:
            # A copy of the folder is another one, and has its file in another place of a disk.
            return f"{file.read().strip()}-{os.fstat(file.fileno()).st_ino}"


class Presence:
    """This process as one of a client, told from those before it and elsewhere."""

    def __init__(
        self, store: ObjectStore, client_id: str, folder: str, silence: float = SILENCE
    ) -> None:
        """Make up a name; nothing is asked of the store yet.

        Args:
            store: the fleet.
            client_id: of the client.
            folder: what :func:`folder_id` says of the folder that this process has locked.
            silence: see :data:`SILENCE`.
        """
        self._store = store
        self._client = client_id
        self._silence = silence
        self.claim = Claim(client_id, new_name(), folder)
        """What this process writes to a task that it does."""

    @property
    def _name(self) -> str:
        return layout.sign_of_life(self._client, self.claim.process)

    def announce(self, sign: SignOfLife) -> None:
        """Give a sign of life.

        Raises:
            StorageError: the store does not take it.
        """
        self._store.replace(self._name, sign.dumps())

    def forget_others(self) -> None:
        """Remove the signs of life of processes of this client that are gone."""
        names = self._store.names(layout.clients_folder(self._client))
        found = [place for name in names if (place := layout.client_of(name)) is not None]
        gone = [process for _, process in found if self._is_gone(process)]
        self._store.delete(layout.sign_of_life(self._client, process) for process in gone)

    def may_take(self, claim: Claim) -> bool:
        """Tell whether a task with this claim is this process's to do.

        Raises:
            StorageError: the store cannot be asked.
        """
        if claim.client != self._client:
            return False
        if claim.process == self.claim.process or claim.folder == self.claim.folder:
            return True
        return self._is_gone(claim.process)

    def _is_gone(self, process: str) -> bool:
        if process == self.claim.process:
            return False
        name = layout.sign_of_life(self._client, process)
        data = self._store.read(name)
        # Nothing is claimed before a first sign of life; the next process removes what is old.
        if data is None:
            return True
        with contextlib.suppress(IntegrityError):  # it tells nothing then
            sign = SignOfLife.parse(data, self._store.where(name))
            if sign.is_stopped or sign.folder == self.claim.folder:
                return True
        owner = Owner.parse(process)
        alive = None if owner is None else is_alive(owner)
        return not alive if alive is not None else self._is_silent(name)

    def _is_silent(self, name: str) -> bool:
        theirs, mine = self._store.info(name), self._store.info(self._name)
        if theirs is None:
            return True
        if mine is None or mine.modified is None or theirs.modified is None:
            return False
        return (mine.modified - theirs.modified).total_seconds() > self._silence
