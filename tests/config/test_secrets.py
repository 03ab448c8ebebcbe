"""A secret is never shown: not by a config, not by an error about one, not by the settings."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.config import (
    AzureConfig,
    ConfigModel,
    FsspecConfig,
    GCSConfig,
    HFConfig,
    HTTPConfig,
    S3Config,
    Settings,
    kserve_config,
    load_settings,
    named_config,
    resolve_config,
)
from storage.errors import ConfigurationError
from storage.uri import parse_uri

CANARY = "c4nary-Zm9vYmFy"
KEY = json.dumps({"type": "service_account", "private_key": CANARY})


def with_stores(stores: Any) -> Settings:
    """Return settings with these tables as entries of ``[stores]``."""
    return Settings(stores=stores)


CONFIGS: list[Callable[[], ConfigModel]] = [
    lambda: S3Config("AK", CANARY, session_token=CANARY, proxy=f"http://u:{CANARY}@p:1"),
    lambda: GCSConfig(KEY, token=CANARY, proxy=f"http://u:{CANARY}@p:1"),
    lambda: AzureConfig("a", CANARY, CANARY, f"AccountName=a;AccountKey={CANARY}"),
    lambda: AzureConfig("a", client_secret=CANARY, token=CANARY),
    lambda: HFConfig(CANARY),
    lambda: HTTPConfig({"Authorization": CANARY}, username="u", password=CANARY),
    lambda: HTTPConfig(token=CANARY),
    lambda: FsspecConfig({"password": CANARY, "kwargs": {"token": [CANARY]}}),
]


@pytest.mark.parametrize("make", CONFIGS)
def test_a_config_does_not_show_its_secrets(
    make: Callable[[], ConfigModel], caplog: pytest.LogCaptureFixture
) -> None:
    config = make()
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("%s %r", config, config)
    shown = [
        repr(config),
        str(config),
        f"{config:}",
        f"{config!a}",
        str(config.model_dump()),
        str(config.model_dump(mode="json")),
        config.model_dump_json(),
        config.model_dump_json(indent=1),
        str(dict(config)),
        str(list(config)),
        repr([config]),
        repr(vars(config)),
        repr(config.__rich_repr__()),
        repr(list(config.__repr_args__())),
        caplog.text,
    ]
    assert [text for text in shown if CANARY in text] == []


@pytest.mark.parametrize("make", CONFIGS)
def test_a_secret_survives_pickling(make: Callable[[], ConfigModel]) -> None:
    config = make()
    data = pickle.dumps(config)
    # A process that takes the config over needs the secret; hence a pickle is one.
    assert CANARY.encode() in data
    assert pickle.loads(data) == config
    assert CANARY not in repr(pickle.loads(data))


BAD: list[Callable[[], Any]] = [
    lambda: S3Config("AK", CANARY, use_ssl="no idea"),
    lambda: S3Config(None, CANARY),
    lambda: S3Config(use_ssl=CANARY),
    lambda: S3Config("AK", [CANARY]),
    lambda: S3Config("AK", CANARY, nope=CANARY),
    lambda: S3Config(endpoint_url=f"http://u:{CANARY}@host"),
    lambda: S3Config(endpoint_url=f"http://host/?sig={CANARY}"),
    lambda: S3Config(endpoint_url=f"http://[{CANARY}"),
    lambda: S3Config(proxy=f"{CANARY}://"),
    lambda: S3Config(proxy=f"http://[{CANARY}"),
    lambda: S3Config(driver=CANARY),
    lambda: S3Config(copy_part_limit=CANARY),
    lambda: S3Config.model_validate({"secret_access_key": CANARY, "nope": CANARY}),
    lambda: GCSConfig("{" + CANARY),
    lambda: GCSConfig(json.dumps({"private_key": CANARY})),
    lambda: AzureConfig("a", {"k": CANARY}),
    lambda: HTTPConfig({"A": f"{CANARY}\nB: c"}),
    lambda: HTTPConfig({"A": [CANARY]}),
    lambda: HTTPConfig(password=CANARY),
    lambda: FsspecConfig(CANARY),
    lambda: FsspecConfig([("password", CANARY)]),
    lambda: with_stores({"a": {"prefix": "s3://b", "secret_access_key": CANARY}}),
    lambda: with_stores({"a": {"prefix": f"https://u:{CANARY}@host/"}}),
    lambda: with_stores({"a": {"prefix": f"https://host/?sig={CANARY}"}}),
    lambda: resolve_config(parse_uri("s3://b/k"), {"secret_access_key": CANARY, "x": CANARY}),
    lambda: resolve_config(parse_uri("s3://b/k"), HFConfig(CANARY)),
    lambda: resolve_config(parse_uri("file:///x"), {"token": CANARY}),
    lambda: resolve_config(parse_uri(f"https://h/x?sig={CANARY}"), S3Config()),
]


@pytest.mark.parametrize("make", BAD)
def test_an_error_does_not_show_secrets(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert_clean(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f'{{"type": "s3", "secret_access_key": "{CANARY}"',
        f'["{CANARY}"]',
        f'"{CANARY}"',
        f'{{"type": "s3", "secret_access_key": "{CANARY}"}}',
        f'{{"type": "s3", "use_ssl": "{CANARY}"}}',
        f'{{"type": "gs", "service_account_key": "{{{CANARY}"}}',
    ],
)
def test_storage_config_does_not_show_secrets(text: str) -> None:
    uri = "gs://b/k" if '"gs"' in text else "s3://b/k"
    for environ in ({"STORAGE_CONFIG": text}, {"STORAGE_OVERRIDE_CONFIG": text}):
        with pytest.raises(ConfigurationError) as caught:
            kserve_config(parse_uri(uri), environ)
        assert_clean(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f'[stores.a]\nprefix = "s3://b/"\nsecret_access_key = "{CANARY}',
        f'[stores.a]\nprefix = "s3://b/"\nsecret_access_key = "{CANARY}"\n',
        f'[stores.a]\nprefix = "s3://b/"\nsecret = "{CANARY}"\n',
        f'[stores.a]\nprefix = "s3://b/"\nuse_ssl = "{CANARY}"\n',
        f'[stores.a]\nprefix = 3\nsecret_access_key = "{CANARY}"\n',
        f'stores = "{CANARY}"\n',
        f'offline = "{CANARY}"\n',
        f'[transfer]\nmemory = "{CANARY}"\n',
    ],
)
def test_a_settings_file_does_not_show_secrets(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)
    assert_clean(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        named_config(str(path))
    assert_clean(caught.value)


def test_a_settings_file_of_bytes_does_not_show_secrets(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'secret = "' + CANARY.encode() + b'\xff"')
    with pytest.raises(ConfigurationError, match="not UTF-8") as caught:
        load_settings(path)
    assert_clean(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STORAGE_STORES", f'{{"a": {{"secret_access_key": "{CANARY}"}}'),
        ("STORAGE_STORES", CANARY),
        ("STORAGE_STORES__A__SECRET_ACCESS_KEY", CANARY),
        ("STORAGE_TRANSFER", f"{{{CANARY}"),
        ("STORAGE_OFFLINE", CANARY),
        ("STORAGE_DURABLE", CANARY),
        ("STORAGE_TRANSFER__CONNECTIONS", CANARY),
    ],
)
def test_a_variable_does_not_show_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="STORAGE_") as caught:
        load_settings()
    assert_clean(caught.value)


def test_settings_do_not_show_the_secrets_of_their_stores() -> None:
    settings = Settings(
        stores={
            "a": {"prefix": "s3://b", "access_key_id": "AK", "secret_access_key": CANARY},
            "b": {"prefix": "sftp://h/", "password": CANARY},
        }
    )
    assert "AK" in repr(settings)
    for text in (
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        str(settings.model_dump()),
    ):
        assert CANARY not in text


def assert_clean(error: BaseException) -> None:
    """Look for the canary wherever a program that reports the error might."""
    assert "\n" not in str(error)
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    for one in seen:
        shown = [str(one), repr(one), repr(one.args), repr(vars(one))]
        # pydantic's own error and the parsers' hold the input in places like these.
        shown += [repr(getattr(one, name, "")) for name in ("doc", "object")]
        errors = getattr(one, "errors", None)
        shown.append(repr(errors()) if callable(errors) else "")
        assert [text for text in shown if CANARY in text] == []
    lines = "".join(traceback.TracebackException.from_exception(error).format_exception_only())
    assert CANARY not in lines
