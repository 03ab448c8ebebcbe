"""What batches in threads of this process open is closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage.client.mirror import batch as batches


@pytest.fixture(scope="module", autouse=True)
def _workers_of_this_process() -> Iterator[None]:
    """Close what batches in threads of this process opened: a server waits for its clients."""
    yield
    for client in batches._clients.values():
        client.close()
