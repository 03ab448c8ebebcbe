"""KServe's environment: the variables of one call, as settings, patterns and typed configs.

The webhook of KServe turns annotations and secrets into variables. They are read here, for each
call anew, and none is ever written, so two calls with other secrets do not meet. What is not
named here (``AWS_ACCESS_KEY_ID``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``HF_TOKEN``, …) is left to
the chain of each store, which reads the environment by itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.addresses import azure_account
from storage.config.kserve import complete_fields, kserve_fields
from storage.config.plain import current_settings
from storage.config.resolve import config_class
from storage.errors import ConfigurationError, one_line
from storage.integrations.kserve.authorities import Authorities
from storage.transfer.plan import Patterns
from storage.uri import Location

if TYPE_CHECKING:
    from collections.abc import Iterable

    from storage.config.base import ConfigModel
    from storage.config.plain import AnySettings

__all__ = ["Environment"]

_YES = ("1", "on", "true", "yes")
# What of Azure's own says who we are; then its chain is asked, and nothing is anonymous.
_AZURE_AMBIENT = (
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "IDENTITY_ENDPOINT",
    "MSI_ENDPOINT",
)
_DOCKER_CONFIG = "/mnt/oci-fetch-auth/config.json"
# Requests that boto3 has under way for one file, and what kserve-storage has for one blob.
_BOTO_THREADS = 10
_AZURE_CHUNKS = 4
_MOST_CONNECTIONS = 1024
_MOST_DIGITS = 9


class Environment:
    """The variables of one call."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Take them as they are now.

        Args:
            environ: the variables; those of the process if none.
        """
        # A copy: what another thread sets meanwhile is for another call.
        self.variables = dict(os.environ if environ is None else environ)

    def get(self, *names: str) -> str | None:
        """Return the first of some variables that holds anything, without white space around."""
        found = (self.variables.get(name, "").strip() for name in names)
        return next(filter(None, found), None)

    # -- what is wanted ----------------------------------------------------------------------

    def patterns(
        self, allow: str | Iterable[str] | None, ignore: str | Iterable[str] | None
    ) -> Patterns:
        """Return the filters of a call; ``STORAGE_ALLOW_PATTERNS`` and its twin if it has none."""
        if allow is None:
            allow = self._patterns("STORAGE_ALLOW_PATTERNS")
        if ignore is None:
            ignore = self._patterns("STORAGE_IGNORE_PATTERNS")
        # An empty list of what is allowed means all, to kserve-storage and its callers.
        return Patterns(allow or None, ignore or None)

    def _patterns(self, variable: str) -> list[str] | None:
        text = self.get(variable)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = text.split(",")
        listed = found if isinstance(found, list) else [found]
        return [name for name in (str(one).strip() for one in listed) if name] or None

    # -- limits ------------------------------------------------------------------------------

    def settings(self, location: Location) -> AnySettings:
        """Return the settings for a call, with the limits that KServe's variables name.

        Raises:
            ConfigurationError: a variable holds what it may not.
        """
        limits: dict[str, Any] = {}
        if location.type == "s3":
            if (retries := self._number("S3_MAX_ATTEMPTS", least=0)) is not None:
                limits["attempts"] = retries + 1
            if (files := self._number("S3_MAX_FILE_CONCURRENCY")) is not None:
                limits["connections"] = files * _BOTO_THREADS
        elif location.type == "azure":
            files = self._number("AZURE_MAX_FILE_CONCURRENCY")
            chunks = self._number("AZURE_MAX_CHUNK_CONCURRENCY")
            if files is not None or chunks is not None:
                limits["connections"] = (files or _AZURE_CHUNKS) * (chunks or _AZURE_CHUNKS)
        if not limits:
            return current_settings()
        from storage.config.settings import load_settings

        if "connections" in limits:
            limits["connections"] = min(limits["connections"], _MOST_CONNECTIONS)
        return load_settings(transfer=limits)

    def _number(self, variable: str, *, least: int = 1) -> int | None:
        text = self.get(variable)
        if text is None:
            return None
        if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < least:
            raise ConfigurationError(
                f"the variable {variable}: a whole number from {least} on is needed, and it is "
                f"{one_line(repr(text), 40)}"
            )
        return int(text)

    def _is_true(self, *variables: str) -> bool:
        return (self.get(*variables) or "").lower() in _YES

    # -- who we are --------------------------------------------------------------------------

    def configs(self, location: Location, authorities: Authorities) -> Iterator[ConfigModel | None]:
        """Yield the config for a source, and what may be tried if the store refuses it.

        Where nothing says who we are, a bucket of GCS may still be public, and a container of
        Azure that is not may be open to the identity of this machine.

        Args:
            location: what is fetched.
            authorities: those that the cluster trusts beside the system's.

        Raises:
            ConfigurationError: a variable holds what it may not.
        """
        wanted = config_class(location.type)
        if wanted is None:
            yield None
            return
        stored = self._stored(location)
        fields = self._fields(location)
        if stored and location.type == "azure":
            fields.pop("anonymous", None)  # somebody says who we are
        fields |= stored
        complete_fields(location.type, fields, self.variables)
        known = wanted.model_fields
        if location.type == "s3":
            self._check_bundle(fields)
        elif "ca_bundle" in known and "ca_bundle" not in fields:
            fields["ca_bundle"] = authorities.bundle(oci=location.type == "oci")
        fields = {
            name: value for name, value in fields.items() if name in known and value is not None
        }
        yield self._make(wanted, fields, stored)
        fallback = self._fallback(location, fields)
        if fallback is not None:
            yield wanted(**fallback)

    def _stored(self, location: Location) -> dict[str, Any]:
        """Return what ``STORAGE_CONFIG`` says of the store that ``location`` is in."""
        kind, fields = kserve_fields(self.variables)
        account = fields.get("account_name")
        if kind != location.type or (
            location.account is not None and account not in (None, location.account)
        ):
            return {}
        return fields

    def _make(
        self, wanted: type[ConfigModel], fields: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> ConfigModel | None:
        if not fields:
            return None
        try:
            return wanted(**fields)
        except ConfigurationError as exc:
            source = "STORAGE_CONFIG" if set(fields) & set(stored) else "KServe's variables"
            raise ConfigurationError(f"{source}: {exc}") from exc

    def _fields(self, location: Location) -> dict[str, Any]:
        read = {
            "s3": self._s3,
            "azure": lambda: self._azure(location),
            "oci": self._oci,
            "git+http": self._git,
        }.get(location.type)
        return {} if read is None else read()

    def _s3(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            # As boto3 has it in kserve-storage, which passes the first of them itself.
            "endpoint_url": self.get("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
            "region": self.get("AWS_DEFAULT_REGION", "AWS_REGION"),
            "ca_bundle": self.get("AWS_CA_BUNDLE"),
            "connect_timeout": self._seconds("S3_CONNECT_TIMEOUT"),
            "read_timeout": self._seconds("S3_READ_TIMEOUT"),
        }
        if "://" not in (fields["endpoint_url"] or "://"):
            raise ConfigurationError(
                "the variable AWS_ENDPOINT_URL: a URL such as https://minio.example is needed, "
                f"and it is {one_line(repr(fields['endpoint_url']), 80)}"
            )
        if fields["endpoint_url"] is None and (host := self.get("S3_ENDPOINT")) is not None:
            secure = (self.get("S3_USE_HTTPS") or "1").lower() not in ("0", "false")
            scheme = "https" if secure else "http"
            fields["endpoint_url"] = host if "://" in host else f"{scheme}://{host}"
        if (self.get("S3_VERIFY_SSL") or "").lower() in ("0", "false"):
            fields["verify_ssl"] = False
        if self._is_true("awsAnonymousCredential", "AWS_ANONYMOUS_CREDENTIAL"):
            fields["anonymous"] = True
        # The first is the name that KServe's webhook writes.
        if self._is_true("S3_USER_VIRTUAL_BUCKET", "S3_USE_VIRTUAL_BUCKET"):
            fields["addressing_style"] = "virtual"
        if self._is_true("S3_USE_ACCELERATE"):
            fields["use_accelerate"] = True
        return {name: value for name, value in fields.items() if value is not None}

    def _seconds(self, variable: str) -> float | None:
        number = self._number(variable)
        return None if number is None else float(number)

    def _check_bundle(self, fields: dict[str, Any]) -> None:
        """Refuse an S3 bundle that is not there: without it another one would be trusted."""
        path = fields.get("ca_bundle")
        if str(fields.get("verify_ssl", True)).lower() in ("0", "false"):
            fields.pop("ca_bundle", None)
        elif isinstance(path, str) and path and not os.path.exists(os.path.expanduser(path)):
            raise ConfigurationError(
                f"the CA bundle {path} is not there; AWS_CA_BUNDLE, the ca_bundle of "
                "STORAGE_CONFIG, or CA_BUNDLE_CONFIGMAP_NAME names it; mount it, or unset these"
            )

    def _azure(self, location: Location) -> dict[str, Any]:
        named = self._azure_account()
        if None not in (named, location.account) and named != location.account:
            # What is for one account is not sent to another.
            return {"anonymous": True}
        fields: dict[str, Any] = {}
        if location.scheme == "azure" and (url := self.get("AZURE_SERVICE_URL")) is not None:
            fields["endpoint_url"] = url
        if location.account is None and named is not None:
            fields["account_name"] = named
        client = self.get("AZ_CLIENT_ID", "AZURE_CLIENT_ID")
        tenant = self.get("AZ_TENANT_ID", "AZURE_TENANT_ID")
        secret = self.get("AZ_CLIENT_SECRET", "AZURE_CLIENT_SECRET")
        key = self.get("AZURE_STORAGE_ACCESS_KEY")
        # Of shares KServe knows the key alone, so that goes first there.
        if client is not None and (location.scheme == "azure" or key is None):
            fields |= {"client_id": client, "tenant_id": tenant}
            if tenant is not None:
                fields["client_secret"] = secret
        elif key is not None:
            fields["account_key"] = key
        elif (token := self.get("AZURE_ACCESS_TOKEN")) is not None:
            fields["token"] = token
        elif self.get(*_AZURE_AMBIENT) is None and not _is_signed(location):
            fields["anonymous"] = True
        return {name: value for name, value in fields.items() if value is not None}

    def _azure_account(self) -> str | None:
        """Return the account that the variables are about, if they say so."""
        host = urlsplit(self.get("AZURE_SERVICE_URL") or "").hostname
        found = azure_account(host or "")
        return self.get("AZURE_ACCOUNT_NAME") or (found[0] if found is not None else None)

    def _oci(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        path = self.get("KSERVE_OCI_DOCKER_CONFIG") or _DOCKER_CONFIG
        if os.path.exists(path):
            fields["docker_config"] = path
        if self._is_true("KSERVE_OCI_INSECURE_REGISTRY"):
            fields |= {"plain_http": True, "verify_ssl": False}
        return fields

    def _git(self) -> dict[str, Any]:
        fields = {"username": self.get("GIT_USERNAME"), "password": self.get("GIT_PASSWORD")}
        return {name: value for name, value in fields.items() if value is not None}

    def _fallback(self, location: Location, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        if location.type == "gs" and self.get("GOOGLE_APPLICATION_CREDENTIALS") is None:
            given = {"service_account_key", "token", "anonymous", "impersonate_service_account"}
            return None if given & set(fields) else {**fields, "anonymous": True}
        if location.type == "azure" and fields.get("anonymous") is True:
            if _is_signed(location) or self._azure_account() not in (None, location.account):
                return None
            return {name: value for name, value in fields.items() if name != "anonymous"}
        return None


def _is_signed(location: Location) -> bool:
    """Tell whether the URI of a blob or a file brings its own credential."""
    return re.search(r"(?:^|&)sig=", location.query or "") is not None
