"""HTTP and HTTPS through the conformance suite, on nginx with its WebDAV methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions
from storage.config import HTTPConfig
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.http_support import NGINX_EXCEPTIONS, FolderRaw, LiteralKeys, empty
from tests.servers.nginx_http import NginxHTTP


class NginxConformance(BackendConformance):
    exceptions: ClassVar = NGINX_EXCEPTIONS

    def url(self, server: NginxHTTP) -> str:
        return server.endpoint

    @pytest.fixture
    def bucket(self, nginx_http: NginxHTTP) -> Iterator[Path]:
        yield nginx_http.data
        empty(nginx_http.data)

    @pytest.fixture
    def backend(self, nginx_http: NginxHTTP, bucket: Path) -> Iterator[Backend]:
        location = parse_uri(f"{self.url(nginx_http)}/")
        config = HTTPConfig(ca_bundle=nginx_http.ca_file)
        backend = LiteralKeys(open_backend(location, config, OpenOptions()))
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, bucket: Path) -> FolderRaw:
        return FolderRaw(bucket)


class TestNginx(NginxConformance):
    pass


@pytest.mark.slow
class TestNginxOverTLS(NginxConformance):
    def url(self, server: NginxHTTP) -> str:
        return server.tls
