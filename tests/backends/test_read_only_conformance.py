"""Git, ModelScope and Azure Files through the conformance suite: all that is reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import AzureConfig, ModelScopeConfig
from storage.uri import parse_uri
from tests.backends.reading import ReadingConformance
from tests.servers.azure_files import ACCOUNT, AzureFiles
from tests.servers.git_http import GitHTTP
from tests.servers.modelscope import ModelScope
from tests.servers.odd_http import OddHTTP, Reply

_NO_FOLDERS = "git has no folders of their own, so there are no directory markers"
_MARKERS = ("test_directory_marker_is_no_object", "test_directory_markers_are_not_listed")


class DictRaw:
    """What a server of the tests keeps, around HTTP."""

    def __init__(self, files: dict[str, bytes], put: Callable[[str, bytes], object]) -> None:
        self._files = files
        self._put = put

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def get(self, key: str) -> bytes:
        return self._files[key]

    def keys(self) -> set[str]:
        return set(self._files)


class GitRaw:
    """A bare repository, by git's own plumbing."""

    def __init__(self, server: GitHTTP) -> None:
        self._server = server
        self._bare = server.folder / "m.git"

    def _git(self, *command: str, data: bytes | None = None) -> str:
        return self._server.git(*command, cwd=self._bare, data=data)

    def commit(self) -> None:
        commit = self._git("commit-tree", "-m", "more", self._git("write-tree"))
        self._git("update-ref", "refs/heads/main", commit)

    def put(self, key: str, data: bytes) -> None:
        name = self._git("hash-object", "-w", "--stdin", data=data)
        self._git("update-index", "--add", "--cacheinfo", f"100644,{name},{key}")
        self.commit()

    def get(self, key: str) -> bytes:
        return self._server.run("cat-file", "blob", f"main:{key}", cwd=self._bare)

    def keys(self) -> set[str]:
        return set(self._git("ls-tree", "-rz", "--name-only", "main").split("\0")) - {""}


class TestGit(ReadingConformance):
    count = 40
    # Folders of these names are listed by another test, and each case costs a repository.
    test_odd_key_is_listed = None
    exceptions: ClassVar = {
        **{
            f"{test}[hidden]": "git keeps no file or folder named .git"
            for test in (
                "test_odd_key_is_read",
                "test_odd_prefix_is_literal",
            )
        },
        **dict.fromkeys(_MARKERS, _NO_FOLDERS),
        "test_key_may_be_the_beginning_of_another": "a name is a file or a folder, not both",
    }

    @pytest.fixture
    def bucket(self, git_server: GitHTTP) -> str:
        git_server.create_bare("m")
        # A repository without a commit has no listing either, and an error of its own.
        GitRaw(git_server).commit()
        return git_server.uri("m")

    @pytest.fixture
    def backend(self, bucket: str) -> Iterator[Backend]:
        backend = open_backend(parse_uri(bucket), None, OpenOptions())
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, git_server: GitHTTP, bucket: str) -> GitRaw:
        return GitRaw(git_server)

    @pytest.fixture
    def missing_bucket_backend(self, git_server: GitHTTP) -> Backend:
        return open_backend(parse_uri(git_server.uri("missing")), None, OpenOptions())


class TestModelScope(ReadingConformance):
    exceptions: ClassVar = {"test_directory_markers_are_not_listed": _NO_FOLDERS}

    @pytest.fixture
    def service(self, odd_http: Callable[..., OddHTTP]) -> ModelScope:
        service = ModelScope(odd_http(lambda request: Reply(500)))
        service.models["owner/m"] = {"master": {}}
        return service

    def open(self, service: ModelScope, name: str) -> Backend:
        config = ModelScopeConfig(endpoint=service.server.url)
        return open_backend(parse_uri(f"modelscope://owner/{name}"), config, OpenOptions())

    @pytest.fixture
    def backend(self, service: ModelScope) -> Iterator[Backend]:
        backend = self.open(service, "m")
        yield backend
        backend.close()

    @pytest.fixture
    def missing_bucket_backend(self, service: ModelScope) -> Backend:
        return self.open(service, "missing")

    @pytest.fixture
    def raw(self, service: ModelScope) -> DictRaw:
        files = service.models["owner/m"]["master"]
        return DictRaw(files, files.__setitem__)


class TestAzureFiles(ReadingConformance):
    exceptions: ClassVar = {
        **{
            f"{test}[{case}]": "the service has no backslashes in names"
            for test in ("test_odd_key_is_read", "test_odd_prefix_is_literal")
            for case in ("backslash", "backslash-dots")
        },
        "test_keys_that_look_alike_are_two[case]": "the service takes upper for lower case",
    }

    @pytest.fixture
    def service(self, odd_http: Callable[..., OddHTTP]) -> AzureFiles:
        return AzureFiles(odd_http(lambda request: Reply(500)))

    def open(self, service: AzureFiles, share: str) -> Backend:
        location = parse_uri(f"https://{ACCOUNT}.file.core.windows.net/{share}/")
        config = AzureConfig(connection_string=service.connection_string)
        return open_backend(location, config, OpenOptions())

    @pytest.fixture
    def backend(self, service: AzureFiles) -> Iterator[Backend]:
        backend = self.open(service, "models")
        yield backend
        backend.close()

    @pytest.fixture
    def missing_bucket_backend(self, service: AzureFiles) -> Backend:
        return self.open(service, "missing")

    @pytest.fixture
    def raw(self, service: AzureFiles) -> DictRaw:
        files = service.shares["models"]
        folders = service.folders.setdefault("models", set())

        def put(key: str, data: bytes) -> None:
            if key.endswith("/"):
                folders.add(key.removesuffix("/"))
            else:
                files[key] = data

        return DictRaw(files, put)
