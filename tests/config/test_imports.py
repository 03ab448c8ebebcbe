"""What is loaded when, and that the package exports what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import storage.config

ROOT = Path(storage.config.__file__).parents[2]
HEAVY = ("pydantic", "pydantic_settings", "platformdirs", "tomllib")
# What a process that finds its model in the cache has no use for.
ONLINE = ("asyncio", "concurrent.futures", "ctypes", "filelock", "pydantic")


def loaded(code: str, modules: Sequence[str] = HEAVY, **variables: str) -> set[str]:
    """Return which of ``modules`` a fresh interpreter has after ``code``."""
    show = f"import sys, json; print(json.dumps([m for m in {modules!r} if m in sys.modules]))"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    return set(json.loads(process.stdout))


LOAD = "from storage.config import load_settings; settings = load_settings()"
CURRENT = "from storage.config.plain import current_settings; settings = current_settings()"
RESOLVE = "from storage.config import *; from storage.uri import parse_uri; "


@pytest.mark.parametrize(
    "code",
    [
        "import storage.config",
        "import storage.config; dir(storage.config)",
        "from storage.config import resolve_config, reveal; reveal('x')",
        "from storage.config import resolve_config; from storage.uri import parse_uri\n"
        "assert resolve_config(parse_uri('s3://b/k')) is None",
        "from storage.config.freshness import read_freshness; read_freshness('max-age=60')",
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


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {
            "STORAGE_CACHE_BUDGET": "20GiB",
            "STORAGE_CACHE_DIR": "/c",
            "STORAGE_CACHE_GRACE": "60",
            "STORAGE_CACHE_LOCK_TIMEOUT": "60",
            "STORAGE_CACHE_LOWER": "/a:/b",
            "STORAGE_DIGEST_ALGORITHM": "blake3",
            "STORAGE_DURABLE": "1",
            "STORAGE_FRESHNESS": "cache-first",
            "STORAGE_OFFLINE": "1",
            "STORAGE_PROFILE": "edge",
        },
    ],
    ids=["none", "all"],
)
def test_variables_of_single_fields_need_no_pydantic(variables: dict[str, str]) -> None:
    assert "pydantic" not in loaded(CURRENT, **variables)


def test_a_client_loads_nothing_that_only_transfers_need() -> None:
    code = "from storage import StorageClient; client = StorageClient(); client.settings"
    assert loaded(code, ONLINE) == set()


def test_the_command_loads_nothing_that_only_transfers_need() -> None:
    code = (
        "from storage.cli import main\n"
        "assert main(['download', '--offline', '--quiet', 's3://bucket/never-cached']) == 1"
    )
    assert loaded(code, ONLINE) == set()


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
