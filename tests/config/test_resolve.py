"""Which config applies to a URI."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from storage.config import (
    AzureConfig,
    ConfigModel,
    FsspecConfig,
    GCSConfig,
    HFConfig,
    HTTPConfig,
    PVCConfig,
    S3Config,
    Settings,
    make_config,
    resolve_config,
)
from storage.config.prefix import Prefix
from storage.errors import ConfigurationError
from storage.uri import parse_uri


def with_stores(stores: Any) -> Settings:
    """Return settings with these tables as entries of ``[stores]``."""
    return Settings(stores=stores)


def settings_for(*prefixes: str) -> Settings:
    """Return settings with an entry for each prefix, named like it."""
    return with_stores({prefix: {"prefix": prefix} for prefix in prefixes})


def entry(settings: Settings, uri: str) -> str | None:
    """Return the prefix that applies to the URI."""
    store = settings.store_for(parse_uri(uri))
    return store and store.prefix


@pytest.mark.parametrize(
    ("prefix", "uri", "matches"),
    [
        ("s3://team", "s3://team", True),
        ("s3://team", "s3://team/", True),
        ("s3://team", "s3://team/x", True),
        ("s3://team", "s3://team-b/x", False),
        ("s3://team", "s3://tea/m", False),
        ("s3://team/", "s3://team/x", True),
        ("s3://team/", "s3://team", True),
        ("s3://team/m", "s3://team/m", True),
        ("s3://team/m", "s3://team/m/", True),
        ("s3://team/m", "s3://team/m/x", True),
        ("s3://team/m", "s3://team/m?versionId=1", True),
        ("s3://team/m", "s3://team/m2", False),
        ("s3://team/m", "s3://team/m-b/x", False),
        ("s3://team/m", "s3://team", False),
        ("s3://team/m/", "s3://team/m/x", True),
        ("s3://team/m/", "s3://team/m2/x", False),
        ("s3://team/m", "s3://team//m", False),
        ("s3://team/M", "s3://team/m", False),
        ("s3://", "s3://any/x", True),
        ("s3://", "gs://any/x", False),
        ("s3://team", "gs://team/x", False),
        ("S3://team", "s3://team/x", True),
        ("gcs://b", "gs://b/x", True),
        ("gs://b", "gcs://b/x", True),
        ("az://c", "azure://c/x", True),
        ("azure://c", "abfs://c/x", True),
        ("azure://c", "https://acc.blob.core.windows.net/c/x", True),
        ("azure://c", "https://acc.blob.core.windows.net/cc/x", False),
        ("abfss://c@acc.dfs.core.windows.net/p", "https://acc.blob.core.windows.net/c/p/x", True),
        ("abfss://c@acc.dfs.core.windows.net/p", "https://ott.blob.core.windows.net/c/p/x", False),
        ("abfss://c@acc.dfs.core.windows.net/p", "azure://c/p/x", False),
        ("https://acc.blob.core.windows.net/", "https://acc.blob.core.windows.net/c/x", True),
        ("https://acc.blob.core.windows.net", "abfss://c@acc.dfs.core.windows.net/x", True),
        ("https://acc.blob.core.windows.net/", "https://b.blob.core.windows.net/c/x", False),
        ("https://acc.blob.core.windows.net/", "azure://c/x", False),
        ("https://h.example", "https://h.example/x", True),
        ("https://h.example", "https://h.example", True),
        ("https://h.example", "https://H.Example:443/x?sig=1", True),
        ("https://h.example:443/", "https://h.example/x", True),
        ("https://h.example", "https://h.example:8443/x", False),
        ("https://h.example", "http://h.example/x", False),
        ("http://h.example", "https://h.example/x", False),
        ("https://h.example", "https://h.example.evil.test/x", False),
        ("https://h.example", "https://evil.test/https://h.example/x", False),
        ("https://h.example", "https://h.example@evil.test/x", False),
        ("https://h.example/p", "https://h.example/p/x", True),
        ("https://h.example/p", "https://h.example/p?q=1", True),
        ("https://h.example/p", "https://h.example/pp", False),
        ("https://h.example/p", "https://h.example/p/../q", False),
        ("https://h.example/p", "https://h.example/p/%2e%2E/q", False),
        ("https://h.example/", "https://h.example/p/../q", True),
        ("modelscope://owner", "modelscope://owner/model:v1/weights", True),
        ("modelscope://owner/", "modelscope://owner2/model", False),
        ("modelscope://owner/model", "modelscope://owner/model/weights", True),
        ("git+https://h.example/p", "git+https://h.example/p/repository", True),
        ("git+https://h.example:443/p", "git+https://H.example/p/repository.git@main/m", True),
        ("git+https://h.example", "git+https://h.example:443/p/repository.git", True),
        ("git+https://h.example/p", "git+https://h.example/p2/repository.git", False),
        ("git+https://h.example/p", "git+https://h.example/p/../q/repository.git", False),
        ("git+https://h.example/p", "https://h.example/p/%2e%2e/q/repository.git", False),
        ("git+https://h.example", "git+https://h.example/p/../q/repository.git", True),
        ("https://", "https://any.example/x", True),
        ("https://", "http://any.example/x", False),
        ("hf://org", "hf://org/model", True),
        ("hf://org/", "hf://org/model/file", True),
        ("hf://org", "hf://org-b/model", False),
        ("hf://org", "hf://org", True),
        ("hf://org/model", "hf://org/model@v1/file", True),
        ("hf://org/model", "hf://org/model-b", False),
        ("hf://org/model@v1", "hf://org/model@v1/file", True),
        ("hf://org/model@v1", "hf://org/model@v2/file", False),
        ("hf://org/model@v1", "hf://org/model", False),
        ("hf://org", "hf://datasets/org/data", False),
        ("hf://datasets/org", "hf://datasets/org/data", True),
        ("hf://", "hf://datasets/org/data", True),
        ("pvc://claim", "pvc://claim/x", True),
        ("pvc://claim", "pvc://claim-b/x", False),
        ("sftp://host", "sftp://host/x", True),
        ("sftp://host", "sftp://u:p@host/x", True),
        ("sftp://host/a", "sftp://host/ab", False),
        ("sftp://host", "ftp://host/x", False),
    ],
)
def test_a_prefix_matches_at_path_boundaries(prefix: str, uri: str, matches: bool) -> None:
    assert entry(settings_for(prefix), uri) == (prefix if matches else None)


@pytest.mark.parametrize(
    ("prefixes", "uri", "best"),
    [
        (["s3://", "s3://a", "s3://a/b", "s3://a/b/c"], "s3://a/b/x", "s3://a/b"),
        (["s3://a/b/c", "s3://a/b", "s3://a", "s3://"], "s3://a/b/c", "s3://a/b/c"),
        (["s3://a", "s3://"], "s3://x", "s3://"),
        (["s3://a/bbbbbbbbbbbb", "s3://a/b"], "s3://a/b/c", "s3://a/b"),
        (
            ["azure://c", "abfs://c@acc.dfs.core.windows.net/"],
            "abfs://c@acc.dfs.core.windows.net/x",
            "abfs://c@acc.dfs.core.windows.net/",
        ),
        (["hf://o/m", "hf://o/m@v1"], "hf://o/m@v1/f", "hf://o/m@v1"),
        (["hf://o/m", "hf://o/m@v1"], "hf://o/m/f", "hf://o/m"),
    ],
)
def test_the_longest_prefix_applies(prefixes: list[str], uri: str, best: str) -> None:
    assert entry(settings_for(*prefixes), uri) == best
    assert entry(settings_for(*reversed(prefixes)), uri) == best


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bucket/path",
        "/local",
        "file:///local",
        "s3:///x",
        "s3://bad bucket/",
        "https://h/?query",
        "https://h/#fragment",
        "https://u:p@h/",
        "https://acc.blob.core.windows.net/c?sig=x",
        "sftp://u@h/",
        "hf://datasets/",
    ],
)
def test_what_is_no_prefix_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^prefix: .* is not the beginning of a URI"):
        Prefix.parse(text)


def test_a_store_without_a_prefix_applies_to_nothing() -> None:
    settings = with_stores({"a": {"type": "s3"}})
    assert settings.store_for(parse_uri("s3://b/k")) is None


def test_the_key_of_one_account_is_not_sent_to_another() -> None:
    ours = "https://ours.blob.core.windows.net/c/x"
    theirs = "https://theirs.blob.core.windows.net/c/x"
    for fields in (
        {"account_name": "ours", "account_key": "k"},
        {"connection_string": "AccountName=ours;AccountKey=k"},
    ):
        settings = with_stores({"a": {"prefix": "azure://", **fields}})
        assert resolve_config(parse_uri(ours), None, settings) == AzureConfig(**fields)
        assert resolve_config(parse_uri("azure://c/x"), None, settings) is not None
        assert resolve_config(parse_uri(theirs), None, settings) is None
        with pytest.raises(ConfigurationError, match=r"account 'theirs', .* is for 'ours'"):
            resolve_config(parse_uri(theirs), fields)
        assert resolve_config(parse_uri(ours), fields) == AzureConfig(**fields)


def test_the_order_is_call_then_prefix_then_storage_config_then_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    location = parse_uri("s3://bucket/key")
    settings = with_stores({"a": {"prefix": "s3://bucket", "profile": "prefix"}})
    call = S3Config(profile="call")
    assert resolve_config(location) is None
    assert resolve_config(location, None, Settings()) is None
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps({"type": "s3", "profile": "kserve"}))
    assert resolve_config(location) == S3Config(profile="kserve")
    assert resolve_config(location, None, Settings()) == S3Config(profile="kserve")
    assert resolve_config(location, None, settings) == S3Config(profile="prefix")
    assert resolve_config(location, call, settings) is call
    assert resolve_config(parse_uri("s3://other/key"), None, settings) == S3Config(profile="kserve")
    assert resolve_config(parse_uri("gs://bucket/key"), None, settings) is None


BY_TYPE: list[tuple[str, ConfigModel]] = [
    ("s3://b/k", S3Config()),
    ("gs://b/k", GCSConfig()),
    ("azure://b/k", AzureConfig()),
    ("hf://o/m", HFConfig()),
    ("https://h/k", HTTPConfig()),
    ("http://h/k", HTTPConfig()),
    ("pvc://c/k", PVCConfig()),
    ("sftp://h/k", FsspecConfig()),
]


@pytest.mark.parametrize(("uri", "right"), BY_TYPE)
def test_a_config_of_the_wrong_type_names_both(uri: str, right: ConfigModel) -> None:
    location = parse_uri(uri)
    assert resolve_config(location, right) is right
    for _, other in BY_TYPE:
        if type(other) is type(right):
            continue
        with pytest.raises(ConfigurationError) as caught:
            resolve_config(location, other)
        for word in (uri, type(right).__name__, type(other).__name__):
            assert word in str(caught.value)


@pytest.mark.parametrize("wrong", [S3Config, "team", 3, object()])
def test_what_is_no_config_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="s3://b/k needs S3Config or a mapping"):
        resolve_config(parse_uri("s3://b/k"), wrong)


@pytest.mark.parametrize("uri", ["/data/model", "file:///data/model", "memory://m/x"])
def test_local_uris_take_no_config(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="URIs take no config, and S3Config was given"):
        resolve_config(parse_uri(uri), S3Config())
    monkeypatch.setenv("STORAGE_CONFIG", "no JSON")
    assert resolve_config(parse_uri(uri), None, settings_for("s3://")) is None


@pytest.mark.parametrize(
    ("uri", "fields", "config"),
    [
        ("s3://b/k", {"access_key_id": "a", "secret_access_key": "b"}, S3Config("a", "b")),
        ("s3://b/k", {"type": "s3", "region": None}, S3Config()),
        ("gs://b/k", {"type": "gcs", "project_id": "p"}, GCSConfig(project_id="p")),
        ("az://b/k", {"type": "az", "account_name": "a"}, AzureConfig("a")),
        ("hf://o/m", {"token": "t"}, HFConfig("t")),
        ("https://h/k", {"type": "https", "token": "t"}, HTTPConfig(token="t")),
        ("pvc://c/k", {"mount_root": "/x"}, PVCConfig("/x")),
        ("sftp://h/k", {"username": "u"}, FsspecConfig({"username": "u"})),
        ("sftp://h/k", {"options": {"username": "u"}}, FsspecConfig({"username": "u"})),
        ("sftp://h/k", {"type": "fsspec", "port": 22}, FsspecConfig({"port": 22})),
        ("s3://b/k", {}, S3Config()),
    ],
)
def test_a_mapping_becomes_the_config_of_the_scheme(
    uri: str, fields: dict[str, Any], config: ConfigModel
) -> None:
    assert resolve_config(parse_uri(uri), fields) == config


@pytest.mark.parametrize("own", ["gs", "sftp", "fsspec", "file", "no scheme", 3])
def test_a_mapping_of_another_type_is_refused(own: Any) -> None:
    with pytest.raises(ConfigurationError, match="type"):
        resolve_config(parse_uri("s3://b/k"), {"type": own})


def test_a_third_party_s_scheme_may_have_its_own_config() -> None:
    class OwnConfig(ConfigModel):
        uri_type: ClassVar[str] = "own"
        name: str = ""

    config = OwnConfig(name="x")
    assert resolve_config(parse_uri("own://h/k"), config) is config
    assert hash(config) == hash(OwnConfig(name="x"))
    with pytest.raises(ConfigurationError, match=r"needs FsspecConfig .* OwnConfig was given"):
        resolve_config(parse_uri("other://h/k"), config)


def test_a_subclass_serves_for_its_base() -> None:
    class Ours(S3Config):
        pass

    config = Ours("AK", "SK")
    assert resolve_config(parse_uri("s3://b/k"), config) is config


def test_make_config_names_what_needs_it() -> None:
    with pytest.raises(ConfigurationError, match=r"^the archive needs HFConfig"):
        make_config("hf", S3Config(), "the archive")
