"""The stores of the faulty transfers: each by its drivers, behind a proxy, and around it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from storage import AzureConfig, GCSConfig
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Request, Script
from tests.facade.stores import AzureStore, GCSStore, HubStore, S3Store, Store, s3_config
from tests.servers import NginxHTTP
from tests.servers.nginx_http import put_file, unfinished_uploads

__all__ = ["SITES", "Site", "make_site"]

SITES = (
    "s3-obstore",
    "s3-fsspec",
    "gcs-obstore",
    "gcs-fsspec",
    "azure-obstore",
    "azure-fsspec",
    "hf",
    "http",
)
"""Store and driver."""


class Site(ABC):
    """A server behind a proxy, and a fresh place on it for each transfer.

    Attributes:
        name: out of ``SITES``.
        store: whose manner the proxy's own answers have.
        lists: whether there are trees to download.
        batch: whether an upload of many objects is one step.
        vouches: whether the store vouches for the bytes of a download.
        blind: faults of an upload that nobody can see, and why.
        undoes: whether an object that arrived damaged never appears at the target.
        patience: stall timeouts that the answer to a request may take.
        proxies: those of the latest place.
    """

    name: str
    store: str
    lists = True
    batch = False
    vouches = True
    blind: ClassVar[Mapping[str, str]] = {}
    undoes = True
    patience = 1

    def __init__(self, *targets: str) -> None:
        """Know the server's URLs; a transfer gets a proxy before each of them."""
        self._targets = targets
        self.proxies: list[FaultProxy] = []

    @contextmanager
    def place(
        self, script: Script | None, change: Callable[[Request], object] | None = None
    ) -> Iterator[Store]:
        """Give a fresh, empty place, whose config leads through new proxies with ``script``.

        At the end every connection is closed, whatever hangs there.
        """
        with ExitStack() as stack:
            proxies = [
                stack.enter_context(FaultProxy(target, script, on_change=change, store=self.store))
                for target in self._targets
            ]
            self.proxies = proxies
            yield self._place(*(proxy.endpoint for proxy in proxies))

    @abstractmethod
    def _place(self, *endpoints: str) -> Store:
        """Return a fresh, empty place, by way of ``endpoints``."""

    @abstractmethod
    def reads_object(self, request: Request) -> bool:
        """Tell whether the answer's body is bytes of an object."""

    @abstractmethod
    def sends_object(self, request: Request) -> bool:
        """Tell whether the request's body is bytes of an object that the store can check."""

    def litter(self) -> list[str]:
        """Return what takes up space and is no object, as far as the server shows it."""
        return []


class S3Site(Site):
    """SeaweedFS."""

    store = "s3"

    def __init__(self, name: str, server: Any, driver: str, bucket: str) -> None:
        super().__init__(server.endpoint)
        self.name = name
        self._server, self._driver, self._bucket = server, driver, bucket

    def _place(self, *endpoints: str) -> Store:
        config = s3_config(self._server, self._driver, endpoint=endpoints[0])
        prefix = f"f{uuid4().hex}"
        return S3Store(self.name, self._server, self._driver, self._bucket, prefix, config)

    def reads_object(self, request: Request) -> bool:
        return request.method == "GET" and _path_parts(request) > 1 and _lacks(request, "list-type")

    def sends_object(self, request: Request) -> bool:
        return request.method == "PUT"

    def litter(self) -> list[str]:
        return [key for key, _ in self._server.pending_uploads(self._bucket)]


class GCSSite(Site):
    """fake-gcs-server; for obstore's uploads, which it refuses, a shim before SeaweedFS."""

    store = "gcs"

    def __init__(self, name: str, server: Any, driver: str, bucket: str) -> None:
        super().__init__(server.endpoint)
        self.name = name
        self._server, self._driver, self._bucket = server, driver, bucket

    def _place(self, *endpoints: str) -> Store:
        config = GCSConfig(
            project_id=self._server.project,
            token="any",
            endpoint_url=endpoints[0],
            driver=self._driver,  # type: ignore[arg-type]
        )
        prefix = f"f{uuid4().hex}"
        return GCSStore(self.name, self._server, self._driver, self._bucket, prefix, config)

    def reads_object(self, request: Request) -> bool:
        json = "/storage/v1/" in request.target
        return request.method == "GET" and (
            "alt=media" in request.target if json else _lacks(request, "list-type", "prefix")
        )

    def sends_object(self, request: Request) -> bool:
        return request.method == "PUT"


class ShimSite(GCSSite):
    """GCS's XML API before a SeaweedFS."""

    blind: ClassVar = {"flip_request": "the server behind the shim does not know GCS's checksums"}

    def __init__(self, name: str, shim: Any, seaweedfs: Any, bucket: str) -> None:
        super().__init__(name, shim, "obstore", bucket)
        self._behind = seaweedfs

    def _place(self, *endpoints: str) -> Store:
        config = GCSConfig(project_id="p", token="any", endpoint_url=endpoints[0], driver="obstore")
        prefix = f"f{uuid4().hex}"
        return GCSStore(self.name, self._behind, "obstore", self._bucket, prefix, config)

    def litter(self) -> list[str]:
        # Whose beginning was never answered holds nothing, and has no name to end it by.
        raw = self._behind.raw
        return [
            key
            for key, upload in self._behind.pending_uploads(self._bucket)
            if raw.list_parts(Bucket=self._bucket, Key=key, UploadId=upload).get("Parts")
        ]


class AzureSite(Site):
    """Azurite."""

    store = "azure"

    def __init__(self, name: str, server: Any, driver: str, container: str) -> None:
        super().__init__(server.endpoint)
        self.name = name
        self._server, self._driver, self._container = server, driver, container

    def _place(self, *endpoints: str) -> Store:
        endpoint = f"{endpoints[0]}/{self._server.main.name}"
        config = AzureConfig(
            *self._server.main,
            endpoint_url=endpoint,
            driver=self._driver,  # type: ignore[arg-type]
        )
        prefix = f"f{uuid4().hex}"
        return AzureStore(self.name, self._server, self._driver, self._container, prefix, config)

    def reads_object(self, request: Request) -> bool:
        return request.method == "GET" and _lacks(request, "comp", "restype")

    def sends_object(self, request: Request) -> bool:
        return request.method == "PUT" and "comp=blocklist" not in request.target

    def litter(self) -> list[str]:
        found: list[str] = self._server.uncommitted(self._container)
        return found


class HubSite(Site):
    """The test Hub: a proxy before each of its two origins."""

    name = store = "hf"
    batch = True
    # A commit is answered when all of it is written.
    patience = 10

    def __init__(self, hub: Any) -> None:
        super().__init__(hub.url, hub.cdn)
        self._hub = hub

    @contextmanager
    def place(
        self, script: Script | None, change: Callable[[Request], object] | None = None
    ) -> Iterator[Store]:
        try:
            with super().place(script, change) as store:
                yield store
        finally:
            self._hub.url, self._hub.cdn = self._targets

    def _place(self, *endpoints: str) -> Store:
        self._hub.reset()
        # The addresses that it gives out lead through the proxies too.
        self._hub.url, self._hub.cdn = endpoints
        return HubStore(self._hub)

    def reads_object(self, request: Request) -> bool:
        path = urlsplit(request.target).path
        return request.method == "GET" and ("/resolve/" in path or path.startswith("/files/"))

    def sends_object(self, request: Request) -> bool:
        # A small file goes inside the document of a commit, and nothing vouches for it.
        return request.method == "PUT"


class WebStore(Store):
    """A folder of nginx."""

    name = "http"

    def __init__(self, server: NginxHTTP, endpoint: str) -> None:
        self._server = server
        self._prefix = f"f{uuid4().hex}"
        self.base = f"{endpoint}/{self._prefix}"

    def put_raw(self, path: str, data: bytes) -> None:
        put_file(self._server.data, f"{self._prefix}/{path}", data)

    def get_raw(self, path: str) -> bytes:
        return (self._server.data / self._prefix / path).read_bytes()

    def delete_raw(self, path: str) -> None:
        (self._server.data / self._prefix / path).unlink()

    def keys(self) -> list[str]:
        folder = self._server.data / self._prefix
        found = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in found)

    def filesystem_path(self, path: str) -> str:
        return self.uri(path)


class WebSite(Site):
    """nginx before a folder."""

    name = store = "http"
    lists = False
    vouches = False
    # It stores whatever comes; what was damaged is seen when it is read back, and sent again.
    undoes = False

    def __init__(self, server: NginxHTTP) -> None:
        super().__init__(server.endpoint)
        self._server = server

    def _place(self, *endpoints: str) -> Store:
        return WebStore(self._server, endpoints[0])

    def reads_object(self, request: Request) -> bool:
        return request.method == "GET"

    def sends_object(self, request: Request) -> bool:
        return request.method == "PUT"

    def litter(self) -> list[str]:
        return unfinished_uploads(self._server.data)


def make_site(request: pytest.FixtureRequest, name: str, direction: str) -> Site:
    """Return a site out of ``SITES``; ``direction`` is ``down`` or ``up``."""
    get = request.getfixturevalue
    kind, _, driver = name.partition("-")
    if kind == "s3":
        return S3Site(name, get("seaweedfs"), driver, get("seaweedfs_bucket"))
    if name == "gcs-obstore" and direction == "up":
        return ShimSite(name, get("gcs_shim"), get("open_seaweedfs"), get("open_bucket"))
    if kind == "gcs":
        return GCSSite(name, get("gcs_server"), driver, get("gcs_bucket"))
    if kind == "azure":
        return AzureSite(name, get("azurite"), driver, get("azurite_container"))
    return HubSite(get("hub")) if kind == "hf" else WebSite(get("nginx_http"))


def _path_parts(request: Request) -> int:
    return len([part for part in urlsplit(request.target).path.split("/") if part])


def _lacks(request: Request, *parameters: str) -> bool:
    """Tell whether none of ``parameters`` is in the query: they make it no object's bytes."""
    query = urlsplit(request.target).query
    return not any(re.search(rf"(?:^|&){name}(?:=|&|$)", query) for name in parameters)
