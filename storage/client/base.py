"""What all calls of one client share: settings, connections, limits, and the cache."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from storage.awaitable import awaitable
from storage.backends import open_backend
from storage.config.plain import AnySettings, current_settings
from storage.errors import ConfigurationError, InvalidInput
from storage.transfer.plan import resolve
from storage.uri import Location

if TYPE_CHECKING:
    from storage.backends.base import Backend, ObjectInfo
    from storage.cache.cache import ModelCache
    from storage.client.signatures import RequireSignature, SignaturePolicy
    from storage.transfer.engine import Budget, TransferOptions
    from storage.transfer.limits import RateLimiter

__all__ = ["ClientBase"]

T = TypeVar("T")


class ClientBase:
    """The state of a client. Safe for many threads; a forked child makes its own."""

    def __init__(
        self,
        config: Any = None,
        settings: AnySettings | None = None,
        *,
        require_signature: SignaturePolicy | None = None,
    ) -> None:
        """Prepare; no network, no disk, no SDK.

        Args:
            config: config for every call that brings none of its own.
            settings: limits, cache folder, offline mode; read from the environment and the
                settings file on first use if ``None``.
            require_signature: who has to have signed whatever is handed over, where a call says
                nothing else; from the settings if ``None``.
        """
        self._config = config
        self._policy = require_signature
        self._given_settings = settings
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._backends: dict[Any, Backend] = {}
        self._budget: Budget | None = None
        self._limiter: RateLimiter | None = None
        self._options: TransferOptions | None = None
        self._cache: ModelCache | None = None
        _instances.add(self)

    # -- life --------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the connections. A later call opens new ones.

        What was downloaded without a destination stays where it is as long as this process
        lives; ``client.cache.close()`` lets it be evicted.
        """
        with self._lock:
            backends, self._backends = self._backends, {}
            mine = self._pid == os.getpid()
        if mine:
            for backend in backends.values():
                backend.close()

    aclose = awaitable(close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # -- what the parts share ----------------------------------------------------------------

    @property
    def settings(self) -> AnySettings:
        """The settings in force; read from the environment and the file on first use."""
        if self._given_settings is None:
            self._given_settings = current_settings()
        return self._given_settings

    @property
    def signature_policy(self) -> SignaturePolicy | None:
        """Who has to have signed whatever is handed over, where a call says nothing else.

        Raises:
            ConfigurationError: the settings name a file without a key or certificates.
        """
        file = None if self._policy is not None else self.settings.require_signature
        if file is not None:
            from storage.client.signatures import SignaturePolicy

            try:
                self._policy = SignaturePolicy.read(file)
            except InvalidInput as exc:
                raise ConfigurationError(f"the setting require_signature: {exc}") from exc
        return self._policy

    def policy_for(self, asked: RequireSignature) -> SignaturePolicy | None:
        """Return the policy of a call that says ``asked``.

        Raises:
            InvalidInput: it says something else.
        """
        if asked is None:
            return self.signature_policy
        if asked is False:
            return None
        from storage.client.signatures import SignaturePolicy

        if not isinstance(asked, SignaturePolicy):
            raise InvalidInput(
                'require_signature is a SignaturePolicy, such as SignaturePolicy.key("pub.pem"), '
                f"False or None, not {type(asked).__name__}"
            )
        return asked

    def backend(self, location: Location, config: Any = None, *, durable: bool = False) -> Backend:
        """Return the backend for the bucket of ``location``, the same one for the same config.

        Args:
            location: what it is for.
            config: of the call.
            durable: whether what it writes on a file system is forced to the disk.
        """
        config = self.resolve_config(location, config)
        transfer = self.settings.transfer
        key = (_store_of(location), location.bucket, config, durable)
        with self._lock:
            if self._pid != os.getpid():
                # Sockets and threads stayed with the parent.
                self._pid, self._backends = os.getpid(), {}
                self._budget = self._limiter = None
            backend = self._backends.get(key)
            if backend is None:
                from storage.backends.base import OpenOptions
                from storage.client.secrets import conceal_credentials

                conceal_credentials(location, config)
                options = OpenOptions(
                    transfer.connections,
                    transfer.connect_timeout,
                    transfer.stall_timeout,
                    transfer.memory,
                    durable,
                )
                backend = open_backend(location, config, options)
                if transfer.limit_rate is not None and not location.is_local:
                    from storage.transfer.limits import RateLimiter, limited

                    if self._limiter is None:
                        self._limiter = RateLimiter(transfer.limit_rate)
                    backend = limited(backend, self._limiter)
                self._backends[key] = backend
        return backend

    def resolve_config(self, location: Location, config: Any) -> Any:
        """Return the config that applies to ``location``: the call's, the client's, and so on."""
        from storage.config import resolve_config

        if config is None and self._config is not None and self._default_fits(location):
            config = self._config
        return resolve_config(location, config, self.settings)

    def share_store(self, one: Location, config: Any, other: Location, other_config: Any) -> bool:
        """Tell whether two locations are in buckets of the same store, with the same config."""
        return _store_of(one) == _store_of(other) and self.resolve_config(
            one, config
        ) == self.resolve_config(other, other_config)

    def _default_fits(self, location: Location) -> bool:
        """Tell whether the client's own config is meant for stores of this kind."""
        kind = getattr(self._config, "uri_type", location.type)
        return kind in (location.type, "*") and location.scheme not in ("file", "memory")

    def resolve_all(self, location: Location, config: Any) -> tuple[bool, list[ObjectInfo]]:
        """Return whether there is a tree at ``location``, and all objects of it; one attempt."""
        is_tree, found = resolve(self.backend(location, config), location)
        return is_tree, list(found)

    @property
    def cache(self) -> ModelCache:
        """The cache of this client."""
        with self._lock:
            if self._cache is None:
                from storage.cache.cache import ModelCache

                settings = self.settings
                self._cache = ModelCache(
                    str(settings.cache_dir),
                    lower=map(str, settings.cache_lower),
                    algorithm=settings.digest_algorithm,
                    budget=settings.cache_budget,
                    grace=settings.cache_grace,
                    lock_timeout=settings.cache_lock_timeout,
                )
            return self._cache

    @property
    def transfer_options(self) -> TransferOptions:
        """Sizes and retries of this client's transfers."""
        if self._options is None:
            from storage.transfer.engine import PART_GRANULE, TransferOptions
            from storage.transfer.retry import RetryBudget, RetryPolicy

            transfer = self.settings.transfer
            self._options = TransferOptions(
                transfer.connections,
                -(-transfer.part_size // PART_GRANULE) * PART_GRANULE,
                RetryPolicy(
                    transfer.attempts,
                    transfer.retry_timeout,
                    transfer.retry_wait,
                    wait_throttled=transfer.throttle_wait,
                    budget=RetryBudget(transfer.retry_budget),
                ),
                transfer.memory,
            )
        return self._options

    @property
    def budget(self) -> Budget:
        """The connections that all transfers of this client share."""
        with self._lock:
            if self._budget is None:
                from storage.transfer.engine import Budget
                from storage.transfer.limits import connections_at

                transfer = self.settings.transfer
                self._budget = Budget(connections_at(transfer.limit_rate, transfer.connections))
            return self._budget

    def run_retried(self, function: Callable[..., T], *args: Any, where: str = "") -> T:
        """Call a short operation of a backend, and again if it failed for a passing reason.

        ``where`` is the URI that it is about, for events.
        """
        return self.transfer_options.retry.run(partial(function, *args), where=where)


_instances: weakref.WeakSet[ClientBase] = weakref.WeakSet()


def _after_fork() -> None:
    # The thread that held a lock does not exist in the child; the retry budget has one, too.
    for client in _instances:
        client._lock = threading.Lock()
        client._options = None


os.register_at_fork(after_in_child=_after_fork)


def _store_of(location: Location) -> tuple[object, ...]:
    """Return what tells one store from another: who serves it, and as what we come to it."""
    return (
        location.scheme,
        location.account,
        location.domain,
        location.repo_type,
        location.query,
        _authority(location),
        # All that is done in a repository is done at one revision of it.
        location.version if location.has_revisions else None,
    )


def _authority(location: Location) -> str | None:
    """Return the parts of a URL that may hold credentials: who is asked, and for HTTP how."""
    if location.url is None:
        return None
    authority = "/".join(location.url.split("/", 3)[:3])
    return f"{authority}?{urlsplit(location.url).query}" if location.type == "http" else authority
