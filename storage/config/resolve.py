"""Which config applies to a URI. Without pydantic as long as no config is in sight."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from storage.errors import ConfigurationError, InvalidInput, one_line
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.config.base import ConfigModel
    from storage.config.plain import AnySettings

__all__ = ["config_class", "make_config", "read_type", "resolve_config"]

_CLASSES = {
    "s3": ("object_stores", "S3Config"),
    "gs": ("object_stores", "GCSConfig"),
    "azure": ("object_stores", "AzureConfig"),
    "hf": ("other_stores", "HFConfig"),
    "http": ("other_stores", "HTTPConfig"),
    "pvc": ("other_stores", "PVCConfig"),
    "git+http": ("repositories", "GitConfig"),
    "modelscope": ("repositories", "ModelScopeConfig"),
    "oci": ("repositories", "OCIConfig"),
}
_GENERIC = ("other_stores", "FsspecConfig")
_UNCONFIGURED = ("file", "memory")


def resolve_config(
    location: Location,
    config: ConfigModel | Mapping[str, Any] | None = None,
    settings: AnySettings | None = None,
) -> ConfigModel | None:
    """Return the config that applies to ``location``.

    The order is: ``config``; the entry of ``settings.stores`` with the longest prefix that
    matches at a path boundary; ``STORAGE_CONFIG``; none.

    Args:
        location: a parsed URI.
        config: what the caller of an operation passed; a mapping holds the fields.
        settings: as loaded; no entry of theirs is looked at when ``None``.

    Returns:
        A config of the type that the URI needs, or ``None`` for the SDK's ambient chain.

    Raises:
        ConfigurationError: ``config`` is of the wrong type or names another account than
            the URI, or the config that applies holds what it may not.
    """
    if config is not None:
        made = make_config(location.type, config, str(location))
        account = getattr(made, "account", None)
        if location.account is not None and account not in (None, location.account):
            raise ConfigurationError(
                f"{location} is in the storage account {location.account!r}, and the config is "
                f"for {account!r}: no credential is sent to another account; pass the right one"
            )
        return made
    if location.type in _UNCONFIGURED:
        return None
    if settings is not None and (store := settings.store_for(location)) is not None:
        return store.config
    if "STORAGE_CONFIG" in os.environ or "STORAGE_OVERRIDE_CONFIG" in os.environ:
        from storage.config.kserve import kserve_config

        return kserve_config(location)
    return None


def config_class(kind: str) -> type[ConfigModel] | None:
    """Return the class of config for URIs of the type ``kind``; none for local ones."""
    if kind in _UNCONFIGURED:
        return None
    module, name = _CLASSES.get(kind, _GENERIC)
    found: type[ConfigModel] = getattr(import_module(f"storage.config.{module}"), name)
    return found


def make_config(kind: str, config: ConfigModel | Mapping[str, Any], what: str) -> ConfigModel:
    """Return ``config`` as the config that URIs of the type ``kind`` take.

    Args:
        kind: as ``Location.type`` has it, or ``fsspec``.
        config: a config, returned as it is, or a mapping with its fields. For the generic
            driver the mapping holds the options themselves, or ``options`` that do.
        what: named in messages as what needs the config.

    Raises:
        ConfigurationError: the config is of another type, or a field is wrong.
    """
    wanted = config_class(kind)
    if wanted is None:
        found = "a mapping" if isinstance(config, Mapping) else type(config).__name__
        raise ConfigurationError(f"{what}: {kind} URIs take no config, and {found} was given")
    name = wanted.__name__
    if isinstance(config, Mapping):
        fields = {str(field): value for field, value in config.items()}
        own = fields.pop("type", None)
        if own is not None and config_class(read_type(own)) is not wanted:
            raise ConfigurationError(f"{what} needs {name}, and the config says type = {own!r}")
        if name == "FsspecConfig" and set(fields) != {"options"}:
            fields = {"options": fields}
        return wanted(**fields)
    # The type of URI, not the class, so that a third party's backend may have its own config.
    if not isinstance(config, type) and getattr(config, "uri_type", None) in (
        kind,
        wanted.uri_type,
    ):
        return config
    found = config.__name__ if isinstance(config, type) else type(config).__name__
    raise ConfigurationError(
        f"{what} needs {name} or a mapping with its fields, and {found} was given"
    )


def read_type(name: object) -> str:
    """Return the type of URI that ``name``, the ``type`` of a config, stands for.

    Every scheme is one, aliases included (``gcs`` is ``gs``), and ``fsspec``.

    Raises:
        ConfigurationError: it is no scheme.
    """
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", name):
        if name.lower() in _UNCONFIGURED:
            return name.lower()
        try:
            return parse_uri(f"{name}://name/path").type
        except InvalidInput:
            pass
    raise ConfigurationError(
        f"type: {one_line(repr(name), 40)} is none; expected {', '.join(_CLASSES)}, or the scheme "
        "of another store"
    )
