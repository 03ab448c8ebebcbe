"""Each way of S3 to get credentials, on both drivers, against servers that hand them out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import S3Config
from storage.errors import AuthenticationError
from storage.uri import parse_uri
from tests.servers import CountingProxy, Moto, SeaweedFS

ROLE = "arn:aws:iam::123456789012:role/reader"


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def opened() -> Iterator[Callable[[str, S3Config | None], Backend]]:
    backends: list[Backend] = []

    def make(bucket: str, config: S3Config | None) -> Backend:
        backends.append(open_backend(parse_uri(f"s3://{bucket}/"), config, OpenOptions()))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


class MetadataService(ThreadingHTTPServer):
    """An instance metadata service (IMDSv2) that gives the keys of one server to a role."""

    daemon_threads = True

    def __init__(self, server: SeaweedFS) -> None:
        super().__init__(("127.0.0.1", 0), _Metadata)
        expires = datetime.now(UTC) + timedelta(hours=6)
        self.credentials = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": server.access_key,
            "SecretAccessKey": server.secret_key,
            "Token": "",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Metadata(BaseHTTPRequestHandler):
    server: MetadataService
    token: ClassVar[str] = "session-token"
    folder: ClassVar[str] = "/latest/meta-data/iam/security-credentials/"

    def do_PUT(self) -> None:
        self._answer(200 if self.path == "/latest/api/token" else 404, self.token)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.headers.get("X-aws-ec2-metadata-token") != self.token:
            self._answer(401, "")
        elif self.path == self.folder:
            self._answer(200, "the-role")
        elif self.path in (f"{self.folder}the-role", "/task"):
            self._answer(200, json.dumps(self.server.credentials))
        else:
            self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def metadata(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    # botocore gives the service one second, once; a machine that stands still takes longer.
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "60")
    with MetadataService(seaweedfs) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        yield service
        service.shutdown()
        thread.join()


def keys(backend: Backend, prefix: str) -> list[str]:
    return [info.key for info in backend.list(f"{prefix}/")]


@pytest.mark.parametrize("way", ["config", "variable"])
def test_instance_profile(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    way: str,
    metadata: MetadataService,
    opened: Callable[[str, S3Config | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seaweedfs.put_raw(shared_bucket, f"{prefix}/m", b"1")
    place = metadata.url if way == "config" else None
    if way == "variable":
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
    config = S3Config(endpoint_url=seaweedfs.endpoint, metadata_endpoint=place, driver=driver)
    assert keys(opened(shared_bucket, config), prefix) == [f"{prefix}/m"]
    assert any(path.endswith("/the-role") for path in metadata.asked)


def test_profile_of_the_shared_files(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    tmp_path: Path,
    opened: Callable[[str, S3Config | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seaweedfs.put_raw(shared_bucket, f"{prefix}/m", b"1")
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = WRONG\naws_secret_access_key = WRONG\n"
        f"[team]\naws_access_key_id = {seaweedfs.access_key}\n"
        f"aws_secret_access_key = {seaweedfs.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    named = S3Config(profile="team", endpoint_url=seaweedfs.endpoint, driver=driver)
    assert keys(opened(shared_bucket, named), prefix) == [f"{prefix}/m"]
    unnamed = S3Config(endpoint_url=seaweedfs.endpoint, driver=driver)
    with pytest.raises(AuthenticationError):
        keys(opened(shared_bucket, unnamed), prefix)
    monkeypatch.setenv("AWS_PROFILE", "team")
    again = S3Config(endpoint_url=seaweedfs.endpoint, driver=driver, read_timeout=29)
    assert keys(opened(shared_bucket, again), prefix) == [f"{prefix}/m"]


def test_role_is_assumed_and_its_key_is_what_signs(
    moto: Moto,
    moto_shared_bucket: str,
    prefix: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, S3Config | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moto.put_raw(moto_shared_bucket, f"{prefix}/m", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto.endpoint)
    proxy = counting_proxy(moto.endpoint)
    config = S3Config(
        "AKIDOFTHEUSER", "SECRET", role_arn=ROLE, endpoint_url=proxy.endpoint, driver=driver
    )
    backend = opened(moto_shared_bucket, config)
    assert keys(backend, prefix) == [f"{prefix}/m"]
    assert backend.stat(f"{prefix}/m").size == 1
    signed_by = {request.headers["authorization"] for request in proxy.requests}
    assert signed_by
    for text in signed_by:
        assert "AKIDOFTHEUSER" not in text
        assert "Credential=ASIA" in text  # what AWS's names of temporary keys begin with
    assert all("x-amz-security-token" in request.headers for request in proxy.requests)


def test_web_identity_of_the_environment(
    moto: Moto,
    moto_shared_bucket: str,
    prefix: str,
    driver: Any,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, S3Config | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moto.put_raw(moto_shared_bucket, f"{prefix}/m", b"1")
    (tmp_path / "token").write_text("a.web.identity")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto.endpoint)
    proxy = counting_proxy(moto.endpoint)
    config = S3Config(endpoint_url=proxy.endpoint, driver=driver)
    assert keys(opened(moto_shared_bucket, config), prefix) == [f"{prefix}/m"]
    assert "Credential=ASIA" in proxy.requests[0].headers["authorization"]


def test_anonymous_sends_no_signature(
    seaweedfs: SeaweedFS,
    public_bucket: str,
    prefix: str,
    driver: Any,
    counting_proxy: Callable[[str], CountingProxy],
    opened: Callable[[str, S3Config | None], Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seaweedfs.put_raw(public_bucket, f"{prefix}/m", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WRONG")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "WRONG")
    proxy = counting_proxy(seaweedfs.endpoint)
    config = S3Config(anonymous=True, endpoint_url=proxy.endpoint, driver=driver)
    assert keys(opened(public_bucket, config), prefix) == [f"{prefix}/m"]
    assert all("authorization" not in request.headers for request in proxy.requests)


def test_presigned_urls_need_no_credentials(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    driver: Any,
    opened: Callable[[str, S3Config | None], Backend],
) -> None:
    import requests

    config = S3Config(
        seaweedfs.access_key, seaweedfs.secret_key, endpoint_url=seaweedfs.endpoint, driver=driver
    )
    backend = opened(shared_bucket, config)
    put = requests.put(backend.sign(f"{prefix}/a b+c", "PUT", 60), data=b"weights", timeout=30)
    assert put.status_code == 200
    assert seaweedfs.get_raw(shared_bucket, f"{prefix}/a b+c") == b"weights"
    got = requests.get(backend.sign(f"{prefix}/a b+c", "GET", 60), timeout=30)
    assert got.content == b"weights"
