"""What reaches the two GCS drivers from a config and the environment, side by side."""

from __future__ import annotations

import json
import pickle
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from storage.backends.base import OpenOptions
from storage.backends.gcs.backend import (
    gcsfs_arguments,
    obstore_arguments,
    open_backend,
    tls_context,
)
from storage.config import GCSConfig
from storage.errors import ConfigurationError
from storage.uri import parse_uri
from tests.servers.google_tokens import GoogleTokens

GOOGLE = "https://storage.googleapis.com"


def obstore(config: GCSConfig | None, options: OpenOptions | None = None) -> dict[str, Any]:
    return obstore_arguments(config, options or OpenOptions())


def gcsfs(config: GCSConfig | None) -> dict[str, Any]:
    return gcsfs_arguments(config, OpenOptions())


def endpoints(config: GCSConfig | None) -> tuple[str, str]:
    return obstore(config)["base_url"], gcsfs(config)["endpoint_url"]


def tokens_of(config: GCSConfig | None) -> tuple[Any, Any]:
    """Return the token that each driver would send."""
    theirs = gcsfs(config)["token"]
    theirs.refresh(None)
    return obstore(config)["credential_provider"]()["token"], theirs.token


def test_endpoint_is_googles_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GCSConfig(token="t")
    assert endpoints(config) == (GOOGLE, GOOGLE)
    monkeypatch.setenv("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "cloud.example")
    assert endpoints(config) == ("https://storage.cloud.example",) * 2


@pytest.mark.parametrize(
    "value", ["127.0.0.1:4443", "http://127.0.0.1:4443", "http://127.0.0.1:4443/"]
)
def test_emulator_of_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", value)
    assert endpoints(None) == ("http://127.0.0.1:4443",) * 2
    # And no credentials, but for those that the config has for it.
    assert obstore(None)["skip_signature"] is True
    assert gcsfs(None)["token"] == "anon"
    assert tokens_of(GCSConfig(token="t")) == ("t", "t")


def test_endpoint_of_the_config_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "other:1")
    config = GCSConfig(endpoint_url="http://mine:2/")
    assert endpoints(config) == ("http://mine:2", "http://mine:2")
    assert obstore(config)["skip_signature"] is False


@pytest.mark.parametrize(("url", "plain"), [("http://h:1", True), ("https://h:1", False)])
def test_plain_http_only_if_the_endpoint_says_so(url: str, plain: bool) -> None:
    config = GCSConfig(token="t", endpoint_url=url)
    assert obstore(config)["client_options"]["allow_http"] is plain


def test_anonymous_has_no_credentials() -> None:
    arguments = obstore(GCSConfig(anonymous=True))
    assert arguments["skip_signature"] is True
    assert arguments["credential_provider"]() == {"token": "", "expires_at": None}
    assert gcsfs(GCSConfig(anonymous=True))["token"] == "anon"


def test_token_reaches_both() -> None:
    assert tokens_of(GCSConfig(token="my-token")) == ("my-token", "my-token")
    assert obstore(GCSConfig(token="my-token"))["skip_signature"] is False


def test_token_wins_over_a_key_and_a_key_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GoogleTokens() as tokens:
        other = tmp_path / "other.json"
        other.write_text("{}")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(other))
        key = tokens.service_account()
        assert tokens_of(GCSConfig(key, token="t")) == ("t", "t")
        assert tokens_of(GCSConfig(key)) == ("token-of-the-robot",) * 2


def test_obstores_own_variables_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "other")
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://other:1")
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    arguments = obstore(GCSConfig(token="t"))
    assert arguments["base_url"] == GOOGLE
    assert arguments["skip_signature"] is False
    assert arguments["credential_provider"]()["token"] == "t"


def test_expiry_is_told_to_both() -> None:
    with GoogleTokens() as tokens:
        config = GCSConfig(tokens.service_account())
        expiry = obstore(config)["credential_provider"]()["expires_at"]
        assert expiry.utcoffset() == timedelta(0)
        theirs = gcsfs(config)["token"]
        theirs.refresh(None)
        assert theirs.expiry.tzinfo is None
        assert abs(theirs.expiry - expiry.replace(tzinfo=None)) < timedelta(minutes=1)


def test_one_call_is_one_attempt() -> None:
    assert obstore(GCSConfig(token="t"))["retry_config"] == {"max_retries": 0}


def test_listings_are_not_cached_and_instances_not_shared() -> None:
    arguments = gcsfs(GCSConfig(token="t"))
    assert arguments["use_listings_cache"] is False
    assert arguments["skip_instance_cache"] is True


@pytest.mark.parametrize("way", ["config", "key", "variable"])
def test_who_pays(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = None
    if way == "key":
        key = json.dumps({"type": "service_account", "project_id": "payer"})
    if way == "variable":
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "payer")
    config = GCSConfig(key, "payer" if way == "config" else None, requester_pays=True)
    headers = obstore(config)["client_options"]["default_headers"]
    assert headers == {"x-goog-user-project": "payer"}
    arguments = gcsfs(config)
    assert (arguments["requester_pays"], arguments["project"]) == ("payer", "payer")


def test_nobody_pays_unasked() -> None:
    config = GCSConfig(token="t", project_id="p")
    assert "default_headers" not in obstore(config)["client_options"]
    assert "requester_pays" not in gcsfs(config)


def test_requester_pays_without_a_project_is_an_error() -> None:
    config = GCSConfig(token="t", requester_pays=True)
    for arguments in (obstore, gcsfs):
        with pytest.raises(ConfigurationError, match="project_id"):
            arguments(config)


def test_timeouts_of_the_options() -> None:
    options = OpenOptions(connections=5, connect_timeout=3.0, stall_timeout=7.0)
    client = obstore(GCSConfig(token="t"), options)["client_options"]
    assert client["connect_timeout"] == timedelta(seconds=3)
    assert client["read_timeout"] == timedelta(seconds=7)
    # It would cover the whole body.
    assert client["timeout"] > timedelta(hours=1)
    assert client["pool_max_idle_per_host"] == "5"


@pytest.mark.parametrize("driver", ["obstore", "fsspec"])
def test_timeouts_of_the_config_win(driver: Any) -> None:
    config = GCSConfig(token="t", connect_timeout=3.0, read_timeout=7.0, driver=driver)
    backend: Any = open_backend(parse_uri("gs://bucket/"), config, OpenOptions(connections=5))
    assert backend._options == OpenOptions(5, 3.0, 7.0)


def test_proxy_of_the_config() -> None:
    config = GCSConfig(token="t", proxy="http://user:pass@proxy:3128")
    assert obstore(config)["client_options"]["proxy_url"] == "http://user:pass@proxy:3128"
    assert gcsfs(config)["session_kwargs"] == {"proxy": "http://user:pass@proxy:3128"}


def test_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "near.example")
    # obstore looks there itself.
    assert gcsfs(GCSConfig(token="t"))["session_kwargs"] == {"proxy": "http://proxy:3128"}
    for near in ("https://near.example", "https://near.example:8443", "http://h:1"):
        assert "session_kwargs" not in gcsfs(GCSConfig(token="t", endpoint_url=near))


def test_certificates(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(bundle)
    config = GCSConfig(token="t", ca_bundle=bundle)
    assert obstore(config)["client_options"]["root_certificate"] == bundle.read_bytes()
    context = tls_context(config)
    assert isinstance(context, ssl.SSLContext)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert "root_certificate" not in obstore(GCSConfig(token="t"))["client_options"]
    assert tls_context(GCSConfig(token="t")) is None


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_of_the_environment(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(bundle)
    monkeypatch.setenv(variable, str(bundle))
    assert obstore(None)["client_options"]["root_certificate"] == bundle.read_bytes()
    assert isinstance(tls_context(None), ssl.SSLContext)


def test_certificates_may_go_unchecked() -> None:
    config = GCSConfig(token="t", verify_ssl=False)
    assert obstore(config)["client_options"]["allow_invalid_certificates"] is True
    assert tls_context(config) is False


def test_missing_ca_bundle_is_named() -> None:
    config = GCSConfig(token="t", ca_bundle="/no/such/ca.pem")
    for arguments in (obstore, tls_context):
        with pytest.raises(ConfigurationError, match=r"/no/such/ca\.pem"):
            arguments(config)


def test_ca_bundle_that_is_none_is_named(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"ca\.pem cannot be used"):
        tls_context(GCSConfig(token="t", ca_bundle=bundle))


@pytest.mark.parametrize(
    ("driver", "name"),
    [(None, "gs (obstore)"), ("obstore", "gs (obstore)"), ("fsspec", "gs (gcsfs)")],
)
def test_driver_of_the_config(driver: Any, name: str) -> None:
    backend = open_backend(parse_uri("gs://bucket/"), GCSConfig(driver=driver), OpenOptions())
    assert backend.name == name
    assert backend.capabilities.copy_across
    assert backend.capabilities.if_match
    assert not backend.capabilities.sign


def test_credentials_of_gcsfs_can_be_sent_to_another_process() -> None:
    with GoogleTokens() as tokens:
        theirs = gcsfs(GCSConfig(tokens.service_account()))["token"]
        theirs.refresh(None)
        again = pickle.loads(pickle.dumps(theirs))
        again.refresh(None)
        assert again.token == "token-of-the-robot"
