"""Settings without pydantic: the same as with it, and only where there is nothing to check."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from storage.config import S3Config, Settings, TransferSettings, load_settings, named_config
from storage.config.freshness import CACHE_FIRST, REVALIDATE, read_freshness
from storage.config.plain import (
    PROFILES,
    PlainSettings,
    PlainTransfer,
    current_settings,
    read_folders,
)
from storage.errors import ConfigurationError, InvalidInput, StorageError
from storage.uri import parse_uri

MIB = 1024 * 1024
EDGE = {"connections": 4, "memory": 32 * MIB, "part_size": 4 * MIB, "limit_rate": 8 * MIB}


def as_dict(settings: Any) -> dict[str, Any]:
    """Return all fields of settings, however they were read."""
    if isinstance(settings, PlainSettings):
        return dataclasses.asdict(settings)
    return {
        name: dict(value) if isinstance(value, (dict, TransferSettings)) else value
        for name, value in ((name, getattr(settings, name)) for name in Settings.model_fields)
    }


def test_both_have_the_same_fields_and_defaults() -> None:
    assert as_dict(Settings()) == as_dict(PlainSettings())
    assert dict(TransferSettings()) == dataclasses.asdict(PlainTransfer())


def test_profiles_name_fields_that_there_are() -> None:
    for name, defaults in PROFILES.items():
        assert Settings(profile=name).profile == name
        assert set(defaults) <= set(Settings.model_fields)
        assert set(defaults["transfer"]) <= set(TransferSettings.model_fields)


PLAIN = [
    {},
    {"STORAGE_CACHE_DIR": "sub/../cache"},
    {"STORAGE_CACHE_DIR": "~/cache\n"},
    {"STORAGE_CACHE_BUDGET": "20GiB"},
    {"STORAGE_CACHE_BUDGET": "1.5 mb"},
    {"STORAGE_CACHE_GRACE": "0"},
    {"STORAGE_CACHE_GRACE": "90.5"},
    {"STORAGE_CACHE_LOCK_TIMEOUT": "5"},
    {"STORAGE_CACHE_LOWER": f"/a{os.pathsep}~/b{os.pathsep}"},
    {"STORAGE_CACHE_LOWER": '["/with:colon", "relative"]'},
    {"STORAGE_CACHE_LOWER": ""},
    {"STORAGE_FRESHNESS": "cache-first"},
    {"STORAGE_FRESHNESS": "Max-Age=3600"},
    {"STORAGE_FRESHNESS": "60"},
    {"STORAGE_OFFLINE": "1"},
    {"STORAGE_OFFLINE": " Auto "},
    {"STORAGE_DURABLE": "yes"},
    {"STORAGE_DURABLE": "False"},
    {"STORAGE_DIGEST_ALGORITHM": "sha256"},
    {"STORAGE_PROFILE": "edge"},
    {"STORAGE_PROFILE": "edge", "STORAGE_DURABLE": "0"},
    {"STORAGE_PROFILE": "", "STORAGE_OFFLINE": "", "STORAGE_CACHE_DIR": ""},
    {"STORAGE_EMULATOR_HOST": "h", "STORAGE_CONFIG": "{}", "STORAGE_DURABLE__X": "1"},
]


@pytest.mark.parametrize("variables", PLAIN, ids=str)
def test_variables_of_single_fields_mean_the_same_in_both_ways(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = current_settings()
    assert isinstance(settings, PlainSettings)
    assert as_dict(settings) == as_dict(load_settings())
    # The same by way of pydantic-settings, which a nested variable brings in.
    attempts = str(PlainTransfer.attempts)
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", attempts)
    nested = current_settings()
    assert isinstance(nested, Settings)
    assert as_dict(nested) == as_dict(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORAGE_TRANSFER__CONNECTIONS", "8"),
        ("STORAGE_TRANSFER", '{"connections": 8}'),
        ("STORAGE_STORES__A__TYPE", "s3"),
        ("storage_durable", "1"),
        ("STORAGE_CACHE_GRACE", "1e3"),
    ],
)
def test_what_is_not_plain_is_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert isinstance(current_settings(), Settings)
    assert current_settings() == load_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CACHE_BUDGET", "0", "cache_budget: .*greater than 0"),
        ("CACHE_BUDGET", "much", "cache_budget: a number of bytes is needed"),
        ("CACHE_GRACE", "-1", "cache_grace: .*greater than or equal to 0"),
        ("CACHE_GRACE", "nan", "cache_grace: .*finite"),
        ("CACHE_LOCK_TIMEOUT", "0", "cache_lock_timeout: .*greater than 0"),
        ("CACHE_LOCK_TIMEOUT", "inf", "cache_lock_timeout: .*finite"),
        ("CACHE_LOWER", "[", "cache_lower: paths of folders are needed"),
        ("CACHE_LOWER", "[1]", "cache_lower: paths of folders are needed"),
        ("FRESHNESS", "sometimes", "freshness: freshness is revalidate, cache-first, max-age="),
        ("FRESHNESS", "max-age=", "freshness: freshness is .*, not 'max-age='"),
        ("OFFLINE", "perhaps", "offline: true, false or auto"),
        ("DURABLE", "perhaps", "durable: .*boolean"),
        ("DURABLE", " yes ", "durable: .*boolean"),
        ("DIGEST_ALGORITHM", "md5", "digest_algorithm: .*'blake3' or 'sha256'"),
        ("PROFILE", "tiny", "profile: .*'edge'"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"STORAGE_{name}", value)
    with pytest.raises(ConfigurationError, match=f"^STORAGE_{name}: {message}") as caught:
        current_settings()
    assert "\n" not in str(caught.value)


def test_a_file_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert isinstance(current_settings(), PlainSettings)
    (tmp_path / "modelstorage").mkdir()
    (tmp_path / "modelstorage" / "config.toml").write_text(
        f"""
        cache_dir = "{tmp_path}/cache"
        cache_budget = "2GB"
        cache_grace = 60
        cache_lower = ["/opt/models", "~/shared"]
        cache_lock_timeout = 10
        freshness = "max-age=3600"
        profile = "edge"

        [transfer]
        connections = 2
        """
    )
    monkeypatch.delenv("STORAGE_CACHE_DIR")
    settings = current_settings()
    assert settings == Settings(
        cache_dir=tmp_path / "cache",
        cache_budget=2 * 10**9,
        cache_grace=60.0,
        cache_lower=(Path("/opt/models"), Path.home() / "shared"),
        cache_lock_timeout=10.0,
        freshness=3600.0,
        profile="edge",
        durable=True,
        transfer=TransferSettings(**{**EDGE, "connections": 2}),
    )


def test_a_named_file_that_is_absent_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(tmp_path / "absent.toml"))
    with pytest.raises(ConfigurationError, match=r"^STORAGE_SETTINGS_FILE: .*absent\.toml"):
        current_settings()


def test_plain_settings_serve_where_settings_do() -> None:
    settings = PlainSettings()
    assert settings.store_for(parse_uri("s3://bucket/key")) is None
    with pytest.raises(ConfigurationError, match="no config named 'team'"):
        named_config("team", settings)
    with pytest.raises(AttributeError):
        settings.durable = True  # type: ignore[misc]


# -- profiles --------------------------------------------------------------------------------


def test_the_edge_profile_bounds_a_small_machine() -> None:
    settings = Settings(profile="edge")
    assert settings.durable is True
    assert settings.transfer == TransferSettings(**EDGE)


@pytest.mark.parametrize(
    ("transfer", "changed"),
    [
        ({"connections": 16}, {"connections": 16}),
        ({"memory": "64MiB", "attempts": 2}, {"memory": 64 * MIB, "attempts": 2}),
        ({"connections": None, "memory": ""}, {}),
        (
            TransferSettings(connections=16, stall_timeout=5),
            {"connections": 16, "stall_timeout": 5},
        ),
        (TransferSettings(), {}),
    ],
    ids=str,
)
def test_what_is_given_goes_before_the_profile(transfer: Any, changed: dict[str, Any]) -> None:
    settings = Settings(profile="edge", transfer=transfer, durable=False)
    assert settings.durable is False
    assert settings.transfer == TransferSettings(**{**EDGE, **changed})


def test_variables_and_arguments_go_before_the_profile_of_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "s.toml"
    path.write_text('profile = "edge"\n[transfer]\nmemory = "48MiB"\n')
    monkeypatch.setenv("STORAGE_TRANSFER__CONNECTIONS", "3")
    settings = load_settings(path, transfer={"limit_rate": "1MiB"})
    assert settings.transfer == TransferSettings(
        connections=3, memory=48 * MIB, part_size=4 * MIB, limit_rate=MIB
    )


def test_a_bad_field_is_named_under_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('profile = "edge"\n[transfer]\nconnections = 0\n')
    with pytest.raises(ConfigurationError, match=rf"^{path}: transfer.connections: "):
        load_settings(path)


# -- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("/a", ["/a"]),
        (f"/a{os.pathsep}/b/../c", ["/a", "/c"]),
        (os.pathsep, []),
        (json.dumps(["/a:b", "/c"]), ["/a:b", "/c"]),
        ("[]", []),
        (["/a", Path("/b")], ["/a", "/b"]),
        (Path("/a:b"), ["/a:b"]),
        ((), []),
    ],
    ids=str,
)
def test_folders(value: Any, paths: list[str]) -> None:
    assert read_folders(value) == tuple(map(Path, paths))
    assert Settings(cache_lower=value).cache_lower == tuple(map(Path, paths))


@pytest.mark.parametrize("value", [3, [3], {"a": "/b"}, "[", '["/a", 1]', b"/a"], ids=str)
def test_what_is_no_list_of_folders(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^Settings: cache_lower: paths of folders"):
        Settings(cache_lower=value)


# -- freshness -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("revalidate", REVALIDATE),
        (" Revalidate ", 0.0),
        ("cache-first", CACHE_FIRST),
        ("max-age=3600", 3600.0),
        ("max-age = 0.5", 0.5),
        ("60", 60.0),
        (60, 60.0),
        (0, REVALIDATE),
        (1.5, 1.5),
        (math.inf, CACHE_FIRST),
    ],
)
def test_freshness(value: Any, seconds: float) -> None:
    found = read_freshness(value)
    assert found == seconds
    assert type(found) is float
    assert read_freshness(found) == found
    assert Settings(freshness=value).freshness == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "max-age",
        "max-age=-1",
        "max-age=x",
        "-1",
        "inf",
        "nan",
        "1h",
        "60\n61",
        "cache_first",
        -1,
        -0.1,
        math.nan,
        True,
        None,
        [],
        b"60",
    ],
    ids=str,
)
def test_what_is_no_freshness(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^freshness is revalidate, cache-first, ") as caught:
        read_freshness(value)
    assert isinstance(caught.value, StorageError)
    assert "\n" not in str(caught.value)


def test_a_config_is_found_with_plain_settings() -> None:
    from storage.config import resolve_config

    location = parse_uri("s3://bucket/key")
    assert resolve_config(location, None, PlainSettings()) is None
    assert resolve_config(location, {"profile": "p"}, PlainSettings()) == S3Config(profile="p")
