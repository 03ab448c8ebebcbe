"""All that one client of a fleet works with, once it is known which client it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.integrations.scaleout import layout
from storage.integrations.scaleout.documents import SignOfLife
from storage.integrations.scaleout.models import ModelStore
from storage.integrations.scaleout.outbox import Delivery, Outbox
from storage.integrations.scaleout.presence import Presence, folder_id
from storage.integrations.scaleout.sender import Sender
from storage.integrations.scaleout.spool import Spool
from storage.registry.documents import encode
from storage.registry.marker import create_marker
from storage.registry.objects import ObjectStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.client.client import StorageClient
    from storage.config.freshness import Freshness
    from storage.uri import Location

__all__ = ["Binding", "Options", "mark"]

_MARK = {"fleet": "scaleout"}


@dataclass(frozen=True, slots=True)
class Options:
    """What a runtime was told when it was made."""

    folder: str
    models: str | Sequence[str]
    freshness: Freshness
    silence: float
    durable: bool


def mark(store: ObjectStore) -> None:
    """Say at the root of a fleet what it is, unless that was done.

    Raises:
        UnsupportedOperation: two clients could not be told apart on this store.
    """
    store.check()
    create_marker(store, layout.MARKER, encode(_MARK))


class Binding:
    """A client of a fleet: its store, and its folder on this machine, which it has locked."""

    def __init__(
        self, client: StorageClient, root: Location, config: Any, client_id: str, options: Options
    ) -> None:
        """Open the folder; nothing is asked of the store.

        Raises:
            ConfigurationError: another process works in the folder.
            DestinationError: it cannot be written to.
            InvalidInput: that cannot be the id of a client.
            UnsupportedOperation: two clients could not be told apart on this store.
        """
        self.client_id = layout.check_client(client_id)
        folder = os.path.join(options.folder, client_id)
        self.store = ObjectStore(client, root, config)
        self.models = ModelStore(
            client,
            root,
            config,
            others=options.models,
            freshness=options.freshness,
            folder=os.path.join(folder, "models"),
        )
        # It locks its folder, and so all that is beside it.
        self.spool = Spool(os.path.join(folder, "spool"), client_id, durable=options.durable)
        try:
            self.outbox = Outbox(os.path.join(folder, "outbox"), durable=options.durable)
            self.presence = Presence(self.store, client_id, folder_id(folder), options.silence)
            reports = ObjectStore(client, root.child(layout.REPORTS), config)
            self.sender = Sender(self.spool, reports)
        except BaseException:
            self.spool.close()
            raise
        self.delivery = Delivery(self.outbox, self.store, self.models)
        self._is_sending = False

    def start(self) -> None:
        """Begin to deliver what is here."""
        self._is_sending = True
        self.sender.start()
        self.delivery.start()

    def wake(self) -> None:
        """Deliver at once: the store can be reached again."""
        self.sender.wake()
        self.delivery.wake()

    def join(self) -> None:
        """Come to the fleet: mark it, and tidy up after earlier processes of this client.

        Raises:
            StorageError: the store cannot be reached, or cannot hold a fleet.
        """
        mark(self.store)
        self.presence.forget_others()

    def sign(self, name: str, running: tuple[str, ...], *, is_stopped: bool = False) -> None:
        """Give a sign of life.

        Raises:
            StorageError: the store does not take it.
        """
        sign = SignOfLife(
            name,
            self.presence.claim.folder,
            is_stopped,
            running,
            self.sender.counts().pending,
            len(self.outbox.tasks()),
        )
        self.presence.announce(sign)

    def close(self, timeout: float) -> bool:
        """Deliver what can be within ``timeout`` seconds, and let go of the folder.

        Returns:
            Whether the store has everything; what is left is delivered by the next process.
        """
        is_empty = False
        try:
            if self._is_sending:
                results = self.delivery.close(timeout)
                is_empty = self.sender.close(timeout) and results
        finally:
            self.spool.close()
        return is_empty
