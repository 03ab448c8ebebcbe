"""Settings: ``STORAGE_*`` variables over a TOML file over defaults.

The file is ``STORAGE_SETTINGS_FILE``, else ``modelstorage/config.toml`` in the user's folder
for configuration, if it is there::

    offline = "auto"

    [transfer]
    connections = 32
    memory = "256MiB"

    [stores.team]
    prefix = "s3://team-a/"          # the URIs that it is for
    endpoint_url = "https://minio.example:9000"
    access_key_id = "…"
    secret_access_key = "…"

A variable is ``STORAGE_`` and the name of a field in capitals, with two underscores before
the name of a nested one: ``STORAGE_TRANSFER__MEMORY=256MiB``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, field_validator

from storage.config.base import ConfigModel, FieldError, FrozenDict, Seconds, StrictModel, given
from storage.config.files import read_table
from storage.config.prefix import Prefix
from storage.config.resolve import config_class, make_config, read_type
from storage.errors import ConfigurationError, one_line
from storage.uri import Location

__all__ = ["Settings", "Store", "TransferSettings", "load_settings", "named_config"]

_APP = "modelstorage"
_PREFIX = "STORAGE_"
_FILE_VARIABLE = "STORAGE_SETTINGS_FILE"
# Read without pydantic-settings, which takes longer to import than a cached model to find.
_PLAIN = {"STORAGE_CACHE_DIR": "cache_dir", "STORAGE_OFFLINE": "offline"}
_NESTED = ("transfer", "stores")

_MIB = 1024 * 1024
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?", re.IGNORECASE)
_WORDS = dict.fromkeys(("1", "true", "yes", "on", "y", "t"), True) | dict.fromkeys(
    ("0", "false", "no", "off", "n", "f"), False
)


def _read_size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("a number of bytes is needed, such as 134217728, 128MiB or 128MB")
    number, unit, binary = match.groups()
    exponent = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def _read_offline(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word == "auto":
        return word
    if word not in _WORDS:
        raise ValueError("true, false or auto is needed")
    return _WORDS[word]


def _read_folder(value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)):
        return value
    return Path(os.path.abspath(os.path.expanduser(value)))


def _user_folder(kind: Literal["cache", "config"]) -> Path:
    import platformdirs

    find = platformdirs.user_cache_path if kind == "cache" else platformdirs.user_config_path
    return find(_APP, appauthor=False)


Size = Annotated[int, BeforeValidator(_read_size), Field(gt=0)]
"""A positive number of bytes; as text with a unit, ``MiB`` (1024²) or ``MB`` (1000²)."""


class TransferSettings(StrictModel):
    """Limits of the transfers of one client."""

    connections: int = Field(default=16, ge=1, le=1024)
    """Requests under way at once, over all objects."""

    memory: Size = 128 * _MIB
    """Bytes held in flight, over all objects."""

    part_size: Size = 32 * _MIB
    """Bytes of one range of a download; the least size of one part of an upload."""

    attempts: int = Field(default=5, ge=1)
    """Attempts for one range or request, the first included."""

    retry_timeout: Seconds = 300.0
    """Seconds that the attempts for one range may take together."""

    connect_timeout: Seconds = 10.0
    """Seconds for a connection to be made."""

    stall_timeout: Seconds = 30.0
    """Seconds without a byte after which a request counts as dead."""

    limit_rate: Size | None = None
    """Bytes per second, over all objects; no limit if none."""


class Store(StrictModel):
    """An entry of ``[stores]``: a config and the URIs that it is for."""

    config: SerializeAsAny[ConfigModel]
    """How the store is reached."""

    prefix: str | None = None
    """Beginning of the URIs; an entry without one is used by its name only."""


@lru_cache(maxsize=256)
def _parse_prefix(text: str) -> Prefix:
    return Prefix.parse(text)


def _read_store(path: tuple[str, ...], table: Mapping[str, Any]) -> Store:
    """Return the entry that ``table`` describes; ``path`` leads to it in messages."""
    fields = given(table)
    prefix, kind = fields.pop("prefix", None), fields.pop("type", None)
    try:
        if prefix is None and kind is None:
            raise ConfigurationError('a prefix such as "s3://bucket/" or a type is needed')
        if kind is not None:
            kind = read_type(kind)
        if prefix is not None:
            if not isinstance(prefix, str):
                raise ConfigurationError(
                    f"prefix: a text is needed (found: {type(prefix).__name__})"
                )
            needed = _parse_prefix(prefix).type
            generic = kind == "fsspec" and config_class(needed) is config_class(kind)
            if kind not in (None, needed) and not generic:
                raise ConfigurationError(f"type is {kind}, but the prefix is one of {needed} URIs")
            kind = needed
        return Store(config=make_config(kind, fields, "the entry"), prefix=prefix)
    except FieldError as exc:
        problems = [((*path, *where), text) for where, text in exc.problems]
    except ConfigurationError as exc:
        problems = [(path, str(exc))]
    raise FieldError("Settings", problems)


def _freeze_stores(stores: dict[str, Store]) -> FrozenDict[str, Store]:
    names: dict[Prefix, str] = {}
    for name, store in stores.items():
        if store.prefix is not None:
            other = names.setdefault(_parse_prefix(store.prefix), name)
            if other != name:
                raise ValueError(f"{other} and {name} have the same prefix; keep one of them")
    return FrozenDict(stores)


class Settings(StrictModel):
    """Everything that is not said in a call."""

    cache_dir: Annotated[Path, BeforeValidator(_read_folder)] = Field(
        default_factory=lambda: _user_folder("cache")
    )
    """Root of the cache; by default in the user's folder for caches."""

    offline: Annotated[bool | Literal["auto"], BeforeValidator(_read_offline)] = False
    """Serve from the cache and ask no store; ``auto``: only if the store cannot be reached."""

    durable: bool = False
    """Sync files and folders to the disk before a download counts as done."""

    digest_algorithm: Literal["blake3", "sha256"] = "blake3"
    """Digest that addresses the blobs of the cache."""

    transfer: TransferSettings = Field(default_factory=TransferSettings)
    """Limits of transfers."""

    stores: Annotated[dict[str, Store], AfterValidator(_freeze_stores)] = FrozenDict()
    """Configs by name, for the URIs with their prefix."""

    @field_validator("transfer", mode="before")
    @classmethod
    def _read_transfer(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return TransferSettings(**{str(name): item for name, item in value.items()})
        except FieldError as exc:
            problems = [(("transfer", *where), text) for where, text in exc.problems]
        raise FieldError("Settings", problems)

    @field_validator("stores", mode="before")
    @classmethod
    def _read_stores(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            name: _read_store(("stores", str(name)), entry) if isinstance(entry, Mapping) else entry
            for name, entry in value.items()
        }

    def store_for(self, location: Location) -> Store | None:
        """Return the entry of ``stores`` whose prefix matches ``location`` best, or none."""
        best, best_score = None, None
        for store in self.stores.values():
            if store.prefix is None:
                continue
            account = getattr(store.config, "account", None)
            score = _parse_prefix(store.prefix).match(location, account)
            if score is not None and (best_score is None or score > best_score):
                best, best_score = store, score
        return best


def load_settings(file: str | os.PathLike[str] | None = None, **overrides: Any) -> Settings:
    """Return the settings as they are now.

    Args:
        file: a TOML file; ``None`` for the one that the module's text names.
        **overrides: fields that go before the variables and the file; ``None`` is not given.

    Raises:
        ConfigurationError: the file cannot be read, or a field holds what it may not; the
            message names the file or the variable.
    """
    path, table = _read_settings_file(file)
    variables = _read_variables()
    merged = _merge(_merge(table, variables), given(overrides))
    try:
        return Settings(**merged)
    except FieldError as exc:
        problems = exc.problems
    lines = []
    for where, text in problems:
        if _holds(overrides, where[:1]):
            source = "argument"
        elif _holds(variables, where):
            source = _variable_name(where)
        else:
            source = path or "settings"
        lines.append(f"{source}: {'.'.join(where)}: {text}")
    raise ConfigurationError("; ".join(one_line(line) for line in lines))


def named_config(name_or_file: str, settings: Settings | None = None) -> ConfigModel:
    """Return the config that a user named, as with ``--config NAME|FILE``.

    Args:
        name_or_file: the name of an entry of ``[stores]``, or the path of a TOML or JSON file
            that holds the fields of one config, its ``type`` (or a ``prefix``) among them.
        settings: where to look for the name; loaded if ``None``.

    Raises:
        ConfigurationError: there is no such entry and no such file, or it is unusable.
    """
    settings = load_settings() if settings is None else settings
    if name_or_file in settings.stores:
        return settings.stores[name_or_file].config
    path = os.path.expanduser(name_or_file)
    if os.sep not in path and not path.endswith((".toml", ".json")) and not os.path.isfile(path):
        names = ", ".join(sorted(settings.stores)) or "none"
        raise ConfigurationError(
            f"no config named {one_line(repr(name_or_file), 80)}: neither an entry of [stores] in "
            f"the settings (there are: {names}) nor a TOML or JSON file"
        )
    table = read_table(path)
    try:
        return _read_store((), table).config
    except FieldError as exc:
        problems = exc.problems
    raise FieldError(path, problems)


def _read_settings_file(file: str | os.PathLike[str] | None) -> tuple[str | None, dict[str, Any]]:
    chosen = os.fspath(file) if file is not None else os.environ.get(_FILE_VARIABLE)
    if chosen:
        path = os.path.expanduser(chosen)
        why = "" if file is not None else f"{_FILE_VARIABLE}: "
        return path, read_table(path, why)
    path = str(_user_folder("config") / "config.toml")
    return (path, read_table(path)) if os.path.exists(path) else (None, {})


def _read_variables() -> dict[str, Any]:
    """Return the fields that variables give, nested as in the file."""
    found = [name for name in os.environ if _field_of(name)]
    if all(name in _PLAIN for name in found):
        return {_PLAIN[name]: os.environ[name] for name in found if os.environ[name]}
    from storage.config.variables import read_variables

    return read_variables(Settings, _PREFIX)


def _field_of(variable: str) -> str | None:
    """Return the field that ``variable`` is about, none if it is another program's."""
    name = variable.upper()
    if not name.startswith(_PREFIX):
        return None
    field, nested, _ = name[len(_PREFIX) :].lower().partition("__")
    if field not in Settings.model_fields or (nested and field not in _NESTED):
        return None
    return field


def _variable_name(where: tuple[str, ...]) -> str:
    """Return the variable that gave the field at ``where``: its own, or a JSON one above."""
    present = {name.upper(): name for name in os.environ}
    for length in range(len(where), 0, -1):
        name = _PREFIX + "__".join(where[:length]).upper()
        if name in present:
            return present[name]
    return f"{_PREFIX}{where[0].upper()}"


def _holds(table: Mapping[str, Any], where: tuple[str, ...]) -> bool:
    value: Any = table
    for name in where:
        if not isinstance(value, Mapping):
            return True
        if name not in value:
            return False
        value = value[name]
    return True


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged
