"""The config models: construction, defaults, equality, what they refuse."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from storage.config import (
    AzureConfig,
    ConfigModel,
    FsspecConfig,
    GCSConfig,
    HFConfig,
    HTTPConfig,
    PVCConfig,
    S3Config,
    reveal,
)
from storage.errors import ConfigurationError

ALL = (S3Config, GCSConfig, AzureConfig, HFConfig, HTTPConfig, PVCConfig, FsspecConfig)


def test_s3_takes_positional_arguments_in_the_published_order() -> None:
    config = S3Config("AK", "SK", "eu-west-1", "http://x", False)
    assert config.access_key_id == "AK"
    assert reveal(config.secret_access_key) == "SK"
    assert (config.region, config.endpoint_url, config.use_ssl) == ("eu-west-1", "http://x", False)


def test_gcs_takes_positional_arguments_in_the_published_order() -> None:
    config = GCSConfig("/key.json", "project")
    assert (config.service_account_file, config.project_id) == ("/key.json", "project")


def test_azure_takes_positional_arguments_in_the_published_order() -> None:
    config = AzureConfig("account", "key", "sas", "conn")
    assert config.account_name == "account"
    assert [
        reveal(secret)
        for secret in (config.account_key, config.sas_token, config.connection_string)
    ] == ["key", "sas", "conn"]


@pytest.mark.parametrize(
    ("cls", "names", "defaults"),
    [
        (
            S3Config,
            ["access_key_id", "secret_access_key", "region", "endpoint_url", "use_ssl"],
            {"region": "us-east-1", "endpoint_url": None, "use_ssl": True},
        ),
        (
            GCSConfig,
            ["service_account_key", "project_id"],
            {"service_account_key": None, "project_id": None},
        ),
        (
            AzureConfig,
            ["account_name", "account_key", "sas_token", "connection_string"],
            {"account_key": None, "sas_token": None, "connection_string": None},
        ),
    ],
)
def test_signature_begins_as_published(
    cls: type[ConfigModel], names: list[str], defaults: dict[str, Any]
) -> None:
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[: len(names)] == names
    assert {name: parameters[name].default for name in defaults} == defaults
    rest = list(parameters.values())[len(names) :]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in rest)


@pytest.mark.parametrize("cls", ALL)
def test_every_field_is_an_argument_and_every_argument_a_field(cls: type[ConfigModel]) -> None:
    assert set(inspect.signature(cls).parameters) == set(cls.model_fields)


@pytest.mark.parametrize("cls", ALL)
def test_a_default_shown_in_the_signature_is_the_field_s(cls: type[ConfigModel]) -> None:
    config = cls()
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is not None:
            assert getattr(config, name) == parameter.default


@pytest.mark.parametrize("cls", ALL)
def test_none_means_not_given_for_every_field(cls: type[ConfigModel]) -> None:
    config = cls(**dict.fromkeys(cls.model_fields))
    assert config == cls()
    assert not any(config.explicit(name) for name in cls.model_fields)


def test_an_empty_text_means_not_given() -> None:
    config = S3Config("", SecretStr(""), "", endpoint_url="")
    assert config == S3Config()
    assert (config.access_key_id, config.secret_access_key) == (None, None)
    assert config.region == "us-east-1"


def test_a_line_break_at_the_end_is_dropped() -> None:
    config = S3Config("AK\n", SecretStr("SK\r\n"))
    assert (config.access_key_id, reveal(config.secret_access_key)) == ("AK", "SK")


def test_region_is_explicit_only_when_given() -> None:
    assert not S3Config().explicit("region")
    assert not S3Config(region=None).explicit("region")
    assert not S3Config("AK", "SK").explicit("region")
    assert S3Config(region="us-east-1").explicit("region")
    assert S3Config("AK", "SK", "us-east-1").explicit("region")
    assert S3Config.model_validate({"region": "us-east-1"}).explicit("region")
    assert not S3Config.model_validate({"region": None}).explicit("region")


def test_configs_that_lead_to_other_regions_are_not_equal() -> None:
    assert S3Config(region="us-east-1") != S3Config()
    assert S3Config(region=None) == S3Config()


EXAMPLES: list[tuple[type[ConfigModel], dict[str, Any]]] = [
    (S3Config, {"access_key_id": "a", "secret_access_key": "b", "region": "r"}),
    (GCSConfig, {"service_account_key": {"type": "service_account", "private_key": "k"}}),
    (AzureConfig, {"account_name": "a", "account_key": "b"}),
    (HFConfig, {"token": "t", "endpoint": "https://hub.example"}),
    (HTTPConfig, {"headers": {"X-Key": "k"}, "username": "u", "password": "p"}),
    (PVCConfig, {"mounts": {"claim": "/data"}}),
    (FsspecConfig, {"options": {"host": "h", "nested": {"list": [1, {"a": {2}}]}}}),
]


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES)
def test_equal_configs_are_one_key(cls: type[ConfigModel], fields: dict[str, Any]) -> None:
    one, other = cls(**fields), cls(**copy.deepcopy(fields))
    assert one == other
    assert len({one, other}) == 1
    assert one != cls()
    assert len({one, cls()}) == 2


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES)
def test_pickle_and_deepcopy_give_an_equal_config(
    cls: type[ConfigModel], fields: dict[str, Any]
) -> None:
    config = cls(**fields)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert twin == config
        assert hash(twin) == hash(config)
        assert twin.model_fields_set == config.model_fields_set
        for name in cls.model_fields:
            assert reveal(getattr(twin, name)) == reveal(getattr(config, name))


def test_configs_of_two_types_are_not_equal() -> None:
    assert HFConfig() != S3Config()
    assert S3Config() != {"region": "us-east-1"}


def test_secrets_count_for_equality() -> None:
    assert S3Config("AK", "one") != S3Config("AK", "two")
    assert FsspecConfig({"password": "one"}) != FsspecConfig({"password": "two"})
    assert HTTPConfig({"A": "one"}) != HTTPConfig({"A": "two"})


def test_an_option_without_a_hash_is_compared_by_identity() -> None:
    session = bytearray(b"x")
    assert FsspecConfig({"s": session}) == FsspecConfig({"s": session})
    assert FsspecConfig({"s": session}) != FsspecConfig({"s": bytearray(b"x")})


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES)
def test_a_config_cannot_be_changed(cls: type[ConfigModel], fields: dict[str, Any]) -> None:
    config = cls(**fields)
    for name in cls.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, None)


def test_mappings_of_a_config_cannot_be_changed() -> None:
    headers = {"A": "b"}
    config = HTTPConfig(headers)
    headers["A"] = "other"
    assert reveal(config.headers["A"]) == "b"
    for change in (
        lambda: config.headers.update(A=SecretStr("c")),
        lambda: config.headers.__setitem__("B", SecretStr("c")),
        lambda: config.headers.pop("A"),
        config.headers.clear,
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


def test_options_are_a_copy_of_the_caller_s_dict() -> None:
    options = {"a": 1}
    config = FsspecConfig(options)
    options["a"] = 2
    assert reveal(config.options) == {"a": 1}


@pytest.mark.parametrize("cls", ALL)
def test_an_unknown_field_is_named(cls: type[ConfigModel]) -> None:
    with pytest.raises(ConfigurationError, match=r"acount_nam: there is no such field"):
        cls(acount_nam="x")


def test_a_misspelt_field_gets_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean secret_access_key\?"):
        S3Config(secret_acess_key="x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S3Config("AK"), "access_key_id is given without secret_access_key"),
        (lambda: S3Config(None, "SK"), "secret_access_key is given without access_key_id"),
        (lambda: S3Config(use_ssl="perhaps"), "use_ssl: input should be a valid boolean"),
        (lambda: S3Config(driver="boto"), "driver: input should be 'obstore' or 'fsspec'"),
        (lambda: S3Config(addressing_style="host"), "addressing_style: input should be"),
        (lambda: S3Config(connect_timeout=0), "connect_timeout: input should be greater than 0"),
        (lambda: S3Config(read_timeout=float("inf")), "read_timeout: "),
        (lambda: S3Config(copy_part_limit=0), "copy_part_limit: input should be greater than 0"),
        (lambda: S3Config(endpoint_url="ftp://x"), "endpoint_url: a URL is needed"),
        (lambda: S3Config(endpoint_url="http://"), "endpoint_url: a URL is needed"),
        (lambda: S3Config(endpoint_url="http://h:port"), "endpoint_url: a URL is needed"),
        (lambda: S3Config(endpoint_url="http://u:p@h"), "endpoint_url: a URL without user"),
        (lambda: S3Config(endpoint_url="http://h?x=1"), "endpoint_url: a URL without a query"),
        (lambda: S3Config(proxy="http://"), "proxy: the URL of a proxy"),
        (lambda: GCSConfig("{no json"), "service_account_key: the path or the JSON text"),
        (lambda: GCSConfig("{}"), "service_account_key: the path or the JSON text"),
        (lambda: GCSConfig(endpoint_url="localhost:4443"), "endpoint_url: a URL is needed"),
        (lambda: HTTPConfig(token="t", username="u"), "token and username exclude each other"),
        (lambda: HTTPConfig(password="p"), "password is given without username"),
        (lambda: HTTPConfig(client_key="/k"), "client_key is given without client_cert"),
        (lambda: HTTPConfig({"a b": "x"}), "the name of a header"),
        (lambda: HTTPConfig({"a": "x\r\nHost: y"}), "the header a holds a control character"),
        (lambda: HTTPConfig({"a": 1}), "headers.a: input should be a valid string"),
        (lambda: HTTPConfig(max_redirects=-1), "max_redirects: input should be greater"),
        (lambda: PVCConfig("relative"), "mount_root: an absolute path is needed"),
        (lambda: PVCConfig(mounts={"c": "rel"}), "mounts.c: an absolute path is needed"),
        (lambda: PVCConfig(mounts={"a/b": "/x"}), "mounts: the name of a claim"),
        (lambda: PVCConfig(mounts={"..": "/x"}), "mounts: the name of a claim"),
        (lambda: FsspecConfig(["x"]), "options: input should be a valid dictionary"),
    ],
)
def test_a_bad_value_is_a_configuration_error_of_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        S3Config(use_ssl="perhaps", driver="boto")
    assert "use_ssl" in str(caught.value)
    assert "driver" in str(caught.value)


@pytest.mark.parametrize(
    ("use_ssl", "endpoint"), [(True, "https://minio:9000"), (False, "http://minio:9000")]
)
def test_an_s3_endpoint_without_a_scheme_gets_it_from_use_ssl(use_ssl: bool, endpoint: str) -> None:
    assert S3Config(endpoint_url="minio:9000", use_ssl=use_ssl).endpoint_url == endpoint


def test_the_scheme_of_an_endpoint_goes_before_use_ssl() -> None:
    assert S3Config(endpoint_url="http://minio:9000/", use_ssl=True).endpoint_url == (
        "http://minio:9000"
    )


def test_a_proxy_without_a_scheme_is_http() -> None:
    assert reveal(S3Config(proxy="user:pw@proxy:3128").proxy) == "http://user:pw@proxy:3128"


def test_paths_may_be_path_objects_and_a_tilde_is_expanded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert S3Config(ca_bundle=tmp_path / "ca.pem").ca_bundle == str(tmp_path / "ca.pem")
    assert HTTPConfig(client_cert="~/c.pem").client_cert == str(tmp_path / "c.pem")
    assert GCSConfig("~/key.json").service_account_file == str(tmp_path / "key.json")
    assert GCSConfig(tmp_path / "key.json").service_account_file == str(tmp_path / "key.json")


def test_gcs_key_is_a_path_or_json() -> None:
    key = {"type": "service_account", "private_key": "pk"}
    for given in (json.dumps(key), SecretStr(f"\n {json.dumps(key)}"), key):
        config = GCSConfig(given)
        assert json.loads(config.service_account_json or "") == key
        assert config.service_account_file is None
    assert GCSConfig("/a/key.json").service_account_json is None
    assert GCSConfig().service_account_file is None


@pytest.mark.parametrize(
    ("fields", "account"),
    [
        ({"account_name": "one"}, "one"),
        ({"connection_string": "Protocol=https;AccountName=two;AccountKey=x=="}, "two"),
        ({"connection_string": "accountname=two"}, "two"),
        ({"connection_string": "BlobEndpoint=http://x"}, None),
        ({}, None),
    ],
)
def test_azure_account_is_named_or_in_the_connection_string(
    fields: dict[str, str], account: str | None
) -> None:
    assert AzureConfig(**fields).account == account


def test_pvc_folders() -> None:
    config = PVCConfig(mounts={"models": "/data/models/"})
    assert config.folder("models") == "/data/models"
    assert config.folder("other") == "/mnt/pvc/other"
    assert PVCConfig("/mnt/claims/").folder("c") == "/mnt/claims/c"


@pytest.mark.parametrize("text", ["true", "True", "1", "yes"])
def test_a_boolean_may_be_text(text: Any) -> None:
    assert S3Config(anonymous=text).anonymous is True


def test_validation_from_a_mapping_or_json_is_the_same() -> None:
    fields = {"access_key_id": "AK", "secret_access_key": "SK"}
    assert S3Config.model_validate(fields) == S3Config("AK", "SK")
    assert S3Config.model_validate_json(json.dumps(fields)) == S3Config("AK", "SK")
    with pytest.raises(ConfigurationError, match="there is no such field"):
        S3Config.model_validate({"nope": 1})


def test_reveal_leaves_what_is_no_secret() -> None:
    assert reveal(None) is None
    assert reveal("text") == "text"
    assert reveal(SecretStr("s")) == "s"
