"""Redirections: where they lead, and what does not go there."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import Storage
from storage.config import HTTPConfig
from storage.errors import (
    AuthenticationError,
    StorageError,
)
from tests.backends.http_support import CANARY, empty, quiet
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import Handler, OddHTTP, Reply, Request, StaticFile

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


SECRETS = HTTPConfig(
    headers={"X-Api-Key": CANARY, "Cookie": f"session={CANARY}", "Authorization": CANARY}
)


def shown(server: OddHTTP) -> set[str]:
    """Return what of the secrets a server saw."""
    return {
        name
        for request in server.requests
        for name, value in request.headers.items()
        if CANARY in value
    }


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirection_to_another_host_carries_no_secret(
    odd_http: Callable[..., OddHTTP], out: Path, status: int
) -> None:
    theirs = odd_http(StaticFile(DATA), "localhost")
    ours = odd_http(redirect(f"{theirs.url}/there.bin?x=1", status))
    Storage.download(f"{ours.url}/m.bin", out, config=SECRETS)
    assert out.read_bytes() == DATA
    assert shown(ours) == {"X-Api-Key", "Cookie", "Authorization"}
    assert [one.target for one in theirs.requests] == ["/there.bin?x=1"] * 2
    assert shown(theirs) == set()


@pytest.mark.parametrize("config", [HTTPConfig(token=CANARY), None], ids=["token", "in-the-url"])
def test_another_port_is_another_host(
    odd_http: Callable[..., OddHTTP], out: Path, config: HTTPConfig | None
) -> None:
    theirs = odd_http(StaticFile(DATA))
    ours = odd_http(redirect(f"{theirs.url}/m.bin"))
    url = ours.url if config else ours.url.replace("//", f"//user:{CANARY}@")
    Storage.download(f"{url}/m.bin", out, config=config)
    assert "Authorization" in ours.requests[0].headers
    assert all("Authorization" not in one.headers for one in theirs.requests)


def test_redirection_on_the_same_host_keeps_the_secrets(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    file = StaticFile(DATA)
    server = odd_http(
        lambda one: (
            Reply(302, headers={"Location": "new/m.bin"}) if one.path == "/old/m.bin" else file(one)
        )
    )
    Storage.download(f"{server.url}/old/m.bin", out, config=SECRETS)
    paths = [(one.path, one.headers["X-Api-Key"]) for one in server.requests]
    assert paths == [("/old/m.bin", CANARY), ("/old/new/m.bin", CANARY)] * 2


def test_secrets_do_not_come_back_from_another_host(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    file = StaticFile(DATA)
    ours_url: list[str] = []
    theirs = odd_http(
        lambda one: Reply(302, headers={"Location": f"{ours_url[0]}/back"}), "localhost"
    )
    ours = odd_http(
        lambda one: (
            file(one) if one.path == "/back" else Reply(302, headers={"Location": f"{theirs.url}/"})
        )
    )
    ours_url.append(ours.url)
    Storage.download(f"{ours.url}/m.bin", out, config=SECRETS)
    assert {one.path for one in ours.requests if "X-Api-Key" in one.headers} == {"/m.bin"}


def test_user_in_a_redirection_is_not_believed(odd_http: Callable[..., OddHTTP], out: Path) -> None:
    theirs = odd_http(StaticFile(DATA), "localhost")
    ours = odd_http(redirect(theirs.url.replace("//", f"//user:{CANARY}@") + "/m.bin"))
    Storage.download(f"{ours.url}/m.bin", out)
    assert all("Authorization" not in one.headers for one in theirs.requests)


def test_cookies_last_for_one_chain_and_stay_on_their_host(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    file = StaticFile(DATA)
    theirs = odd_http(file, "localhost")

    def handler(request: Request) -> Reply:
        if request.path == "/m.bin":
            return Reply(302, headers={"Location": "/second", "Set-Cookie": "seen=1; Path=/"})
        return Reply(302, headers={"Location": f"{theirs.url}/m.bin"})

    ours = odd_http(handler)
    Storage.download(f"{ours.url}/m.bin", out)
    assert [one.headers.get("Cookie") for one in ours.requests] == [None, "seen=1"] * 2
    assert all("Cookie" not in one.headers for one in theirs.requests)


def test_cookies_do_not_go_to_another_port(odd_http: Callable[..., OddHTTP], out: Path) -> None:
    theirs = odd_http(StaticFile(DATA))
    ours = odd_http(
        lambda one: Reply(
            302, headers={"Location": f"{theirs.url}/m.bin", "Set-Cookie": "seen=1; Path=/"}
        )
    )
    Storage.download(f"{ours.url}/m.bin", out)
    assert [one.headers.get("Cookie") for one in theirs.requests] == [None, None]


def test_refusal_after_a_redirection_says_that_nothing_was_sent(
    odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    theirs = odd_http(lambda one: Reply(403), "localhost")
    ours = odd_http(redirect(f"{theirs.url}/m.bin?sig={CANARY}"))
    with pytest.raises(AuthenticationError, match="redirection to http://localhost:") as caught:
        Storage.download(f"{ours.url}/m.bin", out, config=SECRETS)
    assert quiet(caught.value)


@pytest.mark.parametrize("limit", [0, 3])
def test_redirections_end(odd_http: Callable[..., OddHTTP], out: Path, limit: int) -> None:
    server = odd_http(redirect(f"/again?sig={CANARY}"))
    with pytest.raises(StorageError, match=f"redirected more than {limit} times") as caught:
        Storage.download(f"{server.url}/m.bin", out, config=HTTPConfig(max_redirects=limit))
    assert quiet(caught.value)
    assert len(server.requests) == limit + 1


@pytest.mark.parametrize(
    "location",
    ["ftp://host/m.bin", "file:///etc/passwd", "http://[::1", "https://host:port/"],
)
def test_redirection_to_elsewhere_is_refused(
    odd_http: Callable[..., OddHTTP], out: Path, location: str
) -> None:
    server = odd_http(redirect(location))
    with pytest.raises(StorageError, match="where nothing is fetched from"):
        Storage.download(f"{server.url}/m.bin", out)


def test_https_is_not_left_for_http_unless_that_is_allowed(
    nginx: NginxHTTP, odd_http: Callable[..., OddHTTP], out: Path
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(nginx.folder / "server.pem")
    server = odd_http(redirect(f"{nginx.endpoint}/m.bin?sig={CANARY}"), "127.0.0.1", tls)
    config = HTTPConfig(ca_bundle=nginx.ca_file)
    with pytest.raises(StorageError, match=r"from https to http://127\.0\.0\.1") as caught:
        Storage.download(f"{server.url}/m.bin", out, config=config)
    assert quiet(caught.value)
    config = HTTPConfig(ca_bundle=nginx.ca_file, insecure_redirects=True)
    Storage.download(f"{server.url}/m.bin", out, config=config)
    assert out.read_bytes() == DATA


@pytest.mark.parametrize("path", ["moved", "moved-for-good", "elsewhere", "to-plain"])
def test_redirections_of_nginx_are_followed(nginx: NginxHTTP, out: Path, path: str) -> None:
    place = "m.bin" if path == "moved" else f"{path}/m.bin"
    if path != "moved-for-good":
        put_file(nginx.data, place, DATA)
        Storage.download(f"{nginx.odd}/{path}/m.bin", out)
        assert out.read_bytes() == DATA
    else:
        with pytest.raises(StorageError, match="redirected more than 10 times"):
            Storage.download(f"{nginx.odd}/{path}/m.bin", out)


def test_page_for_logging_in_is_no_model(odd_http: Callable[..., OddHTTP], out: Path) -> None:
    page = {"Content-Type": "text/html; charset=utf-8"}
    login = odd_http(lambda one: Reply(200, b"<h1>Log in</h1>", page), "localhost")
    server = odd_http(redirect(f"{login.url}/login?next={CANARY}"))
    with pytest.raises(AuthenticationError, match="web page at http://localhost") as caught:
        Storage.download(f"{server.url}/model.bin", out)
    assert quiet(caught.value)
    assert not out.exists()
