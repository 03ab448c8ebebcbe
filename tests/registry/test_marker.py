"""Making a registry: on no store that ignores conditions, whoever else does it, or dies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage import StorageClient, UnsupportedOperation
from storage.backends.base import Backend, Payload
from storage.backends.memory import MemoryBackend
from storage.registry import ModelRegistry, layout
from storage.uri import Location
from tests.facade.stores import MemoryStore


class Killed(BaseException):
    """Stands for the end of the process."""


class Client(StorageClient):
    """A client of memory that calls ``after`` with the number of each write or removal."""

    def __init__(self, fit: bool) -> None:
        super().__init__()
        self.fit = fit
        self.calls = 0
        self.after: Callable[[int], object] = lambda call: None

    def backend(self, location: Location, config: Any = None, *, durable: bool = False) -> Backend:
        return _Backend(location.bucket, self)

    def called(self) -> None:
        self.calls += 1
        self.after(self.calls)


class _Backend(MemoryBackend):
    def __init__(self, bucket: str, client: Client) -> None:
        super().__init__(bucket)
        self._client = client

    def write(self, key: str, payload: Payload, **options: Any) -> Any:
        if not self._client.fit:
            options["if_absent"] = False
        info = super().write(key, payload, **options)
        self._client.called()
        return info

    def delete(self, keys: Any) -> None:
        super().delete(keys)
        self._client.called()


@pytest.fixture(params=[True, False], ids=["fit", "unfit"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(request.param) as client:
        yield client


def init(registry: ModelRegistry) -> None:
    """Make it, or be told why not."""
    if registry.client.fit:  # type: ignore[attr-defined]
        registry.init()
        return
    with pytest.raises(UnsupportedOperation, match="keep the registry on another store"):
        registry.init()


def test_of_two_who_make_a_registry_at_once_both_are_told_the_same(client: Client) -> None:
    for step in itertools.count(1):
        registry = ModelRegistry(MemoryStore().base, client=client)
        other = ModelRegistry(str(registry.location), client=client)

        def overtake(call: int, other: ModelRegistry = other, step: int = step) -> None:
            if call == step:
                init(other)

        client.calls, client.after = 0, overtake
        init(registry)
        client.after = lambda call: None
        assert registry.store.names("") == ([layout.MARKER] if client.fit else [])
        if client.calls < step:
            break
    assert step > 3


def test_whoever_dies_while_he_makes_a_registry_is_in_nobodys_way(client: Client) -> None:
    for step in itertools.count(1):
        registry = ModelRegistry(MemoryStore().base, client=client)

        def die(call: int, step: int = step) -> None:
            # Nothing of what he does on his way out reaches the store.
            if call >= step:
                raise Killed

        client.calls, client.after = 0, die
        try:
            init(registry)
        except Killed:
            client.after = lambda call: None
            assert client.fit or not registry.exists()
            init(ModelRegistry(str(registry.location), client=client))
            assert registry.exists() == client.fit
        else:
            break
    assert step > 3
