"""The settings in force, without pydantic where there is nothing that only it can check.

A process that finds its model in the cache should not import for longer than it looks. Without
a settings file, and with no variable but those of single fields, the settings are read here.
All else is left to :mod:`storage.config.settings`: files, nested fields, and everything that is
wrong, for it words the message. What both need is said here once: defaults, profiles, and how
a text is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from storage.config.freshness import REVALIDATE, read_freshness
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config.settings import Settings, Store

__all__ = [
    "FILE_VARIABLE",
    "PREFIX",
    "PROFILES",
    "AnySettings",
    "PlainSettings",
    "PlainTransfer",
    "current_settings",
    "field_of",
    "read_folder",
    "read_folders",
    "read_offline",
    "read_size",
    "settings_file",
    "user_folder",
]

PREFIX = "STORAGE_"
"""What the variables of settings begin with."""

FILE_VARIABLE = "STORAGE_SETTINGS_FILE"
"""The variable that names the settings file."""

_APP = "modelstorage"
_NESTED = ("transfer", "stores")
_MIB = 1024 * 1024
# Not compiled before they are needed, which is seldom.
_SIZE = r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b)?"
_NUMBER = r"\d+(?:\.\d+)?"
_WORDS = dict.fromkeys(("1", "true", "yes", "on", "y", "t"), True) | dict.fromkeys(
    ("0", "false", "no", "off", "n", "f"), False
)

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "edge": {
        "durable": True,
        "transfer": {
            "connections": 4,
            "memory": 32 * _MIB,
            "part_size": 4 * _MIB,
            "limit_rate": 8 * _MIB,
        },
    }
}
"""Other defaults, by the name of the profile."""


def read_size(value: Any) -> Any:
    """Return the bytes that a text such as ``128MiB`` means; what is no text as it is."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(_SIZE, value.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("a number of bytes is needed, such as 134217728, 128MiB or 128MB")
    number, unit, binary = match.groups()
    exponent = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def read_offline(value: Any) -> bool | Literal["auto"]:
    """Return whether a value means offline, or ``auto``."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word == "auto":
        return "auto"
    if word not in _WORDS:
        raise ValueError("true, false or auto is needed")
    return _WORDS[word]


def read_folder(value: Any) -> Any:
    """Return the absolute path of a folder or file; what is no path as it is."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    return Path(os.path.abspath(os.path.expanduser(value)))


def read_folders(value: Any) -> tuple[Path, ...]:
    """Return absolute paths: of a list, of a JSON list, or of a text as ``PATH`` is one."""
    if isinstance(value, str):
        value = _parse_list(value) if value.lstrip().startswith("[") else value.split(os.pathsep)
    elif isinstance(value, os.PathLike):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(path, (str, os.PathLike)) for path in value
    ):
        raise ValueError(f"paths of folders are needed: a list, or a text with {os.pathsep}")
    return tuple(read_folder(path) for path in value if os.fspath(path).strip())


def _parse_list(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def user_folder(kind: Literal["cache", "config"]) -> Path:
    """Return this library's folder among the user's caches or configurations.

    There is no such folder for a user without a home, as containers have them.
    """
    import platformdirs

    find = platformdirs.user_cache_path if kind == "cache" else platformdirs.user_config_path
    try:
        return find(_APP, appauthor=False)
    except RuntimeError:
        return Path("/nonexistent", kind, _APP)


def settings_file() -> str | None:
    """Return the path of the settings file in force, none if there is none."""
    chosen = os.environ.get(FILE_VARIABLE)
    if chosen:
        return os.path.expanduser(chosen)
    path = str(user_folder("config") / "config.toml")
    return path if os.path.exists(path) else None


@dataclass(frozen=True, kw_only=True)
class PlainTransfer:
    """The fields of ``TransferSettings``, and their defaults."""

    connections: int = 16
    memory: int = 128 * _MIB
    part_size: int = 32 * _MIB
    attempts: int = 5
    retry_timeout: float = 300.0
    retry_wait: float = 0.2
    throttle_wait: float = 2.0
    retry_budget: int = 100
    connect_timeout: float = 10.0
    stall_timeout: float = 30.0
    limit_rate: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """The fields of ``Settings``, and their defaults; no store has an entry."""

    cache_dir: Path = field(default_factory=lambda: user_folder("cache"))
    cache_budget: int | None = None
    cache_grace: float = 3600.0
    cache_lower: tuple[Path, ...] = ()
    cache_lock_timeout: float = 3600.0
    freshness: float = REVALIDATE
    offline: bool | Literal["auto"] = False
    durable: bool = False
    digest_algorithm: Literal["blake3", "sha256"] = "blake3"
    require_signature: Path | None = None
    profile: Literal["edge"] | None = None
    transfer: PlainTransfer = field(default_factory=PlainTransfer)
    stores: Mapping[str, Store] = field(default_factory=dict)

    def store_for(self, location: Location) -> Store | None:
        """Return the entry of ``stores`` for ``location``: none."""
        return None


AnySettings: TypeAlias = "Settings | PlainSettings"
"""Settings, read in either way."""


def current_settings() -> AnySettings:
    """Return the settings as they are now: the fields of ``Settings``, as cheaply as can be.

    Raises:
        ConfigurationError: as :func:`storage.config.load_settings` says.
    """
    fields = None if settings_file() is not None else _read_plain()
    if fields is None:
        from storage.config.settings import load_settings

        return load_settings()
    defaults = PROFILES.get(fields.get("profile", ""), {})
    transfer = PlainTransfer(**defaults.get("transfer", {}))
    return PlainSettings(**{**defaults, **fields, "transfer": transfer})


def field_of(variable: str) -> str | None:
    """Return the field that ``variable`` is about, none if it is another program's."""
    name = variable.upper()
    if not name.startswith(PREFIX):
        return None
    found, nested, _ = name[len(PREFIX) :].lower().partition("__")
    if found not in PlainSettings.__dataclass_fields__ or (nested and found not in _NESTED):
        return None
    return found


def _read_plain() -> dict[str, Any] | None:
    """Return the fields that variables give; none if one of them is for the model to read."""
    fields = {}
    for variable, text in os.environ.items():
        name = field_of(variable)
        if name is None or not (text := text.rstrip("\r\n")):
            continue
        if variable != f"{PREFIX}{name.upper()}" or name not in _READERS:
            return None
        try:
            fields[name] = _READERS[name](text)
        except (ValueError, KeyError):
            return None
    return fields


def _positive_size(text: str) -> int:
    size: int = read_size(text)
    if size <= 0:
        raise ValueError
    return size


def _seconds(text: str) -> float:
    if not re.fullmatch(_NUMBER, text):
        raise ValueError
    return float(text)


def _positive_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds == 0:
        raise ValueError
    return seconds


_READERS: Mapping[str, Callable[[str], Any]] = {
    "cache_dir": read_folder,
    "cache_budget": _positive_size,
    "cache_grace": _seconds,
    "cache_lower": read_folders,
    "cache_lock_timeout": _positive_seconds,
    "freshness": read_freshness,
    "offline": read_offline,
    "durable": lambda text: _WORDS[text.lower()],
    "digest_algorithm": {"blake3": "blake3", "sha256": "sha256"}.__getitem__,
    "require_signature": read_folder,
    "profile": {name: name for name in PROFILES}.__getitem__,
}
