"""Archives go in parts where Arkindex gives no URL for all of one, as from the newest helper."""

from __future__ import annotations

import hashlib
import io
import logging
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.config import HTTPConfig
from storage.container import create_archive
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ObjectExistsError,
    StorageError,
    TransferError,
)
from storage.integrations import arkindex_upload
from storage.integrations.arkindex import ModelVersionPublisher, publish_model_version
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from storage.transfer.progress import Progress
from tests.faults.scripts import once
from tests.integrations.arkindex_checks import available
from tests.integrations.arkindex_server import MODEL, TOKEN, Arkindex, PlainClient
from tests.integrations.arkindex_store import Store
from tests.peers.environments import ARKINDEX, Peer, running
from tests.servers.process import ServerError
from tests.servers.seaweedfs import SeaweedFS

PART = 5 * 1024 * 1024
"""The least that S3 takes of a part that is not the last."""

CONTENT = random.Random(8).randbytes(2 * PART + 1_000_000)
IN_PARTS = [
    "CreateMultipartUpload",
    *["CreateMultipartUploadPart"] * 3,
    "CompleteMultipartUpload",
]


@pytest.fixture
def store(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Store:
    return Store(seaweedfs, shared_bucket, prefix)


@pytest.fixture
def arkindex(store: Store) -> Iterator[Arkindex]:
    with Arkindex(lambda _: None, store.get, parts=store) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "model.bin").write_bytes(CONTENT)
    (made / "config.json").write_text("{}", encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def _small_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arkindex_upload, "_PART", PART)
    monkeypatch.setenv("STORAGE_TRANSFER__RETRY_WAIT", "0.01")
    monkeypatch.setenv("STORAGE_TRANSFER__THROTTLE_WAIT", "0.02")


def published(arkindex: Arkindex, store: Store, version: Any, folder: Path, scratch: Path) -> None:
    """Check that a version is available and that its archive is the folder, byte for byte."""
    available(arkindex, store, version, folder, scratch)
    assert store.pending() == []


# -- what it does --------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", ["s3v4", "s3"])
def test_an_archive_goes_in_parts_where_no_url_is_given(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path, signature: str
) -> None:
    store.signature = signature
    seen: list[Request] = []
    told: list[Progress] = []
    with FaultProxy(store.endpoint, seen.append, store="s3") as proxy:
        store.endpoint = proxy.endpoint
        # Without the digest that the store is told by itself, the one that was signed is sent.
        config = HTTPConfig(headers={"X-Team": "vision"}, verify_uploads=False)
        version = publish_model_version(
            PlainClient(arkindex), folder, MODEL, "v1", "A model", config=config,
            progress=told.append,
        )  # fmt: skip
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert (version["tag"], version["description"]) == ("v1", "A model")
    assert arkindex.operations == [
        "CreateModelVersion",
        "UpdateModelVersion",
        *IN_PARTS,
        "RetrieveModelVersion",
    ]
    assert [request.method for request in seen] == ["PUT"] * 3
    assert {request.headers["x-team"] for request in seen} == {"vision"}
    assert [int(request.headers["content-length"]) for request in seen] == [
        PART, PART, version["size"] - 2 * PART,
    ]  # fmt: skip
    (last,) = [one for one in told if one.finished]
    assert (last.bytes_done, last.bytes_total) == (version["size"], version["size"])
    assert "Signature" not in last.uri


def test_a_server_may_want_to_know_the_archive_before_the_version_is_made(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    arkindex.wants_archive = True
    client = PlainClient(arkindex)
    publish_model_version(client, folder, MODEL, tag="best")
    (folder / "more").write_bytes(b"trained")
    del arkindex.asked[:]
    # This server looks at the tag first, each time.
    version = publish_model_version(client, folder, MODEL, tag="best")
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert version["tag"] is None
    assert arkindex.operations == [
        *["CreateModelVersion"] * 4, *IN_PARTS, "RetrieveModelVersion",
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="size This field is required"):
        ModelVersionPublisher(client).create_model_version(MODEL)


def test_a_version_that_was_made_before_gets_its_archive_in_parts(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    publisher = ModelVersionPublisher(PlainClient(arkindex))
    made = publisher.create_model_version(MODEL, configuration={"epochs": 10})
    version = publisher.publish_model_version(folder, MODEL, tag="done")
    published(arkindex, store, version, folder, tmp_path)
    assert version is not None
    assert made is not None
    assert (version["id"], version["configuration"]) == (made["id"], {"epochs": 10})
    with pytest.raises(ObjectExistsError, match="is available already"):
        publisher.publish_model_version(folder, MODEL)


def test_the_upload_alone_makes_a_version_available(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    publisher = ModelVersionPublisher(PlainClient(arkindex))
    publisher.create_model_version(MODEL)
    with create_archive(folder) as archive:
        publisher.upload_archive(archive.path)
    published(arkindex, store, publisher.model_version, folder, tmp_path)


def test_parts_are_sent_and_hashed_without_being_held(folder: Path) -> None:
    path = folder / "model.bin"
    payload = arkindex_upload._payload(path, 3, PART + 5)
    assert payload.size == PART + 2
    with payload.open() as stream:
        assert isinstance(stream, io.BufferedReader)
        assert stream.read() == CONTENT[3 : PART + 5]
        assert stream.read(1) == b""
    with payload.open() as stream:
        assert b"".join(iter(lambda: stream.read(100_000), b"")) == CONTENT[3 : PART + 5]


def test_no_archive_has_more_parts_than_s3_takes(
    arkindex: Arkindex, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arkindex_upload, "_PARTS", 2)
    publish_model_version(PlainClient(arkindex), folder, MODEL)
    assert arkindex.operations.count("CreateMultipartUploadPart") == 2


# -- what fails ----------------------------------------------------------------------------------


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
def test_a_part_that_fails_once_is_sent_again(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path, fault: Fault
) -> None:
    with FaultProxy(store.endpoint, once(fault, "PUT"), store="s3") as proxy:
        store.endpoint = proxy.endpoint
        version = publish_model_version(PlainClient(arkindex), folder, MODEL)
        assert proxy.count("PUT") == 4
    published(arkindex, store, version, folder, tmp_path)


@pytest.mark.parametrize(
    ("status", "error"), [(403, AuthenticationError), (503, TransferError)], ids=str
)
def test_parts_that_are_refused_leave_nothing(
    arkindex: Arkindex,
    store: Store,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    error: type[StorageError],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "2")
    number = iter(range(100))

    def refuse(request: Request) -> Fault | None:
        return Fault("status", status=status) if next(number) else None

    with FaultProxy(store.endpoint, refuse, store="s3") as proxy:
        store.endpoint = proxy.endpoint
        with pytest.raises(error) as raised:
            publish_model_version(PlainClient(arkindex), folder, MODEL)
    assert arkindex.versions == {}
    assert store.pending() == store.ids() == []
    assert "AbortMultipartUpload" in arkindex.operations
    text = "".join(traceback.format_exception(raised.value)) + caplog.text
    for url in store.urls:
        assert url.rpartition("Signature=")[2].partition("&")[0] not in text


OPERATIONS = dict.fromkeys(["CreateModelVersion", "UpdateModelVersion", *IN_PARTS])


@pytest.mark.parametrize("fault", ["reset", "lost", 400, 403, 404, 500])
@pytest.mark.parametrize("operation", [*OPERATIONS, "RetrieveModelVersion", "AbortMultipartUpload"])
def test_one_request_goes_wrong(
    arkindex: Arkindex, store: Store, folder: Path, operation: str, fault: int | str
) -> None:
    client = PlainClient(arkindex)
    arkindex.faults[operation] = [fault]
    (folder / "model.bin").write_bytes(b"weights")
    try:
        version = publish_model_version(client, folder, MODEL)
    except StorageError:
        unfinished = [v["id"] for v in arkindex.versions.values() if v["state"] != "available"]
        # Only who made one and was not told of it leaves it behind.
        assert not unfinished or (operation, fault) == ("CreateModelVersion", "lost")
        assert not store.pending() or (operation, fault) == ("CreateMultipartUpload", "lost")
        if operation == "RetrieveModelVersion":
            # It is available, and the second look has told.
            assert [v["state"] for v in arkindex.versions.values()] == ["available"]
            return
        version = publish_model_version(client, folder, MODEL)
    assert version is not None
    assert version["state"] == "available"
    data = store.get(version["id"])
    assert data is not None
    assert hashlib.md5(data).hexdigest() == version["archive_hash"]
    assert arkindex.lost == []
    assert sum(one["state"] == "available" for one in arkindex.versions.values()) == 1


def test_an_upload_that_cannot_be_aborted_is_told(
    arkindex: Arkindex, store: Store, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arkindex.faults = {"CompleteMultipartUpload": [500], "AbortMultipartUpload": [403]}
    with pytest.raises(TransferError, match=r"CompleteMultipartUpload of .* answered 500"):
        publish_model_version(PlainClient(arkindex), folder, MODEL)
    assert "the upload in parts of the model version" in caplog.text
    assert arkindex.versions == {}
    for upload in store.pending():
        store.abort(arkindex.made[0], upload)


def test_an_archive_that_changes_while_it_is_sent_is_not_published(
    arkindex: Arkindex, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "archive.tar.zst"
    path.write_bytes(CONTENT)
    client = PlainClient(arkindex)

    class Meddled:
        def request(self, operation: str, **parameters: Any) -> Any:
            answer = client.request(operation, **parameters)
            if operation == "CreateMultipartUploadPart" and parameters["body"]["part_number"] == 1:
                with path.open("r+b") as file:
                    file.seek(PART + 7)
                    file.write(b"another")
            return answer

    publisher = ModelVersionPublisher(Meddled())
    publisher.create_model_version(MODEL)
    with pytest.raises(IntegrityError, match="changed while it was being uploaded"):
        publisher.upload_archive(path)
    assert [one["state"] for one in arkindex.versions.values()] == ["created"]
    assert store.pending() == store.ids() == []


def test_a_part_is_sent_to_nothing_but_http(
    arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    client = PlainClient(arkindex)
    target = tmp_path / "stolen"

    class Thieving:
        def request(self, operation: str, **parameters: Any) -> Any:
            answer = client.request(operation, **parameters)
            return {"url": target.as_uri()} if "url" in (answer or {}) else answer

    with pytest.raises(StorageError, match="a signed URL of HTTP is needed"):
        publish_model_version(Thieving(), folder, MODEL)
    assert not target.exists()
    assert arkindex.versions == {}
    assert store.pending() == []


@pytest.mark.parametrize("answer", [None, [], {}, {"upload_id": 7}, {"upload_id": ""}])
def test_an_answer_without_an_upload_is_an_error(
    arkindex: Arkindex, folder: Path, answer: Any
) -> None:
    client = PlainClient(arkindex)

    class Odd:
        def request(self, operation: str, **parameters: Any) -> Any:
            if operation == "CreateMultipartUpload":
                return answer
            return client.request(operation, **parameters)

    with pytest.raises(StorageError, match="was to tell the upload_id"):
        publish_model_version(Odd(), folder, MODEL)
    assert arkindex.versions == {}


# -- the newest release of the peer --------------------------------------------------------------


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """The training helper that sends archives in parts, and the client that it came with."""
    try:
        ARKINDEX.python()
    except ServerError as exc:
        pytest.fail(f"{ARKINDEX.requirement} cannot be installed: {exc}", pytrace=False)
    with running(ARKINDEX, "arkindex_training.py", tmp_path_factory.mktemp("peer")) as peer:
        yield peer


@pytest.mark.parametrize("wants_archive", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("signature", ["s3v4", "s3"])
def test_the_newest_helper_and_ours_end_in_the_same(
    helper: Peer,
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    folder: Path,
    tmp_path: Path,
    wants_archive: bool,
    signature: str,
) -> None:
    attributes: dict[str, Any] = {
        "tag": "v1",
        "description": "A model",
        "configuration": {"a": {"b": [1, None]}},
    }
    ends = []
    for name in ("theirs", "ours"):
        store = Store(seaweedfs, shared_bucket, f"{prefix}/{name}")
        store.signature = signature
        side = Arkindex(lambda _: None, store.get, parts=store, wants_archive=wants_archive)
        with side as arkindex:
            if name == "ours":
                publish_model_version(PlainClient(arkindex), folder, MODEL, **attributes)
            else:
                arguments = {"model_path": folder, "model_id": MODEL, **attributes}
                steps = [("publish_model_version", arguments)]
                helper("publish", url=arkindex.url, token=TOKEN, steps=steps)
        (version,) = arkindex.versions.values()
        (tmp_path / name).mkdir()
        published(arkindex, store, version | {"s3_put_url": None}, folder, tmp_path / name)
        seen = [
            (one.operation, sorted(one.body), sorted((one.body.get("parts") or [{}])[0]))
            for one in arkindex.asked
            if "Multipart" in one.operation
        ]
        # No two programs make the same archive.
        ends.append((seen, version | {"id": "", "size": 0, "archive_hash": ""}))
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def client_class() -> Iterator[Callable[..., Any]]:
    """``arkindex.ArkindexClient`` 1.3, unmodified."""
    from tests.integrations.test_arkindex import _client_class

    yield from _client_class(ARKINDEX)


def test_the_client_of_the_peer_drives_the_upload(
    client_class: Callable[..., Any], arkindex: Arkindex, store: Store, folder: Path, tmp_path: Path
) -> None:
    client = client_class(token=TOKEN, base_url=arkindex.url)
    version = publish_model_version(client, folder, MODEL)
    published(arkindex, store, version, folder, tmp_path)
    with FaultProxy(store.endpoint, lambda _: Fault("status", status=403), store="s3") as proxy:
        store.endpoint = proxy.endpoint
        with pytest.raises(AuthenticationError, match="the URL is a signed one"):
            publish_model_version(client, folder, MODEL)
    assert arkindex.operations[-3:] == [
        "AbortMultipartUpload",
        "RetrieveModelVersion",
        "DestroyModelVersion",
    ]
    assert store.pending() == []
