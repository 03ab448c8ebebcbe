"""Faults of KServe's storage client, each named, and that they are not here.

Many are cases of the comparison, where both programs are run; :data:`COMPARED` says which. The
others need a server that takes notes, or misbehaves, and are tests of their own.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import AuthenticationError, IntegrityError, ModelMissingError, StorageError
from storage.integrations.kserve import Storage
from tests.backends.oci_support import Pusher
from tests.integrations.kserve.case import Wrong, tar
from tests.integrations.kserve.cases import CASES
from tests.integrations.kserve.faults_support import command, lead_to, tree
from tests.servers import (
    Azurite,
    CountingProxy,
    FakeGCS,
    ForwardProxy,
    Moto,
    OddHTTP,
    Reply,
    Request,
    SeaweedFS,
    StaticFile,
    free_port,
)
from tests.servers.process import HOST
from tests.servers.registry import Gate, Registry

pytestmark = pytest.mark.usefixtures("short_waits")

OddServer = Callable[..., OddHTTP]
Proxies = Callable[[str], CountingProxy]

COMPARED = {
    "a name with .git in it is taken for a repository": ["https-name-that-begins-like-git"],
    "keys with .. are written outside of the destination": ["s3-key-outside"],
    "models/iris also brings iris-v2": ["s3-sibling-prefix", "azure-sibling-prefix"],
    "models/iri succeeds": ["s3-half-a-name"],
    "objects of zero bytes are dropped": ["s3-empty-file-in-a-tree", "azure-empty-file"],
    "an exact key of zero bytes falls through to its siblings": ["s3-exact-empty-file"],
    "an exact key is not tried before listing": [
        *("gcs-exact-key-before-a-tree", "azure-exact-blob-before-a-tree"),
        "s3-permission-for-one-object",
    ],
    "m/x and m//x collide": ["s3-colliding-keys"],
    "/mnt/models-typo succeeds with an empty folder": ["models-look-alike"],
    "with filters, GCS unpacks by the wrong file's name": [
        *("gcs-archive-beside-what-is-ignored", "gcs-archive-before-what-is-ignored"),
    ],
    "files of version 1 survive in a destination re-used for version 2": [
        *("s3-second-version", "s3-second-version-on-the-volume", "gcs-second-version"),
        *("http-second-version", "hf-second-version"),
    ],
    ".pkl.gz over HTTP is stored decompressed": ["http-compressed-file"],
    "a compressed body is saved compressed": ["http-compressed-on-its-way"],
    "%20 is kept": ["http-name-with-a-space"],
    "gs://bucket alone fails": ["gcs-whole-bucket"],
    "an Azure container alone fails": ["azure-whole-container"],
    "a pull request of the Hub fails": ["hf-pull-request"],
    "a model of the Hub without an owner fails": ["hf-without-an-owner"],
    "a local path with brackets fails": ["local-brackets"],
    "a boolean in STORAGE_CONFIG is a TypeError": ["s3-anonymous-config-of-a-boolean"],
    "S3_ENDPOINT of the webhook is forgotten": [
        *("s3-endpoint-of-the-webhook", "s3-endpoint-of-the-webhook-over-tls"),
    ],
    "whiteouts of OCI layers are extracted": ["oci-removed-by-a-layer"],
    "hard links of OCI layers fail": ["oci-hard-link"],
    "layers by zstd are refused": ["oci-zstd-layer"],
    "AZURE_ACCESS_TOKEN of the webhook is forgotten": ["azure-access-token"],
}
"""Fault to the names of the cases that show it."""


@pytest.mark.parametrize("fault", COMPARED)
def test_the_old_program_is_shown_to_have_the_fault(fault: str) -> None:
    """The comparison runs both programs in these cases."""
    cases = {case.name: case for case in CASES}
    for name in COMPARED[fault]:
        assert isinstance(cases[name].old, Wrong), name


# --- wrong files ------------------------------------------------------------------------------


def test_files_of_version_1_are_gone_though_version_2_has_other_names_and_another_uri(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path
) -> None:
    """A claim outlives a pod, and the next revision of a service has another URI."""
    seaweedfs.put_raw(s3, f"{prefix}/v1/model-v1.bin", b"1")
    seaweedfs.put_raw(s3, f"{prefix}/v2/model-v2.bin", b"2")
    for version in ("v1", "v2"):
        ended = command(f"s3://{s3}/{prefix}/{version}", str(dest))
        assert ended.returncode == 0, ended.stderr
    assert tree(dest) == {"model-v2.bin": b"2"}


def test_a_failed_version_2_leaves_version_1_whole(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path
) -> None:
    """What served yesterday serves today."""
    seaweedfs.put_raw(s3, f"{prefix}/v1/a.bin", b"1")
    Storage.download(f"s3://{s3}/{prefix}/v1", str(dest))
    with pytest.raises(ModelMissingError):
        Storage.download(f"s3://{s3}/{prefix}/v2", str(dest))
    assert tree(dest) == {"a.bin": b"1"}


def test_two_versions_are_never_mixed_over_http(odd_http: OddServer, dest: Path) -> None:
    """A file that changes while it is fetched is fetched anew."""
    kind = {"Content-Type": "application/octet-stream"}
    old, new = StaticFile(b"1" * 100_000, headers=kind), StaticFile(b"2" * 100_000, headers=kind)
    old.cuts, new.etag = [50_000], '"v2"'
    server = odd_http(old)

    def changing(request: Request) -> Reply:
        reply = old(request)
        if request.method == "GET":
            server.handler = new
        return reply

    server.handler = changing
    Storage.download(f"{server.url}/m.bin", str(dest))
    assert tree(dest) == {"m.bin": b"2" * 100_000}


def test_an_oci_layer_of_another_digest_is_refused(
    oci_registry: Registry, prefix: str, dest: Path
) -> None:
    """A registry, or whoever sits before it, that changes a byte is not believed."""
    pusher = Pusher.of(oci_registry, prefix)
    pusher.image("v1", [[("models/a.bin", b"1" * 1000)]], "")

    def alter(path: str, body: bytes) -> bytes:
        return body.replace(b"1" * 1000, b"2" * 1000)

    with Gate(oci_registry, alter=alter) as gate, pytest.raises(IntegrityError):
        Storage.download(pusher.uri(":v1", gate.host), str(dest))
    assert tree(dest) == {}


# --- robustness -------------------------------------------------------------------------------


def test_a_transfer_that_is_always_cut_leaves_nothing(
    odd_http: OddServer, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither 100 of 1,000 bytes, nor a part of what an archive holds."""
    monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "2")
    kind = {"Content-Type": "application/gzip"}
    body = tar({"a": b"1" * 1000, "b": os.urandom(1000)})
    server = odd_http(lambda _: Reply(200, body, kind, cut=100))
    for name in ("m.tar.gz", "m.bin"):
        with pytest.raises(StorageError):
            Storage.download(f"{server.url}/{name}", str(dest))
        assert tree(dest) == {}


def test_one_503_is_not_fatal_over_http(odd_http: OddServer, dest: Path) -> None:
    """A server that restarts is asked again."""
    static = StaticFile(b"weights", headers={"Content-Type": "application/octet-stream"})
    failures = iter([503, 503])

    def handler(request: Request) -> Reply:
        status = next(failures, None)
        return static(request) if status is None else Reply(status)

    Storage.download(f"{odd_http(handler).url}/m.bin", str(dest))
    assert tree(dest) == {"m.bin": b"weights"}


def test_what_is_cut_is_resumed_by_a_range(odd_http: OddServer, dest: Path) -> None:
    """Bytes that came need not come again."""
    data = os.urandom(400_000)
    kind = {"Content-Type": "application/octet-stream"}
    server = odd_http(StaticFile(data, headers=kind, cuts=[300_000]))
    Storage.download(f"{server.url}/m.bin", str(dest))
    assert tree(dest) == {"m.bin": data}
    spans = [request.span for request in server.asked("GET")]
    assert len(spans) > 1
    assert spans[-1] is not None
    assert spans[-1][0] > 0


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_permanent_failure_is_asked_for_once(
    odd_http: OddServer, dest: Path, status: int
) -> None:
    """A pod that can never start shall say so at once."""
    server = odd_http(lambda _: Reply(status))
    with pytest.raises(StorageError):
        Storage.download(f"{server.url}/m.bin", str(dest))
    assert [len(server.asked(method)) <= 1 for method in ("GET", "HEAD")] == [True, True]


@pytest.mark.parametrize("fragment", ["sha256=" + "0" * 64, "blake3=" + "0" * 64])
def test_an_expected_digest_is_checked(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path, fragment: str
) -> None:
    """Nothing appears if it is another one."""
    seaweedfs.put_raw(s3, f"{prefix}/m.bin", b"weights")
    with pytest.raises(IntegrityError):
        Storage.download(f"s3://{s3}/{prefix}/m.bin#{fragment}", str(dest))
    assert tree(dest) == {}


def test_the_environment_is_never_written(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one process may have two secrets."""
    config = {
        "type": "s3",
        "access_key_id": seaweedfs.access_key,
        "secret_access_key": seaweedfs.secret_key,
        "endpoint_url": seaweedfs.endpoint,
        "region": seaweedfs.region,
        "anonymous": False,
    }
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps(config))
    monkeypatch.setenv("STORAGE_OVERRIDE_CONFIG", '{"region": "us-east-1"}')
    seaweedfs.put_raw(s3, f"{prefix}/m.bin", b"1")
    before = dict(os.environ)
    Storage.download(f"s3://{s3}/{prefix}/m.bin", str(dest))
    assert dict(os.environ) == before
    assert tree(dest) == {"m.bin": b"1"}


def test_a_host_with_auth_in_its_name_is_no_failed_authentication(
    dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be reached, which is what has to be said."""
    with ForwardProxy(hosts={"minio.authors.example": (HOST, free_port())}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.authors.example")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("STORAGE_TRANSFER__ATTEMPTS", "1")
        with pytest.raises(StorageError) as caught:
            Storage.download("s3://bucket/model", str(dest))
    assert not isinstance(caught.value, AuthenticationError)
    assert "authentication" not in str(caught.value).lower()
    assert proxy.asked


def test_gcs_lists_once_and_takes_several_files_at_a_time(
    gcs_server: FakeGCS, gcs_bucket: str, dest: Path, counting_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two files wait for each other at the proxy; one after the other they would not meet."""
    for number in range(4):
        gcs_server.put_raw(gcs_bucket, f"m/{number}.bin", b"1")
    meeting = threading.Barrier(2)

    def meet(number: int, method: str, path: str) -> None:
        if method == "GET" and ".bin" in path:
            meeting.wait(20)

    proxy = counting_proxy(gcs_server.endpoint)
    proxy.fault = meet
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
    Storage.download(f"gs://{gcs_bucket}/m", str(dest))
    assert len(tree(dest)) == 4
    assert not meeting.broken
    listings = [request for request in proxy.requests if "prefix=" in request.path]
    assert len(listings) == 1, listings


def test_a_large_blob_of_azure_comes_by_several_ranges_at_a_time(
    azurite: Azurite, azurite_container: str, dest: Path, counting_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two ranges wait for each other at the proxy, as the files of GCS do."""
    data = os.urandom(3 * 1024 * 1024)
    azurite.put_raw(azurite_container, "m/large.bin", data)
    meeting = threading.Barrier(2)
    awaited = iter(range(2))

    def meet(number: int, method: str, path: str) -> None:
        if method == "GET" and "large.bin" in path and next(awaited, None) is not None:
            meeting.wait(20)

    proxy = counting_proxy(azurite.endpoint)
    proxy.fault = meet
    there = azurite.connection_string().replace(azurite.endpoint, proxy.endpoint)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", there)
    monkeypatch.setenv("STORAGE_TRANSFER__PART_SIZE", str(1024 * 1024))
    Storage.download(f"azure://{azurite_container}/m", str(dest))
    assert tree(dest) == {"large.bin": data}
    assert not meeting.broken


def test_a_session_token_is_sent(
    moto: Moto, moto_shared_bucket: str, prefix: str, dest: Path, counting_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In every request, as temporary credentials demand."""
    proxy = counting_proxy(moto.endpoint)
    lead_to(moto, monkeypatch, proxy.endpoint)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    moto.put_raw(moto_shared_bucket, f"{prefix}/m.bin", b"1")
    Storage.download(f"s3://{moto_shared_bucket}/{prefix}", str(dest))
    assert proxy.requests
    assert {request.headers.get("x-amz-security-token") for request in proxy.requests} == {
        "the-token"
    }


def test_a_body_that_stalls_does_not_hang_for_ever(
    odd_http: OddServer, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after the time set, and asked for again."""
    monkeypatch.setenv("STORAGE_TRANSFER__STALL_TIMEOUT", "1")
    data = os.urandom(100_000)
    static = StaticFile(data, headers={"Content-Type": "application/octet-stream"})
    stalled = threading.Event()
    over = threading.Event()

    def handler(request: Request) -> Reply:
        reply = static(request)
        if request.method == "GET" and not stalled.is_set():
            stalled.set()
            reply.cut, reply.stall = 1000, over
        return reply

    try:
        Storage.download(f"{odd_http(handler).url}/m.bin", str(dest))
    finally:
        over.set()
    assert stalled.is_set()
    assert tree(dest) == {"m.bin": data}
