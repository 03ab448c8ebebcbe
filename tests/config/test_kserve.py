"""``STORAGE_CONFIG`` and ``STORAGE_OVERRIDE_CONFIG`` as KServe's controller writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from storage.config import (
    AzureConfig,
    ConfigModel,
    FsspecConfig,
    GCSConfig,
    HFConfig,
    HTTPConfig,
    S3Config,
    kserve_config,
    resolve_config,
)
from storage.errors import ConfigurationError
from storage.uri import parse_uri

URIS = {
    "s3": "s3://b/k",
    "gs": "gs://b/k",
    "azure": "azure://c/k",
    "hf": "hf://o/m",
    "http": "https://h/k",
    "hdfs": "hdfs://user/m",
    "sftp": "sftp://h/k",
}


def read(
    config: Any, override: Any = None, kind: str = "s3", **variables: str
) -> ConfigModel | None:
    environ = dict(variables)
    for name, value in (("STORAGE_CONFIG", config), ("STORAGE_OVERRIDE_CONFIG", override)):
        if value is not None:
            environ[name] = value if isinstance(value, str) else json.dumps(value)
    return kserve_config(parse_uri(URIS[kind]), environ)


def test_a_storage_secret_of_minio() -> None:
    config = read(
        {
            "type": "s3",
            "access_key_id": "minio",
            "secret_access_key": "minio123",
            "endpoint_url": "http://minio-service.kubeflow:9000",
            "bucket": "mlpipeline",
            "default_bucket": "mlpipeline",
            "region": "us-south",
            "anonymous": "False",
            "certificate": "-----BEGIN CERTIFICATE-----",
        }
    )
    assert config == S3Config(
        "minio",
        "minio123",
        "us-south",
        "http://minio-service.kubeflow:9000",
        anonymous=False,
    )


@pytest.mark.parametrize("field", ["anonymous", "verify_ssl", "use_ssl", "requester_pays"])
@pytest.mark.parametrize(
    ("given", "value"),
    [
        (True, True),
        (False, False),
        ("true", True),
        ("True", True),
        ("1", True),
        ("false", False),
        ("False", False),
        ("0", False),
        (1, True),
        (0, False),
    ],
)
def test_booleans_may_be_booleans_or_text(field: str, given: Any, value: bool) -> None:
    assert getattr(read({"type": "s3", field: given}), field) is value


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (None, None),
        ("", None),
        (" ", ""),
        ({}, {}),
        ({"access_key_id": "no type"}, None),
        ({"type": ""}, None),
        ({"type": None}, None),
        ({"type": "gs"}, None),
        ({"type": "hdfs"}, None),
        ({"type": "pvc"}, None),
    ],
)
def test_nothing_for_this_type_is_no_config(text: Any, override: Any) -> None:
    assert read(text, override) is None


@pytest.mark.parametrize(
    ("secret", "override", "expected"),
    [
        ({"type": "s3", "region": "a"}, {"region": "b"}, S3Config(region="b")),
        ({"type": "s3", "region": "a"}, {"bucket": "x"}, S3Config(region="a")),
        ({"region": "a"}, {"type": "s3"}, S3Config(region="a")),
        (None, {"type": "s3", "region": "a"}, S3Config(region="a")),
        # What the controller writes for parameters that are not filled in.
        ({"type": "s3", "region": "a"}, {"type": "", "bucket": ""}, S3Config(region="a")),
        ({"type": "s3", "region": "a"}, {"type": "gs"}, None),
    ],
)
def test_the_override_goes_before_the_secret(
    secret: Any, override: Any, expected: ConfigModel | None
) -> None:
    assert read(secret, override) == expected


def test_an_empty_region_leaves_the_ambient_one() -> None:
    config = read({"type": "s3", "access_key_id": "a", "secret_access_key": "b", "region": ""})
    assert config is not None
    assert not config.explicit("region")


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("gs", {"type": "gs", "project_id": "p", "bucket": "b"}, GCSConfig(project_id="p")),
        ("gs", {"type": "gcs", "service_account_key": "/k.json"}, GCSConfig("/k.json")),
        (
            "gs",
            {
                "type": "gcs",
                "private_key": "PEM\n",
                "client_email": "a@b",
                "token_uri": "https://t",
            },
            GCSConfig(
                {
                    "type": "service_account",
                    "private_key": "PEM",
                    "client_email": "a@b",
                    "token_uri": "https://t",
                }
            ),
        ),
        ("azure", {"type": "azure", "account_name": "a", "container": "c"}, AzureConfig("a")),
        (
            "azure",
            {"type": "azure", "connection_string": "AccountName=a"},
            AzureConfig(connection_string="AccountName=a"),
        ),
        ("hf", {"type": "hf", "token": "t"}, HFConfig("t")),
        ("hf", {"type": "hf", "HF_TOKEN": "t"}, HFConfig("t")),
        ("http", {"type": "http", "headers": {"A": "b"}}, HTTPConfig({"A": "b"})),
        ("http", {"type": "https", "token": "t", "url": "x"}, HTTPConfig(token="t")),
        ("sftp", {"type": "sftp", "options": {"port": 2}}, FsspecConfig({"port": 2})),
    ],
)
def test_other_stores(kind: str, fields: dict[str, Any], expected: ConfigModel) -> None:
    assert read(fields, kind=kind) == expected
    assert read(fields, kind="s3") is None


@pytest.mark.parametrize("kind", ["hdfs", "webhdfs"])
def test_hdfs_is_refused_for_its_own_uris_only(kind: str) -> None:
    config = {"type": kind, "HDFS_NAMENODE": "http://n:9870"}
    with pytest.raises(ConfigurationError, match=f"type {kind}, which is not supported"):
        read(config, kind="hdfs")
    assert read(config, kind="s3") is None


@pytest.mark.parametrize("name", ["STORAGE_CONFIG", "STORAGE_OVERRIDE_CONFIG"])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", r"no JSON \(line 1, column 2\)"),
        ("type: s3", r"no JSON \(line 1, column 1\)"),
        ("[]", "something else"),
        ('"s3"', "something else"),
        ("null", "something else"),
        ("[" * 100_000, ""),
    ],
)
def test_what_is_no_json_object_is_refused(name: str, text: str, found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}: a JSON object is needed.*{found}"):
        kserve_config(parse_uri("s3://b/k"), {name: text})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "s3", "anonymous": "perhaps"}, "STORAGE_CONFIG: S3Config: anonymous: "),
        ({"type": "s3", "access_key_id": "a"}, "STORAGE_CONFIG: S3Config: access_key_id is given"),
        ({"type": "s3", "endpoint_url": "ftp://x"}, "STORAGE_CONFIG: S3Config: endpoint_url: "),
        ({"type": ["s3"]}, "STORAGE_CONFIG: type: "),
        ({"type": "no scheme"}, "STORAGE_CONFIG: type: 'no scheme' is none"),
    ],
)
def test_a_bad_field_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        read(config)


def test_the_authorities_of_a_config_map(tmp_path: Path) -> None:
    def bundle(fields: dict[str, Any], **variables: str) -> str | None:
        config: Any = read({"type": "s3", **fields}, **variables)
        return config.ca_bundle

    path = str(tmp_path / "cabundle.crt")
    mount = {"CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path)}
    asked = {"cabundle_configmap": "local-cabundle"}
    assert bundle({}, **mount) is None
    assert bundle(asked, **mount) is None
    assert bundle({}, CA_BUNDLE_CONFIGMAP_NAME="m", **mount) == path
    assert bundle({}, CA_BUNDLE_CONFIGMAP_NAME="m") == "/etc/ssl/custom-certs/cabundle.crt"
    Path(path).touch()
    assert bundle(asked, **mount) == path
    assert bundle({**asked, "ca_bundle": "/own.pem"}, **mount) == "/own.pem"


def test_the_key_of_one_account_is_not_sent_to_another() -> None:
    text = json.dumps({"type": "azure", "account_name": "ours", "account_key": "k"})
    for uri, applies in (
        ("azure://c/k", True),
        ("https://ours.blob.core.windows.net/c/k", True),
        ("https://theirs.blob.core.windows.net/c/k", False),
    ):
        found = kserve_config(parse_uri(uri), {"STORAGE_CONFIG": text})
        assert (found is not None) is applies


def test_the_environment_is_read_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"type": "s3", "access_key_id": "AK", "secret_access_key": "SK", "anonymous": True}
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps(fields))
    monkeypatch.setenv("STORAGE_OVERRIDE_CONFIG", json.dumps({"region": "r"}))
    before = dict(os.environ)
    assert resolve_config(parse_uri("s3://b/k")) == S3Config("AK", "SK", "r", anonymous=True)
    assert dict(os.environ) == before


def test_the_override_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_OVERRIDE_CONFIG", json.dumps({"type": "s3", "region": "r"}))
    assert resolve_config(parse_uri("s3://b/k")) == S3Config(region="r")
