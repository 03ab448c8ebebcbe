"""What can be read from an OCI registry through the conformance suite: artifacts and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from storage.backends.base import Backend
from tests.backends.oci_support import TITLE, Descriptor, Pusher, open_oci
from tests.backends.reading import ReadingConformance
from tests.servers.registry import Registry


class ArtifactRaw:
    """Pushes the artifact anew for every file."""

    def __init__(self, push: Pusher) -> None:
        self.push = push
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, Descriptor] = {}
        self.publish()

    def put(self, key: str, data: bytes) -> None:
        if not key.endswith("/"):  # an artifact has no folders
            self.files[key] = data
            self.add(key, data)
            self.publish()

    def add(self, key: str, data: bytes) -> None:
        self.blobs[key] = self.push.blob(data, "application/octet-stream", **{TITLE: key})

    def publish(self) -> None:
        self.push.artifact("v1", list(self.blobs.values()))

    def get(self, key: str) -> bytes:
        return self.files[key]

    def keys(self) -> set[str]:
        return set(self.files)


class ImageRaw(ArtifactRaw):
    """Pushes the image anew for every file, all files in one layer."""

    def add(self, key: str, data: bytes) -> None:
        pass

    def publish(self) -> None:
        layer = [(f"models/{key}", data) for key, data in self.files.items()]
        self.push.image("v1", [layer] if layer else [], "zstd")


class OCIConformance(ReadingConformance):
    count: ClassVar = 20
    large: ClassVar = 1024 * 1024
    kind: ClassVar = ArtifactRaw

    @pytest.fixture
    def raw(self, oci_registry: Registry, prefix: str) -> ArtifactRaw:
        return self.kind(Pusher.of(oci_registry, prefix))

    @pytest.fixture
    def backend(self, raw: ArtifactRaw) -> Iterator[Backend]:
        backend = open_oci(raw.push.uri(":v1"))
        yield backend
        backend.close()

    @pytest.fixture
    def missing_bucket_backend(self, oci_registry: Registry) -> Iterator[Backend]:
        backend = open_oci(f"oci://{oci_registry.host}/no/such:v1")
        yield backend
        backend.close()


class TestArtifacts(OCIConformance):
    pass


class TestImages(OCIConformance):
    kind: ClassVar = ImageRaw
    exceptions: ClassVar = {
        **{
            f"{test}[backslash-dots]": "a name that leads elsewhere on other systems is refused"
            for test in (
                "test_odd_key_is_read",
                "test_odd_key_is_listed",
                "test_odd_prefix_is_literal",
            )
        },
        "test_key_may_be_the_beginning_of_another": "in a file system nothing is both",
    }
