"""The Hugging Face Hub through the conformance suite, on a Hub in this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import HFConfig
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.hf_support import HUB_EXCEPTIONS, HubRaw
from tests.servers.hub import Hub, Repo

_numbers = itertools.count(1)

# What the Hub's own client does when it uploads, in `filesystem`.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


class HubConformance(BackendConformance):
    exceptions: ClassVar = HUB_EXCEPTIONS
    # Each is a commit, and the test Hub gives pages of 200.
    count = 450

    @pytest.fixture
    def repo(self, hub: Hub) -> Repo:
        return hub.repo(f"owner/conformance-{next(_numbers)}")

    def open(self, hub: Hub, name: str) -> Backend:
        config = HFConfig(hub.writer.token, hub.url)
        return open_backend(parse_uri(f"hf://{name}"), config, OpenOptions())

    @pytest.fixture
    def backend(self, hub: Hub, repo: Repo) -> Iterator[Backend]:
        backend = self.open(hub, repo.id)
        yield backend
        backend.close()
        assert not hub.leaks, "the content network was sent a token"
        assert not hub.failures

    @pytest.fixture
    def raw(self, hub: Hub, repo: Repo) -> HubRaw:
        return HubRaw(hub, repo)

    @pytest.fixture
    def missing_bucket_backend(self, hub: Hub) -> Iterator[Backend]:
        backend = self.open(hub, "owner/no-such-repository")
        yield backend
        backend.close()


class TestHub(HubConformance):
    pass
