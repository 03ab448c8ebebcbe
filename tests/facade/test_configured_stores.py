"""Every store with credentials, reached through each place that a config may come from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage import Storage, StorageClient, StorageOperations
from storage.config import load_settings
from storage.errors import AuthenticationError, BucketMissingError
from tests.servers import CountingProxy, SeaweedFS
from tests.servers.azurite import Azurite
from tests.servers.gcs import FakeGCS
from tests.servers.hub import Hub
from tests.servers.nginx_http import PASSWORD, USER, NginxHTTP, put_file

DATA = b"weights"


@dataclass(frozen=True)
class Place:
    """An object that only the right fields of a config reach.

    Attributes:
        other: fields of a config of somebody else.
        sent: what the request of the right one has in its ``Authorization``.
    """

    uri: str
    endpoint: str
    fields: dict[str, Any]
    other: dict[str, Any]
    sent: str


def _s3(request: pytest.FixtureRequest, prefix: str) -> Place:
    server: SeaweedFS = request.getfixturevalue("seaweedfs")
    bucket = request.getfixturevalue("shared_bucket")
    server.put_raw(bucket, f"{prefix}/m", DATA)

    def fields(access: str, secret: str) -> dict[str, Any]:
        keys = {"access_key_id": access, "secret_access_key": secret}
        return {**keys, "endpoint_url": server.endpoint, "region": "us-east-1"}

    return Place(
        f"s3://{bucket}/{prefix}/m",
        server.endpoint,
        fields(server.access_key, server.secret_key),
        fields("AKIDSTRANGER", "SECRETSTRANGER"),
        f"Credential={server.access_key}/",
    )


def _gs(request: pytest.FixtureRequest, prefix: str) -> Place:
    server: FakeGCS = request.getfixturevalue("gcs_server")
    bucket = request.getfixturevalue("gcs_shared_bucket")
    server.put_raw(bucket, f"{prefix}/m", DATA)
    fields = {"token": "the-right-one", "project_id": "p", "endpoint_url": server.endpoint}
    return Place(
        f"gs://{bucket}/{prefix}/m",
        server.endpoint,
        fields,
        fields | {"token": "another"},
        "Bearer the-right-one",
    )


def _azure(request: pytest.FixtureRequest, prefix: str) -> Place:
    server: Azurite = request.getfixturevalue("azurite")
    container = request.getfixturevalue("azurite_shared_container")
    server.put_raw(container, f"{prefix}/m", DATA)

    def fields(key: str) -> dict[str, Any]:
        name = {"account_name": server.main.name, "account_key": key}
        return {**name, "endpoint_url": server.account_url()}

    return Place(
        f"azure://{container}/{prefix}/m",
        server.endpoint,
        fields(server.main.key),
        fields(server.other.key),
        f"SharedKey {server.main.name}:",
    )


def _hf(request: pytest.FixtureRequest, prefix: str) -> Place:
    hub: Hub = request.getfixturevalue("hub")
    repo = hub.repo(f"owner/{prefix[-20:]}", private=True)
    hub.put(repo, {"m": DATA})
    return Place(
        f"hf://{repo.id}/m",
        hub.url,
        {"token": hub.writer.token, "endpoint": hub.url},
        {"token": hub.reader.token, "endpoint": hub.url},
        f"Bearer {hub.writer.token}",
    )


def _http(request: pytest.FixtureRequest, prefix: str) -> Place:
    server: NginxHTTP = request.getfixturevalue("nginx_http")
    put_file(server.data, f"{prefix}/m", DATA)
    return Place(
        f"{server.odd}/private/{prefix}/m",
        server.odd,
        {"username": USER, "password": PASSWORD},
        {"username": USER, "password": "another"},
        "Basic ",
    )


STORES: dict[str, Callable[[pytest.FixtureRequest, str], Place]] = {
    "s3": _s3,
    "gs": _gs,
    "azure": _azure,
    "hf": _hf,
    "http": _http,
}


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(request: pytest.FixtureRequest, kind: str, prefix: str) -> Place:
    return STORES[kind](request, prefix)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def folder_of(uri: str) -> str:
    return uri.rpartition("/")[0] + "/"


def refuses(kind: str) -> bool:
    # The one server that takes any token.
    return kind != "gs"


def test_settings_give_each_prefix_its_config(kind: str, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"

    def entry(name: str, prefix: str, fields: dict[str, Any]) -> str:
        lines = [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
        return "\n".join([f"[stores.{name}]", f"prefix = {json.dumps(prefix)}", *lines, ""])

    root = place.uri[: place.uri.index("/", place.uri.index("://") + 3) + 1]
    if kind == "hf":
        root = "hf://owner/"
    file.write_text(
        entry("all", root, place.other) + entry("mine", folder_of(place.uri), place.fields)
    )
    with StorageClient(settings=load_settings(file)) as client:
        assert read(client.download(place.uri, tmp_path / "m")) == DATA
    if refuses(kind):
        file.write_text(entry("all", root, place.other))
        with (
            StorageClient(settings=load_settings(file)) as client,
            pytest.raises((AuthenticationError, BucketMissingError)),
        ):
            client.download(place.uri, tmp_path / "n")


def test_kserve_config_is_used_where_its_type_fits(
    kind: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps({"type": kind, **place.fields}))
    before = dict(os.environ)
    with StorageClient() as client:
        assert read(client.download(place.uri, tmp_path / "m")) == DATA
        if refuses(kind):
            # What the call says goes before.
            with pytest.raises((AuthenticationError, BucketMissingError)):
                client.download(place.uri, tmp_path / "n", config=place.other)
    assert dict(os.environ) == before


def test_two_configs_of_one_store_work_in_one_process(
    kind: str, place: Place, tmp_path: Path
) -> None:
    for number in range(3):
        assert (
            read(Storage.download(place.uri, tmp_path / f"{number}", config=place.fields)) == DATA
        )
        if refuses(kind):
            with pytest.raises((AuthenticationError, BucketMissingError)):
                Storage.download(place.uri, tmp_path / f"other-{number}", config=place.other)
    described = StorageOperations.get_object_metadata(place.uri, config=place.fields)
    assert described["size"] == len(DATA)


def test_requests_go_through_the_proxy_of_the_config_with_the_credentials(
    kind: str,
    place: Place,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    proxy = counting_proxy(place.endpoint)
    config = place.fields | {"proxy": proxy.endpoint}
    assert read(Storage.download(place.uri, tmp_path / "m", config=config)) == DATA
    assert proxy.requests
    assert any(place.sent in request.headers.get("authorization", "") for request in proxy.requests)
