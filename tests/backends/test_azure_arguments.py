"""What reaches the two Azure drivers from a config, a URI and the environment, side by side."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.backends import open_backend
from storage.backends.azure.backend import adlfs_arguments, obstore_arguments
from storage.backends.azure.credentials import Access, find_access
from storage.backends.base import OpenOptions
from storage.backends.network import Network
from storage.config import AzureConfig, resolve_config
from storage.errors import AuthenticationError, ConfigurationError, InvalidInput
from storage.uri import parse_uri

KEY = "a2V5IG9uZQ=="
OTHER_KEY = "a2V5IHR3bw=="
SAS = "sv=2024-01-01&sr=c&sig=a%2Bb%3D"
PLAIN = "azure://container/model"
URL = "https://acct.blob.core.windows.net/container/model"
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=acct;AccountKey={KEY};EndpointSuffix="


def obstore(config: AzureConfig | None, uri: str = PLAIN) -> dict[str, Any]:
    return obstore_arguments(parse_uri(uri), config, OpenOptions())


def adlfs(config: AzureConfig | None, uri: str = PLAIN) -> dict[str, Any]:
    return adlfs_arguments(parse_uri(uri), config)


def access(config: AzureConfig | None, uri: str = PLAIN) -> Access:
    return find_access(parse_uri(uri), config, Network())


def credential(config: AzureConfig | None, uri: str = PLAIN) -> dict[str, Any]:
    found: dict[str, Any] = obstore(config, uri)["credential_provider"]()
    assert found.pop("expires_at") is None
    return found


def test_account_key_reaches_both() -> None:
    config = AzureConfig("acct", KEY)
    assert credential(config) == {"access_key": KEY}
    assert obstore(config)["account_name"] == "acct"
    assert obstore(config)["endpoint"] == "https://acct.blob.core.windows.net"
    arguments = adlfs(config)
    assert (arguments["account_name"], arguments["account_key"]) == ("acct", KEY)
    assert arguments["account_host"] == "acct.blob.core.windows.net"
    assert arguments["anon"] is False


@pytest.mark.parametrize("mark", ["", "?"])
def test_sas_token_reaches_both(mark: str) -> None:
    config = AzureConfig("acct", sas_token=mark + SAS)
    assert credential(config) == {"sas_token": SAS}
    assert adlfs(config)["sas_token"] == SAS
    assert "account_key" not in adlfs(config)


@pytest.mark.parametrize(
    ("text", "account", "endpoint", "found"),
    [
        (f"{CONNECTION}core.windows.net", "acct", "https://acct.blob.core.windows.net", KEY),
        (
            f"{CONNECTION}core.chinacloudapi.cn",
            "acct",
            "https://acct.blob.core.chinacloudapi.cn",
            KEY,
        ),
        (
            f"AccountName=acct;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:10000/acct;",
            "acct",
            "http://127.0.0.1:10000/acct",
            KEY,
        ),
        (
            f"BlobEndpoint=https://acct.blob.core.windows.net/;SharedAccessSignature={SAS}",
            "acct",
            "https://acct.blob.core.windows.net",
            SAS,
        ),
        (f"accountname=acct; accountkey={KEY}", "acct", "https://acct.blob.core.windows.net", KEY),
    ],
    ids=["portal", "china", "emulator", "sas", "short"],
)
def test_connection_string_is_understood(
    text: str, account: str, endpoint: str, found: str
) -> None:
    config = AzureConfig(connection_string=text)
    assert (obstore(config)["account_name"], obstore(config)["endpoint"]) == (account, endpoint)
    assert list(credential(config).values()) == [found]
    assert f"BlobEndpoint={endpoint}" in adlfs(config)["connection_string"]
    assert found in adlfs(config)["connection_string"]


def test_development_storage_is_the_emulator() -> None:
    config = AzureConfig(connection_string="UseDevelopmentStorage=true")
    assert obstore(config)["endpoint"] == "http://127.0.0.1:10000/devstoreaccount1"
    assert obstore(config)["client_options"]["allow_http"] is True
    assert obstore(config)["use_emulator"] is False


@pytest.mark.parametrize("text", ["nonsense", "AccountName=;AccountKey=x", "a=b;c"])
def test_broken_connection_string_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"AzureConfig\.connection_string") as caught:
        access(AzureConfig(connection_string=text))
    assert text not in str(caught.value)


def test_bearer_token_reaches_both() -> None:
    config = AzureConfig("acct", token="bearer")
    assert credential(config) == {"token": "bearer"}
    assert adlfs(config)["credential"].fetch()[0] == "bearer"
    assert "connection_string" not in adlfs(config)


def test_anonymous_sends_nothing() -> None:
    config = AzureConfig("acct", anonymous=True)
    assert obstore(config)["skip_signature"] is True
    assert "credential_provider" not in obstore(config)
    assert adlfs(config)["anon"] is True
    assert not {"account_key", "sas_token", "credential"} & set(adlfs(config))


def test_order_of_credentials_in_a_config() -> None:
    everything = {
        "account_name": "acct",
        "connection_string": f"AccountName=acct;AccountKey={OTHER_KEY}",
        "account_key": KEY,
        "sas_token": SAS,
        "token": "bearer",
    }
    assert access(AzureConfig(**everything, anonymous=True)).anonymous
    for name, found in (
        ("connection_string", {"access_key": OTHER_KEY}),
        ("account_key", {"access_key": KEY}),
        ("sas_token", {"sas_token": SAS}),
        ("token", {"token": "bearer"}),
    ):
        assert credential(AzureConfig(**everything)) == found
        del everything[name]


def test_sas_of_the_url_is_the_credential_for_it() -> None:
    assert credential(None, f"{URL}?{SAS}") == {"sas_token": SAS}
    assert credential(AzureConfig("acct", KEY), f"{URL}?{SAS}") == {"sas_token": SAS}


def test_query_without_a_signature_is_no_credential() -> None:
    assert credential(AzureConfig("acct", KEY), f"{URL}?x=1") == {"access_key": KEY}


@pytest.mark.parametrize("query", ["snapshot=2026-01-01", "comp=metadata", "restype=container"])
def test_url_that_means_no_blob_is_refused(query: str) -> None:
    with pytest.raises(InvalidInput, match="something other than a blob"):
        access(AzureConfig("acct", KEY), f"{URL}?{query}")


@pytest.mark.parametrize(
    ("uri", "account", "endpoint"),
    [
        (URL, "acct", "https://acct.blob.core.windows.net"),
        ("abfss://c@acct.dfs.core.windows.net/m", "acct", "https://acct.blob.core.windows.net"),
        (
            "https://acct.blob.core.usgovcloudapi.net/c/m",
            "acct",
            "https://acct.blob.core.usgovcloudapi.net",
        ),
        (
            "abfss://c@acct.dfs.core.chinacloudapi.cn/m",
            "acct",
            "https://acct.blob.core.chinacloudapi.cn",
        ),
    ],
)
def test_account_and_cloud_of_the_uri(uri: str, account: str, endpoint: str) -> None:
    for config in (AzureConfig(account_key=KEY), AzureConfig("acct", KEY)):
        arguments = obstore(config, uri)
        assert (arguments["account_name"], arguments["endpoint"]) == (account, endpoint)
        assert adlfs(config, uri)["account_host"] == endpoint.removeprefix("https://")


@pytest.mark.parametrize(
    ("endpoint", "account", "expected"),
    [
        ("https://acct.dfs.core.windows.net/", "acct", "https://acct.blob.core.windows.net"),
        ("http://127.0.0.1:1/devstore", "devstore", "http://127.0.0.1:1/devstore"),
        ("https://models.example.com", "models", "https://models.example.com"),
    ],
)
def test_endpoint_of_the_config_names_the_account(
    endpoint: str, account: str, expected: str
) -> None:
    found = access(AzureConfig(account_key=KEY, endpoint_url=endpoint))
    assert (found.account, found.endpoint) == (account, expected)


def test_no_account_anywhere_is_its_own_error_and_not_before_it_is_needed() -> None:
    backend = open_backend(parse_uri(PLAIN), AzureConfig(account_key=KEY), OpenOptions())
    with pytest.raises(ConfigurationError, match="no storage account is known"):
        backend.stat("a")
    with pytest.raises(ConfigurationError, match="no storage account is known"):
        backend.filesystem()
    backend.close()


# --- one account's credential is not another's ------------------------------------------------

FOREIGN = "https://victim.blob.core.windows.net/container/model"


@pytest.mark.parametrize(
    "config",
    [
        AzureConfig("acct", KEY),
        AzureConfig("acct", sas_token=SAS),
        AzureConfig("acct", token="bearer"),
        AzureConfig(connection_string=f"AccountName=acct;AccountKey={KEY}"),
        AzureConfig(
            connection_string="BlobEndpoint=https://acct.blob.core.windows.net;"
            f"SharedAccessSignature={SAS}"
        ),
        AzureConfig(account_key=KEY, endpoint_url="https://acct.blob.core.windows.net"),
    ],
    ids=["key", "sas", "token", "connection-string", "sas-connection-string", "endpoint"],
)
def test_config_of_one_account_never_reaches_another(config: AzureConfig) -> None:
    for make in (obstore, adlfs):
        with pytest.raises(ConfigurationError, match="another account") as caught:
            make(config, FOREIGN)
        assert KEY not in str(caught.value)
        assert "sig=" not in str(caught.value)


def test_config_of_another_account_is_refused_before_a_backend_is_made() -> None:
    with pytest.raises(ConfigurationError, match="another account"):
        resolve_config(parse_uri(FOREIGN), AzureConfig("acct", KEY))


def test_config_of_one_cloud_is_not_used_in_another() -> None:
    config = AzureConfig(account_key=KEY, endpoint_url="https://acct.blob.core.windows.net")
    with pytest.raises(ConfigurationError, match="cloud"):
        obstore(config, "https://acct.blob.core.chinacloudapi.cn/c/m")


def test_account_and_endpoint_of_a_config_have_to_agree() -> None:
    config = AzureConfig("acct", KEY, endpoint_url="https://victim.blob.core.windows.net")
    with pytest.raises(ConfigurationError, match="another account"):
        obstore(config)


@pytest.mark.parametrize(
    "variables",
    [
        {"AZURE_STORAGE_ACCOUNT": "acct", "AZURE_STORAGE_KEY": KEY},
        {"AZURE_STORAGE_ACCOUNT": "acct", "AZURE_STORAGE_SAS_TOKEN": SAS},
        {"AZURE_STORAGE_SAS_TOKEN": SAS},
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=acct;AccountKey={KEY}"},
    ],
    ids=["key", "sas", "sas-without-account", "connection-string"],
)
@pytest.mark.parametrize("config", [None, AzureConfig("victim")], ids=["none", "config"])
def test_environment_of_one_account_never_reaches_another(
    variables: dict[str, str], config: AzureConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = access(config, FOREIGN)
    assert found.endpoint == "https://victim.blob.core.windows.net"
    assert (found.key, found.sas) == (None, None)


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize("account", ["AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"])
@pytest.mark.parametrize(
    "key", ["AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY"]
)
@pytest.mark.parametrize("uri", [PLAIN, URL])
def test_account_key_of_the_environment(
    account: str, key: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(account, "acct")
    monkeypatch.setenv(key, KEY)
    assert credential(None, uri) == {"access_key": KEY}
    assert adlfs(None, uri)["account_key"] == KEY


def test_sas_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acct")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?{SAS}")
    assert credential(None) == {"sas_token": SAS}
    assert credential(AzureConfig("acct")) == {"sas_token": SAS}


def test_connection_string_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"AccountName=acct;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:1/acct",
    )
    assert credential(None) == {"access_key": KEY}
    assert obstore(None)["endpoint"] == "http://127.0.0.1:1/acct"
    assert obstore(None, URL)["endpoint"] == "http://127.0.0.1:1/acct"


def test_credentials_of_the_config_are_not_mixed_with_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING", f"AccountName=acct;AccountKey={OTHER_KEY}"
    )
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", SAS)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    for config, found in (
        (AzureConfig("acct", KEY), {"access_key": KEY}),
        (AzureConfig("acct", token="bearer"), {"token": "bearer"}),
    ):
        assert credential(config) == found
        assert OTHER_KEY not in str(adlfs(config))
    assert obstore(AzureConfig("acct", KEY))["use_emulator"] is False
    assert obstore(AzureConfig("acct", anonymous=True))["skip_signature"] is True


def test_file_system_does_not_take_its_credential_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"AccountName=acct;AccountKey={OTHER_KEY};BlobEndpoint=https://env.example",
    )
    for config in (AzureConfig("mine", token="bearer"), AzureConfig("mine", KEY)):
        backend = open_backend(parse_uri(PLAIN), config, OpenOptions())
        files, path = backend.filesystem()
        assert path == "container"
        assert files.service_client.url.startswith("https://mine.blob.core.windows.net")
        backend.close()


# --- the network ------------------------------------------------------------------------------


def test_one_call_is_one_attempt() -> None:
    assert obstore(AzureConfig("acct", KEY))["retry_config"] == {"max_retries": 0}


def test_time_outs_reach_obstore() -> None:
    options = OpenOptions(connections=7, connect_timeout=3, stall_timeout=4)
    arguments = obstore_arguments(parse_uri(PLAIN), AzureConfig("acct", KEY), options)
    client = arguments["client_options"]
    assert client["connect_timeout"] == timedelta(seconds=3)
    assert client["read_timeout"] == timedelta(seconds=4)
    assert client["pool_max_idle_per_host"] == "7"


def test_proxy_and_certificates_reach_obstore(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(b"PEM")
    config = AzureConfig("acct", KEY, ca_bundle=str(bundle), proxy="http://proxy:3128")
    client = obstore(config)["client_options"]
    assert client["root_certificate"] == b"PEM"
    assert client["proxy_url"] == "http://proxy:3128"
    assert client["allow_http"] is False
    assert obstore(AzureConfig("acct", KEY, verify_ssl=False))["client_options"][
        "allow_invalid_certificates"
    ]


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_of_the_environment(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(b"PEM")
    monkeypatch.setenv(variable, str(bundle))
    assert obstore(AzureConfig("acct", KEY))["client_options"]["root_certificate"] == b"PEM"


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
def test_missing_ca_bundle_is_named(driver: Any) -> None:
    config = AzureConfig("acct", KEY, ca_bundle="/no/such/ca.pem", driver=driver)
    backend = open_backend(parse_uri(PLAIN), config, OpenOptions())
    with pytest.raises(ConfigurationError, match=r"/no/such/ca\.pem"):
        backend.stat("a")
    backend.close()


def test_bearer_token_is_not_sent_without_tls() -> None:
    config = AzureConfig(token="bearer", endpoint_url="http://127.0.0.1:1/acct")
    for make in (obstore, adlfs):
        with pytest.raises(ConfigurationError, match="https only"):
            make(config)


# --- identities -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (AzureConfig("acct"), "DefaultAzureCredential"),
        (AzureConfig("acct", managed_identity=True), "ManagedIdentityCredential"),
        (AzureConfig("acct", managed_identity=True, client_id="c"), "ManagedIdentityCredential"),
        (
            AzureConfig("acct", tenant_id="t", client_id="c", client_secret="s"),
            "ClientSecretCredential",
        ),
        (
            AzureConfig("acct", tenant_id="t", client_id="c", federated_token_file="/token"),
            "WorkloadIdentityCredential",
        ),
    ],
    ids=["ambient", "system-identity", "user-identity", "secret", "workload"],
)
def test_identity_is_that_of_the_config(config: AzureConfig, kind: str) -> None:
    from storage.backends.azure.tokens import _credential

    made = _credential(config, Network(), "windows.net")
    assert type(made).__name__ == kind
    made.close()
    assert obstore(config)["credential_provider"] is not None
    assert type(adlfs(config)["credential"]).__name__ == "Tokens"


@pytest.mark.parametrize(
    ("config", "domain", "variable", "expected"),
    [
        (AzureConfig("a"), "windows.net", None, None),
        (AzureConfig("a"), "chinacloudapi.cn", None, "https://login.chinacloudapi.cn"),
        (AzureConfig("a"), "usgovcloudapi.net", None, "https://login.microsoftonline.us"),
        (AzureConfig("a"), "chinacloudapi.cn", "https://env.example", "https://env.example"),
        (
            AzureConfig("a", authority_host="https://own.example"),
            "windows.net",
            "https://env.example",
            "https://own.example",
        ),
    ],
)
def test_authority_of_the_cloud(
    config: AzureConfig,
    domain: str,
    variable: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from storage.backends.azure.tokens import _identity_arguments

    if variable is not None:
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", variable)
    arguments = _identity_arguments(config, Network("http://proxy:1", "/ca.pem"), domain)
    assert arguments.get("authority") == expected
    assert arguments.get("disable_instance_discovery", False) is ("example" in str(expected))
    assert arguments["proxies"] == {"http": "http://proxy:1", "https": "http://proxy:1"}
    assert arguments["connection_verify"] == "/ca.pem"
    unchecked = _identity_arguments(config, Network(verify=False), domain)
    assert unchecked["connection_verify"] is False


def test_secret_without_its_principal_is_named() -> None:
    tokens = access(AzureConfig("acct", client_secret="s")).tokens
    assert tokens is not None
    with pytest.raises(ConfigurationError, match="tenant_id and client_id"):
        tokens.fetch()


def test_no_credentials_anywhere_is_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # No command of a cloud may answer, and the metadata service of a cloud machine not either.
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")
    tokens = access(AzureConfig("acct")).tokens
    assert tokens is not None
    with pytest.raises(AuthenticationError, match="anonymous=True"):
        tokens.fetch()
    tokens.close()


def test_tokens_and_file_systems_can_be_sent_to_workers() -> None:
    tokens = access(AzureConfig("acct", token="bearer")).tokens
    assert pickle.loads(pickle.dumps(tokens)).fetch() == tokens.fetch()  # type: ignore[union-attr]


def test_nothing_of_a_credential_is_shown() -> None:
    for config in (AzureConfig("acct", KEY), AzureConfig("acct", sas_token=SAS)):
        text = repr(access(config))
        assert KEY not in text
        assert "sig=" not in text
    assert "password" not in repr(Network("http://user:password@proxy:1"))
