"""Downloads that have to fail well: an error of its own, one line, no secret, no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.client import StorageClient
from storage.config import S3Config
from tests.servers import SeaweedFS
from tests.transfer.support import assert_clear, everything_in

ACCESS = "AKIDCANARY5D0C"
SECRET = "canary-secret-71f3a09c"
TOKEN = "canary-token-e4b855d2"
QUERY = "canary-query-0a6be1f7"
CANARIES = (SECRET, TOKEN, QUERY)
DRIVERS = ("obstore", "fsspec")
ATTEMPTS = 2


def good(server: SeaweedFS, driver: str, endpoint: str | None = None) -> S3Config:
    return S3Config(
        server.access_key,
        server.secret_key,
        endpoint_url=endpoint or server.endpoint,
        driver=driver,  # type: ignore[arg-type]
    )


def fails(
    client: StorageClient,
    kind: type[Exception],
    uri: str,
    dest: Path,
    **options: Any,
) -> Exception:
    """Download, check that it fails well, and return the error."""
    place = dest
    while not place.is_dir():
        place = place.parent
    before = everything_in(place)
    with pytest.raises(kind) as caught:
        client.download(uri, dest, **options)
    assert type(caught.value) is kind
    assert_clear(caught.value, *CANARIES)
    assert everything_in(place) == before
    return caught.value
