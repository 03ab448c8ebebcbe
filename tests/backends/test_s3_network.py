"""S3 over TLS of a private authority and through proxies, on both drivers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import S3Config
from storage.digest import Digest
from storage.errors import StorageError, TransientError
from storage.uri import parse_uri
from tests.servers import CountingProxy, SeaweedFS
from tests.servers.tls import TlsFront


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def front(seaweedfs: SeaweedFS) -> Iterator[TlsFront]:
    with TlsFront(seaweedfs.endpoint) as server:
        yield server


@pytest.fixture
def opened(
    seaweedfs: SeaweedFS, shared_bucket: str, driver: Any
) -> Iterator[Callable[..., Backend]]:
    backends: list[Backend] = []

    def make(endpoint: str, **options: Any) -> Backend:
        config = S3Config(
            seaweedfs.access_key,
            seaweedfs.secret_key,
            endpoint_url=endpoint,
            driver=driver,
            **options,
        )
        location = parse_uri(f"s3://{shared_bucket}/")
        backends.append(open_backend(location, config, OpenOptions()))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def round_trip(backend: Backend, key: str) -> None:
    backend.write(key, bytes_payload(b"weights"))
    with backend.read(key) as body:
        assert b"".join(bytes(chunk) for chunk in body) == b"weights"
    # Asked by a client of its own, where obstore moves the bytes.
    assert backend.checksums(backend.stat(key)) == (
        Digest("sha256", hashlib.sha256(b"weights").hexdigest()),
    )


def test_private_authority_is_trusted_if_the_config_says_so(
    front: TlsFront, opened: Callable[..., Backend], prefix: str
) -> None:
    round_trip(opened(front.endpoint, ca_bundle=front.ca_file), f"{prefix}/m")


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_private_authority_is_trusted_if_the_environment_says_so(
    front: TlsFront,
    opened: Callable[..., Backend],
    prefix: str,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, str(front.ca_file))
    round_trip(opened(front.endpoint), f"{prefix}/m")


def test_private_authority_is_not_trusted_unasked(
    front: TlsFront, opened: Callable[..., Backend], prefix: str
) -> None:
    with pytest.raises(StorageError, match="certificate") as caught:
        opened(front.endpoint).stat(f"{prefix}/m")
    # Asking again will not make it better.
    assert not isinstance(caught.value, TransientError)


def test_certificate_need_not_be_checked(
    front: TlsFront, opened: Callable[..., Backend], prefix: str
) -> None:
    round_trip(opened(front.endpoint, verify_ssl=False), f"{prefix}/m")


def test_requests_go_through_the_proxy_of_the_config(
    seaweedfs: SeaweedFS,
    opened: Callable[..., Backend],
    prefix: str,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    proxy = counting_proxy(seaweedfs.endpoint)
    round_trip(opened(seaweedfs.endpoint, proxy=proxy.endpoint), f"{prefix}/m")
    assert {request.method for request in proxy.requests} >= {"PUT", "GET", "HEAD"}
