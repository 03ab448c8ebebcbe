"""What is loaded when, and that the package exports what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import storage.config

ROOT = Path(storage.config.__file__).parents[2]
HEAVY = ("pydantic", "pydantic_settings", "platformdirs", "tomllib")


def loaded(code: str, **variables: str) -> set[str]:
    """Return which of the heavy modules a fresh interpreter has after ``code``."""
    show = f"import sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    return set(json.loads(process.stdout))


LOAD = "from storage.config import load_settings; settings = load_settings()"
RESOLVE = "from storage.config import *; from storage.uri import parse_uri; "


@pytest.mark.parametrize(
    "code",
    [
        "import storage.config",
        "import storage.config; dir(storage.config)",
        "from storage.config import resolve_config, reveal; reveal('x')",
        "from storage.config import resolve_config; from storage.uri import parse_uri\n"
        "assert resolve_config(parse_uri('s3://b/k')) is None",
    ],
)
def test_nothing_heavy_is_loaded_before_a_config(code: str) -> None:
    assert loaded(code) == set()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"STORAGE_CACHE_DIR": "/c", "STORAGE_OFFLINE": "1"},
        {"STORAGE_CONFIG": "{}", "STORAGE_OVERRIDE_CONFIG": "{}"},
        {"STORAGE_EMULATOR_HOST": "h", "STORAGE_SERVICE_HOST": "h"},
    ],
)
def test_settings_without_a_file_do_not_load_pydantic_settings(variables: dict[str, str]) -> None:
    assert loaded(LOAD, **variables) == {"pydantic", "platformdirs"}


def test_settings_from_a_file_do_not_load_pydantic_settings(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('[stores.a]\nprefix = "s3://b"\n')
    assert loaded(LOAD, STORAGE_SETTINGS_FILE=str(path)) == {"pydantic", "tomllib"}


def test_settings_from_variables_load_pydantic_settings() -> None:
    assert "pydantic_settings" in loaded(
        f"{LOAD}; assert settings.transfer.connections == 3", STORAGE_TRANSFER__CONNECTIONS="3"
    )


def test_every_exported_name_is_there() -> None:
    assert sorted(storage.config.__all__) == dir(storage.config)
    for name in storage.config.__all__:
        assert getattr(storage.config, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        storage.config.nope  # noqa: B018
