"""The stores that programs with this library in them work on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.facade.stores import (
    AzureStore,
    BucketStore,
    FileStore,
    GCSStore,
    HubStore,
    PVCStore,
    S3Store,
    Store,
)
from tests.servers import Azurite, FakeGCS, Hub


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where claims are mounted."""
    return tmp_path_factory.mktemp("mounts")


@pytest.fixture(scope="session")
def store_settings(
    mounts: Path, gcs_server: FakeGCS, azurite: Azurite, hub_server: Hub
) -> dict[str, dict[str, str]]:
    """The settings of all stores but S3, by name."""
    return {
        "gs": {"prefix": "gs://shared/", "token": "any", "endpoint_url": gcs_server.endpoint},
        "azure": {
            "prefix": "azure://shared/",
            "account_name": azurite.main.name,
            "account_key": azurite.main.key,
            "endpoint_url": azurite.account_url(),
        },
        "hub": {
            "prefix": "hf://owner",
            "token": hub_server.writer.token,
            "endpoint": hub_server.url,
        },
        "claims": {"prefix": "pvc://claim", "mount_root": str(mounts)},
    }


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, mounts: Path, prefix: str) -> Store:
    """A store with a fresh, empty place."""
    kind: str = request.param
    get = request.getfixturevalue
    if kind == "file":
        return FileStore(tmp_path / "the store")
    if kind == "pvc":
        return PVCStore(mounts, "claim", prefix)
    if kind == "hub":
        return HubStore(get("hub"))
    make: type[BucketStore]
    make, server, bucket = {
        "s3": (S3Store, "seaweedfs", "shared_bucket"),
        "gs": (GCSStore, "gcs_server", "gcs_shared_bucket"),
        "azure": (AzureStore, "azurite", "azurite_shared_container"),
    }[kind]
    return make(kind, get(server), "", get(bucket), prefix, None)
