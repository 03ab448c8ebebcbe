"""Who we are over HTTP, what the server makes of it, and what nobody gets to know."""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import Storage
from storage.backends.base import OpenOptions
from storage.backends.http.access import make_access
from storage.client import StorageClient
from storage.config import HTTPConfig
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidInput,
    StorageError,
    TransferError,
    UnreachableError,
)
from tests.backends.http_support import CANARY, empty, fast_client, quiet
from tests.servers import free_port
from tests.servers.nginx_http import PASSWORD, USER, NginxHTTP, put_file
from tests.servers.odd_http import OddHTTP, Reply, Request, StaticFile

DATA = b"the model"


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    put_file(nginx_http.data, "m.bin", DATA)
    yield nginx_http
    empty(nginx_http.data)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


SECRETS = HTTPConfig(
    headers={"X-Api-Key": CANARY, "Cookie": f"session={CANARY}", "Authorization": CANARY}
)


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"token": "t0ken"}, {"Authorization": "Bearer t0ken"}),
        ({"username": "u", "password": "p:w"}, {"Authorization": basic("u", "p:w")}),
        ({"username": "ü"}, {"Authorization": basic("ü", "")}),
        ({"headers": {"X-Api-Key": "k", "Accept": "a/b"}}, {"X-Api-Key": "k", "Accept": "a/b"}),
        ({"headers": {"authorization": "own"}, "token": "t"}, {"Authorization": "own"}),
        ({"headers": {"User-Agent": "me/1"}}, {"User-Agent": "me/1"}),
        ({"headers": {"X-Note": "ß"}}, {"X-Note": "ß".encode().decode("latin-1")}),
    ],
)
def test_config_is_sent_with_every_request(
    odd_http: Callable[..., OddHTTP], out: Path, config: dict[str, Any], expected: dict[str, str]
) -> None:
    server = odd_http(StaticFile(DATA))
    Storage.download(f"{server.url}/m.bin", out, config=config)
    assert [one.method for one in server.requests] == ["HEAD", "GET"]
    for request in server.requests:
        for name, value in expected.items():
            assert request.headers.get_all(name) == [value]


@pytest.mark.parametrize("token", [f"{CANARY}\nmore", f"X {CANARY}", f"{CANARY}\r\nX-Own: 1"])
def test_token_that_is_none_is_neither_sent_nor_shown(
    odd_http: Callable[..., OddHTTP], out: Path, token: str
) -> None:
    server = odd_http(StaticFile(DATA))
    with pytest.raises(ConfigurationError, match="the token") as caught:
        Storage.download(f"{server.url}/m.bin", out, config=HTTPConfig(token=token))
    assert quiet(caught.value)
    assert server.requests == []


def test_user_in_the_url_is_sent_as_basic_authentication(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    server = odd_http(StaticFile(DATA))
    url = server.url.replace("http://", "http://us%40er:p%2Fw@")
    Storage.download(f"{url}/m.bin", out)
    assert {one.headers["Authorization"] for one in server.requests} == {basic("us@er", "p/w")}
    assert {one.target for one in server.requests} == {"/m.bin"}
    server.clear()
    Storage.download(f"{url}/m.bin", out, config=HTTPConfig(token="t"), overwrite=True)
    assert {one.headers["Authorization"] for one in server.requests} == {"Bearer t"}


def test_netrc_is_not_read(
    odd_http: Callable[..., OddHTTP], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server = odd_http(StaticFile(DATA))
    Storage.download(f"{server.url}/m.bin", out)
    assert [one.headers.get("Authorization") for one in server.requests] == [None, None]


def test_nginx_asks_for_user_and_password(nginx: NginxHTTP, out: Path) -> None:
    url = f"{nginx.odd}/private/m.bin"
    with pytest.raises(AuthenticationError, match="asks for Basic"):
        Storage.download(url, out)
    with pytest.raises(AuthenticationError) as caught:
        Storage.download(url, out, config=HTTPConfig(username=USER, password=CANARY))
    assert quiet(caught.value)
    Storage.download(url, out, config=HTTPConfig(username=USER, password=PASSWORD))
    assert out.read_bytes() == DATA


def test_two_configs_for_two_hosts_in_one_process(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    servers = [odd_http(StaticFile(DATA)) for _ in range(2)]
    for _ in range(2):
        for number, server in enumerate(servers):
            config = HTTPConfig(token=f"token-{number}")
            Storage.download(
                f"{server.url}/m.bin", tmp_path / str(number), config=config, overwrite=True
            )
    for number, server in enumerate(servers):
        sent = {one.headers["Authorization"] for one in server.requests}
        assert sent == {f"Bearer token-{number}"}


def test_settings_choose_the_config_by_host(
    odd_http: Callable[..., OddHTTP], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = odd_http(StaticFile(DATA)), odd_http(StaticFile(DATA))
    file = tmp_path / "settings.toml"
    file.write_text(f'[stores.ours]\nprefix = "{ours.url}/models"\ntoken = "t"\n')
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(file))
    with StorageClient() as client:
        client.download(f"{ours.url}/models/m.bin", out)
        client.download(f"{ours.url}/modelsX/m.bin", out, overwrite=True)
        client.download(f"{theirs.url}/models/m.bin", out, overwrite=True)
    sent = [one.headers.get("Authorization") for one in ours.requests + theirs.requests]
    assert sent == ["Bearer t"] * 2 + [None] * 4


# -- KServe's variables --------------------------------------------------------------------------


def test_headers_in_kserves_variable_go_to_that_host_alone(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = odd_http(StaticFile(DATA), "localhost")
    theirs = odd_http(StaticFile(DATA))
    monkeypatch.setenv("localhost-headers", json.dumps({"X-Key": "k", "Authorization": "Bearer t"}))
    Storage.download(f"{ours.url}/m.bin", tmp_path / "1")
    Storage.download(f"{theirs.url}/m.bin", tmp_path / "2")
    assert {(one.headers["X-Key"], one.headers["Authorization"]) for one in ours.requests} == {
        ("k", "Bearer t")
    }
    assert {one.headers["X-Key"] for one in theirs.requests} == {None}


def test_config_with_credentials_goes_before_kserves_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("host.example-headers", '{"X-Key": "k"}')
    url = "https://HOST.example:8443/m.bin"
    assert make_access(url, None, OpenOptions()).headers == {"X-Key": "k"}
    other = make_access(url, HTTPConfig(connect_timeout=1), OpenOptions())
    assert (other.headers, other.connect_timeout) == ({"X-Key": "k"}, 1)
    config = HTTPConfig(token="t")
    assert make_access(url, config, OpenOptions()).headers == {"Authorization": "Bearer t"}


@pytest.mark.parametrize(
    "value",
    [CANARY, f'["{CANARY}"]', f'{{"A": {{"{CANARY}": 1}}}}', f'{{"A": "{CANARY}\\r\\nB: c"}}'],
)
def test_malformed_variable_of_kserve_is_named_and_not_shown(
    out: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("host.example-headers", value)
    with pytest.raises(ConfigurationError, match=r"host\.example-headers") as caught:
        Storage.download("http://host.example/m.bin", out)
    assert quiet(caught.value)


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, FileNotFoundError),
        (410, FileNotFoundError),
        (418, StorageError),
        (451, StorageError),
    ],
)
def test_permanent_refusal_is_asked_once_by_each_method(
    odd_http: Callable[..., OddHTTP], out: Path, status: int, error: type[Exception]
) -> None:
    server = odd_http(lambda one: Reply(status))
    url = server.url.replace("//", f"//user:{CANARY}@")
    with pytest.raises(error) as caught:
        Storage.download(f"{url}/m.bin?X-Amz-Signature={CANARY}", out)
    assert isinstance(caught.value, StorageError)
    assert not isinstance(caught.value, TransferError)
    assert quiet(caught.value)
    assert len(server.requests) <= 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_refusal_is_repeated(
    odd_http: Callable[..., OddHTTP], out: Path, status: int
) -> None:
    file = StaticFile(DATA)
    count = iter(range(100))
    server = odd_http(
        lambda one: (
            Reply(status, headers={"Retry-After": "0"}) if next(count) in (0, 2) else file(one)
        )
    )
    with fast_client() as client:
        client.download(f"{server.url}/m.bin", out)
    assert out.read_bytes() == DATA
    assert [one.method for one in server.requests] == ["HEAD", "HEAD", "GET", "GET"]


def test_signed_url_that_is_refused_says_why_that_may_be(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    server = odd_http(lambda one: Reply(403))
    with pytest.raises(AuthenticationError, match="it may have expired") as caught:
        Storage.download(f"{server.url}/m.bin?X-Amz-Signature={CANARY}&X-Amz-Expires=1", out)
    assert quiet(caught.value)


def test_nobody_at_the_address(out: Path) -> None:
    with fast_client(attempts=1) as client:
        url = f"http://user:{CANARY}@127.0.0.1:{free_port()}/m.bin?sig={CANARY}"
        with pytest.raises(UnreachableError, match="nobody answers") as caught:
            client.download(url, out)
    assert quiet(caught.value)


def test_host_without_an_address(out: Path) -> None:
    with fast_client(attempts=1) as client, pytest.raises(UnreachableError) as caught:
        client.download(f"http://no-such-host.invalid/m.bin?sig={CANARY}", out)
    assert quiet(caught.value)


@pytest.mark.parametrize(
    "url", ["http://a..b/m.bin", "http://ex%41mple/m.bin", f"http://{'a' * 70}/m"]
)
def test_host_that_cannot_be_one(out: Path, url: str) -> None:
    with fast_client(attempts=1) as client, pytest.raises((InvalidInput, UnreachableError)):
        client.download(url, out)


def test_server_that_says_nothing_is_given_up(odd_http: Callable[..., OddHTTP], out: Path) -> None:
    done = threading.Event()

    def handler(request: Request) -> Reply:
        done.wait(60)
        return Reply()

    server = odd_http(handler)
    config = HTTPConfig(read_timeout=0.2)
    try:
        with (
            fast_client(attempts=2) as client,
            pytest.raises(TransferError, match=r"not a byte came for 0\.2 s") as caught,
        ):
            client.download(f"{server.url}/m.bin?sig={CANARY}", out, config=config)
    finally:
        done.set()
    assert quiet(caught.value)


def test_log_holds_no_query_and_no_header(
    odd_http: Callable[..., OddHTTP], out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = odd_http(StaticFile(DATA))
    with caplog.at_level(logging.DEBUG):
        url = server.url.replace("//", f"//user:{CANARY}@")
        Storage.download(f"{url}/m.bin?sig={CANARY}", out, config=SECRETS)
        Storage.upload(out, f"{url}/m.bin?sig={CANARY}", config=SECRETS)
    assert "urllib3" in {record.name.partition(".")[0] for record in caplog.records}
    assert CANARY not in caplog.text
