"""Who is asked as whom: logins, tokens, redirections. Credentials reach the registry alone."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.backends.base import OpenOptions
from storage.backends.oci.answers import scheme_of
from storage.backends.oci.logins import Login, find_login
from storage.backends.oci.session import RegistrySession
from storage.config import OCIConfig
from storage.errors import AuthenticationError, ConfigurationError, StorageError
from tests.backends.oci_support import TITLE, Pusher, opened, tree_of
from tests.servers.registry import PASSWORD, USER, Gate, Registry
from tests.servers.tls import TlsFront

BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
LOGIN = OCIConfig(USER, PASSWORD)
TREE = {"m": b"model"}


def _push(registry: Registry, name: str, **headers: str) -> Pusher:
    push = Pusher.of(registry, name, **headers)
    push.artifact("v1", [push.blob(b"model", "application/octet-stream", **{TITLE: "m"})])
    return push


@pytest.fixture
def public(oci_registry: Registry, prefix: str) -> Pusher:
    """A repository that everybody may read, unless a gate is before it."""
    return _push(oci_registry, prefix)


@pytest.fixture
def private(oci_private_registry: Registry, prefix: str) -> Pusher:
    """A repository for one user, by password."""
    return _push(oci_private_registry, prefix, Authorization=f"Basic {BASIC}")


def _write_login(path: Path, host: str, **fields: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"auths": {host: fields or {"auth": BASIC}}}))


# -- passwords -----------------------------------------------------------------------------------


def test_a_password_opens_a_private_registry(private: Pusher) -> None:
    with opened(private.uri(":v1"), LOGIN) as backend:
        assert tree_of(backend) == TREE


@pytest.mark.parametrize(
    "config",
    [None, OCIConfig(anonymous=True), OCIConfig(USER, "wrong-password")],
    ids=["nothing", "anonymous", "wrong"],
)
def test_without_the_right_password_access_is_refused(
    private: Pusher, config: OCIConfig | None
) -> None:
    with (
        opened(private.uri(":v1"), config) as backend,
        pytest.raises(AuthenticationError, match="docker login") as caught,
    ):
        list(backend.list())
    assert "wrong-password" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("variable", "file"),
    [
        (None, ".docker/config.json"),
        (None, ".config/containers/auth.json"),
        ("DOCKER_CONFIG", "config.json"),
        ("XDG_RUNTIME_DIR", "containers/auth.json"),
        ("REGISTRY_AUTH_FILE", ""),
    ],
)
def test_the_last_login_is_used(
    private: Pusher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str | None,
    file: str,
) -> None:
    if variable is None:
        place = Path(os.environ["HOME"], file)
    else:
        monkeypatch.setenv(variable, str(tmp_path / "logins"))
        place = tmp_path / "logins" / file
    _write_login(place, private.host)
    with opened(private.uri(":v1")) as backend:
        assert tree_of(backend) == TREE


def test_a_login_to_another_port_or_host_is_not_used(private: Pusher, tmp_path: Path) -> None:
    host, _, port = private.host.partition(":")
    for other in (host, f"{host}:{int(port) + 1}", f"localhost:{port}", f"{private.host}0", port):
        _write_login(tmp_path / "config.json", other)
        config = OCIConfig(docker_config=tmp_path / "config.json")
        with opened(private.uri(":v1"), config) as backend, pytest.raises(AuthenticationError):
            list(backend.list())


def test_a_login_is_for_the_longest_part_of_the_name(tmp_path: Path) -> None:
    file = tmp_path / "auth.json"
    pairs = {"h.example:5000": "all", "h.example:5000/team": "team", "h.example:5000/team/m": "m"}
    auths = {
        name: {"auth": base64.b64encode(f"u:{secret}".encode()).decode()}
        for name, secret in pairs.items()
    }
    auths["https://index.docker.io/v1/"] = {"username": "u", "password": "public"}
    file.write_text(json.dumps({"auths": auths}))
    config = OCIConfig(docker_config=file)

    def secret(registry: str, repository: str) -> str | None:
        found = find_login(registry, repository, config)
        if found is None or found.basic is None:
            return None
        return base64.b64decode(found.basic).decode().partition(":")[2]

    assert secret("h.example:5000", "other/m") == "all"
    assert secret("h.example:5000", "team/n") == "team"
    assert secret("h.example:5000", "team/m") == "m"
    assert secret("h.example:5000", "teammate/m") == "all"
    assert secret("h.example", "team/m") is None
    assert secret("docker.io", "library/m") == "public"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "holds no JSON object"),
        ("[]", "holds no JSON object"),
        ('{"auths": {"h.example": {"auth": "%%%"}}}', "not the Base64"),
        ('{"credsStore": "../evil"}', "cannot be one"),
        ('{"credsStore": "missing-program"}', "not installed"),
    ],
)
def test_a_file_of_logins_that_cannot_be_used_is_told(
    tmp_path: Path, text: str, match: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=match) as caught:
        find_login("h.example", "a/b", OCIConfig(docker_config=file))
    assert "%%%" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        find_login("h.example", "a/b", OCIConfig(docker_config=tmp_path / "none"))


@pytest.mark.parametrize("field", ["credsStore", "credHelpers"])
def test_a_credential_helper_is_asked(
    private: Pusher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, field: str
) -> None:
    program = tmp_path / "docker-credential-example"
    answer = json.dumps({"ServerURL": "", "Username": USER, "Secret": PASSWORD})
    program.write_text(
        "#!/bin/sh\nread -r server\n"
        f'if [ "$1 $server" = "get {private.host}" ]; then echo \'{answer}\'; '
        "else echo credentials not found in native keychain; exit 1; fi\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "config.json"
    value = "example" if field == "credsStore" else {private.host: "example"}
    file.write_text(json.dumps({"auths": {private.host: {}}, field: value}))
    config = OCIConfig(docker_config=file)
    with opened(private.uri(":v1"), config) as backend:
        assert tree_of(backend) == TREE
    file.write_text(json.dumps({"credsStore": "example"}))
    assert find_login("h.example", "a/b", config) is None


# -- tokens --------------------------------------------------------------------------------------


def test_a_token_is_got_by_the_password_and_used_from_then_on(
    oci_registry: Registry, public: Pusher
) -> None:
    with Gate(oci_registry, tokens=True) as gate:
        with opened(public.uri(":v1", gate.host), LOGIN) as backend:
            assert tree_of(backend) == TREE
        asked = [(one.path.partition("?")[0], one.authorization) for one in gate.asked]
        assert asked.count(("/token", f"Basic {BASIC}")) == 1
        assert sum(sent is None for _, sent in asked) == 1
        assert all(sent == "Bearer token-1" for path, sent in asked[2:] if path != "/token")


def test_a_token_that_expired_is_renewed(oci_registry: Registry, public: Pusher) -> None:
    with Gate(oci_registry, tokens=True) as gate:
        with opened(public.uri(":v1", gate.host), LOGIN) as backend:
            assert tree_of(backend) == TREE
            gate.valid = {"token-2"}
            assert tree_of(backend) == TREE
        assert sum(one.path.startswith("/token") for one in gate.asked) == 2


def test_a_refresh_token_is_exchanged(
    oci_registry: Registry, public: Pusher, tmp_path: Path
) -> None:
    with Gate(oci_registry, tokens=True) as gate:
        _write_login(tmp_path / "config.json", gate.host, identitytoken=PASSWORD)
        config = OCIConfig(docker_config=tmp_path / "config.json")
        with opened(public.uri(":v1", gate.host), config) as backend:
            assert tree_of(backend) == TREE


def test_a_token_of_the_config_is_sent_as_it_is(oci_registry: Registry, public: Pusher) -> None:
    with Gate(oci_registry, tokens=True) as gate:
        with opened(public.uri(":v1", gate.host), OCIConfig(token="token-1")) as backend:
            assert tree_of(backend) == TREE
        with (
            opened(public.uri(":v1", gate.host), OCIConfig(token="another-token")) as backend,
            pytest.raises(AuthenticationError),
        ):
            list(backend.list())


def test_credentials_do_not_go_to_another_host_without_tls(
    oci_registry: Registry, public: Pusher
) -> None:
    with Gate(oci_registry, tokens=True, realm_host="localhost") as gate:
        with (
            opened(public.uri(":v1", gate.host), LOGIN) as backend,
            pytest.raises(AuthenticationError, match="only by https"),
        ):
            list(backend.list())
        assert all(one.authorization is None for one in gate.asked)
        assert not any(one.path.startswith("/token") for one in gate.asked)


def test_who_has_no_credentials_may_ask_there_for_a_token(
    oci_registry: Registry, public: Pusher
) -> None:
    with Gate(oci_registry, tokens=True, realm_host="localhost") as gate:
        with opened(public.uri(":v1", gate.host)) as backend, pytest.raises(AuthenticationError):
            list(backend.list())
        assert any(one.path.startswith("/token") for one in gate.asked)


def test_blobs_on_another_origin_are_read_without_credentials(
    oci_registry: Registry, public: Pusher
) -> None:
    with Gate(oci_registry, tokens=True, blobs_elsewhere=True) as gate:
        with opened(public.uri(":v1", gate.host), LOGIN) as backend:
            assert tree_of(backend) == TREE
        elsewhere = [one for one in gate.asked if one.origin.startswith("localhost")]
        assert elsewhere
        assert all(one.authorization is None for one in elsewhere)


@pytest.mark.parametrize(
    "target", ["ftp://h.example/x", "http://h.example\\@127.0.0.1/x", "http://u@h.example/x"]
)
def test_a_redirection_to_what_is_no_plain_url_is_not_followed(
    oci_registry: Registry, public: Pusher, target: str
) -> None:
    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        return (307, {"Location": target}) if "/blobs/" in path else None

    with (
        Gate(oci_registry, refuse=refuse) as gate,
        opened(public.uri(":v1", gate.host)) as backend,
        pytest.raises(StorageError, match="not a plain URL"),
    ):
        tree_of(backend)


def test_a_registry_that_leads_in_circles_is_left(oci_registry: Registry, public: Pusher) -> None:
    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        return (307, {"Location": path}) if "/blobs/" in path else None

    with Gate(oci_registry, refuse=refuse) as gate:
        with (
            opened(public.uri(":v1", gate.host)) as backend,
            pytest.raises(StorageError, match="more than 5 times"),
        ):
            tree_of(backend)
        assert sum("/blobs/" in one.path for one in gate.asked) == 6


@pytest.mark.parametrize(
    ("challenge", "scheme"),
    [
        ('Bearer realm="https://a/t",service="s"', "bearer"),
        ('Basic realm="x"', "basic"),
        ('Basic realm="x", Bearer realm="https://a/t"', "bearer"),
        ("Negotiate", ""),
        ("", ""),
    ],
)
def test_the_best_way_that_a_registry_offers_is_taken(challenge: str, scheme: str) -> None:
    assert scheme_of(challenge) == scheme


def test_secrets_are_not_shown() -> None:
    shown = repr(LOGIN) + repr(Login.of(USER, PASSWORD)) + repr(Login.by_token(PASSWORD))
    assert PASSWORD not in shown
    assert BASIC not in shown


@pytest.mark.parametrize(
    "fields",
    [
        {"username": "u"},
        {"password": "p"},
        {"username": "u", "password": "p", "token": "t"},
        {"token": "t", "anonymous": True},
        {"platform": "linux"},
        {"model_folder": "models"},
        {"model_folder": "/"},
        {"model_folder": "/a/../b"},
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        OCIConfig(**fields)


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(oci_registry: Registry) -> Iterator[TlsFront]:
    """The registry over TLS."""
    with TlsFront(oci_registry.endpoint) as found:
        yield found


def test_a_registry_over_tls_is_read_with_its_authority(tls: TlsFront, public: Pusher) -> None:
    uri = public.uri(":v1", f"127.0.0.1:{tls.port}")
    with opened(uri, OCIConfig(plain_http=False, ca_bundle=tls.ca_file)) as backend:
        assert tree_of(backend) == TREE
    with (
        opened(uri, OCIConfig(plain_http=False)) as backend,
        pytest.raises(ConfigurationError, match="not trusted"),
    ):
        list(backend.list())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # urllib3 tells that nobody checks
        with opened(uri, OCIConfig(plain_http=False, verify_ssl=False)) as backend:
            assert tree_of(backend) == TREE


def test_a_registry_over_tls_does_not_lead_to_where_there_is_none(
    oci_registry: Registry, public: Pusher
) -> None:
    with Gate(oci_registry, blobs_elsewhere=True) as gate, TlsFront(f"http://{gate.host}") as tls:
        config = OCIConfig(USER, PASSWORD, plain_http=False, ca_bundle=tls.ca_file)
        with (
            opened(public.uri(":v1", f"127.0.0.1:{tls.port}"), config) as backend,
            pytest.raises(StorageError, match="from https to"),
        ):
            tree_of(backend)
        assert not any(one.path.startswith("/elsewhere") for one in gate.asked)


def test_other_hosts_than_this_one_are_spoken_to_over_tls() -> None:
    schemes = {
        "localhost:5000": "http",
        "127.0.0.1:5000": "http",
        "[::1]:5000": "http",
        "registry.example": "https",
        "10.0.0.1:5000": "https",
        "localhost.example": "https",
        "docker.io": "https",
    }
    for host, scheme in schemes.items():
        session = RegistrySession(host, "a/b", None, OpenOptions())
        assert session.scheme == scheme, host
        assert session.manifest_url("v1").startswith(f"{scheme}://")
        session.close()
    session = RegistrySession("docker.io", "library/m", None, OpenOptions())
    assert (
        session.blob_url("sha256:0") == "https://registry-1.docker.io/v2/library/m/blobs/sha256:0"
    )
    session.close()


@pytest.mark.parametrize(
    ("scheme", "realm", "allowed"),
    [
        ("https", "https://auth.example/token", True),
        ("https", "http://registry.example/token", False),
        ("http", "http://registry.example:5001/token", True),
        ("http", "http://other.example/token", False),
        ("http", "https://other.example/token", True),
    ],
)
def test_where_credentials_may_go(scheme: str, realm: str, allowed: bool) -> None:
    config = OCIConfig(USER, PASSWORD, plain_http=scheme == "http")
    session = RegistrySession("registry.example", "a/b", config, OpenOptions())
    assert session._may_have_secrets(realm) is allowed


def test_without_the_package_the_extra_is_named(
    public: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "oras.provider", None)
    with (
        opened(public.uri(":v1")) as backend,
        pytest.raises(ConfigurationError, match=r'pip install "modelstorage\[oci\]"'),
    ):
        list(backend.list())
