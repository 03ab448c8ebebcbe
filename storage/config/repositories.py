"""The configs of stores whose models are repositories: OCI registries, git, ModelScope."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Never, Self

from pydantic import AfterValidator, SecretStr, model_validator

from storage.config.base import Endpoint, NetworkConfig, Path, PathText, Text, arguments

__all__ = ["GitConfig", "ModelScopeConfig", "OCIConfig"]


def _platform(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9_.-]+/[a-z0-9_.-]+(?:/[a-z0-9_.-]+)?", value):
        raise ValueError("an operating system and an architecture are needed, such as linux/arm64")
    return value


def _model_folder(value: str) -> str:
    parts = [part for part in value.split("/") if part]
    if not value.startswith("/") or not parts or {".", ".."} & set(parts):
        raise ValueError("the absolute path of a folder in the image is needed, such as /models")
    return "/" + "/".join(parts)


class OCIConfig(NetworkConfig):
    """OCI registries: model images and artifacts.

    Without credentials here those of the last ``docker login`` or ``podman login`` to the same
    host and port are used. They go to the registry's own host and to nobody else.
    """

    uri_type: ClassVar[str] = "oci"

    username: str | None = None
    """User of the registry."""

    password: SecretStr | None = None
    """Password or access token of that user."""

    token: SecretStr | None = None
    """Bearer token of the registry itself; excludes ``username``."""

    anonymous: bool = False
    """Send no credentials, even where a login has left some."""

    docker_config: PathText | None = None
    """Path of the file with the logins, instead of the usual places."""

    plain_http: bool | None = None
    """Whether the registry is spoken to without TLS. Unset: only if it is on this machine."""

    verify_ssl: bool = True
    """Whether the registry's certificate is checked."""

    platform: Annotated[str, AfterValidator(_platform)] | None = None
    """Which image of several to take, such as ``linux/arm64``; this machine's if none."""

    model_folder: Annotated[str, AfterValidator(_model_folder)] = "/models"
    """Folder of an image that the model is in. Artifacts have none."""

    def __init__(
        self,
        /,
        username: str | None = None,
        password: Text | None = None,
        *,
        token: Text | None = None,
        anonymous: bool | None = None,
        docker_config: Path | None = None,
        plain_http: bool | None = None,
        verify_ssl: bool | None = None,
        platform: str | None = None,
        model_folder: str | None = None,
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

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.token is not None and self.username is not None:
            raise ValueError("token and username exclude each other; give one of them")
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together; give both, or neither")
        if self.anonymous and (self.username or self.token or self.docker_config):
            raise ValueError("anonymous excludes credentials; leave one of the two out")
        return self


class GitConfig(NetworkConfig):
    """Git repositories over HTTP and HTTPS. The credentials go to the URI's own host alone."""

    uri_type: ClassVar[str] = "git+http"

    username: str | None = None
    """Whom to log in as; a user in the URI goes first."""

    password: SecretStr | None = None
    """Password of that user; most hosts want an access token here."""

    token: SecretStr | None = None
    """Access token: the password of ``username``, or of ``x-access-token``; excludes another."""

    revision: str | None = None
    """Branch, tag or commit for URIs that name none; else the repository's ``HEAD``."""

    verify_ssl: bool = True
    """Whether the server's certificate is checked."""

    def __init__(
        self,
        /,
        username: str | None = None,
        password: Text | None = None,
        *,
        token: Text | None = None,
        revision: str | None = None,
        verify_ssl: bool | None = None,
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

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.token is not None and self.password is not None:
            raise ValueError("token and password exclude each other; give one of them")
        return self


class ModelScopeConfig(NetworkConfig):
    """ModelScope, or a service that speaks its protocol.

    Without ``token`` the one in ``MODELSCOPE_API_TOKEN`` is used, if there is one.
    """

    uri_type: ClassVar[str] = "modelscope"

    token: SecretStr | None = None
    """Access token."""

    endpoint: Endpoint | None = None
    """URL of the service; else ``MODELSCOPE_ENDPOINT``, else the public one."""

    revision: str | None = None
    """Branch or tag for URIs that name none; else ``master``."""

    anonymous: bool = False
    """Send no token, even where one is in the environment."""

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
