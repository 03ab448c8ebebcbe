"""Watching what is at a URI."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from storage.client.offline import offline_mode
from storage.client.sourcing import source_of
from storage.client.watched import WatchedModel, WatchedSource, kept_patterns
from storage.client.watching import OnChange, OnError, Watcher, WatchOptions
from storage.transfer.plan import Patterns
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.client.signatures import RequireSignature
    from storage.transfer.progress import ProgressCallback

__all__ = ["ModelWatcher", "WatchedModel"]


class ModelWatcher(Watcher):
    """Watches what is at a URI.

    ::

        def on_change(model):
            server.load(model.path)
            if model.previous:
                model.previous.release()

        with ModelWatcher("s3://models/iris/", on_change):
            server.run()
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        on_change: OnChange | None = None,
        *,
        client: StorageClient | None = None,
        interval: float = 60.0,
        dest: str | os.PathLike[str] | None = None,
        initial: bool = True,
        current: str | os.PathLike[str] | None = None,
        settle: float = 0.0,
        on_error: OnError | None = None,
        config: Any = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        unpack: bool = False,
        durable: bool | None = None,
        progress: ProgressCallback | None = None,
        require_signature: RequireSignature = None,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            uri: what to watch.
            on_change: called with a :class:`WatchedModel` by the thread of the watcher; what it
                raises is told to ``on_error``, and it is called again later. An ``async``
                function is called by the event loop that started the watcher, or by one of
                its own.
            client: does the work; one of its own, from the environment, if ``None``.
            interval: seconds between two looks, a tenth more or less. From the second
                failure in a row on it is doubled by each, up to ten times as much.
            dest: a folder for the versions, each in one of its own; it is the watchers' alone,
                who remove in it what no process uses. ``None`` keeps them in the cache.
            initial: whether the version that is there first is told, too.
            current: the path of a version that the server has already, as
                :meth:`storage.Storage.download` returned it: that one is not told.
            settle: seconds for which a new version must stay as it is before it is fetched, where
                files of a tree are replaced one by one.
            on_error: called with what went wrong; the log is told if ``None``.
            config: as in :meth:`storage.Storage.download`, like those that follow.
            allow_patterns: of relative paths; the rest is left out.
            ignore_patterns: of what is left out.
            unpack: extract the one archive that ``uri`` is.
            durable: force everything to disk.
            progress: called while bytes move.
            require_signature: who has to have signed each version.

        Raises:
            InvalidInput: an argument is unusable.
        """
        from storage.client.client import StorageClient

        source = _UriSource(
            StorageClient() if client is None else client,
            uri,
            {
                "config": config,
                "allow_patterns": kept_patterns(allow_patterns),
                "ignore_patterns": kept_patterns(ignore_patterns),
            },
            {
                "unpack": unpack,
                "durable": durable,
                "progress": progress,
                "require_signature": require_signature,
            },
        )
        options = WatchOptions(interval, dest, initial, current, settle, on_error)
        super().__init__(str(source.location), source, on_change, options)


class _UriSource(WatchedSource):
    """What is at a URI."""

    def __init__(
        self,
        client: StorageClient,
        uri: str | os.PathLike[str],
        choice: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.location = parse_uri(uri)
        self._client = client
        self._uri = uri
        self._choice = choice
        self._options = options

    @property
    def _is_offline(self) -> bool:
        return offline_mode(self._client.settings, self.location, None) is True

    @property
    def identity(self) -> str:
        choice = self._choice
        config = self._client.resolve_config(self.location, choice["config"])
        patterns = Patterns(choice["allow_patterns"], choice["ignore_patterns"])
        return source_of(self.location, config, patterns, self._options["unpack"]).id

    def look(self) -> str | None:
        if self._is_offline:
            return "offline"  # there is nobody to say that it is another one
        return self._client.plan_download(self._uri, **self._choice).fingerprint()

    def fetch(self, version: str | None, dest: str | None, *, offline: bool = False) -> str:
        choice = self._choice
        if dest is None and self.location.is_local and not choice["allow_patterns"]:
            # What is on this machine would be used in place, and change there.
            choice = choice | {"allow_patterns": "*"}
        return self._client.download(
            self._uri,
            dest,
            **choice,
            **self._options,
            offline=offline or self._is_offline,
            freshness="revalidate",
        )

    def release(self, path: str) -> None:
        self._client.cache.release(path)
