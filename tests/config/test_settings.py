"""Settings from variables, from a TOML file, and by default; named configs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from storage.config import (
    FsspecConfig,
    S3Config,
    Settings,
    TransferSettings,
    load_settings,
    named_config,
    reveal,
)
from storage.errors import ConfigurationError

MIB = 1024 * 1024


def with_stores(stores: Any) -> Settings:
    """Return settings with these tables as entries of ``[stores]``."""
    return Settings(stores=stores)


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file that is in force."""
    path = tmp_path / "settings.toml"
    path.touch()
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(path))
    return path


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_CACHE_DIR")
    settings = load_settings()
    assert settings.cache_dir == Path.home() / ".cache" / "modelstorage"
    assert settings.offline is False
    assert settings.durable is False
    assert settings.digest_algorithm == "blake3"
    assert settings.stores == {}
    assert settings.transfer == TransferSettings(
        connections=16,
        memory=128 * MIB,
        part_size=32 * MIB,
        attempts=5,
        retry_timeout=300,
        connect_timeout=10,
        stall_timeout=30,
        limit_rate=None,
    )


def test_settings_cannot_be_changed_and_serve_as_a_key() -> None:
    settings = with_stores({"a": {"prefix": "s3://b"}})
    with pytest.raises(ValueError, match="frozen"):
        settings.durable = True
    with pytest.raises(TypeError, match="cannot be changed"):
        settings.stores.clear()
    assert len({settings, settings.model_copy(), Settings()}) == 2


def test_the_cache_dir_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STORAGE_CACHE_DIR", "sub/../cache")
    assert load_settings().cache_dir == tmp_path / "cache"
    monkeypatch.setenv("STORAGE_CACHE_DIR", "~/cache")
    assert load_settings().cache_dir == Path.home() / "cache"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("on", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("off", False),
        ("", False),
        ("auto", "auto"),
        (" Auto ", "auto"),
    ],
)
def test_offline_from_its_variable(monkeypatch: pytest.MonkeyPatch, text: str, value: Any) -> None:
    monkeypatch.setenv("STORAGE_OFFLINE", text)
    assert load_settings().offline is value or load_settings().offline == value == "auto"
    # The same by way of pydantic-settings, which the second variable brings in.
    monkeypatch.setenv("STORAGE_DURABLE", "1")
    assert load_settings().offline == value


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("STORAGE_DURABLE", "yes", "durable", True),
        ("STORAGE_DIGEST_ALGORITHM", "sha256", "digest_algorithm", "sha256"),
        ("STORAGE_TRANSFER__CONNECTIONS", "8", "connections", 8),
        ("STORAGE_TRANSFER__MEMORY", "256MiB", "memory", 256 * MIB),
        ("STORAGE_TRANSFER__PART_SIZE", "8388608", "part_size", 8 * MIB),
        ("STORAGE_TRANSFER__ATTEMPTS", "1", "attempts", 1),
        ("STORAGE_TRANSFER__RETRY_TIMEOUT", "60", "retry_timeout", 60.0),
        ("STORAGE_TRANSFER__CONNECT_TIMEOUT", "2.5", "connect_timeout", 2.5),
        ("STORAGE_TRANSFER__STALL_TIMEOUT", "5", "stall_timeout", 5.0),
        ("STORAGE_TRANSFER__LIMIT_RATE", "10MB", "limit_rate", 10_000_000),
        ("STORAGE_TRANSFER__LIMIT_RATE", "", "limit_rate", None),
        ("STORAGE_TRANSFER", '{"connections": 4}', "connections", 4),
        ("storage_transfer__connections", "8", "connections", 8),
    ],
)
def test_each_field_has_a_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, field: str, value: Any
) -> None:
    monkeypatch.setenv(name, text)
    settings = load_settings()
    owner = settings if field in Settings.model_fields else settings.transfer
    assert getattr(owner, field) == value


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (1, 1),
        ("1", 1),
        ("128MiB", 128 * MIB),
        ("128 mib", 128 * MIB),
        ("1.5GiB", 3 * 512 * MIB),
        ("1KB", 1000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_sizes(given: Any, size: int) -> None:
    assert TransferSettings(memory=given).memory == size


@pytest.mark.parametrize("given", ["", "12M", "MiB", "-1", "1 parsec", "1e6", "0", 0, -5, "0.2B"])
def test_bad_sizes(given: Any) -> None:
    if given == "":
        assert TransferSettings(memory=given) == TransferSettings()
        return
    with pytest.raises(ConfigurationError, match=r"^TransferSettings: memory: "):
        TransferSettings(memory=given)


def test_a_store_from_variables_keeps_texts_that_look_like_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = "STORAGE_STORES__TEAM__"
    monkeypatch.setenv(f"{prefix}PREFIX", "s3://team-a/")
    monkeypatch.setenv(f"{prefix}ACCESS_KEY_ID", "true")
    monkeypatch.setenv(f"{prefix}SECRET_ACCESS_KEY", "0012345678901234567890.10")
    monkeypatch.setenv(f"{prefix}USE_SSL", "false")
    config = load_settings().stores["team"].config
    assert config == S3Config("true", "0012345678901234567890.10", use_ssl=False)


def test_a_service_account_in_a_variable_stays_json(monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"type": "service_account", "private_key": "k"}
    monkeypatch.setenv("STORAGE_STORES__G__PREFIX", "gs://b")
    monkeypatch.setenv("STORAGE_STORES__G__SERVICE_ACCOUNT_KEY", json.dumps(key))
    config: Any = load_settings().stores["g"].config
    assert json.loads(config.service_account_json) == key


def test_variables_of_other_programs_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "STORAGE_EMULATOR_HOST",  # Google's clients
        "STORAGE_PORT_80_TCP",  # Kubernetes, for a service named storage
        "STORAGE_SERVICE_HOST",
        "STORAGE_TRANSFER_SERVICE_HOST",
        "STORAGE_CONFIG",  # KServe
        "STORAGE_OVERRIDE_CONFIG",
        "STORAGE_DURABLE__X",
    ):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    monkeypatch.delenv("STORAGE_CACHE_DIR")
    assert load_settings() == Settings()


def test_a_file_gives_every_field(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_CACHE_DIR")
    toml.write_text(
        """
        cache_dir = "/var/cache/models"
        offline = "auto"
        durable = true
        digest_algorithm = "sha256"

        [transfer]
        connections = 32
        memory = "256MiB"

        [stores.team]
        prefix = "s3://team-a/"
        access_key_id = "AK"
        secret_access_key = "SK"

        [stores.lab]
        type = "sftp"
        username = "u"
        """
    )
    settings = load_settings()
    assert settings.cache_dir == Path("/var/cache/models")
    assert (settings.offline, settings.durable) == ("auto", True)
    assert settings.digest_algorithm == "sha256"
    assert settings.transfer == TransferSettings(connections=32, memory=256 * MIB)
    assert settings.stores["team"].config == S3Config("AK", "SK")
    assert settings.stores["team"].prefix == "s3://team-a/"
    assert settings.stores["lab"].config == FsspecConfig({"username": "u"})


def test_the_order_is_argument_then_variable_then_file_then_default(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text(
        "durable = true\n[transfer]\nconnections = 2\nattempts = 2\npart_size = 1024\n"
        '[stores.a]\nprefix = "s3://a"\nregion = "file"\nprofile = "file"\n'
    )
    monkeypatch.setenv("STORAGE_TRANSFER__CONNECTIONS", "3")
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "3")
    monkeypatch.setenv("STORAGE_STORES__A__REGION", "variable")
    settings = load_settings(transfer={"connections": 4}, offline=None)
    assert settings.durable is True
    transfer = settings.transfer
    assert (transfer.connections, transfer.attempts, transfer.part_size) == (4, 3, 1024)
    assert transfer.stall_timeout == 30
    assert settings.stores["a"].config == S3Config(region="variable", profile="file")


def test_an_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_OFFLINE", "1")
    assert load_settings().offline is True
    assert load_settings(offline=False).offline is False
    assert load_settings(offline=None).offline is True


def test_the_file_in_the_user_s_folder_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_settings().durable is False
    (tmp_path / "modelstorage").mkdir()
    (tmp_path / "modelstorage" / "config.toml").write_text("durable = true\n")
    assert load_settings().durable is True


def test_an_empty_variable_names_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", "")
    assert load_settings().durable is False


def test_a_named_file_that_is_absent_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigurationError, match=r"absent\.toml cannot be read: No such file"):
        load_settings(path)
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(path))
    with pytest.raises(ConfigurationError, match=r"^STORAGE_SETTINGS_FILE: .*absent\.toml"):
        load_settings()


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = \n", r"is not TOML of one table \(line 1, column 5\)"),
        ("durable = 3\n", "durable: input should be a valid boolean"),
        ("durabel = true\n", r"durabel: there is no such field; did you mean durable\?"),
        ("transfer = 3\n", r"transfer: .*\(found: int\)"),
        ("[transfer]\nconnections = 0\n", "transfer.connections: .* greater than or equal to 1"),
        ("[transfer]\nconections = 1\n", r"transfer.conections: .* mean connections\?"),
        ('digest_algorithm = "md5"\n', "digest_algorithm: input should be 'blake3' or 'sha256'"),
        ('offline = "perhaps"\n', "offline: true, false or auto is needed"),
        ("cache_dir = 3\n", "cache_dir: .*path"),
        ("stores = 3\n", r"stores: .*\(found: int\)"),
        ("stores.a = 3\n", r"stores.a: .*\(found: int\)"),
        ("[stores.a]\nregion = 'r'\n", "stores.a: a prefix .* or a type is needed"),
        ("[stores.a]\nprefix = 3\n", "stores.a: prefix: a text is needed"),
        ("[stores.a]\nprefix = 's3:/b'\n", "stores.a: prefix: 's3:/b' is not the beginning"),
        ("[stores.a]\nprefix = '/data'\n", "stores.a: prefix: '/data' is not the beginning"),
        ("[stores.a]\nprefix = 'file:///d'\n", "stores.a: prefix: .* local path"),
        ("[stores.a]\nprefix = 'memory://d'\n", "stores.a: .*memory URIs take no config"),
        ("[stores.a]\nprefix = 'https://u@h/'\n", "stores.a: prefix: .* holds a user"),
        ("[stores.a]\nprefix = 'sftp://u:p@h/'\n", "stores.a: prefix: .* holds a user"),
        ("[stores.a]\nprefix = 's3://b'\ntype = 'gs'\n", "stores.a: type is gs, but the prefix"),
        ("[stores.a]\nprefix = 's3://b'\ntype = 'fsspec'\n", "stores.a: type is fsspec, but"),
        ("[stores.a]\ntype = 'no scheme'\n", "stores.a: type: 'no scheme' is none; expected s3"),
        ("[stores.a]\nprefix = 's3://b'\nregoin = 'r'\n", r"stores.a.regoin: .* mean region\?"),
        ("[stores.a]\nprefix = 's3://b'\nuse_ssl = 'x'\n", "stores.a.use_ssl: .*boolean"),
        ("[stores.a]\nprefix = 's3://b'\naccess_key_id = 'x'\n", "stores.a: access_key_id is"),
        (
            "[stores.a]\nprefix = 'gs://b/'\n[stores.b]\nprefix = 'gcs://b'\n",
            "stores: a and b have the same prefix",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_field(
    monkeypatch: pytest.MonkeyPatch, toml: Path, text: str, message: str
) -> None:
    monkeypatch.delenv("STORAGE_CACHE_DIR")
    toml.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_settings()
    assert str(toml) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("STORAGE_OFFLINE", "perhaps", "STORAGE_OFFLINE: offline: true, false or auto"),
        ("STORAGE_DURABLE", "perhaps", "STORAGE_DURABLE: durable: .*boolean"),
        ("STORAGE_TRANSFER", "{", "STORAGE_TRANSFER: a JSON object is needed"),
        ("STORAGE_TRANSFER", "7", "STORAGE_TRANSFER: transfer: "),
        ("STORAGE_TRANSFER", '{"attempts": 0}', "STORAGE_TRANSFER: transfer.attempts: "),
        ("STORAGE_TRANSFER__ATTEMPTS", "0", "STORAGE_TRANSFER__ATTEMPTS: transfer.attempts: "),
        ("storage_transfer__attempts", "0", "storage_transfer__attempts: transfer.attempts: "),
        ("STORAGE_TRANSFER__ATEMPTS", "1", "STORAGE_TRANSFER__ATEMPTS: .* mean attempts"),
        ("STORAGE_STORES", "[]", "STORAGE_STORES: stores: "),
        ("STORAGE_STORES__A__USE_SSL", "x", "STORAGE_STORES.*: stores.a: a prefix"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, toml: Path, name: str, text: str, message: str
) -> None:
    toml.write_text("[transfer]\nconnections = 2\n")
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError, match=f"^{message}") as caught:
        load_settings()
    assert "\n" not in str(caught.value)


def test_the_file_is_named_when_another_variable_is_set(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text("[transfer]\nattempts = 0\n")
    monkeypatch.setenv("STORAGE_TRANSFER__CONNECTIONS", "3")
    with pytest.raises(ConfigurationError, match=rf"^{toml}: transfer.attempts"):
        load_settings()


def test_a_bad_argument_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^argument: offline: "):
        load_settings(offline="perhaps")
    with pytest.raises(ConfigurationError, match=r"^argument: nope: there is no such field"):
        load_settings(nope=1)


def test_loading_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch, toml: Path) -> None:
    toml.write_text('[stores.a]\nprefix = "s3://b"\n')
    monkeypatch.setenv("STORAGE_TRANSFER__CONNECTIONS", "3")
    before = dict(os.environ)
    load_settings()
    assert dict(os.environ) == before


SETTINGS = Settings(
    stores={
        "team": {"prefix": "s3://a", "region": "r"},
        "spare": {"type": "s3", "profile": "p"},
    }
)


def test_a_config_by_name() -> None:
    assert named_config("team", SETTINGS) == S3Config(region="r")
    assert named_config("spare", SETTINGS) == S3Config(profile="p")


def test_a_config_by_name_from_the_settings_in_force(toml: Path) -> None:
    toml.write_text('[stores.team]\ntype = "s3"\nprofile = "q"\n')
    assert named_config("team") == S3Config(profile="q")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'type = "s3"\naccess_key_id = "AK"\nsecret_access_key = "SK"\n'),
        ("c", 'prefix = "s3://any/"\naccess_key_id = "AK"\nsecret_access_key = "SK"\n'),
        ("c.json", '{"type": "s3", "access_key_id": "AK", "secret_access_key": "SK"}'),
    ],
)
def test_a_config_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    assert named_config(str(tmp_path / name), SETTINGS) == S3Config("AK", "SK")
    monkeypatch.chdir(tmp_path)
    assert named_config(name, SETTINGS) == S3Config("AK", "SK")


def test_a_generic_config_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('type = "fsspec"\nhost = "h"\nport = 22\n')
    config: Any = named_config(str(path), SETTINGS)
    assert reveal(config.options) == {"host": "h", "port": 22}


def test_a_name_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "team").write_text('type = "gs"\n')
    assert named_config("team", SETTINGS) == S3Config(region="r")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"no config named 'taem'.*\(there are: spare, t"):
        named_config("taem", SETTINGS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "{", r"c\.json is not JSON of one table \(line 1, column 2\)"),
        ("c.json", "[1]", r"c\.json is not JSON of one table"),
        ("c.toml", "x", r"c\.toml is not TOML of one table"),
        ("c.toml", "", r"c\.toml: a prefix such as .* or a type is needed"),
        ("c.toml", 'type = "s3"\nnope = 1', r"c\.toml: nope: there is no such field"),
        ("absent.toml", None, r"absent\.toml cannot be read: No such file"),
    ],
)
def test_a_bad_config_file(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        named_config(str(tmp_path / name), SETTINGS)
