"""Each way of GCS to get credentials, on both drivers, against servers that hand them out.

fake-gcs-server takes any token, so a proxy before it tells which one arrived.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from storage import StorageClient
from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.backends.gcs.auth import TokenSource
from storage.config import GCSConfig
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidInput,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)
from storage.uri import parse_uri
from tests.servers import CountingProxy, FakeGCS
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.google_tokens import GOOGLE_HOSTS, GoogleTokens
from tests.servers.process import HOST, free_port


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def tokens() -> Iterator[GoogleTokens]:
    with GoogleTokens() as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Callable[[str, GCSConfig | None], Backend]]:
    backends: list[Backend] = []

    def make(bucket: str, config: GCSConfig | None) -> Backend:
        backends.append(open_backend(parse_uri(f"gs://{bucket}/"), config, OpenOptions()))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture
def seen(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, GCSConfig | None], Backend],
) -> Callable[..., set[str | None]]:
    """Look at an object with these fields in the config; return the Authorization headers."""

    def look(**fields: Any) -> set[str | None]:
        gcs_server.put_raw(gcs_bucket, "m/a", b"12345")
        proxy = counting_proxy(gcs_server.endpoint)
        config = GCSConfig(endpoint_url=proxy.endpoint, driver=driver, **fields)
        backend = opened(gcs_bucket, config)
        assert backend.stat("m/a").size == 5
        assert [info.key for info in backend.list("m/")] == ["m/a"]
        with backend.read("m/a") as body:
            assert b"".join(bytes(piece) for piece in body) == b"12345"
        return {request.headers.get("authorization") for request in proxy.requests}

    return look


@pytest.fixture
def at_google(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Fields of a config by which Google's own hosts are reached, but played."""
    authority = trustme.CA()
    certificate = authority.issue_cert(*GOOGLE_HOSTS)
    chain, key, bundle = (tmp_path / name for name in ("chain.pem", "key.pem", "ca.pem"))
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(bundle)
    with (
        GoogleTokens((chain, key)) as server,
        ForwardProxy(hosts=dict.fromkeys(GOOGLE_HOSTS, (HOST, server.port))) as proxy,
    ):
        yield {"proxy": proxy.url, "ca_bundle": bundle}
        # Not by another way.
        assert any(f"{host}:443" in proxy.asked for host in GOOGLE_HOSTS)


def test_anonymous_sends_no_token(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "key.json"
    file.write_text(json.dumps(tokens.service_account()))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert seen(anonymous=True) == {None}


def test_anonymous_writes_send_no_token(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, GCSConfig | None], Backend],
) -> None:
    proxy = counting_proxy(gcs_server.endpoint)
    config = GCSConfig(anonymous=True, endpoint_url=proxy.endpoint, driver=driver)
    backend = opened(gcs_bucket, config)
    backend.write("a", bytes_payload(b"1"))
    assert gcs_server.get_raw(gcs_bucket, "a") == b"1"
    backend.delete(["a", "b"])
    assert gcs_server.keys_raw(gcs_bucket) == []
    assert {request.headers.get("authorization") for request in proxy.requests} == {None}


def test_token_of_the_config(seen: Callable[..., set[str | None]]) -> None:
    assert seen(token="my-token") == {"Bearer my-token"}


@pytest.mark.parametrize("form", ["text", "table", "file"])
def test_service_account(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, tmp_path: Path, form: str
) -> None:
    key: Any = tokens.service_account()
    if form != "table":
        key = json.dumps(key)
    if form == "file":
        (tmp_path / "key.json").write_text(key)
        key = tmp_path / "key.json"
    assert seen(service_account_key=key) == {"Bearer token-of-the-robot"}


def test_token_is_fetched_once_and_used_until_it_expires(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens
) -> None:
    before = len(tokens.asked)
    seen(service_account_key=tokens.service_account())
    # obstore reads through two stores; both take their token from one place.
    assert len(tokens.asked) - before == 1


def test_token_that_is_about_to_expire_is_renewed(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "lifetime", 100)
    before = len(tokens.asked)
    assert seen(service_account_key=tokens.service_account()) == {"Bearer token-of-the-robot"}
    assert len(tokens.asked) - before > 1


@pytest.mark.parametrize("kind", ["service_account", "external_account"])
def test_default_credentials_of_the_environment(
    seen: Callable[..., set[str | None]],
    tokens: GoogleTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    subject = tmp_path / "subject"
    subject.write_text("proof-of-the-workload")
    content, who = {
        "service_account": (tokens.service_account(), "robot"),
        "external_account": (tokens.external_account(subject), "workload"),
    }[kind]
    file = tmp_path / "adc.json"
    file.write_text(json.dumps(content))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert seen() == {f"Bearer token-of-the-{who}"}


def test_federation_file_of_the_config(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, tmp_path: Path
) -> None:
    subject = tmp_path / "subject"
    subject.write_text("proof-of-the-workload")
    key = tokens.external_account(subject)
    assert seen(service_account_key=key) == {"Bearer token-of-the-workload"}


def test_credentials_that_gcloud_left(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, at_google: dict[str, Any]
) -> None:
    file = Path(os.environ["HOME"], ".config/gcloud/application_default_credentials.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(tokens.authorized_user()))
    assert seen(**at_google) == {"Bearer token-of-the-user"}


@pytest.mark.parametrize("source", ["token", "service_account_key"])
def test_impersonation(
    seen: Callable[..., set[str | None]],
    tokens: GoogleTokens,
    at_google: dict[str, Any],
    source: str,
) -> None:
    value, who = {
        "token": ("my-token", "my-token"),
        "service_account_key": (tokens.service_account(), "token-of-the-robot"),
    }[source]
    found = seen(
        impersonate_service_account="boss@test-project.iam.gserviceaccount.com",
        **at_google,
        **{source: value},
    )
    assert found == {f"Bearer token-of-boss-by-{who}"}


# google-auth looks at these variables when it is imported.
_MACHINE = """
import sys
from storage.backends import open_backend
from storage.backends.base import OpenOptions
from storage.config import GCSConfig
from storage.uri import parse_uri
endpoint, bucket, driver = sys.argv[1:]
config = GCSConfig(endpoint_url=endpoint, driver=driver)
backend = open_backend(parse_uri(f"gs://{bucket}/"), config, OpenOptions())
assert [info.key for info in backend.list()] == ["m"]
backend.close()
"""


def test_workload_identity_of_the_machine(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    tokens: GoogleTokens,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    gcs_server.put_raw(gcs_bucket, "m", b"1")
    proxy = counting_proxy(gcs_server.endpoint)
    metadata = f"{HOST}:{tokens.port}"
    environment = {name: value for name, value in os.environ.items() if name != "NO_GCE_CHECK"}
    environment |= {"GCE_METADATA_HOST": metadata, "GCE_METADATA_IP": metadata}
    subprocess.run(
        [sys.executable, "-c", _MACHINE, proxy.endpoint, gcs_bucket, driver],
        check=True,
        timeout=120,
        env=environment,
    )
    found = {request.headers.get("authorization") for request in proxy.requests}
    assert found == {"Bearer token-of-the-machine"}


@pytest.mark.parametrize("form", ["host", "url"])
def test_emulator_of_the_environment_gets_no_token(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    form: str,
    tokens: GoogleTokens,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, GCSConfig | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "key.json"
    file.write_text(json.dumps(tokens.service_account()))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    proxy = counting_proxy(gcs_server.endpoint)
    url = proxy.endpoint
    monkeypatch.setenv(
        "STORAGE_EMULATOR_HOST", url.removeprefix("http://") if form == "host" else url
    )
    backend = opened(gcs_bucket, GCSConfig(driver=driver))
    backend.write("m/a", bytes_payload(b"12345"))
    assert backend.stat("m/a").size == 5
    assert {request.headers.get("authorization") for request in proxy.requests} == {None}


def test_two_accounts_in_one_process(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, GCSConfig | None], Backend],
) -> None:
    gcs_server.put_raw(gcs_bucket, "m", b"1")
    proxies = [counting_proxy(gcs_server.endpoint) for _ in range(2)]
    backends = [
        opened(gcs_bucket, GCSConfig(token=name, endpoint_url=proxy.endpoint, driver=driver))
        for name, proxy in zip(("first", "second"), proxies, strict=True)
    ]
    for _ in range(2):
        for backend in backends:
            assert backend.stat("m").size == 1
            assert [info.key for info in backend.list()] == ["m"]
    for name, proxy in zip(("first", "second"), proxies, strict=True):
        found = {request.headers.get("authorization") for request in proxy.requests}
        assert found == {f"Bearer {name}"}


def test_two_accounts_by_the_settings(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = counting_proxy(gcs_server.endpoint)
    lines = []
    for name in ("first", "second"):
        gcs_server.put_raw(gcs_bucket, f"{name}/m", name.encode())
        lines += [
            f"[stores.{name}]",
            f'prefix = "gs://{gcs_bucket}/{name}"',
            f'token = "{name}"',
            f'endpoint_url = "{proxy.endpoint}"',
            f'driver = "{driver}"',
        ]
    settings = tmp_path / "settings.toml"
    settings.write_text("\n".join(lines))
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(settings))
    with StorageClient() as client:
        for name in ("first", "second"):
            path = client.download(f"gs://{gcs_bucket}/{name}/m", f"{tmp_path}/{name}")
            assert Path(path).read_text() == name
    for request in proxy.requests:
        # A listing names its folder in the query, an object stands in the path.
        name = "first" if "first" in request.path else "second"
        assert request.headers["authorization"] == f"Bearer {name}"


def test_secret_of_kserve(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    tokens: GoogleTokens,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gcs_server.put_raw(gcs_bucket, "m", b"12345")
    proxy = counting_proxy(gcs_server.endpoint)
    key = tokens.service_account()
    names = ("private_key", "client_email", "token_uri", "project_id")
    secret = {name: key[name] for name in names}
    secret |= {"type": "gs", "endpoint_url": proxy.endpoint, "driver": driver}
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps(secret))
    with StorageClient() as client:
        path = client.download(f"gs://{gcs_bucket}/m", f"{tmp_path}/m")
    assert Path(path).read_bytes() == b"12345"
    found = {request.headers.get("authorization") for request in proxy.requests}
    assert found == {"Bearer token-of-the-robot"}


def test_who_pays_is_told(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, GCSConfig | None], Backend],
) -> None:
    gcs_server.put_raw(gcs_bucket, "m", b"1")
    proxy = counting_proxy(gcs_server.endpoint)
    config = GCSConfig(
        token="t",
        project_id="payer",
        requester_pays=True,
        endpoint_url=proxy.endpoint,
        driver=driver,
    )
    backend = opened(gcs_bucket, config)
    assert backend.stat("m").size == 1
    assert [info.key for info in backend.list()] == ["m"]
    assert {request.headers.get("x-goog-user-project") for request in proxy.requests} == {"payer"}


def test_refused_credentials_are_their_own_error(
    seen: Callable[..., set[str | None]], tokens: GoogleTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "refuse", True)
    with pytest.raises(AuthenticationError, match="refuses these credentials") as caught:
        seen(service_account_key=tokens.service_account())
    assert "PRIVATE KEY" not in str(caught.value)


def test_no_credentials_anywhere_is_its_own_error(seen: Callable[..., set[str | None]]) -> None:
    with pytest.raises(AuthenticationError, match="no Google credentials were found"):
        seen()


def test_key_file_that_is_not_there_is_named(seen: Callable[..., set[str | None]]) -> None:
    with pytest.raises(ConfigurationError, match=r"/no/such/key\.json cannot be read"):
        seen(service_account_key="/no/such/key.json")


def test_key_file_that_is_no_key_is_not_repeated(
    seen: Callable[..., set[str | None]], tmp_path: Path
) -> None:
    (tmp_path / "key.json").write_text("hunter2")
    with pytest.raises(ConfigurationError, match=r"key\.json are not JSON") as caught:
        seen(service_account_key=tmp_path / "key.json")
    assert "hunter2" not in repr(caught.value)


def test_nobody_issues_tokens(seen: Callable[..., set[str | None]], tokens: GoogleTokens) -> None:
    key = tokens.service_account() | {"token_uri": f"http://{HOST}:{free_port()}/token"}
    with pytest.raises(UnreachableError):
        seen(service_account_key=key)


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"error": "internal_failure"}),
        (503, ""),
        (429, {}),
        (200, []),
        (200, None),
        (200, "<html>"),
        (200, 5),
        (200, {"access_token": 5, "expires_in": 3600}),
        (200, {"access_token": "a", "expires_in": "soon"}),
    ],
    ids=repr,
)
def test_a_token_that_is_not_given_is_asked_for_again_by_who_asked(
    tokens: GoogleTokens, answer: tuple[int, Any]
) -> None:
    source = TokenSource(json.dumps(tokens.service_account()))
    tokens.instead.append(answer)
    before = len(tokens.asked)
    with pytest.raises(TransientError, match="issues Google's tokens") as caught:
        source()
    # Not again and again by google-auth itself.
    assert len(tokens.asked) == before + 1
    assert caught.value.throttled == (answer[0] in (429, 503))
    assert source()[0] == "token-of-the-robot"


# --- presigned URLs ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "file"])
def test_signed_url_gives_the_object_without_credentials(
    gcs_server: FakeGCS,
    gcs_bucket: str,
    driver: Any,
    form: str,
    tokens: GoogleTokens,
    tmp_path: Path,
    opened: Callable[[str, GCSConfig | None], Backend],
) -> None:
    gcs_server.put_raw(gcs_bucket, "m/a b+c", b"12345")
    key: Any = json.dumps(tokens.service_account())
    if form == "file":
        (tmp_path / "key.json").write_text(key)
        key = tmp_path / "key.json"
    before = len(tokens.asked)
    backend = opened(gcs_bucket, GCSConfig(key, endpoint_url=gcs_server.endpoint, driver=driver))
    assert backend.capabilities.sign
    url = backend.sign("m/a b+c", "GET", 600)
    assert url.startswith(f"{gcs_server.endpoint}/{gcs_bucket}/")
    assert "X-Goog-Algorithm=GOOG4-RSA-SHA256" in url
    assert "X-Goog-Expires=600" in url
    assert "robot%40test-project" in url
    assert requests.get(url, timeout=60).content == b"12345"
    assert len(tokens.asked) == before


def test_signing_takes_a_private_key(
    gcs_server: FakeGCS,
    driver: Any,
    tokens: GoogleTokens,
    opened: Callable[[str, GCSConfig | None], Backend],
) -> None:
    configs = [
        GCSConfig(token="t", driver=driver),
        GCSConfig(anonymous=True, driver=driver),
        GCSConfig(tokens.authorized_user(), driver=driver),
        GCSConfig("/no/such/key.json", driver=driver),
    ]
    for config in configs:
        backend = opened("bucket", config)
        assert not backend.capabilities.sign
        with pytest.raises(UnsupportedOperation, match="service account"):
            backend.sign("m", "GET", 60)


def test_signature_for_what_cannot_be_signed(
    driver: Any, tokens: GoogleTokens, opened: Callable[[str, GCSConfig | None], Backend]
) -> None:
    backend = opened("bucket", GCSConfig(tokens.service_account(), driver=driver))
    for key, method, seconds in (("m", "PATCH", 60), ("", "GET", 60), ("m", "GET", 10**6)):
        with pytest.raises(InvalidInput):
            backend.sign(key, method, seconds)
    # obstore would sign the URL of "m/a" for them.
    for key in ("/m/a", "m//a", "m/./a", "m/a/"):
        with pytest.raises(UnsupportedOperation):
            backend.sign(key, "GET", 60)
