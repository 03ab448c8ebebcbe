"""The logins that ``docker login``, ``podman login`` and their kin left on this machine.

The file is ``config.json`` of Docker, or ``auth.json`` of Podman, Buildah and Skopeo, whose form is
the same: https://docs.docker.com/reference/cli/docker/login/ and containers-auth.json(5).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage.config import reveal
from storage.errors import AuthenticationError, ConfigurationError, conceal, one_line

if TYPE_CHECKING:
    from storage.config import OCIConfig

__all__ = ["Login", "find_login"]

_PUBLIC = "docker.io"
# Docker's own name for it, as a server in its files and for its helpers.
_PUBLIC_SERVER = "https://index.docker.io/v1/"
_PUBLIC_HOSTS = ("index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
_HELPER = re.compile(r"[A-Za-z0-9_.-]+")
_HELPER_SECONDS = 60.0
# The name by which a helper says that the secret is a token to be exchanged.
_TOKEN_USER = "<token>"
_MAX_FILE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Login:
    """Who asks a registry. One of the three is set."""

    basic: str | None = field(default=None, repr=False)
    """User and password as HTTP's basic authentication sends them."""

    identity_token: str | None = field(default=None, repr=False)
    """Refresh token, which is exchanged for a bearer token."""

    bearer: str | None = field(default=None, repr=False)
    """Bearer token of the registry itself."""

    @classmethod
    def of(cls, username: str, password: str) -> Login:
        """Return the login of a user."""
        # Variables and files may hold bytes that are no text.
        text = f"{username}:{password}".encode(errors="surrogateescape")
        basic = base64.b64encode(text).decode("ascii")
        conceal(password, basic)
        return cls(basic=basic)

    @classmethod
    def by_token(cls, token: str) -> Login:
        """Return the login by a bearer token of the registry."""
        conceal(token)
        return cls(bearer=token)

    @classmethod
    def by_identity(cls, token: str) -> Login:
        """Return the login by a refresh token."""
        conceal(token)
        return cls(identity_token=token)


def find_login(registry: str, repository: str, config: OCIConfig | None) -> Login | None:
    """Return who asks a registry for a repository: as the config says, else by the last login.

    Args:
        registry: host, and port if the URI names one; a login to another port is another one.
        repository: in the registry. Podman's files know logins to parts of a registry.
        config: of the call.

    Raises:
        ConfigurationError: a file or a helper that the config or a variable names cannot be used.
    """
    if config is not None:
        if config.anonymous:
            return None
        if config.token is not None:
            return Login.by_token(reveal(config.token))
        if config.username is not None:
            return Login.of(config.username, reveal(config.password) or "")
    for path, named in _files(config):
        table = _read(path, named)
        if table is not None and (found := _login_in(table, registry, repository, path)):
            return found
    return None


def _files(config: OCIConfig | None) -> Iterator[tuple[str, bool]]:
    """Yield the files to look at, and whether somebody named them."""
    if config is not None and config.docker_config is not None:
        yield config.docker_config, True
        return
    if path := os.environ.get("REGISTRY_AUTH_FILE"):
        yield path, True
    if folder := os.environ.get("DOCKER_CONFIG"):
        yield os.path.join(folder, "config.json"), False
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        yield os.path.join(folder, "containers", "auth.json"), False
    own = os.environ.get("XDG_CONFIG_HOME") or os.path.join("~", ".config")
    yield os.path.expanduser(os.path.join(own, "containers", "auth.json")), False
    yield os.path.expanduser(os.path.join("~", ".docker", "config.json")), False


def _read(path: str, named: bool) -> Mapping[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE)
    except OSError as exc:
        if named:
            raise ConfigurationError(
                f"the file of logins {path} cannot be read: {exc.strerror or exc}"
            ) from exc
        return None
    # The parser's error keeps the text, so it is not chained.
    table = None
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(data)
    if not isinstance(table, dict):
        raise ConfigurationError(
            f"the file of logins {path} holds no JSON object; expected that of `docker login`"
        )
    return table


def _login_in(table: Mapping[str, Any], registry: str, repository: str, path: str) -> Login | None:
    auths = table.get("auths")
    entry = _entry(auths if isinstance(auths, dict) else {}, registry, repository)
    if entry is not None and (found := _login_of(entry, path)) is not None:
        return found
    helpers = table.get("credHelpers")
    helper = helpers.get(registry) if isinstance(helpers, dict) else None
    server = _PUBLIC_SERVER if registry == _PUBLIC else registry
    helper = helper or table.get("credsStore")
    return _ask(helper, server, path) if isinstance(helper, str) and helper else None


def _entry(auths: Mapping[str, Any], registry: str, repository: str) -> Mapping[str, Any] | None:
    """Return the entry for the longest part of a repository's name that has one."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, entry in auths.items():
        if isinstance(entry, dict):
            found.setdefault(_plain(name), entry)
    parts = [registry, *repository.split("/")]
    for length in range(len(parts), 0, -1):
        if (entry := found.get("/".join(parts[:length]))) is not None:
            return entry
    return None


def _plain(name: str) -> str:
    """Return the name of an entry as host, port and path; old ones are URLs."""
    plain = re.sub(r"^https?://", "", name).rstrip("/")
    plain = re.sub(r"^([^/]+)/v[12]$", r"\1", plain)
    host, slash, rest = plain.partition("/")
    return f"{_PUBLIC if host.lower() in _PUBLIC_HOSTS else host.lower()}{slash}{rest}"


def _login_of(entry: Mapping[str, Any], path: str) -> Login | None:
    texts = {name: value for name, value in entry.items() if isinstance(value, str) and value}
    if "registrytoken" in texts:
        return Login.by_token(texts["registrytoken"])
    if "identitytoken" in texts:
        return Login.by_identity(texts["identitytoken"])
    if "auth" in texts:
        try:
            pair = base64.b64decode(texts["auth"], validate=True)
        except (binascii.Error, ValueError):
            pair = b""
        user, colon, password = pair.decode(errors="surrogateescape").partition(":")
        if not colon:
            raise ConfigurationError(
                f"the file of logins {path}: the field auth of an entry is not the Base64 of "
                "user:password; log in again"
            )
        return Login.of(user, password.rstrip("\0"))
    if "username" in texts and "password" in texts:
        return Login.of(texts["username"], texts["password"])
    return None


def _ask(helper: str, server: str, path: str) -> Login | None:
    """Ask a credential helper (docker-credential-helpers' protocol: server in, JSON out)."""
    if not _HELPER.fullmatch(helper):
        raise ConfigurationError(f"the file of logins {path} names a helper that cannot be one")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"],
            input=server.encode(),
            capture_output=True,
            timeout=_HELPER_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigurationError(
            f"the file of logins {path} names the helper {program}, which is not installed; "
            "install it, give credentials, or use anonymous=True of OCIConfig"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigurationError(f"{program} of {path} cannot be used: {one_line(exc)}") from None
    if done.returncode:
        said = one_line((done.stdout or done.stderr).decode(errors="replace"))
        if "not found" in said.lower():
            return None
        raise AuthenticationError(f"{program} gave no login to {server}: {said or 'no reason'}")
    answer = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(done.stdout)
    if not isinstance(answer, dict) or not isinstance(answer.get("Secret"), str):
        raise ConfigurationError(f"{program} did not answer as a credential helper does")
    user = str(answer.get("Username") or "")
    secret = str(answer["Secret"])
    return Login.by_identity(secret) if user == _TOKEN_USER else Login.of(user, secret)
