"""The checksums that S3 keeps are told, and what is sent to it arrives or is noticed."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from storage import Storage
from storage.backends import open_backend
from storage.backends.base import Backend, ByteRange, ObjectInfo, OpenOptions, bytes_payload
from storage.backends.network import Network
from storage.backends.s3.answers import encrypted, stored_digests
from storage.backends.s3.backend import obstore_arguments
from storage.backends.s3.signed import SignedClient
from storage.config import S3Config
from storage.digest import Digest, new_hasher
from storage.errors import (
    IntegrityError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
)
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request, Script
from storage.uri import parse_uri
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.moto import Moto
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import S3Server
from tests.servers.seaweedfs import SeaweedFS

MIB = 1024 * 1024
SMALL = b"weights" * 1000
LARGE = bytes(range(256)) * (4096 * 12)  # 12 MiB
# Small enough for parts of 5 MiB by s3fs; those of obstore have 8.
OPTIONS = OpenOptions(connections=4, stall_timeout=60.0, memory=40 * MIB)


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["seaweedfs", "moto"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> str:
    shared = "shared_bucket" if isinstance(server, SeaweedFS) else "moto_shared_bucket"
    name: str = request.getfixturevalue(shared)
    return name


@contextmanager
def opened(
    server: S3Server, bucket: str, driver: Any, endpoint: str | None = None, **config: Any
) -> Iterator[Backend]:
    keys = (server.access_key, server.secret_key)
    config = {"endpoint_url": endpoint or server.endpoint, "driver": driver, **config}
    with closing(
        open_backend(parse_uri(f"s3://{bucket}/"), S3Config(*keys, **config), OPTIONS)
    ) as backend:
        yield backend


def digest_of(algorithm: str, data: bytes) -> Digest:
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return Digest(algorithm, hasher.hexdigest())


def listed(backend: Backend, prefix: str) -> ObjectInfo:
    (info,) = backend.list(f"{prefix}/")
    return info


def put(server: S3Server, bucket: str, key: str, algorithm: str, **arguments: Any) -> None:
    """Store a small object with a checksum that boto3 computes, unless one is given."""
    arguments = {"ChecksumAlgorithm": algorithm.upper(), "Body": SMALL, **arguments}
    server.raw.put_object(Bucket=bucket, Key=key, **arguments)


def put_parts(server: S3Server, bucket: str, key: str, algorithm: str, kind: str) -> None:
    """Store 5 MiB and a byte in two parts."""
    where = {"Bucket": bucket, "Key": key}
    algorithm = algorithm.upper()
    begun = server.raw.create_multipart_upload(
        ChecksumAlgorithm=algorithm, ChecksumType=kind, **where
    )
    where["UploadId"] = begun["UploadId"]
    parts = []
    for number, data in enumerate((LARGE[: 5 * MIB], b"x"), start=1):
        answer = server.raw.upload_part(
            PartNumber=number, Body=data, ChecksumAlgorithm=algorithm, **where
        )
        names = ("ETag", f"Checksum{algorithm}")
        parts.append({"PartNumber": number, **{name: answer[name] for name in names}})
    server.raw.complete_multipart_upload(
        MultipartUpload={"Parts": parts}, ChecksumType=kind, **where
    )


# --- what the store keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme", "sha256", "sha1"])
def test_checksum_that_the_store_keeps_is_told(
    server: S3Server, bucket: str, prefix: str, driver: Any, algorithm: str
) -> None:
    put(server, bucket, f"{prefix}/ä +b", algorithm)
    with opened(server, bucket, driver) as backend:
        assert backend.capabilities.checksums
        info = listed(backend, prefix)
        assert info.digests == ()
        assert backend.checksums(info) == (digest_of(algorithm, SMALL),)


def test_checksum_of_a_kind_that_is_not_computed_is_left_out(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    put(server, bucket, f"{prefix}/a", "crc32")
    with opened(server, bucket, driver) as backend:
        assert backend.checksums(listed(backend, prefix)) == ()


def test_checksum_of_a_whole_object_in_parts_is_told(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    put_parts(server, bucket, f"{prefix}/a", "crc64nvme", "FULL_OBJECT")
    with opened(server, bucket, driver) as backend:
        expected = digest_of("crc64nvme", LARGE[: 5 * MIB] + b"x")
        assert backend.checksums(listed(backend, prefix)) == (expected,)


def test_checksum_of_checksums_is_not_taken_for_one_of_the_content(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    put_parts(server, bucket, f"{prefix}/a", "sha256", "COMPOSITE")
    with opened(server, bucket, driver) as backend:
        assert backend.checksums(listed(backend, prefix)) == ()
        assert backend.stat(f"{prefix}/a").digests == ()


def test_checksum_of_what_has_replaced_the_object_is_not_told(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    key = f"{prefix}/a"
    put(server, bucket, key, "crc64nvme")
    with opened(server, bucket, driver) as backend:
        info = listed(backend, prefix)
        put(server, bucket, key, "crc64nvme", Body=b"others")
        assert backend.checksums(info) == ()
        server.delete_raw(bucket, key)
        assert backend.checksums(info) == ()


def test_checksum_of_a_version_is_told(moto: Moto, moto_bucket: str, driver: Any) -> None:
    versioning = {"Status": "Enabled"}
    moto.raw.put_bucket_versioning(Bucket=moto_bucket, VersioningConfiguration=versioning)
    put(moto, moto_bucket, "a", "crc64nvme")
    with opened(moto, moto_bucket, driver) as backend:
        info = backend.stat("a")
        put(moto, moto_bucket, "a", "crc64nvme", Body=b"newer")
        assert backend.checksums(info) == (digest_of("crc64nvme", SMALL),)


def test_checksum_of_a_public_object_is_told_without_credentials(
    seaweedfs: SeaweedFS, public_bucket: str, prefix: str, driver: Any
) -> None:
    put(seaweedfs, public_bucket, f"{prefix}/a", "crc64nvme")
    config = S3Config(endpoint_url=seaweedfs.endpoint, anonymous=True, driver=driver)
    uri = parse_uri(f"s3://{public_bucket}/")
    with closing(open_backend(uri, config, OPTIONS)) as backend:
        expected = (digest_of("crc64nvme", SMALL),)
        assert backend.checksums(listed(backend, prefix)) == expected


def test_checksum_needs_no_second_request_of_s3fs(
    server: S3Server, bucket: str, prefix: str
) -> None:
    put(server, bucket, f"{prefix}/a", "crc32c")
    with opened(server, bucket, "fsspec") as backend:
        assert backend.stat(f"{prefix}/a").digests == (digest_of("crc32c", SMALL),)


@pytest.mark.parametrize(
    "answer",
    [
        {"ETag": '"abc-2"', "ChecksumSHA256": base64.b64encode(b"x" * 32).decode()},
        {"ETag": '"abc"', "ChecksumSHA256": "xVGK2Q==-2"},
        {"ETag": '"abc"', "ChecksumSHA256": "not base64!"},
        {"ETag": '"abc"', "ChecksumSHA256": base64.b64encode(b"short").decode()},
        {"etag": '"abc"', "x-amz-checksum-type": "COMPOSITE", "x-amz-checksum-crc32c": "AAAAAA=="},
    ],
)
def test_checksum_that_may_be_of_something_else_is_none(answer: dict[str, str]) -> None:
    assert stored_digests(answer) == ()


@pytest.mark.parametrize("kind", ["aws:kms", "aws:kms:dsse"])
def test_etag_of_an_encrypted_object_is_no_digest(kind: str) -> None:
    assert encrypted({"x-amz-server-side-encryption": kind})
    assert encrypted({"ServerSideEncryption": kind})
    assert encrypted({"SSECustomerAlgorithm": "AES256"})
    assert not encrypted({"x-amz-server-side-encryption": "AES256"})


def test_hint_of_an_encrypted_object_is_told_apart(
    moto: Moto, moto_shared_bucket: str, prefix: str, driver: Any
) -> None:
    put(moto, moto_shared_bucket, f"{prefix}/kms/a", "sha256", ServerSideEncryption="aws:kms")
    put(moto, moto_shared_bucket, f"{prefix}/plain/a", "sha256")
    with opened(moto, moto_shared_bucket, driver) as backend:
        assert not backend.is_digest(listed(backend, f"{prefix}/kms"))
        assert backend.is_digest(listed(backend, f"{prefix}/plain"))


@pytest.mark.parametrize(
    ("config", "url"),
    [
        ({}, "https://bucket.s3.us-east-1.amazonaws.com/a%20b/%C3%A9?versionId=1"),
        (
            {"addressing_style": "path", "region": "eu-west-1"},
            "https://s3.eu-west-1.amazonaws.com/bucket/a%20b/%C3%A9?versionId=1",
        ),
        ({"endpoint_url": "http://h:9000"}, "http://h:9000/bucket/a%20b/%C3%A9?versionId=1"),
        (
            {"endpoint_url": "https://h", "addressing_style": "virtual"},
            "https://bucket.h/a%20b/%C3%A9?versionId=1",
        ),
        (
            {"use_accelerate": True, "addressing_style": "virtual"},
            "https://bucket.s3-accelerate.amazonaws.com/a%20b/%C3%A9?versionId=1",
        ),
    ],
)
def test_address_is_that_of_obstore(config: dict[str, Any], url: str) -> None:
    arguments = obstore_arguments("bucket", S3Config("AK", "SK", **config), OPTIONS)
    client = SignedClient("bucket", arguments, Network(), OPTIONS)
    assert client.url("a b/é", {"versionId": "1"}) == url


def test_download_of_what_the_store_says_is_something_else_publishes_nothing(
    moto: Moto, moto_shared_bucket: str, prefix: str, driver: Any, tmp_path: Path
) -> None:
    # moto gives an object in parts a CRC32C that is none of its content.
    put_parts(moto, moto_shared_bucket, f"{prefix}/wrong", "crc32c", "FULL_OBJECT")
    put_parts(moto, moto_shared_bucket, f"{prefix}/right", "crc64nvme", "FULL_OBJECT")
    config = S3Config(moto.access_key, moto.secret_key, endpoint_url=moto.endpoint, driver=driver)
    uri = f"s3://{moto_shared_bucket}/{prefix}"
    with pytest.raises(IntegrityError, match="the store says crc32c"):
        Storage.download(f"{uri}/wrong", tmp_path / "wrong", config=config)
    assert list(tmp_path.iterdir()) == []
    Storage.download(f"{uri}/right", tmp_path / "right", config=config)
    assert (tmp_path / "right").stat().st_size == 5 * MIB + 1


# --- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sha256", "crc64nvme"])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one-request", "parts"])
def test_checksum_goes_with_an_upload(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Any, way: str, data: bytes
) -> None:
    key = f"{prefix}/a"
    with opened(seaweedfs, shared_bucket, driver, upload_checksum=way) as backend:
        backend.write(key, bytes_payload(data))
        checksums = backend.checksums(backend.stat(key))
    head = seaweedfs.raw.head_object(Bucket=shared_bucket, Key=key, ChecksumMode="ENABLED")
    assert f"Checksum{way.upper()}" in head
    # In parts, a SHA-256 is one of the parts' own.
    whole = way == "crc64nvme" or data is SMALL
    assert checksums == ((digest_of(way, data),) if whole else ())


@pytest.mark.parametrize("way", ["md5", "off"])
def test_no_checksum_goes_with_an_upload_if_the_config_says_so(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Any, way: str
) -> None:
    with opened(seaweedfs, shared_bucket, driver, upload_checksum=way) as backend:
        for name, data in (("small", SMALL), ("large", LARGE)):
            key = f"{prefix}/{name}"
            backend.write(key, bytes_payload(data))
            assert seaweedfs.get_raw(shared_bucket, key) == data
            assert backend.checksums(backend.stat(key)) == ()


@pytest.mark.parametrize("way", ["auto", "sha256", "crc64nvme", "md5", "off"])
def test_upload_to_a_store_that_knows_no_checksums_works(
    rclone_s3: RcloneS3, rclone_bucket: str, driver: Any, way: str
) -> None:
    with opened(rclone_s3, rclone_bucket, driver, upload_checksum=way) as backend:
        for data in (b"", SMALL, LARGE):
            backend.write("a", bytes_payload(data))
            assert rclone_s3.get_raw(rclone_bucket, "a") == data


def test_way_is_chosen_by_the_endpoint() -> None:
    def chosen(**config: Any) -> str | None:
        found = obstore_arguments("b", S3Config("AK", "SK", **config), OPTIONS)
        value: str | None = found.get("checksum_algorithm")
        return value

    assert chosen() == "CRC64NVME"
    assert chosen(endpoint_url="https://s3.eu-west-1.amazonaws.com") == "CRC64NVME"
    assert chosen(endpoint_url="http://h") == "SHA256"
    assert chosen(upload_checksum="sha256") == "SHA256"
    assert chosen(upload_checksum="md5") is None
    assert chosen(upload_checksum="off") is None


# --- what goes wrong on the way ------------------------------------------------------------------


def first_body(kind: str, part: str = "") -> Script:
    """Damage the first request that has a body (and ``part`` in its target)."""
    met: list[int] = []

    def script(request: Request) -> Fault | None:
        if request.method != "PUT" or part not in request.target or met:
            return None
        met.append(request.number)
        return Fault(kind)

    return script


# moto looks at no checksum and no signature; of parts it says only what their ETags are.
WAYS = {"seaweedfs": "auto", "moto": "md5"}


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one-request", "parts"])
def test_byte_that_flips_on_the_way_up_is_noticed(
    server: S3Server, bucket: str, prefix: str, driver: Any, data: bytes
) -> None:
    key = f"{prefix}/a"
    script = first_body("flip_request", "partNumber=2" if data is LARGE else "")
    way = WAYS[server.name] if data is LARGE else "auto"
    with (
        FaultProxy(server.endpoint, script, store="s3") as proxy,
        opened(server, bucket, driver, proxy.endpoint, upload_checksum=way) as backend,
    ):
        with pytest.raises(TransientError):
            backend.write(key, bytes_payload(data))
        assert any(one.fault for one in proxy.exchanges)
        backend.write(key, bytes_payload(data))
    assert server.get_raw(bucket, key) == data
    assert [found for found, _ in server.pending_uploads(bucket) if found == key] == []


def test_object_that_was_created_damaged_is_not_in_the_way(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    key = f"{prefix}/a"
    with (
        FaultProxy(server.endpoint, first_body("flip_request"), store="s3") as proxy,
        opened(server, bucket, driver, proxy.endpoint) as backend,
    ):
        with pytest.raises(TransientError):
            backend.write(key, bytes_payload(SMALL), if_absent=True)
        assert server.keys_raw(bucket, prefix) == []
        backend.write(key, bytes_payload(SMALL), if_absent=True)
        with pytest.raises(ObjectExistsError):
            backend.write(key, bytes_payload(b"other"), if_absent=True)
    assert server.get_raw(bucket, key) == SMALL


def test_damage_is_not_looked_for_if_the_config_says_so(
    moto: Moto, moto_shared_bucket: str, prefix: str, driver: Any
) -> None:
    key = f"{prefix}/a"
    script = first_body("flip_request")
    with (
        FaultProxy(moto.endpoint, script, store="s3") as proxy,
        opened(moto, moto_shared_bucket, driver, proxy.endpoint, upload_checksum="off") as backend,
    ):
        backend.write(key, bytes_payload(SMALL))
    assert moto.get_raw(moto_shared_bucket, key) != SMALL


def on(method: str, target: str = "", kind: str = "error_body") -> Script:
    return lambda request: (
        Fault(kind) if request.method == method and target in request.target else None
    )


def copied(backend: Backend, prefix: str) -> None:
    backend.copy(f"{prefix}/source", f"{prefix}/a")


def written(backend: Backend, prefix: str) -> None:
    backend.write(f"{prefix}/a", bytes_payload(LARGE))


@pytest.fixture(scope="module")
def crowded(seaweedfs: SeaweedFS, shared_bucket: str) -> Iterator[list[str]]:
    """Two pages of keys, with everything in them that is written otherwise in a listing."""
    folder = f"crowded-{uuid4().hex}"
    keys = [f"{folder}/{number:04} +%ä&<" for number in range(1002)]
    backend = open_backend(
        parse_uri(f"s3://{shared_bucket}/"),
        S3Config(seaweedfs.access_key, seaweedfs.secret_key, endpoint_url=seaweedfs.endpoint),
        OPTIONS,
    )
    with closing(backend), ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda key: backend.write(key, bytes_payload(b"1")), keys):
            pass
        yield keys
        backend.delete(keys)


@pytest.mark.parametrize("kind", ["error_body", "truncate", "truncate_unsized", "reset"])
@pytest.mark.parametrize("page", [1, 2])
def test_listing_that_is_cut_is_no_listing(
    seaweedfs: SeaweedFS, shared_bucket: str, crowded: list[str], driver: Any, kind: str, page: int
) -> None:
    pages = itertools.count(1)

    def script(request: Request) -> Fault | None:
        return Fault(kind, 0.6) if next(pages) == page else None

    prefix = crowded[0].partition("/")[0] + "/"
    with (
        FaultProxy(seaweedfs.endpoint, script, store="s3") as proxy,
        opened(seaweedfs, shared_bucket, driver, proxy.endpoint) as backend,
    ):
        with pytest.raises(TransientError):
            list(backend.list(prefix))
        assert [info.key for info in backend.list(prefix)] == crowded


def test_nothing_needs_awscrt(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.backends.s3.signed.find_spec", lambda name: None)
    put(seaweedfs, shared_bucket, f"{prefix}/a", "sha256")
    with opened(seaweedfs, shared_bucket, "obstore") as backend:
        info = listed(backend, prefix)
        assert backend.checksums(info) == (digest_of("sha256", SMALL),)
        assert backend.is_digest(info)
        backend.write(f"{prefix}/a", bytes_payload(LARGE))
        assert backend.stat(f"{prefix}/a").size == len(LARGE)


def test_config_goes_before_what_the_environment_says_of_the_way(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"
    seaweedfs.put_raw(shared_bucket, f"{prefix}/a", b"1")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ForwardProxy() as way:
        with opened(seaweedfs, shared_bucket, "obstore", proxy=way.url) as backend:
            listed(backend, prefix)
        assert way.asked
    with (
        opened(seaweedfs, shared_bucket, "obstore") as backend,
        pytest.raises(UnreachableError),
    ):
        listed(backend, prefix)


@pytest.mark.parametrize(
    ("act", "method", "target"),
    [(written, "POST", "uploadId="), (copied, "PUT", "/a")],
    ids=["completion", "copy"],
)
def test_error_in_the_body_of_a_success_is_an_error(
    server: S3Server,
    bucket: str,
    prefix: str,
    driver: Any,
    act: Callable[[Backend, str], None],
    method: str,
    target: str,
) -> None:
    server.put_raw(bucket, f"{prefix}/source", SMALL)
    with (
        FaultProxy(server.endpoint, on(method, target), store="s3") as proxy,
        opened(server, bucket, driver, proxy.endpoint) as backend,
        pytest.raises(TransientError),
    ):
        act(backend, prefix)
    assert server.keys_raw(bucket, prefix) == [f"{prefix}/source"]
    # moto gives every unfinished upload the age of fifteen years.
    if server.name != "moto":
        assert not [key for key, _ in server.pending_uploads(bucket) if key.startswith(prefix)]


def test_error_in_place_of_an_object_is_not_its_content(
    server: S3Server, bucket: str, prefix: str, driver: Any
) -> None:
    key = f"{prefix}/a"
    server.put_raw(bucket, key, SMALL)
    with (
        FaultProxy(server.endpoint, on("GET"), store="s3") as proxy,
        opened(server, bucket, driver, proxy.endpoint) as backend,
    ):
        info = backend.stat(key)
        for span in (None, ByteRange(0, 1000)):
            with pytest.raises(StorageError), backend.read(key, span, info) as body:
                list(body)


def test_checksum_is_of_what_was_to_be_sent(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, driver: Any
) -> None:
    seen: list[Request] = []

    def script(request: Request) -> Fault | None:
        seen.append(request)
        return None

    with (
        FaultProxy(seaweedfs.endpoint, script, store="s3") as proxy,
        opened(seaweedfs, shared_bucket, driver, proxy.endpoint) as backend,
    ):
        backend.write(f"{prefix}/a", bytes_payload(SMALL))
    (request,) = (one for one in seen if one.method == "PUT")
    expected = base64.b64encode(hashlib.sha256(SMALL).digest()).decode()
    assert request.headers["x-amz-checksum-sha256"] == expected
