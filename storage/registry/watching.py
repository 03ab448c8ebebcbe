"""Watching a model of a registry: which version an alias is set to, or which is the latest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from storage.client.offline import offline_mode
from storage.client.sourcing import source_of
from storage.client.watched import WatchedSource, kept_patterns
from storage.client.watching import OnChange, OnError, Watcher, WatchOptions
from storage.errors import ObjectChangedError
from storage.registry import layout
from storage.registry.pull import make_pull
from storage.transfer.plan import Patterns

if TYPE_CHECKING:
    from storage.client.signatures import RequireSignature
    from storage.registry.registry import ModelRegistry
    from storage.transfer.progress import ProgressCallback

__all__ = ["RegistryWatcher"]


class RegistryWatcher(Watcher):
    """Watches an alias of a model; made by :meth:`storage.registry.ModelRegistry.watch`."""

    def __init__(
        self,
        registry: ModelRegistry,
        model: str,
        reference: int | str = layout.LATEST,
        on_change: OnChange | None = None,
        *,
        interval: float = 60.0,
        dest: str | os.PathLike[str] | None = None,
        initial: bool = True,
        current: str | os.PathLike[str] | None = None,
        settle: float = 0.0,
        on_error: OnError | None = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        durable: bool | None = None,
        progress: ProgressCallback | None = None,
        require_signature: RequireSignature = None,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            registry: where the model is.
            model: its name.
            reference: an alias, or ``latest`` for the highest number; a number, too, which
                stays what it is.
            on_change: as for :class:`storage.ModelWatcher`, like all that follow.
            interval: seconds between two looks.
            dest: a folder for the versions; ``None`` for the cache.
            initial: whether the version that is there first is told, too.
            current: the path of a version that need not be told.
            settle: seconds for which the alias must stay as it is.
            on_error: called with what went wrong.
            allow_patterns: of relative paths; the rest is left out.
            ignore_patterns: of what is left out.
            durable: force everything to disk.
            progress: called while bytes move.
            require_signature: who has to have signed each version.

        Raises:
            InvalidInput: an argument is unusable.
        """
        choice = {
            "allow_patterns": kept_patterns(allow_patterns),
            "ignore_patterns": kept_patterns(ignore_patterns),
            "durable": durable,
            "progress": progress,
            "require_signature": require_signature,
        }
        wanted = layout.parse_reference(reference)
        source = _RegistrySource(registry, layout.check_model(model), wanted, choice)
        name = f"{registry.location} {model}@{wanted}"
        options = WatchOptions(interval, dest, initial, current, settle, on_error)
        super().__init__(name, source, on_change, options)


class _RegistrySource(WatchedSource):
    """What an alias of a registry is set to."""

    def __init__(
        self, registry: ModelRegistry, model: str, reference: int | str, choice: dict[str, Any]
    ) -> None:
        self._registry = registry
        self._model = model
        self._reference = reference
        self._choice = choice

    @property
    def identity(self) -> str:
        registry, choice = self._registry, self._choice
        config = registry.client.resolve_config(registry.location, registry.config)
        patterns = Patterns(choice["allow_patterns"], choice["ignore_patterns"])
        source = source_of(registry.location, config, patterns, False)
        return f"{source.id} {self._model}@{self._reference}"

    @property
    def _is_offline(self) -> bool:
        registry = self._registry
        # A registry on this machine may be asked.
        return (
            not registry.location.is_local
            and offline_mode(registry.client.settings, registry.location, None) is True
        )

    def look(self) -> str | None:
        if self._is_offline:
            return "offline"  # there is nobody to say that it is another one
        return str(self._registry.resolve(self._model, self._reference))

    def fetch(self, version: str | None, dest: str | None, *, offline: bool = False) -> str:
        offline = offline or self._is_offline
        # By the alias, not by the number: so the cache knows offline what the alias was.
        pull = make_pull(
            self._registry,
            self._model,
            self._reference,
            **self._choice,
            offline=offline,
            freshness="revalidate",
        )
        path = pull.run(dest)
        if not offline and str(pull.number) != version:
            if dest is None:
                self.release(path)
            raise ObjectChangedError(
                f"{pull.location} was set to version {pull.number} while {version} was fetched"
            )
        return path

    def release(self, path: str) -> None:
        self._registry.client.cache.release(path)
