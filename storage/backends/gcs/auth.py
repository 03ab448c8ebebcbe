"""Where the bearer token of Google Cloud Storage comes from, the same for both drivers.

google-auth is imported here, and this module on the first request that needs a token.
"""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import google.auth
import google.auth.credentials
import google.auth.exceptions
import google.auth.transport.requests
import requests

from storage.backends.drivers.fsspec_errors import THROTTLED, causes, retry_after
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    StorageError,
    TransientError,
    UnreachableError,
    one_line,
)

__all__ = ["SharedCredentials", "TokenSource"]

_SCOPE = "https://www.googleapis.com/auth/devstorage.full_control"
_IAM_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# Renewed so long before it expires; gcsfs asks for a new one as early.
_MARGIN = timedelta(minutes=5)
# What google-auth stumbles over in an answer, or a key, that is not made as Google makes them.
_ODD = (AttributeError, KeyError, TypeError)


class TokenSource:
    """Google's credentials of one config, renewed when they are about to expire."""

    def __init__(
        self,
        key_json: str | None = None,
        key_file: str | None = None,
        impersonate: str | None = None,
        *,
        token: str | None = None,
        proxy: str | None = None,
        verify: str | bool | None = None,
        timeout: float = 30.0,
    ) -> None:
        """Ask nobody yet.

        Args:
            key_json: the text of a credentials file; any kind that google-auth knows.
            key_file: the path of one.
            impersonate: the service account to act as.
            token: a bearer token that is there already.
            proxy: for the requests that this takes.
            verify: a CA bundle's path, false for no check, ``None`` for the usual.
            timeout: seconds for each of those requests.
        """
        self._arguments = (key_json, key_file, impersonate, token)
        self._proxy = proxy
        self._verify = verify
        self._timeout = timeout
        self._lock = threading.Lock()
        self._credentials: Any = None
        self._renewed = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_credentials": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __call__(self) -> tuple[str, datetime | None]:
        """Return a token that is good for a while, and when it expires.

        Raises:
            AuthenticationError: there are no credentials, or they were refused.
            ConfigurationError: what should hold them cannot be read.
            TransientError: who issues tokens failed to answer.
        """
        with self._lock, _translated():
            if self._credentials is None:
                self._credentials = self._find()
            credentials = self._credentials
            if not _fresh(credentials):
                self._refresh()
            expiry = credentials.expiry
            return credentials.token, expiry.replace(tzinfo=UTC) if expiry is not None else None

    def renew(self, begun: float) -> bool:
        """Get a new token, because the store refused the one that was good until now.

        Args:
            begun: when the refused request began, by ``time.monotonic``; whoever shares this
                may have a new token since.

        Returns:
            Whether there is a new one; false for a token that was given.

        Raises:
            AuthenticationError: who issues tokens gives no more of them.
            TransientError: who issues tokens failed to answer.
        """
        _, _, impersonate, token = self._arguments
        with self._lock, _translated():
            if self._credentials is None or (token is not None and not impersonate):
                return False
            if self._renewed < begun:
                self._refresh()
            return True

    def _refresh(self) -> None:
        with requests.Session() as session:
            problem: Exception | None = None
            try:
                self._credentials.refresh(self._request(session, once=True))
            except google.auth.exceptions.GoogleAuthError:
                raise
            except (ValueError, *_ODD) as exc:
                problem = exc
            if problem is not None or not isinstance(self._credentials.token, str):
                self._credentials.token = None
                raise TransientError(
                    "who issues Google's tokens answered something that is none"
                ) from problem
        self._renewed = time.monotonic()

    def _find(self) -> Any:
        key_json, key_file, impersonate, token = self._arguments
        if key_json is None and key_file is None:
            key_file = _default_file()
        scopes = [_IAM_SCOPE] if impersonate else [_SCOPE]
        with requests.Session() as session:
            request = self._request(session)
            if token is not None:
                from google.oauth2.credentials import Credentials

                found: Any = Credentials(token)  # type: ignore[no-untyped-call]
            elif key_json is not None or key_file is not None:
                found = _from_key(_parsed(key_json, key_file), scopes, request)
            else:
                found, _ = google.auth.default(scopes=scopes, request=request)
        if impersonate:
            from google.auth.impersonated_credentials import Credentials as Impersonated

            found = Impersonated(found, impersonate, [_SCOPE])  # type: ignore[no-untyped-call]
        return found

    def _request(self, session: requests.Session, *, once: bool = False) -> _Request:
        if self._proxy:
            # Not for plain http, which is that of the machine's own metadata server.
            session.proxies["https"] = self._proxy
        return _Request(session, self._timeout, self._verify, once)


class _Request(google.auth.transport.requests.Request):
    """google-auth's way to make a request, with our limits."""

    def __init__(
        self, session: requests.Session, timeout: float, verify: str | bool | None, once: bool
    ) -> None:
        super().__init__(session)
        self._once = once
        self._defaults: dict[str, Any] = {"timeout": timeout}
        if verify is not None:
            # Said for each request: a session's own is outdone by REQUESTS_CA_BUNDLE.
            self._defaults["verify"] = verify

    def __call__(self, url: str, *args: Any, **kwargs: Any) -> Any:
        answer = super().__call__(url, *args, **{**self._defaults, **kwargs})  # type: ignore[no-untyped-call]
        if self._once and (answer.status in (408, 429) or answer.status >= 500):
            # Before google-auth asks seven times by itself, for the better part of a minute.
            raise TransientError(
                f"who issues Google's tokens answered {answer.status}",
                retry_after({"retry-after": answer.headers.get("Retry-After")}),
                throttled=answer.status in THROTTLED,
            )
        return answer


class SharedCredentials(google.auth.credentials.Credentials):
    """A token source as google-auth's credentials, for gcsfs."""

    def __init__(self, source: TokenSource) -> None:
        """Take tokens from ``source``."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = source

    def renew(self, begun: float) -> bool:
        """Do without the token that was refused; see :meth:`TokenSource.renew`."""
        renewed = self._source.renew(begun)
        if renewed:
            self.token = None
        return renewed

    def refresh(self, request: object) -> None:
        """Take a token that is good for a while; whoever issues it is asked by the source."""
        self.token, expiry = self._source()
        # google-auth's own habit: UTC without saying so.
        self.expiry = expiry.replace(tzinfo=None) if expiry is not None else None


def _fresh(credentials: Any) -> bool:
    if not credentials.token:
        return False
    expiry = credentials.expiry
    return expiry is None or bool(expiry.replace(tzinfo=UTC) - datetime.now(UTC) > _MARGIN)


def _parsed(key_json: str | None, key_file: str | None) -> Mapping[str, Any]:
    if key_json is None:
        assert key_file is not None
        try:
            with open(key_file, encoding="utf-8") as file:
                key_json = file.read()
        except (OSError, UnicodeDecodeError) as exc:
            problem = getattr(exc, "strerror", None) or "it is not text"
            raise ConfigurationError(
                f"the Google credentials file {key_file} cannot be read: {problem}"
            ) from exc
    info = None
    # The parser's error holds the text, which is a secret.
    with suppress(ValueError):
        info = json.loads(key_json)
    if not isinstance(info, dict):
        raise ConfigurationError(
            f"the Google credentials {f'in {key_file} ' if key_file else ''}are not JSON of one "
            "object; download the key again"
        )
    return info


def _from_key(info: Mapping[str, Any], scopes: list[str], request: Any) -> Any:
    if info.get("type") == "external_account":
        # Not by the loader: it asks yet another service of Google's for the project's name.
        return _federated(info).from_info(info, scopes=scopes)
    with warnings.catch_warnings():
        # That credentials from elsewhere have to be trusted; the config's author does.
        warnings.simplefilter("ignore")
        found, _ = google.auth.load_credentials_from_dict(info, request=request)  # type: ignore[no-untyped-call]
    # Afterwards, because a user's have the scopes that the user granted and take no others.
    return google.auth.credentials.with_scopes_if_required(found, scopes)  # type: ignore[no-untyped-call]


def _default_file() -> str | None:
    """Return the file of the default credentials, if there is one.

    Not left to google-auth, which would run ``gcloud`` to learn a project's name.
    """
    if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return named
    folder = os.environ.get("CLOUDSDK_CONFIG")
    if not folder:
        home = os.environ.get("APPDATA") if os.name == "nt" else os.path.expanduser("~/.config")
        folder = os.path.join(home or "", "gcloud")
    path = os.path.join(folder, "application_default_credentials.json")
    return path if os.path.isfile(path) else None


def _federated(info: Mapping[str, Any]) -> Any:
    """Return the class for credentials that another identity provider vouches for."""
    if str(info.get("subject_token_type")).startswith("urn:ietf:params:aws:"):
        from google.auth import aws

        return aws.Credentials
    if "executable" in (info.get("credential_source") or {}):
        from google.auth import pluggable

        return pluggable.Credentials
    from google.auth import identity_pool

    return identity_pool.Credentials


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what google-auth raises in the block into an error of ours."""
    try:
        yield
    except StorageError:
        raise
    except (
        google.auth.exceptions.GoogleAuthError,
        requests.RequestException,
        ValueError,
        *_ODD,
    ) as exc:
        raise _error_for(exc, one_line(exc.args[0] if exc.args else exc)) from exc


def _error_for(exc: Exception, said: str) -> StorageError:
    if isinstance(exc, google.auth.exceptions.DefaultCredentialsError):
        return AuthenticationError(
            f"no Google credentials were found ({said}); expected service_account_key or token "
            "in a GCSConfig, GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default "
            "login`, or a machine of Google's; for a public bucket use GCSConfig(anonymous=True)"
        )
    if any(isinstance(cause, requests.exceptions.SSLError) for cause in causes(exc)):
        return ConfigurationError(
            f"the TLS certificate of who issues Google's tokens is not trusted ({said}); name "
            "its authority in ca_bundle, or SSL_CERT_FILE"
        )
    if isinstance(exc, google.auth.exceptions.TransportError):
        return UnreachableError(
            f"nobody answers where Google's tokens are issued ({said}); check the network and "
            "the proxy"
        )
    if isinstance(exc, requests.RequestException) or getattr(exc, "retryable", False):
        return TransientError(f"a Google token could not be obtained: {said}")
    if isinstance(exc, google.auth.exceptions.RefreshError):
        return AuthenticationError(
            f"Google refuses these credentials ({said}); check the key and the account's "
            "permissions"
        )
    if isinstance(exc, (ValueError, *_ODD)):
        return ConfigurationError(
            f"the Google credentials cannot be used ({said}); download the key again"
        )
    return AuthenticationError(f"a Google token could not be obtained: {said}")
