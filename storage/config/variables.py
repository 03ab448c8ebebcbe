"""Settings from environment variables, by pydantic-settings.

A module of its own: the import of pydantic-settings takes longer than all the rest, and most
processes have no variable that needs it.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from storage.config.base import StrictModel
from storage.errors import ConfigurationError

__all__ = ["read_variables"]


class _Source(EnvSettingsSource):
    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        # A number or a word stays the text that it is: it may be a password like 00123 or true.
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            return value
        return super().decode_complex_value(field_name, field, value)


def read_variables(model: type[StrictModel], prefix: str) -> dict[str, Any]:
    """Return the fields of ``model`` that variables with ``prefix`` give, not validated.

    Raises:
        ConfigurationError: a variable that holds a table is malformed.
    """

    class Variables(model, BaseSettings):  # type: ignore[misc, valid-type]
        """The same fields, as pydantic-settings wants them."""

    source = _Source(Variables, env_prefix=prefix, env_nested_delimiter="__", env_ignore_empty=True)
    # The error keeps the value in its cause, so it ends here.
    try:
        return source()
    except SettingsError as exc:
        field = re.search(r'field "(\w+)"', str(exc))
    name = f"{prefix}{field[1].upper()}" if field else f"a {prefix}* variable"
    raise ConfigurationError(f'{name}: a JSON object is needed, such as {{"connections": 8}}')
