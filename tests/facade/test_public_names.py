"""The names that users import: that they are there, whole, and cost nothing to import."""

from __future__ import annotations

import builtins
import copy
import errno
import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import storage
import storage.errors
from storage import (
    AUTHENTICATION_METHODS,
    SUPPORTED_PROTOCOLS,
    AzureConfig,
    GCSConfig,
    InferenceError,
    InvalidInput,
    ModelMissingError,
    ModelNotFound,
    S3Config,
    Storage,
    StorageError,
    StorageOperations,
)

REQUIRED = inspect.Parameter.empty

# The interface that model servers know, in the order of its parameters, with their defaults.
# What they require may be optional here, never the other way round.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Storage.download": {"uri": REQUIRED, "dest": None},
    "Storage.upload": {"src": REQUIRED, "uri": REQUIRED},
    "Storage.is_local": {"uri": REQUIRED},
    "Storage.get_storage_spec": {"uri": REQUIRED},
    "S3Config": {
        "access_key_id": REQUIRED,
        "secret_access_key": REQUIRED,
        "region": "us-east-1",
        "endpoint_url": None,
        "use_ssl": True,
    },
    "GCSConfig": {"service_account_key": None, "project_id": None},
    "AzureConfig": {
        "account_name": REQUIRED,
        "account_key": None,
        "sas_token": None,
        "connection_string": None,
    },
    "StorageOperations.list_objects": {"uri": REQUIRED},
    "StorageOperations.get_object_metadata": {"uri": REQUIRED},
    "StorageOperations.delete_object": {"uri": REQUIRED},
    "StorageOperations.copy_object": {"src_uri": REQUIRED, "dest_uri": REQUIRED},
    "ModelMissingError": {"path": REQUIRED},
    "ModelNotFound": {"model_name": None},
    "InferenceError": {"reason": REQUIRED, "status": None, "debug_details": None},
    "InvalidInput": {"reason": REQUIRED},
}

# What this library adds: keyword-only unless it is one of a method's subjects.
OWN: Mapping[str, str] = {
    "Storage.download": (
        "uri dest * config allow_patterns ignore_patterns digest unpack offline progress"
    ),
    "Storage.download_many": "uris dests",
    "Storage.upload": "src uri * config overwrite",
    "Storage.is_local": "uri",
    "Storage.get_storage_spec": "uri",
    "Storage.open": "uri mode * config",
    "Storage.filesystem": "uri * config",
    "StorageOperations.list_objects": "uri * config",
    "StorageOperations.get_object_metadata": "uri * config",
    "StorageOperations.delete_object": "uri * config",
    "StorageOperations.copy_object": "src_uri dest_uri * config dest_config",
}

FORMATS = {
    "S3_URI_FORMAT": "s3://bucket-name/path/to/model/",
    "GCS_URI_FORMAT": "gs://bucket-name/path/to/model/",
    "AZURE_URI_FORMAT": "azure://container-name/path/to/model/",
    "PVC_URI_FORMAT": "pvc://pvc-name/path/to/model/",
    "LOCAL_URI_FORMAT": "file:///path/to/model/",
    "HTTP_URI_FORMAT": "https://example.com/model.tar.gz",
    "HF_URI_FORMAT": "hf://username/model-name",
}

EXPECTED_NAMES = {
    *FORMATS,
    *("Storage", "StorageOperations", "StorageClient"),
    *("S3Config", "GCSConfig", "AzureConfig", "HFConfig", "HTTPConfig", "PVCConfig"),
    *("StorageURI", "LocalPath", "StorageConfig", "StorageMetadata", "ObjectList"),
    *("SUPPORTED_PROTOCOLS", "AUTHENTICATION_METHODS"),
    *("StorageError", "ModelMissingError", "AuthenticationError", "IntegrityError"),
    *("SignatureError", "OfflineError", "ConfigurationError", "UnsupportedOperation"),
    *("InvalidInput", "TransferError", "InsufficientSpaceError"),
    *("ModelNotFound", "InferenceError"),
}

# Imported on first use only: each costs more than all of this package.
HEAVY = {
    *("adlfs", "aiobotocore", "aiohttp", "azure", "blake3", "boto3", "botocore", "fsspec"),
    *("gcsfs", "google", "huggingface_hub", "numpy", "obstore", "pydantic", "pydantic_core"),
    *("pydantic_settings", "requests", "rich", "s3fs", "urllib3"),
}


def find(name: str) -> Any:
    value: Any = storage
    for part in name.split("."):
        value = getattr(value, part)
    return value


def parameters(name: str) -> list[inspect.Parameter]:
    value = find(name)
    if inspect.isclass(value):
        value = value.__init__
    found = list(inspect.signature(value).parameters.values())
    return found[1:] if found and found[0].name == "self" else found


@pytest.mark.parametrize("name", KNOWN)
def test_known_parameters_keep_place_name_and_default(name: str) -> None:
    found = parameters(name)[: len(KNOWN[name])]
    assert [each.name for each in found] == list(KNOWN[name])
    for parameter in found:
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = KNOWN[name][parameter.name]
        if default is REQUIRED:
            assert parameter.default in (REQUIRED, None)
        else:
            assert parameter.default == default


@pytest.mark.parametrize("name", OWN)
def test_own_parameters_are_there_and_later_ones_are_keywords(name: str) -> None:
    subjects, _, keywords = OWN[name].partition(" * ")
    found = parameters(name)
    positional = [
        each.name for each in found if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == subjects.split()
    by_keyword = {each.name: each for each in found if each.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(keywords.split()) <= by_keyword.keys()
    assert all(each.default is not REQUIRED for each in by_keyword.values())


@pytest.mark.parametrize("facade", [Storage, StorageOperations])
def test_facades_are_static(facade: type) -> None:
    public = [name for name in vars(facade) if not name.startswith("_")]
    assert public
    assert all(isinstance(vars(facade)[name], staticmethod) for name in public)


@pytest.mark.parametrize("name", FORMATS)
def test_uri_formats_have_their_values_and_can_be_parsed(name: str) -> None:
    assert find(name) == FORMATS[name]
    assert Storage.get_storage_spec(FORMATS[name])["uri"] == (
        "/path/to/model/" if name == "LOCAL_URI_FORMAT" else FORMATS[name]
    )


def test_protocols_and_authentication_methods_have_their_values() -> None:
    assert SUPPORTED_PROTOCOLS == {
        "s3": "Amazon S3 and S3-compatible storage",
        "gs": "Google Cloud Storage",
        "azure": "Azure Blob Storage",
        "pvc": "Kubernetes Persistent Volume Claims",
        "file": "Local filesystem",
        "http": "HTTP/HTTPS downloads",
        "https": "Secure HTTP downloads",
        "hf": "HuggingFace Hub models",
    }
    assert AUTHENTICATION_METHODS == {
        "s3": ["access_key", "iam_role", "instance_profile"],
        "gs": ["service_account", "default_credentials", "workload_identity"],
        "azure": ["account_key", "sas_token", "managed_identity"],
        "hf": ["access_token", "login"],
    }


@pytest.mark.parametrize("scheme", SUPPORTED_PROTOCOLS)
def test_every_supported_protocol_has_a_spec(scheme: str) -> None:
    spec = Storage.get_storage_spec(
        f"{scheme}:///abs/model" if scheme == "file" else f"{scheme}://name/path/model"
    )
    assert spec["scheme"] == scheme
    assert spec["type"] == ("http" if scheme == "https" else scheme)
    assert {"bucket", "path", "uri"} <= spec.keys()
    assert json.loads(json.dumps(spec)) == spec


def test_type_aliases_are_what_annotations_need() -> None:
    assert storage.StorageURI is str
    assert storage.LocalPath is str
    assert storage.StorageMetadata == dict[str, Any]
    assert storage.ObjectList == list[str]
    for config in (S3Config, GCSConfig, AzureConfig):
        assert issubclass(config, storage.StorageConfig)


def test_s3_config_takes_its_fields_by_position_and_by_keyword() -> None:
    by_position = S3Config("key", "secret", "eu-west-1", "http://127.0.0.1:9000", False)
    by_keyword = S3Config(
        access_key_id="key",
        secret_access_key="secret",
        region="eu-west-1",
        endpoint_url="http://127.0.0.1:9000",
        use_ssl=False,
    )
    assert by_position == by_keyword
    assert hash(by_position) == hash(by_keyword)
    assert by_position.access_key_id == "key"
    assert by_position.secret_access_key is not None
    assert by_position.secret_access_key.get_secret_value() == "secret"
    assert (by_position.region, by_position.use_ssl) == ("eu-west-1", False)
    assert by_position.endpoint_url == "http://127.0.0.1:9000"


def test_gcs_and_azure_configs_take_their_fields_by_position_and_by_keyword() -> None:
    assert GCSConfig("/etc/key.json", "project") == GCSConfig(
        service_account_key="/etc/key.json", project_id="project"
    )
    assert AzureConfig("account", "a2V5") == AzureConfig(account_name="account", account_key="a2V5")
    assert AzureConfig("account", None, "sv=1&sig=abc") == AzureConfig(
        account_name="account", sas_token="sv=1&sig=abc"
    )


def test_unset_variables_are_accepted_as_none() -> None:
    config = S3Config(access_key_id=None, secret_access_key=None, region="us-east-1")
    assert config.access_key_id is None
    assert config.secret_access_key is None
    assert GCSConfig(service_account_key=None, project_id=None) == GCSConfig()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: S3Config("key", "s3cr3t-value"), id="S3Config"),
        pytest.param(
            lambda: GCSConfig('{"type": "service_account", "private_key": "s3cr3t-value"}'),
            id="GCSConfig",
        ),
        pytest.param(lambda: AzureConfig("account", "czNjcjN0LXZhbHVl"), id="AzureConfig"),
        pytest.param(lambda: storage.HFConfig("s3cr3t-value"), id="HFConfig"),
        pytest.param(lambda: storage.HTTPConfig(token="s3cr3t-value"), id="HTTPConfig"),
    ],
)
def test_configs_are_frozen_and_hide_their_secrets(config: Callable[[], Any]) -> None:
    value = config()
    for text in (repr(value), str(value), f"{value}"):
        assert "s3cr3t-value" not in text
        assert "czNjcjN0LXZhbHVl" not in text
    with pytest.raises(Exception, match="frozen"):
        value.proxy = "http://127.0.0.1:1"
    assert pickle.loads(pickle.dumps(value)) == value


# -- the public surface ----------------------------------------------------------------------


def test_all_is_complete_sorted_and_without_repetition() -> None:
    # Constants, classes, the rest; each by the alphabet, as the linter wants it.
    ordered = sorted(
        set(storage.__all__), key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert storage.__all__ == ordered
    assert set(storage.__all__) >= EXPECTED_NAMES
    assert set(storage.__all__) == set(storage._HOME) | {"__version__"}
    assert set(dir(storage)) >= set(storage.__all__)


def test_every_error_that_users_meet_is_exported() -> None:
    exported = {
        name for name in storage.errors.__all__ if inspect.isclass(getattr(storage.errors, name))
    }
    # The transfer layer turns it into a TransferError before anybody sees it.
    assert exported - set(storage.__all__) == {"TransientError"}


@pytest.mark.parametrize("name", storage.__all__)
def test_every_public_name_can_be_imported_from_the_package(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"from storage import {name}", scope)
    assert scope[name] is getattr(storage, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Storrage'"):
        storage.Storrage  # noqa: B018


# -- errors ----------------------------------------------------------------------------------


def drawn_errors() -> list[tuple[str, str, str | None]]:
    """Read the tree in the module's text: name, name of its base, a builtin that it also is."""
    text = storage.errors.__doc__ or ""
    above: list[str] = []
    found = []
    for line in text.splitlines():
        match = re.match(r" {4}([│ ]*(?:[├└]── )?)(\w+)\b(.*)$", line)
        if match is None:
            continue
        depth = len(match.group(1)) // 4
        name = match.group(2)
        del above[depth:]
        if depth:
            also = re.search(r"\((\w+)\)$", match.group(3))
            found.append((name, above[-1], also.group(1) if also else None))
        above.append(name)
    return found


def test_the_drawing_of_errors_is_complete() -> None:
    classes = {
        name for name in storage.errors.__all__ if inspect.isclass(getattr(storage.errors, name))
    }
    assert {name for name, _, _ in drawn_errors()} == classes


@pytest.mark.parametrize(("name", "base", "also"), drawn_errors())
def test_errors_are_in_the_tree_that_is_drawn(name: str, base: str, also: str | None) -> None:
    error = getattr(storage.errors, name)
    expected = [getattr(storage.errors, base, None) or getattr(builtins, base)]
    if also is not None:
        expected.append(getattr(builtins, also))
    assert list(error.__bases__) == expected


MADE: Mapping[str, Callable[[], BaseException]] = {
    "ModelMissingError": lambda: storage.ModelMissingError("s3://b/k"),
    "BucketMissingError": lambda: storage.BucketMissingError("s3://b/k", "no bucket b"),
    "ModelNotFound": lambda: storage.ModelNotFound("iris"),
    "InferenceError": lambda: storage.InferenceError("reason", "500", "details"),
    "TransientError": lambda: storage.errors.TransientError("slow down", 3.5),
    "UnreachableError": lambda: storage.UnreachableError("nobody answers"),
}


def made(name: str) -> BaseException:
    make = MADE.get(name)
    if make is not None:
        return make()
    error: BaseException = getattr(storage.errors, name)("something failed")
    return error


@pytest.mark.parametrize("name", sorted({name for name, _, _ in drawn_errors()}))
def test_errors_survive_pickling_and_copying(name: str) -> None:
    error = made(name)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error) != ""
        assert again.__dict__ == error.__dict__
        assert getattr(again, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in drawn_errors()}))
def test_errors_are_made_without_arguments_by_those_who_unpickle_so(name: str) -> None:
    error = made(name)
    again = type(error).__new__(type(error))
    again.args, again.__dict__ = error.args, error.__dict__
    assert str(again) == str(error) != ""


@pytest.mark.parametrize("name", sorted({name for name, _, _ in drawn_errors()}))
def test_errors_say_what_they_were_given(name: str) -> None:
    error = made(name)
    assert any(
        word in str(error)
        for word in ("failed", "s3://b/k", "bucket b", "iris", "reason", "slow", "nobody")
    )
    assert len(str(error).splitlines()) == 1


def test_model_missing_error_keeps_its_path_and_is_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        raise ModelMissingError("s3://bucket/iris")
    assert isinstance(caught.value, StorageError)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.path == "s3://bucket/iris"  # type: ignore[attr-defined]
    assert "s3://bucket/iris" in str(caught.value)


def test_model_missing_error_shows_no_secret_of_its_path() -> None:
    error = ModelMissingError("https://user:s3cr3t@host/model?sig=s3cr3t")
    for text in (str(error), repr(error), error.path, repr(error.args), repr(error.__dict__)):
        assert "s3cr3t" not in text


def test_model_not_found_may_come_without_a_name() -> None:
    with pytest.raises(ModelNotFound) as caught:
        raise ModelNotFound
    assert caught.value.model_name is None
    assert not isinstance(caught.value, StorageError)
    assert "iris" in str(ModelNotFound("iris"))
    assert ModelNotFound(model_name="iris").model_name == "iris"


def test_inference_error_keeps_what_it_was_given() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        raise InferenceError("out of memory")
    error = InferenceError("out of memory", status="503", debug_details="batch 12")
    assert (error.reason, error.status, error.debug_details) == (
        "out of memory",
        "503",
        "batch 12",
    )
    assert not isinstance(error, StorageError)


def test_invalid_input_is_a_value_error_with_a_reason() -> None:
    with pytest.raises(ValueError, match="no such shape") as caught:
        raise InvalidInput("no such shape")
    assert caught.value.reason == "no such shape"  # type: ignore[attr-defined]
    assert isinstance(caught.value, StorageError)


def test_errors_are_the_builtins_that_callers_catch() -> None:
    assert issubclass(storage.AuthenticationError, PermissionError)
    assert issubclass(storage.InsufficientSpaceError, OSError)
    assert issubclass(storage.ObjectExistsError, FileExistsError)
    assert issubclass(storage.ModelMissingError, FileNotFoundError)


# -- what an import costs --------------------------------------------------------------------

AUDIT = """
import json, sys
touched = []
def watch(event, args):
    if event.startswith(("socket.", "os.mkdir", "os.remove", "os.rename", "subprocess.")):
        touched.append(event)
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        touched.append(f"open {args[0]}")
sys.addaudithook(watch)
%s
print(json.dumps({"touched": touched, "modules": sorted(sys.modules)}))
"""


def imports_of(statement: str) -> tuple[list[str], set[str]]:
    """Run ``statement`` in a fresh interpreter; return what it touched and imported."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", AUDIT % statement],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return report["touched"], {name.partition(".")[0] for name in report["modules"]}


@pytest.mark.parametrize(
    "statement",
    [
        "import storage",
        "from storage import Storage, StorageOperations",
        "from storage import StorageError, ModelMissingError, InvalidInput",
        "from storage import StorageURI, LocalPath, SUPPORTED_PROTOCOLS, AUTHENTICATION_METHODS",
        "from storage import Storage; Storage.is_local('s3://b/k'); Storage.get_storage_spec('s3://b/k')",
    ],
)
def test_imports_load_no_sdk_and_touch_nothing(statement: str) -> None:
    touched, modules = imports_of(statement)
    assert touched == []
    assert not modules & HEAVY
    assert "asyncio" not in modules


def test_the_watch_over_imports_sees_what_it_should() -> None:
    touched, modules = imports_of(
        "import socket, pydantic, os; socket.socket().close(); open(os.devnull, 'w').close()"
    )
    assert "pydantic" in modules
    assert "socket.__new__" in touched
    assert "open /dev/null" in touched


def test_a_client_and_configs_touch_nothing_before_their_first_call() -> None:
    touched, modules = imports_of(
        "from storage import StorageClient, S3Config; StorageClient(S3Config('a', 'b'))"
    )
    assert touched == []
    assert not modules & {"obstore", "s3fs", "fsspec", "botocore", "boto3", "aiohttp"}
