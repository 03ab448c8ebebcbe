"""Azure beyond the conformance suite: what blobs say, metadata, copies, blocks, and gaps."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.azure.answers import decoded_metadata, encoded_metadata
from storage.backends.azure.upload import block_sizes
from storage.backends.base import Backend, OpenOptions, Payload, bytes_payload
from storage.config import AzureConfig
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
)
from storage.testing.conformance_support import MIB, content
from storage.uri import parse_uri
from tests.servers.azurite import Azurite

Opener = Callable[..., Backend]


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Literal["obstore", "fsspec"]:
    found: Literal["obstore", "fsspec"] = request.param
    return found


@pytest.fixture
def opened(azurite: Azurite, driver: Literal["obstore", "fsspec"]) -> Iterator[Opener]:
    backends: list[Backend] = []

    def opener(container: str, options: OpenOptions | None = None, **fields: Any) -> Backend:
        fields = {"account_key": azurite.main.key, "driver": driver, **fields}
        config = AzureConfig(endpoint_url=azurite.account_url(), **fields)
        uri = parse_uri(f"azure://{container}/")
        backends.append(open_backend(uri, config, options or OpenOptions()))
        return backends[-1]

    yield opener
    for backend in backends:
        backend.close()


@pytest.fixture
def backend(azurite_container: str, opened: Opener) -> Backend:
    return opened(azurite_container)


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(piece) for piece in body)


# --- what is said about a blob ---------------------------------------------------------------


def test_md5_that_azure_keeps_is_a_digest(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    azurite.put_raw(azurite_container, "m/a", b"12345")
    md5 = Digest("md5", hashlib.md5(b"12345", usedforsecurity=False).hexdigest())
    assert backend.stat("m/a").digests == (md5,)
    assert [info.digests for info in backend.list("m/")] == [(md5,)]


def test_text_that_is_no_md5_hides_no_blob(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    from azure.storage.blob import BlobServiceClient, ContentSettings

    azurite.put_raw(azurite_container, "a", b"12345")
    with BlobServiceClient.from_connection_string(azurite.connection_string()) as service:
        blob = service.get_blob_client(azurite_container, "a")
        blob.set_http_headers(ContentSettings(content_md5=bytearray(b"short")))
    assert backend.stat("a").digests == ()
    assert [info.digests for info in backend.list()] == [()]
    assert read(backend, "a") == b"12345"


def test_md5_of_a_part_is_not_taken_for_that_of_the_whole(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    from storage.backends.base import ByteRange

    azurite.put_raw(azurite_container, "a", b"12345")
    whole = Digest("md5", hashlib.md5(b"12345", usedforsecurity=False).hexdigest())
    with backend.read("a", ByteRange(1, 3)) as body:
        assert set(body.info.digests) <= {whole}


def test_digests_of_our_upload_come_with_the_listing(backend: Backend) -> None:
    sha256 = hashlib.sha256(b"12345").hexdigest()
    backend.write("m/a", bytes_payload(b"12345"), metadata={"sha256": sha256})
    assert Digest("sha256", sha256) in next(iter(backend.list())).digests
    assert Digest("sha256", sha256) in backend.stat("m/a").digests


def test_old_md5_of_a_blob_that_grew_is_no_digest(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    path = f"{azurite_container}/log"
    azurite.request(
        "PUT",
        path,
        None,
        # That of nothing.
        {"x-ms-blob-type": "AppendBlob", "x-ms-blob-content-md5": "1B2M2Y8AsgTpgAmY7PhCfg=="},
    )
    azurite.request("PUT", path, {"comp": "appendblock"}, {}, b"12345")
    assert backend.stat("log").digests == ()
    assert [info.digests for info in backend.list()] == [()]
    assert read(backend, "log") == b"12345"


@pytest.mark.parametrize("mark", ["hdi_isfolder", "is_directory"])
def test_directory_marked_by_metadata_is_no_object(
    azurite: Azurite, azurite_container: str, backend: Backend, mark: str
) -> None:
    azurite.put_raw(azurite_container, "m", b"", {f"x-ms-meta-{mark}": "true"})
    azurite.put_raw(azurite_container, "m/sub", b"", {f"x-ms-meta-{mark}": "true"})
    azurite.put_raw(azurite_container, "m/a", b"", {f"x-ms-meta-{mark}": "false"})
    with pytest.raises(ModelMissingError):
        backend.stat("m")
    assert [info.key for info in backend.list()] == ["m/a"]
    assert backend.stat("m/a").size == 0


def test_encoded_blob_is_given_as_it_is_stored(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    packed = gzip.compress(b"12345" * 1000)
    azurite.put_raw(
        azurite_container,
        "a.gz",
        packed,
        {"x-ms-blob-content-encoding": "gzip", "x-ms-blob-content-type": "text/plain"},
    )
    info = backend.stat("a.gz")
    assert (info.size, info.content_type) == (len(packed), "text/plain")
    with backend.read("a.gz", pin=info) as body:
        assert b"".join(bytes(piece) for piece in body) == packed


@pytest.mark.parametrize("key", ["a\\b", "m/./a", "m/../a", "../a", "a.", "m./a", "..."])
def test_key_that_azure_would_change_is_refused(
    azurite: Azurite, azurite_container: str, backend: Backend, key: str
) -> None:
    azurite.put_raw(azurite_container, "a", b"old")
    for refused in (
        lambda: backend.stat(key),
        lambda: read(backend, key),
        lambda: backend.write(key, bytes_payload(b"new")),
        lambda: backend.copy("a", key),
        lambda: backend.copy(key, "b"),
        lambda: backend.delete([key]),
        lambda: list(backend.list(f"{key}/")),
    ):
        with pytest.raises(InvalidInput, match="another blob"):
            refused()
    assert azurite.keys_raw(azurite_container) == ["a"]
    assert azurite.get_raw(azurite_container, "a") == b"old"


# --- metadata --------------------------------------------------------------------------------

ODD_METADATA = {
    "model-owner": "me",
    "1st": "x=1; y, z",
    "with space": "équipe 模型",
    "dot.ted": " outer spaces ",
    "empty": "",
    "lines": "a\nb\r\nc",
    "_x002d_": "=?UTF-8?B?eA==?=",
    "ключ": "🤗",
}


def test_metadata_that_azure_cannot_hold_survives(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    backend.write("a", bytes_payload(b"1"), metadata=ODD_METADATA)
    backend.write("big", bytes_payload(content(20 * MIB)), metadata=ODD_METADATA)
    for key in ("a", "big"):
        assert backend.stat(key).metadata == ODD_METADATA
        with backend.read(key) as body:
            assert body.info.metadata == ODD_METADATA
    assert all(info.metadata == ODD_METADATA for info in backend.list())
    headers = azurite.head_raw(azurite_container, "a")
    assert headers["x-ms-meta-model_x002d_owner"] == "me"


def test_metadata_of_others_is_told_as_it_is(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    headers = {"x-ms-meta-Model_Owner": "Me", "x-ms-meta-_x00ZZ_": "a_x002d_b"}
    azurite.put_raw(azurite_container, "a", b"1", headers)
    assert backend.stat("a").metadata == {"model_owner": "Me", "_x00zz_": "a_x002d_b"}


def test_encoding_of_metadata_is_undone() -> None:
    assert decoded_metadata(encoded_metadata(ODD_METADATA)) == ODD_METADATA
    assert encoded_metadata({"sha256": "ab", "Blake3": "cd"}) == {"sha256": "ab", "blake3": "cd"}
    assert encoded_metadata(None) == {}
    for name, value in encoded_metadata(ODD_METADATA).items():
        assert name.isascii()
        assert name.isidentifier()
        assert value.isascii()
        assert value.isprintable()


# --- copies ----------------------------------------------------------------------------------


@pytest.fixture
def second_container(azurite: Azurite, azurite_container: str) -> Iterator[str]:
    with azurite.container(f"{azurite_container}-b") as name:
        yield name


@pytest.mark.parametrize("credential", ["key", "sas"])
def test_copy_from_another_container(
    azurite: Azurite,
    azurite_container: str,
    second_container: str,
    opened: Opener,
    credential: str,
) -> None:
    fields = {"account_key": None, "sas_token": azurite.sas()} if credential == "sas" else {}
    origin = opened(azurite_container, **fields)
    target = opened(second_container, **fields)
    assert target.capabilities.copy_across
    metadata = {"model-owner": "me", "sha256": "0" * 64}
    data = content(3 * MIB)
    origin.write("m/ü b+c", bytes_payload(data), metadata=metadata, content_type="text/x-model")
    target.copy("m/ü b+c", "n/a", bucket=azurite_container)
    assert azurite.get_raw(second_container, "n/a") == data
    info = target.stat("n/a")
    assert (info.metadata, info.content_type) == (metadata, "text/x-model")


def test_copy_of_the_same_name_from_another_container(
    azurite: Azurite, azurite_container: str, second_container: str, opened: Opener
) -> None:
    azurite.put_raw(azurite_container, "a", b"new")
    azurite.put_raw(second_container, "a", b"old")
    opened(second_container).copy("a", "a", bucket=azurite_container)
    assert azurite.get_raw(second_container, "a") == b"new"


def test_copy_onto_itself_changes_nothing(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    azurite.put_raw(azurite_container, "a", b"1")
    backend.copy("a", "a")
    assert azurite.get_raw(azurite_container, "a") == b"1"


def test_copy_says_which_container_is_missing(
    azurite: Azurite, azurite_container: str, backend: Backend, opened: Opener
) -> None:
    azurite.put_raw(azurite_container, "a", b"1")
    with pytest.raises(BucketMissingError, match="nowhere"):
        backend.copy("a", "b", bucket="nowhere")
    with pytest.raises(BucketMissingError, match="no-target"):
        opened("no-target").copy("a", "b", bucket=azurite_container)
    with pytest.raises(ModelMissingError):
        backend.copy("a", "b", version="2026-01-01T00:00:00.0000000Z")


# --- blocks ----------------------------------------------------------------------------------


class Stepwise(io.BytesIO):
    """Breaks once the first block has arrived at the store."""

    def __init__(self, data: bytes, arrived: threading.Event) -> None:
        super().__init__(data)
        self._arrived = arrived

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 48 * MIB:
            assert self._arrived.wait(60), "no block arrived"
            raise RuntimeError("the source of the payload broke")
        return super().read(size)


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "over-old"])
def test_blocks_of_a_failed_upload_never_become_an_object(
    azurite: Azurite, azurite_container: str, opened: Opener, old: bytes | None
) -> None:
    backend = opened(azurite_container, OpenOptions(connections=2, memory=64 * MIB))
    if old is not None:
        azurite.put_raw(azurite_container, "a", old)
    arrived = threading.Event()
    data = content(64 * MIB)
    payload = Payload(lambda: Stepwise(data, arrived), len(data))
    with pytest.raises(RuntimeError, match="broke"):
        backend.write("a", payload, on_bytes=lambda _: arrived.set())
    assert azurite.keys_raw(azurite_container) == ([] if old is None else ["a"])
    if old is not None:
        assert azurite.get_raw(azurite_container, "a") == old
    # Nobody can drop what was left but the next write of the same blob.
    assert azurite.uncommitted(azurite_container) == ["a"]
    backend.write("a", bytes_payload(data[: 20 * MIB]))
    assert azurite.uncommitted(azurite_container) == []
    assert azurite.get_raw(azurite_container, "a") == data[: 20 * MIB]


def test_large_conditional_writes_are_decided_at_the_end(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    data = content(20 * MIB)
    first = backend.write("a", bytes_payload(data), if_absent=True)
    assert first.etag == backend.stat("a").etag
    with pytest.raises(ObjectExistsError):
        backend.write("a", bytes_payload(data[::-1]), if_absent=True)
    azurite.put_raw(azurite_container, "a", b"other")
    with pytest.raises(ObjectChangedError):
        backend.write("a", bytes_payload(data), if_match=first)
    assert azurite.get_raw(azurite_container, "a") == b"other"
    now = backend.stat("a")
    backend.write("a", bytes_payload(data), if_match=now)
    assert azurite.get_raw(azurite_container, "a") == data


def test_two_large_uploads_of_one_name_leave_one_of_them(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from storage.errors import TransientError

    backend = opened(azurite_container)
    versions = [content(20 * MIB, seed) for seed in range(3)]

    def write(data: bytes) -> bytes | None:
        try:
            backend.write("a", bytes_payload(data))
        except TransientError:
            # A commit drops the blocks of all others, who have to start again.
            return None
        return data

    with ThreadPoolExecutor(3) as pool:
        written = [data for data in pool.map(write, versions) if data is not None]
    assert written
    assert azurite.get_raw(azurite_container, "a") in written


@pytest.mark.parametrize("memory", [8 * MIB, 128 * MIB, 1024 * MIB])
@pytest.mark.parametrize("size", [0, 1, 5 * 1024**3, 190 * 1024**4], ids=str)
def test_blocks_suffice_for_any_blob(size: int, memory: int) -> None:
    block = next(block_sizes(size, memory))
    assert block * 50_000 >= size
    assert block <= 4000 * MIB


def test_blocks_of_unknown_size_grow() -> None:
    sizes = block_sizes(None, 128 * MIB)
    total = sum(next(sizes) for _ in range(50_000))
    assert total > 4 * 1024**4


# --- two drivers -----------------------------------------------------------------------------


def test_driver_is_that_of_the_config(azurite_container: str, opened: Opener) -> None:
    assert opened(azurite_container, driver=None).name == "azure (obstore)"
    assert opened(azurite_container, driver="obstore").name == "azure (obstore)"
    assert opened(azurite_container, driver="fsspec").name == "azure (adlfs)"


def test_signed_url_of_an_odd_name_works_for_every_method(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    import urllib.request

    key = "m/a b+ü%41#?.bin"
    put = urllib.request.Request(
        backend.sign(key, "PUT", 600),
        data=b"12345",
        method="PUT",
        headers={"x-ms-blob-type": "BlockBlob", "Content-Type": "text/plain"},
    )
    urllib.request.urlopen(put, timeout=30).close()
    assert azurite.get_raw(azurite_container, key) == b"12345"
    for method, expected in (("GET", b"12345"), ("HEAD", b"")):
        request = urllib.request.Request(backend.sign(key, method, 600), method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.read() == expected
    gone = urllib.request.Request(backend.sign(key, "DELETE", 600), method="DELETE")
    urllib.request.urlopen(gone, timeout=30).close()
    assert azurite.keys_raw(azurite_container) == []
    with pytest.raises(InvalidInput):
        backend.sign(key, "PATCH", 60)


def test_signed_url_does_no_more_than_it_says(
    azurite: Azurite, azurite_container: str, backend: Backend
) -> None:
    import urllib.error
    import urllib.request

    azurite.put_raw(azurite_container, "a", b"1")
    request = urllib.request.Request(backend.sign("a", "GET", 600), method="DELETE")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with closing(caught.value):
        assert caught.value.code == 403
    assert azurite.keys_raw(azurite_container) == ["a"]


def test_delete_of_many_with_a_key_and_a_sas(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    keys = [f"m/{number}" for number in range(300)]
    for fields in ({}, {"account_key": None, "sas_token": azurite.sas()}):
        for key in keys:
            azurite.put_raw(azurite_container, key, b"")
        opened(azurite_container, **fields).delete([*keys, "m/none"])
        assert azurite.keys_raw(azurite_container) == []


def test_program_that_closes_nothing_ends_in_silence(
    azurite: Azurite, azurite_container: str, driver: str
) -> None:
    program = f"""
from storage import AzureConfig, StorageOperations
config = AzureConfig(
    "{azurite.main.name}", "{azurite.main.key}",
    endpoint_url="{azurite.account_url()}", driver="{driver}",
)
print(StorageOperations.list_objects("azure://{azurite_container}/", config=config))
"""
    azurite.put_raw(azurite_container, "a", b"12345")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("['a']\n", "")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_makes_its_own_connections(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    backend = opened(azurite_container, driver="fsspec")
    azurite.put_raw(azurite_container, "a", b"12345")
    assert read(backend, "a") == b"12345"
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            os._exit(0 if read(backend, "a") == b"12345" and len(list(backend.list())) == 1 else 1)
        except BaseException:  # noqa: BLE001 -- told to the parent by the status
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert read(backend, "a") == b"12345"
