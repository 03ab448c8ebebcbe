"""The second driver of S3, s3fs: what is its own, beside the conformance suite."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.backends.base import (
    ByteRange,
    OpenOptions,
    Payload,
    bytes_payload,
)
from storage.backends.s3.fsspec import S3FsspecBackend
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    UnreachableError,
)
from tests.servers.moto import Moto
from tests.servers.process import HOST, free_port
from tests.servers.proxy import CountingProxy
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import Keys, S3Server
from tests.servers.seaweedfs import READABLE_KEY, SeaweedFS

MIB = 1024 * 1024


def backend_of(
    server: S3Server,
    bucket: str,
    keys: Keys | None = None,
    endpoint: str | None = None,
    options: OpenOptions | None = None,
    **own: Any,
) -> S3FsspecBackend:
    keys = keys or server.admin
    arguments = {
        "key": keys.access_key,
        "secret": keys.secret_key,
        "endpoint_url": endpoint or server.endpoint,
        "client_kwargs": {"region_name": server.region},
    }
    return S3FsspecBackend(bucket, arguments, options, **own)


def read(backend: S3FsspecBackend, key: str, *arguments: Any) -> bytes:
    with backend.read(key, *arguments) as body:
        return b"".join(bytes(piece) for piece in body)


@pytest.fixture
def seaweed(seaweedfs: SeaweedFS, shared_bucket: str) -> Iterator[S3FsspecBackend]:
    backend = backend_of(seaweedfs, shared_bucket)
    yield backend
    backend.close()


@pytest.fixture
def on_moto(moto: Moto, moto_shared_bucket: str) -> Iterator[S3FsspecBackend]:
    backend = backend_of(moto, moto_shared_bucket)
    yield backend
    backend.close()


# --- inert, forked, closed -----------------------------------------------------------------------


def test_construction_imports_no_sdk() -> None:
    script = (
        "import sys\n"
        "from storage.backends.s3.fsspec import S3FsspecBackend\n"
        "backend = S3FsspecBackend('b', {'endpoint_url': 'http://127.0.0.1:1'})\n"
        "backend.name, backend.capabilities\n"
        "found = {'s3fs', 'botocore', 'aiobotocore', 'fsspec', 'aiohttp'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_missing_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigurationError, match=r'pip install "modelstorage\[s3\]"'):
        S3FsspecBackend("b", {}).stat("a")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_makes_its_own_connections(seaweed: S3FsspecBackend, prefix: str) -> None:
    key = f"{prefix}/a"
    seaweed.write(key, bytes_payload(b"12345"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if read(seaweed, key) == b"12345" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert read(seaweed, key) == b"12345"


def test_close_can_be_repeated(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> None:
    backend = backend_of(seaweedfs, shared_bucket)
    backend.close()
    with pytest.raises(ModelMissingError):
        backend.stat(prefix)
    backend.close()
    backend.close()


def test_thread_that_copies_through_itself_does_not_wait_for_itself(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str
) -> None:
    backend = backend_of(seaweedfs, shared_bucket, options=OpenOptions(connections=1))
    backend.write(f"{prefix}/a", bytes_payload(b"x" * 3 * MIB))
    with backend.read(f"{prefix}/a") as body:
        first = bytes(next(iter(body)))
        backend.write(f"{prefix}/b", bytes_payload(first))
    assert backend.stat(f"{prefix}/b").size == len(first)
    backend.close()


# --- errors --------------------------------------------------------------------------------------


def _write(backend: S3FsspecBackend) -> object:
    return backend.write("a", bytes_payload(b"1"))


CALLS: dict[str, Callable[[S3FsspecBackend], object]] = {
    "stat": lambda backend: backend.stat("a"),
    "list": lambda backend: list(backend.list()),
    "read": lambda backend: read(backend, "a"),
    "write": _write,
    "delete": lambda backend: backend.delete(["a"]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "keys",
    [Keys("AKIDEXAMPLE", "WRONGSECRET"), Keys("AKIDNOBODY", "WRONGSECRET")],
    ids=["secret", "key"],
)
def test_wrong_credentials_are_refused_after_one_attempt(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    counting_proxy: Callable[[str], CountingProxy],
    call: Callable[[S3FsspecBackend], object],
    keys: Keys,
) -> None:
    proxy = counting_proxy(seaweedfs.endpoint)
    backend = backend_of(seaweedfs, shared_bucket, keys, proxy.endpoint)
    with pytest.raises(AuthenticationError) as caught:
        call(backend)
    assert proxy.count() == 1
    assert "WRONGSECRET" not in str(caught.value)
    assert "Signature=" not in str(caught.value)
    backend.close()


@pytest.mark.parametrize("call", [CALLS["stat"], CALLS["read"]], ids=["stat", "read"])
def test_missing_key_takes_one_attempt(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    counting_proxy: Callable[[str], CountingProxy],
    call: Callable[[S3FsspecBackend], object],
) -> None:
    proxy = counting_proxy(seaweedfs.endpoint)
    backend = backend_of(seaweedfs, shared_bucket, endpoint=proxy.endpoint)
    with pytest.raises(ModelMissingError):
        call(backend)
    assert proxy.count() == 1
    backend.close()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nobody_answers(call: Callable[[S3FsspecBackend], object]) -> None:
    endpoint = f"http://{HOST}:{free_port()}"
    backend = S3FsspecBackend(
        "b", {"key": "k", "secret": "HIDDEN", "endpoint_url": endpoint}, OpenOptions()
    )
    with pytest.raises(UnreachableError) as caught:
        call(backend)
    assert "HIDDEN" not in str(caught.value)
    assert "list-type" not in str(caught.value)


def test_no_credentials_at_all() -> None:
    endpoint = f"http://{HOST}:{free_port()}"
    with pytest.raises(AuthenticationError):
        S3FsspecBackend("b", {"endpoint_url": endpoint}).stat("a")


@pytest.mark.parametrize(
    "arguments",
    [
        {"endpoint_url": "nonsense", "key": "k", "secret": "s"},
        {"profile": "nobody"},
        {"client_kwargs": {"nonsense": 1}, "key": "k", "secret": "s"},
        {"config_kwargs": {"nonsense": 1}, "key": "k", "secret": "s"},
        {"nonsense": 1, "key": "k", "secret": "s"},
    ],
    ids=["endpoint", "profile", "client", "config", "argument"],
)
def test_unusable_settings(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        S3FsspecBackend("b", arguments).stat("a")


def test_exact_object_needs_no_permission_to_list(
    seaweedfs: SeaweedFS, readable_bucket: str
) -> None:
    seaweedfs.put_raw(readable_bucket, READABLE_KEY, b"12345")
    for keys in (seaweedfs.reader, seaweedfs.object_reader):
        backend = backend_of(seaweedfs, readable_bucket, keys)
        info = backend.stat(READABLE_KEY)
        assert read(backend, READABLE_KEY, None, info) == b"12345"
        with pytest.raises(AuthenticationError):
            list(backend.list())
        with pytest.raises(AuthenticationError):
            _write(backend)
        backend.close()


def test_unsigned_requests_read_a_public_bucket(seaweedfs: SeaweedFS, public_bucket: str) -> None:
    seaweedfs.put_raw(public_bucket, "m/a", b"12345")
    backend = S3FsspecBackend(public_bucket, {"anon": True, "endpoint_url": seaweedfs.endpoint})
    assert [info.key for info in backend.list("m/")] == ["m/a"]
    assert read(backend, "m/a") == b"12345"
    backend.close()


def test_store_that_ignores_pins_is_noticed(rclone_s3: RcloneS3, rclone_bucket: str) -> None:
    backend = backend_of(rclone_s3, rclone_bucket)
    info = backend.write("a", bytes_payload(b"12345"))
    assert read(backend, "a", ByteRange(1, 3), info) == b"23"
    rclone_s3.put_raw(rclone_bucket, "a", b"67890")
    with pytest.raises(ObjectChangedError):
        read(backend, "a", ByteRange(1, 3), info)
    backend.close()


# --- versions, digests, encryption ---------------------------------------------------------------


@pytest.fixture
def versioned(moto: Moto, moto_bucket: str) -> Iterator[S3FsspecBackend]:
    moto.raw.put_bucket_versioning(
        Bucket=moto_bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    backend = backend_of(moto, moto_bucket)
    yield backend
    backend.close()


def test_old_version_is_read_copied_and_told_apart(versioned: S3FsspecBackend) -> None:
    first = versioned.write("a", bytes_payload(b"1"))
    second = versioned.write("a", bytes_payload(b"22"))
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


def test_deleted_object_is_missing_and_its_version_is_not(versioned: S3FsspecBackend) -> None:
    first = versioned.write("a", bytes_payload(b"1"))
    versioned.delete(["a"])
    with pytest.raises(ModelMissingError):
        versioned.stat("a")
    with pytest.raises(ModelMissingError):
        read(versioned, "a")
    assert list(versioned.list()) == []
    assert versioned.stat("a", first.version).size == 1


def test_delete_marker_is_no_version(versioned: S3FsspecBackend, moto: Moto) -> None:
    versioned.write("a", bytes_payload(b"1"))
    bucket = versioned.filesystem()[1]
    marker = moto.raw.delete_object(Bucket=bucket, Key="a")["VersionId"]
    with pytest.raises(ModelMissingError):
        versioned.stat("a", marker)


def test_reader_without_the_permission_for_versions_reads_by_entity_tag(
    versioned: S3FsspecBackend, moto: Moto
) -> None:
    info = versioned.write("a", bytes_payload(b"12345"))

    def refuse(number: int, method: str, path: str) -> int | None:
        return 403 if "versionId=" in path else None

    with CountingProxy(moto.endpoint, refuse) as proxy:
        backend = backend_of(moto, versioned.filesystem()[1], endpoint=proxy.endpoint)
        assert read(backend, "a", ByteRange(1, 3), info) == b"23"
        versioned.write("a", bytes_payload(b"67890"))
        with pytest.raises(ObjectChangedError):
            read(backend, "a", ByteRange(1, 3), info)
        backend.close()


def test_store_that_ignores_versions_has_no_such_version(
    seaweed: S3FsspecBackend, prefix: str
) -> None:
    info = seaweed.write(f"{prefix}/a", bytes_payload(b"1"))
    assert info.version is None
    with pytest.raises(ModelMissingError, match="no version 123"):
        seaweed.stat(f"{prefix}/a", "123")


def test_checksum_that_the_store_keeps_is_a_digest(
    moto: Moto, on_moto: S3FsspecBackend, moto_shared_bucket: str, prefix: str
) -> None:
    data = b"12345"
    moto.raw.put_object(
        Bucket=moto_shared_bucket, Key=f"{prefix}/a", Body=data, ChecksumAlgorithm="SHA256"
    )
    assert on_moto.stat(f"{prefix}/a").digests == (
        Digest("sha256", hashlib.sha256(data).hexdigest()),
    )


def test_simple_entity_tag_is_a_hint(seaweed: S3FsspecBackend, prefix: str) -> None:
    key = f"{prefix}/a"
    written = seaweed.write(key, bytes_payload(b"12345"))
    md5 = Digest("md5", hashlib.md5(b"12345").hexdigest())
    [listed] = seaweed.list(f"{prefix}/")
    for info in (written, listed, seaweed.stat(key)):
        assert info.hint == md5
        assert info.etag == f'"{md5.hex}"'
        assert seaweed.is_digest(info)


def test_entity_tag_of_parts_is_no_hint(seaweed: S3FsspecBackend, prefix: str) -> None:
    info = seaweed.write(f"{prefix}/a", bytes_payload(b"x" * 17 * MIB))
    assert info.hint is None
    assert info.etag == seaweed.stat(f"{prefix}/a").etag


def test_entity_tag_of_an_object_with_a_key_of_the_user_is_no_digest(
    moto: Moto, on_moto: S3FsspecBackend, moto_shared_bucket: str, prefix: str
) -> None:
    key = f"{prefix}/a"
    moto.raw.put_object(
        Bucket=moto_shared_bucket, Key=key, Body=b"12345", ServerSideEncryption="aws:kms"
    )
    assert not on_moto.is_digest(on_moto.stat(key))


# --- writing -------------------------------------------------------------------------------------


class Interrupted(io.BytesIO):
    """A stream during which somebody presses Ctrl-C."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 40 * MIB:
            raise KeyboardInterrupt
        return super().read(size)


@pytest.mark.parametrize("size", [64 * MIB, None], ids=["known-size", "unknown-size"])
def test_interrupted_upload_leaves_nothing(
    seaweedfs: SeaweedFS, seaweedfs_bucket: str, size: int | None
) -> None:
    backend = backend_of(seaweedfs, seaweedfs_bucket)
    data = bytes(64 * MIB)
    with pytest.raises(KeyboardInterrupt):
        backend.write("a", Payload(lambda: Interrupted(data), size))
    assert seaweedfs.pending_uploads(seaweedfs_bucket) == []
    assert seaweedfs.keys_raw(seaweedfs_bucket) == []
    backend.close()


def test_upload_whose_part_is_refused_leaves_nothing(
    seaweedfs: SeaweedFS, seaweedfs_bucket: str
) -> None:
    def refuse(number: int, method: str, path: str) -> int | None:
        return 403 if "partNumber=2" in path else None

    with CountingProxy(seaweedfs.endpoint, refuse) as proxy:
        backend = backend_of(seaweedfs, seaweedfs_bucket, endpoint=proxy.endpoint)
        with pytest.raises(AuthenticationError):
            backend.write("a", bytes_payload(bytes(64 * MIB)))
        assert sum("partNumber=2" in request.path for request in proxy.requests) == 1
        backend.close()
    assert seaweedfs.pending_uploads(seaweedfs_bucket) == []
    assert seaweedfs.keys_raw(seaweedfs_bucket) == []


@pytest.mark.parametrize("size", [5, 17 * MIB], ids=["one-request", "parts"])
def test_conditions_hold_for_small_and_large(
    seaweed: S3FsspecBackend, prefix: str, size: int
) -> None:
    key, data = f"{prefix}/a", bytes_payload(bytes(size))
    first = seaweed.write(key, data, if_absent=True)
    with pytest.raises(ObjectExistsError):
        seaweed.write(key, data, if_absent=True)
    other = seaweed.write(key, bytes_payload(b"other"), if_match=first)
    with pytest.raises(ObjectChangedError):
        seaweed.write(key, data, if_match=first)
    assert seaweed.write(key, data, if_match=other).size == size


def test_few_bytes_of_memory_are_enough_for_a_large_upload(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str
) -> None:
    backend = backend_of(seaweedfs, shared_bucket, options=OpenOptions(memory=MIB, connections=2))
    data = os.urandom(23 * MIB + 5)
    counts: list[int] = []
    info = backend.write(f"{prefix}/a", bytes_payload(data), on_bytes=counts.append)
    assert (info.size, sum(counts), len(counts)) == (len(data), len(data), 5)
    assert seaweedfs.get_raw(shared_bucket, f"{prefix}/a") == data
    backend.close()


def test_large_copy_goes_in_parts_and_keeps_what_belongs_to_the_object(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str
) -> None:
    backend = backend_of(seaweedfs, shared_bucket, copy_limit=6 * MIB)
    data = os.urandom(14 * MIB + 3)
    metadata = {"owner": "me", "sha256": hashlib.sha256(data).hexdigest()}
    source, target = f"{prefix}/a b+%41", f"{prefix}/b #1"
    backend.write(source, bytes_payload(data), metadata=metadata, content_type="text/x-model")
    backend.copy(source, target)
    assert seaweedfs.get_raw(shared_bucket, target) == data
    info = backend.stat(target)
    assert info.etag is not None
    assert info.etag.endswith('-3"')
    assert (info.metadata["owner"], info.content_type) == ("me", "text/x-model")
    assert info.digests == (Digest("sha256", metadata["sha256"]),)
    pending = seaweedfs.pending_uploads(shared_bucket)
    assert [key for key, _ in pending if key.startswith(prefix)] == []
    backend.close()


def test_copy_onto_itself_changes_nothing(seaweed: S3FsspecBackend, prefix: str) -> None:
    key = f"{prefix}/a"
    before = seaweed.write(key, bytes_payload(b"1"), metadata={"owner": "me"})
    seaweed.copy(key, key)
    assert (seaweed.stat(key).etag, seaweed.stat(key).metadata) == (before.etag, {"owner": "me"})
    with pytest.raises(ModelMissingError):
        seaweed.copy(f"{prefix}/none", f"{prefix}/none")


def test_metadata_that_no_header_can_hold_is_refused(seaweed: S3FsspecBackend, prefix: str) -> None:
    with pytest.raises(InvalidInput):
        seaweed.write(f"{prefix}/a", bytes_payload(b"1"), metadata={"owner": "modèle"})


@pytest.mark.parametrize("letter", ["\x01", "\x1f", "\r"], ids=["01", "1f", "return"])
def test_key_that_xml_cannot_hold_is_deleted(
    on_moto: S3FsspecBackend, prefix: str, letter: str
) -> None:
    keys = [f"{prefix}/a", f"{prefix}/b{letter}c"]
    for key in keys:
        on_moto.write(key, bytes_payload(b"1"))
    assert sorted(info.key for info in on_moto.list(f"{prefix}/")) == keys
    on_moto.delete(keys)
    assert list(on_moto.list(f"{prefix}/")) == []


# --- URLs ----------------------------------------------------------------------------------------


def test_signed_urls_read_and_write_without_credentials(
    seaweed: S3FsspecBackend, prefix: str
) -> None:
    key = f"{prefix}/a b+%41#1"
    url = seaweed.sign(key, "PUT", 60)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url
    request = urllib.request.Request(url, b"12345", method="PUT")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(seaweed.sign(key, "get", 60), timeout=60) as answer:
        assert answer.read() == b"12345"


def test_url_is_signed_for_an_object_and_a_known_method(seaweed: S3FsspecBackend) -> None:
    with pytest.raises(InvalidInput, match="PATCH"):
        seaweed.sign("a", "PATCH", 60)
    with pytest.raises(InvalidInput):
        seaweed.sign("", "GET", 60)


def test_filesystem_is_an_ordinary_s3fs(seaweed: S3FsspecBackend, prefix: str) -> None:
    from s3fs import S3FileSystem

    files, root = seaweed.filesystem()
    assert isinstance(files, S3FileSystem)
    assert files.retries > 1
    files.pipe_file(f"{root}/{prefix}/a", b"1")
    assert read(seaweed, f"{prefix}/a") == b"1"
