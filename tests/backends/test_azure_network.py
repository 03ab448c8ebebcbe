"""Azure through proxies, by both drivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import AzureConfig
from storage.errors import UnreachableError
from storage.uri import parse_uri
from tests.servers.azurite import Azurite
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.process import HOST, free_port


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Literal["obstore", "fsspec"]:
    found: Literal["obstore", "fsspec"] = request.param
    return found


@pytest.fixture
def opened(driver: Literal["obstore", "fsspec"]) -> Iterator[Callable[..., Backend]]:
    backends: list[Backend] = []

    def opener(endpoint: str, container: str, **fields: Any) -> Backend:
        config = AzureConfig(**fields, endpoint_url=endpoint, driver=driver)
        backends.append(open_backend(parse_uri(f"azure://{container}/"), config, OpenOptions()))
        return backends[-1]

    yield opener
    for backend in backends:
        backend.close()


def use(backend: Backend) -> None:
    backend.write("m", bytes_payload(b"weights"))
    assert [info.key for info in backend.list()] == ["m"]
    with backend.read("m", pin=backend.stat("m")) as body:
        assert b"".join(bytes(piece) for piece in body) == b"weights"


def test_requests_go_through_the_proxy_of_the_config(
    azurite: Azurite, azurite_container: str, opened: Callable[..., Backend]
) -> None:
    host = f"{azurite.main.name}.example"
    hosts = {host: (HOST, azurite.port)}
    with ForwardProxy("user", "pass", hosts) as proxy:
        backend = opened(
            f"http://{host}",
            azurite_container,
            account_name=azurite.main.name,
            account_key=azurite.main.key,
            proxy=f"http://user:pass@{proxy.address}",
        )
        use(backend)
        files, root = backend.filesystem()
        assert files.cat_file(f"{root}/m") == b"weights"
        assert set(proxy.asked) == {f"{host}:80"}
        assert proxy.refused == 0


def test_requests_go_through_the_proxy_of_the_environment(
    azurite: Azurite,
    azurite_container: str,
    opened: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = f"{azurite.main.name}.example"
    hosts = {host: (HOST, azurite.port)}
    with ForwardProxy(hosts=hosts) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        backend = opened(
            f"http://{host}",
            azurite_container,
            account_name=azurite.main.name,
            account_key=azurite.main.key,
        )
        use(backend)
        assert set(proxy.asked) == {f"{host}:80"}


def test_tls_goes_through_the_proxy_of_the_config(
    azurite_tls: Azurite, opened: Callable[..., Backend]
) -> None:
    with ForwardProxy() as proxy, azurite_tls.container("by-proxy") as container:
        backend = opened(
            azurite_tls.account_url(),
            container,
            token=azurite_tls.bearer(),
            ca_bundle=azurite_tls.ca,
            proxy=proxy.url,
        )
        use(backend)
        assert set(proxy.asked) == {f"{HOST}:{azurite_tls.port}"}


def test_proxy_that_is_not_there_is_named(
    azurite: Azurite, azurite_container: str, opened: Callable[..., Backend]
) -> None:
    backend = opened(
        azurite.account_url(),
        azurite_container,
        account_key=azurite.main.key,
        proxy=f"http://user:hidden@{HOST}:{free_port()}",
    )
    for call in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(UnreachableError) as caught:
            call()
        assert "hidden" not in str(caught.value)
