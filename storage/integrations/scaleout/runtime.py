"""`StorageRuntime`: the runtime of an ``EdgeClient`` that works with a store alone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from storage.client.arguments import writable
from storage.client.offline import offline_mode
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    TransferError,
    UnsupportedOperation,
    UnsupportedScheme,
    one_line,
)
from storage.integrations.scaleout import layout
from storage.integrations.scaleout.binding import Binding, Options, mark
from storage.integrations.scaleout.classes import scaleout_classes
from storage.integrations.scaleout.handlers import Handlers
from storage.integrations.scaleout.polling import Polling
from storage.integrations.scaleout.presence import SILENCE
from storage.integrations.scaleout.processes import ended_by_signal
from storage.integrations.scaleout.reporting import Reporting
from storage.integrations.scaleout.tasks import CONCURRENCY, TaskRunner
from storage.integrations.scaleout.tokens import access_token, with_token
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.config.freshness import Freshness
    from storage.integrations.scaleout.classes import Classes
    from storage.uri import Location

__all__ = ["StorageRuntime"]

_log = logging.getLogger(__name__)

_FOLDER = os.path.join(".scaleout", "storage")
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_TICK = 0.5
_TO_THE_UNREACHABLE = 1.0


class StorageRuntime(Reporting):
    """What an ``EdgeClient`` needs to work with a store and without a server.

    Give it to the client that the package ``scaleout`` has; everything else stays as it is::

        from scaleout import EdgeClient
        from storage.integrations.scaleout import StorageRuntime

        client = EdgeClient(train, validate, runtime=StorageRuntime("s3://bucket/fleet"))
        client.set_client_id("edge-7")
        client.run()

    Tasks are objects below the URI, submitted with a ``TaskBoard``. Models come through the cache.
    What the client makes (results, trained models, metrics, attributes, telemetry) is on the disk
    before a call returns, and in the store as soon as that can be reached.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | None = None,
        *,
        config: Any = None,
        client: StorageClient | None = None,
        folder: str | os.PathLike[str] | None = None,
        models: str | Sequence[str] = (),
        freshness: Freshness = "cache-first",
        poll_interval: float | None = None,
        heartbeat_interval: float = 30.0,
        silence: float = SILENCE,
        concurrency: int = CONCURRENCY,
        patience: float | None = 300.0,
        shutdown_timeout: float = 10.0,
        durable: bool = False,
    ) -> None:
        """Prepare; no network, no disk, and nothing of scaleout yet.

        Args:
            uri: the fleet: a folder of a store that can create an object only if it is absent
                (S3, GCS, Azure, the Hub, a claim, a directory). If ``None``, the URL that
                ``connect_to_api`` is given.
            config: for that store.
            client: moves the bytes and has the cache; that of the facades if ``None``.
            folder: where this machine keeps what no store has yet; it has to outlive the process.
                By default ``.scaleout/storage`` below the working folder, beside what scaleout
                keeps. Each client has a folder of its own in it.
            models: URIs with ``{model_id}`` in them where models are looked for that the fleet
                does not have; of any store.
            freshness: of models in the cache. A model of an id never changes, so the store is not
                asked about those that are there.
            poll_interval: seconds between looks for tasks; by default what scaleout is told by
                ``SCALEOUT_CLIENT_TASK_POLLING_INTERVAL`` (5).
            heartbeat_interval: seconds between signs of life, each given with a look.
            silence: seconds without one after which an earlier process of this client on another
                machine counts as gone, and its tasks are done again here; more than both.
            concurrency: tasks of the board that are done at the same time.
            patience: seconds for which a model is waited for while its store cannot be reached;
                ``None`` for ever.
            shutdown_timeout: seconds that the end of :meth:`run` waits for tasks, and again for
                what has to be delivered.
            durable: whether what is kept in ``folder`` survives a power cut too, not only the
                death of the process.

        Raises:
            InvalidInput: an argument is unusable.
        """
        for name, value in (
            ("concurrency", concurrency),
            ("heartbeat_interval", heartbeat_interval),
        ):
            if value <= 0:
                raise InvalidInput(f"{name} is {value}; expected more than 0")
        if poll_interval is not None and poll_interval <= 0:
            raise InvalidInput(f"poll_interval is {poll_interval}; expected more than 0 seconds")
        if silence <= max(heartbeat_interval, poll_interval or 0.0):
            raise InvalidInput(
                f"silence is {silence} s, so a client that is well would count as gone; expected "
                "more than heartbeat_interval and poll_interval"
            )
        super().__init__()
        self._location = None if uri is None else _location(uri)
        self._config = config
        self._given_client = client
        self._options = Options(
            os.path.abspath(_FOLDER if folder is None else os.fspath(folder)),
            models,
            freshness,
            silence,
            durable,
        )
        self._poll_interval = poll_interval
        self._heartbeat_interval = heartbeat_interval
        self._concurrency = concurrency
        self._patience = patience
        self._shutdown_timeout = shutdown_timeout
        self._client: Any = None
        self._token: str | None = None
        self._binding: Binding | None = None
        self._runner: TaskRunner | None = None
        self._polling: Polling | None = None
        self._stop = threading.Event()
        self._has_ended = False

    # -- what it is made of ------------------------------------------------------------------

    @property
    def _classes(self) -> Classes:
        return scaleout_classes()

    @property
    def _storage(self) -> StorageClient:
        if self._given_client is None:
            from storage.facade import default_client

            self._given_client = default_client()
        return self._given_client

    def set_client(self, client: Any) -> None:
        """Take the ``EdgeClient`` that this is the runtime of; it calls this itself."""
        self._client = client

    def _bound(self) -> Binding:
        """Return what the client works with; open it if that was not done.

        Raises:
            StorageError: the client has no id or has ended, there is no URI, or its folder is
                unusable.
        """
        with self._lock:
            if self._binding is not None:
                return self._binding
            if self._has_ended:
                raise ConfigurationError("the client has ended; run() begins anew")
            if self._client is None or not self._client.client_id:
                raise ConfigurationError(
                    "the client has no id: call set_client_id, or connect_to_api with one"
                )
            if self._location is None:
                raise ConfigurationError(
                    "the runtime has no URI: give it one, or call connect_to_api with it"
                )
            classes = self._classes
            binding = Binding(
                self._storage,
                self._location,
                self._store_config(),
                self._client.client_id,
                self._options,
            )
            self._runner = TaskRunner(
                binding.store,
                binding.client_id,
                binding.presence,
                Handlers(
                    self._client,
                    classes,
                    self.get_model_from_combiner,
                    self.send_status,
                    self._send_validation,
                ),
                binding.outbox,
                classes,
                concurrency=self._concurrency,
                on_outcome=binding.delivery.hurry,
            )
            if not self._is_offline():
                binding.start()
            self._binding = binding
            return binding

    def _store_config(self) -> Any:
        assert self._location is not None
        return with_token(self._storage, self._location, self._config, self._token)

    def _is_offline(self) -> bool:
        assert self._location is not None
        return offline_mode(self._storage.settings, self._location, None) is True

    # -- connecting --------------------------------------------------------------------------

    def connect_to_api(
        self,
        url: str,
        json: Mapping[str, Any] | None = None,
        token: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> tuple[Any, Any]:
        """Come to the fleet.

        A store that cannot be reached is no reason not to work: models in the cache can be used,
        and what is reported waits on the disk.

        Args:
            url: the URI of the fleet, if the runtime was made without one; else it says nothing.
            json: ``client_id`` and ``name``, as scaleout's ``ClientOptions`` give them.
            token: for stores that take one (GCS, Azure, the Hub); else it is only kept.
            token_refresh_callback: never called, for nothing renews the token.

        Returns:
            A ``ConnectToApiResult``, and what ``init_grpchandler`` takes if that is ``Assigned``,
            else the reason.
        """
        answer = self._classes.ConnectToApiResult
        told = dict(json or {})
        try:
            self._take_token(token)
            if self._location is None:
                self._location = _location(url)
            client_id = told.get("client_id") or self._client.client_id
            if not client_id:
                raise InvalidInput("the client has no id; expected client_id in json")
            layout.check_client(client_id)
            if self._binding is not None and self._binding.client_id != client_id:
                raise InvalidInput(f"the client has begun already, as {self._binding.client_id}")
            self._client.set_client_id(client_id)
            self._client.set_name(told.get("name") or self._client.name or client_id)
            if not self._is_offline():
                mark(ObjectStore(self._storage, self._location, self._store_config()))
        except AuthenticationError as exc:
            return answer.UnAuthorized, one_line(exc)
        except (BucketMissingError, UnsupportedScheme) as exc:
            return answer.IncorrectUrl, one_line(exc)
        except (InvalidInput, UnsupportedOperation, ConfigurationError) as exc:
            return answer.UnMatchedConfig, one_line(exc)
        except TransferError as exc:
            _log.warning("the client begins without its store: %s", one_line(exc))
        except StorageError as exc:
            return answer.UnknownError, one_line(exc)
        return answer.Assigned, self._classes.GrpcConnectionOptions(
            host=str(self._location), port=0
        )

    def init_grpchandler(
        self,
        config: Any = None,
        token: str | None = None,
        url: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> bool:
        """Open the folder of the client, and begin to deliver what is in it.

        Args:
            config: what ``connect_to_api`` returned; where the fleet is, is known already.
            token: as :meth:`connect_to_api`.
            url: as :meth:`connect_to_api`.
            token_refresh_callback: as :meth:`connect_to_api`.

        Returns:
            Whether that was possible; if not, the reason is logged.
        """
        self._has_ended = False
        try:
            self._take_token(token)
            if self._location is None and url is not None:
                self._location = _location(url)
            self._bound()
        except StorageError as exc:
            _log.error("the client cannot begin: %s", one_line(exc))
            return False
        return True

    def _take_token(self, token: str | None) -> None:
        with self._lock:
            if token and token != self._token:
                if self._binding is not None:
                    raise ConfigurationError("the client has begun already, with another token")
                self._token = token

    def get_access_token(self) -> str | None:
        """Return the token that the store is asked with, if there is one.

        It is the one that was given, else that of the store's config.
        """
        if self._token is not None or self._location is None:
            return self._token
        return access_token(self._storage, self._location, self._config)

    # -- models ------------------------------------------------------------------------------

    def get_model_from_combiner(self, model_id: str) -> Any:
        """Return a model as a ``ScaleoutModel``, from the cache or its store; else ``None``.

        A store that cannot be reached is waited for; a task that is stopped meanwhile ends.

        Raises:
            StorageError: it cannot be had; ``IntegrityError`` if it says that it is another one.
            StoppedException: the task that asks for it was stopped.
        """
        binding = self._bound()
        deadline = None if self._patience is None else time.monotonic() + self._patience
        wait = _FIRST_WAIT
        while True:
            try:
                return binding.models.load(model_id, self._classes.ScaleoutModel)
            except ModelMissingError:
                return None
            except TransferError as exc:
                if deadline is not None and time.monotonic() + wait > deadline:
                    raise
                _log.warning("model %s is waited for: %s", model_id, one_line(exc))
            until = time.monotonic() + wait
            while time.monotonic() < until:
                self.check_task_abort()
                time.sleep(min(_TICK, wait))
            wait = min(2 * wait, _LONGEST_WAIT)

    def send_model_to_combiner(self, model: Any) -> bool:
        """Store a ``ScaleoutModel`` under its id, now.

        The result of a training needs no call: its model waits on the disk for the store.

        Raises:
            StorageError: it cannot be stored.
        """
        self._bound().models.accept(model.model_id, model.get_filechunk_stream())
        return True

    def get_model_chunks(self, model_id: str) -> Iterator[Any]:
        """Yield a model as the ``FileChunk`` messages that a combiner would send.

        Raises:
            ModelMissingError: there is none.
            StorageError: it cannot be had.
        """
        message = self._classes.messages.FileChunk
        return self._bound().models.chunks(model_id, message)

    # -- tasks -------------------------------------------------------------------------------

    def check_task_abort(self) -> None:
        """Raise if the task of the calling thread is to stop; do nothing on other threads.

        Raises:
            StoppedException: of scaleout.
        """
        if self._runner is not None:
            self._runner.check_abort()

    def get_current_task_id(self) -> str | None:
        """Return the id of the task that the calling thread does, if it does one."""
        task = None if self._runner is None else self._runner.current()
        return None if task is None else str(task.correlation_id)

    def start_autonomous_task(
        self, callback: Callable[[], Any], command_type: str, parameters: dict[str, Any] | None
    ) -> Any:
        """Begin a task that the client wants by itself, on a thread of its own.

        It is on the board as soon as the store can be reached, can be stopped there, and its
        result is delivered as any other. What a killed process had begun so is not begun again.

        Returns:
            scaleout's ``Task``.

        Raises:
            StorageError: the client cannot begin.
        """
        self._bound()
        assert self._runner is not None
        return self._runner.start_own(callback, command_type, parameters)

    # -- the loop ----------------------------------------------------------------------------

    @property
    def link_quality(self) -> Any:
        """The ``LinkQuality``: offline if the store could not be reached last time."""
        quality = self._classes.LinkQuality
        polling = self._polling
        if polling is None or polling.is_reachable is None:
            return quality.HEALTHY
        if not polling.is_reachable:
            return quality.OFFLINE
        return quality.DEGRADED if polling.is_slow else quality.HEALTHY

    def run(self, with_heartbeat: bool = True, with_polling: bool = True) -> None:
        """Do tasks until :meth:`stop`, SIGTERM or an interrupt.

        A store that cannot be reached does not end it: it is asked again, less and less often.

        Args:
            with_heartbeat: give signs of life, by which others know that this client works.
            with_polling: look for tasks. Without it, what was begun or reported is delivered.

        Raises:
            StorageError: the client cannot begin: it has no id, or its folder is unusable.
        """
        self._has_ended = False
        binding = self._bound()
        assert self._runner is not None
        interval = self._poll_interval
        if interval is None:
            interval = float(self._classes.config.SCALEOUT_CLIENT_TASK_POLLING_INTERVAL)
        self._polling = Polling(
            binding,
            self._runner,
            lambda: self._client.name or self._client.client_id,
            interval=interval,
            heartbeat=self._heartbeat_interval if with_heartbeat else None,
            looks_for_tasks=with_polling,
        )
        if self._classes.config.SCALEOUT_CLIENT_SEND_TELEMETRY:
            threading.Thread(target=self._client._default_telemetry_loop, daemon=True).start()
        with ended_by_signal(self._classes.GracefulExitException):
            try:
                if not self._is_offline():
                    self._polling.start()
                while not self._stop.wait(_TICK):
                    pass
            except (KeyboardInterrupt, self._classes.GracefulExitException):
                _log.info("the client stops")
            finally:
                self._shut_down(self._polling)

    def stop(self) -> None:
        """Let :meth:`run` end, from any thread."""
        self._stop.set()

    def _shut_down(self, polling: Polling) -> None:
        assert self._runner is not None
        assert self._binding is not None
        self._client.stop_default_telemetry_loop()
        self._runner.stop(self._shutdown_timeout)
        # A store that does not answer is not waited for: all is on the disk.
        timeout = self._shutdown_timeout
        if polling.is_reachable is False:
            timeout = min(timeout, _TO_THE_UNREACHABLE)
        polling.stop(timeout)
        with self._lock:
            # What a callback that does not end says from now on is refused, not spooled again.
            self._has_ended = True
            binding, self._binding = self._binding, None
            self._stop.clear()
        if not binding.close(timeout):
            _log.warning("some of what this client made is not in the store yet; it is kept")


def _location(uri: str | os.PathLike[str]) -> Location:
    return writable(parse_uri(uri))
