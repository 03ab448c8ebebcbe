"""The configs of the object stores: S3, Google Cloud Storage, Azure Blob Storage.

They can be built with positional arguments, in the order of their ``__init__``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Never, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from storage.config.base import (
    Default,
    Endpoint,
    NetworkConfig,
    Path,
    PathText,
    Text,
    arguments,
)

__all__ = ["AzureConfig", "GCSConfig", "S3Config"]

Driver = Literal["obstore", "fsspec"]
UploadChecksum = Literal["auto", "sha256", "crc64nvme", "md5", "off"]

_REGION = Default("us-east-1")


class S3Config(NetworkConfig):
    """Amazon S3 and everything that speaks its protocol.

    Credentials are looked for in this order: ``anonymous``; ``access_key_id`` with its secret;
    ``profile``; the ambient chain (variables, shared files, web identity, container and
    instance roles). What was found then assumes ``role_arn``, if there is one.
    """

    uri_type: ClassVar[str] = "s3"
    yielding: ClassVar[tuple[str, ...]] = ("region",)

    access_key_id: str | None = None
    """Access key; goes with ``secret_access_key``."""

    secret_access_key: SecretStr | None = None
    """Secret of the access key."""

    region: str = _REGION
    """Region of the bucket. Unless ``explicit("region")``, the ambient one goes first."""

    use_ssl: bool = True
    """Whether an endpoint without a scheme, AWS's own included, is reached over TLS."""

    # After use_ssl, which its check looks at.
    endpoint_url: Endpoint | None = None
    """URL of the service. ``host:port`` gets its scheme from ``use_ssl``."""

    session_token: SecretStr | None = None
    """Token of temporary credentials."""

    profile: str | None = None
    """Profile of the shared AWS files (``~/.aws/config``)."""

    role_arn: str | None = None
    """ARN of the role to assume."""

    role_session_name: str | None = None
    """Name of the session under that role, as CloudTrail shows it."""

    external_id: str | None = None
    """External id that the role's trust policy asks for."""

    anonymous: bool = False
    """Send unsigned requests, as to a public bucket, whatever credentials there are."""

    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Where the bucket's name goes: the path or the host. ``auto``: path with an endpoint."""

    verify_ssl: bool = True
    """Whether the server's certificate is checked."""

    requester_pays: bool = False
    """Agree to be charged for requests to a requester-pays bucket."""

    use_accelerate: bool = False
    """Use S3 Transfer Acceleration."""

    metadata_endpoint: Endpoint | None = None
    """URL of the instance metadata service, where it is not at its usual address."""

    copy_part_limit: int = Field(default=5 * 1024**3, gt=0)
    """Bytes above which the store copies an object in parts only: 5 GiB on AWS."""

    upload_checksum: UploadChecksum = "auto"
    """How an upload is protected, beside the signature. ``sha256`` and ``crc64nvme`` are sent
    along, checked by the store and kept with the object; ``auto`` is ``crc64nvme`` on AWS and
    ``sha256`` with an endpoint. ``md5`` sends none and compares the ETags of the answers, for
    stores that check nothing; ``off`` does neither. A single request's ETag is compared anyway,
    unless ``off``."""

    driver: Driver | None = None
    """Who talks to the store; ``None`` chooses by config and operation."""

    def __init__(
        self,
        /,
        access_key_id: str | None = None,
        secret_access_key: Text | None = None,
        region: str | None = _REGION,
        endpoint_url: str | None = None,
        use_ssl: bool | None = True,
        *,
        session_token: Text | None = None,
        profile: str | None = None,
        role_arn: str | None = None,
        role_session_name: str | None = None,
        external_id: str | None = None,
        anonymous: bool | None = None,
        addressing_style: Literal["auto", "path", "virtual"] | None = None,
        verify_ssl: bool | None = None,
        ca_bundle: Path | None = None,
        proxy: Text | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        requester_pays: bool | None = None,
        use_accelerate: bool | None = None,
        metadata_endpoint: str | None = None,
        copy_part_limit: int | None = None,
        upload_checksum: UploadChecksum | None = None,
        driver: Driver | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        super().__init__(**arguments(locals()))

    @field_validator("endpoint_url", mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and "://" not in value:
            return f"{'https' if info.data.get('use_ssl', True) else 'http'}://{value}"
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            have, lack = "access_key_id", "secret_access_key"
            if self.access_key_id is None:
                have, lack = lack, have
            raise ValueError(f"{have} is given without {lack}; give both, or neither")
        return self


def _service_account(value: Any) -> Any:
    return json.dumps(dict(value)) if isinstance(value, Mapping) else value


def _check_service_account(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not text.startswith("{"):
        return value
    try:
        valid = isinstance(json.loads(text).get("type"), str)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            "the path or the JSON text of a key file is needed, and this is no JSON "
            'object with a "type"'
        )
    return value


class GCSConfig(NetworkConfig):
    """Google Cloud Storage.

    Credentials are looked for in this order: ``anonymous``; ``token``;
    ``service_account_key``; Application Default Credentials (which hold workload identity).
    """

    uri_type: ClassVar[str] = "gs"

    service_account_key: (
        Annotated[
            SecretStr,
            BeforeValidator(_service_account),
            AfterValidator(_check_service_account),
        ]
        | None
    ) = None
    """Path of a credentials file, or the JSON in it; a table is taken as that JSON."""

    project_id: str | None = None
    """Project for what needs one: making buckets, and the bill of ``requester_pays``."""

    token: SecretStr | None = None
    """OAuth 2 bearer token. It is not renewed."""

    anonymous: bool = False
    """Send requests without credentials, as to a public bucket."""

    endpoint_url: Endpoint | None = None
    """URL of the service, as of an emulator; else ``STORAGE_EMULATOR_HOST``, else Google's."""

    impersonate_service_account: str | None = None
    """E-mail of the service account to act as."""

    requester_pays: bool = False
    """Bill requests to ``project_id``."""

    verify_ssl: bool = True
    """Whether the server's certificate is checked."""

    driver: Driver | None = None
    """Who talks to the store; ``None`` chooses by config and operation."""

    def __init__(
        self,
        /,
        service_account_key: Text | Path | Mapping[str, Any] | None = None,
        project_id: str | None = None,
        *,
        token: Text | None = None,
        anonymous: bool | None = None,
        endpoint_url: str | None = None,
        impersonate_service_account: str | None = None,
        requester_pays: bool | None = None,
        verify_ssl: bool | None = None,
        ca_bundle: Path | None = None,
        proxy: Text | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        driver: Driver | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        if isinstance(service_account_key, os.PathLike):
            service_account_key = os.fspath(service_account_key)
        super().__init__(**arguments(locals()))

    @property
    def service_account_json(self) -> str | None:
        """The JSON text of the key, where that was given; a secret."""
        text = self.service_account_key and self.service_account_key.get_secret_value()
        return text if text and text.lstrip().startswith("{") else None

    @property
    def service_account_file(self) -> str | None:
        """The path of the key's file, where that was given; ``~`` is expanded."""
        text = self.service_account_key and self.service_account_key.get_secret_value()
        return None if not text or text.lstrip().startswith("{") else os.path.expanduser(text)


class AzureConfig(NetworkConfig):
    """Azure Blob Storage.

    Credentials are looked for in this order: ``anonymous``; ``connection_string``;
    ``account_key``; ``sas_token``; ``token``; ``client_secret``; ``federated_token_file``;
    ``managed_identity``; the ambient chain (variables, workload and managed identity, CLI).
    """

    uri_type: ClassVar[str] = "azure"

    account_name: str | None = None
    """Storage account; else the one in the URI, the connection string or the environment."""

    account_key: SecretStr | None = None
    """Shared key of the account."""

    sas_token: SecretStr | None = None
    """Shared access signature, with or without its leading ``?``."""

    connection_string: SecretStr | None = None
    """Connection string, as the portal shows it."""

    tenant_id: str | None = None
    """Entra tenant of the service principal."""

    client_id: str | None = None
    """Service principal, or the user-assigned identity that ``managed_identity`` means."""

    client_secret: SecretStr | None = None
    """Secret of the service principal."""

    managed_identity: bool = False
    """Use the managed identity of this machine: the system's, or that of ``client_id``."""

    msi_endpoint: Endpoint | None = None
    """URL that hands out managed-identity tokens, where it is not at its usual address."""

    federated_token_file: PathText | None = None
    """File with the token of a workload identity."""

    token: SecretStr | None = None
    """OAuth 2 bearer token for storage. It is not renewed."""

    anonymous: bool = False
    """Send requests without credentials, as to a public container."""

    endpoint_url: Endpoint | None = None
    """URL of the blob service, as of an emulator (with the account in its path)."""

    authority_host: Endpoint | None = None
    """URL that issues Entra tokens, as in a sovereign cloud."""

    verify_ssl: bool = True
    """Whether the server's certificate is checked."""

    driver: Driver | None = None
    """Who talks to the store; ``None`` chooses by config and operation."""

    def __init__(
        self,
        /,
        account_name: str | None = None,
        account_key: Text | None = None,
        sas_token: Text | None = None,
        connection_string: Text | None = None,
        *,
        tenant_id: str | None = None,
        client_id: str | None = None,
        client_secret: Text | None = None,
        managed_identity: bool | None = None,
        msi_endpoint: str | None = None,
        federated_token_file: Path | None = None,
        token: Text | None = None,
        anonymous: bool | None = None,
        endpoint_url: str | None = None,
        authority_host: str | None = None,
        verify_ssl: bool | None = None,
        ca_bundle: Path | None = None,
        proxy: Text | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        driver: Driver | None = None,
        **unknown: Never,
    ) -> None:
        """Validate the fields. Each means what the class says of it.

        Raises:
            ConfigurationError: a field is unknown or holds what it may not.
        """
        super().__init__(**arguments(locals()))

    @property
    def account(self) -> str | None:
        """The account that the config names, in its own field or in the connection string."""
        if self.account_name is not None or self.connection_string is None:
            return self.account_name
        text = self.connection_string.get_secret_value()
        match = re.search(r"(?:^|;)\s*AccountName=([^;]+)", text, re.IGNORECASE)
        return match.group(1).strip() if match else None
