"""Configuration files: TOML, or JSON where the name says so."""

from __future__ import annotations

from typing import Any

from storage.errors import ConfigurationError

__all__ = ["read_table"]


def read_table(path: str, why: str = "") -> dict[str, Any]:
    """Return the table that the file at ``path`` holds.

    Args:
        path: of a TOML file, or of a JSON file if it ends in ``.json``.
        why: beginning of messages: what named the file.

    Raises:
        ConfigurationError: the file cannot be read or is malformed. The message says where,
            never what stands there, which may be a secret.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as exc:
        raise ConfigurationError(f"{why}{path} cannot be read: {exc.strerror or exc}") from exc
    kind = "JSON" if path.endswith(".json") else "TOML"
    table, where = _parse(kind, data)
    if not isinstance(table, dict):
        raise ConfigurationError(f"{why}{path} is not {kind} of one table{where}; correct it there")
    return table


def _parse(kind: str, data: bytes) -> tuple[Any, str]:
    """Return what ``data`` holds, or ``None`` and where it is wrong.

    The errors of the parsers keep the text, so they end here.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        return None, f": it is not UTF-8 (byte {exc.start})"
    if kind == "JSON":
        import json

        try:
            return json.loads(text), ""
        except json.JSONDecodeError as exc:
            return None, f" (line {exc.lineno}, column {exc.colno})"
    import re
    import tomllib

    try:
        return tomllib.loads(text), ""
    except tomllib.TOMLDecodeError as exc:
        place = re.search(r"\(at ([a-z0-9, ]+)\)\s*$", str(exc))
        return None, f" ({place[1]})" if place else ""
