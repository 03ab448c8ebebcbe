"""The configs of the other stores: the Hub, HTTP, volume claims, and fsspec's schemes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Never, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from storage.config.base import (
    ConfigModel,
    Endpoint,
    FrozenDict,
    NetworkConfig,
    Path,
    PathText,
    SecretOptions,
    Text,
    arguments,
)

__all__ = ["FsspecConfig", "HFConfig", "HTTPConfig", "PVCConfig"]


class HFConfig(NetworkConfig):
    """The Hugging Face Hub, or a service that speaks its protocol.

    Without ``token`` the ambient one is used: ``HF_TOKEN``, else that of the last login.
    """

    uri_type: ClassVar[str] = "hf"

    token: SecretStr | None = None
    """Access token."""

    endpoint: Endpoint | None = None
    """URL of the Hub; else ``HF_ENDPOINT``, else the public one."""

    revision: str | None = None
    """Branch, tag or commit for URIs that name none; else ``main``."""

    anonymous: bool = False
    """Send no token, even where one is in the environment or from a login."""

    def __init__(
        self,
        /,
        token: Text | None = None,
        endpoint: str | None = None,
        *,
        revision: str | None = None,
        anonymous: bool | None = None,
        ca_bundle: Path | None = None,
        proxy: Text | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        super().__init__(**arguments(locals()))


def _check_headers(headers: dict[str, SecretStr]) -> FrozenDict[str, SecretStr]:
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ValueError("the name of a header is made of letters, digits and hyphens")
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value.get_secret_value()):
            raise ValueError(f"the value of the header {name} holds a control character")
    return FrozenDict(headers)


class HTTPConfig(NetworkConfig):
    """Plain HTTP and HTTPS. The credentials go to the URI's own host and to no other."""

    uri_type: ClassVar[str] = "http"

    headers: Annotated[dict[str, SecretStr], AfterValidator(_check_headers)] = FrozenDict()
    """Headers of every request. Their values are secrets."""

    username: str | None = None
    """User of HTTP basic authentication."""

    password: SecretStr | None = None
    """Password of HTTP basic authentication; none counts as empty."""

    token: SecretStr | None = None
    """Bearer token; excludes ``username``."""

    verify_ssl: bool = True
    """Whether the server's certificate is checked."""

    client_cert: PathText | None = None
    """Path of a PEM file with the certificate to show to the server (and perhaps its key)."""

    client_key: PathText | None = None
    """Path of the certificate's key, where that is in a file of its own."""

    max_redirects: int = Field(default=10, ge=0)
    """Redirections to follow for one request."""

    insecure_redirects: bool = False
    """Whether a redirection from https to http is followed."""

    verify_uploads: bool | None = None
    """Whether what a server stored is compared with what was sent: by what it says of it, else
    by reading it back. Unset: read back over plain http only. Off: not even compared."""

    def __init__(
        self,
        /,
        headers: Mapping[str, Text] | None = None,
        *,
        username: str | None = None,
        password: Text | None = None,
        token: Text | None = None,
        verify_ssl: bool | None = None,
        ca_bundle: Path | None = None,
        client_cert: Path | None = None,
        client_key: Path | None = None,
        proxy: Text | None = None,
        max_redirects: int | None = None,
        insecure_redirects: bool | None = None,
        verify_uploads: bool | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        super().__init__(**arguments(locals()))

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.token is not None and self.username is not None:
            raise ValueError("token and username exclude each other; give one of them")
        if self.password is not None and self.username is None:
            raise ValueError("password is given without username; give both, or neither")
        if self.client_key is not None and self.client_cert is None:
            raise ValueError("client_key is given without client_cert; give both, or neither")
        return self


def _absolute(value: str) -> str:
    if not os.path.isabs(value):
        raise ValueError("an absolute path is needed")
    return os.path.normpath(value)


_Folder = Annotated[PathText, AfterValidator(_absolute)]


def _check_mounts(mounts: dict[str, str]) -> FrozenDict[str, str]:
    if any(not claim or "/" in claim or claim in (".", "..") for claim in mounts):
        raise ValueError("the name of a claim is not empty and holds no slash")
    return FrozenDict(mounts)


class PVCConfig(ConfigModel):
    """Kubernetes persistent volume claims, mounted on this machine."""

    uri_type: ClassVar[str] = "pvc"

    mount_root: _Folder = "/mnt/pvc"
    """Folder below which each claim is mounted under its own name."""

    mounts: Annotated[dict[str, _Folder], AfterValidator(_check_mounts)] = FrozenDict()
    """Folders of claims that are mounted elsewhere, by the claim's name."""

    def __init__(
        self,
        /,
        mount_root: Path | None = None,
        mounts: Mapping[str, Path] | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        super().__init__(**arguments(locals()))

    def folder(self, claim: str) -> str:
        """Return the folder on which ``claim`` is mounted."""
        return self.mounts.get(claim) or os.path.join(self.mount_root, claim)


class FsspecConfig(ConfigModel):
    """Any scheme that fsspec knows."""

    uri_type: ClassVar[str] = "*"

    options: SecretOptions = SecretOptions({})
    """Arguments of the file system's class; ``reveal(config.options)`` is the dict."""

    def __init__(self, /, options: Mapping[str, Any] | None = None, **unknown: Never) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        if isinstance(options, Mapping):
            options = dict(options)
        super().__init__(**arguments(locals()))
