"""TLS and proxies on the way to an HTTP server."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from storage import Storage, StorageOperations
from storage.client import StorageClient
from storage.config import HTTPConfig
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    StorageError,
    UnreachableError,
)
from tests.backends.http_support import CANARY, empty, fast_client, quiet
from tests.servers import free_port
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import Handler, OddHTTP, Reply, StaticFile

DATA = b"the model"


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    put_file(nginx_http.data, "m.bin", DATA)
    yield nginx_http
    empty(nginx_http.data)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def redirect(location: str, status: int = 302) -> Handler:
    return lambda request: Reply(status, headers={"Location": location})


# -- TLS -----------------------------------------------------------------------------------------


def test_authority_is_named_by_the_config(nginx: NginxHTTP, out: Path) -> None:
    Storage.download(f"{nginx.tls}/m.bin", out, config=HTTPConfig(ca_bundle=nginx.ca_file))
    assert out.read_bytes() == DATA


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_authority_is_named_by_the_environment(
    nginx: NginxHTTP, out: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, nginx.ca_file)
    with StorageClient() as client:
        client.download(f"{nginx.tls}/m.bin", out)
    assert out.read_bytes() == DATA


def test_config_goes_before_the_environment(
    nginx: NginxHTTP, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other))
    Storage.download(f"{nginx.tls}/m.bin", out, config=HTTPConfig(ca_bundle=nginx.ca_file))


def test_unknown_authority_is_an_error_that_says_what_to_do(nginx: NginxHTTP, out: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"not trusted .* ca_bundle") as caught:
        Storage.download(f"{nginx.tls}/m.bin?sig={CANARY}", out)
    assert quiet(caught.value)


def test_certificate_of_another_host_is_not_trusted(
    nginx: NginxHTTP, odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    nginx.ca.issue_cert("other.example").configure_cert(tls)
    server = odd_http(StaticFile(DATA), "127.0.0.1", tls)
    with pytest.raises(ConfigurationError, match="not trusted"):
        Storage.download(f"{server.url}/m.bin", out, config=HTTPConfig(ca_bundle=nginx.ca_file))


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_verification_can_be_turned_off(nginx: NginxHTTP, out: Path) -> None:
    Storage.download(f"{nginx.tls}/m.bin", out, config=HTTPConfig(verify_ssl=False))
    assert out.read_bytes() == DATA
    # Connections that nobody verified are not used for those who want it.
    with pytest.raises(ConfigurationError, match="not trusted"):
        Storage.download(f"{nginx.tls}/m.bin", out, config=HTTPConfig(), overwrite=True)


def test_client_certificate_is_shown(nginx: NginxHTTP, out: Path, tmp_path: Path) -> None:
    url = f"{nginx.mutual_tls}/m.bin"
    shown = HTTPConfig(ca_bundle=nginx.ca_file, client_cert=nginx.client_file)
    Storage.download(url, out, config=shown)
    assert out.read_bytes() == DATA
    # Nor are those that were opened with a certificate used without.
    for config in (
        HTTPConfig(ca_bundle=nginx.ca_file),
        HTTPConfig(ca_bundle=nginx.ca_file, client_cert=nginx.stranger_file),
    ):
        with pytest.raises(StorageError):
            Storage.download(url, tmp_path / "none", config=config)


def test_certificate_and_key_may_be_two_files(nginx: NginxHTTP, out: Path, tmp_path: Path) -> None:
    text = Path(nginx.client_file).read_text()
    begin = text.index("-----BEGIN CERTIFICATE")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    key.write_text(text[:begin])
    cert.write_text(text[begin:])
    config = HTTPConfig(ca_bundle=nginx.ca_file, client_cert=cert, client_key=key)
    Storage.download(f"{nginx.mutual_tls}/m.bin", out, config=config)
    assert out.read_bytes() == DATA


def test_client_certificate_stays_on_its_host(
    nginx: NginxHTTP, odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(nginx.folder / "server.pem")
    server = odd_http(redirect(f"{nginx.mutual_tls}/m.bin"), "127.0.0.1", tls)
    config = HTTPConfig(ca_bundle=nginx.ca_file, client_cert=nginx.client_file)
    with pytest.raises(StorageError):
        Storage.download(f"{server.url}/m.bin", out, config=config)


@pytest.mark.parametrize("field", ["ca_bundle", "client_cert"])
@pytest.mark.parametrize("there", [False, True], ids=["missing", "rubbish"])
def test_unusable_file_is_named(
    nginx: NginxHTTP, out: Path, tmp_path: Path, field: str, there: bool
) -> None:
    file = tmp_path / "file.pem"
    if there:
        file.write_text("rubbish")
    fields: dict[str, Any] = {"ca_bundle": nginx.ca_file, field: str(file)}
    with pytest.raises(ConfigurationError, match=field):
        Storage.download(f"{nginx.tls}/m.bin", out, config=HTTPConfig(**fields))


def test_http_at_a_port_of_https_and_the_other_way_round(nginx: NginxHTTP, out: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not speak TLS"):
        Storage.download(nginx.endpoint.replace("http:", "https:") + "/m.bin", out)
    with pytest.raises(StorageError):
        Storage.download(nginx.tls.replace("https:", "http:") + "/m.bin", out)


# -- proxies -------------------------------------------------------------------------------------


@pytest.fixture
def proxy(nginx: NginxHTTP) -> Iterator[ForwardProxy]:
    ports = {"127.0.0.1": ("127.0.0.1", nginx.port)}
    hosts = {"models.example": ports["127.0.0.1"], "secure.example": ("127.0.0.1", nginx.ports[1])}
    with ForwardProxy("user", f"p@ss{CANARY}", hosts) as proxy:
        yield proxy


def proxy_url(proxy: ForwardProxy) -> str:
    return f"http://user:p%40ss{CANARY}@{proxy.address}"


def test_everything_goes_through_the_proxy(
    nginx: NginxHTTP, proxy: ForwardProxy, out: Path
) -> None:
    config = HTTPConfig(proxy=proxy_url(proxy))
    Storage.download("http://models.example/m.bin", out, config=config)
    assert out.read_bytes() == DATA
    Storage.upload(out, "http://models.example/new.bin", config=config)
    assert (nginx.data / "new.bin").read_bytes() == DATA
    assert set(proxy.asked) == {"models.example:80"}
    assert proxy.refused == 0


def test_tls_goes_through_a_tunnel(nginx: NginxHTTP, proxy: ForwardProxy, out: Path) -> None:
    config = HTTPConfig(proxy=proxy_url(proxy), ca_bundle=nginx.ca_file)
    Storage.download(f"{nginx.tls}/m.bin", out, config=config)
    assert out.read_bytes() == DATA
    assert set(proxy.asked) == {nginx.tls.removeprefix("https://")}


def test_proxy_of_the_environment_is_used_but_for_its_exceptions(
    nginx: NginxHTTP, proxy: ForwardProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy_url(proxy))
    monkeypatch.setenv("http_proxy", proxy_url(proxy))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with StorageClient() as client:
        client.download("http://models.example/m.bin", tmp_path / "1")
        client.download(f"{nginx.endpoint}/m.bin", tmp_path / "2")
    assert set(proxy.asked) == {"models.example:80"}


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_proxy_that_refuses_is_named_as_such(
    nginx: NginxHTTP, proxy: ForwardProxy, out: Path, tls: bool
) -> None:
    wrong = f"http://user:wrong{CANARY}@{proxy.address}"
    config = HTTPConfig(proxy=wrong, ca_bundle=nginx.ca_file)
    url = nginx.tls if tls else "http://models.example"
    with pytest.raises(AuthenticationError, match="proxy") as caught:
        Storage.download(f"{url}/m.bin", out, config=config)
    assert quiet(caught.value)
    assert proxy.asked == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_is_not_there(out: Path, scheme: str) -> None:
    config = HTTPConfig(proxy=f"http://user:{CANARY}@127.0.0.1:{free_port()}")
    with fast_client(attempts=1) as client, pytest.raises(UnreachableError) as caught:
        client.download(f"{scheme}://models.example/m.bin", out, config=config)
    assert quiet(caught.value)


def test_metadata_and_deletion_use_the_same_access(nginx: NginxHTTP, proxy: ForwardProxy) -> None:
    config = HTTPConfig(proxy=proxy_url(proxy))
    described = StorageOperations.get_object_metadata("http://models.example/m.bin", config=config)
    assert described["size"] == len(DATA)
    assert StorageOperations.delete_object("http://models.example/m.bin", config=config)
    assert not (nginx.data / "m.bin").exists()
