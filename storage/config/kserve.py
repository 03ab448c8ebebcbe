"""KServe's ``STORAGE_CONFIG``: one config as JSON, from the secret of a storage spec.

``STORAGE_OVERRIDE_CONFIG`` holds the spec's parameters, which go before the secret's. The
variables are read where KServe would copy them into others; none is written. Keys that are
not about access (``bucket``, ``default_bucket``, ``path``, …) are left alone, and so is a value
that is empty. Booleans may be booleans or text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from storage.config.base import given
from storage.config.resolve import config_class, read_type
from storage.errors import ConfigurationError
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config.base import ConfigModel

__all__ = ["complete_fields", "kserve_config", "kserve_fields"]

_VARIABLES = ("STORAGE_CONFIG", "STORAGE_OVERRIDE_CONFIG")
_HDFS = ("hdfs", "webhdfs")
_CA_FILE = "cabundle.crt"
_CA_FOLDER = "/etc/ssl/custom-certs"


def kserve_config(
    location: Location, environ: Mapping[str, str] | None = None
) -> ConfigModel | None:
    """Return the config in ``STORAGE_CONFIG``, if it is for the type of ``location``.

    Args:
        location: a parsed URI.
        environ: the variables; ``os.environ`` if none.

    Returns:
        The config; ``None`` if there is none, if it names no type or another type, or if it
        is for another Azure account.

    Raises:
        ConfigurationError: a variable is no JSON object, or a field holds what it may not.
    """
    environ = os.environ if environ is None else environ
    kind, fields = kserve_fields(environ)
    if kind is None:
        return None
    if kind in _HDFS and location.type in _HDFS:
        raise ConfigurationError(
            f"STORAGE_CONFIG is of type {kind}, which is not supported; pass "
            "config=FsspecConfig({...}) with the options of fsspec's file system"
        )
    if kind != location.type:
        return None
    complete_fields(kind, fields, environ)
    wanted = config_class(kind)
    if wanted is None:
        return None
    known = wanted.model_fields
    try:
        made = wanted(**{name: value for name, value in fields.items() if name in known})
    except ConfigurationError as exc:
        raise ConfigurationError(f"STORAGE_CONFIG: {exc}") from exc
    account = getattr(made, "account", None)
    if location.account is not None and account not in (None, location.account):
        return None
    return made


def kserve_fields(environ: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """Return the type that ``STORAGE_CONFIG`` is for, and its fields as they stand there.

    Raises:
        ConfigurationError: a variable is no JSON object, or the type is none.
    """
    fields: dict[str, Any] = {}
    for variable in _VARIABLES:
        fields |= _read(variable, environ.get(variable, ""))
    kind = fields.pop("type", None)
    if kind is None:
        return None, {}
    try:
        return read_type(kind), fields
    except ConfigurationError as exc:
        raise ConfigurationError(f"STORAGE_CONFIG: {exc}") from exc


def complete_fields(kind: str, fields: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Make of KServe's fields for stores of the type ``kind`` those of its config, in place."""
    adapt = _ADAPTERS.get(kind)
    if adapt is not None:
        adapt(fields, environ)


def _read(variable: str, text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    # The error of the parser keeps the whole text, so it is not chained.
    where = ""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as exc:
        where = f" (line {exc.lineno}, column {exc.colno})"
        value = None
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError(
            f'{variable}: a JSON object is needed, such as {{"type": "s3", …}}, and this is '
            f"{'no JSON' + where if where else 'something else'}"
        )
    return given(value)


def _adapt_s3(fields: dict[str, Any], environ: Mapping[str, str]) -> None:
    if "ca_bundle" not in fields:
        folder = environ.get("CA_BUNDLE_VOLUME_MOUNT_POINT") or _CA_FOLDER
        path = os.path.join(folder, _CA_FILE)
        # The first names a mount that KServe made; the second may be about another cluster.
        if environ.get("CA_BUNDLE_CONFIGMAP_NAME") or (
            "cabundle_configmap" in fields and os.path.isfile(path)
        ):
            fields["ca_bundle"] = path


def _adapt_gs(fields: dict[str, Any], environ: Mapping[str, str]) -> None:
    parts = ("private_key", "client_email", "token_uri", "private_key_id", "project_id")
    if "service_account_key" not in fields and "private_key" in fields:
        key = {name: fields[name] for name in parts if name in fields}
        key.setdefault("token_uri", "https://oauth2.googleapis.com/token")
        fields["service_account_key"] = json.dumps({"type": "service_account", **key})


def _adapt_hf(fields: dict[str, Any], environ: Mapping[str, str]) -> None:
    for name, alias in (("token", "HF_TOKEN"), ("endpoint", "HF_ENDPOINT")):
        if alias in fields:
            fields.setdefault(name, fields[alias])


_ADAPTERS = {"s3": _adapt_s3, "gs": _adapt_gs, "hf": _adapt_hf}
