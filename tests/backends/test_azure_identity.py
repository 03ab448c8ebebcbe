"""Entra tokens, certificates and identities for Azure, by both drivers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import AzureConfig
from storage.errors import (
    AuthenticationError,
)
from storage.uri import parse_uri
from tests.backends.azure_identity_server import IdentityServer
from tests.backends.azure_support import check_use
from tests.servers.azurite import Azurite

Driver = Literal["obstore", "fsspec"]
Opener = Callable[..., Backend]


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Driver:
    found: Driver = request.param
    return found


@pytest.fixture
def opened(driver: Driver) -> Iterator[Opener]:
    """Open backends of the driver under test, closed after the test."""
    backends: list[Backend] = []

    def opener(uri: str, *arguments: Any, **fields: Any) -> Backend:
        config = AzureConfig(*arguments, driver=driver, **fields)
        backends.append(open_backend(parse_uri(uri), config, OpenOptions()))
        return backends[-1]

    yield opener
    for backend in backends:
        backend.close()


@pytest.fixture
def tls_container(azurite_tls: Azurite, request: pytest.FixtureRequest) -> Iterator[str]:
    with azurite_tls.container(f"tokens-{abs(hash(request.node.name))}") as name:
        yield name


@pytest.fixture
def authority(azurite_tls: Azurite, tmp_path: Path) -> Iterator[IdentityServer]:
    """An authority over TLS; ``bundle`` beside it trusts it and Azurite."""
    with IdentityServer(azurite_tls.bearer(), tmp_path) as server:
        yield server


@pytest.fixture
def bundle(azurite_tls: Azurite, authority: IdentityServer, tmp_path: Path) -> str:
    path = tmp_path / "bundle.pem"
    path.write_text(azurite_tls.ca.read_text() + authority.ca)
    return str(path)


@pytest.fixture
def machine(azurite_tls: Azurite) -> Iterator[IdentityServer]:
    """The metadata service of a machine with an identity."""
    with IdentityServer(azurite_tls.bearer()) as server:
        yield server


def test_account_key_over_tls(azurite_tls: Azurite, tls_container: str, opened: Opener) -> None:
    check_use(
        opened(
            f"azure://{tls_container}",
            *azurite_tls.main,
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=azurite_tls.ca,
        )
    )


def test_certificate_is_checked_unless_told_otherwise(
    azurite_tls: Azurite, tls_container: str, opened: Opener
) -> None:
    arguments = {"endpoint_url": azurite_tls.account_url()}
    backend = opened(f"azure://{tls_container}", *azurite_tls.main, **arguments)
    for refused in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(Exception, match="certificate") as caught:
            refused()
        assert type(caught.value).__name__ == "ConfigurationError"
    unchecked = opened(f"azure://{tls_container}", *azurite_tls.main, verify_ssl=False, **arguments)
    check_use(unchecked)


def test_bearer_token(azurite_tls: Azurite, tls_container: str, opened: Opener) -> None:
    check_use(
        opened(
            f"azure://{tls_container}",
            token=azurite_tls.bearer(),
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=azurite_tls.ca,
        )
    )


def test_bearer_token_that_is_none_is_refused(
    azurite_tls: Azurite, tls_container: str, opened: Opener
) -> None:
    backend = opened(
        f"azure://{tls_container}",
        token="no.bearer.token",
        endpoint_url=azurite_tls.account_url(),
        ca_bundle=azurite_tls.ca,
    )
    for refused in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(AuthenticationError) as caught:
            refused()
        assert "no.bearer.token" not in str(caught.value)


def test_bearer_token_signs_urls(azurite_tls: Azurite, tls_container: str, opened: Opener) -> None:
    import ssl
    import urllib.request

    azurite_tls.put_raw(tls_container, "m/a b", b"12345")
    backend = opened(
        f"azure://{tls_container}",
        token=azurite_tls.bearer(),
        endpoint_url=azurite_tls.account_url(),
        ca_bundle=azurite_tls.ca,
    )
    assert backend.capabilities.sign
    url = backend.sign("m/a b", "GET", 600)
    context = ssl.create_default_context(cafile=str(azurite_tls.ca))
    with urllib.request.urlopen(url, timeout=30, context=context) as answer:
        assert answer.read() == b"12345"


def test_service_principal(
    azurite_tls: Azurite,
    tls_container: str,
    authority: IdentityServer,
    bundle: str,
    opened: Opener,
) -> None:
    check_use(
        opened(
            f"azure://{tls_container}",
            tenant_id="my-tenant",
            client_id="my-client",
            client_secret="my-secret",
            authority_host=authority.url,
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=bundle,
        )
    )
    assert {asked.path for asked in authority.asked} == {"/my-tenant/oauth2/v2.0/token"}
    fields = authority.asked[0].fields
    assert fields["client_id"] == "my-client"
    assert fields["client_secret"] == "my-secret"
    assert fields["scope"] == "https://storage.azure.com/.default"
    # Both drivers and the file system share what was fetched.
    assert len(authority.asked) == 1


def test_refused_service_principal(
    azurite_tls: Azurite,
    tls_container: str,
    authority: IdentityServer,
    bundle: str,
    opened: Opener,
) -> None:
    authority.refuse = True
    backend = opened(
        f"azure://{tls_container}",
        tenant_id="my-tenant",
        client_id="my-client",
        client_secret="my-secret",
        authority_host=authority.url,
        endpoint_url=azurite_tls.account_url(),
        ca_bundle=bundle,
    )
    for refused in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(AuthenticationError, match="no Entra token") as caught:
            refused()
        assert "my-secret" not in str(caught.value)


def test_workload_identity(
    azurite_tls: Azurite,
    tls_container: str,
    authority: IdentityServer,
    bundle: str,
    opened: Opener,
    tmp_path: Path,
) -> None:
    token_file = tmp_path / "projected-token"
    token_file.write_text("token-of-the-cluster")
    check_use(
        opened(
            f"azure://{tls_container}",
            tenant_id="my-tenant",
            client_id="my-client",
            federated_token_file=token_file,
            authority_host=authority.url,
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=bundle,
        )
    )
    fields = authority.asked[0].fields
    assert fields["client_assertion"] == "token-of-the-cluster"
    assert fields["client_id"] == "my-client"


@pytest.mark.parametrize("client", [None, "my-client"], ids=["system", "user"])
def test_managed_identity_of_a_named_endpoint(
    azurite_tls: Azurite,
    tls_container: str,
    machine: IdentityServer,
    opened: Opener,
    client: str | None,
) -> None:
    check_use(
        opened(
            f"azure://{tls_container}",
            managed_identity=True,
            client_id=client,
            msi_endpoint=machine.url,
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=azurite_tls.ca,
        )
    )
    [asked] = machine.asked
    assert asked.path == "/metadata/identity/oauth2/token"
    assert asked.headers["metadata"] == "true"
    assert asked.fields["resource"] == "https://storage.azure.com/"
    assert asked.fields.get("client_id") == client


def test_refused_managed_identity(
    azurite_tls: Azurite, tls_container: str, machine: IdentityServer, opened: Opener
) -> None:
    machine.refuse = True
    backend = opened(
        f"azure://{tls_container}",
        managed_identity=True,
        msi_endpoint=machine.url,
        endpoint_url=azurite_tls.account_url(),
        ca_bundle=azurite_tls.ca,
    )
    with pytest.raises(AuthenticationError, match="managed identity"):
        backend.stat("a")


def test_managed_identity_of_app_service(
    azurite_tls: Azurite,
    tls_container: str,
    machine: IdentityServer,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{machine.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "secret-header")
    # Of another workload: the system's identity is asked for.
    monkeypatch.setenv("AZURE_CLIENT_ID", "another-client")
    check_use(
        opened(
            f"azure://{tls_container}",
            managed_identity=True,
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=azurite_tls.ca,
        )
    )
    asked = machine.asked[0]
    assert asked.path == "/msi/token"
    assert asked.headers["x-identity-header"] == "secret-header"
    assert "client_id" not in asked.fields


def test_service_principal_of_the_environment(
    azurite_tls: Azurite,
    tls_container: str,
    authority: IdentityServer,
    bundle: str,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_TENANT_ID", "env-tenant")
    monkeypatch.setenv("AZURE_CLIENT_ID", "env-client")
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "env-secret")
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", authority.url)
    check_use(
        opened(f"azure://{tls_container}", endpoint_url=azurite_tls.account_url(), ca_bundle=bundle)
    )
    assert authority.asked[0].path == "/env-tenant/oauth2/v2.0/token"
    assert authority.asked[0].fields["client_secret"] == "env-secret"


def test_workload_identity_of_the_environment(
    azurite_tls: Azurite,
    tls_container: str,
    authority: IdentityServer,
    bundle: str,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    token_file = tmp_path / "projected-token"
    token_file.write_text("token-of-the-cluster")
    monkeypatch.setenv("AZURE_TENANT_ID", "env-tenant")
    monkeypatch.setenv("AZURE_CLIENT_ID", "env-client")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(token_file))
    monkeypatch.setenv("AZURE_AUTHORITY_HOST", authority.url)
    check_use(
        opened(f"azure://{tls_container}", endpoint_url=azurite_tls.account_url(), ca_bundle=bundle)
    )
    assert authority.asked[0].fields["client_assertion"] == "token-of-the-cluster"


def test_login_of_the_command_line(
    azurite_tls: Azurite,
    tls_container: str,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # What "az account get-access-token" prints.
    answer = {
        "accessToken": azurite_tls.bearer(),
        "expires_on": int((datetime.now(UTC) + timedelta(hours=1)).timestamp()),
        "expiresOn": "2099-01-01 00:00:00.000000",
        "tokenType": "Bearer",
    }
    command = tmp_path / "bin" / "az"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    # The chain would look for the metadata service of a cloud machine first, and wait.
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")
    check_use(
        opened(
            f"azure://{tls_container}",
            endpoint_url=azurite_tls.account_url(),
            ca_bundle=azurite_tls.ca,
        )
    )
