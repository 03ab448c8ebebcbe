"""Which account and which cloud a credential of Azure's may be sent to."""

from __future__ import annotations

import pytest

from storage.backends.azure.credentials import Access, find_access
from storage.backends.network import Network
from storage.config import AzureConfig
from storage.errors import ConfigurationError, TransientError
from storage.uri import parse_uri
from tests.servers.odd_http import OddHTTP, Reply

KEY = "a2V5IG9uZQ=="
SAS = "sv=2024-01-01&sr=c&sig=a%2Bb%3D"
PLAIN = "azure://container/model"
URL = "https://acct.blob.core.windows.net/container/model"
FOREIGN = "https://victim.blob.core.windows.net/container/model"


def access(config: AzureConfig | None, uri: str = PLAIN) -> Access:
    return find_access(parse_uri(uri), config, Network())


def test_connection_string_of_one_cloud_is_not_used_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = f"AccountName=acct;AccountKey={KEY};EndpointSuffix=core.usgovcloudapi.net"
    with pytest.raises(ConfigurationError, match="cloud"):
        access(AzureConfig(connection_string=text), URL)
    assert access(AzureConfig(connection_string=text)).key == KEY
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    assert access(None, URL).key is None
    assert access(None, URL.replace("windows.net", "usgovcloudapi.net")).key == KEY


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:10000/acct", "https://acct.privatelink.blob.core.windows.net"],
    ids=["emulator", "private-link"],
)
def test_address_of_one_account_is_not_used_for_another(endpoint: str) -> None:
    config = AzureConfig(sas_token=SAS, endpoint_url=endpoint)
    assert access(config, URL).endpoint == endpoint
    with pytest.raises(ConfigurationError, match="another account"):
        access(config, FOREIGN)


def test_address_of_another_account_in_the_environment_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "https://victim.blob.core.windows.net")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    found = access(AzureConfig("acct"))
    assert (found.endpoint, found.key) == ("https://acct.blob.core.windows.net", None)
    assert access(None).account == "victim"


def test_authority_is_that_of_the_cloud_that_the_config_names() -> None:
    endpoint = "https://acct.blob.core.chinacloudapi.cn"
    config = AzureConfig(
        "acct", endpoint_url=endpoint, tenant_id="t", client_id="c", client_secret="s"
    )
    tokens = access(config).tokens
    assert tokens is not None
    assert tokens._parts[2] == "chinacloudapi.cn"


def test_secret_header_is_for_the_endpoint_of_the_environment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from storage.backends.azure.tokens import _header_for

    monkeypatch.setenv("IDENTITY_HEADER", "secret-header")
    assert _header_for("http://127.0.0.1:1/msi/token") == "secret-header"
    monkeypatch.setenv("IDENTITY_ENDPOINT", "http://127.0.0.1:1/msi/token")
    assert _header_for("http://127.0.0.1:1/msi/token") == "secret-header"
    assert _header_for("http://127.0.0.1:2/msi/token") is None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_metadata_service_that_is_busy_may_be_asked_again(status: int) -> None:
    with OddHTTP(lambda request: Reply(status, b"", {"Retry-After": "7"})) as server:
        config = AzureConfig("acct", managed_identity=True, msi_endpoint=server.url)
        tokens = access(config).tokens
        assert tokens is not None
        with pytest.raises(TransientError) as caught:
            tokens.fetch()
        assert len(server.requests) == 1
    assert caught.value.retry_after == 7
