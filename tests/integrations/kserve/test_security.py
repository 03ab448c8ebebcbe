"""What KServe's storage client reveals, or lets out of its folder, is not so here."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage import AuthenticationError, StorageError
from storage.integrations.kserve import Storage
from tests.integrations.kserve.case import zipped
from tests.integrations.kserve.faults_support import command, is_empty, lead_to, tree
from tests.servers import (
    Azurite,
    FakeGCS,
    ForwardProxy,
    Moto,
    OddHTTP,
    Reply,
    SeaweedFS,
    free_port,
)
from tests.servers.process import HOST
from tests.servers.tls import TlsFront

pytestmark = pytest.mark.usefixtures("short_waits")

OddServer = Callable[..., OddHTTP]


@pytest.fixture
def far(odd_http: OddServer) -> Iterator[Callable[..., OddHTTP]]:
    """Call it with a host and a body to have that host serve it, over TLS that is trusted."""
    with ForwardProxy() as proxy, pytest.MonkeyPatch.context() as patch:
        fronts: list[TlsFront] = []

        def serve(host: str, body: bytes) -> OddHTTP:
            headers = {"Content-Type": "application/octet-stream"}
            server = odd_http(lambda _: Reply(200, body, headers))
            front = TlsFront(server.url, hosts=(host,)).start()
            fronts.append(front)
            proxy.hosts[host] = (HOST, front.port)
            patch.setenv("HTTPS_PROXY", proxy.url)
            patch.setenv("SSL_CERT_FILE", str(front.ca_file))
            patch.setenv("REQUESTS_CA_BUNDLE", str(front.ca_file))
            return server

        yield serve
        for front in fronts:
            front.stop()


def test_githubusercontent_is_not_taken_for_git(far: Callable[..., OddHTTP], dest: Path) -> None:
    """What begins like ``.git`` within a host's name is no end of a path."""
    far("raw.githubusercontent.com", b"weights")
    uri = "https://raw.githubusercontent.com/o/r/main/model.bin"
    assert Storage.download(uri, str(dest)) == str(dest)
    assert tree(dest) == {"model.bin": b"weights"}


@pytest.mark.parametrize(
    "variables",
    [
        {"AZURE_ACCESS_TOKEN": "the-bearer-token"},
        {"AZURE_STORAGE_ACCESS_KEY": base64.b64encode(b"the key").decode()},
        {"AZ_TENANT_ID": "tenant-1", "AZ_CLIENT_ID": "client-1", "AZ_CLIENT_SECRET": "secret-1"},
    ],
    ids=["token", "key", "principal"],
)
@pytest.mark.parametrize(
    "path",
    [
        "https://a.blob.core.windows.net/c/x.bin",
        "a.blob.core.windows.net/c/x.bin",
        "?u=https://a.blob.core.windows.net/c/x.bin",
    ],
)
def test_a_host_that_only_mentions_azure_gets_no_credential(
    far: Callable[..., OddHTTP],
    dest: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    path: str,
) -> None:
    """It is a host like any other, wherever its path says that it is Azure."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = far("evil.example", b"weights")
    uri = f"https://evil.example/x.bin{path}" if path[0] == "?" else f"https://evil.example/{path}"
    Storage.download(uri, str(dest))
    assert tree(dest) == {"x.bin": b"weights"}
    assert server.requests
    for request in server.requests:
        said = str(request.headers)
        assert request.headers["Authorization"] is None
        assert not any(value in said for value in variables.values())


@pytest.mark.parametrize("key", ["m/../../out", "m/a/../../../out"])
def test_keys_that_lead_out_of_the_destination_are_refused_by_s3(
    moto: Moto, moto_shared_bucket: str, prefix: str, dest: Path,
    monkeypatch: pytest.MonkeyPatch, key: str,
) -> None:  # fmt: skip
    """Nothing is written, neither outside nor inside."""
    lead_to(moto, monkeypatch)
    moto.put_raw(moto_shared_bucket, f"{prefix}/{key}", b"1")
    moto.put_raw(moto_shared_bucket, f"{prefix}/m/good", b"2")
    with pytest.raises(StorageError, match=r"\.\."):
        Storage.download(f"s3://{moto_shared_bucket}/{prefix}/m", str(dest))
    assert is_empty(dest)
    assert sorted(os.listdir(dest.parent)) in (["dest"], [])


def test_keys_that_lead_out_of_the_destination_are_refused_by_gcs(
    gcs_server: FakeGCS, gcs_bucket: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on S3."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.endpoint)
    gcs_server.put_raw(gcs_bucket, "m/../../out", b"1")
    gcs_server.put_raw(gcs_bucket, "m/good", b"2")
    with pytest.raises(StorageError, match=r"\.\."):
        Storage.download(f"gs://{gcs_bucket}/m", str(dest))
    assert is_empty(dest)


def test_keys_that_lead_out_of_the_destination_are_refused_by_azure(
    azurite: Azurite, azurite_container: str, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on S3."""
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite.connection_string())
    azurite.put_raw(azurite_container, "m/../../out", b"1")
    azurite.put_raw(azurite_container, "m/good", b"2")
    assert "m/../../out" in azurite.keys_raw(azurite_container)
    with pytest.raises(StorageError, match=r"\.\."):
        Storage.download(f"azure://{azurite_container}/m", str(dest))
    assert is_empty(dest)


def test_configured_headers_do_not_follow_a_redirect_to_another_host(
    odd_http: OddServer, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for the host that they are configured for, and for no other."""
    kind = {"Content-Type": "application/octet-stream"}
    other = odd_http(lambda _: Reply(200, b"weights", kind), "localhost")
    first = odd_http(lambda request: Reply(302, headers={"Location": f"{other.url}/m.bin"}))
    headers = {"Authorization": "Bearer t0ken", "X-Api-Key": "k3y", "Cookie": "s3ssion"}
    monkeypatch.setenv(f"{HOST}-headers", json.dumps(headers))
    Storage.download(f"{first.url}/m.bin", str(dest))
    assert tree(dest) == {"m.bin": b"weights"}
    assert first.requests[0].headers["X-Api-Key"] == "k3y"
    for request in other.requests:
        for name in headers:
            assert request.headers[name] is None


def test_signatures_in_urls_are_neither_logged_nor_said(
    odd_http: OddServer, dest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither on success nor on failure, at no level, in no message."""
    caplog.set_level(logging.DEBUG)
    kind = {"Content-Type": "application/octet-stream"}
    server = odd_http(lambda request: Reply(200 if "good" in request.path else 403, b"1", kind))
    for name in ("good.bin", "bad.bin"):
        uri = f"{server.url}/{name}?X-Amz-Signature=SECRETSIGNATURE&sig=SECRETSAS"
        if name == "good.bin":
            Storage.download(uri, str(dest))
        else:
            with pytest.raises(AuthenticationError) as caught:
                Storage.download(uri, str(dest))
            assert "SECRET" not in f"{caught.value} {caught.value!r}"
    ours = [record.getMessage() for record in caplog.records if "urllib3" not in record.name]
    assert not [line for line in ours if "SECRET" in line]


def test_signatures_in_urls_are_not_in_the_log_of_the_pod(
    odd_http: OddServer, tmp_path: Path
) -> None:
    """What the command prints, when it works and when it does not."""
    kind = {"Content-Type": "application/octet-stream"}
    server = odd_http(lambda request: Reply(200 if "good" in request.path else 404, b"1", kind))
    for name, status in (("good", 0), ("bad", 1)):
        ended = command(f"{server.url}/{name}.bin?sig=SECRETSAS", str(tmp_path / name))
        assert ended.returncode == status, ended.stderr
        assert "SECRET" not in ended.stdout + ended.stderr
        assert f"{name}.bin" in ended.stderr


def test_secrets_of_hdfs_are_neither_logged_nor_left_behind(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A keytab and headers come in a variable; they go with the call, whatever comes of it."""
    caplog.set_level(logging.DEBUG)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    config = {
        "type": "webhdfs",
        "HDFS_NAMENODE": f"http://{HOST}:{free_port()}",
        "HEADERS": '{"X-Knox-Token": "SECRETTOKEN"}',
        "TLS_CA": base64.b64encode(b"SECRETCA").decode(),
    }
    monkeypatch.setenv("STORAGE_CONFIG", json.dumps(config))
    with pytest.raises(StorageError) as caught:
        Storage.download("webhdfs://user/me/model", str(dest))
    assert "SECRET" not in f"{caught.value} {caplog.text}"
    assert list(temporary.iterdir()) == []
    assert is_empty(dest)


def _bomb(name: str) -> bytes:
    """Return an archive of a few kilobytes that says it holds 2 GiB."""
    if name.endswith(".zip"):
        honest, lie = struct.pack("<L", 1 << 20), struct.pack("<L", (1 << 31) - 1)
        return zipped({"weights.bin": bytes(1 << 20)}).replace(honest, lie)
    head = tarfile.TarInfo("weights.bin")
    head.size = 1 << 31
    return gzip.compress(head.tobuf() + bytes(1 << 20))


@pytest.mark.parametrize("name", ["bomb.zip", "bomb.tar.gz"])
def test_an_archive_that_becomes_a_thousand_times_its_size_is_refused(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path, name: str
) -> None:
    """What unpacks to gigabytes out of nothing fills a node's disk, and its neighbours'."""
    seaweedfs.put_raw(s3, f"{prefix}/{name}", _bomb(name))
    with pytest.raises(StorageError, match=name):
        Storage.download(f"s3://{s3}/{prefix}/{name}", str(dest))
    assert is_empty(dest)


def test_a_zip_keeps_its_links_and_its_executables(
    seaweedfs: SeaweedFS, s3: str, prefix: str, dest: Path
) -> None:
    """Python's zipfile drops both without a word."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for path, mode, content in (
            ("bin/run.sh", 0o100755, b"#!/bin/sh\n"),
            ("weights.bin", 0o100644, b"1"),
            ("latest.bin", 0o120777, b"weights.bin"),
        ):
            entry = zipfile.ZipInfo(path)
            entry.create_system = 3
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    seaweedfs.put_raw(s3, f"{prefix}/m.zip", written.getvalue())
    Storage.download(f"s3://{s3}/{prefix}/m.zip", str(dest))
    assert os.readlink(dest / "latest.bin") == "weights.bin"
    assert os.access(dest / "bin" / "run.sh", os.X_OK)
    assert not (dest / "weights.bin").stat().st_mode & 0o111
