"""S3: both drivers through the conformance suite, each on two real servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import S3Config
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.s3_support import MOTO_EXCEPTIONS, SEAWEEDFS_EXCEPTIONS, S3Raw
from tests.servers.s3 import S3Server


class S3Conformance(BackendConformance):
    driver: ClassVar[Literal["obstore", "fsspec"]]
    server_fixture: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, request: pytest.FixtureRequest) -> Any:
        return request.getfixturevalue(cls.server_fixture)

    @pytest.fixture(scope="class")
    @classmethod
    def class_bucket(cls, server: S3Server) -> Iterator[str]:
        with server.bucket(f"conformance-{cls.driver}") as name:
            yield name

    @pytest.fixture
    def bucket(self, server: S3Server, class_bucket: str) -> Iterator[str]:
        # A new bucket for each test would take most of the time on SeaweedFS.
        yield class_bucket
        server.empty_bucket(class_bucket)

    def open(self, server: S3Server, bucket: str) -> Backend:
        config = S3Config(
            server.access_key,
            server.secret_key,
            endpoint_url=server.endpoint,
            driver=self.driver,
        )
        return open_backend(parse_uri(f"s3://{bucket}/"), config, OpenOptions())

    @pytest.fixture
    def backend(self, server: S3Server, bucket: str) -> Iterator[Backend]:
        backend = self.open(server, bucket)
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, server: S3Server, bucket: str) -> S3Raw:
        return S3Raw(server, bucket)

    @pytest.fixture
    def missing_bucket_backend(self, server: S3Server) -> Iterator[Backend]:
        backend = self.open(server, "no-such-bucket")
        yield backend
        backend.close()


class TestSeaweedFSByObstore(S3Conformance):
    driver = "obstore"
    server_fixture = "seaweedfs"
    exceptions: ClassVar = SEAWEEDFS_EXCEPTIONS


# A client of s3fs takes a third of a second to make, and every test has its own.
@pytest.mark.slow
class TestSeaweedFSByS3fs(S3Conformance):
    driver = "fsspec"
    server_fixture = "seaweedfs"
    exceptions: ClassVar = SEAWEEDFS_EXCEPTIONS


@pytest.mark.slow
class TestMotoByObstore(S3Conformance):
    driver = "obstore"
    server_fixture = "moto"
    exceptions: ClassVar = MOTO_EXCEPTIONS


@pytest.mark.slow
class TestMotoByS3fs(S3Conformance):
    driver = "fsspec"
    server_fixture = "moto"
    exceptions: ClassVar = MOTO_EXCEPTIONS
