"""What reaches the two S3 drivers from a config and the environment, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import OpenOptions
from storage.backends.s3.backend import obstore_arguments, s3fs_arguments
from storage.config import S3Config
from storage.errors import AuthenticationError, ConfigurationError


def obstore(config: S3Config | None, bucket: str = "bucket") -> dict[str, Any]:
    return obstore_arguments(bucket, config, OpenOptions())


def credentials(config: S3Config | None) -> dict[str, Any]:
    found: dict[str, Any] = obstore(config)["credential_provider"]()
    return found


def test_keys_of_the_config_reach_both() -> None:
    config = S3Config("AK", "SK", session_token="TOKEN")
    assert credentials(config) == {
        "access_key_id": "AK",
        "secret_access_key": "SK",
        "token": "TOKEN",
        "expires_at": None,
    }
    arguments = s3fs_arguments(config)
    assert (arguments["key"], arguments["secret"], arguments["token"]) == ("AK", "SK", "TOKEN")


def test_keys_of_the_config_are_not_mixed_with_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "OTHER")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "OTHER")
    found = credentials(S3Config("AK", "SK"))
    assert found["access_key_id"] == "AK"
    assert found["token"] is None
    assert "token" not in s3fs_arguments(S3Config("AK", "SK"))


def test_environment_is_used_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert credentials(None)["token"] == "TOKEN"
    assert obstore(None)["endpoint"] == "http://127.0.0.1:9000"
    assert obstore(None)["region"] == "eu-west-1"
    assert s3fs_arguments(None)["endpoint_url"] == "http://127.0.0.1:9000"
    assert s3fs_arguments(None)["client_kwargs"]["region_name"] == "eu-west-1"
    assert "key" not in s3fs_arguments(None)  # botocore finds them by itself


def test_endpoint_of_the_config_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:1")
    config = S3Config("AK", "SK", endpoint_url="http://mine:2")
    arguments = obstore(config)
    assert arguments["endpoint"] == arguments["aws_endpoint_url_s3"] == "http://mine:2"
    assert s3fs_arguments(config)["endpoint_url"] == "http://mine:2"


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
@pytest.mark.parametrize("url", ["no url", "http://no url", "ftp://host", "http://u:geheim@host"])
def test_an_endpoint_that_is_none_is_a_configuration_error(
    url: str, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(ConfigurationError, match="AWS_ENDPOINT_URL: a URL") as caught:
        obstore(None) if driver == "obstore" else s3fs_arguments(None)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("explicit", "expected"), [(None, "eu-west-1"), ("us-east-1", "us-east-1")]
)
def test_region_of_the_config_wins_if_it_was_given(
    explicit: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    config = S3Config("AK", "SK", region=explicit)
    assert obstore(config)["region"] == expected
    assert s3fs_arguments(config)["client_kwargs"]["region_name"] == expected


@pytest.mark.parametrize(
    ("style", "endpoint", "virtual", "url"),
    [
        ("auto", None, True, None),
        ("auto", "http://h:1", False, "http://h:1"),
        ("path", None, False, None),
        ("virtual", "http://h:1", True, "http://bucket.h:1"),
        *(
            ("auto", f"https://{host}", True, f"https://bucket.{host}")
            for host in (
                "s3.amazonaws.com",
                "s3.eu-west-1.amazonaws.com",
                "s3.dualstack.eu-west-1.amazonaws.com",
                "s3-fips.us-gov-west-1.amazonaws.com",
                "s3.cn-north-1.amazonaws.com.cn",
                "s3-accelerate.dualstack.amazonaws.com",
            )
        ),
        # One of a network's own, and one that only looks like Amazon's.
        *(
            ("auto", f"https://{host}", False, f"https://{host}")
            for host in (
                "bucket.vpce-1a-2b.s3.eu-west-1.vpce.amazonaws.com",
                "s3.amazonaws.com.minio.example",
                "minio.example/s3.amazonaws.com",
            )
        ),
    ],
)
def test_addressing_style(style: Any, endpoint: str | None, virtual: bool, url: str | None) -> None:
    config = S3Config("AK", "SK", endpoint_url=endpoint, addressing_style=style)
    arguments = obstore(config)
    assert arguments["virtual_hosted_style_request"] is virtual
    assert arguments.get("endpoint") == url


@pytest.mark.parametrize("endpoint", [None, "https://s3.us-west-2.amazonaws.com"])
def test_bucket_with_dots_is_addressed_by_path(endpoint: str | None) -> None:
    # A wildcard certificate covers one label only.
    config = S3Config("AK", "SK", endpoint_url=endpoint)
    assert obstore(config, "my.bucket")["virtual_hosted_style_request"] is False


def test_acceleration_knows_buckets_by_the_name_of_the_host_alone() -> None:
    arguments = obstore(S3Config("AK", "SK", use_accelerate=True))
    assert arguments["virtual_hosted_style_request"] is True
    assert arguments["endpoint"] == "https://bucket.s3-accelerate.amazonaws.com"


@pytest.mark.parametrize("ambient", [False, True], ids=["config", "variable"])
@pytest.mark.parametrize(
    ("endpoint", "region", "used"),
    [
        ("https://s3.amazonaws.com", "eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ("http://S3.amazonaws.com/", "eu-west-1", "http://s3.eu-west-1.amazonaws.com"),
        ("s3.amazonaws.com", "eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ("https://s3.amazonaws.com", "us-east-1", "https://s3.amazonaws.com"),
        ("https://s3.amazonaws.com", None, "https://s3.amazonaws.com"),
    ],
)
def test_the_global_endpoint_gives_way_to_the_region_s(
    endpoint: str, region: str | None, used: str, ambient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ambient:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    config = S3Config("AK", "SK", region=region, endpoint_url=None if ambient else endpoint)
    assert s3fs_arguments(config)["endpoint_url"] == used
    assert obstore(config)["endpoint"] == used.replace("://", "://bucket.")


def test_anonymous_signs_nothing() -> None:
    config = S3Config(anonymous=True)
    assert obstore(config)["skip_signature"] is True
    assert "credential_provider" not in obstore(config)
    assert s3fs_arguments(config)["anon"] is True


def test_one_call_is_one_attempt() -> None:
    assert obstore(S3Config("AK", "SK"))["retry_config"] == {"max_retries": 0}


def test_profile_of_the_shared_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "credentials"
    file.write_text("[team]\naws_access_key_id = AK\naws_secret_access_key = SK\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    found = credentials(S3Config(profile="team"))
    assert (found["access_key_id"], found["secret_access_key"]) == ("AK", "SK")
    assert s3fs_arguments(S3Config(profile="team"))["profile"] == "team"


def test_no_credentials_anywhere_is_its_own_error() -> None:
    with pytest.raises(AuthenticationError, match="no S3 credentials were found"):
        credentials(S3Config())


def test_proxy_and_certificates(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(b"PEM")
    config = S3Config("AK", "SK", ca_bundle=str(bundle), proxy="http://proxy:3128")
    client = obstore(config)["client_options"]
    assert client["root_certificate"] == b"PEM"
    assert client["proxy_url"] == "http://proxy:3128"
    arguments = s3fs_arguments(config)
    assert arguments["client_kwargs"]["verify"] == str(bundle)
    assert arguments["config_kwargs"]["proxies"]["https"] == "http://proxy:3128"


def test_missing_ca_bundle_is_named() -> None:
    config = S3Config("AK", "SK", ca_bundle="/no/such/ca.pem")
    with pytest.raises(ConfigurationError, match=r"/no/such/ca\.pem"):
        obstore(config)
