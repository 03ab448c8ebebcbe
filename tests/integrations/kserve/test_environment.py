"""KServe's variables become typed configs, limits and patterns; none is ever written."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.config import AzureConfig, GCSConfig, GitConfig, HFConfig, OCIConfig, S3Config
from storage.errors import ConfigurationError
from storage.integrations.kserve.authorities import Authorities
from storage.integrations.kserve.environment import Environment
from storage.uri import parse_uri
from tests.integrations.kserve.support import config_for, configs_for

BLOB = "https://modelsacct.blob.core.windows.net/container/model"


@pytest.mark.parametrize(
    ("variables", "fields"),
    [
        ({"AWS_ENDPOINT_URL": "http://m:9000"}, {"endpoint_url": "http://m:9000"}),
        ({"S3_ENDPOINT": "m:9000"}, {"endpoint_url": "https://m:9000"}),
        ({"S3_ENDPOINT": "m:9000", "S3_USE_HTTPS": "1"}, {"endpoint_url": "https://m:9000"}),
        ({"S3_ENDPOINT": "m:9000", "S3_USE_HTTPS": "0"}, {"endpoint_url": "http://m:9000"}),
        ({"S3_ENDPOINT": "http://m"}, {"endpoint_url": "http://m"}),
        (
            {"S3_ENDPOINT": "m", "S3_USE_HTTPS": "0", "AWS_ENDPOINT_URL": "https://n"},
            {"endpoint_url": "https://n"},
        ),
        ({"AWS_DEFAULT_REGION": "eu-west-1", "AWS_REGION": "us-west-2"}, {"region": "eu-west-1"}),
        ({"S3_VERIFY_SSL": "0"}, {"verify_ssl": False}),
        ({"S3_VERIFY_SSL": "False"}, {"verify_ssl": False}),
        ({"awsAnonymousCredential": "True"}, {"anonymous": True}),
        ({"AWS_ANONYMOUS_CREDENTIAL": "true"}, {"anonymous": True}),
        ({"S3_USER_VIRTUAL_BUCKET": "true"}, {"addressing_style": "virtual"}),
        ({"S3_USE_VIRTUAL_BUCKET": "1"}, {"addressing_style": "virtual"}),
        ({"S3_USE_ACCELERATE": "true"}, {"use_accelerate": True}),
        (
            {"S3_CONNECT_TIMEOUT": "3", "S3_READ_TIMEOUT": "4"},
            {"connect_timeout": 3.0, "read_timeout": 4.0},
        ),
    ],
)
def test_variables_of_s3(variables: Mapping[str, str], fields: Mapping[str, Any]) -> None:
    config = config_for("s3://bucket/model", variables)

    assert isinstance(config, S3Config)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"S3_VERIFY_SSL": "1", "awsAnonymousCredential": "false", "S3_USER_VIRTUAL_BUCKET": "0"},
        {"S3_VERIFY_SSL": "", "S3_ENDPOINT": " "},
        {"S3_USE_HTTPS": "0"},
    ],
)
def test_what_says_nothing_leaves_all_to_the_chain_of_aws(variables: Mapping[str, str]) -> None:
    assert config_for("s3://bucket/model", variables) is None


def test_a_secret_goes_before_the_variables_field_by_field() -> None:
    stored = {"type": "s3", "access_key_id": "a", "secret_access_key": "b", "verify_ssl": "0"}
    config = config_for(
        "s3://bucket/model",
        {
            "AWS_ENDPOINT_URL": "http://from.variable",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "STORAGE_CONFIG": json.dumps(stored),
            "STORAGE_OVERRIDE_CONFIG": '{"region": "eu-north-1", "bucket": "x"}',
        },
    )

    assert isinstance(config, S3Config)
    assert (config.endpoint_url, config.region) == ("http://from.variable", "eu-north-1")
    assert config.secret_access_key is not None
    assert config.secret_access_key.get_secret_value() == "b"
    assert not config.verify_ssl


def test_a_secret_for_another_store_is_not_used() -> None:
    stored = json.dumps({"type": "gs", "token": "of-google"})

    assert config_for("s3://bucket/model", {"STORAGE_CONFIG": stored}) is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("S3_MAX_ATTEMPTS", "many"),
        ("S3_MAX_FILE_CONCURRENCY", "0"),
        ("S3_MAX_FILE_CONCURRENCY", "-1"),
        ("S3_MAX_ATTEMPTS", "9" * 5000),
    ],
)
def test_a_limit_that_is_none_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=variable):
        Environment({variable: value}).settings(parse_uri("s3://bucket/model"))


def test_an_endpoint_without_a_scheme_is_named() -> None:
    with pytest.raises(ConfigurationError, match="AWS_ENDPOINT_URL"):
        config_for("s3://bucket/model", {"AWS_ENDPOINT_URL": "minio:9000"})


@pytest.mark.parametrize(
    ("uri", "variables", "attempts", "connections"),
    [
        ("s3://b/m", {"S3_MAX_ATTEMPTS": "0"}, 1, 16),
        ("s3://b/m", {"S3_MAX_ATTEMPTS": "7", "S3_MAX_FILE_CONCURRENCY": "2"}, 8, 20),
        ("s3://b/m", {"S3_MAX_FILE_CONCURRENCY": "1000"}, 5, 1024),
        ("gs://b/m", {"S3_MAX_FILE_CONCURRENCY": "2"}, 5, 16),
        (BLOB, {"AZURE_MAX_FILE_CONCURRENCY": "3"}, 5, 12),
        (BLOB, {"AZURE_MAX_CHUNK_CONCURRENCY": "8"}, 5, 32),
    ],
)
def test_limits_are_those_of_the_store(
    uri: str, variables: Mapping[str, str], attempts: int, connections: int
) -> None:
    transfer = Environment(variables).settings(parse_uri(uri)).transfer

    assert (transfer.attempts, transfer.connections) == (attempts, connections)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("*.bin", ("*.bin",)),
        (" *.a , b/* ,", ("*.a", "b/*")),
        ('["*.a", "b,c", " "]', ("*.a", "b,c")),
        ('"*.a"', ("*.a",)),
        ("[1]*", ("[1]*",)),
        ("", None),
        (" , ", None),
        ("[]", None),
    ],
)
def test_patterns_are_json_or_separated_by_commas(text: str, patterns: object) -> None:
    found = Environment({"STORAGE_ALLOW_PATTERNS": text}).patterns(None, None)

    assert found.allow == patterns
    assert found.ignore is None


def test_patterns_of_a_call_go_before_the_variables() -> None:
    environment = Environment({"STORAGE_ALLOW_PATTERNS": "a", "STORAGE_IGNORE_PATTERNS": "b"})

    assert environment.patterns(["c"], None).allow == ("c",)
    assert environment.patterns(["c"], None).ignore == ("b",)
    assert environment.patterns([], []).active is False


@pytest.mark.parametrize(
    ("variables", "fields"),
    [
        ({"AZURE_STORAGE_ACCESS_KEY": "a2V5"}, {"account_key": "a2V5"}),
        ({"AZURE_ACCESS_TOKEN": "of-entra"}, {"token": "of-entra"}),
        (
            {"AZ_CLIENT_ID": "me", "AZ_TENANT_ID": "us", "AZ_CLIENT_SECRET": "hidden"},
            {"client_id": "me", "tenant_id": "us", "client_secret": "hidden"},
        ),
        (
            {"AZURE_CLIENT_ID": "me", "AZURE_TENANT_ID": "us", "AZURE_STORAGE_ACCESS_KEY": "a2V5"},
            {"client_id": "me", "tenant_id": "us", "client_secret": None, "account_key": None},
        ),
        (
            {"AZURE_STORAGE_ACCESS_KEY": "a2V5", "AZURE_ACCESS_TOKEN": "of-entra"},
            {"account_key": "a2V5", "token": None},
        ),
        ({}, {"anonymous": True}),
        (
            {
                "AZURE_ACCOUNT_NAME": "modelsacct",
                "AZURE_SERVICE_URL": "http://127.0.0.1/modelsacct",
            },
            {"endpoint_url": "http://127.0.0.1/modelsacct", "anonymous": True},
        ),
    ],
)
def test_variables_of_azure(variables: Mapping[str, str], fields: Mapping[str, Any]) -> None:
    config = config_for(BLOB, variables)

    assert isinstance(config, AzureConfig)
    for name, value in fields.items():
        found = getattr(config, name)
        assert getattr(found, "get_secret_value", lambda found=found: found)() == value


def test_of_a_share_the_key_goes_first() -> None:
    share = "https://modelsacct.file.core.windows.net/share/model"
    both = {"AZURE_CLIENT_ID": "me", "AZURE_STORAGE_ACCESS_KEY": "a2V5"}

    assert config_for(share, both) == AzureConfig(account_key="a2V5")
    assert config_for(share, {"AZURE_CLIENT_ID": "me"}) == AzureConfig(client_id="me")


def test_what_is_for_one_account_is_not_sent_to_another() -> None:
    variables = {
        "AZURE_ACCOUNT_NAME": "others",
        "AZURE_SERVICE_URL": "https://others.blob.core.windows.net",
        "AZURE_STORAGE_ACCESS_KEY": "a2V5",
    }

    assert configs_for(BLOB, variables) == [AzureConfig(anonymous=True)]
    del variables["AZURE_ACCOUNT_NAME"]
    assert configs_for(BLOB, variables) == [AzureConfig(anonymous=True)]


def test_a_secret_of_azure_is_used() -> None:
    stored = {"type": "azure", "account_name": "modelsacct", "account_key": "a2V5"}
    found = configs_for(BLOB, {"STORAGE_CONFIG": json.dumps(stored)})

    assert found == [AzureConfig("modelsacct", "a2V5")]
    of_another = json.dumps({**stored, "account_name": "others"})
    assert configs_for(BLOB, {"STORAGE_CONFIG": of_another})[0] == AzureConfig(anonymous=True)


@pytest.mark.parametrize(
    "variables",
    [
        {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=modelsacct;AccountKey=a2V5"},
        {"AZURE_STORAGE_SAS_TOKEN": "sig=x"},
        {"IDENTITY_ENDPOINT": "http://169.254.169.254/"},
    ],
)
def test_azures_own_variables_are_left_to_its_chain(variables: Mapping[str, str]) -> None:
    assert configs_for(BLOB, variables) == [None]


def test_a_signed_url_of_azure_needs_nothing_else() -> None:
    assert configs_for(f"{BLOB}?sv=1&sig=abc", {}) == [None]


def test_without_credentials_azure_is_asked_as_nobody_and_then_as_this_machine() -> None:
    nobody, machine = configs_for(BLOB, {})

    assert isinstance(nobody, AzureConfig)
    assert nobody.anonymous
    assert machine == AzureConfig()


def test_without_credentials_a_bucket_of_gcs_may_be_public() -> None:
    assert configs_for("gs://bucket/model", {}) == [None, GCSConfig(anonymous=True)]
    named = {"GOOGLE_APPLICATION_CREDENTIALS": "/var/secrets/key.json"}
    assert configs_for("gs://bucket/model", named) == [None]


def test_registries_take_the_login_that_is_mounted(tmp_path: Path) -> None:
    login = tmp_path / "config.json"
    login.write_text("{}")
    variables = {"KSERVE_OCI_DOCKER_CONFIG": str(login), "KSERVE_OCI_INSECURE_REGISTRY": "yes"}

    config = config_for("oci://registry.example/model:1", variables)

    assert config == OCIConfig(docker_config=login, plain_http=True, verify_ssl=False)
    assert config_for("oci://registry.example/model:1", {}) is None


def test_repositories_of_git_take_user_and_password() -> None:
    variables = {"GIT_USERNAME": "me", "GIT_PASSWORD": "hidden"}

    config = config_for("https://git.example/models/iris.git", variables)

    assert config == GitConfig(username="me", password="hidden")


def test_an_authority_of_s3_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = {"AWS_CA_BUNDLE": str(tmp_path / "ca.crt")}
    with pytest.raises(ConfigurationError, match=r"ca\.crt"):
        config_for("s3://bucket/model", missing)
    mounted = {"CA_BUNDLE_CONFIGMAP_NAME": "cas", "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path)}
    with pytest.raises(ConfigurationError, match=r"cabundle\.crt"):
        config_for("s3://bucket/model", mounted)
    assert config_for("s3://bucket/model", {**missing, "S3_VERIFY_SSL": "0"}) is not None


def test_the_authority_of_s3_goes_before_that_of_the_cluster(tmp_path: Path) -> None:
    own, cluster = tmp_path / "own.crt", tmp_path / "cabundle.crt"
    own.touch()
    cluster.touch()
    variables = {
        "CA_BUNDLE_CONFIGMAP_NAME": "cas",
        "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path),
    }

    config = config_for("s3://bucket/model", variables)
    assert isinstance(config, S3Config)
    assert config.ca_bundle == str(cluster)
    config = config_for("s3://bucket/model", {**variables, "AWS_CA_BUNDLE": str(own)})
    assert isinstance(config, S3Config)
    assert config.ca_bundle == str(own)


@pytest.fixture
def mounted(tmp_path: Path) -> dict[str, str]:
    """The variables of a cluster with an authority of its own."""
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "cabundle.crt"))
    return {"CA_BUNDLE_CONFIGMAP_NAME": "cas", "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path)}


@pytest.mark.parametrize(
    "uri", ["gs://b/m", "hf://o/m", "https://h.example/m", BLOB, "oci://r.example/m:1"]
)
def test_the_authority_of_the_cluster_is_trusted_beside_the_usual_ones(
    uri: str, mounted: dict[str, str]
) -> None:
    environment = Environment(mounted)
    with Authorities(environment) as authorities:
        config: Any = next(environment.configs(parse_uri(uri), authorities))
        context = ssl.create_default_context(cafile=config.ca_bundle)
        names = [str(each["issuer"]) for each in context.get_ca_certs()]
        assert any("trustme" in name for name in names)
        assert len(names) > 50
        assert "authorities" in os.readlink(config.ca_bundle)
    # Other threads may have taken its number.
    left = os.path.islink(config.ca_bundle) and os.readlink(config.ca_bundle)
    assert "authorities" not in str(left), "the file in memory is left"


def test_an_authority_that_somebody_chose_goes_first(mounted: dict[str, str]) -> None:
    assert config_for("hf://o/m", {**mounted, "REQUESTS_CA_BUNDLE": "/own.crt"}) is None


def test_a_registry_needs_only_the_folder_of_the_authority(mounted: dict[str, str]) -> None:
    del mounted["CA_BUNDLE_CONFIGMAP_NAME"]

    assert config_for("hf://o/m", mounted) is None
    config = config_for("oci://registry.example/m:1", mounted)
    assert isinstance(config, OCIConfig)
    assert config.ca_bundle is not None


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_an_authority_that_cannot_be_used_is_a_warning(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        broken = b"-----BEGIN CERTIFICATE-----\n" + content + b"\n-----END CERTIFICATE-----\n"
        (tmp_path / "cabundle.crt").write_bytes(broken)
    variables = {
        "CA_BUNDLE_CONFIGMAP_NAME": "cas",
        "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path),
    }

    assert config_for("hf://o/m", variables) is None
    assert str(tmp_path) in caplog.text


def test_nothing_is_written_to_the_environment(
    monkeypatch: pytest.MonkeyPatch, mounted: dict[str, str]
) -> None:
    stored = json.dumps({"type": "s3", "access_key_id": "a", "secret_access_key": "b"})
    for name, value in {**mounted, "AZ_CLIENT_ID": "me", "STORAGE_CONFIG": stored}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)

    environment = Environment()
    with Authorities(environment) as authorities:
        for uri in ("s3://b/m", "gs://b/m", BLOB, "hf://o/m", "https://h.example/m"):
            list(environment.configs(parse_uri(uri), authorities))

    assert dict(os.environ) == before


def test_the_hub_keeps_its_own_chain() -> None:
    assert config_for("hf://o/m", {"HF_TOKEN": "hf_x"}) is None
    stored = {"STORAGE_CONFIG": '{"type": "hf", "HF_TOKEN": "hf_y"}'}
    assert config_for("hf://o/m", stored) == HFConfig("hf_y")
