"""The second driver of GCS, gcsfs: what is its own, beside the conformance suite."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.backends.base import ByteRange, ObjectInfo, OpenOptions, Payload, bytes_payload
from storage.backends.gcs.fsspec import GcsFsspecBackend
from storage.backends.gcs.upload import chunk_size
from storage.errors import (
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from tests.servers import CountingProxy, FakeGCS
from tests.servers.odd_http import OddHTTP, Reply, Request

MIB = 1024 * 1024
KIB_256 = 256 * 1024


def backend_of(
    endpoint: str, bucket: str = "bucket", options: OpenOptions | None = None, **own: Any
) -> GcsFsspecBackend:
    arguments = {"token": "anon", "endpoint_url": endpoint}
    return GcsFsspecBackend(bucket, arguments, options, **own)


def read(backend: GcsFsspecBackend, key: str, *arguments: Any) -> bytes:
    with backend.read(key, *arguments) as body:
        return b"".join(bytes(piece) for piece in body)


@pytest.fixture
def backend(gcs_server: FakeGCS, gcs_bucket: str) -> Iterator[GcsFsspecBackend]:
    backend = backend_of(gcs_server.endpoint, gcs_bucket)
    yield backend
    backend.close()


# --- inert, forked, closed -----------------------------------------------------------------------


def test_construction_imports_no_sdk() -> None:
    script = (
        "import sys\n"
        "from storage.backends.gcs.fsspec import GcsFsspecBackend\n"
        "backend = GcsFsspecBackend('b', {'endpoint_url': 'http://127.0.0.1:1'})\n"
        "backend.name, backend.capabilities\n"
        "found = {'gcsfs', 'google', 'fsspec', 'aiohttp', 'requests'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_missing_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(ConfigurationError, match=r'pip install "modelstorage\[gcs\]"'):
        backend_of("http://127.0.0.1:1").stat("a")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_makes_its_own_connections(backend: GcsFsspecBackend) -> None:
    backend.write("a", bytes_payload(b"12345"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if read(backend, "a") == b"12345" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert read(backend, "a") == b"12345"


def test_close_can_be_repeated(gcs_server: FakeGCS, gcs_bucket: str) -> None:
    backend = backend_of(gcs_server.endpoint, gcs_bucket)
    backend.close()
    with pytest.raises(ModelMissingError):
        backend.stat("none")
    backend.close()
    backend.close()


def test_file_system_is_the_plain_one(
    backend: GcsFsspecBackend, gcs_server: FakeGCS, gcs_bucket: str
) -> None:
    import gcsfs.core
    import pandas

    gcs_server.put_raw(gcs_bucket, "t/a.csv", b"x,y\n1,2\n3,4\n")
    files, root = backend.filesystem()
    # Not the subclass that asks for the kind of each bucket by gRPC.
    assert type(files) is gcsfs.core.GCSFileSystem
    assert files.ls(f"{root}/t") == [f"{gcs_bucket}/t/a.csv"]
    with files.open(f"{root}/t/a.csv") as file:
        table = pandas.read_csv(file)
    assert table.y.tolist() == [2, 4]


def test_unusable_settings() -> None:
    for arguments in ({"endpoint_url": "nonsense", "token": "anon"}, {"access": "nonsense"}):
        with pytest.raises(ConfigurationError):
            GcsFsspecBackend("bucket", arguments).stat("a")


# --- generations ---------------------------------------------------------------------------------


@pytest.fixture
def versioned(gcs_server: FakeGCS) -> Iterator[GcsFsspecBackend]:
    with gcs_server.bucket("versioned", versioning=True) as bucket:
        backend = backend_of(gcs_server.endpoint, bucket)
        yield backend
        backend.close()


def test_old_generation_is_read_copied_and_told_apart(versioned: GcsFsspecBackend) -> None:
    first = versioned.write("a", bytes_payload(b"1"))
    second = versioned.write("a", bytes_payload(b"22"))
    assert first.version
    assert first.version != second.version
    assert versioned.stat("a").version == second.version
    old = versioned.stat("a", first.version)
    assert (old.size, old.version) == (1, first.version)
    assert read(versioned, "a", None, old) == b"1"
    assert read(versioned, "a", None, versioned.stat("a")) == b"22"
    versioned.copy("a", "b", version=first.version)
    assert read(versioned, "b") == b"1"
    versioned.copy("a", "a", version=first.version)
    assert read(versioned, "a") == b"1"


def test_replaced_object_is_changed_and_a_deleted_one_missing(
    backend: GcsFsspecBackend,
) -> None:
    info = backend.write("a", bytes_payload(b"12345"))
    backend.write("a", bytes_payload(b"67890"))
    with pytest.raises(ObjectChangedError, match="was replaced"):
        read(backend, "a", ByteRange(1, 3), info)
    backend.delete(["a"])
    with pytest.raises(ModelMissingError):
        read(backend, "a", ByteRange(1, 3), info)


@pytest.mark.parametrize("version", ["nonsense", "-1", "1", "٣"])
def test_generation_that_cannot_be_one_is_missing(backend: GcsFsspecBackend, version: str) -> None:
    backend.write("a", bytes_payload(b"1"))
    with pytest.raises(ModelMissingError):
        backend.stat("a", version)


def test_condition_by_entity_tag_alone_finds_the_generation(backend: GcsFsspecBackend) -> None:
    backend.write("a", bytes_payload(b"1"))
    with backend.read("a") as body:
        tagged = ObjectInfo("a", 1, body.info.etag)
    assert tagged.etag
    backend.write("a", bytes_payload(b"22"), if_match=tagged)
    assert read(backend, "a") == b"22"
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(b"333"), if_match=tagged)
    backend.delete(["a"])
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(b"333"), if_match=tagged)
    with pytest.raises(InvalidInput):
        backend.write("a", bytes_payload(b"333"), if_match=ObjectInfo("a", 1))


def test_checksums_of_the_store_are_digests_after_our_own(backend: GcsFsspecBackend) -> None:
    wanted = ["md5:827ccb0eea8a706c4c34a16891f84e7b", "crc32c:18d12335"]
    digest = "a" * 64
    written = backend.write("a", bytes_payload(b"12345"), metadata={"sha256": digest})
    [listed] = backend.list()
    with backend.read("a") as body:
        answered = body.info
    for info in (backend.stat("a"), listed, answered):
        assert [str(found) for found in info.digests] == [f"sha256:{digest}", *wanted]
    assert [str(found) for found in written.digests] == [f"sha256:{digest}", *wanted]


# --- copies --------------------------------------------------------------------------------------


def test_copy_from_another_bucket(backend: GcsFsspecBackend, gcs_server: FakeGCS) -> None:
    with gcs_server.bucket("other-bucket") as other:
        gcs_server.put_raw(other, "m/a#1", b"12345", "text/x-model")
        backend.copy("m/a#1", "m/a#1", bucket=other)
        info = backend.stat("m/a#1")
        assert (info.size, info.content_type) == (5, "text/x-model")
        with pytest.raises(ModelMissingError):
            backend.copy("none", "b", bucket=other)
    with pytest.raises(ModelMissingError):
        backend.copy("m/a", "b", bucket="no-such-bucket")


def test_copy_in_several_steps() -> None:
    tokens: list[str] = []

    def answer(request: Request) -> Reply:
        if request.method == "GET":
            return Reply(body=b'{"name": "a", "size": "9", "generation": "7"}')
        assert request.path == "/storage/v1/b/bucket/o/a/rewriteTo/b/bucket/o/b%2Fc"
        assert "sourceGeneration=7" in request.target
        tokens.append(request.target.partition("rewriteToken=")[2])
        done = len(tokens) == 3
        more = {} if done else {"rewriteToken": f"next/{len(tokens)}"}
        return Reply(body=json.dumps({"done": done, **more}).encode())

    with OddHTTP(answer) as server:
        backend = backend_of(server.url)
        backend.copy("a", "b/c")
        backend.close()
    assert tokens == ["", "next%2F1", "next%2F2"]


def test_object_that_is_replaced_before_its_copy_is_copied_again() -> None:
    generations = iter((7, 8, 8, 7))

    def answer(request: Request) -> Reply:
        if request.method == "GET":
            info = {"name": "a", "size": "9", "generation": str(next(generations))}
            return Reply(body=json.dumps(info).encode())
        if "sourceGeneration=8" in request.target:
            return Reply(body=b'{"done": true}')
        return Reply(404, b'{"error": {"code": 404, "message": "No such object: bucket/a"}}')

    with OddHTTP(answer) as server:
        backend = backend_of(server.url)
        with pytest.raises(TransientError, match="replaced"):
            backend.copy("a", "b")
        backend.copy("a", "b")
        with pytest.raises(ModelMissingError):
            backend.copy("a", "b", version="7")
        backend.close()


# --- uploads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, MIB, 10 * MIB, 128 * MIB, 10**12])
def test_chunks_are_whole_steps_within_memory(memory: int) -> None:
    size = chunk_size(memory)
    assert size % KIB_256 == 0
    assert KIB_256 <= size <= 16 * MIB
    assert 3 * size <= max(memory, 3 * KIB_256)


@pytest.mark.parametrize("known", [True, False], ids=["known-size", "unknown-size"])
@pytest.mark.parametrize("size", [9 * MIB, 9 * MIB + 1], ids=["whole-chunks", "a-byte-more"])
def test_large_object_goes_up_in_chunks(
    gcs_server: FakeGCS, gcs_bucket: str, known: bool, size: int
) -> None:
    data = os.urandom(size)
    backend = backend_of(gcs_server.endpoint, gcs_bucket, OpenOptions(memory=3 * MIB))
    counts: list[int] = []
    payload = Payload(lambda: io.BytesIO(data), size if known else None)
    info = backend.write("m/a", payload, metadata={"owner": "me"}, on_bytes=counts.append)
    backend.close()
    assert gcs_server.get_raw(gcs_bucket, "m/a") == data
    head = gcs_server.head_raw(gcs_bucket, "m/a")
    assert head["metadata"] == {"owner": "me"}
    assert (info.size, info.version) == (size, head["generation"])
    assert counts == [MIB] * 9 + [1] * (size - 9 * MIB)


def test_small_object_is_one_request(
    gcs_server: FakeGCS, gcs_bucket: str, counting_proxy: Callable[[str], CountingProxy]
) -> None:
    proxy = counting_proxy(gcs_server.endpoint)
    backend = backend_of(proxy.endpoint, gcs_bucket)
    for key, data in (("a", b""), ("b", b"1"), ("c", b"x" * 8 * MIB)):
        backend.write(key, bytes_payload(data), content_type="text/x-model")
    backend.close()
    assert [request.method for request in proxy.requests] == ["POST"] * 3
    assert gcs_server.head_raw(gcs_bucket, "c")["contentType"] == "text/x-model"


def test_store_is_told_what_the_bytes_have_to_be() -> None:
    with OddHTTP(lambda request: Reply(body=b'{"size": "5", "generation": "7"}')) as server:
        backend = backend_of(server.url)
        backend.write("a", bytes_payload(b"12345"))
        backend.close()
        [request] = server.requests
    # Base64 of the MD5.
    assert b'"md5Hash": "gnzLDuqKcGxMNKFokfhOew=="' in request.body


def test_store_without_resumable_uploads_is_told() -> None:
    with OddHTTP(lambda request: Reply()) as server:
        backend = backend_of(server.url)
        with pytest.raises(StorageError, match="resumable"):
            backend.write("a", bytes_payload(b"x" * 9 * MIB))
        backend.close()


@pytest.mark.parametrize("size", [5, 9 * MIB], ids=["small", "large"])
def test_conditions_are_sent_whatever_the_size(size: int) -> None:
    targets: list[str] = []

    def answer(request: Request) -> Reply:
        targets.append(request.target)
        return Reply(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')

    with OddHTTP(answer) as server:
        backend = backend_of(server.url)
        with pytest.raises(ObjectExistsError):
            backend.write("a", bytes_payload(b"x" * size), if_absent=True)
        info = ObjectInfo("a", 1, version="77")
        with pytest.raises(ObjectChangedError):
            backend.write("a", bytes_payload(b"x" * size), if_match=info)
        backend.close()
    assert len(targets) == 2
    assert "ifGenerationMatch=0" in targets[0]
    assert "ifGenerationMatch=77" in targets[1]


def test_write_to_no_bucket() -> None:
    with OddHTTP(lambda request: Reply(404)) as server:
        backend = backend_of(server.url)
        for size in (5, 9 * MIB):
            with pytest.raises(BucketMissingError):
                backend.write("a", bytes_payload(b"x" * size))
        backend.close()


def test_delete_of_many_tells_the_one_that_failed(gcs_server: FakeGCS, gcs_bucket: str) -> None:
    keys = [f"m/{number}" for number in range(40)]
    for key in keys:
        gcs_server.put_raw(gcs_bucket, key, b"1")

    def refuse(number: int, method: str, path: str) -> int | None:
        return 403 if path.endswith("%2F7") else None

    with CountingProxy(gcs_server.endpoint, refuse) as proxy:
        backend = backend_of(proxy.endpoint, gcs_bucket)
        with pytest.raises(StorageError, match="m/7"):
            backend.delete(keys)
        backend.close()
    assert gcs_server.keys_raw(gcs_bucket) == ["m/7"]
