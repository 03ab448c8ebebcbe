"""Copies between buckets of one store: done by the store, through this machine if need be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from storage import S3Config, Storage, StorageOperations
from storage.backends.memory import MemoryBackend
from storage.errors import ModelMissingError
from tests.facade.stores import s3_config
from tests.servers import CountingProxy, SeaweedFS

MIB = 1024 * 1024
TREE = {"weights.bin": os.urandom(3 * MIB), "sub/odd name+%20#.json": b"{}", "empty": b""}


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def other_bucket(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Iterator[str]:
    for path, data in TREE.items():
        seaweedfs.put_raw(shared_bucket, f"{prefix}/{path}", data)
    with seaweedfs.bucket(f"other-{prefix[-8:]}") as name:
        yield name


def copies(proxy: CountingProxy) -> tuple[int, int]:
    """Return how many objects the store copied, and how many bodies passed through here."""
    puts = [request for request in proxy.requests if request.method == "PUT"]
    return len(puts), sum(request.method == "GET" for request in proxy.requests)


def test_a_tree_goes_to_another_bucket_without_its_bytes_coming_here(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    other_bucket: str,
    prefix: str,
    driver: str,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    proxy = counting_proxy(seaweedfs.endpoint)
    config = s3_config(seaweedfs, driver, endpoint=proxy.endpoint)
    StorageOperations.copy_object(
        f"s3://{shared_bucket}/{prefix}", f"s3://{other_bucket}/tree", config=config
    )
    found = {key: seaweedfs.get_raw(other_bucket, key) for key in seaweedfs.keys_raw(other_bucket)}
    assert found == {f"tree/{path}": data for path, data in TREE.items()}
    puts, gets = copies(proxy)
    # The listing is one GET, and the only one that has a body.
    assert puts == len(TREE)
    assert gets == 1


def test_what_has_to_go_in_parts_goes_in_parts(
    seaweedfs: SeaweedFS, shared_bucket: str, other_bucket: str, prefix: str, driver: str
) -> None:
    data = os.urandom(11 * MIB + 1)
    seaweedfs.put_raw(shared_bucket, f"{prefix}/large", data)
    config = S3Config(
        seaweedfs.access_key,
        seaweedfs.secret_key,
        endpoint_url=seaweedfs.endpoint,
        driver=driver,  # type: ignore[arg-type]
        copy_part_limit=5 * MIB,
    )
    for target in (f"s3://{other_bucket}/large", f"s3://{shared_bucket}/{prefix}/again"):
        StorageOperations.copy_object(f"s3://{shared_bucket}/{prefix}/large", target, config=config)
    assert seaweedfs.get_raw(other_bucket, "large") == data
    assert seaweedfs.get_raw(shared_bucket, f"{prefix}/again") == data
    # An ETag with a dash is one of parts.
    assert "-3" in seaweedfs.head_raw(other_bucket, "large")["ETag"]
    assert seaweedfs.pending_uploads(other_bucket) == []


def test_another_account_gets_the_bytes_through_this_machine(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    readable_bucket: str,
    prefix: str,
    driver: str,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    seaweedfs.put_raw(readable_bucket, f"{prefix}/m", b"weights")
    proxy = counting_proxy(seaweedfs.endpoint)
    reader = s3_config(seaweedfs, driver, seaweedfs.reader, proxy.endpoint)
    writer = s3_config(seaweedfs, driver)
    StorageOperations.copy_object(
        f"s3://{readable_bucket}/{prefix}/m",
        f"s3://{shared_bucket}/{prefix}/m",
        config=reader,
        dest_config=writer,
    )
    assert seaweedfs.get_raw(shared_bucket, f"{prefix}/m") == b"weights"
    assert copies(proxy) == (0, 1)


def test_a_digest_makes_the_bytes_come_by(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    other_bucket: str,
    prefix: str,
    driver: str,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    seaweedfs.put_raw(shared_bucket, f"{prefix}/m", b"abc")
    proxy = counting_proxy(seaweedfs.endpoint)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    StorageOperations.copy_object(
        f"s3://{shared_bucket}/{prefix}/m#sha256={digest}",
        f"s3://{other_bucket}/m",
        config=s3_config(seaweedfs, driver, endpoint=proxy.endpoint),
    )
    assert seaweedfs.get_raw(other_bucket, "m") == b"abc"
    assert copies(proxy) == (1, 1)


def test_what_is_missing_in_another_bucket_is_named(
    seaweedfs: SeaweedFS, shared_bucket: str, other_bucket: str, driver: str
) -> None:
    config = s3_config(seaweedfs, driver)
    with pytest.raises(ModelMissingError, match=f"{shared_bucket}/nothing"):
        StorageOperations.copy_object(
            f"s3://{shared_bucket}/nothing", f"s3://{other_bucket}/m", config=config
        )
    assert seaweedfs.keys_raw(other_bucket) == []


def test_buckets_of_memory_are_one_store(prefix: str) -> None:
    one, two = f"one{prefix[-8:]}", f"two{prefix[-8:]}"
    with Storage.open(f"memory://{one}/m", "wb") as file:
        file.write(b"weights")
    StorageOperations.copy_object(f"memory://{one}/m", f"memory://{two}/m")
    with MemoryBackend(two).read("m") as body:
        assert b"".join(bytes(chunk) for chunk in body) == b"weights"
