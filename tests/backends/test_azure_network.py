"""Azure through proxies, by both drivers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import AzureConfig
from storage.errors import AuthenticationError, UnreachableError
from storage.uri import parse_uri
from tests.servers.azurite import Azurite
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.odd_http import OddHTTP, Reply
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


@pytest.mark.parametrize(
    ("fields", "sent"),
    [({"account_key": "a2V5"}, "SharedKey"), ({"anonymous": True}, None)],
    ids=["key", "anonymous"],
)
def test_passwords_of_a_netrc_stay_there(
    opened: Callable[..., Backend],
    fields: dict[str, Any],
    sent: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password hidden\n")
    monkeypatch.setenv("NETRC", str(netrc))
    described = {"ETag": '"0x1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    with OddHTTP(lambda request: Reply(200, b"12345", described)) as server:
        backend = opened(f"{server.url}/acct", "c", account_name="acct", **fields)
        with backend.read("a") as body:
            assert b"".join(bytes(piece) for piece in body) == b"12345"
        found = server.requests[-1].headers["Authorization"]
    assert (found and found.partition(" ")[0]) == sent


def test_exception_to_the_proxy_of_the_environment(
    azurite: Azurite,
    azurite_container: str,
    opened: Callable[..., Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://{HOST}:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, HOST)
    account, key = azurite.main
    use(opened(azurite.account_url(), azurite_container, account_name=account, account_key=key))


@pytest.mark.parametrize("size", [5, 20 * 1024 * 1024], ids=["small", "large"])
def test_refused_bearer_token_is_offered_once(
    opened: Callable[..., Backend], tmp_path: Path, size: int
) -> None:
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(tls)
    challenge = (
        "Bearer authorization_uri=https://login.microsoftonline.com/tenant/oauth2/authorize "
        "resource_id=https://storage.azure.com"
    )
    answer = Reply(401, b"", {"WWW-Authenticate": challenge})
    with OddHTTP(lambda request: answer, tls=tls) as server:
        backend = opened(f"{server.url}/acct", "c", token="expired", ca_bundle=tmp_path / "ca.pem")
        with pytest.raises(AuthenticationError):
            backend.write("a", bytes_payload(bytes(size)))
        targets = [request.target for request in server.requests]
    assert len(targets) == len(set(targets)) > 0
