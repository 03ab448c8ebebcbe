"""Artifacts in an OCI registry: ModelPack, ORAS, and others; layers are files or folders."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from storage.backends.base import ByteRange
from storage.config import OCIConfig
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    TransientError,
    UnreachableError,
)
from tests.backends.oci_support import (
    LAYER,
    TITLE,
    Entry,
    Pusher,
    compressed,
    opened,
    sha256,
    tar_of,
    tree_of,
)
from tests.servers.process import free_port
from tests.servers.registry import Gate, Registry

UNPACK = "io.deis.oras.content.unpack"
CONTENT = "io.deis.oras.content.digest"


@pytest.fixture
def push(oci_registry: Registry, prefix: str) -> Pusher:
    """A repository of its own."""
    return Pusher.of(oci_registry, prefix)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The place for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("owner", ["cncf", "cnai"])
def test_the_files_of_a_modelpack_artifact_are_its_layers(push: Pusher, owner: str) -> None:
    kind, path = f"application/vnd.{owner}.model", f"org.{owner}.model.filepath"
    push.artifact(
        "v1",
        [
            push.blob(b"w" * 5000, f"{kind}.weight.v1.raw", **{path: "weights/model.safetensors"}),
            push.blob(b"{}", f"{kind}.weight.config.v1.raw", **{path: "./config.json"}),
            push.blob(b"", f"{kind}.doc.v1.raw", **{path: "EMPTY"}),
        ],
        f"{kind}.manifest.v1+json",
    )
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {
            "weights/model.safetensors": b"w" * 5000,
            "config.json": b"{}",
            "EMPTY": b"",
        }
        info = backend.stat("weights/model.safetensors")
        assert info.digests == (Digest.parse(sha256(b"w" * 5000)),)
        assert {info.key for info in backend.list("weights/")} == {"weights/model.safetensors"}


@pytest.mark.parametrize("coding", ["", "gzip", "zstd"])
@pytest.mark.parametrize("owner", ["cncf", "cnai"])
def test_layers_of_a_modelpack_artifact_may_be_archives(
    push: Pusher, owner: str, coding: str
) -> None:
    kind = f"application/vnd.{owner}.model.weight.v1.tar" + (f"+{coding}" if coding else "")
    tar = tar_of([("weights/a", b"a"), ("weights/sub/b", b"b" * 1000)])
    raw = push.blob(
        b"doc",
        f"application/vnd.{owner}.model.doc.v1.raw",
        **{f"org.{owner}.model.filepath": "README.md"},
    )
    packed = push.blob(compressed(tar, coding), kind, **{f"org.{owner}.model.filepath": "weights"})
    push.artifact("v1", [packed, raw])
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {
            "weights/a": b"a",
            "weights/sub/b": b"b" * 1000,
            "README.md": b"doc",
        }


def test_a_file_beside_archives_is_told_without_unpacking(
    oci_registry: Registry, push: Pusher, temporary: Path
) -> None:
    tar = push.blob(tar_of([("a", b"a")]), "application/vnd.cncf.model.weight.v1.tar")
    push.artifact("v1", [tar, push.blob(b"doc", "text/plain", **{TITLE: "README.md"})])
    with Gate(oci_registry) as gate, opened(push.uri(":v1", gate.host)) as backend:
        assert backend.stat("README.md").size == 3
        assert gate.body_bytes == 0
        assert os.listdir(temporary) == []
        assert backend.stat("a").size == 1
        assert gate.body_bytes == tar["size"]
        assert len(os.listdir(temporary)) == 1
    assert os.listdir(temporary) == []


def test_what_oras_pushes_is_read(push: Pusher, tmp_path: Path) -> None:
    from oras.client import OrasClient

    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_bytes(b"b")
    (tmp_path / "model.bin").write_bytes(b"m" * 3000)
    (tmp_path / "data.tar.gz").write_bytes(b"an archive that is a file")
    OrasClient(insecure=True).push(
        target=f"{push.host}/{push.repository}:v1",
        files=[str(tmp_path / name) for name in ("model.bin", "folder", "data.tar.gz")],
        disable_path_validation=True,
        quiet=True,
    )
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {
            "model.bin": b"m" * 3000,
            "folder/sub/b": b"b",
            "data.tar.gz": b"an archive that is a file",
        }


def test_folders_of_the_oras_command_are_unpacked(push: Pusher) -> None:
    # It tells of the tar in the layer by an annotation, and of its digest by another one.
    tar = tar_of([Entry("m", folder=True), ("m/a", b"a")])
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    for tag, digest in (("good", sha256(tar)), ("bad", sha256(b""))):
        notes = {TITLE: "m", UNPACK: "true", CONTENT: digest}
        push.artifact(tag, [push.blob(compressed(tar, "gzip"), kind, **notes)])
    with opened(push.uri(":good")) as backend:
        assert tree_of(backend) == {"m/a": b"a"}
    with opened(push.uri(":bad")) as backend, pytest.raises(IntegrityError, match="the content"):
        tree_of(backend)


def test_a_layer_without_a_name_is_called_by_its_digest(push: Pusher) -> None:
    push.artifact("v1", [push.blob(b"1", "application/octet-stream")])
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {sha256(b"1"): b"1"}


def test_two_contents_of_one_name_are_both_listed(push: Pusher) -> None:
    # So whoever downloads them is told that they collide.
    layers = [push.blob(data, "text/plain", **{TITLE: "a"}) for data in (b"1", b"2")]
    push.artifact("v1", layers)
    with opened(push.uri(":v1")) as backend:
        assert [info.key for info in backend.list()] == ["a", "a"]


def test_an_archive_that_leads_elsewhere_is_refused(push: Pusher, temporary: Path) -> None:
    kind = "application/vnd.cncf.model.weight.v1.tar"
    for number, entry in enumerate((Entry("../x", b"1"), Entry("x", link="/etc/passwd"))):
        push.artifact(f"v{number}", [push.blob(tar_of([entry]), kind)])
        with opened(push.uri(f":v{number}")) as backend, pytest.raises(InvalidInput):
            list(backend.list())
    assert os.listdir(temporary) == []


# -- reading by ranges ---------------------------------------------------------------------------


@pytest.fixture
def blob(push: Pusher) -> bytes:
    """The content of the only file of an artifact ``v1``."""
    data = os.urandom(300_000)
    push.artifact("v1", [push.blob(data, "application/octet-stream", **{TITLE: "m"})])
    return data


def test_parts_of_a_file_are_asked_for_by_ranges(
    oci_registry: Registry, push: Pusher, blob: bytes
) -> None:
    with Gate(oci_registry) as gate, opened(push.uri(":v1", gate.host)) as backend:
        info = backend.stat("m")
        for start, end in ((0, 1), (1000, 200_000), (299_999, 300_000)):
            with backend.read("m", ByteRange(start, end), info) as body:
                assert b"".join(map(bytes, body)) == blob[start:end]
        assert gate.body_bytes == 1 + 199_000 + 1
        with pytest.raises(InvalidInput):
            backend.read("m", ByteRange(0, 300_001), info)


def test_a_registry_without_ranges_is_read_all_the_same(
    oci_registry: Registry, push: Pusher, blob: bytes
) -> None:
    gate = Gate(oci_registry, drop_ranges=True)
    with gate, opened(push.uri(":v1", gate.host)) as backend:
        info = backend.stat("m")
        assert info.ranged
        with backend.read("m", ByteRange(1000, 2000), info) as body:
            assert b"".join(map(bytes, body)) == blob[1000:2000]
        assert not backend.stat("m").ranged


def test_a_read_of_what_was_replaced_fails_or_gives_the_old_bytes(
    push: Pusher, blob: bytes
) -> None:
    with opened(push.uri(":v1")) as backend, opened(push.uri(":v1")) as other:
        old = backend.stat("m")
        push.artifact("v1", [push.blob(b"new", "application/octet-stream", **{TITLE: "m"})])
        assert backend.stat("m").size == 3
        with other.read("m", ByteRange(0, 10), old) as body:
            assert b"".join(map(bytes, body)) == blob[:10]
        gone = f"sha256:{'0' * 64}"
        with pytest.raises(ObjectChangedError):
            other.read("m", None, replace(old, version=gone))


# -- errors --------------------------------------------------------------------------------------


def test_what_is_not_there_is_missing(push: Pusher, blob: bytes) -> None:
    for uri in (push.uri(":none"), push.uri(f"@sha256:{'0' * 64}"), push.uri(":v1") + "x"):
        with opened(uri) as backend:
            for ask in (lambda one=backend: list(one.list()), backend.current_version):
                with pytest.raises(ModelMissingError):
                    ask()
    with opened(push.uri(":v1")) as backend, pytest.raises(ModelMissingError):
        backend.stat("none")
    with opened(push.uri(":v1")) as backend:
        assert list(backend.list("none/")) == []


@pytest.mark.parametrize("key", ["a//b", "./a", "a/../b", "a//"])
def test_odd_paths_are_refused(push: Pusher, blob: bytes, key: str) -> None:
    with opened(push.uri(":v1")) as backend:
        with pytest.raises(InvalidInput):
            backend.stat(key)
        with pytest.raises(InvalidInput):
            backend.read(key)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (401, {}, AuthenticationError),
        (403, {}, AuthenticationError),
        (429, {"Retry-After": "7"}, TransientError),
        (500, {}, TransientError),
        (503, {"Retry-After": "7"}, TransientError),
    ],
)
def test_refusals_are_told_by_kind(
    oci_registry: Registry,
    push: Pusher,
    blob: bytes,
    status: int,
    headers: dict[str, str],
    expected: type[Exception],
) -> None:
    refused = ""

    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        return (status, headers) if refused and refused in path else None

    with Gate(oci_registry, refuse=refuse) as gate, opened(push.uri(":v1", gate.host)) as backend:
        info = backend.stat("m")
        refused = "/blobs/"
        with pytest.raises(expected) as caught:
            backend.read("m", None, info)
        refused = "/manifests/"
        with pytest.raises(expected):
            backend.stat("m")
        if isinstance(caught.value, TransientError):
            assert caught.value.retry_after == (7.0 if headers else None)
            assert caught.value.throttled == (status in (429, 503))


def test_a_body_that_ends_early_is_worth_repeating(
    oci_registry: Registry, push: Pusher, blob: bytes
) -> None:
    def alter(path: str, body: bytes) -> bytes:
        return body[:1000] if "/blobs/" in path else body

    with Gate(oci_registry, alter=alter) as gate, opened(push.uri(":v1", gate.host)) as backend:
        body = backend.read("m", None, backend.stat("m"))
        with body, pytest.raises(TransientError, match="too early"):
            list(body)


def test_nobody_at_the_address_is_unreachable() -> None:
    with (
        opened(f"oci://127.0.0.1:{free_port()}/a/b:v1") as backend,
        pytest.raises(UnreachableError, match="nobody answers"),
    ):
        backend.current_version()


def test_tls_where_there_is_none_is_a_matter_of_the_settings(
    oci_registry: Registry, push: Pusher, blob: bytes
) -> None:
    with (
        opened(push.uri(":v1"), OCIConfig(plain_http=False)) as backend,
        pytest.raises(ConfigurationError, match="no TLS with the registry"),
    ):
        backend.current_version()


def test_an_unknown_repository_is_a_missing_bucket(oci_registry: Registry, push: Pusher) -> None:
    answer = {"errors": [{"code": "NAME_UNKNOWN", "message": "repository name not known"}]}

    def alter(path: str, body: bytes) -> bytes:
        return json.dumps(answer).encode()

    with (
        Gate(oci_registry, alter=alter) as gate,
        opened(push.uri(":v1", gate.host)) as backend,
        pytest.raises(BucketMissingError, match="no such repository"),
    ):
        list(backend.list())


def test_a_registry_without_head_is_asked_by_get(
    oci_registry: Registry, push: Pusher, blob: bytes
) -> None:
    def refuse(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        return (405, {}) if method == "HEAD" else None

    with Gate(oci_registry, refuse=refuse) as gate, opened(push.uri(":v1", gate.host)) as backend:
        assert tree_of(backend) == {"m": blob}
        assert backend.current_version() == backend.stat("m").version


def test_a_layer_type_of_an_image_is_a_file_of_an_artifact(push: Pusher) -> None:
    # The default type of files that ORAS pushes.
    push.artifact("v1", [push.blob(b"no tar", LAYER, **{TITLE: "m.bin"})])
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {"m.bin": b"no tar"}
