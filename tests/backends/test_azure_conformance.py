"""Azure: both drivers through the conformance suite, on Azurite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import AzureConfig
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.azure_support import AZURITE_EXCEPTIONS, AzureRaw
from tests.servers.azurite import Azurite


class AzureConformance(BackendConformance):
    driver: ClassVar[Literal["obstore", "fsspec"]]
    exceptions: ClassVar = AZURITE_EXCEPTIONS

    @pytest.fixture(scope="class")
    @classmethod
    def class_container(cls, azurite: Azurite) -> Iterator[str]:
        with azurite.container(f"conformance-{cls.driver}") as name:
            yield name

    @pytest.fixture
    def container(self, azurite: Azurite, class_container: str) -> Iterator[str]:
        yield class_container
        azurite.empty_container(class_container)

    def open(self, azurite: Azurite, container: str) -> Backend:
        config = AzureConfig(*azurite.main, endpoint_url=azurite.account_url(), driver=self.driver)
        return open_backend(parse_uri(f"azure://{container}/"), config, OpenOptions())

    @pytest.fixture
    def backend(self, azurite: Azurite, container: str) -> Iterator[Backend]:
        backend = self.open(azurite, container)
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, azurite: Azurite, container: str) -> AzureRaw:
        return AzureRaw(azurite, container)

    @pytest.fixture
    def missing_bucket_backend(self, azurite: Azurite) -> Iterator[Backend]:
        backend = self.open(azurite, "no-such-container")
        yield backend
        backend.close()


class TestAzuriteByObstore(AzureConformance):
    driver = "obstore"


# Most tests of keys open a client of its own.
@pytest.mark.slow
class TestAzuriteByAdlfs(AzureConformance):
    driver = "fsspec"
