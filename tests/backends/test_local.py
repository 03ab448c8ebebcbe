"""Files and mounted claims: the conformance suite, and which directory a URI means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, Capabilities, OpenOptions, bytes_payload
from storage.backends.local.backend import LocalBackend
from storage.errors import (
    BucketMissingError,
)
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.directories import DirectoryRaw, claim


class DirectoryConformance(BackendConformance):
    exceptions: ClassVar = {
        "test_key_may_be_the_beginning_of_another": "a name is a file or a directory",
    }

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "bucket"
        root.mkdir()
        return root

    @pytest.fixture
    def raw(self, root: Path) -> DirectoryRaw:
        return DirectoryRaw(root)


class TestFileConformance(DirectoryConformance):
    @pytest.fixture
    def backend(self, root: Path) -> LocalBackend:
        return LocalBackend(str(root))

    @pytest.fixture
    def missing_bucket_backend(self, tmp_path: Path) -> LocalBackend:
        return LocalBackend(str(tmp_path / "none"))


class TestDurableFileConformance(DirectoryConformance):
    count = 100

    @pytest.fixture
    def backend(self, root: Path) -> LocalBackend:
        return LocalBackend(str(root), durable=True)


class TestClaimConformance(DirectoryConformance):
    @pytest.fixture
    def backend(self, root: Path) -> Backend:
        return claim(root.parent, root.name)

    @pytest.fixture
    def missing_bucket_backend(self, tmp_path: Path) -> Backend:
        return claim(tmp_path, "none")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture(params=["file", "pvc"])
def either(request: pytest.FixtureRequest, root: Path) -> Backend:
    if request.param == "file":
        return LocalBackend(str(root))
    return claim(root.parent, root.name)


def test_capabilities_of_files() -> None:
    assert LocalBackend("/").capabilities == Capabilities(
        list=True,
        write=True,
        delete=True,
        copy=True,
        ranged_read=True,
        pinned_read=True,
        if_absent=True,
        if_match=True,
        metadata=False,
        sign=False,
        any_key=False,
    )


@pytest.mark.parametrize("form", ["{}/m/a", "file://{}/m/a"], ids=["path", "uri"])
def test_key_of_a_file_is_its_absolute_path(root: Path, form: str) -> None:
    location = parse_uri(form.format(root))
    backend = open_backend(location, None, OpenOptions())
    key = location.key.lstrip("/")
    backend.write(key, bytes_payload(b"12345"))
    assert (root / "m/a").read_bytes() == b"12345"
    assert backend.stat(key).size == 5
    assert [info.key for info in backend.list(f"{root}/".lstrip("/"))] == [key]
    assert backend.local_path(key) == str(root / "m/a")


def test_claim_is_below_the_mount_root_or_where_the_config_says(tmp_path: Path) -> None:
    location = parse_uri("pvc://models/iris")
    elsewhere = SimpleNamespace(mount_root="/mnt/pvc", mounts={"models": str(tmp_path)})
    for config, path in (
        (None, "/mnt/pvc/models/iris"),
        (SimpleNamespace(mount_root=tmp_path, mounts={}), f"{tmp_path}/models/iris"),
        (elsewhere, f"{tmp_path}/iris"),
    ):
        backend = open_backend(location, config, OpenOptions())
        assert backend.local_path("iris") == path


def test_local_path_of_trees_and_of_the_bucket(either: Backend, root: Path) -> None:
    assert either.local_path("") == str(root)
    assert either.local_path("m/tree/") == str(root / "m/tree")


def test_construction_touches_nothing(tmp_path: Path) -> None:
    LocalBackend(str(tmp_path / "none")).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("operation", ["stat", "list", "read", "write", "copy", "delete"])
def test_missing_claim_says_where_it_was_looked_for(tmp_path: Path, operation: str) -> None:
    backend = claim(tmp_path, "none")
    calls: dict[str, Callable[[], object]] = {
        "stat": lambda: backend.stat("a"),
        "list": lambda: list(backend.list()),
        "read": lambda: backend.read("a"),
        "write": lambda: backend.write("a", bytes_payload(b"")),
        "copy": lambda: backend.copy("a", "b"),
        "delete": lambda: backend.delete(["a"]),
    }
    with pytest.raises(BucketMissingError) as caught:
        calls[operation]()
    assert str(tmp_path / "none") in str(caught.value)
    assert "pvc://none/" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_deep_path_is_resolved_in_a_claim_whose_mount_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    backend = claim(tmp_path, "linked")
    backend.write("m/a", bytes_payload(b"1"))
    assert [info.key for info in backend.list()] == ["m/a"]
    assert backend.local_path("m/a") == str(tmp_path / "linked/m/a")
