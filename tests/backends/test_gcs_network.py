"""GCS over TLS of a private authority and through proxies, on both drivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import GCSConfig
from storage.errors import AuthenticationError, StorageError, TransientError, UnreachableError
from storage.uri import parse_uri
from tests.servers import FakeGCS
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.process import HOST, free_port
from tests.servers.tls import TlsFront


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def front(gcs_server: FakeGCS) -> Iterator[TlsFront]:
    with TlsFront(gcs_server.endpoint) as server:
        yield server


@pytest.fixture
def opened(gcs_server: FakeGCS, gcs_bucket: str, driver: Any) -> Iterator[Callable[..., Backend]]:
    gcs_server.put_raw(gcs_bucket, "m", b"weights")
    backends: list[Backend] = []

    def make(endpoint: str, **options: Any) -> Backend:
        config = GCSConfig(token="t", endpoint_url=endpoint, driver=driver, **options)
        backends.append(open_backend(parse_uri(f"gs://{gcs_bucket}/"), config, OpenOptions()))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def read(backend: Backend) -> bytes:
    assert [info.key for info in backend.list()] == ["m"]
    with backend.read("m", pin=backend.stat("m")) as body:
        return b"".join(bytes(piece) for piece in body)


def test_private_authority_is_trusted_if_the_config_says_so(
    front: TlsFront, opened: Callable[..., Backend]
) -> None:
    backend = opened(front.endpoint, ca_bundle=front.ca_file)
    assert read(backend) == b"weights"
    files, root = backend.filesystem()
    assert files.cat_file(f"{root}/m") == b"weights"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_private_authority_is_trusted_if_the_environment_says_so(
    front: TlsFront,
    opened: Callable[..., Backend],
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, str(front.ca_file))
    assert read(opened(front.endpoint)) == b"weights"


def test_private_authority_is_not_trusted_unasked(
    front: TlsFront, opened: Callable[..., Backend]
) -> None:
    with pytest.raises(StorageError, match=r"(?i)certificate") as caught:
        opened(front.endpoint).stat("m")
    # Asking again will not make it better.
    assert not isinstance(caught.value, TransientError)


def test_certificate_need_not_be_checked(front: TlsFront, opened: Callable[..., Backend]) -> None:
    assert read(opened(front.endpoint, verify_ssl=False)) == b"weights"


def test_requests_go_through_the_proxy_of_the_config(
    gcs_server: FakeGCS, opened: Callable[..., Backend]
) -> None:
    with ForwardProxy("user", "pass") as proxy:
        backend = opened(gcs_server.endpoint, proxy=f"http://user:pass@{proxy.address}")
        assert read(backend) == b"weights"
        before = len(proxy.asked)
        files, root = backend.filesystem()
        assert files.cat_file(f"{root}/m") == b"weights"
        assert len(proxy.asked) > before
    assert set(proxy.asked) == {f"{HOST}:{gcs_server.port}"}


def test_tls_goes_through_the_proxy_as_well(
    front: TlsFront, opened: Callable[..., Backend]
) -> None:
    with ForwardProxy() as proxy:
        backend = opened(front.endpoint, proxy=proxy.url, ca_bundle=front.ca_file)
        assert read(backend) == b"weights"
    assert f"{HOST}:{front.port}" in proxy.asked


def test_proxy_that_wants_a_password_is_no_transient_failure(
    gcs_server: FakeGCS, opened: Callable[..., Backend]
) -> None:
    with ForwardProxy("user", "pass") as proxy:
        with pytest.raises(AuthenticationError):
            opened(gcs_server.endpoint, proxy=proxy.url).stat("m")
        assert proxy.refused
        assert not proxy.asked


def test_proxy_of_the_environment(
    gcs_server: FakeGCS, opened: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ForwardProxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert read(opened(gcs_server.endpoint)) == b"weights"
        assert proxy.asked
        before = len(proxy.asked)
        monkeypatch.setenv("no_proxy", HOST)
        assert read(opened(gcs_server.endpoint)) == b"weights"
        assert len(proxy.asked) == before


def test_nobody_answers(opened: Callable[..., Backend]) -> None:
    backend = opened(f"http://{HOST}:{free_port()}")
    for call in (lambda: backend.stat("m"), lambda: list(backend.list()), lambda: read(backend)):
        with pytest.raises(UnreachableError):
            call()


def test_nobody_answers_at_the_proxy(gcs_server: FakeGCS, opened: Callable[..., Backend]) -> None:
    backend = opened(gcs_server.endpoint, proxy=f"http://{HOST}:{free_port()}")
    with pytest.raises(UnreachableError):
        backend.stat("m")
