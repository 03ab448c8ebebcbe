"""Whom the Hub's backend asks, as whom, and through what; and what it tells nobody."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import HFConfig
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    OfflineError,
    StorageError,
    TransientError,
    UnreachableError,
)
from storage.uri import parse_uri
from tests.servers.hub import Answer, Hub, Repo, Request
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.process import free_port

Open = Callable[[HFConfig | None], Backend]
WEIGHTS = bytes_payload(b"weights of a model")


@pytest.fixture
def repo(hub: Hub) -> Repo:
    repo = hub.repo("owner/m")
    hub.put(repo, {"a.txt": b"12345", "a.bin": b"weights"})
    return repo


@pytest.fixture
def open_hub(hub: Hub) -> Iterator[Open]:
    opened: list[Backend] = []

    def make(config: HFConfig | None) -> Backend:
        opened.append(open_backend(parse_uri("hf://owner/m"), config, OpenOptions()))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(piece) for piece in body)


def sent_token(hub: Hub, backend: Backend) -> str | None:
    """Return the token that a request of ``backend`` brings."""
    hub.forget()
    hub.before = lambda request: Answer(404)
    with pytest.raises(StorageError):
        backend.stat("a.txt")
    [request] = hub.requests
    return request.token


def every_call(backend: Backend) -> list[Callable[[], object]]:
    return [
        lambda: backend.stat("a.txt"),
        lambda: list(backend.list()),
        lambda: read(backend, "a.txt"),
        lambda: backend.write("b", bytes_payload(b"1")),
        lambda: backend.delete(["a.txt"]),
        lambda: backend.copy("a.txt", "b.txt"),
    ]


# -- tokens --------------------------------------------------------------------------------------


def test_token_of_the_config_is_sent(hub: Hub, open_hub: Open) -> None:
    assert sent_token(hub, open_hub(HFConfig("hf_config", hub.url))) == "hf_config"


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_token_of_the_environment_is_sent(
    hub: Hub, open_hub: Open, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    backend = open_hub(HFConfig(endpoint=hub.url))
    assert sent_token(hub, backend) is None
    monkeypatch.setenv(variable, " hf_ambient\n")
    assert sent_token(hub, backend) == "hf_ambient"
    assert sent_token(hub, open_hub(HFConfig("hf_config", hub.url))) == "hf_config"


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        ("HF_TOKEN_PATH", "{home}/my-token", "my-token"),
        ("HF_HOME", "{home}/hf", "hf/token"),
        ("XDG_CACHE_HOME", "{home}/xdg", "xdg/huggingface/token"),
        ("UNRELATED", "", ".cache/huggingface/token"),
    ],
)
def test_token_of_the_last_login_is_sent(
    hub: Hub,
    open_hub: Open,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    value: str,
    file: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, value.format(home=tmp_path))
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("hf_login\n")
    backend = open_hub(HFConfig(endpoint=hub.url))
    assert sent_token(hub, backend) == "hf_login"
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    assert sent_token(hub, backend) == "hf_ambient"


def test_login_of_the_hubs_own_client_is_found(
    hub: Hub, open_hub: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    path = tmp_path / "token"
    path.write_text("hf_login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    assert sent_token(hub, open_hub(HFConfig(endpoint=hub.url))) == "hf_login"


def test_token_of_the_config_may_have_space_around_it(hub: Hub, open_hub: Open) -> None:
    assert sent_token(hub, open_hub(HFConfig(" hf_config \r\n", hub.url))) == "hf_config"


def test_token_that_no_header_holds_is_an_error_that_does_not_show_it(
    hub: Hub, repo: Repo, open_hub: Open
) -> None:
    backend = open_hub(HFConfig("hf_s3cret…", hub.url))
    with pytest.raises(ConfigurationError) as caught:
        backend.stat("a.txt")
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None
    assert not hub.requests


def test_anonymous_sends_no_token(
    hub: Hub, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    assert sent_token(hub, open_hub(HFConfig(endpoint=hub.url, anonymous=True))) is None


def test_implicit_token_can_be_switched_off(
    hub: Hub, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert sent_token(hub, open_hub(HFConfig(endpoint=hub.url))) is None
    assert sent_token(hub, open_hub(HFConfig("hf_config", hub.url))) == "hf_config"


def test_password_of_netrc_is_not_sent(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login u password p\nmachine localhost login u password p\n")
    monkeypatch.setenv("NETRC", str(netrc))
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    assert read(backend, "a.bin") == b"weights"
    backend = open_hub(HFConfig(endpoint=hub.url, anonymous=True))
    assert read(backend, "a.bin") == b"weights"
    assert not hub.leaks


def test_file_system_has_the_same_account(hub: Hub, open_hub: Open) -> None:
    hub.put(hub.repo("owner/secret", private=True), {"a.txt": b"1"})
    location = parse_uri("hf://owner/secret")
    for config, found in (
        (HFConfig(hub.writer.token, hub.url), True),
        (HFConfig(hub.reader.token, hub.url), False),
        (HFConfig(endpoint=hub.url, anonymous=True), False),
    ):
        backend = open_backend(location, config, OpenOptions())
        files, root = backend.filesystem()
        assert files.exists(f"{root}/a.txt") is found
        backend.close()


# -- where to ------------------------------------------------------------------------------------


def test_endpoint_of_the_environment_is_used(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    backend = open_hub(None)
    assert read(backend, "a.bin") == b"weights"
    files, root = backend.filesystem()
    assert files.cat_file(f"{root}/a.txt") == b"12345"


def test_endpoint_of_the_config_wins(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert read(open_hub(HFConfig(endpoint=hub.url)), "a.txt") == b"12345"
    with pytest.raises(UnreachableError):
        open_hub(None).stat("a.txt")


def test_address_that_nobody_answers(open_hub: Open) -> None:
    config = HFConfig("hf_secret", f"http://127.0.0.1:{free_port()}")
    backend = open_hub(config)
    for call in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(UnreachableError, match="refused"):
            call()


def test_name_that_does_not_exist(open_hub: Open) -> None:
    with pytest.raises(UnreachableError):
        open_hub(HFConfig("hf_secret", "http://hub.invalid")).stat("a")


def test_token_does_not_follow_a_redirect_of_the_api(hub: Hub, repo: Repo, open_hub: Open) -> None:
    def before(request: Request) -> Answer | None:
        if request.origin == "hub":
            return Answer(307, {"Location": f"{hub.cdn}{request.path}"})
        return None

    hub.before = before
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    calls: list[Callable[[], object]] = [
        lambda: list(backend.list()),
        lambda: backend.delete(["a.txt"]),
        lambda: read(backend, "a.txt"),
        lambda: backend.write("b", bytes_payload(b"1")),
    ]
    for call in calls:
        with pytest.raises(StorageError):
            call()
    assert not hub.leaks


def test_token_does_not_go_to_a_host_that_looks_like_the_hub(
    hub: Hub, repo: Repo, open_hub: Open, odd_http: Callable[..., OddHTTP]
) -> None:
    theirs = odd_http(lambda request: Reply(404))
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    host = hub.url.removeprefix("http://")
    for location in (f"{theirs.url}\\@{host}/", f"{theirs.url}@{host}/", f"{theirs.url}\\.{host}"):
        hub.before = lambda request, to=location: Answer(302, {"Location": to})
        for call in every_call(backend):
            with pytest.raises(StorageError):
                call()
    assert theirs.requests == []


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "http://[::1", "http://host:port/", "http://host:99999/", "https:///a"],
)
def test_redirect_to_what_is_no_address_is_an_error_of_ours(
    hub: Hub, repo: Repo, open_hub: Open, location: str
) -> None:
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    hub.before = lambda request: Answer(302, {"Location": location})
    for call in every_call(backend):
        with pytest.raises(StorageError, match="not a plain URL"):
            call()


def test_https_is_not_left_for_http(
    tls_hub: Hub, open_hub: Open, bundle: str, odd_http: Callable[..., OddHTTP]
) -> None:
    theirs = odd_http(lambda request: Reply(404))
    backend = open_hub(HFConfig(tls_hub.writer.token, tls_hub.url, ca_bundle=bundle))
    tls_hub.cdn = theirs.url
    for call in (lambda: read(backend, "a.bin"), lambda: backend.write("b.bin", WEIGHTS)):
        with pytest.raises(StorageError, match="from https to http") as caught:
            call()
        assert "X-Amz-Signature" not in str(caught.value)
    assert theirs.requests == []


def test_log_holds_no_signature_and_no_token(
    hub: Hub, repo: Repo, open_hub: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        backend = open_hub(HFConfig(hub.writer.token, hub.url))
        read(backend, "a.bin")
        backend.write("b.bin", bytes_payload(b"1"))
    assert "/files/" in caplog.text
    assert "X-Amz-Signature" not in caplog.text
    assert hub.writer.token not in caplog.text


def test_pages_that_name_the_public_hub_are_fetched_from_the_endpoint(
    hub: Hub, repo: Repo, open_hub: Open
) -> None:
    hub.page = 1
    hub.url, url = "https://huggingface.co", hub.url
    try:
        backend = open_hub(HFConfig(hub.writer.token, url))
        assert [info.key for info in backend.list()] == ["a.bin", "a.txt"]
        # So are the addresses of an upload.
        hub.part_size = 4
        backend.write("b.bin", bytes_payload(b"12345678"))
    finally:
        hub.url = url
    assert hub.get(repo, "b.bin") == b"12345678"


def test_mirror_that_leads_to_the_public_hub_is_followed_without_the_token(
    hub: Hub, repo: Repo, open_hub: Open
) -> None:
    public = "http://huggingface.co"

    def before(request: Request) -> Answer | None:
        if request.headers["host"] == "mirror.invalid" and "/resolve/" in request.path:
            return Answer(308, {"Location": f"{public}{request.path}"})
        return None

    hub.before = before
    # Both names are reached by way of the test Hub.
    backend = open_hub(HFConfig(hub.writer.token, "http://mirror.invalid", proxy=hub.url))
    info = backend.stat("a.txt")
    assert (info.size, info.version) == (5, repo.head().id)
    assert read(backend, "a.txt") == b"12345"
    hosts = {(request.headers["host"], request.token) for request in hub.requests}
    assert hosts == {("mirror.invalid", hub.writer.token), ("huggingface.co", None)}


def test_cookies_are_not_kept(hub: Hub, repo: Repo, open_hub: Open) -> None:
    hub.before = lambda request: Answer(404, {"Set-Cookie": "session=secret; Path=/"})
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    for _ in range(2):
        with pytest.raises(StorageError):
            backend.stat("a.txt")
    assert all("cookie" not in request.headers for request in hub.requests)


# -- through what --------------------------------------------------------------------------------


def test_proxy_of_the_config_is_used(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    config = HFConfig(hub.writer.token, "http://hub.invalid", proxy=hub.url)
    assert read(open_hub(config), "a.txt") == b"12345"
    assert hub.requests[-1].headers["host"] == "hub.invalid"


def test_proxy_of_the_environment_is_used(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    assert read(open_hub(HFConfig(endpoint="http://hub.invalid")), "a.txt") == b"12345"
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    with pytest.raises(UnreachableError):
        open_hub(HFConfig(endpoint="http://hub.invalid")).stat("a.txt")


def test_proxy_that_nobody_answers(hub: Hub, repo: Repo, open_hub: Open) -> None:
    proxy = f"http://user:SECRET@127.0.0.1:{free_port()}"
    with pytest.raises(UnreachableError) as caught:
        open_hub(HFConfig(endpoint=hub.url, proxy=proxy)).stat("a.txt")
    assert "SECRET" not in str(caught.value)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_hub(authority: trustme.CA) -> Iterator[Hub]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    with Hub(context) as hub:
        hub.put(hub.repo("owner/m"), {"a.txt": b"12345", "a.bin": b"weights"})
        yield hub


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def test_authority_of_the_config_is_trusted(
    tls_hub: Hub, open_hub: Open, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file.pem")
    backend = open_hub(HFConfig(tls_hub.writer.token, tls_hub.url, ca_bundle=bundle))
    assert (read(backend, "a.txt"), read(backend, "a.bin")) == (b"12345", b"weights")
    backend.write("b.bin", bytes_payload(b"1"))
    assert not tls_hub.leaks


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_authority_of_the_environment_is_trusted(
    tls_hub: Hub,
    open_hub: Open,
    bundle: str,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, bundle)
    assert read(open_hub(HFConfig(endpoint=tls_hub.url)), "a.bin") == b"weights"


def test_unknown_authority_is_no_passing_failure(tls_hub: Hub, open_hub: Open) -> None:
    with pytest.raises(ConfigurationError, match="ca_bundle"):
        open_hub(HFConfig(endpoint=tls_hub.url)).stat("a.txt")
    with pytest.raises(ConfigurationError, match=r"/no/such/ca\.pem"):
        open_hub(HFConfig(endpoint=tls_hub.url, ca_bundle="/no/such/ca.pem")).stat("a.txt")


def test_handshake_that_breaks_off_is_worth_another_try(open_hub: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.recv(64 * 1024)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TransientError):
            open_hub(HFConfig(endpoint=url)).stat("a.txt")
        thread.join()


def test_port_without_tls_is_named_as_such(hub: Hub, open_hub: Open) -> None:
    with pytest.raises(ConfigurationError, match="no TLS"):
        open_hub(HFConfig(endpoint=hub.url.replace("http:", "https:"))).stat("a.txt")


def test_hub_that_says_nothing_is_given_up(hub: Hub, repo: Repo, open_hub: Open) -> None:
    release = threading.Event()

    def before(request: Request) -> Answer | None:
        release.wait(60)
        return None

    hub.before = before
    try:
        with pytest.raises(TransientError):
            open_hub(HFConfig(endpoint=hub.url, read_timeout=0.2)).stat("a.txt")
    finally:
        release.set()


def test_hub_is_not_asked_when_it_is_switched_off(
    hub: Hub, repo: Repo, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_hub(HFConfig(hub.writer.token, hub.url))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in [*every_call(backend), backend.filesystem]:
        with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
            call()
    assert not hub.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert backend.stat("a.txt").size == 5


def test_token_that_cannot_be_exchanged_is_said(
    hub: Hub, open_hub: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub._oidc", reason="this release exchanges no tokens")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "owner/m")
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL", raising=False)
    backend: Any = open_hub(HFConfig(endpoint=hub.url))
    monkeypatch.setenv("HF_TOKEN_PATH", _own_token_path())
    with pytest.raises(AuthenticationError, match="token"):
        backend.stat("a.txt")
    assert not hub.requests


def _own_token_path() -> str:
    from huggingface_hub import constants

    return constants.HF_TOKEN_PATH
