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
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from storage.config.base import ConfigModel, FieldError, FrozenDict, Seconds, StrictModel, given
from storage.config.files import read_table
from storage.config.freshness import read_freshness
from storage.config.plain import (
    FILE_VARIABLE,
    PREFIX,
    PROFILES,
    PlainSettings,
    PlainTransfer,
    field_of,
    read_folder,
    read_folders,
    read_offline,
    read_size,
    settings_file,
    user_folder,
)
from storage.config.prefix import Prefix
from storage.config.resolve import config_class, make_config, read_type
from storage.errors import ConfigurationError, one_line
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config.plain import AnySettings

__all__ = ["Settings", "Store", "TransferSettings", "load_settings", "named_config"]

Size = Annotated[int, BeforeValidator(read_size), Field(gt=0)]
"""A positive number of bytes; as text with a unit, ``MiB`` (1024²) or ``MB`` (1000²)."""


class TransferSettings(StrictModel):
    """Limits of the transfers of one client."""

    connections: int = Field(default=PlainTransfer.connections, ge=1, le=1024)
    """Requests under way at once, over all objects."""

    memory: Size = PlainTransfer.memory
    """Bytes held in flight, over all objects."""

    part_size: Size = PlainTransfer.part_size
    """Bytes of one range of a download."""

    attempts: int = Field(default=PlainTransfer.attempts, ge=1)
    """Attempts for one range or request, the first included."""

    retry_timeout: Seconds = PlainTransfer.retry_timeout
    """Seconds that the attempts for one range may take together, counted from the last progress;
    a store that asks to wait longer is not asked again."""

    retry_wait: Seconds = PlainTransfer.retry_wait
    """Seconds before the second attempt; they double for each further one, up to 10."""

    throttle_wait: Seconds = PlainTransfer.throttle_wait
    """Seconds before the second attempt if the store is asked too often and does not say how
    long to wait; they double likewise."""

    retry_budget: int = Field(default=PlainTransfer.retry_budget, ge=1)
    """Repeated attempts, over all transfers of a client, that may go before those that work:
    each of these gives one back, and so does each second."""

    connect_timeout: Seconds = PlainTransfer.connect_timeout
    """Seconds for a connection to be made."""

    stall_timeout: Seconds = PlainTransfer.stall_timeout
    """Seconds without a byte after which a request counts as dead."""

    limit_rate: Size | None = PlainTransfer.limit_rate
    """Bytes per second, over all objects and both ways; no limit if none."""


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

    cache_dir: Annotated[Path, BeforeValidator(read_folder)] = Field(
        default_factory=lambda: user_folder("cache")
    )
    """Root of the cache; by default in the user's folder for caches."""

    cache_budget: Size | None = PlainSettings.cache_budget
    """Bytes that the blobs of the cache may take; no limit if none."""

    cache_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = PlainSettings.cache_grace
    """Seconds since its last use in which a model is not evicted."""

    cache_lower: Annotated[tuple[Path, ...], BeforeValidator(read_folders)] = (
        PlainSettings.cache_lower
    )
    """Roots of other caches to read from, in this order; they are never written."""

    cache_lock_timeout: Seconds = PlainSettings.cache_lock_timeout
    """Seconds to wait for another process that fetches the same; then it is fetched here, too."""

    freshness: Annotated[float, BeforeValidator(read_freshness)] = PlainSettings.freshness
    """Seconds for which a cached model is taken without asking its store: ``revalidate`` (0),
    ``cache-first`` (for ever), ``max-age=3600``, or a number."""

    offline: Annotated[bool | Literal["auto"], BeforeValidator(read_offline)] = (
        PlainSettings.offline
    )
    """Serve from the cache and ask no store; ``auto``: only if the store cannot be reached."""

    durable: bool = PlainSettings.durable
    """Sync files and folders to the disk before a download counts as done."""

    digest_algorithm: Literal["blake3", "sha256"] = PlainSettings.digest_algorithm
    """Digest that addresses the blobs of the cache."""

    require_signature: Annotated[Path | None, BeforeValidator(read_folder)] = (
        PlainSettings.require_signature
    )
    """File with the public key, or the certificates, that every model has to be signed with."""

    profile: Literal["edge"] | None = PlainSettings.profile
    """Other defaults, for a kind of machine; ``edge`` is one with little memory and a thin line."""

    transfer: TransferSettings = Field(default_factory=TransferSettings)
    """Limits of transfers."""

    stores: Annotated[dict[str, Store], AfterValidator(_freeze_stores)] = FrozenDict()
    """Configs by name, for the URIs with their prefix."""

    @model_validator(mode="before")
    @classmethod
    def _apply_profile(cls, fields: Any) -> Any:
        """Put the fields that were given over the defaults of their profile."""
        if not isinstance(fields, Mapping) or not (
            defaults := PROFILES.get(str(fields.get("profile")))
        ):
            return fields
        transfer = fields.get("transfer")
        if isinstance(transfer, TransferSettings):
            transfer = {name: getattr(transfer, name) for name in transfer.model_fields_set}
        if isinstance(transfer, Mapping):
            fields = {**fields, "transfer": given(transfer)}
        return _merge(defaults, fields)

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


def named_config(name_or_file: str, settings: AnySettings | None = None) -> ConfigModel:
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
    path = settings_file() if file is None else os.path.expanduser(file)
    if path is None:
        return None, {}
    named = file is None and os.environ.get(FILE_VARIABLE)
    return path, read_table(path, f"{FILE_VARIABLE}: " if named else "")


def _read_variables() -> dict[str, Any]:
    """Return the fields that variables give, nested as in the file."""
    found = {name: field for name in os.environ if (field := field_of(name))}
    # A text for a whole field needs no pydantic-settings, which takes longest to import.
    if all(name == f"{PREFIX}{field.upper()}" for name, field in found.items()) and not (
        {"transfer", "stores"} & {*found.values()}
    ):
        return {field: os.environ[name] for name, field in found.items() if os.environ[name]}
    from storage.config.variables import read_variables

    return read_variables(Settings, PREFIX)


def _variable_name(where: tuple[str, ...]) -> str:
    """Return the variable that gave the field at ``where``: its own, or a JSON one above."""
    present = {name.upper(): name for name in os.environ}
    for length in range(len(where), 0, -1):
        name = PREFIX + "__".join(where[:length]).upper()
        if name in present:
            return present[name]
    return f"{PREFIX}{where[0].upper()}"


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
