"""Registries in memory whose users halt before each call to the store, and go on when told to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from blake3 import blake3

from storage import StorageClient
from storage.backends.memory import MemoryBackend, _Bucket
from storage.config import load_settings
from storage.registry import ModelRegistry, layout
from storage.registry.documents import Version, decode
from storage.registry.leases import condemned

__all__ = ["Actor", "KilledError", "World", "schedules"]

T = TypeVar("T")

_TIMEOUT = 60
_CALLS = ("stat", "list", "read", "write", "delete")
_numbers = itertools.count(1)


class KilledError(BaseException):
    """Ends an actor as SIGKILL would: what it does on its way out does not reach the store."""


class World:
    """A registry in memory that can be looked at as it is, and copied."""

    def __init__(self, objects: dict[str, Any] | None = None) -> None:
        self.bucket = f"stepping-{next(_numbers)}"
        self.uri = f"memory://{self.bucket}/r"
        if objects is None:
            ModelRegistry(self.uri, client=client()).init()
        else:
            MemoryBackend._buckets[self.bucket] = _Bucket(dict(objects))

    def copy(self) -> World:
        return World(self._objects)

    def close(self) -> None:
        MemoryBackend.clear(self.bucket)

    @property
    def _objects(self) -> dict[str, Any]:
        return MemoryBackend._buckets[self.bucket].objects

    @property
    def registry(self) -> ModelRegistry:
        """The registry, without halts."""
        return ModelRegistry(self.uri, client=client())

    def names(self, prefix: str = "") -> set[str]:
        """Return the names of the objects that are there."""
        there = (key.removeprefix("r/") for key in list(self._objects))
        return {name for name in there if name.startswith(prefix)}

    def data(self, name: str) -> bytes:
        return bytes(self._objects[f"r/{name}"].data)

    def is_deleted(self, number: int, model: str = "m") -> bool:
        return layout.deleted(model, number) in self.names()

    def visible(self) -> dict[tuple[str, int], Version]:
        """Return the versions that a reader sees; each has to be whole."""
        found = {}
        for name in self.names(layout.MODELS):
            _, model, kind, *_ = name.split("/")
            if kind != "versions":
                continue
            version = Version.parse(self.data(name), name)
            if not self.is_deleted(version.number, model):
                assert (version.model, layout.version(model, version.number)) == (model, name)
                self.check_blobs(version)
                found[model, version.number] = version
        return found

    def check_blobs(self, version: Version) -> None:
        there = self.names(layout.BLOBS)
        for file in version.files:
            assert file.name in there, f"version {version.number} lacks {file.path}"
            data = self.data(file.name)
            assert (len(data), blake3(data).hexdigest()) == (file.size, file.blake3)

    def check(self) -> dict[tuple[str, int], Version]:
        """Check that all is right that holds at any moment; return the versions."""
        commits: dict[tuple[str, int], str] = {}
        for name in self.names(layout.MODELS):
            _, model, kind, *_ = name.split("/")
            if kind != "contents":
                continue
            document = decode(self.data(name), name)
            if "revoked" in document:
                continue
            version = Version.read(document, name)
            key = model, version.number
            assert key not in commits, f"number {key} is {name} and {commits[key]}"
            commits[key] = name
            if not self.is_deleted(version.number, model):
                # Seen or not: whoever publishes the same gets it.
                self.check_blobs(version)
        visible = self.visible()
        assert visible.keys() <= commits.keys()
        contents = [(version.model, version.content) for version in visible.values()]
        assert len(set(contents)) == len(contents), "a content has two numbers"
        return visible

    def check_collected(self) -> None:
        """Collect, and check that all is there that is needed, and nothing else."""
        self.registry.gc(grace=0)
        # What publishers have lost to others, or to the collector before.
        self.registry.gc(grace=0)
        needed = {name for version in self.check().values() for name in version.blobs}
        assert self.names(layout.BLOBS) == needed
        assert not self.names(layout.UPLOADS)
        assert not self.names(layout.COLLECTIONS)
        assert not condemned(self.registry.store)


class Actor(Generic[T]):
    """Somebody who uses a registry, in a thread of his own; halts before each call to the store.

    Attributes:
        calls: method and key of each call that was made.
        next: of the call before which it halts.
        result: what the work returned.
        error: what it raised.
    """

    def __init__(self, world: World, work: Callable[[ModelRegistry], T]) -> None:
        self.world = world
        self.calls: list[tuple[str, str]] = []
        self.next = ("", "")
        self.result: T | None = None
        self.error: BaseException | None = None
        self.killed = False
        self.gone_before: set[str] = set()
        self._work = work
        self._allowed = 0
        self._state = threading.Condition()
        self._halted = self._ended = False
        self._registry = ModelRegistry(world.uri, client=client(self))
        self._thread: threading.Thread | None = None

    def run(self, calls: int | None = None) -> None:
        """Go on until before the call after the next ``calls``, or to the end."""
        with self._state:
            if self._ended:
                return
            self._allowed = 1 << 60 if calls is None else self._allowed + calls
            self._halted = False
            self._state.notify_all()
            if self._thread is None:
                # What was deleted before he came, he cannot get.
                self.gone_before = self.world.names(layout.deletions("m"))
                self._thread = threading.Thread(target=self._live, daemon=True)
                self._thread.start()
            done = self._state.wait_for(lambda: self._halted or self._ended, _TIMEOUT)
        assert done, f"an actor hangs after {self.calls[-3:]}"
        if self._ended:
            self._thread.join()
            unexpected = self.error if not isinstance(self.error, Exception | KilledError) else None
            assert unexpected is None, unexpected

    @property
    def has_ended(self) -> bool:
        return self._ended

    def run_until(self, method: str, part: str) -> None:
        """Go on until before a call of ``method`` for a key that has ``part`` in it."""
        while self.next[0] != method or part not in self.next[1]:
            assert not self._ended, f"there was no {method} {part}"
            self.run(1)

    def kill(self) -> None:
        """Let it die where it is."""
        self.killed = True
        self.run()

    def _live(self) -> None:
        try:
            self.result = self._work(self._registry)
        except BaseException as exc:  # noqa: BLE001 -- told to whoever waits
            self.error = exc
        with self._state:
            self._ended = True
            self._state.notify_all()

    def before(self, method: str, key: str) -> None:
        """Wait before a call."""
        with self._state:
            self.next = (method, key)
            while len(self.calls) >= self._allowed:
                self._halted = True
                self._state.notify_all()
                if not self._state.wait(_TIMEOUT):
                    raise KilledError
            if self.killed:
                raise KilledError
            self.calls.append((method, key))


class _Halting:
    """A backend that tells an actor about each call, before it is made."""

    def __init__(self, backend: Any, actor: Actor[Any]) -> None:
        self._backend = backend
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in _CALLS:
            return found

        def call(*args: Any, **options: Any) -> Any:
            key = args[0] if args else ""
            self._actor.before(name, key if isinstance(key, str) else ",".join(key))
            return found(*args, **options)

        return self._pages if name == "list" else call

    def _pages(self, prefix: str = "") -> Iterator[Any]:
        """List as stores do: page by page, each as things are then."""
        last = ""
        for page in itertools.count():
            if page < 2:
                self._actor.before("list", f"{prefix} page {page}")
            there = [info for info in self._backend.list(prefix) if info.key > last]
            # The second page is the rest.
            some = there[: (len(there) + 1) // 2] if page == 0 else there
            yield from some
            if len(some) == len(there):
                return
            last = some[-1].key


class _Client(StorageClient):
    actor: Actor[Any] | None = None

    def backend(self, *args: Any, **options: Any) -> Any:
        found = super().backend(*args, **options)
        return found if self.actor is None else _Halting(found, self.actor)


def client(actor: Actor[Any] | None = None) -> StorageClient:
    """Return a client for ``actor``, which does one thing at a time."""
    made = _Client(settings=_settings())
    made.actor = actor
    return made


def _settings() -> Any:
    global _loaded
    if _loaded is None:
        _loaded = load_settings(transfer={"connections": 1})
    return _loaded


_loaded: Any = None


def schedules(first: int, second: int, stride: int = 1) -> Iterator[tuple[bool, int, int]]:
    """Yield all ways in which two actors interrupt each other once.

    Args:
        first: calls of one of them when he is alone.
        second: calls of the other one.
        stride: only every so manyth.

    Yields:
        Whether they change places; the calls of who begins before he is interrupted; and of the
        other one, before the first goes on to the end.
    """
    ways = [
        (swapped, before, between)
        for swapped, one, other in ((False, first, second), (True, second, first))
        for before in range(one + 1)
        for between in range(1, other + 1)
    ]
    yield from ways[::stride]
