"""Model versions are published by the real clients of Arkindex, to a real S3."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.config import HTTPConfig
from storage.container import create_archive
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    StorageError,
    TransferError,
)
from storage.integrations.arkindex import ModelVersionPublisher, publish_model_version
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault
from storage.transfer.progress import Progress
from tests.faults.scripts import once
from tests.integrations.arkindex_checks import available
from tests.integrations.arkindex_server import MODEL, OTHER_MODEL, TOKEN, Arkindex, Refused
from tests.integrations.arkindex_store import Store
from tests.peers.environments import ARKINDEX, ARKINDEX_BEFORE, Release
from tests.servers.seaweedfs import SeaweedFS

PUBLISHED = ["CreateModelVersion", "PartialUpdateModelVersion"]
CONTENT = random.Random(7).randbytes(3_000_000)


@pytest.fixture
def store(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Store:
    return Store(seaweedfs, shared_bucket, prefix)


@pytest.fixture
def arkindex(store: Store) -> Iterator[Arkindex]:
    with Arkindex(store.sign, store.get) as server:
        yield server


def _client_class(release: Release) -> Iterator[Callable[..., Any]]:
    """Import the client that a release came with, and forget it afterwards."""
    (site,) = Path(release.python()).parent.parent.glob("lib/python*/site-packages")
    before = set(sys.modules)
    # What the library has, too, it goes on taking from its own place.
    sys.path.append(str(site))
    try:
        with warnings.catch_warnings(action="ignore"):
            client_class = importlib.import_module("arkindex").ArkindexClient
        yield client_class
    finally:
        sys.path.remove(str(site))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(site)):
                del sys.modules[name]


@pytest.fixture(scope="module", params=[ARKINDEX, ARKINDEX_BEFORE], ids=["now", "before"])
def client_class(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``arkindex.ArkindexClient``, unmodified: 1.3, and 1.0 on apistar."""
    yield from _client_class(request.param)


@pytest.fixture
def client(client_class: Callable[..., Any], arkindex: Arkindex) -> Any:
    return client_class(token=TOKEN, base_url=arkindex.url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "weights").mkdir(parents=True)
    (made / "weights" / "model.bin").write_bytes(CONTENT)
    (made / "config.json").write_text('{"classes": 3}', encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_TRANSFER__RETRY_WAIT", "0.01")
    monkeypatch.setenv("STORAGE_TRANSFER__THROTTLE_WAIT", "0.02")


def published(arkindex: Arkindex, store: Store, version: Any, folder: Path, scratch: Path) -> None:
    """Check that a version is available and that its archive is the folder, byte for byte."""
    available(arkindex, store, version, folder, scratch)
    with create_archive(folder) as (_, content_hash, *_rest):
        assert version["hash"] == content_hash
    head = store.server.head_raw(store.bucket, store.key(version["id"]))
    assert head["ContentType"] == "application/zstd"


# -- what it does --------------------------------------------------------------------------------


def test_a_folder_becomes_an_available_version(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    version = publish_model_version(client, folder, MODEL, "v1", "A model", {"classes": 3})
    published(arkindex, store, version, folder, tmp_path)
    assert arkindex.operations == PUBLISHED
    assert arkindex.bodies("CreateModelVersion") == [
        {"tag": "v1", "description": "A model", "configuration": {"classes": 3}}
    ]
    assert version is not None
    assert arkindex.bodies("PartialUpdateModelVersion") == [
        {"state": "available", **{name: version[name] for name in ("size", "hash", "archive_hash")}}
    ]


def test_ids_may_be_uuids(client: Any, arkindex: Arkindex, folder: Path) -> None:
    parent = publish_model_version(client, folder, uuid.UUID(MODEL))
    assert parent is not None
    (folder / "more").write_bytes(b"trained")
    child = publish_model_version(client, folder, MODEL, parent=uuid.UUID(parent["id"]))
    assert child is not None
    assert child["parent"] == parent["id"]


def test_a_version_is_made_first_and_published_when_it_is_trained(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    publisher = ModelVersionPublisher(client)
    made = publisher.create_model_version(MODEL, configuration={"epochs": 10})
    publisher.update_model_version(description="training")
    version = publisher.publish_model_version(folder, MODEL, tag="done")
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert made is not None
    assert version["id"] == made["id"]
    # What publishing says nothing about stays.
    assert [version[name] for name in ("tag", "description", "configuration")] == [
        "done",
        "training",
        {"epochs": 10},
    ]
    assert arkindex.operations == [
        "CreateModelVersion",
        "UpdateModelVersion",
        "UpdateModelVersion",
        "PartialUpdateModelVersion",
    ]
    assert publisher.model_version == version


def test_a_version_that_somebody_else_made_is_published(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    made = client.request("CreateModelVersion", id=MODEL, body={})
    version = ModelVersionPublisher(client, made).publish_model_version(folder, MODEL)
    published(arkindex, store, version, folder, tmp_path)
    assert arkindex.operations == PUBLISHED


def test_the_way_to_the_store_is_that_of_the_config(
    client: Any, arkindex: Arkindex, store: Store, folder: Path
) -> None:
    seen: list[Mapping[str, str]] = []
    told: list[Progress] = []
    with FaultProxy(store.endpoint, lambda request: seen.append(request.headers)) as proxy:
        store.endpoint = proxy.endpoint
        config = HTTPConfig(headers={"X-Team": "vision"}, verify_uploads=False)
        version = publish_model_version(client, folder, MODEL, config=config, progress=told.append)
    assert version is not None
    (headers,) = seen
    assert (headers["x-team"], headers["content-type"]) == ("vision", "application/zstd")
    assert "content-md5" not in headers
    assert told[-1].bytes_done == version["size"]


def test_a_url_that_is_signed_the_older_way_covers_the_content_type(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    import boto3
    from botocore.config import Config

    signer = boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.server.access_key,
        aws_secret_access_key=store.server.secret_key,
        region_name=store.server.region,
        config=Config(signature_version="s3", s3={"addressing_style": "path"}),
    )
    arkindex.sign = lambda id: signer.generate_presigned_url(
        "put_object",
        Params={
            "Bucket": store.bucket,
            "Key": store.key(id),
            "ContentType": "application/zstd",
        },
        ExpiresIn=600,
    )
    version = publish_model_version(client, folder, MODEL)
    published(arkindex, store, version, folder, tmp_path)
    assert arkindex.operations == PUBLISHED


@pytest.mark.parametrize("conflict", ["id", "version", "existing_id"])
def test_the_same_content_is_published_once(
    client: Any, arkindex: Arkindex, folder: Path, conflict: str
) -> None:
    arkindex.conflict = conflict
    first = publish_model_version(client, folder, MODEL, tag="v1", configuration={"a": 1})
    del arkindex.asked[:]
    second = publish_model_version(client, folder, MODEL, description="the same again")
    assert first is not None
    assert second == first | {"description": "the same again"}
    assert list(arkindex.versions) == [first["id"]]
    assert arkindex.operations == [
        *PUBLISHED,
        "RetrieveModelVersion",
        "DestroyModelVersion",
        "UpdateModelVersion",
    ]
    assert arkindex.bodies("UpdateModelVersion") == [{"description": "the same again"}]


def test_without_attributes_the_existing_version_stays_as_it_is(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    first = publish_model_version(client, folder, MODEL, tag="v1", configuration={"a": 1})
    assert publish_model_version(client, folder, MODEL) == first
    assert "UpdateModelVersion" not in arkindex.operations


def test_a_pending_version_that_cannot_be_removed_is_no_failure(
    client: Any, arkindex: Arkindex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = publish_model_version(client, folder, MODEL)
    arkindex.faults["DestroyModelVersion"] = [403]
    assert publish_model_version(client, folder, MODEL) == first
    (error,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "could not be removed" in error.getMessage()


def test_a_tag_that_is_taken_does_not_lose_the_model(
    client: Any,
    arkindex: Arkindex,
    store: Store,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish_model_version(client, folder, MODEL, tag="best")
    (folder / "more").write_bytes(b"trained")
    version = publish_model_version(client, folder, MODEL, tag="best", description="better")
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert (version["tag"], version["description"]) == (None, "better")
    assert "'best'; this one is published without it" in caplog.text


def test_who_asks_for_a_taken_tag_alone_is_told(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    publish_model_version(client, folder, MODEL, tag="best")
    publisher = ModelVersionPublisher(client)
    publisher.create_model_version(MODEL)
    with pytest.raises(InvalidInput, match="with this tag already exists"):
        publisher.update_model_version(tag="best")


def test_read_only_asks_for_nothing(
    client: Any, arkindex: Arkindex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = ModelVersionPublisher(client, read_only=True)
    assert publisher.create_model_version(MODEL) is None
    assert publisher.update_model_version(tag="v1") is None
    assert publisher.publish_model_version(folder, MODEL) is None
    assert publisher.validate_model_version("0" * 32, 1, "0" * 32) is None
    publisher.upload_archive(folder / "config.json")
    # A worker is a client, too, and knows itself whether it may write.
    client.is_read_only = True
    assert publish_model_version(client, folder, MODEL) is None
    assert arkindex.asked == []
    assert caplog.text.count("read-only: nothing is published") == 6


# -- misuse --------------------------------------------------------------------------------------


def test_steps_out_of_order_are_refused(client: Any, arkindex: Arkindex, folder: Path) -> None:
    publisher = ModelVersionPublisher(client)
    steps: list[Callable[[], object]] = [
        lambda: publisher.update_model_version(tag="v1"),
        lambda: publisher.upload_archive(folder / "config.json"),
        lambda: publisher.validate_model_version("0" * 32, 1, "0" * 32),
    ]
    for step in steps:
        with pytest.raises(InvalidInput, match="create_model_version makes one"):
            step()
    publisher.create_model_version(MODEL)
    with pytest.raises(InvalidInput, match="is no file"):
        publisher.upload_archive(folder)
    with pytest.raises(InvalidInput, match="was made already"):
        publisher.create_model_version(MODEL)
    with pytest.raises(InvalidInput, match=f"cannot be published as one of {OTHER_MODEL}"):
        publisher.publish_model_version(folder, OTHER_MODEL)
    publisher.publish_model_version(folder, MODEL)
    with pytest.raises(ObjectExistsError, match="is available already"):
        publisher.publish_model_version(folder, MODEL, tag="again")
    assert arkindex.operations == PUBLISHED


def test_what_is_no_folder_makes_no_version(client: Any, arkindex: Arkindex, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a folder"):
        publish_model_version(client, folder / "config.json", MODEL)
    assert arkindex.asked == []


def test_what_arkindex_refuses_is_told_in_our_errors(
    client: Any, client_class: Callable[..., Any], arkindex: Arkindex, folder: Path
) -> None:
    stranger = client_class(token="another", base_url=arkindex.url)
    with pytest.raises(AuthenticationError, match=r"CreateModelVersion of .* answered 403"):
        publish_model_version(stranger, folder, MODEL)
    with pytest.raises(ModelMissingError, match="answered 404: detail Not found"):
        publish_model_version(client, folder, str(uuid.uuid4()))
    with pytest.raises(InvalidInput, match="answered 400: parent Invalid pk"):
        publish_model_version(client, folder, MODEL, parent=str(uuid.uuid4()))
    assert arkindex.versions == {}


def test_an_operation_that_arkindex_does_not_have_is_named(
    client_class: Callable[..., Any], arkindex: Arkindex, folder: Path
) -> None:
    arkindex.missing.add("CreateModelVersion")
    client = client_class(token=TOKEN, base_url=arkindex.url)
    with pytest.raises(StorageError, match="CreateModelVersion"):
        publish_model_version(client, folder, MODEL)


def test_nobody_answers(client: Any, arkindex: Arkindex, folder: Path) -> None:
    arkindex.faults["CreateModelVersion"] = ["reset"]
    with pytest.raises(TransferError, match="CreateModelVersion"):
        publish_model_version(client, folder, MODEL)


# -- uploads that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503),
        Fault("reset_request", 0.5),
        Fault("lost_answer"),
        Fault("flip_request", 0.5),
    ],
    ids=lambda fault: fault.kind,
)
def test_an_upload_that_fails_once_is_sent_again(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    with FaultProxy(store.endpoint, once(fault, "PUT"), store="s3") as proxy:
        store.endpoint = proxy.endpoint
        version = publish_model_version(client, folder, MODEL)
        assert [one.method for one in proxy.exchanges] == ["PUT", "PUT"]
    published(arkindex, store, version, folder, tmp_path)
    assert arkindex.operations == PUBLISHED


def test_an_upload_that_is_refused_leaves_no_version(
    client: Any,
    arkindex: Arkindex,
    store: Store,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with FaultProxy(store.endpoint, lambda _: Fault("status", status=403)) as proxy:
        store.endpoint = proxy.endpoint
        with pytest.raises(AuthenticationError, match="the URL is a signed one") as raised:
            publish_model_version(client, folder, MODEL, tag="v1")
        # One, or two if the second URL was signed in another second.
        assert 1 <= proxy.count("PUT") <= 2
    assert arkindex.versions == {}
    text = "".join(traceback.format_exception(raised.value)) + caplog.text
    for url in store.urls:
        assert url.rpartition("Signature=")[2] not in text


def test_a_version_that_was_made_before_outlives_a_failed_upload(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    publisher = ModelVersionPublisher(client)
    made = publisher.create_model_version(MODEL)
    assert made is not None
    publisher.model_version = made | {"s3_put_url": made["s3_put_url"] + "0"}
    arkindex.faults["RetrieveModelVersion"] = [403]
    with pytest.raises(AuthenticationError, match="the URL is a signed one"):
        publisher.publish_model_version(folder, MODEL)
    assert list(arkindex.versions) == [made["id"]]
    version = publisher.publish_model_version(folder, MODEL, tag="v1")
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert version["id"] == made["id"]


def test_a_url_that_has_expired_is_asked_for_again(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    publisher = ModelVersionPublisher(client)
    made = publisher.create_model_version(MODEL)
    assert made is not None
    old = made["s3_put_url"].replace("X-Amz-Date=20", "X-Amz-Date=19")
    publisher.model_version = made | {"s3_put_url": old}
    version = publisher.publish_model_version(folder, MODEL)
    published(arkindex, store, version, folder, tmp_path)
    assert arkindex.operations == [
        "CreateModelVersion",
        "RetrieveModelVersion",
        "PartialUpdateModelVersion",
    ]


def test_without_a_url_nothing_is_left_behind(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    arkindex.sign = lambda _: None
    # Nor does this release take parts.
    with pytest.raises(AuthenticationError, match=r"takes no parts .*right to validate versions"):
        publish_model_version(client, folder, MODEL)
    assert arkindex.versions == {}


def test_an_archive_is_sent_to_nothing_but_http(
    client: Any, arkindex: Arkindex, folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "stolen"
    arkindex.sign = lambda _: target.as_uri()
    with pytest.raises(StorageError, match="a signed URL of HTTP is needed"):
        publish_model_version(client, folder, MODEL)
    assert not target.exists()
    assert arkindex.versions == {}


# -- validation ----------------------------------------------------------------------------------


def test_an_archive_that_was_replaced_is_not_made_available(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    arkindex.stored = lambda _: b"another"
    with pytest.raises(InvalidInput, match="size It has 7 bytes"):
        publish_model_version(client, folder, MODEL)
    assert arkindex.versions == {}


def test_a_version_whose_answer_is_lost_is_available_all_the_same(
    client: Any, arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    arkindex.faults["PartialUpdateModelVersion"] = ["lost"]
    version = publish_model_version(client, folder, MODEL)
    published(arkindex, store, version, folder, tmp_path)
    assert "DestroyModelVersion" not in arkindex.operations


def test_a_version_is_not_removed_while_nobody_knows_its_state(
    client: Any, arkindex: Arkindex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arkindex.faults["PartialUpdateModelVersion"] = ["lost"]
    arkindex.faults["RetrieveModelVersion"] = ["reset", "reset"]
    with pytest.raises(TransferError, match="PartialUpdateModelVersion"):
        publish_model_version(client, folder, MODEL)
    (version,) = arkindex.versions.values()
    assert version["state"] == "available"
    assert "is left behind" in caplog.text


def test_a_conflict_with_itself_removes_nothing(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    class Repeating:
        """Repeats a validation whose answer was lost, and is told of what it did itself."""

        def request(self, operation: str, **parameters: Any) -> Any:
            answer = client.request(operation, **parameters)
            if operation == "PartialUpdateModelVersion":
                raise Refused(409, {"id": [parameters["id"]]})
            return answer

    version = publish_model_version(Repeating(), folder, MODEL)
    assert version is not None
    assert arkindex.versions[version["id"]]["state"] == "available"
    assert "DestroyModelVersion" not in arkindex.operations


def test_a_conflict_must_name_an_available_version(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    unfinished = client.request("CreateModelVersion", id=MODEL, body={})

    class Confused:
        def request(self, operation: str, **parameters: Any) -> Any:
            if operation == "PartialUpdateModelVersion":
                raise Refused(400, {"id": [unfinished["id"]]})
            return client.request(operation, **parameters)

    with pytest.raises(IntegrityError, match="found the state 'created'"):
        publish_model_version(Confused(), folder, MODEL)
    assert list(arkindex.versions) == [unfinished["id"]]


@pytest.mark.parametrize("said", [["Required."], "../model", "a?b=c", ["Must", "be"], None])
def test_what_is_wrong_with_an_id_is_no_id(
    client: Any, arkindex: Arkindex, folder: Path, said: Any
) -> None:
    class Strict:
        def request(self, operation: str, **parameters: Any) -> Any:
            if operation == "PartialUpdateModelVersion":
                raise Refused(400, {"id": said})
            return client.request(operation, **parameters)

    with pytest.raises(InvalidInput, match="answered 400: id "):
        publish_model_version(Strict(), folder, MODEL)
    assert {one.id for one in arkindex.asked} == {MODEL, *arkindex.made}
    assert arkindex.versions == {}


def test_a_version_with_another_archive_is_not_taken_for_ours(
    client: Any, arkindex: Arkindex, folder: Path
) -> None:
    class Meddled:
        """Somebody else published something as this version meanwhile."""

        def request(self, operation: str, **parameters: Any) -> Any:
            if operation == "PartialUpdateModelVersion":
                raise Refused(400, {"state": ["This version is available already."]})
            answer = client.request(operation, **parameters)
            if operation == "RetrieveModelVersion":
                answer |= {"state": "available", "archive_hash": "0" * 32}
            return answer

    with pytest.raises(InvalidInput, match="state This version is available already"):
        publish_model_version(Meddled(), folder, MODEL)
    assert "DestroyModelVersion" not in arkindex.operations


@pytest.mark.parametrize("status", [409, 500])
def test_an_error_tells_no_signed_url_that_a_refusal_holds(folder: Path, status: int) -> None:
    url = "http://store.example/a?X-Amz-Signature=0123456789abcdef"

    class Talkative:
        def request(self, operation: str, **parameters: Any) -> Any:
            raise Refused(status, {"detail": f"not {url}", "s3_url": url})

    with pytest.raises(StorageError, match=f"answered {status}: detail not http://store") as raised:
        publish_model_version(Talkative(), folder, MODEL)
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert "0123456789abcdef" not in shown
