"""A store with the first version of a model, and a client for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from storage import (
    StorageClient,
)
from tests.facade.stores import S3Store, Store
from tests.facade.watcher.support import put_version


@pytest.fixture
def s3(make_store: Callable[[str], Store]) -> S3Store:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    put_version(store, 1)
    return store


@pytest.fixture
def client(s3: S3Store) -> Iterator[StorageClient]:
    with StorageClient(s3.config) as client:
        yield client
