"""What is sent to GCS through gcsfs: kept in part, damaged, or unanswered."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from storage.backends.base import OpenOptions, Payload, bytes_payload
from storage.backends.gcs.fsspec import GcsFsspecBackend
from storage.backends.gcs.upload import Answer, ResumableUpload
from storage.digest import new_hasher
from storage.errors import IntegrityError, TransientError
from tests.servers.odd_http import OddHTTP, Reply, Request

MIB = 1024 * 1024


def backend_of(endpoint: str, options: OpenOptions | None = None) -> GcsFsspecBackend:
    return GcsFsspecBackend("bucket", {"token": "anon", "endpoint_url": endpoint}, options)


class Store:
    """Takes a resumable upload as GCS does, and can fail on the way."""

    def __init__(self) -> None:
        self.data = b""
        self.done = False
        self.cancelled = 0
        self.ranges: list[str] = []
        self.keep: int | None = None
        """Bytes that it keeps of each chunk, at most."""
        self.refusals: dict[int, Reply] = {}
        """What it answers to requests by their numbers, from 1, instead of doing them."""
        self.removed: list[str] = []
        """Queries of the deletions of the object."""
        self.checksum: str | None = None
        """What it was told of the object's."""
        self.last_word: bytes | None = None
        """What it says of the object, if not what it is."""

    def __call__(self, request: Request) -> Reply:
        if request.method == "POST":
            if "uploadType=multipart" in request.target:
                assert self.last_word is not None
                return Reply(body=self.last_word)
            location = f"http://{request.headers['Host']}/session/1?upload_id=secret"
            return Reply(headers={"Location": location})
        if request.path == "/storage/v1/b/bucket/o/a":
            assert request.method == "DELETE"
            self.removed.append(request.target.partition("?")[2])
            return Reply(204)
        assert request.target == "/session/1?upload_id=secret"
        if request.method == "DELETE":
            self.cancelled += 1
            return Reply(499)
        span = request.headers["Content-Range"].removeprefix("bytes ")
        self.ranges.append(span)
        refusal = self.refusals.get(len(self.ranges))
        if refusal is not None and not refusal.cut:
            return refusal
        bounds, _, total = span.partition("/")
        if bounds == "*":
            assert not request.body
        else:
            first, last = (int(bound) for bound in bounds.split("-"))
            assert first == len(self.data)
            assert last + 1 - first == len(request.body)
            self.data += request.body if self.keep is None else request.body[: self.keep]
            self.checksum = request.headers.get("x-goog-hash")
        if refusal is not None:
            return refusal
        if total != "*" and len(self.data) == int(total):
            self.done = True
            body = {"name": "a", "size": total, "generation": "5"}
            said = json.dumps(body).encode() if self.last_word is None else self.last_word
            return Reply(body=said)
        return Reply(308, headers={"Range": f"bytes=0-{len(self.data) - 1}"} if self.data else {})


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def to_store(store: Store) -> Iterator[GcsFsspecBackend]:
    with OddHTTP(store) as server:
        backend = backend_of(server.url, options=OpenOptions(memory=9 * MIB))
        yield backend
        backend.close()


def test_ranges_of_an_upload(store: Store, to_store: GcsFsspecBackend) -> None:
    size = 9 * MIB + 1
    info = to_store.write("a", bytes_payload(b"x" * size))
    assert info.version == "5"
    assert store.done
    assert store.cancelled == 0
    chunk = 3 * MIB
    assert store.ranges == [
        *(f"{start}-{start + chunk - 1}/*" for start in range(0, 3 * chunk, chunk)),
        f"{3 * chunk}-{3 * chunk}/{size}",
    ]


def test_what_the_store_did_not_keep_is_sent_again(
    store: Store, to_store: GcsFsspecBackend
) -> None:
    data = os.urandom(9 * MIB + 5)
    store.keep = 2 * MIB
    to_store.write("a", bytes_payload(data))
    assert store.done
    assert store.data == data
    assert len(store.ranges) == 7


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.backends.gcs.upload._PAUSES", (0.01, 0.01, 0.01))


@pytest.mark.usefixtures("impatient")
def test_store_that_keeps_nothing_is_given_up(store: Store, to_store: GcsFsspecBackend) -> None:
    store.keep = 0
    with pytest.raises(TransientError, match="lost track"):
        to_store.write("a", bytes_payload(b"x" * 9 * MIB))
    assert len(store.ranges) == 4
    assert store.cancelled == 1


@pytest.mark.usefixtures("impatient")
def test_upload_that_fails_is_cancelled(store: Store, to_store: GcsFsspecBackend) -> None:
    store.refusals = {number: Reply(503) for number in range(2, 9)}
    with pytest.raises(TransientError) as caught:
        to_store.write("a", bytes_payload(b"x" * 9 * MIB))
    assert caught.value.throttled
    assert "secret" not in str(caught.value)
    assert (store.done, store.cancelled) == (False, 1)


def test_store_that_wants_to_be_left_alone_is(store: Store, to_store: GcsFsspecBackend) -> None:
    store.refusals = {2: Reply(503, headers={"Retry-After": "31"})}
    with pytest.raises(TransientError) as caught:
        to_store.write("a", bytes_payload(b"x" * 9 * MIB))
    assert caught.value.retry_after == 31
    assert (len(store.ranges), store.cancelled) == (2, 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "refusal",
    [Reply(500), Reply(408), Reply(308, b"x" * 99, cut=1), Reply(200, b"x" * 99, cut=1)],
    ids=["refused", "late", "answer lost", "answer of the end lost"],
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_upload_goes_on_where_the_store_has_it(
    number: int, refusal: Reply, store: Store, to_store: GcsFsspecBackend
) -> None:
    data = os.urandom(8 * MIB + 5)
    store.refusals = {number: refusal}
    info = to_store.write("a", bytes_payload(data))
    assert (store.done, store.cancelled, info.size) == (True, 0, len(data))
    assert store.data == data
    total = f"{len(data)}" if number == 3 else "*"
    assert store.ranges[number] == f"*/{total}"
    # The chunk that was not kept, and that alone, is sent twice.
    assert len(store.ranges) == (4 if refusal.cut else 5)


def test_checksum_of_the_object_goes_with_its_last_chunk(
    store: Store, to_store: GcsFsspecBackend
) -> None:
    data = os.urandom(8 * MIB + 5)
    to_store.write("a", bytes_payload(data))
    crc = hex_of("crc32c", data)
    assert store.checksum == "crc32c=" + base64.b64encode(bytes.fromhex(crc)).decode()


def hex_of(algorithm: str, data: bytes) -> str:
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return hasher.hexdigest()


@pytest.mark.parametrize("size", [5, 8 * MIB + 5], ids=["small", "large"])
@pytest.mark.parametrize(
    "said",
    [
        {"crc32c": "AAAAAA==", "md5Hash": "gnzLDuqKcGxMNKFokfhOeg=="},
        {"size": "4"},
        {"name": "b"},
        {"metadata": {"sha256": "other"}},
        {"metadata": {}},
        {"contentType": "text/html"},
    ],
    ids=lambda said: "-".join(said),
)
def test_what_arrived_otherwise_is_removed_and_nothing_newer(
    said: dict[str, Any], size: int, store: Store, to_store: GcsFsspecBackend
) -> None:
    described = {
        "name": "a",
        "size": str(size),
        "generation": "5",
        "metadata": {"sha256": "1"},
        **said,
    }
    store.last_word = json.dumps(described).encode()
    with pytest.raises(TransientError, match="damaged"):
        to_store.write("a", bytes_payload(bytes(size)), metadata={"sha256": "1"})
    assert store.removed == ["generation=5&ifGenerationMatch=5"]


def test_damaged_object_that_cannot_be_removed_is_told() -> None:
    def answer(request: Request) -> Reply:
        if request.method == "POST":
            return Reply(body=b'{"name": "a", "size": "4", "generation": "5"}')
        return Reply(403)

    with OddHTTP(answer) as server:
        backend = backend_of(server.url)
        with pytest.raises(IntegrityError, match="could not be removed"):
            backend.write("a", bytes_payload(b"12345"))
        backend.close()


@pytest.mark.parametrize("off", [1, -1], ids=["longer", "shorter"])
def test_payload_of_another_size_is_cancelled_before_its_end(
    store: Store, to_store: GcsFsspecBackend, off: int
) -> None:
    size = 9 * MIB
    with pytest.raises(IntegrityError):
        to_store.write("a", Payload(lambda: io.BytesIO(b"x" * (size + off)), size))
    assert (store.done, store.cancelled) == (False, 1)


def test_interrupted_upload_is_cancelled(store: Store, to_store: GcsFsspecBackend) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_store.write("a", bytes_payload(b"x" * 9 * MIB), on_bytes=interrupt)
    assert (store.done, store.cancelled) == (False, 1)


def test_upload_that_cannot_be_cancelled_keeps_its_first_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def put(url: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        raise TransientError("first", retry_after=60)

    def cancel(url: str) -> int:
        raise OSError("second")

    upload = ResumableUpload("gs://b/a", lambda: "http://h/s?upload_id=secret", put, cancel)
    with pytest.raises(TransientError, match="first"), upload:
        upload.send(b"1", last=True)
    assert "could not be cancelled" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"size": "3", "generation": "5"}'])
def test_end_of_an_upload_that_says_otherwise(
    body: bytes, store: Store, to_store: GcsFsspecBackend
) -> None:
    store.last_word = body
    with pytest.raises(TransientError):
        to_store.write("a", bytes_payload(b"x" * 9 * MIB))
