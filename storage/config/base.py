"""What all configs share: frozen, hashable, their secrets hidden, their errors one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Secret,
    SecretStr,
    ValidationError,
)

from storage.addresses import endpoint_fault
from storage.errors import ConfigurationError, one_line

__all__ = [
    "ConfigModel",
    "Default",
    "Endpoint",
    "FieldError",
    "FrozenDict",
    "NetworkConfig",
    "Path",
    "PathText",
    "Proxy",
    "Seconds",
    "SecretOptions",
    "StrictModel",
    "Text",
    "arguments",
    "given",
]

K = TypeVar("K")
V = TypeVar("V")

Location = tuple[str, ...]
Text = str | SecretStr
Path = str | os.PathLike[str]


class FieldError(ConfigurationError):
    """Fields of a config or of the settings hold what they may not.

    Attributes:
        title: what was to be made.
        problems: the path of each faulty field and what is wrong with it. Never its value.
    """

    def __init__(self, title: str, problems: Sequence[tuple[Location, str]]) -> None:
        """Keep the ``title`` and the ``problems``."""
        super().__init__(title, problems)
        self.title = title
        self.problems = problems

    def __str__(self) -> str:
        return f"{self.title}: " + "; ".join(describe(path, text) for path, text in self.problems)


def describe(path: Location, text: str) -> str:
    """Return one problem as text."""
    return one_line(f"{'.'.join(path)}: {text}" if path else text, 600)


def find_problems(exc: ValidationError, known: Sequence[str]) -> list[tuple[Location, str]]:
    """Return where pydantic found what, without the input that it found."""
    problems = []
    for error in exc.errors(include_url=False, include_context=False):
        path = tuple(str(part) for part in error["loc"])
        text = error["msg"].removeprefix("Value error, ")
        text = text[:1].lower() + text[1:]
        if error["type"] == "extra_forbidden":
            # Only this model's own fields are known here, so no guess for nested ones.
            text = "there is no such field" + (_nearest(path[0], known) if len(path) == 1 else "")
        elif error["type"] != "value_error":
            text += f" (found: {type(error['input']).__name__})"
        problems.append((path, text))
    return problems


def _nearest(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    matches = get_close_matches(name, known, 1)
    return f"; did you mean {matches[0]}?" if matches else f"; known are {', '.join(known)}"


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed, and so can be hashed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config cannot be changed; make another one")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class SecretOptions(Secret[dict[str, Any]]):
    """Options for a driver. Any of them may be a secret, so only their names are shown."""

    def _display(self) -> str:
        return ", ".join(f"{name}=…" for name in self.get_secret_value())


class StrictModel(BaseModel):
    """Frozen; no unknown fields; what is wrong is a ``ConfigurationError`` of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def __init__(self, /, **fields: Any) -> None:
        """Validate the ``fields``; ``None`` and an empty text count as not given."""
        problems = None
        try:
            super().__init__(**given(fields))
        except ValidationError as exc:
            problems = find_problems(exc, sorted(type(self).model_fields))
        # Raised out here: pydantic's error holds the input, secrets included, and a cause or
        # context would carry it along.
        if problems is not None:
            raise FieldError(type(self).__name__, problems)


class ConfigModel(StrictModel):
    """Base of the configs, those of third-party backends included.

    Two configs are equal, and hash alike, when a backend made from the one serves for the
    other.
    """

    uri_type: ClassVar[str] = ""
    """The type of URI that the config is for; ``*`` for every scheme of the generic driver."""

    yielding: ClassVar[tuple[str, ...]] = ()
    """Fields whose default gives way to the environment, unless it was given explicitly."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return (
            (name, value) for name, value in super().__repr_args__() if self.explicit(str(name))
        )

    def explicit(self, name: str) -> bool:
        """Tell whether the field ``name`` was given, rather than left to its default."""
        return name in self.model_fields_set and getattr(self, name) is not None

    def _identity(self) -> tuple[Any, ...]:
        values = tuple(_hashable(getattr(self, name)) for name in type(self).model_fields)
        return values, tuple(self.explicit(name) for name in self.yielding)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return bool(self._identity() == other._identity())

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))


def _hashable(value: Any) -> Any:
    if isinstance(value, SecretOptions):
        return _hashable(value.get_secret_value())
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_hashable(item) for item in value)
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return value


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``fields`` that hold something.

    ``None`` and ``""`` are what an unset variable leaves behind. A line break at the end of a
    text is what ``echo … | base64`` leaves in a Kubernetes secret; no field ends in one.
    """
    return dict(_given(fields))


def _given(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, str):
            value = value.rstrip("\r\n")
        elif isinstance(value, SecretStr):
            value = SecretStr(value.get_secret_value().rstrip("\r\n"))
        if value is None or (isinstance(value, (str, SecretStr)) and len(value) == 0):
            continue
        yield name, value


def _path_text(value: Any) -> Any:
    return os.path.expanduser(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else value


def _endpoint(value: str) -> str:
    fault = endpoint_fault(value)
    if fault is not None:
        raise ValueError(fault)
    return value.rstrip("/")


def _proxy(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if "://" not in text:
        text = f"http://{text}"
    try:
        host, _ = urlsplit(text).hostname, urlsplit(text).port
    except ValueError:
        host = None
    if not host:
        raise ValueError("the URL of a proxy is needed, such as http://proxy.example:3128")
    return SecretStr(text)


class Default(str):
    """A default that can be told from the same text given by the caller."""

    __slots__ = ()


def arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments in the ``locals()`` of an ``__init__``."""
    unknown: dict[str, Any] = scope.pop("unknown")
    return {
        name: value
        for name, value in scope.items()
        if name not in ("self", "__class__") and not isinstance(value, Default)
    } | unknown


PathText = Annotated[str, BeforeValidator(_path_text)]
"""A local path as text; ``~`` is expanded. The file is not looked at before it is used."""

Endpoint = Annotated[str, AfterValidator(_endpoint)]
"""An http(s) URL of a service, without a slash at its end."""

Proxy = Annotated[SecretStr, AfterValidator(_proxy)]
"""The URL of a proxy. It may hold user and password, so it is a secret."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A positive number of seconds."""


class NetworkConfig(ConfigModel):
    """How any store over the network is reached."""

    ca_bundle: PathText | None = None
    """Path of a PEM file with the authorities to trust, instead of the system's."""

    proxy: Proxy | None = None
    """URL of the proxy to go through, instead of ``HTTPS_PROXY`` and its kin."""

    connect_timeout: Seconds | None = None
    """Seconds for a connection to be made; the settings' ``transfer.connect_timeout`` if none."""

    read_timeout: Seconds | None = None
    """Seconds without a byte until a request is dead; ``transfer.stall_timeout`` if none."""
