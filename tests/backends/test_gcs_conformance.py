"""GCS: both drivers through the conformance suite.

fake-gcs-server takes no object by the XML API, by which obstore writes. So obstore's writes are
held to the contract on a SeaweedFS behind a shim; ``gcs_support`` says what each cannot do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import GCSConfig
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.gcs_support import (
    FAKE_GCS_EXCEPTIONS,
    FAKE_GCS_OBSTORE_EXCEPTIONS,
    SHIM_EXCEPTIONS,
    GCSRaw,
)
from tests.backends.s3_support import S3Raw
from tests.servers.gcs import FakeGCS, GCSShim, OpenSeaweedFS


def opened(endpoint: str, bucket: str, driver: Literal["obstore", "fsspec"]) -> Backend:
    config = GCSConfig(token="any", endpoint_url=endpoint, driver=driver)
    return open_backend(parse_uri(f"gs://{bucket}/"), config, OpenOptions())


class FakeGCSConformance(BackendConformance):
    driver: ClassVar[Literal["obstore", "fsspec"]]

    @pytest.fixture
    def backend(self, gcs_server: FakeGCS, gcs_bucket: str) -> Iterator[Backend]:
        backend = opened(gcs_server.endpoint, gcs_bucket, self.driver)
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, gcs_server: FakeGCS, gcs_bucket: str) -> GCSRaw:
        return GCSRaw(gcs_server, gcs_bucket)

    @pytest.fixture
    def missing_bucket_backend(self, gcs_server: FakeGCS) -> Iterator[Backend]:
        backend = opened(gcs_server.endpoint, "no-such-bucket", self.driver)
        yield backend
        backend.close()


class TestFakeGcsByGcsfs(FakeGCSConformance):
    driver = "fsspec"
    exceptions: ClassVar = FAKE_GCS_EXCEPTIONS


@pytest.mark.slow
class TestFakeGcsByObstore(FakeGCSConformance):
    driver = "obstore"
    exceptions: ClassVar = FAKE_GCS_OBSTORE_EXCEPTIONS


@pytest.mark.slow
class TestGcsShimByObstore(BackendConformance):
    exceptions: ClassVar = SHIM_EXCEPTIONS

    @pytest.fixture(scope="class")
    @classmethod
    def class_bucket(cls, open_seaweedfs: OpenSeaweedFS) -> Iterator[str]:
        with open_seaweedfs.bucket("conformance-shim") as name:
            yield name

    @pytest.fixture
    def bucket(self, open_seaweedfs: OpenSeaweedFS, class_bucket: str) -> Iterator[str]:
        yield class_bucket
        open_seaweedfs.empty_bucket(class_bucket)

    @pytest.fixture
    def backend(self, gcs_shim: GCSShim, bucket: str) -> Iterator[Backend]:
        backend = opened(gcs_shim.endpoint, bucket, "obstore")
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, open_seaweedfs: OpenSeaweedFS, bucket: str) -> S3Raw:
        return S3Raw(open_seaweedfs, bucket)

    @pytest.fixture
    def missing_bucket_backend(self, gcs_shim: GCSShim) -> Iterator[Backend]:
        backend = opened(gcs_shim.endpoint, "no-such-bucket", "obstore")
        yield backend
        backend.close()
