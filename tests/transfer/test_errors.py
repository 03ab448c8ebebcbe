"""What stores and callers can do wrong: each has an error type of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.client import StorageClient
from storage.config import S3Config, load_settings
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    TransferError,
    UnreachableError,
    UnsupportedScheme,
)
from tests.servers import CountingProxy, SeaweedFS, free_port
from tests.transfer.failing import (
    ACCESS,
    ATTEMPTS,
    DRIVERS,
    QUERY,
    SECRET,
    TOKEN,
    fails,
    good,
)
from tests.transfer.support import assert_clear, everything_in

# -- what the store says -------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("key", ["a.bin", "", "/"], ids=["object", "tree", "slash"])
@pytest.mark.parametrize("wrong", ["access key", "secret key", "token"])
def test_wrong_credentials_are_refused_at_the_first_request(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    dest: Path,
    driver: str,
    key: str,
    wrong: str,
) -> None:
    config = S3Config(
        seaweedfs.access_key if wrong == "secret key" else ACCESS,
        SECRET,
        endpoint_url=proxy.endpoint,
        session_token=TOKEN if wrong == "token" else None,
        driver=driver,  # type: ignore[arg-type]
    )
    uri = f"{stored}/{key}" if key == "a.bin" else f"{stored}{key}"
    error = fails(client, AuthenticationError, uri, dest / "made" / "m", config=config)
    assert isinstance(error, PermissionError)
    assert uri.rstrip("/") in str(error)
    assert len(proxy.requests) == 1, proxy.requests


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_missing_key_costs_one_look_and_one_listing(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    dest: Path,
    driver: str,
) -> None:
    config = good(seaweedfs, driver, proxy.endpoint)
    error = fails(client, ModelMissingError, f"{stored}/nope", dest / "made", config=config)
    assert isinstance(error, FileNotFoundError)
    assert f"{stored}/nope" in str(error)
    assert [request.method for request in proxy.requests] == ["HEAD", "GET"]
    assert "list-type=2" in proxy.requests[1].path
    # The beginning of other names is not the tree.
    fails(client, ModelMissingError, stored[:-1], dest, config=config)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_missing_tree_costs_one_listing(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    dest: Path,
    driver: str,
) -> None:
    config = good(seaweedfs, driver, proxy.endpoint)
    fails(client, ModelMissingError, f"{stored}/nope/", dest, config=config)
    assert [request.method for request in proxy.requests] == ["GET"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("key", ["key", "key/", ""])
def test_a_missing_bucket_is_told_apart_and_not_asked_for_again(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    dest: Path,
    driver: str,
    key: str,
) -> None:
    config = good(seaweedfs, driver, proxy.endpoint)
    uri = f"s3://no-such-bucket-here/{key}"
    error = fails(client, BucketMissingError, uri, dest / "made" / "m", config=config)
    assert isinstance(error, ModelMissingError)
    assert "no-such-bucket-here" in str(error)
    # The answer to HEAD has no body that could say what is missing.
    methods = [request.method for request in proxy.requests]
    assert methods == (["HEAD", "GET"] if key == "key" else ["GET"])


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_host_where_nobody_answers_is_tried_as_often_as_the_settings_say(
    client: StorageClient, dest: Path, driver: str
) -> None:
    config = S3Config(
        ACCESS,
        SECRET,
        endpoint_url=f"http://127.0.0.1:{free_port()}",
        session_token=TOKEN,
        driver=driver,  # type: ignore[arg-type]
    )
    error = fails(client, UnreachableError, "s3://bucket/m", dest / "made", config=config)
    assert f"(tried {ATTEMPTS} times)" in str(error)
    assert "s3://bucket/m" in str(error)


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_host_without_an_address_is_unreachable(
    client: StorageClient, dest: Path, driver: str
) -> None:
    config = S3Config(ACCESS, SECRET, endpoint_url="http://nowhere.invalid", driver=driver)  # type: ignore[arg-type]
    fails(client, UnreachableError, "s3://bucket/m", dest, config=config)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_store_that_is_busy_for_ever_spends_the_attempts(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    dest: Path,
    driver: str,
    status: int,
) -> None:
    proxy.fault = lambda number, method, path: status
    config = good(seaweedfs, driver, proxy.endpoint)
    with pytest.raises(TransferError, match=f"tried {ATTEMPTS} times") as caught:
        client.download(stored, dest, config=config)
    assert_clear(caught.value, seaweedfs.secret_key)
    assert len(proxy.requests) == ATTEMPTS, proxy.requests
    assert everything_in(dest.parent) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_store_that_is_busy_now_and_then_is_good_enough(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    dest: Path,
    driver: str,
) -> None:
    # Every other request: no request fails twice in a row on one connection.
    proxy.fault = lambda number, method, path: 503 if number == 1 or number % 5 == 0 else None
    limits = {"attempts": 10, "part_size": "1MiB", "connections": 1}
    with StorageClient(settings=load_settings(transfer=limits)) as patient:
        patient.download(stored, dest, config=good(seaweedfs, driver, proxy.endpoint))
    assert everything_in(dest) == ["a.bin", "large.bin", "sub", "sub/b.bin"]
    assert any(request.status == 503 for request in proxy.requests)


# -- what the caller says ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("nosuchscheme://bucket/key", UnsupportedScheme),
        (f"nosuchscheme://user:{SECRET}@host/key?sig={QUERY}", UnsupportedScheme),
        ("", InvalidInput),
        ("s3://", InvalidInput),
        ("s3:///key", InvalidInput),
        (f"s3://bad bucket/key?sig={QUERY}", InvalidInput),
        ("s3://bucket/key\0", InvalidInput),
        ("s3://bucket/tree/?versionId=1", InvalidInput),
        ("file://host/path", InvalidInput),
        ("pvc://claim/../x", InvalidInput),
    ],
)
def test_a_uri_that_cannot_be_used(
    client: StorageClient, dest: Path, uri: str, kind: type[Exception]
) -> None:
    error = fails(client, kind, uri, dest / "made" / "m")
    scheme = uri.partition("://")[0]
    assert kind is InvalidInput or scheme in str(error)


@pytest.mark.parametrize(
    "digest",
    ["", "sha256", "sha256:xyz", "sha256:" + "0" * 63, "crc32:00000000", "md4:" + "0" * 32],
)
def test_a_digest_that_is_none(
    client: StorageClient, dest: Path, tmp_path: Path, digest: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    fails(client, InvalidInput, str(tmp_path / "source"), dest / "made", digest=digest)


def test_digests_that_contradict_one_another(
    client: StorageClient, dest: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    uri = f"{tmp_path}/source#sha256={'0' * 64}"
    fails(client, InvalidInput, uri, dest, digest="sha256:" + "1" * 64)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("key", ["/large.bin", "/a.bin", ""])
def test_bytes_of_another_digest(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    stored: str,
    dest: Path,
    driver: str,
    key: str,
) -> None:
    expected = f"sha256:{'0' * 64}"
    error = fails(
        client,
        IntegrityError,
        stored + key,
        dest / "made" / "m",
        config=good(seaweedfs, driver),
        digest=expected,
    )
    assert expected in str(error)
    assert "sha256:" in str(error).replace(expected, "")
